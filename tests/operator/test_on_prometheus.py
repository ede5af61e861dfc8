"""Every panel's and every alert's expression on a real Prometheus, which has scraped two real operators with a job in
flight, as the chart's PodMonitors would have it scrape them, and the pages of the stages that the operator has started.

Each returns data, or stands with a reason in a list below, and the lists are exact.
"""

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from feddiff_operator.cluster import PDS, Cluster
from feddiff_protocol.stages import AnyStageSpec, Stage
from feddiff_protocol.telemetry import GPU_MEMORY, OF_SHARED_TRAINING, Metric, told_by
from feddiff_trainer.telemetry import TEXT, Telemetry
from on_prometheus import DASHBOARDS, Prometheus, everything_asked, monitors, scrape, shown, wrong_now

PATIENCE_SECONDS = 60
PATIENT = "--lease-seconds=30"  # who leads is not the story here
Object = dict[str, Any]
SPEC: TypeAdapter[Any] = TypeAdapter(AnyStageSpec)

# What returns nothing while all is well, and why.
EMPTY = {
    "fleet/Firing now A": "nothing fires",
    **{f"{name}/Alerts": "nothing fires" for name in DASHBOARDS},
    "job/GPU memory A": "trained on processors",
    "FeddiffNoLeader": "asks whether something is absent",
    "FeddiffReconcileErrors": "no look ended with an error",
    'feddiff_reconcile_duration_seconds_count{result="error"}': "no look ended with an error",
    "FeddiffJobFailed": "no job has failed",
    'feddiff_jobs{phase="Failed"}': "no job has failed",
    "FeddiffJobStuck": "the job in flight is Training, which is none of its phases",
    'feddiff_job_info{phase=~"Pending|Reserving|Releasing|Sampling|Evaluating"}': "the job in flight is Training",
}
EITHER = {'feddiff_api_requests_total{code=~"429|5..|none"}': "a busy machine's API server may not answer all"}


# ---- what is scraped -------------------------------------------------------------------------------------------


def scrapes(operators: Iterable[int], shared: int, personal: int, world: Any) -> list[Object]:
    """As the chart's PodMonitors say, with addresses of this machine."""
    of_operators, of_stages = monitors()
    operator_pods = [("feddiff-system", port) for port in operators]
    stage_pods = [(world.research, shared), (world.clinics[0], personal)]
    return [scrape(of_operators, _targets(operator_pods)), scrape(of_stages, _targets(stage_pods))]


def _targets(pods: Iterable[tuple[str, int]]) -> Object:
    targets = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": namespace, "pod": f"pod-{number}"}}
        for number, (namespace, port) in enumerate(pods)
    ]
    return {"static_configs": targets}


# ---- pages of stages -------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What a pod tells, from when its spec is known on; its numbers rise from scrape to scrape."""

    port: int = 0
    telemetry: Telemetry | None = None

    def begin(self, spec: Object) -> None:
        telemetry, began = Telemetry(SPEC.validate_python(spec)), time.time()
        for metric in told_by(Stage(spec["stage"])):
            if metric in OF_SHARED_TRAINING and metric is not GPU_MEMORY:  # there is none here
                telemetry.tell(metric, functools.partial(_rising, metric, began))
        telemetry.progressed(1, 100)
        self.telemetry = telemetry


def _rising(metric: Metric, began: float) -> float:
    seconds = time.time() - began
    if metric.name.endswith("_ratio"):
        return min(0.9, seconds / 1000)
    return time.time() if "timestamp" in metric.name else seconds


@contextlib.contextmanager
def stage_page() -> Iterator[Page]:
    """A page on a port of its own, empty at first."""
    page = Page()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", TEXT)
            self.end_headers()
            self.wfile.write(page.telemetry.exposition() if page.telemetry else b"")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        page.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield page
        finally:
            server.shutdown()


# ---- the story -------------------------------------------------------------------------------------------------


def ports(log: Path) -> list[int]:
    """Where the operators that write this log serve their pages."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line["port"] for line in lines if line.get("event") == "pages"]


async def true(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():
            await asyncio.sleep(0.1)


def test_every_expression_returns_data_or_has_a_reason_not_to(world: Any, tmp_path: Path) -> None:
    pages: dict[str, Page] = {}
    first_release_is_scraped = asyncio.Event()  # what was counted before it was seen is no rise

    def outcome(pod: Object, spec: Object) -> int | None:
        place = f"{spec['stage']}/{spec.get('client', '')}"
        if place in pages and not pages[place].telemetry:
            pages[place].begin(spec)
        return 0 if place == "release/a" or (place == "release/b" and first_release_is_scraped.is_set()) else None

    async def story(cluster: Cluster, stack: contextlib.ExitStack) -> None:
        log = world.folder / "operator.log"
        stack.enter_context(world.operator(PATIENT))
        stack.enter_context(world.operator(PATIENT))
        shared, personal = stack.enter_context(stage_page()), stack.enter_context(stage_page())
        pages.update({"train-shared/": shared, "train-personal/a": personal})
        await true(lambda: len(ports(log)) == 2)
        scraped = scrapes(ports(log), shared.port, personal.port, world)
        prometheus = stack.enter_context(Prometheus(tmp_path / "prometheus", scraped))
        pushed_aside = [{**each, "honor_labels": False} for each in scraped]
        mutant = stack.enter_context(Prometheus(tmp_path / "mutant", pushed_aside))

        datasets = [world.dataset(clinic, budget={"epsilon": "100", "delta": "1e-5"}) for clinic in world.clinics]
        await world.apply(cluster, *datasets, world.job())
        await true(lambda: prometheus.query('feddiff_stage_duration_seconds_count{stage="release"} == 1'))
        first_release_is_scraped.set()
        await world.until(cluster, world.phase("Training"))

        chosen = {"namespace": world.research, "job": "job"}
        questions, wrong = everything_asked(chosen), ["not asked yet"]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while wrong:  # a rate needs a second scrape
                    await asyncio.sleep(0.5)
                    wrong = await asyncio.to_thread(wrong_now, prometheus, questions, EMPTY, EITHER)
        assert wrong == []

        assert shown(prometheus, "fleet/In flight", chosen) == {"jobs": 1}  # though two replicas tell of it
        assert shown(prometheus, "fleet/Complete", chosen) == {"jobs": 0}
        assert shown(prometheus, "operator/Leads", chosen) == {"leaders": 1}
        assert shown(prometheus, "operator/Replicas", chosen) == {"0.1.0": 2}
        assert shown(prometheus, "job/Phase", chosen) == {"Training": 1}
        assert shown(prometheus, "job/Clients", chosen) == {"released": 2, "dropped": 0, "waiting": 0}
        spent = shown(prometheus, "budgets/Spent, and when", chosen)
        for clinic in world.clinics:
            dataset = await cluster.get(PDS, clinic, "scans")
            assert spent[f"{clinic}/scans spent"] == float(dataset["status"]["budget"]["spent"]) == 10
        assert [each for each in wrong_now(mutant, questions, EMPTY, EITHER) if each.startswith("job/Phase")]

    async def told() -> None:
        async with world.kubelet(outcome) as kubelet:
            with contextlib.ExitStack() as stack:
                await story(kubelet.cluster, stack)

    asyncio.run(told())
