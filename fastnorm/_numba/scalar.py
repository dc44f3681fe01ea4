"""The arithmetic of one element, of one statistic and of one merge: plain functions.

`cpu` and `gpu` compile these same functions, and so can anybody: inside a function of your own
that Numba compiles they can be called once `fastnorm._numba.cpu` has been imported. They compute
what the Cython kernels do, in the same order (the headers in `_core` are their twins).

A number is float32 or float64; float16 and bfloat16 come and go as their 16 bits. Moments are five
numbers of float64: count, mean and the rest of the mean, sum of squared deviations and its rest.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# What a float32 scale must lie between for its products to keep all their digits: 2^-100 and 2^100.
LEAST, MOST = 7.9e-31, 1.3e30


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once: a compiler's own instruction takes the place of this."""
    if isinstance(a, np.float32):
        return np.float32(float(a) * float(b) + float(c))
    return np.float64(np.longdouble(a) * np.longdouble(b) + np.longdouble(c))


def mac(a: Any, b: Any, c: Any) -> Any:
    """The same in sums, where a rounding more is nothing: never slower than * and +."""
    return a * b + c


# --- Moments --------------------------------------------------------------------------------------


def two_sum(a: Any, b: Any) -> Any:
    """a + b and what rounding lost of it (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def moments_of_sums(count: Any, first: Any, second: Any, pivot: Any) -> Any:
    """Mean, its rest and M2 from the sums of x - pivot and of its square, and whether to try again.

    Squares cancel where the mean is 64 standard deviations or more from the pivot: a mean would
    lose more than 2^-44 deviations, three units of an output of 2^-20. Sum again, about that mean.
    """
    if count == 0.0:
        return 0.0, 0.0, 0.0, False
    d = first / count
    m2 = fma(-first, d, second)
    mean = pivot + d
    back = mean - pivot
    rest = (pivot - (mean - back)) + (d - back) + fma(-count, d, first) / count
    again = not first * d <= 4096.0 * m2
    return mean, rest, 0.0 if m2 <= 0.0 else m2, again


def merge(one: Any, other: Any) -> Any:
    """Moments of two disjoint parts together (Chan, Golub, LeVeque 1979); either may be empty."""
    count, mean, rest, m2, m2_rest = one
    other_count, other_mean, other_rest, other_m2, other_m2_rest = other
    total = count + other_count
    f = other_count / total if total > 0.0 else 0.0
    extra = other_rest - rest
    delta = other_mean - mean
    whole = delta + extra
    together = mean + other_mean
    mean, lost = two_sum(mean, delta * f)
    # to an infinity there are no differences: it stays, or it is no number
    mean = mean if abs(delta) < math.inf else together
    m2, lost_2 = two_sum(m2, other_m2)
    m2, lost_3 = two_sum(m2, whole * whole * (count * f))
    return total, mean, (rest + lost) + extra * f, m2, ((m2_rest + lost_2) + lost_3) + other_m2_rest


def inverse_root(v: Any, rest: Any) -> Any:
    """1 / sqrt(v + rest), to half a unit: sqrt and / round twice, one Newton step mends it."""
    if not (v > 0.0 and v < math.inf):
        return math.inf if v == 0.0 else (math.nan if v != v or v < 0.0 else 0.0)
    r = 1.0 / math.sqrt(v)
    product = v * r
    error = fma(-product, r, 1.0) - fma(v, r, -product) * r - rest * r * r
    return r + 0.5 * r * error


def holds(scale: Any) -> Any:
    """Whether a float32 can take a scale, or that times a weight, and keep its digits; or NaN."""
    return not (abs(scale) <= LEAST or abs(scale) >= MOST) or scale == 0.0


# --- Output ---------------------------------------------------------------------------------------


def apply(x: Any, hi: Any, r: Any, shift: Any) -> Any:
    """(x - mean) rstd; mean = hi + lo, `shift` = -lo rstd: x - hi is exact where it matters.

    With rstd * weight for `r` and bias - lo * rstd * weight for `shift` the affine step is in it.
    """
    return fma(x - hi, r, shift)


def apply_back(x: Any, dy: Any, hi: Any, r: Any, shift: Any, wr: Any, c1: Any, c2: Any) -> Any:
    """dx = rstd (weight dy - mean(weight dy) - xhat mean(weight dy xhat)): wr = weight rstd.

    `c1` and `c2` are the two means times rstd.
    """
    return fma(-fma(x - hi, r, shift), c2, fma(dy, wr, -c1))


# --- float16 and bfloat16 -------------------------------------------------------------------------


def from_bf16(h: Any) -> Any:
    """float32 of the 16 bits of a bfloat16: those of a float32 cut short."""
    return np.uint32(np.uint32(h) << np.uint32(16)).view(np.float32)


def to_bf16(x: Any) -> Any:
    """The 16 bits of a bfloat16: to nearest, ties to even; a NaN stays one."""
    u = np.float32(x).view(np.uint32)
    rounded = np.uint32(u + np.uint32(0x7FFF) + (np.uint32(u >> np.uint32(16)) & np.uint32(1)))
    nan = np.uint32(u | np.uint32(0x400000))
    return np.uint16(np.uint32(nan if x != x else rounded) >> np.uint32(16))


def from_f16(h: Any) -> Any:
    """float32 of the 16 bits of a float16. A subtraction normalises what is subnormal."""
    magnitude = np.uint32((np.uint32(h) & np.uint32(0x7FFF)) << np.uint32(13))
    exponent = np.uint32(magnitude & np.uint32(0x0F800000))
    normal = np.uint32(magnitude + np.uint32(112 << 23))
    special = np.uint32(normal + np.uint32(112 << 23))
    shifted = np.uint32(magnitude + np.uint32(113 << 23)).view(np.float32)
    subnormal = np.float32(shifted - np.float32(2.0**-14)).view(np.uint32)
    u = subnormal if exponent == 0 else normal
    u = special if exponent == np.uint32(0x0F800000) else u
    sign = np.uint32((np.uint32(h) & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(np.uint32(u) | sign).view(np.float32)


def to_f16(x: Any) -> Any:
    """The 16 bits of a float16: to nearest, ties to even; below 2^-14 adding 0.5 rounds."""
    u = np.float32(x).view(np.uint32)
    magnitude = np.uint32(u & np.uint32(0x7FFFFFFF))
    half = np.float32(magnitude.view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(half.view(np.uint32) - np.uint32(0x3F000000))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(112 << 23))
    normal = np.uint32(rounded >> np.uint32(13))
    special = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    h = subnormal if magnitude < np.uint32(0x38800000) else normal
    h = special if magnitude >= np.uint32(0x47800000) else h
    return np.uint16(
        np.uint32(h) | np.uint32(np.uint32(u & np.uint32(0x80000000)) >> np.uint32(16))
    )


# --- Activations ----------------------------------------------------------------------------------
# float32: branch-free, so that loops over them vectorise; the polynomials are Chebyshev
# interpolants (their errors stand in _core/activations.h). float64: the C library's functions.


def _scaled(k: Any) -> Any:
    """2^k as a float32, -126 <= k <= 127; infinite for 128."""
    return np.uint32(np.uint32(k + np.int32(127)) << np.uint32(23)).view(np.float32)


def _within32(x: Any, largest: Any) -> Any:
    """x, or the number of its sign whose bits are `largest`, where that is nearer to zero.

    Not a number becomes one. In integers: of comparisons of floats LLVM makes masks.
    """
    bits = np.float32(x).view(np.uint32)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    size = largest if size > largest else size
    return np.uint32(np.uint32(bits & np.uint32(0x80000000)) | size).view(np.float32)


def _exp_parts(x: Any) -> Any:
    """k and p such that e^x = 2^k p, sqrt(1/2) <= p <= sqrt(2), |x| <= 104."""
    magic = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
    shifted = fma(x, np.float32(1.44269504), magic)
    n = np.float32(shifted - magic)
    r = fma(n, np.float32(-0.693359375), x)  # ln 2 in two parts: the first has 9 bits
    r = fma(n, np.float32(2.12194440e-4), r)
    p = np.float32(1.3934545e-3)
    p = fma(p, r, np.float32(8.3637768e-3))
    p = fma(p, r, np.float32(4.1666456e-2))
    p = fma(p, r, np.float32(1.6666573e-1))
    p = fma(p, r, np.float32(0.5))
    p = np.float32(fma(np.float32(p * r), r, r) + np.float32(1.0))
    return np.int32(n), p


def exp32(x: Any) -> Any:
    """e^x of a float32; 2^k in two halves, so that results below 2^-126 come out subnormal.

    Of what is not a number it is one: who calls it sees to that.
    """
    k, p = _exp_parts(_within32(x, np.uint32(0x42D00000)))  # 104
    half = np.int32(k >> np.int32(1))
    return np.float32(np.float32(p * _scaled(half)) * _scaled(np.int32(k - half)))


def _one_and_exp32(x: Any) -> Any:
    """1 + e^x, to half a unit of 1 at least: 2^k in one piece, infinite from k = 128 on."""
    k, p = _exp_parts(_within32(x, np.uint32(0x42B20000)))  # 89
    k = np.int32(-126) if k < np.int32(-126) else k
    return fma(p, _scaled(k), np.float32(1.0))


def relu(x: Any) -> Any:
    """max(x, 0); keeps NaN."""
    return np.float32(0.0) if x < 0.0 else x


relu_32 = relu_64 = relu


def relu6(x: Any) -> Any:
    """min(max(x, 0), 6); keeps NaN."""
    return np.float32(6.0) if x > 6.0 else relu(x)


relu6_32 = relu6_64 = relu6


def silu_32(x: Any) -> Any:
    """x / (1 + e^-x) of a float32."""
    return np.float32(x / _one_and_exp32(np.float32(-x)))


def _erfc_factor32(t: Any) -> Any:
    """g of erfc(t) = e^(-t^2) g/(1 + 2t), a polynomial of (t - 2)/(t + 2)."""
    q = np.float32((t - np.float32(2.0)) / (t + np.float32(2.0)))
    g = np.float32(-0.000404705759)
    g = fma(g, q, np.float32(-0.00123237038))
    g = fma(g, q, np.float32(0.00132110389))
    g = fma(g, q, np.float32(0.00863596704))
    g = fma(g, q, np.float32(-0.00806384347))
    g = fma(g, q, np.float32(-0.0542061627))
    g = fma(g, q, np.float32(0.164056093))
    g = fma(g, q, np.float32(-0.166031197))
    g = fma(g, q, np.float32(-0.09276402))
    return fma(g, q, np.float32(1.27697837))


def gelu_32(x: Any) -> Any:
    """x Phi(x) of a float32, Phi(x) = erfc(-x/sqrt(2))/2: the tail keeps its relative precision."""
    a = abs(x)
    a = np.float32(15.0) if a > np.float32(15.0) else a
    t = np.float32(a * np.float32(0.70710678))
    g = _erfc_factor32(t)
    s = np.float32(a * a)
    rest = fma(a, a, np.float32(-s))  # what a * a lost, restored below
    e = np.float32(exp32(np.float32(np.float32(-0.5) * s)))
    e = np.float32(np.float32(np.float32(0.5) * g) * e)
    e = np.float32(e * (np.float32(1.0) - np.float32(0.5) * rest))
    tail = np.float32(e / (np.float32(1.0) + np.float32(2.0) * t))
    return np.float32(x * (tail if x < np.float32(0.0) else np.float32(np.float32(1.0) - tail)))


def gelu_tanh_32(x: Any) -> Any:
    """x (1 + tanh(u))/2 = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3), of a float32."""
    u2 = np.float32(x * fma(np.float32(x * x), np.float32(0.0713548163), np.float32(1.59576912)))
    return np.float32(x / _one_and_exp32(np.float32(-u2)))


def tanh_32(x: Any) -> Any:
    """Hyperbolic tangent of a float32: an odd polynomial, from 0.625 on by e^(-2|x|)."""
    a = abs(x)
    z = np.float32(x * x)
    p = np.float32(2.27260613e-3)
    p = fma(p, z, np.float32(-8.3262939e-3))
    p = fma(p, z, np.float32(2.17635911e-2))
    p = fma(p, z, np.float32(-5.39586172e-2))
    p = fma(p, z, np.float32(1.33333012e-1))
    p = fma(p, z, np.float32(-3.33333343e-1))
    small = fma(np.float32(x * z), p, x)
    e = np.float32(exp32(np.float32(np.float32(-2.0) * a)))
    large = np.float32((np.float32(1.0) - e) / (np.float32(1.0) + e))
    large = np.float32(-large) if x < np.float32(0.0) else large
    return large if a >= np.float32(0.625) else small  # not a number stays so


def erf_32(x: Any) -> Any:
    """Error function of a float32: an odd polynomial, from 0.875 on 1 - erfc(|x|)."""
    a = abs(x)
    z = np.float32(x * x)
    p = np.float32(8.67543131e-5)
    p = fma(p, z, np.float32(-8.21111375e-4))
    p = fma(p, z, np.float32(5.20674838e-3))
    p = fma(p, z, np.float32(-2.68615857e-2))
    p = fma(p, z, np.float32(1.1283733e-1))
    p = fma(p, z, np.float32(-3.76126349e-1))
    p = fma(p, z, np.float32(1.28379166e-1))
    small = fma(x, p, x)
    t = _within32(a, np.uint32(0x40800000))  # 4
    e = np.float32(exp32(np.float32(-np.float32(t * t))))
    tail = np.float32(np.float32(_erfc_factor32(t) * e) / (np.float32(1.0) + np.float32(2.0) * t))
    large = np.float32(np.float32(1.0) - tail)
    large = np.float32(-large) if x < np.float32(0.0) else large
    return large if a >= np.float32(0.875) else small  # not a number stays so


def _one_and_exp64(x: Any) -> Any:
    return 1.0 + (math.exp(x) if x < 709.0 else (x if x != x else math.inf))


def silu_64(x: Any) -> Any:
    """x / (1 + e^-x) of a float64."""
    return x / _one_and_exp64(-x)


def gelu_64(x: Any) -> Any:
    """x Phi(x) of a float64."""
    return x * 0.5 * math.erfc(x * -0.70710678118654752440)


def gelu_tanh_64(x: Any) -> Any:
    """x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3), of a float64."""
    return x / _one_and_exp64(-1.5957691216057307 * fma(0.044715 * x, x * x, x))


def tanh_64(x: Any) -> Any:
    """Hyperbolic tangent of a float64."""
    return math.tanh(x)


def erf_64(x: Any) -> Any:
    """Error function of a float64."""
    return math.erf(x)
