"""A cluster pool without an engine: nodes that refuse, fall silent, or are another version."""

from __future__ import annotations

import asyncio
import json
import pickle
import re
import threading
import time
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from support_inside import (
    kept_by_nodes,
    listed_places,
    room_of,
    unused_places,
    wait_for_answers,
)
from support_processes import in_a_fork, wait_until

import safepool
from safepool import WorkerInfo
from safepool.cluster import (
    ClusterPool,
    NodeLostError,
    NoNodesError,
    agent,
    core,
    messages,
    nodes,
    shell,
)
from safepool.cluster import pool as pool_module
from safepool.cluster.carriers import EngineGoneError, PlaceLostError
from safepool.cluster.carriers.dask import DaskCarrier
from safepool.cluster.messages import (
    LARGE_ARGUMENT_BYTES,
    PROTOCOL,
    Buffers,
    DeliverMessage,
    Packet,
    Parcel,
    Welcome,
    pickle_arguments,
    pickle_function,
    python_version,
)
from safepool.pool.calls import results as map_results

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


class Engine:
    """One place, which answers as a test wants it."""

    at_once = False
    needs_this_thread = False

    def is_in_this_thread(self) -> bool:
        return self.needs_this_thread

    def __init__(self, **answers: Callable[[], object]) -> None:
        self.answers: dict[str, Callable[[], object]] = {"release": lambda: None, **answers}
        self.gone = ""
        self.pending: list[Future[Any]] = []
        self.asked: list[str] = []
        self.messages: list[Packet] = []

    def places(self) -> list[str]:
        if self.gone:
            raise EngineGoneError(self.gone)
        return ["p"]

    def submit(self, place: str, function: Callable[..., Any], *args: Any) -> Future[Any]:
        assert place == "p"
        name = function.__name__.removeprefix("agent_")
        if name == "deliver":
            self.messages.append(args[-1])
        self.asked.append(name)
        future: Future[Any] = Future()
        answer = self.answers.get(name)
        if answer is None:
            self.pending.append(future)
            return future
        try:
            future.set_result(answer())
        except Exception as error:
            future.set_exception(error)
        return future


def welcome(**facts: Any) -> tuple[Any, ...]:
    usual = Welcome(
        PROTOCOL, python_version(), safepool.__version__, "n", "host", 1, 2, ("a", "b", "c"), True
    )
    return tuple(usual._replace(**facts))


def raises(error: Exception) -> Callable[[], object]:
    def answer() -> object:
        raise error

    return answer


@pytest.fixture
def pool_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ClusterPool]]:
    made: list[ClusterPool] = []

    def make(engine: Engine, **words: Any) -> ClusterPool:
        monkeypatch.setattr(pool_module, "_carrier", lambda *_: engine)
        made.append(ClusterPool(None, **words))
        return made[-1]

    yield make
    for one in made:
        one.kill_workers()
        one.shutdown()


def test_shutdown_returns_when_the_nodes_know_that_the_pool_has_ended(
    pool_of: Callable[..., ClusterPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that ends at once would otherwise take the message with it."""
    monkeypatch.setattr(shell, "_RELEASE_S", 600.0)
    engine = Engine(greet=welcome)
    del engine.answers["release"]
    pool = pool_of(engine)
    pool.submit(abs, 1)
    wait_until(lambda: "deliver" in engine.asked)
    ending = threading.Thread(target=pool.shutdown)

    pool.kill_workers()
    ending.start()

    wait_until(lambda: "release" in engine.asked)
    assert ending.is_alive()
    for future in engine.pending:
        future.set_result(None)
    ending.join(60)
    assert not ending.is_alive()


def test_the_thread_that_carries_calls_does_not_wait_for_them(
    pool_of: Callable[..., ClusterPool],
) -> None:
    engine = Engine(greet=welcome)
    pool = pool_of(engine)
    futures, results = [pool.submit(abs, n) for n in range(3)], pool.map(abs, [-1])
    wait_until(lambda: pool.size and futures[0].running())
    engine.needs_this_thread = True
    for wait in (futures[0].result, futures[2].exception, results.__next__, pool.workers):
        with pytest.raises(RuntimeError, match="would wait for itself"):
            wait()
    with pytest.raises(TimeoutError):
        futures[0].result(timeout=0)
    pool.shutdown()
    assert not futures[0].done()
    assert pool.cancel(futures[2])
    assert futures[2].cancelled()


def test_the_loop_of_a_client_carries_its_calls() -> None:
    async def told() -> list[bool]:
        is_it = DaskCarrier(Scheduler("near")).is_in_this_thread
        return [is_it(), await asyncio.to_thread(is_it)]

    assert asyncio.run(told()) == [True, False]


# What a node answers, and what the error of a call says of it.
REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "another Python": (lambda: welcome(python="3.2"), "it has Python 3.2 and safepool"),
    "another protocol": (lambda: welcome(protocol=99), "Install the same versions"),
    "no safepool": (
        raises(ModuleNotFoundError("No module named 'safepool'")),
        "ModuleNotFoundError: No module named 'safepool'",
    ),
    "what clears a terminal": (lambda: welcome(python="3\x1b[2J"), r"it has Python 3\\x1b\[2J "),
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no other node once one has refused."""
    monkeypatch.setattr(core, "_UNFIT_S", 0.0)
    monkeypatch.setattr(core, "_WRONG_S", 0.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", REFUSALS)
def test_why_a_node_is_not_used_is_in_the_error(
    pool_of: Callable[..., ClusterPool], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer, words = REFUSALS[name]
    pool = pool_of(Engine(greet=answer), no_nodes_timeout=None)
    with pytest.raises(NoNodesError, match=f"no node can be used .p: .*{words}"):
        pool.submit(abs, 1).result(60)
    with pytest.raises(NoNodesError):
        pool.submit(abs, 2).result(60)
    # The log tells it once.
    assert [text for text in caplog.messages if "node p is not used: " in text] == caplog.messages
    assert len(caplog.messages) == 1


def test_the_versions_of_a_node_that_is_not_named_do_not_matter(
    pool_of: Callable[..., ClusterPool], caplog: pytest.LogCaptureFixture
) -> None:
    """The named one may join later."""
    answer = REFUSALS["another protocol"][0]
    pool = pool_of(Engine(greet=answer), nodes=["other"], no_nodes_timeout=None)
    future = pool.submit(abs, 1)
    wait_until(lambda: "not one of nodes=" in unused_places(pool).get("p", ""))
    assert not future.done()
    assert caplog.messages == []


@pytest.mark.usefixtures("impatient")
def test_a_refusal_counts_if_its_node_is_named(pool_of: Callable[..., ClusterPool]) -> None:
    wrong = raises(agent.WrongOptionsError("no such module", "host.domain"))
    for names, answer in (
        (["p"], REFUSALS["no safepool"][0]),
        (["host"], REFUSALS["another Python"][0]),
        (["host"], wrong),
    ):
        pool = pool_of(Engine(greet=answer), nodes=names, no_nodes_timeout=None)
        with pytest.raises(NoNodesError, match=r"no node can be used \(p: "):
            pool.submit(abs, 1).result(60)
    for answer in (REFUSALS["no safepool"][0], wrong):
        pool = pool_of(Engine(greet=answer), nodes=["other"], no_nodes_timeout=None)
        future = pool.submit(abs, 1)
        wait_until(lambda pool=pool: "odule" in unused_places(pool).get("p", ""))
        wait_for_answers(pool)  # the refusal has had its effect
        assert not future.done()


def test_the_reason_and_the_host_of_wrong_arguments_travel() -> None:
    error = pickle.loads(pickle.dumps(agent.WrongOptionsError("no such module", "host")))
    assert (str(error), error.host) == ("no such module", "host")


def test_calls_at_a_node_that_refuses_the_arguments_later_are_lost(
    pool_of: Callable[..., ClusterPool],
) -> None:
    """An executor may run each message on another node."""
    engine = Engine(greet=welcome, work=raises(agent.WrongOptionsError("no such module")))
    engine.at_once = True
    with pytest.raises(NodeLostError, match="no such module"):
        pool_of(engine).submit(abs, 1).result(60)


def test_a_node_that_falls_silent_is_lost(
    pool_of: Callable[..., ClusterPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "_SILENCE_S", 0.05)
    monkeypatch.setattr(shell, "_LIST_S", 0.01)
    engine = Engine(greet=welcome, deliver=lambda: None)
    with pytest.raises(NodeLostError, match=r"p \(host\) was lost .* has not answered"):
        pool_of(engine).submit(abs, 1).result(30)


def test_a_place_that_is_lost_is_named(
    pool_of: Callable[..., ClusterPool], tmp_path: Path
) -> None:
    engine = Engine(greet=welcome, deliver=raises(PlaceLostError("connection closed")))
    pool = pool_of(engine, trace=tmp_path / "run.json")
    with pytest.raises(NodeLostError, match="connection closed") as caught:
        pool.submit(abs, 1).result(30)
    assert caught.value.task == "builtins.abs"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    pool.kill_workers()
    pool.shutdown()
    events = json.loads((tmp_path / "run.json").read_text())
    lost = [one["args"] for one in events if one["name"] == "node lost"]
    assert lost[0] == {"node": "p (host)", "why": "connection closed", "calls": 1}


def test_only_a_trace_is_told_which_worker_had_a_call(
    pool_of: Callable[..., ClusterPool], tmp_path: Path
) -> None:
    for words in ({}, {"trace": tmp_path / "run.json"}):
        engine = Engine(greet=welcome, deliver=lambda: None)
        pool_of(engine, **words).submit(abs, 1)
        wait_until(lambda engine=engine: engine.messages)
        assert engine.messages[0].value().traced is bool(words)
        # No question for it: where calls ran is told with their answers.
        assert {*engine.asked} <= {"greet", "deliver", "collect"}


def test_a_node_that_does_not_answer_a_question_is_told(
    pool_of: Callable[..., ClusterPool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pool_module, "_ASK_S", 0.0)
    pool = pool_of(Engine(greet=welcome))
    assert pool.workers() == ()
    pool.submit(abs, 1)
    wait_until(pool.nodes)
    assert pool.dump_tracebacks(0) == {("p (host)", 0): "(it has not answered for 0 s)"}
    assert pool.workers() == ()
    assert caplog.messages == [
        "cannot read the workers of node p (host): it has not answered for 0 s"
    ]


def test_questions_are_answered_for_each_node(pool_of: Callable[..., ClusterPool]) -> None:
    worker = WorkerInfo(
        pid=7, index=0, state="idle", task=None, running_s=None, tasks_done=1, waiting=0,
        resident_bytes=None, native_threads=None,
    )  # fmt: skip
    answers: list[Any] = [(worker,), {7: "a stack"}]
    pool = pool_of(Engine(greet=welcome, ask=lambda: answers.pop(0)))
    pool.submit(abs, 1)
    wait_until(pool.nodes)
    (told,) = pool.workers()
    assert (told.node, told.pid, told.state) == ("p (host)", 7, "idle")
    assert pool.dump_tracebacks() == {("p (host)", 7): "a stack"}


def test_when_the_engine_is_gone_calls_end(pool_of: Callable[..., ClusterPool]) -> None:
    engine = Engine(greet=welcome)
    pool = pool_of(engine)
    future = pool.submit(abs, 1)
    engine.gone = "the client is closed"
    with pytest.raises(safepool.PoolBrokenError, match="the client is closed"):
        future.result(30)
    engine.gone = ""
    for _ in range(2):  # it stays broken, when the engine is there again
        with pytest.raises(safepool.PoolBrokenError, match="the client is closed"):
            pool.submit(abs, 1).result(30)
        wait_until(lambda: listed_places(pool) == ("p",))
    assert pool.nodes() == ()


def test_an_engine_that_is_gone_while_a_node_is_asked_is_no_fault_of_the_node(
    pool_of: Callable[..., ClusterPool], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()

    def close() -> None:
        engine.gone = "the client is closed"
        raise EngineGoneError(engine.gone)

    engine.answers["greet"] = close
    with pytest.raises(safepool.PoolBrokenError, match="the client is closed") as caught:
        pool_of(engine).submit(abs, 1).result(60)
    assert caught.type is safepool.PoolBrokenError
    assert caplog.messages == []


def test_a_closed_client_is_told_whatever_it_raises() -> None:
    class Closed:
        status = "running"

        async def run(self, *_: Any, **_words: Any) -> None:
            self.status = "closing"
            raise RuntimeError("cannot schedule new futures after shutdown")

    carrier = DaskCarrier(Closed())
    carrier._reached["w"] = False, time.monotonic()
    with pytest.raises(EngineGoneError, match="client was closed"):
        asyncio.run(carrier._run("w", _size, ()))


def test_a_node_answers_for_a_call_that_it_was_told_to_end() -> None:
    """Else it would count as under way for ever."""
    node_pool = agent.NodePool({"max_workers": 1})
    session = agent.Session("s", node_pool)
    function = pickle_function(time.sleep)
    calls = [
        Parcel(
            number,
            "sleep",
            None,
            function.key,
            pickle_arguments((600,), {}, Buffers()).packet,
            (),
            (),
        )
        for number in (1, 2)
    ]
    functions = {function.key: (function.packet, ())}
    try:
        session.take_in(DeliverMessage(calls, functions, {}, {}, (), (), (), False))
        wait_until(lambda: any(worker.task for worker in node_pool.pool.workers()))
        session.take_in(DeliverMessage([], {}, {}, {}, (), (1, 2), (), False))
        session.wait_for_all(2)
        answers = session.report().answers
        assert sorted(number for number, *_ in answers) == [1, 2]
        assert not any(died for _, _, died, *_ in answers)
    finally:
        node_pool.close()
        node_pool.pool.shutdown()


def test_a_worker_of_a_node_holds_more_work_than_one_of_a_pool() -> None:
    """The agent shares its interpreter with the engine: a worker must not wait for both."""
    ten_ms = 10_000_000
    node_pool = agent.NodePool({"max_workers": 1})
    with safepool.ProcessPool(1) as pool, node_pool.pool as of_node:
        assert [room_of(one, ten_ms) for one in (of_node, pool)] == [3, 0]


def test_a_large_argument_is_sent_to_a_node_once(pool_of: Callable[..., ClusterPool]) -> None:
    large = [bytearray(bytes([n])) * LARGE_ARGUMENT_BYTES for n in range(3)]
    engine = Engine(greet=lambda: welcome(workers=99), deliver=lambda: None)
    pool = pool_of(engine)

    def sent(*args: Any) -> tuple[list[int], int, int]:
        """First bytes of what is sent, what each call has of it, what the node may forget."""
        before = len(engine.messages)
        pool.submit(len, *(pickle.PickleBuffer(one) for one in args))
        wait_until(lambda: len(engine.messages) > before)
        message: DeliverMessage = engine.messages[-1].value()
        (parcel,) = message.calls
        assert set(message.large) <= {key for _, key in parcel.large}
        first = sorted(packet.segments[0][0] for packet in message.large.values())
        return first, len(parcel.large), len(message.forget)

    assert sent(large[0]) == ([0], 1, 0)
    assert sent(large[0]) == ([], 1, 0)
    assert sent(large[0], large[1]) == ([1], 2, 0)
    large[0][5] = 7
    assert sent(large[0], bytearray(large[1])) == ([0], 2, 0)
    assert sent(large[2][:-1]) == ([], 0, 0)  # it goes with the call


def test_a_node_keeps_what_was_used_last(
    pool_of: Callable[..., ClusterPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "KEPT_BYTES", LARGE_ARGUMENT_BYTES)
    engine = Engine(greet=lambda: welcome(workers=99), deliver=lambda: None)
    pool = pool_of(engine)
    keys: list[str] = []

    def send(number: int) -> tuple[list[str], list[str]]:
        before = len(engine.messages)
        content = bytearray(bytes([number])) * LARGE_ARGUMENT_BYTES
        pool.submit(len, pickle.PickleBuffer(content))
        wait_until(lambda: len(engine.messages) > before)
        message: DeliverMessage = engine.messages[-1].value()
        keys.append(message.calls[0].large[0][1])
        # What it may forget is told with the next message.
        (node,) = kept_by_nodes(pool)
        return node

    assert send(0) == (keys, [])
    assert send(1) == (keys, [])
    assert send(2) == (keys[1:], keys[:1])
    assert send(1) == ([keys[2], keys[1]], [])
    assert send(3) == ([keys[1], keys[4]], [keys[2]])


def test_each_content_is_copied_once_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "KEPT_BYTES", 2 * LARGE_ARGUMENT_BYTES)
    buffers = Buffers()

    def key(content: bytearray) -> str:
        (large,) = pickle_arguments((pickle.PickleBuffer(content),), {}, buffers).large
        assert large[1].content == content
        return large[1].key

    zeros = bytearray(LARGE_ARGUMENT_BYTES)
    # It differs between the bytes that are looked at first.
    nearly = bytearray(zeros)
    nearly[1] = 1
    assert [key(one) for one in (zeros, nearly, bytearray(zeros), nearly)] == ["1", "2", "1", "2"]
    zeros[-1] = 3
    assert [key(zeros), key(nearly), key(bytearray(len(zeros)))] == ["3", "2", "4"]
    zeros[-1] = 0
    assert key(zeros) == "4"


def test_a_copy_that_a_call_has_is_found_however_many_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "KEPT_BYTES", 0)
    buffers = Buffers()
    contents = [bytearray(bytes([n])) * LARGE_ARGUMENT_BYTES for n in range(3)]

    def sent() -> list[str]:
        args = [pickle_arguments((pickle.PickleBuffer(one),), {}, buffers) for one in contents]
        return [large.key for one in args for _, large in one.large]

    waiting = [pickle_arguments((pickle.PickleBuffer(one),), {}, buffers) for one in contents]
    assert sent() == ["1", "2", "3"]
    waiting.clear()
    assert sent() == ["4", "5", "6"]
    del contents[:2]
    # The last one is kept for the next call.
    assert sent() == ["6"]


class Scheduler:
    """A client of Dask whose workers can be reached, or not, or are others of that address."""

    status = "running"

    def __init__(self, kind: str) -> None:
        self.loop = SimpleNamespace(asyncio_loop=asyncio.get_running_loop())
        self.kind = kind
        self.rpc = self
        self.ways: list[str] = []
        self.worker = SimpleNamespace(data={}, handlers={}, id="worker")

    async def scatter(self, values: Any, *, workers: Any, hash: bool, direct: bool) -> Any:  # noqa: A002
        assert (workers, hash, direct) == (["w"], False, False)
        self.worker.data["key"] = values[0]
        return [SimpleNamespace(key="key")]

    async def run(self, function: Callable[..., Any], *args: Any, workers: Any) -> Any:
        found = function(*args, dask_worker=self.worker)
        if asyncio.iscoroutine(found):
            self.ways.append("scheduler")
            found = await found
        return {workers[0]: found}

    # Connections to workers.

    def __call__(self, place: str) -> Scheduler:
        assert place == "w"
        return self

    async def identity(self) -> dict[str, str]:
        if self.kind == "unreachable":
            raise OSError("no route to host")
        return {"id": "other" if self.kind == "another" else "worker"}

    async def connect(self, place: str) -> str:
        if self.kind == "cut" and "direct" in self.ways:
            raise OSError("no route to host")
        return place

    def reuse(self, place: str, connection: str) -> None:
        assert connection == place

    async def safepool_call(self, *, segments: Any) -> Any:
        self.ways.append("direct")
        if self.kind == "new process" and len(self.ways) == 2:
            return None
        return {
            "segments": (await self.worker.handlers["safepool_call"](segments.data))[
                "segments"
            ].data
        }


# Kind of worker: how each of four messages goes.
WAYS = {
    "near": ["scheduler", "direct", "direct", "direct"],
    "unreachable": ["scheduler"] * 4,
    "another": ["scheduler"] * 4,
    "cut": ["scheduler", "direct", "scheduler", "scheduler"],
    "new process": ["scheduler", "direct", "scheduler", "direct"],
}


@pytest.mark.slow  # with Dask, which is there where the slow tests run
@pytest.mark.parametrize("nbytes", [1, 2 << 20])
@pytest.mark.parametrize("kind", WAYS)
def test_messages_go_past_the_scheduler_where_they_can(kind: str, nbytes: int) -> None:
    pytest.importorskip("distributed", reason="pip install 'safepool[dask]'")

    async def send() -> tuple[list[str], list[str]]:
        client = Scheduler(kind)
        carrier = DaskCarrier(client)
        wrong: list[str] = []
        for number in range(4):
            packet = Packet(memoryview(bytes([number]) * nbytes))
            try:
                size = await carrier._run("w", _size, (packet,))
                assert size == (nbytes, number)
            except PlaceLostError as error:
                wrong.append(str(error))
            await asyncio.sleep(0)
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        return client.ways, wrong

    ways, wrong = asyncio.run(send())

    assert ways == WAYS[kind]
    assert len(wrong) == (kind == "new process")
    assert all("another process has its address now" in text for text in wrong)


def _size(packet: Packet) -> tuple[int, int]:
    (segment,) = packet.segments
    return packet.nbytes, segment[0]


def test_a_session_that_an_agent_does_not_know_is_an_error() -> None:
    with pytest.raises(agent.SessionLostError, match="has no session"):
        asyncio.run(agent.agent_deliver("never", Packet.of(None)))


# Each wrong argument, and what its error says.
WRONG: dict[str, tuple[tuple[Any, dict[str, Any]], type[Exception], str]] = {
    "names of an executor's nodes": (
        (ThreadPoolExecutor(1), {"nodes": ["a"]}), ValueError, "does not name its nodes",
    ),
    "an executor of no known size": ((Executor(), {}), ValueError, "Pass that number as nodes="),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_told_by_name(name: str) -> None:
    (engine, words), kind, text = WRONG[name]
    with pytest.raises(kind, match=text):
        ClusterPool(engine, **words)


@pytest.mark.usefixtures("short_lives", "impatient")
def test_arguments_that_no_node_can_use_are_told() -> None:
    with ThreadPoolExecutor(1) as executor, ClusterPool(executor, preload=["nomodule"]) as pool:
        error = pool.submit(abs, 1).exception(30)
    assert isinstance(error, NoNodesError)
    assert str(error) == (
        "no node can be used (call 1: ModuleNotFoundError: preload names "
        "'nomodule': no module named 'nomodule'. Install it, or leave it out)"
    )


def test_a_fork_of_the_program_does_not_wait_for_nodes(
    pool_of: Callable[..., ClusterPool],
) -> None:
    pool = pool_of(Engine())
    future, results = pool.submit(abs, -1), pool.map(abs, [-1])

    for ask in (future.result, lambda: next(results), lambda: pool.submit(abs, -1)):
        assert "is a fork of that process: results arrive only in" in in_a_fork(ask)
    assert in_a_fork(lambda: pool.cancel(future, kill=True)) == "False"
    assert in_a_fork(pool.shutdown) == "None"
    assert not future.done()


def fails() -> None:
    raise LookupError("no such table")


@pytest.mark.usefixtures("short_lives")
def test_an_initializer_that_raises_is_told() -> None:
    with (
        ThreadPoolExecutor(1) as executor,
        ClusterPool(executor, workers_per_node=1, initializer=fails) as pool,
        pytest.raises(safepool.PoolBrokenError, match="no such table"),
    ):
        pool.submit(abs, 1).result(60)


@pytest.fixture
def short_lives(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let an agent in this process end as soon as nobody uses it."""
    monkeypatch.setattr(agent, "_IDLE_S", 0.0)
    monkeypatch.setattr(agent, "_LOOK_S", 0.02)
    yield
    deadline = time.monotonic() + 30
    # The agent's, and those of its pool.
    while any(thread.name.startswith("safepool-") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def later(x: int) -> int:
    await asyncio.sleep(0)
    return x


async def awaited(pool: ClusterPool) -> list[Any]:
    first: int = await pool.run(later, 3)
    return [
        first,
        [one async for one in pool.amap(abs, [-4, -5])],
        [one async for one in pool.amap(abs, coming())],
    ]


async def coming() -> AsyncIterator[int]:
    for number in (-6, -7):
        yield number


@pytest.mark.usefixtures("short_lives")
def test_an_executor_of_one_long_call_per_node_carries_calls() -> None:
    import os

    def fragile(x: int) -> int:
        if x == 5:
            os._exit(3)
        return x * x

    table = safepool.share(list(range(10)))
    with ThreadPoolExecutor(1) as executor, ClusterPool(executor, workers_per_node=1) as pool:
        found = list(pool.map(fragile, range(8), return_exceptions=True))
        assert [type(one).__name__ for one in found] == [
            *["int"] * 5, "WorkerDiedError", "int", "int",
        ]  # fmt: skip
        assert pool.submit(lambda: table[7]).result() == 7
        assert sorted(pool.map(abs, range(-300, 0), ordered=False)) == [*range(1, 301)]
        with pytest.raises(TypeError):
            pool.submit(threading.Lock).result()
        with pytest.raises(safepool.TaskTimeoutError):
            pool.submit(safepool.worker(time.sleep, timeout=0.1), 60).result()
        assert asyncio.run(awaited(pool)) == [3, [4, 5], [6, 7]]
        assert pool.size == 1
        assert [node.place for node in pool.nodes()] == ["call 1"]
        with pytest.raises(NotImplementedError, match="cannot ask the nodes of an executor"):
            pool.workers()


@pytest.mark.usefixtures("short_lives")
def test_calls_are_given_up_and_refused() -> None:
    go_on = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(go_on.wait, 60)  # no node can be opened yet
        pool = ClusterPool(executor, workers_per_node=1)
        first, second, third = (pool.submit(abs, -n) for n in range(3))
        with pytest.raises(ValueError, match="does not belong to this pool"):
            pool.cancel(Future(), kill=True)
        assert pool.cancel(first, kill=True)
        results = pool.map(abs, range(100), buffersize=3)
        go_on.set()
        assert next(results) == 0
        results.end()
        assert third.result(60) == 2
        assert not pool.cancel(third, kill=True)
        with pytest.raises(CancelledError):
            first.result(60)
        pool.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(abs, 1)
        pool.shutdown()
    assert second.result() == 1


@pytest.mark.usefixtures("short_lives")
def test_progress_counts_calls_of_all_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="pip install 'safepool[progress]'")
    with ThreadPoolExecutor(2) as executor, ClusterPool(executor, workers_per_node=1) as pool:
        assert list(pool.map(abs, range(-3, 0), progress="three")) == [3, 2, 1]
        items: list[Any] = [-1, "x"]
        found = pool.map(abs, items, progress=True, ordered=False, return_exceptions=True)
        assert {type(one) for one in found} == {int, TypeError}
    bars = capsys.readouterr().err
    assert "three: 100%" in bars
    assert "3/3" in bars
    assert "2/2" in bars


@pytest.mark.usefixtures("short_lives")
def test_items_that_are_not_taken_yet_are_taken_when_the_block_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by the standard pool, which takes all of them at first."""
    monkeypatch.setattr(map_results, "_AT_ONCE", 20)
    items = (n for n in range(2000))
    with ThreadPoolExecutor(1) as executor:
        with ClusterPool(executor, workers_per_node=1) as pool:
            results = pool.map(abs, items)
        assert list(results) == [*range(2000)]


def test_only_a_carrier_knows_an_engine() -> None:
    package = Path(safepool.__file__).parent
    knows = re.compile(
        r"""^\s*(?:from|import) (?:dask|distributed|mpi4py|executorlib)\b"""
        r"""|import_module\("distributed|\.scatter\(|\bdask_worker\b""",
        re.MULTILINE,
    )
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for text in [path.read_text(encoding="utf-8")]
        if knows.search(text.partition("\nfrom __future__ import annotations\n")[2])
    }
    assert found == {"cluster/carriers/dask.py"}


def test_an_executor_that_was_shut_down_is_an_error() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with ClusterPool(executor) as pool:
        with pytest.raises(safepool.PoolBrokenError, match="executor takes no more calls"):
            pool.submit(abs, 1).result()
        assert pool.nodes() == ()
