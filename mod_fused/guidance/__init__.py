"""Value-guided decoding: trained scorers that steer a frozen reference.

    guide = guidance.Guidance.embedded(["helpful"])                        # a trained scorer
    mod_fused.generate(models, prompts, weights=[], value_fn=guide, value_weights=[10.0])
    mod_fused.generate(models, prompts, weights=[], **guidance.fudge(classifier))
    guidance.blockwise_best_of_k(models, prompts, score_fn=score, k=4, block_length=8)

A scorer is an ordinary Hugging Face model, so transformers loads, saves and runs it.
`python -m mod_fused.guidance.train` makes those of the embedded world.
"""

from .blockwise import BlockwiseOutput, best_of_n, blockwise_best_of_k
from .guide import Guidance, GuidanceState
from .policy_iteration import train_mavis
from .scorers import Scorer
from .scoring import prefix_score, response_score
from .systems import controlled_decoding, fudge, mavis
from .trainer import train_scorer

__all__ = [
    "BlockwiseOutput",
    "Guidance",
    "GuidanceState",
    "Scorer",
    "best_of_n",
    "blockwise_best_of_k",
    "controlled_decoding",
    "fudge",
    "mavis",
    "prefix_score",
    "response_score",
    "train_mavis",
    "train_scorer",
]
