"""Kernels in Triton for products that torch has no single operation for."""
