"""Decisions of the pool, without process, clock, lock, future and file.

events     events of a pool, and actions: a table of each
machine    the state machine: an event in, actions out
reclaim    the choice of workers that give calls back, and the time of the next check
worker     state of one worker, with its phase
work       units of work: a call, or a span of calls of a map
policy     timeout and retries of a call
backlog    waiting work, in order
pace       duration of calls, and so the number that is sent ahead
ledger     unanswered calls of one worker
ending     how a worker ended, and the consequence for its calls and the pool
starts     the start of workers: how many, when, in which place, and when the pool gives up
gauge      time of a worker's next memory check, and its result

Facts that the shell finds out, and that are no decisions about calls and workers:

    the pool's size (``size``)                       the user's, or that of the budget
    memory above a limit (``memory``)                measured against the user's limit, then told
    settings that workers must get first             `HandOut`
    standstill of pickling (``hands``)               told as work that may be passed
    the worker of a caller (``turns``)               one of those that the core lends
"""
