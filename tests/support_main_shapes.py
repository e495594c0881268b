"""A program whose own functions are decorated in every way: run as ``__main__`` or imported.

python support_main_shapes.py POOL     prints what each shape gave, as JSON
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import safepool


def look(value: object) -> list[object]:
    """Return the value, whether it is another process, and whether it is capped."""
    return [
        value,
        str(os.getpid()) != os.environ.get("THE_PROGRAM"),
        os.environ["BLIS_NUM_THREADS"],
    ]


def undecorated(value: int) -> list[object]:
    return look(value)


inline = safepool.worker(undecorated, timeout=60)


@safepool.worker
def decorated(value: int) -> list[object]:
    return look(value)


@safepool.worker(retries=1)
def policy(value: int) -> list[object]:
    return look(value)


def rebound(value: int) -> list[object]:
    return look(value)


rebound = safepool.worker(rebound, timeout=60)

twice = safepool.worker(decorated, timeout=60)


@safepool.worker
async def coroutine(value: int) -> list[object]:
    return look(value)


def run_coroutine(value: int) -> list[object]:
    import asyncio

    return asyncio.run(coroutine(value))  # type: ignore[arg-type]


@safepool.worker
def generator(value: int) -> Any:
    yield look(value)


def run_generator(value: int) -> Any:
    return next(generator(value))


class Model:
    def __init__(self, own: int) -> None:
        self.own = own

    @safepool.worker
    def method(self, value: int) -> list[object]:
        return look(value + self.own)

    def bare(self, value: int) -> list[object]:
        return look(value + self.own)

    @safepool.worker
    @classmethod
    def outer(cls, value: int) -> list[object]:
        return look(value)

    @classmethod
    @safepool.worker
    def inner(cls, value: int) -> list[object]:
        return look(value)

    @staticmethod
    @safepool.worker
    def static(value: int) -> list[object]:
        return look(value)

    def __call__(self, value: int) -> list[object]:
        return look(value + self.own)


tool = safepool.worker(Model(1), timeout=60)

# One row per shape: what a pool is given to call with 1.
SHAPES: dict[str, Any] = {
    "decorated": decorated,
    "decorated with a policy": policy,
    "inline": inline,
    "inline, of a name that is its own": rebound,
    "inline, of a decorated one": twice,
    "inline builtin": safepool.worker(abs, timeout=60),
    "calls a coroutine": run_coroutine,
    "calls a generator": run_generator,
    "method": Model(0).method,
    "inline method": safepool.worker(Model(0).bare),
    "class method, above": Model.outer,
    "class method, below": Model.inner,
    "static method": Model.static,
    "partial of it": functools.partial(decorated, value=1),
    "it of a partial": safepool.worker(functools.partial(undecorated, value=1)),
    "callable": tool,
}


def call(shape: Any) -> Any:
    return shape() if "value" in getattr(shape, "keywords", ()) else shape(1)


def call_partial(pool_call: Any, shape: Any) -> Any:
    arguments = () if "value" in getattr(shape, "keywords", ()) else (1,)
    return pool_call(shape, *arguments)


def results(pool: str) -> dict[str, Any]:
    """Return what each shape gave in a pool."""
    if pool == "safepool":
        with safepool.ProcessPool(1) as ours:
            return _all(lambda f, *a: ours.submit(f, *a).result(60))
    if pool == "joblib":
        from joblib import Parallel, delayed

        # Two jobs: joblib runs a single one in the program itself.
        return _all(lambda f, *a: Parallel(2, backend="loky")(delayed(f)(*a) for _ in (1, 2))[0])
    if pool == "pickle":
        return _all(lambda f, *a: pickle.loads(pickle.dumps(f))(*a))
    kind, _, method = pool.partition("-")
    context = multiprocessing.get_context(method)
    if kind == "multiprocessing":
        with context.Pool(1) as theirs:
            found = _all(lambda f, *a: theirs.apply_async(f, a).get(60))
            theirs.close()
            theirs.join()
            return found
    with ProcessPoolExecutor(1, mp_context=context) as standard:
        return _all(lambda f, *a: standard.submit(f, *a).result(60))


def _all(pool_call: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        try:
            found[name] = call_partial(pool_call, shape)
        except Exception as error:
            found[name] = repr(error)
    return found


if __name__ == "__main__":
    os.environ["THE_PROGRAM"] = str(os.getpid())
    # What is there without a block, but in a worker of ours.
    os.environ["BLIS_NUM_THREADS"] = "uncapped"
    print(json.dumps(results(sys.argv[1])))
