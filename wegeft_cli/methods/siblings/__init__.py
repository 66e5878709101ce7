"""Affine edits of a linear layer's output, each on one page: RED, SSF, 1LoRA, tied LoRA, LoReFT."""
