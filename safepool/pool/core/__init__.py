"""Decisions of the pool, without a process, a clock, a lock, a future or a file.

events     what happens to a pool, and what is done about it: a table of each
machine    an event in, actions out
reclaim    from whom calls are taken back, and when to look
worker     what is known of one worker; its phase
work       what workers are given: calls, and spans of calls of a map
policy     what holds for a call: its time, its retries
backlog    what waits, in order
pace       how long calls take, so how many are sent ahead
ledger     what one worker owes
ending     how a worker ended, and what that means for its calls and the pool
patience   when to give up on workers that are of no use
"""
