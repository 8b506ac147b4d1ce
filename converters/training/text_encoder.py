"""The text encoder of the embedded model, trained by itself to know what its captions say.

Trained through a denoiser alone it never learned to bind: in T5 scores are not scaled and positions are known by a
learned bias only, and the scores saturate on word identities before that bias has grown. "a red circle on blue" and "a
blue circle on red" then look the same, after thousands of steps. So the bias begins with heads that look at a word's
neighbours, and the network is asked directly what each noun stands for (`words`): it knows after fifty steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from edgedit.converters.training.captions import caption
from edgedit.converters.training.loop import autocast, step_rng
from edgedit.converters.training.tokens import build_tokenizer, padding_tokenizer
from edgedit.converters.training.words import WordHead, noun_facts, word_loss
from edgedit.converters.training.world import Scene

__all__ = ["TEXT_ENCODER_CONFIG", "TextStage", "build_text_encoder"]

TEXT_ENCODER_CONFIG: dict[str, Any] = {
    "d_model": 192,
    "d_kv": 32,
    "d_ff": 512,
    "num_layers": 3,
    "num_heads": 6,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
NEIGHBOUR_BIAS = 4.0


def build_text_encoder(config: dict[str, Any] | None = None) -> T5EncoderModel:
    """A freshly initialised encoder for the vocabulary of the captions, its first heads looking at neighbours."""
    vocabulary_size = build_tokenizer().get_vocab_size()
    text_encoder = T5EncoderModel(T5Config(vocab_size=vocabulary_size, **(config or TEXT_ENCODER_CONFIG)))
    bias = text_encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    after = bias.shape[0] // 2
    with torch.no_grad():
        # Buckets 1 and 2 are the words one and two before, `after` + 1 and + 2 those after.
        for head, bucket in zip(range(bias.shape[1]), (1, after + 1, 2, after + 2), strict=False):
            bias[bucket, head] += NEIGHBOUR_BIAS
    return text_encoder


class TextStage:
    """Training of the text encoder on captions and the scenes that they describe."""

    name = "text_encoder"
    hidden_matrices: frozenset[str] = frozenset()

    def __init__(
        self,
        scenes: list[Scene],
        *,
        seed: int,
        device: torch.device,
        config: dict[str, Any] | None = None,
        batch_size: int = 192,
        learning_rate: float = 1e-3,
    ) -> None:
        torch.manual_seed(seed)
        self.text_encoder = build_text_encoder(config)
        head = WordHead(self.text_encoder.config.d_model)
        self.modules: nn.Module = nn.ModuleDict({"text_encoder": self.text_encoder, "word_head": head}).to(device)
        self.learning_rate = learning_rate
        self._head, self._scenes, self._seed, self._device = head, scenes, seed, device
        self._batch_size = batch_size
        self._tokenizer = padding_tokenizer()

    def loss(self, step: int) -> Tensor:
        """Error in the facts that the nouns of a batch of captions stand for."""
        rng = step_rng(self._seed, step, purpose=5)
        scenes = [self._scenes[int(i)] for i in rng.integers(len(self._scenes), size=self._batch_size)]
        encodings = self._tokenizer.encode_batch([caption(scene, rng)[0] for scene in scenes])
        length = max(sum(encoding.attention_mask) for encoding in encodings)
        ids = torch.tensor([encoding.ids[:length] for encoding in encodings]).to(self._device)
        mask = torch.tensor([encoding.attention_mask[:length] for encoding in encodings]).to(self._device)
        facts = np.stack([noun_facts(e.tokens[:length], s) for e, s in zip(encodings, scenes, strict=True)])
        with autocast(self._device):
            states = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = self._head(states)
        return word_loss(logits, torch.from_numpy(facts).to(self._device))
