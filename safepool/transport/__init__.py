"""Floor 4: bytes between a pool and one of its workers, over a private channel.

    From objects to messages, and back
    payloads        objects -> segments: a pickle, and the buffers of arrays beside it
    memmaps         ... arrays of a file as the file's name
    sharing, references    ... shared objects as a number
    files, _memfd   segments -> unnamed files, if they are large
    frames          segments -> one message, and back
    channel         sends and receives messages, without ever blocking the pool
    letters, descriptors    rare messages with descriptors, to a fork server
    room, growing   memory that is left for a copy: looked at before, and at each step

    Objects that the worker cannot import, or must not make again
    by_value        the pickler for them; `classes`, `kinds`, `annotations`, `lazy`, `weak`: how
                    each kind of object travels
    reductions      results of methods for pickling: each method runs once for an object
    exceptions      made from class, arguments and attributes
    trusted         pickling that runs no code of the program
    blame           search for the part that could not be pickled

    The script
    marks           functions, classes and their attributes in ``__main__``
    main_names      those that a receiver has too; `fingerprints`: values that are equal there
    names           names of the script in the place of its objects
    held, additions objects that the script has got from modules, and has put into them

The package knows nothing of tasks.
"""
