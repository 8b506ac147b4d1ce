"""SentencePiece models (`spiece.model`) read without the sentencepiece library, and written as `tokenizer.json`.

T5 repositories from before 2023, PixArt's among them, ship only a SentencePiece model. The file is one protocol buffer
(google/sentencepiece, `sentencepiece_model.proto`); the few fields that decide how text is cut are read here by hand.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from edgedit.errors import CheckpointError

__all__ = ["SentencePieceModel", "read_sentencepiece", "tokenizer_json_from_spiece"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_END = "</s>"
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class SentencePieceModel:
    """What a SentencePiece model says about cutting text, under the names of `sentencepiece_model.proto`.

    `pieces` holds `(text, score, type)` in the order of their ids.
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: str = "unigram"
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    precompiled_charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Reads `spiece.model` or `tokenizer.model`. Raises CheckpointError when the file is missing or damaged."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); fetch the tokenizer folder again") from None
    try:
        model = _model(data)
    except (ValueError, struct.error, IndexError):
        raise CheckpointError(f"{path}: not a whole SentencePiece model; fetch the tokenizer folder again") from None
    scores_are_numbers = all(math.isfinite(score) for _, score, _ in model.pieces)
    if not scores_are_numbers or not any(kind == _UNKNOWN for _, _, kind in model.pieces):
        raise CheckpointError(f"{path}: the SentencePiece model has no usable vocabulary; fetch it again")
    return model


def tokenizer_json_from_spiece(path: Path, *, extra_ids: int = 100) -> str:
    """The text of a `tokenizer.json` that cuts text as the SentencePiece model at `path` does, for a T5-like encoder.

    `</s>` closes every text and `extra_ids` sentinels (`<extra_id_99>` … `<extra_id_0>`) follow the vocabulary, as in
    transformers' `T5Tokenizer`. Raises CheckpointError when the file is damaged, is not a unigram model, or uses a
    feature that `tokenizer.json` cannot express.
    """
    model = read_sentencepiece(path)
    _refuse_inexpressible(path, model)
    try:
        return _t5_tokenizer(model, extra_ids).to_str()
    except Exception as error:  # the library raises a bare Exception
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a usable SentencePiece model ({reason}); fetch it again") from None


def _t5_tokenizer(model: SentencePieceModel, extra_ids: int) -> Tokenizer:
    sentinels = [f"<extra_id_{index}>" for index in range(extra_ids - 1, -1, -1)]
    vocabulary = [(text, score) for text, score, _ in model.pieces] + [(text, 0.0) for text in sentinels]
    unknown = next(index for index, (_, _, kind) in enumerate(model.pieces) if kind == _UNKNOWN)
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback))

    special = [text for text, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL)] + sentinels
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])

    steps: list[normalizers.Normalizer] = []
    if model.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.precompiled_charsmap))
    steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", pair=f"$A {_END} $B {_END}", special_tokens=[(_END, tokenizer.token_to_id(_END))]
    )
    return tokenizer


def _refuse_inexpressible(path: Path, model: SentencePieceModel) -> None:
    problems = {
        f"is a {model.model_type} model": model.model_type != "unigram",
        "puts whitespace behind the word": model.treat_whitespace_as_suffix,
        "keeps extra whitespace": not model.remove_extra_whitespaces,
        "does not escape whitespace": not model.escape_whitespaces,
        "has user-defined pieces": any(kind == _USER_DEFINED for _, _, kind in model.pieces),
        f"has no {_END!r}": all(text != _END for text, _, _ in model.pieces),
        "has unused pieces": any(kind == _UNUSED for _, _, kind in model.pieces),
    }
    for problem, present in problems.items():
        if present:
            raise CheckpointError(
                f"{path}: {problem}, which cannot be turned into tokenizer.json here; "
                "save the tokenizer once with transformers (save_pretrained) to get one"
            )


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(value)))
        elif number == 2:
            trainer.update(_fields(_message(value)))
        elif number == 3:
            normalizer.update(_fields(_message(value)))
    return SentencePieceModel(
        pieces=pieces,
        model_type=_MODEL_TYPES[_integer(trainer.get(3, 1))],
        byte_fallback=bool(trainer.get(35, 0)),
        treat_whitespace_as_suffix=bool(trainer.get(24, 0)),
        precompiled_charsmap=_message(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _message(value).decode("utf-8")
        elif number == 2:
            score = float(struct.unpack("<f", _message(value))[0])
        elif number == 3:
            kind = _integer(value)
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protocol-buffer message: `(number, value)`, fixed-width values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("the message is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value
