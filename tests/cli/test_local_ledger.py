"""The SQLite ledger: races for one budget admit exactly the right number, and nothing that was spent is forgotten."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from feddiff import local_ledger
from feddiff.documents import LocalDataset
from feddiff.local_ledger import LedgerState, LocalLedger, ledger_path, read_ledger
from feddiff_protocol.accountant import spent_epsilon
from feddiff_protocol.errors import OutputFailed, PrivacyRefusal, SpecInvalid, StoreUnavailable
from feddiff_protocol.layout import release_name
from feddiff_protocol.ledger import Phase, Refusal
from feddiff_protocol.plan import Hold

RACER = """
import json, sys
from pathlib import Path
from feddiff.documents import load_job
from feddiff.local_ledger import LocalLedger
job = load_job([Path(sys.argv[1])])
sys.stdin.readline()
ledger = LocalLedger(job.datasets["a"])
answers = [ledger.reserve(job.document, f"{sys.argv[2]}-{i}", "a", job.promise.charge) for i in range(4)]
print(json.dumps([answer is None for answer in answers]))
"""


def reserve(world: Any, uid: str) -> Refusal | None:
    job = world.job()
    return LocalLedger(job.datasets["a"]).reserve(job.document, uid, "a", job.promise.charge)


def test_reserve_charge_manifest_are_what_a_reader_sees(world: Any) -> None:
    job = world.job()
    ledger = LocalLedger(job.datasets["a"])
    name = release_name("uid-1", "a", ledger.dataset_uid)
    assert ledger.hold("uid-1", "a") is Hold.NONE
    assert ledger.reserve(job.document, "uid-1", "a", job.promise.charge) is None
    assert ledger.hold("uid-1", "a") is Hold.RESERVED
    ledger.charge(name)
    ledger.record_manifest(name, "0" * 64)
    state = read_ledger(job.datasets["a"])
    (entry,) = state.entries
    assert (entry.phase, entry.manifest_sha256, entry.epsilon) == (Phase.CHARGED, "0" * 64, Decimal(10))
    assert state.spent_epsilon == pytest.approx(10)


def test_reserving_twice_holds_once(world: Any) -> None:
    assert reserve(world, "uid-1") is None
    assert reserve(world, "uid-1") is None
    assert world.ledger("a").num_releases == 1


def test_what_is_given_back_frees_the_budget(world: Any) -> None:
    ledger = LocalLedger(world.job().datasets["a"])
    for uid in ("uid-1", "uid-2"):
        assert reserve(world, uid) is None
    assert reserve(world, "uid-3") is not None
    ledger.give_back(release_name("uid-1", "a", ledger.dataset_uid))
    assert reserve(world, "uid-3") is None
    assert reserve(world, "uid-4") is not None


def test_processes_that_race_for_one_budget_admit_exactly_what_fits(world: Any) -> None:
    file = world.job_file()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(file), f"job-{index}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    outs = [racer.communicate("go\n", timeout=60)[0] for racer in racers]
    admitted = [answer for out in outs for answer in json.loads(out)]
    assert len(admitted) == 12
    assert sum(admitted) == 2, "two of ε = 10 fit ε = 20"
    assert world.ledger("a").num_releases == 2


def test_threads_that_race_for_one_budget_admit_exactly_what_fits(world: Any) -> None:
    world.budget = {"epsilon": "36"}  # seven of ε = 10 are 35.85, eight do not fit
    job, start, answers = world.job(), threading.Barrier(8, timeout=60), []

    def ask(index: int) -> None:
        ledger = LocalLedger(job.datasets["a"])
        start.wait()
        answers.append(ledger.reserve(job.document, f"uid-{index}", "a", job.promise.charge))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answer is None for answer in answers) == 7
    assert world.ledger("a").spent_epsilon == pytest.approx(35.848, abs=1e-3)


def test_a_ledger_that_lets_go_between_reading_and_writing_is_caught_overspending(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reserve(world, "uid-1") is None
    job, both_have_read, real_read = world.job(), threading.Barrier(2, timeout=60), local_ledger._read
    ledgers = [LocalLedger(job.datasets["a"]) for _ in range(2)]

    def reading(db: sqlite3.Connection) -> LedgerState:
        state = real_read(db)
        db.execute("ROLLBACK")
        both_have_read.wait()
        db.execute("BEGIN IMMEDIATE")
        return state

    def ask(index: int) -> None:
        answers.append(ledgers[index].reserve(job.document, f"racer-{index}", "a", job.promise.charge))

    answers: list[Refusal | None] = []
    monkeypatch.setattr(local_ledger, "_read", reading)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    assert answers == [None, None], "both were told yes, though one fits"
    entries = world.ledger("a").entries
    assert spent_epsilon([entry.charge for entry in entries], "1e-5") > 20


def renamed(dataset: LocalDataset, name: str) -> LocalDataset:
    metadata = dataset.document.metadata.model_copy(update={"name": name})
    return LocalDataset(dataset.document.model_copy(update={"metadata": metadata}))


def moved(dataset: LocalDataset, path: Path) -> LocalDataset:
    source = dataset.source.model_copy(update={"path": os.path.normpath(path)})
    spec = dataset.document.spec.model_copy(update={"source": source})
    return LocalDataset(dataset.document.model_copy(update={"spec": spec}))


def begin_at_once(datasets: list[LocalDataset]) -> list[str]:
    """The uids of the ledgers that could be begun."""
    start, uids = threading.Barrier(len(datasets), timeout=60), list[str]()

    def begin(dataset: LocalDataset) -> None:
        start.wait()
        with contextlib.suppress(PrivacyRefusal):
            uids.append(LocalLedger(dataset).dataset_uid)

    threads = [threading.Thread(target=begin, args=(dataset,)) for dataset in datasets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return uids


@pytest.mark.parametrize("trial", range(5))
def test_threads_that_begin_one_ledger_at_once_find_the_same_one(world: Any, trial: int) -> None:
    uids = begin_at_once([world.job().datasets["a"]] * 8)
    assert len(uids) == 8 and len(set(uids)) == 1


@pytest.mark.parametrize("trial", range(5))
def test_datasets_that_race_for_the_same_records_begin_one_ledger(world: Any, trial: int) -> None:
    dataset = world.job().datasets["a"]
    assert len(begin_at_once([renamed(dataset, f"name-{index}") for index in range(4)])) == 1


@pytest.mark.parametrize("trial", range(5))
def test_a_folder_and_a_part_of_it_that_race_begin_one_ledger(world: Any, trial: int) -> None:
    (world.path / "images/cats").mkdir(parents=True)
    dataset = world.job().datasets["a"]
    parts = [moved(dataset, world.path / "images" / part) for part in (".", "cats")]
    assert len(begin_at_once(parts)) == 1


def test_ledgers_that_are_not_begun_alone_are_caught_sharing_records(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_have_looked, look = threading.Barrier(2, timeout=60), local_ledger._check_sole_holder

    def looking(dataset: LocalDataset) -> None:
        look(dataset)
        both_have_looked.wait()

    monkeypatch.setattr(local_ledger, "_check_sole_holder", looking)
    monkeypatch.setattr(local_ledger, "_alone_with", lambda records: contextlib.nullcontext())
    dataset = world.job().datasets["a"]
    assert len(begin_at_once([renamed(dataset, f"name-{index}") for index in range(2)])) == 2


def test_a_beginning_that_was_cut_off_holds_nothing_and_is_begun_again(world: Any) -> None:
    dataset = world.job().datasets["a"]
    dataset.owner_folder.mkdir(parents=True)
    ledger_path(dataset).touch()
    assert read_ledger(dataset).entries == ()
    assert LocalLedger(renamed(dataset, "renamed")).dataset_uid
    with pytest.raises(PrivacyRefusal, match="already have the ledger"):
        LocalLedger(dataset)


# ---- What must not be forgotten ----------------------------------------------------------------------------------


def test_a_budget_may_be_raised_never_lowered(world: Any) -> None:
    for uid in ("uid-1", "uid-2"):
        assert reserve(world, uid) is None
    assert reserve(world, "uid-3") is not None
    world.budget = {"epsilon": "21"}
    assert reserve(world, "uid-3") is None
    for lowered in ({"epsilon": "20"}, {"epsilon": "21", "delta": "1e-4"}):
        world.budget = lowered
        for read in (lambda: LocalLedger(world.job().datasets["a"]), lambda: world.ledger("a")):
            with pytest.raises(SpecInvalid, match=r"never lowered|cannot change"):
                read()


def test_an_entry_cannot_be_deleted_nor_a_charge_undone(world: Any) -> None:
    job = world.job()
    ledger = LocalLedger(job.datasets["a"])
    ledger.reserve(job.document, "uid-1", "a", job.promise.charge)
    ledger.charge(release_name("uid-1", "a", ledger.dataset_uid))
    db = sqlite3.connect(ledger.path)
    for statement in ("DELETE FROM entry", "UPDATE entry SET phase = 'Returned'"):
        with pytest.raises(sqlite3.IntegrityError):
            db.execute(statement)
    db.close()


def test_a_tampered_ledger_admits_nothing(world: Any) -> None:
    assert reserve(world, "uid-1") is None
    db = sqlite3.connect(ledger_path(world.job().datasets["a"]))
    db.execute("UPDATE entry SET mu_squared = '0.1'")
    db.commit()
    db.close()
    refusal = reserve(world, "uid-2")
    assert refusal is not None and "contradicts itself" in refusal.message
    assert world.ledger("a").remaining_epsilon == 0


def test_a_ledger_that_cannot_be_understood_is_a_refusal(world: Any) -> None:
    assert reserve(world, "uid-1") is None
    ledger_path(world.job().datasets["a"]).write_bytes(b"not a database at all" * 100)
    with pytest.raises(PrivacyRefusal, match="cannot be understood"):
        reserve(world, "uid-2")


def test_a_lost_ledger_beside_sealed_releases_is_a_refusal(world: Any) -> None:
    dataset = world.job().datasets["a"]
    (dataset.owner_folder / "store/releases/prl-1").mkdir(parents=True)
    for read in (read_ledger, LocalLedger):
        with pytest.raises(PrivacyRefusal, match="the ledger is gone, or older"):
            read(dataset)


def test_an_older_ledger_beside_releases_that_came_after_it_is_a_refusal(world: Any) -> None:
    job = world.job()
    ledger, older = LocalLedger(job.datasets["a"]), world.path / "older.sqlite"
    for uid in ("uid-1", "uid-2"):
        shutil.copy(ledger.path, older)
        assert reserve(world, uid) is None
        ledger.charge(name := release_name(uid, "a", ledger.dataset_uid))
        (job.datasets["a"].owner_folder / "store/releases" / name).mkdir(parents=True)
        assert world.ledger("a").num_releases, "a ledger that knows all releases is read"
    shutil.copy(older, ledger.path)
    for read in (read_ledger, LocalLedger):
        with pytest.raises(PrivacyRefusal, match=f"holds 1 releases .* the first {name}"):
            read(job.datasets["a"])


def test_what_is_no_release_in_the_owners_store_is_no_sign_of_one(world: Any) -> None:
    dataset = world.job().datasets["a"]
    folder = dataset.owner_folder / "store/releases"
    folder.mkdir(parents=True)
    (folder / ".DS_Store").touch()
    assert LocalLedger(dataset).dataset_uid and read_ledger(dataset).entries == ()


def test_a_folder_that_stays_locked_or_cannot_be_locked_is_named(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = world.job().datasets["a"]
    dataset.owner_folder.mkdir(parents=True)
    monkeypatch.setattr(local_ledger, "BUSY_SECONDS", 0.05)
    descriptor = os.open(world.path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreUnavailable, match=f"{world.path}: another process kept it locked"):
        LocalLedger(dataset)
    os.close(descriptor)
    assert LocalLedger(dataset).dataset_uid

    def unable(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(local_ledger.fcntl, "flock", unable)
    with pytest.raises(OutputFailed, match="cannot be locked"):
        LocalLedger(dataset)


def test_a_release_of_which_the_ledger_has_a_reservation_alone_is_a_refusal(world: Any) -> None:
    """A release starts when it is charged: such a ledger is older than the charge."""
    job = world.job()
    assert reserve(world, "uid-1") is None
    (entry,) = world.ledger("a").entries
    (job.datasets["a"].owner_folder / "store/releases" / entry.name).mkdir(parents=True)
    with pytest.raises(PrivacyRefusal, match="knows nothing"):
        LocalLedger(job.datasets["a"])


def test_the_same_records_under_another_name_get_no_second_budget(world: Any) -> None:
    assert reserve(world, "uid-1") is None
    with pytest.raises(PrivacyRefusal, match="already have the ledger"):
        LocalLedger(renamed(world.job().datasets["a"], "renamed"))


def test_records_that_another_ledger_holds_are_refused_to_one_that_moves_there(world: Any) -> None:
    dataset = world.job().datasets["a"]
    elsewhere = renamed(dataset, "elsewhere")
    LocalLedger(moved(elsewhere, Path(f"{dataset.source.path}.old")))
    assert reserve(world, "uid-1") is None
    with pytest.raises(PrivacyRefusal, match="already have the ledger"):
        LocalLedger(elsewhere)


@pytest.mark.parametrize(("first", "second"), [("images", "images/cats"), ("images/cats", "images"), ("x/y/z", "x")])
def test_a_folder_and_a_part_of_it_get_one_budget(world: Any, first: str, second: str) -> None:
    dataset = world.job().datasets["a"]
    for path in (first, second):
        (world.path / path).mkdir(parents=True, exist_ok=True)
    LocalLedger(moved(dataset, world.path / first))
    with pytest.raises(PrivacyRefusal, match="already have the ledger"):
        LocalLedger(moved(renamed(dataset, "part"), world.path / second))


def test_two_names_of_one_file_get_one_budget(world: Any) -> None:
    world.write_records()
    dataset = world.job().datasets["a"]
    (world.path / "a/again.npz").hardlink_to(dataset.source.path)
    assert reserve(world, "uid-1") is None
    with pytest.raises(PrivacyRefusal, match="already have the ledger"):
        LocalLedger(moved(renamed(dataset, "again"), world.path / "a/again.npz"))


def test_records_beside_each_other_have_a_budget_each(world: Any) -> None:
    dataset = world.job().datasets["a"]
    for path in ("images/cats", "images/cats-2", "images-2"):
        (world.path / path).mkdir(parents=True)
        assert LocalLedger(moved(renamed(dataset, Path(path).name), world.path / path)).dataset_uid


def test_reading_writes_nothing(world: Any) -> None:
    read_ledger(world.job().datasets["a"])
    assert not (world.path / "a").exists()


def test_access_rules_come_before_the_budget(world: Any) -> None:
    job = world.job(privacy={**privacy(), "epsilon": "10.5"})
    refusal = LocalLedger(job.datasets["a"]).reserve(job.document, "uid-1", "a", job.promise.charge)
    assert refusal is not None and "ask for ε ≤ 10" in refusal.message


def privacy() -> dict[str, str]:
    return {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "momentClipNorm": "2.5"}


def test_an_owners_folder_may_be_copied_with_its_records(world: Any, tmp_path: Path) -> None:
    assert reserve(world, "uid-1") is None
    shutil.move(world.path / "a", world.path / "aside")
    shutil.copytree(world.path / "aside", world.path / "a")
    assert world.ledger("a").num_releases == 1
