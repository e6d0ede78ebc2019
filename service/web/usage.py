"""`/usage`: what the key has used of its limits."""

from fastapi import APIRouter, Depends, Request, Response

from service.auth.authentication import ReadDep
from service.db.engine import SessionDep
from service.usage.router import RequestsDep, Usage, get_usage
from service.web.admission import logged_in
from service.web.rendering import render

router = APIRouter(include_in_schema=False, dependencies=[Depends(logged_in)])


@router.get("/usage")
def usage_page(request: Request, session: SessionDep, principal: ReadDep, requests: RequestsDep) -> Response:
    used = get_usage(request, session, principal, requests)
    described = {name: field.description for name, field in Usage.model_fields.items() if field.description}
    return render(request, "usage.html", usage=used, described=described)
