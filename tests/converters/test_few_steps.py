"""Published few-step models: their timesteps and noise levels against diffusers, and how a checkpoint is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

import edgedit
from edgedit.converters.families import FAMILIES
from edgedit.converters.few_steps import FEW_STEPS, FewSteps, few_steps_of
from edgedit.converters.own_record import OwnRecord
from edgedit.errors import InputError
from edgedit.guidance import Guidance
from edgedit.schedules import Schedule, make_schedule, own_steps, schedule_config_from_diffusers
from edgedit.solvers import make_solver

Saved = Callable[[str], tuple[Any, Path, int]]

BY_NAME = {entry.name: entry for entry in FEW_STEPS}
#: Image tokens of a picture of 1024 × 1024 pixels.
TOKENS = 4096


def scheduler_of(entry: FewSteps) -> Any:
    class_name, options = entry.scheduler
    return getattr(diffusers, class_name)(**options)


def schedule_of(entry: FewSteps, steps: int) -> Schedule:
    scheduler = scheduler_of(entry)
    config = schedule_config_from_diffusers(entry.scheduler[0], json.loads(scheduler.to_json_string()))
    return make_schedule({**config, **entry.schedule}, steps, image_tokens=TOKENS)


def as_their_pipelines_set_it(entry: FewSteps, steps: int) -> Any:
    """The scheduler after the `set_timesteps` that the entry's pipeline makes."""
    scheduler = scheduler_of(entry)
    unit = np.linspace(1.0, 1 / steps, steps)
    flux, qwen = (0.5, 1.15, 4096), None
    if entry.name == "sana-sprint":
        scheduler.set_timesteps(steps, max_timesteps=1.5708, intermediate_timesteps=1.3 if steps == 2 else None)
    elif entry.name == "pixart-dmd":
        scheduler.set_timesteps(timesteps=[400])
    elif entry.name == "flux2-klein":
        scheduler.set_timesteps(sigmas=unit, mu=compute_empirical_mu(TOKENS, steps))
    elif entry.name.startswith("hyper-flux"):
        mu = calculate_shift(TOKENS, 256, flux[2], *flux[:2])
        scheduler.set_timesteps(sigmas=unit, mu=mu)
    elif entry.name == "qwen-image-lightning":
        options = scheduler.config
        qwen = calculate_shift(
            TOKENS, options.base_image_seq_len, options.max_image_seq_len, options.base_shift, options.max_shift
        )
        scheduler.set_timesteps(sigmas=unit, mu=qwen)
    elif entry.name in ("flux-schnell", "z-image-turbo"):
        scheduler.set_timesteps(sigmas=unit)
    else:
        scheduler.set_timesteps(steps)
    return scheduler


CASES = [(entry.name, steps) for entry in FEW_STEPS for steps in entry.steps]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_timesteps_and_levels_are_those_of_diffusers(name: str, steps: int) -> None:
    entry = BY_NAME[name]
    expected, actual = as_their_pipelines_set_it(entry, steps), schedule_of(entry, steps)
    assert actual.steps == steps
    if name == "sana-sprint":
        angles = expected.timesteps.double()
        np.testing.assert_allclose(np.arctan2(actual.sigmas, actual.alphas), angles, atol=1e-6)
        told = torch.sin(angles[:-1]) / (torch.cos(angles[:-1]) + torch.sin(angles[:-1]))
        np.testing.assert_allclose(actual.timesteps, told, atol=1e-6)
        return
    np.testing.assert_array_equal(actual.timesteps, expected.timesteps.numpy().astype(np.float32))
    if hasattr(expected, "sigmas"):
        np.testing.assert_array_equal(actual.sigmas.astype(np.float32), expected.sigmas.numpy())
    else:
        kept = expected.alphas_cumprod[expected.timesteps.long()].numpy()
        np.testing.assert_allclose(actual.alphas[:-1] ** 2, kept, rtol=1e-6)


GOLDEN = {
    ("sana-sprint", 1): "1.5708",
    ("sana-sprint", 2): "1.5708 1.3",
    ("sana-sprint", 4): "1.5708 1.1781 .7854 .3927",
    ("pixart-lcm", 4): "999 759 499 259",
    ("pixart-dmd", 1): "400",
    ("tcd", 4): "999 759 499 259",
    ("sd3.5-turbo", 4): "1 .85769 .60215 .00893",
    ("flux-schnell", 4): "1 .75 .5 .25",
    ("flux2-klein", 4): "1 .96738 .90814 .7672",
    ("z-image-turbo", 8): "1 .95455 .9 .83333 .75 .64286 .5 .3",
}


@pytest.mark.parametrize(("name", "steps"), list(GOLDEN), ids=[f"{name}-{steps}" for name, steps in GOLDEN])
def test_golden_numbers_of_the_published_schedules(name: str, steps: int) -> None:
    schedule = schedule_of(BY_NAME[name], steps)
    shown = {"trigflow": np.arctan2(schedule.sigmas, schedule.alphas)[:-1], "flow": schedule.sigmas[:-1]}
    expected = [float(word) for word in GOLDEN[name, steps].split()]
    np.testing.assert_allclose(shown.get(schedule.path, schedule.timesteps), expected, atol=6e-6)


def test_pixart_dmd_is_one_clean_estimate_at_timestep_400() -> None:
    schedule = schedule_of(BY_NAME["pixart-dmd"], 1)
    assert schedule.alphas[0] ** 2 == pytest.approx(0.1935720, abs=1e-7)
    x, epsilon = np.random.default_rng(0).standard_normal((2, 1, 4, 3, 5)).astype(np.float32)
    end = make_solver(schedule.sampler, schedule).step(0, x, epsilon, lambda shape: np.full(shape, np.nan, np.float32))
    kept = 0.1935720
    np.testing.assert_allclose(end, (x - (1 - kept) ** 0.5 * epsilon) / kept**0.5, rtol=1e-5)


@pytest.mark.parametrize("entry", FEW_STEPS, ids=lambda entry: entry.name)
def test_every_entry_can_be_run(entry: FewSteps) -> None:
    Guidance.from_manifest(entry.guidance)
    for steps in entry.steps:
        schedule = schedule_of(entry, steps)
        make_solver(schedule.sampler, schedule)
    tables = own_steps({"path": "vp", "prediction": "epsilon", "sampler": "ddim", **entry.schedule})
    assert not tables or tables == entry.steps


def checkpoint_of(entry: FewSteps, name: str, **changes: Any) -> Any:
    """As much of a checkpoint as is looked at, with everything that tells the entry."""
    class_name, options = entry.scheduler
    marks = {"scheduler": dict(options), "transformer": {}, "index": {}}
    for mark, value in entry.marks.items():
        place, key = mark.split(".", 1)
        marks[place][key] = value
    found = {
        "source": f"someone/{name}",
        "pipeline_class": entry.pipelines[0],
        "scheduler": SimpleNamespace(class_name=class_name, config=marks["scheduler"]),
        "components": {"transformer": SimpleNamespace(config=marks["transformer"])},
        "model_index": marks["index"],
        "own": OwnRecord(),
    }
    return SimpleNamespace(**{**found, **changes})


NAMES = {
    "pixart-dmd": "PixArt-Alpha-DMD-XL-2-512x512",
    "sd3.5-turbo": "stable-diffusion-3.5-large-turbo",
    "z-image-turbo": "Z-Image-Turbo",
    "hyper-sd3-8": "Hyper-SD3-8steps-CFG",
    "hyper-sd3-4": "Hyper-SD3-4steps-CFG",
    "hyper-sd3-16": "Hyper-SD3-16steps-CFG",
    "hyper-flux-8": "Hyper-FLUX.1-dev-8steps",
    "hyper-flux-16": "Hyper-FLUX.1-dev-16steps",
}


@pytest.mark.parametrize("entry", FEW_STEPS, ids=lambda entry: entry.name)
def test_a_checkpoint_is_told_by_its_files_and_where_they_are_silent_by_its_name(entry: FewSteps) -> None:
    name = NAMES.get(entry.name, "anything")
    assert few_steps_of(checkpoint_of(entry, name)) is entry
    assert (few_steps_of(checkpoint_of(entry, "my-model")) is entry) == (entry.source is None)
    assert few_steps_of(checkpoint_of(entry, name, pipeline_class="OtherPipeline")) is None
    stated = OwnRecord(schedule={"path": "flow", "prediction": "flow", "sampler": "euler"})
    assert few_steps_of(checkpoint_of(entry, name, own=stated)) is None
    for mark in entry.marks:
        changed = checkpoint_of(entry, name)
        place, key = mark.split(".", 1)
        {
            "scheduler": changed.scheduler.config,
            "transformer": changed.components["transformer"].config,
            "index": changed.model_index,
        }[place][key] = "other"
        assert few_steps_of(changed) is not entry


def test_the_base_models_are_not_taken_for_distilled_ones() -> None:
    for family in FAMILIES:
        for pipeline_class in family.pipeline_classes:
            scheduler = SimpleNamespace(class_name="DPMSolverMultistepScheduler", config={})
            found = few_steps_of(checkpoint_of(FEW_STEPS[0], "x", pipeline_class=pipeline_class, scheduler=scheduler))
            assert found is None


def test_a_published_one_step_model_converts_to_a_bundle_that_draws_in_one_step(
    saved_pipeline: Saved, tmp_path: Path
) -> None:
    folder = tmp_path / "PixArt-Alpha-DMD-XL-2-512x512"
    shutil.copytree(saved_pipeline("pixart-sigma")[1], folder)
    scheduler_of(BY_NAME["pixart-dmd"]).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "DDPMScheduler"]}))
    edgedit.convert(folder, tmp_path / "x.edgedit")
    pipeline = edgedit.load(tmp_path / "x.edgedit")
    seen: list[float] = []
    result = pipeline.generate("a red cat", seed=0, on_step=lambda state: seen.append(state.timestep) or True)
    assert seen == [400.0]
    assert (result.recipe["steps"], result.recipe["sampler"], result.recipe["guidance_scale"]) == (1, "dmd", 1.0)
    with pytest.raises(InputError, match="distilled for 1 step; ask for that, not 4"):
        pipeline.generate("a red cat", seed=0, steps=4)


def test_the_page_lists_every_model_with_its_steps() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
    listed: dict[str, str] = {}
    for row in page.split("| Model | Known by |")[1].split("\n\n")[0].splitlines()[2:]:
        _, names, _, steps, *_ = row.split("|")
        listed.update(dict.fromkeys(re.findall(r"`([^`]+)`", names), steps))
    assert list(listed) == [entry.name for entry in FEW_STEPS]
    for entry in FEW_STEPS:
        assert {str(count) for count in entry.steps} <= set(re.findall(r"\d+", listed[entry.name]))
