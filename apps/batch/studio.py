"""Drawing the pictures of a batch on an open pipeline: encode, denoise together, decode, save."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgedit.apps.batch.ledger import Picture
from edgedit.apps.batch.recipe_book import RecipeBook
from edgedit.autoencoder import DECODERS
from edgedit.errors import EdgeditError, InputError
from edgedit.metadata import encode_image

if TYPE_CHECKING:
    from edgedit.denoise import StepState
    from edgedit.embeddings import PromptEmbedding
    from edgedit.pipeline import Pipeline
    from edgedit.recipes import Recipe

__all__ = ["Sink", "Studio", "Told", "latents_key"]

#: (what happened, facts) as a worker tells its coordinator.
Told = Callable[[str, dict[str, Any]], None]


class Sink(Protocol):
    """Where finished work goes."""

    def picture(self, path: str, data: bytes) -> dict[str, Any]:
        """Keep a finished picture; returns what the coordinator must be told besides. Raises InputError."""
        ...

    def save_latents(self, key: str, latents: np.ndarray) -> None:
        """Keep latents until the picture is recorded. Raises InputError."""
        ...

    def latents(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Latents that an earlier attempt left."""
        ...


def latents_key(picture: Picture, identity: str, facts: Mapping[str, Any]) -> str:
    """Names the latents of one picture: never those of another seed, job, start, model or way of computing."""
    text = f"{picture.index}\0{picture.seed}\0{sorted(picture.spec.items())!r}\0{facts!r}\0{identity}"
    return f"{picture.index}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"


_NONE = np.zeros((0, 0, 0, 0), np.float32)


@dataclass
class _Drawn:
    """A denoised picture on its way to the disk."""

    picture: Picture
    recipe: Recipe
    latents: np.ndarray
    facts: dict[str, Any]
    key: str
    seconds: dict[str, float] = field(default_factory=dict)


class _RunStoppingError(Exception):
    """Something that no other picture would survive either: the disk, the folder, the bundle."""


class Studio:
    """One worker's pipeline.

    Args:
        identity: names the model and how it is computed.
        told: hears "start", "step", "done", "failed" and "fatal".
        overlap: decode and save in a thread of its own while the next pictures are denoised.
        free_encoder: free the text encoder whenever the prompts at hand are encoded.
    """

    def __init__(
        self, pipe: Pipeline, sink: Sink, told: Told, *, identity: str, overlap: bool = True, free_encoder: bool = True
    ) -> None:
        self.pipe, self.sink, self.told, self.identity = pipe, sink, told, identity
        self.free_encoder = free_encoder
        self.book = RecipeBook(pipe.bundle)
        self.runtime = dict(pipe.runtime.describe())
        self._queue: Queue[_Drawn | None] = Queue(maxsize=2)
        self._thread: threading.Thread | None = None
        if overlap:
            self._thread = threading.Thread(target=self._finish_all, name="finisher", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Finish what is under way and free the model."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
        self.pipe.close()

    def encode(self, prompts: Sequence[tuple[str, bool]]) -> list[tuple[str, bool, int, str, tuple[str, ...]]]:
        """Encode (text, negative?) prompts into the pipeline's cache.

        Returns (text, negative?, tokens, what was cut, unknown words) of each; one that cannot be encoded is left out
        and fails with its picture.
        """
        lengths = []
        for text, negative in prompts:
            try:
                embedding = self.pipe.encode_prompt(text, negative=negative)
            except EdgeditError:
                continue
            lengths.append((text, negative, embedding.hidden_states.shape[1], embedding.cut, embedding.unknown))
        if self.free_encoder:
            self.pipe.free("text_encoder")
        return lengths

    def draw(self, pictures: Sequence[Picture], batch: int) -> None:
        """Draw pictures of one group, `batch` at a time. Failures are told, not raised."""
        drawn: list[_Drawn] = []
        for first in range(0, len(pictures), batch):
            some = pictures[first : first + batch]
            try:
                done = self._denoise(some)
            except Exception as error:
                self._fail(some, error)
                continue
            if self._thread is not None:
                for item in done:
                    self._queue.put(item)
            else:
                # One component in memory at a time: all of the chunk is denoised before the decoder is opened.
                drawn += done
        for item in drawn:
            self._finish(item)

    def _fail(self, pictures: Sequence[Picture], error: Exception) -> None:
        if isinstance(error, _RunStoppingError):
            self.told("fatal", {"message": str(error)})
            return
        memory = isinstance(error, MemoryError) or "out of memory" in str(error)
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError):
            text = f"out of memory: {text}"
        elif not isinstance(error, EdgeditError):
            text = f"{type(error).__name__}: {text}"
        self.told("failed", {"indices": [p.index for p in pictures], "error": text, "memory": memory})

    def _open(self, component: str) -> None:
        try:
            self.pipe.open(component)
        except EdgeditError as error:
            if "out of memory" in str(error) or "alloc" in str(error):
                raise
            raise _RunStoppingError(str(error)) from error

    def _denoise(self, pictures: Sequence[Picture]) -> list[_Drawn]:
        self.told("start", {"indices": [p.index for p in pictures]})
        todo: list[_Drawn] = []
        drawn: list[_Drawn] = []
        for picture in pictures:
            recipe, facts = self.book.recipe(picture.spec), _facts(picture.spec)
            key = latents_key(picture, self.identity, facts)
            latents = self.sink.latents(key, recipe.latents_shape)
            item = _Drawn(picture, recipe, latents if latents is not None else _NONE, facts, key, {"denoise": 0.0})
            (todo if latents is None else drawn).append(item)
        if todo:
            self._compute(todo)
        return drawn + todo

    def _compute(self, items: Sequence[_Drawn]) -> None:
        """Denoise; the latents and the times are put into `items`."""
        started = time.monotonic()
        pictures, recipe = [item.picture for item in items], items[0].recipe
        prompts = [self.pipe.encode_prompt(item.recipe.prompt) for item in items]
        negatives: list[PromptEmbedding] | None = None
        if self.book.guidance.needs_negative(recipe.guidance_scale):
            negatives = [self.pipe.encode_prompt(item.recipe.negative_prompt, negative=True) for item in items]
        references = self._references(pictures, recipe)
        latents = self._start_latents(pictures, recipe)
        encoded = time.monotonic()
        self._open("transformer")
        said = 0.0

        def on_step(state: StepState) -> None:
            nonlocal said
            if time.monotonic() - said > 0.5:
                said = time.monotonic()
                self.told("step", {"indices": [p.index for p in pictures], "step": state.step, "steps": state.steps})

        result = self.pipe.denoise_together(
            recipe,
            prompts,
            negatives,
            [picture.seed for picture in pictures],
            latents=latents,
            references=references,
            on_step=on_step,
        )
        share = 1 / len(items)
        for row, item in enumerate(items):
            item.latents = np.ascontiguousarray(result[row : row + 1])
            item.seconds = {
                "encode": (encoded - started) * share,
                "denoise": (time.monotonic() - encoded) * share,
            }
            try:
                self.sink.save_latents(item.key, item.latents)
            except InputError as error:
                raise _RunStoppingError(str(error)) from error

    def _references(self, pictures: Sequence[Picture], recipe: Recipe) -> np.ndarray | None:
        if recipe.strength is None:
            return None
        images = [self.pipe.encode_image(p.spec["image"], width=recipe.width, height=recipe.height) for p in pictures]
        return np.concatenate(images)

    @staticmethod
    def _start_latents(pictures: Sequence[Picture], recipe: Recipe) -> np.ndarray | None:
        if "latents" not in pictures[0].spec:
            return None
        arrays = []
        for picture in pictures:
            path = picture.spec["latents"]
            try:
                array = np.load(path, allow_pickle=False).astype(np.float32)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path}: the latents cannot be read ({error}); check the file") from None
            if array.shape != recipe.latents_shape or not np.isfinite(array).all():
                raise InputError(f"{path}: the latents do not fit, or hold values that are not numbers; check the file")
            arrays.append(array)
        return np.concatenate(arrays)

    def _finish_all(self) -> None:
        while (item := self._queue.get()) is not None:
            self._finish(item)

    def _finish(self, item: _Drawn) -> None:
        """Decode, save and tell. Latents that cannot be decoded stay for the next attempt."""
        try:
            started = time.monotonic()
            self._open(DECODERS[self.pipe.decoder])
            (image,) = self.pipe.decode(item.latents)
            decoded = time.monotonic()
            recipe = item.recipe.as_dict(self.pipe.bundle, seed=item.picture.seed, runtime=self.runtime)
            recipe |= item.facts
            if self.pipe.decoder != "full":
                recipe["decoder"] = self.pipe.decoder
            data = encode_image(image, item.picture.path, recipe)
            try:
                extra = self.sink.picture(item.picture.path, data)
            except InputError as error:
                raise _RunStoppingError(str(error)) from error
            seconds = {**item.seconds, "decode": decoded - started, "save": time.monotonic() - decoded}
            self.told(
                "done",
                {
                    "index": item.picture.index,
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "seconds": {name: round(value, 4) for name, value in seconds.items()},
                    "recipe": recipe,
                    "latents": item.key,
                    **extra,
                },
            )
        except Exception as error:
            self._fail([item.picture], error)


def _facts(spec: Any) -> dict[str, Any]:
    """What the recipe says of the files that the picture starts from."""
    facts: dict[str, Any] = {}
    for name in ("image", "latents"):
        if name in spec:
            path = Path(spec[name])
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
            facts[name] = {"path": str(path), "sha256": digest}
    return facts
