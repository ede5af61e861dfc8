"""What a running stage's port answers, read over real HTTP: from an owner's stage nothing that depends on records."""

import contextlib
import os
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from batch_objects import job, stage_spec
from feddiff_protocol import telemetry as protocol
from feddiff_protocol.api import parse
from feddiff_protocol.errors import PrivacyRefusal
from feddiff_protocol.stages import AnyStageSpec, ReleaseSpec, Stage, StageSpec
from feddiff_protocol.telemetry import LOSS, METRICS_PORT_VARIABLE, OF_SHARED_TRAINING
from feddiff_trainer import telemetry
from feddiff_trainer.release import release
from feddiff_trainer.stage import report_progress, run_stage
from feddiff_trainer.stores import open_store
from feddiff_trainer.telemetry import Telemetry, tell, telling

TOUCH_RECORDS = (Stage.RELEASE, Stage.TRAIN_PERSONAL, Stage.SAMPLE, Stage.EVALUATE)
HARMLESS = {"feddiff_stage_info", "feddiff_stage_progress_ratio", "feddiff_stage_step"}
SECRET = "hunter2-hunter2"


def spec_of(stage: Stage) -> AnyStageSpec:
    return stage_spec(job(), stage, "a" if stage in TOUCH_RECORDS else "", attempt=3)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, which stages are told to serve."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number: int = free.getsockname()[1]
    monkeypatch.setenv(METRICS_PORT_VARIABLE, str(number))
    return number


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scraped(text: str) -> dict[str, tuple[float, dict[str, str]]]:
    """Value and labels of every series, by its name; none has more than one."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert len({sample.name for sample in samples}) == len(samples)
    return {sample.name: (sample.value, sample.labels) for sample in samples}


def told_when_all_is_tried(stage: Stage, port: int) -> set[str]:
    """The names that a pod of the stage serves after its code has tried to tell everything that there is."""
    with telling(spec_of(stage)):
        report_progress(3, 7, "images")
        for metric in OF_SHARED_TRAINING:
            with contextlib.suppress(PrivacyRefusal):
                tell(metric, 0.25)
        return set(scraped(get(port, "/metrics")[1]))


@pytest.mark.parametrize("stage", TOUCH_RECORDS)
def test_a_stage_that_touches_records_serves_stage_step_and_percent(stage: Stage, port: int) -> None:
    assert told_when_all_is_tried(stage, port) == HARMLESS


@pytest.mark.parametrize("stage", TOUCH_RECORDS)
def test_a_loss_on_the_list_of_an_owners_stage_is_noticed(
    stage: Stage, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "told_by", lambda of: (*protocol.told_by(of), LOSS))
    assert told_when_all_is_tried(stage, port) == HARMLESS | {"feddiff_trainer_loss"}


def test_a_stage_without_the_list_is_noticed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Telemetry, "tell", lambda self, metric, value: self._values.update({metric: value}))
    assert told_when_all_is_tried(Stage.RELEASE, port) > HARMLESS


def test_an_owners_stage_that_tells_a_loss_is_stopped_even_where_nobody_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spec.json").write_text(spec_of(Stage.RELEASE).model_dump_json(by_alias=True, exclude_none=True))
    monkeypatch.setattr(sys, "argv", ["stage", str(tmp_path / "spec.json")])

    def body(spec: StageSpec) -> dict[str, str]:
        tell(LOSS, 0.5)
        return {}

    assert run_stage(ReleaseSpec, body) == 77
    assert "feddiff_trainer_loss: expected one of feddiff_stage_info" in capfd.readouterr().err


# ---- what is told does not depend on the records ---------------------------------------------------------------


def everything_told(folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch, mechanism: str) -> list[bytes]:
    """Both pages after each piece of a release of records drawn from `seed`."""
    folder.mkdir()
    images = np.random.default_rng(seed).uniform(0, 1, (70, 1, 4, 4)) ** (1 + seed)
    np.savez(folder / "records.npz", images=images, labels=np.repeat([0, 1], [30, 40]))
    more = {"momentClipNorm": "2"} if mechanism == "summary" else {}
    spec = parse(
        ReleaseSpec,
        {
            **spec_of(Stage.RELEASE).to_wire(),
            "source": {"format": "npz", "path": str(folder / "records.npz")},
            "image": {"channels": 1, "height": 4, "width": 4},
            "privacy": {"mechanism": mechanism, "epsilon": "10", "delta": "1e-5", "clipNorm": "2", **more},
            "diffusion": {"splitSigma": "0.25"} if mechanism == "summary" else {},
            "ownerStore": (folder / "owner").as_uri(),
            "federationStore": (folder / "federation").as_uri(),
        },
        "spec",
    )
    pages: list[bytes] = []
    with telling(spec) as told, monkeypatch.context() as patch:
        progressed = told.progressed

        def watched(done: int, total: int) -> None:
            progressed(done, total)
            pages.extend((told.exposition(), told.progress()))

        patch.setattr(told, "progressed", watched)
        stores = {f"{name}_store": open_store(getattr(spec, f"{name}_store")) for name in ("owner", "federation")}
        release(spec, **stores, normals=np.random.default_rng(seed).standard_normal)
    return pages


@pytest.mark.parametrize("mechanism", ["gaussian", "summary"])
def test_owners_with_other_records_of_the_same_declared_counts_tell_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    first = everything_told(tmp_path / "first", 0, monkeypatch, mechanism)
    assert first and first == everything_told(tmp_path / "second", 3, monkeypatch, mechanism)


def test_a_release_that_tells_of_its_records_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feddiff_trainer import release as stage

    honest = stage.release_gaussian_on_grid

    def leaking(records: Any, *arguments: Any, **more: Any) -> Any:
        tell(LOSS, float(records[:].mean()))
        return honest(records, *arguments, **more)

    monkeypatch.setattr(stage, "release_gaussian_on_grid", leaking)
    with pytest.raises(PrivacyRefusal):
        everything_told(tmp_path / "refused", 0, monkeypatch, "gaussian")
    monkeypatch.setattr(telemetry, "told_by", lambda of: (*protocol.told_by(of), LOSS))
    first = everything_told(tmp_path / "first", 0, monkeypatch, "gaussian")
    assert first != everything_told(tmp_path / "second", 3, monkeypatch, "gaussian")


# ---- the pages -------------------------------------------------------------------------------------------------


def test_the_shared_training_tells_more_with_its_types(port: int) -> None:
    with telling(spec_of(Stage.TRAIN_SHARED)):
        tell(protocol.STEPS, 12)
        tell(protocol.GPU_MEMORY, lambda: 7.0)
        report_progress(1234, 2000, "images")
        text = get(port, "/metrics")[1]
    found = scraped(text)
    whose = {"stage": "train-shared", "job_namespace": "research", "job_name": "digits", "client": "", "attempt": "3"}
    assert found["feddiff_stage_info"] == (1, whose)
    assert found["feddiff_trainer_steps_total"] == (12, {}) and found["feddiff_trainer_gpu_memory_bytes"] == (7, {})
    assert found["feddiff_stage_step"] == (1234, {"stage": "train-shared"})
    assert found["feddiff_stage_progress_ratio"] == (0.61, {"stage": "train-shared"})
    assert "# TYPE feddiff_trainer_steps_total counter" in text and "python_" not in text and "process_" not in text


def test_progress_is_whole_percents_where_records_are_touched(port: int) -> None:
    for stage, done in ((Stage.TRAIN_SHARED, 1234), (Stage.SAMPLE, 1220)):
        with telling(spec_of(stage)):
            assert get(port, "/progress") == (204, "")
            report_progress(1234, 2000, "images")
            assert get(port, "/progress") == (200, f'{{"stage": "{stage}", "done": {done}, "total": 2000}}')


def test_time_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0, 20.5])
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: next(clock))
    with telling(spec_of(Stage.TRAIN_SHARED)) as told:
        for _ in range(2):
            with telemetry.time_told(protocol.DATA_WAIT):
                pass
    assert scraped(told.exposition().decode())["feddiff_trainer_data_wait_seconds_total"] == (3.0, {})


def test_nothing_else_is_answered_and_no_page_shows_the_environment(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDERATION_AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("OWNER_AWS_ACCESS_KEY_ID", SECRET)
    with telling(spec_of(Stage.RELEASE)):
        report_progress(1, 2, "images")
        pages = {path: get(port, path) for path in ("/", "/metrics", "/progress", "/../proc/self/environ", "/debug")}
    assert {path for path, (status, _) in pages.items() if status != 404} == {"/metrics", "/progress"}
    assert all(SECRET not in text for _, text in pages.values()) and SECRET in os.environ["OWNER_AWS_ACCESS_KEY_ID"]
    assert capfd.readouterr().err == "", "requests are not logged"


def test_who_says_nothing_or_hangs_up_keeps_nobody_waiting(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with telling(spec_of(Stage.RELEASE)), contextlib.ExitStack() as silent:
        for _ in range(5):
            connection = silent.enter_context(socket.create_connection(("127.0.0.1", port)))
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        connection.close()
        assert get(port, "/metrics")[0] == 200
    assert capfd.readouterr().err == ""


def metric_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "metrics"]


def test_no_port_is_opened_unless_one_is_named_and_none_by_a_second_process_of_a_pod(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with telling(spec_of(Stage.RELEASE)):
        assert metric_threads() == ["metrics"]
    assert metric_threads() == [] and _refused(port), "closed with the stage"
    monkeypatch.setenv("LOCAL_RANK", "1")
    with telling(spec_of(Stage.TRAIN_SHARED)):
        assert metric_threads() == [] and _refused(port)
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv(METRICS_PORT_VARIABLE)
    with telling(spec_of(Stage.RELEASE)):
        assert metric_threads() == [] and _refused(port)


def _refused(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return False
    return True


@pytest.mark.parametrize("named", ["taken", "99999999", "-1", "http"])
def test_a_port_that_cannot_be_had_stops_no_stage(named: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", port)), capture_logs() as logged:
        monkeypatch.setenv(METRICS_PORT_VARIABLE, str(port) if named == "taken" else named)
        with telling(spec_of(Stage.TRAIN_SHARED)) as told:
            tell(LOSS, 1)
    assert [each["event"] for each in logged] == ["metrics_not_served"]
    assert "feddiff_trainer_loss 1.0" in told.exposition().decode()


def test_outside_of_a_stage_nothing_is_told() -> None:
    tell(LOSS, 0.5)
    telemetry.progressed(1, 2)
    with telemetry.time_told(protocol.DATA_WAIT):
        pass


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert metric_threads() == []


Page = Callable[[str], tuple[int, str]]
