"""One module per command: where the parts meet."""
