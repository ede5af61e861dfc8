"""The order of a run: what is asked for in which state, and that a simulated world always ends, never uncharged."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from feddiff_protocol.api import FederatedDiffusionJob
from feddiff_protocol.plan import (
    HINDERS_STARTS,
    MESSAGE_LENGTH,
    OWNER_STAGES,
    WAITED_FOR,
    ChargeReservation,
    ClientObserved,
    GiveBack,
    Hold,
    JobPhase,
    Observed,
    Plan,
    Reason,
    Reserve,
    StageKey,
    StageObserved,
    StagePhase,
    Start,
    Stop,
    not_accepted,
    plan,
    releases_that_count,
)
from feddiff_protocol.stages import Receipt, Stage

CONDITIONS = [
    *("Accepted", "BudgetReserved", "Released", "SharedTrained", "PersonalTrained", "Evaluated"),
    *("Suspended", "Complete", "Failed"),
]
UID = "job-uid-1"


def job(clients: str = "abc", **spec: Any) -> FederatedDiffusionJob:
    return FederatedDiffusionJob.model_validate(
        {
            "metadata": {"name": "digits", "namespace": "research"},
            "spec": {
                "clients": [{"name": name, "dataset": {"namespace": name, "name": "scans"}} for name in clients],
                "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4"},
                **spec,
            },
        }
    )


def receipt(stage: Stage, client: str = "") -> Receipt:
    outputs = {"manifest": client.encode().hex().ljust(64, "0")} if stage is Stage.RELEASE else {}
    return Receipt(stage=stage, job_uid=UID, client=client, attempt=1, outputs=outputs, milliseconds=1)


def done(stage: Stage, client: str = "") -> tuple[StageKey, StageObserved]:
    return (stage, client), StageObserved(StagePhase.SUCCEEDED, 1, receipt=receipt(stage, client))


def failed(stage: Stage, client: str, code: int, failures: int = 1) -> tuple[StageKey, StageObserved]:
    return (stage, client), StageObserved(StagePhase.FAILED, failures, failures, code, "broke")


def running(stage: Stage, client: str = "") -> tuple[StageKey, StageObserved]:
    return (stage, client), StageObserved(StagePhase.RUNNING, 1)


def holding(hold: Hold, clients: str = "abc") -> dict[str, ClientObserved]:
    return {name: ClientObserved(hold) for name in clients}


def released(*names: str) -> dict[StageKey, StageObserved]:
    return dict(done(Stage.RELEASE, name) for name in names)


def starts(decision: Plan) -> list[tuple[str, str]]:
    return [(action.stage.value, action.client) for action in decision.actions if isinstance(action, Start)]


# ---- The order ---------------------------------------------------------------------------------------------------


def test_first_every_client_is_asked_for_a_reservation() -> None:
    decision = plan(job(), Observed({}))
    assert decision.actions == (Reserve("a"), Reserve("b"), Reserve("c"))
    assert decision.status.phase is JobPhase.RESERVING


def test_nobody_is_charged_before_all_have_reserved() -> None:
    clients = {**holding(Hold.RESERVED, "ab"), "c": ClientObserved()}
    assert plan(job(), Observed(clients)).actions == (Reserve("c"),)


def test_nobody_releases_before_all_are_charged() -> None:
    clients = {**holding(Hold.CHARGED, "ab"), "c": ClientObserved(Hold.RESERVED)}
    assert plan(job(), Observed(clients)).actions == (ChargeReservation("c"),)


def test_charged_clients_release() -> None:
    decision = plan(job(), Observed(holding(Hold.CHARGED)))
    assert starts(decision) == [("release", name) for name in "abc"]


def test_both_denoisers_are_trained_side_by_side_once_releases_count() -> None:
    decision = plan(job(), Observed(holding(Hold.CHARGED), released("a", "b", "c")))
    assert starts(decision) == [("train-shared", ""), *(("train-personal", name) for name in "abc")]
    assert decision.status.counted == ("a", "b", "c")


def test_an_owner_samples_when_both_its_denoisers_are_there() -> None:
    stages = {**released("a", "b", "c"), **dict([done(Stage.TRAIN_SHARED), done(Stage.TRAIN_PERSONAL, "b")])}
    assert ("sample", "b") in starts(plan(job(), Observed(holding(Hold.CHARGED), stages)))
    without_shared = {key: seen for key, seen in stages.items() if key[0] is not Stage.TRAIN_SHARED}
    assert ("sample", "b") not in starts(plan(job(), Observed(holding(Hold.CHARGED), without_shared)))


def test_the_report_closes_the_run() -> None:
    stages = {**released(*"abc"), **dict([done(Stage.TRAIN_SHARED)])}
    stages |= dict(done(stage, name) for stage in OWNER_STAGES for name in "abc")
    assert starts(plan(job(), Observed(holding(Hold.CHARGED), stages))) == [("report", "")]
    stages |= dict([done(Stage.REPORT)])
    decision = plan(job(), Observed(holding(Hold.CHARGED), stages))
    assert decision.actions == ()
    assert decision.status.phase is JobPhase.COMPLETE


def test_what_is_under_way_is_not_asked_for_again() -> None:
    stages = dict(running(Stage.RELEASE, name) for name in "abc")
    assert plan(job(), Observed(holding(Hold.CHARGED), stages)).actions == ()


# ---- What goes wrong ---------------------------------------------------------------------------------------------


def test_a_refusal_ends_the_job_and_reservations_are_given_back() -> None:
    clients = {**holding(Hold.RESERVED, "ab"), "c": ClientObserved(refusal="too much")}
    decision = plan(job(), Observed(clients))
    assert decision.actions == (GiveBack("a"), GiveBack("b"))
    failure = decision.status.condition("Failed")
    assert (failure.status, failure.reason) == (True, "PrivacyBudgetExceeded")
    assert "client c: too much" in failure.message


def test_with_a_quorum_a_refusal_only_drops_the_client() -> None:
    clients = {**holding(Hold.RESERVED, "ab"), "c": ClientObserved(refusal="too much")}
    decision = plan(job(quorum=2), Observed(clients))
    assert decision.actions == (ChargeReservation("a"), ChargeReservation("b"))
    assert decision.status.dropped == {"c": "too much"}


@pytest.mark.parametrize(
    ("story", "code", "failures", "again"),
    [
        ("a store that does not answer", 69, 3, True),
        ("the last attempt", 69, 4, False),
        ("a bug of ours", 1, 3, True),
        ("a privacy refusal", 77, 1, False),
        ("invalid data", 65, 1, False),
        ("killed by a signal", 137, 1, True),
    ],
)
def test_a_failed_stage_is_tried_again_only_where_that_may_help(
    story: str, code: int, failures: int, again: bool
) -> None:
    stages = {**released("b", "c"), **dict([failed(Stage.RELEASE, "a", code, failures)])}
    decision = plan(job(), Observed(holding(Hold.CHARGED), stages))
    assert (("release", "a") in starts(decision)) is again, story
    assert (decision.status.phase is JobPhase.FAILED) is not again


def test_a_failed_job_stops_what_runs() -> None:
    stages = {
        **released("a", "b", "c"),
        **dict([failed(Stage.TRAIN_SHARED, "", 77), running(Stage.TRAIN_PERSONAL, "a")]),
    }
    decision = plan(job(), Observed(holding(Hold.CHARGED), stages))
    assert decision.actions == (Stop(Stage.TRAIN_PERSONAL, "a"),)
    assert decision.status.condition("Failed").reason == "StageFailed"


def test_at_the_deadline_the_quorum_counts_and_latecomers_are_stopped() -> None:
    stages = {**released("a", "b"), **dict([running(Stage.RELEASE, "c")])}
    observed = Observed(holding(Hold.CHARGED), stages, release_deadline_passed=True)
    decision = plan(job(quorum=2), observed)
    assert decision.status.counted == ("a", "b")
    assert Stop(Stage.RELEASE, "c") in decision.actions


def test_who_counts_is_decided_once() -> None:
    observed = Observed(holding(Hold.CHARGED), released(*"abc"), counted=("a", "b"))
    decision = plan(job(quorum=2), observed)
    assert decision.status.counted == ("a", "b")
    assert ("train-personal", "c") not in starts(decision)


def test_too_few_releases_at_the_deadline_end_the_job() -> None:
    observed = Observed(holding(Hold.CHARGED), released("a"), release_deadline_passed=True)
    assert plan(job(quorum=2), observed).status.condition("Failed").reason == "ReleaseDeadlineExceeded"


def test_suspend_stops_everything_and_asks_for_nothing() -> None:
    stages = {**released("a", "b", "c"), **dict([running(Stage.TRAIN_SHARED)])}
    decision = plan(job(suspend=True), Observed(holding(Hold.CHARGED), stages))
    assert decision.actions == (Stop(Stage.TRAIN_SHARED, ""),)
    assert decision.status.phase is JobPhase.SUSPENDED


def test_the_releases_that_count_come_with_the_hashes_of_their_receipts() -> None:
    references = releases_that_count(Observed({}, released(*"abc")), ("a", "c"))
    assert [(each.client, each.manifest_sha256[:2]) for each in references] == [("a", "61"), ("c", "63")]


# ---- What is waited for, and in which words ----------------------------------------------------------------------


def refused(reason: Reason, hold: Hold = Hold.NONE) -> ClientObserved:
    return ClientObserved(hold, f"no: {reason}", reason)


def test_the_platforms_words_reach_phase_and_conditions() -> None:
    stages = dict(running(Stage.RELEASE, name) for name in "abc")
    words = "release of a, b: Unschedulable: 0/3 nodes are available"
    status = plan(job(), Observed(holding(Hold.CHARGED), stages, waiting=(words,))).status
    assert words in status.message
    assert (status.condition("Released").reason, words in status.condition("Released").message) == (
        Reason.WAITING,
        True,
    )
    assert status.condition("BudgetReserved").reason is Reason.BUDGET_RESERVED


def test_a_failure_that_is_tried_again_is_named_meanwhile() -> None:
    stages = {**released("b", "c"), **dict([failed(Stage.RELEASE, "a", 69)])}
    status = plan(job(), Observed(holding(Hold.CHARGED), stages)).status
    assert status.condition("Complete").reason is Reason.RETRYING
    assert "release of client a: attempt 2 follows, the last one failed: broke" in status.message


def test_words_are_bounded_however_many_there_are() -> None:
    names = "abc"
    waiting = tuple("word " * 200 for _ in range(1000))
    status = plan(job(names), Observed(holding(Hold.CHARGED), waiting=waiting)).status
    assert max(len(condition.message) for condition in status.conditions) <= MESSAGE_LENGTH


@pytest.mark.parametrize("reason", WAITED_FOR)
def test_before_the_charge_an_owner_is_waited_for_and_others_keep_their_reservations(reason: Reason) -> None:
    clients = {"a": refused(reason), "b": ClientObserved(), "c": ClientObserved(Hold.RESERVED)}
    decision = plan(job(), Observed(clients))
    assert decision.actions == (Reserve("b"),)
    assert (decision.status.phase, decision.status.condition("Complete").reason) == (JobPhase.RESERVING, reason)
    assert f"client a: no: {reason}" in decision.status.message
    alone = plan(job("a"), Observed({"a": refused(reason)}))
    assert (alone.actions, alone.status.phase) == ((), JobPhase.PENDING)


def test_nobody_is_charged_while_a_ledger_contradicts_itself_but_who_is_charged_goes_on() -> None:
    clients = {**holding(Hold.RESERVED, "bc"), "a": refused(Reason.LEDGER_MISMATCH, Hold.RESERVED)}
    assert plan(job(), Observed(clients)).actions == ()
    clients = {**holding(Hold.CHARGED, "bc"), "a": refused(Reason.LEDGER_MISMATCH, Hold.CHARGED)}
    assert starts(plan(job(), Observed(clients))) == [("release", name) for name in "abc"]


@pytest.mark.parametrize("reason", HINDERS_STARTS)
def test_a_charged_client_that_cannot_start_is_waited_for(reason: Reason) -> None:
    clients = {**holding(Hold.CHARGED, "bc"), "a": refused(reason, Hold.CHARGED)}
    decision = plan(job(), Observed(clients))
    assert starts(decision) == [("release", "b"), ("release", "c")]
    assert (decision.status.condition("Released").reason, "client a: no" in decision.status.message) == (reason, True)


def test_a_dataset_that_goes_once_a_stage_has_started_is_a_loss() -> None:
    clients = {**holding(Hold.CHARGED, "bc"), "a": refused(Reason.DATASET_MISSING, Hold.CHARGED)}
    decision = plan(job(), Observed(clients, dict([running(Stage.RELEASE, "a")])))
    assert decision.actions == (Stop(Stage.RELEASE, "a"),)
    assert decision.status.condition("Failed").reason is Reason.DATASET_MISSING


def test_who_is_through_with_everything_cannot_be_lost_any_more() -> None:
    stages = {**released("a"), **dict(done(stage, "a") for stage in OWNER_STAGES), **dict([done(Stage.TRAIN_SHARED)])}
    clients = {"a": refused(Reason.ACCESS_DENIED, Hold.CHARGED)}
    assert starts(plan(job("a"), Observed(clients, stages))) == [("report", "")]


# ---- Who is dropped ----------------------------------------------------------------------------------------------


def test_a_dropped_clients_pods_are_stopped_and_its_reservation_is_given_back() -> None:
    clients = {**holding(Hold.RESERVED, "ab"), "c": refused(Reason.ACCESS_DENIED, Hold.RESERVED)}
    assert GiveBack("c") in plan(job(quorum=2), Observed(clients)).actions
    stages = {**released(*"abc"), **dict([running(Stage.TRAIN_PERSONAL, "c"), running(Stage.TRAIN_PERSONAL, "a")])}
    clients = {**holding(Hold.CHARGED, "ab"), "c": refused(Reason.ACCESS_DENIED, Hold.CHARGED)}
    stops = [each for each in plan(job(quorum=2), Observed(clients, stages)).actions if isinstance(each, Stop)]
    assert stops == [Stop(Stage.TRAIN_PERSONAL, "c")]


@pytest.mark.parametrize(
    ("story", "reasons", "expected"),
    [
        ("a budget before everything", (Reason.PRIVACY_BUDGET_EXCEEDED, Reason.ACCESS_DENIED), "PrivacyBudgetExceeded"),
        ("access before what else went wrong", (Reason.ACCESS_DENIED, Reason.INVALID_SPEC), "AccessDenied"),
        ("what all have in common", (Reason.INVALID_POD_TEMPLATE, Reason.INVALID_POD_TEMPLATE), "InvalidPodTemplate"),
        ("nothing in common", (Reason.INVALID_POD_TEMPLATE, Reason.INVALID_SPEC), "ClientsLost"),
    ],
)
def test_a_job_that_lost_its_clients_says_why(story: str, reasons: tuple[Reason, Reason], expected: str) -> None:
    clients = dict(zip("ab", map(refused, reasons), strict=True))
    assert plan(job("ab"), Observed(clients)).status.condition("Failed").reason == expected, story


def test_what_was_given_back_on_the_way_is_not_why_a_job_failed() -> None:
    given_back = refused(Reason.PRIVACY_BUDGET_EXCEEDED, Hold.RETURNED)
    for reason in (Reason.ACCESS_DENIED, Reason.INVALID_SPEC):
        clients = {**dict.fromkeys("abcdef", given_back), "g": refused(reason)}
        failure = plan(job("abcdefg"), Observed(clients)).status.condition("Failed")
        assert failure.reason == reason
        assert clients["g"].refusal in failure.message, "the cause before what followed from it"
    alone = plan(job("a"), Observed({"a": given_back})).status.condition("Failed")
    assert alone.reason is Reason.CLIENTS_LOST


def test_a_budget_that_is_held_is_no_question_any_more() -> None:
    clients = {name: refused(Reason.PRIVACY_BUDGET_EXCEEDED, Hold.CHARGED) for name in "abc"}
    assert plan(job(), Observed(clients)).status.dropped == {}


LATE: dict[str, Any] = {"quorum": 2, "deadlines": {"reservationSeconds": 600}}


@pytest.mark.parametrize(
    "late",
    [
        refused(Reason.DATASET_MISSING),
        refused(Reason.LEDGER_MISMATCH),
        refused(Reason.LEDGER_MISMATCH, Hold.RESERVED),
        ClientObserved(hindrance="ledger of c: forbidden"),
        ClientObserved(Hold.RESERVED, hindrance="release c: jobs is forbidden"),
    ],
    ids=["no dataset", "mismatch", "mismatch, reserved", "no rights", "no rights, reserved"],
)
def test_at_the_reservation_deadline_a_quorum_goes_on_without_who_has_not_reserved(late: ClientObserved) -> None:
    clients = {**holding(Hold.RESERVED, "ab"), "c": late}
    waits = plan(job(**LATE), Observed(clients)).status
    assert (waits.dropped, waits.left_out) == ({}, ())
    decision = plan(job(**LATE), Observed(clients, reservation_deadline_passed=True))
    give_back = [GiveBack("c")] if late.hold is Hold.RESERVED else []
    assert decision.actions == (*give_back, ChargeReservation("a"), ChargeReservation("b"))
    words = late.refusal or late.hindrance
    assert (decision.status.dropped, decision.status.left_out) == ({"c": words}, ("c",))
    alone = plan(job(deadlines=LATE["deadlines"]), Observed(clients, reservation_deadline_passed=True)).status
    assert alone.condition("Failed").reason is Reason.RESERVATION_DEADLINE_EXCEEDED
    assert words in alone.message


def test_who_is_left_out_stays_out_whatever_its_ledger_and_the_clock_say_later() -> None:
    for seen in (
        ClientObserved(),
        refused(Reason.PRIVACY_BUDGET_EXCEEDED, Hold.RETURNED),
        ClientObserved(Hold.CHARGED),
    ):
        clients = {**holding(Hold.CHARGED, "ab"), "c": seen}
        decision = plan(job(quorum=2), Observed(clients, left_out=("c",)))
        assert (starts(decision), decision.status.left_out) == ([("release", "a"), ("release", "b")], ("c",))
    unseen = {**holding(Hold.CHARGED, "ab"), "c": ClientObserved(Hold.RESERVED)}
    assert GiveBack("c") in plan(job(quorum=2), Observed(unseen, left_out=("c",))).actions


@pytest.mark.parametrize(
    ("story", "c", "stages"),
    [
        ("nothing hinders it, as after hours without an operator", ClientObserved(), {}),
        ("it is reserved and nothing hinders it", ClientObserved(Hold.RESERVED), {}),
        ("it is charged", refused(Reason.DATASET_MISSING, Hold.CHARGED), {}),
        (
            "a release has begun, so it was charged",
            refused(Reason.DATASET_MISSING),
            dict([running(Stage.RELEASE, "a")]),
        ),
    ],
)
def test_nobody_else_is_left_out(story: str, c: ClientObserved, stages: dict[StageKey, StageObserved]) -> None:
    clients = {**holding(Hold.CHARGED, "ab"), "c": c}
    decision = plan(job(**LATE), Observed(clients, stages, reservation_deadline_passed=True))
    assert decision.status.left_out == (), story


def test_a_charge_is_not_wasted_by_leaving_out_who_is_needed() -> None:
    clients = {"a": ClientObserved(Hold.CHARGED), "b": ClientObserved(Hold.RESERVED, hindrance="forbidden")}
    decision = plan(job("ab", deadlines=LATE["deadlines"]), Observed(clients, reservation_deadline_passed=True))
    assert (decision.actions, decision.status.left_out) == ((ChargeReservation("b"),), ())


@pytest.mark.parametrize("reason", [Reason.START_DEADLINE_EXCEEDED, Reason.STAGE_DEADLINE_EXCEEDED])
def test_a_stage_that_missed_its_deadlines_ends_the_job_with_that_reason(reason: Reason) -> None:
    late = StageObserved(StagePhase.FAILED, 4, 4, message="waited longer than 600 s", reason=reason)
    shared = plan(job(), Observed(holding(Hold.CHARGED), {**released(*"abc"), (Stage.TRAIN_SHARED, ""): late}))
    assert shared.status.condition("Failed").reason is reason
    assert shared.status.message == "train-shared failed: waited longer than 600 s"
    client = plan(job(), Observed(holding(Hold.CHARGED), {(Stage.RELEASE, "a"): late}))
    assert client.status.condition("Failed").reason is reason


# ---- Records that somebody deleted -------------------------------------------------------------------------------


def test_a_counted_release_whose_receipt_is_gone_is_sent_again_before_anything_else() -> None:
    observed = Observed(holding(Hold.CHARGED), released("b", "c"), counted=("a", "b", "c"))
    decision = plan(job(), observed)
    assert starts(decision) == [("release", "a")]
    assert (decision.status.counted, decision.status.phase) == (("a", "b", "c"), JobPhase.RELEASING)


def test_a_counted_release_that_can_no_longer_be_had_ends_the_job() -> None:
    for seen in (ClientObserved(), refused(Reason.ACCESS_DENIED, Hold.CHARGED)):
        clients = {**holding(Hold.CHARGED, "bc"), "a": seen}
        decision = plan(job(quorum=2), Observed(clients, released("b", "c"), counted=("a", "b", "c")))
        assert decision.status.condition("Failed").reason is Reason.CLIENTS_LOST


def test_an_end_leaves_nothing_running_and_nothing_held_back() -> None:
    stages = dict([done(Stage.REPORT), running(Stage.SAMPLE, "c")])
    clients = {**holding(Hold.CHARGED, "ab"), "c": ClientObserved(Hold.RESERVED)}
    decision = plan(job(quorum=2), Observed(clients, stages))
    assert decision.status.phase is JobPhase.COMPLETE
    assert decision.actions == (Stop(Stage.SAMPLE, "c"), GiveBack("c"))


def test_a_job_that_cannot_be_understood_has_all_conditions_and_its_reason() -> None:
    status = not_accepted(Reason.INVALID_SPEC, "spec.privacy.epsilon: expected a value")
    assert [condition.type for condition in status.conditions] == CONDITIONS
    assert [condition.type for condition in status.conditions if condition.status] == ["Failed"]
    assert {condition.reason for condition in status.conditions} == {Reason.INVALID_SPEC}


# ---- Any state, and a simulated world ----------------------------------------------------------------------------


def check_invariants(decision: Plan, observed: Observed) -> None:
    assert [condition.type for condition in decision.status.conditions] == CONDITIONS
    for action in decision.actions:
        if isinstance(action, Start):
            seen = observed.stages.get((action.stage, action.client))
            assert seen is None or seen.phase in (StagePhase.FAILED, StagePhase.STOPPED)
            assert action.attempt == (seen.attempt + 1 if seen else 1)
            if action.stage is Stage.RELEASE:
                assert observed.clients[action.client].hold is Hold.CHARGED
        if isinstance(action, Stop):
            assert observed.stages[(action.stage, action.client)].phase is StagePhase.RUNNING
        if isinstance(action, GiveBack):
            assert observed.clients[action.client].hold is Hold.RESERVED
    assert len(set(decision.actions)) == len(decision.actions)


def any_state(draw: random.Random, names: str) -> Observed:
    """States no honest world would reach, too: entries lost, stages done out of order."""
    clients = {
        name: ClientObserved(draw.choice(list(Hold)), draw.choice(["", "", "", "no"]), draw.choice(list(Reason)))
        for name in names
        if draw.random() < 0.9
    }
    keys = [(stage, name) for stage in (Stage.RELEASE, *OWNER_STAGES) for name in names]
    stages = {}
    for key in (*keys, (Stage.TRAIN_SHARED, ""), (Stage.REPORT, "")):
        if draw.random() < 0.6:
            phase = draw.choice(list(StagePhase))
            code = draw.choice([None, 1, 65, 69, 74, 77, 137]) if phase is StagePhase.FAILED else None
            kept = receipt(*key) if phase is StagePhase.SUCCEEDED else None
            stages[key] = StageObserved(phase, draw.randint(1, 6), draw.randint(0, 6), code, "", kept)
    counted = tuple(name for name in names if draw.random() < 0.3)
    left_out = tuple(name for name in names if draw.random() < 0.1)
    return Observed(clients, stages, counted, left_out, draw.random() < 0.3, draw.random() < 0.3)


def test_no_state_makes_a_release_start_without_its_charge() -> None:
    draw = random.Random(0)
    for _ in range(4_000):
        names = "abcd"[: draw.randint(1, 4)]
        spec = {"quorum": draw.randint(1, len(names)), "suspend": draw.random() < 0.1}
        observed = any_state(draw, names)
        check_invariants(plan(job(names, **spec), observed), observed)


@dataclass
class SimulatedWorld:
    """Ledgers and stages that fail, stall and are lost at random; `observed` is what a planner sees of them."""

    draw: random.Random
    names: str
    trouble: float
    clients: dict[str, ClientObserved] = field(default_factory=dict)
    stages: dict[StageKey, StageObserved] = field(default_factory=dict)
    counted: tuple[str, ...] = ()
    late: bool = False
    releases: list[str] = field(default_factory=list)

    def observed(self) -> Observed:
        return Observed(dict(self.clients), dict(self.stages), self.counted, release_deadline_passed=self.late)

    def carry_out(self, decision: Plan) -> None:
        self.counted = decision.status.counted
        for action in decision.actions:
            if self.draw.random() < 0.1:
                continue  # the planner died here
            match action:
                case Reserve(client):
                    refused = self.draw.random() < self.trouble / 4
                    self.clients[client] = ClientObserved(Hold.NONE if refused else Hold.RESERVED, "no" * refused)
                case ChargeReservation(client):
                    self.clients[client] = ClientObserved(Hold.CHARGED)
                case GiveBack(client):
                    assert self.clients[client].hold is Hold.RESERVED
                    self.clients[client] = replace(self.clients[client], hold=Hold.RETURNED)
                case Start(stage, client, attempt):
                    if stage is Stage.RELEASE:
                        assert self.clients[client].hold is Hold.CHARGED
                        self.releases.append(client)
                    before = self.stages.get((stage, client))
                    failures = before.num_failures if before else 0
                    self.stages[(stage, client)] = StageObserved(StagePhase.RUNNING, attempt, failures)
                case Stop(stage, client):
                    seen = self.stages[(stage, client)]
                    self.stages[(stage, client)] = replace(seen, phase=StagePhase.STOPPED)

    def move(self) -> None:
        self.late = self.late or self.draw.random() < self.trouble / 50
        for key, seen in list(self.stages.items()):
            if seen.phase is not StagePhase.RUNNING or self.draw.random() < 0.3:
                continue
            if self.draw.random() >= self.trouble:
                self.stages[key] = replace(seen, phase=StagePhase.SUCCEEDED, receipt=receipt(*key))
            elif self.draw.random() < 0.4:
                self.stages[key] = replace(seen, phase=StagePhase.STOPPED, exit_code=75)
            else:
                code = self.draw.choice([1, 69, 74, 137, 65, 77])
                failures = seen.num_failures + 1
                self.stages[key] = replace(seen, phase=StagePhase.FAILED, num_failures=failures, exit_code=code)


def test_every_simulated_run_ends_complete_or_failed() -> None:
    draw = random.Random(1)
    ends = {JobPhase.COMPLETE: 0, JobPhase.FAILED: 0}
    for _ in range(2_000):
        names = "abcd"[: draw.randint(1, 4)]
        decision = simulate(
            job(names, quorum=draw.randint(1, len(names))), SimulatedWorld(draw, names, draw.random() / 2)
        )
        ends[decision.status.phase] += 1
    assert min(ends.values()) > 200, "both ends must be common"


def simulate(asked: FederatedDiffusionJob, world: SimulatedWorld) -> Plan:
    for _ in range(1_000):
        observed = world.observed()
        decision = plan(asked, observed)
        check_invariants(decision, observed)
        if decision.status.phase in (JobPhase.COMPLETE, JobPhase.FAILED) and not decision.actions:
            assert not any(client.hold is Hold.RESERVED for client in world.clients.values())
            return decision
        world.carry_out(decision)
        world.move()
    raise AssertionError("the run did not end")


def test_a_planner_that_forgets_to_charge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from feddiff_protocol.plan import _Run

    monkeypatch.setattr(_Run, "charge", lambda self: None)
    with pytest.raises(AssertionError, match="only after its charge"):
        simulate(job("ab"), SimulatedWorld(random.Random(0), "ab", 0.0))
