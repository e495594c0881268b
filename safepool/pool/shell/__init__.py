"""Brings events to the core and does its actions: here are the threads, processes and files.

scheduler    the thread that owns every worker; `turns`: the way beside it for a lone call
dispatch     work -> messages; `packing`: large payloads; `settings`: what the program has set
settling     answers -> results
staff        workers: listened to, seen to their end; `worker` is one of them
hiring       starts them, with `variables`; `refusals`, `refused_calls`: why the system gives none
size         how many there may be
memory, oom  what they hold; which of them the kernel took
records      their log records, and the pool's own
listener     how somebody listens to all this
exits        the pools that work, for the interpreter's end and for forks
"""
