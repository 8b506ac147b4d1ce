from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import GemmaTokenizer, T5Tokenizer

from edgedit.converters.tokenizer import read_tokenizer
from edgedit.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Gemma-like tokenizer as transformers saves it."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["a red circle above a blue square"] * 20, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    GemmaTokenizer(vocab=model["vocab"], merges=merges).save_pretrained(tmp_path)
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("in_config", [True, False])
def test_first_and_last_tokens_are_those_that_transformers_adds(folder: Path, in_file: bool, in_config: bool) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    single = "<bos> $A <eos>" if in_file else "$A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    configure(folder, add_bos_token=in_config, add_eos_token=in_config)
    reference = GemmaTokenizer.from_pretrained(folder)
    found = Tokenizer.from_str(read_tokenizer(folder).json)
    for text in ("", "a red circle", "<bos> a</s>"):
        assert found.encode(text).ids == reference(text)["input_ids"]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("form", [str, lambda token: {"content": token, "special": True}])
def test_the_padding_token_is_the_one_that_is_named(folder: Path, where: str, form: Any) -> None:
    assert read_tokenizer(folder).pad_token_id == 0
    (folder / "tokenizer_config.json").unlink()
    (folder / where).write_text(json.dumps({"pad_token": form("<mask>"), "unk_token": form("<bos>")}))
    found = read_tokenizer(folder)
    assert (found.pad_token_id, found.unk_token_id) == (4, 2)


def test_without_a_name_the_padding_token_is_that_of_the_file_itself(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert read_tokenizer(folder).pad_token_id == 0
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(pad_id=1, pad_token="<eos>")
    backend.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder).pad_token_id == 1


def test_truncation_and_padding_do_not_get_into_the_bundle(folder: Path) -> None:
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    raw = json.loads(read_tokenizer(folder).json)
    assert raw["truncation"] is None
    assert raw["padding"] is None


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("tokenizer.json", None, "neither tokenizer.json nor spiece.model"),
        ("tokenizer.json", "", "not a tokenizer"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not a JSON object"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"pad_token": "<none>"}', "padding token '<none>' is not in the vocabulary"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    folder: Path, name: str, text: str | None, problem: str
) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=problem) as caught:
        read_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_model_serves_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle above a blue square", "the cat sleeps"] * 20),
        model_writer=buffer,
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(buffer.getvalue())
    for extra_ids in (100, 7):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": extra_ids}))
        reference = T5Tokenizer.from_pretrained(tmp_path)
        found = read_tokenizer(tmp_path)
        assert (found.pad_token_id, found.unk_token_id) == (0, 2)
        backend = Tokenizer.from_str(found.json)
        assert backend.get_vocab_size() == len(reference)
        for text in ("a red cat", "<extra_id_3> above"):
            assert backend.encode(text).ids == reference(text)["input_ids"]
    for wrong in (-1, 10**9, "many"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": wrong}))
        with pytest.raises(CheckpointError, match="no number of sentinels"):
            read_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_utf_8_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read as UTF-8"):
        read_tokenizer(folder)
