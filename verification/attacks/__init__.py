"""Attacks, the suites made of them, and what they came to for each image."""
