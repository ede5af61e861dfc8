"""docs/reliability.md, from what the faults led to."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime

from cluster.chaos import Outcome
from feddiff.experiment import commit, cpu_model

TEXT = """# Reliability

What becomes of a job when something breaks under it. `make chaos` wrote this page: it starts a Kubernetes with
real images, an S3 server and two data owners, breaks one thing under each of many jobs, and looks at everything
afterwards.

## What holds after every fault

- **The ledger is exact.** Each owner has one entry for the job, charged, that names the manifest which lies in
  the federation's store; the account in the dataset's status is the sum of its entries to the last digit.
- **No shard without a release.** Every object that a client has sent belongs to a charged entry and is, byte
  for byte, what its owner sealed.
- **No second release.** All bytes that left a pod for the federation's store passed a gate that noted them:
  whatever was sent under one name was sent in one form, also where the pod was killed, the server was gone, or
  a request came minutes late.
- **The job ends as without the fault.** Complete, where it was neither deleted nor lost more attempts than
  `backoffLimit` allows. A stage goes on from its newest checkpoint; one is stored every 60 seconds and on
  SIGTERM.
- **A client that reports nothing stays charged**, and a deleted job leaves its ledger.

The same checks are run on evidence made wrong on purpose (a shard more, other bytes, a second entry, an entry
without charge) and have to find it. Five of the faults strike one job with every run of all tests.

## What does not follow

- One machine was all of it: one node, one control plane, one S3 server. Loss of *one of several* nodes is
  played by force-deleted pods and by the reboot.
- The node's network does not enforce NetworkPolicies; they are evaluated by tests of the chart instead.
- etcd ran without fsync. `kill -9` of everything loses no write of the kernel's; a loss of power can, and then
  the ledger is what the backup holds: see [ledger-backup.md](ledger-backup.md).
- A store that is gone for longer than about two minutes, or a disk that stays full longer than the attempts of
  `backoffLimit` take, ends the job: [exit-codes.md](exit-codes.md). Ranks that cannot reach each other for ten
  minutes end their attempt with 74.
- A kill within a minute of the start of training finds no checkpoint: the attempt begins anew.

## What happened

Commit {commit}, {date}, {hardware}. Seconds count from the job's creation. *Recovered* is when every stage that
ran at the time of the fault was done; the first row is a job without a fault, for comparison.
"""
HEAD = """| fault | what happened | strikes after | recovered after | ends after | attempts | verdict |
|---|---|---|---|---|---|---|"""


def page(outcomes: Sequence[Outcome]) -> str:
    """The whole page, the table last."""
    rows = "\n".join(_row(each) for each in outcomes)
    text = TEXT.format(commit=commit(), hardware=hardware(), date=datetime.now(UTC).date())
    return f"{text}\n{HEAD}\n{rows}\n"


def _row(outcome: Outcome) -> str:
    cells = [
        outcome.fault.name,
        "; ".join(outcome.notes) or "–",
        _seconds(outcome.struck),
        _seconds(outcome.recovered),
        f"{outcome.fault.end or 'gone'}, {_seconds(outcome.ended)}",
        _attempts(outcome),
        "; ".join(outcome.wrongs) or "well",
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.0f} s"


def _attempts(outcome: Outcome) -> str:
    """Of the stages that took more than one; nothing is left of a job that is gone."""
    if not outcome.attempts:
        return "–"
    more = sorted((f"{stage.value} {client}".strip(), number) for (stage, client), number in outcome.attempts.items())
    return ", ".join(f"{number} × {stage}" for stage, number in more if number > 1) or "one each"


def hardware() -> str:
    return f"{os.cpu_count()} cores of {cpu_model()}, Linux {platform.release()}"
