"""Merging adapters into base models."""
