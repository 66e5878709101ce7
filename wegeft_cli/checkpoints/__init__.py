"""What stays on disk: adapters, checkpoints for resuming, and merged models."""
