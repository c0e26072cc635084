"""Elementary functions in float32, and Philox's random numbers, as Triton device functions. In C++
they are in csrc/scalar_math.h and csrc/philox.h."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x in float32 by the hardware's 2^x. `tl.exp` takes three instructions more, for results
    below 2^-126; these are 0 here on NVIDIA."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def reciprocal(x):
    """1 / x for normal positive x below 2^126, in half the instructions of a division."""
    y = tl.math.rsqrt(x)
    y = y * y
    return y * tl.fma(-x, y, 2.0)


@triton.jit
def expm1(x):
    """e^x - 1, relatively exact near 0; saturates above 85 and below -87."""
    x = tl.minimum(tl.maximum(x, -87.0), 85.0)
    # Adding 1.5 * 2^23 rounds to an integer and puts it into the low bits, without a conversion.
    shifted = tl.fma(x, 1.44269504, 12582912.0)
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693145751953125, x)
    r = tl.fma(n, -1.42860677e-6, r)
    scale = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    # Minimax on |r| <= log(2) / 2: relative error 3e-9.
    p = r * 0.0013814540579915047 + 0.00836874544620514
    p = p * r + 0.04166838899254799
    p = p * r + 0.1666652113199234
    p = p * r + 0.4999999403953552
    return tl.fma(scale, tl.fma(r * r, p, r), scale - 1.0)


@triton.jit
def log_of(x):
    """log x for normal positive x, without the branches of tl.log."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23  # mantissa in [2/3, 4/3)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * 0.14026358723640442 - 0.1538853943347931
    p = p * f + 0.13995806872844696
    p = p * f - 0.1641596108675003
    p = p * f + 0.20011168718338013
    p = p * f - 0.2500782012939453
    p = p * f + 0.33333197236061096
    p = p * f - 0.49999937415122986
    n = exponent.to(tl.float32)
    low = tl.fma(f * f, p, n * 1.42860677e-6)
    return tl.fma(n, 0.693145751953125, low + f)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, relatively exact."""
    p = x * 0.005232692696154118 - 0.029505232349038124
    p = p * x + 0.07822594046592712
    p = p * x - 0.13663244247436523
    p = p * x + 0.19106006622314453
    p = p * x - 0.2484298199415207
    p = p * x + 0.3331909775733948
    p = p * x - 0.4999949336051941
    p = p * x + 0.9999999403953552
    return x * p


@triton.jit
def wright_omega(z):
    """v with v + log v = z, by two steps of Fritsch, Shafer and Crowley. z below -80 counts as -80:
    there v is too small to change v - z."""
    z = tl.maximum(z, -80.0)
    exp_z = exp(tl.minimum(z, 1.0))
    high = tl.maximum(z, 1.0)
    start = high - log_of(high) * (high * reciprocal(1.0 + high))
    v = tl.where(z > 1.0, start, exp_z * reciprocal(1.0 + 0.6 * exp_z))
    for _ in tl.static_range(2):
        step = (z - v - log_of(v)) * reciprocal(1.0 + v)
        twice = 2.0 * (1.0 + v + step * (1.0 + v) * (2.0 / 3.0))
        v = v * (1.0 + step * (twice - step) * reciprocal(twice - 2.0 * step))
    return v


@triton.jit
def philox(seed, position, index, stream: tl.constexpr):
    """First two words of Philox-4x32-10 (Salmon et al., SC 2011) for int64 scalars `seed` and
    `position` and int32 indices."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c2 = index.to(tl.uint32)
    c0 = tl.zeros_like(c2) + position.to(tl.uint32)
    c1 = tl.zeros_like(c2) + (position >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c2) + tl.full([], stream, tl.uint32)
    a = tl.full([], 0xD2511F53, tl.uint32)
    b = tl.full([], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(a, c0), a * c0
        high1, low1 = tl.umulhi(b, c2), b * c2
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1


@triton.jit
def split_mix(state):
    """One step of SplitMix64 on an int64 scalar."""
    x = state.to(tl.uint64) + tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    x = (x ^ (x >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return (x ^ (x >> 31)).to(tl.int64)


@triton.jit
def exponential(seed, position, index, stream: tl.constexpr):
    """E = -log1p(-v), v = (x + 0.5) 2^-64 of the 64 random bits x; positive and finite."""
    high, low = philox(seed, position, index, stream)
    v = high.to(tl.float32) * 2.3283064365386963e-10
    v = v + (low.to(tl.float32) + 0.5) * 5.421010862427522e-20
    v = tl.minimum(v, 0.99999994)
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0)))
    # log(u) with u = 1 - v rounded, plus a correction for the rounding.
    u = 1.0 - v
    lost = (1.0 - u) - v
    return tl.where(v < 0.000244140625, series, -(log_of(u) + lost / u))
