"""The commands that ask a cluster: why, budget, logs, and status where a cluster is meant."""

import functools
import inspect
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from feddiff_protocol.errors import UsageInvalid

from .answers import AsJson, console, print_json, say_next

if TYPE_CHECKING:
    from .on_cluster import Cluster

KUBECTL_PLUGIN = "kubectl feddiff"
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job on the cluster: NAME, or NAMESPACE/NAME.")]


@dataclass(frozen=True)
class Place:
    """A cluster and namespace as the user named them."""

    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", metavar="NS", help="Namespace; the kubeconfig's unless given.")
    ] = None
    context: Annotated[str | None, typer.Option("--context", metavar="NAME", help="Context of the kubeconfig.")] = None
    kubeconfig: Annotated[
        Path | None, typer.Option("--kubeconfig", metavar="FILE", help="Kubeconfig; KUBECONFIG or ~/.kube/config.")
    ] = None

    @property
    def said(self) -> bool:
        return bool(self.namespace or self.context or self.kubeconfig)

    def connect(self) -> "Cluster":
        from .on_cluster import connect

        return connect(self.kubeconfig, self.context, self.namespace)

    def command(self, *words: str) -> str:
        """A command line for the same cluster and namespace."""
        named = {"--kubeconfig": self.kubeconfig, "--context": self.context, "-n": self.namespace}
        options = [word for option, value in named.items() if value for word in (option, str(value))]
        return shlex.join(["feddiff", *words, *options])


def at_place(command: Callable[..., None]) -> Callable[..., None]:
    """`command` for typer: the options that name a Place stand where it has its argument `place`."""
    options = inspect.signature(Place).parameters.values()

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        command(place=Place(**{option.name: given.pop(option.name) for option in options}), **given)

    own = inspect.signature(command).parameters.values()
    parameters = [each for argument in own for each in (options if argument.name == "place" else (argument,))]
    by_name = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    with_options.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    return with_options


def cluster_status(place: Place, name: str | None, all_namespaces: bool, as_json: bool) -> None:
    """Where a job stands, or all of a namespace, or all of the cluster."""
    from datetime import UTC, datetime

    from .cluster_jobs import job_document, jobs_document, print_job, print_jobs
    from .on_cluster import JOBS, read_job

    if all_namespaces and (name or place.namespace):
        raise UsageInvalid("--all-namespaces goes with neither a job nor --namespace; leave one out")
    now = datetime.now(UTC)
    with place.connect() as cluster:
        if name is None:
            document = jobs_document(cluster.list(JOBS, None if all_namespaces else cluster.namespace))
        else:
            document = job_document(read_job(cluster, name))
    if as_json:
        print_json(document)
        return
    if name is None:
        _say_where(cluster, all_namespaces)
        print_jobs(document, console(), now)
    else:
        print_job(document, console(), now)
        say_next(place.command("why", name))


def _say_where(cluster: "Cluster", all_namespaces: bool = False) -> None:
    print(f"context {cluster.context}, {'all namespaces' if all_namespaces else f'namespace {cluster.namespace}'}")


@at_place
def why(job: Job, place: Place, as_json: AsJson = False) -> None:
    """On a cluster: why a job waits or failed, in words, and who has to do what."""
    from .cluster_why import print_why, why_document
    from .on_cluster import read_scene

    with place.connect() as cluster:
        document = why_document(read_scene(cluster, job))
    if as_json:
        print_json(document)
        return
    print_why(document, console())
    failed = [each for each in document["attempts"] if each["phase"] == "Failed"]
    if failed:
        client = ["--client", failed[0]["client"]] if failed[0]["client"] else []
        say_next(place.command("logs", job, *client, "--stage", failed[0]["stage"]))


@at_place
def budget(
    place: Place,
    dataset: Annotated[str | None, typer.Argument(metavar="DATASET", help="One dataset, with its entries.")] = None,
    as_json: AsJson = False,
) -> None:
    """On a cluster: limit, spent, reserved and remaining ε of the datasets, checked against the ledger's entries."""
    from .cluster_budgets import budget_document, print_budgets, print_entries
    from .on_cluster import read_books

    with place.connect() as cluster:
        documents = [budget_document(books) for books in read_books(cluster, dataset)]
    if as_json:
        print_json({"datasets": documents})
        return
    _say_where(cluster)
    print_budgets(documents, console())
    if dataset is not None:
        print_entries(documents[0], console())
    elif documents:
        say_next(place.command("budget", documents[0]["dataset"].partition("/")[2]))


@at_place
def logs(
    job: Job,
    place: Place,
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose stages; else those of the whole job.")
    ] = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Which stage; the newest unless given.")] = None,
    as_json: AsJson = False,
) -> None:
    """On a cluster: the log of a stage's newest attempt. An owner's stages are for that owner to read."""
    from .on_cluster import read_logs

    with place.connect() as cluster:
        pods = read_logs(cluster, job, client, stage)
    if as_json:
        print_json({"pods": pods})
        return
    for pod in pods:
        if len(pods) > 1:
            print(f"==> {pod['pod']} <==")
        for line in pod["lines"]:
            print(line)
