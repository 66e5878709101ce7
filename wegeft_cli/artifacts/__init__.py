"""The file formats: adapters, checkpoints and run directories."""
