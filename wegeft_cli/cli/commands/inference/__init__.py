"""The commands that answer: `generate`, `chat`, `serve`."""
