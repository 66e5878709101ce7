"""Training runs: start, training, finalization and sweeps."""
