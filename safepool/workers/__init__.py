"""Floor 5: worker processes. A worker knows tasks as numbers and payloads, and no futures.

Each module imports only from those below it here; an import contract holds it. Within a group they
stand in the order in which one start uses them.

    In the program: what starts a worker
    methods         which start method a pool gets
    context         ours: what is preloaded, how the script gets into workers
    forkserver      the table of fork servers, one for each setting
    upkeep          one of them, started again when it is lost
    asking          one that runs: what it is asked, and what its answers mean
    handing         what a worker is given by a program that is not its parent
    launch          an interpreter is started that serves
    kept, forked    a server, a worker that somebody else has started: signalled, waited for
    standard        multiprocessing's and loky's methods
    safe_path       nothing is imported from the working directory
    process         one worker, and the pool's end of its channel

    In other processes, up to a worker
    server          the fork server: import, check, fork, report
    birth           from a fork of it to a worker
    keeper          the parent of a server, which ends what tasks have started
    script, loading the program's script, run where workers come from
    capped_server, begin    what runs before the program is imported: forkserver, spawn
    lifeline        a pipe whose end is the end of all of them
    identity        the rights of a process, and where it is
    traces, preload    what an import leaves; what is worth importing

    In a worker
    main            environment, caps, signals, channel
    runner          tasks, one after the other
    coroutines      a task that is a coroutine function
    timed, answers, messages, logs    what it says
    settings, settings_table, levels, namespace, describe, unlike    what it is told of the program

    On both sides
    start           all that a new worker is told; what a start method is
    plan            how ``__main__`` gets into workers
    inheritance     what its initializer finds beside the pickle
    board, fence    what both read and write without a message
    index           which worker of its pool a process is
    tree, fork      what a task has started; a fork of a worker
    contained       a log whose handlers end no thread
"""
