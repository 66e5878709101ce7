"""A YAML file becomes a typed, frozen recipe; every fault in it is told with its place."""
