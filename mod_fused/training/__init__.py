"""Training: scorers for value guidance, and the models of the embedded world."""
