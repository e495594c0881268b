"""The timeline of a run: the work of each worker, in the Trace Event Format.

It listens to a pool (``listener``): to the core's events and actions, and to the few facts that
only the pool's shell knows. The workers of a traced pool report when each call began and ended.
Without a trace none of these modules is imported.

trace    the listener, which passes events to the rows, and on to the file
costs    cost of calls before a worker has them
counted  begin, counters and end of a trace, also of a cluster pool
rows     begin and end of each call: a row for each worker
events   the events, as lines, and the description of their format
file     the file, and the thread that writes it

A row is an index in the pool: a replacement continues the row of its predecessor.
"""
