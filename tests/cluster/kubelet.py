"""A kubelet that runs nothing: it answers for every pod of the stages as a test tells it to.

Without a scheduler pods belong to no node, so they vanish as soon as they are deleted.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp

from feddiff_operator.cluster import CONFIG_MAP, POD, Cluster, Conflict
from feddiff_protocol.layout import release_name
from feddiff_protocol.stages import Receipt, Stage

Object = dict[str, Any]
OUTPUTS = {Stage.RELEASE: "manifest", Stage.TRAIN_SHARED: "denoiser", Stage.REPORT: "report"}


class Kubelet:
    """Every pod in these namespaces (all unless said) runs, and ends as `outcome(pod, spec)` says: an exit code, None
    to go on running."""

    def __init__(
        self,
        cluster: Cluster,
        outcome: Callable[[Object, Object], int | None] | None = None,
        namespaces: Iterable[str | None] = (None,),
    ) -> None:
        self.cluster, self.outcome, self.namespaces = cluster, outcome or (lambda pod, spec: 0), tuple(namespaces)
        self.specs: dict[str, list[Object]] = defaultdict(list)  # what stages were told, by stage and client
        self._done: set[tuple[str, str]] = set()
        self.leaving = False

    async def run(self) -> None:
        """Until it is `leaving`, between two looks: a request that is cut off leaves its connection half closed."""
        while not self.leaving:
            for namespace in self.namespaces:
                for pod in await self.cluster.list(POD, namespace, "feddiff.dev/job-uid"):
                    with suppress(Conflict):  # deleted meanwhile
                        await self._look_at(pod)
            await asyncio.sleep(0.05)

    async def follow(self, session: aiohttp.ClientSession) -> None:
        """The same for the pods of all namespaces, by one watch: however many there are, each is looked at when it
        changes."""
        query = {"watch": "true", "labelSelector": "feddiff.dev/job-uid"}
        while True:
            async with session.get(POD.path(None), params=query) as answer:
                async for line in answer.content:
                    event = json.loads(line)
                    if event["type"] in ("ADDED", "MODIFIED") and _of_a_stage(event["object"]):
                        with suppress(Conflict):
                            await self._look_at(event["object"])

    async def _look_at(self, pod: Object) -> None:
        metadata = pod["metadata"]
        phase = pod["status"]["phase"]
        if phase in ("Succeeded", "Failed") or metadata.get("deletionTimestamp"):
            return
        if phase == "Pending":
            await self._patch(pod, "Running", {"running": {"startedAt": _now()}})
            return
        spec = await self._spec(pod)
        code = self.outcome(pod, spec) if spec else None
        if spec is None or code is None:
            return
        labels = metadata["labels"]
        if (metadata["uid"], "told") not in self._done:
            self._done.add((metadata["uid"], "told"))
            self.specs[f"{labels['feddiff.dev/stage']}/{labels.get('feddiff.dev/client', '')}"].append(spec)
        ended = {
            "exitCode": code,
            "startedAt": _now(),
            "finishedAt": _now(),
            "reason": "Error" if code else "Completed",
        }
        if code == 0:
            ended["message"] = receipt_of(spec)
        await self._patch(pod, "Failed" if code else "Succeeded", {"terminated": ended})

    async def _spec(self, pod: Object) -> Object | None:
        name = next(each["configMap"]["name"] for each in pod["spec"]["volumes"] if each["name"] == "spec")
        found = await self.cluster.get(CONFIG_MAP, pod["metadata"]["namespace"], name)
        return json.loads(found["data"]["spec.json"]) if found else None

    async def _patch(self, pod: Object, phase: str, state: Object) -> None:
        status = {"name": "stage", "image": "x", "imageID": "x", "ready": phase == "Running", "restartCount": 0}
        body: Object = {"status": {"phase": phase, "containerStatuses": [{**status, "state": state}]}}
        ready = {"type": "Ready", "status": "True" if phase == "Running" else "False", "lastTransitionTime": _now()}
        body["status"]["conditions"] = [ready]
        path = POD.path(pod["metadata"]["namespace"], pod["metadata"]["name"], "status")
        answer = await self.cluster._call("PATCH", path, {}, body, "application/merge-patch+json")
        answer.changed()


def _of_a_stage(pod: Object) -> bool:
    """Whether an operator made it: other tests leave pods that only look like it."""
    return any(volume["name"] == "spec" for volume in pod["spec"].get("volumes", ()))


def receipt_of(spec: Object) -> str:
    """What the stage would hand over: outputs that follow from its job, stage and client."""
    stage = Stage(spec["stage"])
    digest = release_name(spec["job"]["uid"], stage.value, spec.get("client", ""))[4:].ljust(64, "0")
    outputs = {OUTPUTS[stage]: digest} if stage in OUTPUTS else {}
    receipt = Receipt(
        stage=stage,
        job_uid=spec["job"]["uid"],
        client=spec.get("client", ""),
        attempt=spec["attempt"],
        outputs=outputs,
        milliseconds=1000,
    )
    return receipt.to_line()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
