"""Processes: launching, signals, sharding and collective operations."""
