"""Value-guided decoding: trained scorers that steer a frozen reference, token by token.

    guide = guidance.Guidance.embedded(["helpful"])                        # a trained scorer
    mod_fused.generate(models, prompts, weights=[], value_fn=guide, value_weights=[10.0])
    mod_fused.generate(models, prompts, weights=[], **guidance.fudge(classifier))

A scorer is an ordinary Hugging Face model, so transformers loads, saves and runs it.
`python -m mod_fused.guidance.train` makes those of the embedded world.
"""

from .guide import Guidance, GuidanceState
from .policy_iteration import train_mavis
from .scorers import Scorer
from .systems import controlled_decoding, fudge, mavis
from .trainer import train_scorer

__all__ = [
    "Guidance",
    "GuidanceState",
    "Scorer",
    "controlled_decoding",
    "fudge",
    "mavis",
    "train_mavis",
    "train_scorer",
]
