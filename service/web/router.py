"""All pages in one router."""

from fastapi import APIRouter
from fastapi.responses import Response

from service.web import compare, jobs, login, provenance, results, samples, static_files
from service.web.rendering import see_other

router = APIRouter(include_in_schema=False)


@router.get("/")
async def home() -> Response:
    return see_other("/jobs")


for part in (static_files, login, jobs, results, samples, compare, provenance):
    router.include_router(part.router)
