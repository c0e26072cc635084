"""Numbers that the device functions share; design §2 and §3 say why they are what they are."""

from __future__ import annotations

import triton.language as tl

#: Tile of the race in token ids; part of the definition of the random numbers (design §3).
TILE = tl.constexpr(1024)
INFINITY = tl.constexpr(float("inf"))
#: Q of a token outside the support: its ratio is 0 in float32, and it is still finite.
EXCLUDED = tl.constexpr(9.999999933815813e36)  # 1e37 in float32
SMALLEST_WEIGHT = tl.constexpr(2.0**-126)  # the least normal float32; smaller weights are 0
#: Under reverse KL a 1 - sum w that is no larger is 0; for float32 weights the second, times the
#: number of models.
WEIGHT_ROUNDING = tl.constexpr(2.0**-40)
FLOAT32_ROUNDING = tl.constexpr(2.0**-24)
#: With normalizer "zero" and a finite sup f', tokens whose tau + D is not above it break the row.
LEAST_TAU = tl.constexpr(1e-36)
#: Tokens whose log pi_ref is smaller leave the support; log ratios are clamped: float32's range.
SMALLEST_LOG_REF = tl.constexpr(-80.0)
SMALLEST_LOG_RATIO = tl.constexpr(-80.0)
#: A model whose log-sum-exp is further from 0 is shifted by a whole number, see `level_of`.
FAR_LEVEL = tl.constexpr(128.0)
#: Where a prefix difference is smaller, all are shifted up together until it is this.
SMALLEST_PREFIX_DIFFERENCE = tl.constexpr(-40.0)
