"""Which layers of a model are adapted, and what the model owns for them; for several methods."""
