"""`edgedit decode`: latents → picture, to finish a run that died or to decode with other tiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedit.apps.cli import generate_options as flag
from edgedit.apps.cli.progress import make_progress
from edgedit.errors import InputError

__all__ = ["decode"]

Latents = Annotated[Path, typer.Argument(metavar="LATENTS", help="A .latents.npz that a run left, or a .npy file.")]
Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="NAME",
        help="File (.png, .jpg, .webp).",
        show_default="the name that the run would have given it",
    ),
]


def decode(
    latents: Latents,
    output: Output = None,
    model: flag.Model = None,
    no_metadata: flag.NoMetadata = False,
    decoder: flag.Decoder = None,
    vae_tiling: flag.VaeTiling = "auto",
    vae_tile_size: flag.VaeTileSize = None,
    vae_tile_overlap: flag.VaeTileOverlap = None,
    max_memory: flag.MaxMemory = None,
    as_json: flag.AsJson = False,
    quiet: flag.Quiet = False,
    backend: flag.Backend = "auto",
    provider: flag.Providers = None,
    threads: flag.Threads = None,
    offline: flag.Offline = False,
) -> None:
    """Decode latents to a picture. A run that was stopped while decoding is finished so, byte for byte.

    edgedit decode cat.latents.npz
    """
    from edgedit.apps.cli.finish import SUFFIX, Undecoded, decode_to_file, make_tiling
    from edgedit.apps.cli.interrupt import Interrupt
    from edgedit.outputs import plan_outputs
    from edgedit.tiling.run import TilesStoppedError

    found = Undecoded.read(latents)
    target = plan_outputs(output or found.output, [0])[0]
    progress = make_progress(quiet=quiet, events=as_json)
    with progress, Interrupt() as interrupt:

        def on_tile(done: int, total: int) -> bool:
            progress.step(done, total)
            return not interrupt.requested

        tiling = make_tiling(vae_tiling, vae_tile_size, vae_tile_overlap, max_memory, on_tile)
        import edgedit
        from edgedit.apps.cli.bundles import find_bundle

        place = find_bundle(model or _model_of(found, latents), offline=offline)
        which = decoder or str((found.recipe or {}).get("decoder") or "full")
        with edgedit.load(place, backend, threads=threads, providers=provider or None, decoder=which) as pipe:
            if found.model_hash not in (None, pipe.bundle.model_hash):
                raise InputError(
                    f"{latents}: latents of another model than {pipe.bundle.manifest.name}; name theirs with -m"
                )
            pipe.on_stage = progress.stage
            recipe = None if no_metadata else _with_decoder(found.recipe, which)
            try:
                decode_to_file(pipe, found.latents, target, recipe, tiling, stage="decode")
            except TilesStoppedError:
                raise KeyboardInterrupt from None
        progress.finish()
        if latents.name.endswith(SUFFIX):
            latents.unlink(missing_ok=True)
        progress.result({"event": "picture", "path": str(target), "recipe": recipe}, str(target))
        progress.done({"pictures": 1, "seconds": progress.seconds})


def _with_decoder(recipe: Mapping[str, Any] | None, decoder: str) -> dict[str, Any] | None:
    if recipe is None:
        return None
    told = {key: value for key, value in recipe.items() if key != "decoder"}
    return {**told, "decoder": decoder} if decoder != "full" else told


def _model_of(found: object, path: Path) -> str:
    """The model that made the latents, builtin where they do not say."""
    from edgedit.apps.cli.replay import Replay

    recipe = getattr(found, "recipe", None) or {}
    known = {**recipe, "model_hash": getattr(found, "model_hash", None)}
    return Replay(path, known).find_model()
