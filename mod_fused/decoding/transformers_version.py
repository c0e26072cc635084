"""Which versions of transformers the decoder was tested with; it needs none for plain callables."""

from __future__ import annotations

import importlib.metadata
import re
import warnings

# The first whose caches hold linear attention too, and the newest that was tried.
OLDEST, NEWEST = (5, 5), (5, 24)


def check_transformers_version() -> None:
    """Raise ImportError for a transformers that is too old, warn about one that is too new."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
    if found < OLDEST:
        raise ImportError(
            f"mod_fused's decoder needs transformers >= {oldest}, found {version}: "
            "pip install --upgrade 'mod-fused[hf]'"
        )
    if found > NEWEST:
        warnings.warn(
            f"mod_fused's decoder was tested with transformers {oldest} to {newest}, found "
            f"{version}: compare with the models' own generate",
            stacklevel=2,
        )
