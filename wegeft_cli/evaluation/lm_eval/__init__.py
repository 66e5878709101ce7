"""The bridge to lm-evaluation-harness."""
