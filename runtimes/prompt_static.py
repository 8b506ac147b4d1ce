"""What a transformer computes from the prompt alone, once a prompt instead of once a step: the projection of the text,
and the keys and values of cross-attention.

The graph is divided by what each node depends on: the `prompt` part needs the text inputs only, and what it hands over
are inputs of the `step` part. Both are the nodes of the graph that was divided, over the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgedit.errors import BundleError, InputError

__all__ = ["PROMPT_INPUTS", "Part", "PromptStaticSession", "Split", "split_graph", "split_model"]

#: Inputs of a transformer that stay what they are for all steps of a picture.
PROMPT_INPUTS = frozenset({"encoder_hidden_states", "encoder_attention_mask"})
#: Prompts whose results are kept: with guidance a step alternates between two.
_KEPT = 2
#: Bytes of one prompt's results above which they are computed anew at every step.
_LARGEST = 256 << 20


@dataclass(frozen=True)
class Split:
    """Two parts as serialized ONNX models without weights, what depends on inputs that stay and the rest, and the
    values that pass from one to the other."""

    static: bytes
    rest: bytes
    values: tuple[str, ...]


def split_graph(path: Path) -> Split | None:
    """Divide the graph in `path` by its prompt, see `split_model`."""
    import onnx

    return split_model(onnx.load(str(path), load_external_data=False), PROMPT_INPUTS)


def split_model(model: Any, constant: Collection[str]) -> Split | None:
    """Divide an ONNX model into what depends on the inputs `constant` alone and the rest. None where nothing does, or
    the graph does not say the types of what would be handed over."""
    graph = model.graph
    constant = frozenset(constant)
    inputs = {value.name for value in graph.input}
    if any(a.type in (a.GRAPH, a.GRAPHS) for node in graph.node for a in node.attribute):
        return None
    depends: dict[str, frozenset[str]] = {name: frozenset({name}) for name in inputs}
    prompt: list[int] = []
    step: list[int] = []
    for index, node in enumerate(graph.node):
        needs: frozenset[str] = frozenset().union(*(depends.get(name, frozenset()) for name in node.input))
        depends.update(dict.fromkeys(node.output, needs))
        if needs:
            (prompt if needs <= constant else step).append(index)
    made = {name: index for index in prompt for name in graph.node[index].output}
    wanted = {name for index in step for name in graph.node[index].input} & made.keys()
    finished = {value.name for value in graph.output} & made.keys()
    types = {value.name: value for value in graph.value_info}
    if not wanted or finished or not wanted <= types.keys():
        return None
    values = sorted(wanted, key=made.__getitem__)
    passed = [types[name] for name in values]
    first = _part(model, prompt, list(graph.input), passed)
    second = _part(model, step, [*graph.input, *passed], list(graph.output))
    return Split(first.SerializeToString(), second.SerializeToString(), tuple(values))


def _part(model: Any, chosen: list[int], inputs: list[Any], outputs: list[Any]) -> Any:
    """A model of the chosen nodes and the constant ones that they need, with the inputs and weights that are used."""
    graph = model.graph
    made = {name: index for index, node in enumerate(graph.node) for name in node.output}
    given = {value.name for value in inputs}
    keep, open_ = set(chosen), list(chosen)
    while open_:
        for name in graph.node[open_.pop()].input:
            if name not in given and name in made and made[name] not in keep:
                keep.add(made[name])
                open_.append(made[name])
    nodes = [graph.node[index] for index in sorted(keep)]
    used = {name for node in nodes for name in node.input}
    part = type(model)()
    part.CopyFrom(model)
    part.graph.Clear()
    part.graph.name = graph.name
    part.graph.node.extend(nodes)
    part.graph.initializer.extend(value for value in graph.initializer if value.name in used)
    part.graph.input.extend(value for value in inputs if value.name in used)
    part.graph.output.extend(outputs)
    outer = given | {value.name for value in outputs}
    inside = {name for node in nodes for name in node.output} - outer
    part.graph.value_info.extend(value for value in graph.value_info if value.name in inside)
    return part


class Part(Protocol):
    """A session of one part; `inputs` holds the names that it takes."""

    @property
    def inputs(self) -> Mapping[str, Any]: ...
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def close(self) -> None: ...


class PromptStaticSession:
    """A transformer in two parts that runs as one: the `prompt` part only for text that it has not just seen.

    Args:
        most: different inputs of the first part whose results are kept.
    """

    def __init__(self, prompt: Part, step: Part, values: tuple[str, ...], label: str, *, most: int = _KEPT) -> None:
        self.label, self._most = label, most
        self._prompt, self._step, self._values = prompt, step, frozenset(values)
        self.inputs = {**prompt.inputs, **{name: v for name, v in step.inputs.items() if name not in self._values}}
        self._kept: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
        self._closed = False

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the component once."""
        if self._closed:
            raise BundleError(f"{self.label}: the session is closed")
        if set(inputs) != set(self.inputs):
            raise InputError(f"{self.label} takes {sorted(self.inputs)}; got {sorted(inputs)}")
        passed = self._of_prompt({name: inputs[name] for name in self._prompt.inputs})
        own = {name: inputs[name] for name in self._step.inputs if name not in self._values}
        return self._step.run({**own, **passed})

    def _of_prompt(self, text: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for index, (known, found) in enumerate(self._kept):
            if all(np.array_equal(known[name], value) for name, value in text.items()):
                self._kept.append(self._kept.pop(index))
                return found
        found = self._prompt.run(text)
        size = sum(value.nbytes for value in found.values())
        if size <= _LARGEST:
            most = min(self._most, _KEPT * _LARGEST // max(size, 1))
            self._kept = [*self._kept, ({name: value.copy() for name, value in text.items()}, found)][-most:]
        return found

    def close(self) -> None:
        """Free the weights and what was kept."""
        self._closed = True
        self._kept = []
        for part in (self._prompt, self._step):
            part.close()
