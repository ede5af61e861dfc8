"""`feddiff store check`: whom it asks about which store, how it answers, how it ends."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from feddiff import store_checks
from feddiff.scaffold import job_text

STORES = {
    "  classes:": '  store: {uri: "s3://owners/OWNER", secretName: own}\n  classes:',
    "  clients:": '  store: {uri: "s3://federation/jobs", secretName: trainer}\n  clients:',
}
FINE = {"check": "keys", "state": "fine", "found": "those of a", "expected": "", "advice": "", "exitCode": 0}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def feddiff(feddiff: Run) -> Run:
    return partial(feddiff, "store", "check")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The specs that the trainer would have got; it finds everything fine."""
    specs: list[dict[str, Any]] = []

    def module(_: str, spec: Path) -> str:
        specs.append(json.loads(spec.read_text()))
        return json.dumps({"findings": [FINE]})

    monkeypatch.setattr(store_checks, "run_module", module)
    return specs


def found(monkeypatch: pytest.MonkeyPatch, *exit_codes: int) -> None:
    """The trainer answers with failed findings of these codes, after one that is fine."""
    failure = FINE | {"state": "failed", "expected": "x"}
    failures = [failure | {"check": f"check {code}", "exitCode": code} for code in exit_codes]
    monkeypatch.setattr(store_checks, "run_module", lambda *_: json.dumps({"findings": [FINE, *failures]}))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Two owners with stores of their own, and a federation's."""
    documents = []
    for number, text in enumerate(job_text(2).split("\n---\n")):
        for before, after in STORES.items():
            text = text.replace(before, after.replace("OWNER", f"owner-{number}"), 1)
        documents.append(text)
    path = tmp_path / "job.yaml"
    path.write_text("\n---\n".join(documents))
    return path


def test_every_store_of_a_job_is_checked_once_as_its_administrator_sees_it(feddiff: Run, job: Path, asked: Any) -> None:
    code, out, err = feddiff("-f", job)
    assert (code, err) == (0, "")
    assert sorted((each["uri"], each["whose"]) for each in asked)[0] == ("s3://federation/jobs", "federation")
    owners = [each["uri"] for each in asked if each["whose"] == "owner"]
    assert len(owners) == 2 and all(each["role"] is None for each in asked)
    assert "s3://federation/jobs\n  ✓ keys: those of a" in out


def test_a_clients_keys_are_tried_on_the_other_clients_and_their_stores(feddiff: Run, job: Path, asked: Any) -> None:
    assert feddiff("-f", job, "--role", "federation", "--client", "a")[0] == 0
    assert feddiff("-f", job, "--role", "owner", "--client", "a")[0] == 0
    assert feddiff("-f", job, "--role", "trainer")[0] == 0
    client, owner, trainer = asked
    assert (client["uri"], client["whose"], client["neighbours"]) == ("s3://federation/jobs", "federation", ["b", "a0"])
    assert (owner["whose"], len(owner["closed"])) == ("owner", 1) and owner["uri"] not in owner["closed"]
    assert client["closed"] == owner["closed"]
    assert (trainer["neighbours"], set(trainer["closed"])) == (["a", "b"], {owner["uri"], *owner["closed"]})


def test_an_address_is_checked_by_itself(feddiff: Run, asked: Any) -> None:
    assert feddiff("s3://b/x", "--endpoint", "https://s3.example")[0] == 0
    assert feddiff("s3://b/x", "--role", "federation", "--client", "a", "--client", "c")[0] == 0
    assert (asked[0]["whose"], asked[0]["endpoint"]) == (None, "https://s3.example")
    assert (asked[1]["client"], asked[1]["neighbours"]) == ("a", ["c", "a0"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either STORE or --file"),
        (("s3://b/x", "-f", "JOB"), "either STORE or --file"),
        (("s3://b/x", "--role", "federation"), "add --client NAME"),
        (("s3://b/x", "--client", "a"), "add --role"),
        (("s3://b/x", "--print-policy"), "add --role"),
        (("-f", "JOB", "--role", "owner"), "add --client NAME"),
        (("-f", "JOB", "--role", "owner", "--client", "z"), "expected one of a, b, found z"),
        (("-f", "LOCAL",), "expected spec.store of a job or dataset, found none"),
    ],
)  # fmt: skip
def test_what_does_not_say_whose_store_is_meant_is_64(
    feddiff: Run, job: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "local.yaml").write_text(job_text(2))
    files = {"JOB": str(job), "LOCAL": str(tmp_path / "local.yaml")}
    code, _, err = feddiff(*(files.get(each, each) for each in arguments))
    assert code == 64
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("codes", "expected"), [((), 0), ((66,), 66), ((74, 78), 74), ((69, 77), 77)])
def test_the_promise_comes_first_among_what_failed(
    feddiff: Run, monkeypatch: pytest.MonkeyPatch, codes: tuple[int, ...], expected: int
) -> None:
    found(monkeypatch, *codes)
    code, out, err = feddiff("s3://b/x")
    assert code == expected
    assert all(f"✗ check {each}: expected x, found" in out for each in codes)
    listed = ", ".join(f"check {each}" for each in codes)
    assert err == (f"feddiff: s3://b/x: {len(codes)} of {len(codes) + 1} failed: {listed}\n" if codes else "")


def test_json_holds_every_finding(feddiff: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, 77)
    code, out, _ = feddiff("s3://b/x", "--json")
    (store,) = json.loads(out)["stores"]
    assert (code, store["store"], store["role"]) == (77, "s3://b/x", None)
    assert [each["exitCode"] for each in store["findings"]] == [0, 77]


def test_least_policies_of_all_parties_of_a_job_are_printed_without_asking(feddiff: Run, job: Path, asked: Any) -> None:
    code, out, _ = feddiff("-f", job, "--print-policy", "--json")
    policies = json.loads(out)["policies"]
    assert code == 0 and asked == []
    parties = [(each["role"], each["client"]) for each in policies]
    assert parties == [("trainer", None), ("owner", "a"), ("federation", "a"), ("owner", "b"), ("federation", "b")]
    assert all(each["awsIam"]["Statement"] and each["seaweedfsActions"] for each in policies)
    _, out, _ = feddiff(
        "s3://federation/jobs", "--role", "federation", "--client", "a", "--client", "b", "--print-policy"
    )
    assert "# federation a at s3://federation/jobs: AWS IAM" in out and "/clients/b/*" in out


def test_a_shared_folder_is_checked_by_the_real_trainer(feddiff: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    code, out, err = feddiff(tmp_path.as_uri(), "--role", "owner")
    assert (code, err) == (0, "")
    assert "✓ create if absent" in out and list(tmp_path.iterdir()) == []
