"""Every panel's and every alert's expression on a real Prometheus, which has scraped two real operators with a job in
flight, as the chart's PodMonitors would have it scrape them, and the pages of the stages that the operator has started.

Each returns data, or stands with a reason in a list below, and the lists are exact.
"""

import asyncio
import contextlib
import functools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from cluster.kubernetes import PROGRAMS
from feddiff_operator.cluster import PDS, Cluster
from feddiff_protocol.stages import AnyStageSpec, Stage
from feddiff_protocol.telemetry import GPU_MEMORY, OF_SHARED_TRAINING, Metric, told_by
from feddiff_trainer.telemetry import TEXT, Telemetry

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/feddiff"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))}
RULES = [rule for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PATIENCE_SECONDS = 60
PATIENT = "--lease-seconds=30"  # who leads is not the story here
Object = dict[str, Any]
SPEC: TypeAdapter[Any] = TypeAdapter(AnyStageSpec)
Sample = tuple[dict[str, str], float]

# What returns nothing while all is well, and why.
EMPTY_PANELS = {
    "fleet/Firing now": "nothing fires",
    "job/GPU memory": "trained on processors",
}
EMPTY_ANNOTATIONS = {f"{name}/Alerts": "nothing fires" for name in DASHBOARDS}
EMPTY_ALERTS = {
    "FeddiffNoLeader": "asks whether something is absent",
    "FeddiffReconcileErrors": "no look ended with an error",
    "FeddiffJobFailed": "no job has failed",
    "FeddiffJobStuck": "the job in flight is Training, which is none of its phases",
}
EMPTY_SELECTORS = {
    'feddiff_reconcile_duration_seconds_count{result="error"}': "no look ended with an error",
    'feddiff_jobs{phase="Failed"}': "no job has failed",
    'feddiff_job_info{phase=~"Pending|Reserving|Releasing|Sampling|Evaluating"}': "the job in flight is Training",
}

EITHER_SELECTORS = {
    'feddiff_api_requests_total{code=~"429|5..|none"}': "a busy machine's API server may not answer all"
}


# ---- Prometheus ------------------------------------------------------------------------------------------------


class Prometheus:
    """A Prometheus that scrapes every second."""

    def __init__(self, folder: Path, scrapes: list[Object]) -> None:
        folder.mkdir()
        self._folder, self._port = folder, free_port()
        interval = {"scrape_interval": "1s", "evaluation_interval": "5s"}
        configuration = {"global": interval, "rule_files": [str(CHART / "alerts.yaml")], "scrape_configs": scrapes}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))

    def __enter__(self) -> "Prometheus":
        program = shutil.which("prometheus")
        assert program, "prometheus is missing: apt-get install prometheus, as .ci/run does"
        flags = [f"--config.file={self._folder}/prometheus.yaml", f"--storage.tsdb.path={self._folder}/data"]
        with (self._folder / "log").open("wb") as log:
            address = f"--web.listen-address=127.0.0.1:{self._port}"
            self._process = subprocess.Popen([program, *flags, address], stderr=log, stdout=log)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._ready():
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)
        return self

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready", timeout=10):
                return True
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Sample]:
        """What the expression returns now; a number that is none is no data."""
        found = [(each["metric"], float(each["value"][1])) for each in self.get("query", query=expression)["result"]]
        return [(labels, value) for labels, value in found if value == value]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def scrapes(operators: Iterable[int], shared: int, personal: int, world: Any) -> list[Object]:
    """What the Prometheus operator would make of the chart's PodMonitors, with addresses of this machine."""
    argv = [PROGRAMS / "helm", "template", "feddiff", CHART, "--namespace=feddiff-system"]
    done = subprocess.run([*argv, "--set=monitoring.podMonitor=true"], capture_output=True, text=True, check=True)
    monitors = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "PodMonitor"]
    of_operator, of_stages = sorted(monitors, key=lambda monitor: monitor["metadata"]["name"])
    operator_pods = [("feddiff-system", port) for port in operators]
    stage_pods = [(world.research, shared), (world.clinics[0], personal)]
    return [_scrape(of_operator, operator_pods), _scrape(of_stages, stage_pods)]


def _scrape(monitor: Object, pods: Iterable[tuple[str, int]]) -> Object:
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    name = monitor["metadata"]["name"]
    targets = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": namespace, "pod": f"{name}-{number}"}}
        for number, (namespace, port) in enumerate(pods)
    ]
    relabel = [
        {"source_labels": each["sourceLabels"], "regex": each["regex"], "action": each["action"]}
        for each in endpoint.get("metricRelabelings", [])
    ]
    return {
        "job_name": f"podMonitor/feddiff-system/{name}/0",
        "metrics_path": endpoint["path"],
        "honor_labels": endpoint.get("honorLabels", False),
        "static_configs": targets,
        "metric_relabel_configs": relabel,
    }


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


# ---- the checks: each returns what is wrong --------------------------------------------------------------------


def filled_in(expression: str, chosen: Mapping[str, str]) -> str:
    for name, value in {**chosen, "__rate_interval": "1m"}.items():
        expression = re.sub(rf"\$\{{?{name}\b\}}?", value, expression)
    return expression


def choices(dashboard: Object, research: str) -> dict[str, str]:
    """What somebody has chosen at the top: everything, or the job in flight."""
    present = {"namespace": research, "job": "job"}
    variables = dashboard["templating"]["list"]
    return {v["name"]: v.get("allValue", present.get(v["name"], "")) for v in variables if v["type"] == "query"}


def wrong_variables(prometheus: Prometheus, research: str) -> list[str]:
    """Variables that offer nothing to choose."""
    wrong = []
    for name, dashboard in DASHBOARDS.items():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                query = filled_in(variable["query"]["query"], choices(dashboard, research))
                metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
                offered = [labels for labels, _ in prometheus.query(f"group by ({label}) ({metric})") if labels]
                wrong += [] if offered else [f"{name}: variable {variable['name']} offers nothing"]
    return wrong


def wrong_panels(prometheus: Prometheus, research: str) -> list[str]:
    """Queries of panels that return nothing, or have a legend or a column that their data do not have."""
    wrong = []
    for name, dashboard in DASHBOARDS.items():
        for panel in dashboard["panels"]:
            place = f"{name}/{panel['title']}"
            for target in panel["targets"]:
                found = prometheus.query(filled_in(target["expr"], choices(dashboard, research)))
                if (not found) != (place in EMPTY_PANELS):
                    wrong.append(f"{place} {target['refId']}: {'nothing' if not found else 'data after all'}")
                known = {label for labels, _ in found for label in labels}
                asked = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) if found else set()
                wrong += [f"{place}: legend {label}" for label in asked - known]
    return wrong


def wrong_annotations(prometheus: Prometheus) -> list[str]:
    wrong = []
    for name, dashboard in DASHBOARDS.items():
        for each in dashboard["annotations"]["list"]:
            empty = not prometheus.query(each["expr"])
            wrong += [f"{name}: {each['name']}"] if empty != (f"{name}/{each['name']}" in EMPTY_ANNOTATIONS) else []
    return wrong


def undecided(expression: str) -> str:
    """The expression as one that returns data whether or not the alert fires: comparisons answer 0 or 1, the past is
    the present, and nothing is taken away."""
    expression = re.sub(r" unless .*", "", expression, flags=re.DOTALL)
    expression = re.sub(r" offset \w+", "", expression)
    return re.sub(r" (==|<=|>=|<|>) ", r" \1 bool ", expression)


def wrong_alerts(prometheus: Prometheus) -> list[str]:
    """Alerts that Prometheus cannot evaluate, that fire, or that could not, since what they ask for is not there."""
    evaluated = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    wrong = [f"{rule['name']}: {rule['health']}" for rule in evaluated if rule["health"] != "ok"]
    wrong += [f"{labels['alertname']} fires" for labels, _ in prometheus.query('ALERTS{alertstate="firing"}')]
    for rule in RULES:
        empty = not prometheus.query(undecided(rule["expr"]))
        wrong += [f"{rule['alert']}: no data"] if empty != (rule["alert"] in EMPTY_ALERTS) else []
        for selector in set(re.findall(r"feddiff_\w+(?:{.*?})?", rule["expr"])) - EITHER_SELECTORS.keys():
            empty = not prometheus.query(selector)
            wrong += [f"{rule['alert']}: {selector}"] if empty != (selector in EMPTY_SELECTORS) else []
    return wrong


def everything_wrong(prometheus: Prometheus, research: str) -> list[str]:
    return [
        *wrong_variables(prometheus, research),
        *wrong_panels(prometheus, research),
        *wrong_annotations(prometheus),
        *wrong_alerts(prometheus),
    ]


def shown(prometheus: Prometheus, research: str, place: str) -> dict[str, float]:
    """What a panel's first query shows, by its legend."""
    name, _, title = place.partition("/")
    dashboard = DASHBOARDS[name]
    (target,) = [panel["targets"][0] for panel in dashboard["panels"] if panel["title"] == title]
    samples = prometheus.query(filled_in(target["expr"], choices(dashboard, research)))
    form = target["legendFormat"].replace("{{", "{").replace("}}", "}")
    return {form.format(**labels): value for labels, value in samples}


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

        wrong = ["not asked yet"]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_SECONDS):
                while wrong:  # a rate needs a second scrape
                    await asyncio.sleep(0.5)
                    wrong = await asyncio.to_thread(everything_wrong, prometheus, world.research)
        assert wrong == []

        assert shown(prometheus, world.research, "fleet/In flight") == {"jobs": 1}  # though two replicas tell of it
        assert shown(prometheus, world.research, "fleet/Complete") == {"jobs": 0}
        assert shown(prometheus, world.research, "operator/Leads") == {"leaders": 1}
        assert shown(prometheus, world.research, "operator/Replicas") == {"0.1.0": 2}
        assert shown(prometheus, world.research, "job/Phase") == {"Training": 1}
        assert shown(prometheus, world.research, "job/Clients") == {"released": 2, "dropped": 0, "waiting": 0}
        spent = shown(prometheus, world.research, "budgets/Spent, and when")
        for clinic in world.clinics:
            dataset = await cluster.get(PDS, clinic, "scans")
            assert spent[f"{clinic}/scans spent"] == float(dataset["status"]["budget"]["spent"]) == 10
        assert [each for each in wrong_panels(mutant, world.research) if each.startswith("job/Phase")]

    async def told() -> None:
        async with world.kubelet(outcome) as kubelet:
            with contextlib.ExitStack() as stack:
                await story(kubelet.cluster, stack)

    asyncio.run(told())
