"""Floor 4: bytes between a pool and one of its workers, over a private channel.

``frames`` cuts the stream, ``payloads`` turns objects into segments, ``channel`` sends and
receives without ever blocking the pool. It does not know what a task means.
"""
