"""Prompts to the states that a transformer is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from edgedit.components import Components
from edgedit.device import cache_dir
from edgedit.embeddings import EmbeddingCache, PromptEmbedding
from edgedit.errors import BundleError, InputError
from edgedit.text import Tokenizer

__all__ = ["PromptEncoder"]

#: Text encoders above this size have their embeddings cached on disk.
CACHE_ENCODERS_OVER = 100 << 20
#: Prompts whose embeddings are kept in memory.
KEPT = 256


@dataclass
class PromptEncoder:
    """The text encoder of an open bundle behind its prompt recipe.

    Attributes:
        use_cache: keep embeddings of large text encoders on disk between runs.
        embeddings: where those of any text encoder are kept, instead of the machine's cache of large ones.
    """

    components: Components
    use_cache: bool = True
    embeddings: EmbeddingCache | None = None
    _encoded: dict[str, PromptEmbedding] = field(default_factory=dict, repr=False)
    _tokenizer: Tokenizer | None = field(default=None, repr=False)

    def __call__(self, prompt: str, *, negative: bool = False) -> PromptEmbedding:
        """See `Pipeline.encode_prompt`."""
        if not isinstance(prompt, str):
            raise InputError(f"the prompt must be a string, not {type(prompt).__name__}")
        key = f"{int(negative)}{prompt}"
        if key not in self._encoded:
            if len(self._encoded) >= KEPT:
                self._encoded.clear()
            self._encoded[key] = self._encode(prompt, negative)
        return self._encoded[key]

    def _encode(self, prompt: str, negative: bool) -> PromptEmbedding:
        bundle = self.components.bundle
        recipe = bundle.manifest.prompt
        if recipe is None:
            raise BundleError(f"{bundle.path.name} has no text encoder; pass embeddings to predict() instead")
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(bundle.file(recipe.tokenizer), recipe)
        tokens = self._tokenizer.encode(prompt, negative=negative).without_padding()
        states = self._hidden_states(tokens.ids[None])
        if tokens.select is not None:
            states = states[:, tokens.select]
        return PromptEmbedding(
            hidden_states=np.ascontiguousarray(states),
            attention_mask=np.ones(states.shape[:2], np.float32),
            cut=tokens.cut,
            unknown=tuple(tokens.unknown),
        )

    def _hidden_states(self, ids: np.ndarray) -> np.ndarray:
        components = self.components
        cache = self.embeddings
        if cache is None and self.use_cache and components.weights_size("text_encoder") >= CACHE_ENCODERS_OVER:
            cache = EmbeddingCache(cache_dir() / "embeddings")
        artefact = components.bundle.component("text_encoder").artefacts[components.runtime.name]
        identity = ",".join(components.bundle.manifest.files[path].sha256 for path in artefact.files)
        states = cache.get(identity, ids) if cache else None
        if states is None:
            session = components.session("text_encoder")
            components.stage("encode")
            states = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["hidden_states"]
            if cache:
                cache.put(identity, ids, states)
        return states
