"""Calls, maps and their results, and the names of the script that they need.

tasks        a call with a future
mapping      the calls of a ``map``; `results`: the iterator over its results; `gathering`: all
             results at once; `counted`: for a bar; `awaiting`: for coroutines
front        ``map``, ``cancel`` and the ``with`` block of any pool
pickling     pickles of calls
functions    functions that a worker is sent once, and that are called by number from then on
names        names of the script that workers have, and names that they lack
closures     objects that a name leads to: `walk` follows them
table        state of the names at one time, and the script's imports; `known`: whether a name
             still has its value
mains        functions, classes and data of the script, and `prints` of their former state
values       pickles of single values, or of values that share objects
deliveries   names with their values, on the way to workers
"""
