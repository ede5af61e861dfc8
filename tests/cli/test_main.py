"""The command as its users meet it: answers, exit codes, one line for a mistake, and the next command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from feddiff import processes
from feddiff.run_folder import RunFolder
from feddiff_protocol.promise import NOT_COVERED
from feddiff_protocol.stages import Stage

CLIENT_KEYS = {
    *("client", "mechanism", "unit", "epsilon", "delta", "mu", "paperEpsilon", "attackAuc", "attackTprAt1PercentFpr"),
    *("onePixel", "releases", "split", "budgetBefore", "budgetAfter", "signalToNoiseDb"),
}


@pytest.fixture
def fake_stages(in_the_trainers_place: Any, world: Any) -> Any:
    return in_the_trainers_place(world.stages())


# ---- plan --------------------------------------------------------------------------------------------------------


def test_plan_says_what_is_promised_and_what_it_costs(feddiff: Any, world: Any) -> None:
    code, out, err = feddiff("plan", world.job_file())
    assert (code, err) == (0, "")
    for words in ("ε = 10 per image, δ = 1e-5, 1 release", "11.6001", "15.3137", "Not covered by the promise"):
        assert words in out
    assert f"next: feddiff run {world.path / 'digits.yaml'}" in out
    assert not (world.path / "a").exists()


def test_plan_as_json_holds_exactly_the_documented_keys(feddiff: Any, world: Any) -> None:
    code, out, _ = feddiff("plan", world.job_file(), "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["notCovered"] == list(NOT_COVERED)
    assert [set(each) for each in answer["clients"]] == [CLIENT_KEYS, CLIENT_KEYS]
    first = answer["clients"][0]
    assert (first["client"], first["epsilon"], first["delta"], first["releases"]) == ("a", "10", "1e-5", 1)
    assert first["mu"] == pytest.approx(2.000446, abs=1e-6)
    assert first["attackAuc"] == pytest.approx(0.92140, abs=1e-5)
    assert set(first["split"]) == {"step", "sigma"}
    assert first["budgetBefore"]["spentEpsilon"] == 0
    assert first["budgetAfter"]["spentEpsilon"] == pytest.approx(10)
    budget = {"spentEpsilon", "remainingEpsilon", "remainingPureEpsilon", "limitEpsilon", "delta"}
    assert set(first["budgetAfter"]) == budget


PURE = {"privacy": {"mechanism": "privunit", "epsilon": "2", "clipNorm": "4.25"}}


def test_plan_of_pure_epsilon_says_that_delta_is_0_and_what_is_left_of_it(feddiff: Any, world: Any) -> None:
    world.budget["pureEpsilon"] = "5"
    code, out, err = feddiff("plan", world.job_file(**PURE))
    assert (code, err) == (0, "")
    for words in ("ε = 2 per image, δ = 0, 1 release (pure ε)", "pure ε left", "AUC 0.8808; 7.4% found at 1 %"):
        assert words in out
    assert "paper's formula" not in out and "μ" not in out
    first = json.loads(feddiff("plan", world.job_file(**PURE), "--json")[1])["clients"][0]
    assert set(first) == CLIENT_KEYS
    assert (first["delta"], first["mu"], first["paperEpsilon"]) == ("0", None, None)
    assert (first["budgetBefore"]["remainingPureEpsilon"], first["budgetAfter"]["remainingPureEpsilon"]) == ("5", "3")
    assert first["budgetAfter"]["spentEpsilon"] == 2 and first["budgetAfter"]["remainingEpsilon"] < 15.0001


def test_plan_of_pure_epsilon_that_no_budget_sets_aside_says_by_how_much_it_is_too_much(
    feddiff: Any, world: Any
) -> None:
    code, _, err = feddiff("plan", world.job_file(**PURE))
    assert code == 77
    assert "(pure ε: 0 + 2 > 0, too much by 2)" in err and "raise the budget" not in err


def test_plan_of_what_exceeds_a_budget_says_by_how_much_and_ends_with_77(feddiff: Any, world: Any) -> None:
    for folder in ("1", "2"):
        world.run(world.job(), world.stages(), folder=folder)
    code, out, err = feddiff("plan", world.job_file())
    assert code == 77
    assert "20.1309" in out
    assert err.startswith("feddiff: client a: spent so far ε = 15.4606 of 20 (per image")
    code, out, _ = feddiff("plan", world.job_file(), "--json")
    assert code == 77
    assert set(json.loads(out)["refusals"]) == {"a", "b"}


def test_plan_of_what_an_owner_does_not_allow_ends_with_77(feddiff: Any, world: Any) -> None:
    job = world.job_file()
    job.write_text(job.read_text().replace("namespace: research\nspec", "namespace: elsewhere\nspec"))
    code, _, err = feddiff("plan", job)
    assert code == 77
    assert "lets no job of namespace elsewhere use it" in err


# ---- run ---------------------------------------------------------------------------------------------------------


def test_run_names_the_reports_and_the_next_command(feddiff: Any, world: Any, fake_stages: Any) -> None:
    job, folder = world.job_file(), world.path / "runs/digits"
    with_reports(fake_stages, world)
    code, out, err = feddiff("run", job)
    assert code == 0, err
    assert "May be shared" in out and "job-report.html" in out
    assert f"next: feddiff ledger {job}" in out
    assert "event='stage-started'" in err
    code, out, _ = feddiff("status", folder, "--json")
    assert (code, json.loads(out)["phase"], json.loads(out)["atWork"]) == (0, "Complete", False)
    assert {each["phase"] for each in json.loads(out)["stages"]} == {"Succeeded"}
    assert "Complete" in feddiff("status", folder)[1]
    assert "Not private, for its owner only" in feddiff("report", folder)[1]


def test_run_as_json_writes_nothing_but_one_object_per_line(feddiff: Any, world: Any, fake_stages: Any) -> None:
    with_reports(fake_stages, world)
    code, out, err = feddiff("run", world.job_file(), "--json")
    assert (code, err) == (0, "")
    events = [json.loads(line) for line in out.splitlines()]
    assert [each["phase"] for each in events if each["event"] == "phase"][-1] == "Complete"
    assert sum(each["event"] == "stage-ended" for each in events) == 10
    assert events[-1]["event"] == "finished"
    assert events[-1]["jobReport"].endswith("job-report.html")
    progress = [each for each in events if each["event"] == "progress"]
    assert progress and progress[0]["stage"] == "train-shared" and progress[0]["total"] == 10


def with_reports(stages: Any, world: Any) -> None:
    """The fake report stage leaves a page, and the shared one says how far it is."""

    def behaviour(spec: Any) -> str | None:
        if spec.stage.value == "report":
            page = Path(spec.federation_store.removeprefix("file://")) / spec.job.uid / "report/job-report.html"
            return f"mkdir -p {page.parent}; touch {page}; {world.receipt_script(spec)}"
        if spec.stage.value == "train-shared":
            line = json.dumps({"event": "progress", "stage": "train-shared", "done": 5, "total": 10, "unit": "images"})
            return f"echo '{line}' >&2; {world.receipt_script(spec)}"
        return None

    stages.behaviour = behaviour


def test_a_failed_run_says_what_failed_and_where_to_read(feddiff: Any, world: Any, fake_stages: Any) -> None:
    def broken(spec: Any) -> str | None:
        return "echo 'feddiff: no such column' >&2; exit 65" if spec.stage.value == "release" else None

    fake_stages.behaviour = broken
    code, out, err = feddiff("run", world.job_file(), "--dir", world.path / "run")
    assert code == 65
    assert "client a: release ended with exit code 65: no such column" in err
    assert f"{world.path / 'run/stages/release-a/attempt-1/stderr.log'}" in err
    assert "Traceback" not in err
    code, out, _ = feddiff("status", world.path / "run")
    assert "Failed: ClientsLost" in out


@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_stops_the_run_which_says_how_to_go_on(world: Any, as_json: bool) -> None:
    json_option = ["--json"] if as_json else []
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import FakeStages
from feddiff import engine, main, processes
setting = engine.Setting
slow = FakeStages(lambda spec: "echo; touch {world.path}/ready; exec sleep 600")
engine.Setting = lambda **given: setting(start_attempt=processes.StartProcess(slow), **given)
main.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, "run", str(world.job_file()), "--dir", str(world.path / "run"), *json_option],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    events = process.stdout if as_json else process.stderr
    assert events is not None
    while "stage-started" not in events.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM if as_json else signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    said = [json.loads(line) for line in out.splitlines()]
    last = [(each["event"], each["exitCode"], each["message"]) for each in said if "exitCode" in each]
    assert last == [("stopped", 75, "stopped; run the same command again to go on")][: len(json_option)]
    assert not as_json or said[-1]["event"] == "stopped"
    assert "feddiff: stopped; run the same command again to go on" in err
    assert "Traceback" not in err


# ---- ledger, sample, check, init ---------------------------------------------------------------------------------


def test_ledger_lists_every_entry_with_sums(feddiff: Any, world: Any) -> None:
    world.run(world.job(), world.stages())
    for where in (world.job_file(), world.path / "run"):
        code, out, _ = feddiff("ledger", where)
        assert code == 0
        assert "spent ε = 10.0000 of 20 per image (δ = 1e-5, 1 release), remaining ε = 15.3137" in out
        assert "research/digits" in out and "Charged" in out
    answer = json.loads(feddiff("ledger", world.job_file(), "--json")[1])
    (entry,) = answer["datasets"][0]["entries"]
    assert (entry["phase"], entry["epsilon"], entry["job"]["name"]) == ("Charged", "10", "digits")
    assert answer["datasets"][0]["contradiction"] == ""


def test_ledger_shows_pure_epsilon_apart(feddiff: Any, world: Any) -> None:
    world.budget["pureEpsilon"] = "5"
    world.run(world.job(), world.stages())
    world.run(world.job("pure", **PURE), world.stages(), folder="pure")
    code, out, _ = feddiff("ledger", world.job_file())
    assert code == 0
    assert "spent ε = 12.0000 of 20 per image (δ = 1e-5, 2 releases)" in out
    assert "of pure ε 3 of 5" in out
    for word in ("pure ε 2", "μ²", "privunit"):
        assert word in out
    entries = json.loads(feddiff("ledger", world.job_file(), "--json")[1])["datasets"][0]["entries"]
    assert [(each["delta"], each["muSquared"], each["pureEpsilon"]) for each in entries][1] == ("0", "0", "2")


def test_a_fresh_budget_shows_as_whole(feddiff: Any, world: Any) -> None:
    assert "remaining ε = 20.0000" in feddiff("ledger", world.job_file())[1]


def test_sample_wants_a_finished_run_a_known_client_and_a_new_file(feddiff: Any, world: Any) -> None:
    world.run(world.job(), world.stages(lambda spec: "exit 65" if spec.stage is Stage.SAMPLE else None))
    asked = ["sample", world.path / "run", "--images-per-class", "5", "--client"]
    (world.path / "there.npz").touch()
    for client, out, code, words in (
        ("a", "x.png", 64, "ends in .npz"),
        ("z", "x.npz", 64, "expected one of a, b, found z"),
        ("a", "there.npz", 73, "exists"),
        ("a", "no/x.npz", 73, "is no folder"),
        ("a", "x.npz", 66, "has no samples yet"),
    ):
        found, _, err = feddiff(*asked, client, "--out", world.path / out)
        assert (found, words in err) == (code, True), err


def test_sample_asks_the_trainer_with_other_numbers_and_an_output(
    feddiff: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feddiff import owner_stages

    world.run(world.job(), world.stages())
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        owner_stages, "run_module", lambda module, path: asked.append((module, json.loads(path.read_text())))
    )
    out = world.path / "more.npz"
    code, _, err = feddiff("sample", world.path / "run", "--client", "b", "--images-per-class", "7", "--out", out)
    assert code == 0, err
    ((module, spec),) = asked
    assert module == "feddiff_trainer.sample"
    assert (spec["client"], spec["sampling"]["imagesPerClass"], spec["output"]) == ("b", 7, str(out))


def test_check_is_private_and_says_so_first(feddiff: Any, world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from feddiff import owner_stages

    answer = {
        "records": 70,
        "classes": [{"class": 0, "declared": 30, "found": 29}, {"class": 1, "declared": 40, "found": 41}],
        "pixelRange": [0.0, 1.0],
        "normQuantiles": {"50 %": 3.5},
        "clips": [{"field": "clipNorm", "norm": "4.25", "touched": 7}],
        "released": {"tensors": {"mean_sums": [2, 64]}, "bytes": 512},
        "inception": "inception.pt, SHA-256 01, as the dataset states",
    }
    monkeypatch.setattr(owner_stages, "run_module", lambda module, path: json.dumps(answer))
    code, out, _ = feddiff("check", world.job_file())
    assert code == 0
    assert out.splitlines()[0].startswith("PRIVATE")
    for words in (
        "declared 30 records, found 29",
        "clipNorm 4.25 would scale 7 of 70",
        "mean_sums 2×64 (512 bytes)",
        "FID and KID would be measured by inception.pt, SHA-256 01, as the dataset states",
    ):
        assert words in out
    assert json.loads(feddiff("check", world.job_file(), "--json")[1])["notice"].startswith("PRIVATE")


def test_what_the_trainer_refuses_is_one_line_with_its_code(feddiff: Any, world: Any) -> None:
    pytest.importorskip("numpy")
    code, _, err = feddiff("check", world.job_file())
    assert code == 66
    assert err.startswith("feddiff: ") and "train.npz" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("owners", [1, 3])
def test_init_writes_documents_that_plan_accepts(feddiff: Any, tmp_path: Path, owners: int) -> None:
    code, out, _ = feddiff("init", tmp_path / "new", "--owners", owners)
    assert code == 0
    assert "next: " in out and "feddiff check" in out
    job = tmp_path / "new/job.yaml"
    assert len(list(yaml.safe_load_all(job.read_text()))) == owners + 1
    assert feddiff("plan", job)[0] == 0
    code, _, err = feddiff("init", tmp_path / "new")
    assert (code, "exists; name another folder" in err) == (73, True)


# ---- What goes to kubectl apply, too -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan", "run", "check", "ledger"])
def test_what_is_for_a_cluster_alone_is_said_once(
    feddiff: Any, world: Any, fake_stages: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from feddiff import owner_stages

    with_reports(fake_stages, world)
    answer = {"records": 1, "classes": [], "pixelRange": [0.0, 1.0], "normQuantiles": {}, "clips": []}
    monkeypatch.setattr(owner_stages, "run_module", lambda module, path: json.dumps(answer))
    job = world.job_file()
    said = {}
    for text in (job.read_text(), f"{OF_A_CLUSTER}---\n{job.read_text()}"):
        job.write_text(text)
        code, out, err = feddiff(name, job, "--json")
        assert code == 0, err
        said[err] = out.count("\n") > 0 and "Namespace" not in out
    assert said == {
        "": True,
        "feddiff: passed over, since only a cluster needs it: 2 Namespace, 1 PersistentVolume\n": True,
    }


OF_A_CLUSTER = "---\n".join(
    f"{{apiVersion: v1, kind: {kind}, metadata: {{name: x}}}}\n"
    for kind in ("Namespace", "PersistentVolume", "Namespace")
)


def test_what_an_owner_applies_goes_to_plan(feddiff: Any, world: Any) -> None:
    """As it is printed; a researcher's job beside it."""
    *_, job = yaml.safe_load_all(world.job_file(diffusion={"splitSigma": "2"}).read_text())
    job["spec"]["clients"] = [{"name": "a", "dataset": {"namespace": "clinic-a", "name": "scans"}}]
    job["spec"]["privacy"]["epsilon"] = "1"
    owner = world.path / "owner.yaml"
    owner.write_text(feddiff("owner", "init", "-n", "clinic-a", "--research", "research", "--dataset", "scans")[1])
    (world.path / "job.yaml").write_text(yaml.safe_dump(job))
    code, out, err = feddiff("plan", owner, world.path / "job.yaml")
    assert code == 0, err
    assert "clinic-a/scans" in out
    assert err == "feddiff: passed over, since only a cluster needs it: 1 Namespace, 1 RoleBinding, 1 NetworkPolicy\n"


# ---- Mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["frobnicate"], 64),
        (["plan"], 64),
        (["plan", "--nope", "x.yaml"], 64),
        (["plan", "nothing.yaml"], 66),
        (["run", "nothing.yaml"], 66),
        (["run", "nothing.yaml", "--processes", "0"], 64),
        (["status", "nowhere"], 66),
        (["report", "nowhere"], 66),
        (["ledger", "nowhere"], 66),
        (["init", "x", "--owners", "0"], 64),
    ],
)
def test_a_mistake_is_told_without_a_traceback(feddiff: Any, arguments: list[str], code: int) -> None:
    found, out, err = feddiff(*arguments)
    assert found == code
    assert err and "Traceback" not in out + err


def test_every_fault_of_a_document_gets_its_own_line(feddiff: Any, world: Any) -> None:
    job = world.job_file()
    job.write_text(job.read_text().replace("'10'", "ten").replace("8", "0"))
    code, _, err = feddiff("plan", job)
    assert code == 65
    assert len(err.splitlines()) > 1
    assert all(line.startswith("feddiff: ") for line in err.splitlines())


def test_a_run_folder_that_cannot_be_written_is_73(feddiff: Any, world: Any) -> None:
    (world.path / "file").touch()
    code, _, err = feddiff("run", world.job_file(), "--dir", world.path / "file/run")
    assert code == 73
    assert err.startswith("feddiff: ")


def test_version_and_help(feddiff: Any) -> None:
    assert feddiff("--version")[1].startswith("feddiff 0.")
    code, out, _ = feddiff("--help")
    assert code == 0
    assert "Exit codes:" in out


def test_the_command_line_of_the_shared_denoiser_goes_through_torchrun(world: Any) -> None:
    stages = world.stages()
    world.run(world.job(shared={"replicas": 2}), stages)
    by_stage = {spec.stage.value: processes.stage_command(spec, Path("spec.json")) for spec in stages.specs}
    assert by_stage["train-shared"][1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "feddiff_trainer.train_shared", "spec.json"),
    ]
    assert by_stage["release"][1:] == ["-m", "feddiff_trainer.release", "spec.json"]


def test_an_unexpected_error_is_our_bug_with_a_traceback(world: Any) -> None:
    script = "from feddiff import main; main.app = lambda: 1 / 0; main.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


# ---- audit -------------------------------------------------------------------------------------------------------


ESTIMATE = {"value": 0.841, "low": 0.83, "high": 0.85}
FINDING = {
    "target": "upload",
    "attack": "matched filter",
    "group": "all",
    "members": 10_000,
    "others": 10_000,
    "auc": ESTIMATE,
    "aucBound": 0.842,
    "tpr": ESTIMATE,
    "tprBound": 0.85,
    "controlAuc": 1.0,
    "verdict": "within its bound",
}
ONE_RUN = {
    "target": "upload",
    "controlAuc": 1.0,
    "attack": "a",
    "canaries": 1000,
    "guesses": 100,
    "correct": 100,
    "epsilonLow": 2.5,
    "ceiling": 2.5,
}
ONE_RUN |= {"epsilonBound": 2.0, "delta": 1e-5, "verdict": "above its bound"}
AUDIT = {
    "findings": [FINDING],
    "oneRun": [],
    "copies": [],
    "notes": [],
    "exportRefusals": ["the personal denoiser was not attacked"],
}


def trainer_that_answers(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    from feddiff import owner_stages

    asked: list[tuple[str, dict[str, Any]]] = []

    def run_module(module: str, path: Path, told: Any = None) -> str:
        asked.append((module, json.loads(path.read_text())))
        return json.dumps(answer)

    monkeypatch.setattr(owner_stages, "run_module", run_module)
    return asked


def test_audit_asks_the_trainer_for_every_owner_and_says_first_that_it_is_private(
    feddiff: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(world.job(), world.stages())
    asked = trainer_that_answers(monkeypatch, AUDIT)
    code, out, err = feddiff("audit", world.path / "run")
    assert (code, [(module, spec["client"]) for module, spec in asked]) == (
        0,
        [("feddiff_trainer.audit", c) for c in "ab"],
    ), err
    assert out.startswith("PRIVATE") and "within its bound" in out and "0.841 (0.830 to 0.850)" in out
    assert "do not pass on the personal denoiser: the personal denoiser was not attacked" in out
    code, out, _ = feddiff("audit", world.path / "run", "--client", "b", "--json")
    assert (code, list(json.loads(out)["clients"]), len(asked)) == (0, ["b"], 3)


def test_an_attack_above_its_bound_ends_with_77_after_the_whole_answer(
    feddiff: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(world.job(), world.stages())
    red = {"findings": [FINDING, FINDING | {"verdict": "above its bound"}], "oneRun": [ONE_RUN]}
    trainer_that_answers(monkeypatch, AUDIT | red)
    code, out, err = feddiff("audit", world.path / "run", "--client", "a", "--json")
    assert (code, len(json.loads(out)["clients"]["a"]["findings"])) == (77, 2)
    assert "client a: matched filter on upload: AUC 0.841, bound 0.842: a bug of ours" in err
    assert "client a: one run on upload, a: ε ≥ 2.50 per image, bound 2.00: a bug of ours" in err


def test_audit_wants_a_finished_run_and_a_known_client(feddiff: Any, world: Any) -> None:
    world.run(world.job(), world.stages(lambda spec: "exit 65" if spec.stage is Stage.SAMPLE else None))
    for client, code, words in (("z", 64, "expected one of a, b, found z"), ("a", 66, "has no samples yet")):
        found, _, err = feddiff("audit", world.path / "run", "--client", client)
        assert (found, words in err) == (code, True), err


def test_what_a_process_of_the_trainer_says_on_its_way_is_told_at_once(tmp_path: Path) -> None:
    from feddiff import owner_stages

    script = 'import sys\nprint(\'{"event": "progress", "done": 3, "total": 9}\', file=sys.stderr)\nprint("answer")'
    (tmp_path / "a_module.py").write_text(script)
    told: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert (
            owner_stages.run_module("a_module", tmp_path / "spec.json", lambda *seen: told.append(seen)) == "answer\n"
        )
    assert told == [(3, 9)]


# ---- export ------------------------------------------------------------------------------------------------------


def test_export_asks_the_trainer_for_the_owner_and_says_what_is_on_record(
    feddiff: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(world.job(), world.stages())
    asked = trainer_that_answers(monkeypatch, {"refusals": ["one", "two"]})
    out = world.path / "p.safetensors"
    code, said, err = feddiff(
        "export", "denoiser", world.path / "run", "--client", "b", "--out", out, "--override", "they are public"
    )
    assert (code, "overridden: 2 reasons against it" in said) == (0, True), err
    ((module, spec),) = asked
    assert module == "feddiff_trainer.export" and spec["run"]["client"] == "b"
    assert {name: spec[name] for name in ("what", "out", "override")} == {
        "what": "denoiser",
        "out": str(out),
        "override": "they are public",
    }


def test_the_shared_denoiser_goes_out_by_the_hash_of_its_receipt_and_without_an_owner(
    feddiff: Any, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(world.job(), world.stages())
    asked = trainer_that_answers(monkeypatch, {"files": []})
    out = world.path / "shared"
    code, said, err = feddiff("export", "shared", world.path / "run", "--out", out, "--license", "cc-by-4.0")
    assert (code, err) == (0, "")
    assert "made of 2 owners' releases, each at ε = 10 per image, δ = 1e-5, k = 1 release; it may be shared" in said
    ((module, spec),) = asked
    assert module == "feddiff_trainer.export_shared" and spec["run"]["stage"] == "train-shared"
    folder = RunFolder(world.path / "run")
    receipt = folder.receipt((Stage.TRAIN_SHARED, ""), 1, folder.record().uid)
    assert receipt is not None and spec["sharedDenoiserSha256"] == receipt.outputs["denoiser"]
    assert (spec["licence"], spec["out"]) == ("cc-by-4.0", str(out))


def test_a_licence_is_an_identifier(feddiff: Any, world: Any) -> None:
    out = world.path / "shared"
    code, _, err = feddiff("export", "shared", world.path / "run", "--out", out, "--license", "mine: yes")
    assert (code, "--license: expected an identifier like cc-by-4.0, found 'mine: yes'" in err) == (64, True), err


def test_an_export_of_a_personal_denoiser_names_its_owner(feddiff: Any, world: Any) -> None:
    world.run(world.job(), world.stages())
    code, _, err = feddiff("export", "denoiser", world.path / "run", "--out", world.path / "p.safetensors")
    assert (code, "--client: expected the owner whose denoiser it is, found none" in err) == (64, True), err


def test_a_shared_denoiser_that_is_not_there_yet_is_missing_input(feddiff: Any, world: Any) -> None:
    RunFolder(world.path / "new").begin(world.job())
    code, _, err = feddiff("export", "shared", world.path / "new", "--out", world.path / "shared")
    assert (code, "no shared denoiser yet" in err) == (66, True), err


def test_export_wants_a_known_client_a_new_file_of_its_kind_and_a_reason(feddiff: Any, world: Any) -> None:
    world.run(world.job(), world.stages())
    (world.path / "there.npz").touch()
    for what, client, out, override, code, words in (
        ("denoiser", "a", "x.npz", (), 64, "ends in .safetensors"),
        ("samples", "a", "x.safetensors", (), 64, "ends in .npz"),
        ("samples", "z", "x.npz", (), 64, "expected one of a, b, found z"),
        ("samples", "a", "there.npz", (), 73, "exists"),
        ("samples", "a", "x.npz", ("--override", " "), 64, "expected the owner's reason"),
        ("shared", "a", "x", (), 64, "--client: belongs to denoiser or samples, found a"),
        ("both", "a", "x.npz", (), 64, "'both' is not one of"),
        ("samples", "a", "x.npz", ("--license", "mit"), 64, "--license: belongs to shared, found mit"),
    ):
        found, _, err = feddiff(
            "export", what, world.path / "run", "--client", client, "--out", world.path / out, *override
        )
        assert (found, words in err) == (code, True), err
