"""The exact LoRA equivalent of a WeGeFT adapter: its pairs, its layers and its files."""
