"""Judged benchmarks: MT-Bench, AlpacaEval and the judge client."""
