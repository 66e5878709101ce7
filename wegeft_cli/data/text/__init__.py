"""Text rows: templates, tokens, masks, caching and streaming."""
