"""YAML in, typed documents out: what is ambiguous is refused, and no text whatever ends in another exception."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feddiff.documents import load_documents, load_job, parse_yaml, resolved
from feddiff_protocol.api import API_VERSION, SourceSpec
from feddiff_protocol.errors import InputMissing, SpecInvalid


def documents_of(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def rewritten(file: Path, documents: list[Any]) -> list[Path]:
    file.write_text(yaml.safe_dump_all(documents))
    return [file]


def test_files_together_hold_one_job_and_its_datasets(world: Any) -> None:
    *datasets, job = documents_of(world.job_file())
    owners = rewritten(world.path / "owners.yaml", datasets)
    loaded = load_job([*owners, *rewritten(world.path / "job.yaml", [job])])
    assert list(loaded.datasets) == ["a", "b"]


NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "clinic-a"}}
POLICY = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "x"}, "spec": {}}


def test_what_only_a_cluster_needs_is_passed_over_and_named(world: Any) -> None:
    """The same job, of which a local run sees no difference."""
    before, documents = world.job(), documents_of(world.job_file())
    files = rewritten(world.path / "digits.yaml", [NAMESPACE, *documents, POLICY, NAMESPACE])
    assert load_job(files) == before
    assert load_documents(files).passed_over == ("Namespace", "NetworkPolicy", "Namespace")


@pytest.mark.parametrize(
    ("story", "document", "words"),
    [
        ("a kind of ours that nobody knows", {**NAMESPACE, "apiVersion": API_VERSION}, "found .*'Namespace'"),
        ("a version of ours that nobody knows", {"apiVersion": "feddiff.dev/v1", "kind": "PrivateDataset"}, "v1'"),
        ("an entry of the ledger", {"apiVersion": API_VERSION, "kind": "PrivacyRelease"}, "'PrivacyRelease'"),
        ("a kind of ours in a misspelt group", {"apiVersion": "fediff.dev/v1", "kind": "PrivateDataset"}, "fediff"),
        ("no kind", {"apiVersion": "v1"}, "found 'v1', None"),
        ("an empty kind", {"apiVersion": "v1", "kind": ""}, "found 'v1', ''"),
        ("no apiVersion", {"kind": "Namespace"}, "found None, 'Namespace'"),
        ("a list", [NAMESPACE], "found list"),
    ],
)
def test_what_might_be_meant_for_us_is_not_passed_over(world: Any, story: str, document: Any, words: str) -> None:
    with pytest.raises(SpecInvalid, match=words):
        load_documents(rewritten(world.path / "x.yaml", [*documents_of(world.job_file()), document]))


def test_paths_are_relative_to_the_file_that_holds_the_dataset(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    dataset = world.job().datasets["a"]
    assert dataset.source.path == os.path.realpath(world.path / "a/train.npz")
    assert dataset.owner_folder == Path(os.path.realpath(world.path)) / "a/feddiff/clinic-a.scans"


def test_every_path_of_a_source_is_relative_to_the_file(world: Any) -> None:
    """Also one that a later version adds."""
    document = world.job().datasets["a"].document
    paths = {name: f"some/{name}" for name in SourceSpec.model_fields if name.endswith("path")}
    source = SourceSpec.model_validate({"format": "folder", **paths})
    spec = document.spec.model_copy(update={"source": source})
    found = resolved(document.model_copy(update={"spec": spec}), world.path).source
    assert {name: getattr(found, name) for name in paths} == {
        name: os.path.realpath(world.path / path) for name, path in paths.items()
    }


def test_a_link_to_the_records_leads_to_the_same_ledger(world: Any) -> None:
    before = world.job().datasets["a"].owner_folder
    (world.path / "a").mkdir()
    (world.path / "a/train.npz").touch()
    (world.path / "link").symlink_to(world.path / "a")
    documents = documents_of(world.job_file())
    documents[0]["spec"]["source"]["path"] = "link/train.npz"
    assert load_job(rewritten(world.path / "linked.yaml", documents)).datasets["a"].owner_folder == before


def test_two_datasets_with_the_same_records_are_refused(world: Any) -> None:
    documents = documents_of(world.job_file())
    documents[1]["spec"]["source"] = documents[0]["spec"]["source"]
    with pytest.raises(SpecInvalid, match="hold the same records"):
        load_job(rewritten(world.path / "job.yaml", documents))


def test_two_names_of_one_file_are_refused(world: Any) -> None:
    world.write_records()
    (world.path / "again.npz").hardlink_to(world.path / "a/train.npz")
    documents = documents_of(world.job_file())
    documents[1]["spec"]["source"]["path"] = "again.npz"
    with pytest.raises(SpecInvalid, match="hold the same records"):
        load_job(rewritten(world.path / "job.yaml", documents))


def test_a_dataset_within_another_one_is_refused(world: Any) -> None:
    documents = documents_of(world.job_file())
    documents[1]["spec"]["source"]["path"] = f"{documents[0]['spec']['source']['path']}/part"
    with pytest.raises(SpecInvalid, match="hold the same records"):
        load_job(rewritten(world.path / "job.yaml", documents))


@pytest.mark.parametrize(
    ("story", "change", "words"),
    [
        ("two jobs", lambda docs: [*docs, {**docs[-1], "metadata": {"name": "other"}}], "found digits, other"),
        ("no job", lambda docs: docs[:-1], "exactly one FederatedDiffusionJob, found none"),
        ("a dataset twice", lambda docs: [docs[0], *docs], "clinic-a/scans is described twice"),
        ("a dataset missing", lambda docs: docs[1:], "client a uses dataset clinic-a/scans, found clinic-b/scans"),
        ("nothing at all", lambda docs: [None], "exactly one FederatedDiffusionJob, found none"),
    ],
)
def test_what_does_not_make_one_job_is_refused(world: Any, story: str, change: Any, words: str) -> None:
    documents = documents_of(world.job_file())
    with pytest.raises(SpecInvalid, match=words):
        load_job(rewritten(world.path / "job.yaml", change(documents)))


@pytest.mark.parametrize(
    ("part", "value"),
    [("image", {"channels": 3, "height": 8, "width": 8}), ("classes", {"count": 3, "records": [1, 1, 1]})],
)
def test_datasets_of_one_job_agree_on_shape_and_classes(world: Any, part: str, value: Any) -> None:
    documents = documents_of(world.job_file())
    documents[1]["spec"][part] = value
    with pytest.raises(SpecInvalid, match=f"clients a and b must agree on {part}"):
        load_job(rewritten(world.path / "job.yaml", documents))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", 'line 2: not valid YAML: "a" is given twice'),
        ("a: &x 1\nb: *x\n", "aliases are not supported"),
        ("a: [", "not valid YAML"),
        ("!!python/object:os.system {}", "not valid YAML"),
        ("a: 2020-99-99", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("{[1]: 2}: 3", "not valid YAML"),
    ],
)
def test_yaml_that_is_ambiguous_or_broken_is_refused(text: str, words: str) -> None:
    with pytest.raises(SpecInvalid, match=words):
        parse_yaml(text, "x.yaml")


def test_what_cannot_be_read_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.yaml", tmp_path, Path("a\0b")):
        with pytest.raises(InputMissing, match="cannot be read"):
            load_documents([path])


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(SpecInvalid, match="expected UTF-8"):
        load_documents([tmp_path / "x.yaml"])


def test_numbers_beyond_the_schedule_are_spec_invalid(world: Any) -> None:
    with pytest.raises(SpecInvalid, match="last ᾱ"):
        world.job(diffusion={"splitSigma": "0.25", "steps": 10_000, "betaEnd": "0.9"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, 2000),
    length=st.integers(0, 40),
    insert=st.one_of(
        st.text(max_size=12), st.sampled_from(["- ", ": ", "{", "]", "&a", "*a", "!!int", "\t", "1e999", "? "])
    ),
)
def test_a_mutilated_file_is_valid_or_refused_and_nothing_else(world: Any, cut: int, length: int, insert: str) -> None:
    text = world.job_file().read_text()
    file = world.path / "mutilated.yaml"
    file.write_text(text[:cut] + insert + text[cut + length :], encoding="utf-8", errors="surrogatepass")
    try:
        load_job([file])
    except SpecInvalid as error:
        assert str(error)
