"""Data: sources, text, labeled examples and batches."""
