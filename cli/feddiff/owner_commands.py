"""The commands of a data owner: check the records, read the ledger, use, attack and pass on what a run left, take part
in a cluster's federation."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feddiff_protocol.errors import PrivacyRefusal, UsageInvalid

from .answers import AsJson, RunDir, console, print_json, quoted, read_documents, say_next

if TYPE_CHECKING:
    from .documents import LocalDataset


def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with datasets, and the job to try if any.")],
    as_json: AsJson = False,
) -> None:
    """For a data owner: do the records fit their description, and what would a job's clip norms do to them?

    The answer depends on the records. Keep it.
    """
    from .owner_stages import check_lines, check_records

    documents = read_documents([file])
    if not documents.datasets:
        raise UsageInvalid(f"{file}: expected at least one PrivateDataset, found none; name the file that holds it")
    job = documents.jobs[0] if len(documents.jobs) == 1 else None
    answers = {dataset.key: check_records(dataset, job) for dataset in documents.datasets}
    private = "PRIVATE: for the owner of these records only; it was computed from them without noise"
    if as_json:
        print_json({"notice": private, "datasets": answers})
        return
    print(private)
    for key, answer in answers.items():
        print("\n".join(["", key, *(f"  {line}" for line in check_lines(answer))]))
    say_next(f"feddiff plan {quoted(file)}")


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
    found = list(read_documents([where]).datasets)
    if not found:
        raise UsageInvalid(f"{where}: expected at least one PrivateDataset, found none; name the file that holds it")
    return found


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
        raise typer.Exit(PrivacyRefusal.exit_code)
    if not as_json:
        say_next(f"feddiff report {quoted(folder)}")


class Exported(StrEnum):
    """What may be passed on: an owner's own, or what is everybody's."""

    DENOISER = "denoiser"
    SAMPLES = "samples"
    SHARED = "shared"


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
