"""The example's federation on a real node: three owners whose rare classes have 5 scans each, one job from its releases
to its report, scraped by a real Prometheus all the while.

`make e2e` runs it; the story is told once, and each test looks at another side of it. Its short form, which every run
of all tests includes, is test_first_job.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from cluster.evidence import keys_of, leaks, readable
from cluster.federation import RESEARCH, OwnFederation, Watch, federation, phase
from cluster.overhead import Ran, added_seconds, pod_start_seconds, stages_that_ran
from cluster.reliability import hardware
from cluster.scraping import Discovery
from digits_federation import CLIENTS, NAME, OWNERS, digest_of, figures_of, outside, rows_of, write_files
from feddiff.documents import load_job
from feddiff.experiment import commit
from feddiff_protocol import layout
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Stage
from feddiff_trainer.evaluation import Evaluation
from on_prometheus import DASHBOARDS, Inquiry, Prometheus, everything_asked, shown

pytestmark = [pytest.mark.cluster, pytest.mark.node, pytest.mark.e2e, pytest.mark.timeout(1800)]

ROW = os.environ.get("FEDDIFF_E2E_ROW", "")  # a file to which a row of what was measured is appended
MOST_SECONDS, MOST_ADDED_SECONDS = 720, 15
ASK_SECONDS = 2.0
PHASES = ("Pending", "Reserving", "Releasing", "Training", "Sampling", "Evaluating", "Complete")
CHOSEN = {"namespace": RESEARCH, "job": NAME}
Object = dict[str, Any]

# What returns nothing during the whole run, and why.
EMPTY = {
    "fleet/Firing now A": "nothing fires",
    **{f"{name}/Alerts": "nothing fires" for name in DASHBOARDS},
    "job/GPU memory A": "trained on processors",
    "FeddiffNoLeader": "asks whether something is absent",
    "FeddiffReconcileErrors": "no look ended with an error",
    'feddiff_reconcile_duration_seconds_count{result="error"}': "no look ended with an error",
    "FeddiffJobFailed": "no job has failed",
    'feddiff_jobs{phase="Failed"}': "no job has failed",
}
EITHER = {'feddiff_api_requests_total{code=~"429|5..|none"}': "a busy machine's API server may not answer all"}


@dataclass
class Story:
    """What happened, in seconds of time.time(), and what is left of it."""

    world: OwnFederation
    files: tuple[Path, Path]  # of the owners and of the researcher
    prometheus: Prometheus
    inquiry: Inquiry
    pages: Mapping[str, str]  # of metrics, the last of every pod
    watch: Watch
    applied: float  # the job
    uid: str = ""
    tables: list[str] = field(default_factory=list)  # what `kubectl get fdj` said while the status had an ETA

    def first(self, **fields: str) -> float:
        """When a status first had these."""
        return next(moment for moment, status in self.watch.seen if fields.items() <= status.items())

    @property
    def complete(self) -> float:
        return self.first(phase="Complete")

    def ran(self) -> dict[StageKey, Ran]:
        return stages_that_ran(self.world.children(self.uid, "jobs"), self.world.children(self.uid, "pods"))

    def evaluations(self) -> list[Evaluation]:
        """Out of the owners' own buckets, with their own keys."""
        keys = {owner: f"feddiff/{layout.evaluation(self.uid, client)}" for owner, client in CLIENTS.items()}
        return [Evaluation.model_validate_json(self.world.object(o, o, key)) for o, key in keys.items()]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("e2e")
    owners, job = files = write_files(folder)
    with federation(folder, OWNERS, CLIENTS) as world:
        world.install()
        for owner in OWNERS:
            world.onboard(owner, on_a_volume(folder, owner), owners)
        with Discovery(world.node, folder / "targets") as found, found.prometheus(folder / "prometheus") as prometheus:
            inquiry = Inquiry(prometheus, everything_asked(CHOSEN))
            wait_for(prometheus, "feddiff_leader == 1")  # what asks for the absence of one is not to be asked before
            applied = time.time()
            with world.submit(job) as watch:
                story = Story(world, files, prometheus, inquiry, found.pages, watch, applied)
                _follow(story)
            story.uid = watch.uid
            wait_for(prometheus, 'feddiff_jobs{phase="Complete"} == 1')
            yield story


def on_a_volume(folder: Path, owner: str) -> Path:
    """The owner's records where its file says, on a volume with nobody else's."""
    volume = folder / "volumes" / owner
    shutil.copytree(folder / owner, volume / owner)
    return volume


def wait_for(prometheus: Prometheus, expression: str) -> None:
    deadline = time.monotonic() + 60
    while not prometheus.query(expression):
        assert time.monotonic() < deadline, f"no data within a minute: {expression}"
        time.sleep(0.2)


def _follow(story: Story) -> None:
    """The job has ended; while it ran, everything was asked."""
    watch, deadline = story.watch, story.applied + MOST_SECONDS
    while not watch.has_ended(ASK_SECONDS):
        story.inquiry.ask()
        if watch.seen and "eta" in watch.statuses[-1] and len(story.tables) < 3:
            story.tables.append(story.world.node.kubectl("get", "fdj", "-n", RESEARCH))
        if time.time() > deadline:
            break
    watch.until(phase("Complete"), 0)


# ---- The job


def test_the_job_went_through_its_phases_and_was_complete_in_time(story: Story) -> None:
    phases = [phase for phase, _ in itertools.groupby(status["phase"] for status in story.watch.statuses)]
    assert phases == sorted(set(phases), key=PHASES.index)
    assert {"Releasing", "Training", "Sampling", "Evaluating", "Complete"} <= set(phases)
    last = story.watch.statuses[-1]
    assert (last["clientsSummary"], last["trainer"], last["progress"]) == ("3/3", "2/2", "100 %")
    assert story.complete - story.applied < MOST_SECONDS


def test_every_owner_was_charged_once_for_what_it_released(story: Story) -> None:
    world = story.world
    for owner, client in CLIENTS.items():
        (entry,) = world.get("prl", "-n", owner)
        manifest = world.object("trainer", "federation", f"jobs/{layout.manifest(story.uid, client)}")
        charged = {"phase": "Charged", "manifestSha256": hashlib.sha256(manifest).hexdigest()}
        assert charged.items() <= entry["status"].items()


def test_progress_and_eta_reached_kubectl(story: Story) -> None:
    said = [int(status["progress"].removesuffix(" %")) for status in story.watch.statuses]
    assert said == sorted(said)
    assert len({each for each in said if 0 < each < 100}) > 5
    etas = {status["eta"] for status in story.watch.statuses if "eta" in status}
    trained = story.ran()[Stage.TRAIN_SHARED, ""].finished
    assert etas and min(abs(datetime.fromisoformat(eta).timestamp() - trained) for eta in etas) < 90
    shown = [line.split() for table in story.tables for line in table.splitlines() if line.startswith(NAME)]
    assert [row for row in shown if etas & set(row) and "%" in row]


# ---- What it led to


def test_results_are_those_of_a_local_run_of_the_same_files(story: Story) -> None:
    rows = rows_of(load_job(story.files))
    assert len(rows) >= 5
    assert outside(figures_of(story.evaluations()), rows) == []


# ---- Metrics


def test_every_panel_and_alert_had_data_during_the_run_or_has_a_reason(story: Story) -> None:
    assert story.inquiry.wrongs(EMPTY, EITHER) == []


def test_dashboards_show_what_is_so(story: Story) -> None:
    assert shown(story.prometheus, "fleet/Complete", CHOSEN) == {"jobs": 1}
    spent = shown(story.prometheus, "budgets/Spent, and when", CHOSEN)
    for owner in OWNERS:
        (dataset,) = story.world.get("pds", "-n", owner)
        assert spent[f"{owner}/scans spent"] == float(dataset["status"]["budget"]["spent"])
    assert story.prometheus.query("max_over_time(count(feddiff_stage_info{stage='train-shared'})[30m:1s])")[0][1] == 2


def test_secrets_can_be_read_nowhere(story: Story) -> None:
    """Nor in the metrics of pods that are gone, which were read while they ran."""
    trained = (Stage.TRAIN_SHARED, Stage.TRAIN_PERSONAL)
    pods = {pod["metadata"]["name"] for stage in trained for pod in story.world.pods(story.uid, stage)}
    assert len(pods) == 5
    assert all("feddiff_stage_info{" in story.pages.get(pod, "") for pod in pods)
    keys = keys_of(story.world)
    assert len(keys) == 16
    assert leaks(keys, readable(story.world, story.pages)) == []
    careless = {min(pods): f'{story.pages[min(pods)]}feddiff_stage_info{{key="{min(keys)}"}} 1\n'}
    assert leaks(keys, readable(story.world, {**story.pages, **careless})) == [f"metrics of {min(pods)}"]


# ---- Time


def test_the_operator_added_little_to_what_the_stages_took(story: Story) -> None:
    ran = story.ran()
    added = added_seconds(story.applied, story.complete, ran)
    took = story.complete - story.applied
    print(f"of {took:.1f} s the operator added {added:.1f} s, starts of pods were {pod_start_seconds(ran):.0f} s")
    for (stage, client), each in sorted(ran.items(), key=lambda item: item[1].created):
        start, process = each.started - each.created, each.process_seconds
        print(f"{stage.value:15}{client:2} start {start:3.0f} s, ran {process:4.0f} s, own {each.own_seconds:6.1f} s")
    assert added <= MOST_ADDED_SECONDS


def test_the_row_says_what_was_measured(story: Story) -> None:
    row = row_of(story)
    seconds = row["seconds_from_apply"]
    assert 0 < seconds["first_release"] < seconds["first_step"] < seconds["complete"]
    if ROW:
        with Path(ROW).open("a") as file:
            file.write(json.dumps(row) + "\n")


def row_of(story: Story) -> Object:
    """Seconds from `kubectl apply` of the job to: the first status with a client that has released; rank 0's first word
    of images seen; the status Complete. And where they went."""
    ran = story.ran()
    moments = {"first_release": first_release(story), "first_step": first_step(story), "complete": story.complete}
    stages = {f"{stage.value} {client}".strip(): round(each.own_seconds, 1) for (stage, client), each in ran.items()}
    loading = [each.process_seconds - each.own_seconds for each in ran.values()]
    return {
        "benchmark": "e2e",
        "job": digest_of(load_job(story.files)),
        "seconds_from_apply": {name: round(moment - story.applied, 1) for name, moment in moments.items()},
        "added_seconds": round(added_seconds(story.applied, story.complete, ran), 1),
        "pod_start_seconds": round(pod_start_seconds(ran), 1),
        "loading_seconds": {"median": round(median(loading), 1), "max": round(max(loading), 1)},  # of Python and torch
        "stage_seconds": stages,
        "figures": {name: round(value, 5) for name, value in figures_of(story.evaluations()).items()},
        "commit": commit(),
        "hardware": hardware(),
    }


def first_release(story: Story) -> float:
    return next(moment for moment, status in story.watch.seen if not status["clientsSummary"].startswith("0/"))


def first_step(story: Story) -> float:
    rank_0 = story.world.pods(story.uid, Stage.TRAIN_SHARED)[0]["metadata"]["name"]
    lines = story.world.node.kubectl("logs", "-n", RESEARCH, rank_0).splitlines()
    said = [json.loads(line) for line in lines if '"event": "progress"' in line]
    return datetime.fromisoformat(next(each["timestamp"] for each in said if each["done"] > 0)).timestamp()
