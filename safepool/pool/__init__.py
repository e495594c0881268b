"""Floor 6: the pool. It owns workers and futures; what happens to a call is decided in ``core``.

    executor    `ProcessPool`, what people hold; `inherited`: in the place of a forked pool
    calls       what people hand over: calls, maps, functions, names of the script
    core        what waits, who gets it, what is owed, lost, run again: pure
    shell       brings events to the core and does its actions: threads, workers, messages
    tracing     a picture of a run, by listening
    watch       the pool seen from outside
    hands       threads that run the program's code beside the scheduler's
    latch       waiting that a signal's handler cannot spoil

One word for one thing:

    call       what a worker is to run once: a `Task` has a future, a `MapRun` makes many
    span       calls of one run that travel together
    work       a call or a span, from the backlog until it is settled
    position   the number of a call among all that one worker was sent, from 1
    ledger     what one worker owes, by position
    board      memory that a worker shares with the pool: it says how far the worker came
    claimed    begun, or found to be taken back; `began`: begun
    take back  strike what a worker has not claimed, and let it wait again
    settle     cross out a call that was answered, and end it
    lost       begun by a worker that ended before it answered
"""
