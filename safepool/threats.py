"""Threat model: possible attackers of a program's pools, the protection, and threats out of scope.

    who                               what holds
    another user of the machine       No socket, memory, file or temporary folder of a pool can be
                                      opened by another user. Nothing listens on a network.
                                      The agent of a node holds an abstract name that another user
                                      could take first: the node is used all the same.
      the file of trace=              It is written through no link that another user placed, and
                                      in a folder for everybody over no file of another user. Your
                                      umask says who may read it: it has the names of functions
                                      and how calls ended, no arguments and results.
      command lines                   Everybody may read them (``ps``). Arguments, results,
                                      initargs, env= and keys are never in one.
    the working directory             Workers and servers import nothing from it that the program
                                      does not import from there itself. A program on a prompt, of
                                      ``python -c`` and ``python -m`` does; so does a script in
                                      that directory. ``python -P -m safepool`` does not, nor does
                                      the command ``safepool``.
    names that others choose          Control groups, commands, libraries, functions, the text of a
                                      trace: they are printed with all escaped that could control
                                      a terminal or begin a line.
    files of the kernel and           Limits, variables and traces with any content are read or
    of others                         reported; they do not end the program.
    a program that gives up root      New workers have its new rights, never the old ones.

Not covered:
    * Untrusted functions, arguments and results. They are pickles, and reading a pickle runs code.
      A pool is no sandbox: a task has all rights of the program, and its result can run code in
      the program. Run untrusted code in a container or as another user, and read no pickle of it.
    * The same user, root, and any user who may debug the program (``ptrace``): they can do all
      that the program can. Secrets in env= are in the environment of workers, and of what tasks
      start.
    * Your network: :class:`safepool.ClusterPool` sends pickles through your engine. A user who can
      reach an unprotected Dask scheduler runs code on every node. Use its TLS.
    * ``PYTHONPATH``, ``PATH``, the virtual environment: a user who can change those runs the
      program.
    * A machine with too little for all: another user may use up processors, memory or processes.
    * ``mp_context="forkserver"`` before Python 3.11.1: its socket has an abstract name, to which
      every user of the machine can connect (CVE-2022-42919).
    * Other systems than Linux: links of others are followed there.

The tests of each line: ``tests/pool/test_other_user.py``, ``tests/workers/test_safe_path.py``,
``tests/test_hostile_text.py``, ``tests/test_named_file.py``.
"""
