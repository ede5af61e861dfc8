"""What the chart's PodMonitors select, by the reading of tests/on_prometheus.py, and how answers are judged there."""

from typing import Any

import pytest

from on_prometheus import Inquiry, Question, Sample, monitors, targets_of

Object = dict[str, Any]
OPERATOR = {"app.kubernetes.io/name": "feddiff", "app.kubernetes.io/instance": "feddiff"}
OPERATOR |= {"app.kubernetes.io/component": "operator"}
STAGE = {"feddiff.dev/stage": "release"}


def pod(namespace: str, labels: dict[str, str], port: tuple[str, int], phase: str = "Running", ip: str = "1") -> Object:
    name, number = port
    status = {"phase": phase, "podIP": f"10.244.0.{ip}"} if ip else {"phase": phase}
    spec = {"containers": [{"ports": [{"name": name, "containerPort": number}]}]}
    return {"metadata": {"name": f"pod-{ip}", "namespace": namespace, "labels": labels}, "spec": spec, "status": status}


def test_an_operator_and_every_stage_that_runs_are_scraped_and_no_other_pod() -> None:
    http, metrics = ("http", 8080), ("metrics", 9464)
    pods = [
        pod("feddiff-system", OPERATOR, http, ip="2"),
        pod("elsewhere", OPERATOR, http, ip="3"),
        pod("clinic-a", STAGE, metrics, ip="4"),
        pod("clinic-a", STAGE, metrics, phase="Pending", ip=""),
        pod("clinic-a", STAGE, metrics, phase="Succeeded", ip="5"),
        pod("clinic-a", {}, metrics, ip="6"),
        pod("clinic-a", STAGE, http, ip="7"),
    ]
    of_operators, of_stages = (targets_of(monitor, pods) for monitor in monitors())
    assert of_operators == [{"targets": ["10.244.0.2:8080"], "labels": {"namespace": "feddiff-system", "pod": "pod-2"}}]
    assert of_stages == [{"targets": ["10.244.0.4:9464"], "labels": {"namespace": "clinic-a", "pod": "pod-4"}}]


# ---- The judge


class Answers:
    """What is asked of a Prometheus, with answers that a test chooses, by expression."""

    def __init__(self, rules: str = "ok", **answers: list[Sample]) -> None:
        self.answers, self.rules = answers, [{"name": "Alert", "health": rules}]

    def query(self, expression: str) -> list[Sample]:
        return self.answers.get(expression, [])

    def get(self, path: str) -> Object:
        return {"groups": [{"rules": self.rules}]}


QUESTIONS = [Question("fleet/Jobs A", "jobs", frozenset({"phase"})), Question("Alert", "alert")]
EMPTY = {"Alert": "nothing happens"}
JOBS: list[Sample] = [({"phase": "Training"}, 1.0)]


def judged(*rounds: Answers, empty: dict[str, str] = EMPTY, either: tuple[str, ...] = ()) -> list[str]:
    inquiry = Inquiry(rounds[0], QUESTIONS)  # type: ignore[arg-type]
    for answers in rounds:
        inquiry.prometheus = answers  # type: ignore[assignment]
        inquiry.ask()
    return inquiry.wrongs(empty, either)


def test_one_answer_in_the_whole_run_is_enough() -> None:
    assert judged(Answers(), Answers(jobs=JOBS), Answers()) == []
    assert judged(Answers(jobs=[({}, 1.0)]), Answers(jobs=JOBS)) == []


@pytest.mark.parametrize(
    ("answers", "options", "wrong"),
    [
        (Answers(), {}, "fleet/Jobs A: nothing"),
        (Answers(jobs=[({}, 1.0)]), {}, "fleet/Jobs A: no phase"),
        (Answers(jobs=JOBS, alert=[({}, 0.0)]), {}, "Alert: data after all"),
        (Answers(jobs=JOBS), {"empty": {}}, "Alert: nothing"),
        (Answers(jobs=JOBS), {"empty": EMPTY | {"job/Loss A": "gone"}}, "job/Loss A: asked by nobody"),
        (Answers(jobs=JOBS), {"either": ("job/Loss A",)}, "job/Loss A: asked by nobody"),
        (Answers(jobs=JOBS, rules="err"), {}, "Alert: err"),
        (Answers(**{"jobs": JOBS, 'ALERTS{alertstate="firing"}': [({"alertname": "Alert"}, 1.0)]}), {}, "Alert fired"),
    ],
)
def test_what_is_wrong_is_named(answers: Answers, options: Any, wrong: str) -> None:
    assert judged(answers, **options) == [wrong]


def test_what_may_be_so_or_so_is_not_judged() -> None:
    for answers in (Answers(jobs=JOBS), Answers(jobs=JOBS, alert=[({}, 0.0)])):
        assert judged(answers, empty={}, either=("Alert",)) == []
