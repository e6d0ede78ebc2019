"""How much load one API process sustains: polling, waiting, submissions and lists over 100,000 jobs, on loopback, with locust.

    python benchmarks/api.py --out benchmarks/results

A real PostgreSQL and broker, the API on uvicorn, no worker, no limits on the keys. The clients run in a separate process on the
same machine, whose CPU use is reported. Takes five minutes. With `--before DIR` each scenario runs first on the API of another
checkout, on a database of its own, so that the two can be compared within one run, of ten minutes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import api_cpu
import api_rates
import numpy as np
import psutil
from load_world import Watch, World, ending, make_worlds, serving, upload
from measuring import heading
from reporting import table, write_json
from rich.console import Console

from service.local.process_group import ProcessGroup

console = Console(stderr=True)
ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]

LISTS = [
    ("list, 20", "limit=20"),
    ("list, 100", "limit=100"),
    ("list, 20, after a cursor", "limit=20&after={cursor}"),
    ("list, 100, after a cursor", "limit=100&after={cursor}"),
    ("list, 20, running", "limit=20&status=running"),
    ("list, 20, failed, after a cursor", "limit=20&status=failed&after={cursor}"),
    ("list, 20, cancelling (none)", "limit=20&status=cancelling"),
]
PACING_SECONDS = 5  # of `Poster`
WARM_UP = {"Poller": 10.0, "Waiter": 12.0, "Poster": 8.0}
HOLDS_SECONDS = 1.0  # a rate of submissions is sustained if p99 is below this
ENDING = 500  # at most this many jobs end during a scenario
RATES = "fixed rates"
FULL = 0.9  # of a core, about the most that a Python process can use


@dataclass(frozen=True)
class Scenario:
    name: str
    users: dict[str, int]
    seconds: float
    workers: int = 1
    ends_every: float = 0.0


def submissions(rate: int, seconds: float) -> Scenario:
    return Scenario(f"{rate} submissions a second", {"Poster": rate * PACING_SECONDS}, seconds)


def scenarios(small: bool) -> list[Scenario]:
    n, seconds = (20, 1.5) if small else (1000, 25.0)
    mixed = {"Poller": 3 * n // 10, "Waiter": 3 * n // 10, "Poster": 10 * PACING_SECONDS, "SlowLister": n // 100}
    found = [
        Scenario(f"{n} pollers", {"Poller": n}, seconds),
        Scenario(f"{n} pollers, 2 processes", {"Poller": n}, seconds, workers=2),
        Scenario(f"{n} waiters", {"Waiter": n}, seconds, ends_every=0.1),
        Scenario("8 listers", {"Lister": 8}, seconds / 2),
        Scenario("all together", mixed, seconds, ends_every=0.1),
    ]
    return [found[0], found[2], found[3]] if small else found


def drive(world: World, scenario: Scenario, code: Path, request: Json) -> Json:
    """Runs one scenario on a freshly started API."""
    warm_up = max((WARM_UP.get(kind, 5.0) for kind in scenario.users), default=5.0)
    warm_up = min(warm_up, 3 * scenario.seconds)
    postgres = postgres_of(world)
    with serving(world, code, scenario.workers) as (url, api):
        task = {
            "url": url,
            "warm_up": warm_up,
            "seconds": scenario.seconds,
            "users": scenario.users,
            "running": world.running,
            "keys": world.keys,
            "cursors": world.cursors,
            "lists": LISTS,
            "request": request or upload(url, world.keys[0]),
        }
        request.update(task["request"])
        path = world.folder / "task.json"
        path.write_text(json.dumps(task))
        # Clients take jobs from the end of the list, so these must end first.
        ends = [job for _, job in world.running[-ENDING:]] if scenario.ends_every else []
        command = [sys.executable, str(ROOT / "benchmarks" / "load_users.py"), str(path)]
        with ending(world, ends, scenario.ends_every) if ends else nullcontext(), load_generator(command) as process:
            process.stdout.readline()  # warmed up: measurements start here
            with Watch(world, api, postgres) as watch:
                output = process.communicate(timeout=120)[0]
    del world.running[len(world.running) - len(ends) :]
    return _summary(scenario, json.loads(output), watch.found)


@contextmanager
def load_generator(command: list[str]) -> Iterator[Any]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _summary(scenario: Scenario, seen: Json, used: Json) -> Json:
    calls = [_call(name, times, seen["seconds"]) for name, times in sorted(seen["calls"].items())]
    generator = round(seen["cpu_seconds"] / seen["seconds"], 2)
    found = {
        "name": scenario.name,
        "users": scenario.users,
        "seconds": round(seen["seconds"], 1),
        "calls": calls,
        "requests": sum(c["requests"] for c in calls),
        "errors": seen["errors"],
        "crashed": seen["crashed"],
        "under_way_at_the_end": seen["under_way"],
        "generator_cores": generator,
        **used,
    }
    found["limit"] = _limit(found, scenario.workers)
    console.print(found)
    return found


def _limit(found: Json, workers: int) -> str:
    """The bottleneck, judged by CPU use."""
    if found["generator_cores"] >= FULL:
        return "the generator"
    if found["api_cores"] >= FULL * workers:
        return "the API process"
    return "the machine" if found["machine_busy"] >= FULL else "none"


def _call(name: str, seconds: list[float], window: float) -> Json:
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    milliseconds = {"p50": p50, "p95": p95, "p99": p99, "max": max(seconds)}
    rounded = {key: round(1000 * float(value), 1) for key, value in milliseconds.items()}
    return {"call": name, "requests": len(seconds), "per_second": round(len(seconds) / window, 1), **rounded}


def is_held(found: Json, rate: int) -> bool:
    """Whether that rate of submissions was sustained: all were answered soon enough, and as many as requested."""
    call = found["calls"][0] if found["calls"] else {"p99": float("inf"), "per_second": 0.0}
    return bool(call["p99"] < 1000 * HOLDS_SECONDS and call["per_second"] > 0.9 * rate and not found["errors"])


def measure(worlds: dict[str, World], codes: dict[str, Path], options: argparse.Namespace) -> dict[str, list[Json]]:
    """Each scenario on each code in turn; the rate of submissions is raised until none sustains it."""
    found: dict[str, list[Json]] = {name: [] for name in codes}
    requests: dict[str, Json] = {name: {} for name in codes}
    small = options.small
    for scenario in scenarios(small):
        for name, code in (
            list(codes.items()) * options.pairs if scenario.name in (options.only or [scenario.name]) else ()
        ):
            found[name].append(drive(worlds[name], scenario, code, requests[name]))
    if options.only:
        return found
    for rate in (10,) if small else (10, 20, 40, 100, 200):
        for name, code in codes.items():
            found[name].append(drive(worlds[name], submissions(rate, 2.0 if small else 10.0), code, requests[name]))
            found[name][-1]["held"] = is_held(found[name][-1], rate)
        if not any(lines[-1]["held"] for lines in found.values()):
            break
    return found


def compare(world: World, *, small: bool) -> Json:
    """The processor time of requests beside that of a minimal API."""
    with serving(world, ROOT, 1) as (url, _):
        body = upload(url, world.keys[0])
    return api_cpu.measure(world, ROOT, postgres_of(world), body, requests=40 if small else 2_000)


def at_rates(world: World, *, small: bool, turns: int) -> dict[str, list[Json]]:
    """Polls and submissions at fixed rates, to two processes, which are started anew for each turn."""
    found: dict[str, list[Json]] = {"poll": [], "submission": []}
    for _ in range(turns):
        with serving(world, ROOT, 2) as (url, _):
            posts = api_cpu.submissions(world, upload(url, world.keys[0]))
            calls = {"poll": (api_cpu.polls(world), 1000, 200), "submission": (posts, 100, 202)}
            for call, (request, rate, expected) in calls.items():
                rate, seconds = (rate // 10, 1.0) if small else (rate, 20.0)
                found[call].append(api_rates.at_rate(url, request, rate, seconds, expected))
                console.print(call, found[call][-1])
    return found


def waits(world: World, *, small: bool) -> Json:
    """Clients that wait for jobs of two processes, which end at a fixed rate."""
    clients, seconds = (20, 2.0) if small else (1000, 30.0)
    jobs = [world.running.pop() for _ in range(min(len(world.running), 2 * clients))]
    with serving(world, ROOT, 2) as (url, _), ending(world, [job for _, job in jobs], 0.1):
        found = api_rates.until_ended(url, jobs, clients, seconds)
    console.print("waits", found)
    return found


def report_cpu(found: Json) -> str:
    head = ["ms of processor time", "API", "PostgreSQL", "minimal API", "its PostgreSQL", "factor"]
    rows = [
        [call, *of_call["service_ms"].values(), *of_call["minimal_ms"].values(), of_call["over_minimal"]]
        for call, of_call in found.items()
    ]
    return table(head, rows)


def report_rates(found: Mapping[str, list[Json]]) -> str:
    head = ["two processes, at a fixed rate", "a second", "answered a second", "p50, ms", "p99", "max", "errors"]
    head += ["busy, of the machine", "ms of a fixed loop, before and after"]
    return table(head, [[call, *turn.values()] for call, turns in found.items() for turn in turns])


def report_waits(found: Json) -> str:
    head = ["two processes, clients that wait for a job", "notified a second", "p50, ms", "p99", "max", "errors"]
    return table(head, [list(found.values())] if found else [])


def postgres_of(world: World) -> psutil.Process:
    return psutil.Process(int((world.folder / "postgres" / "postmaster.pid").read_text().split()[0]))


def report(found: list[Json]) -> str:
    head = ["", "requests a second", "p50, ms", "p95", "p99", "max", "errors", "cores: API; PostgreSQL; clients"]
    head += ["API, MiB", "connections", "bottleneck"]
    rows = []
    for scenario in found:
        used = f"{scenario['api_cores']}; {scenario['postgres_cores']}; {scenario['generator_cores']}"
        of_all = [used, scenario["api_peak_rss_mib"], scenario["connections"], scenario["limit"]]
        for call in scenario["calls"]:
            errors = sum(n for name, n in scenario["errors"].items() if name.startswith(f"{call['call']}: "))
            figures = [f"{call[key]:,.0f}" for key in ("p50", "p95", "p99", "max")]
            rows.append([f"{scenario['name']}: {call['call']}", call["per_second"], *figures, errors, *of_all])
            of_all = [""] * 4
    return table(head, rows)


def over_minimal(compared: Mapping[str, Any]) -> dict[str, float]:
    """The ratios that the API is judged by, under names of their own."""
    return {f"{name}_over_minimal": found["over_minimal"] for name, found in compared.items() if name != "list of 20"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--before", type=Path, help="another checkout, measured before this one in each scenario")
    parser.add_argument("--only", nargs="+", help=f"scenarios by name, or `{RATES}`; without it, all, and submissions")
    parser.add_argument("--pairs", type=int, default=1, help="how often each is run, in turns")
    parser.add_argument("--name", default="api", help="of the files of results")
    parser.add_argument("--small", action="store_true", help="half a minute, to check that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beside", default="nothing", help="what else ran on the machine, for the record")
    options = parser.parse_args()
    jobs = 2_000 if options.small else options.jobs
    head = heading(options)  # taken now: the commit that is measured, even if another is made meanwhile
    codes = {**({"before": options.before.resolve()} if options.before else {}), "now": ROOT}
    with tempfile.TemporaryDirectory(prefix="winnow-load-") as name:
        folder = Path(name)
        with make_worlds(folder, jobs, min(jobs // 4, 6_000), ProcessGroup(folder), codes) as worlds:
            found = measure(worlds, codes, options)
            compared = {} if options.only else compare(worlds["now"], small=options.small)
            only = options.only or [RATES]
            rates = at_rates(worlds["now"], small=options.small, turns=options.pairs) if RATES in only else {}
            waited = {} if options.only else waits(worlds["now"], small=options.small)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out / f"{options.name}.json",
        {**head, "jobs": jobs, **over_minimal(compared), **found, "cpu": compared, "at_rates": rates, "waits": waited},
    )
    (options.out / f"{options.name}.md").write_text(
        "\n".join(
            [
                *(f"{name}\n\n{report(lines)}" for name, lines in found.items()),
                report_cpu(compared),
                report_rates(rates),
                report_waits(waited),
            ]
        )
    )


if __name__ == "__main__":
    main()
