"""The Celery application. A message says only "there may be work": it carries no state, and losing or repeating one changes
nothing, so it is acknowledged early and leaves no result."""

from typing import Any

from celery import Celery
from celery.signals import worker_ready, worker_shutdown, worker_shutting_down

from service.dispatch import QUEUE, TASK
from service.settings import worker_settings
from worker.supervisor import Supervisor

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
    accept_content=["json"],
    task_serializer="json",
)

supervisor = Supervisor(settings)


@app.task(name=TASK, ignore_result=True)
def work() -> None:
    """Does units until there is none to claim."""
    supervisor.drain()


@worker_ready.connect
def _start(**_: Any) -> None:
    supervisor.start()


@worker_shutting_down.connect
def _stop(**_: Any) -> None:
    """First sign of SIGTERM: the running unit is given back, so that the task ends within a batch."""
    supervisor.stop()


@worker_shutdown.connect
def _close(**_: Any) -> None:
    supervisor.close()
