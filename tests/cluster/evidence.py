"""What must be so after any fault: the ledger exact, no shard without a release, no second release.

`gather` reads it from the API server, from the buckets and from the gate between them; `wrongs` judges it, and knows
nothing else. What is released of one job must be in order as long as the buckets hold it, whatever became of the job.
"""

import hashlib
import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.federation import Federation, OwnFederation
from cluster.gate import Write
from cluster.weed import environment_in
from feddiff_protocol import layout
from feddiff_protocol.layout import release_name
from feddiff_protocol.ledger import Entry, Phase, inconsistency
from feddiff_protocol.ledger_objects import account_of, entry_of
from feddiff_protocol.manifest import Manifest, Seal

Object = dict[str, Any]
FEDERATION, OWN = "jobs", "feddiff"  # where in their buckets the stores begin
OF_A_CLIENT = re.compile(rf"/federation/{FEDERATION}/(?P<key>[^/]+/clients/(?P<client>[^/]+)/(?P<rest>.+))")


@dataclass(frozen=True)
class Evidence:
    uid: str  # of the job that has just ended
    datasets: Mapping[str, Object]  # that it used, by client; clients are called as their owners' namespaces
    ledger: Sequence[Object]  # the entries of all owners, for all jobs
    stores: Mapping[str, Mapping[str, bytes]]  # the owners', below releases/
    released: Mapping[str, bytes]  # the federation's store: what clients of all jobs have sent
    strays: Sequence[str]  # and what lies where the layout has no place
    writes: Sequence[Write]  # all that left the pods, whether or not it arrived

    def entries_of(self, client: str) -> list[Entry]:
        place = client, self.datasets[client]["metadata"]["name"]
        return [
            entry_of(each)
            for each in self.ledger
            if (each["metadata"]["namespace"], each["spec"]["dataset"]["name"]) == place
        ]

    def seal_of(self, release: str) -> Seal | None:
        key = layout.seal(release)
        data = next((store[key] for store in self.stores.values() if key in store), None)
        return Seal.from_bytes(data, key) if data is not None else None


def gather(
    world: Federation, uid: str, datasets: Mapping[str, str], folders: Mapping[str, Path], writes: Sequence[Write]
) -> Evidence:
    """`datasets` are the job's, by client; `folders` are owners' stores besides their buckets."""
    s3, keys = world.s3(), world.keys("federation")
    of_clients = [key for key in keys if "/clients/" in key]
    return Evidence(
        uid=uid,
        datasets={
            owner: next(each for each in world.get("pds", "-n", owner) if each["metadata"]["name"] == dataset)
            for owner, dataset in datasets.items()
        },
        ledger=world.entries(),
        stores={
            owner: _in_bucket(s3, owner, world.keys(owner)) | _in_folder(folders.get(owner)) for owner in world.owners
        },
        released={key.removeprefix(f"{FEDERATION}/"): _read(s3, "federation", key) for key in of_clients},
        strays=[key for key in keys if not re.match(rf"{FEDERATION}/[^/]+/(clients|shared|report)/", key)],
        writes=tuple(writes),
    )


def _in_bucket(s3: Any, owner: str, keys: Iterable[str]) -> dict[str, bytes]:
    releases = [key for key in keys if key.startswith(f"{OWN}/releases/")]
    return {key.removeprefix(f"{OWN}/"): _read(s3, owner, key) for key in releases}


def _in_folder(folder: Path | None) -> dict[str, bytes]:
    files = [each for each in folder.glob("releases/**/*") if each.is_file()] if folder else []
    return {str(each.relative_to(folder)): each.read_bytes() for each in files if not each.name.startswith(".")}


def _read(s3: Any, bucket: str, key: str) -> bytes:
    return bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read())


def wrongs(evidence: Evidence, has_released: bool = True) -> list[str]:
    """What is wrong, in words. `has_released` says that the job came far enough for every client's manifest."""
    return [
        *(wrong for client in evidence.datasets for wrong in _of_ledger(evidence, client, has_released)),
        *_of_released(evidence),
        *(wrong for owner in evidence.stores for wrong in _of_seals(evidence, owner)),
        *_of_writes(evidence),
        *(f"{key}: the layout has no such place" for key in evidence.strays),
    ]


def _of_ledger(evidence: Evidence, client: str, has_released: bool) -> Iterator[str]:
    """One entry of this job, charged, its manifest known; and an account that is the sum of all entries."""
    dataset, entries = evidence.datasets[client], evidence.entries_of(client)
    own = [each for each in entries if each.job_uid == evidence.uid]
    name = release_name(evidence.uid, client, dataset["metadata"]["uid"])
    if [(each.name, each.phase) for each in own] != [(name, Phase.CHARGED)]:
        yield f"{client}: its entries are {[(each.name, each.phase.value) for each in own]}, expected {name} charged"
    manifest = evidence.released.get(layout.manifest(evidence.uid, client), b"")
    if has_released and [each.manifest_sha256 for each in own] != [_sha256(manifest)]:
        yield f"{client}: the ledger's manifest is not the one in the bucket"
    account = account_of(dataset["status"])
    if account is None or account.pending:
        yield f"{client}: its account is {account}"
    elif differs := inconsistency(account, entries):
        yield f"{client}: {differs}"


def _of_released(evidence: Evidence) -> Iterator[str]:
    """Everything that any job's clients sent belongs to a charged entry, and is what its owner sealed."""
    entries = {(each.job_uid, each.client): each for each in map(entry_of, evidence.ledger)}
    for key, data in evidence.released.items():
        uid, _, client, rest = key.split("/", 3)
        entry = entries.get((uid, client))
        if entry is None:
            yield f"{key}: sent without an entry"
        elif entry.phase is not Phase.CHARGED:
            yield f"{key}: sent without a charge"
        elif not _is_sealed(evidence.seal_of(entry.name), entry, rest, data):
            yield f"{key}: not what the owner sealed"


def _is_sealed(seal: Seal | None, entry: Entry, rest: str, data: bytes) -> bool:
    if seal is None:
        return False
    if rest == "manifest.json":
        known = entry.manifest_sha256 in ("", _sha256(data))  # "": its job was deleted before it was heard of
        return known and Manifest.from_bytes(data, rest).shards == seal.shards
    return (rest.removeprefix("shards/"), _sha256(data)) in [(each.name, each.sha256) for each in seal.shards]


def _of_seals(evidence: Evidence, owner: str) -> Iterator[str]:
    """What is drawn is in the ledger, and of a sealed release nothing is left but what was sealed."""
    known = {each["metadata"]["name"] for each in evidence.ledger if each["metadata"]["namespace"] == owner}
    drawn: dict[str, dict[str, str]] = defaultdict(dict)
    for key, data in evidence.stores[owner].items():
        release, name = key.split("/")[1], key.rpartition("/")[2]
        if not name.startswith(layout.PROBE) and key != layout.seal(release):
            drawn[release][key] = _sha256(data)
    for release, found in drawn.items():
        seal = evidence.seal_of(release)
        if release not in known:
            yield f"{owner}: {release} was drawn, and no entry pays for it"
        elif seal and found != {layout.attempt_shard(release, seal.attempt, s.name): s.sha256 for s in seal.shards}:
            yield f"{owner}: {release} holds {sorted(found)}, sealed was {seal.attempt}"


def _of_writes(evidence: Evidence) -> Iterator[str]:
    """Whatever left a pod for the federation's store left it in one form alone, even where nothing arrived."""
    forms: dict[str, set[str]] = defaultdict(set)
    for write in evidence.writes:
        match = OF_A_CLIENT.fullmatch(write.path)
        if match and not match["rest"].startswith(layout.PROBE):
            forms[match["key"]].add(write.sha256)
    for key, found in forms.items():
        if len(found) > 1 or (key in evidence.released and found != {_sha256(evidence.released[key])}):
            yield f"{key}: sent in {len(found)} forms, a second release"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def leaks(secrets: Iterable[str], texts: Mapping[str, str]) -> list[str]:
    """Where a planted secret can be read."""
    return [where for where, text in texts.items() if any(secret in text for secret in secrets)]


def readable(world: OwnFederation, pages: Mapping[str, str]) -> dict[str, str]:
    """Logs, events, objects with their status, audit log, and metrics, by where they are; `pages` are the metrics of
    pods that are gone."""
    node = world.node
    kinds = ("fdj", "pds", "prl", "jobs", "pods", "events", "configmaps", "services")
    texts = {kind: node.kubectl("get", kind, "--all-namespaces", "-o", "json") for kind in kinds}
    logs = [each for each in (node.directory / "pod-logs").rglob("*.log") if each.is_file()]
    assert len(logs) > 10
    texts |= {str(log): log.read_text(errors="replace") for log in logs}
    texts["audit log"] = node.audit_log.read_text()
    for pod in world.operators():
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8080/metrics", timeout=10) as answer:
            texts[f"metrics of {pod['metadata']['name']}"] = answer.read().decode()
    return texts | {f"metrics of {pod}": page for pod, page in pages.items()}


def keys_of(world: Federation) -> set[str]:
    """Both parts of the keys of all stores."""
    files = sorted((world.folder / "s3").glob("*.env"))
    keys = {environment_in(file)[name] for file in files for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    assert len(keys) == 2 * len(files)
    return keys
