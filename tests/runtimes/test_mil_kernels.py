"""Kernels of the interpreter against torch, on random shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgedit.runtimes import mil_kernels
from edgedit.runtimes.mil_kernels import KERNELS


@pytest.fixture
def random() -> np.random.Generator:
    seed = np.random.SeedSequence().generate_state(1)[0]
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def draw(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("rank", [1, 2])
def test_convolutions_of_any_stride_dilation_padding_and_groups(
    random: np.random.Generator, groups: int, rank: int
) -> None:
    for _ in range(4):
        kernel, stride, apart = (random.integers(1, 4, rank).tolist() for _ in range(3))
        pad = random.integers(0, 3, 2 * rank).tolist()
        x = draw(random, 2, 6, *random.integers(9, 13, rank))
        weight, bias = draw(random, 12, 6 // groups, *kernel), draw(random, 12)
        found = KERNELS["conv"](x, weight, bias, stride, apart, groups, "custom", pad)
        padded = F.pad(torch.from_numpy(x), [p for axis in reversed(range(rank)) for p in pad[2 * axis : 2 * axis + 2]])
        function = F.conv1d if rank == 1 else F.conv2d
        close(found, function(padded, torch.from_numpy(weight), torch.from_numpy(bias), stride, 0, apart, groups))


@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_convolutions(random: np.random.Generator, groups: int) -> None:
    x, weight, bias = draw(random, 2, 6, 4, 5), draw(random, 6, 2, 3, 2), draw(random, 2 * groups)
    found = KERNELS["conv_transpose"](x, weight, bias, [2, 3], [1, 2], groups, "custom", [1, 1, 0, 0])
    parts = (torch.from_numpy(part) for part in (x, weight, bias))
    close(found, F.conv_transpose2d(*parts, stride=(2, 3), padding=(1, 0), groups=groups, dilation=(1, 2)))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_parts_is_attention(
    random: np.random.Generator, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = draw(random, 2, 3, 11, 8), draw(random, 2, 3, 7, 8), draw(random, 2, 3, 7, 5)
    mask = draw(random, 2, 1, 11, 7) if masked else None
    monkeypatch.setattr(mil_kernels, "attention_scores_limit", 4 * 7 * 6 * 3)
    found = KERNELS["scaled_dot_product_attention"](q, k, v, mask)
    torch_mask = None if mask is None else torch.from_numpy(mask)
    close(found, F.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)), attn_mask=torch_mask))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("erf", torch.erf),
        ("sigmoid", torch.sigmoid),
        ("silu", F.silu),
        ("relu", F.relu),
        ("gelu", F.gelu),
        ("log", torch.log),
        ("rsqrt", torch.rsqrt),
        ("softmax", lambda x: torch.softmax(x, -1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_functions_over_a_wide_range(name: str, expected: Any) -> None:
    x = np.linspace(-30, 30, 6001, dtype=np.float32)
    x = np.abs(x) + np.float32(1e-3) if name in ("log", "rsqrt") else x
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(KERNELS[name](x), expected(torch.from_numpy(x)).numpy(), rtol=2e-6, atol=1e-6)


def test_gelu_by_tanh_and_by_sigmoid(random: np.random.Generator) -> None:
    x = draw(random, 50) * 4
    close(KERNELS["gelu"](x, "TANH_APPROXIMATION"), F.gelu(torch.from_numpy(x), approximate="tanh"))
    close(KERNELS["gelu"](x, "SIGMOID_APPROXIMATION"), torch.from_numpy(x) * torch.sigmoid(1.702 * torch.from_numpy(x)))


def test_layer_norm_shuffles_and_pads(random: np.random.Generator) -> None:
    x, gamma, beta = draw(random, 3, 4, 10), draw(random, 10), draw(random, 10)
    normed = F.layer_norm(torch.from_numpy(x), [10], torch.from_numpy(gamma), torch.from_numpy(beta), 1e-3)
    close(KERNELS["layer_norm"](x, [-1], gamma, beta, np.float32(1e-3)), normed)
    shuffled = draw(random, 2, 12, 3, 5)
    close(KERNELS["pixel_shuffle"](shuffled, 2), F.pixel_shuffle(torch.from_numpy(shuffled), 2))
    large = draw(random, 2, 3, 6, 4)
    close(KERNELS["pixel_unshuffle"](large, np.uint32(2)), F.pixel_unshuffle(torch.from_numpy(large), 2))
    for mode, name in (("reflect", "reflect"), ("replicate", "replicate")):
        close(KERNELS["pad"](large, [1, 2, 2, 1], mode), F.pad(torch.from_numpy(large), (2, 1, 1, 2), mode=name))
    close(
        KERNELS["upsample_nearest_neighbor"](large, 2, 3), F.interpolate(torch.from_numpy(large), scale_factor=(2, 3))
    )


def test_slices_and_reductions_follow_their_masks(random: np.random.Generator) -> None:
    x = draw(random, 4, 5, 6)
    found = KERNELS["slice_by_index"](
        x, [1, 0, 2], [3, 1, 6], [1, 1, 2], [True, False, False], [False, True, False], [False, False, False]
    )
    np.testing.assert_array_equal(found, x[:3, 0:, 2:6:2])
    np.testing.assert_array_equal(
        KERNELS["slice_by_index"](x, [1, 0, 0], [2, 5, 6], squeeze_mask=[True, False, False]), x[1]
    )
    close(KERNELS["reduce_mean"](x, [0, -1], True), torch.from_numpy(x).mean((0, 2), keepdim=True))
    close(KERNELS["reduce_sum"](x, None, False), torch.from_numpy(x).sum())
