"""The committed local runs belong to the job that the example holds now, and their spread tells a run that learned
less."""

import json
from pathlib import Path
from typing import Any

import pytest

from digits_federation import FIGURES, NAME, OWNERS, ROWS, cut_short, digest_of, outside, rows_of, write_files
from feddiff.documents import load_documents, load_job

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return rows_of(load_job(write_files(tmp_path_factory.mktemp("digits"))))


def test_the_files_hold_three_owners_one_job_and_what_only_a_cluster_needs(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    documents = load_documents(files)
    assert [dataset.key for dataset in documents.datasets] == [f"{owner}/scans" for owner in OWNERS]
    assert [job.metadata.name for job in documents.jobs] == [NAME]
    assert documents.passed_over == ("Namespace", "RoleBinding", "NetworkPolicy") * 3


def test_there_are_runs_of_the_examples_job(rows: list[Row]) -> None:
    assert len(rows) >= 5, "python tests/digits_federation.py benchmarks/results/digits_local_runs.jsonl"
    assert all(len(row["figures"]) == len(FIGURES) for row in rows)


def test_each_of_them_is_a_run_like_the_others(rows: list[Row]) -> None:
    assert [outside(row["figures"], [each for each in rows if each is not row]) for row in rows] == [[]] * len(rows)


def test_a_run_that_learned_less_is_told_apart(rows: list[Row], tmp_path: Path) -> None:
    everything = [json.loads(line) for line in ROWS.read_text().splitlines()]
    shorter = [row for row in everything if row not in rows]
    assert shorter and all(row["images"] < rows[0]["images"] for row in shorter)
    for row in shorter:
        assert outside(row["figures"], rows) != []


def test_rows_of_another_job_are_not_compared(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    before = digest_of(load_job(files))
    cut_short(files[1], 20_000)
    assert digest_of(load_job(files)) != before
