"""The commands around a run: what comes before it, the run itself or a grid of them, where it stands, where its
reports are."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feddiff_protocol.errors import ConfigurationInvalid, FeddiffError, InputMissing, PrivacyRefusal

from .answers import AsJson, RunDir, console, print_json, quoted, read_documents, say_next
from .cluster_commands import KUBECTL_PLUGIN, Place, at_place, cluster_status

if TYPE_CHECKING:
    from .engine import Outcome

Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help="YAML files that together hold the datasets and exactly one job."),
]


class EngineName(StrEnum):
    """What carries out a plan."""

    LOCAL = "local"
    RAY = "ray"


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; made if missing.")],
    owners: Annotated[int, typer.Option(help="How many data owners.")] = 2,
) -> None:
    """Write a commented job.yaml to start from."""
    from .scaffold import write_scaffold

    for path in write_scaffold(folder, owners):
        print(f"wrote {path}")
    say_next(f"put the records in place, then: feddiff check {quoted(folder / 'job.yaml')}")


def split(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="A folder, a .npz or .parquet file, or MNIST's images with --labels."),
    ],
    clients: Annotated[int, typer.Option(help="How many clients.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write; new or empty.")],
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The labels: a CSV file for a folder, else MNIST's.")
    ] = None,
    majority: Annotated[
        int | None, typer.Option(min=1, help="Classes of which a client has many records; all unless given.")
    ] = None,
    minority_records: Annotated[
        int, typer.Option(min=0, help="Records of every class that each client has at least.")
    ] = 0,
    dirichlet: Annotated[
        str | None, typer.Option(metavar="ALPHA", help="Draw the shares of a class by Dir(ALPHA); equal unless given.")
    ] = None,
    holdout: Annotated[str, typer.Option(metavar="SHARE", help="Share of each class held out for all.")] = "0.1",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Divide one labelled data set among clients: records, datasets, a job, and a page that shows who holds what.

    Each client gets --minority-records of every class; what is left of a class goes to the clients for which it is one
    of --majority classes, dealt in turn.
    """
    from .split import JOB, OWNERS, PAGE, split_data

    answer = split_data(
        data,
        out,
        num_clients=clients,
        labels=labels,
        majority=majority,
        minority_records=minority_records,
        dirichlet=dirichlet,
        holdout=holdout,
        seed=seed,
    )
    if as_json:
        print_json(answer)
        return
    sizes = [sum(of_client) for of_client in answer["records"].values()]
    print(f"{len(sizes)} clients with {min(sizes)} to {max(sizes)} records, {answer['holdout']} held out for all")
    if answer["undealt"]:
        print(f"{answer['undealt']} records with nobody: their classes are no client's majority")
    for name in (OWNERS, JOB, PAGE):
        print(f"wrote {out / name}")
    say_next(f"feddiff plan {quoted(out / OWNERS)} {quoted(out / JOB)}")


def plan(files: Files, as_json: AsJson = False) -> None:
    """What a job would promise, and what it would cost each owner's budget. Starts and writes nothing.

    Ends with 77 when a budget or an owner's access rules do not admit it.
    """
    from .documents import one_job
    from .plan_report import plan_document, plan_report, print_plan

    report = plan_report(one_job(read_documents(files), files))
    if as_json:
        print_json(plan_document(report))
    else:
        print_plan(report, console())
    for client, refusal in report.refusals.items():
        print(f"feddiff: client {client}: {refusal}", file=sys.stderr)
    if report.refusals:
        raise typer.Exit(PrivacyRefusal.exit_code)
    if not as_json:
        say_next(f"feddiff run {' '.join(map(quoted, files))}")


def run(
    files: Files,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="The run's folder; runs/<job> beside the first file.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes at a time; default: one per core.")] = None,
    engine: Annotated[EngineName, typer.Option(help="What starts them: this process, or a Ray cluster.")] = (
        EngineName.LOCAL
    ),
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster to join; default: RAY_ADDRESS, or one started here.")
    ] = None,
    gpu_share: Annotated[
        float | None, typer.Option(help="With Ray: share of a GPU for each training; default: 1.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Carry a job out on this machine, or on a Ray cluster. Stopped or crashed? The same command goes on where it was.

    Each owner's ledger and private results lie beside the records, in feddiff/. Deleting the run's folder
    forgets no charge: run again, it is a new release.
    """
    from .documents import one_job
    from .engine import Setting, carriers, run_job
    from .processes import stop_requests
    from .progress import display
    from .run_folder import RunFolder

    job = one_job(read_documents(files), files)
    run_folder = RunFolder(folder or files[0].resolve().parent / "runs" / job.document.metadata.name)
    with (
        carriers(engine, processes, address, gpu_share) as given,
        display(as_json) as shown,
        stop_requests() as stop,
    ):
        command_line = shlex.join(["feddiff", *sys.argv[1:]])
        setting = Setting(reporter=shown, command_line=command_line, stop_requested=stop, **given)
        try:
            outcome = run_job(job, run_folder, setting)
        except FeddiffError as error:
            _tell_stop(error, run_folder.path, as_json)
            raise
    _tell_outcome(outcome, run_folder.path, files, as_json)


def experiment(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML that names job, datasets, arms, grid and seeds.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Where it goes; experiments/<FILE's name> beside FILE.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes at a time; default: one per core.")] = None,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Run nothing: table and figure of the rows that are there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run every arm, for every cell of a grid, with every seed, and draw the table and the figure of what is measured.

    Every run is a release of its own, charged as usual; a budget that does not hold them all is refused before anything
    starts. Stopped or crashed? The same command goes on where it was. What was measured on all owners' records comes
    together in one folder: it is for records that one person may see.
    """
    from .engine import Setting, carriers
    from .experiment import read_rows, run_experiment
    from .experiment_file import load_experiment
    from .experiment_table import write_results
    from .processes import stop_requests
    from .progress import display, json_logger

    out = folder or file.resolve().parent / "experiments" / file.stem
    if table_only:
        rows = read_rows(out)
    else:
        loaded = load_experiment(file)
        print("feddiff: NOT PRIVATE: rows, table and figure show what was measured on every owner", file=sys.stderr)
        with (
            carriers(EngineName.LOCAL, processes, None, None) as given,
            display(as_json) as shown,
            stop_requests() as stop,
        ):
            command_line = shlex.join(["feddiff", *sys.argv[1:]])
            setting = Setting(reporter=shown, command_line=command_line, stop_requested=stop, **given)
            try:
                rows = run_experiment(loaded, out, setting, lambda unit, *of: shown.run_begun(unit.label, *of))
            except FeddiffError as error:
                _tell_stop(error, out, as_json)
                raise
    written = write_results(rows, out)
    if as_json:
        json_logger().info("finished", folder=str(out), rows=len(rows), files=[str(path) for path in written])
        return
    for path in written:
        print(f"wrote {path}")


def _tell_stop(error: FeddiffError, folder: Path, as_json: bool) -> None:
    """The last event of a run, or of an experiment, that did not come to its end."""
    from .progress import json_logger

    if as_json:
        json_logger().info("stopped", folder=str(folder), exitCode=error.exit_code, message=str(error))


def _tell_outcome(outcome: "Outcome", folder: Path, files: list[Path], as_json: bool) -> None:
    from .progress import json_logger
    from .run_folder import RunFolder
    from .views import print_reports, report_of

    if as_json:
        reports: dict[str, Any] = {}
        if outcome.exit_code == 0:
            report = report_of(RunFolder(folder))
            pages = {client: str(owner.page) for client, owner in report.owners.items()}
            reports = {"jobReport": str(report.job_report), "ownerReports": pages}
        said = {"message": outcome.message} if outcome.message else {}
        if outcome.log is not None:
            said["log"] = str(outcome.log)
        phase = outcome.status.phase.value
        json_logger().info("finished", folder=str(folder), phase=phase, exitCode=outcome.exit_code, **said, **reports)
    if outcome.exit_code:
        print(f"feddiff: {outcome.message}", file=sys.stderr)
        if outcome.log is not None:
            print(f"feddiff: its words are in {outcome.log}", file=sys.stderr)
        raise typer.Exit(outcome.exit_code)
    if not as_json:
        print_reports(report_of(RunFolder(folder)), console())
        say_next(f"feddiff ledger {' '.join(map(quoted, files[:1]))}; feddiff report {quoted(folder)}")


@at_place
def status(
    called: typer.Context,
    place: Place,
    name: Annotated[
        str | None, typer.Argument(metavar="DIR|JOB", help="The folder of a run, or a job on the cluster.")
    ] = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="The jobs of every namespace.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Where a run stands: in a folder, DIR, or on a cluster.

    A cluster is meant when one of --namespace, --all-namespaces, --context and --kubeconfig is given, when there is
    no argument, and always as `kubectl feddiff`. Otherwise the argument is a folder.
    """
    said, plugin = place.said or all_namespaces, called.find_root().info_name == KUBECTL_PLUGIN
    if name is not None and not said and not plugin:
        _folder_status(name, as_json)
        return
    try:
        cluster_status(place, name, all_namespaces, as_json)
    except ConfigurationInvalid as error:
        if said or plugin:
            raise
        raise ConfigurationInvalid(f"{error}\na run on this machine: feddiff status DIR") from None


def _folder_status(name: str, as_json: bool) -> None:
    from .run_folder import RunFolder
    from .views import print_run, run_document, run_status

    try:
        found = run_status(RunFolder(Path(name)))
    except InputMissing as error:
        raise InputMissing(f"{error}\na job on a cluster: feddiff status {shlex.quote(name)} -n NAMESPACE") from None
    if as_json:
        print_json(run_document(found))
        return
    print_run(found, console())
    if found.phase == "Complete":
        say_next(f"feddiff report {shlex.quote(name)}")


def report(folder: RunDir) -> None:
    """Where a run's reports are, and which of them may be shared."""
    from .run_folder import RunFolder
    from .views import print_reports, report_of

    print_reports(report_of(RunFolder(folder)), console())
    say_next(f"feddiff sample {quoted(folder)} --client NAME --images-per-class 1000 --out samples.npz")
