"""`torch.manual_seed(seed); torch.randn(shape)` on a CPU, bit for bit, without torch.

This is what torch does on x86-64 processors with AVX2 (torch 2.x; on a processor without AVX2, and on ARM, torch itself
gives numbers that differ in the last bits, and this module still gives those of AVX2). A Mersenne Twister (MT19937)
gives 32-bit words. From 16 numbers on, each becomes a 24-bit uniform; every 16 uniforms become 16 normals (Box-Muller,
eight radii, then eight angles); if the count is no multiple of 16, the last 16 are drawn anew. Below 16 numbers, each
pair of 53-bit uniforms gives two normals in float64, of which an unused second one waits for the next such draw.

The float32 logarithm, sine and cosine are the Cephes polynomials (S. Moshier, netlib.org/cephes) with each multiply-add
fused, because that is the arithmetic of torch's build; one rounding elsewhere shows in one number in a hundred.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgedit.noise import Noise

__all__ = ["TorchNoise"]

_F32 = np.float32
Array32 = NDArray[np.float32]

_LOG = [
    _F32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
]
_LN2_LOW, _LN2_HIGH = _F32(-2.12194440e-4), _F32(0.693359375)
_SQRT_HALF = _F32(0.707106781186547524)
_FOUR_OVER_PI = _F32(1.27323954473516)
_MINUS_QUARTER_PI = [_F32(c) for c in (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)]
_SIN = [_F32(c) for c in (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)]
_COS = [_F32(c) for c in (2.443315711809948e-005, -1.388731625493765e-003, 4.166664568298827e-002)]
_TWO_PI = _F32(2.0 * math.pi)
_CHUNK = 1 << 15
_TIE, _TAIL = 0x10000000, 0x1FFFFFFF


def _fma(a: Array32 | np.float32, b: Array32, c: Array32 | np.float32) -> Array32:
    """a * b + c in float32, rounded once.

    The float64 product is exact. The float64 sum may not be, and matters only where it looks like a tie of float32:
    there it is moved to the side on which the exact sum lies.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    ties = (total.view(np.int64) & _TAIL) == _TIE
    if ties.any():
        p, t = product[ties], total[ties]
        addend = np.broadcast_to(np.asarray(c, dtype=np.float64), total.shape)[ties]
        part = t - p
        error = (p - (t - part)) + (addend - part)
        total[ties] = np.where(error > 0, np.nextafter(t, np.inf), np.where(error < 0, np.nextafter(t, -np.inf), t))
    return total.astype(_F32)


def _log(x: Array32) -> Array32:
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    e = (exponent - small).astype(_F32)
    x = (mantissa - _F32(1)) + np.where(small, mantissa, _F32(0))
    z = x * x
    y = np.full_like(x, _LOG[0])
    for coefficient in _LOG[1:]:
        y = _fma(y, x, coefficient)
    y = _fma(y * x, z, e * _LN2_LOW)
    y = y - z * _F32(0.5)
    return _fma(_LN2_HIGH, e, x + y)


def _sincos(x: Array32) -> tuple[Array32, Array32]:
    octant = ((x * _FOUR_OVER_PI).astype(np.int32) + 1) & ~1
    y = octant.astype(_F32)
    for part in _MINUS_QUARTER_PI:
        x = _fma(part, y, x)
    z = x * x
    cosine = _fma(_fma(_COS[0], z, _COS[1]), z, _COS[2]) * z
    cosine = _fma(cosine, z, z * _F32(-0.5)) + _F32(1)
    sine = _fma(_fma(_fma(_SIN[0], z, _SIN[1]), z, _SIN[2]) * z, x, x)
    swapped = (octant & 2) != 0
    sine, cosine = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(octant & 4, -sine, sine), np.where((octant - 2) & 4, cosine, -cosine)


def _box_muller(uniforms: Array32) -> Array32:
    """Sixteen uniforms to sixteen normals, row by row: float32 [M, 16] in and out."""
    radius = np.sqrt(_F32(-2) * _log(_F32(1) - uniforms[:, :8]))
    sine, cosine = _sincos(_TWO_PI * uniforms[:, 8:])
    # adding zero turns -0 into 0, as torch's last multiply-add (standard deviation 1, mean 0) does
    return np.concatenate([radius * cosine, radius * sine], axis=1) + _F32(0)


def _mersenne_twister(seed: int) -> np.random.MT19937:
    """MT19937 seeded as its authors' `init_genrand` does (Matsumoto & Nishimura 2002), and numpy's own seeding not."""
    key = np.empty(624, dtype=np.uint32)
    for index in range(624):
        key[index] = seed
        seed = (1812433253 * (seed ^ (seed >> 30)) + index + 1) & 0xFFFFFFFF
    generator = np.random.MT19937()
    generator.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    return generator


class TorchNoise(Noise):
    """torch's CPU generator; see this module. Only the low 32 bits of the seed count, as in torch."""

    kind = "torch"

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._words = _mersenne_twister(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = math.prod(shape)
        if count < 16:
            return np.array([self._single() for _ in range(count)], dtype=_F32).reshape(shape)
        uniforms = self._uniforms(count)
        out = np.empty(count, dtype=_F32)
        whole = count - count % 16
        for start in range(0, whole, _CHUNK):
            end = min(start + _CHUNK, whole)
            out[start:end] = _box_muller(uniforms[start:end].reshape(-1, 16)).reshape(-1)
        if whole != count:
            out[-16:] = _box_muller(self._uniforms(16).reshape(1, 16))[0]
        return out.reshape(shape)

    def _uniforms(self, count: int) -> Array32:
        words = self._words.random_raw(count)
        return np.asarray((words & np.uint64(0xFFFFFF)).astype(_F32) * _F32(2.0**-24), dtype=_F32)

    def _single(self) -> float:
        """One normal from two 53-bit uniforms, in float64; its twin is kept."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        words = [int(word) for word in self._words.random_raw(4)]
        first, second = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in (words[:2], words[2:]))
        radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)
