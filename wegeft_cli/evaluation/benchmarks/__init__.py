"""Benchmark families, one file each."""
