"""T5 and UMT5 encoders against transformers."""

from __future__ import annotations

import re
import secrets
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.t5.modeling_t5 import T5Attention

from edgedit.converters import graph
from edgedit.converters.architectures import t5
from edgedit.converters.checkpoint import open_checkpoint
from edgedit.errors import ConversionError

KINDS = {"t5 v1.0": "relu", "t5 v1.1": "gated-gelu", "umt5": "gated-gelu"}


def draw_config(kind: str, rng: np.random.Generator) -> T5Config | UMT5Config:
    buckets = int(rng.integers(4, 20))
    values: dict[str, Any] = {
        "vocab_size": int(rng.integers(30, 200)),
        "d_model": int(rng.integers(12, 48)),
        "d_kv": int(rng.integers(3, 12)),
        "d_ff": int(rng.integers(10, 60)),
        "num_layers": int(rng.integers(1, 4)),
        "num_heads": int(rng.integers(1, 6)),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": int(rng.integers(buckets // 4 + 1, 50)),
        "layer_norm_epsilon": float(rng.choice([1e-6, 1e-3])),
        "feed_forward_proj": KINDS[kind],
    }
    return UMT5Config(**values) if kind == "umt5" else T5Config(**values)


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        wide = parameter.ndim == 2 and not name.startswith("shared") and "relative" not in name
        scale = parameter.shape[1] ** -0.5 if wide else 1.0
        parameter.data = 1 + 0.2 * noise if parameter.ndim == 1 else noise * scale


def draw_mask(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Rows with padding on the right, one with padding on the left, and at times one with nothing to keep."""
    mask = (np.arange(length) < rng.integers(1, length + 1, size=(batch, 1))).astype(np.int64)
    if batch > 1:
        mask[-1] = mask[-1, ::-1]
    if batch > 2 and rng.random() < 0.5:
        mask[1] = 0
    return mask


def session_of(folder: Path, *, without: tuple[str, ...] = ()) -> ort.InferenceSession:
    """The graph of the checkpoint in `folder`, saved and opened again; `without` entries of config.json."""
    (source,) = open_checkpoint(folder).components.values()
    config = {key: value for key, value in source.config.items() if key not in without}
    component = t5.build_text_encoder(config)
    model = graph.build(component)
    graph.bind(model, source.tensors, drop=component.drop)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def error_of(session: ort.InferenceSession, model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> float:
    """Relative L2 over every position, padded ones too."""
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))[0].numpy()
    (got,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    assert got.shape == expected.shape
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture
def seed() -> int:
    return secrets.randbits(31)


@pytest.mark.parametrize("draw", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_agrees_with_transformers_at_every_batch_length_and_mask(
    kind: str, draw: int, seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    config = draw_config(kind, rng)
    model = (UMT5EncoderModel if kind == "umt5" else T5EncoderModel)(config).eval()
    randomise(model, seed)
    model.save_pretrained(tmp_path)
    session = session_of(tmp_path, without=("dense_act_fn", "is_gated_act") if draw % 2 else ())
    for length in (1, 2, 40, *rng.integers(3, 40, size=3)):
        batch = int(rng.integers(1, 4))
        ids = rng.integers(0, config.vocab_size, size=(batch, length))
        mask = draw_mask(rng, batch, int(length))
        error = error_of(session, model, ids, mask)
        assert error <= 1e-5, f"seed {seed}, batch {batch}, length {length}, {config}"


def test_a_long_prompt_agrees_with_transformers_beyond_the_largest_distance(seed: int, tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    model = T5EncoderModel(config).eval()
    randomise(model, seed)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(seed).integers(0, 50, size=(2, 300))
    mask = np.ones_like(ids)
    mask[1, 200:] = 0
    assert error_of(session_of(tmp_path), model, ids, mask) <= 1e-5, f"seed {seed}"


def test_every_distance_falls_into_the_bucket_that_torch_computes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    published = [(32, 128), (32, 256), (64, 512), (16, 4096), (4, 2), (5, 3)]
    pairs = list(published)
    for buckets in rng.integers(4, 129, size=60):
        pairs.append((int(buckets), int(rng.integers(buckets // 4 + 1, 1000))))
    distance = torch.arange(-4200, 4201)
    for buckets, end in pairs:
        expected = T5Attention._relative_position_bucket(distance, True, buckets, end).numpy()
        table = t5.relative_position_buckets(buckets, end)
        got = table[np.clip(distance.numpy(), -end, end) + end]
        if (buckets, end) not in published:
            # torch.log is one unit off the nearest float32 in 4 % of its values, one way or the other: where a boundary
            # falls upon a distance, as log(45 / 27) / log(125 / 27) = 1 / 3 does, its bucket is chance.
            exact = buckets // 2 // 2
            steps = np.log(np.maximum(np.abs(distance.numpy()), 1) / exact) / np.log(end / exact)
            steps *= buckets // 2 - exact
            undecided = np.abs(steps - np.rint(steps)) < 1e-5
            assert np.abs(got - expected)[undecided].max(initial=0) <= 1, f"seed {seed}, {buckets}, {end}"
            got = np.where(undecided, expected, got)
            assert undecided.mean() < 0.02
        np.testing.assert_array_equal(got, expected, err_msg=f"seed {seed}, buckets {buckets}, max_distance {end}")


@pytest.mark.parametrize(
    "entries",
    [
        {"feed_forward_proj": "gelu"},
        {"feed_forward_proj": "silu"},
        {"feed_forward_proj": "gated-silu"},
        {"feed_forward_proj": "gated-relu"},
        {"feed_forward_proj": "gated-gelu_pytorch_tanh"},
        {"feed_forward_proj": "relu", "dense_act_fn": "silu", "is_gated_act": True},
    ],
    ids=lambda entries: "+".join(str(value) for value in entries.values()),
)
def test_other_feed_forwards_agree_with_transformers(entries: dict[str, Any], seed: int, tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **entries)
    model = T5EncoderModel(config).eval()
    randomise(model, seed)
    model.save_pretrained(tmp_path)
    ids = np.random.default_rng(seed).integers(0, 50, size=(2, 9))
    assert error_of(session_of(tmp_path), model, ids, np.ones_like(ids)) <= 1e-5, f"seed {seed}"


@pytest.mark.parametrize("present", ["shared only", "alias only", "both"])
def test_the_embedding_is_found_under_either_of_its_names(present: str, seed: int, tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = T5EncoderModel(config).eval()
    randomise(model, seed)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors.pop("shared.weight", tensors.pop("encoder.embed_tokens.weight", None))
    if present != "alias only":
        tensors["shared.weight"] = embedding
    if present != "shared only":
        tensors["encoder.embed_tokens.weight"] = embedding.copy()
    save_file(tensors, tmp_path / "model.safetensors")
    ids = np.arange(10).reshape(2, 5)
    assert error_of(session_of(tmp_path), model, ids, np.ones_like(ids)) <= 1e-5, f"seed {seed}"


def test_a_whole_encoder_decoder_checkpoint_gives_its_encoder(seed: int, tmp_path: Path) -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, num_decoder_layers=1)
    whole = T5ForConditionalGeneration(config).eval()
    randomise(whole, seed)
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"].copy()}, tmp_path / "model.safetensors")
    ids = np.arange(12).reshape(2, 6)
    mask = np.ones_like(ids)
    assert error_of(session_of(tmp_path), whole.get_encoder(), ids, mask) <= 1e-5, f"seed {seed}"
    drops = t5.build_text_encoder(config.to_dict()).drop
    for key in ("decoder.block.0.layer.0.layer_norm.weight", "lm_head.weight"):
        (reason,) = (reason for pattern, reason in drops if re.fullmatch(pattern, key))
        assert "text encoder" in reason


@pytest.mark.parametrize("wrong", ["unknown key", "missing key", "wrong width"])
def test_a_checkpoint_that_disagrees_with_its_configuration_is_refused(wrong: str, tmp_path: Path) -> None:
    config = UMT5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    if wrong == "unknown key":
        key = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.scale"
        tensors[key] = np.ones(2, np.float32)
    elif wrong == "missing key":
        del tensors[key]
    else:
        tensors[key] = np.ones((31, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=re.escape(key)):
        session_of(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("model_type", "bart"),
        ("is_decoder", True),
        ("feed_forward_proj", "gated-tanh"),
        ("feed_forward_proj", "double-relu"),
        ("dense_act_fn", "mish"),
        ("relative_attention_num_buckets", 2),
        ("relative_attention_max_distance", 8),
    ],
)
def test_a_configuration_that_the_graph_cannot_represent_is_refused_by_name(entry: str, value: Any) -> None:
    derived = ("dense_act_fn", "is_gated_act")
    config = {key: v for key, v in T5Config().to_dict().items() if key not in derived}
    with pytest.raises(ConversionError) as error:
        t5.build_text_encoder({**config, entry: value})
    assert str(value).removeprefix("gated-") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "config", "cls"),
    [
        ({}, T5Config(), T5EncoderModel),
        ({"model_type": "umt5"}, UMT5Config(), UMT5EncoderModel),
        ({"architectures": ["UMT5EncoderModel"]}, UMT5Config(), UMT5EncoderModel),
    ],
)
def test_missing_entries_mean_the_defaults_of_the_class(
    given: dict[str, Any], config: T5Config | UMT5Config, cls: type
) -> None:
    assert_same_parameters(given, cls, config)


def test_t5_xxl_builds_in_seconds_with_the_parameters_of_transformers_and_no_weights() -> None:
    config = T5Config(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"
    )
    start = time.process_time()
    count = assert_same_parameters(config.to_dict(), T5EncoderModel, config)
    assert time.process_time() - start < 20
    assert count == 4_762_310_656


def assert_same_parameters(given: dict[str, Any], cls: type, config: T5Config | UMT5Config) -> int:
    """The graph has the parameters of transformers' class, none of them allocated; returns how many values in all."""
    with torch.device("meta"):
        expected = {
            k: tuple(v.shape) for k, v in cls(config).state_dict().items() if k != "encoder.embed_tokens.weight"
        }
    model = graph.build(t5.build_text_encoder(given))
    parameters = model.graph.initializers
    assert all(value.const_value is None for value in parameters.values())
    got = {}
    for name, value in parameters.items():
        shape = tuple(value.shape.numpy())
        got[name] = shape[::-1] if value.metadata_props.get(graph.LAYOUT) == "transposed" else shape
    assert got == expected
    return sum(int(np.prod(shape)) for shape in got.values())
