"""The parser of the command line, and the types of its options: each converts a text, or says
what was expected."""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..decoding.loading import missing_folder
from ..divergence import get_divergence

DTYPES = ("auto", "float32", "bfloat16", "float16")


class UsageError(ValueError):
    """An argument that does not fit; its text is the one line that the user sees."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def divergence(text: str) -> str:
    try:
        return get_divergence(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names that torch is about to drop
            device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda, cuda:1, ..., got {text!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # torch raises whatever it likes for a device that it cannot use
        raise argparse.ArgumentTypeError(
            f"torch cannot use {text!r} on this machine ({type(error).__name__})"
        ) from error
    return text


def model(text: str) -> str:
    if missing_folder(text):
        raise argparse.ArgumentTypeError(f"the folder {text} does not exist")
    return text


def whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return convert


def plausibility(text: str) -> float | str | None:
    """A number in (0, 1], "auto", or None for "off"."""
    if text in ("auto", "off"):
        return None if text == "off" else text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number <= 1.0:
        raise argparse.ArgumentTypeError(f"expected off or a number in (0, 1], got {text!r}")
    return number


def names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return names


def each(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [convert(name) for name in dict.fromkeys(names(text))]


def minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0.0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of minutes > 0, got {text!r}")
    return minutes


def numbers(text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between, got {text!r}")
    return found
