"""Where a conversion by training keeps what it has done so far, so that it can be stopped and started again.

The folder is `.NAME.work` beside the checkpoint to be made. It goes when the checkpoint is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edgedit.converters.training.calibration import Calibration, embed_prompts, sample_latents
from edgedit.converters.training.denoisers import Denoiser, Text
from edgedit.converters.training.judging import judge
from edgedit.converters.training.loop import load_file, save_file
from edgedit.converters.training.trajectory import sample_trajectories
from edgedit.converters.work_folder import WorkFolder

__all__ = ["OnProgress", "Workspace", "digest"]

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]
"""Stage, done, total, and figures such as the loss."""


class Workspace(WorkFolder):
    """Intermediate results of one run: prompts, the teacher's samples, checkpoints of stages, and loss curves."""

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.folder / name

    def note_loss(self, stage: str, step: int, loss: float) -> None:
        """Keep one point of the loss curve."""
        with self.path("losses.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([stage, step, loss]) + "\n")

    def losses(self) -> dict[str, dict[int, float]]:
        """Loss by stage and step."""
        curves: dict[str, dict[int, float]] = {}
        path = self.path("losses.jsonl")
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                stage, step, loss = json.loads(line)
                curves.setdefault(stage, {})[step] = loss
        return curves

    def first_and_last(self) -> dict[str, tuple[float, float]]:
        """First and last loss of each stage."""
        return {stage: (next(iter(c.values())), list(c.values())[-1]) for stage, c in self.losses().items()}

    def plot(self, name: str) -> Path | None:
        """The loss curves as a picture, None when there are none."""
        curves = self.losses()
        if not curves:
            return None
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.5), squeeze=False)
        for panel, (stage, points) in zip(panels[0], curves.items(), strict=True):
            panel.plot(list(points), list(points.values()))
            panel.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
            panel.grid(alpha=0.3)
        figure.tight_layout()
        path = self.path(name)
        figure.savefig(path, dpi=100)
        pyplot.close(figure)
        return path

    def calibration(
        self,
        checkpoint: Path,
        denoiser: Denoiser,
        prompts: list[str],
        *,
        count: int,
        shape: tuple[int, int, int],
        guidance_scale: float,
        seed: int,
        device: torch.device,
        batch_size: int,
        levels: Sequence[float] | None = None,
        from_noise_alone: bool = False,
        keep_right: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Calibration:
        """Embedded prompts and the teacher's samples for them, made once and kept.

        With `levels`, a few-step student's, the teacher's ways through them are kept as well (`trajectory`), with
        `keep_right` also which of them end well (`judging`). `from_noise_alone` as in `sample_latents`.
        """

        def tell(stage: str) -> Callable[[int, int], None] | None:
            return None if on_progress is None else lambda done, total: on_progress(stage, done, total, {})

        text_path, latents_path = self.path("text.pt"), self.path("latents.npy")
        if not text_path.exists():
            text, empty = embed_prompts(checkpoint, prompts, on_step=tell("embed prompts"))
            stored = {"states": text.states, "mask": text.mask, "no_states": empty.states, "no_mask": empty.mask}
            save_file(stored, text_path)
        stored = load_file(text_path)
        text, empty = Text(stored["states"], stored["mask"]), Text(stored["no_states"], stored["no_mask"])
        data = Calibration(text, empty, np.empty((0, *shape), np.float16), guidance_scale, seed, batch_size)
        if not latents_path.exists():
            if levels is None:
                drawn = sample_latents(
                    denoiser,
                    text,
                    empty,
                    count=count,
                    shape=shape,
                    guidance_scale=guidance_scale,
                    seed=seed,
                    device=device,
                    batch_size=batch_size,
                    from_noise_alone=from_noise_alone,
                    on_step=tell("draw samples"),
                )
            else:
                drawn = sample_trajectories(
                    denoiser,
                    data,
                    levels=levels,
                    shape=shape,
                    count=count,
                    device=device,
                    on_step=tell("draw trajectories"),
                )
            temporary = latents_path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, drawn)
            temporary.replace(latents_path)
        kept = np.load(latents_path)
        if levels is None:
            return replace(data, latents=kept)
        data = replace(data, latents=kept[:, 1, -1], points=kept[:, 0], pictures=kept[:, 1])
        if not keep_right:
            return data
        return replace(
            data, right=judge(checkpoint, prompts, data.latents, device=device, on_step=tell("judge pictures"))
        )


def digest(text: str) -> str:
    """A short hash, to recognise a file's content in the options."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
