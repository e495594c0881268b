"""Floor 7: ``python -m safepool`` is the command ``safepool``."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # ``python -m`` puts the current folder first in ``sys.path``: Python would import a file
    # there, such as logging.py, instead of a library. The command and this module import nothing
    # from there. Child processes look there for safepool if this module was found there.
    here: str = os.getcwd()
    if not sys.flags.safe_path and sys.path[:1] in ([here], [""]):
        del sys.path[0]
        if os.path.dirname(os.path.dirname(os.path.abspath(__file__))) == here:
            sys.path.append(here)

from safepool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
