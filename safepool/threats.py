"""Threat model: possible attackers of a program's pools, the protection, and threats out of scope.

    attacker or attack surface        protection
    another user of the machine       Another user can open no socket, memory, file or temporary
                                      folder of a pool. Nothing listens on a network. The agent of
                                      a node holds an abstract name; the node works even if another
                                      user has taken that name first.
      the file of trace=              The pool follows no link that another user placed and, in a
                                      world-writable sticky folder, replaces no file of another
                                      user. Your umask decides who may read the file. It has the
                                      names of functions and the outcomes of calls, but no
                                      arguments and no results.
      command lines                   Every user may read command lines (``ps``). They never have
                                      arguments, results, initargs, env= or keys.
    the working directory             Workers and servers import from it only if the program does:
                                      at a prompt, with ``python -c`` or ``python -m``, or as a
                                      script in that directory. The command ``safepool`` and
                                      ``python -P -m safepool`` never import from it.
    names that others choose          Names of control groups, commands, libraries and functions,
                                      and texts of a trace: characters that could control a
                                      terminal or begin a line are escaped.
    files of the kernel and           Limits, variables and traces may have any content: safepool
    of other programs                 reads or reports it, and the program goes on.
    a program that gives up root      New workers have only its new rights.

Not covered:
    * Untrusted functions, arguments and results. They are pickles, and unpickling runs code. A
      pool is no sandbox: a task has all rights of the program, and its result can run code in the
      program. Run untrusted code in a container or as another user, and never unpickle its data.
    * The same user, root, and any user who may debug the program (``ptrace``): these users can do
      all that the program can. Secrets in env= are in the environment of workers, and of programs
      that tasks start.
    * Your network: :class:`safepool.ClusterPool` sends pickles through your engine. Every user who
      reaches an unprotected Dask scheduler can run code on every node. Use Dask's TLS.
    * ``PYTHONPATH``, ``PATH``, the virtual environment: a user who can change these controls the
      program.
    * Denial of service: another user may use up processors, memory or processes.
    * ``mp_context="forkserver"`` before Python 3.11.1: its socket has an abstract name, to which
      every user of the machine can connect (CVE-2022-42919).
    * Links of other users elsewhere than on Linux: the pool follows them.

Tests: ``tests/pool/test_other_user.py``, ``tests/workers/test_safe_path.py``,
``tests/test_hostile_text.py``, ``tests/test_named_file.py``.
"""
