"""Metrics of several API processes on one host: each keeps its own in files of a folder that they share, by which
prometheus_client sums them; whichever process is asked answers for all.

The folder is named by `PROMETHEUS_MULTIPROC_DIR`, which has to be set before prometheus_client is imported: service/serve.py
makes a new one at each start. What a process has counted stays when it ends; what it holds at a time (gauges) goes with it.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def shared_folder() -> Path | None:
    """None: this process is alone. Called before the first metric: it removes what a process of this number has left there."""
    if (name := os.environ.get(FOLDER)) is None:
        return None
    mark_process_dead(os.getpid(), name)  # type: ignore[no-untyped-call]
    return Path(name)


class AllProcesses(Collector):
    """The sums over the processes, those about the processes themselves (`process_...`) too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = MultiProcessCollector(None, str(folder))  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        alive = list(self._alive())
        yield from self._metrics.collect()  # type: ignore[no-untyped-call]
        yield from _summed(ProcessCollector(pid=lambda pid=pid: pid, registry=None) for pid in alive)  # type: ignore[misc]

    def _alive(self) -> Iterator[int]:
        """Those that run; what the others held is forgotten. A number that went to another program is not taken for one."""
        for pid in {int(path.stem.rpartition("_")[2]) for path in self._folder.glob("gauge_live*.db")}:
            try:
                process = psutil.Process(pid)
                runs = process.ppid() == os.getppid() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                runs = False
            if runs:
                yield pid
            else:
                mark_process_dead(pid, str(self._folder))  # type: ignore[no-untyped-call]


def _summed(collectors: Iterable[Collector]) -> Iterable[Metric]:
    found: dict[str, Metric] = {}
    for collector in collectors:
        for metric in collector.collect():
            before = found.get(metric.name)
            add = min if metric.name == "process_start_time_seconds" else sum
            if before is not None:
                pairs = zip(metric.samples, before.samples, strict=True)
                metric.samples = [one._replace(value=add((one.value, other.value))) for one, other in pairs]
            found[metric.name] = metric
    return found.values()
