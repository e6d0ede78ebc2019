"""Alive and ready."""

import asyncio

import redis.asyncio
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy import Engine

from service.errors import Unavailable, responses
from service.schema import standing
from service.settings import ApiSettings

router = APIRouter(tags=["health"])

_TIMEOUT_SECONDS = 3.0


class Health(BaseModel):
    status: str = Field(default="ok", examples=["ok"])


@router.get("/healthz", summary="The process is alive")
async def healthz() -> Health:
    return Health()


def _check_database(engine: Engine) -> str | None:
    """None where the database answers and holds every migration of this version, else what is wrong."""
    try:
        with engine.connect() as connection:
            found = standing(connection)
    except Exception as error:  # whatever keeps it from answering is the answer
        return f"database: {type(error).__name__}"
    # On a database of a later version this one serves on: so it is during an upgrade.
    if found.is_behind:
        return (
            f"migrations: the database is at {found.current}, this version needs {found.newest}; run `winnow migrate`"
        )
    return None


async def _check_broker(url: str) -> str | None:
    client = redis.asyncio.from_url(url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS)
    try:
        await client.ping()
    except (redis.RedisError, OSError) as error:
        return f"broker: {type(error).__name__}"
    finally:
        await client.aclose()
    return None


@router.get("/readyz", summary="Database, migrations and broker are there", responses=responses(Unavailable))
async def readyz(request: Request) -> Health:
    settings: ApiSettings = request.app.state.settings
    checks = await asyncio.gather(
        asyncio.to_thread(_check_database, request.app.state.engine), _check_broker(settings.broker.url)
    )
    wrong = [check for check in checks if check is not None]
    if wrong:
        raise Unavailable(
            "; ".join(wrong), errors=[{"param": w.partition(":")[0], "message": w} for w in wrong], code="not_ready"
        )
    return Health()
