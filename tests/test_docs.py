"""The documentation says what the software does: commands, options, JSON keys, exit codes, links, samples, blocks.

Every check returns what is wrong; each is also run on a text made wrong on purpose and must find that.
"""

import copy
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from typer.testing import CliRunner

import feddiff
from feddiff import cluster_budgets, cluster_jobs, cluster_scene, cluster_why, store_checks
from feddiff import main as command
from feddiff.documents import LocalJob, load_documents, load_job
from feddiff.experiment import check_budgets
from feddiff.experiment_file import load_experiment
from feddiff.local_ledger import LocalLedger, read_ledger
from feddiff.plan_report import plan_document, plan_report
from feddiff.run_folder import RunFolder
from feddiff.scaffold import job_text, write_scaffold
from feddiff.split import owners_text
from feddiff.views import ledger_document, ledger_of, run_document, run_status
from feddiff_operator.workloads import check_overlay
from feddiff_protocol import errors, ledger_objects
from feddiff_protocol.access import Role
from feddiff_protocol.api import API_VERSION, FederatedDiffusionJob, parse_document
from feddiff_protocol.baselines import Baseline
from feddiff_protocol.errors import FINAL_EXIT_CODES, RETRIED_EXIT_CODES, FeddiffError, SpecInvalid
from feddiff_protocol.plan import Observed, plan
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import JobReference
from feddiff_trainer.check import CheckSpec, check
from feddiff_trainer.findings import Audit, Copies, Estimate, Finding, Reconstruction, Target, Verdict
from feddiff_trainer.store_probes import failed
from feddiff_trainer.verdicts import one_run_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CLI = (DOCS / "cli.md").read_text()
EXIT_CODES = (DOCS / "exit-codes.md").read_text()
EXPERIMENTS = sorted((ROOT / "examples" / "experiments").glob("*.yaml"))  # no documents
IMAGES = ROOT / "examples" / "images"  # a job alone: `feddiff split` writes its datasets
EXAMPLE_FOLDERS = sorted(
    {path.parent for path in (ROOT / "examples").rglob("*.yaml") if path not in EXPERIMENTS} - {IMAGES}
)
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


# ---- cli.md: commands and options ------------------------------------------------------------------------------


def sections(text: str) -> dict[str, str]:
    """Text below each heading "## `feddiff …`", by command; "" is `feddiff` itself."""
    _, *parts = re.split(r"^## `feddiff ?(.*)`$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands(group: Any, before: str = "") -> dict[str, Any]:
    """Every command by the words that name it, "" the first; commands of a group among them ("owner init")."""
    found = {before: group}
    for name, inner in getattr(group, "commands", {}).items():
        found |= commands(inner, f"{before} {name}".lstrip())
    return found


def known_commands() -> dict[str, Any]:
    return commands(typer.main.get_command(command.app))


def wrong_options(text: str) -> list[str]:
    """Commands, options and arguments that only the page or only the application has."""
    written, known = sections(text), known_commands()
    wrong = [f"command {name!r}" for name in written.keys() ^ known.keys()]
    for name in written.keys() & known.keys():
        (usage,) = re.findall(r"^Usage:.*?\n\n", written[name], flags=re.MULTILINE | re.DOTALL)
        rows = re.findall(r"^\| `(--[a-z-]+)", written[name], flags=re.MULTILINE)
        short = set(re.findall(r"^\| .*, `(-[a-zA-Z])\b", written[name], flags=re.MULTILINE)) - {"-h"}
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", written[name]))
        arguments = [each.metavar for each in known[name].params if each.param_type_name == "argument"]
        options = {option for each in known[name].params if each.param_type_name == "option" for option in each.opts}
        options |= {"--help"} if name == "" else set()
        wrong += [f"{name}: {each} in the table" for each in short ^ {each for each in options if len(each) == 2}]
        wrong += [f"{name}: {each} in the usage line" for each in short if each not in usage]
        options = {each for each in options if len(each) > 2}
        wrong += [f"{name}: {each} in the text" for each in mentioned ^ options]
        wrong += [f"{name}: {each} in the table" for each in set(rows) ^ options]
        wrong += [f"{name}: {each} in the usage line" for each in options - {"--help"} if each not in usage]
        wrong += [f"{name}: argument {each}" for each in arguments if not re.search(rf" \[?{re.escape(each)}", usage)]
    return wrong


def test_the_command_page_has_every_command_argument_and_option_and_no_other() -> None:
    assert wrong_options(CLI) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("## `feddiff status`", "## `feddiff state`"),
        ("| `--owners N`", "| `--parties N`"),
        ("[--processes N]", ""),
        ("feddiff plan FILE...", "feddiff plan JOB"),
        ("Reads documents and ledgers", "Reads documents and ledgers (--quiet)"),
        ("## `feddiff owner init`", "## `feddiff owner start`"),
        ("`--all-namespaces`, `-A` |", "`--all-namespaces`, `-B` |"),
        ("feddiff budget [DATASET]", "feddiff budget [NAME]"),
    ],
)
def test_a_command_page_that_is_wrong_in_one_word_is_noticed(right: str, wrong: str) -> None:
    assert right in CLI
    assert wrong_options(CLI.replace(right, wrong)) != []


def test_required_options_are_called_required() -> None:
    for name, known in known_commands().items():
        for each in known.params:
            if name and each.param_type_name == "option":
                row = next(line for line in sections(CLI)[name].splitlines() if line.startswith(f"| `{each.opts[0]}"))
                assert each.required == ("required" in row), row


# ---- cli.md: JSON keys -----------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> LocalJob:
    write_scaffold(tmp_path / "mine", 2)
    return load_job([tmp_path / "mine" / "job.yaml"])


def keys(value: Any, free: frozenset[str] = frozenset()) -> Iterator[str]:
    """Keys of a JSON value at any depth; below a name of `free` the next keys are data, not names."""
    if isinstance(value, list | tuple):
        for each in value:
            yield from keys(each, free)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            below = list(inner.values()) if name in free and isinstance(inner, dict) else inner
            yield from keys(below, free)


def missing_keys(name: str, value: Any, text: str, free: frozenset[str] = frozenset()) -> set[str]:
    return {key for key in keys(value, free) if f"`{key}`" not in sections(text)[name]}


def test_plan_and_ledger_keys_are_on_the_page(job: LocalJob) -> None:
    planned = plan_document(plan_report(job))
    assert missing_keys("plan", planned, CLI, frozenset({"refusals"})) == set()
    LocalLedger(job.first_dataset).reserve(job.document, "uid", "a", job.promise.charge)
    document = ledger_document(ledger_of(job.first_dataset))
    assert document["entries"]
    assert missing_keys("ledger", {"datasets": [document]}, CLI) == set()
    assert missing_keys("plan", planned, CLI.replace("`paperEpsilon`", "`looserEpsilon`")) == {"paperEpsilon"}


def test_status_keys_are_on_the_page(job: LocalJob, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(job)
    folder.write_status(plan(job.document, Observed({}, {})).status, None)
    document = run_document(run_status(folder))
    assert document["conditions"]
    assert missing_keys("status", document, CLI, frozenset({"dropped"})) == set()


def test_keys_of_a_cluster_are_on_the_page() -> None:
    """Of objects that have all that is shown: a list or a mapping without entries would hide its keys."""
    condition = {"type": "Failed", "status": "True", "reason": "StageFailed", "message": "m"}
    status = {"phase": "Failed", "conditions": [condition], "dropped": [{"client": "a", "reason": "r"}]}
    status |= {"stages": [{"stage": "release", "running": 0, "succeeded": 0, "failed": 1, "stopped": 0}]}
    metadata = {"namespace": "n", "name": "j", "uid": "u"}
    clients = [{"name": "a", "dataset": {"namespace": "c", "name": "d"}}]
    job = {"metadata": metadata, "spec": {"clients": clients, "privacy": {"epsilon": "1"}}, "status": status}
    labels = {"feddiff.dev/stage": "release", "feddiff.dev/client": "a", "feddiff.dev/attempt": "1"}
    batch = {"metadata": {**metadata, "labels": labels}, "spec": {}}
    unreadable = (cluster_scene.Unreadable("c", "privatedatasets", "ask"),)
    reference = cluster_scene.JobReference("n", "j", "u")
    scene = cluster_scene.Scene(reference, job, attempts=[batch], unreadable=unreadable)
    assert missing_keys("status", cluster_jobs.jobs_document([job]), CLI) == set()
    assert missing_keys("status", cluster_jobs.job_document(job), CLI, frozenset({"dropped"})) == set()
    why = cluster_why.why_document(scene)
    assert all(why[name] for name in ("clients", "attempts", "unreadable", "next"))
    assert missing_keys("why", why, CLI) == set()
    assert missing_keys("why", why, CLI.replace("`takesPart`", "`partakes`")) == {"takesPart"}


def test_keys_of_a_clusters_budget_are_on_the_page(job: LocalJob) -> None:
    LocalLedger(job.first_dataset).reserve(job.document, "uid", "a", job.promise.charge)
    (entry,) = read_ledger(job.first_dataset).entries
    release = ledger_objects.with_status_of(ledger_objects.release_object("n", "d", entry), entry)
    dataset = {
        "metadata": {"namespace": "n", "name": "d", "uid": "u"},
        "spec": {"budget": {"epsilon": "20", "delta": "1e-5"}},
    }
    document = cluster_budgets.budget_document(cluster_budgets.Books(dataset, [release]))
    assert document["entries"]
    assert missing_keys("budget", {"datasets": [document]}, CLI) == set()


def test_check_keys_are_on_the_page(tmp_path: Path) -> None:
    text = job_text(1).replace("[1000, 1000]", "[2, 2]").replace("height: 28, width: 28", "height: 8, width: 8")
    (tmp_path / "job.yaml").write_text(text)
    (tmp_path / "owner-a").mkdir()
    np.savez(tmp_path / "owner-a" / "train.npz", images=np.full((4, 8, 8), 0.5), labels=np.array([0, 0, 1, 1]))
    job = load_job([tmp_path / "job.yaml"])
    spec = job.first_dataset.document.spec
    answer = check(
        CheckSpec(
            source=job.first_dataset.source, image=spec.image, classes=spec.classes, privacy=job.document.spec.privacy
        )
    )
    said = {"notice": "", "datasets": {job.first_dataset.key: answer}}
    assert missing_keys("check", said, CLI, frozenset({"datasets", "normQuantiles", "tensors"})) == set()


def test_audit_keys_are_on_the_page() -> None:
    """Of an audit that found something everywhere: what is left out would hide its keys."""
    estimate = Estimate(value=0.5, low=0.4, high=0.6)
    finding = Finding(
        target=Target.UPLOAD,
        attack="a",
        members=100,
        others=100,
        auc=estimate,
        auc_bound=0.9,
        tpr=estimate,
        tpr_bound=0.9,
        control_auc=1.0,
        verdict=Verdict.WITHIN,
    )
    found = Audit(
        job=JobReference(uid="uid-00000001", name="j", namespace="n"),
        client="a",
        records_sha256="a" * 64,
        personal_sha256="a" * 64,
        samples_sha256="a" * 64,
        finished_at="",
        findings=(finding,),
        one_run=(one_run_of(Target.UPLOAD, "a", np.zeros(20), np.zeros(20, np.bool_), 1.0, 1e-5, 1.0),),
        reconstruction=Reconstruction(
            records=1,
            nearer=estimate,
            nearer_bound=0.6,
            gain_db=0.1,
            ssim=0.2,
            guess_ssim=0.1,
            control_nearer=1.0,
            control_gain_db=9.0,
            control_ssim=1.0,
            verdict=Verdict.WITHIN,
        ),
        copies=(Copies(target=Target.BOTH, third=estimate, half=estimate),),
        blind=estimate,
    )
    said = {"notice": "", "clients": {"a": found.to_wire() | {"exportRefusals": []}}}
    assert missing_keys("audit", said, CLI, frozenset({"clients"})) == set()
    assert missing_keys("audit", said, CLI.replace("`aucBound`", "`limit`"), frozenset({"clients"})) == {"aucBound"}


def test_keys_of_a_store_check_are_on_the_page() -> None:
    finding = failed("keys", errors.InputMissing, expected="e", found="f", advice="a")
    document = {"store": "s3://b", "role": None, "client": None, "findings": [finding.to_wire()]}
    assert missing_keys("store check", {"stores": [document]}, CLI) == set()
    policies = store_checks.policies_of([store_checks.store_at("s3://federation/x", Role.FEDERATION, ["a"])])
    (policy,) = policies
    assert missing_keys("store check", {"policies": [policy | {"awsIam": ""}]}, CLI) == set()
    assert missing_keys("store check", {"stores": [document]}, CLI.replace("`advice`", "`hint`")) == {"advice"}


def unexplained(text: str) -> set[str]:
    """Questions about a store that can fail and that the table of messages leaves out."""
    sources = (ROOT / "trainer" / "feddiff_trainer" / f"{name}.py" for name in ("bucket_check", "store_probes"))
    asked = {
        name
        for each in sources
        for name in re.findall(r'(?:failed\(\s*|check = |_public\()"([a-z ,]+)"', each.read_text())
    }
    assert {"endpoint", "keys", "bucket", "clock", "reach", "create if absent", "public access"} <= asked
    return {name for name in asked if f"`✗ {name}" not in text}


def test_every_question_about_a_store_that_can_fail_is_explained() -> None:
    text = (DOCS / "stores.md").read_text()
    assert unexplained(text) == set()
    assert unexplained(text.replace("`✗ clock`", "`✗ watch`")) == {"clock"}


# ---- exit-codes.md ---------------------------------------------------------------------------------------------


def wrong_exit_codes(text: str) -> list[str]:
    """Classes, codes and retries that differ between the table and protocol/feddiff_protocol/errors.py."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if re.match(r"\| \d", line)]
    written = {(name, int(code)) for code, names, *_ in rows for name in re.findall(r"`(\w+)`", names)}
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, FeddiffError)]
    known = {(each.__name__, each.exit_code) for each in classes if each is not FeddiffError}
    retried = {int(code) for code, *_, answer in rows if answer == "yes"} - {1}
    final = {int(code) for code, *_, answer in rows if answer == "no"}
    wrong = [f"{name} {code}" for name, code in written ^ known]
    wrong += [f"{code} retried" for code in retried ^ RETRIED_EXIT_CODES]
    return wrong + [f"{code} final" for code in final ^ FINAL_EXIT_CODES]


def test_the_table_of_exit_codes_is_the_tree_of_errors() -> None:
    assert wrong_exit_codes(EXIT_CODES) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (r"`DataInvalid`", ""),
        (r"\| 66 \|", "| 67 |"),
        (r"`PrivacyRefusal`", "`PrivacyRefused`"),
        (r"(\| 75 .*)\| yes \|", r"\1| no |"),
        (r"(\| 77 .*)\| no \|", r"\1| yes |"),
    ],
)
def test_a_wrong_table_of_exit_codes_is_noticed(right: str, wrong: str) -> None:
    changed = re.sub(right, wrong, EXIT_CODES)
    assert changed != EXIT_CODES
    assert wrong_exit_codes(changed) != []


def test_help_names_the_codes_of_the_table() -> None:
    in_table = {int(code) for code in re.findall(r"^\| (\d+) \|", EXIT_CODES, flags=re.MULTILINE)}
    assert {int(code) for code in re.findall(r"\b(\d+) [a-z]", command.EXIT_CODES)} == in_table


# ---- api.md ----------------------------------------------------------------------------------------------------

specification = importlib.util.spec_from_file_location("generate_api", DOCS / "generate.py")
assert specification and specification.loader
generate = importlib.util.module_from_spec(specification)
specification.loader.exec_module(generate)


def test_the_api_reference_is_what_the_types_give() -> None:
    assert (DOCS / "api.md").read_text() == generate.page(), "run `make crds`"


def test_a_changed_type_changes_the_api_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = copy.deepcopy(generate.definitions())
    (version,) = changed["federateddiffusionjobs"]["spec"]["versions"]
    version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["backoffLimit"]["maximum"] = 7
    before = generate.page()
    monkeypatch.setattr(generate, "definitions", lambda: changed)
    assert set(generate.page().splitlines()) - set(before.splitlines()) == {
        "| `spec.backoffLimit` | integer, 0 to 7 | `3` | yes | failures of one stage, after which no further attempt"
        " follows; interruptions do not count |"
    }


def test_the_python_reference_is_what_signatures_docstrings_and_comments_give() -> None:
    assert (DOCS / "python.md").read_text() == generate.python_page(), "run `make crds`"


def test_a_name_that_is_added_to_the_package_is_on_the_python_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def added(job: LocalJob, /, *, most: int = 3) -> list[str]:
        """Some words."""
        return []

    before = generate.python_page()
    monkeypatch.setattr(feddiff, "added", added, raising=False)
    monkeypatch.setattr(feddiff, "__all__", [*feddiff.__all__, "added"])
    new = set(generate.python_page().splitlines()) - set(before.splitlines())
    assert new == {"### `feddiff.added`", "def added(job: LocalJob, /, *, most: int = 3) -> list[str]", "Some words."}


def undescribed(page: str) -> list[str]:
    """Rows of fields without a word, and classes or functions without a docstring."""
    return re.findall(r"^\| `\w+` \|.*\|\s*(?:None)?\s*\|$|^None$", page, re.MULTILINE)


def test_every_field_of_the_python_reference_is_described() -> None:
    page = generate.python_page()
    assert undescribed(page) == []
    assert undescribed(page.replace("| as the ledger stands |", "|  |")) == ["| `budget_before` | `Budget` |  |"]


def fields_that_change(kind: str) -> dict[str, str]:
    (section,) = re.findall(rf"^## {kind}\n(.*?)^### Rules", (DOCS / "api.md").read_text(), re.MULTILINE | re.DOTALL)
    rows = [line.replace("\\|", "").split("|") for line in section.splitlines() if line.startswith("| `spec")]
    return {cells[1].strip(" `"): cells[4].strip() for cells in rows}


def test_the_api_reference_says_what_may_change() -> None:
    job, dataset = fields_that_change("FederatedDiffusionJob"), fields_that_change("PrivateDataset")
    assert job["spec.suspend"] == dataset["spec.access[].maxEpsilon"] == "yes"
    assert {value for path, value in job.items() if path.startswith(("spec.privacy", "spec.clients"))} == {"no"}
    assert job["spec.shared.resources"] == "while suspended"
    assert (dataset["spec.budget.epsilon"], dataset["spec.budget.delta"]) == ("raised only", "no")
    assert set(fields_that_change("PrivacyRelease").values()) == {"no"}


# ---- links -----------------------------------------------------------------------------------------------------


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links of `text` (a Markdown page at `page`) to files that are not there. Code is not searched."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"""(?:src|href)=["']([^"']+)""", prose)
    relative = [each.split("#")[0] for each in targets if not re.match(r"[a-z][a-z0-9+.-]*:|#", each)]
    return [each for each in relative if not (page.parent / each).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_to_a_file(page: Path) -> None:
    assert dead_links(page, page.read_text()) == []


def test_a_dead_link_is_noticed() -> None:
    text = "[a](cli.md#feddiff) [b](nowhere.md) `[c](code.md)` [d](https://example.org) ![e](no.png 'title')"
    assert dead_links(DOCS / "page.md", text) == ["nowhere.md", "no.png"]


def unreachable(pages: Mapping[Path, str]) -> set[str]:
    """Names of pages to which no links lead from the README."""
    found, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in pages and page not in found:
            found.add(page)
            targets = re.findall(r"\]\(([^)\s#]+)", pages[page])
            queue += [(page.parent / each).resolve() for each in targets]
    return {str(page.relative_to(ROOT)) for page in pages.keys() - found}


def test_links_lead_from_the_readme_to_every_page() -> None:
    pages = {page: page.read_text() for page in PAGES if "decisions" not in page.parts}
    assert unreachable(pages) == set()
    assert unreachable({**pages, DOCS / "lost.md": "[back](../README.md)"}) == {"docs/lost.md"}


def unproved(text: str) -> list[str]:
    """Rows of the threat model that claim to stop something and link no test; its other tables have other heads."""
    tables = re.findall(r"^\| (?:attack|channel) \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for table in tables for row in table.splitlines()]
    return [name for name, stops, _ in rows if not stops.startswith("nothing") and "](../tests/" not in stops]


def test_the_threat_model_claims_nothing_without_a_test() -> None:
    text = (DOCS / "threat-model.md").read_text()
    assert unproved(text) == []
    assert unproved(re.sub(r" \(\[test_mechanisms\]\(\S+\)\)", "", text)) != []


# ---- blocks: YAML, commands, values of the chart ---------------------------------------------------------------

SCHEMA = json.loads((ROOT / "charts/feddiff/values.schema.json").read_text())


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages ("" is a fence without one), those inside of a list, too."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [block for language, block in fenced if language in languages]


def wrong_documents(text: str) -> list[str]:
    """What is wrong with the YAML of a page: our kinds in full, and overlays wherever one stands."""
    wrong = []
    for block in blocks(text, "yaml"):
        try:
            for each in yaml.safe_load_all(block):
                _check_document(each)
        except (yaml.YAMLError, SpecInvalid) as error:
            wrong.append(str(error))
    return wrong


def _check_document(document: Any) -> None:
    spec = document.get("spec", {}) if isinstance(document, dict) else {}
    check_overlay(spec.get("podTemplate", {}), "spec.podTemplate")
    if isinstance(document, dict) and document.get("apiVersion") == API_VERSION:
        parsed = parse_document(document, "page")
        if isinstance(parsed, FederatedDiffusionJob):
            promise_of(parsed.spec.privacy, parsed.spec.diffusion)
            check_overlay(parsed.spec.shared.pod_template, "spec.shared.podTemplate")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_yaml_is_one_that_is_taken(page: Path) -> None:
    assert wrong_documents(page.read_text()) == []


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("gpu.md", "processesPerReplica: 4", "processesPerReplica: 3"),
        ("gpu.md", "runtimeClassName: nvidia", "hostNetwork: true"),
        ("gpu.md", "nodeSelector: {nvidia", "hostname: {nvidia"),
        ("kueue.md", "queueName: gpus", "queue: gpus"),
        ("kueue.md", "trainShared: {stageSeconds", "trainShared: {seconds"),
        ("stores.md", "serviceAccountName: feddiff", "serviceAccount: feddiff"),
    ],
)
def test_a_block_of_yaml_that_is_wrong_in_one_word_is_noticed(name: str, right: str, wrong: str) -> None:
    text = (DOCS / name).read_text()
    assert right in text
    assert wrong_documents(text.replace(right, wrong)) != []


def command_lines(text: str) -> Iterator[str]:
    """Every call of `feddiff`, alone or as kubectl's plugin, in a block or in prose, up to a pipe or a comment."""
    indented = re.findall(r"^    (?:\$ )?(feddiff .*)$", text, re.MULTILINE)
    in_prose = re.findall(r"`((?:kubectl )?feddiff [^`…[]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    code = "\n".join([*blocks(text, "sh", ""), *indented, *(" ".join(each.split()) for each in in_prose)])
    for line in code.replace("\\\n", " ").splitlines():
        called = re.search(r"(?:^|[\s$])(feddiff( .*)?)$", re.split(r" [#|>&]|\|", line)[0].rstrip())
        if called and not line.lstrip().startswith("helm "):
            yield called[1]


def unknown_in(line: str) -> list[str]:
    """Words of a call that neither name a command nor are an option of the one that is called."""
    words, known = line.split()[1:], known_commands()
    names = [" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in known]
    if not names:
        return words[:1] if words and not words[0].startswith("-") else []
    options = {each for option in known[names[0]].params for each in (*option.opts, *option.secondary_opts)}
    given = {word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)}
    return sorted(given - options - {"--help"})


def wrong_commands(text: str) -> list[str]:
    return [f"{line}: {word}" for line in command_lines(text) for word in unknown_in(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_call_of_feddiff_on_a_page_is_one_that_exists(page: Path) -> None:
    assert wrong_commands(page.read_text()) == []


def test_a_call_that_does_not_exist_is_noticed() -> None:
    text = (DOCS / "stores.md").read_text()
    assert len(list(command_lines(text))) >= 5
    for right, wrong in (
        ("store check -f", "store look -f"),
        ("--print-policy", "--policy"),
        (" --role ", " --party "),
    ):
        assert wrong_commands(text.replace(right, wrong)) != []
    assert wrong_commands("```sh\nkubectl feddiff what JOB\n```") != []


def is_value(path: str) -> bool:
    """Whether the chart has this value, named by its dotted path; what its schema leaves open may have any name."""
    schema = SCHEMA
    for name in path.split("."):
        properties = schema.get("properties", {})
        if name not in properties and schema.get("additionalProperties", True) is False:
            return False
        schema = properties.get(name, {})
    return True


def values_named(text: str) -> set[str]:
    """Paths of chart values on a page: those that are set in a command, and those that prose names in backticks."""
    said = "|".join(sorted(SCHEMA["properties"].keys() - {"scope", "global"}))
    in_prose = re.findall(rf"`((?:{said})(?:\.\w+)+)(?:=[^`]*)?`", text)
    return {*re.findall(r"--set(?:-string|-json)? '?([\w.]+)=", text), *in_prose} - {
        path for path in in_prose if path.endswith(".md")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_value_of_the_chart_on_a_page_exists(page: Path) -> None:
    assert [path for path in values_named(page.read_text()) if not is_value(path)] == []


def test_a_value_that_the_chart_does_not_have_is_noticed() -> None:
    text = "`networkPolicy.store.from` `--set operator.replica=0` --set image.digest=sha256:1 `roles.md` `image.tag`"
    assert {path for path in values_named(text) if not is_value(path)} == {
        "networkPolicy.store.from",
        "operator.replica",
    }
    assert is_value("monitoring.labels.release") and not is_value("monitoring.label.release")


# ---- samples ---------------------------------------------------------------------------------------------------


def planned_jobs(files: list[Path]) -> list[str]:
    """Names of the jobs in `files`, each of which, with the datasets of all files, gives an admitted plan."""
    of_job = [file for file in files if load_documents([file]).jobs]
    names = []
    for file in of_job:
        job = load_job([*(each for each in files if each not in of_job), file])
        report = plan_report(job)
        assert report.refusals == {}
        assert [each.client for each in report.clients] == [each.name for each in job.document.spec.clients]
        names.append(job.document.metadata.name)
    return names


@pytest.mark.parametrize("folder", EXAMPLE_FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_every_job_of_the_examples_gives_a_plan(folder: Path, tmp_path: Path) -> None:
    files = [Path(shutil.copy(file, tmp_path)) for file in sorted(folder.glob("*.yaml"))]
    assert planned_jobs(files)


def test_the_job_of_the_images_takes_what_its_script_draws_and_splits(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    subprocess.run([sys.executable, IMAGES / "make_shapes.py", tmp_path / "shapes", "30"], check=True)
    (options,) = re.findall(r'feddiff split "\$work/shapes" (.*) \\\n  --out', (IMAGES / "shapes.sh").read_text())
    split = CliRunner().invoke(
        command.app, ["split", str(tmp_path / "shapes"), *options.split(), "--out", str(tmp_path / "split")]
    )
    assert split.exit_code == 0, split.output
    owners = tmp_path / "split" / "owners.yaml"
    assert planned_jobs([owners, IMAGES / "job.yaml"]) == ["shapes"]
    written, ours = (
        load_job([owners, file]).document.spec for file in (owners.with_name("job.yaml"), IMAGES / "job.yaml")
    )
    assert ours.privacy == written.privacy and ours.clients == written.clients


def script_of(experiment: Path) -> Path:
    """What runs it: `digits.sh` every digits-*.yaml."""
    (script,) = (each for each in experiment.parent.glob("*.sh") if experiment.stem.startswith(each.stem))
    return script


def prepared(experiment: Path, folder: Path) -> Path:
    """The experiment's file in `folder` beside the datasets of every seed, as the script beside it makes them."""
    digits = (ROOT / "examples" / "digits" / "owners.yaml").read_text()
    crossed = [5000] * 5 + [50] * 5, [50] * 5 + [5000] * 5
    made = {"digits": digits, "split": owners_text(answer_of(14, crossed))}
    made |= {f"of-{clients}": owners_text(answer_of(8, [[1] * 10] * clients)) for clients in (4, 32, 128)}
    for old, new in re.findall(r"s/(.*?)/(.*?)/", script_of(experiment).read_text()):
        made = {name: owners.replace(old, new) for name, owners in made.items()}
    for seed in yaml.safe_load(experiment.read_text())["seeds"]:
        for name, owners in made.items():
            (folder / f"{name}-{seed}").mkdir()
            (folder / f"{name}-{seed}" / "owners.yaml").write_text(owners)
    return Path(shutil.copy(experiment, folder))


def answer_of(side: int, records: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Of the trainer to `feddiff split`: clients with so many records of each class."""
    digits = len(str(len(records) - 1))
    return {
        "image": {"channels": 1, "height": side, "width": side},
        "classes": {"count": 10, "names": []},
        "records": {f"client-{number:0{digits}}": of_client for number, of_client in enumerate(records)},
        "holdout": 9500,
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_of_the_examples_is_admitted(experiment: Path, tmp_path: Path) -> None:
    loaded = load_experiment(prepared(experiment, tmp_path))
    check_budgets(loaded.units, tmp_path / "out")
    assert None in {unit.baseline for unit in loaded.units}
    spec = {unit.job.document.spec.network for unit in loaded.units}
    assert len(spec) == 1, "every arm has the same network"
    lengths = {unit.job.document.spec.personal.images for unit in loaded.units}
    assert lengths == {unit.job.document.spec.shared.images for unit in loaded.units} and len(lengths) == 1


def test_the_experiments_of_the_examples_have_every_baseline() -> None:
    arms = [arm for experiment in EXPERIMENTS for arm in yaml.safe_load(experiment.read_text())["arms"]]
    assert {arm["baseline"] for arm in arms if "baseline" in arm} == set(Baseline)


def test_the_scripts_of_the_experiments_make_a_split_for_every_seed() -> None:
    for experiment in EXPERIMENTS:
        seeds = yaml.safe_load(experiment.read_text())["seeds"]
        (listed,) = re.findall(r"for seed in ([\d ]+);", script_of(experiment).read_text())
        assert set(seeds) <= set(map(int, listed.split()))


def test_the_splits_of_the_experiment_are_the_papers(tmp_path: Path) -> None:
    (experiment,) = (each for each in EXPERIMENTS if each.stem == "digits-split")
    units = load_experiment(prepared(experiment, tmp_path)).units
    assert {unit.job.promise.split_step for unit in units if unit.baseline is None} == {50, 100, 200, 400}


@pytest.mark.parametrize("num_owners", [1, 2, 26])
def test_what_init_writes_gives_a_plan(num_owners: int, tmp_path: Path) -> None:
    written = write_scaffold(tmp_path / "mine", num_owners)
    assert planned_jobs([file for file in written if file.suffix == ".yaml"]) == ["first"]


def test_a_sample_that_asks_for_more_than_the_owners_allow_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job_text(2).replace('maxEpsilon: "10"', 'maxEpsilon: "9"'))
    with pytest.raises(AssertionError):
        planned_jobs([tmp_path / "job.yaml"])
