"""Components are opened once, and once more where less memory is asked for."""

from __future__ import annotations

from edgedit.api import BUILTIN
from edgedit.bundle import open_bundle
from edgedit.components import Components
from edgedit.runtimes.base import open_runtime


def test_a_component_is_opened_again_only_for_another_memory() -> None:
    bundle = open_bundle(BUILTIN)
    stages: list[str] = []
    components = Components(bundle, open_runtime(bundle, "onnx"), low_ram=False, on_stage=stages.append)
    roomy = components.session("decoder")
    assert components.session("decoder") is roomy
    lean = components.session("decoder", lean=True)
    assert lean is not roomy
    assert components.session("decoder", lean=True) is lean
    assert components.session("decoder") is not lean
    assert stages == ["load decoder"] * 3
    components.close()
    assert not components.loaded
