"""docs/first-job.md, command for command: real images, a real S3 server, pods on a real node, one job of two owners.

The story runs once; each test looks at another side of what it left.
"""

import fcntl
import hashlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from botocore.exceptions import ClientError

from cluster.federation import IMAGES, ROOT, Federation, Watch, need_node, phase
from cluster.kubernetes import PROGRAMS, RUN, CommandFailed, Node, guard
from cluster.weed import ADMINISTRATOR
from feddiff_protocol import layout
from feddiff_protocol.manifest import Manifest
from feddiff_protocol.stages import Receipt, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.node]

OWNERS = ("clinic-a", "clinic-b")
NAMESPACES = ("research", *OWNERS)
PHASES = ("Pending", "Reserving", "Releasing", "Training", "Sampling", "Evaluating", "Complete")
CONDITIONS = {
    *("Accepted", "BudgetReserved", "Released", "SharedTrained", "PersonalTrained", "Evaluated"),
    *("Suspended", "Complete", "Failed"),
}
OF_THE_JOB = (Stage.TRAIN_SHARED, Stage.REPORT)
PAGE = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/first-job.md").read_text(), re.MULTILINE | re.DOTALL)
Object = dict[str, Any]


class Shell:
    """The reader's terminal: what a command sets, or starts in the background, is there for the next one."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}:{PROGRAMS}:{os.environ['PATH']}"
        first = {"FIRST": str(folder), "IMAGES": str(IMAGES), "KUBECACHEDIR": f"{folder}/discovery"}
        self._environment = {**os.environ, "PATH": path, "NO_PROXY": "*", **first}

    def __enter__(self) -> Self:
        command = ["bash", "-eu"]
        self._bash = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment,
            stdin=-1,
            stdout=-1,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._bash.communicate()

    def kill(self) -> None:
        self._bash.kill()

    def run(self, block: str) -> None:
        """The commands have been run. Raises CommandFailed with what they printed when one of them failed."""
        assert self._bash.stdin and self._bash.stdout
        started, printed = time.monotonic(), []
        self._bash.stdin.write(f"{block}\necho '{END}'\n")
        for line in self._bash.stdout:
            if line.strip() == END:
                return print(f"{time.monotonic() - started:6.1f} s  {block.splitlines()[0]}")
            printed.append(line)
        raise CommandFailed(f"{block}\n{''.join(printed)}")


END = "-- end of the block --"


@dataclass
class Story(Federation):
    """What the page's commands left, and what could be seen meanwhile."""

    shell: Shell
    statuses: list[Object] = field(default_factory=list)  # all of the job's, in order

    @property
    def first_job(self) -> Object:
        return self.job("first-job")

    @property
    def uid(self) -> str:
        return self.first_job["metadata"]["uid"]

    def no_use_waiting(self, status: Object) -> None:
        """For the job to be Complete, once it has Failed."""
        if status["phase"] == "Failed":
            self.shell.kill()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    need_node()
    folder = tmp_path_factory.mktemp("first-job")
    story = Story(folder, Node(folder / "node"), OWNERS, Shell(folder))
    with RUN.with_suffix(".lock").open("w") as lock, story.shell:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one node a machine
        watchman = guard(story.node.directory)
        try:
            _tell(story)
            yield story
        finally:
            story.node.down()
            story.node.forget_images()
            watchman.kill()
            watchman.communicate()


def _tell(story: Story) -> None:
    """Everything on the page happens, but for what `make` and the tests' environment have done, up to *Afterwards*."""
    blocks = PAGE[1:-2]
    (applied,) = (number for number, block in enumerate(blocks) if "job.yaml" in block)
    _type(story, blocks[:applied])
    with Watch(story, "first-job", story.no_use_waiting) as watch:
        _type(story, blocks[applied:])
        watch.until(phase("Complete"), 10)
    story.statuses = watch.statuses


def _type(story: Story, blocks: list[str]) -> None:
    for block in blocks:
        try:
            story.shell.run(block)
        except CommandFailed as error:
            pytest.fail(f"{error}\n{story.what_went_wrong()}", pytrace=False)


# ---- What the page's commands led to


def test_the_job_went_through_its_phases_in_order(story: Story) -> None:
    phases = [phase for phase, _ in itertools.groupby(status["phase"] for status in story.statuses)]
    assert phases == sorted(set(phases), key=PHASES.index)
    assert {"Releasing", "Training", "Sampling", "Complete"} <= set(phases)
    for status in story.statuses:
        assert {each["type"] for each in status["conditions"]} == CONDITIONS, status["phase"]
    status = story.first_job["status"]
    true = {each["type"] for each in status["conditions"] if each["status"] == "True"}
    assert true == CONDITIONS - {"Suspended", "Failed"}
    assert (status["clientsSummary"], status["trainer"], status["progress"]) == ("2/2", "2/2", "100 %")
    assert (status["counted"], status["dropped"]) == (list(OWNERS), [])


def test_events_tell_the_story_once(story: Story) -> None:
    events = story.events("first-job")
    reasons = [event["reason"] for event in events]
    assert {"Releasing", "Training", "Sampling", "Complete"} <= set(reasons)
    assert len(reasons) == len(set(reasons)), reasons
    assert {event["type"] for event in events} == {"Normal"}


def test_every_stage_ran_once_and_left_its_receipt(story: Story) -> None:
    jobs = story.children(story.uid, "jobs")
    found = set()
    for job in jobs:
        labels, annotations = job["metadata"]["labels"], job["metadata"]["annotations"]
        receipt = Receipt.model_validate_json(annotations["feddiff.dev/receipt"])
        assert (receipt.job_uid, receipt.attempt) == (story.uid, 1)
        assert (receipt.stage, receipt.client) == (labels["feddiff.dev/stage"], labels.get("feddiff.dev/client", ""))
        found.add((receipt.stage, receipt.client, job["metadata"]["namespace"]))
    of_owners = {(stage, owner, owner) for stage in Stage for owner in OWNERS if stage not in OF_THE_JOB}
    assert found == of_owners | {(stage, "", "research") for stage in OF_THE_JOB}
    assert len(jobs) == len(found)


def test_two_pods_trained_the_shared_denoiser_together(story: Story) -> None:
    jobs = story.children(story.uid, "jobs")
    (job,) = (each for each in jobs if each["metadata"]["labels"]["feddiff.dev/stage"] == Stage.TRAIN_SHARED)
    assert (job["spec"]["completions"], job["status"]["succeeded"]) == (2, 2)
    receipt = Receipt.model_validate_json(job["metadata"]["annotations"]["feddiff.dev/receipt"])
    stored = story.object("trainer", "federation", f"jobs/{layout.shared_denoiser(story.uid)}")
    assert hashlib.sha256(stored).hexdigest() == receipt.outputs["denoiser"]


def test_the_ledger_names_the_manifests_that_lie_in_the_bucket(story: Story) -> None:
    for owner in OWNERS:
        (entry,) = story.get("prl", "-n", owner)
        assert entry["status"]["phase"] == "Charged"
        stored = story.object("trainer", "federation", f"jobs/{layout.manifest(story.uid, owner)}")
        assert entry["status"]["manifestSha256"] == hashlib.sha256(stored).hexdigest()
        manifest = Manifest.from_bytes(stored, owner)
        assert (manifest.client, manifest.release) == (owner, entry["metadata"]["name"])
        for shard in manifest.shards:
            key = f"jobs/{layout.released_shard(story.uid, owner, shard.name)}"
            assert hashlib.sha256(story.object("trainer", "federation", key)).hexdigest() == shard.sha256
        (dataset,) = story.get("pds", "-n", owner)
        assert float(dataset["status"]["budget"]["spent"]) == pytest.approx(10, abs=0.01)
        assert {"type": "LedgerConsistent", "status": "True"}.items() <= _condition(dataset, "LedgerConsistent").items()


def _condition(obj: Object, name: str) -> Object:
    return next(each for each in obj["status"]["conditions"] if each["type"] == name)


def test_buckets_hold_what_the_layout_names_and_nothing_else(story: Story) -> None:
    assert strays(story) == []
    for owner in OWNERS:
        (release,) = (each["metadata"]["name"] for each in story.get("prl", "-n", owner))
        assert f"feddiff/{layout.seal(release)}" in story.keys(owner)
        report = story.object(owner, owner, _report_key(story, owner)).decode()
        assert report.lower().startswith("<!doctype html>") and owner in report
    report = story.object("trainer", "federation", f"jobs/{layout.job_report(story.uid)}").decode()
    assert report.lower().startswith("<!doctype html>") and all(owner in report for owner in OWNERS)


def test_an_object_elsewhere_would_be_found(story: Story) -> None:
    for bucket, key in (
        ("federation", f"jobs/{story.uid}/clients/clinic-c/shards/0"),
        ("federation", "jobs/another-uid/clients/clinic-a/probe-0"),
        ("clinic-a", f"feddiff/jobs/{story.uid}/clinic-b/samples.safetensors"),
    ):
        story.s3(ADMINISTRATOR).put_object(Bucket=bucket, Key=key, Body=b"-")
        assert strays(story) == [f"{bucket}/{key}"]
        story.s3(ADMINISTRATOR).delete_object(Bucket=bucket, Key=key)


def strays(story: Story) -> list[str]:
    """Objects that lie where the layout has no place for them."""
    uid = story.uid
    released = tuple(
        f"federation/jobs/{place}"
        for owner in OWNERS
        for place in (f"{layout.client_prefix(uid, owner)}shards/", layout.manifest(uid, owner))
    )
    kept = (layout.shared_denoiser, layout.shared_samples, layout.shared_checkpoints, layout.job_report)
    made_by_the_job = tuple(f"federation/jobs/{of(uid)}" for of in kept)
    private = tuple(f"{owner}/feddiff/{layout.owner_prefix(uid, owner)}" for owner in OWNERS)
    sealed = tuple(
        f"{each['metadata']['namespace']}/feddiff/{layout.release_prefix(each['metadata']['name'])}"
        for each in story.entries()
    )
    known = (*released, *made_by_the_job, *private, *sealed)
    found = {bucket: story.keys(bucket) for bucket in ("federation", *OWNERS)}
    paths = [f"{bucket}/{key}" for bucket, keys in found.items() for key in keys]
    return [path for path in paths if not path.startswith(known)]


def test_an_owners_keys_open_what_is_its_own(story: Story) -> None:
    theirs = f"jobs/{layout.manifest(story.uid, 'clinic-b')}"
    attempts = {
        "write below the other's prefix": ("federation-clinic-a", "put_object", "federation", theirs),
        "delete below the other's prefix": ("federation-clinic-a", "delete_object", "federation", theirs),
        "replace the shared denoiser": (
            "federation-clinic-a", "put_object", "federation", f"jobs/{layout.shared_denoiser(story.uid)}",
        ),
        "read the other's bucket": ("clinic-a", "get_object", "clinic-b", _report_key(story, "clinic-b")),
        "list the other's bucket": ("clinic-a", "list_objects_v2", "clinic-b", ""),
        "write into the other's bucket": ("clinic-a", "put_object", "clinic-b", "feddiff/x"),
        "read it with the federation's key": (
            "federation-clinic-a", "get_object", "clinic-b", _report_key(story, "clinic-b"),
        ),
        "read it as the job": ("trainer", "get_object", "clinic-b", _report_key(story, "clinic-b")),
    }  # fmt: skip
    for what, (identity, call, bucket, key) in attempts.items():
        place = {"Prefix": key} if call == "list_objects_v2" else {"Key": key}
        with pytest.raises(ClientError, match=r"AccessDenied|Forbidden|403"):
            getattr(story.s3(identity), call)(Bucket=bucket, **place)
            pytest.fail(f"clinic-a could {what}")
    assert story.object("federation-clinic-a", "federation", theirs)  # what is released is for all owners to read
    assert story.object("clinic-b", "clinic-b", _report_key(story, "clinic-b"))


def _report_key(story: Story, owner: str) -> str:
    return f"feddiff/{layout.owner_report(story.uid, owner)}"


def test_pods_lived_under_the_restrictions_and_held_no_token(story: Story) -> None:
    pods = story.children(story.uid, "pods")
    assert len(pods) == 4 * len(OWNERS) + 2 + 1
    assert {pod["metadata"]["name"]: liberties(pod) for pod in pods if liberties(pod)} == {}
    for namespace in NAMESPACES:
        with pytest.raises(CommandFailed, match="violates PodSecurity"):
            story.node.kubectl("run", "bold", "-n", namespace, "--image=localhost/pause:1", "--privileged")


def test_a_pod_with_a_token_would_be_found(story: Story) -> None:
    """The operator's own is one: it talks to the API server, so it holds a token."""
    for pod in story.get("pods", "-n", "feddiff-system"):
        assert liberties(pod) == ["a token is mounted", "a volume that no stage needs"]


def liberties(pod: Object) -> list[str]:
    """What the pod may do or holds, and a stage must not."""
    spec = pod["spec"]
    (container,) = spec["containers"]
    security = spec["securityContext"] | container["securityContext"]
    found = {
        "a token is mounted": spec.get("automountServiceAccountToken") is not False,
        "a volume that no stage needs": any(
            {"projected", "secret", "hostPath"} & each.keys() for each in spec["volumes"]
        ),
        "it may be root": not security.get("runAsNonRoot"),
        "its root can be written": not security.get("readOnlyRootFilesystem"),
        "it has capabilities": security.get("capabilities") != {"drop": ["ALL"]},
    }
    return [what for what, is_so in found.items() if is_so]


def test_what_is_left_afterwards_is_the_ledger(story: Story) -> None:
    entries = {each["metadata"]["uid"] for each in story.entries()}
    uid = story.uid
    story.shell.run(PAGE[-2])
    assert {each["metadata"]["uid"] for each in story.entries()} == entries
    children = ("jobs,pods,configmaps,services", "--all-namespaces", "-l", f"feddiff.dev/job-uid={uid}")
    for left in (story.get(*children), story.get("deployments,pods", "-n", "feddiff-system")):
        assert [each["metadata"]["name"] for each in left if "deletionTimestamp" not in each["metadata"]] == []
    story.shell.run(PAGE[-1])
    assert story.node.processes.running() == []
