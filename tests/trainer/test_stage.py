import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from feddiff_protocol.errors import FeddiffError, PrivacyRefusal
from feddiff_protocol.stages import RECEIPT_BYTES, Receipt, ReleaseSpec, Stage
from feddiff_trainer import stage
from feddiff_trainer.stage import report_progress, run_stage

SPEC = {
    "job": {"uid": "uid-12345678", "name": "digits", "namespace": "research"},
    "attempt": 3,
    "stage": "release",
    "client": "a",
    "release": "prl-" + "a" * 40,
    "source": {"format": "npz", "path": "train.npz"},
    "image": {"channels": 1, "height": 8, "width": 8},
    "classes": {"count": 2, "records": [5, 7]},
    "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25"},
    "diffusion": {},
    "ownerStore": "file:///owner",
    "federationStore": "file:///federation",
}

Body = Callable[[ReleaseSpec], Mapping[str, str]]
Run = Callable[[Body], int]


def succeed(spec: ReleaseSpec) -> dict[str, str]:
    return {"manifest": "0" * 64}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "SPEC.json").write_text(json.dumps(SPEC))
    monkeypatch.setenv("FEDDIFF_TERMINATION_LOG", str(tmp_path / "termination-log"))

    def run_body(body: Body) -> int:
        monkeypatch.setattr(sys, "argv", ["stage", str(tmp_path / "SPEC.json")])
        return run_stage(ReleaseSpec, body)

    return run_body


def test_receipt_is_the_last_line_and_the_termination_log(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy(spec: ReleaseSpec) -> dict[str, str]:
        print("something a library says")
        return succeed(spec)

    assert run(noisy) == 0
    line = capfd.readouterr().out.splitlines()[-1]
    assert (tmp_path / "termination-log").read_text() == line
    assert len(line.encode()) <= RECEIPT_BYTES
    receipt = Receipt.model_validate_json(line)
    assert (receipt.stage, receipt.job_uid, receipt.client, receipt.attempt) == (Stage.RELEASE, "uid-12345678", "a", 3)
    assert receipt.outputs == {"manifest": "0" * 64}
    assert set(receipt.versions) == {"feddiff", "python", "torch", "numpy"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SPEC.json", "termination-log"]


def test_receipt_says_nothing_but_what_its_type_allows() -> None:
    allowed = {"stage", "job_uid", "client", "attempt", "outputs", "milliseconds", "versions"}
    assert set(Receipt.model_fields) == allowed


@pytest.mark.parametrize("error", [e for e in FeddiffError.__subclasses__() if e.__module__ == FeddiffError.__module__])
def test_error_of_the_tree_is_one_line_and_its_code(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], error: type[FeddiffError]
) -> None:
    def fail(spec: ReleaseSpec) -> dict[str, str]:
        raise error("expected this, found that; do it")

    assert run(fail) == error.exit_code
    assert capfd.readouterr() == ("", "feddiff: expected this, found that; do it\n")
    assert not (tmp_path / "termination-log").exists()


@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.ENOSPC, 74), (errno.EROFS, 73), (errno.EACCES, 73), (errno.EDQUOT, 74), (errno.EIO, 74)],
)
def test_error_of_the_disk_is_one_line(run: Run, capfd: pytest.CaptureFixture[str], code: int, expected: int) -> None:
    def fail(spec: ReleaseSpec) -> dict[str, str]:
        raise OSError(code, os.strerror(code), "/some/file")

    assert run(fail) == expected
    message = capfd.readouterr().err
    assert message.startswith("feddiff: /some/file: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), FileNotFoundError(errno.ENOENT, "bug"), AssertionError()])
def test_our_bug_is_a_traceback_and_code_one(run: Run, capfd: pytest.CaptureFixture[str], error: Exception) -> None:
    def fail(spec: ReleaseSpec) -> dict[str, str]:
        raise error

    assert run(fail) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_stage_says_that_it_can_go_on(
    run: Run, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def stopped(spec: ReleaseSpec) -> dict[str, str]:
        signal.raise_signal(number)
        raise AssertionError("went on")

    before = signal.getsignal(number)
    assert run(stopped) == 75
    assert capfd.readouterr().err == f"feddiff: stopped by {number.name}; run it again to go on\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("name", "text", "expected", "says"),
    [
        ("no JSON", "{", 65, "expected JSON"),
        ("no text", b"\xff\xfe\xfa", 65, "expected JSON"),
        ("deep nesting", "[" * 100_000, 65, "expected JSON"),
        ("a list", "[]", 65, "SPEC.json"),
        ("a field missing", json.dumps({k: v for k, v in SPEC.items() if k != "client"}), 65, "client: expected"),
        ("unknown field", json.dumps(SPEC | {"seed": 1}), 65, "seed: unknown field"),
        ("another stage", json.dumps(SPEC | {"stage": "report"}), 65, "stage"),
        ("epsilon of zero", json.dumps(SPEC | {"privacy": SPEC["privacy"] | {"epsilon": "0"}}), 65, "epsilon"),
        ("absent", None, 66, "No such file"),
    ],
)
def test_bad_spec_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    text: str | bytes | None,
    expected: int,
    says: str,
) -> None:
    path = tmp_path / "SPEC.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sys, "argv", ["stage", str(path)])
    assert run_stage(ReleaseSpec, succeed) == expected
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("feddiff: ")
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("argv", [["stage"], ["stage", "a", "b"]])
def test_wrong_number_of_arguments_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert run_stage(ReleaseSpec, succeed) == 64
    assert "expected one argument" in capfd.readouterr().err


def test_only_the_first_rank_hands_over_a_receipt(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def body(spec: ReleaseSpec) -> dict[str, str]:
        report_progress(1, 2, "images")
        return succeed(spec)

    monkeypatch.setenv("RANK", "1")
    assert run(body) == 0
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "termination-log").exists()


def test_progress_is_json_lines_and_few_of_them(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = iter(number * 0.1 for number in range(1000))
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))

    def body(spec: ReleaseSpec) -> dict[str, str]:
        for done in range(101):
            report_progress(done, 100, "images", epoch=1)
        return succeed(spec)

    assert run(body) == 0
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    fields = {"event": "progress", "stage": "release", "total": 100, "unit": "images", "epoch": 1}
    assert all(fields.items() <= line.items() for line in lines)
    done = [line["done"] for line in lines]
    assert done[0] == 0
    assert done[-1] == 100
    assert 10 <= len(done) <= 25
    assert done == sorted(done)


def test_failed_hand_over_leaves_no_torn_receipt(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stage.os, "replace", fail)
    assert run(succeed) == 74
    assert [path.name for path in tmp_path.iterdir()] == ["SPEC.json"]
    assert capfd.readouterr().out == ""


def test_refusal_keeps_its_own_code_when_it_comes_from_a_disk_error(run: Run) -> None:
    def fail(spec: ReleaseSpec) -> dict[str, str]:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise PrivacyRefusal("expected, found; do") from error

    assert run(fail) == 77


def test_frame_does_not_load_torch() -> None:
    code = "import sys, feddiff_trainer.stage, feddiff_trainer.stores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
