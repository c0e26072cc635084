"""The ensemble inside other people's programs."""
