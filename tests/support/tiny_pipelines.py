"""Tiny random-weight pipelines of every family, made with diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = (
    "a an the red blue green cat dog on in of big small circle square given user prompt generate image with and is , ."
).split()


def word_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that closes with </s> (T5) or opens with <bos> (Gemma)."""
    special = ["<pad>", "</s>", "<bos>", "<unk>"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    template = "<bos> $A" if bos else "$A </s>"
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 2), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<bos>", unk_token="<unk>"
    )


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations near one and leave nothing at its initial zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "scale_shift_table" not in name:
                fan_in = parameter[0].numel() if "embed" not in name.rsplit(".", 2)[-2] else 1
                parameter.copy_(noise / fan_in**0.5)
            elif parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=64,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _gemma() -> Gemma2Model:
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        max_position_embeddings=1024,
    )
    return Gemma2Model(config)


def _kl() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=0.31,
    )


def _dc() -> diffusers.AutoencoderDC:
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41,
    )


def _pixart(*, alpha: bool, layers: int, out_channels: int = 8) -> diffusers.PixArtTransformer2DModel:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=layers,
        cross_attention_dim=24,
        caption_channels=24,
        sample_size=128 if alpha else 8,
        interpolation_scale=2 if alpha else 1,
        use_additional_conditions=alpha,
    )


def _sana(layers: int, **extra: Any) -> diffusers.SanaTransformer2DModel:
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=24,
        sample_size=8,
        patch_size=1,
        **extra,
    )


DPM_VP = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
DPM_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def build_pipeline(kind: str, seed: int, *, layers: int = 2) -> Any:
    """A diffusers pipeline of `kind` with random weights. Gemma's tokenizer opens, T5's closes with a special token."""
    parts: dict[str, Any]
    if kind.startswith("pixart"):
        alpha = kind.startswith("pixart-alpha")
        cls = diffusers.PixArtAlphaPipeline if alpha else diffusers.PixArtSigmaPipeline
        scheduler: Any = diffusers.DPMSolverMultistepScheduler(**DPM_VP)
        if kind.endswith("ddim"):
            scheduler = diffusers.DDIMScheduler(**DPM_VP, clip_sample=False)
        parts = {
            "tokenizer": word_tokenizer(bos=False),
            "text_encoder": _t5(),
            "vae": _kl(),
            "transformer": _pixart(alpha=alpha, layers=layers),
        }
    else:
        sprint = kind == "sana-sprint"
        cls = diffusers.SanaSprintPipeline if sprint else diffusers.SanaPipeline
        scheduler = diffusers.SCMScheduler() if sprint else diffusers.DPMSolverMultistepScheduler(**DPM_FLOW)
        extra = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1.0} if sprint else {}
        parts = {
            "tokenizer": word_tokenizer(bos=True),
            "text_encoder": _gemma(),
            "vae": _dc(),
            "transformer": _sana(layers, **extra),
        }
    for index, name in enumerate(("text_encoder", "vae", "transformer")):
        randomize(parts[name], seed + index)
        parts[name].eval()
    pipeline = cls(scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
