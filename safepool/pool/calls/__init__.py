"""Calls, maps and their results, and the names of the script that they need.

tasks        a call with a future
mapping      the calls of a ``map``, and who takes their results; `gathering`: all of them at
             once; `counted`: for a bar; `awaiting`: by coroutines; `opened`: items not taken yet
front        ``map``, ``cancel`` and the ``with`` block of any pool
functions    sent to a worker once, called by number from then on
names        what workers have of the script's names, and what they lack
closures     what a name leads to: `walk` follows it, `circles` orders it, `imports` are imported
table        what is known of the names at one time; `known`: is it still so?
mains        functions, classes and data of the script, and `prints` of what they were
values       pickled alone, or with what shares objects with it
deliveries   names with their values, on the way to workers
"""
