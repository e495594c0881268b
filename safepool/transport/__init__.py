"""Floor 4: bytes between a pool and one of its workers, over a private channel.

    payloads    objects -> segments: a pickle, and the buffers of arrays beside it
    memmaps     ... arrays of a file as the file's name
    sharing     ... shared objects as a number (references)
    files       segments -> unnamed files, if they are large
    frames      segments -> one message, and back
    channel     sends and receives messages, without ever blocking the pool
    letters     rare messages with descriptors, to a fork server

The package knows nothing of tasks.
"""
