"""Members, the networks of an ensemble, and how their weights are kept."""
