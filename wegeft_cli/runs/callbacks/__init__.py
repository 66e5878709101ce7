"""Callbacks of a training run, one concern each."""
