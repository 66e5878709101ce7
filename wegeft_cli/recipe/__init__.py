"""Load a YAML file as a typed, frozen recipe, and report every fault with its place."""
