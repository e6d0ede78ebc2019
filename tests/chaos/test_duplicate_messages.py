"""Messages that come more than once."""

import re
from collections import Counter

import pytest
import redis
from scenario import Told, errors, frozen, survived
from undisturbed import Undisturbed
from world import World

from service.background.dispatcher import QUEUE

COPIES = 50
_BEGUN = re.compile(r"(\w+/\d+ of job_\w+, attempt \d+)")


@pytest.mark.slow
def test_a_message_that_comes_many_times_at_once_runs_nothing_twice(
    pair: World, undisturbed: Undisturbed, record_property: Told
) -> None:
    with redis.Redis.from_url(pair.settings.broker.url) as queue:
        with frozen(*pair.workers):
            job_id = pair.submit()
            # One goes to each worker that stands still and had asked for the next.
            pair.until("a message waits", lambda: queue.llen(QUEUE))
            message = queue.lindex(QUEUE, 0)
            queue.rpush(QUEUE, *[message] * COPIES)
            record_property("fault", f"a message {COPIES} times")
        survived(pair, undisturbed, job_id)
        pair.until("the queue is drained", lambda: not queue.llen(QUEUE))
    assert errors(pair, job_id) == []
    begun = Counter(line for worker in pair.workers for line in _BEGUN.findall(worker.log.read_text(errors="replace")))
    own = {line: count for line, count in begun.items() if job_id in line}
    assert own
    assert set(own.values()) == {1}
