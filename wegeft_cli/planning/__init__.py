"""Checks and estimates made before any weight is read."""
