"""Timing on a GPU, by one protocol for tuning and for benchmarks."""
