from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from tiny_pipelines import build_pipeline

import edgedit
from edgedit.apps.cli.main import main
from edgedit.denoise import StepState
from edgedit.errors import InputError
from edgedit.metadata import read_recipe
from edgedit.parts import FRONT, REAR
from edgedit.step_cache import StepCache, _Branch, parse_step_cache

PROMPT = "a red cat on the big square"
SIZE = 64


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, edgedit.Pipeline]:
    """A diffusers pipeline of five blocks whose steps resemble each other, and its bundle, open."""
    folder = tmp_path_factory.mktemp("deep")
    pipeline = build_pipeline("pixart-sigma", random.randrange(2**31), layers=5)
    pipeline.save_pretrained(folder / "model")
    edgedit.convert(folder / "model", folder / "x.edgedit")
    return pipeline, edgedit.load(folder / "x.edgedit")


def drawn(pipe: edgedit.Pipeline, step_cache: str | None, **settings: Any) -> tuple[np.ndarray, list[bool]]:
    reused: list[bool] = []

    def watch(state: StepState) -> None:
        reused.append(state.reused)

    settings = {"seed": 3, "steps": 12, "guidance_scale": 1.0, "width": SIZE, "height": SIZE, **settings}
    # diffusers scales scores alike at every size.
    settings.setdefault("attention_scale", 1.0)
    result = pipe.generate(PROMPT, step_cache=step_cache, decode=False, on_step=watch, **settings)
    return result.latents, reused


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("text", ["first-block:0", "taylor:1", "delta:1", "off"])
def test_a_policy_that_never_reuses_is_bit_equal_to_none(deep: tuple[Any, edgedit.Pipeline], text: str) -> None:
    expected, _ = drawn(deep[1], None, guidance_scale=4.0)
    found, reused = drawn(deep[1], text, guidance_scale=4.0)
    assert not any(reused)
    assert np.array_equal(found, expected)


def test_first_block_agrees_with_the_first_block_cache_of_diffusers(deep: tuple[Any, edgedit.Pipeline]) -> None:
    reference, pipe = deep
    noise = torch.randn(1, 4, SIZE // 2, SIZE // 2)
    settings = {"steps": 20, "latents": noise.numpy()}
    full, _ = drawn(pipe, None, **settings)
    for threshold in (0.2, 0.5):
        found, reused = drawn(pipe, f"first-block:{threshold}", **settings)
        # The class is no CacheMixin, whose methods would be no more than these calls.
        apply_first_block_cache(reference.transformer, FirstBlockCacheConfig(threshold=threshold))
        _set_cache_context(reference.transformer, CacheContext("prompt"))
        try:
            expected = reference(
                PROMPT,
                num_inference_steps=20,
                guidance_scale=1.0,
                height=SIZE,
                width=SIZE,
                latents=noise.clone(),
                output_type="latent",
                use_resolution_binning=False,
                clean_caption=False,
            ).images.numpy()
        finally:
            registry = HookRegistry.check_if_exists_or_initialize(reference.transformer)
            for name in ("fbc_leader_block_hook", "fbc_block_hook"):
                registry.remove_hook(name, recurse=True)
        assert relative(found, expected) <= 1e-4, threshold
    assert any(reused)
    assert relative(found, full) > 1e-3


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecasts_agree_with_taylorseer_of_diffusers(order: int) -> None:
    state = TaylorSeerState(taylor_factors_dtype=torch.float32, max_order=order)
    branch = _Branch()
    for step in range(12):
        state.current_step = step
        if step < 3 or random.random() < 0.4:
            features = np.random.default_rng().standard_normal((2, 3, 5)).astype(np.float32)
            state.update((torch.from_numpy(features),))
            branch.remember(FRONT, features, step, order)
            branch.full = step
        else:
            (expected,) = state.predict()
            assert np.allclose(branch.forecast(FRONT, step), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "omitted"),
    [
        ("taylor:3", "...bb.bb.bb."),
        ("taylor:2:3", "...b.b.b.b.b"),
        ("delta:2:0.5", ".r.r.r.f.f.f"),
        ("delta:3:0", ".ff.ff.ff.ff"),
    ],
)
def test_interval_policies_leave_out_the_parts_that_their_papers_say(text: str, omitted: str) -> None:
    policy = parse_step_cache(text)
    assert policy is not None
    names = {(): ".", (FRONT,): "f", (REAR,): "r", (FRONT, REAR): "b"}
    last: int | None = None
    found = ""
    for step in range(12):
        parts = policy.omits(step, 12, last, 0.0)
        last = last if parts else step
        found += names[parts]
    assert found == omitted


def test_delta_reuses_what_a_range_of_blocks_added(deep: tuple[Any, edgedit.Pipeline]) -> None:
    """Δ-DiT written down once more, as a hook on the blocks of the diffusers transformer."""
    reference, pipe = deep
    blocks = list(reference.transformer.transformer_blocks)
    ranges = {REAR: blocks[3:], FRONT: blocks[1:3]}
    steps, boundary, added = 10, 0.4, {}
    state = {"step": -1}

    def cached(index: int, block: Any, plain: Any) -> Any:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if index == 0:
                state["step"] += 1
            step = state["step"]
            if step % 2 == 0:
                out: torch.Tensor = plain(hidden_states, *args, **kwargs)
                added[index] = out - hidden_states
                return out
            omitted = ranges[REAR if step < boundary * steps else FRONT]
            if any(block is other for other in omitted):
                return hidden_states + added[index]
            result: torch.Tensor = plain(hidden_states, *args, **kwargs)
            return result

        return forward

    noise = torch.randn(1, 4, SIZE // 2, SIZE // 2)
    plain = [block.forward for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = cached(index, block, plain[index])
        expected = reference(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=1.0,
            height=SIZE,
            width=SIZE,
            latents=noise.clone(),
            output_type="latent",
            use_resolution_binning=False,
            clean_caption=False,
        ).images.numpy()
    finally:
        for block, forward in zip(blocks, plain, strict=True):
            block.forward = forward
    found, reused = drawn(pipe, f"delta:2:{boundary}", steps=steps, latents=noise.numpy())
    assert reused == [False, True] * 5
    assert relative(found, expected) <= 1e-4


def test_guidance_in_one_batch_or_two_makes_the_same_picture(
    deep: tuple[Any, edgedit.Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("first-block:0.4", "taylor:3:2", "delta:2"):
        for interval in ((0.0, 1.0), (0.3, 0.8)):
            settings = {"guidance_scale": 4.0, "guidance_interval": interval}
            together, reused = drawn(deep[1], text, **settings)
            monkeypatch.setattr("edgedit.transformer.GUIDANCE_BATCH_TOKENS", 0)
            apart, again = drawn(deep[1], text, **settings)
            monkeypatch.undo()
            assert reused == again
            assert any(reused), text
            assert relative(apart, together) <= 1e-4, (text, interval)


def test_the_whole_transformer_is_used_again_once_the_cache_is_off(deep: tuple[Any, edgedit.Pipeline]) -> None:
    expected, _ = drawn(deep[1], None)
    drawn(deep[1], "taylor:2")
    found, _ = drawn(deep[1], None)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "text",
    [
        *("", "taylor", "taylor:0", "taylor:2.5", "taylor:2:9", "taylor:x", "taylor:2:1:1", "delta:2:1.5", "off:1"),
        *("first-block", "first-block:-1", "first-block:nan", "teacache:1"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_step_cache(text)
    assert "taylor:INTERVAL" in str(refused.value)


@pytest.mark.parametrize("text", ["taylor:3:2", "delta:4:0.25", "first-block:0.07"])
def test_a_policy_reads_back_from_its_own_text(text: str) -> None:
    policy = parse_step_cache(text)
    assert isinstance(policy, StepCache)
    assert str(policy) == text
    assert parse_step_cache(str(policy)) == policy


def test_schedules_of_few_steps_and_backends_without_parts_are_refused(
    deep: tuple[Any, edgedit.Pipeline], tmp_path: Path
) -> None:
    with edgedit.load() as pipe:
        for policy in ("taylor:2", "delta:2", "first-block:0.1"):
            with pytest.raises(InputError, match="sampler lcm draws all noise afresh"):
                pipe.generate("a red circle", step_cache=policy, seed=1)
        assert pipe.generate("a red circle", step_cache="taylor:1", seed=1, steps=2, decode=False).recipe["steps"] == 2
    with pytest.raises(InputError, match="4 steps are too few"):
        drawn(deep[1], "taylor:2", steps=4)
    build_pipeline("pixart-sigma", 1).save_pretrained(tmp_path / "model")
    edgedit.convert(tmp_path / "model", tmp_path / "x.edgedit")
    with pytest.raises(InputError, match="not cut between its blocks"):
        drawn(edgedit.load(tmp_path / "x.edgedit"), "taylor:2")


def test_pictures_of_one_batch_may_not_decide_for_each_other(deep: tuple[Any, edgedit.Pipeline]) -> None:
    from edgedit.recipes import Recipe

    pipe = deep[1]
    recipe = Recipe.resolve(
        pipe.bundle,
        prompt=PROMPT,
        negative_prompt=None,
        steps=8,
        width=SIZE,
        height=SIZE,
        guidance_scale=1.0,
        guidance_interval=(0.0, 1.0),
        sampler=None,
        sigmas=None,
        rng="philox",
        strength=None,
        has_image=False,
        has_latents=False,
        step_cache="first-block:0.1",
    )
    embedding = pipe.encode_prompt(PROMPT)
    with pytest.raises(InputError, match="depend on the others"):
        pipe.denoise_together(recipe, [embedding, embedding], None, [1, 2])


def test_the_policy_travels_in_the_picture_and_draws_it_again(
    deep: tuple[Any, edgedit.Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    bundle = str(deep[1].bundle.path)
    call = ["generate", PROMPT, "-m", bundle, "-s", "5", "--steps", "8", "--size", "16x16"]
    assert main([*call, "--step-cache", "taylor:2", "-o", str(first)]) == 0
    assert "blocks reused in 3 steps" in capsys.readouterr().err
    assert read_recipe(first)["step_cache"] == "taylor:2:1"
    assert main(["generate", "-C", str(first), "-m", bundle, "-o", str(again)]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert main([*call, "--step-cache", "sometimes", "-o", str(tmp_path / "no.png")]) == 2
    assert not (tmp_path / "no.png").exists()
