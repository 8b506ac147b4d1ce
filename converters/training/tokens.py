"""The tokenizer of the embedded model: lower-cased words and marks, closed vocabulary, `</s>` at the end."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase, Sequence, StripAccents
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from edgedit.converters.training.captions import vocabulary

__all__ = ["MAX_TOKENS", "PAD", "SPECIAL", "UNKNOWN", "build_tokenizer", "padding_tokenizer", "wrap_tokenizer"]

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPECIAL = (PAD, END, UNKNOWN)
MAX_TOKENS = 36
"""Longest token sequence of a caption, `</s>` counted."""


def build_tokenizer() -> Tokenizer:
    """Words and marks become ids in a fixed order, the special tokens first; other words become `<unk>`."""
    words = {token: index for index, token in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = Sequence([NFKC(), Lowercase(), StripAccents()])
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, words[END])])
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same for transformers and diffusers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="right",
        model_max_length=300,
    )


def padding_tokenizer() -> Tokenizer:
    """The tokenizer for training: every caption is padded to `MAX_TOKENS`."""
    tokenizer = build_tokenizer()
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD, length=MAX_TOKENS, direction="right")
    return tokenizer
