"""The tokenizer of a checkpoint, and the prompt recipe that a manifest gives it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from edgedit.converters.sentencepiece_model import tokenizer_json_from_spiece
from edgedit.errors import CheckpointError

__all__ = ["CheckpointTokenizer", "prompt_recipe", "read_tokenizer"]


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A checkpoint's tokenizer: the text of its `tokenizer.json`, without truncation and padding, and two of its ids.

    `unk_token_id` is None when the vocabulary covers every text (byte-level or byte fallback without such a token).
    """

    json: str
    pad_token_id: int
    unk_token_id: int | None


def read_tokenizer(folder: Path) -> CheckpointTokenizer:
    """Reads a tokenizer folder: `tokenizer.json` if there is one, otherwise the SentencePiece model `spiece.model`.

    Raises CheckpointError when neither is there, a file is damaged, or no padding token is named.
    """
    config = _read_config(folder / "special_tokens_map.json") | _read_config(folder / "tokenizer_config.json")
    path = folder / "tokenizer.json"
    if path.is_file():
        source = _read_text(path)
    elif (path := folder / "spiece.model").is_file():
        source = tokenizer_json_from_spiece(path, extra_ids=_extra_ids(config, folder))
    else:
        raise CheckpointError(
            f"{folder}: has neither tokenizer.json nor spiece.model; save the tokenizer with transformers "
            "(save_pretrained) or fetch the folder again"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises a bare Exception
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a tokenizer ({reason}); fetch it again") from None
    padding = (backend.padding or {}).get("pad_token", "<pad>")
    pad_token = _token(config, "pad_token", padding)
    pad_token_id = backend.token_to_id(pad_token)
    if pad_token_id is None:
        raise CheckpointError(f"{folder}: the padding token {pad_token!r} is not in the vocabulary; fetch it again")
    # Not written by the library, which would round the scores of a unigram vocabulary and so break ties another way.
    text = json.dumps({**json.loads(source), "truncation": None, "padding": None}, ensure_ascii=False)
    return CheckpointTokenizer(text, pad_token_id, backend.token_to_id(_token(config, "unk_token", "<unk>")))


def prompt_recipe(
    tokenizer: CheckpointTokenizer,
    *,
    max_length: int,
    instruction: Sequence[str] = (),
    lower: bool = True,
    strip: bool = True,
    padding: str = "max_length",
    negative_prompt: str = "",
    path: str = "tokenizer/tokenizer.json",
) -> dict[str, object]:
    """The section `prompt` of a manifest, as diffusers' PixArt and SANA pipelines treat text.

    Args:
        max_length: `max_sequence_length` of the pipeline: 120 for PixArt-alpha, 300 for PixArt-Sigma and SANA.
        instruction: `complex_human_instruction` of SANA, which precedes the positive prompt. The transformer then sees
            the first token and the last `max_length` - 1 (diffusers, `SanaPipeline.encode_prompt`).
        path: where the bundle keeps the tokenizer.
    """
    before = "\n".join(instruction)
    limit, select = max_length, None
    if before:
        backend = tokenizers.Tokenizer.from_str(tokenizer.json)
        limit = len(backend.encode(before)) + max_length - 2
        select = {"first": 1, "last": max_length - 1}
    return {
        "tokenizer": path,
        "lower": lower,
        "strip": strip,
        "add_special_tokens": True,
        "padding": padding,
        "pad_token_id": tokenizer.pad_token_id,
        "unk_token_id": tokenizer.unk_token_id,
        "positive": {"template": before + "{prompt}", "max_length": limit, "select": select},
        "negative": {"template": "{prompt}", "max_length": max_length, "select": None},
        "negative_prompt": negative_prompt,
    }


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: cannot be read as UTF-8 text; fetch it again") from None


def _extra_ids(config: dict[str, object], folder: Path) -> int:
    value = config.get("extra_ids", 100)
    if not isinstance(value, int) or not 0 <= value <= 10_000:
        raise CheckpointError(f"{folder}: extra_ids {value!r} in tokenizer_config.json is no number of sentinels")
    return value


def _read_config(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch the tokenizer folder again")
    return config


def _token(config: dict[str, object], key: str, default: str) -> str:
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else default
