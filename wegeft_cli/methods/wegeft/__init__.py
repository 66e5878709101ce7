"""WeGeFT: weight changes generated from the frozen weights themselves."""
