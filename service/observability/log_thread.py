"""Log lines written by a thread: whoever logs, above all an event loop, does not wait for the log's reader."""

import logging
import queue
import threading
from contextlib import suppress

MAX_LINES = 10_000
"""That wait to be written; whoever logs more waits for the reader after all, so that no line is lost and memory is bounded."""
_GATHER_SECONDS = 0.01
_FLUSH_SECONDS = 1.0


class LogThread(logging.StreamHandler):  # type: ignore[type-arg]
    """A `StreamHandler` whose thread writes what came within a hundredth of a second at once. An error is written before the call
    that logs it returns, and all lines before the process ends; one that is killed loses what it logged in that hundredth."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | threading.Event] = queue.Queue(MAX_LINES)
        self._hurry, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put(self.format(record) + self.terminator)
            if record.levelno >= logging.ERROR:
                self.flush()
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Returns once all lines so far are written, or after a second."""
        if not self._thread.is_alive():
            return
        written = threading.Event()
        with suppress(queue.Full):
            self._hurry.set()
            self._lines.put(written, timeout=_FLUSH_SECONDS)
            written.wait(_FLUSH_SECONDS)

    def close(self) -> None:
        self._closing.set()
        self.flush()
        super().close()

    def _run(self) -> None:
        while not self._closing.is_set() or not self._lines.empty():
            items = [self._lines.get()]
            self._hurry.wait(_GATHER_SECONDS)
            self._hurry.clear()
            with suppress(queue.Empty):
                while True:
                    items.append(self._lines.get_nowait())
            with suppress(OSError, ValueError):  # whoever read the log has gone
                self.stream.write("".join(item for item in items if isinstance(item, str)))
                self.stream.flush()
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
