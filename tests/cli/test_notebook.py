"""`import feddiff`: typed answers that are the command's own, its refusals as exceptions, and the example notebook."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import feddiff
from feddiff import notebook
from feddiff.run_folder import RunFolder
from feddiff.tables import html_list, html_table
from feddiff_protocol.errors import FeddiffError, InputMissing, Interrupted, PrivacyRefusal, UsageInvalid
from feddiff_protocol.promise import NOT_COVERED
from feddiff_protocol.stages import Stage

EXAMPLE = Path(__file__).parents[2] / "examples/notebook/digits.ipynb"


@pytest.fixture
def said(request: pytest.FixtureRequest) -> Callable[..., tuple[int, str, str]]:
    """The fixture `feddiff`, under a name that leaves the module its own."""
    run: Callable[..., tuple[int, str, str]] = request.getfixturevalue("feddiff")
    return run


@pytest.fixture
def stages(in_the_trainers_place: Any, world: Any) -> Any:
    return in_the_trainers_place(world.stages())


# ---- What is there ---------------------------------------------------------------------------------------------


def test_every_name_is_there_and_no_other() -> None:
    assert all(getattr(feddiff, name) is getattr(notebook, name) for name in feddiff.__all__)
    assert dir(feddiff) == sorted(feddiff.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'budget'"):
        feddiff.budget  # type: ignore[attr-defined]  # noqa: B018


def test_importing_it_loads_nothing_until_something_is_asked_for() -> None:
    script = "import feddiff, sys; print(*sorted({'pydantic', 'yaml', 'rich', 'numpy', 'torch'} & set(sys.modules)))"
    asked = f"{script}; feddiff.load; print(*sorted({{'numpy', 'torch', 'feddiff_trainer'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout == "\n\n"


# ---- plan and ledger -------------------------------------------------------------------------------------------


def test_a_plan_is_what_the_command_says_and_writes_nothing(world: Any, said: Any) -> None:
    file = world.job_file()
    planned = feddiff.plan(feddiff.load(file))
    first, told = planned.clients[0], json.loads(said("plan", file, "--json")[1])
    assert (first.client, first.dataset, first.unit, first.releases) == ("a", "clinic-a/scans", "image", 1)
    assert (first.epsilon, first.delta) == (Decimal(10), Decimal("1e-5"))
    assert first.budget_after.spent_epsilon == pytest.approx(10)
    assert told["clients"][0]["budgetAfter"]["remainingEpsilon"] == first.budget_after.remaining_epsilon
    assert [each["mu"] for each in told["clients"]] == [each.mu for each in planned.clients]
    assert planned.refusals == {} and planned.not_covered == NOT_COVERED
    assert [path.name for path in world.path.iterdir()] == ["digits.yaml"]


def test_a_plan_is_shown_with_unit_delta_and_number_of_releases(world: Any) -> None:
    shown = feddiff.plan(feddiff.load(world.job_file()))._repr_html_()
    for words in (
        "ε = 10 per image, δ = 1e-5, 1 release",
        "<td>15.3137</td>",
        "ε per image of all releases",
        "AUC 0.92",
    ):
        assert words in shown
    assert "Refused" not in shown and shown.count("<li>") == len(NOT_COVERED)


def test_what_exceeds_a_budget_is_planned_with_the_reason_refused_by_run_and_spends_nothing(
    world: Any, said: Any
) -> None:
    for folder in ("1", "2"):
        world.run(world.job(), world.stages(), folder=folder)
    file, job = world.job_file(), feddiff.load(world.job_file())
    before, planned = feddiff.ledger(job.datasets["a"]), feddiff.plan(job)
    assert set(planned.refusals) == {"a", "b"} and "Refused" in planned._repr_html_()
    with pytest.raises(PrivacyRefusal) as refused:
        feddiff.run(job, world.path / "3", progress=False)
    assert planned.refusals["a"] in str(refused.value)
    assert feddiff.ledger(job.datasets["a"]).entries == before.entries
    assert not (world.path / "3/stages").exists(), "nothing was started"
    code, _, err = said("run", file, "--dir", world.path / "4")
    assert (code, err.splitlines()[-1]) == (refused.value.exit_code, f"feddiff: {refused.value}")


def test_a_ledger_says_what_counts_and_what_is_left(world: Any) -> None:
    dataset = feddiff.datasets(world.job_file())["clinic-a/scans"]
    empty = feddiff.ledger(dataset)
    assert (empty.uid, empty.releases, empty.entries, empty.budget.remaining_epsilon) == ("", 0, (), pytest.approx(20))
    world.run(world.job(), world.stages())
    found = feddiff.ledger(dataset)
    assert (found.releases, found.unit, found.contradiction) == (1, "image", "")
    assert (found.budget.limit_epsilon, found.budget.delta) == (Decimal(20), Decimal("1e-5"))
    assert found.budget.spent_epsilon == pytest.approx(10)
    assert [entry.client for entry in found.entries] == ["a"]
    assert "spent ε = 10.0000 of 20 per image (δ = 1e-5, 1 release), remaining ε = 15.3137" in found._repr_html_()


def test_a_ledger_that_contradicts_itself_has_nothing_left(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run(world.job(), world.stages())
    dataset = world.job().datasets["a"]
    monkeypatch.setattr("feddiff_protocol.ledger.inconsistency", lambda account, entries: "an entry is gone")
    found = feddiff.ledger(dataset)
    assert (found.budget.remaining_epsilon, found.budget.remaining_pure_epsilon) == (0, 0)
    assert "contradicts itself, admits nothing: an entry is gone" in found._repr_html_()


# ---- run and what it leaves ------------------------------------------------------------------------------------


def test_a_run_is_one_that_the_command_knows_and_is_not_done_twice(world: Any, stages: Any, said: Any) -> None:
    job, folder = feddiff.load(world.job_file()), world.path / "run"
    run = feddiff.run(job, folder, processes=2, progress=False)
    started = len(stages.started)
    assert feddiff.run(job, str(folder), progress=False).status() == run.status()
    assert len(stages.started) == started == 10
    status, told = feddiff.Run(folder).status(), json.loads(said("status", folder, "--json")[1])
    assert (status.phase, status.at_work, status.counted, status.failure) == ("Complete", False, ("a", "b"), "")
    assert [each["phase"] for each in told["stages"]] == [each.phase for each in status.stages] == ["Succeeded"] * 10
    assert "Job research/digits: Complete" in status._repr_html_()
    assert run.job.datasets == job.datasets and run.folder == folder


def test_progress_is_shown_unless_it_is_not_wanted(world: Any, stages: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job = feddiff.load(world.job_file())
    feddiff.run(job, world.path / "quiet", progress=False)
    assert capsys.readouterr() == ("", "")
    feddiff.run(feddiff.load(world.job_file("other")), world.path / "told")
    told = capsys.readouterr()
    assert told.out == "" and "event='stage-ended' stage='report' attempt=1 phase='Succeeded'" in told.err


def test_a_failed_stage_raises_its_code_and_names_its_log(world: Any, stages: Any) -> None:
    stages.behaviour = lambda spec: (
        "echo 'feddiff: no such column' >&2; exit 65" if spec.stage is Stage.RELEASE else None
    )
    with pytest.raises(feddiff.StageFailed, match="release ended with exit code 65: no such column") as failed:
        feddiff.run(feddiff.load(world.job_file()), world.path / "run", progress=False)
    log = world.path / "run/stages/release-a/attempt-1/stderr.log"
    assert failed.value.exit_code == 65 and str(failed.value).endswith(f"its words are in {log}")
    status = feddiff.Run(world.path / "run").status()
    assert status.failure.startswith("ClientsLost: ") and status.failure.split(": ")[1] in status._repr_html_()


def test_an_interrupted_run_raises_and_the_same_call_goes_on(
    world: Any, stages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    job, folder, before = feddiff.load(world.job_file()), world.path / "run", signal.getsignal(signal.SIGINT)
    interrupt = f"kill -INT {os.getpid()}; exec sleep 600"
    stages.behaviour = lambda spec: interrupt if spec.stage is Stage.TRAIN_SHARED else None
    with pytest.raises(Interrupted, match="to go on"):
        feddiff.run(job, folder, progress=False)
    assert "stages save their work" in capsys.readouterr().err and signal.getsignal(signal.SIGINT) is before
    stages.behaviour = lambda spec: None
    assert feddiff.run(job, folder, progress=False).status().phase == "Complete"
    assert stages.started.count("release a") == 1, "nothing is released again"


def test_a_suspended_job_raises_too(world: Any, stages: Any) -> None:
    with pytest.raises(Interrupted, match=r"spec\.suspend is true"):
        feddiff.run(feddiff.load(world.job_file(suspend=True)), world.path / "run", progress=False)


def test_a_thread_may_run_a_job(world: Any, stages: Any) -> None:
    job = feddiff.load(world.job_file())
    with ThreadPoolExecutor(1) as executor:
        run = executor.submit(feddiff.run, job, world.path / "run", progress=False).result()
    assert run.status().phase == "Complete"


REFUSED: dict[str, tuple[type[FeddiffError], Callable[[Any], object], list[str]]] = {
    "a file that is not there": (InputMissing, lambda path: feddiff.load(path / "none.yaml"), ["plan", "{}/none.yaml"]),
    "no run": (InputMissing, lambda path: feddiff.Run(path), ["report", "{}"]),
    "no report yet": (InputMissing, lambda path: feddiff.Run(path / "begun").report(), ["report", "{}/begun"]),
    "no such client": (
        UsageInvalid,
        lambda path: feddiff.Run(path / "begun").sample("z", 1),
        ["sample", "{}/begun", "--client", "z", "--images-per-class", "1", "--out", "{}/z.npz"],
    ),
    "no samples yet": (
        InputMissing,
        lambda path: feddiff.Run(path / "begun").sample("a", 1),
        ["sample", "{}/begun", "--client", "a", "--images-per-class", "1", "--out", "{}/a.npz"],
    ),
    "ray's options": (
        UsageInvalid,
        lambda path: feddiff.run(feddiff.load(path / "digits.yaml"), path / "run", gpu_share=0.5),
        ["run", "{}/digits.yaml", "--dir", "{}/run", "--gpu-share", "0.5"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_command_refuses_raises_the_same_words_and_code(world: Any, said: Any, what: str) -> None:
    kind, call, arguments = REFUSED[what]
    RunFolder(world.path / "begun").begin(feddiff.load(world.job_file()))
    with pytest.raises(kind) as refused:
        call(world.path)
    code, _, err = said(*(each.format(world.path) for each in arguments))
    assert (code, err) == (refused.value.exit_code, f"feddiff: {refused.value}\n")
    assert not (world.path / "run").exists()


@pytest.mark.parametrize("wrong", [{"engine": "spark"}, {"processes": 0}])
def test_arguments_that_the_command_line_cannot_have_are_refused_too(world: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageInvalid, match=r"expected .*, found (spark|0)"):
        feddiff.run(feddiff.load(world.job_file()), world.path / "run", **wrong)
    assert not (world.path / "run").exists()


def test_figures_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"arms": 1}')
    with pytest.raises(FeddiffError, match="expected an evaluation of this version"):
        _ = feddiff.OwnerReport(tmp_path / "page.html", tmp_path / "evaluation.json").figures


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_samples_are_shown_as_one_picture_and_called_private(channels: int) -> None:
    images = np.zeros((6, channels, 4, 5), np.uint8)
    shown = feddiff.Samples("a", images, images, images, np.repeat([0, 1, 2], 2))._repr_html_()
    assert shown.count("data:image/png;base64,") == 1 and "not private, for the owner of client a only" in shown


def test_words_of_others_are_no_markup() -> None:
    bad = "<script>alert(1)</script>"
    shown = html_table(bad, [bad], [[bad]]) + html_table(bad, (), [[bad, bad]]) + html_list(bad, [bad])
    assert "<script" not in shown and shown.count("&lt;script&gt;") == 8


# ---- Beside threads --------------------------------------------------------------------------------------------

ENGINE = """
import os, sys, threading
from pathlib import Path
from feddiff.processes import StartProcess
if sys.argv[2] == "threads":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
start = StartProcess(lambda spec, path: ["/bin/sh", "-c", "echo $$; exec sleep 600"])
stage = start(("release", "a"), 1, Path(sys.argv[1]), None, 1, 1, 0.0)
while not (Path(sys.argv[1]) / "stdout.log").read_text().endswith("\\n"):
    pass
os._exit(0)
"""


@pytest.mark.parametrize("threads", ["threads", "alone"])
def test_a_stage_is_told_to_stop_when_its_engine_dies_in_a_process_with_threads_or_alone(
    tmp_path: Path, threads: str
) -> None:
    subprocess.run([sys.executable, "-c", ENGINE, str(tmp_path), threads], check=True)
    pid, deadline = int((tmp_path / "stdout.log").read_text()), time.monotonic() + 60
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(pid)


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- The example -----------------------------------------------------------------------------------------------

# As a kernel does: cells one after the other in one namespace, beside a thread, the last expression of each shown.
KERNEL = """
import ast, json, sys, threading
from pathlib import Path
threading.Thread(target=threading.Event().wait, daemon=True).start()
scope, shown = {"__name__": "__main__"}, []
for number, cell in enumerate(json.loads(Path(sys.argv[1]).read_text())["cells"]):
    if cell["cell_type"] == "code":
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {number}", "exec"), scope)
        if last is not None and (value := eval(compile(ast.Expression(last.value), "cell", "eval"), scope)) is not None:
            shown.append(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))
Path(sys.argv[2]).write_text(json.dumps(shown))
"""


def test_the_example_notebook_is_committed_without_outputs() -> None:
    book = json.loads(EXAMPLE.read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    cells = book["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all((cell["outputs"], cell["execution_count"]) == ([], None) for cell in code)
    assert EXAMPLE.stat().st_size < 10_000


@pytest.mark.timeout(900)  # eleven processes that load torch, one after the other where there is one core
def test_the_example_notebook_plans_runs_samples_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command_line = [sys.executable, "-c", KERNEL, str(EXAMPLE), str(tmp_path / "shown.json")]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    plan, status, samples, report, ledger = json.loads((tmp_path / "shown.json").read_text())
    for words in ("ε = 10 per image, δ = 1e-5, 1 release", "<td>owner-b/scans</td>", "Not covered by the promise"):
        assert words in plan
    assert "Job research/digits: Complete" in status and status.count("<td>Succeeded</td>") == 10
    assert "data:image/png;base64," in samples and "not private" in samples
    assert "job-report.html" in report and report.count("<td>minority</td>") == 4  # arms of the owner with a hold-out
    assert "spent ε = 10.0000 of 12 per image (δ = 1e-5, 1 release)" in ledger
    shape, *figures, refusal = [line for line in done.stdout.splitlines() if line]
    assert shape == "(32, 1, 8, 8) uint8"
    assert {line.split(":")[0] for line in figures} == {
        f"a {arm} recall of the rare digits" for arm in ("both", "shared", "personal", "real")
    }
    assert all(0 <= float(line.split(":")[1]) <= 1 for line in figures)
    assert "client a: spent so far ε = 10.0000 of 12 (per image, δ = 0.00001); with this release" in refusal
    assert not (tmp_path / "runs/digits-notebook/again/stages").exists(), "a second release was started"
