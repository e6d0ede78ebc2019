"""Posted jobs have their plans when they are answered: in tests of something else, with or without the loop that plans them."""

from typing import Any

from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.jobs.first_plans import FirstPlans
from service.ledger.tables import SelectionJob
from support.waiting import until


class PlannedAtOnce:
    """The middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_planned(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 202:
                named = dict(message["headers"]).get(b"location", b"").decode()
                if named.startswith("/v1/selection-jobs/"):
                    await run_in_threadpool(_plan, scope["app"].state, named.rpartition("/")[2])
            await send(message)

        await self._app(scope, receive, send_planned)


def _plan(state: Any, job_id: str) -> None:
    def is_planned() -> bool:
        FirstPlans(state.sessions, state.store, state.settings).write()
        with state.sessions() as session:
            return not session.get_one(SelectionJob, job_id).awaits_plan

    until(f"{job_id} is planned", is_planned, 10)
