"""A call of a cluster pool, in a worker of a node's pool."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import CoroutineType
from typing import Any

from safepool.cluster.messages import Packet, unpickle
from safepool.transport import payloads
from safepool.transport.reductions import Reductions
from safepool.workers.coroutines import run_to_its_end
from safepool.workers.describe import describe, get_ready, say_what
from safepool.workers.index import worker_index

RETURNED, RAISED = b"=", b"!"
"""First segment of an answer: a result follows, or a description of what was raised."""

# The most unpickled functions that this worker keeps: a program may submit many lambdas.
_MOST_FUNCTIONS = 256
_functions: OrderedDict[str, Callable[..., Any]] = OrderedDict()


def run(
    key: str,
    function: Packet,
    needs: Mapping[int, Any],
    arguments: Packet,
    large: Sequence[tuple[int, Packet]],
    shared: Mapping[int, Any],
) -> tuple[tuple[Any, ...], Packet]:
    """Run one call."""
    begin_ns = loaded_ns = packed_ns = time.monotonic_ns()
    result: object = None
    try:
        called = _functions.get(key)
        if called is None:
            called = unpickle(function, needs)
            _functions[key] = called
            if len(_functions) > _MOST_FUNCTIONS:
                _functions.popitem(last=False)
        segments = [*arguments.segments]
        for place, buffer in large:
            segments.insert(place, *buffer.segments)
        args, kwargs = unpickle(Packet(*segments), shared)
        del segments
        loaded_ns = time.monotonic_ns()
        result = called(*args, **kwargs)
        del args, kwargs
        if type(result) is CoroutineType:
            result = run_to_its_end(result)
        packed_ns = time.monotonic_ns()
        done = Reductions()
        try:
            answered = payloads.dumps(result, into_main=True, reductions=done)
        except Exception as error:
            say_what(error, result, done, look=True)
            raise
        answer = Packet(RETURNED, *answered)
    except BaseException as error:  # noqa: BLE001 -- SystemExit too is the call's, as in any pool
        get_ready()
        answer = Packet(RAISED, *describe(error))
    end_ns = time.monotonic_ns()
    packed_ns = end_ns - packed_ns if packed_ns > begin_ns else 0
    ran = os.getpid(), worker_index(), begin_ns, end_ns, loaded_ns - begin_ns, packed_ns
    return ran, answer


def initialize(initializer: Packet | None) -> None:
    """Run the initializer that the program gave to its cluster pool."""
    if initializer is not None:
        function, initargs = unpickle(initializer, {})
        function(*initargs)
