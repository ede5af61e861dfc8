"""Datasets, their ledgers, jobs and attempts as the operator writes them, and what a console shows: for tests of the
command line."""

import io
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from rich.console import Console

from feddiff.cluster_budgets import Books
from feddiff_protocol import ledger, ledger_objects
from feddiff_protocol.accountant import charge_mu_squared
from feddiff_protocol.api import BudgetSpec
from feddiff_protocol.ledger import Account, Charge, Entry, Phase

Object = dict[str, Any]
NOW = datetime(2026, 1, 2, tzinfo=UTC)
DELTA = Decimal("1e-5")


def entry(number: int, epsilon: str, phase: Phase = Phase.CHARGED) -> Entry:
    return Entry(
        name=f"prl-{number}",
        dataset_uid="d",
        job_namespace="research",
        job_name=f"job-{number}",
        job_uid=f"uid-{number}",
        client="a",
        mechanism="summary",
        unit="image",
        epsilon=Decimal(epsilon),
        delta=DELTA,
        charge=Charge(mu_squared=charge_mu_squared(Decimal(epsilon), DELTA)),
        reserved_at=f"2026-01-01T00:00:{number:02}Z",
        phase=phase,
    )


def books(entries: list[Entry], account: Account | None = None, limit: str = "20", readable: bool = True) -> Books:
    """As the operator writes them, with these entries and the account that they give, unless another is given."""
    budget = {"epsilon": limit, "delta": "1e-5", "unit": "image"}
    dataset: Object = {"metadata": {"namespace": "clinic-a", "name": "scans", "uid": "d"}, "spec": {"budget": budget}}
    kept = account or ledger.adopt(entries)
    said = ledger_objects.Books(kept, tuple(entries), BudgetSpec.model_validate(budget))
    dataset["status"] = ledger_objects.dataset_status(dataset, said, NOW)
    releases = [
        ledger_objects.with_status_of(ledger_objects.release_object("clinic-a", "scans", each), each)
        for each in entries
    ]
    return Books(dataset, releases if readable else None)


def job(status: Object | None = None, **spec: Any) -> Object:
    clients = [{"name": n, "dataset": {"namespace": f"clinic-{n}", "name": "scans"}} for n in "ab"]
    privacy = {"mechanism": "summary", "epsilon": "4", "delta": "1e-5", "clipNorm": "4", "momentClipNorm": "2"}
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "metadata": {
            "namespace": "research",
            "name": "first",
            "uid": "uid-1",
            "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"clients": clients, "privacy": privacy, "diffusion": {"splitSigma": "1"}, **spec},
        **({"status": status} if status else {}),
    }


def status(phase: str, reason: str, message: str, **more: Any) -> Object:
    failed = {"type": "Failed", "status": str(phase == "Failed"), "reason": reason, "message": message}
    return {"phase": phase, "observedGeneration": 1, "message": message, "conditions": [failed], **more}


def attempt(stage: str, client: str = "", number: int = 1, **annotations: str) -> Object:
    namespace = f"clinic-{client}" if client else "research"
    labels = {"feddiff.dev/stage": stage, "feddiff.dev/attempt": str(number), "feddiff.dev/job-uid": "uid-1"}
    labels |= {"feddiff.dev/job": "first", "feddiff.dev/job-namespace": "research"}
    labels |= {"feddiff.dev/client": client} if client else {}
    return {
        "metadata": {
            "namespace": namespace,
            "name": f"fd-{stage}-{client}-{number}",
            "uid": f"{stage}-{client}-{number}",
            "labels": labels,
            "annotations": {f"feddiff.dev/{name.replace('_', '-')}": value for name, value in annotations.items()},
            "creationTimestamp": f"2026-01-01T00:{number:02}:00Z",
        },
        "spec": {},
    }


def pod(of: Object, phase: str = "Pending", index: int = 0, **status: Any) -> Object:
    labels = {
        "batch.kubernetes.io/job-name": of["metadata"]["name"],
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    metadata = {"namespace": of["metadata"]["namespace"], "name": f"{of['metadata']['name']}-{index}", "labels": labels}
    return {"metadata": metadata, "status": {"phase": phase, **status}}


def waiting(reason: str, message: str = "") -> Object:
    return {"containerStatuses": [{"name": "stage", "state": {"waiting": {"reason": reason, "message": message}}}]}


def shown(printer: Any, *arguments: Any, terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=160, color_system=None)
    printer(*arguments[:1], console, *arguments[1:])
    return file.getvalue()
