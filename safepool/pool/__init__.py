"""Floor 6: the pool. ``scheduler`` owns workers and tasks, ``executor`` is what people hold."""
