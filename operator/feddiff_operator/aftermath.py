"""What becomes of a job that has ended or is deleted, and of what it started: its attempts, its reservations, itself.

A job has a finalizer from its first look, so that it cannot vanish before its pods in other namespaces are stopped.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime

from feddiff_protocol.api import FederatedDiffusionJob
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.labels import JOB_UID, STOPPED
from feddiff_protocol.ledger import Entry, Phase
from feddiff_protocol.plan import Hold

from .children import Children
from .cluster import CONFIG_MAP, FDJ, JOB, SERVICE, Cluster, Kind, Object, Refused
from .endings import is_over, stopping
from .events import Recorder
from .ledger import ClusterLedger
from .status import expires_at
from .versions import Versions

FINALIZER = "feddiff.dev/stop-pods"


class Aftermath:
    """What is left of jobs is taken away, from the cluster and from the ledgers; every call may be a repetition."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: ClusterLedger,
        recorder: Recorder,
        clock: Callable[[], datetime],
        versions: Versions,
        understood: Callable[[Object], FederatedDiffusionJob | SpecInvalid],
    ) -> None:
        self._cluster, self._ledger, self._recorder, self._clock = cluster, ledger, recorder, clock
        self._versions, self._understood = versions, understood

    async def with_finalizer(self, found: Object) -> Object:
        """The job, sure not to vanish before its pods in other namespaces are stopped."""
        metadata = found["metadata"]
        finalizers = metadata.get("finalizers") or []
        if FINALIZER in finalizers:
            return found
        return await self._set_finalizers(metadata, [*finalizers, FINALIZER])

    async def say_farewell(self, found: Object, children: Children) -> float | None:
        """A deleted job leaves its ledger's entries, and nothing else."""
        metadata = found["metadata"]
        finalizers = metadata.get("finalizers") or []
        if FINALIZER not in finalizers:
            return None
        await self._give_back_all(found, children)
        if await self._delete_children(found, children):
            return 1.0  # until every Job is gone; its pods go with it
        await self._set_finalizers(metadata, [one for one in finalizers if one != FINALIZER])
        return None

    async def _set_finalizers(self, metadata: Object, finalizers: Sequence[str]) -> Object:
        """The job with these finalizers. Raises Conflict if it is no longer the version that was read: a merge patch
        that names a version holds for that one alone."""
        change = {"metadata": {"resourceVersion": metadata["resourceVersion"], "finalizers": list(finalizers)}}
        return self._versions.remember(await self._cluster.patch(FDJ, metadata["namespace"], metadata["name"], change))

    async def _give_back_all(self, found: Object, children: Children) -> None:
        """What is only reserved is returned; what is charged stays charged. A job that was never understood holds
        nothing."""
        job, uid = self._understood(found), found["metadata"]["uid"]
        if isinstance(job, SpecInvalid):
            return
        shown = [self._ledger.entry_of(release) for release in children.releases_of(uid)]
        charged = {each.client for each in shown if isinstance(each, Entry) and each.phase is Phase.CHARGED}
        for client in job.spec.clients:
            if client.name in charged:
                continue
            with suppress(Refused):  # who took our rights away can read in the entry that its job is gone
                if (await self._ledger.look(job, uid, client.name)).hold is Hold.RESERVED:
                    await self._ledger.give_back(job, uid, client.name)

    async def _delete_children(self, found: Object, children: Children) -> bool:
        """Whether there were any left. Read anew, and in every namespace of the job: a watch may be late."""
        uid, own = found["metadata"]["uid"], found["metadata"]["namespace"]
        places = [(kind, each) for kind in (JOB, CONFIG_MAP) for each in sorted(namespaces_of_job(found))]
        left = [await self._delete_in(found, kind, namespace, uid) for kind, namespace in [*places, (SERVICE, own)]]
        return any(left) or any(not is_over(each) for each in _within(found, children.jobs_of(uid)))

    async def _delete_in(self, found: Object, kind: Kind, namespace: str, uid: str) -> bool:
        """The same in one namespace. An owner who has taken our rights away does not hold the job back: what still
        runs there is seen by the watch."""
        try:
            left = await self._cluster.list(kind, namespace, f"{JOB_UID}={uid}")
            for child in left:
                await self._cluster.delete(kind, namespace, child["metadata"]["name"], child["metadata"]["uid"])
        except Refused as refusal:
            self._recorder.record(found, "CleanUpRefused", str(refusal), warning=True)
            return False
        return bool(left)

    async def clean_up(self, found: Object, children: Children) -> float | None:
        """An ended job keeps what cleanPodPolicy says, for as long as ttlSecondsAfterFinished says."""
        uid = found["metadata"]["uid"]
        policy = found["spec"].get("cleanPodPolicy", "Running")
        jobs, pods = _within(found, children.jobs_of(uid)), _within(found, children.pods_of(uid))
        left = [*jobs, *pods] if policy == "All" else []
        running = [each for each in jobs if not is_over(each)] if policy == "Running" else []
        if (left or running) and not await self._versions.is_current(found):
            return 0.0
        if left:
            await self._delete_children(found, children)
        for child in running:
            metadata = child["metadata"]
            change = stopping({STOPPED: "NotNeeded"})
            await self._cluster.patch(JOB, metadata["namespace"], metadata["name"], change)
        return await self._expire(found)

    async def _expire(self, found: Object) -> float | None:
        """Seconds until ttlSecondsAfterFinished has passed; then the job is deleted."""
        at = expires_at(found)
        if at is None:
            return None
        if (left := (at - self._clock()).total_seconds()) > 0:
            return left
        if not await self._versions.is_current(found):
            return 0.0
        metadata = found["metadata"]
        await self._cluster.delete(FDJ, metadata["namespace"], metadata["name"], metadata["uid"])
        return None

    async def remove_orphans(self, strangers: Iterable[Object]) -> None:
        """Jobs of an earlier job of this name, whose finalizer somebody took away. Anybody can write such labels where
        we may not delete: that hinders nobody."""
        for child in strangers:
            metadata = child["metadata"]
            with suppress(Refused):
                await self._cluster.delete(JOB, metadata["namespace"], metadata["name"], metadata["uid"])


def namespaces_of_job(found: Object) -> set[str]:
    """Where a job's children are: its own namespace, and its owners'."""
    clients = found["spec"].get("clients") or []
    return {found["metadata"]["namespace"], *(each["dataset"].get("namespace", "default") for each in clients)}


def _within(found: Object, children: Iterable[Object]) -> list[Object]:
    """Those in the job's namespaces: elsewhere anybody can write its labels."""
    namespaces = namespaces_of_job(found)
    return [each for each in children if each["metadata"].get("namespace") in namespaces]
