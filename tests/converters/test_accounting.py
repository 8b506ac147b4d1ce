"""Every key is consumed or dropped by name, every parameter filled, or the conversion stops with the list."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel

from edgedit.converters.accounting import account
from edgedit.converters.tensors import TensorRef
from edgedit.errors import ConversionError

Shapes = dict[str, tuple[int, ...]]


def refs(shapes: Shapes) -> dict[str, TensorRef]:
    def unread() -> np.ndarray:
        raise AssertionError("accounting reads no weights")

    return {name: TensorRef(name, "float32", shape, unread) for name, shape in shapes.items()}


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "num_layers": 4,
    "sample_size": 8,
    "caption_channels": 20,
    "in_channels": 5,
}


def pixart(**changes: int) -> Shapes:
    return shapes_of(PixArtTransformer2DModel(**(CONFIG | changes)))


def refused(parameters: Shapes, tensors: Shapes, **options: object) -> ConversionError:
    with pytest.raises(ConversionError) as caught:
        account(parameters, refs(tensors), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_checkpoint_that_fits_is_consumed_whole_in_the_order_of_the_parameters() -> None:
    shapes = pixart()
    shuffled = list(shapes.items())
    random.shuffle(shuffled)
    result = account(shapes, refs(dict(shuffled)))
    assert list(result.tensors) == list(shapes)
    assert all(result.tensors[name].shape == shape for name, shape in shapes.items())
    assert (result.dropped, result.absent) == ({}, ())


def test_keys_are_dropped_by_their_whole_name_with_the_first_reason_that_fits() -> None:
    tensors = {"a": (1,), "b.x": (2,), "b.y": (3,)}
    result = account({"a": (1,)}, refs(tensors), drop=[(r"b\.x", "one"), (r"b\..", "two"), ("a", "never")])
    assert result.dropped == {"b.x": "one", "b.y": "two"}
    assert list(result.tensors) == ["a"]
    assert "1 unused" in str(refused({"a": (1,)}, tensors, drop=[("b", "a part of the name"), (r"b\.x", "x")]))


def test_a_parameter_may_be_absent_only_when_it_is_optional() -> None:
    result = account({"a": (1,), "tied": (2,)}, refs({"a": (1,)}), optional=["tie."])
    assert result.absent == ("tied",)
    assert list(result.tensors) == ["a"]
    assert "1 missing" in str(refused({"a": (1,), "tied": (2,)}, {"a": (1,)}, optional=["tie"]))


def test_one_key_too_many_or_too_few_or_of_another_shape_stops() -> None:
    shapes = pixart()
    key = random.choice(list(shapes))
    rest = {name: shape for name, shape in shapes.items() if name != key}
    assert "(1 missing)" in str(refused(shapes, rest)), key
    assert "(1 unused)" in str(refused(rest, shapes)), key
    assert "(1 of another shape)" in str(refused(shapes, shapes | {key: (*shapes[key], 1)})), key


def test_the_nearest_match_stands_beside_a_key_that_is_written_otherwise() -> None:
    shapes = pixart()
    wrong = {name.replace("attn1.to_q", "attn1.q_proj"): shape for name, shape in shapes.items()}
    details = refused(shapes, wrong).details
    assert "in the checkpoint, not used (8):" in details
    assert "needed, not in the checkpoint (8):" in details
    for n in range(4):
        for letter in ("weight", "bias"):
            shape = list(shapes[f"transformer_blocks.{n}.attn1.to_q.{letter}"])
            one, other = (f"transformer_blocks.{n}.attn1.{name}.{letter} {shape}" for name in ("q_proj", "to_q"))
            assert f"  {one}   nearest: {other}" in details
            assert f"  {other}   nearest: {one}" in details


def test_long_lists_are_cut_and_counted() -> None:
    details = refused({}, {f"x{i}": (1,) for i in range(1000)}).details
    assert "(1000):" in details
    assert "… and 976 more" in details


@pytest.mark.parametrize("layers", [2, 3, 5, 7])
def test_another_number_of_layers_is_blamed_on_its_field(layers: int) -> None:
    error = refused(pixart(), pixart(num_layers=layers), config=CONFIG)
    assert f"num_layers is 4 and the weights have {layers} of transformer_blocks" in str(error)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"caption_channels": 21}, "caption_channels gives 20"),
        ({"in_channels": 6}, "in_channels gives 5"),
        ({"attention_head_dim": 12, "cross_attention_dim": 36}, "num_attention_heads × attention_head_dim gives 24"),
    ],
)
def test_another_size_is_blamed_on_its_field(change: dict[str, int], field: str) -> None:
    error = refused(pixart(), pixart(**change), config=CONFIG)
    expected = field if "×" not in field else "cross_attention_dim or " + field
    assert expected in str(error)
    assert "of another shape" in error.details
    assert "has [" in error.details


def test_without_a_configuration_the_tensor_itself_is_named() -> None:
    error = refused(pixart(), pixart(caption_channels=21))
    assert "caption_projection.linear_1.weight is [24, 21] and should be [24, 20]" in str(error)


def test_names_from_the_file_reach_the_terminal_escaped() -> None:
    error = refused({"a": (1,)}, {"a": (1,), "\x1b[2J\nb": (1,)})
    assert "\x1b" not in str(error) + error.details
    assert len(error.details.splitlines()) == 2


def test_a_checkpoint_of_another_model_is_reported_quickly() -> None:
    sana = SanaTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=4,
        num_cross_attention_heads=1,
        cross_attention_head_dim=4,
        cross_attention_dim=4,
        num_layers=60,
    )
    started = time.process_time()
    error = refused(pixart(num_layers=60), shapes_of(sana))
    assert time.process_time() - started < 5
    assert "unused" in str(error)
    assert "missing" in str(error)
