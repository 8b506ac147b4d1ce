"""`edgedit batch` from the job file to the last picture."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedit.apps.batch.coordinator import Coordinator, RunOptions
from edgedit.apps.batch.growth import grow
from edgedit.apps.batch.index import index_is_whole, rebuild_index
from edgedit.apps.batch.job_files import kind_of
from edgedit.apps.batch.jobs import MISTAKE_LIMIT, Mistake
from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.ledger_file import create
from edgedit.apps.batch.naming import NameTemplate
from edgedit.apps.batch.owners import LEASE, Owner
from edgedit.apps.batch.places import Places
from edgedit.apps.batch.planning import PlannedJob, Shard, plan
from edgedit.apps.batch.pool import LocalPool, Pool
from edgedit.apps.batch.recipe_book import RecipeBook
from edgedit.apps.batch.reporter import Reporter
from edgedit.apps.batch.resources import share_machine
from edgedit.apps.batch.store import Store
from edgedit.apps.batch.worker import WorkerSettings
from edgedit.autoencoder import check_decoder
from edgedit.bundle import Bundle, open_bundle
from edgedit.errors import InputError
from edgedit.files import sha256_file

__all__ = ["BatchRequest", "Summary", "run_batch"]

#: Mistakes that the error message lists.
LISTED = 20
#: Text encoders above this size are freed when the prompts at hand are encoded, and encode more of them at a time.
LARGE_ENCODER, LARGE_WINDOW = 100 << 20, 512
#: Latent tokens up to which pictures are denoised two at a time unless something else is asked for.
SMALL_PICTURE = 256


@dataclass(frozen=True)
class BatchRequest:
    """What `edgedit batch` was asked for. None leaves the choice to the ledger, or to the machine.

    Attributes:
        jobs: path of the job file; "-" is standard input; None goes on with what the ledger has.
        name: template of the pictures' names.
        memory: bytes that all workers may take together.
        make_pool: makes the workers; processes of this machine by default.
    """

    root: Path
    jobs: Path | None = None
    bundle: Path | None = None
    jobs_format: str | None = None
    name: str | None = None
    skip_invalid: bool = False
    force_size: bool = False
    shard: Shard | None = None
    join: bool = False
    workers: int | None = None
    threads: int | None = None
    memory: int | None = None
    low_ram: bool | None = None
    batch: int | None = None
    backend: str = "auto"
    providers: tuple[str, ...] = ()
    decoder: str | None = None
    retries: int = 1
    fail_fast: bool = False
    timeout: float | None = None
    dry_run: bool = False
    lease: float = LEASE
    make_pool: Callable[[WorkerSettings], Pool] = LocalPool


@dataclass(frozen=True)
class Summary:
    """How a run ended. Pictures; `drawn` in this run, the others in all."""

    total: int
    done: int
    failed: int
    drawn: int
    seconds: float
    stopped: bool
    skipped_lines: int

    @property
    def left(self) -> int:
        """Pictures that are neither finished nor failed."""
        return self.total - self.done - self.failed


def run_batch(request: BatchRequest, reporter: Reporter, *, stop: Callable[[], bool] = lambda: False) -> Summary:
    """Draw everything that the jobs ask for and the ledger does not have yet.

    Raises:
        InputError: mistakes in the job file (listed in `details`), a ledger of another model or job file, another
            process at work, a disk that is full or a folder that cannot be written.
        BundleError: the bundle is missing or damaged.
        KeyboardInterrupt: stopped at once; everything recorded is kept.
    """
    started = time.monotonic()
    places = Places(request.root)
    ledger = _open(request, places, reporter)
    with ledger:
        if request.dry_run or (not ledger.has_work() and not ledger.anything_running()):
            ledger.check_place()
            return _summary(ledger, 0, started, stopped=False)
        bundle = _bundle_of(ledger, request)
        bundle.verify()
        drawn, stopped = _draw(request, ledger, bundle, reporter, stop)
        return _summary(ledger, drawn, started, stopped=stopped)


def _summary(ledger: Ledger, drawn: int, started: float, *, stopped: bool) -> Summary:
    counts = ledger.counts()
    seconds = round(time.monotonic() - started, 3)
    return Summary(counts.total, counts.done, counts.failed, drawn, seconds, stopped, ledger.meta["mistakes"])


def _open(request: BatchRequest, places: Places, reporter: Reporter) -> Ledger:
    exists = places.ledger.exists()
    if request.jobs is None:
        if not exists:
            raise InputError(f"{request.root}: holds no batch; begin one with: edgedit batch JOBS -o {request.root}")
        ledger = Ledger(places)
        _same_settings(ledger, request)
        return ledger
    if not exists:
        _make_folders(places)
    jobs, folder = _take_in(request, places)
    digest = sha256_file(jobs)
    if exists:
        ledger = Ledger(places)
        try:
            _same_settings(ledger, request)
            if ledger.meta["jobs_sha256"] != digest:
                _grow(request, ledger, jobs, folder, digest, reporter)
        except BaseException:
            ledger.close()
            raise
        return ledger
    return _begin(request, places, jobs, folder, digest, reporter)


def _make_folders(places: Places) -> None:
    try:
        for path in (places.inside, places.partial, places.latents, places.embeddings):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{places.root}: the output folder cannot be made ({error.strerror}); choose one that can be written"
        ) from None


def _take_in(request: BatchRequest, places: Places) -> tuple[Path, Path]:
    """(the job file, the folder that paths in it are relative to); standard input is written to a file first."""
    assert request.jobs is not None
    if str(request.jobs) != "-":
        if not request.jobs.is_file():
            raise InputError(f"{request.jobs}: there is no such job file; check the path")
        return request.jobs, request.jobs.resolve().parent
    partial = places.partial / f"stdin-{os.getpid()}"
    try:
        try:
            with partial.open("wb") as file:
                while block := sys.stdin.buffer.read(1 << 20):
                    file.write(block)
            partial.replace(places.spool)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{places.spool}: the jobs cannot be kept ({error.strerror}); check the folder") from None
    return places.spool, Path.cwd()


def _kind(request: BatchRequest, jobs: Path) -> str:
    if str(request.jobs) == "-" and request.jobs_format is None:
        return "jsonl"
    return kind_of(jobs, request.jobs_format)


def _begin(request: BatchRequest, places: Places, jobs: Path, folder: Path, digest: str, reporter: Reporter) -> Ledger:
    from edgedit.api import BUILTIN
    from edgedit.apps.batch.naming import DEFAULT_NAME

    bundle = open_bundle(request.bundle or BUILTIN)
    check_decoder(bundle, request.decoder or "full")
    template = NameTemplate(request.name or DEFAULT_NAME)
    kind = _kind(request, jobs)
    recommended = bundle.manifest.recommended
    pixels = recommended.width * recommended.height if recommended is not None else 0
    share = share_machine(
        bundle,
        pixels,
        workers=request.workers,
        threads=request.threads,
        memory=request.memory,
        low_ram=request.low_ram,
        batch=request.batch or 1,
    )
    meta: dict[str, Any] = {
        "bundle": str(bundle.path.resolve()),
        "model": bundle.manifest.name,
        "model_hash": bundle.model_hash,
        "jobs_file": str(request.jobs),
        "jobs_sha256": digest,
        "name": template.text,
        "shard": None if request.shard is None else str(request.shard),
        "threads": share.threads,
        "low_ram": share.low_ram,
        "backend": request.backend,
        "providers": list(request.providers),
        "decoder": request.decoder or "full",
        "force_size": request.force_size,
        "index_bytes": 0,
        "created": time.time(),
    }
    planned = plan(jobs, kind, bundle, template, folder=folder, shard=request.shard, force_size=request.force_size)
    mistakes = create(places.ledger, meta, planned, skip_invalid=request.skip_invalid, on_line=reporter.reading)
    if mistakes and not request.skip_invalid:
        raise _refusal(request, mistakes)
    ledger = Ledger(places)
    if not ledger.meta["pictures"] and request.shard is None:
        # A ledger of nothing would only stand in the way of the right job file.
        ledger.close()
        for path in places.inside.glob("ledger.sqlite*"):
            path.unlink()
        raise InputError(f'{request.jobs}: holds no valid job; write one a line, like {{"prompt": "a red circle"}}')
    _tell_skipped(ledger, reporter)
    return ledger


def _refusal(request: BatchRequest, mistakes: list[Mistake]) -> InputError:
    more = "at least " if len(mistakes) >= MISTAKE_LIMIT else ""
    lines = [str(mistake) for mistake in mistakes[:LISTED]]
    if len(mistakes) > LISTED:
        lines.append(f"and {more}{len(mistakes) - LISTED} more")
    first = "" if len(mistakes) > 1 else f" ({mistakes[0]})"
    return InputError(
        f"{request.jobs}: {more}{len(mistakes)} lines cannot be used{first}, so nothing was drawn; "
        "mend them, or leave them out with --skip-invalid",
        details="\n".join(lines),
    )


def _tell_skipped(ledger: Ledger, reporter: Reporter) -> None:
    count = ledger.meta["mistakes"]
    if count:
        reporter.warn(f"{count} lines of the job file were left out; see: edgedit batch status {ledger.places.root}")


def _same_settings(ledger: Ledger, request: BatchRequest) -> None:
    """Refuse what would make the rest of the batch unlike its beginning."""
    meta, root = ledger.meta, ledger.places.root
    asked = {
        "name": request.name,
        "shard": None if request.shard is None else str(request.shard),
        "threads": request.threads,
        "low_ram": request.low_ram,
        "providers": list(request.providers) or None,
        "backend": None if request.backend == "auto" else request.backend,
        "decoder": request.decoder,
    }
    for key, value in asked.items():
        if value is not None and value != meta[key]:
            raise InputError(
                f"{root}: was begun with --{key.replace('_', '-')} {meta[key]}, and pictures of one batch are drawn "
                "alike; leave the flag out, or choose another output folder"
            )
    if request.bundle is not None:
        _check_model(ledger, open_bundle(request.bundle))


def _check_model(ledger: Ledger, bundle: Bundle) -> None:
    if bundle.model_hash != ledger.meta["model_hash"]:
        raise InputError(
            f"{bundle.path}: is not the model that this batch was begun with ({ledger.meta['model']}, hash "
            f"{ledger.meta['model_hash'][:10]}, not {bundle.model_hash[:10]}); put that back, "
            "or choose another output folder"
        )


def _bundle_of(ledger: Ledger, request: BatchRequest) -> Bundle:
    bundle = open_bundle(request.bundle or Path(ledger.meta["bundle"]))
    _check_model(ledger, bundle)
    return bundle


def _grow(request: BatchRequest, ledger: Ledger, jobs: Path, folder: Path, digest: str, reporter: Reporter) -> None:
    """The job file has changed since: accept what was added, refuse everything else."""
    if request.join:
        raise InputError(f"{request.jobs}: is not the job file of the batch to join; leave it as it was")
    owner = Owner(ledger, join=False, on_wait=reporter.say, lease=request.lease)
    try:
        bundle = _bundle_of(ledger, request)
        shard = None if ledger.meta["shard"] is None else Shard.parse(ledger.meta["shard"])
        planned: Iterable[PlannedJob | Mistake] = plan(
            jobs,
            _kind(request, jobs),
            bundle,
            NameTemplate(ledger.meta["name"]),
            folder=folder,
            shard=shard,
            # What was let in once stays in; ledgers of earlier versions let every size in.
            force_size=request.force_size or ledger.meta.get("force_size", True),
        )
        mistakes = grow(ledger, planned, digest, skip_invalid=request.skip_invalid, on_line=reporter.reading)
        if mistakes and not request.skip_invalid:
            raise _refusal(request, mistakes)
        _tell_skipped(ledger, reporter)
    finally:
        owner.leave()


def _draw(
    request: BatchRequest, ledger: Ledger, bundle: Bundle, reporter: Reporter, stop: Callable[[], bool]
) -> tuple[int, bool]:
    _make_folders(ledger.places)
    owner = Owner(ledger, join=request.join, on_wait=reporter.say, lease=request.lease)
    try:
        alone = next(ledger.rows("SELECT count(*) FROM owners"))[0] == 1
        if alone:
            Store(ledger.places).sweep(ledger.is_finished)
            if index_is_whole(ledger):
                ledger.trim_index()
            else:
                rebuild_index(ledger, bundle)
        pixels, tokens = _largest(ledger, bundle)
        batch = request.batch or (2 if tokens <= SMALL_PICTURE and request.timeout is None else 1)
        share = share_machine(
            bundle,
            pixels,
            workers=request.workers,
            threads=ledger.meta["threads"],
            memory=request.memory,
            low_ram=ledger.meta["low_ram"],
            batch=batch,
        )
        large = _encoder_size(bundle) > LARGE_ENCODER
        settings = WorkerSettings(
            root=request.root.resolve(),
            bundle=bundle.path.resolve(),
            model_hash=bundle.model_hash,
            backend=ledger.meta["backend"],
            providers=tuple(ledger.meta["providers"]),
            threads=share.threads,
            low_ram=share.low_ram,
            decoder=ledger.meta["decoder"],
            free_encoder=large,
            memory=None if request.memory is None else request.memory // share.workers,
        )
        options = RunOptions(
            workers=share.workers,
            batch=batch,
            retries=request.retries,
            fail_fast=request.fail_fast,
            timeout=request.timeout,
            low_ram=share.low_ram,
            window=LARGE_WINDOW if large else 32,
        )
        counts = ledger.counts()
        reporter.begin(total=counts.total, done=counts.done, failed=counts.failed, workers=share.workers)
        pool = request.make_pool(settings)
        coordinator = Coordinator(ledger, owner, pool, RecipeBook(bundle), options, reporter, stop=stop)
        try:
            coordinator.run()
        finally:
            pool.kill_all()
            if alone:
                # What stopped the run is what has to be said; the next run sweeps first, and says what it cannot.
                with contextlib.suppress(InputError):
                    Store(ledger.places).sweep(ledger.is_finished)
        if coordinator.cut:
            reporter.warn(f"{len(coordinator.cut)} prompts were too long for the model and cut; index.jsonl says where")
        return reporter.drawn, coordinator.stopped
    finally:
        owner.leave()


def _encoder_size(bundle: Bundle) -> int:
    component = bundle.manifest.components.get("text_encoder")
    if component is None:
        return 0
    return max(sum(bundle.manifest.files[f].size for f in a.files) for a in component.artefacts.values())


def _largest(ledger: Ledger, bundle: Bundle) -> tuple[int, int]:
    """(pixels, latent tokens) of the largest picture that is still to be drawn."""
    book = RecipeBook(bundle)
    largest = (0, 0)
    query = (
        "SELECT j.spec FROM jobs j WHERE j.job IN (SELECT min(job) FROM pictures WHERE state IN (0, 1) GROUP BY grp)"
    )
    space = bundle.need(bundle.manifest.latents, "autoencoder")
    for (spec,) in ledger.rows(query):
        recipe = book.recipe(json.loads(spec))
        tokens = recipe.latents_shape[2] * recipe.latents_shape[3] // space.patch_size**2
        largest = max(largest, (recipe.width * recipe.height, tokens))
    return largest
