"""Pickles of calls: of a task, or of calls of a map that travel together.

The methods with ``here`` in their name run no code of the program (``trusted``), and return
``None`` if that is impossible. The others may run any, and so may wait.
"""

from __future__ import annotations

import functools
import gc
import itertools
import pickle
import sys
import types
from collections import Counter
from typing import TYPE_CHECKING, Any

from safepool.errors import text_of, without_our_frames
from safepool.pool.calls.functions import Functions
from safepool.pool.calls.mains import is_data, runs_no_code
from safepool.pool.calls.names import Names
from safepool.pool.calls.tasks import Pickled
from safepool.transport import payloads, references, trusted
from safepool.transport.blame import find_unpicklable
from safepool.transport.descriptors import are_beyond
from safepool.transport.marks import MAIN_NAMES, PLAIN
from safepool.transport.names import Met, names_of
from safepool.transport.reductions import Reductions
from safepool.transport.room import require_to_pickle
from safepool.transport.trusted import UntrustedError, imports_here

if TYPE_CHECKING:
    from collections.abc import Callable

    from safepool.pool.calls.deliveries import Delivery
    from safepool.pool.calls.mapping import MapRun
    from safepool.pool.calls.tasks import Parts, Task
    from safepool.pool.core.work import Span
    from safepool.transport.main_names import MainNames
    from safepool.transport.sharing import Shared

# The most items of a batch that may be large.
_FEW = 16

# They hold nothing that a call could change.
_CODE = type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType
_UNCHANGED: tuple[type, ...] = (*PLAIN, *_CODE)

# For the pickle of these no room is asked for.
_NUMBERS = PLAIN - {str, bytes}

# Parts of one item that are looked at.
_MOST_PARTS = 1000
# Calls of one function of which it is searched what could not be pickled.
_MOST_BLAMED = 3
# First words of the note on a pickling error.
_NOT_SENT = "while the call of "
# In the pickler's words: of a coroutine that was called too early.
_COROUTINE = "'coroutine' object"
# Text of multiprocessing's locks, values and queues about a pickler that starts no process.
_INHERITED = "shared between processes through inheritance"


class Pickling:
    """Pickles the calls of one pool, whose workers may have names of the script."""

    def __init__(self, main: MainNames | None) -> None:
        self.functions: Functions = Functions()
        self.names: Names = Names(main)
        self._blamed: Counter[str] = Counter()

    def task_now(self, task: Task) -> None:
        """Pickle a task in the thread that submits it, if this thread imports a module.

        Objects of that module would make another thread wait for the import's end, and the program
        may wait for the call before the import ends.
        """
        if imports_here() and not _is_name_in_main(task.name):
            try:
                with Met() as met:
                    pickled = payloads.dumps_to_send(task.call, into_main=True)
                if not (met.names or references.known()):
                    task.pickled = Pickled(None, pickled, (), ())
            except Exception:  # noqa: BLE001 -- user code; tried again, and told, in its turn
                pass

    def function_now(self, run: MapRun) -> None:
        """Pickle the function of a run, as :meth:`task_now`."""
        if imports_here() and not _is_name_in_main(run.name):
            try:
                self._send_once(run)
            except Exception:  # noqa: BLE001 -- as above
                pass

    def task_here(self, task: Task) -> Pickled | None:
        """Return a task's pickle, if to make it runs no code of the program."""
        assert task.call is not None
        function, args, kwargs = task.call
        sent = self.functions.known(function)
        if sent is None:
            bare = not kwargs and runs_no_code(function) and is_data(args)
            return self._pickle_bare(task) if bare else None
        needs = self.names.needed_here(sent.names)
        if needs is None:
            return None
        try:
            if not kwargs and _NUMBERS.issuperset(map(type, args)):
                # In C code; the class's own __new__ is not.
                parts = sent, [pickle.dumps((args, kwargs), 5)], (), needs
                return tuple.__new__(Pickled, parts)
            require_to_pickle(args)
            if kwargs:
                require_to_pickle(kwargs.values())
            elif PLAIN.issuperset(map(type, args)):
                return Pickled(sent, [pickle.dumps((args, kwargs), 5)], (), needs)
            return _dumps_here((args, kwargs))._replace(function=sent, needs=needs)
        except (UntrustedError, MemoryError):  # the hands say why
            return None

    def _pickle_bare(self, task: Task) -> Pickled | None:
        """Return the pickle of a function by value that holds only data, as most lambdas do."""
        assert task.call is not None
        function, args, kwargs = task.call
        names = names_of(function.__code__)
        needs = self.names.needed_here(names)
        by_value = sys.modules.get("safepool.transport.by_value")
        if needs is None or by_value is None or not trusted.is_settled(by_value):
            return None
        sent = self.functions.lasting(function)
        if sent is not None:
            same = sent.names == names
            return Pickled(sent, [pickle.dumps((args, kwargs), 5)], (), needs) if same else None
        with Met() as met:
            segments = payloads.dumps(task.call, into_main=True, by_value=True)
        return Pickled(None, segments, (), needs) if met.names == names else None

    def task(self, task: Task) -> Pickled:
        """Return a task's pickle. In any thread."""
        call, task.call = task.call, None  # dropped here: a finalizer may wait as well
        assert call is not None
        function, args, kwargs = call
        done = Reductions()
        try:
            require_to_pickle(args)
            require_to_pickle(kwargs.values())
            sent = self.functions.lasting(function)
            if sent is None:
                return self._dumps(call, done, by_value=_is_name_in_main(task.name))
            return self._dumps((args, kwargs), done, names=sent.names)._replace(function=sent)
        except BaseException as error:
            self._say_what(error, task.name, _whole(call), done)
            raise

    def _dumps(
        self,
        value: object,
        done: Reductions,
        *,
        by_value: bool = False,
        names: frozenset[str] = frozenset(),
    ) -> Pickled:
        """Pickle a call, or a part of it."""
        with Met() as met, references.Collected() as shared:
            segments = payloads.dumps_to_send(
                value, into_main=True, by_value=by_value, reductions=done
            )
        needed = self.names.needed(names | met.names if met.refs or met.uses else names)
        return Pickled(None, segments, shared.found, needed)

    def span_here(self, span: Span) -> Pickled | None:
        """Return the pickle of a run's calls, if to make it runs no code of the program."""
        run: MapRun = span.run
        if run.sent is None:
            sent = self.functions.known(run.function)
            needs = None if sent is None else self.names.needed_here(sent.names)
            if needs is not None:
                run.sent, run.needs = sent, needs
        if run.sent is None:
            return None
        items = span.items
        if not span.alone and _are_plain(items, run.starred, _NUMBERS):
            span.apart = False
            return Pickled(None, [pickle.dumps(items, 5)], (), ())
        try:
            return _pickle_items(span, _dumps_here)
        except (UntrustedError, MemoryError):  # the hands say why
            return None

    def span(self, span: Span) -> Pickled:
        """Return the pickle of a run's calls, and make that of its function. In any thread."""
        run: MapRun = span.run
        if run.sent is None:
            done = Reductions()
            try:
                self._send_once(run, done)
            except BaseException as error:
                self._say_what(error, run.name, run.function, done)
                raise
        try:
            return _pickle_items(span, self._dumps)
        except BaseException as error:
            if span.count > 1:
                without_our_frames(error)  # it may be kept until its call has been sent alone
                return _EACH_ALONE
            items = run.arguments_of(span.items[0])
            done = run.reductions.pop(span.start, Reductions())
            self._say_what(error, run.name, _whole((_sent_before, items, {})), done)
            done.forget_errors()  # these may be other calls' results, too
            raise

    def _send_once(self, run: MapRun, done: Reductions | None = None) -> None:
        sent = self.functions.once(run.function, done, of_main=_is_name_in_main(run.name))
        run.needs = self.names.needed(sent.names)
        run.sent = sent

    def _say_what(self, error: BaseException, name: str, value: object, done: Reductions) -> None:
        """Add the call, and the part of the call, to a pickling error."""
        note = f"{_NOT_SENT}{name} was pickled, with its arguments"
        if _is_name_in_main(name):
            note += (
                " and the globals of __main__ that it uses, which travel to the worker by value"
            )
        inherited = isinstance(error, RuntimeError) and _INHERITED in text_of(error)
        # Not for each of many calls of a function: the workers wait meanwhile.
        if self._blamed[name] < _MOST_BLAMED and (
            inherited or isinstance(error, (TypeError, AttributeError, pickle.PicklingError))
        ):
            self._blamed[name] += 1
            dumps = functools.partial(payloads.dumps_to_send, reductions=done)
            done.is_search = True
            culprit = find_unpicklable(value, dumps)
            note += f". It is {culprit}" if culprit else ""
            if _COROUTINE in text_of(error):
                note += ". A coroutine cannot be sent: pass its function and its arguments"
        if inherited:
            note += (
                '. Make it by multiprocessing.get_context("spawn"), and give it to the workers '
                "by ProcessPool(initializer=, initargs=)"
            )
        try:
            error.add_note(note)
        except BaseException:  # noqa: BLE001 -- an exception whose class allows no attributes
            pass


def _is_name_in_main(name: str) -> bool:
    return name.partition(".")[0] in MAIN_NAMES


def _dumps_here(value: object, _done: Reductions | None = None) -> Pickled:
    """Pickle what runs no code of the program."""
    if payloads.by_value_modules() or are_beyond():
        raise UntrustedError
    if not references.known():
        return Pickled(None, trusted.dumps(value), (), ())
    with references.Collected() as met:
        segments = trusted.dumps(value)
    return Pickled(None, segments, met.found, ())


# Stands for the pickle of calls that must travel one by one.
_EACH_ALONE = Pickled(None, (), (), ())


def _pickle_items(span: Span, dumps: Callable[[object, Reductions], Pickled]) -> Pickled:
    run: MapRun = span.run
    if span.count <= _FEW:
        for item in span.items:
            require_to_pickle(run.arguments_of(item))
    if span.alone:
        return _dumps_at(span, span.start, (run.arguments_of(span.items[0]), {}), dumps)
    return _dumps_items(span, dumps) or _EACH_ALONE


def _dumps_items(span: Span, dumps: Callable[[object, Reductions], Pickled]) -> Pickled | None:
    """Pickle the items of several calls; ``None`` if each must be sent separately.

    In a common pickle, an object that two calls refer to would be one object in the worker, and
    one call would see the changes of another. Hence each call gets a separate pickle, unless the
    caller has said which calls belong together, or nothing can be changed. cloudpickle costs more
    for each pickle: calls that need it share one if they have no object in common.
    """
    items = span.items
    span.apart = False
    if span.run.at_once is not None and span.count > 1:
        span.bound = not _are_plain(items, span.run.starred) and _have_parts_in_common(items)
    if span.run.at_once is not None or span.count == 1 or _are_plain(items, span.run.starred):
        return _dumps_all(span, dumps)
    pickles: list[bytes | memoryview] = []
    shared: list[Shared[Any]] = []
    needs: list[Delivery] = []
    for index, item in enumerate(items, span.start):
        _, segments, more, needed = _dumps_at(span, index, item, dumps)
        if len(segments) > 1:
            return None
        if needed and not pickles and not _have_parts_in_common(items):
            return _dumps_all(span, dumps)
        pickles.append(segments[0])  # type: ignore[arg-type]  # no file yet
        shared += more
        needs += needed
    span.apart = True
    return Pickled(None, payloads.dumps([bytes(one) for one in pickles]), shared, needs)


def _dumps_at(
    span: Span, index: int, value: object, dumps: Callable[[object, Reductions], Pickled]
) -> Pickled:
    """Pickle the value of one call, which may be sent again: otherwise, or to another worker."""
    before: dict[int, Reductions] = span.run.reductions
    done = before.pop(index, None) or Reductions()
    try:
        return dumps(value, done)
    finally:
        if done and not (done.of_one_pickle or span.run.dropped):
            before[index] = done


def _dumps_all(span: Span, dumps: Callable[[object, Reductions], Pickled]) -> Pickled:
    """Pickle the values of all calls in common."""
    before: dict[int, Reductions] = span.run.reductions
    indexes = range(span.start, span.start + span.count)
    done = Reductions()
    if before:
        for index in indexes:
            done.update(before.get(index, ()))
    try:
        return dumps(span.items, done)
    finally:
        if done and not (done.of_one_pickle or span.run.dropped):
            before.update(dict.fromkeys(indexes, done))


def _are_plain(items: list[Any], starred: bool, kinds: frozenset[type] = PLAIN) -> bool:
    parts = itertools.chain.from_iterable(items) if starred else items
    return kinds.issuperset(map(type, parts))


def _have_parts_in_common(items: list[Any]) -> bool:
    """Tell whether two items refer, however deep, to one object that a call could change."""
    seen: set[int] = set()
    for item in items:
        mine: set[int] = set()
        parts = [item]
        while parts:
            part = parts.pop()
            # isinstance() is not used: it reads __class__ of an object of the program.
            if issubclass(type(part), _UNCHANGED) or id(part) in mine:
                continue
            if id(part) in seen:
                return True
            # Only the content of these can be changed.
            if type(part) not in (tuple, frozenset):
                mine.add(id(part))
            parts += gc.get_referents(part)
            if len(mine) + len(parts) > _MOST_PARTS:
                return True  # perhaps: to find out would take longer than to send them apart
        seen |= mine
    return False


def was_not_sent(error: BaseException) -> bool:
    """Return whether this is an exception of the pickler, and no worker has begun the call."""
    return any(note.startswith(_NOT_SENT) for note in getattr(error, "__notes__", ()))


def _sent_before() -> None:
    """Stand for the function of a map, which could be pickled: its methods are not run again."""


def _whole(call: Parts) -> object:
    """Return a call in one piece, for words about its parts."""
    function, args, kwargs = call
    return functools.partial(function, *args, **kwargs) if callable(function) else call
