"""`/healthz`: the process is alive. `/readyz`: what every request needs is there."""

import asyncio

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from service.health.checks import System, run_checks
from service.http.errors import Unavailable, responses

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: str = Field(default="ok", examples=["ok"])


@router.get("/healthz", summary="The process is alive")
async def healthz() -> Health:
    return Health()


@router.get(
    "/readyz",
    summary="Database, migrations, broker and the database's artifact store are available",
    responses=responses(Unavailable),
)
async def readyz(request: Request) -> Health:
    system = System(request.app.state.settings, request.app.state.engine)
    results = await asyncio.to_thread(run_checks, system, "database", "migrations", "broker", "pair")
    failed = [result for result in results if result.level == "FAIL"]
    if failed:
        problems = {result.name: result.error or f"{result.detail}; {result.remedy}" for result in failed}
        errors = [{"param": name, "message": f"{name}: {problem}"} for name, problem in problems.items()]
        raise Unavailable("; ".join(error["message"] for error in errors), errors=errors, code="not_ready")
    return Health()
