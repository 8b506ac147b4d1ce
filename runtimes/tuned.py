"""Each component with the engine, threads and form of graph that `edgedit tune` found fastest on this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgedit.runtimes.base import ENGINES, Runtime, RuntimeOptions, Session, make_runtime

if TYPE_CHECKING:
    from edgedit.bundle import Bundle
    from edgedit.tuning_record import TuningRecord

__all__ = ["TunedRuntime"]


class TunedRuntime:
    """Opens the `onnx` artefacts of a bundle by a record. Threads that the options name outrank the record's."""

    name = "onnx"

    def __init__(self, bundle: Bundle, options: RuntimeOptions, record: TuningRecord) -> None:
        self.bundle, self.options, self.record = bundle, options, record
        self._default = make_runtime(bundle, ENGINES["onnxruntime"], options)

    def open(self, component: str) -> Session:
        """Open a component; one that was not measured as ONNX Runtime does by default."""
        return self._runtime(component).open(component)

    def open_lean(self, component: str) -> Session:
        """Open a component for the least memory, where its engine has the choice."""
        runtime = self._runtime(component)
        opened: Session = getattr(runtime, "open_lean", runtime.open)(component)
        return opened

    def _runtime(self, component: str) -> Runtime:
        choice = self.record.components.get(component)
        if choice is None:
            return self._default
        threads = self.options.threads or choice.threads
        options = replace(self.options, threads=threads, standard_graph=choice.form == "standard")
        return make_runtime(self.bundle, ENGINES[choice.engine], options)

    def open_piece(self, component: str, graph: str, *, lean: bool = False) -> Any:
        """Open one piece of a component that runs in tiles, in ONNX Runtime."""
        return self._default.open_piece(component, graph, lean=lean)  # type: ignore[attr-defined]

    def open_part(self, component: str, graph: str) -> Any:
        """Open one part of a transformer that is cut between its blocks, in ONNX Runtime."""
        return self._default.open_part(component, graph)  # type: ignore[attr-defined]

    def open_canonical(self, component: str) -> Any:
        """Open the canonical graph in ONNX Runtime: the reference that `verify` compares with."""
        return self._default.open_canonical(component)  # type: ignore[attr-defined]

    def guides_together(self, tokens: int) -> bool | None:
        """Whether guidance is one batch of two at this many latent tokens; None leaves that to the pipeline."""
        return self.record.guides_together(tokens)

    def describe(self) -> dict[str, str]:
        """ONNX Runtime's description, OpenVINO's version where it is used, and what runs each component."""
        facts = dict(self._default.describe())
        if any(choice.engine == "openvino" for choice in self.record.components.values()):
            from edgedit.runtimes.openvino import version

            facts["openvino"] = version()
        chosen = (f"{name} on {choice}" for name, choice in self.record.components.items())
        return {**facts, "tuned": "; ".join(chosen)}
