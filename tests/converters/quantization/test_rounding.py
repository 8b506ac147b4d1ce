"""Codes: adaptive rounding against the formula it comes from, palettes against SciPy's k-means, planes bit by bit."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from edgedit.converters.quantization import rounding
from edgedit.converters.quantization.encode import encode
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.levels import LEVELS
from edgedit.converters.quantization.packing import pack, unpack
from edgedit.converters.quantization.palettes import fit
from edgedit.converters.quantization.rounding import adaptive, code_range, codes_and_scales


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def inputs_like_those_of_a_network(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Correlated channels of very different sizes."""
    mixed = rng.standard_normal((rows, width)) @ rng.standard_normal((width, width)) / width**0.5
    return (mixed * np.exp(rng.normal(size=width))).astype(np.float32)


def optimal_brain_surgeon(weight: np.ndarray, moments: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Frantar et al. (2022), equation 2, with the inverse taken anew for every input that is left."""
    order = np.argsort(-np.diag(moments), kind="stable")
    matrix = moments.astype(np.float64)
    matrix[np.diag_indices_from(matrix)] += 0.01 * np.diag(moments).mean()
    work, codes = weight.astype(np.float64), np.zeros(weight.shape, np.int8)
    for number, row in enumerate(order):
        left = order[number:]
        inverse = np.linalg.inv(matrix[np.ix_(left, left)])
        codes[row] = np.clip(np.rint(work[row] / scales), -7, 7)
        error = (work[row] - codes[row] * scales) / inverse[0, 0]
        work[left] -= np.outer(inverse[:, 0], error)
    return codes


def test_adaptive_rounding_is_the_published_formula(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((40, 24)).astype(np.float32)
    x = inputs_like_those_of_a_network(rng, 400, 40)
    moments = x.T @ x
    _, scales = codes_and_scales(weight, 4, axis=0)

    def round_row(_: int, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes = np.clip(np.rint(row / scales[0]), -7, 7).astype(np.int8)
        return codes, codes * scales[0]

    found, expected = adaptive(weight, moments, round_row), optimal_brain_surgeon(weight, moments, scales[0])
    # A value half way between two codes may fall either way in float32, and changes what comes after it.
    assert (found == expected).mean() > 0.9


FORMS = [
    Form(4, 64),
    Form(3, 64),
    Form(2, 64),
    Form(4, 64, format="fp4"),
    Form(4, 64, format="log"),
    Form(2, format="palette"),
    Form(4, format="palette"),
    Form(8),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.format}{form.bits}")
def test_adaptive_rounding_changes_the_layers_output_less(form: Form, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((128, 96)).astype(np.float32)
    x = inputs_like_those_of_a_network(rng, 2000, 128)
    moments = x[:1000].T @ x[:1000]
    plain = encode(weight, form, "matrix").value()
    adapted = encode(weight, Form(form.bits, form.block, format=form.format, rounding="adaptive"), "matrix", moments)
    fresh = x[1000:]
    lost, kept = (np.linalg.norm(fresh @ (value - weight)) for value in (plain, adapted.value()))
    assert kept < 0.95 * lost


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.format}{form.bits}")
def test_descent_never_ends_worse_than_adaptive_rounding(form: Form, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    x = inputs_like_those_of_a_network(rng, 1000, 64)
    moments = x.T @ x
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(64)
    lost = []
    for kind in ("adaptive", "descent"):
        value = encode(weight, replace(form, rounding=kind), "matrix", moments).value()
        lost.append(np.einsum("kn,kl,ln->", value - weight, damped, value - weight))
    assert lost[1] <= lost[0] * (1 + 1e-4)
    if form.bits < 8:
        assert lost[1] < lost[0]


def test_descent_ends_where_no_single_code_can_be_bettered(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "_SWEEPS", 100)
    weight = rng.standard_normal((16, 6)).astype(np.float32)
    x = inputs_like_those_of_a_network(rng, 200, 16)
    moments = x.T @ x
    form = Form(4, 16, format="fp4", rounding="descent")
    found = encode(weight, form, "matrix", moments)
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(16)

    def loss(value: np.ndarray) -> float:
        return float(np.einsum("kn,kl,ln->", value - weight, damped, value - weight))

    least = loss(found.value())
    numbers = np.array([0, 1, 2, 3, 4, 6, 8, 12])
    for row in range(16):
        for column in range(6):
            for number in (*numbers, *-numbers):
                other = found.value().copy()
                other[row, column] = number * found.parts["scale"][0, column]
                assert loss(other) >= least * (1 - 1e-4)


def test_four_bit_floats_are_those_of_ml_dtypes(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 24)).astype(np.float32)
    found = encode(weight, Form(4, 64, format="fp4"), "matrix")
    unit = 2 * found.parts["scale"]
    expected = np.clip(weight / unit, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(found.value(), expected.astype(np.float32) * unit)
    packed = found.parts[""]
    codes = np.stack([packed & 15, packed >> 4], 2).reshape(64, 24)
    opened = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(opened, expected.astype(np.float32))


def test_twin_logarithms_are_powers_of_the_root_of_two_on_both_sides_of_zero(rng: np.random.Generator) -> None:
    numbers = LEVELS["log"].ordered.astype(int)
    np.testing.assert_array_equal(numbers, -numbers[::-1])
    np.testing.assert_allclose(numbers[8:] / 127, 2.0 ** -(np.arange(6, -1, -1) / 2), atol=0.5 / 127)
    scaled = rng.uniform(-150, 150, 1000).astype(np.float32)
    expected = np.abs(scaled[:, None] - numbers).min(1)
    np.testing.assert_array_equal(np.abs(LEVELS["log"].nearest(scaled) - scaled), expected.astype(np.float32))


def test_with_white_inputs_adaptive_rounding_is_plain_rounding(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    form = Form(4, 64, rounding="adaptive")
    adapted = encode(weight, form, "matrix", np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(adapted.parts[""], encode(weight, Form(4, 64), "matrix").parts[""])


@pytest.mark.parametrize("bits", [3, 2])
def test_codes_of_few_bits_use_the_longer_side_for_the_largest_weight(bits: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((4, 64, 8)).astype(np.float32)
    codes, scales = codes_and_scales(weight, bits, axis=1)
    low, high = code_range(bits)
    assert codes.min() == low
    assert codes.max() <= high
    one_sided, _ = codes_and_scales(np.abs(weight), bits, axis=1)
    assert (one_sided <= 0).all(), "a block of one sign has its codes on the long side, with a negative scale"
    symmetric = np.abs(weight).max(1, keepdims=True) / high
    rounded = np.clip(np.rint(weight / symmetric), -high, high) * symmetric
    assert ((codes * scales - weight) ** 2).sum() < ((rounded - weight) ** 2).sum()


def test_planes_of_three_bit_codes_open_to_the_same_codes(rng: np.random.Generator) -> None:
    codes = rng.integers(-4, 4, (17, 40)).astype(np.int8)
    low, sign = pack(codes)
    assert (low.shape, sign.shape) == ((17, 10), (17, 5))
    np.testing.assert_array_equal(unpack(low, sign), codes)


@pytest.mark.parametrize("width", [2, 4])
def test_a_palette_is_about_as_good_as_scipys(width: int, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((256, 64)).astype(np.float32)
    palette = fit(weight, width)
    error = ((palette.values(palette.round(weight)) - weight) ** 2).mean()
    vectors = weight.reshape(-1, width)
    centres, labels = kmeans2(vectors, 256, iter=15, minit="points", seed=1)
    # Both end in a local minimum, from different starts.
    assert error < 1.25 * ((centres[labels] - vectors) ** 2).mean()


@pytest.mark.parametrize("format", ["int", "fp4"])
def test_block_scales_of_int8_arithmetic_keep_products_in_a_byte(format: str, rng: np.random.Generator) -> None:
    weight = (rng.standard_normal((128, 48)) * np.exp(rng.normal(size=(128, 1)))).astype(np.float32)
    found = encode(weight, Form(4, 64, int8_activations=True, format=format), "matrix")
    codes = found.parts[""] if format == "int" else LEVELS["fp4"].table[found.parts[""]].reshape(weight.shape)
    products = codes.astype(int) * np.repeat(found.parts["multiplier"].astype(int), 64, 0)
    assert np.abs(products).max() <= 127
    np.testing.assert_allclose(found.value(), products * found.parts["scale"], rtol=1e-6)
    plain = encode(weight, Form(4, 64, format=format), "matrix").value()
    assert ((found.value() - weight) ** 2).sum() < 1.2 * ((plain - weight) ** 2).sum()
