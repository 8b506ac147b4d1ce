"""One resumable training loop for every stage.

All randomness of a step is drawn from `(seed, step)` alone, so a run that was killed and started again from its last
checkpoint does exactly what an uninterrupted run would have done.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgedit.errors import CheckpointError, InputError

__all__ = ["Budget", "Stage", "autocast", "load_file", "run_stage", "save_file", "step_rng"]


class Stage(Protocol):
    """What `run_stage` trains."""

    name: str
    modules: nn.Module
    learning_rate: float
    hidden_matrices: frozenset[str]
    """Names of the parameters that Muon trains (matrices inside the network); AdamW trains the others."""

    def loss(self, step: int) -> Tensor:
        """Loss of the batch that belongs to a step: a scalar, to be differentiated."""
        ...


MUON_RATE = 2.5
"""Learning rate of Muon over that of AdamW."""


@dataclass(frozen=True)
class Budget:
    """When a stage ends: after a number of steps, or after seconds of training (resumed runs go on counting)."""

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used, from 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        raise ValueError("a budget has steps or seconds")


def step_rng(seed: int, step: int, purpose: int = 0) -> np.random.Generator:
    """The generator of one step."""
    return np.random.default_rng((seed, purpose, step))


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bfloat16 for matrix products where that is fast; weights, norms and the loss stay float32.

    A processor without instructions for bfloat16 takes two to five times as long as in float32; with those of AVX-512
    alone (Zen 4, 2 cores) products of the embedded model's shapes take 0.35 and a training step 0.58 of the time.
    """
    fast = device.type != "cpu" or _computes_bfloat16()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and fast)


@functools.cache
def _computes_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def save_file(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_file(path: Path) -> dict[str, Any]:
    """Reads what `save_file` wrote; refuses anything but tensors and plain containers.

    Raises CheckpointError for a damaged file.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120]
        raise CheckpointError(f"{path} is damaged ({reason}); delete it to begin this part again") from None
    return state


def _learning_rate(peak: float, step: int, progress: float, warm_up: int, decay_share: float) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_share` of the budget."""
    rising = min(1.0, (step + 1) / warm_up)
    falling = min(1.0, (1.0 - progress) / decay_share)
    return peak * rising * max(0.0, falling)


class _Optimisers:
    """AdamW, and Muon for the matrices that a stage names for it.

    Muon steps along the orthogonalised momentum (Jordan et al., 2024; the scale is that of Liu et al., "Muon is
    scalable for LLM training", 2025, section 2.2). On the transformer of the embedded model it came in 260 steps to the
    loss that AdamW had after 400, at 1.23 times the time of a step.
    """

    def __init__(self, stage: Stage) -> None:
        hidden: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in stage.modules.named_parameters():
            (hidden if name in stage.hidden_matrices else others).append(parameter)
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True, eps=1e-8), 1.0)
        ]
        if hidden:
            muon = torch.optim.Muon(hidden, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            self._parts.append((muon, MUON_RATE))

    def step(self, learning_rate: float) -> None:
        for optimiser, factor in self._parts:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser, _ in self._parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for (optimiser, _), state in zip(self._parts, states, strict=True):
            optimiser.load_state_dict(state)


def _check_finite(window: list[Tensor], name: str, step: int) -> float:
    """Mean of the last losses, 0 when there are none."""
    mean = torch.stack(window).mean().item() if window else 0.0
    if not math.isfinite(mean):
        raise InputError(
            f"{name}: the loss is not a number around step {step}; the checkpoint before it is kept, "
            "start again with a smaller learning rate"
        )
    return mean


def run_stage(
    stage: Stage,
    run_dir: Path,
    budget: Budget,
    *,
    log: Callable[[str], None] = print,
    save_every: float = 180.0,
    log_every: int = 50,
    warm_up: int = 200,
    decay_share: float = 0.25,
    ema_decay: float = 0.999,
    snapshot_every: float = math.inf,
    on_snapshot: Callable[[dict[str, Tensor], int], None] | None = None,
    on_progress: Callable[[int, float, float], None] | None = None,
    stop_after: int | None = None,
) -> dict[str, Tensor]:
    """Trains a stage until its budget is used, from its last checkpoint if there is one.

    Args:
        stage: modules and loss.
        run_dir: holds `<stage.name>.pt`, replaced every `save_every` seconds and at the end.
        budget: end of training; the learning rate follows it.
        log: takes one line of progress every `log_every` steps.
        warm_up: steps of rising learning rate.
        decay_share: part of the budget over which the learning rate falls to zero.
        ema_decay: decay per step of the averaged weights, less at the start.
        snapshot_every: seconds between two calls of `on_snapshot(averaged weights, step)`.
        on_progress: takes (step, share of the budget used, mean loss since the last call) every `log_every` steps.
        stop_after: leave at this step as if interrupted, for tests.

    Returns:
        The averaged weights (float32), named as in `stage.modules.state_dict()`.

    Raises InputError when the loss is no longer a number; the last checkpoint stays.
    """
    path = run_dir / f"{stage.name}.pt"
    parameters = dict(stage.modules.named_parameters())
    tensors: list[Tensor] = list(parameters.values())
    device = tensors[0].device
    optimiser = _Optimisers(stage)
    averaged = {name: value.detach().clone() for name, value in parameters.items()}
    step, spent = 0, 0.0
    if path.exists():
        state = load_file(path)
        stage.modules.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        averaged = {name: value.to(device) for name, value in state["averaged"].items()}
        step, spent = int(state["step"]), float(state["seconds"])
        log(f"{stage.name}: resumed at step {step}")

    def save() -> None:
        _check_finite(window, stage.name, step)
        save_file(
            {
                "model": stage.modules.state_dict(),
                "averaged": averaged,
                "optimiser": optimiser.state_dict(),
                "step": step,
                "seconds": spent,
            },
            path,
        )

    saved_at = snapshot_at = time.monotonic()
    window: list[Tensor] = []
    window_start = time.monotonic()
    stage.modules.train()
    while (progress := budget.progress(step, spent)) < 1.0 and (stop_after is None or step < stop_after):
        began = time.monotonic()
        rate = _learning_rate(stage.learning_rate, step, progress, warm_up, decay_share)
        loss = stage.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimiser.step(rate)
        with torch.no_grad():
            keep = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.values()), tensors, 1 - keep)
        step += 1
        window.append(loss.detach())
        now = time.monotonic()
        spent += now - began
        if step % log_every == 0:
            speed = len(window) / (now - window_start)
            mean = _check_finite(window, stage.name, step)
            log(f"{stage.name}: step {step} loss {mean:.5f} lr {rate:.2e} {speed:.2f} steps/s {100 * progress:.1f} %")
            if on_progress is not None:
                on_progress(step, budget.progress(step, spent), mean)
            window, window_start = [], time.monotonic()
        if now - saved_at > save_every:
            save()
            saved_at = time.monotonic()
        if on_snapshot is not None and now - snapshot_at > snapshot_every:
            on_snapshot(averaged, step)
            stage.modules.train()
            snapshot_at = time.monotonic()
    save()
    return averaged
