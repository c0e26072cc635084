"""Value-guided decoding: trained scorers that steer a frozen reference.

    guide = guidance.Guidance.embedded(["helpful"])                       # a trained scorer
    mod_fused.generate(models, prompts, weights=[], value_fn=guide, value_weights=[10.0])

Controlled Decoding, FUDGE and MAVIS are the same call with other scorers (`systems`); the losses
that train them are in `losses`, a trainer for any Hugging Face reference in `trainer`, MAVIS's
iterations in `mavis`. `python -m mod_fused.guidance.train` makes the scorers of the embedded world.
`blockwise_best_of_k` keeps the best of several continuations, block by block.
"""

from .blockwise import BlockwiseOutput, best_of_n, blockwise_best_of_k
from .guide import Guidance, GuidanceState
from .scorers import Scorer

__all__ = [
    "BlockwiseOutput",
    "Guidance",
    "GuidanceState",
    "Scorer",
    "best_of_n",
    "blockwise_best_of_k",
]
