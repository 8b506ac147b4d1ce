"""The `edgedit` command: parsing, and errors as one line with an exit status.

Exit status: 0 done, 1 a check of `verify` failed, 2 something the user can mend, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from edgedit import __version__
from edgedit.apps.cli.batch import app as batch
from edgedit.apps.cli.bench import bench
from edgedit.apps.cli.convert import convert
from edgedit.apps.cli.decode import decode
from edgedit.apps.cli.distill import distill
from edgedit.apps.cli.eval import eval_model
from edgedit.apps.cli.export_app import export_app
from edgedit.apps.cli.generate import generate
from edgedit.apps.cli.inspect import inspect
from edgedit.apps.cli.linearize import linearize
from edgedit.apps.cli.models import models
from edgedit.apps.cli.tune import tune
from edgedit.apps.cli.upscale import upscale
from edgedit.apps.cli.verify import verify
from edgedit.errors import EdgeditError

__all__ = ["app", "main"]

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="edgedit",
    help="Draw pictures with diffusion transformers on this machine, and convert checkpoints for it.",
    epilog="EDGEDIT_MODELS: folders with bundles. EDGEDIT_CACHE: folder for caches. EDGEDIT_DEBUG=1: tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (
    *(generate, upscale, decode, convert, inspect, verify, bench, tune, models),
    *(linearize, distill, export_app),
):
    app.command(no_args_is_help=False)(command)
app.command("eval", no_args_is_help=False)(eval_model)
app.add_typer(batch, name="batch")


def _print_version(value: bool) -> None:
    if value:
        print(f"edgedit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status. Mistakes are one line on stderr, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A path or a prompt that the terminal cannot show must not end the run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = typer.main.get_command(app).main(arguments, prog_name="edgedit", standalone_mode=False)
        sys.stdout.flush()
        return _stopped(arguments) if status == INTERRUPTED else int(status or 0)
    except Exception as error:
        if os.environ.get("EDGEDIT_DEBUG", "") not in ("", "0"):
            raise
        return _explain(error, arguments)
    except KeyboardInterrupt:
        return _stopped(arguments)


def _explain(error: Exception, arguments: Sequence[str]) -> int:
    if isinstance(error, typer.Abort):
        return _stopped(arguments)
    if isinstance(error, BrokenPipeError) or getattr(error, "errno", None) == errno.EPIPE:
        # The reader has gone (`edgedit models | head`): Python must not complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    details = ""
    if isinstance(error, EdgeditError):
        message, details = str(error), error.details
    elif hasattr(error, "format_message"):
        # Errors of the parser; which class they have depends on the version of typer.
        message = f"{error.format_message().rstrip('.')}; see: edgedit {_command(arguments)}--help"
    elif isinstance(error, MemoryError):
        message = "out of memory; try a smaller size, fewer components or --low-ram"
    elif isinstance(error, OSError):
        message = _system(error)
    else:
        message = (
            f"a fault in edgedit ({type(error).__name__}: {error}); "
            "run again with EDGEDIT_DEBUG=1 and report what it prints"
        )
    _report(" ".join(message.split()), details, arguments)
    return USER_ERROR


def _system(error: OSError) -> str:
    if error.errno is None:
        # NumPy's short writes say nothing else.
        return f"{error}; the disk may be full: free some room or choose another"
    place = f"{error.filename}: " if error.filename else ""
    advice = {
        errno.ENOSPC: "free some room or choose another disk",
        errno.EDQUOT: "free some room or choose another disk",
        errno.EACCES: "check its permissions or choose another place",
        errno.EPERM: "check its permissions or choose another place",
        errno.EROFS: "choose a place that can be written",
        errno.ENOENT: "check the path",
    }.get(error.errno, "check the path and the disk")
    return f"{place}{error.strerror or error}; {advice}"


def _report(message: str, details: str, arguments: Sequence[str]) -> None:
    if "--json" in arguments:
        print(json.dumps({"event": "error", "message": message, "details": details}))
    print(f"error: {message}", file=sys.stderr)
    if details:
        print(details, file=sys.stderr)


def _stopped(arguments: Sequence[str]) -> int:
    message = "stopped; nothing was left half written"
    if "--json" in arguments:
        print(json.dumps({"event": "stopped", "message": message}))
    print(message, file=sys.stderr)
    return INTERRUPTED


def _command(arguments: Sequence[str]) -> str:
    names = {
        command.name or (command.callback.__name__ if command.callback else "") for command in app.registered_commands
    }
    names |= {group.name or "" for group in app.registered_groups}
    return next((f"{word} " for word in arguments[:1] if word in names), "")
