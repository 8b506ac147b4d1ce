"""Gemma-2 as a text encoder against transformers."""

from __future__ import annotations

import json
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
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2RotaryEmbedding

from edgedit.converters import graph
from edgedit.converters.architectures import gemma2
from edgedit.converters.checkpoint import open_checkpoint
from edgedit.errors import ConversionError

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def draw_config(rng: np.random.Generator) -> Gemma2Config:
    """Any shape, 12 wide or more: the norm of 3 numbers that almost cancel shows their rounding, up to 2e-5 of it."""
    kv_heads, groups, layers = (int(rng.integers(1, 4)) for _ in range(3))
    types = ["sliding_attention", "full_attention"]
    return Gemma2Config(
        vocab_size=int(rng.integers(30, 200)),
        hidden_size=kv_heads * groups * -(-int(rng.integers(12, 48)) // (kv_heads * groups)),
        intermediate_size=int(rng.integers(10, 60)),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=2 * int(rng.integers(1, 8)),
        hidden_activation=str(rng.choice(["gelu_pytorch_tanh", "silu"])),
        rms_norm_eps=float(rng.choice([1e-6, 1e-3])),
        attention_bias=bool(rng.random() < 0.3),
        query_pre_attn_scalar=int(rng.integers(2, 20)),
        sliding_window=int(rng.integers(1, 16)),
        layer_types=None if rng.random() < 0.5 else [str(t) for t in rng.choice(types, size=layers)],
        attn_logit_softcapping=[None, 1.5, 5.0, 50.0][rng.integers(4)],
        rope_parameters={"rope_type": "default", "rope_theta": float(rng.choice([100.0, 10000.0, 1e6]))},
    )


def randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[1] ** -0.5


def draw_mask(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Rows with padding on the right, one with padding on the left, and at times one with nothing to keep."""
    mask = (np.arange(length) < rng.integers(1, length + 1, size=(batch, 1))).astype(np.int64)
    if batch > 1:
        mask[-1] = mask[-1, ::-1]
    if batch > 2 and rng.random() < 0.5:
        mask[1] = 0
    return mask


def session_of(folder: Path, *, without: tuple[str, ...] = (), **entries: Any) -> ort.InferenceSession:
    """The graph of the checkpoint in `folder`, saved and opened again; config.json with `entries`, `without` others."""
    (source,) = open_checkpoint(folder).components.values()
    config = {**source.config, **entries}
    config = {key: value for key, value in config.items() if key not in without}
    component = gemma2.build_text_encoder(config)
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


def saved(config: Gemma2Config, seed: int, folder: Path) -> Gemma2Model:
    model = Gemma2Model(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def seed() -> int:
    return secrets.randbits(31)


@pytest.mark.parametrize("draw", range(10))
def test_one_graph_agrees_with_transformers_at_every_batch_length_and_mask(
    draw: int, seed: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(seed)
    config = draw_config(rng)
    model = saved(config, seed, tmp_path)
    session = session_of(tmp_path)
    for length in (1, 2, 40, *rng.integers(3, 40, size=3)):
        batch = int(rng.integers(1, 4))
        ids = rng.integers(0, config.vocab_size, size=(batch, length))
        mask = draw_mask(rng, batch, int(length))
        error = error_of(session, model, ids, mask)
        assert error <= 1e-5, f"seed {seed}, batch {batch}, length {length}, {config}"


def test_a_prompt_of_300_tokens_agrees_with_transformers(seed: int, tmp_path: Path) -> None:
    model = saved(Gemma2Config(**{**SMALL, "head_dim": 256}, sliding_window=100), seed, tmp_path)
    ids = np.random.default_rng(seed).integers(0, 50, size=(2, 300))
    mask = np.ones_like(ids)
    mask[1, 120:] = 0
    assert error_of(session_of(tmp_path), model, ids, mask) <= 1e-5, f"seed {seed}"


def test_masked_tokens_stay_unseen_when_the_cap_saturates(seed: int, tmp_path: Path) -> None:
    """A mask added before the cap would come out of it as minus the cap, no lower than a saturated score."""
    config = Gemma2Config(**SMALL, attn_logit_softcapping=1.0)
    saved(config, seed, tmp_path)
    session = session_of(tmp_path)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 50, size=(1, 12))
    mask = (np.arange(12) < 7).astype(np.int64)[None]
    others = np.where(mask == 1, ids, (ids + 1) % 50)
    first, second = (session.run(None, {"input_ids": x, "attention_mask": mask})[0][:, :7] for x in (ids, others))
    np.testing.assert_array_equal(first, second, err_msg=f"seed {seed}")


def test_layers_alternate_from_a_sliding_one_when_the_configuration_does_not_say(seed: int, tmp_path: Path) -> None:
    model = saved(Gemma2Config(**{**SMALL, "num_hidden_layers": 3}, sliding_window=3), seed, tmp_path)
    ids = np.random.default_rng(seed).integers(0, 50, size=(2, 20))
    session = session_of(tmp_path, without=("layer_types",))
    assert error_of(session, model, ids, np.ones_like(ids)) <= 1e-5, f"seed {seed}"


def test_the_base_of_the_rotation_is_read_in_both_spellings(seed: int, tmp_path: Path) -> None:
    model = saved(Gemma2Config(**SMALL, rope_theta=77.0), seed, tmp_path)
    ids = np.random.default_rng(seed).integers(0, 50, size=(2, 20))
    mask = np.ones_like(ids)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    assert error_of(session_of(tmp_path), model, ids, mask) <= 1e-5, f"seed {seed}"
    assert error_of(session_of(tmp_path, rope_parameters=None, rope_theta=77.0), model, ids, mask) <= 1e-5, (
        f"seed {seed}"
    )
    assert error_of(session_of(tmp_path, rope_parameters=None), model, ids, mask) > 1e-3, f"seed {seed}"


@pytest.mark.parametrize(("head_dim", "theta"), [(256, 10000.0), (128, 1e6), (6, 77.0)])
def test_rotation_frequencies_are_those_of_transformers(head_dim: int, theta: float) -> None:
    config = Gemma2Config(head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta})
    expected = Gemma2RotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(gemma2.rope_frequencies(head_dim, theta), expected, rtol=1.2e-7)


def test_a_causal_language_model_checkpoint_gives_its_encoder(seed: int, tmp_path: Path) -> None:
    whole = Gemma2ForCausalLM(Gemma2Config(**SMALL, tie_word_embeddings=False)).eval()
    randomise(whole, seed)
    whole.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    assert {"lm_head.weight", "model.norm.weight"} <= set(keys)
    ids = np.random.default_rng(seed).integers(0, 50, size=(2, 9))
    assert error_of(session_of(tmp_path), whole.model, ids, np.ones_like(ids)) <= 1e-5, f"seed {seed}"
    drops = gemma2.build_text_encoder(whole.config.to_dict()).drop
    (reason,) = (reason for pattern, reason in drops if re.fullmatch(pattern, "lm_head.weight"))
    assert "text encoder" in reason


@pytest.mark.parametrize("wrong", ["unknown key", "missing key", "wrong width"])
def test_a_checkpoint_that_disagrees_with_its_configuration_is_refused(wrong: str, tmp_path: Path) -> None:
    Gemma2Model(Gemma2Config(**SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "layers.1.post_feedforward_layernorm.weight"
    if wrong == "unknown key":
        key = "layers.1.post_feedforward_layernorm.bias"
        tensors[key] = np.ones(16, np.float32)
    elif wrong == "missing key":
        del tensors[key]
    else:
        tensors[key] = np.ones(15, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=re.escape(key)):
        session_of(tmp_path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("model_type", "gemma3"),
        ("hidden_activation", "mish"),
        ("layer_types", ["chunked_attention"] * 26),
        ("layer_types", ["full_attention"] * 25),
        ("num_hidden_layers", 27),
        ("sliding_window", None),
        ("use_bidirectional_attention", True),
        ("num_key_value_heads", 3),
        ("head_dim", 33),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_parameters", {"partial_rotary_factor": 0.5}),
    ],
)
def test_a_configuration_that_the_graph_cannot_represent_is_refused_by_name(entry: str, value: Any) -> None:
    with pytest.raises(ConversionError) as error:
        gemma2.build_text_encoder({**Gemma2Config().to_dict(), entry: value})
    named = "rope_type" if isinstance(value, dict) and "rope_type" in value else entry
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_entries_mean_the_defaults_of_the_class_which_are_gemma_2_2b() -> None:
    """Also: it builds in seconds, with the parameters of transformers, none of them allocated."""
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in Gemma2Model(Gemma2Config()).state_dict().items()}
    start = time.process_time()
    model = graph.build(gemma2.build_text_encoder({}))
    assert time.process_time() - start < 20
    assert all(value.const_value is None for value in model.graph.initializers.values())
    got = {}
    for name, value in model.graph.initializers.items():
        shape = tuple(value.shape.numpy())
        got[name] = shape[::-1] if value.metadata_props.get(graph.LAYOUT) == "transposed" else shape
    assert got == expected
    assert sum(int(np.prod(shape)) for shape in got.values()) == 2_614_341_888
