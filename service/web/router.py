"""All pages in one router."""

from fastapi import APIRouter
from fastapi.responses import Response

from service.web import (
    compare,
    datasets,
    job,
    jobs,
    keys,
    login,
    new_job,
    provenance,
    results,
    samples,
    static_files,
    usage,
    workers,
)
from service.web.rendering import see_other

router = APIRouter(include_in_schema=False)


@router.get("/")
async def home() -> Response:
    return see_other("/jobs")


# `new` stands before what would take it for the id of a job.
_USING = (jobs, new_job, job, datasets, results, samples, compare, provenance)
_ADMINISTERING = (usage, keys, workers)
for part in (static_files, login, *_USING, *_ADMINISTERING):
    router.include_router(part.router)
