"""Draws pictures with the model itself and keeps what its components were given on the way.

No data set and no torch: prompts, seeded noise, the bundle's own sampler and the fp32 graphs in ONNX Runtime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgedit.bundle import Bundle
from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.statistics import InputStatistics, Observer
from edgedit.converters.quantization.stream import run_in_segments
from edgedit.converters.quantization.workspace import Workspace
from edgedit.embeddings import PromptEmbedding
from edgedit.errors import ConversionError
from edgedit.guidance import Guidance
from edgedit.json_reader import JsonNode
from edgedit.manifest_parser import parse_manifest
from edgedit.pipeline import Pipeline
from edgedit.recipes import Recipe
from edgedit.runtimes.onnx import CPU, OnnxSession
from edgedit.solver_base import predict_x0
from edgedit.text import Tokenizer

__all__ = ["NEEDED", "Calibration", "OnProgress"]

Array = npt.NDArray[Any]
OnProgress = Callable[[str, int, int], None]
"""Stage, done, total."""

#: Components without which no picture is drawn.
NEEDED = ("transformer", "text_encoder", "decoder")
#: Image tokens of a calibration picture at most: statistics of channels do not need more, and time goes with it.
MOST_TOKENS = 256
#: Network evaluations a picture at most.
MOST_STEPS = 10


@dataclass
class Calibration:
    """The calls that components get while the model draws.

    Args:
        manifest: as JSON, complete but for its files.
        tokenizer: tokenizer.json as text.
        build: component → a fresh canonical graph with lazy weights.
        prompts: one picture each; its seed is its number.
        work: where calls and statistics are kept.
        on_progress: told stage, done, total.
    """

    manifest: Mapping[str, Any]
    tokenizer: str
    build: Callable[[str], ir.Model]
    prompts: Sequence[str]
    work: Workspace
    on_progress: OnProgress | None = None

    def __post_init__(self) -> None:
        document = json.loads(json.dumps({**self.manifest, "files": {}}))
        self.bundle = Bundle(self.work.folder, parse_manifest(JsonNode(document, "manifest.json")))
        self.recipe = self._recipe()
        self._calls: dict[str, list[dict[str, Array]]] = {}

    def facts(self) -> dict[str, Any]:
        """For the record of a component."""
        return {
            "prompts": len(self.prompts),
            "calls": len(self.calls("transformer")),
            "steps": self.recipe.steps,
            "width": self.recipe.width,
            "height": self.recipe.height,
            "seed": 0,
        }

    def calls(self, component: str) -> list[dict[str, Array]]:
        """Inputs of every call of a component."""
        if component not in self._calls:
            if component == "text_encoder":
                self._calls[component] = [self._tokens(text, negative)[0] for text, negative in self._texts()]
            else:
                self._calls |= self._drawn()
        return self._calls[component]

    def observe(
        self,
        component: str,
        model: ir.Model,
        layers: Mapping[str, Layer],
        moments: frozenset[str],
        *,
        calls: slice = slice(None),
    ) -> dict[str, InputStatistics]:
        """Statistics of the inputs of a component's matrices.

        Args:
            model: the component's graph, to which `layers` belong.
            moments: layers of which second moments are wanted.
            calls: those that are looked at.

        Raises ConversionError, with the layer's name, for inputs that are not finite.
        """
        observer = Observer(component, layers, moments, self.work)
        missing = observer.missing
        if missing:

            def on_segment(done: int, total: int) -> None:
                observer.keep()
                self.tell(f"calibrate {component}", done, total)

            run_in_segments(
                model,
                self.calls(component)[calls],
                self.work.folder / "segment",
                watched=missing,
                on_value=observer.add,
                on_segment=on_segment,
                extra_cost=observer.cost,
            )
        return observer.statistics()

    def influence(self) -> list[float]:
        """How much an error of each of the transformer's calls counts: the square of what an Euler step makes of it."""
        schedule, each = self.recipe.schedule, len(self.calls("transformer")) // len(self.prompts)
        one, none = np.ones(1), np.zeros(1)
        moved = []
        for i in range(len(schedule)):
            slope = predict_x0(schedule, i, none, one) - predict_x0(schedule, i, none, none)
            ratio = schedule.landing_sigmas[i] / max(float(schedule.sigmas[i]), 1e-12)
            moved.append(float((slope * (schedule.landing_alphas[i] - schedule.alphas[i] * ratio))[0]) ** 2)
        return [moved[number % each * len(schedule) // each] for number in range(each * len(self.prompts))]

    def tell(self, stage: str, done: int, total: int) -> None:
        """Report progress."""
        if self.on_progress is not None:
            self.on_progress(stage, done, total)

    def _recipe(self) -> Recipe:
        """The model's recommended settings at a size and a number of steps that take minutes, not hours."""
        best, space = self.bundle.manifest.recommended, self.bundle.manifest.latents
        if best is None or space is None:
            raise ConversionError("calibration draws pictures and needs the whole pipeline folder; give that")
        unit = space.size_multiple
        shrink = max(1.0, math.sqrt(best.width * best.height / unit**2 / MOST_TOKENS))
        width, height = (max(1, round(side / unit / shrink)) * unit for side in (best.width, best.height))
        return Recipe.resolve(
            self.bundle,
            prompt="",
            negative_prompt=None,
            steps=min(best.steps, MOST_STEPS),
            width=width,
            height=height,
            guidance_scale=None,
            guidance_interval=(0.0, 1.0),
            sampler=None,
            sigmas=None,
            rng="philox",
            strength=None,
            has_image=False,
            has_latents=False,
        )

    def _texts(self) -> list[tuple[str, bool]]:
        """Prompts, and last the negative one where guidance needs it, with whether it is negative."""
        guided = Guidance.from_manifest(self.bundle.manifest.guidance).needs_negative(self.recipe.guidance_scale)
        return [(prompt, False) for prompt in self.prompts] + ([(self.recipe.negative_prompt, True)] if guided else [])

    def _tokens(self, text: str, negative: bool) -> tuple[dict[str, Array], Array | None]:
        path = self.work.folder / "tokenizer.json"
        if not path.exists():
            path.write_text(self.tokenizer, encoding="utf-8")
        prompt = self.bundle.manifest.prompt
        assert prompt is not None
        tokens = Tokenizer(path, prompt).encode(text, negative=negative).without_padding()
        ids = tokens.ids[None]
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}, tokens.select

    def _embeddings(self) -> list[PromptEmbedding]:
        """Of `_texts`. The encoder runs in segments: the largest ones do not fit into memory."""
        texts = self._texts()
        if not self.work.has("text", "states"):
            samples = [self._tokens(text, negative)[0] for text, negative in texts]
            found = run_in_segments(
                self.build("text_encoder"),
                samples,
                self.work.folder / "segment",
                on_segment=lambda done, total: self.tell("encode prompts", done, total),
            )
            self.work.save("text", "states", {str(i): one["hidden_states"] for i, one in enumerate(found)})
        stored = self.work.load("text", "states")
        assert stored is not None
        embeddings = []
        for index, (text, negative) in enumerate(texts):
            select = self._tokens(text, negative)[1]
            states = stored[str(index)] if select is None else stored[str(index)][:, select]
            mask = np.ones(states.shape[:2], np.float32)
            embeddings.append(PromptEmbedding(np.ascontiguousarray(states), mask))
        return embeddings

    def _drawn(self) -> dict[str, list[dict[str, Array]]]:
        """Calls of transformer and decoder: a picture a prompt, drawn now or before."""
        count = len(self.prompts)
        absent = [index for index in range(count) if not self.work.has("calls", str(index))]
        if absent:
            embeddings = self._embeddings()
            negatives = None if len(embeddings) == count else embeddings[-1:]
            place = self.work.folder / "fp32"
            self.tell("draw", count - len(absent), count)
            written = onnx_lowering.write(self.build("transformer"), place, "transformer", dtype="fp32")
            session = _Recorder(place / (written.fused_graph or written.graph))
            pipeline = Pipeline(self.bundle, _Runtime(session), low_ram=False, use_cache=False)
            for index in absent:
                session.calls.clear()
                latents = pipeline.denoise_together(self.recipe, [embeddings[index]], negatives, [index])
                arrays = {
                    f"{i}.{key}": value
                    for i, call in enumerate(session.calls)
                    for key, value in call.items()
                    if i == 0 or value is not session.calls[i - 1][key]
                }
                self.work.save("calls", str(index), {**arrays, "latents": latents})
                self.tell("draw", count - len(absent) + absent.index(index) + 1, count)
            session.close()
            for path in written.files:
                (place / path).unlink()
        return self._stored_calls()

    def _stored_calls(self) -> dict[str, list[dict[str, Array]]]:
        space = self.bundle.manifest.latents
        assert space is not None
        calls: dict[str, list[dict[str, Array]]] = {"transformer": [], "decoder": []}
        for index in range(len(self.prompts)):
            stored = self.work.load("calls", str(index))
            assert stored is not None
            latents = stored.pop("latents") / np.float32(space.scaling_factor) + np.float32(space.shift_factor)
            calls["decoder"].append({"latents": latents.astype(np.float32)})
            call: dict[str, Array] = {}
            for number in range(1 + max(int(key.partition(".")[0]) for key in stored)):
                start = f"{number}."
                # What did not change since the call before is stored, and kept in memory, once.
                call = call | {k.removeprefix(start): v for k, v in stored.items() if k.startswith(start)}
                calls["transformer"].append(call)
        return calls


class _Recorder(OnnxSession):
    """A session that keeps what it is given; what is the same as in the call before, as the same array."""

    def __init__(self, graph: Path) -> None:
        super().__init__(graph, [CPU], None, None, "transformer")
        self.calls: list[dict[str, Array]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        before = self.calls[-1] if self.calls else {}
        self.calls.append(
            {k: before[k] if k in before and np.array_equal(before[k], v) else v.copy() for k, v in inputs.items()}
        )
        return super().run(inputs)


class _Runtime:
    """A runtime that has one session."""

    name = "onnx"

    def __init__(self, session: OnnxSession) -> None:
        self.session = session

    def open(self, component: str) -> OnnxSession:
        """The session, which is the transformer's."""
        if component != "transformer":
            raise ValueError(component)
        return self.session

    def describe(self) -> dict[str, str]:
        """The backend's name."""
        return {"backend": self.name}
