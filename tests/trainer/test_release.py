"""A release may be interrupted, raced and tampered with anywhere: what leaves the owner is one draw, or nothing.

Every test of that kind runs a procedure and asks it for problems. The same procedures must find problems in broken
variants of the stage, which the tests called mutants bring.
"""

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from feddiff_protocol import layout
from feddiff_protocol.api import ClassesSpec, DiffusionSpec, ImageSpec, Mechanism, PrivacySpec, SourceSpec
from feddiff_protocol.errors import (
    DataInvalid,
    FeddiffError,
    InputMissing,
    OutputFailed,
    PrivacyRefusal,
    SpecInvalid,
    StorageFailed,
    StoreUnavailable,
)
from feddiff_protocol.manifest import Manifest, Seal
from feddiff_protocol.stages import JobReference, Receipt, ReleaseSpec
from feddiff_trainer import release as stage
from feddiff_trainer import shards, stored, stores
from feddiff_trainer.noise import os_entropy_normals
from feddiff_trainer.privunit import STEP
from feddiff_trainer.release import release
from feddiff_trainer.stores import Store, open_store

UID, CLIENT = "uid-12345678", "client1"
RELEASE = layout.release_name(UID, CLIENT, "dataset")
SEAL = layout.seal(RELEASE)
MANIFEST = layout.manifest(UID, CLIENT)
COUNTS = (5, 7)


class Killed(BaseException):
    """The process is gone: nothing catches it."""


class MemoryStore:
    """A store that remembers every value an object ever had."""

    def __init__(self, uri: str = "file:///memory") -> None:
        self.uri = uri
        self.objects: dict[str, bytes] = {}
        self.history: list[tuple[str, bytes]] = []

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise InputMissing(f"{self.uri}/{key}: expected an object, found none")
        return self.objects[key]

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data
        self.history.append((key, data))

    def create(self, key: str, data: bytes) -> bool:
        if key in self.objects:
            return False
        self.put(key, data)
        return True

    def exists(self, key: str) -> bool:
        return key in self.objects

    def list(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


class Stores:
    """An owner's and a federation's store, and every value that any object of the latter ever had."""

    def __init__(self) -> None:
        self.owner, self.federation = MemoryStore("file:///owner"), MemoryStore("file:///federation")

    def ever_sent(self) -> dict[str, set[bytes]]:
        sent: dict[str, set[bytes]] = {}
        for key, data in self.federation.history:
            if "/probe-" not in key:
                sent.setdefault(key, set()).add(data)
        return sent


class Watched:
    """A store that calls `step` before and after each operation."""

    def __init__(self, store: Store, step: Callable[[str], None]) -> None:
        self.uri, self._store, self._step = store.uri, store, step

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def watched(key: str, *data: bytes) -> Any:
            self._step(f"before {operation} {key}")
            answer = getattr(self._store, operation)(key, *data)
            self._step(f"after {operation} {key}")
            return answer

        return watched


class At:
    """Does something at one step, counted from 0, and remembers the steps' names."""

    def __init__(self, index: int = -1, action: Callable[[str], None] = lambda name: None) -> None:
        self.index, self.action, self.names = index, action, list[str]()

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) - 1 == self.index:
            self.action(name)


def kill(name: str) -> None:
    raise Killed(name)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * (2 * 16 + 4))  # 5 images: 12 make three shards


@pytest.fixture
def records(tmp_path: Path) -> Path:
    return write_records(tmp_path / "train.npz")


def write_records(path: Path, **changes: Any) -> Path:
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "images": generator.uniform(0, 1, (sum(COUNTS), 4, 4)),
        "labels": np.repeat(np.arange(len(COUNTS)), COUNTS),
    }
    np.savez(path, **(arrays | changes))
    return path


def privacy(mechanism: str = "gaussian", **changes: Any) -> PrivacySpec:
    fields: dict[str, Any] = {"epsilon": Decimal(10), "clip_norm": Decimal(2)}
    if mechanism != "privunit":
        fields["delta"] = Decimal("1e-5")
    if mechanism == "summary":
        fields["moment_clip_norm"] = Decimal(2)
    return PrivacySpec(mechanism=Mechanism(mechanism), **(fields | changes))


def spec_of(records: Path, mechanism: str = "gaussian", **changes: Any) -> ReleaseSpec:
    fields: dict[str, Any] = {
        "job": JobReference(uid=UID, name="digits", namespace="research"),
        "attempt": 1,
        "client": CLIENT,
        "release": RELEASE,
        "source": SourceSpec(format="npz", path=str(records)),
        "image": ImageSpec(channels=1, height=4, width=4),
        "classes": ClassesSpec(count=len(COUNTS), records=COUNTS),
        "privacy": privacy(mechanism),
        "diffusion": DiffusionSpec(split_sigma=None if mechanism == "gaussian" else Decimal("0.25")),
        "owner_store": "file:///owner",
        "federation_store": "file:///federation",
    }
    return ReleaseSpec(**(fields | changes))


def crowded() -> ClassesSpec:
    """So many records that their sums, in steps of little noise, need more than 32 bits."""
    return ClassesSpec(count=2, records=(10**8, 5))


def run(spec: ReleaseSpec, pair: Stores, step: Callable[[str], None] | None = None) -> str:
    owner, federation = (Watched(store, step) if step else store for store in (pair.owner, pair.federation))
    return release(spec, owner_store=owner, federation_store=federation, normals=os_entropy_normals())


def steps_of(spec: ReleaseSpec, pair: Stores | None = None) -> list[str]:
    """The names of all steps of a release that nothing disturbs."""
    watch = At()
    run(spec, pair or Stores(), watch)
    return watch.names


def problems_after(spec: ReleaseSpec, pair: Stores, answers: list[str]) -> list[str]:
    """What is wrong once all attempts are over, of which some answered with a manifest's hash."""
    problems = []
    if len({data for key, data in pair.owner.history if key == SEAL}) != 1:
        problems.append("not exactly one seal was ever written")
    if changed := [key for key, values in pair.ever_sent().items() if len(values) > 1]:
        problems.append(f"a released object had two values: {changed}")
    manifest = Manifest.from_bytes(pair.federation.get(MANIFEST), "manifest")
    if set(answers) != {manifest.sha256}:
        problems.append("attempts do not agree on the manifest")
    seal = Seal.from_bytes(pair.owner.get(SEAL), "seal")
    sealed = {
        layout.released_shard(UID, CLIENT, shard.name): pair.owner.objects.get(
            layout.attempt_shard(RELEASE, seal.attempt, shard.name)
        )
        for shard in seal.shards
    }
    if {key: pair.federation.objects.get(key) for key in sealed} != sealed or manifest.shards != seal.shards:
        problems.append("what was released is not what was sealed")
    winner = f"{layout.attempts_prefix(RELEASE)}{seal.attempt}/"
    if [key for key in pair.owner.list(layout.attempts_prefix(RELEASE)) if not key.startswith(winner)]:
        problems.append("a losing attempt was not deleted")
    return problems


# ---- Nothing goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_release_ends_with_seal_shards_and_manifest(records: Path, mechanism: str) -> None:
    spec, pair = spec_of(records, mechanism), Stores()
    answer = run(spec, pair)
    assert problems_after(spec, pair, [answer]) == []
    num_shards = 1 if mechanism == "summary" else 3
    names = [layout.released_shard(UID, CLIENT, f"shard-0000{index}.safetensors") for index in range(num_shards)]
    assert sorted(pair.federation.objects) == sorted([*names, MANIFEST])


def test_manifest_comes_last_and_the_seal_before_all_that_is_sent(records: Path) -> None:
    creates = [name for name in steps_of(spec_of(records)) if name.startswith("before create") and "probe-" not in name]
    first_sent = creates.index(f"before create {layout.released_shard(UID, CLIENT, 'shard-00000.safetensors')}")
    assert creates.index(f"before create {SEAL}") < first_sent
    assert creates[-1] == f"before create {MANIFEST}"


def test_nothing_of_the_records_is_in_the_manifest(records: Path, tmp_path: Path) -> None:
    other = write_records(tmp_path / "other.npz", images=np.zeros((sum(COUNTS), 4, 4)))
    manifests = []
    for path in (records, other):
        pair = Stores()
        run(spec_of(path), pair)
        document = json.loads(pair.federation.get(MANIFEST))
        manifests.append(document | {"shards": [(shard["name"], shard["numBytes"]) for shard in document["shards"]]})
        digest = Seal.from_bytes(pair.owner.get(SEAL), "seal").records_sha256
        assert all(digest.encode() not in data for data in pair.federation.objects.values())
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_two_releases_of_one_spec_into_fresh_stores_share_no_noise(records: Path, mechanism: str) -> None:
    first, second = Stores(), Stores()
    assert run(spec_of(records, mechanism), first) != run(spec_of(records, mechanism), second)
    for key in first.federation.objects:
        assert first.federation.get(key) != second.federation.get(key)


def test_no_field_of_the_release_path_is_a_seed() -> None:
    names: set[str] = set()
    waiting: list[Any] = [ReleaseSpec]
    while waiting:
        model = waiting.pop()
        names |= set(model.model_fields)
        waiting += [f.annotation for f in model.model_fields.values() if hasattr(f.annotation, "model_fields")]
    assert {"privacy", "epsilon", "clip_norm", "steps", "path"} <= names  # the walk went everywhere
    assert not [name for name in names if "seed" in name or "noise" in name or "random" in name]


def test_labels_are_shuffled_with_their_images(records: Path) -> None:
    spec, pair = spec_of(records), Stores()
    release(spec, owner_store=pair.owner, federation_store=pair.federation, normals=np.zeros)
    decoded = [
        shards.decode(
            shard_layout, pair.federation.get(layout.released_shard(UID, CLIENT, f"shard-0000{i}.safetensors")), ""
        )
        for i, shard_layout in enumerate(shards.layouts(Mechanism.GAUSSIAN, spec.image, COUNTS))
    ]
    labels_N = np.concatenate([shard["labels"] for shard in decoded])
    images_ND = np.concatenate([shard["images"] for shard in decoded]).reshape(len(labels_N), -1)
    stored = np.load(records)
    x_ND = stored["images"].reshape(len(labels_N), -1)
    clipped_ND = 2 * x_ND * np.minimum(1, 2 / np.linalg.norm(x_ND, axis=1))[:, None] - 1
    correlation_NN = np.corrcoef(images_ND, clipped_ND)[: len(labels_N), len(labels_N) :]
    assert (stored["labels"][correlation_NN.argmax(axis=1)] == labels_N).all()
    assert sorted(correlation_NN.argmax(axis=1)) == list(range(len(labels_N)))
    assert sorted(labels_N) == sorted(stored["labels"])
    # One order in 12! is the stored one.
    assert list(correlation_NN.argmax(axis=1)) != list(range(len(labels_N)))


def test_directions_on_the_grid_are_released_with_their_labels(records: Path) -> None:
    """At so large an ε a direction comes back nearly as it is."""
    spec, pair = spec_of(records, "privunit", privacy=privacy("privunit", epsilon=Decimal(100))), Stores()
    run(spec, pair)
    decoded = [
        shards.decode(
            shard_layout, pair.federation.get(layout.released_shard(UID, CLIENT, f"shard-0000{i}.safetensors")), ""
        )
        for i, shard_layout in enumerate(shards.layouts(Mechanism.PRIVUNIT, spec.image, COUNTS))
    ]
    labels_N = np.concatenate([shard["labels"] for shard in decoded])
    z_ND = np.concatenate([shard["directions"] for shard in decoded]).reshape(len(labels_N), -1) * STEP
    stored = np.load(records)
    u_ND = stored["images"].reshape(len(labels_N), -1)
    u_ND = u_ND / np.linalg.norm(u_ND, axis=1)[:, None]
    nearest_N = (z_ND @ u_ND.T).argmax(axis=1)
    assert (stored["labels"][nearest_N] == labels_N).all() and sorted(nearest_N) == list(range(len(labels_N)))
    assert Manifest.from_bytes(pair.federation.get(MANIFEST), "manifest").grid_steps.directions == math.log2(STEP)


# ---- Killed anywhere -----------------------------------------------------------------------------------------


def kill_everywhere(spec: ReleaseSpec) -> list[str]:
    """Problems found by killing a release at every step and running it again."""
    problems = []
    for index in range(len(steps_of(spec))):
        pair, watch = Stores(), At(index, kill)
        with pytest.raises(Killed):
            run(spec, pair, watch)
        visible = dict(pair.federation.objects)
        answers = [run(spec, pair), run(spec, pair)]
        found = problems_after(spec, pair, answers)
        if not visible.items() <= pair.federation.objects.items():
            found.append("something visible changed")
        problems += [f"killed at {watch.names[-1]}: {problem}" for problem in found]
    return problems


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_release_killed_at_any_step_and_run_again_is_one_release(records: Path, mechanism: str) -> None:
    names = " ".join(steps_of(spec_of(records, mechanism)))
    for step in (f"create {SEAL}", f"create {MANIFEST}", "put releases/", f"create {UID}/clients/{CLIENT}/shards/"):
        assert f"before {step}" in names
        assert f"after {step}" in names
    assert kill_everywhere(spec_of(records, mechanism)) == []


def test_release_killed_twice_anywhere_is_one_release(records: Path) -> None:
    spec, generator = spec_of(records), random.Random(0)
    num_steps = len(steps_of(spec))
    for _ in range(40):
        pair = Stores()
        for _ in range(3):
            try:
                run(spec, pair, At(generator.randrange(num_steps), kill))
            except Killed:
                continue
        assert problems_after(spec, pair, [run(spec, pair)]) == []


def problems_or_refusal(procedure: Callable[[], list[str]]) -> list[str]:
    """A broken variant may also end in a refusal that no honest one meets."""
    try:
        return procedure()
    except PrivacyRefusal as refusal:
        return [str(refusal)]


def test_mutant_that_draws_again_on_retry_is_found(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_seal, calls = stage._read_seal, []

    def forgets(owner_store: Store, release_name: str) -> Seal | None:
        calls.append(release_name)
        return None if len(calls) % 2 else read_seal(owner_store, release_name)

    monkeypatch.setattr(stage, "_read_seal", forgets)
    assert problems_or_refusal(lambda: kill_everywhere(spec_of(records)))


def test_mutant_that_leaves_losing_attempts_is_found(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_delete_losing_attempts", lambda *arguments: None)
    assert any("not deleted" in problem for problem in kill_everywhere(spec_of(records)))


def test_mutant_that_sends_before_it_seals_is_found(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards = stage._write_shards

    def sends_at_once(*arguments: Any) -> Any:
        references = write_shards(*arguments)
        spec, owner_store = arguments[0], arguments[4]
        for reference in references:
            data = owner_store.get(layout.attempt_shard(spec.release, arguments[3], reference.name))
            pair.federation.create(layout.released_shard(UID, CLIENT, reference.name), data)
        return references

    pair, spec = Stores(), spec_of(records)
    before_seal = steps_of(spec).index(f"before create {SEAL}")
    monkeypatch.setattr(stage, "_write_shards", sends_at_once)
    with pytest.raises(Killed):
        run(spec, pair, At(before_seal + 6, kill))  # three shards more are read than in the honest variant
    with pytest.raises(PrivacyRefusal, match="no seal"):
        run(spec, pair)


# ---- Two attempts at once ------------------------------------------------------------------------------------


def race_everywhere(spec: ReleaseSpec, make: Callable[[], Stores] = Stores) -> list[str]:
    """Problems found by running a whole attempt at every step of another."""
    problems = []
    for index in range(len(steps_of(spec, make()))):
        pair, answers = make(), list[str]()
        # The second attempt is a closure of this turn of the loop and over before the next one.
        watch = At(index, lambda name, pair=pair, answers=answers: answers.append(run(spec, pair)))  # type: ignore[misc]
        answers.append(run(spec, pair, watch))
        problems += [f"raced at {watch.names[index]}: {found}" for found in problems_after(spec, pair, answers)]
    return problems


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_attempt_raced_at_any_step_agrees_with_its_rival(records: Path, mechanism: str) -> None:
    assert race_everywhere(spec_of(records, mechanism)) == []


class Turns:
    """Lets one thread at a time go on by one step, chosen by a generator, so that a race can be repeated."""

    def __init__(self, generator: random.Random, num_threads: int) -> None:
        self.generator, self.condition = generator, threading.Condition()
        self.waiting, self.live, self.turn = set[int](), num_threads, -1

    def step(self, name: str, thread: int) -> None:
        with self.condition:
            self.waiting.add(thread)
            self._choose()
            assert self.condition.wait_for(lambda: self.turn == thread, timeout=20)
            self.turn = -1
            self.waiting.discard(thread)

    def leave(self) -> None:
        with self.condition:
            self.live -= 1
            self._choose()

    def _choose(self) -> None:
        if self.turn == -1 and self.waiting and len(self.waiting) == self.live:
            self.turn = self.generator.choice(sorted(self.waiting))
            self.condition.notify_all()


def race(spec: ReleaseSpec, pair: Stores, seed: int, num_threads: int) -> list[str]:
    turns, answers = Turns(random.Random(seed), num_threads), list[str]()

    def attempt(thread: int) -> None:
        try:
            answers.append(run(spec, pair, lambda name: turns.step(name, thread)))
        except FeddiffError as error:
            answers.append(str(error))
        finally:
            turns.leave()

    threads = [threading.Thread(target=attempt, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("seed", range(20))
def test_attempts_interleaved_step_by_step_agree(records: Path, seed: int) -> None:
    spec, pair = spec_of(records, "summary" if seed % 2 else "gaussian"), Stores()
    num_threads = 2 + seed % 3
    answers = race(spec, pair, seed, num_threads)
    assert len(answers) == num_threads
    assert problems_after(spec, pair, answers) == []


def test_mutant_whose_seal_overwrites_is_found_by_racing(records: Path) -> None:
    class SealsTwice(MemoryStore):
        def create(self, key: str, data: bytes) -> bool:
            if key == SEAL:
                self.put(key, data)
                return True
            return super().create(key, data)

    def make() -> Stores:
        pair = Stores()
        pair.owner = SealsTwice()
        return pair

    assert problems_or_refusal(lambda: race_everywhere(spec_of(records), make))


# ---- On any doubt, nothing is sent ---------------------------------------------------------------------------


def refused(spec: ReleaseSpec, pair: Stores, says: str) -> None:
    """The release is refused and leaves the federation store as it was."""
    before = dict(pair.federation.objects)
    with pytest.raises(PrivacyRefusal, match=says):
        run(spec, pair)
    assert pair.federation.objects == before


def sealed_and_killed(spec: ReleaseSpec) -> Stores:
    """Stores of a release that was sealed and then killed before anything was sent."""
    pair = Stores()
    with pytest.raises(Killed):
        run(spec, pair, At(steps_of(spec).index(f"after create {SEAL}"), kill))
    assert pair.ever_sent() == {}
    return pair


def test_records_changed_after_the_seal_are_refused(records: Path) -> None:
    spec = spec_of(records)
    pair = sealed_and_killed(spec)
    images = np.load(records)["images"]
    images[3, 1, 1] = 0.5
    write_records(records, images=images)
    refused(spec, pair, "changed ones")


def test_records_in_another_order_after_the_seal_are_refused(records: Path) -> None:
    spec = spec_of(records)
    pair = sealed_and_killed(spec)
    write_records(records, images=np.load(records)["images"][::-1])
    refused(spec, pair, "changed ones")


def test_mutant_that_does_not_compare_records_is_found(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_check_seal", lambda *arguments: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_records_changed_after_the_seal_are_refused(records)


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": privacy(epsilon=Decimal(11))},
        {"privacy": privacy(clip_norm=Decimal("1.5"))},
        {"diffusion": DiffusionSpec(steps=999)},
        {"classes": ClassesSpec(count=3, records=(*COUNTS, 0))},
    ],
)
def test_spec_changed_after_the_seal_is_refused(records: Path, changes: dict[str, Any]) -> None:
    pair = sealed_and_killed(spec_of(records))
    refused(spec_of(records, **changes), pair, "found another")


def test_next_attempt_number_and_other_places_are_the_same_release(records: Path, tmp_path: Path) -> None:
    pair = sealed_and_killed(spec_of(records))
    moved = records.rename(tmp_path / "moved.npz")
    spec = spec_of(moved, attempt=2, owner_store="file:///elsewhere")
    assert problems_after(spec, pair, [run(spec, pair)]) == []


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("finished", [False, True])
def test_sealed_shard_that_is_gone_is_refused(records: Path, index: int, finished: bool) -> None:
    spec = spec_of(records)
    pair = sealed_and_killed(spec)
    if finished:
        run(spec, pair)
    pair.owner.delete(pair.owner.list(layout.attempts_prefix(RELEASE))[index])
    refused(spec, pair, "sealed shard is gone")


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("finished", [False, True])
def test_sealed_shard_with_a_changed_byte_is_refused(records: Path, index: int, finished: bool) -> None:
    spec = spec_of(records)
    pair = sealed_and_killed(spec)
    if finished:
        run(spec, pair)
    tamper(pair.owner, pair.owner.list(layout.attempts_prefix(RELEASE))[index])
    refused(spec, pair, "as sealed")


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("finished", [False, True])
def test_released_object_with_a_changed_byte_is_refused(records: Path, index: int, finished: bool) -> None:
    spec, pair = spec_of(records), Stores()
    run(spec, pair)
    key = sorted(pair.federation.objects)[index]
    tamper(pair.federation, key)
    if not finished:  # as if only this one had been sent
        for other in set(pair.federation.objects) - {key}:
            pair.federation.delete(other)
    refused(spec, pair, "as sealed")


def test_foreign_object_among_the_released_is_refused(records: Path) -> None:
    spec = spec_of(records)
    pair = sealed_and_killed(spec)
    pair.federation.put(layout.released_shard(UID, CLIENT, "shard-00009.safetensors"), b"another draw")
    refused(spec, pair, "sealed objects alone")


@pytest.mark.parametrize("damage", [b"", b"{}", b"\0" * 100])
def test_damaged_seal_is_refused(records: Path, damage: bytes) -> None:
    spec = spec_of(records)
    pair = sealed_and_killed(spec)
    pair.owner.put(SEAL, damage)
    refused(spec, pair, "seal is damaged")


def test_seal_of_another_release_is_refused(records: Path) -> None:
    spec = spec_of(records)
    pair = sealed_and_killed(spec)
    tampered = pair.owner.get(SEAL).replace(RELEASE.encode(), b"prl-" + b"0" * 40)
    pair.owner.put(SEAL, tampered)
    refused(spec, pair, "found another")


@pytest.mark.parametrize("keep", range(4))
def test_lost_seal_of_a_release_that_was_sent_is_refused(records: Path, keep: int) -> None:
    spec, pair = spec_of(records), Stores()
    run(spec, pair)
    pair.owner.objects.clear()
    for key in sorted(pair.federation.objects)[:keep] + sorted(pair.federation.objects)[keep + 1 :]:
        pair.federation.delete(key)
    refused(spec, pair, "no seal")
    assert pair.owner.objects == {}


def test_client_whose_name_begins_alike_is_another_client(records: Path) -> None:
    pair = Stores()
    pair.federation.put(layout.manifest(UID, f"{CLIENT}0"), b"of another client")
    run(spec_of(records), pair)


def tamper(store: MemoryStore, key: str) -> None:
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))


@pytest.mark.parametrize("which", ["owner", "federation"])
def test_store_that_ignores_create_if_absent_is_refused_before_anything_is_drawn(records: Path, which: str) -> None:
    class Overwrites(MemoryStore):
        def create(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    def no_normals(shape: tuple[int, ...]) -> Any:
        raise AssertionError("drawn")

    pair = Stores()
    setattr(pair, which, Overwrites())
    with pytest.raises(PrivacyRefusal, match="created once"):
        release(spec_of(records), owner_store=pair.owner, federation_store=pair.federation, normals=no_normals)
    assert pair.owner.objects == pair.federation.objects == {}


# ---- Bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("NaN", {"images": np.full((12, 4, 4), np.nan)}, DataInvalid),
        ("infinity", {"images": np.full((12, 4, 4), np.inf)}, DataInvalid),
        ("above one", {"images": np.full((12, 4, 4), 1.5)}, DataInvalid),
        ("another size", {"images": np.zeros((12, 4, 5))}, DataInvalid),
        ("other counts", {"labels": np.repeat([0, 1], [6, 6])}, DataInvalid),
        ("label outside", {"labels": np.full(12, 2)}, DataInvalid),
        ("fewer labels", {"labels": np.zeros(3, np.int64)}, DataInvalid),
        ("no records", {"images": np.zeros((0, 4, 4)), "labels": np.zeros(0, np.int64)}, DataInvalid),
    ],
)
@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_bad_records_leave_both_stores_empty(
    records: Path, mechanism: str, name: str, changes: dict[str, Any], error: type[FeddiffError]
) -> None:
    write_records(records, **changes)
    pair = Stores()
    with pytest.raises(error):
        run(spec_of(records, mechanism), pair)
    assert pair.owner.history == pair.federation.history == []


def test_missing_records_leave_both_stores_empty(tmp_path: Path) -> None:
    pair = Stores()
    with pytest.raises(InputMissing):
        run(spec_of(tmp_path / "absent.npz"), pair)
    assert pair.owner.history == pair.federation.history == []


@pytest.mark.parametrize(
    ("mechanism", "changes"),
    [
        ("gaussian", {"privacy": privacy(epsilon=Decimal("0.0001"))}),  # no split hides that much
        ("gaussian", {"privacy": privacy(epsilon=Decimal(10_000_000))}),  # noise below the images' last digits
        ("summary", {"privacy": privacy("summary", epsilon=Decimal(1000)), "classes": crowded()}),
    ],
)
def test_promise_out_of_reach_is_refused_before_the_records_are_read(
    tmp_path: Path, mechanism: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(SpecInvalid, match=r"spec\.privacy\.epsilon"):
        run(spec_of(tmp_path / "absent.npz", mechanism, **changes), Stores())


# ---- Stores that fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OutputFailed, StorageFailed, StoreUnavailable])
@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_failure_of_a_store_at_any_step_is_reported_and_mended_by_a_retry(
    records: Path, mechanism: str, error: type[FeddiffError]
) -> None:
    def fail(name: str) -> None:
        raise error(name)

    spec, failed = spec_of(records, mechanism), 0
    for index in range(len(steps_of(spec))):
        pair, watch = Stores(), At(index, fail)
        try:
            run(spec, pair, watch)
        except error:
            failed += 1
        if " put releases/" in watch.names[index]:
            assert pair.owner.list(layout.attempts_prefix(RELEASE)) == []  # makes room again
        assert problems_after(spec, pair, [run(spec, pair)]) == []
    assert failed > 20  # only what was to be deleted anyway may fail in silence


def test_full_disk_at_any_write_is_tried_again_and_mended_by_it(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, write_durably = spec_of(records), stores._write_durably

    def count_down(path: Path, data: bytes) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, os.strerror(28))
        write_durably(path, data)

    monkeypatch.setattr(stores, "_write_durably", count_down)
    monkeypatch.setattr(stores.os, "fsync", lambda descriptor: None)  # a hundred releases wait for no disk
    for writes in range(1, 100):
        owner, federation = (open_store(f"file://{tmp_path}/{writes}/{name}") for name in ("owner", "federation"))
        left, answer = writes, ""
        try:
            answer = release(spec, owner_store=owner, federation_store=federation, normals=os_entropy_normals())
        except StorageFailed as error:
            assert "No space left on device" in str(error)
        visible = {key: federation.get(key) for key in federation.list(f"{UID}/")}
        left = -1
        again = release(spec, owner_store=owner, federation_store=federation, normals=os_entropy_normals())
        assert visible.items() <= {key: federation.get(key) for key in federation.list(f"{UID}/")}.items()
        assert not [path for path in (tmp_path / str(writes)).rglob(".*")]
        if answer:
            assert answer == again
            break
    assert 12 < writes < 99


def test_read_only_store_is_output_failed(records: Path, tmp_path: Path) -> None:
    (tmp_path / "owner").write_text("a file where the folder should be")
    owner, federation = open_store(f"file://{tmp_path}/owner"), open_store(f"file://{tmp_path}/federation")
    with pytest.raises(OutputFailed):
        release(spec_of(records), owner_store=owner, federation_store=federation, normals=os_entropy_normals())
    assert federation.list(f"{UID}/") == []


# ---- The process ---------------------------------------------------------------------------------------------


def start(spec: ReleaseSpec, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "SPEC.json").write_text(json.dumps(spec.to_wire()))
    environment = {**os.environ, "FEDDIFF_TERMINATION_LOG": str(folder / "receipt.json"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "feddiff_trainer.release", str(folder / "SPEC.json")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def messages(process: subprocess.CompletedProcess[str]) -> list[str]:
    """Lines on stderr apart from events."""
    return [line for line in process.stderr.splitlines() if not line.startswith("{")]


def test_stage_as_a_process_releases_once_and_refuses_changed_records(records: Path, tmp_path: Path) -> None:
    spec = spec_of(records, owner_store=f"file://{tmp_path}/owner", federation_store=f"file://{tmp_path}/federation")
    first, again = start(spec, tmp_path), start(spec, tmp_path)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    receipt, repeated = (Receipt.model_validate_json(run.stdout.splitlines()[-1]) for run in (first, again))
    assert (tmp_path / "receipt.json").read_text() == again.stdout.splitlines()[-1]
    manifest = (tmp_path / "federation" / MANIFEST).read_bytes()
    assert receipt.outputs == repeated.outputs == {"manifest": Manifest.from_bytes(manifest, "manifest").sha256}
    told = [json.loads(line) for line in first.stderr.splitlines()]
    assert {line["event"] for line in told} == {"progress"} and told[-1]["done"] == told[-1]["total"] == sum(COUNTS)

    write_records(records, images=np.zeros((12, 4, 4)))
    changed = start(spec, tmp_path)
    assert changed.returncode == 77
    assert changed.stdout == ""
    (message,) = messages(changed)
    assert message.startswith("feddiff: release ")
    assert (tmp_path / "federation" / MANIFEST).read_bytes() == manifest


def test_stage_as_a_process_refuses_bad_records_in_one_line(records: Path, tmp_path: Path) -> None:
    write_records(records, images=np.full((12, 4, 4), np.nan))
    spec = spec_of(records, owner_store=f"file://{tmp_path}/owner", federation_store=f"file://{tmp_path}/federation")
    process = start(spec, tmp_path)
    assert (process.returncode, process.stdout) == (65, "")
    assert len(messages(process)) == 1
    assert not (tmp_path / "federation").exists()


# ---- Images that stay in their files -------------------------------------------------------------------------


def write_pictures(folder: Path) -> tuple[Path, Path]:
    """The same images as files, one folder per class, and as arrays."""
    pixels = np.random.default_rng(0).integers(0, 256, (sum(COUNTS), 4, 4), dtype=np.uint8)
    for row, (image, label) in enumerate(zip(pixels, np.repeat(np.arange(len(COUNTS)), COUNTS), strict=True)):
        (folder / f"scans/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"scans/{label}/patient-{row:02}.png")
    return folder / "scans", write_records(folder / "train.npz", images=pixels)


def of_folder(path: Path, mechanism: str = "gaussian", **changes: Any) -> ReleaseSpec:
    return spec_of(path, mechanism, source=SourceSpec(format="folder", path=str(path)), **changes)


@pytest.mark.parametrize("mechanism", ["gaussian", "summary"])  # privunit draws more than normals
def test_a_folder_is_released_as_the_same_images_in_one_file_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    monkeypatch.setattr(stage, "shuffled_order", lambda num_records: np.arange(num_records)[::-1].copy())
    folder, file = write_pictures(tmp_path)
    released = []
    for spec in (of_folder(folder, mechanism), spec_of(file, mechanism)):
        pair = Stores()
        noise = np.random.default_rng(1).standard_normal
        release(spec, owner_store=pair.owner, federation_store=pair.federation, normals=noise)
        released.append(pair.federation.objects)
    assert released[0] == released[1] != {}


def sent_after_a_change(folder: Path, mechanism: str) -> int:
    """How many objects leave an owner one of whose images is overwritten once its records have been hashed."""
    pair, target = Stores(), folder / "1/patient-07.png"

    def change(name: str) -> None:
        if name.startswith("before create") and "probe" in name:
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(target)

    with suppress(PrivacyRefusal):
        run(of_folder(folder, mechanism), pair, change)
    return len(pair.ever_sent())


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_an_image_changed_between_its_hash_and_its_noise_is_not_released(tmp_path: Path, mechanism: str) -> None:
    assert sent_after_a_change(write_pictures(tmp_path)[0], mechanism) == 0


def test_mutant_that_releases_a_changed_image_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "fingerprint", lambda image_CHW: bytes(stored.FINGERPRINT_BYTES))
    assert sent_after_a_change(write_pictures(tmp_path)[0], "gaussian") > 0


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_progress_rises_to_all_images_by_their_declared_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    folder, _ = write_pictures(tmp_path)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(stage, "report_progress", lambda done, total, unit: told.append((done, total)))
    run(of_folder(folder, mechanism), Stores())
    assert told == sorted(told) and {total for _, total in told} == {sum(COUNTS)}
    assert told[-1][0] == sum(COUNTS) > told[-2][0] and len(set(told)) > 3


@pytest.mark.parametrize("odd", ["empty", "label", "link"])
def test_an_odd_file_is_named_to_its_owner_alone(tmp_path: Path, odd: str) -> None:
    folder, _ = write_pictures(tmp_path)
    target = folder / "1/patient-07.png"
    if odd == "empty":
        target.write_bytes(b"")
    elif odd == "label":
        target.rename(folder / "0/patient-07.png")
    else:
        target.rename(tmp_path / "elsewhere.png")
        target.symlink_to(tmp_path / "elsewhere.png")
    spec = of_folder(folder, owner_store=f"file://{tmp_path}/o", federation_store=f"file://{tmp_path}/federation")
    process = start(spec, tmp_path)
    assert (process.returncode, process.stdout) == (65, "")
    (message,) = messages(process)
    assert message.startswith("feddiff: ") and ("patient-07.png: " in message or odd == "label")
    assert not (tmp_path / "receipt.json").exists() and not (tmp_path / "federation").exists()


def kill_at_every_system_call(folder: Path) -> None:
    """Runs the stage in forked processes, each of which ends by SIGKILL at the next call that changes the disk."""
    shards.SHARD_BYTES = 5 * (2 * 16 + 4)
    os.fsync = lambda descriptor: None  # a killed process loses nothing that was written, and disks are slow
    spec = spec_of(write_records(folder / "train.npz"))
    for index in range(1000):
        pair = [open_store(f"file://{folder}/{index}/{name}") for name in ("owner", "federation")]
        status = os.waitstatus_to_exitcode(in_child(lambda pair=pair, index=index: killed_at(index, spec, *pair)))  # type: ignore[misc]
        visible = snapshot(pair[1])
        answer = release(spec, owner_store=pair[0], federation_store=pair[1], normals=os_entropy_normals())
        assert visible.items() <= snapshot(pair[1]).items()
        assert hashlib.sha256(pair[1].get(MANIFEST)).hexdigest() == answer
        seal = Seal.from_bytes(pair[0].get(SEAL), "seal")
        assert len(pair[0].list(layout.attempts_prefix(RELEASE))) == len(seal.shards) == 3
        if status == 0:
            print(index)
            return
        assert status == -signal.SIGKILL


def in_child(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def killed_at(index: int, spec: ReleaseSpec, owner: Store, federation: Store) -> None:
    calls = iter(range(index + 1))

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def before(*arguments: Any, **named: Any) -> Any:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return before

    for name in ("fsync", "link", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    release(spec, owner_store=owner, federation_store=federation, normals=os_entropy_normals())


def snapshot(store: Store) -> dict[str, bytes]:
    return {key: store.get(key) for key in store.list(f"{UID}/") if "/probe-" not in key}


def test_process_killed_at_any_system_call_and_run_again_is_one_release(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 50


def test_stage_does_not_load_torch() -> None:
    code = "import sys, feddiff_trainer.release; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    kill_at_every_system_call(Path(sys.argv[1]))
