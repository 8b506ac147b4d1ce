"""Noise: the torch stream to the bit, Philox against its published vectors and its own specification."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from edgedit.errors import InputError
from edgedit.noise import KINDS, NoiseBatch, make_noise, philox_4x32
from edgedit.noise_torch import _box_muller, _fma

SEED = random.SystemRandom().randrange(2**63)
SEEDS = [0, 1, 2**32 - 1, 2**32 + 5, 2**63, 2**64 - 1, pytest.param(SEED, id="fresh")]

x86_with_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch itself gives other last bits on this processor",
)


def assert_same_bits(ours: np.ndarray, theirs: torch.Tensor, note: str) -> None:
    assert ours.dtype == np.float32, note
    expected = theirs.numpy()
    assert ours.shape == expected.shape, note
    different = int((ours.view(np.int32) != expected.view(np.int32)).sum())
    assert different == 0, f"{note}: {different} of {ours.size} numbers differ"


@x86_with_avx2
@pytest.mark.parametrize("seed", SEEDS)
def test_torch_noise_equals_torch_randn_to_the_bit_over_many_draws_of_mixed_sizes(seed: int) -> None:
    noise = make_noise("torch", seed)
    torch.manual_seed(seed)
    draw = random.Random(SEED)
    sizes = [*range(1, 50), *draw.sample(range(1, 17), 16), *(draw.randrange(1, 4101) for _ in range(60)), 3, 70001, 5]
    for size in sizes:
        assert_same_bits(noise.normal((size,)), torch.randn(size), f"seed {seed}, {size} numbers, draws by {SEED}")


@x86_with_avx2
@pytest.mark.full
def test_torch_noise_equals_torch_randn_for_every_size_up_to_4100() -> None:
    noise = make_noise("torch", SEED)
    torch.manual_seed(SEED)
    for size in range(1, 4101):
        assert_same_bits(noise.normal((size,)), torch.randn(size), f"seed {SEED}, {size} numbers")


@x86_with_avx2
def test_torch_noise_equals_torch_randn_on_a_large_draw() -> None:
    shape = (3, 33, 127, 65)
    torch.manual_seed(SEED)
    assert_same_bits(make_noise("torch", SEED).normal(shape), torch.randn(shape), f"seed {SEED}")


@x86_with_avx2
def test_torch_noise_equals_what_a_diffusers_pipeline_draws() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    noise, generator = make_noise("torch", SEED), torch.Generator().manual_seed(SEED)
    for shape in ((1, 4, 17, 9), (1, 1, 2, 3), (2, 32, 8, 8), (1, 1, 1, 5)):
        assert_same_bits(noise.normal(shape), randn_tensor(shape, generator=generator), f"seed {SEED}, shape {shape}")


def test_torch_noise_is_within_rounding_of_torch_on_any_processor() -> None:
    torch.manual_seed(SEED)
    theirs = torch.randn(4096).numpy()
    np.testing.assert_allclose(make_noise("torch", SEED).normal((4096,)), theirs, rtol=2e-5, atol=2e-6)


def test_a_fused_multiply_add_is_rounded_once_even_where_float64_would_round_to_a_tie() -> None:
    # a b = 2^-24 - 2^-70, so the exact sum lies just below the tie between 1 + 2^-23 and 1 + 2^-22
    for sign in (1, -1):
        a = np.array([sign * (1 + 2.0**-23)], np.float32)
        b = np.array([2.0**-24 * (1 - 2.0**-23)], np.float32)
        c = np.array([sign * (1 + 2.0**-23)], np.float32)
        assert np.float32(float(a[0]) * float(b[0]) + float(c[0])) == sign * (1 + 2.0**-22)
        assert _fma(a, b, c)[0] == sign * (1 + 2.0**-23)
    generator = np.random.default_rng(SEED)
    a, b, c = (generator.normal(size=4096).astype(np.float32) for _ in range(3))
    for x, y, z, ours in zip(a[:512], b, c, _fma(a, b, c), strict=False):
        exact_sum = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below = np.nextafter(ours, np.float32(-np.inf))
        above = np.nextafter(ours, np.float32(np.inf))
        distance = abs(Fraction(float(ours)) - exact_sum)
        assert distance <= abs(Fraction(float(below)) - exact_sum)
        assert distance <= abs(Fraction(float(above)) - exact_sum)


def test_a_radius_of_zero_gives_zeros_without_a_sign_as_in_torch() -> None:
    uniforms = np.zeros((1, 16), np.float32)
    uniforms[0, 8:] = np.linspace(0, 0.99, 8, dtype=np.float32)
    assert _box_muller(uniforms).tobytes() == np.zeros(16, np.float32).tobytes()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox_4x32(tuple(np.array([word], np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == expected


def philox_as_specified(seed: int, draw: int, count: int) -> list[float]:
    """The specification of `edgedit.noise` in plain integers and `math`, one block at a time."""
    numbers: list[float] = []
    for block in range(-(-count // 4)):
        c = [block % 2**32, block // 2**32, draw % 2**32, draw // 2**32]
        k = [seed % 2**32, seed // 2**32]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(q >> 32) ^ c[1] ^ k[0], q % 2**32, (p >> 32) ^ c[3] ^ k[1], p % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        for first, second in ((c[0], c[1]), (c[2], c[3])):
            radius = math.sqrt(-2.0 * math.log((first + 0.5) / 2**32))
            angle = 2.0 * math.pi * second / 2**32
            numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return numbers[:count]


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_noise_follows_its_specification(seed: int) -> None:
    noise = make_noise("philox", seed)
    for draw, shape in enumerate([(1,), (3, 5), (2, 4, 7, 3), (1, 1), (600,)]):
        ours = noise.normal(shape)
        assert ours.dtype == np.float32
        assert ours.shape == shape
        expected = np.array(philox_as_specified(seed, draw, math.prod(shape))).reshape(shape)
        np.testing.assert_allclose(ours, expected, rtol=1.2e-7, atol=1e-14, err_msg=f"seed {seed}, draw {draw}")


def test_philox_noise_rounds_as_specified_in_a_long_draw() -> None:
    count = 400_000
    block = np.arange(count // 4, dtype=np.uint64)
    zero = np.zeros_like(block)
    words = philox_4x32((block, zero, zero, zero), (SEED % 2**32, SEED // 2**32))
    radius = [np.sqrt(-2.0 * np.log((w + 0.5) / 2**32)) for w in words[::2]]
    angle = [2.0 * math.pi * w / 2**32 for w in words[1::2]]
    columns = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (np.cos, np.sin)]
    expected = np.stack(columns, axis=1).astype(np.float32).reshape(-1)
    different = int((make_noise("philox", SEED).normal((count,)) != expected).sum())
    assert different <= 3, f"seed {SEED}: {different} of {count} numbers are rounded otherwise"


def test_philox_noise_keeps_the_numbers_that_pictures_were_drawn_with() -> None:
    noise = make_noise("philox", 42)
    first, second = noise.normal((5,)), noise.normal((2,))
    np.testing.assert_allclose(first, philox_as_specified(42, 0, 5), rtol=1.2e-7)
    np.testing.assert_allclose(second, philox_as_specified(42, 1, 2), rtol=1.2e-7)
    np.testing.assert_array_equal(make_noise("philox", 42).normal((100_000,))[:5], first)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_normal_and_draws_seeds_and_kinds_are_independent(kind: str) -> None:
    noise = make_noise(kind, SEED)
    a, b = noise.normal((200_000,)).astype(np.float64), noise.normal((200_000,)).astype(np.float64)
    c = make_noise(kind, (SEED + 1) % 2**64).normal((200_000,)).astype(np.float64)
    for values in (a, b, c):
        assert abs(values.mean()) < 0.015, SEED
        assert abs(values.std() - 1) < 0.012, SEED
        assert abs((values**3).mean()) < 0.06, SEED
        assert abs((values**4).mean() - 3) < 0.2, SEED
        assert abs(np.mean(values[1:] * values[:-1])) < 0.015, SEED
        assert abs(np.mean(values[::2] ** 2 * values[1::2] ** 2) - 1) < 0.05, SEED
    assert abs(np.mean(a * b)) < 0.015, SEED
    assert abs(np.mean(a * c)) < 0.015, SEED
    np.testing.assert_array_equal(make_noise(kind, SEED).normal((200_000,)), a.astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_integers_are_seeds_and_empty_shapes_are_shapes(kind: str) -> None:
    np.testing.assert_array_equal(make_noise(kind, np.int64(7)).normal((3,)), make_noise(kind, 7).normal((3,)))
    assert make_noise(kind, 7).normal((0, 4)).shape == (0, 4)
    assert make_noise(kind, 7).normal(()).shape == ()


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_that_is_no_whole_number_from_0_is_refused(kind: str, seed: object) -> None:
    with pytest.raises(InputError, match="the seed must be a whole number from 0 to 18446744073709551615") as caught:
        make_noise(kind, seed)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_an_unknown_kind_of_noise_is_refused() -> None:
    with pytest.raises(InputError, match="unknown noise 'cuda'; choose one of: philox, torch"):
        make_noise("cuda", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_several_streams_together_draw_what_each_draws_alone(kind: str) -> None:
    seeds = (3, 2**64 - 1, 0)
    together = NoiseBatch([make_noise(kind, seed) for seed in seeds])
    alone = [make_noise(kind, seed) for seed in seeds]
    for _ in range(2):
        drawn = together.normal((3, 4, 5, 5))
        assert np.array_equal(drawn, np.concatenate([stream.normal((1, 4, 5, 5)) for stream in alone]))
    with pytest.raises(InputError, match="2 rows from 3 streams"):
        together.normal((2, 4, 5, 5))
