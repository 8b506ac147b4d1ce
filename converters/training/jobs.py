"""What conversions by training share: options, devices, and running a stage with its progress kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from edgedit.converters.training.loop import Budget, Stage, run_stage
from edgedit.converters.training.trainable import Trainable
from edgedit.converters.training.workspace import OnProgress, Workspace
from edgedit.errors import InputError

__all__ = [
    "DEFAULT_SECONDS",
    "default_guidance",
    "latent_shape",
    "pick_device",
    "run_training",
    "training_budget",
    "weights_of",
]

DEFAULT_SECONDS = 1800.0


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu" or "cuda". Raises InputError when it is not here."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here; leave --device out")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def training_budget(budget: float | None, steps: int | None) -> Budget:
    """Seconds or steps of training, `DEFAULT_SECONDS` when neither is given.

    Raises InputError for both, or for nothing.
    """
    if budget is not None and steps is not None:
        raise InputError("give a time or a number of training steps, not both")
    if (budget is not None and budget <= 0) or (steps is not None and steps < 1):
        raise InputError("the budget must be more than nothing; give a time such as 30m, or a number of steps")
    return Budget(steps=steps) if steps is not None else Budget(seconds=DEFAULT_SECONDS if budget is None else budget)


def default_guidance(trainable: Trainable) -> float:
    """The guidance scale that the checkpoint recommends, or the usual 4.5; 1 for a distilled one."""
    if trainable.settings.get("guidance", {}).get("kind") == "none":
        return 1.0
    return float(trainable.settings.get("recommended", {}).get("guidance_scale", 4.5))


def latent_shape(trainable: Trainable) -> tuple[int, int, int]:
    """Channels, height and width of the latents that the checkpoint was trained on."""
    config = trainable.transformer.config
    return (int(config.in_channels), int(config.sample_size), int(config.sample_size))


def weights_of(network: nn.Module, averaged: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors to store: averaged parameters, and buffers that belong to the checkpoint."""
    state = {name: value for name, value in network.state_dict().items() if name != "pos_embed.pos_embed"}
    return {name: averaged.get(name, value).cpu() for name, value in state.items()}


def run_training(
    stage: Stage,
    work: Workspace,
    budget: Budget,
    on_progress: OnProgress | None,
    stop_after: int | None = None,
) -> dict[str, torch.Tensor]:
    """Train a stage in a workspace, from where it was left.

    Raises KeyboardInterrupt at step `stop_after`, as Ctrl-C would.
    """

    def tell(step: int, share: float, loss: float) -> None:
        work.note_loss(stage.name, step, loss)
        if on_progress is not None:
            on_progress(stage.name, round(1000 * share), 1000, {"loss": loss, "step": step})

    averaged = run_stage(
        stage,
        work.folder,
        budget,
        log=lambda line: None,
        save_every=60.0,
        log_every=10,
        warm_up=20,
        decay_share=0.4,
        on_progress=tell,
        stop_after=stop_after,
    )
    if stop_after is not None:
        raise KeyboardInterrupt
    return averaged
