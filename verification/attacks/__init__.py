"""Attacks, the suites made of them, and the outcome of each image under each attack."""
