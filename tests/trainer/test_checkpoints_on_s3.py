"""Checkpoints in a real S3 server, whose identities are those of a federation."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor, nn

from cluster.weed import Weed, federation_of
from feddiff_protocol import layout
from feddiff_protocol.errors import FeddiffError, Interrupted
from feddiff_trainer import stores
from feddiff_trainer.checkpoints import Checkpoint, Checkpoints
from feddiff_trainer.stores import Store, open_store
from feddiff_trainer.training import BatchLoss, World, train

pytestmark = pytest.mark.usefixtures("one_thread")

UID = "00000000-0000-4000-8000-000000000001"
OWNERS = ("clinic-a", "clinic-b")
SHARED, PERSONAL = layout.shared_checkpoints(UID), layout.personal_checkpoints(UID, "clinic-a")
BATCH, NUM_STEPS = 8, 16
# A rank 0 as far as its upload, which takes long enough to be killed in.
UPLOAD = """
import os, sys
from feddiff_trainer.stores import open_store
open_store("s3://federation/jobs", "federation").put(sys.argv[1], bytes(512 << 20))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with Weed(tmp_path_factory.mktemp("s3"), federation_of(OWNERS), ["federation", *OWNERS]) as server:
        yield server


@pytest.fixture
def store_as(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Store]:
    def store(identity: str, uri: str) -> Store:
        for name, value in server.environment(identity).items():
            monkeypatch.setenv(f"FEDERATION_{name}", value)
        return open_store(uri, "federation")

    return store


@pytest.fixture
def shared(store_as: Callable[[str, str], Store]) -> Iterator[Checkpoints]:
    store = store_as("trainer", "s3://federation/jobs")
    yield Checkpoints(store, SHARED)
    for key in store.list(SHARED):
        store.delete(key)


def a_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {}, {"weight": torch.full((1000,), float(step))})


def steps(kept: Checkpoints) -> list[int]:
    return [int(key.removeprefix(kept.prefix)[:12]) for key in kept.store.list(kept.prefix)]


def newest_step(kept: Checkpoints) -> int | None:
    checkpoint = Checkpoints(kept.store, kept.prefix).newest()
    return None if checkpoint is None else checkpoint.step


def test_every_party_keeps_its_own_last_two_and_may_touch_no_others(
    shared: Checkpoints, store_as: Callable[[str, str], Store]
) -> None:
    personal = Checkpoints(store_as("clinic-a", "s3://clinic-a/feddiff"), PERSONAL)
    for step in (1, 2, 3):
        shared.save(a_checkpoint(step))
        personal.save(a_checkpoint(10 + step))
    assert (steps(shared), steps(personal), newest_step(shared), newest_step(personal)) == ([2, 3], [12, 13], 3, 13)
    poisoner = Checkpoints(store_as("federation-clinic-b", "s3://federation/jobs"), SHARED)
    thief = Checkpoints(store_as("clinic-b", "s3://clinic-a/feddiff"), PERSONAL)
    for forbidden in (
        lambda: poisoner.save(a_checkpoint(99)),
        lambda: poisoner.store.delete(shared.store.list(SHARED)[0]),
        thief.newest,
        lambda: thief.store.get(personal.store.list(PERSONAL)[0]),
    ):
        with pytest.raises(FeddiffError, match="who may use it"):
            forbidden()
    assert steps(shared) == [2, 3]


def test_upload_that_is_killed_leaves_nothing_to_be_found(shared: Checkpoints, server: Weed) -> None:
    shared.save(a_checkpoint(1))
    key = f"{SHARED}{9:012d}-{'0' * 64}.safetensors"
    environment = {f"FEDERATION_{name}": value for name, value in server.environment("trainer").items()}
    upload = subprocess.Popen([sys.executable, "-c", UPLOAD, key], env=os.environ | environment)
    client, deadline = server.client(), time.monotonic() + 120
    while "Uploads" not in client.list_multipart_uploads(Bucket="federation"):
        assert upload.poll() is None and time.monotonic() < deadline
    upload.kill()
    assert upload.wait() == -signal.SIGKILL
    with capture_logs() as logs:
        assert newest_step(shared) == 1
    assert (steps(shared), logs) == ([1], [])


def test_object_that_somebody_damaged_is_skipped(shared: Checkpoints, server: Weed) -> None:
    shared.save(a_checkpoint(1))
    key, client = shared.save(a_checkpoint(2)), server.client()
    damaged = client.get_object(Bucket="federation", Key=f"jobs/{key}")["Body"].read()[:-1] + b"!"
    client.put_object(Bucket="federation", Key=f"jobs/{key}", Body=damaged)
    with capture_logs() as logs:
        assert newest_step(shared) == 1
    assert [line["event"] for line in logs] == ["checkpoint_damaged"]
    assert hashlib.sha256(damaged).hexdigest() in logs[0]["reason"]


# ---- Training ------------------------------------------------------------------------------------------------


def loss_at(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
    x_BD = torch.randn(batch, 6, generator=generator)
    return (model(x_BD[mine]) - x_BD[mine].flip(1)).square().mean()


def run(loss: BatchLoss, kept: Checkpoints | None, **changes: Any) -> list[Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    found = train(
        model, loss, world=World(0, 1, torch.device("cpu")), num_images=NUM_STEPS * BATCH, batch=BATCH,
        learning_rate=0.01, ema_width=0.1, seed=3, on_progress=lambda _: None, checkpoints=kept, **changes,
    )  # fmt: skip
    return list(found.parameters())


def acting(acts: dict[int, Callable[[], object]]) -> BatchLoss:
    """The loss that acts before it is computed, by call counted from 1."""
    calls = iter(range(1, 1000))

    def loss(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        acts.get(next(calls), lambda: None)()
        return loss_at(model, generator, batch, mine)

    return loss


def test_training_outlives_an_outage_and_goes_on_bit_for_bit_after_a_stop(tmp_path: Path) -> None:
    """A checkpoint after every step that finds the store idle; the server is gone for steps 5 to 9."""
    expected = run(loss_at, None)
    with Weed(tmp_path / "s3", {}, ["federation"]) as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment("administrator").items():
            environment.setenv(name, value)
        environment.setattr(stores, "BUCKET_PATIENCE_SECONDS", 0.5)
        kept = Checkpoints(open_store("s3://federation/jobs"), SHARED)
        seen: list[list[int]] = []

        def tried(after: Callable[[], object] = lambda: None) -> Callable[[], object]:
            """Waits for what is on its way, then acts."""

            def act() -> None:
                for thread in [each for each in threading.enumerate() if each.name == "checkpoint"]:
                    thread.join()
                after()

            return act

        acts = {
            4: tried(lambda: seen.append(steps(kept))),
            5: tried(server.__exit__),
            10: tried(server.__enter__),
            12: tried(lambda: seen.append(steps(kept))),
            13: tried(lambda: os.kill(os.getpid(), signal.SIGTERM)),
        }
        with capture_logs() as logs, pytest.raises(Interrupted, match="after 104 of 128 images; all of it is kept"):
            run(acting(acts), kept, checkpoint_seconds=0.0)
        assert {line["event"] for line in logs} == {"checkpoint_not_saved"}
        assert seen[0] and max(seen[0]) <= 4 and max(seen[1]) >= 10
        assert max(steps(kept)) == 13
        resumed = run(loss_at, Checkpoints(kept.store, SHARED))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, expected, strict=True))
