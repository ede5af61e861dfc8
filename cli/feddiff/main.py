"""The `feddiff` command. Modules that cost time are imported by the command that needs them."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from feddiff_protocol.errors import OUR_BUG, FeddiffError, Interrupted, OutputFailed, UsageInvalid

from .cluster_commands import KUBECTL_PLUGIN, budget, logs, why
from .owner_commands import audit, check, export, ledger, owner_init, sample
from .run_commands import experiment, init, plan, report, run, split, status
from .store_commands import store_check

EXIT_CODES = (
    "Exit codes: 0 done · 64 command line · 65 document or data invalid · 66 input missing · 69 no answer in time · "
    "73 output cannot be written · 74 input/output error · 75 stopped, the same command goes on · "
    "77 privacy budget or promise refused · 78 configuration · 1 a bug of ours."
)

app = typer.Typer(
    name="feddiff",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels would cost half of the time that --help takes
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def main() -> None:
    """The process ends with the code of docs/exit-codes.md; a mistake of the user is one line, never a traceback."""
    sys.exit(_exit_code(app))


def kubectl_plugin() -> None:
    """The same as `kubectl feddiff`: a cluster is meant wherever `feddiff` alone could mean a run's folder."""
    sys.exit(_exit_code(lambda: app(prog_name=KUBECTL_PLUGIN)))


def _exit_code(command: Callable[[], Any]) -> int:
    try:
        command()
        return 0
    except SystemExit as ended:  # how typer ends; it has printed what is wrong with a command line
        code = ended.code if isinstance(ended.code, int) else OUR_BUG if ended.code else 0
        return UsageInvalid.exit_code if code == 2 else code
    except FeddiffError as error:
        for line in str(error).splitlines():
            print(f"feddiff: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # whoever read us has left; nothing is wrong
        return 0
    except OSError as error:
        print(f"feddiff: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return OutputFailed.exit_code
    except KeyboardInterrupt:
        print("feddiff: stopped", file=sys.stderr)
        return Interrupted.exit_code


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"feddiff {version('feddiff')}")
        raise typer.Exit


@app.callback()
def _feddiff(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Train diffusion models across data owners who keep their images: each lets out one noised release, with a
    stated privacy loss, counted against a budget that holds.

    Start with `feddiff init demo`.
    """


# In the order in which --help names them.
app.command()(init)
app.command(short_help="Divide one data set among clients, to study heterogeneity.")(split)
app.command(short_help="For a data owner: hold the records against their description.")(check)
app.command(short_help="What a job would promise, and what it would cost.")(plan)
app.command()(run)
app.command(short_help="A grid of jobs on this machine, with its table and figure.")(experiment)
app.command(short_help="Where a run stands, in a folder or on a cluster.")(status)
app.command(short_help="On a cluster: why a job waits or failed, and who can mend it.")(why)
app.command(short_help="On a cluster: what a dataset's releases have cost.")(budget)
app.command(short_help="On a cluster: the log of a job's stage.")(logs)
app.command()(report)
app.command(short_help="Every release, what they add up to, what remains.")(ledger)
app.command()(sample)
app.command(short_help="For a data owner: what attacks find in a finished run.")(audit)
app.command(short_help="Pass on the shared denoiser, or as a data owner one's own.")(export)

owner = typer.Typer(no_args_is_help=True, help="For a data owner: take part in a cluster's federation.")
owner.command("init", short_help="YAML that lets the operator in, and a dataset to fill in.")(owner_init)
app.add_typer(owner, name="owner")

store = typer.Typer(no_args_is_help=True, help="The stores in which releases and results lie.")
store.command("check", short_help="Can a store carry releases, and who gets in?")(store_check)
app.add_typer(store, name="store")


if __name__ == "__main__":
    main()
