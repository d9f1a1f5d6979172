"""The application: every command by name, the global options, and the run that turns exceptions into exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

import bidispatch
from bidispatch.cli import audit, demo, doctor, explain, failures, plan, profile, render, tune, verify, vllm
from bidispatch.cli.options import show_help_without_command
from bidispatch.errors import BidispatchError

__all__ = ["run"]

# typer's own name for what a mistyped command line raises moved between versions; its subclass is public.
_TyperUsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="bidispatch",
    help="Batch-invariant kernels for whatever GPU is in the machine: plan them, prove them, watch them hold.",
    epilog="Exit codes: 0 fine, 1 a finding, 2 usage, 3 this machine lacks something.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("plan")(plan.command)
app.command("explain")(explain.command)
app.command("verify")(verify.command)
app.command("tune")(tune.command)
app.add_typer(profile.app, name="profile")
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)
app.command("audit")(audit.command)
app.add_typer(vllm.app, name="vllm")


def _show_version(wanted: bool) -> None:
    if wanted:
        render.line(f"bidispatch {bidispatch.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _globals(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    show_help_without_command(context)


def run(arguments: list[str]) -> int:
    """Run a command line; print what went wrong in one place; return the exit code."""
    # Errors come also from parsing, when no option has a value yet: look at the words themselves.
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        with render.log_shown(debug=debug):
            result = typer.main.get_command(app).main(arguments, prog_name="bidispatch", standalone_mode=False)
    except BidispatchError as error:
        return failures.report(error, as_json=as_json, debug=debug)
    except _TyperUsageError as error:
        return failures.report_usage(error, as_json=as_json)
    except typer.Abort:  # how some versions of typer pass Ctrl-C on; others return 130
        return failures.INTERRUPTED
    except BrokenPipeError:
        return failures.reader_gone()
    return result if isinstance(result, int) else 0
