"""The f-divergences of design §2, in torch: names, parsing, and the three functions a divergence is
made of.

The solver never sees f itself. With c = sup f' (0 where f' is unbounded) a divergence is its
*deficit*

    q(d) = c - f'(e^d),        d = log(pi_i / pi_ref),

a decreasing function of the log-ratio, together with its inverse H (a ratio as a function of q) in
logarithms: `log_ratio(q) = log H(q)` and `log_slope(q) = log(-H'(q))`. Reverse KL needs none of
them: it is log-linear.
"""

from __future__ import annotations

import functools
import math
import numbers
import zlib
from typing import Any

import torch
from torch import Tensor

#: The smallest that is tested; the limit of smaller ones is reverse KL.
SMALLEST_ALPHA = 1e-3
#: Below it q is measured from f'(1) = 0: next to 1 / alpha float32 would lose its differences.
SMALL_ALPHA = 0.03


class Divergence:
    """An f-divergence whose derivative is a barrier, f'(0) = -inf, so that its mixture always has a
    solution.

    The built-in ones, and a registered one, cannot be changed. Two are equal if they are of one
    class and hold the same: a copy equals its original, another divergence of its name does not.

    Attributes:
        name: canonical name, accepted by `get_divergence` and by every backend.
        supremum: c = sup f', the value the deficit is measured from; 0 where f' has no upper bound.
        bounded: whether sup f' is finite. Then deficits are positive and Z sits next to a pole.
        clamped: whether log-ratios are clamped below at -80 and extreme prefixes are shifted
            (design §2).
        triton: the same three functions as Triton device functions of (x, a), where a is to be
            ignored; None: the `triton` backend cannot run it.
    """

    name: str
    supremum: float = 0.0
    bounded: bool = False
    clamped: bool = True
    triton: tuple[Any, Any, Any] | None = None

    def __repr__(self) -> str:
        return f"<divergence {self.name}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Divergence) and _same(self, other)

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    def __setattr__(self, name: str, value: object) -> None:
        if is_built_in(self) or any(known is self for known in _CANONICAL.values()):
            raise AttributeError(f"{self!r} cannot be changed, got {name} = {value!r}")
        object.__setattr__(self, name, value)

    def deficit(self, d: Tensor) -> Tensor:
        """q(d) = c - f'(e^d), elementwise."""
        raise NotImplementedError(f"{self.name} is log-linear and has no deficit form")

    def log_ratio(self, q: Tensor) -> Tensor:
        """log H(q), the inverse of `deficit`, elementwise."""
        raise NotImplementedError(f"{self.name} is log-linear and has no deficit form")

    def log_slope(self, q: Tensor) -> Tensor:
        """log(-H'(q)), elementwise."""
        raise NotImplementedError(f"{self.name} is log-linear and has no deficit form")


class ReverseKL(Divergence):
    """f(x) = x log x: pi* is proportional to pi_ref^(1 - sum w) prod pi_i^w_i exp(sum v V)."""

    name = "reverse_kl"
    clamped = False


class ForwardKL(Divergence):
    """f(x) = -log x, f'(x) = -1/x."""

    name = "forward_kl"
    bounded = True

    def deficit(self, d: Tensor) -> Tensor:
        return torch.exp(-d)

    def log_ratio(self, q: Tensor) -> Tensor:
        return -torch.log(q)

    def log_slope(self, q: Tensor) -> Tensor:
        return -2.0 * torch.log(q)


class JensenShannonDivergence(Divergence):
    """f(x) = x log x - (x + 1) log((x + 1)/2), f'(x) = log 2 + log(x / (1 + x))."""

    name = "jsd"
    supremum = math.log(2.0)
    bounded = True
    clamped = False  # q is linear for very negative d: nothing overflows

    def deficit(self, d: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-d)

    def log_ratio(self, q: Tensor) -> Tensor:
        # -log(expm1 q), written so that a large q does not overflow.
        return -(q + torch.log(-torch.expm1(-q)))

    def log_slope(self, q: Tensor) -> Tensor:
        return -q - 2.0 * torch.log(-torch.expm1(-q))


class AlphaDivergence(Divergence):
    """f(x) = (x^(1-a) - (1-a) x - a) / (a (a-1)), f'(x) = (1 - x^-a) / a, for 0 < a < 1.

    Raises:
        ValueError: if `alpha` is not strictly between 0 and 1, or below 0.001.
    """

    alpha: float

    def __init__(self, alpha: float = 0.5) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
            raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
        if alpha < SMALLEST_ALPHA:
            raise ValueError(
                f"alpha must be at least {SMALLEST_ALPHA}, got {alpha}; "
                "the limit of smaller ones is reverse_kl"
            )
        object.__setattr__(self, "alpha", float(alpha))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"alpha:{self.alpha!r}"

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.alpha >= SMALL_ALPHA

    @property
    def supremum(self) -> float:  # type: ignore[override]
        return 1.0 / self.alpha if self.bounded else 0.0

    def deficit(self, d: Tensor) -> Tensor:
        exp = torch.exp if self.bounded else torch.expm1
        return exp(-self.alpha * d) / self.alpha

    def log_ratio(self, q: Tensor) -> Tensor:
        log = torch.log if self.bounded else torch.log1p
        return log(self.alpha * q) / -self.alpha

    def log_slope(self, q: Tensor) -> Tensor:
        return (1.0 + self.alpha) * self.log_ratio(q)


class JeffreyDivergence(Divergence):
    """f(x) = (x - 1) log x, f'(x) = log x - 1/x + 1; f' is unbounded, so c = 0 and q = -f'."""

    name = "jeffrey"

    def deficit(self, d: Tensor) -> Tensor:
        return torch.expm1(-d) - d

    def log_ratio(self, q: Tensor) -> Tensor:
        # v = 1/x solves v + log v = 1 + q. Both forms are log x; -log v alone cancels where v is
        # large, v - z alone where v is small.
        z = 1.0 + q
        v = wright_omega(z)
        return torch.where(z > 0, -torch.log(v), v - z)

    def log_slope(self, q: Tensor) -> Tensor:
        log_x = self.log_ratio(q)
        return 2.0 * log_x - torch.nn.functional.softplus(log_x)


def wright_omega(z: Tensor) -> Tensor:
    """The Wright omega function for real z, elementwise: the solution v of v + log v = z.

    Two steps of the quartically convergent iteration of Fritsch, Shafer and Crowley. Below -80 the
    result is e^-80 (its only use here is v - z, where that no longer shows).
    """
    z = z.clamp(min=-80.0)
    exp_z = torch.exp(z.clamp(max=1.0))
    log_z = torch.log(z.clamp(min=1.0))
    v = torch.where(z > 1.0, z - log_z * (z / (1.0 + z)), exp_z / (1.0 + 0.6 * exp_z))
    for _ in range(2):
        residual = z - v - torch.log(v)
        step = residual / (1.0 + v)
        double = 2.0 * (1.0 + v + residual * (2.0 / 3.0))
        v = v * (1.0 + step * (double - step) / (double - 2.0 * step))
    return v


#: In the order of their numbers, by which the ops know them; csrc/divergence.h has the same.
_BUILT_IN = (ReverseKL, ForwardKL, JensenShannonDivergence, AlphaDivergence, JeffreyDivergence)
_ALPHA = _BUILT_IN.index(AlphaDivergence)
#: By number and by name: the built-in ones but alpha, of which there are many, and the registered.
_NUMBERED: dict[int, Divergence] = {
    number: kind() for number, kind in enumerate(_BUILT_IN) if number != _ALPHA
}
_CANONICAL: dict[str, Divergence] = {d.name: d for d in _NUMBERED.values()}
_NUMBERS: dict[str, int] = {d.name: number for number, d in _NUMBERED.items()}
#: What doctor, the benchmarks and the tests go through; of the alpha-divergences one.
DIVERGENCES: tuple[str, ...] = tuple(
    _NUMBERED.get(number, AlphaDivergence(0.5)).name for number in range(len(_BUILT_IN))
)
_ALIASES = {
    "kl": "reverse_kl",
    "rkl": "reverse_kl",
    "kl_reverse": "reverse_kl",
    "fkl": "forward_kl",
    "kl_forward": "forward_kl",
    "js": "jsd",
    "jensen_shannon": "jsd",
    "jeffreys": "jeffrey",
    "alpha": "alpha:0.5",
}
_NO_BARRIER = {
    "tv": "total variation",
    "total_variation": "total variation",
    "chi2": "chi-squared",
    "chi_squared": "chi-squared",
    "chi_square": "chi-squared",
    "pearson": "chi-squared",
    "pearson_chi2": "chi-squared",
}
_SUPPORTED = ", ".join(DIVERGENCES).replace("alpha:0.5", "alpha:A with 0 < A < 1")
_EXPECTED = (
    "divergence must be a name, one of mod_fused's five divergences or a registered one "
    "(register_divergence)"
)


def _parse(name: str) -> Divergence:
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    key = _ALIASES.get(key, key)
    if key in _CANONICAL:
        return _CANONICAL[key]
    if key in _NO_BARRIER:
        raise ValueError(
            f"divergence {name!r} is refused: the derivative of {_NO_BARRIER[key]} is finite at 0 "
            "(f is not a barrier function), so policies do not determine the mixture's optimum; "
            f"the divergences that work are {_SUPPORTED}"
        )
    if key.startswith("alpha:"):
        text = name.strip().split(":", 1)[1]
        try:
            alpha = float(text)
        except ValueError:
            raise ValueError(
                f"divergence 'alpha:A' needs a number A with 0 < A < 1, got {name!r}"
            ) from None
        return AlphaDivergence(alpha)
    raise ValueError(f"unknown divergence {name!r}; the divergences that work are {_SUPPORTED}")


def get_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence of a name or alias, or the known one that equals a `Divergence`.

    Args:
        divergence: `reverse_kl` (`kl`, `rkl`), `forward_kl` (`fkl`), `jsd` (`js`,
            `jensen_shannon`), `alpha:A` with 0 < A < 1, `jeffrey` (`jeffreys`), or a `Divergence`
            object: of one of the five classes itself, or equal to a registered one.

    Raises:
        ValueError: for an unknown name, for total variation and chi-squared, which are not
            barriers, and for an object of the five classes that was changed.
        TypeError: if the argument is neither a string nor a known `Divergence`.
    """
    if type(divergence) is str and divergence in _CANONICAL:
        return _CANONICAL[divergence]
    if isinstance(divergence, str):
        return _parse(divergence)
    if not isinstance(divergence, Divergence):
        raise TypeError(f"{_EXPECTED}, got {type(divergence).__name__}")
    if is_built_in(divergence):
        built_in = type(divergence)
        alpha = (getattr(divergence, "alpha", None),) if built_in is AlphaDivergence else ()
        known = built_in(*alpha)
        if not _same(known, divergence):
            raise ValueError(f"an object of {built_in.__name__} holds what its class did not set")
        return known
    name = getattr(divergence, "name", None)
    registered = _CANONICAL.get(name) if isinstance(name, str) else None
    if registered is None or not _same(registered, divergence):
        unequal = "" if registered is None else ", which is not the registered one of that name"
        raise TypeError(f"{_EXPECTED}, got {type(divergence).__name__} {name!r}{unequal}")
    return registered


def _same(one: Divergence, other: Divergence) -> bool:
    """Whether both are of one class and hold the same: a name alone says nothing."""
    if one is other or type(one) is not type(other):
        return one is other
    # What they hold, and what pickle would make each anew from: a class may hide either.
    held = _equal(getattr(one, "__dict__", {}), getattr(other, "__dict__", {}))
    return held and _equal(one.__reduce_ex__(2)[:3], other.__reduce_ex__(2)[:3])


def _equal(x: Any, y: Any) -> bool:
    """x == y; containers entry by entry, tensors and arrays whole."""
    if type(x) is not type(y):
        return False
    if isinstance(x, (float, int, str)):
        return x == y
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(map(_equal, x, y))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_equal(x[key], y[key]) for key in x)
    equal: Any = getattr(x, "shape", None) == getattr(y, "shape", None) and x == y
    return bool(equal.all() if hasattr(equal, "all") else equal)


def is_built_in(divergence: Divergence) -> bool:
    """Whether it is one of the five that every backend knows; a subclass of them is not."""
    return type(divergence) in _BUILT_IN


def number_of(divergence: Divergence) -> int:
    """The number by which the ops know a divergence that `get_divergence` returned. A registered
    one's comes from its name: a saved graph means the same in every process."""
    return _ALPHA if type(divergence) is AlphaDivergence else _NUMBERS[divergence.name]


def alpha_of(divergence: Divergence) -> float:
    """The alpha of an alpha-divergence; 1 for every other, where nothing reads it."""
    return divergence.alpha if type(divergence) is AlphaDivergence else 1.0


def divergence_of(number: int, alpha: float) -> Divergence:
    """The divergence of a number; `alpha` counts for the alpha-divergence only.

    Raises:
        ValueError: if none is registered under it in this process.
    """
    if number == _ALPHA:
        return _alpha(alpha)
    if number not in _NUMBERED:
        raise ValueError(
            f"divergence number {number} belongs to none that is registered in this process "
            "(register_divergence)"
        )
    return _NUMBERED[number]


_alpha = functools.lru_cache(AlphaDivergence)


def register_divergence(divergence: Divergence) -> Divergence:
    """Makes a divergence of your own known under its name, to `sample`, `log_probs`, `generate` and
    the command line.

    The three functions must belong to one f whose derivative is a barrier, f'(0) = -inf:

        deficit(d) = c - f'(e^d), decreasing in d,    c = sup f', or 0 where f' has no upper bound
        log_ratio(q) = log H(q),   log_slope(q) = log(-H'(q)),   H(deficit(d)) = e^d

    They are called with float32 and float64 tensors of any shape and must be accurate to float32
    rounding over -80 <= d <= 80. The `torch` backend runs them on any device; with `triton` set,
    the `triton` backend runs those. The `cpu` backend knows the five built-in divergences only.

    Args:
        divergence: an object of a subclass of `Divergence`. Its name is lower case and new. It can
            no longer be changed; a copy of it counts as itself.

    Returns:
        The same object.

    Raises:
        TypeError: if it is no `Divergence`, or lacks a function.
        ValueError: if the name is taken or cannot be typed, or the functions contradict each other.
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"expected an object of a subclass of Divergence, got {type(divergence).__name__}"
        )
    name = getattr(divergence, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise ValueError(f"the name of a divergence must be a lower-case identifier, got {name!r}")
    number = len(_BUILT_IN) + zlib.crc32(name.encode())
    same_number = _NUMBERED.get(number, divergence).name != name
    if name in _CANONICAL or name in _ALIASES or name in _NO_BARRIER or same_number:
        raise ValueError(f"the name {name!r} is taken")
    for function in ("deficit", "log_ratio", "log_slope"):
        if getattr(type(divergence), function) is getattr(Divergence, function):
            raise TypeError(f"divergence {name!r} does not define {function}")
    if divergence.triton is not None and len(divergence.triton) != 3:
        raise ValueError(
            "triton must hold deficit, log_ratio and log_slope as device functions, "
            f"got {len(divergence.triton)} of them"
        )
    _check_functions(divergence)
    _CANONICAL[name] = _NUMBERED[number] = divergence
    _NUMBERS[name] = number
    return divergence


def _check_functions(divergence: Divergence) -> None:
    """Refuses functions that are not each other's inverse and slope."""
    d = torch.linspace(-8.0, 8.0, 33, dtype=torch.float64, device="cpu")
    q = divergence.deficit(d)
    if not bool((q[1:] < q[:-1]).all()):
        raise ValueError(f"the deficit of {divergence.name!r} must decrease with d")
    if divergence.bounded and not bool((q > 0).all()):
        raise ValueError(f"the deficit of {divergence.name!r} must be positive: it is bounded")
    if not torch.allclose(divergence.log_ratio(q), d, rtol=0.0, atol=1e-3):
        raise ValueError(f"log_ratio of {divergence.name!r} is not the inverse of its deficit")
    step = 1e-5 * q.abs().clamp(min=1e-3)
    high, low = divergence.log_ratio(q + step), divergence.log_ratio(q - step)
    slope = torch.log((torch.exp(low) - torch.exp(high)) / (2.0 * step))
    if not torch.allclose(divergence.log_slope(q), slope, rtol=0.0, atol=1e-2):
        raise ValueError(f"log_slope of {divergence.name!r} is not log(-H') of its log_ratio")
