"""Floor 5: worker processes. A worker knows tasks as numbers and payloads, and has no futures.

Each module imports only from modules below it in this list; an import contract checks that. Within
a group, the order is that of use in one start.

    In the program: modules that start a worker
    methods         choice of a pool's start method
    context         the package's own method: modules to preload, the way of the script
    forkserver      the table of fork servers, one for each setting
    upkeep          one fork server, started again when it is lost
    asking          one running fork server: requests and the meaning of its answers
    launch          the start of an interpreter that serves; state and descriptors for a worker
    forked          a worker with another parent: signals, and waiting for its end
    standard        multiprocessing's and loky's methods
    safe_path       nothing is imported from the working directory

    In other processes, up to a worker
    server          the fork server: import, check, fork, report
    birth           from a fork of it to a worker
    keeper          the parent of a server, which ends the processes that tasks have started
    script, loading the program's script, run in the fork server
    capped_server, begin    code before the program is imported: forkserver, spawn
    lifeline        a pipe whose end ends all of them
    identity        the rights of a process, and its place
    traces, preload    effects of an import; modules that are worth preloading

    In a worker
    main            environment, caps, signals, channel
    runner          tasks, one after the other
    coroutines      a task that is a coroutine function
    timed, answers, messages, logs    messages of a worker
    settings, settings_table, namespace, describe, unlike    state of the program

    On both sides
    start           facts for a new worker; the interface of a start method; one worker
    plan            the way of ``__main__`` into workers
    off_path        modules that the program has loaded from files which no import finds
    interpreter     the interpreter for workers, and the error if there is none
    inheritance     objects that an initializer gets beside its pickle
    board, fence    memory that both read and write without a message
    index           number of a worker in its pool
    tree, fork      descendants of a task; a fork of a worker
    contained       a log whose handlers end no thread
"""
