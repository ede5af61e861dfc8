"""Both reports in a real browser, driven over the DevTools pipe: quiet, self-contained, no wider than the screen."""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feddiff_protocol.api import parse
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import EvaluateSpec, ReportSpec
from feddiff_trainer.evaluation import GROUPS, MEASURES, ArmQuality, Evaluation
from feddiff_trainer.owner_page import Gallery, OwnerReport, owner_page
from feddiff_trainer.pages import CONTENT_SECURITY_POLICY
from feddiff_trainer.pictures import LabelledImages, grid
from feddiff_trainer.report import job_report

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")


@dataclass
class Visit:
    """What a page did while it was open at one width in one colour scheme."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    overflow: int = 0  # CSS pixels by which the page is wider than its window
    background: str = ""
    images: tuple[int, int] = (0, 0)  # all, and those that were decoded


class Browser:
    """A headless Chromium; commands and events are JSON, each ended by a zero byte, on file descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        (read_commands, self.commands), (self.events, write_events) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}", "--no-first-run", "--disable-extensions", "--disable-dev-shm-usage"]
        redirect = f'exec "$@" 3<&{read_commands} 4>&{write_events}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", str(CHROMIUM), *flags, "about:blank"],
            pass_fds=(read_commands, write_events), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_commands)
        os.close(write_events)
        self.count, self.rest, self.seen = 0, b"", list[dict[str, Any]]()
        self.session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda message: message.get("id") == self.count)
        assert "error" not in answer, answer
        return answer["result"]

    def _wait(self, wanted: Any) -> dict[str, Any]:
        """The next wanted message; all others are kept in `seen`."""
        while True:
            while b"\0" not in self.rest:
                chunk = os.read(self.events, 1 << 20)
                assert chunk, "the browser closed its pipe"
                self.rest += chunk
            line, self.rest = self.rest.split(b"\0", 1)
            message = json.loads(line)
            if wanted(message):
                return message
            self.seen.append(message)

    def visit(self, page: Path, width: int, scheme: str, screenshot: Path | None = None) -> Visit:
        self.seen.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        if not any(message.get("method") == "Page.loadEventFired" for message in self.seen):
            self._wait(lambda message: message.get("method") == "Page.loadEventFired")
        visit = Visit(
            overflow=self.value("document.documentElement.scrollWidth - document.documentElement.clientWidth"),
            background=self.value("getComputedStyle(document.body).backgroundColor"),
            images=tuple(self.value("(i => [i.length, i.filter(x => x.naturalWidth).length])([...document.images])")),
        )
        if screenshot is not None:
            shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            screenshot.write_bytes(base64.b64decode(shot))
        for message in self.seen:
            _note(visit, message.get("method", ""), message.get("params", {}))
        visit.requests.remove(page.as_uri())
        return visit

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def close(self) -> None:
        os.close(self.commands)  # end of its input ends the browser
        self.process.wait()
        os.close(self.events)


def _note(visit: Visit, method: str, params: dict[str, Any]) -> None:
    if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
        visit.requests.append(params["request"]["url"])
    elif method == "Log.entryAdded":
        visit.complaints.append(params["entry"]["text"])
    elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
        visit.complaints.append(json.dumps(params))


def faults(visit: Visit) -> list[str]:
    """The criterion for every page: what is wrong with this visit, nothing for a good page."""
    wrong = [*visit.complaints, *(f"requested {url}" for url in visit.requests)]
    if visit.overflow > 0:
        wrong.append(f"{visit.overflow} pixels too wide")
    if visit.images[0] != visit.images[1]:
        wrong.append(f"{visit.images[0] - visit.images[1]} images without pixels")
    return wrong


LONG = "a" + "-much-longer-name-than-anybody-would-give"[:40] + "x" * 20
CLASSES = {"count": 3, "records": [112, 5, 40], "names": ["zero", "W" * 63, "<b>two</b>"]}
COMMON = {
    "job": {"uid": "0123abcd", "name": LONG, "namespace": "research"},
    "attempt": 1,
    "releases": [{"client": LONG, "manifestSha256": "a" * 64}],
    "image": {"channels": 3, "height": 28, "width": 28},
    "classes": CLASSES,
    "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25"},
    "diffusion": {},
    "shared": {},
    "federationStore": "file:///federation",
}


def random_images(num: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(num).integers(0, 256, (num, 3, 28, 28), dtype=np.uint8)


def job_page() -> bytes:
    budget = {"client": LONG, "budgetEpsilon": "20", "spentEpsilon": "15.46", "remainingEpsilon": "9.87"}
    spec = {
        "budgets": [budget | {"delta": "1e-5", "numReleases": 2}],
        "durations": [{"stage": "release", "client": LONG, "attempts": 1, "milliseconds": 1234}],
        "command": f"feddiff run {'very/long/' * 30}job.yaml",
        "sharedDenoiserSha256": "b" * 64,
    }
    samples = LabelledImages({"images": random_images(48)}, np.arange(48) % 3)
    return job_report(parse(ReportSpec, COMMON | spec, "spec"), samples, {"feddiff": "0.1.0"})


def evaluation_of(spec: EvaluateSpec, uid: str, measured: bool) -> Evaluation:
    values = {measure.key: 0.5 for measure in MEASURES}
    quality = ArmQuality(groups=dict.fromkeys(GROUPS, values), per_class=(values,) * 3)
    how = {
        "numSamples": 300,
        "numTrain": 157,
        "numHoldout": 50,
        "nearestNeighbours": 5,
        "seed": 0,
        "extractor": "small classifier",
    }
    row = grid(random_images(3), 3)
    document = {
        "job": spec.job.to_wire() | {"uid": uid},
        "client": spec.client,
        "recordsSha256": "c" * 64,
        "finishedAt": "2026-01-02T03:04:05+00:00",
        "mechanism": "gaussian",
        "epsilon": "10",
        "delta": "1e-5",
        "muSquared": "4.0",
        "splitStep": 700,
        "splitSigma": 6.4,
        "measured": how if measured else None,
        "arms": dict.fromkeys(("both", "shared", "personal", "real"), quality) if measured else {},
        "picture": {"pngBase64": base64.b64encode(row.png).decode(), "width": row.width, "height": row.height},
    }
    return parse(Evaluation, document, "evaluation")


def owners_page(measured: bool) -> bytes:
    document = COMMON | {
        "client": LONG,
        "source": {"format": "npz", "path": "/train.npz"},
        "network": {},
        "personal": {},
        "sampling": {},
        "ownerStore": "file:///owner",
    }
    spec = parse(EvaluateSpec, document, "spec")
    images = [random_images(min(8, count)) for count in CLASSES["records"]]
    return owner_page(
        OwnerReport(
            spec=spec,
            promise=promise_of(spec.privacy, spec.diffusion),
            evaluation=evaluation_of(spec, spec.job.uid, measured),
            others=[evaluation_of(spec, "other-uid", measured)],
            minority=[1],
            gallery=Gallery(dict.fromkeys(("real", "released", "shared", "personal", "both"), images), "Released."),
        )
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports in files, with names as long as names may be and images in colour."""
    folder = tmp_path_factory.mktemp("pages")
    contents = {
        "owner report": owners_page(measured=True),
        "owner report without hold-out": owners_page(measured=False),
        "job report": job_page(),
    }
    for name, content in contents.items():
        (folder / f"{name}.html").write_bytes(content)
    return {name: folder / f"{name}.html" for name in contents}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["owner report", "owner report without hold-out", "job report"])
def test_a_report_is_quiet_and_fits_the_screen(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    visit = browser.visit(pages[name], width, scheme)
    assert faults(visit) == []
    assert visit.images[0] > 0
    assert (sum(int(part) for part in re.findall(r"\d+", visit.background)) < 128) is (scheme == "dark")


BAD_PAGES = {
    "loads from elsewhere": '<img src="https://example.invalid/x.png">',
    "runs a script": "<script>document.title = 'ran'</script>",
    "complains": "<script>console.warn('oh')</script>",
    "is too wide": '<div style="width: 2000px">wide</div>',
    "has a broken image": '<img src="data:image/png;base64,AAAA">',
}


@pytest.mark.parametrize(
    ("fault", "policy"),
    [*((fault, True) for fault in BAD_PAGES), *((fault, False) for fault in BAD_PAGES if fault != "runs a script")],
)
def test_the_same_check_fails_a_page_that(browser: Browser, tmp_path: Path, fault: str, policy: bool) -> None:
    page = tmp_path / "bad.html"
    meta = f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">' if policy else ""
    page.write_text(f'<!doctype html><meta charset="utf-8">{meta}<link rel="icon" href="data:,">{BAD_PAGES[fault]}')
    assert faults(browser.visit(page, 400, "light"))
