"""Base models: loading, heads, quantization and kernels."""
