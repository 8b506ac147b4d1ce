"""`edgedit generate`: prompt → pictures."""

from __future__ import annotations

from edgedit.apps.cli import generate_options as flag
from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.replay import load_replay
from edgedit.apps.cli.request import (
    Request,
    parse_aspect,
    parse_interval,
    parse_seeds,
    parse_sigmas,
    parse_size,
    read_prompt,
)
from edgedit.errors import InputError

__all__ = ["generate"]


def generate(
    prompt: flag.Prompt = None,
    prompt_option: flag.PromptOption = None,
    prompt_file: flag.PromptFile = None,
    negative_prompt: flag.NegativePrompt = None,
    model: flag.Model = None,
    steps: flag.Steps = None,
    seed: flag.Seeds = None,
    batch_count: flag.BatchCount = 1,
    width: flag.Width = None,
    height: flag.Height = None,
    size: flag.Size = None,
    aspect: flag.Aspect = None,
    force_size: flag.ForceSize = False,
    denoise_tile: flag.DenoiseTile = None,
    denoise_overlap: flag.DenoiseOverlap = None,
    attention_scale: flag.AttentionScale = None,
    guidance: flag.GuidanceScale = None,
    guidance_interval: flag.GuidanceInterval = None,
    sampler: flag.Sampler = None,
    sigmas: flag.Sigmas = None,
    rng: flag.Rng = None,
    step_cache: flag.StepCache = None,
    allow_empty: flag.AllowEmpty = False,
    image: flag.ImagePath = None,
    strength: flag.Strength = None,
    latents_in: flag.LatentsIn = None,
    config_from_metadata: flag.Replayed = None,
    output: flag.Output = None,
    preview: flag.Preview = None,
    latents_out: flag.LatentsOut = None,
    no_metadata: flag.NoMetadata = False,
    as_json: flag.AsJson = False,
    quiet: flag.Quiet = False,
    verbose: flag.Verbose = False,
    backend: flag.Backend = "auto",
    engine: flag.Engine = "auto",
    provider: flag.Providers = None,
    threads: flag.Threads = None,
    low_ram: flag.LowRam = False,
    decoder: flag.Decoder = None,
    vae_tiling: flag.VaeTiling = "auto",
    vae_tile_size: flag.VaeTileSize = None,
    vae_tile_overlap: flag.VaeTileOverlap = None,
    max_memory: flag.MaxMemory = None,
    graph_cache: flag.GraphCache = False,
    interpreter: flag.Interpreter = False,
    emulate_fp16: flag.EmulateFp16 = False,
    compute_units: flag.ComputeUnits = None,
    no_cache: flag.NoCache = False,
    offline: flag.Offline = False,
) -> None:
    """Draw pictures from a prompt.

    edgedit generate "a red circle above a blue square on a white background" -s 7
    """
    if quiet and verbose:
        raise InputError("give either --quiet or --verbose, not both")
    replay = None if config_from_metadata is None else load_replay(config_from_metadata)
    columns, rows = parse_size(size, width, height)
    request = Request(
        prompt=read_prompt(prompt, prompt_option, prompt_file),
        allow_empty=allow_empty,
        negative_prompt=negative_prompt,
        negative_is_explicit=bool(negative_prompt),
        model=model,
        steps=steps,
        seeds=parse_seeds(seed or (replay.seeds if replay else []), batch_count),
        width=columns,
        height=rows,
        aspect=parse_aspect(aspect),
        force_size=force_size,
        denoise_tile=denoise_tile,
        denoise_overlap=denoise_overlap,
        attention_scale=attention_scale,
        guidance_scale=guidance,
        guidance_interval=parse_interval(guidance_interval),
        sampler=sampler,
        sigmas=parse_sigmas(sigmas),
        rng=rng,
        step_cache=step_cache,
        image=image,
        strength=strength,
        latents_in=latents_in,
        latents_out=latents_out,
        output=output,
        preview=preview,
        metadata=not no_metadata,
        backend=backend,
        engine=engine,
        providers=tuple(provider or ()),
        threads=threads,
        low_ram=low_ram,
        decoder=decoder,
        vae_tiling=vae_tiling,
        vae_tile_size=vae_tile_size,
        vae_tile_overlap=vae_tile_overlap,
        max_memory=max_memory,
        graph_cache=graph_cache,
        interpreter=interpreter,
        emulate_fp16=emulate_fp16,
        compute_units=compute_units,
        use_cache=not no_cache,
        offline=offline,
    )
    if replay is not None:
        request = replay.complete(request)
    request.check()
    from edgedit.apps.cli.drawing import draw

    draw(request, make_progress(quiet=quiet, events=as_json), verbose=verbose)
