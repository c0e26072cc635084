"""Guidance of whole models by scores: the best of several continuations, block by block."""

from .blockwise import BlockwiseOutput, best_of_n, blockwise_best_of_k

__all__ = ["BlockwiseOutput", "best_of_n", "blockwise_best_of_k"]
