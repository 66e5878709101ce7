"""The exact LoRA equivalent of an adapter: its pairs, its layers and its files."""
