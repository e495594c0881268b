"""Floor 7: ``python -m safepool`` is the command ``safepool``."""

from __future__ import annotations

from safepool.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
