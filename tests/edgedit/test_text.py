from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, SanaPipeline, SanaSprintPipeline
from diffusers.utils import logging as diffusers_logging
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer, T5Tokenizer

from edgedit.converters.tokenizer import prompt_recipe, read_tokenizer
from edgedit.errors import BundleError, InputError
from edgedit.json_reader import JsonNode
from edgedit.manifest import Prompt
from edgedit.manifest_parser import parse_manifest
from edgedit.text import Tokenizer

WORDS = [
    *(
        "a",
        "red",
        "Blue",
        "circle",
        "SQUARE",
        "above",
        "photo",
        "of",
        "the",
        "cat,",
        "naïve",
        "ÉTÉ",
        "straße",
        "İstanbul",
    ),
    *("東京", "привет", "🦊", "3.5", "don't", "x<unk>", "</s>", "<eos>", "ﬁre", "  ", "\n", "\t", "ΑΣ", "q\u0301z"),
]
diffusers_logging.set_verbosity_error()
INSTRUCTION = ["Given a user prompt, draw:", "- a red circle", "User Prompt: "]
Manifests = Callable[[random.Random], dict[str, Any]]
PromptOf = Callable[[dict[str, object]], Prompt]


class EchoEncoder(torch.nn.Module):
    """A text encoder whose output is its input: what the pipeline hands over comes out of `encode_prompt`."""

    dtype = torch.float64

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.stack([input_ids, attention_mask], dim=-1).to(torch.float64),)


def corpus() -> list[str]:
    generator = random.Random(0)
    return [" ".join(generator.choices(WORDS, k=8)).lower() for _ in range(300)] + INSTRUCTION * 20


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly trained tokenizer as transformers saves a T5 one."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([line for line in corpus() if "🦊" not in line], trainer)
    vocabulary = [tuple(item) for item in json.loads(backend.to_str())["model"]["vocab"]]
    folder = tmp_path_factory.mktemp("t5")
    T5Tokenizer(vocab=vocabulary, extra_ids=10).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly trained tokenizer as transformers saves a Gemma one: BPE, byte fallback, <bos> first."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(corpus(), trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    folder = tmp_path_factory.mktemp("gemma")
    GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True).save_pretrained(folder)
    return folder


@pytest.fixture
def prompt_of(rng: random.Random, random_manifest: Manifests) -> PromptOf:
    """A function that reads the section `prompt` of a manifest."""

    def read(section: dict[str, object]) -> Prompt:
        manifest = random_manifest(rng) | {"prompt": section}
        prompt = parse_manifest(JsonNode(manifest, "manifest.json")).prompt
        assert prompt is not None
        return prompt

    return read


@pytest.fixture
def load(tmp_path: Path, prompt_of: PromptOf) -> Callable[..., Tokenizer]:
    """A function that converts a tokenizer folder with a recipe, and loads the result as a runtime does."""

    def load(folder: Path, **options: Any) -> Tokenizer:
        found = read_tokenizer(folder)
        (tmp_path / "tokenizer.json").write_text(found.json, encoding="utf-8")
        return Tokenizer(tmp_path / "tokenizer.json", prompt_of(prompt_recipe(found, **options)))

    return load


def random_prompt(rng: random.Random) -> str:
    length = rng.choice([0, 0, 1, 3, 10, 40, 200])
    return rng.choice(["", " "]).join(rng.choices(WORDS, k=length)) + rng.choice(["", " ", "\u3000"])


def both(tensor: torch.Tensor) -> tuple[list[int], list[int]]:
    return tensor[0, :, 0].long().tolist(), tensor[0, :, 1].long().tolist()


def seen(tokens: Any) -> tuple[list[int], list[int]]:
    """Ids and mask at the positions that the transformer sees."""
    select = slice(None) if tokens.select is None else tokens.select
    assert tokens.ids.dtype == tokens.mask.dtype == np.int64
    assert tokens.n_tokens == tokens.mask.sum()
    return tokens.ids[select].tolist(), tokens.mask[select].tolist()


@pytest.mark.parametrize(("pipeline_class", "limit"), [(PixArtAlphaPipeline, 120), (PixArtSigmaPipeline, 300)])
def test_pixart_prompts_become_the_tokens_of_diffusers(
    pipeline_class: Any, limit: int, t5_folder: Path, load: Callable[..., Tokenizer], rng: random.Random
) -> None:
    reference = T5Tokenizer.from_pretrained(t5_folder)
    pipeline = pipeline_class(reference, EchoEncoder(), vae=None, transformer=None, scheduler=None)
    tokenizer = load(t5_folder, max_length=limit)
    cut = 0
    for _ in range(60):
        prompt, negative = random_prompt(rng), random_prompt(rng)
        embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt(
            prompt, negative_prompt=negative, device="cpu", max_sequence_length=limit
        )
        for text, found, found_mask in ((prompt, embeds, mask), (negative, negative_embeds, negative_mask)):
            tokens = tokenizer.encode(text, negative=text is negative)
            assert seen(tokens) == both(found), ascii(text)
            assert seen(tokens)[1] == found_mask[0].tolist()
        cut += bool(tokenizer.encode(prompt).cut)
    assert cut > 0


@pytest.mark.parametrize("pipeline_class", [SanaPipeline, SanaSprintPipeline])
@pytest.mark.parametrize("instruction", [[], INSTRUCTION])
@pytest.mark.parametrize("limit", [300, 40])
def test_sana_prompts_become_the_tokens_of_diffusers(
    pipeline_class: Any,
    instruction: list[str],
    limit: int,
    gemma_folder: Path,
    load: Callable[..., Tokenizer],
    rng: random.Random,
) -> None:
    reference = GemmaTokenizer.from_pretrained(gemma_folder)
    pipeline = pipeline_class(reference, EchoEncoder(), vae=None, transformer=None, scheduler=None)
    tokenizer = load(gemma_folder, max_length=limit, instruction=instruction)
    options = {"complex_human_instruction": instruction, "max_sequence_length": limit, "device": "cpu"}
    for _ in range(30):
        prompt, negative = random_prompt(rng), random_prompt(rng)
        if pipeline_class is SanaPipeline:
            embeds, mask, negative_embeds, negative_mask = pipeline.encode_prompt(
                prompt, negative_prompt=negative, **options
            )
            found = tokenizer.encode(negative, negative=True)
            assert seen(found) == both(negative_embeds)
            assert seen(found)[1] == negative_mask[0].tolist()
        else:
            embeds, mask = pipeline.encode_prompt(prompt, **options)
        assert seen(tokenizer.encode(prompt)) == both(embeds), ascii(prompt)
        assert seen(tokenizer.encode(prompt))[1] == mask[0].tolist()
        assert len(seen(tokenizer.encode(prompt))[0]) == limit


def test_the_instruction_of_sana_precedes_the_positive_prompt_only(
    gemma_folder: Path, load: Callable[..., Tokenizer]
) -> None:
    tokenizer = load(gemma_folder, max_length=300, instruction=INSTRUCTION)
    assert tokenizer.apply_recipe(" A Cat ") == "\n".join(INSTRUCTION) + "a cat"
    assert tokenizer.apply_recipe(" A Cat ", negative=True) == "a cat"
    assert tokenizer.recipe.positive.select is not None
    assert tokenizer.recipe.negative.select is None


def test_case_and_white_space_are_kept_when_the_recipe_says_so(t5_folder: Path, load: Callable[..., Tokenizer]) -> None:
    tokenizer = load(t5_folder, max_length=20, lower=False, strip=False)
    assert tokenizer.apply_recipe(" A Cat ") == " A Cat "


@pytest.mark.parametrize("family", ["t5", "gemma"])
def test_what_is_cut_off_is_told_and_what_is_kept_needs_no_more(
    family: str, t5_folder: Path, gemma_folder: Path, load: Callable[..., Tokenizer], rng: random.Random
) -> None:
    folder = t5_folder if family == "t5" else gemma_folder
    for instruction in ([], INSTRUCTION):
        tokenizer = load(folder, max_length=50, instruction=instruction)
        plain = [word for word in WORDS if word.isalpha() and word.isascii()]
        words = rng.choices(plain, k=4000)
        prompt = " ".join(words)
        whole = tokenizer.encode(prompt)
        assert whole.cut
        assert prompt.lower().endswith(whole.cut)
        kept = prompt.lower().removesuffix(whole.cut).rstrip()
        assert whole.n_tokens == tokenizer.recipe.positive.max_length
        # Not by encoding `kept` again: the front of a word that was cut in two may need more tokens by itself.
        decoded = Backend.from_str(read_tokenizer(folder).json).decode(whole.ids.tolist())
        assert decoded.replace(" ", "").endswith(kept.replace(" ", ""))
        short = tokenizer.encode("red cat")
        assert (short.cut, short.select is None) == ("", not instruction)


def test_the_cut_is_the_text_that_diffusers_warns_about(
    t5_folder: Path, load: Callable[..., Tokenizer], rng: random.Random
) -> None:
    reference = T5Tokenizer.from_pretrained(t5_folder)
    tokenizer = load(t5_folder, max_length=20)
    known = [word for word in ("a", "red", "circle", "above", "photo", "of", "the") if word in WORDS]
    for _ in range(20):
        prompt = " ".join(rng.choices(known, k=60))
        untruncated = reference(prompt)["input_ids"]
        expected = reference.decode(untruncated[20 - 1 : -1])
        assert tokenizer.encode(prompt).cut.replace(" ", "") == expected.replace(" ", "")


def test_words_outside_the_vocabulary_are_told_once_in_their_order(
    t5_folder: Path, load: Callable[..., Tokenizer]
) -> None:
    tokenizer = load(t5_folder, max_length=30)
    assert tokenizer.encode("a RED 🦊 above the fo🦊x 🦊").unknown == ["🦊", "fo🦊x"]
    assert tokenizer.encode("a red cat,").unknown == []
    beyond = tokenizer.encode("red " * 40 + "🦊")
    assert (beyond.unknown, beyond.cut.endswith("🦊")) == ([], True)


def test_bytes_stand_in_for_unknown_characters_where_the_tokenizer_has_them(
    gemma_folder: Path, load: Callable[..., Tokenizer]
) -> None:
    assert load(gemma_folder, max_length=30).encode("a 🦑").unknown == []


def test_padding_to_the_longest_is_left_to_the_caller(t5_folder: Path, load: Callable[..., Tokenizer]) -> None:
    tokenizer = load(t5_folder, max_length=30, padding="longest")
    reference = T5Tokenizer.from_pretrained(t5_folder)
    prompts = ["a red circle", "a photo of the cat, above"]
    expected = reference(prompts, padding="longest", return_tensors="np")
    longest = max(tokenizer.encode(prompt).n_tokens for prompt in prompts)
    for row, prompt in enumerate(prompts):
        assert len(tokenizer.encode(prompt).ids) == tokenizer.encode(prompt).n_tokens
        padded = tokenizer.encode(prompt, pad_to=longest)
        assert padded.ids.tolist() == expected["input_ids"][row].tolist()
        assert padded.mask.tolist() == expected["attention_mask"][row].tolist()
    with pytest.raises(InputError, match="are asked for"):
        tokenizer.encode(prompts[1], pad_to=2)


def test_a_prompt_without_padding_keeps_its_tokens_and_their_places(
    gemma_folder: Path, load: Callable[..., Tokenizer], rng: random.Random
) -> None:
    tokenizer = load(gemma_folder, max_length=60, instruction=INSTRUCTION)
    for _ in range(20):
        tokens = tokenizer.encode(random_prompt(rng))
        bare = tokens.without_padding()
        assert bare.mask.tolist() == [1] * tokens.n_tokens
        assert tokens.select is not None
        assert bare.select is not None
        ids, mask = seen(tokens)
        assert bare.ids[bare.select].tolist() == [i for i, kept in zip(ids, mask, strict=True) if kept]


def test_settings_inside_tokenizer_json_do_not_add_to_the_recipe(
    t5_folder: Path, tmp_path: Path, prompt_of: PromptOf
) -> None:
    found = read_tokenizer(t5_folder)
    backend = Backend.from_str(found.json)
    expected = backend.encode("red cat, above").ids
    assert len(expected) > 4
    recipe = prompt_of(prompt_recipe(found, max_length=40, padding="longest"))
    for setting in ("truncation", "padding"):
        if setting == "truncation":
            backend.enable_truncation(3)
        else:
            backend.no_truncation()
            backend.enable_padding(length=33)
        (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        assert Tokenizer(tmp_path / "tokenizer.json", recipe).encode("red cat, above").ids.tolist() == expected


def test_special_tokens_stay_out_when_the_recipe_says_so(t5_folder: Path, tmp_path: Path, prompt_of: PromptOf) -> None:
    found = read_tokenizer(t5_folder)
    (tmp_path / "tokenizer.json").write_text(found.json, encoding="utf-8")
    recipe = prompt_of(prompt_recipe(found, max_length=12) | {"add_special_tokens": False})
    reference = T5Tokenizer.from_pretrained(t5_folder)("a red circle", add_special_tokens=False)["input_ids"]
    tokens = Tokenizer(tmp_path / "tokenizer.json", recipe).encode("a red circle")
    assert tokens.ids[: tokens.n_tokens].tolist() == reference


def test_text_that_is_not_unicode_is_refused(t5_folder: Path, load: Callable[..., Tokenizer]) -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        load(t5_folder, max_length=12).encode("half a pair: \ud83d")


def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line(
    t5_folder: Path, tmp_path: Path, prompt_of: PromptOf
) -> None:
    found = read_tokenizer(t5_folder)
    recipe = prompt_of(prompt_recipe(found, max_length=12))
    for name, data in (("cut", found.json[:1000].encode()), ("empty", b""), ("binary", b"\xff\xfe"), ("json", b"{}")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BundleError) as caught:
            Tokenizer(tmp_path / name, recipe)
        assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="nothing"):
        Tokenizer(tmp_path / "nothing", recipe)


def test_a_recipe_without_room_for_a_prompt_is_refused(t5_folder: Path, load: Callable[..., Tokenizer]) -> None:
    with pytest.raises(BundleError, match="allows 1 tokens"):
        load(t5_folder, max_length=1)
    assert load(t5_folder, max_length=2).encode("red cat").n_tokens == 2


def test_a_panic_of_the_library_is_a_damaged_tokenizer(t5_folder: Path, load: Callable[..., Tokenizer]) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    tokenizer = load(t5_folder, max_length=12)
    tokenizer._backend = SimpleNamespace(encode=panic)  # type: ignore[assignment]
    with pytest.raises(BundleError, match="damaged"):
        tokenizer.encode("red")
