"""Value-guided decoding: trained scorers that steer a frozen reference, token by token.

    guide = guidance.Guidance.embedded(["helpful"])                       # a trained scorer
    mod_fused.generate(models, prompts, weights=[], value_fn=guide, value_weights=[10.0])

Controlled Decoding, FUDGE and MAVIS are the same call with other scorers (`systems`); the losses
that train them are in `losses`, a trainer for any Hugging Face reference in `training`, MAVIS's
iterations in `mavis`. `python -m mod_fused.guidance.train` makes the scorers of the embedded world.
"""

from .guide import Guidance, GuidanceState
from .scorers import Scorer

__all__ = ["Guidance", "GuidanceState", "Scorer"]
