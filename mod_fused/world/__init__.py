"""A small world in which "aligned to an objective" is exactly measurable.

It holds a reference model and three policies (helpful, harmless, humorous): four real Hugging Face
checkpoints of about 1 MB that share one tokenizer. Each policy was trained from the reference by
preference optimisation on its own reward. The rewards are plain functions of two strings, and the
text comes from a small grammar. `python -m mod_fused.training.embedded_policies` trains the models
again and measures them. For each reward there is also a value scorer of the reference, which
`python -m mod_fused.training.embedded_scorers` trains.

    prompt = world.prompts(1, seed=0)[0]        # "User: How do I bake bread?\\nAssistant:"
    world.reward("helpful", prompt, " Knead the dough for ten minutes.")      # 0.49
"""

from __future__ import annotations

from pathlib import Path

from .corpus import format_prompt, prompts
from .rewards import OBJECTIVES, REWARDS, reward

__all__ = ["OBJECTIVES", "REWARDS", "checkpoint", "format_prompt", "prompts", "reward", "scorer"]

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SCORERS = CHECKPOINTS / "scorers"


def checkpoint(name: str) -> Path:
    """The folder of a trained model, for `from_pretrained` of the transformers Auto classes.

    Args:
        name: "reference" or one of `OBJECTIVES`.

    Raises:
        ValueError: there is no model of that name.
        FileNotFoundError: the installation lacks the trained files.
    """
    names = ("reference", *OBJECTIVES)
    if name not in names:
        raise ValueError(f"checkpoint name must be one of {', '.join(names)}, got {name!r}")
    return _complete(CHECKPOINTS / name, "mod_fused.training.embedded_policies")


def scorer(objective: str) -> Path:
    """The folder of a trained dense scorer: a causal language model whose logits are the values of
    the next tokens. A token's value is the mean reward of the reference's responses that continue
    with it (`mod_fused.guidance`).

    Args:
        objective: one of `OBJECTIVES`.

    Raises:
        ValueError: there is no scorer for it.
        FileNotFoundError: the installation lacks the trained files.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    return _complete(SCORERS / objective, "mod_fused.training.embedded_scorers")


def _complete(folder: Path, maker: str) -> Path:
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no model; make it with: python -m {maker}")
    return folder
