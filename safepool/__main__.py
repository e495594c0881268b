"""Floor 7: ``python -m safepool`` is the command ``safepool``."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # ``-m`` puts the current folder first: a file there, logging.py for one, would be run in the
    # place of a library. Neither the command nor this module imports from there, but child
    # processes look there for safepool if this module comes from there.
    here: str = os.getcwd()
    if not sys.flags.safe_path and sys.path[:1] in ([here], [""]):
        del sys.path[0]
        if os.path.dirname(os.path.dirname(os.path.abspath(__file__))) == here:
            sys.path.append(here)

from safepool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
