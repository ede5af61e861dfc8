"""The status of a FederatedDiffusionJob as people and columns read it, made from the plan's.

Written only when it says something new: nothing in it changes while nothing happens, a condition's time only with
its truth. It stays small for a thousand clients: counts, and twenty names.
"""

import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from feddiff_protocol.labels import ATTEMPT, STAGE
from feddiff_protocol.plan import (
    OWNER_STAGES,
    Condition,
    JobPhase,
    StageKey,
    StageObserved,
    StagePhase,
    Status,
)
from feddiff_protocol.stages import Stage

from .progress import Known

SHOWN_DROPPED = 20
DROPPED_LENGTH = 300
CLIENT_STAGES = (Stage.RELEASE, *OWNER_STAGES)
ETA_STEP = timedelta(minutes=1)  # a later or earlier end by less than that, or by a tenth of what is left, is no news

Shares = Mapping[StageKey, float]


def job_status(
    job_object: Mapping[str, Any],
    status: Status,
    *,
    now: datetime,
    stages: Mapping[StageKey, StageObserved] | None = None,
    jobs: Iterable[Mapping[str, Any]] = (),
    releasing_since: datetime | None = None,
    progress: Mapping[StageKey, Known] | None = None,
) -> dict[str, Any]:
    """The whole `status` of the FederatedDiffusionJob `job_object`; equal to the one it has when nothing is new.

    `job_object` may have a spec that cannot be read (then `status` is `plan.not_accepted`). A job that has ended
    keeps the status it ended with. `progress` is what is known of stages that are not done.
    """
    before: Mapping[str, Any] = job_object.get("status") or {}
    if ended(job_object):
        return dict(before)
    moment, generation = _text(now), job_object["metadata"].get("generation", 0)
    spec = job_object.get("spec") or {}
    stages, progress = stages or {}, progress or {}
    shares = _shares(status, stages, progress, _client_names(spec))
    finished = status.phase in (JobPhase.COMPLETE, JobPhase.FAILED)
    clients = _client_names(spec)
    said = {each["client"]: each["reason"] for each in before.get("dropped") or ()}  # when the client was dropped
    optional = {
        "startTime": before.get("startTime", moment),
        "completionTime": moment if finished else None,
        "releasingSince": _text(releasing_since) if releasing_since else before.get("releasingSince"),
        "eta": _eta(before, stages, progress, now),
    }
    return {
        "observedGeneration": generation,
        "phase": status.phase.value,
        "message": status.message,
        "conditions": _conditions(before, status.conditions, generation, moment),
        **{name: value for name, value in optional.items() if value is not None},
        "counted": list(status.counted),
        "leftOut": list(status.left_out),
        "dropped": [
            {"client": name, "reason": said.get(name, _cut(why))}
            for name, why in list(status.dropped.items())[:SHOWN_DROPPED]
        ],
        "numDropped": len(status.dropped),
        "clientsSummary": f"{_num_released(status, stages, clients)}/{len(clients)}",
        "trainer": _trainer(spec, stages, jobs),
        "progress": f"{_percent(status, shares, _unheard(stages, progress), before)} %",
        "epsilon": _epsilon(spec),
        "stages": [{**_counts(stage, stages), "percent": _percent_of(stage, shares)} for stage in Stage],
    }


def ended(job_object: Mapping[str, Any]) -> bool:
    """Whether the job is Complete or Failed for good: then it is never planned again."""
    conditions = (job_object.get("status") or {}).get("conditions") or []
    return any(each.get("type") in ("Complete", "Failed") and each.get("status") == "True" for each in conditions)


def expires_at(job_object: Mapping[str, Any]) -> datetime | None:
    """When an ended job is to be deleted, by its ttlSecondsAfterFinished; None when never, or when it has not ended."""
    completed = (job_object.get("status") or {}).get("completionTime")
    seconds = job_object["spec"].get("ttlSecondsAfterFinished")
    if not ended(job_object) or not completed or seconds is None:
        return None
    return datetime.fromisoformat(completed.replace("Z", "+00:00")) + timedelta(seconds=seconds)


def _conditions(
    before: Mapping[str, Any], conditions: Iterable[Condition], generation: int, moment: str
) -> list[dict[str, Any]]:
    """metav1 conditions; the time is that of the last change between True and False."""
    known = {each.get("type"): each for each in before.get("conditions") or []}
    result = []
    for condition in conditions:
        truth = "True" if condition.status else "False"
        old = known.get(condition.type) or {}
        unchanged = old.get("status") == truth and old.get("lastTransitionTime")
        result.append(
            {
                "type": condition.type,
                "status": truth,
                "reason": condition.reason.value,
                "message": condition.message,
                "lastTransitionTime": old["lastTransitionTime"] if unchanged else moment,
                "observedGeneration": generation,
            }
        )
    return result


def _client_names(spec: Mapping[str, Any]) -> list[str]:
    clients = spec.get("clients")
    entries = clients if isinstance(clients, list) else []
    return [str(each["name"]) for each in entries if isinstance(each, Mapping) and "name" in each]


def _num_released(status: Status, stages: Mapping[StageKey, StageObserved], clients: Iterable[str]) -> int:
    """Clients whose releases are in, or, once that is decided, those that count and still take part."""
    if status.counted:
        return sum(name not in status.dropped for name in status.counted)
    return sum(_done(stages, Stage.RELEASE, name) for name in clients)


def _trainer(
    spec: Mapping[str, Any], stages: Mapping[StageKey, StageObserved], jobs: Iterable[Mapping[str, Any]]
) -> str:
    """Ranks that run, or are done, of all ranks' pods."""
    shared = spec.get("shared")
    replicas = shared.get("replicas", 2) if isinstance(shared, Mapping) else 2
    attempts = [each for each in jobs if (each["metadata"].get("labels") or {}).get(STAGE) == Stage.TRAIN_SHARED]
    if not attempts:
        return f"{replicas if _done(stages, Stage.TRAIN_SHARED, '') else 0}/{replicas}"
    newest = max(attempts, key=lambda each: int(each["metadata"]["labels"].get(ATTEMPT, "0")))
    pods, now = newest["spec"].get("parallelism", replicas), newest.get("status") or {}
    up = pods if _done(stages, Stage.TRAIN_SHARED, "") else now.get("ready", 0) + now.get("succeeded", 0)
    return f"{min(up, pods)}/{pods}"


def _shares(
    status: Status,
    stages: Mapping[StageKey, StageObserved],
    progress: Mapping[StageKey, Known],
    clients: Iterable[str],
) -> Shares:
    """What part is done of everything that the clients taking part have to do; what is not over is not 1."""
    names = [name for name in status.counted or clients if name not in status.dropped]
    keys = [(stage, name) for stage in CLIENT_STAGES for name in names]
    keys += [(Stage.TRAIN_SHARED, ""), (Stage.REPORT, "")]
    nothing = Known(0.0)
    return {key: 1.0 if _done(stages, *key) else min(progress.get(key, nothing).share, 0.99) for key in keys}


def _percent(status: Status, shares: Shares, unheard: bool, before: Mapping[str, Any]) -> int:
    """Whole percents of all shares, every stage counting the same; what a stage has once said stands until it says
    something else, also when another operator has taken over that has not asked it yet."""
    if status.phase is JobPhase.COMPLETE:
        return 100
    percent = math.floor(100 * sum(shares.values()) / len(shares) + 1e-9)
    said = str(before.get("progress", "")).removesuffix(" %")
    return max(percent, int(said)) if unheard and said.isdecimal() else percent


def _unheard(stages: Mapping[StageKey, StageObserved], progress: Mapping[StageKey, Known]) -> bool:
    return any(seen.phase is StagePhase.RUNNING and key not in progress for key, seen in stages.items())


def _percent_of(stage: Stage, shares: Shares) -> int:
    own = [share for (of, _), share in shares.items() if of is stage]
    return math.floor(100 * sum(own) / len(own) + 1e-9) if own else 0


def _eta(
    before: Mapping[str, Any],
    stages: Mapping[StageKey, StageObserved],
    progress: Mapping[StageKey, Known],
    now: datetime,
) -> str | None:
    """When the shared training ends at its present pace, on the minute; what was said stands while about right."""
    key = (Stage.TRAIN_SHARED, "")
    seen, known = stages.get(key), progress.get(key)
    if seen is None or seen.phase is not StagePhase.RUNNING:
        return None
    said: str | None = before.get("eta")
    if known is None or known.ends_at is None:
        return said
    wrong = abs(known.ends_at - datetime.fromisoformat(said.replace("Z", "+00:00"))) if said else timedelta.max
    if wrong <= max(ETA_STEP, (known.ends_at - now) / 10):
        return said
    return _text(known.ends_at.replace(second=0, microsecond=0) + timedelta(minutes=1))


def _epsilon(spec: Mapping[str, Any]) -> str:
    privacy = spec.get("privacy")
    return str(privacy.get("epsilon", "")) if isinstance(privacy, Mapping) else ""


def _counts(stage: Stage, stages: Mapping[StageKey, StageObserved]) -> dict[str, Any]:
    phases = [seen.phase for (of, _), seen in stages.items() if of is stage]
    numbers = {phase.value.lower(): phases.count(phase) for phase in StagePhase}
    return {"stage": stage.value, **numbers}


def _done(stages: Mapping[StageKey, StageObserved], stage: Stage, client: str) -> bool:
    seen = stages.get((stage, client))
    return seen is not None and seen.phase is StagePhase.SUCCEEDED


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _cut(words: str) -> str:
    return words if len(words) <= DROPPED_LENGTH else f"{words[: DROPPED_LENGTH - 1]}…"
