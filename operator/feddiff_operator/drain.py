"""Nothing of any job runs when the operator goes: `python -m feddiff_operator.drain`, which helm calls before it
uninstalls.

The drain takes the operator's Lease, so that no replica works meanwhile. Then it goes the same way with every job:
its Jobs are suspended, their pods end, Jobs, ConfigMaps and Services are deleted, and the finalizer, which nobody
would take away any more, is removed. The jobs themselves and every entry of a ledger stay as they are: an operator
installed later goes on with new attempts, and the releases that were made are made.
"""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol

from kubernetes.aio.config import ConfigException

from feddiff_protocol.errors import ConfigurationInvalid, FeddiffError, Interrupted, UsageInvalid
from feddiff_protocol.labels import JOB_UID, MANAGER, STOPPED

from .aftermath import FINALIZER, namespaces_of_job
from .cluster import (
    CONFIG_MAP,
    FDJ,
    JOB,
    LEASE,
    POD,
    SERVICE,
    Cluster,
    Conflict,
    Kind,
    Object,
    Objects,
    Refused,
    Unavailable,
)
from .endings import is_over, stopping

REASON = "Uninstalled"
HOLDER, DRAINED = "drain", "drained"  # in the Lease: while it lasts, and afterwards
TERM_SECONDS = 15  # where the Lease does not say how long its leader leads
AFTERWARDS_SECONDS = 300  # for so long no replica begins anew: helm deletes the operator meanwhile
PAUSE_SECONDS = 1.0  # between two looks
MOST_NAMED = 10
QPS, BURST = 50.0, 100


class Server(Protocol):
    """What the drain needs of the API server."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None: ...
    async def list(self, kind: Kind, namespace: str | None, labels: str = "") -> Objects: ...
    async def patch(self, kind: Kind, namespace: str, name: str, body: Object) -> Object: ...
    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> None: ...


# ---- What to do, from what one look has found --------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """One job's share of a look. `job` is None where children have outlived theirs."""

    job: Object | None = None
    jobs: Sequence[Object] = ()  # its batch Jobs
    pods: Sequence[Object] = ()
    others: Sequence[tuple[Kind, Object]] = ()  # its ConfigMaps and Services


@dataclass(frozen=True)
class Suspend:
    """The Job controller ends the pods with SIGTERM; the annotation says why."""

    child: Object


@dataclass(frozen=True)
class Delete:
    """A Job of which nothing runs, or what belonged to one."""

    kind: Kind
    child: Object


@dataclass(frozen=True)
class LetGo:
    """The finalizer goes: nothing is left that it stands for."""

    job: Object


Step = Suspend | Delete | LetGo


def steps(share: Share) -> list[Step]:
    """What can be done for one job now; nothing while its pods end, or when nothing of it is left."""
    if running := [child for child in share.jobs if not is_over(child)]:
        return [Suspend(child) for child in running]
    if any(map(is_active, share.pods)):
        return []
    if share.jobs or share.others:
        return [*(Delete(JOB, child) for child in share.jobs), *(Delete(kind, child) for kind, child in share.others)]
    return [LetGo(share.job)] if share.job is not None and FINALIZER in _finalizers(share.job) else []


def what_runs(share: Share) -> list[str]:
    """What may still run of one job, in words: pods, and Jobs that are to be suspended."""
    pods = [f"pod {_place(pod)}" for pod in share.pods if is_active(pod)]
    return pods or [f"Job {_place(child)}" for child in share.jobs if not is_over(child)]


def is_active(pod: Mapping[str, Any]) -> bool:
    """Whether the pod runs or may still do so; one that is being deleted runs until it is gone."""
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def is_ours(job: Mapping[str, Any]) -> bool:
    """Whether this operator carries the job out, or has done so."""
    return (job.get("spec") or {}).get("managedBy") in (None, MANAGER) or FINALIZER in _finalizers(job)


def namespaces_of(share: Share) -> set[str]:
    """Where objects of the job can be: its own namespace, its owners', and where its Jobs are."""
    own = set() if share.job is None else namespaces_of_job(share.job)
    return own | {child["metadata"]["namespace"] for child in share.jobs}


def _finalizers(job: Mapping[str, Any]) -> list[str]:
    return job["metadata"].get("finalizers") or []


def _place(obj: Mapping[str, Any]) -> str:
    return f"{obj['metadata']['namespace']}/{obj['metadata']['name']}"


def _key(obj: Mapping[str, Any]) -> tuple[str, str]:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def _by_uid(children: Iterable[Object]) -> dict[str, Objects]:
    """The children of each job, by the uid in their label."""
    found: dict[str, Objects] = {}
    for child in children:
        found.setdefault(child["metadata"]["labels"][JOB_UID], []).append(child)
    return found


def _shortened(words: Sequence[str]) -> str:
    more = f", and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
    return ", ".join(words[:MOST_NAMED]) + more


# ---- Looking and doing -------------------------------------------------------------------------------------------


class Drain:
    """One drain; `namespaces` empty: all of them."""

    def __init__(self, cluster: Server, lease: tuple[str, str], namespaces: Sequence[str] = ()) -> None:
        self._cluster, self._lease, self._namespaces = cluster, lease, namespaces
        self.refused: dict[str, str] = {}  # the API server's words, by namespace
        self._last = "the API server does not answer"  # what kept the drain from its end when it last looked
        self._term: float = TERM_SECONDS
        self._renew_at: float | None = None  # None: the Lease is not ours yet
        self._quiet_at = 0.0  # from when on no replica can still be at work

    async def run(self, timeout_seconds: float) -> None:
        """Every job is drained, and no replica begins anew for a while.

        Raises Interrupted when time runs out: then the replicas go on at once, with new attempts of what was stopped.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                while not await self._one_look():
                    await asyncio.sleep(PAUSE_SECONDS)
                await self._write_lease({"holderIdentity": DRAINED, "leaseDurationSeconds": AFTERWARDS_SECONDS})
        except TimeoutError:
            await self._let_others()
            words = "; ".join([self._last, *self.refused.values()])
            raise Interrupted(f"not drained after {timeout_seconds:g} s, run it again; still there: {words}") from None
        except FeddiffError:
            raise
        except BaseException:
            await self._let_others()
            raise

    async def _one_look(self) -> bool:
        """Whether nothing is left; otherwise every job is one step further."""
        try:
            if not await self._alone():
                return False
            shares = await self._shares()
            todo = [step for share in shares for step in steps(share)]
            running = [words for share in shares for words in what_runs(share)]
            self._last = _shortened(running) or f"{len(todo)} objects to delete"
            for step in todo:
                if not await self._alone():
                    return False
                with contextlib.suppress(Conflict):  # the next look decides anew
                    await self._do(step)
            return not todo and not running
        except Unavailable as error:
            self._last = str(error)
            return False

    async def _do(self, step: Step) -> None:
        match step:
            case Suspend(child):
                await self._permitted(child, self._cluster.patch(JOB, *_key(child), stopping({STOPPED: REASON})))
            case Delete(kind, child):
                await self._permitted(child, self._cluster.delete(kind, *_key(child), child["metadata"]["uid"]))
            case LetGo(job):
                version = job["metadata"]["resourceVersion"]  # a merge patch with it holds for that version alone
                finalizers = [each for each in _finalizers(job) if each != FINALIZER]
                change: Object = {"metadata": {"resourceVersion": version, "finalizers": finalizers}}
                await self._permitted(job, self._cluster.patch(FDJ, *_key(job), change))

    async def _permitted(self, obj: Object, request: Awaitable[object]) -> None:
        try:
            await request
        except Refused as refusal:
            self.refused[obj["metadata"]["namespace"]] = str(refusal)

    # -- looking

    async def _shares(self) -> list[Share]:
        jobs = {job["metadata"]["uid"]: job for job in await self._everywhere(FDJ)}
        children, pods = _by_uid(await self._everywhere(JOB, JOB_UID)), _by_uid(await self._everywhere(POD, JOB_UID))
        ours = [uid for uid in {**jobs, **children, **pods} if uid not in jobs or is_ours(jobs[uid])]
        shares = {uid: Share(jobs.get(uid), children.get(uid, ()), pods.get(uid, ())) for uid in ours}
        others = await self._others(shares.values())
        return [replace(self._counted(share), others=others.get(uid, ())) for uid, share in shares.items()]

    async def _everywhere(self, kind: Kind, labels: str = "") -> Objects:
        return [
            found
            for namespace in self._namespaces or (None,)
            for found in await self._cluster.list(kind, namespace, labels)
        ]

    async def _others(self, shares: Iterable[Share]) -> dict[str, list[tuple[Kind, Object]]]:
        """ConfigMaps and Services by the uid of their job; a namespace is read once, however many jobs are in it."""
        everywhere = {namespace for share in shares for namespace in namespaces_of(share)}
        own = {share.job["metadata"]["namespace"] for share in shares if share.job is not None}
        found: dict[str, list[tuple[Kind, Object]]] = {}
        for kind, namespaces in ((CONFIG_MAP, everywhere), (SERVICE, own)):
            for namespace in sorted(namespaces):
                for uid, children in _by_uid(await self._permitted_list(kind, namespace)).items():
                    found.setdefault(uid, []).extend((kind, child) for child in children)
        return found

    async def _permitted_list(self, kind: Kind, namespace: str) -> Objects:
        """An owner who has taken our rights away does not hold the drain back; what runs there does."""
        if namespace in self.refused:
            return []
        try:
            return await self._cluster.list(kind, namespace, JOB_UID)
        except Refused as refusal:
            self.refused[namespace] = str(refusal)
            return []

    def _counted(self, share: Share) -> Share:
        """What the drain waits for. Where nothing is permitted to us only what runs of a job in one of its namespaces:
        anybody can write labels elsewhere, and a pod that bears them has to have a Job beside it."""
        own = set() if share.job is None else namespaces_of_job(share.job)

        def counts(child: Object) -> bool:
            namespace = child["metadata"]["namespace"]
            return namespace not in self.refused or (namespace in own and not is_over(child))

        left = replace(share, jobs=[*filter(counts, share.jobs)])
        places = namespaces_of(left)
        return replace(left, pods=[pod for pod in share.pods if pod["metadata"]["namespace"] in places])

    # -- the Lease

    async def _alone(self) -> bool:
        """Whether the Lease is ours, and whoever had it before has noticed."""
        if self._renew_at is None or self._renew_at <= _now():
            await self._hold()
        if (left := self._quiet_at - _now()) > 0:
            self._last = f"the operator, which may work for another {left:.0f} s"
        return left <= 0

    async def _hold(self) -> None:
        """The Lease names the drain, whoever held it before: that one works for at most a term more."""
        while True:
            lease = await self._cluster.get(LEASE, *self._lease)
            if lease is None:
                raise ConfigurationInvalid(
                    f"Lease {'/'.join(self._lease)}: expected the one by which the replicas elect their leader, found "
                    "none; name it with --lease-namespace and --lease-name"
                )
            spec = lease.get("spec") or {}
            former = spec.get("holderIdentity") or DRAINED
            renewal = former == HOLDER and self._renew_at is not None
            if former != DRAINED and not renewal:
                self._term = spec.get("leaseDurationSeconds") or TERM_SECONDS
            ours, now = {"holderIdentity": HOLDER, "leaseDurationSeconds": int(self._term)}, _now()
            with contextlib.suppress(Conflict):  # a replica was faster: now it is the one to wait for
                await self._write_lease(ours, lease["metadata"]["resourceVersion"])
                self._renew_at = now + self._term / 3
                if former != DRAINED and not renewal:
                    self._quiet_at = _now() + self._term
                return

    async def _let_others(self) -> None:
        """The Lease names nobody; best effort."""
        with contextlib.suppress(Conflict, Unavailable, Refused, TimeoutError):
            async with asyncio.timeout(1):
                await self._write_lease({"holderIdentity": "", "leaseDurationSeconds": 1})

    async def _write_lease(self, spec: Object, version: str = "") -> None:
        renewed = {"renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
        condition = {"metadata": {"resourceVersion": version}} if version else {}
        await self._cluster.patch(LEASE, *self._lease, {**condition, "spec": {**spec, **renewed}})


def _now() -> float:
    return asyncio.get_running_loop().time()


# ---- The program -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageInvalid(f"{message}; see --help")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """What a command line means. Raises UsageInvalid with one line that says what is wrong."""
    parser = _Parser(
        prog="python -m feddiff_operator.drain",
        description="Stop everything that runs for any job, and stop the operator's replicas; ledgers and jobs stay.",
        epilog="Exit codes: 0 drained · 64 command line · 75 time ran out, run it again · 78 no Lease or no rights.",
        allow_abbrev=False,
    )
    parser.add_argument("--lease-namespace", default="feddiff-system", metavar="NAME", help="where the Lease is")
    parser.add_argument("--lease-name", default="feddiff-operator", metavar="NAME", help="the replicas' Lease")
    parser.add_argument(
        "--namespace",
        dest="namespaces",
        action="append",
        default=[],
        metavar="NAME",
        help="namespace that the operator serves; repeat it for more; all unless said otherwise",
    )
    parser.add_argument("--timeout-seconds", type=float, default=60.0, metavar="S", help="how long it may take")
    return parser.parse_args(arguments)


async def _drain(arguments: argparse.Namespace) -> None:
    try:
        cluster = await Cluster.from_kubeconfig(os.environ.get("KUBECONFIG") or None, QPS, BURST)
    except (ConfigException, OSError) as error:
        raise ConfigurationInvalid(
            f"expected KUBECONFIG to name a file, or a service account's token in this pod: {error}"
        ) from None
    async with cluster:
        lease = (arguments.lease_namespace, arguments.lease_name)
        drain = Drain(cluster, lease, tuple(sorted(set(arguments.namespaces))))
        try:
            await drain.run(arguments.timeout_seconds)
        except Refused as refusal:
            raise ConfigurationInvalid(str(refusal)) from None
        except Unavailable as error:
            raise Interrupted(f"the API server does not answer; run it again: {error}") from None
        for words in drain.refused.values():
            print(f"feddiff-operator: drain: left, since nothing runs there: {words}", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """The exit code; what is wrong is one line."""
    try:
        asyncio.run(_drain(parse_arguments(arguments)))
    except FeddiffError as error:
        print(f"feddiff-operator: drain: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
