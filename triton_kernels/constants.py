"""Numbers that the device functions share. The oracle (mod_fused/reference) has the same limits."""

from __future__ import annotations

import triton.language as tl

#: Token ids per tile; another number would draw other tokens.
TILE = tl.constexpr(1024)
INFINITY = tl.constexpr(float("inf"))
#: Q of a token outside the support: finite, but so large that H is 0 in float32.
EXCLUDED = tl.constexpr(9.999999933815813e36)  # 1e37 in float32
SMALLEST_WEIGHT = tl.constexpr(2.0**-126)  # the least normal float32; smaller weights are 0
#: Under reverse KL a 1 - sum w no larger than the first is taken as 0; for float32 weights, no
#: larger than the second times the number of models.
WEIGHT_ROUNDING = tl.constexpr(2.0**-40)
FLOAT32_ROUNDING = tl.constexpr(2.0**-24)
#: With normalizer "zero" and a finite sup f', a token with tau + D not above it makes the row
#: invalid.
LEAST_TAU = tl.constexpr(1e-36)
#: The range of float32: a token with a smaller log pi_ref leaves the support, a smaller log-ratio
#: is set to this.
SMALLEST_LOG_REF = tl.constexpr(-80.0)
SMALLEST_LOG_RATIO = tl.constexpr(-80.0)
#: Logits whose log-sum-exp is further from 0 are shifted by a whole number, see `level_of`.
FAR_LEVEL = tl.constexpr(128.0)
#: If a prefix difference is smaller, all are shifted up together until that one is this.
SMALLEST_PREFIX_DIFFERENCE = tl.constexpr(-40.0)
