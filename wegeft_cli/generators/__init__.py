"""The method: weight changes generated from the frozen weights themselves."""
