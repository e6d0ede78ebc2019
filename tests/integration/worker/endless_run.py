"""What test_interrupted_run.py interrupts; of its name nothing is collected."""

import os
import time
from pathlib import Path

from support.processes import Process
from support.tiny import pool_rows
from support.waiting import until
from support.worker_jobs import post
from support.world import World


def test_of_a_worker_that_computes_and_never_ends(world: World, worker: Process) -> None:
    post(world, world.upload(pool_rows(200)), world.upload(pool_rows(5)), budget=3)
    until("the compute process runs", worker.compute_process)
    Path(os.environ["PYTHON_ENDLESS_RUN"], "ready").touch()
    time.sleep(3600)
