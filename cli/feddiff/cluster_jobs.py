"""Where jobs on a cluster stand, one or all: objects in, answers for people and as JSON out. Pure."""

from collections.abc import Iterable
from datetime import UTC, datetime

from rich.console import Console

from .cluster_scene import Object
from .tables import print_table, say


def jobs_document(jobs: Iterable[Object]) -> Object:
    """Every job in one line's worth of JSON."""
    return {"jobs": [_job_row(job) for job in sorted(jobs, key=_key)]}


def _job_row(job: Object) -> Object:
    status = job.get("status") or {}
    return {
        "namespace": job["metadata"]["namespace"],
        "name": job["metadata"]["name"],
        "phase": status.get("phase", ""),
        "clients": status.get("clientsSummary", ""),
        "progress": status.get("progress", ""),
        "epsilon": job["spec"].get("privacy", {}).get("epsilon", ""),
        "trainer": status.get("trainer", ""),
        "created": job["metadata"].get("creationTimestamp", ""),
        "message": status.get("message", ""),
    }


def print_jobs(document: Object, console: Console, now: datetime) -> None:
    columns = ("namespace", "job", "phase", "clients", "progress", "ε", "trainer", "age")
    rows = [
        (
            each["namespace"],
            each["name"],
            each["phase"] or "unseen",
            each["clients"],
            each["progress"],
            each["epsilon"],
            each["trainer"],
            _age(each["created"], now),
        )
        for each in document["jobs"]
    ]
    if rows:
        print_table(console, columns, rows)
    else:
        say(console, "no jobs here")


def job_document(job: Object) -> Object:
    """One job's status as JSON."""
    row, status, metadata = _job_row(job), job.get("status") or {}, job["metadata"]
    return {
        "job": {"namespace": row["namespace"], "name": row["name"]},
        "uid": metadata["uid"],
        "phase": row["phase"],
        "message": row["message"],
        "upToDate": status.get("observedGeneration") == metadata.get("generation"),
        **{name: row[name] for name in ("clients", "progress", "epsilon", "trainer", "created")},
        "conditions": [
            {
                "type": each["type"],
                "status": each["status"] == "True",
                "reason": each.get("reason", ""),
                "message": each.get("message", ""),
            }
            for each in status.get("conditions") or []
        ],
        "counted": list(status.get("counted") or []),
        "dropped": {each["client"]: each["reason"] for each in status.get("dropped") or []},
        "numDropped": status.get("numDropped", 0),
        "stages": [dict(each) for each in status.get("stages") or []],
    }


def print_job(document: Object, console: Console, now: datetime) -> None:
    job = document["job"]
    say(console, f"Job {job['namespace']}/{job['name']}: {document['phase'] or 'unseen by an operator'}")
    if document["message"]:
        say(console, f"  {document['message']}")
    say(
        console,
        f"  clients {document['clients'] or '-'}, progress {document['progress'] or '-'}, trainer"
        f" {document['trainer'] or '-'}, ε = {document['epsilon']}, age {_age(document['created'], now)},"
        f" uid {document['uid']}",
    )
    if document["phase"] and not document["upToDate"]:
        say(console, "  the job was changed since; the operator has not looked at it yet")
    counts = ("running", "succeeded", "failed", "stopped")
    rows = [(each["stage"], *(str(each.get(name, 0)) for name in counts)) for each in document["stages"]]
    print_table(console, ("stage", *counts), rows)
    reached = [(each["type"], "yes" if each["status"] else "no", each["reason"]) for each in document["conditions"]]
    print_table(console, ("condition", "reached", "reason"), reached)
    for client, why in document["dropped"].items():
        say(console, f"client {client} no longer takes part: {why}")
    if (more := document["numDropped"] - len(document["dropped"])) > 0:
        say(console, f"and {more} more clients")


def _key(thing: Object) -> tuple[str, str]:
    return thing["metadata"]["namespace"], thing["metadata"]["name"]


def _age(created: str, now: datetime) -> str:
    """As kubectl says it: 5s, 3m, 7h, 12d."""
    if not created:
        return ""
    seconds = int((now - datetime.fromisoformat(created.replace("Z", "+00:00")).astimezone(UTC)).total_seconds())
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{max(seconds, 0)}s"
