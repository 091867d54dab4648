"""What one training step does: DVERGE and the methods it is compared with."""
