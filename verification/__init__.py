"""Verification: attack the very file that will be served, and say what the figures are worth."""
