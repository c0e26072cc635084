"""Who runs a call: the backends, their torch ops, and how arguments reach them."""

from .backends import INTERPRETED

__all__ = ["INTERPRETED"]
