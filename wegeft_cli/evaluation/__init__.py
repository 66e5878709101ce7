"""Benchmarks, answers and scores."""
