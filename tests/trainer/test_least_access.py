"""The least policies on a real S3 server: a whole job runs with them, and no party touches what is another's.

Both owners' stores lie in one bucket, where only the policies part them, and one name begins with the other.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import ClientError

from cluster.weed import Weed
from feddiff_protocol import layout
from feddiff_protocol.access import Access, Role, least_access, seaweedfs_actions
from feddiff_protocol.api import parse
from feddiff_protocol.errors import FeddiffError
from feddiff_protocol.stages import (
    BudgetLine,
    EvaluateSpec,
    ReleaseSpec,
    ReportSpec,
    SampleSpec,
    TrainPersonalSpec,
    TrainSharedSpec,
)
from feddiff_trainer import evaluate, release, report, sample, train_personal, train_shared

pytestmark = pytest.mark.usefixtures("one_thread")

UID = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
CLIENTS = ("client-1", "client-10")
FEDERATION, OWNERS = "s3://federation/jobs", "s3://owners"
COUNTS = (20, 20)


def trusting(access: Access, uri: str) -> list[str]:
    """The mutant: a star where the uid stands, and prefixes that do not end in a slash."""
    actions = seaweedfs_actions(access, uri)
    return [
        each.replace("????????-????-????-????-????????????", "*").replace("client-1/*", "client-1*") for each in actions
    ]


def identities() -> dict[str, list[str]]:
    may = {"trainer": seaweedfs_actions(least_access(Role.TRAINER), FEDERATION)}
    for client in CLIENTS:
        may[f"owner {client}"] = seaweedfs_actions(least_access(Role.OWNER), f"{OWNERS}/{client}")
        may[f"federation {client}"] = seaweedfs_actions(least_access(Role.FEDERATION, client), FEDERATION)
    may["trusted owner client-1"] = trusting(least_access(Role.OWNER), f"{OWNERS}/client-1")
    may["trusted federation client-1"] = trusting(least_access(Role.FEDERATION, "client-1"), FEDERATION)
    return may


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with Weed(tmp_path_factory.mktemp("s3"), identities(), ["federation", "owners"]) as server:
        yield server


# ---- A whole job -------------------------------------------------------------------------------------------------


def write_records(path: Path, seed: int) -> None:
    labels_N = np.repeat(np.arange(len(COUNTS)), COUNTS)
    images_NCHW = np.random.default_rng(seed).uniform(0.0, 0.3, (len(labels_N), 1, 4, 4))
    for label in range(len(COUNTS)):
        images_NCHW[labels_N == label, :, 2 * label : 2 * label + 2] += 0.6
    np.savez(path, images=images_NCHW, labels=labels_N)


def common(folder: Path) -> dict[str, Any]:
    return {
        "job": {"uid": UID, "name": "digits", "namespace": "research"},
        "attempt": 1,
        "image": {"channels": 1, "height": 4, "width": 4},
        "classes": {"count": 2, "records": list(COUNTS)},
        "privacy": {"mechanism": "gaussian", "clipNorm": "1", "epsilon": "10", "delta": "1e-5"},
        "diffusion": {},
        "federationStore": FEDERATION,
    }


TRAINING = {"network": {"baseWidth": 8}, "shared": {"images": 64, "batch": 32}}
PERSONAL = {**TRAINING, "personal": {"images": 64, "batch": 32}}


def of_owner(folder: Path, client: str) -> dict[str, Any]:
    source = {"format": "npz", "path": str(folder / f"{client}.npz")}  # no hold-out: measuring would take a minute
    return common(folder) | {"client": client, "source": source, "ownerStore": f"{OWNERS}/{client}"}


class Job:
    """A job of two owners, each stage with the keys of its party alone in the environment."""

    def __init__(self, server: Weed, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.releases: list[dict[str, str]] = []
        self.shared_sha256 = ""

    def as_party(self, body: Callable[[Any], Any], spec: Any, keys: dict[str, str]) -> Any:
        with pytest.MonkeyPatch.context() as environment:
            for prefix, identity in keys.items():
                for name, value in self.server.environment(identity).items():
                    environment.setenv(f"{prefix}_{name}", value)
            return body(spec)

    def as_owner(self, body: Callable[[Any], Any], spec: Any, client: str) -> Any:
        return self.as_party(body, spec, {"OWNER": f"owner {client}", "FEDERATION": f"federation {client}"})

    def as_trainer(self, body: Callable[[Any], Any], spec: Any) -> Any:
        return self.as_party(body, spec, {"FEDERATION": "trainer"})

    def release(self, client: str) -> str:
        write_records(self.folder / f"{client}.npz", seed=len(client))
        document = of_owner(self.folder, client) | {"release": layout.release_name(UID, client, "dataset")}
        outputs = self.as_owner(release.body, parse(ReleaseSpec, document, "release"), client)
        return str(outputs["manifest"])

    def run(self) -> None:
        self.releases = [{"client": client, "manifestSha256": self.release(client)} for client in CLIENTS]
        told = {"releases": self.releases}
        shared = {key: value for key, value in common(self.folder).items() if key != "classes"} | {"numClasses": 2}
        document = shared | told | TRAINING | {"sampling": {"steps": 4}}
        outputs = self.as_trainer(train_shared.body, parse(TrainSharedSpec, document, "shared"))
        (self.shared_sha256,) = outputs.values()
        for client in CLIENTS:
            self.owner_stages(client, told)
        budget = BudgetLine(
            client="client-1",
            budget_epsilon="20",
            spent_epsilon="10",
            remaining_epsilon="9",
            delta="1e-5",
            num_releases=1,
        )
        document = common(self.folder) | told | {"shared": {}, "budgets": [budget.to_wire()], "command": "run"}
        document |= {"durations": [], "sharedDenoiserSha256": self.shared_sha256}
        self.as_trainer(report.body, parse(ReportSpec, document, "report"))

    def owner_stages(self, client: str, told: dict[str, Any]) -> None:
        document, sampling = of_owner(self.folder, client) | told | PERSONAL, {"imagesPerClass": 20, "steps": 4}
        self.as_owner(train_personal.body, parse(TrainPersonalSpec, document, "personal"), client)
        drawn = document | {"sampling": sampling, "sharedDenoiserSha256": self.shared_sha256}
        self.as_owner(sample.body, parse(SampleSpec, drawn, "sample"), client)
        self.as_owner(evaluate.body, parse(EvaluateSpec, document | {"sampling": sampling}, "evaluate"), client)


@pytest.fixture(scope="module")
def job(server: Weed, tmp_path_factory: pytest.TempPathFactory) -> Job:
    done = Job(server, tmp_path_factory.mktemp("job"))
    done.run()
    return done


def keys(server: Weed, bucket: str) -> list[str]:
    return [each["Key"] for each in server.client().list_objects_v2(Bucket=bucket)["Contents"]]


def test_every_stage_of_a_job_runs_with_the_least_policies(job: Job, server: Weed) -> None:
    federation, owners = keys(server, "federation"), keys(server, "owners")
    for client in CLIENTS:
        assert f"jobs/{layout.manifest(UID, client)}" in federation
        for made in (layout.personal_denoiser, layout.samples, layout.evaluation, layout.owner_report):
            assert f"{client}/{made(UID, client)}" in owners
    assert f"jobs/{layout.job_report(UID)}" in federation
    assert not [key for key in federation + owners if layout.PROBE in key]


def test_a_release_with_the_keys_of_another_client_sends_nothing(job: Job, server: Weed) -> None:
    before = keys(server, "federation")
    document = of_owner(job.folder, "client-10") | {"release": layout.release_name(UID, "client-10", "again")}
    document["ownerStore"] = f"{OWNERS}/client-1"
    with pytest.raises(FeddiffError, match="who may use it"):
        job.as_owner(release.body, parse(ReleaseSpec, document, "release"), "client-1")
    assert keys(server, "federation") == before


# ---- What else the keys open -------------------------------------------------------------------------------------


def open_to(client: Any, bucket: str, key: str) -> list[str]:
    """Which operations on `key`, and on the list of what lies beside it, the server grants."""
    where, beside = {"Bucket": bucket, "Key": key}, {"Bucket": bucket, "Prefix": f"{key.rpartition('/')[0]}/"}
    operations: dict[str, Callable[[], Any]] = {
        "read": lambda: client.get_object(**where),
        "list": lambda: client.list_objects_v2(**beside),
        "list versions": lambda: client.list_object_versions(**beside),
        "create": lambda: client.put_object(**where, Body=b"forged", IfNoneMatch="*"),
        "write": lambda: client.put_object(**where, Body=b"forged"),
        "copy": lambda: client.copy_object(Bucket=bucket, Key="copy", CopySource=f"{bucket}/{key}"),
        "delete": lambda: client.delete_object(**where),
        "delete many": lambda: _raise_errors(client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key}]})),
    }
    return [name for name, operation in operations.items() if _granted(operation)]


def _raise_errors(answer: Any) -> None:
    for each in answer.get("Errors", []):
        raise ClientError({"Error": each}, "DeleteObjects")


def _granted(operation: Callable[[], Any]) -> bool:
    """Anything but a denial counts: the server may find fault with a request that it would have let in."""
    try:
        operation()
    except ClientError as error:
        return error.response["Error"]["Code"] not in {"AccessDenied", "403", "Forbidden"}
    return True


def trespasses(server: Weed, identity: str, places: dict[str, tuple[str, str]]) -> dict[str, list[str]]:
    """What `identity` may do in places where it should be able to do nothing."""
    client = server.client(identity)
    granted = {what: open_to(client, *place) for what, place in places.items()}
    return {what: operations for what, operations in granted.items() if operations}


def planted(server: Weed, *places: tuple[str, str]) -> dict[str, tuple[str, str]]:
    for bucket, key in places:
        server.client().put_object(Bucket=bucket, Key=key, Body=b"theirs")
    return {key: (bucket, key) for bucket, key in places}


def closed_to_client_1_in_the_federation(server: Weed) -> dict[str, tuple[str, str]]:
    theirs = layout.client_prefix(UID, "client-10")
    return planted(
        server,
        ("federation", f"jobs/{theirs}draft"),
        ("federation", f"jobs/{theirs}clients/client-1/draft"),  # a star in the policy would open this
        ("federation", f"jobs/{layout.shared_samples(UID)}"),
        ("federation", f"jobs/{layout.job_prefixes(UID)[0]}checkpoints/1"),
        ("federation", f"jobs/{layout.job_report(UID)}"),
        ("federation", "elsewhere/object"),
        ("owners", f"client-10/{layout.seal('prl-1')}"),
        ("owners", f"client-1/{layout.seal('prl-1')}"),
    )


def closed_to_owner_1(server: Weed) -> dict[str, tuple[str, str]]:
    return planted(
        server,
        ("owners", f"client-10/{layout.seal('prl-1')}"),
        ("owners", f"client-10/{layout.personal_denoiser(UID, 'client-10')}"),
        ("owners", "object"),
        ("federation", f"jobs/{layout.manifest(UID, 'client-10')}"),
        ("federation", f"jobs/{layout.shared_denoiser(UID)}"),
    )


def closed_to_the_trainer(server: Weed) -> dict[str, tuple[str, str]]:
    return planted(
        server,
        ("owners", f"client-1/{layout.seal('prl-1')}"),
        ("owners", f"client-10/{layout.personal_denoiser(UID, 'client-10')}"),
        ("federation", f"jobs/{layout.client_prefix(UID, 'client-1')}draft"),
        ("federation", "elsewhere/object"),
    )


def test_client_1_can_do_nothing_in_the_prefix_of_client_10_nor_in_the_trainers(server: Weed) -> None:
    places = closed_to_client_1_in_the_federation(server)
    assert trespasses(server, "federation client-1", places) == {}
    (trap,) = (what for what in places if "clients/client-1/" in what)
    assert trespasses(server, "trusted federation client-1", {trap: places[trap]}) != {}


def test_an_owners_store_is_closed_to_the_owner_beside_it(server: Weed) -> None:
    places = closed_to_owner_1(server)
    assert trespasses(server, "owner client-1", places) == {}
    seal = next(iter(places))
    assert trespasses(server, "trusted owner client-1", {seal: places[seal]}) != {}


def test_the_trainer_opens_no_owners_store_and_writes_no_release(server: Weed) -> None:
    places = closed_to_the_trainer(server)
    assert trespasses(server, "trainer", places) == {}


def test_of_what_client_10_released_the_others_read_the_release_and_no_more(server: Weed) -> None:
    """Releases are the federation's: personal training reads all of them."""
    released = planted(
        server,
        ("federation", f"jobs/{layout.manifest(UID, 'client-10')}"),
        ("federation", f"jobs/{layout.released_shard(UID, 'client-10', 'shard-00000.safetensors')}"),
    )
    for identity in ("federation client-1", "trainer"):
        assert trespasses(server, identity, released) == {what: ["read"] for what in released}
