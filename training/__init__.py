"""Training: members, DVERGE and the run directory."""
