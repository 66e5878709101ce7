"""Labeled texts and images."""
