"""The clients of one scenario of `api.py`, with locust, in a separate process: reads a task and writes what they measured.

    python benchmarks/load_users.py TASK.json

Prints a line "counting" after the warm-up, then a line of JSON.
"""

import json
import random
import resource
import sys
import time
import uuid
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import gevent
from locust import FastHttpUser, between, constant_pacing, task
from locust.env import Environment

Json = dict[str, Any]
JOBS = "/v1/selection-jobs"
PACING_SECONDS = 5.0


class Seen:
    """Durations by name of call, errors by status, and the number of calls in flight."""

    def __init__(self) -> None:
        self.counting = False
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self.under_way = 0


class Client(FastHttpUser):
    """Counts a response other than the expected one as an error, by its status or by the exception that ended the call."""

    abstract = True
    network_timeout = 90.0
    task_: ClassVar[Json]
    seen: ClassVar[Seen]

    def call(self, method: str, path: str, name: str, expected: int, key: str, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {key}", **more.pop("headers", {})}
        self.seen.under_way += 1
        started = time.perf_counter()
        try:
            answer = self.client.request(method, path, name=name, headers=headers, **more)
        finally:
            self.seen.under_way -= 1
        if self.seen.counting:
            self.seen.seconds[name].append(time.perf_counter() - started)
            if answer.status_code != expected:
                self.seen.errors[f"{name}: {answer.status_code or type(answer.error).__name__}"] += 1
        return answer


class JobClient(Client):
    """Observes a running job, and another one when that has ended."""

    abstract = True

    def on_start(self) -> None:
        self.key, self.job = self.task_["running"].pop()
        gevent.sleep(random.random() * 2)


class Poller(JobClient):
    """Polls at the interval given in the response."""

    pause = 2.0

    @task
    def poll(self) -> None:
        answer = self.call("GET", f"{JOBS}/{self.job}", "GET job", 200, self.key)
        self.pause = float(answer.headers.get("retry-after") or 2.0)

    def wait_time(self) -> float:
        return self.pause


class Waiter(JobClient):
    """Waits for the end, like the Python client."""

    @task
    def wait_for_end(self) -> None:
        answer = self.call("GET", f"{JOBS}/{self.job}?wait=30", "GET job?wait=30", 200, self.key)
        if answer.status_code == 200 and (finished := answer.json()["finished_at"]) is not None:
            if self.seen.counting:
                delay = datetime.now(UTC) - datetime.fromisoformat(finished)
                self.seen.seconds["notified of the end"].append(delay.total_seconds())
            self.key, self.job = self.task_["running"].pop()


class Poster(Client):
    """Posts once every `PACING_SECONDS`: the rate is constant as long as responses take less than that."""

    wait_time = constant_pacing(PACING_SECONDS)

    def on_start(self) -> None:
        gevent.sleep(random.random() * PACING_SECONDS)

    @task
    def post(self) -> None:
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        self.call("POST", JOBS, "POST job", 202, self.task_["keys"][0], json=self.task_["request"], headers=headers)


class Lister(Client):
    """Lists jobs of the tenant that has the most, one request after the other without a pause."""

    @task
    def list_jobs(self) -> None:
        name, query = random.choice(self.task_["lists"])
        cursor = random.choice(self.task_["cursors"]) if "after" in query else ""
        self.call("GET", f"{JOBS}?{query.format(cursor=cursor)}", name, 200, self.task_["keys"][0])


class SlowLister(Lister):
    """The same with a pause after each request."""

    wait_time = between(1.0, 3.0)


def main() -> None:
    scenario: Json = json.loads(Path(sys.argv[1]).read_text())
    Client.task_, Client.seen = scenario, Seen()
    kinds = {kind.__name__: kind for kind in (Poller, Waiter, Poster, Lister, SlowLister)}
    users = {kinds[name]: count for name, count in scenario["users"].items()}
    for kind, count in users.items():
        kind.fixed_count = count
    environment = Environment(user_classes=list(users), host=scenario["url"])
    runner = environment.create_local_runner()
    runner.start(sum(users.values()), spawn_rate=sum(users.values()) / scenario["warm_up"] * 2)
    gevent.sleep(scenario["warm_up"])
    print("counting", flush=True)
    seen = Client.seen
    seen.counting, started, before = True, time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    gevent.sleep(scenario["seconds"])
    seen.counting, seconds, after = False, time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    under_way, crashed = seen.under_way, len(runner.exceptions)
    runner.quit()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"seconds": seconds, "cpu_seconds": cpu, "under_way": under_way, "crashed": crashed}
    print(json.dumps({**found, "errors": seen.errors, "calls": seen.seconds}))


if __name__ == "__main__":
    main()
