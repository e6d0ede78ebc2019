"""The API as one process or several that share a port: `python -m service.serve --processes 4`.

The first process listens and starts the others, which all take connections from its socket. One that ends, or has not answered it
for a while, is replaced; where one cannot start, all end. They end with the first one, however that ends (on Linux).
"""

import argparse
import logging
import multiprocessing
import os
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from service.health.connections import warn_at_start
from service.local.process_group import die_with_parent, usual_api_processes
from service.observability import logs, processes
from service.settings import api_settings, settings_problem
from service.storage.tempdirs import temporary_directory

log = logging.getLogger(__name__)

GRACE_SECONDS = 20  # for the requests in progress when it is told to stop
_SILENT_SECONDS = 20  # after which a process counts as hung; it may be long in starting on a busy machine


def application() -> FastAPI:
    """What each of the processes serves."""
    first = multiprocessing.parent_process()
    if first is not None:
        die_with_parent()
        if os.getppid() != first.pid:  # it has ended before that
            sys.exit("the process that started this one has ended")
    from service.app import create_app

    try:
        return create_app()
    except Exception:
        log.critical("the API cannot start", exc_info=True)
        sys.exit(STARTUP_FAILURE)  # which would be no different the next time


def serve(host: str, port: int, processes_wanted: int) -> None:
    """Serves until it is told to stop.

    Raises:
        SystemExit: a process could not start, or the port is taken.
    """
    config = uvicorn.Config(
        "service.serve:application",
        factory=True,
        host=host,
        port=port,
        workers=processes_wanted,
        http="service.http.protocol:TimedHeads",
        log_config=None,
        access_log=False,  # the service writes its own
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_worker_healthcheck=_SILENT_SECONDS,
    )
    if processes_wanted == 1:
        server = uvicorn.Server(config)
        server.run()
        has_started = server.started
    else:
        with temporary_directory() as folder:
            os.environ[processes.FOLDER] = str(folder)
            supervisor = Multiprocess(config, sockets=[config.bind_socket()])
            supervisor.run()
            has_started = all(process.exitcode != STARTUP_FAILURE for process in supervisor.processes)
    if not has_started:
        sys.exit(STARTUP_FAILURE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m service.serve", description="The API, in several processes")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--processes", type=int, default=usual_api_processes(), help="one for each core, at most 4")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error("--processes must be at least 1")
    try:
        settings = api_settings()
    except ValueError as error:
        sys.exit(settings_problem(error))
    logs.configure(settings.log, service="api")
    warn_at_start(settings, arguments.processes)
    serve(arguments.host, arguments.port, arguments.processes)


if __name__ == "__main__":
    main()
