"""Floor 6: the pool, which owns workers and futures. ``core`` decides about every call.

    executor    `ProcessPool`, the public class; `inherited`: a ProcessPool in the place of forks
    calls       the caller's side: calls, maps, functions, names of the script
    core        decisions about waiting, sent, lost and repeated calls: a pure state machine
    shell       delivers events to the core and executes its actions: threads, workers, messages
    tracing     the timeline of a run, written by a listener
    watch       state of the pool for callers outside
    hands       threads that run the program's code, apart from the scheduler's thread
    latch       waiting that stays correct when a signal handler interrupts it

Terms, one for each thing:

    call       one execution of a function: a `Task` has a future, a `MapRun` makes many calls
    span       calls of one run that travel together
    work       a call or a span, from the backlog until it is settled
    position   number of a call among all calls that one worker was sent, from 1
    ledger     calls that one worker was sent and has not answered, by position
    board      memory that a worker shares with the pool: it shows how far the worker came
    claimed    begun, or skipped because it was taken back; `began`: begun
    take back  remove unclaimed calls from a worker, so that they wait again
    settle     end an answered call, and remove it from the ledger
    lost       begun by a worker that ended before it answered
    lane       an idle worker to which callers may send calls themselves, one *turn* at a time
               (``shell.turns``); on a board: slots for results that are numbers

Differences from a forked pool:

    * Top level of the script. With ``if __name__ == "__main__":`` the script runs once more, in
      the server that workers are forked from. Work, output files and connections belong below the
      guard. Values that ``main()`` has set are delivered to workers. Values that cannot be pickled
      (a client, a lock) are not delivered: the worker keeps the object that its own run of the
      script has made. If the script cannot be run there (it raises, or starts threads), the pool
      logs that once. ``__name__`` is ``__mp_main__`` in workers, as under ``spawn``;
      ``logging.getLogger(__name__)`` is still the program's logger. With ``mp_context="spawn"``
      and ``"forkserver"`` each worker runs the script itself. The same holds where no server can
      fork (an agent or a debugger has threads in every interpreter). With ``mp_context="loky"``,
      the default elsewhere than on Linux, the script is not run: functions travel by value.
    * Globals of the script. A worker gets the value that a global has when the first call that
      uses it is sent, not when the pool was made. If the program changes the global later, also
      in place, it is delivered again and replaces the worker's value.
    * Changes to modules. A script without the guard may put its functions, classes and instances
      into modules that it imports: registries, hooks, replaced functions. Workers get these
      changes too (``help("safepool.transport.additions")`` lists the kinds). Workers do not get
      ``codecs.register()``, ``mimetypes.add_type()``, an alias in ``sys.modules``,
      ``signal.signal()``, ``atexit.register()``, filters of loggers and data
      (``module.LEVEL = 5``): write the guard, or set them in a module of your own or in
      ``initializer=``.
    * Large globals. Each worker is sent a large global once. Each ``map`` and ``submit`` checks
      once whether it has changed, in a few milliseconds for each 40 MiB. Read-only arrays
      (``table.flags.writeable = False``) and objects of ``safepool.share(table)`` need no check.
    * Arrays that are read-only in the program are read-only arguments, as under loky. A forked
      pool makes writable copies of them.
    * Locks, queues and values of ``multiprocessing``. They cannot be delivered as globals, except
      to forks. If the top level of a guarded script makes them, workers share them with each
      other, but not with the program. Make them by ``multiprocessing.get_context("spawn")`` and
      pass them by ``initializer=`` and ``initargs=``. Open a database connection in the
      initializer. Sockets, ``multiprocessing`` connections and managers' proxies may be arguments
      and results.
    * ``fork`` is used only with ``mp_context="fork"``, which warns if the process has threads.
    * Settings. Workers take over the program's settings, also later changes: warning filters,
      levels of logging, decimal, NumPy's error state, options of pandas, scikit-learn, Matplotlib,
      PyTorch and JAX, the locale and others (``help("safepool.workers.settings_table")`` lists
      them). ``safepool.register_setting()`` adds one. A setting that an initializer or a task
      changes belongs to its worker.
    * Context variables and ``threading.local``. Workers have the values that a guarded script sets
      at its top level, as with the standard pool's ``forkserver``. Values that are set below the
      guard stay in the program. With ``"fork"``, workers have the context variables of the moment
      at which the pool was made.
    * Random numbers. Each worker has random numbers of its own, those of ``np.random`` included;
      the program's ``np.random.seed()`` does not reach workers. A generator that is a global of
      the script (``rng = np.random.default_rng(1)``) is copied to each worker, as by a fork: its
      draws repeat, and a warning says so once. Pass a seed with each task instead.
    * Hashes of text. ``hash("a")`` and the order of a set differ between workers and program, as
      under ``spawn``, unless ``PYTHONHASHSEED`` is set.
    * Order. In a pool of one worker, calls begin in the order of their submission, and a call that
      is run again keeps its place. Later calls go ahead only if the pickling of an argument
      submits to the pool, or stands still for five seconds (the standard pool waits without end),
      or if too many results of a ``map`` wait to be taken. Several workers are sent short calls in
      groups, so a call may begin before an earlier one of another group. A call whose arguments
      take longer than half a second to be pickled keeps one of the workers free.
    * ``map`` over a generator or a file takes 16,384 items before it returns, and more as you take
      results. An endless generator does not fill the memory.
    * ``multiprocessing.active_children()`` does not contain workers; ``pool.workers()`` does.
    * The first pool of a program starts its server: a Python, and the imports that workers share
      (NumPy, SciPy and others). A forked pool starts nothing: for a script of one second,
      ``@safepool.worker`` with the standard pool is faster.
"""
