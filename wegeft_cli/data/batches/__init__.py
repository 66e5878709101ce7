"""Batches: sampling, packing and collation."""
