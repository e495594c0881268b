"""A progress bar for calls: tqdm's, on standard error, drawn by a separate thread.

Code that runs calls counts them in a `Progress`, which costs an addition. A thread reads the
numbers ten times a second and draws. A terminal that does not read delays no worker, and the bar
moves while the program waits for its first result.

tqdm's ``auto`` form is used: a terminal or a notebook. The first bar imports tqdm. If tqdm is
missing, the error names the remedy.

Not covered:
    * A worker's own writes to standard error, past ``logging``: they go to the terminal directly,
      and disturb the bar's line until the next drawing.
    * Logs and prints of this process, sequential joblib calls included: use
      ``tqdm.contrib.logging.logging_redirect_tqdm`` and ``tqdm.write``.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from typing import IO, TYPE_CHECKING, Any, Self

from safepool.errors import MissingExtraError
from safepool.shown import printable
from safepool.workers import contained

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

_LOOK_S = 0.1

# Bars on the screen.
_open: set[Progress] = set()


class Progress:
    """Counts calls and shows their number until it is closed.

    The numbers may be changed in any one thread.

    Args:
        label: Text before the bar; empty for none.
        total: Number of calls that there will be, ``None`` if that is not known yet.
        look: Called in the drawing thread before it looks; returns whether to go on.

    Attributes:
        done: Calls that have ended, those that failed included. A call that is run again has
            not ended.
        failed: Calls among them that raised, or whose worker died.
        total: The argument of that name; may be set later.

    Raises:
        MissingExtraError: tqdm is not installed.

    Example:
        >>> with Progress("squares", 2) as progress:
        ...     progress.done += 1
    """

    def __init__(
        self,
        label: str = "",
        total: int | None = None,
        *,
        look: Callable[[Progress], bool] | None = None,
    ) -> None:
        tqdm = require_tqdm()
        self.done = 0
        self.failed = 0
        self.total = total
        self._look = look
        self._ended = threading.Event()
        # Reentrant: a signal handler may request a result of the same map.
        self._drawing = threading.RLock()
        self._shown_failed = 0
        # Without tqdm's monitor, a thread that never ends; this package's thread draws often
        # enough. The program's own bars keep the monitor.
        every_s, tqdm.monitor_interval = tqdm.monitor_interval, 0
        try:
            self._bar: Any = tqdm(
                desc=label or None, total=total, unit="call", dynamic_ncols=True, **_output(tqdm)
            )
        finally:
            tqdm.monitor_interval = every_s
        _open.add(self)
        contained.around = beside_bars
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        self._thread = threading.Thread(target=self._draw, name="safepool-progress", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Draw the last numbers, leave the bar there and end its thread. May be called twice."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def draw_now(self) -> None:
        """Draw the numbers of this moment, also if tqdm has drawn just before."""
        with self._drawing:
            if self in _open:
                self._draw_once()
                self._bar.refresh()

    def _draw(self) -> None:
        try:
            while not self._ended.wait(_LOOK_S) and self._draw_once():
                pass
            self._draw_once()
        finally:
            with self._drawing:
                _open.discard(self)
                self._look = None  # it holds the calls and their results
            self._end()

    def _draw_once(self) -> bool:
        """Look and draw; return whether there may be more to draw."""
        with self._drawing:
            more = self._look is None or self._look(self)
            self._show()
            return more

    def _end(self) -> None:
        bar = self._bar
        bar.close()
        # tqdm paints a notebook's bar green if it does not know its length.
        short = self.failed or (self.total is None and self.done)
        if short and hasattr(bar, "container"):
            bar.disp(bar_style="danger", check_delay=False)

    def _show(self) -> None:
        bar = self._bar
        if self.total != bar.total:
            if hasattr(bar, "container"):
                # A notebook's bar has a fixed length, and begins anew with another.
                begun_s = bar.start_t
                bar.reset(self.total)
                bar.start_t = bar.last_print_t = begun_s
            bar.total = self.total
            bar.refresh()
        if self.failed != self._shown_failed:
            self._shown_failed = self.failed
            bar.set_postfix(failed=self.failed, refresh=False)
        if self.done != bar.n:
            bar.update(self.done - bar.n)


def _close_all() -> None:
    """End the bars of results that were not taken to their end, at the program's exit."""
    for progress in [*_open]:
        progress.close()


def beside_bars() -> AbstractContextManager[object]:
    """Return a context in which other text may be written to the terminal.

    Bars are removed from the screen meanwhile, and drawn again below that text.

    Example:
        >>> with beside_bars():
        ...     print("no bar is open")
        no bar is open
    """
    if not _open:
        return contextlib.nullcontext()
    context: AbstractContextManager[object] = require_tqdm().external_write_mode()
    return context


class _Stream:
    """A stream for tqdm that accepts all text, even if its reader is gone.

    An exception of the stream would leave tqdm's lock held, and the next bar would wait without
    end.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(Exception):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(Exception):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        # tqdm asks whether a bar is on the stream that other text is written to.
        return self is other or self._stream is other

    __hash__ = None  # type: ignore[assignment]


def _output(tqdm: Any) -> dict[str, Any]:
    """Return where a bar is drawn, as arguments for tqdm."""
    if any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__):
        return {}  # not on a stream
    try:
        if sys.stderr is None:  # closed before the start
            return {"disable": True}
        # As tqdm does before it begins: the text in the buffer may be impossible to write.
        sys.stderr.flush()
    except Exception:  # noqa: BLE001 -- a stream of the program's own
        return {"disable": True}
    return {"file": _Stream(sys.stderr)}


def label_of(progress: bool | str | None) -> str | None:
    r"""Return the label of the bar, ``""`` for a bar without one, ``None`` for no bar.

    Args:
        progress: The argument of that name: ``True``, ``False`` or a label.

    Example:
        >>> label_of(True), label_of("two\nlines"), label_of(False)
        ('', 'two lines', None)
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return ""
    return printable(" ".join(progress.split()))


def require_tqdm() -> Any:
    """Return the class of tqdm's bars.

    Raises:
        MissingExtraError: tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm  # noqa: PLC0415 -- optional, so imported where it is used
    except ImportError as error:
        raise MissingExtraError("tqdm", "pip install 'safepool[progress]'") from error
    return tqdm
