"""The entry point of the command `mod-fused`."""

from .app.main import main

__all__ = ["main"]
