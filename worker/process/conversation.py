"""The compute process's side of the pipe to its supervisor, also that of a process that does tasks. Imports no torch."""

import json
import os
import queue
import sys
import threading
import time
from typing import IO, Any, Self

from worker.errors import Cancelled

_PROGRESS_SECONDS = 0.2
_ALIVE_SECONDS = 2.0


class Conversation:
    """This process's side of the pipe. A thread reads, so that a cancel and the end of the supervisor are seen at once."""

    def __init__(self, incoming: IO[str], outgoing: IO[str]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._last_progress = 0.0
        self.cancelled = threading.Event()
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._pulse, daemon=True).start()

    @classmethod
    def of_this_process(cls) -> Self:
        """On stdin and stdout; whatever a library prints goes to stderr."""
        outgoing = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return cls(sys.stdin, outgoing)

    def _read(self) -> None:
        for line in self._incoming:
            message = json.loads(line)
            if message["type"] == "cancel":
                self.cancelled.set()
                continue
            self.cancelled.clear()  # here, in the order of the messages: a cancel that follows its unit closely counts
            self.messages.put(message)
        os._exit(0)  # the supervisor is gone: nobody would read a result

    def _pulse(self) -> None:
        while True:
            time.sleep(_ALIVE_SECONDS)
            self.send(type="alive")

    def send(self, **message: Any) -> None:
        with self._sending:
            self._outgoing.write(json.dumps(message) + "\n")
            self._outgoing.flush()

    def event(self, kind: str, data: dict[str, Any]) -> None:
        self.send(type="event", kind=kind, data=data)

    def report(self, done: Any) -> None:
        """Sends how far it is, at most a few times a second.

        Raises:
            Cancelled: the supervisor no longer wants it.
        """
        if self.cancelled.is_set():
            raise Cancelled
        now = time.monotonic()
        if now - self._last_progress >= _PROGRESS_SECONDS:
            self._last_progress = now
            self.send(type="progress", done=done)
