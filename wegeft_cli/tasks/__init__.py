"""Learning problems that a recipe can select, one file each."""
