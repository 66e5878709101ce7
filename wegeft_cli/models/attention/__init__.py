"""Attention functions registered with transformers."""
