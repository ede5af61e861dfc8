"""The ranks of one pod end with the code of the one that explains the end."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from feddiff_protocol.errors import FINAL_EXIT_CODES
from feddiff_trainer import ranks
from feddiff_trainer.ranks import num_threads, own_codes, telling

STAGE = textwrap.dedent(
    """
    import os, signal, sys

    def stop(*_):
        sys.exit(75)

    what = sys.argv[1].split(",")[int(os.environ["LOCAL_RANK"])]
    heard = {"deaf": signal.SIG_IGN, "imports": signal.SIG_DFL}.get(what, stop)
    signal.signal(signal.SIGTERM, heard)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    up = " ".join(["up", *(str(os.environ.get(name)) for name in names)])
    os.write(2, f"{up}\\n".encode())  # at once: ranks share the pipe
    if what in ("waits", "deaf", "imports"):
        while True:
            signal.pause()
    if os.environ["RANK"] == "0":
        print("receipt", flush=True)
    sys.exit(int(what))
    """
)


class Pod:
    """A pod's first process, with the stage of this test."""

    def __init__(
        self,
        folder: Path,
        behaviour: str,
        grace_seconds: float = 60.0,
        cpu_limit: Path = ranks.CPU_LIMIT,
        **environment: str,
    ) -> None:
        (folder / "stage_of_test.py").write_text(STAGE)
        path = os.pathsep.join([str(folder), *sys.path])
        code = (
            "import pathlib, sys; from feddiff_trainer import ranks;"
            f"ranks.GRACE_SECONDS, ranks.CPU_LIMIT = {grace_seconds}, pathlib.Path({str(cpu_limit)!r});"
            "sys.exit(ranks.main(sys.argv[1:]))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(1 + behaviour.count(",")), "stage_of_test", behaviour],
            env={**os.environ, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def up(self, count: int) -> list[str]:
        """The first lines of so many ranks, once they listen."""
        assert self.process.stderr is not None
        return sorted(self.process.stderr.readline().strip() for _ in range(count))

    def ended(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=120)
        return self.process.returncode, out


def test_ranks_know_their_numbers_and_only_the_first_of_all_writes(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "0,0", NODE_RANK="1", WORLD_SIZE="4", OMP_NUM_THREADS="3")
    assert pod.up(2) == ["up 2 0 4 3", "up 3 1 4 3"]
    assert pod.ended() == (0, "")
    assert Pod(tmp_path, "0,0", NODE_RANK="0", WORLD_SIZE="4").ended() == (0, "receipt\n")


@pytest.mark.parametrize("code", [77, 75, 69, 1])
def test_the_code_of_the_rank_that_ends_first_is_the_pods_and_the_others_are_stopped(tmp_path: Path, code: int) -> None:
    assert Pod(tmp_path, f"waits,{code}").ended() == (code, "")


def test_a_rank_that_does_not_stop_is_killed_after_a_while(tmp_path: Path) -> None:
    assert Pod(tmp_path, "deaf,74", grace_seconds=0.5).ended() == (74, "")


def test_sigterm_reaches_every_rank_and_is_an_interruption(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "waits,waits")
    pod.up(2)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.ended() == (75, "")


def test_a_stage_that_is_stopped_while_it_imports_is_interrupted(tmp_path: Path) -> None:
    pod = Pod(tmp_path, "imports")
    pod.up(1)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.ended() == (75, "")


@pytest.mark.parametrize(("behaviour", "threads"), [("0", "4"), ("0,0", "2"), ("0,0,0", "1")])
def test_processes_of_one_pod_share_the_cpus_of_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text("450000 100000\n")
    pod = Pod(tmp_path, behaviour, cpu_limit=tmp_path / "cpu.max")
    assert {line.split()[-1] for line in pod.up(1 + behaviour.count(","))} == {threads}
    assert pod.ended()[0] == 0


def test_a_pod_without_a_limit_or_with_less_than_a_cpu_has_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert num_threads("max 100000", 1) == num_threads("50000 100000", 1) == 1
    pod = Pod(tmp_path, "0", cpu_limit=tmp_path / "not-there")
    assert (pod.up(1)[0].split()[-1], pod.ended()[0]) == ("1", 0)


@pytest.mark.parametrize(
    ("story", "codes", "expected"),
    [
        ("all did what they should", [0, 0], 0),
        ("a refusal stops the others", [77, 75], 77),
        ("a refusal after somebody's bug", [1, 77], 77),
        ("the others lose the rank that was killed for its memory", [137, 74, 74], 137),
        ("the first failure, the others in its wake", [69, 74], 69),
        ("one is interrupted, the other fails for its own reason", [75, 1], 1),
        ("all are interrupted", [75, 75], 75),
        ("one was done before the others were interrupted", [0, 75], 75),
    ],
)
def test_the_telling_code_is_the_one_that_explains(story: str, codes: list[int], expected: int) -> None:
    assert telling(codes) == expected, story


def test_a_death_by_our_own_signal_is_an_interruption_and_any_other_is_what_it_is() -> None:
    assert own_codes([143, 0], stopped=False) == [143, 0]
    assert own_codes([137, 74], stopped=False) == [137, 74]
    assert own_codes([75, 143, 137], stopped=False) == [75, 75, 75]
    assert own_codes([0, 143], stopped=True) == [0, 75]


def test_a_launcher_that_said_what_ended_last_would_hide_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: with it, the stage would be tried again for ever."""
    codes = [77, 75]
    assert telling(codes) in FINAL_EXIT_CODES
    monkeypatch.setattr(ranks, "FINAL_EXIT_CODES", frozenset())
    assert telling([1, 77]) not in FINAL_EXIT_CODES
    assert codes[-1] not in FINAL_EXIT_CODES


@pytest.mark.parametrize("argv", [[], ["0", "m", "s"], ["two", "m", "s"], ["2", "m"]])
def test_a_command_line_that_does_not_fit_is_64(argv: list[str]) -> None:
    assert ranks.main(argv) == 64
