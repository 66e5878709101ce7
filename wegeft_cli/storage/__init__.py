"""Bytes on disk: atomic files, locks, JSON and safetensors."""
