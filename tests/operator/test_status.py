"""What people read of a job: nine conditions from the first look, times that mean something, a size that is bounded."""

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

from batch_objects import NOW, SHA, UID, batch_job, job, text
from feddiff_operator.progress import Known
from feddiff_operator.status import ended, expires_at, job_status
from feddiff_protocol.crd import definitions
from feddiff_protocol.plan import (
    CONDITIONS,
    ClientObserved,
    Hold,
    JobPhase,
    Observed,
    Reason,
    StageKey,
    StageObserved,
    StagePhase,
    not_accepted,
    plan,
)
from feddiff_protocol.stages import Receipt, Stage

Object = dict[str, Any]
LATER = NOW + timedelta(hours=1)


def found(clients: str = "ab", status: Object | None = None, **spec: Any) -> Object:
    """The job as the API server shows it."""
    document = job(clients, **spec).to_wire()
    document["metadata"] |= {"uid": UID, "generation": 3}
    return {**document, "status": status} if status else document


def done(stage: Stage, client: str = "") -> tuple[StageKey, StageObserved]:
    outputs = {"manifest": SHA} if stage is Stage.RELEASE else {}
    kept = Receipt(stage=stage, job_uid=UID, client=client, attempt=1, outputs=outputs, milliseconds=1)
    return (stage, client), StageObserved(StagePhase.SUCCEEDED, 1, receipt=kept)


def after(before: Object, observed: Observed, at: Any = NOW, **more: Any) -> Object:
    """The job with the status that a look at it would write."""
    asked = job("".join(each["name"] for each in before["spec"]["clients"]))
    decision = plan(asked, observed)
    return {**before, "status": job_status(before, decision.status, now=at, stages=observed.stages, **more)}


def charged(*stages: tuple[StageKey, StageObserved], clients: str = "ab") -> Observed:
    return Observed({name: ClientObserved(Hold.CHARGED) for name in clients}, dict(stages))


def condition(of: Object, kind: str) -> Object:
    (only,) = [each for each in of["status"]["conditions"] if each["type"] == kind]
    return dict(only)


def test_all_nine_conditions_are_there_from_the_first_look() -> None:
    status = after(found(), Observed({}))["status"]
    assert [each["type"] for each in status["conditions"]] == [*CONDITIONS, "Failed"]
    assert len(status["conditions"]) == 9
    for each in status["conditions"]:
        assert each["status"] in ("True", "False") and each["reason"] in set(Reason)
        assert each["lastTransitionTime"] == text(NOW) and each["observedGeneration"] == 3
    assert status["startTime"] == text(NOW) and "completionTime" not in status


def test_a_job_that_cannot_be_read_has_all_nine_too() -> None:
    broken = {"metadata": {"name": "x", "generation": 1}, "spec": {"clients": [3], "privacy": "much", "shared": []}}
    status = job_status(broken, not_accepted(Reason.INVALID_SPEC, "spec.privacy: expected …"), now=NOW)
    assert [each["type"] for each in status["conditions"]] == [*CONDITIONS, "Failed"]
    assert (status["phase"], status["message"]) == ("Failed", "spec.privacy: expected …")
    assert ended({"status": status})


def test_a_look_at_which_nothing_happened_changes_nothing() -> None:
    observed = charged(done(Stage.RELEASE, "a"))
    first = after(found(), observed)
    assert after(first, observed, LATER) == first


def test_a_condition_keeps_its_time_until_its_truth_changes() -> None:
    first = after(found(), charged())
    second = after(first, charged(done(Stage.RELEASE, "a"), done(Stage.RELEASE, "b")), LATER)
    assert condition(first, "Released")["status"] == "False"
    assert condition(second, "Released")["lastTransitionTime"] == text(LATER)
    for kind in ("Accepted", "BudgetReserved", "Complete"):
        assert condition(second, kind)["lastTransitionTime"] == text(NOW)
    assert second["status"]["startTime"] == text(NOW)


def test_a_job_that_ended_keeps_the_status_it_ended_with() -> None:
    end = after(found(), charged(done(Stage.REPORT)))
    assert (end["status"]["phase"], end["status"]["progress"]) == ("Complete", "100 %")
    assert end["status"]["completionTime"] == text(NOW)
    assert after(end, Observed({"a": ClientObserved(refusal="gone")}), LATER) == end


def test_the_columns_count_clients_ranks_and_stages() -> None:
    stages = [done(Stage.RELEASE, name) for name in "ab"]
    shared = batch_job(Stage.TRAIN_SHARED, ready=1)
    running = ((Stage.TRAIN_SHARED, ""), StageObserved(StagePhase.RUNNING, 1))
    status = after(found(), charged(*stages, running), jobs=[shared])["status"]
    assert (status["clientsSummary"], status["trainer"], status["epsilon"]) == ("2/2", "1/2", "10")
    assert status["progress"] == "20 %", "2 releases of 2 x 4 + 2 stages"
    none = {"running": 0, "succeeded": 0, "failed": 0, "stopped": 0}
    assert status["stages"][0] == {**none, "stage": "release", "succeeded": 2, "percent": 100}
    assert status["stages"][1] == {**none, "stage": "train-shared", "running": 1, "percent": 0}
    trained = after(found(), charged(*stages, done(Stage.TRAIN_SHARED)), jobs=[shared])["status"]
    assert trained["trainer"] == "2/2"


def test_when_the_releases_began_is_remembered() -> None:
    first = after(found(), charged(), releasing_since=NOW)
    assert first["status"]["releasingSince"] == text(NOW)
    assert after(first, charged(), LATER)["status"]["releasingSince"] == text(NOW)


def test_an_ended_job_expires_its_ttl_after_its_end() -> None:
    end = after(found(ttlSecondsAfterFinished=60), charged(done(Stage.REPORT)))
    assert expires_at(end) == NOW + timedelta(seconds=60)
    assert expires_at(after(found(), charged(done(Stage.REPORT)))) is None
    assert expires_at(after(found(ttlSecondsAfterFinished=60), charged())) is None


def test_a_thousand_clients_fit() -> None:
    names = [f"clinic-{number:04d}" for number in range(1000)]
    clients = [{"name": name, "dataset": {"namespace": name, "name": "scans"}} for name in names]
    asked = job(clients=clients, quorum=1)
    refused = {name: ClientObserved(refusal="too much " * 200) for name in names[500:]}
    holds = {name: ClientObserved(Hold.CHARGED) for name in names[:500]} | refused
    stages = dict(done(Stage.RELEASE, name) for name in names[:500])
    waiting = tuple("Unschedulable " * 50 for _ in range(1000))
    decision = plan(asked, Observed(holds, stages, waiting=waiting))
    before = {"metadata": {"generation": 1}, "spec": asked.to_wire()["spec"]}
    status = job_status(before, decision.status, now=NOW, stages=stages)
    assert len(json.dumps(status, ensure_ascii=False).encode()) < 64_000
    assert (len(status["dropped"]), status["numDropped"], len(status["counted"])) == (20, 500, 500)
    everybody = plan(asked, Observed({n: ClientObserved(Hold.CHARGED) for n in names}, {}, tuple(names)))
    assert everybody.status.phase is JobPhase.RELEASING
    assert len(json.dumps(job_status(before, everybody.status, now=NOW))) < 64_000


def undescribed(value: Any, schema: Object, path: str = "status") -> list[str]:
    """Fields of a status that its definition does not know."""
    if isinstance(value, list):
        return [each for item in value for each in undescribed(item, schema["items"], f"{path}[]")]
    if not isinstance(value, dict):
        return []
    known = schema.get("properties", {})
    found = [f"{path}.{name}" for name in value if name not in known]
    for name in value.keys() & known.keys():
        found += undescribed(value[name], known[name], f"{path}.{name}")
    return found


def test_kubectl_explains_every_field_of_a_status() -> None:
    (version,) = definitions()["federateddiffusionjobs"]["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]["properties"]["status"]
    lost = StageObserved(StagePhase.FAILED, 1, 9, 77)
    observed = replace(charged(done(Stage.RELEASE, "a"), ((Stage.RELEASE, "b"), lost)), counted=("a",))
    status = after(found(), observed, releasing_since=NOW)["status"]
    status |= {"completionTime": text(LATER), "eta": text(LATER)}
    assert status["dropped"] and status["counted"]
    assert undescribed(status, schema) == []
    assert set(status) == set(schema["properties"]), "and it explains no field that nobody writes"
    assert undescribed({**status, "stages": [{"stage": "release", "lost": 1}]}, schema) == ["status.stages[].lost"]


# ---- progress and ETA --------------------------------------------------------------------------------------------

SHARED = (Stage.TRAIN_SHARED, "")
RUNNING = StageObserved(StagePhase.RUNNING, 1)
RELEASED = [done(Stage.RELEASE, name) for name in "ab"]
TRAINING = charged(*RELEASED, (SHARED, RUNNING))


def known(share: float, minutes: float | None = None, at: Any = NOW) -> dict[StageKey, Known]:
    return {SHARED: Known(share, at + timedelta(minutes=minutes) if minutes is not None else None)}


def test_what_a_running_stage_says_moves_its_percent_and_the_jobs() -> None:
    status = after(found(), TRAINING, progress=known(0.5))["status"]
    assert status["progress"] == "25 %", "2.5 of 2 x 4 + 2 stages"
    assert {each["stage"]: each["percent"] for each in status["stages"]} == {
        **dict.fromkeys(map(str, Stage), 0),
        "release": 100,
        "train-shared": 50,
    }
    personal = (Stage.TRAIN_PERSONAL, "a")
    both = charged(*RELEASED, (personal, RUNNING))
    (of_owners,) = [
        each
        for each in after(found(), both, progress={personal: Known(0.5)})["status"]["stages"]
        if each["stage"] == "train-personal"
    ]
    assert of_owners["percent"] == 25, "half of one of two owners"


def test_a_stage_is_done_when_its_receipt_says_so_and_not_before() -> None:
    status = after(found(), TRAINING, progress=known(1.0))["status"]
    assert (status["stages"][1]["percent"], status["progress"]) == (99, "29 %")
    assert after(found(), charged(*RELEASED, done(*SHARED)))["status"]["stages"][1]["percent"] == 100


def test_less_than_a_percent_is_not_worth_a_write() -> None:
    first = after(found(), TRAINING, progress=known(0.500))
    assert after(first, TRAINING, LATER, progress=known(0.509)) == first
    assert after(first, TRAINING, LATER, progress=known(0.51)) != first


def test_an_operator_that_has_not_asked_yet_takes_nothing_back() -> None:
    first = after(found(), TRAINING, progress=known(0.5, 60))
    taken_over = after(first, TRAINING, LATER)
    assert (taken_over["status"]["progress"], taken_over["status"]["eta"]) == ("25 %", first["status"]["eta"])
    assert after(first, TRAINING, LATER, progress=known(0.4))["status"]["progress"] == "24 %", "what it hears counts"


def test_the_eta_is_a_minute_that_stands_while_it_is_about_right() -> None:
    first = after(found(), TRAINING, progress=known(0.5, 60.4))
    assert first["status"]["eta"] == text(NOW + timedelta(minutes=61))
    assert after(first, TRAINING, progress=known(0.5, 65))["status"]["eta"] == first["status"]["eta"]
    assert after(first, TRAINING, progress=known(0.5, 75))["status"]["eta"] == text(NOW + timedelta(minutes=76))
    assert "eta" not in after(first, charged(*RELEASED, done(*SHARED)))["status"]
    assert "eta" not in after(found(), TRAINING, progress=known(0.5))["status"]
