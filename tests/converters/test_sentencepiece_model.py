from __future__ import annotations

import contextlib
import io
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import T5Tokenizer

from edgedit.converters.sentencepiece_model import read_sentencepiece, tokenizer_json_from_spiece
from edgedit.errors import CheckpointError

WORDS = [
    *("a", "an", "the", "red", "blue", "green", "circle", "square", "star", "heart", "above", "left", "of", "on"),
    *("white", "photo", "cat", "sleeping", "naïve", "café", "straße", "ｆｕｌｌ", "ﬁre", "東京", "привет", "мир"),
    *("10", "2024", "3.5", "don't", "it's", "high-quality,", "4k"),
]
RANGES = [
    *((0x20, 0x7E), (0xA0, 0x17F), (0x300, 0x36F), (0x400, 0x4FF), (0x600, 0x6FF), (0x900, 0x97F), (0x2000, 0x206F)),
    *((0x2070, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFDFF), (0xFE00, 0xFFEF)),
    *((0x1F300, 0x1FAFF), (0x1, 0x20)),
]


def train(path: Path, rng: random.Random, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A freshly trained model of T5's kind, written to `path`."""
    words = WORDS + ["".join(rng.choices("aeioubcdstrlmn", k=rng.randint(2, 9))) for _ in range(300)]
    corpus = [" ".join(rng.choices(words, k=rng.randint(3, 15))) for _ in range(2000)]
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(corpus),
            "model_writer": buffer,
            "vocab_size": rng.randint(350, 700),
            "model_type": "unigram",
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
            "normalization_rule_name": "nmt_nfkc",
            "hard_vocab_limit": False,
            "num_threads": 1,
            "minloglevel": 2,
            **options,
        }
    )
    path.write_bytes(buffer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(0, 25)):
        kind = rng.random()
        if kind < 0.4:
            parts.append(rng.choice(WORDS))
        elif kind < 0.6:
            parts.append(" " * rng.randint(1, 3))
        else:
            low, high = rng.choice(RANGES)
            parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
    return "".join(parts)


def has_loose_marks(text: str) -> bool:
    """Whether combining marks, joiners or half-width jamo stand in the text by themselves. The tokenizers library
    normalizes grapheme by grapheme and sentencepiece by longest match, so there the two may differ, as transformers'
    does."""
    joiners = "\u200c\u200d"
    return any(unicodedata.category(c)[0] == "M" or c in joiners or 0xFFA0 <= ord(c) <= 0xFFDC for c in text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    seed = random.SystemRandom().randrange(2**32)
    print(f"random seed {seed}")
    path = tmp_path_factory.mktemp("spiece") / "spiece.model"
    return path, train(path, random.Random(seed))


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"random seed {seed}")
    return random.Random(seed)


def test_the_fields_read_by_hand_are_those_of_the_protocol_buffer(
    model: tuple[Path, sentencepiece.SentencePieceProcessor],
) -> None:
    path, _ = model
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    proto.ParseFromString(path.read_bytes())
    found = read_sentencepiece(path)
    assert found.pieces == [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    assert found.precompiled_charsmap == proto.normalizer_spec.precompiled_charsmap
    assert len(found.precompiled_charsmap) > 1000
    assert (found.model_type, found.byte_fallback, found.add_dummy_prefix) == ("unigram", False, True)


def test_ids_are_those_of_sentencepiece_on_random_unicode(
    model: tuple[Path, sentencepiece.SentencePieceProcessor], rng: random.Random
) -> None:
    path, reference = model
    tokenizer = Tokenizer.from_str(tokenizer_json_from_spiece(path))
    compared = 0
    for _ in range(3000):
        text = random_text(rng)
        if not has_loose_marks(text):
            compared += 1
            assert tokenizer.encode(text).ids == [*reference.encode(text), 1], repr(text)
    assert compared > 1200
    decomposed = [unicodedata.normalize("NFD", word) for word in WORDS]
    for _ in range(200):
        text = " ".join(rng.choices(decomposed, k=5))
        assert tokenizer.encode(text).ids == [*reference.encode(text), 1], repr(text)


def test_ids_are_those_of_transformers_t5_tokenizer_on_random_unicode(
    model: tuple[Path, sentencepiece.SentencePieceProcessor], rng: random.Random
) -> None:
    path, _ = model
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    reference = T5Tokenizer.from_pretrained(path.parent)
    tokenizer = Tokenizer.from_str(tokenizer_json_from_spiece(path))
    assert tokenizer.get_vocab_size() == len(reference)
    for _ in range(2000):
        text = random_text(rng)
        if rng.random() < 0.2:
            text += rng.choice(["</s>", " <pad> ", "<extra_id_7>", "<unk>x", "<extra_id_99> a"])
        assert tokenizer.encode(text).ids == reference(text)["input_ids"], repr(text)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "identity"},
        {"normalization_rule_name": "nfkc_cf"},
        {"add_dummy_prefix": False},
        {"byte_fallback": True},
    ],
)
def test_options_of_the_model_are_honoured(tmp_path: Path, options: dict[str, Any], rng: random.Random) -> None:
    reference = train(tmp_path / "spiece.model", rng, **options)
    tokenizer = Tokenizer.from_str(tokenizer_json_from_spiece(tmp_path / "spiece.model", extra_ids=0))
    for _ in range(300):
        text = random_text(rng)
        if has_loose_marks(text):
            continue
        assert tokenizer.encode(text).ids == [*reference.encode(text), 1], repr(text)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model_type": "bpe"}, "is a bpe model"),
        ({"model_type": "char"}, "is a char model"),
        ({"treat_whitespace_as_suffix": True}, "whitespace behind the word"),
        ({"remove_extra_whitespaces": False}, "keeps extra whitespace"),
        ({"user_defined_symbols": ["<sks>"]}, "user-defined pieces"),
        ({"eos_id": -1}, "has no '</s>'"),
    ],
)
def test_what_tokenizer_json_cannot_express_is_refused(
    tmp_path: Path, options: dict[str, Any], problem: str, rng: random.Random
) -> None:
    train(tmp_path / "spiece.model", rng, **options)
    with pytest.raises(CheckpointError, match=problem) as caught:
        tokenizer_json_from_spiece(tmp_path / "spiece.model")
    assert "\n" not in str(caught.value)


def test_a_damaged_model_is_refused_in_one_line(
    tmp_path: Path, model: tuple[Path, sentencepiece.SentencePieceProcessor], rng: random.Random
) -> None:
    sound = model[0].read_bytes()
    damaged = tmp_path / "spiece.model"
    for _ in range(200):
        data = bytearray(sound[: rng.choice([len(sound), rng.randrange(len(sound))])])
        for _ in range(rng.randint(0, 20)):
            if data:
                data[rng.randrange(rng.choice([3000, 12_000, len(data)]) % len(data) + 1) - 1] = rng.randrange(256)
        damaged.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            json.loads(tokenizer_json_from_spiece(damaged))
    for junk in (b"", b"\x00", b"hello", b"\xff" * 100, rng.randbytes(1000)):
        damaged.write_bytes(junk)
        with pytest.raises(CheckpointError):
            tokenizer_json_from_spiece(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizer_json_from_spiece(tmp_path / "nothing")
