"""The operator asks pods how far they are: silent, slow, huge and lying ones cost it little and change nothing."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

import pytest

from batch_objects import NOW, batch_job, pod
from feddiff_operator import progress
from feddiff_operator.progress import ANSWER_BYTES, MOST_ASKED, Known, Progresses, Target, answer_of, ask, targets
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import StageProgress
from feddiff_trainer.telemetry import Telemetry, _listener, _Server

Object = dict[str, Any]
SHARED = (Stage.TRAIN_SHARED, "")
JOB = ("research", "digits")
GOOD = b'{"stage": "train-shared", "done": 12, "total": 20}'


def said(done: int, total: int = 100, stage: Stage = Stage.TRAIN_SHARED) -> StageProgress:
    return StageProgress(stage=stage, done=done, total=total)


# ---- asking one pod --------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def pod_that(
    answers: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """The port of a server on loopback that treats every connection so."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                await answers(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def asked(answers: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> StageProgress | None:
    async def once() -> StageProgress | None:
        async with pod_that(answers) as port:
            return await ask("127.0.0.1", port)

    return asyncio.run(once())


def saying(*parts: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()

    return answer


def ok(body: bytes) -> bytes:
    return b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + body


def test_the_answer_of_a_stage_is_understood() -> None:
    assert asked(saying(ok(GOOD))) == said(12, 20)
    assert asked(saying(ok(GOOD[:10]), GOOD[10:])) == said(12, 20), "in pieces"


def test_a_real_stages_page_is_understood() -> None:
    """The two sides that meet only over HTTP."""
    from threading import Thread

    from batch_objects import job, stage_spec

    telemetry = Telemetry(stage_spec(job(), Stage.TRAIN_SHARED))
    listener = _listener(str(_free_port()))
    server = _Server(listener, telemetry)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        port = listener.getsockname()[1]
        assert asyncio.run(ask("127.0.0.1", port)) is None, "204"
        telemetry.progressed(12, 20)
        assert asyncio.run(ask("127.0.0.1", port)) == asyncio.run(ask("::1", port)) == said(12, 20)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


HOSTILE = {
    "nothing": b"",
    "no HTTP": GOOD,
    "not found": b"HTTP/1.0 404 Not Found\r\n\r\n" + GOOD,
    "a redirect": b"HTTP/1.0 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n",
    "no JSON": ok(b"62 %"),
    "a page": ok(b"<html>" + GOOD),
    "half of it": ok(GOOD[:-1]),
    "two of it": ok(GOOD + GOOD),
    "no UTF-8": ok(b'{"stage": "\xff"}'),
    "deep nesting": ok(b"[" * 1000),
    "more than there is": ok(b'{"stage": "train-shared", "done": 21, "total": 20}'),
    "one field more": ok(b'{"stage": "train-shared", "done": 1, "total": 20, "loss": 0.1}'),
    "endless digits": ok(b'{"stage": "train-shared", "done": 1' + b"0" * 500 + b', "total": 20}'),
    "a body that is too long": ok(GOOD + b" " * 1024),
    "a head that is too long": b"HTTP/1.0 200 OK\r\nX: " + b"x" * ANSWER_BYTES + b"\r\n\r\n" + GOOD,
    "compressed": b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b\x08\x00",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_understood_is_no_progress(answer: bytes) -> None:
    assert asked(saying(answer)) is None


def test_of_an_endless_answer_little_is_read() -> None:
    """What a pod could write before the operator hung up: its own buffers and the sockets', not gigabytes."""
    written = 0

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(ok(b""))
        while written < 1 << 30:
            writer.write(b" " * 65536)
            written += 65536
            await writer.drain()

    assert asked(pour) is None
    assert written < 64 << 20


def test_who_does_not_answer_in_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "ASK_SECONDS", 0.05)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for letter in ok(GOOD):
            writer.write(bytes([letter]))
            await writer.drain()
            await asyncio.sleep(0.02)

    assert asked(drip) is None
    assert asked(lambda reader, writer: asyncio.sleep(60)) is None


def test_nobody_there_is_no_progress() -> None:
    assert asyncio.run(ask("127.0.0.1", _free_port())) is None
    assert asyncio.run(ask("not-an-address.invalid", 1)) is None


def test_an_answer_without_checks_is_noticed() -> None:
    """The table of hostile answers against a reader that trusts them."""

    def trusting(answer: bytes) -> StageProgress | None:
        try:
            found = json.loads(answer.partition(b"\r\n\r\n")[2] or answer)
            return StageProgress.model_construct(**found)
        except (ValueError, TypeError, RecursionError):
            return None

    believed = {name for name, answer in HOSTILE.items() if trusting(answer) is not None}
    assert {"more than there is", "one field more", "endless digits", "not found", "no HTTP"} <= believed
    rest = [name for name, answer in HOSTILE.items() if answer_of(answer) is not None]
    assert rest == ["a head that is too long"], "whose length is looked at while it comes in"


# ---- whom to ask -----------------------------------------------------------------------------------------------


def running(child: Object, address: str = "10.1.2.3", **more: Any) -> Object:
    found = pod(child, **more)
    found["metadata"]["uid"] = f"uid-of-{found['metadata']['name']}"
    found["status"] |= {"podIP": address, "hostIP": "192.168.0.1"}
    return found


def test_the_first_running_pod_of_each_attempt_is_asked() -> None:
    shared, personal = batch_job(Stage.TRAIN_SHARED), batch_job(Stage.TRAIN_PERSONAL, "a")
    pods = [running(shared), running(shared, index=1), running(personal, "fd00::7")]
    assert targets([shared, personal], pods) == [
        Target(SHARED, pods[0]["metadata"]["uid"], "10.1.2.3"),
        Target((Stage.TRAIN_PERSONAL, "a"), pods[2]["metadata"]["uid"], "fd00::7"),
    ]


def _of_another_namespace(found: Object) -> None:
    found["metadata"]["namespace"] = "elsewhere"


def _of_an_earlier_job(found: Object) -> None:
    found["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] = "another"


def _on_the_hosts_network(found: Object) -> None:
    found["status"]["podIP"] = found["status"]["hostIP"]


def _on_its_way_out(found: Object) -> None:
    found["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"


def _pending(found: Object) -> None:
    found["status"]["phase"] = "Pending"


def _without_address(found: Object) -> None:
    del found["status"]["podIP"]


@pytest.mark.parametrize(
    "spoil",
    [
        _of_another_namespace,
        _of_an_earlier_job,
        _on_the_hosts_network,
        _on_its_way_out,
        _pending,
        _without_address,
        *(
            lambda found, address=address: found["status"].update(podIP=address)
            for address in ("127.0.0.1", "169.254.169.254", "::1", "fe80::1", "0.0.0.0", "224.0.0.1", "host", "")
        ),
    ],
)
def test_what_only_looks_like_a_pod_of_ours_is_not_asked(spoil: Callable[[Object], None]) -> None:
    child = batch_job(Stage.RELEASE, "a")
    found = running(child)
    assert targets([child], [found])
    spoil(found)
    assert targets([child], [found]) == []


# ---- rounds ----------------------------------------------------------------------------------------------------


class Pods:
    """What pods say, by address; and when they were asked."""

    def __init__(self) -> None:
        self.says: dict[str, StageProgress | None] = {}
        self.asked: list[str] = []
        self.now: datetime = NOW
        self.at_once = self.most_at_once = 0
        self.progresses = Progresses(lambda: self.now, self.ask)

    async def ask(self, address: str) -> StageProgress | None:
        self.asked.append(address)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await asyncio.sleep(0)
        self.at_once -= 1
        return self.says.get(address)

    def follow(self, *addresses: str, uid: str = "uid", job: tuple[str, str] = JOB) -> None:
        self.progresses.follow(*job, uid, [Target(SHARED, f"pod-{each}", each) for each in addresses])

    def round(self, seconds: float = 15, **says: StageProgress | None) -> list[tuple[str, str]]:
        self.now += timedelta(seconds=seconds)
        self.says |= says
        return asyncio.run(self.progresses.round())

    def known(self) -> Known | None:
        return self.progresses.of(*JOB).get(SHARED)


def test_a_job_is_named_when_a_percent_is_news() -> None:
    pods = Pods()
    pods.follow("a")
    assert pods.round() == [] and pods.known() is None
    assert pods.round(a=said(500, 1000)) == [JOB]
    assert pods.round(a=said(509, 1000)) == [], "no whole percent"
    assert pods.round(a=said(510, 1000)) == [JOB]


def test_the_end_follows_from_the_pace() -> None:
    pods = Pods()
    pods.follow("a")
    pods.round(a=said(10))
    assert pods.known() == Known(0.1), "one answer is no pace"
    pods.round(60, a=said(20))
    assert pods.known() == Known(0.2, pods.now + timedelta(minutes=8))
    for _ in range(progress.REMEMBERED):
        pods.round(60)
    assert pods.known() == Known(0.2), "it stands still"


def test_of_owners_stages_only_the_share_is_known() -> None:
    pods = Pods()
    key = (Stage.TRAIN_PERSONAL, "a")
    pods.progresses.follow(*JOB, "uid", [Target(key, "pod", "a")])
    for done in (10, 20, 30):
        pods.round(a=said(done, stage=Stage.TRAIN_PERSONAL))
    assert pods.progresses.of(*JOB) == {key: Known(0.3)}


@pytest.mark.parametrize("lie", [said(39), said(90, 200), said(90, stage=Stage.RELEASE), None])
def test_a_pod_that_goes_back_or_speaks_of_something_else_is_not_believed(lie: StageProgress | None) -> None:
    pods = Pods()
    pods.follow("a")
    pods.round(a=said(40))
    assert pods.round(a=lie) == []
    known = pods.known()
    assert known is not None and known.share == 0.4


def test_a_new_attempt_goes_on_from_what_it_says_and_until_then_from_what_was_known() -> None:
    pods = Pods()
    pods.follow("a")
    pods.round(a=said(40))
    pods.follow()
    assert pods.known() == Known(0.4)
    pods.follow("b")
    assert pods.round(b=said(30)) == [JOB]
    assert pods.known() == Known(0.3), "its checkpoint was older"


def test_another_job_of_the_name_begins_anew_and_an_ended_one_is_forgotten() -> None:
    pods = Pods()
    pods.follow("a")
    pods.round(a=said(40))
    pods.follow("b", uid="another")
    assert pods.known() is None
    pods.round(b=said(1))
    pods.progresses.forget(*JOB)
    assert pods.known() is None and pods.round() == []
    pods.follow("a")
    pods.progresses.clear()
    pods.asked.clear()
    assert pods.round() == [] and pods.asked == []


def test_a_pod_that_ended_while_it_was_asked_says_nothing_any_more() -> None:
    pods = Pods()
    pods.follow("a")
    pods.says["a"] = said(40)

    async def meanwhile() -> None:
        asking = asyncio.ensure_future(pods.progresses.round())
        await asyncio.sleep(0)
        pods.follow()
        await asking

    asyncio.run(meanwhile())
    assert pods.known() is None


def test_many_pods_are_asked_in_turn_and_few_at_once() -> None:
    pods = Pods()
    names = [str(number) for number in range(2 * MOST_ASKED + 1)]
    pods.follow(*names)
    pods.round()
    assert len(pods.asked) == MOST_ASKED and pods.most_at_once == progress.SIDE_BY_SIDE
    pods.round()
    pods.round()
    assert len(pods.asked) == 3 * MOST_ASKED and set(pods.asked) == set(names)
