"""A picture of a run: what each worker did when, in the Trace Event Format.

It listens to a pool (``listener``): to the core's events and actions, and to the few facts that
only the pool's shell knows. The workers of a traced pool tell when each call began and ended.
Without a trace nothing of this is imported.

trace    the listener: what is heard goes to the rows, and on to the file
costs    what calls cost before a worker has them
rows     which call ran from when to when: a row for each worker
events   the events, as lines; their form is described there
file     the file, and the thread that writes it

A row is a place: a worker that replaces one which has ended gets its row.
"""
