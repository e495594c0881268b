"""Floor 5: worker processes. ``main`` is what runs in one, ``process`` starts and ends one.

A worker knows tasks as numbers and payloads. It does not know futures.
"""
