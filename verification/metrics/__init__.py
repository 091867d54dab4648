"""Figures computed from the outcomes: robust accuracy, detection, transferability."""
