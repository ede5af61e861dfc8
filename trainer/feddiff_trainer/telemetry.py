"""What a running stage tells over HTTP: /metrics for Prometheus, /progress for the operator; nothing else is answered.

A port is opened only where FEDDIFF_METRICS_PORT names one, as it does in a pod. What may be told is the protocol's
list: a stage that wants to tell more is stopped, whether anybody listens or not.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import structlog

from feddiff_protocol.errors import PrivacyRefusal
from feddiff_protocol.stages import AnyStageSpec, StageSpec
from feddiff_protocol.telemetry import (
    METRICS_PORT_VARIABLE,
    PROGRESS_PATH,
    STAGE_INFO,
    STAGE_PROGRESS,
    STAGE_STEP,
    Metric,
    StageProgress,
    shown_progress,
    told_by,
)

if TYPE_CHECKING:
    from prometheus_client import metrics_core

TEXT = "text/plain; version=0.0.4; charset=utf-8"
REQUEST_SECONDS = 5.0  # for one request to come in; who is slower is cut off
Value = float | Callable[[], float]


class Telemetry:
    """What one stage has told so far."""

    def __init__(self, spec: AnyStageSpec) -> None:
        self._spec, self._allowed = spec, told_by(spec.stage)
        self._values: dict[Metric, Value] = {}
        self._progress: StageProgress | None = None

    def tell(self, metric: Metric, value: Value) -> None:
        """The metric has this value from now on; a function is asked at every scrape.

        Raises PrivacyRefusal (77) if it is none that this stage may tell.
        """
        if metric not in self._allowed:
            raise PrivacyRefusal(
                f"{metric.name}: expected one of {', '.join(each.name for each in self._allowed)} from the stage "
                f"{self._spec.stage}, found another; what depends on records is never told, report this"
            )
        self._values[metric] = value

    def add(self, metric: Metric, value: float) -> None:
        """The metric is so much more."""
        before = self._values.get(metric, 0.0)
        assert not callable(before)
        self.tell(metric, before + value)

    def progressed(self, done: int, total: int) -> None:
        """So much of the stage's work is done."""
        self._progress = shown_progress(self._spec.stage, done, total) if total else None

    def exposition(self) -> bytes:
        """Everything that was told, in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def progress(self) -> bytes:
        """The answer to GET /progress; empty while nothing is known."""
        return json.dumps(self._progress.to_wire()).encode() if self._progress is not None else b""

    def collect(self) -> "Iterator[metrics_core.Metric]":
        """For prometheus_client."""
        yield _family(STAGE_INFO, 1.0, self._whose())
        stage = {"stage": self._spec.stage.value}
        if (known := self._progress) is not None:
            yield _family(STAGE_PROGRESS, known.percent / 100, stage)
            yield _family(STAGE_STEP, known.done, stage)
        for metric, value in list(self._values.items()):
            yield _family(metric, value() if callable(value) else value, {})

    def _whose(self) -> dict[str, str]:
        job = self._spec.job
        return {
            "stage": self._spec.stage.value,
            "job_namespace": job.namespace,
            "job_name": job.name,
            "client": getattr(self._spec, "client", ""),
            "attempt": str(self._spec.attempt),
        }


def _family(metric: Metric, value: float, labels: dict[str, str]) -> "metrics_core.Metric":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made = family(metric.name, metric.text, labels=metric.labels)
    made.add_metric([labels[label] for label in metric.labels], value)
    return made


# ---- The stage of this process ---------------------------------------------------------------------------------

_current: Telemetry | None = None


@contextmanager
def telling(spec: StageSpec) -> Iterator[Telemetry]:
    """While inside, what this process tells is this stage's, and is served where a port is named."""
    global _current
    _current = telemetry = Telemetry(spec)  # type: ignore[arg-type]  # every spec that is run is one of a stage
    try:
        with _served(telemetry):
            yield telemetry
    finally:
        _current = None


def tell(metric: Metric, value: Value) -> None:
    """As Telemetry.tell, by the stage that runs; nothing happens where none does."""
    if _current is not None:
        _current.tell(metric, value)


def progressed(done: int, total: int) -> None:
    """As Telemetry.progressed, by the stage that runs; nothing happens where none does."""
    if _current is not None:
        _current.progressed(done, total)


@contextmanager
def time_told(metric: Metric) -> Iterator[None]:
    """The time inside is added to the metric."""
    began = time.monotonic()
    try:
        yield
    finally:
        if _current is not None:
            _current.add(metric, time.monotonic() - began)


# ---- HTTP ------------------------------------------------------------------------------------------------------


@contextmanager
def _served(telemetry: Telemetry) -> Iterator[None]:
    """The pages answer. Of a pod's processes the first one serves; a port that cannot be had stops no stage."""
    port = os.environ.get(METRICS_PORT_VARIABLE, "")
    if not port or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    try:
        server = _Server(_listener(port), telemetry)
    except (OSError, ValueError) as error:
        structlog.get_logger().warning("metrics_not_served", port=port, reason=str(error))
        yield
        return
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listener(port: str) -> socket.socket:
    """One socket for IPv4 and IPv6, where the machine has both."""
    if not port.isascii() or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{METRICS_PORT_VARIABLE}: expected a port from 1 to 65535, found {port!r}")
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", int(port)))


class _Server(ThreadingHTTPServer):
    """Answers on a socket that listens already; its threads end with the process."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, telemetry: Telemetry) -> None:
        super().__init__(listener.getsockname()[:2], _Pages, bind_and_activate=False)
        self.socket.close()
        self.socket, self.telemetry = listener, telemetry

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up half-way is nobody to write a traceback about."""


class _Pages(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS
    server_version, sys_version = "feddiff", ""

    def do_GET(self) -> None:
        """/metrics, /progress (204 while nothing is known), else 404."""
        if self.path == "/metrics":
            self._answer(200, TEXT, self.server.telemetry.exposition())
        elif self.path == PROGRESS_PATH:
            said = self.server.telemetry.progress()
            self._answer(200 if said else 204, "application/json", said)
        else:
            self._answer(404, "text/plain", b"")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Standard error is the stage's own."""
