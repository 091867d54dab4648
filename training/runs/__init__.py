"""The run directory: its files, its lock, `latest`, TensorBoard events."""
