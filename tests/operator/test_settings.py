"""The command line of the operator."""

import dataclasses
import subprocess
import sys

import pytest

from feddiff_operator.settings import Settings, parse_settings
from feddiff_protocol.errors import UsageInvalid

IMAGE = ["--trainer-image", "registry.example/feddiff-trainer@sha256:0"]


def test_only_the_image_has_to_be_said() -> None:
    assert parse_settings(IMAGE) == Settings(trainer_image=IMAGE[1])


def test_every_setting_has_a_flag() -> None:
    given = {
        "--lease-namespace": "kube-feddiff",
        "--lease-name": "leader",
        "--lease-seconds": "3",
        "--workers": "4",
        "--api-qps": "20.5",
        "--api-burst": "40",
        "--resync-seconds": "60",
        "--progress-seconds": "0",
        "--port": "0",
        "--liveness-seconds": "300",
    }
    settings = parse_settings(
        [*IMAGE, "--namespace", "b", "--namespace", "a", *(x for kv in given.items() for x in kv)]
    )
    expected = Settings(IMAGE[1], ("a", "b"), "kube-feddiff", "leader", 3, 4, 20.5, 40, 60.0, 0.0, 0, 300.0)
    assert settings == expected
    changed = [field.name for field in dataclasses.fields(Settings)]
    assert all(getattr(settings, name) != getattr(Settings("?"), name) for name in changed)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "0"], "expected a whole number from 1 to 1000, found '0'"),
        (["--workers", "4.5"], "found '4.5'"),
        (["--lease-seconds", "-1"], "--lease-seconds"),
        (["--api-qps", "nan"], "found 'nan'"),
        (["--api-qps", "1e9"], "found '1e9'"),
        (["--port", "65536"], "from 0 to 65535"),
        (["--liveness-seconds", "60"], "from 150 to 86400"),
        (["--namespace", "Not A Name"], "found 'Not A Name'"),
        (["--trainer-image", " "], "expected 1 to 1024 characters"),
        (["--api-qps", "50", "--api-burst", "10"], "expected at least --api-qps, 50, found 10"),
        (["--wokers", "3"], "unrecognized arguments: --wokers 3"),
        (["--work", "3"], "unrecognized arguments: --work 3"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(flags: list[str], words: str) -> None:
    with pytest.raises(UsageInvalid) as raised:
        parse_settings([*IMAGE, *flags])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_image_is_missed_in_words() -> None:
    with pytest.raises(UsageInvalid, match="required: --trainer-image"):
        parse_settings([])


def _operator(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "feddiff_operator", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={"COLUMNS": "120"})


def test_help_shows_every_flag_with_its_default() -> None:
    ended = _operator("--help")
    assert ended.returncode == 0
    assert "--lease-seconds S" in ended.stdout
    assert "(default: 15)" in ended.stdout
    assert "64 command line" in ended.stdout


def test_the_process_ends_with_64_and_one_line() -> None:
    ended = _operator("--trainer-image", "x", "--workers", "none")
    assert ended.returncode == 64
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("feddiff-operator: argument --workers: expected a whole number")


def test_without_a_cluster_the_process_says_what_it_misses() -> None:
    ended = _operator("--trainer-image", "x")
    assert ended.returncode == 78
    assert "KUBECONFIG" in ended.stderr.splitlines()[-1]
