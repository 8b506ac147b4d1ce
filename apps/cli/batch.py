"""`edgedit batch`: job file → pictures, and what can be asked of a batch."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from edgedit.errors import InputError

__all__ = ["app"]

WORK, MACHINE, REPORT = "Work", "Machine", "Report"


class _RunByDefault(TyperGroup):
    """`edgedit batch JOBS …` is `edgedit batch run JOBS …`; the name of the command may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


app = typer.Typer(
    cls=_RunByDefault,
    help="Draw the pictures of a job file, any number of them, and never lose a finished one.",
    epilog="To draw: edgedit batch jobs.jsonl -o pictures. Its options: edgedit batch run --help.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The output folder of a batch.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", "-w", metavar="N", min=1, help="Processes.", show_default="what fits", rich_help_panel=MACHINE
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What all workers may take, as 8G.",
        show_default="80 % of what is free",
        rich_help_panel=MACHINE,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", min=1, help="Pictures denoised together.", rich_help_panel=MACHINE),
]
Retries = Annotated[
    int,
    typer.Option("--retry", metavar="N", min=0, help="Further attempts at a picture that fails.", rich_help_panel=WORK),
]
FailFast = Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.", rich_help_panel=WORK)]
Timeout = Annotated[
    float | None, typer.Option(metavar="S", min=0.001, help="Seconds that a picture may take.", rich_help_panel=WORK)
]
Join = Annotated[
    bool, typer.Option("--join", help="Work beside another process on the same folder.", rich_help_panel=WORK)
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.", rich_help_panel=REPORT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings only.", rich_help_panel=REPORT)]


@app.command(hidden=True)
def run(
    jobs: Annotated[
        Path,
        typer.Argument(metavar="JOBS", help="JSONL, CSV, Parquet or text with one job a line; - for standard input."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for pictures and ledger.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="BUNDLE", help="As for generate.", show_default="builtin"),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="TEMPLATE",
            help="Names, with {id} {index:06d} {seed} {prompt_hash} {folder}.",
            show_default="{folder}/{id}.png",
            rich_help_panel=WORK,
        ),
    ] = None,
    jobs_format: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="jsonl, csv, parquet or text.", show_default="by suffix", rich_help_panel=WORK
        ),
    ] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Leave out lines with mistakes.", rich_help_panel=WORK)
    ] = False,
    force_size: Annotated[
        bool, typer.Option("--force-size", help="Draw sizes that the model was not made for.", rich_help_panel=WORK)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the jobs and make the ledger; draw nothing.", rich_help_panel=WORK)
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only part I of N of the jobs, from 1/N.", rich_help_panel=WORK)
    ] = None,
    retries: Retries = 1,
    fail_fast: FailFast = False,
    timeout: Timeout = None,
    join: Join = False,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="local, or ray for a Ray cluster.", rich_help_panel=MACHINE)
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="The Ray cluster.",
            show_default="RAY_ADDRESS, or a new one here",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    workers: Workers = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            "-t",
            metavar="N",
            min=1,
            help="Threads of each worker.",
            rich_help_panel=MACHINE,
            show_default="cores / workers",
        ),
    ] = None,
    batch_size: BatchSize = None,
    memory: Memory = None,
    low_ram: Annotated[
        bool | None,
        typer.Option(
            "--low-ram/--no-low-ram",
            help="One component in memory at a time.",
            show_default="when memory is short",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="NAME", help="auto or onnx.", rich_help_panel=MACHINE)] = "auto",
    provider: Annotated[
        list[str] | None,
        typer.Option(
            "--provider", metavar="NAME", help="As for generate.", show_default="cpu", rich_help_panel=MACHINE
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As for generate.", show_default="full", rich_help_panel=MACHINE),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never use the network, for a Hub id neither.", rich_help_panel=MACHINE)
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw the pictures of a job file.

    A job is a JSON object a line with any field of `generate`: prompt, negative_prompt, seed or seeds, width, height
    or size, steps, guidance_scale, sampler, image, strength …, and id and metadata. All of it is checked before the
    first picture is drawn.
    """
    from edgedit.apps.batch.planning import Shard
    from edgedit.apps.batch.resources import parse_memory
    from edgedit.apps.batch.run import BatchRequest
    from edgedit.apps.cli.bundles import find_bundle

    request = BatchRequest(
        root=output,
        jobs=jobs,
        bundle=None if model is None else find_bundle(model, offline=offline),
        jobs_format=jobs_format,
        name=name,
        skip_invalid=skip_invalid,
        force_size=force_size,
        shard=None if shard is None else Shard.parse(shard),
        join=join,
        workers=workers,
        threads=threads,
        memory=parse_memory(memory),
        low_ram=low_ram,
        batch=batch_size,
        backend=backend,
        providers=tuple(provider or ()),
        decoder=decoder,
        retries=retries,
        fail_fast=fail_fast,
        timeout=timeout,
        dry_run=dry_run,
    )
    if engine == "ray":
        request = _on_ray(request, address)
    elif engine != "local":
        raise InputError(f"--engine {engine!r} is unknown; choose local or ray")
    elif address is not None:
        raise InputError("--address is that of a Ray cluster; add --engine ray, or leave it out")
    _run(request, as_json=as_json, quiet=quiet)


def _on_ray(request: Any, address: str | None) -> Any:
    """The request with its workers on a cluster: one a processor, unless it says otherwise."""
    from dataclasses import replace

    from edgedit.apps.batch.ray_pool import RayPool, cluster_cores, connect

    if request.memory is not None:
        raise InputError("--memory is for workers on this machine; leave it out with --engine ray")
    connect(address)
    threads = request.threads or 1
    workers = request.workers or max(1, cluster_cores() // threads)
    low_ram = bool(request.low_ram)
    return replace(request, workers=workers, threads=threads, low_ram=low_ram, make_pool=RayPool)


def _run(request: Any, *, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    from edgedit.apps.batch.reporter import make_reporter
    from edgedit.apps.batch.run import run_batch
    from edgedit.apps.cli.interrupt import Interrupt

    reporter = make_reporter(quiet=quiet, events=as_json)
    with Interrupt("the pictures under way", signals=(signal.SIGINT, signal.SIGTERM)) as interrupt:
        summary = run_batch(request, reporter, stop=lambda: interrupt.requested)
        if not reporter.total:
            reporter.total, reporter.done, reporter.failed = summary.total, summary.done, summary.failed
        reporter.end({**asdict(summary), "left": summary.left})
        if interrupt.requested:
            raise KeyboardInterrupt
    if summary.failed:
        raise typer.Exit(1)


@app.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Say how far a batch is, what failed and why."""
    from edgedit.apps.batch.status import describe_batch
    from edgedit.apps.cli.tables import megabytes, print_facts, print_json, print_line

    with _ledger(folder) as ledger:
        facts = describe_batch(ledger)
    if as_json:
        print_json(facts)
        return
    states = ("done", "failed", "running", "pending")
    print_facts(
        {
            "batch": facts["folder"],
            "shard": facts["shard"],
            "model": f"{facts['model']} ({facts['model_hash'][:10]})",
            "jobs": f"{facts['jobs']:,} from {facts['jobs_file']}",
            "pictures": f"{facts['pictures']:,}: " + ", ".join(f"{facts[name]:,} {name}" for name in states),
            "size": megabytes(facts["bytes"]),
            "at work": ", ".join(f"process {o['process']} on {o['host']}" for o in facts["at_work"]) or None,
        }
    )
    for error in facts["errors"]:
        print_line(f"failed {error['pictures']:,} times: {error['error']}")
    if facts["lines_left_out"]:
        print_line(f"{facts['lines_left_out']:,} lines of the job file were left out:")
    for mistake in facts["mistakes"]:
        print_line(
            f"  line {mistake['line']}: {mistake['field'] + ': ' if mistake['field'] else ''}{mistake['reason']}"
        )


@app.command()
def retry(
    folder: Folder,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="BUNDLE", help="Where the model is now.", show_default="where it was"),
    ] = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Draw finished pictures again that are missing or have changed.")
    ] = False,
    retries: Retries = 1,
    fail_fast: FailFast = False,
    timeout: Timeout = None,
    workers: Workers = None,
    batch_size: BatchSize = None,
    memory: Memory = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw what failed again, and whatever is left to draw."""
    from edgedit.apps.batch.checking import check_batch
    from edgedit.apps.batch.owners import Owner
    from edgedit.apps.batch.resources import parse_memory
    from edgedit.apps.batch.run import BatchRequest
    from edgedit.apps.cli.bundles import find_bundle

    bundle = None if model is None else find_bundle(model)
    with _ledger(folder) as ledger:
        owner = Owner(ledger, join=False)
        try:
            ledger.retry()
            if damaged:
                ledger.retry(list(check_batch(ledger).damaged))
        finally:
            owner.leave()
    request = BatchRequest(
        root=folder,
        bundle=bundle,
        retries=retries,
        fail_fast=fail_fast,
        timeout=timeout,
        workers=workers,
        batch=batch_size,
        memory=parse_memory(memory),
    )
    _run(request, as_json=as_json, quiet=quiet)


@app.command()
def report(
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="The sheet.", show_default="DIR/report.html")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Pictures shown.", show_default="2000")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every picture with the ledger instead; status 1 if any differs.")
    ] = False,
    parquet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the index as Parquet instead.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a contact sheet (HTML) of a batch, or check it."""
    from edgedit.apps.cli.tables import print_json, print_line

    if verify + (parquet is not None) + (output is not None) > 1:
        raise InputError("give one of --output, --verify and --parquet")
    with _ledger(folder) as ledger:
        if verify:
            from edgedit.apps.batch.checking import check_batch

            found = check_batch(ledger)
            if as_json:
                print_json({"checked": found.checked, "problems": found.problems})
            else:
                for problem in found.problems:
                    print_line(problem)
                print_line(f"{found.checked:,} pictures checked, {len(found.problems):,} problems")
            if found.problems:
                raise typer.Exit(1)
        elif parquet is not None:
            from edgedit.apps.batch.index import write_parquet

            rows = write_parquet(ledger.places.index, parquet)
            print_json({"path": str(parquet), "rows": rows}) if as_json else print_line(f"{parquet}: {rows:,} rows")
        else:
            from edgedit.apps.batch.report import LARGEST_SHEET, write_report

            target = output or folder / "report.html"
            shown = write_report(ledger, target, limit=limit or LARGEST_SHEET)
            print_json({"path": str(target), "shown": shown}) if as_json else print_line(str(target))


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The merged batch, a new folder.")],
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Output folders of all shards.")],
    as_json: AsJson = False,
) -> None:
    """Make one batch of the shards that several machines drew."""
    from edgedit.apps.batch.merging import merge_shards
    from edgedit.apps.cli.tables import print_json, print_line

    finished, lost = merge_shards(folder, shards)
    if as_json:
        print_json({"path": str(folder), "finished": finished, "lost": lost})
        return
    for line in lost:
        print_line(f"{line}; it is pending in {folder}")
    print_line(f"{folder}: {finished:,} pictures")


def _ledger(folder: Path) -> Any:
    from edgedit.apps.batch.ledger import Ledger
    from edgedit.apps.batch.places import Places

    places = Places(folder)
    if not places.ledger.exists():
        raise InputError(f"{folder}: holds no batch; begin one with: edgedit batch JOBS -o {folder}")
    return Ledger(places)
