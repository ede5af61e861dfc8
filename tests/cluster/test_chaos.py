"""Faults on a real node: pods, operator, API server, store, network and node are broken under a running job.

Five in one job run with all tests; `make chaos` runs each in a job of its own and writes docs/reliability.md.
"""

import dataclasses
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.chaos import FAULTS, OWNERS, Fault, Laboratory, Outcome, carry_out, onboard
from cluster.evidence import Evidence, leaks, wrongs
from cluster.federation import ROOT, federation
from cluster.gate import Gate, Write
from cluster.kubernetes import NODE_ADDRESS
from cluster.reliability import page
from cluster.weed import environment_in
from feddiff_protocol import layout

pytestmark = [pytest.mark.cluster, pytest.mark.node, pytest.mark.timeout(2400)]

PAGE = os.environ.get("FEDDIFF_CHAOS", "")  # where to write what all faults led to
OUTCOMES: list[Outcome] = []


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    folder = tmp_path_factory.mktemp("chaos")
    with (
        federation(folder, OWNERS) as world,
        Gate(world.store.endpoint, NODE_ADDRESS) as gate,
        small_disk(folder / "disk") as disk,
    ):
        world.install("--set", "operator.leaseSeconds=5")
        subprocess.run([sys.executable, ROOT / "examples/digits/make_digits.py", folder / "records"], check=True)
        laboratory = Laboratory(world, gate, disk)
        onboard(laboratory, folder / "records")
        yield laboratory
    if PAGE and {each.fault.name for each in OUTCOMES} == {each.name for each in FAULTS}:
        Path(PAGE).write_text(page(OUTCOMES))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """4 MB, for whoever the stages run as."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,uid=65532,gid=65532", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def in_words(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(each, id=in_words(each), marks=() if each.in_ci else pytest.mark.chaos) for each in FAULTS],
)
def test_the_job_ends_as_if_nothing_had_happened(laboratory: Laboratory, fault: Fault) -> None:
    outcome = carry_out(laboratory, fault, len(OUTCOMES))
    OUTCOMES.append(outcome)
    print(page([outcome]).splitlines()[-1])
    assert outcome.wrongs == ()


# ---- The judge finds what is wrong


def planted(key: str, data: bytes) -> Callable[[Evidence], Evidence]:
    return lambda e: dataclasses.replace(e, released={**e.released, key.format(uid=e.uid): data})


def changed(rest: str) -> Callable[[Evidence], Evidence]:
    def change(e: Evidence) -> Evidence:
        key = f"{layout.client_prefix(e.uid, 'clinic-a')}{rest}"
        return dataclasses.replace(e, released={**e.released, key: e.released[key].replace(b"1", b"2", 1)})

    return change


def in_the_ledger(change: Callable[[dict], list[dict]]) -> Callable[[Evidence], Evidence]:
    """`change` makes of this job's entry of clinic-a the entries that take its place."""

    def changed(e: Evidence) -> Evidence:
        own, others = [], []
        for each in json.loads(json.dumps(list(e.ledger))):
            ours = (each["spec"]["job"]["uid"], each["spec"]["client"]) == (e.uid, "clinic-a")
            (own if ours else others).append(each)
        (entry,) = own
        return dataclasses.replace(e, ledger=[*others, *change(entry)])

    return changed


def renamed(entry: dict) -> dict:
    return {**entry, "metadata": {**entry["metadata"], "name": f"prl-{'0' * 40}"}}


def drawn_again(e: Evidence) -> Evidence:
    """Another attempt's shard is left beside the sealed one."""
    store = e.stores["clinic-a"]
    key = next(key for key in store if "/attempts/" in key)
    release = key.split("/")[1]
    beside = {**store, layout.attempt_shard(release, "0" * 32, "shard-00000.safetensors"): b"-"}
    return dataclasses.replace(e, stores={**e.stores, "clinic-a": beside})


def sent_again(e: Evidence) -> Evidence:
    """Other bytes left a pod, and never arrived."""
    path = f"/federation/jobs/{layout.released_shard(e.uid, 'clinic-a', 'shard-00000.safetensors')}"
    return dataclasses.replace(e, writes=[*e.writes, Write(path, "0" * 64, None)])


MUTANTS: dict[str, Callable[[Evidence], Evidence]] = {
    "a shard of nobody's": planted("{uid}/clients/clinic-c/shards/shard-00000.safetensors", b"-"),
    "a shard of another job": planted("other/clients/clinic-a/shards/shard-00000.safetensors", b"-"),
    "one shard more": planted("{uid}/clients/clinic-a/shards/shard-00001.safetensors", b"-"),
    "another shard": changed("shards/shard-00000.safetensors"),
    "another manifest": changed("manifest.json"),
    "a second entry": in_the_ledger(lambda entry: [entry, renamed(entry)]),
    "an entry under another name": in_the_ledger(lambda entry: [renamed(entry)]),
    "no entry": in_the_ledger(lambda entry: []),
    "an entry that is not charged": in_the_ledger(lambda e: [{**e, "status": {**e["status"], "phase": "Reserved"}}]),
    "an entry with another sum": in_the_ledger(
        lambda entry: [{**entry, "spec": {**entry["spec"], "charge": {"muSquared": "1"}}}]
    ),
    "drawn again": drawn_again,
    "sent again": sent_again,
    "a stray": lambda e: dataclasses.replace(e, strays=["jobs/x"]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_wrong_would_be_found(laboratory: Laboratory, mutant: str) -> None:
    if not OUTCOMES:
        OUTCOMES.append(carry_out(laboratory, FAULTS[0], 0))
    evidence = next(each.evidence for each in OUTCOMES if each.fault.end == "Complete")
    assert wrongs(evidence) == []
    assert wrongs(MUTANTS[mutant](evidence)) != []


# ---- Secrets


def test_secrets_can_be_read_nowhere(laboratory: Laboratory) -> None:
    """Faults make every part say what it rarely says: the keys of all stores are in nothing of it."""
    world = laboratory.world
    files = sorted((world.folder / "s3").glob("*.env"))
    keys = {environment_in(file)[name] for file in files for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    assert len(keys) == 2 * len(files) >= 12
    assert leaks(keys, readable(laboratory)) == []
    kubectl = world.node.kubectl
    kubectl("create", "configmap", "careless", "-n", "research", f"--from-literal=key={min(keys)}")
    assert leaks(keys, readable(laboratory)) == ["configmaps"]
    kubectl("delete", "configmap", "careless", "-n", "research")


def readable(laboratory: Laboratory) -> dict[str, str]:
    """Logs, events, objects with their status, audit log, and metrics, by where they are."""
    node = laboratory.world.node
    kinds = ("fdj", "pds", "prl", "jobs", "pods", "events", "configmaps", "services")
    texts = {kind: node.kubectl("get", kind, "--all-namespaces", "-o", "json") for kind in kinds}
    logs = [each for each in (node.directory / "pod-logs").rglob("*.log") if each.is_file()]
    assert len(logs) > 10
    texts |= {str(log): log.read_text(errors="replace") for log in logs}
    texts["audit log"] = node.audit_log.read_text()
    for pod in laboratory.world.operators():
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8080/metrics", timeout=10) as answer:
            texts[f"metrics of {pod['metadata']['name']}"] = answer.read().decode()
    return texts
