"""Exporting adapters and models to LoRA and GGUF."""
