"""The judge of every fault finds what is wrong, in what real releases of two owners left."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from cluster.chaos import DIGITS, FAULTS, OWNERS, dataset_spec, job_document
from cluster.evidence import Evidence, wrongs
from cluster.gate import Write
from feddiff_protocol import layout, ledger
from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset, parse
from feddiff_protocol.ledger import Entry, Phase
from feddiff_protocol.ledger_objects import account_object, release_object, with_status_of
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import Places, ReleaseSpec, release_spec
from feddiff_trainer.noise import os_entropy_normals
from feddiff_trainer.release import release
from feddiff_trainer.stores import FolderStore

UID = "0d9f3a10-0000-4000-8000-000000000000"
JOB = parse(FederatedDiffusionJob, job_document("job", FAULTS[0]), "job")
COUNTS = [3] * DIGITS


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """Of a job that both owners have released to, each in two attempts."""
    folder = tmp_path_factory.mktemp("stores")
    federation = FolderStore(f"file://{folder}/federation")
    datasets, entries, stores = {}, [], {}
    for owner in OWNERS:
        spec, store = spec_of(folder, owner), FolderStore(f"file://{folder}/{owner}")
        places = {"owner_store": store, "federation_store": federation}
        manifests = {release(spec, **places, normals=os_entropy_normals()) for _ in range(2)}
        (manifest,) = manifests
        entry = entry_of(spec, manifest)
        entries.append(with_status_of(release_object(owner, "scans", entry), entry))
        datasets[owner] = dataset_with(owner, entry)
        stores[owner] = {key: store.get(key) for key in store.list("releases/")}
    released = {key: federation.get(key) for key in federation.list(f"{UID}/")}
    writes = [
        Write(f"/federation/jobs/{key}", hashlib.sha256(data).hexdigest(), status)
        for key, data in released.items()
        for status in (None, 200, 412)
    ]
    return Evidence(UID, datasets, entries, stores, released, [], writes)


def spec_of(folder: Path, owner: str) -> ReleaseSpec:
    images = np.random.default_rng(0).random((sum(COUNTS), 8, 8), dtype=np.float32)
    np.savez(folder / f"{owner}.npz", images=images, labels=np.repeat(np.arange(DIGITS), COUNTS))
    described = {"kind": "PrivateDataset", "apiVersion": "feddiff.dev/v1alpha1", "metadata": metadata(owner)}
    dataset = parse(PrivateDataset, {**described, "spec": dataset_spec(owner, COUNTS)}, owner)
    source = dataset.spec.source.model_copy(update={"path": str(folder / f"{owner}.npz")})
    stores = {"federation_store": "s3://federation/jobs", "owner_stores": {owner: f"s3://{owner}/feddiff"}}
    return release_spec(JOB, UID, owner, dataset, Places(sources={owner: source}, **stores), 1)


def metadata(owner: str) -> dict[str, str]:
    return {"name": "scans", "namespace": owner, "uid": f"uid-of-{owner}"}


def entry_of(spec: ReleaseSpec, manifest: str) -> Entry:
    return Entry(
        name=spec.release,
        dataset_uid=f"uid-of-{spec.client}",
        job_namespace="research",
        job_name="job",
        job_uid=UID,
        client=spec.client,
        mechanism="summary",
        unit="image",
        epsilon=Decimal(1),
        delta=Decimal("1e-5"),
        charge=promise_of(JOB.spec.privacy, JOB.spec.diffusion).charge,
        reserved_at="2026-01-01T00:00:00Z",
        phase=Phase.CHARGED,
        manifest_sha256=manifest,
    )


def dataset_with(owner: str, entry: Entry) -> dict:
    return {"metadata": metadata(owner), "status": {"account": account_object("scans", ledger.adopt([entry]))}}


def test_two_releases_in_order_are_in_order(evidence: Evidence) -> None:
    assert wrongs(evidence) == []
    assert len(evidence.released) == 2 * len(OWNERS)


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
def test_what_is_wrong_is_found(evidence: Evidence, mutant: str) -> None:
    assert wrongs(MUTANTS[mutant](evidence)) != []


def test_a_late_shard_of_a_job_that_was_deleted_is_in_order_as_long_as_it_is_the_sealed_one(evidence: Evidence) -> None:
    def unheard_of(entry: dict) -> list[dict]:
        return [{**entry, "status": {"phase": "Charged"}}]

    key = layout.manifest(UID, "clinic-a")
    late = dataclasses.replace(evidence, released={k: v for k, v in evidence.released.items() if k != key})
    late = in_the_ledger(unheard_of)(late)
    assert wrongs(late, has_released=False) == []
    assert wrongs(late) != []
    assert wrongs(changed("shards/shard-00000.safetensors")(late), has_released=False) != []
