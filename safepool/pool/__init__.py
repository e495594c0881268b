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

What differs from a forked pool:

    * The top level of a script with ``if __name__ == "__main__":`` runs once more, in the
      server that workers are forked from. Work, output files and connections belong below the
      guard. What ``main()`` has set since is delivered; what cannot be pickled (a client, a
      lock) is the worker's own. A top level that cannot be run there (it raises, or starts
      threads) is told of once. As under ``spawn``, ``__name__`` is ``__mp_main__`` in workers;
      ``logging.getLogger(__name__)`` is the program's logger all the same. Where no server can
      be forked (an agent or a debugger has threads in every interpreter), and with
      ``mp_context="spawn"`` or ``"forkserver"``, each worker runs it. With
      ``mp_context="loky"``, and by default elsewhere than on Linux, it is not run: functions
      travel by value.
    * Globals of the script. A worker has what the program has when the first call that uses it
      is sent, not when the pool was made. If the program changes one later, also in place, it
      is delivered again, and takes the place of what tasks have made of it in the worker.
    * What a script without the guard has put into modules is put there in workers too, as far
      as it is a function, class or instance of the script in a module that it imports:
      registries, hooks, replaced functions (the kinds (``safepool/transport/additions.py``)).
      Not so ``codecs.register()``, ``mimetypes.add_type()``, an alias in ``sys.modules``,
      ``atexit.register()``, and data (``module.LEVEL = 5``): write the guard, or set them in a
      module of your own or in ``initializer=``.
    * A large global is sent to each worker once. Whether it has changed is asked once for each
      ``map`` and each ``submit``, which takes a few milliseconds for each 40 MiB. Arrays that
      are read-only (``table.flags.writeable = False``) and what is placed by
      ``safepool.share(table)`` are not asked for.
    * Locks, queues and values of ``multiprocessing`` cannot be such globals, but of forks;
      those that a guarded script's top level makes are shared among workers, and not with the
      program. Make them by ``multiprocessing.get_context("spawn")`` and hand them over by
      ``initializer=`` and ``initargs=``. A database connection is opened in the initializer.
      Sockets, ``multiprocessing`` connections and managers' proxies are arguments and results
      like any other.
    * ``fork`` is used only if you ask for it by ``mp_context="fork"``, which warns if your
      process has threads.
    * Settings that the program makes anywhere (warning filters, logging's levels, decimal,
      NumPy's error state, options of pandas, scikit-learn, Matplotlib, PyTorch and JAX, the
      locale, ...) hold in its workers, also when it changes them: the table
      (``safepool/workers/settings_table.py``). ``safepool.register_setting()`` adds to it.
      What an initializer or a task sets is its worker's own.
    * Random numbers: each worker has its own, also of NumPy's ``np.random``; the program's
      ``np.random.seed()`` does not reach them. A generator that is a global of the script
      (``rng = np.random.default_rng(1)``) is copied to each worker, as by a fork: their draws
      repeat, and a warning says so once. Pass a seed with each task instead.
    * Hashes of text (``hash("a")``, the order of a set) are not the program's in a worker, as
      under ``spawn``, unless ``PYTHONHASHSEED`` is set.
    * ``map`` over a generator or a file takes 16,384 items before it returns and the others as
      you take results, so that one without an end does not fill the memory.
    * The first pool of a program takes the start of a Python for its server, and as long again
      as the import of what is shared (NumPy, SciPy and the like). A forked pool has both for
      nothing, so a script that is over in a second is better off with ``@safepool.worker``.
"""
