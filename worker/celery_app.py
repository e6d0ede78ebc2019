"""The Celery application. A message says only "there may be work": it carries no state, and losing or repeating one changes
nothing, so it is acknowledged early and leaves no result."""

import logging
import os
from typing import Any

from celery import Celery
from celery.exceptions import WorkerShutdown
from celery.signals import celeryd_init, setup_logging, worker_ready, worker_shutdown, worker_shutting_down

from service.background.dispatcher import QUEUE, TASK
from service.models.dependency_check import unsafe_packages
from service.observability import logs
from service.settings import worker_settings
from worker.metrics import PortTaken
from worker.supervisor import Supervisor

log = logging.getLogger(__name__)

settings = worker_settings()
app = Celery("winnow", broker=settings.broker.url)
app.conf.update(
    task_ignore_result=True,
    task_acks_late=False,
    task_default_queue=QUEUE,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    worker_send_task_events=False,
    worker_enable_remote_control=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # a broker may be down for a night
    broker_transport_options={"socket_keepalive": True, "socket_connect_timeout": 10},
    accept_content=["json"],
    task_serializer="json",
)

supervisor = Supervisor(settings)


@app.task(name=TASK, ignore_result=True)
def work() -> None:
    """Processes units until none can be claimed."""
    supervisor.run_until_idle()


@celeryd_init.connect
def _log(instance: Any, **_: Any) -> None:
    """Before Celery logs anything, so that its records have our format and level; and before it asks for work."""
    logs.configure(settings.log, service="worker", worker_id=supervisor.worker_id)
    instance.quiet = instance.quiet or settings.log.format == "json"  # of the banner
    if problems := unsafe_packages():
        log.critical("the worker does not start: %s", "; ".join(problems))
        raise WorkerShutdown(os.EX_CONFIG)


@setup_logging.connect
def _keep_logs(**_: Any) -> None:
    """A receiver of this signal keeps Celery from configuring the root logger itself."""


@worker_ready.connect
def _start(sender: Any, **_: Any) -> None:
    def take_work(is_fit: bool) -> None:
        """While it takes no work, it leaves the messages to workers that do."""
        sender.call_soon(sender.add_task_queue if is_fit else sender.cancel_task_queue, QUEUE)

    try:
        supervisor.start(take_work)
    except PortTaken as error:
        log.critical("%s", error)
        raise WorkerShutdown(os.EX_CONFIG) from error


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    """On SIGTERM: the running unit is released, so that the task ends within a batch."""
    supervisor.stop()


@worker_shutdown.connect
def _close(**_: Any) -> None:
    supervisor.close()
