"""A real Prometheus that scrapes as the chart's PodMonitors say, and everything that dashboards and alerts ask of it.

    of_operators, of_stages = monitors()
    with Prometheus(folder, [scrape(of_operators, {"static_configs": […]}), …]) as prometheus:
        questions = everything_asked({"namespace": "research", "job": "job"})
        assert wrong_now(prometheus, questions, empty={"fleet/Firing now A": "nothing fires"}) == []

Needs Debian's package `prometheus` and the helm of tests/cluster/build.sh.
"""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.kubernetes import PROGRAMS

CHART = Path(__file__).parents[1] / "charts/feddiff"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted((CHART / "dashboards").glob("*.json"))}
RULES = [rule for group in yaml.safe_load((CHART / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
READY_SECONDS = 60
Object = dict[str, Any]
Sample = tuple[dict[str, str], float]


class Prometheus:
    """A Prometheus that scrapes every second."""

    def __init__(self, folder: Path, scrapes: Sequence[Object]) -> None:
        folder.mkdir()
        self._folder, self._port = folder, free_port()
        interval = {"scrape_interval": "1s", "evaluation_interval": "5s"}
        configuration = {"global": interval, "rule_files": [str(CHART / "alerts.yaml")], "scrape_configs": [*scrapes]}
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))

    def __enter__(self) -> "Prometheus":
        program = shutil.which("prometheus")
        assert program, "prometheus is missing: apt-get install prometheus, as .ci/run does"
        flags = [f"--config.file={self._folder}/prometheus.yaml", f"--storage.tsdb.path={self._folder}/data"]
        with (self._folder / "log").open("wb") as log:
            address = f"--web.listen-address=127.0.0.1:{self._port}"
            self._process = subprocess.Popen([program, *flags, address], stderr=log, stdout=log)
        deadline = time.monotonic() + READY_SECONDS
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


# ---- What is scraped -------------------------------------------------------------------------------------------


def monitors() -> tuple[Object, Object]:
    """The chart's PodMonitors, of operators and of stages."""
    argv = [PROGRAMS / "helm", "template", "feddiff", CHART, "--namespace=feddiff-system"]
    done = subprocess.run([*argv, "--set=monitoring.podMonitor=true"], capture_output=True, text=True, check=True)
    found = [each for each in yaml.safe_load_all(done.stdout) if each and each["kind"] == "PodMonitor"]
    of_operators, of_stages = sorted(found, key=lambda monitor: monitor["metadata"]["name"])
    return of_operators, of_stages


def scrape(monitor: Object, discovery: Mapping[str, Any]) -> Object:
    """What the Prometheus operator would make of a PodMonitor, with pods found by `discovery`."""
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    relabel = [
        {"source_labels": each["sourceLabels"], "regex": each["regex"], "action": each["action"]}
        for each in endpoint.get("metricRelabelings", [])
    ]
    return {
        "job_name": f"podMonitor/{monitor['metadata']['namespace']}/{monitor['metadata']['name']}/0",
        "metrics_path": endpoint["path"],
        "honor_labels": endpoint.get("honorLabels", False),
        "metric_relabel_configs": relabel,
        "sample_limit": monitor["spec"].get("sampleLimit", 0),
        "label_value_length_limit": monitor["spec"].get("labelValueLengthLimit", 0),
        **discovery,
    }


def targets_of(monitor: Object, pods: Iterable[Object]) -> list[Object]:
    """The pods that a PodMonitor selects and that may still be scraped, as Prometheus' file discovery reads them."""
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    spec, own = monitor["spec"], monitor["metadata"]["namespace"]
    targets = []
    for pod in pods:
        metadata, status = pod["metadata"], pod.get("status", {})
        ports = [
            port["containerPort"]
            for container in pod["spec"]["containers"]
            for port in container.get("ports", ())
            if port.get("name") == endpoint["port"]
        ]
        here = spec.get("namespaceSelector", {}).get("any") or metadata["namespace"] == own
        ended = status.get("phase") in ("Succeeded", "Failed")
        if here and not ended and status.get("podIP") and _selects(spec["selector"], metadata.get("labels", {})):
            labels = {"namespace": metadata["namespace"], "pod": metadata["name"]}
            targets += [{"targets": [f"{status['podIP']}:{port}"], "labels": labels} for port in ports]
    return targets


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert {each["operator"] for each in expressions} <= {"Exists"}, "the chart uses no other"
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        each["key"] in labels for each in expressions
    )


# ---- What is asked ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """An expression, where it stands, and the labels that its place needs of every answer's samples together."""

    place: str
    expression: str
    labels: frozenset[str] = frozenset()

    def missing(self, answer: Sequence[Sample]) -> set[str]:
        return set(self.labels) - {label for labels, _ in answer for label in labels} if answer else set()


def everything_asked(chosen: Mapping[str, str]) -> list[Question]:
    """Of dashboards: variables, panels by their title and query, marks; with what somebody has `chosen` at the top,
    where a dashboard does not offer everything. Of alerts: each by its name, and each selector in them."""
    questions = [
        *(question for name, dashboard in DASHBOARDS.items() for question in _of_dashboard(name, dashboard, chosen)),
        *(Question(rule["alert"], undecided(rule["expr"])) for rule in RULES),
    ]
    selectors = {selector for rule in RULES for selector in re.findall(r"feddiff_\w+(?:{.*?})?", rule["expr"])}
    return [*questions, *(Question(selector, selector) for selector in sorted(selectors))]


def _of_dashboard(name: str, dashboard: Object, chosen: Mapping[str, str]) -> Iterator[Question]:
    chosen = choices(dashboard, chosen)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            query = filled_in(variable["query"]["query"], chosen)
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
            yield Question(f"{name}/${variable['name']}", f"group by ({label}) ({metric})", frozenset({label}))
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            labels = frozenset(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            yield Question(f"{name}/{panel['title']} {target['refId']}", filled_in(target["expr"], chosen), labels)
    for each in dashboard["annotations"]["list"]:
        yield Question(f"{name}/{each['name']}", each["expr"])


def choices(dashboard: Object, chosen: Mapping[str, str]) -> dict[str, str]:
    """What stands at the top: everything, where the dashboard offers that, else what was chosen."""
    variables = dashboard["templating"]["list"]
    return {v["name"]: v.get("allValue", chosen.get(v["name"], "")) for v in variables if v["type"] == "query"}


def filled_in(expression: str, chosen: Mapping[str, str]) -> str:
    for name, value in {**chosen, "__rate_interval": "1m"}.items():
        expression = re.sub(rf"\$\{{?{name}\b\}}?", value, expression)
    return expression


def undecided(expression: str) -> str:
    """The expression as one that returns data whether or not the alert fires: comparisons answer 0 or 1, the past is
    the present, and nothing is taken away."""
    expression = re.sub(r" unless .*", "", expression, flags=re.DOTALL)
    expression = re.sub(r" offset \w+", "", expression)
    return re.sub(r" (==|<=|>=|<|>) ", r" \1 bool ", expression)


def shown(prometheus: Prometheus, place: str, chosen: Mapping[str, str]) -> dict[str, float]:
    """What a panel's first query shows, by its legend."""
    name, _, title = place.partition("/")
    dashboard = DASHBOARDS[name]
    (target,) = [panel["targets"][0] for panel in dashboard["panels"] if panel["title"] == title]
    samples = prometheus.query(filled_in(target["expr"], choices(dashboard, chosen)))
    form = target["legendFormat"].replace("{{", "{").replace("}}", "}")
    return {form.format(**labels): value for labels, value in samples}


# ---- The judge: what is wrong ----------------------------------------------------------------------------------


@dataclass
class Inquiry:
    """Every question, put until it was answered with all that its place needs, and every alert that has fired."""

    prometheus: Prometheus
    questions: Sequence[Question]
    answered: set[str] = field(default_factory=set)
    lacking: dict[str, set[str]] = field(default_factory=dict)  # labels, of what had some data and no good answer yet
    fired: set[str] = field(default_factory=set)

    def ask(self) -> None:
        for question in self.questions:
            if question.place not in self.answered and (answer := self.prometheus.query(question.expression)):
                self.lacking[question.place] = question.missing(answer)
                if not self.lacking[question.place]:
                    self.answered.add(question.place)
        firing = self.prometheus.query('ALERTS{alertstate="firing"}')
        self.fired |= {labels["alertname"] for labels, _ in firing}

    def wrongs(self, empty: Mapping[str, str], either: Collection[str] = ()) -> list[str]:
        """Alerts that fired or cannot be evaluated; answers that lack a label; and where there was one or none against
        what `empty` says, or `either`, which may be so or so."""
        known, data = {question.place for question in self.questions}, self.lacking.keys()
        return [
            *(f"{name} fired" for name in sorted(self.fired)),
            *(f"{name}: {health}" for name, health in unwell(self.prometheus).items()),
            *(f"{place}: no {label}" for place in data - self.answered for label in sorted(self.lacking[place])),
            *(f"{place}: nothing" for place in sorted(known - data - empty.keys() - set(either))),
            *(f"{place}: data after all" for place in sorted(data & empty.keys())),
            *(f"{place}: asked by nobody" for place in sorted((empty.keys() | set(either)) - known)),
        ]


def unwell(prometheus: Prometheus) -> dict[str, str]:
    """Alerts that Prometheus cannot evaluate, or has not yet."""
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    return {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"}


def wrong_now(
    prometheus: Prometheus, questions: Sequence[Question], empty: Mapping[str, str], either: Collection[str] = ()
) -> list[str]:
    """What is wrong at this moment."""
    inquiry = Inquiry(prometheus, questions)
    inquiry.ask()
    return inquiry.wrongs(empty, either)
