"""Waiting for what other threads and processes do, and having them do it at the same moment."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

PATIENCE = 180.0


def until(what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Waits for the condition and returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def at_once(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each action returned, or the exception that it raised; all start at the same moment, each in its thread."""
    barrier = threading.Barrier(len(actions))
    outcomes: list[Any] = [None] * len(actions)

    def act(i: int) -> None:
        barrier.wait()
        try:
            outcomes[i] = actions[i]()
        except Exception as error:
            outcomes[i] = error

    threads = [threading.Thread(target=act, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
