"""The components of a bundle on one backend: opened when they are needed, freed when memory is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from edgedit.bundle import Bundle
from edgedit.device import available_memory
from edgedit.errors import BundleError, InputError
from edgedit.parts import PartedSession, read_parts

if TYPE_CHECKING:
    from edgedit.manifest import Latents
    from edgedit.runtimes.base import Runtime, Session

__all__ = ["Components"]


@dataclass
class Components:
    """Sessions by component.

    Attributes:
        low_ram: keep one component in memory at a time. None decides by the free memory when components are opened.
        on_stage: told "load COMPONENT", "encode", "denoise 1/3", "decode 1/3" as they begin.
    """

    bundle: Bundle
    runtime: Runtime
    low_ram: bool | None = None
    on_stage: Callable[[str], None] | None = None
    _sessions: dict[str, Session] = field(default_factory=dict, repr=False)
    _lean: set[str] = field(default_factory=set, repr=False)

    @property
    def loaded(self) -> list[str]:
        """Names of the components that are in memory."""
        return list(self._sessions)

    @property
    def latent_space(self) -> Latents:
        """The manifest's latent space. Raises BundleError when the bundle has none."""
        latents = self.bundle.manifest.latents
        if latents is None:
            raise BundleError(
                f"{self.bundle.path.name} has no autoencoder and draws no pictures; convert the whole pipeline folder"
            )
        return latents

    def close(self) -> None:
        """Free every component."""
        for component in self.loaded:
            self.free(component)

    def free(self, component: str) -> None:
        """Free one component. Nothing happens when it is not loaded."""
        session = self._sessions.pop(component, None)
        self._lean.discard(component)
        if session is not None:
            session.close()

    def stage(self, name: str) -> None:
        """Tell what begins."""
        if self.on_stage is not None:
            self.on_stage(name)

    def weights_size(self, component: str) -> int:
        """Bytes of a component's files."""
        artefact = self.bundle.component(component).artefacts[self.runtime.name]
        return sum(self.bundle.manifest.files[path].size for path in artefact.files)

    def one_at_a_time(self) -> bool:
        """Whether a component has to go before the next one comes."""
        if self.low_ram is not None:
            return self.low_ram
        free = available_memory()
        total = sum(self.weights_size(name) for name in self.bundle.manifest.components)
        return free is not None and total > 0.4 * free

    def session(self, component: str, *, lean: bool = False) -> Session:
        """A component, loaded if it is not; `lean` takes the least memory rather than the least time, where the backend
        has the choice. Raises BundleError."""
        lean = lean and hasattr(self.runtime, "open_lean")
        if component in self._sessions and lean != (component in self._lean):
            self.free(component)
        if component not in self._sessions:
            self._begin_load(component)
            open_component = self.runtime.open_lean if lean else self.runtime.open  # type: ignore[attr-defined]
            self._sessions[component] = open_component(component)
            if lean:
                self._lean.add(component)
        return self._sessions[component]

    def _begin_load(self, component: str) -> None:
        self.bundle.component(component)
        if self.one_at_a_time():
            self.close()
        self.stage(f"load {component}")

    def parted_transformer(self) -> PartedSession:
        """The transformer as the parts that it is cut into, which `session` gives from then on.

        Raises InputError where a step cache cannot be had.
        """
        session = self._sessions.get("transformer")
        if not isinstance(session, PartedSession):
            plan = self.parts_plan()
            self.free("transformer")
            self._begin_load("transformer")
            open_part = partial(self.runtime.open_part, "transformer")  # type: ignore[attr-defined]
            session = PartedSession(read_parts(self.bundle.file(plan)), open_part)
            self._sessions["transformer"] = session
        return session

    def whole_transformer(self) -> Session:
        """The transformer in one graph."""
        if isinstance(self._sessions.get("transformer"), PartedSession):
            self.free("transformer")
        return self.session("transformer")

    def parts_plan(self) -> str:
        """Path of the plan of the transformer's parts. Raises InputError where a step cache cannot be had."""
        if not hasattr(self.runtime, "open_part"):
            raise InputError("step caches run in ONNX Runtime only; leave it out, or choose that backend and engine")
        plan = self.bundle.component("transformer").artefacts[self.runtime.name].parts
        if plan is None:
            raise InputError(
                f"{self.bundle.path.name}: its transformer is not cut between its blocks, as a step cache needs; "
                "convert the model again, or leave the step cache out"
            )
        return plan
