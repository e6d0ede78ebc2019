"""Waiting for the end of an import."""

import asyncio

from fastapi import Request

from service.auth.authentication import require_live
from service.auth.principal import Principal
from service.datasets import imports, service
from service.datasets.schemas import DatasetOut
from service.db.engine import Sessions, run_with_connection


async def until_imported(request: Request, principal: Principal, dataset_id: str, seconds: float) -> DatasetOut:
    """The dataset when its import has ended, or as it is after `seconds`, or when its client has left.

    Raises:
        Unauthorized: the key is not valid any more.
        NotFound: the tenant has no such dataset, or not any more.
        UsedUp: too many requests wait.
    """
    state = request.app.state
    sessions: Sessions = state.sessions
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds

    def describe() -> DatasetOut:
        with sessions() as session:
            require_live(session, principal)
            return imports.describe(session, [service.find(session, principal.tenant_id, dataset_id)])[0]

    async with (
        state.shares.waiters.taken(principal.tenant_id),
        state.notifications.waiting(dataset_id, request) as waiter,
    ):
        while True:
            dataset = await run_with_connection(request, describe)
            left = deadline - loop.time()
            if dataset.status != "importing" or waiter.gone or left <= 0:
                return dataset
            await waiter.wait(left)
