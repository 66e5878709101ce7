"""Code benchmarks: problems, protocols and scoring."""
