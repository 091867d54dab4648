"""Threads, processes and CUDA graphs that share the work of a step."""
