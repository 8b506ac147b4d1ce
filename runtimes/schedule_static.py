"""What a transformer computes from the schedule alone, once a schedule instead of once a step of every picture: the
embedding of the timestep, and what modulates every block by it.

Of the graph, what needs the prompt only is taken out first (see `prompt_static`), then what needs the timestep and
other inputs that are the same for every picture of a size. The results of each timestep are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgedit.runtimes.prompt_static import PROMPT_INPUTS, Part, PromptStaticSession, split_model

__all__ = ["SCHEDULE_INPUTS", "open_divided"]

#: Inputs of a transformer that are told by the schedule, the guidance scale and the size.
SCHEDULE_INPUTS = frozenset({"timestep", "guidance", "resolution", "aspect_ratio"})
#: Timesteps whose results are kept: those of one schedule.
_KEPT = 128


def open_divided(path: Path, open_part: Callable[[str, bytes], Part], label: str) -> PromptStaticSession | None:
    """A session of the graph in `path`, whose parts `open_part(name, model)` opens; None where it is not divided.

    Outputs are those of the undivided graph: the parts are its nodes, over the same weights.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    by_prompt = split_model(model, PROMPT_INPUTS)
    rest = model if by_prompt is None else onnx.load_model_from_string(by_prompt.rest)
    by_schedule = split_model(rest, SCHEDULE_INPUTS)
    if by_schedule is None:
        if by_prompt is None:
            return None
        step = open_part("step", by_prompt.rest)
    else:
        schedule, each = open_part("schedule", by_schedule.static), open_part("each", by_schedule.rest)
        step = PromptStaticSession(schedule, each, by_schedule.values, label, most=_KEPT)
        if by_prompt is None:
            return step
    return PromptStaticSession(open_part("prompt", by_prompt.static), step, by_prompt.values, label)
