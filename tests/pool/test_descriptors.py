"""Sockets and connections are handed over, in both directions, as by the standard pool."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import resource
import socket
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import pytest
import support_descriptors as there

import safepool
from safepool import ProcessPool
from safepool.transport.payloads import dumps_to_send, loads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the standard library hands descriptors over"
)


@pytest.fixture(params=["safepool", "loky", "fork"])
def pool(request: pytest.FixtureRequest) -> Iterator[ProcessPool]:
    with ProcessPool(1, mp_context=request.param) as made:
        yield made


@pytest.fixture
def registered() -> Iterator[None]:
    """A program that has taught multiprocessing its own classes."""
    before = ForkingPickler._extra_reducers.copy()  # type: ignore[attr-defined]
    there.register()
    yield
    ForkingPickler._extra_reducers = before  # type: ignore[attr-defined]


def test_a_connection_is_an_argument(pool: ProcessPool) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        ours.send(21)
        assert pool.submit(there.answer, theirs).result(timeout=60) == "answered"
        assert ours.recv() == 42


def test_a_socket_is_an_argument_whatever_the_call(pool: ProcessPool) -> None:
    """Closed on exec in the worker, as everything that Python opens."""
    here, other = socket.socketpair()
    with here, other:
        kept = functools.partial(there.say, other)
        futures = [
            pool.submit(there.say, other),
            pool.submit(there.say, sock=other),
            pool.submit(kept),
            pool.submit(lambda: there.say(other)),
        ]
        told = [future.result(timeout=60) for future in futures]
        told += pool.map(there.say, [other] * 3)
        told += pool.map(there.say, [other] * 4, chunksize=2)
        told += pool.map(lambda text: there.say(other, text), [b"hello"] * 2)

        assert told == [(socket.SOCK_STREAM, False)] * 13
        assert here.recv(1000) == b"hello" * 13


def test_results_bring_descriptors_of_the_workers(pool: ProcessPool) -> None:
    """And nothing of the program is closed with them."""
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(40)]
    one, other = pool.submit(there.two_ends).result(timeout=60)
    with one, other:
        one.send("through")
        assert other.recv() == "through"
    del one, other
    made = [pool.submit(there.pair).result(timeout=60), *pool.map(there.pairs, [1, 2])]
    for first, second in made:
        with first, second:
            first.sendall(b"through")
            assert second.recv(100) == b"through"
    for number in held:
        os.fstat(number)  # it is open
        os.close(number)
    gc.collect()


def test_beside_an_array(pool: ProcessPool) -> None:
    """The array is in a file, whose descriptor travels the same way."""
    first, second, array = pool.submit(there.pair_and_array).result(timeout=60)
    with first, second:
        first.sendall(b"through")
        assert second.recv(100) == b"through"
    here, other = socket.socketpair()
    with here, other:
        back = pool.submit(there.back, (array, other, array)).result(timeout=60)
    assert (back[0].sum(), back[2].sum()) == (array.sum(), array.sum())
    back[1].close()


def test_more_than_one_message_takes(pool: ProcessPool) -> None:
    """300 of them; the kernel takes 253 at once."""
    pairs = [socket.socketpair() for _ in range(300)]
    assert pool.submit(there.say_all, [one for one, _ in pairs]).result(timeout=60) == 300
    assert [other.recv(10) for _, other in pairs] == [b"%d" % place for place in range(300)]
    for one, other in pairs:
        one.close()
        other.close()


def test_nothing_is_left_open_in_program_or_worker(pool: ProcessPool) -> None:
    """After calls that return, raise, cannot be sent, or are cancelled before they begin."""
    here, other = socket.socketpair()
    with here, other:
        pool.submit(there.say, other).result(timeout=60)
        before = there.open_descriptors(), pool.submit(there.open_descriptors).result(timeout=60)
        pool.submit(there.say, other).result(timeout=60)
        assert isinstance(
            pool.submit(there.raise_with, other).exception(timeout=60), ConnectionError
        )
        assert pool.submit(there.back, (other, (n for n in ()))).exception(timeout=60) is not None
        late = [pool.submit(there.say, other) for _ in range(20)]
        for future in late:
            future.cancel()
        for future in late:
            future.cancelled() or future.result(timeout=60)
        gc.collect()
        after = there.open_descriptors(), pool.submit(there.open_descriptors).result(timeout=60)
        assert after == before


def test_a_call_that_is_run_again_has_a_duplicate_of_its_own(tmp_path: Path) -> None:
    """Also when the program has closed the socket meanwhile."""
    here, other = socket.socketpair()
    with here, ProcessPool(1, retries=1) as pool:
        future = pool.submit(there.die_at_first, str(tmp_path / "begun"), other)
        future.result(timeout=60)
        other.close()
        assert here.recv(100) == b"again"
        gc.collect()
        here.settimeout(60)
        assert here.recv(100) == b""  # nobody has the other end any more


def test_a_forked_worker_keeps_none_that_goes_to_another(tmp_path: Path) -> None:
    """Forked while a call is kept to be run again; the socket is closed with its own worker."""
    with ProcessPool(1, mp_context="fork", retries=1) as pool:
        pool.submit(there.back, 1).result(timeout=60)  # forked before there is a socket
        here, other = socket.socketpair()
        first = pool.submit(there.wait_and_say, str(tmp_path / "go"), other)
        wait_until((tmp_path / "go.begun").exists)
        other.close()
        with ProcessPool(1, mp_context="fork") as second:
            second.submit(there.back, 1).result(timeout=60)
            (tmp_path / "go").touch()
            first.result(timeout=60)
            with here:
                here.settimeout(20)
                assert [here.recv(100), here.recv(100)] == [b"said", b""]


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_no_thread_is_started_and_nothing_listens(pool: ProcessPool) -> None:
    """As the standard library's resource sharer does."""
    pool.submit(there.back, 1).result(timeout=60)
    here, other = socket.socketpair()
    with here, other:
        pool.submit(there.say, other).result(timeout=60)
        ends = pool.submit(there.back, other).result(timeout=60)
        ends.close()
        assert there.sharers_and_listeners() == (0, 0)
        assert pool.submit(there.sharers_and_listeners).result(timeout=60) == (0, 0)


# One row per kind of pool: the reducers that a program registers hold in all of them.
POOLS: dict[str, Callable[[], Executor]] = {
    "safepool": lambda: ProcessPool(1),
    "fork": lambda: ProcessPool(1, mp_context="fork"),
    "standard": lambda: ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["safepool", "fork"])
def test_reducers_that_a_program_registers_hold(kind: str) -> None:
    with POOLS[kind]() as pool:
        reading, writing = os.pipe()
        os.write(writing, b"from the program")
        os.close(writing)
        assert pool.submit(there.read_own, there.Own(reading)).result(timeout=60) == (
            b"from the program"
        )
        os.close(reading)
        assert pool.submit(there.way_of, there.Plain("pickle")).result(timeout=60) == "registered"
        own: Any = pool.submit(there.make_own).result(timeout=60)
        assert there.read_own(own) == b"from the worker"


def test_where_none_can_go_an_error_says_so() -> None:
    """In an object that is shared, and in a pickle that nobody sends."""
    here, other = socket.socketpair()
    with here, other:
        with pytest.raises(pickle.PicklingError, match="can be handed over as an argument"):
            safepool.share([other])
        segments = dumps_to_send([other])
        with pytest.raises(LookupError, match="only a pool and its workers"):
            loads(segments[:1])  # type: ignore[arg-type]


def test_a_program_that_has_no_descriptors_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task fails with the system's own error; the pool goes on."""
    with ProcessPool(1) as pool:
        here, other = socket.socketpair()
        with here, other:
            pool.submit(there.say, other).result(timeout=60)
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            monkeypatch.setattr(os, "dup", refuse)
            assert isinstance(pool.submit(there.say, other).exception(timeout=60), OSError)
            monkeypatch.undo()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert pool.submit(there.say, other).result(timeout=60)


def refuse(_descriptor: int) -> int:
    raise OSError(24, "Too many open files")


def test_what_a_channel_cannot_take_is_an_error_in_its_place() -> None:
    """And what came with it is closed."""
    from safepool.transport.channel import Channel

    ours, theirs = socket.socketpair()
    here, other = socket.socketpair()
    with theirs, here, other:
        channel = Channel(ours)
        gone = channel.hand_over(dumps_to_send([other, here]))
        assert gone[1:] == [b"", b""]
        with pytest.raises(OSError, match="Hand over fewer at a time"):
            loads(gone)  # type: ignore[arg-type]
        channel.close()


@pytest.mark.parametrize("made", ["Lock", "Queue", "SimpleQueue", "Event"])
def test_locks_and_queues_are_refused_as_by_the_standard_pool(made: str) -> None:
    """They are inherited, by ``initargs=``."""
    thing = getattr(multiprocessing.get_context("spawn"), made)()
    with ProcessPool(1) as pool:
        error = pool.submit(there.back, thing).exception(timeout=60)
    assert "should only be shared between processes through inheritance" in str(error)
