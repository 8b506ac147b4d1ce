"""Writes trained weights as a diffusers pipeline folder in float16."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from edgedit.converters.training.autoencoder import AUTOENCODER_CONFIG
from edgedit.converters.training.calibration import PROMPTS_FILE
from edgedit.converters.training.judging import captions_and_claims
from edgedit.converters.training.loop import load_file
from edgedit.converters.training.teacher import build_transformer
from edgedit.converters.training.text_encoder import build_text_encoder
from edgedit.converters.training.tokens import build_tokenizer, wrap_tokenizer

__all__ = [
    "TRANSFORMER",
    "build_scheduler",
    "export_pipeline",
    "load_autoencoder",
    "load_text_encoder",
    "load_transformer",
]

TRANSFORMER = "transformer-final.pt"
"""File of a run: the averaged transformer."""
FLOW_SHIFT = 5.0
CALIBRATION_PROMPTS = 1000


def build_scheduler(flow_shift: float = FLOW_SHIFT) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ 2M on the flow path, for diffusers, whose PixArt pipeline takes no flow matching scheduler.

    edgedit draws by the schedule in the folder's `edgedit.json`.
    """
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=flow_shift,
        solver_order=2,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )


def load_autoencoder(path: Path, config: dict[str, Any] | None = None) -> AutoencoderKL:
    """The finished autoencoder (float32) from `autoencoder-final.pt`."""
    autoencoder = AutoencoderKL(**(config or AUTOENCODER_CONFIG), scaling_factor=1.0)
    autoencoder.load_state_dict(load_file(path)["averaged"])
    return autoencoder.eval()


def _fill(module: nn.Module, weights: dict[str, Tensor], derived: str) -> None:
    missing, unexpected = module.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {derived}:
        raise ValueError(f"the checkpoint does not fit the model: {sorted(set(missing))[:3]} {unexpected[:3]}")


def load_text_encoder(path: Path, config: dict[str, Any] | None = None) -> T5EncoderModel:
    """The finished text encoder (float32) from `text-encoder-final.pt`."""
    text_encoder = build_text_encoder(config)
    _fill(text_encoder, load_file(path)["averaged"], "encoder.embed_tokens.weight")
    return text_encoder.eval()


def load_transformer(path: Path, config: dict[str, Any] | None = None) -> PixArtTransformer2DModel:
    """The finished transformer (float32) from `TRANSFORMER`."""
    transformer = build_transformer(config)
    _fill(transformer, load_file(path)["averaged"], "pos_embed.pos_embed")
    return transformer.eval()


def _name_tokenizer(folder: Path) -> None:
    """Gives the tokenizer's class the name that every release of transformers knows."""
    for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")


def export_pipeline(
    run_dir: Path,
    folder: Path,
    *,
    flow_shift: float = FLOW_SHIFT,
    autoencoder_config: dict[str, Any] | None = None,
    text_config: dict[str, Any] | None = None,
    transformer_config: dict[str, Any] | None = None,
) -> None:
    """Writes the averaged weights of a run as a `PixArtSigmaPipeline` folder, replacing what was there.

    The configurations are those the run was made with, the module's own when None.
    """
    transformer = load_transformer(run_dir / TRANSFORMER, transformer_config)
    pipeline = PixArtSigmaPipeline(
        tokenizer=wrap_tokenizer(build_tokenizer()),
        text_encoder=load_text_encoder(run_dir / "text-encoder-final.pt", text_config).to(torch.float16),
        vae=load_autoencoder(run_dir / "autoencoder-final.pt", autoencoder_config).to(torch.float16),
        transformer=transformer.to(torch.float16),
        scheduler=build_scheduler(flow_shift),
    )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    _name_tokenizer(temporary)
    captions = [text for text, _ in captions_and_claims(CALIBRATION_PROMPTS)]
    (temporary / PROMPTS_FILE).write_text("\n".join(captions) + "\n", encoding="utf-8")
    for kept in ("README.md", "edgedit.json"):
        if (folder / kept).exists():
            shutil.copy(folder / kept, temporary / kept)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
