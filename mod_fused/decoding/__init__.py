"""The multi-model decoder: an ensemble of language models, and `generate`."""
