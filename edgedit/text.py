"""Prompts to tokens, by the prompt recipe of a manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers

from edgedit.errors import BundleError, InputError
from edgedit.manifest import Prompt, PromptSide, Select

__all__ = ["TokenizedPrompt", "Tokenizer"]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder takes it.

    Attributes:
        ids: token ids, int64 [L].
        mask: 1 for a token, 0 for padding, int64 [L].
        n_tokens: tokens without padding, special ones included.
        select: positions of the encoder's output, and of the mask, that the transformer sees, int64 [K]; None for all.
        cut: the end of the prompt that did not fit, after case folding; "" when everything did.
        unknown: words with a part that the vocabulary lacks, in their order, each once.
    """

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    n_tokens: int
    select: npt.NDArray[np.int64] | None
    cut: str
    unknown: list[str]

    def without_padding(self) -> TokenizedPrompt:
        """The same prompt with its tokens only. A text encoder that is given the mask computes the same for them."""
        n = self.n_tokens
        select = None if self.select is None else self.select[self.select < n]
        return replace(self, ids=self.ids[:n], mask=self.mask[:n], select=select)


class Tokenizer:
    """A tokenizer with the recipe that says how a prompt goes through it.

    Gives the ids and the mask that diffusers' PixArt and SANA pipelines compute in `encode_prompt`, with
    `clean_caption` off, as it is for them where bs4 and ftfy are not installed.

    Args:
        path: a `tokenizer.json`.
        recipe: the section `prompt` of the manifest.

    Raises:
        BundleError: the file is missing or not a tokenizer, or the recipe leaves no room for a prompt.
    """

    def __init__(self, path: str | Path, recipe: Prompt) -> None:
        try:
            backend = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # the library raises a bare Exception
            reason = " ".join(str(error).split())
            raise BundleError(f"{path}: not a tokenizer ({reason}); fetch or convert the bundle again") from error
        # Truncation and padding settings that a tokenizer.json may carry would act beside those of the recipe.
        backend.no_truncation()
        backend.no_padding()
        self.recipe = recipe
        self._path = path
        self._backend = backend
        self._special = backend.num_special_tokens_to_add(False) if recipe.add_special_tokens else 0
        for side in (recipe.positive, recipe.negative):
            if side.max_length <= self._special:
                raise BundleError(
                    f"{path}: the prompt recipe allows {side.max_length} tokens, which the tokenizer's own "
                    f"{self._special} fill; convert the model again"
                )

    def apply_recipe(self, prompt: str, *, negative: bool = False) -> str:
        """The text that is tokenized: `prompt` folded and put into the template of its side."""
        before, after = self._template(self._side(negative))
        return before + self._fold(prompt) + after

    def encode(self, prompt: str, *, negative: bool = False, pad_to: int | None = None) -> TokenizedPrompt:
        """Tokens of `prompt` as the positive or the negative prompt.

        Args:
            pad_to: pad to so many tokens where the recipe pads to the longest of a batch. There is no padding without.

        Raises:
            InputError: the prompt holds half a surrogate pair, or is longer than `pad_to`.
        """
        side = self._side(negative)
        before, after = self._template(side)
        folded = self._fold(prompt)
        try:
            encoding = self._backend.encode(before + folded + after, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise InputError("the prompt is not valid Unicode text; type it again") from None
        except BaseException as error:
            # How a damaged tokenizer shows itself in the library, which does not export the class.
            if type(error).__name__ != "PanicException":
                raise
            raise BundleError(f"{self._path}: the tokenizer is damaged; fetch or convert the bundle again") from None

        room = side.max_length - self._special
        cut_at = len(folded)
        if len(encoding) > room:
            cut_at = min(max(encoding.offsets[room][0] - len(before), 0), len(folded))
            encoding.truncate(room)
        spans = [
            span
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
            if token == self.recipe.unk_token_id
        ]
        unknown = _words(folded, [(start - len(before), end - len(before)) for start, end in spans])
        encoding = self._backend.post_process(encoding, None, self.recipe.add_special_tokens)

        length = side.max_length if self.recipe.padding == "max_length" else pad_to
        ids, n = np.array(encoding.ids, np.int64), len(encoding)
        if length is not None and n > length:
            raise InputError(f"the prompt has {n} tokens and {length} are asked for; shorten it")
        padding = max(length or 0, n) - n
        return TokenizedPrompt(
            ids=np.concatenate([ids, np.full(padding, self.recipe.pad_token_id, np.int64)]),
            mask=np.concatenate([np.ones(n, np.int64), np.zeros(padding, np.int64)]),
            n_tokens=n,
            select=None if side.select is None else _positions(side.select, n + padding),
            cut=folded[cut_at:].strip(),
            unknown=unknown,
        )

    def _side(self, negative: bool) -> PromptSide:
        return self.recipe.negative if negative else self.recipe.positive

    def _fold(self, prompt: str) -> str:
        if self.recipe.lower:
            prompt = prompt.lower()
        return prompt.strip() if self.recipe.strip else prompt

    @staticmethod
    def _template(side: PromptSide) -> tuple[str, str]:
        before, _, after = side.template.partition("{prompt}")
        return before, after


def _positions(select: Select, length: int) -> npt.NDArray[np.int64]:
    return np.concatenate([np.arange(select.first), np.arange(length - select.last, length)]).astype(np.int64)


def _words(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """The white-space separated words of `text` that overlap one of `spans`, each once."""
    found = (
        match.group()
        for match in re.finditer(r"\S+", text)
        if any(start < match.end() and match.start() < end for start, end in spans)
    )
    return list(dict.fromkeys(found))
