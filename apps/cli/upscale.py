"""`edgedit upscale`: a picture drawn again, larger, with the detail that the model puts into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedit.apps.cli import generate_options as flag
from edgedit.apps.cli.progress import make_progress
from edgedit.apps.cli.request import Request, parse_seeds
from edgedit.errors import InputError

if TYPE_CHECKING:
    from edgedit.manifest import Latents, Manifest

__all__ = ["upscale"]

LARGEST_SCALE = 16.0
MULTIPLE_OF = "its sides must be multiples of"

Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to draw larger.")]
Scale = Annotated[
    float, typer.Option("--scale", "-x", metavar="F", help="How many times as wide and high, above 0 to 16.")
]
Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="What the picture shows.",
        show_default="the prompt that it was drawn with, if it says",
    ),
]
Strength = Annotated[
    float, typer.Option(metavar="F", help="How far to go back to noise, above 0 to 1: more is more new detail.")
]
DenoiseTile = Annotated[
    int | None,
    typer.Option(
        metavar="PX",
        help="Side of the overlapping windows.",
        show_default="the model's own size, where the picture becomes larger",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", "-s", metavar="N", help="Seed.", show_default="random, printed")]


def upscale(
    image: Picture,
    scale: Scale = 2.0,
    strength: Strength = 0.3,
    prompt: Prompt = None,
    negative_prompt: flag.NegativePrompt = None,
    model: flag.Model = None,
    steps: flag.Steps = None,
    seed: Seed = None,
    guidance: flag.GuidanceScale = None,
    sampler: flag.Sampler = None,
    denoise_tile: DenoiseTile = None,
    denoise_overlap: flag.DenoiseOverlap = None,
    force_size: flag.ForceSize = False,
    output: flag.Output = None,
    no_metadata: flag.NoMetadata = False,
    as_json: flag.AsJson = False,
    quiet: flag.Quiet = False,
    verbose: flag.Verbose = False,
    backend: flag.Backend = "auto",
    provider: flag.Providers = None,
    threads: flag.Threads = None,
    low_ram: flag.LowRam = False,
    vae_tiling: flag.VaeTiling = "auto",
    vae_tile_size: flag.VaeTileSize = None,
    vae_tile_overlap: flag.VaeTileOverlap = None,
    max_memory: flag.MaxMemory = None,
    offline: flag.Offline = False,
) -> None:
    """Draw a picture again, larger.

    It is enlarged, noised by --strength and denoised in windows of the model's own size.

    edgedit upscale cat.png --scale 2 --strength 0.3
    """
    from edgedit.apps.cli.bundles import find_bundle
    from edgedit.bundle import open_bundle
    from edgedit.image import open_image

    if quiet and verbose:
        raise InputError("give either --quiet or --verbose, not both")
    if not 0 < scale <= LARGEST_SCALE:
        raise InputError(f"--scale must be above 0 and at most {LARGEST_SCALE:g}, not {scale:g}")
    columns, rows = open_image(image).size
    told_prompt, told_model = _told(image, want_model=model is None)
    place = find_bundle(model or told_model, offline=offline)
    bundle = open_bundle(place)
    if bundle.manifest.latents is None:
        raise InputError(f"{bundle.path.name} has no autoencoder and draws no pictures; choose another with -m")
    progress = make_progress(quiet=quiet, events=as_json)
    wanted = round(columns * scale), round(rows * scale)
    width, height = (_fitting(side, bundle.manifest.latents) for side in wanted)
    if (width, height) != wanted:
        progress.warn(
            f"{wanted[0]}x{wanted[1]} is drawn as {width}x{height}: "
            f"{MULTIPLE_OF} {bundle.manifest.latents.size_multiple} for this model"
        )
    if denoise_tile is None and not force_size:
        denoise_tile = _own_side(bundle.manifest, width, height)
    request = Request(
        prompt=told_prompt if prompt is None else prompt,
        allow_empty=True,
        seeds=parse_seeds([] if seed is None else [seed], 1),
        negative_prompt=negative_prompt,
        negative_is_explicit=bool(negative_prompt),
        model=str(place),
        steps=steps,
        width=width,
        height=height,
        force_size=force_size,
        denoise_tile=denoise_tile,
        denoise_overlap=denoise_overlap,
        guidance_scale=guidance,
        sampler=sampler,
        image=image,
        strength=strength,
        output=output,
        metadata=not no_metadata,
        backend=backend,
        providers=tuple(provider or ()),
        threads=threads,
        low_ram=low_ram,
        vae_tiling=vae_tiling,
        vae_tile_size=vae_tile_size,
        vae_tile_overlap=vae_tile_overlap,
        max_memory=max_memory,
        offline=offline,
    )
    request.check()
    from edgedit.apps.cli.drawing import draw

    draw(request, progress, verbose=verbose)


def _told(image: Path, *, want_model: bool) -> tuple[str, str]:
    """The prompt and the model that the picture says it was drawn with; nothing and builtin where it says nothing."""
    from edgedit.apps.cli.replay import load_replay

    try:
        replay = load_replay(image)
    except InputError:
        return "", "builtin"
    return str(replay.recipe.get("prompt", "")), replay.find_model() if want_model else "builtin"


def _fitting(side: int, space: Latents) -> int:
    """The least multiple that the model can draw and that is not below `side`."""
    return max(1, -(-side // space.size_multiple)) * space.size_multiple


def _own_side(manifest: Manifest, width: int, height: int) -> int | None:
    """Side of the model's own square picture, None where it draws the whole at once."""
    best = manifest.recommended
    if best is None or not best.sizes or (width, height) in best.sizes:
        return None
    return min(best.width, best.height)
