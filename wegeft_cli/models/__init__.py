"""The base model: loading it, and knowing it without its weights."""
