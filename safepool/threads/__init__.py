"""Floor 3: the native thread pools that a worker can meet, and how each one is capped.

``table`` is the knowledge, ``environment`` what a child is born with, ``cap`` what is done
to the libraries that are loaded. It never measures limits: the number of threads is given.
"""
