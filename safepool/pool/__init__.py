"""Floor 6: the pool. It owns workers and futures; what happens to a call is decided in ``core``.

What people hand over, in the order in which it goes through the modules:

    executor            `ProcessPool`, what people hold
    tasks, mapping      a call with a future; the calls of a `map`, and who takes their results
    turns               the shortest way of a lone call, while the scheduler's thread sleeps
    scheduler           the thread that brings news to the core, and does what that decides
    core                what waits, who gets it, what is owed, lost, run again: pure
    dispatch            work -> messages; `functions`, `names`, `settings`, `packing` bring what
                        a worker lacks; `hands` run the program's code beside the scheduler
    size                how many workers there may be
    hiring, staff       workers: started, listened to, seen to their end; `worker` is one of them
    settling            answers -> results
    records, watch      log records of workers; who wants to look at them
    listener, tracing   how somebody listens; a picture of the run

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
