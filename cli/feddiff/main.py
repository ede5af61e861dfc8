"""The `feddiff` command. Modules that cost time are imported by the command that needs them."""

import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feddiff_protocol.errors import ConfigurationInvalid, FeddiffError, InputMissing, UsageInvalid

from . import cluster_commands
from .answers import AsJson, console, print_json, quoted, say_next
from .cluster_commands import Place, at_place

if TYPE_CHECKING:
    from feddiff_protocol.access import Role

    from .documents import Documents, LocalDataset
    from .engine import Outcome
    from .store_checks import StoreToCheck

USAGE, OUR_BUG, OUTPUT_FAILED, INTERRUPTED, PRIVACY_REFUSED = 64, 1, 73, 75, 77

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

owner = typer.Typer(no_args_is_help=True, help="For a data owner: take part in a cluster's federation.")
app.add_typer(owner, name="owner")

store = typer.Typer(no_args_is_help=True, help="The stores in which releases and results lie.")
app.add_typer(store, name="store")


class RoleName(StrEnum):
    """feddiff_protocol.access.Role, which --help need not load."""

    OWNER = "owner"
    FEDERATION = "federation"
    TRAINER = "trainer"


class EngineName(StrEnum):
    """What carries out a plan."""

    LOCAL = "local"
    RAY = "ray"


Files = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help="YAML files that together hold the datasets and exactly one job."),
]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")]
KUBECTL_PLUGIN = "kubectl feddiff"


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
        return USAGE if code == 2 else code
    except FeddiffError as error:
        for line in str(error).splitlines():
            print(f"feddiff: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # whoever read us has left; nothing is wrong
        return 0
    except OSError as error:
        print(f"feddiff: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        return OUTPUT_FAILED
    except KeyboardInterrupt:
        print("feddiff: stopped", file=sys.stderr)
        return INTERRUPTED


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


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; made if missing.")],
    owners: Annotated[int, typer.Option(help="How many data owners.")] = 2,
) -> None:
    """Write a commented job.yaml to start from."""
    from .scaffold import write_scaffold

    for path in write_scaffold(folder, owners):
        print(f"wrote {path}")
    say_next(f"put the records in place, then: feddiff check {quoted(folder / 'job.yaml')}")


@app.command(short_help="Divide one data set among clients, to study heterogeneity.")
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
    for name in (OWNERS, JOB, PAGE):
        print(f"wrote {out / name}")
    say_next(f"feddiff plan {quoted(out / OWNERS)} {quoted(out / JOB)}")


@app.command(short_help="For a data owner: hold the records against their description.")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with datasets, and the job to try if any.")],
    as_json: AsJson = False,
) -> None:
    """For a data owner: do the records fit their description, and what would a job's clip norms do to them?

    The answer depends on the records. Keep it.
    """
    from .owner_stages import check_records

    documents = _documents([file])
    if not documents.datasets:
        raise UsageInvalid(f"{file}: expected at least one PrivateDataset, found none; name the file that holds it")
    job = documents.jobs[0] if len(documents.jobs) == 1 else None
    answers = {dataset.key: check_records(dataset, job) for dataset in documents.datasets}
    private = "PRIVATE: for the owner of these records only; it was computed from them without noise"
    if as_json:
        print_json({"notice": private, "datasets": answers})
        return
    print(private)
    from .owner_stages import check_lines

    for key, answer in answers.items():
        print("\n".join(["", key, *(f"  {line}" for line in check_lines(answer))]))
    say_next(f"feddiff plan {quoted(file)}")


@app.command(short_help="What a job would promise, and what it would cost.")
def plan(files: Files, as_json: AsJson = False) -> None:
    """What a job would promise, and what it would cost each owner's budget. Starts and writes nothing.

    Ends with 77 when a budget or an owner's access rules do not admit it.
    """
    from .documents import one_job
    from .plan_report import plan_document, plan_report, print_plan

    report = plan_report(one_job(_documents(files), files))
    if as_json:
        print_json(plan_document(report))
    else:
        print_plan(report, console())
    for client, refusal in report.refusals.items():
        print(f"feddiff: client {client}: {refusal}", file=sys.stderr)
    if report.refusals:
        raise typer.Exit(PRIVACY_REFUSED)
    if not as_json:
        say_next(f"feddiff run {' '.join(map(quoted, files))}")


@app.command()
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

    job = one_job(_documents(files), files)
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


@app.command(short_help="A grid of jobs on this machine, with its table and figure.")
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


def _documents(files: Sequence[Path]) -> "Documents":
    """What the files hold; what of it is for a cluster alone is named, in one line."""
    from .documents import load_documents

    documents = load_documents(files)
    if documents.passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(documents.passed_over).items())
        print(f"feddiff: passed over, since only a cluster needs it: {kinds}", file=sys.stderr)
    return documents


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


@app.command(short_help="Where a run stands, in a folder or on a cluster.")
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
        cluster_commands.cluster_status(place, name, all_namespaces, as_json)
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


app.command(short_help="On a cluster: why a job waits or failed, and who can mend it.")(cluster_commands.why)
app.command(short_help="On a cluster: what a dataset's releases have cost.")(cluster_commands.budget)
app.command(short_help="On a cluster: the log of a job's stage.")(cluster_commands.logs)


@owner.command("init", short_help="YAML that lets the operator in, and a dataset to fill in.")
def owner_init(
    namespace: Annotated[str, typer.Option("--namespace", "-n", metavar="NS", help="The owner's namespace.")],
    operator_namespace: Annotated[
        str, typer.Option("--operator-namespace", metavar="NS", help="Where feddiff is installed.")
    ] = "feddiff-system",
    research: Annotated[
        list[str] | None, typer.Option("--research", metavar="NS", help="Whose jobs may use it; may be repeated.")
    ] = None,
    dataset: Annotated[str, typer.Option("--dataset", metavar="NAME", help="Name of the dataset.")] = "images",
    existing_namespace: Annotated[
        bool, typer.Option("--existing-namespace", help="Leave the Namespace out: somebody else makes it.")
    ] = False,
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", metavar="URL", help="A server of the stores, unless AWS; may be repeated."),
    ] = None,
    metrics_from: Annotated[
        list[str] | None,
        typer.Option("--metrics-from", metavar="NS", help="Whose Prometheus sees step and percent; may be repeated."),
    ] = None,
) -> None:
    """Print the documents of a data owner, for `kubectl apply -f -`. Lines marked CHANGE want to be read first."""
    from .owner import owner_documents

    text = owner_documents(
        namespace,
        operator_namespace,
        research or (),
        dataset,
        existing_namespace,
        endpoint or (),
        metrics_from or (),
    )
    print(text, end="")


@store.command("check", short_help="Can a store carry releases, and who gets in?")
def store_check(
    uri: Annotated[
        str | None, typer.Argument(metavar="STORE", help="s3://bucket/prefix or file:///folder; else --file.")
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="FILE", help="YAML with a job, datasets; may be repeated."),
    ] = None,
    role: Annotated[
        RoleName | None, typer.Option(metavar="ROLE", help="Whose keys: owner, federation (an owner's there), trainer.")
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The client whose keys are used; may be repeated.")
    ] = None,
    endpoint: Annotated[str | None, typer.Option(metavar="URL", help="The server, unless AWS_… say which.")] = None,
    print_policy: Annotated[
        bool, typer.Option("--print-policy", help="Print the least policies instead; asks no store.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Can a store carry releases, and who gets in?

    Tries what stages do, with the keys in the environment, and asks how the bucket is set. What it writes it deletes.
    Ends with 77 for a store in which a release could happen twice, or that is open to others.
    """
    if (uri is None) == (not files):
        raise UsageInvalid("expected either STORE or --file, found both or none; name one")
    from . import store_checks

    whose, clients = _role(role), client or []
    named = store_checks.named_stores(files) if files else None
    if print_policy:
        at = store_checks.parties_at
        parties = at(uri or "", whose, clients) if named is None else store_checks.parties_of(named, whose, clients)
        _print_policies(store_checks.policies_of(parties), as_json)
        return
    if named is None:
        stores = [store_checks.store_at(uri or "", whose, clients)]
    else:
        stores = store_checks.stores_to_check(named, whose, clients)
    _print_checks(stores, endpoint, as_json)


def _role(name: RoleName | None) -> "Role | None":
    from feddiff_protocol.access import Role

    return None if name is None else Role(name.value)


def _print_policies(policies: list[dict[str, Any]], as_json: bool) -> None:
    from .store_checks import policy_lines

    if as_json:
        print_json({"policies": policies})
    else:
        print("\n".join(line for policy in policies for line in policy_lines(policy)))


def _print_checks(stores: "list[StoreToCheck]", endpoint: str | None, as_json: bool) -> None:
    from .store_checks import exit_code_of, finding_line, findings_of

    findings = {each: findings_of(each, endpoint) for each in stores}
    documents = [
        {"store": each.uri, "role": each.role, "client": each.client, "findings": found}
        for each, found in findings.items()
    ]
    if as_json:
        print_json({"stores": documents})
    else:
        for each, found in findings.items():
            print("\n".join([each.title, *(f"  {finding_line(finding)}" for finding in found), ""]))
    for each, found in findings.items():
        if failed := [finding["check"] for finding in found if finding["exitCode"]]:
            print(f"feddiff: {each.title}: {len(failed)} of {len(found)} failed: {', '.join(failed)}", file=sys.stderr)
    if code := exit_code_of([finding for found in findings.values() for finding in found]):
        raise typer.Exit(code)


@app.command()
def report(folder: RunDir) -> None:
    """Where a run's reports are, and which of them may be shared."""
    from .run_folder import RunFolder
    from .views import print_reports, report_of

    print_reports(report_of(RunFolder(folder)), console())
    say_next(f"feddiff sample {quoted(folder)} --client NAME --images-per-class 1000 --out samples.npz")


@app.command(short_help="Every release, what they add up to, what remains.")
def ledger(
    where: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="YAML with datasets, or the folder of a run.")],
    as_json: AsJson = False,
) -> None:
    """Every release of the datasets, what they add up to, and what remains."""
    from .views import ledger_document, ledger_of, print_ledgers

    ledgers = [ledger_of(dataset) for dataset in _datasets(where)]
    if as_json:
        print_json({"datasets": [ledger_document(each) for each in ledgers]})
        return
    print_ledgers(ledgers, console())
    say_next("feddiff plan FILE... (what one more job would cost)")


def _datasets(where: Path) -> "list[LocalDataset]":
    from .run_folder import RunFolder

    if where.is_dir():
        return list(RunFolder(where).job().datasets.values())
    found = list(_documents([where]).datasets)
    if not found:
        raise UsageInvalid(f"{where}: expected at least one PrivateDataset, found none; name the file that holds it")
    return found


@app.command()
def sample(
    folder: RunDir,
    client: Annotated[str, typer.Option(metavar="NAME", help="The owner for whom to draw.")],
    images_per_class: Annotated[int, typer.Option(min=1, help="How many images of each class.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="A new .npz file.")],
) -> None:
    """Draw more images with a finished run's denoisers. They are not private: for their owner only."""
    from .owner_stages import draw_samples
    from .run_folder import RunFolder

    draw_samples(RunFolder(folder), client, images_per_class, out)
    print(f"wrote {out}: not private, for the owner of client {client} only")


@app.command(short_help="For a data owner: what attacks find in a finished run.")
def audit(
    folder: RunDir,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="The owner to audit; default: every one.")] = None,
    as_json: AsJson = False,
) -> None:
    """For a data owner: attack a finished run's release and denoisers, and hold what is found against its bound.

    The answer depends on the records. Keep it. Ends with 77 where an attack does better than the promise allows.
    """
    from .owner_stages import AUDIT_COLUMNS, attacks_above, audit_lines, audit_rows, audit_run, clients_of
    from .progress import bar
    from .run_folder import RunFolder
    from .tables import print_table, say

    run_folder, answers = RunFolder(folder), {}
    for name in clients_of(run_folder, client):
        with bar(f"audit {name}") as told:
            answers[name] = audit_run(run_folder, name, told)
    private = "PRIVATE: for the owner of these records only; attacks read them, and say who is among them"
    if as_json:
        print_json({"notice": private, "clients": answers})
    else:
        print(private)
        for name, answer in answers.items():
            say(console(), f"\n{name}")
            print_table(console(), AUDIT_COLUMNS, audit_rows(answer))
            for line in audit_lines(answer):
                say(console(), f"  {line}")
    above = [f"client {name}: {each}" for name, answer in answers.items() for each in attacks_above(answer)]
    for each in above:
        print(f"feddiff: {each}: a bug of ours; release nothing more with it, and report it", file=sys.stderr)
    if above:
        raise typer.Exit(PRIVACY_REFUSED)
    if not as_json:
        say_next(f"feddiff report {quoted(folder)}")


class Exported(StrEnum):
    """What may be passed on: an owner's own, or what is everybody's."""

    DENOISER = "denoiser"
    SAMPLES = "samples"
    SHARED = "shared"


@app.command(short_help="Pass on the shared denoiser, or as a data owner one's own.")
def export(
    what: Annotated[Exported, typer.Argument(metavar="WHAT", help="shared, denoiser or samples.")],
    folder: RunDir,
    out: Annotated[
        Path,
        typer.Option(metavar="PATH", help="A new folder (shared), .safetensors (denoiser) or .npz file (samples)."),
    ],
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help="denoiser, samples: the owner whose it is.")
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="shared: the weights' licence, for the model card.")
    ] = None,
    override: Annotated[
        str | None, typer.Option(metavar="REASON", help="Although the audit speaks against it; put on record.")
    ] = None,
) -> None:
    """Pass on the shared denoiser, or as a data owner one's own denoiser or samples.

    shared: a folder that loads without feddiff, as a diffusers pipeline with a model card. It is made of the releases
    alone, so their promise covers it. denoiser, samples: copied out of the owner's store. They are not private, no
    promise covers them; refused (77) unless their audit passed or --override says why not.
    """
    from .owner_stages import export_result
    from .run_folder import RunFolder

    if what is Exported.SHARED:
        _refuse_given({"--client": client, "--override": override}, "denoiser or samples")
        _export_shared(folder, out, licence or "unknown")
        return
    _refuse_given({"--license": licence}, "shared")
    if client is None:
        raise UsageInvalid(f"--client: expected the owner whose {what.value} it is, found none; name it")
    if override is not None and not override.strip():
        raise UsageInvalid("--override: expected the owner's reason, found none; it goes on record")
    answer = export_result(RunFolder(folder), what.value, client, out, override or "")
    said = f"overridden: {len(answer['refusals'])} reasons against it" if answer["refusals"] else "its audit passed"
    print(f"wrote {out} ({said}); on record in the store and the report of the owner of client {client}")


def _refuse_given(options: dict[str, str | None], belongs: str) -> None:
    for name, given in options.items():
        if given is not None:
            raise UsageInvalid(f"{name}: belongs to {belongs}, found {given}; leave it out")


def _export_shared(folder: Path, out: Path, licence: str) -> None:
    from .owner_stages import export_shared_denoiser
    from .plan_report import decimal_text
    from .run_folder import RunFolder

    run = export_shared_denoiser(RunFolder(folder), out, licence)
    epsilon, delta = decimal_text(run.privacy.epsilon), decimal_text(run.privacy.delta_or_zero)
    promise = f"ε = {epsilon} per {run.privacy.unit}, δ = {delta}, k = 1 release"
    print(f"wrote {out}: made of {len(run.releases)} owners' releases, each at {promise}; it may be shared")
    say_next(f"read {quoted(out / 'README.md')}: what was promised, how to load it, what it cannot do")


if __name__ == "__main__":
    main()
