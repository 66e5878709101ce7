"""Loaded models, prompts, generation and chat."""
