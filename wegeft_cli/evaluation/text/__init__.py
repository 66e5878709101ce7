"""Text benchmarks: test sets, protocols and answer extraction."""
