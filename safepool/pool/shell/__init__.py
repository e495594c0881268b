"""Delivers events to the core and executes its actions, with threads, processes and files.

scheduler    methods for callers; `turns`: direct calls by the caller's thread
loop         the thread that owns every worker
dispatch     work -> messages; `settings`: settings of the program
settling     answers -> results
staff        all workers, from start to end; `worker` is one of them
hiring       starts workers, with `variables`; `refusals`, `refused_calls`: reasons of the system
             for refusing one
size         the number of workers
memory, oom  memory of workers; kills by the kernel's out-of-memory killer
records      log records of workers, and the pool's own
listener     the interface for a listener to all this
exits        the running pools, for the interpreter's end and for forks
"""
