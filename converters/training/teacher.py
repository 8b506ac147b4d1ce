"""The transformer of the embedded model, trained by flow matching.

Path: rectified flow, x_t = (1 - sigma) x_0 + sigma noise, the network predicts noise - x_0 and is told sigma · 1000.
PixArt itself was trained on a variance-preserving path with noise prediction; flow is chosen here because its target
stays well conditioned up to sigma = 1 (x_0 = x_1 - velocity, where noise prediction divides by a vanishing alpha),
because its trajectories are straighter, so few steps suffice, and because distillation to fewer steps starts there.

References: Liu et al., "Flow Straight and Fast" (2022); Esser et al., "Scaling Rectified Flow Transformers" (2024),
section 3.1 (logit-normal sigma); Chen et al., "PixArt-alpha" (2023), section 2.3 (the block).
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from edgedit.converters.training.captions import caption
from edgedit.converters.training.layout import LayoutHead, layout_loss, layout_of, object_cells
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.tokens import padding_tokenizer
from edgedit.converters.training.world import Scene

__all__ = ["TRANSFORMER_CONFIG", "Denoiser", "PlainAttention", "TeacherStage", "build_transformer"]

TRANSFORMER_CONFIG: dict[str, Any] = {
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 6,
    "cross_attention_dim": 256,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": 192,
    "interpolation_scale": 1,
    "use_additional_conditions": False,
}
CAPTION_DROPOUT = 0.1
SIGMA_SHIFT = 5.0
"""Shift of sigma towards noise in training (and in drawing, see `export`).

Flat pictures are redundant: at sigma 0.7 every shape can still be seen in the noise, and what the caption decides is
decided above that. Measured on a half-trained model, taking the caption away raised the loss from 0.14 to 0.15 at sigma
0.5 and from 0.69 to 0.88 at 0.95; an unshifted logit-normal draws few sigmas up there.
"""
OBJECT_WEIGHT = 6.0
"""Weight of the error where objects are, added to that of the background, in the steps that have such weights.

Objects cover a fifth of the latents' cells. Begun from real scenes at sigma 0.4, a model trained without weights drew
94 % of two-object scenes right, from 0.75 72 % and from 0.85 53 %, no fewer than from noise: what was missing were
exact outlines, not the right objects. Weights sharpen outlines, but draw the mean of what could be towards objects, so
that more of them come out than the caption has; they fade out between `SEEN` and 1, and steps without them must follow.
"""
SEEN = 0.85
LAYOUT_WEIGHT = 0.1
LAYOUT_DEPTH = 4
"""Blocks before the layout head (`layout`)."""
UNKNOWN_WORD_SHARE = 0.04
"""Share of captions with one word put in that the vocabulary lacks, so that such words do no harm."""


_IS_HIDDEN = re.compile(r"transformer_blocks\.\d+\.(attn|ff).*weight$").search


class PlainAttention:
    """Attention as matrix products and a softmax.

    For 64 tokens on CPU this trains twice as fast as the fused kernel, whose backward pass in bfloat16 is slow.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:
            return x.view(batch, x.shape[1], attn.heads, -1).transpose(1, 2)

        query, key, value = split(attn.to_q(hidden_states)), split(attn.to_k(context)), split(attn.to_v(context))
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        if attention_mask is not None:
            scores = scores + attention_mask.view(batch, 1, 1, -1).to(scores.dtype)
        mixed = scores.softmax(-1).to(value.dtype) @ value
        result: Tensor = attn.to_out[0](mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return result


class Denoiser(nn.Module):
    """The transformer with the layout head that helps to train it."""

    def __init__(self, transformer: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.layout_head = LayoutHead(transformer.inner_dim)
        self._hidden_states: Tensor | None = None
        blocks = transformer.transformer_blocks
        blocks[min(LAYOUT_DEPTH, len(blocks)) - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, hidden_states: Tensor) -> None:
        self._hidden_states = hidden_states

    def forward(self, text: Tensor, mask: Tensor, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and layout.

        Takes text states (B, L, width), mask (B, L) int64, latents (B, 8, 16, 16) and timesteps (B,) in [0, 1000];
        returns the velocity (B, 8, 16, 16) and the logits (B, 64, classes) of `LayoutHead`.
        """
        velocity: Tensor = self.transformer(
            latents,
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        assert self._hidden_states is not None
        return velocity, self.layout_head(self._hidden_states)


def build_transformer(config: dict[str, Any] | None = None) -> PixArtTransformer2DModel:
    """A freshly initialised transformer, with small gates and silent outputs as in PixArt."""
    transformer = PixArtTransformer2DModel(**(config or TRANSFORMER_CONFIG))
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(transformer.adaln_single.linear.weight, std=0.02)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class TeacherStage:
    """Training of the transformer on cached latents, behind a text encoder that stays as it is."""

    name = "transformer"

    def __init__(
        self,
        latents: npt.NDArray[np.float16],
        scenes: list[Scene],
        text_encoder: T5EncoderModel,
        *,
        seed: int,
        device: torch.device,
        transformer_config: dict[str, Any] | None = None,
        batch_size: int = 64,
        learning_rate: float = 8e-4,
        layout_weight: float = LAYOUT_WEIGHT,
        weighted_steps: int = 0,
        sigma_shift: float = SIGMA_SHIFT,
        compiled: bool = True,
        transformer: PixArtTransformer2DModel | None = None,
        guide: PixArtTransformer2DModel | None = None,
        guidance_scale: float = 1.0,
        borrowed_steps: int = 0,
    ) -> None:
        """`latents` are (N, 8, 16, 16), zero mean and unit variance, in the order of `scenes`; `transformer` is where
        training begins, a fresh one by default. In the first `weighted_steps` steps errors weigh more at objects.

        With a `guide`, a finished transformer, guidance is trained in: what the caption adds to the guide's velocity is
        added `guidance_scale` - 1 times to the target, and in the first `borrowed_steps` steps the guide's velocity
        itself takes the place of the picture's.
        """
        torch.manual_seed(seed)
        transformer = transformer or build_transformer(transformer_config)
        transformer.set_attn_processor(PlainAttention())
        self.modules: nn.Module = Denoiser(transformer).to(device)
        self._text_encoder = text_encoder.eval().requires_grad_(False).to(device)
        self.hidden_matrices = frozenset(
            name for name, parameter in self.modules.named_parameters() if parameter.ndim == 2 and _IS_HIDDEN(name)
        )
        self.learning_rate = learning_rate
        self._latents = latents
        self._scenes = scenes
        self._seed = seed
        self._device = device
        self._batch_size, self._layout_weight = batch_size, layout_weight
        self._layout = torch.from_numpy(layout_of(scenes, latents.shape[-1] // transformer.config.patch_size))
        self._objects = torch.from_numpy(object_cells(scenes, latents.shape[-1]))
        self._sigma_shift, self._weighted_steps = sigma_shift, weighted_steps
        self._forward = torch.compile(self.modules) if compiled else self.modules
        self._guide: Any = None
        self._extra_guidance, self._borrowed_steps = guidance_scale - 1, borrowed_steps
        if guide is not None:
            guide.set_attn_processor(PlainAttention())
            frozen = Denoiser(guide.eval().requires_grad_(False)).to(device)
            self._guide = torch.compile(frozen) if compiled else frozen
        self._tokenizer = padding_tokenizer()

    def _caption(self, index: int, rng: np.random.Generator) -> str:
        if rng.random() < CAPTION_DROPOUT:
            return ""
        text, _ = caption(self._scenes[index], rng)
        if rng.random() < UNKNOWN_WORD_SHARE:
            words = text.split(" ")
            words.insert(int(rng.integers(len(words) + 1)), "unheard")
            text = " ".join(words)
        return text

    def loss(self, step: int) -> Tensor:
        """Weighted mean squared error of the velocity over one batch, and a part of the error in the layout."""
        rng = step_rng(self._seed, step, purpose=3)
        chosen = rng.integers(len(self._scenes), size=self._batch_size)
        encodings = self._tokenizer.encode_batch([self._caption(int(i), rng) for i in chosen])
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        clean = torch.from_numpy(self._latents[chosen].astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        logit = rng.standard_normal(self._batch_size, dtype=np.float32) + math.log(self._sigma_shift)
        sigma = torch.sigmoid(torch.from_numpy(logit))
        weight = sigma.view(-1, 1, 1, 1)
        noisy = (1 - weight) * clean + weight * noise
        rows = torch.from_numpy(chosen)
        seen = ((1 - sigma) / (1 - SEEN)).clamp(max=1).view(-1, 1, 1)
        extra = OBJECT_WEIGHT if step < self._weighted_steps else 0.0
        emphasis = 1 + extra * seen * self._objects[rows]
        ids, mask, noisy, timestep, target, layout, emphasis = (
            x.to(self._device) for x in (ids, mask, noisy, sigma * 1000, noise - clean, self._layout[rows], emphasis)
        )
        text = self._states(ids, mask)
        if self._guide is not None:
            target = self._guided(target, text, mask, noisy, timestep, borrowed=step < self._borrowed_steps)
        with autocast(self._device):
            velocity, logits = self._forward(text, mask, noisy, timestep)
        error = (velocity.float() - target).square().mean(1)
        loss: Tensor = (error * emphasis).sum() / emphasis.sum()
        return loss + self._layout_weight * layout_loss(logits, layout) if self._layout_weight else loss

    @torch.no_grad()
    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self._text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states

    @torch.no_grad()
    def _guided(
        self, target: Tensor, text: Tensor, mask: Tensor, noisy: Tensor, timestep: Tensor, *, borrowed: bool
    ) -> Tensor:
        """A target velocity with guidance added (Tang et al., "Diffusion Models without Classifier-free Guidance",
        2025, equation 9, with a frozen guide)."""
        encoding = self._tokenizer.encode("")
        ids, empty = (
            torch.tensor([row] * len(noisy), device=self._device) for row in (encoding.ids, encoding.attention_mask)
        )
        with autocast(self._device):
            plain: Tensor = self._guide(text, mask, noisy, timestep)[0].float()
            without: Tensor = self._guide(self._states(ids, empty), empty, noisy, timestep)[0].float()
        return (plain if borrowed else target) + self._extra_guidance * (plain - without)
