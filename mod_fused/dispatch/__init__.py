"""The backends, their torch ops, and how the arguments of a call reach them."""

from .backends import INTERPRETED

__all__ = ["INTERPRETED"]
