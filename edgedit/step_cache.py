"""Steps that leave blocks out: what a range of blocks adds to the hidden states changes little from step to step.

A policy names the steps that compute all blocks; in between, what the others would have added is taken from there.
No policy needs training. They are for schedules of many steps: those of few-step models leave nothing to reuse.

  first-block:T    all blocks are reused while what the first one adds has changed by at most the share T since they
                   were computed (ParaAttention's first block cache; diffusers' FirstBlockCacheConfig)
  taylor:N[:O]     all blocks are computed every N-th step, after three at the start; in between a Taylor polynomial of
                   order O through the last steps that were (Liu et al., "From Reusing to Forecasting", 2025)
  delta:N[:B]      blocks are computed every N-th step; in between the rear half is reused in the share B of the steps
                   at the start, where outlines are drawn, and the front half after it (Δ-DiT: Chen et al., 2024)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgedit.errors import InputError
from edgedit.parts import FRONT, REAR, PartedSession

__all__ = ["LEAST_STEPS", "CachedTransformer", "StepCache", "parse_step_cache"]

#: Samplers that replace all noise after every step, so that a step says little of the next.
ALL_FRESH = frozenset({"lcm", "dmd", "scm"})
#: Schedules of fewer steps are refused.
LEAST_STEPS = 5
#: Steps at the start that `taylor` computes, to have differences to extrapolate.
WARM_UP = 3

Floats = npt.NDArray[np.float32]
_SYNTAX = "write off, first-block:THRESHOLD, taylor:INTERVAL[:ORDER] or delta:INTERVAL[:BOUNDARY], as in taylor:3"


@dataclass(frozen=True)
class StepCache:
    """A policy: `kind` "first-block", "taylor" or "delta", and its numbers, described in this module."""

    kind: str
    threshold: float = 0.0
    interval: int = 1
    order: int = 1
    boundary: float = 0.5

    @property
    def never(self) -> bool:
        """Whether every step computes all blocks."""
        return self.threshold == 0 if self.kind == "first-block" else self.interval == 1

    @property
    def looks(self) -> bool:
        """Whether what is reused depends on the picture, so that pictures of one batch would depend on each other."""
        return self.kind == "first-block"

    def __str__(self) -> str:
        if self.kind == "first-block":
            return f"first-block:{self.threshold:g}"
        return f"{self.kind}:{self.interval}:{self.order if self.kind == 'taylor' else format(self.boundary, 'g')}"

    def check(self, steps: int, sampler: str) -> None:
        """Raises InputError for a schedule that is too short, or a sampler whose steps do not resemble each other."""
        if self.never:
            return
        if steps < LEAST_STEPS:
            raise InputError(
                f"a step cache reuses what changes little between steps, and {steps} steps are too few for that; "
                f"leave it out, or draw in at least {LEAST_STEPS}"
            )
        if sampler in ALL_FRESH:
            raise InputError(
                f"a step cache reuses what changes little between steps, and sampler {sampler} draws all noise afresh "
                "after each; leave it out, or choose another sampler, such as dpmpp_2m or euler"
            )

    def omits(self, step: int, steps: int, last_full: int | None, change: float) -> tuple[int, ...]:
        """The parts that evaluation `step` of `steps` leaves out.

        Args:
            last_full: the last evaluation that computed all blocks, None when there was none.
            change: share by which what the first block adds has changed since.
        """
        if last_full is None or self.never:
            return ()
        if self.kind == "first-block":
            return (FRONT, REAR) if change <= self.threshold else ()
        if self.kind == "taylor":
            return () if step < WARM_UP or (step - WARM_UP + 1) % self.interval == 0 else (FRONT, REAR)
        if step % self.interval == 0:
            return ()
        return (REAR,) if step < self.boundary * steps else (FRONT,)


def parse_step_cache(text: str | None) -> StepCache | None:
    """A policy from "first-block:0.1", "taylor:3:2" or "delta:2:0.4"; None from "off" and from None.

    Raises InputError for anything else.
    """
    if text is None or text == "off":
        return None
    kind, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
        if not all(map(math.isfinite, values)):
            raise ValueError
        if kind == "first-block" and len(values) == 1 and values[0] >= 0:
            return StepCache(kind, threshold=values[0])
        if kind in ("taylor", "delta") and 1 <= len(values) <= 2 and values[0] >= 1 and values[0].is_integer():
            interval, second = int(values[0]), values[1] if len(values) == 2 else None
            if second is None:
                return StepCache(kind, interval=interval)
            if kind == "taylor" and second.is_integer() and 0 <= second <= 4:
                return StepCache(kind, interval=interval, order=int(second))
            if kind == "delta" and 0 <= second <= 1:
                return StepCache(kind, interval=interval, boundary=second)
    except ValueError:
        pass
    raise InputError(f"{text!r} is no step cache; {_SYNTAX}")


@dataclass
class _Branch:
    """What is remembered of one row of guidance: the prompt's predictions, or those without it."""

    full: int | None = None
    residual: Floats | None = None
    factors: dict[int, list[Floats]] = field(default_factory=dict)
    """By part: what it adds, and its divided differences by the step, up to the policy's order."""

    def remember(self, part: int, added: Floats, step: int, order: int) -> None:
        old, new = self.factors.get(part, []), [added]
        if self.full is not None:
            for previous in old[:order]:
                new.append((new[-1] - previous) / np.float32(step - self.full))
        self.factors[part] = new

    def forecast(self, part: int, step: int) -> Floats:
        assert self.full is not None
        ahead = step - self.full
        total = self.factors[part][0]
        for order, factor in enumerate(self.factors[part][1:], 1):
            total = total + factor * np.float32(ahead**order / math.factorial(order))
        return total


class CachedTransformer:
    """One run of a transformer under a policy: the evaluations of one schedule, for one batch of pictures.

    The policy decides on the predictions with the prompt; those without it follow, in one batch with them or apart.
    """

    def __init__(self, session: PartedSession, policy: StepCache, steps: int) -> None:
        self._session, self._policy, self._steps = session, policy, steps
        self._branches: dict[str, _Branch] = {}
        self._omitted: tuple[int, ...] = ()
        self._due: tuple[str, ...] = ()
        self.step = -1

    @property
    def reused(self) -> bool:
        """Whether blocks were left out in the last evaluation."""
        return bool(self._omitted)

    def next_step(self, branches: Sequence[str]) -> None:
        """Begin the next evaluation of the schedule, for which `run` will be called with these branches, in order."""
        self.step += 1
        self._due = tuple(branches)

    def run(self, inputs: Mapping[str, np.ndarray], branches: Sequence[str]) -> dict[str, np.ndarray]:
        """Evaluate the transformer on equal groups of rows, one for each name in `branches`; the first leads."""
        before, hidden, known = self._session.first(inputs)
        residuals = np.split(hidden - before, len(branches))
        held = [self._branches.setdefault(name, _Branch()) for name in branches]
        if branches[0] == self._due[0]:
            self._omitted = self._decide(held[0], residuals[0])
        for part in (FRONT, REAR):
            if part in self._omitted:
                hidden = hidden + np.concatenate([branch.forecast(part, self.step) for branch in held])
                continue
            after = self._session.blocks(part, hidden, known)
            if not self._omitted:
                for branch, added in zip(held, np.split(after - hidden, len(held)), strict=True):
                    branch.remember(part, added, self.step, self._order)
            hidden = after
        if not self._omitted:
            for branch, residual in zip(held, residuals, strict=True):
                branch.full, branch.residual = self.step, residual
        return self._session.last(hidden, known)

    def _decide(self, lead: _Branch, residual: Floats) -> tuple[int, ...]:
        known = [self._branches.get(name, _Branch()).full for name in self._due]
        if any(full != lead.full for full in known):
            # A branch sat out the last full step (outside of the guidance interval) and has nothing to reuse.
            return ()
        return self._policy.omits(self.step, self._steps, lead.full, _relative_change(residual, lead.residual))

    @property
    def _order(self) -> int:
        return self._policy.order if self._policy.kind == "taylor" else 0


def _relative_change(now: Floats, then: Floats | None) -> float:
    if then is None or then.shape != now.shape:
        return math.inf
    return float(np.abs(now - then).mean() / max(np.abs(then).mean(), np.finfo(np.float32).tiny))
