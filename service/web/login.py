"""Logging in with an API key or a link that works once, and out."""

from dataclasses import replace

from fastapi import APIRouter, Depends, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.audit import service as audit
from service.auth import authentication, browsers
from service.auth.principal import Principal
from service.db.engine import SessionDep
from service.http.errors import Unauthorized
from service.web import admission
from service.web.admission import FormDep, LoginFormDep, logged_in
from service.web.rendering import render, see_other

router = APIRouter(include_in_schema=False)

_HOME = "/jobs"


@router.get(admission.LOGIN_PATH)
async def login_page(request: Request, next: str = _HOME, link: str = "") -> Response:
    """A link is used by the button of this page, not by its address: what only looks at addresses does not use it up."""
    return render(request, "login.html", next=admission.own_path(next, _HOME), link=link[:100], error=None)


@router.post(admission.LOGIN_PATH)
async def log_in(request: Request, session: SessionDep, form: LoginFormDep) -> Response:
    key, link = str(form.get("key", "")).strip(), str(form.get("link", ""))
    next = admission.own_path(str(form.get("next", "")), _HOME)
    begin = browsers.begin_by_link if link else browsers.begin_by_key
    how = "link" if link else "key"

    def begun() -> tuple[Principal, str]:
        found, token = begin(session, link or key, admission.secret_key(request), admission.lifetime(request))
        principal = replace(found, request_id=request.state.request_id)
        audit.record(session, principal, "session.opened", principal.key_id, by=how)
        session.commit()
        return principal, token

    try:
        principal, token = await run_in_threadpool(begun)
    except Unauthorized as error:
        await run_in_threadpool(session.rollback)
        said = error.detail if link else "This API key is not valid."
        return render(request, "login.html", status_code=error.status, next=next, link="", error=said)
    await authentication.accept(request, principal)
    answer = see_other(next)
    admission.set_cookie(request, answer, token)
    return answer


@router.post("/logout", dependencies=[Depends(logged_in)])
def log_out(request: Request, session: SessionDep, form: FormDep) -> Response:  # noqa: ARG001  # its token is checked
    principal: Principal = request.state.principal
    if browsers.end(session, admission.session_token(request), admission.secret_key(request)):
        audit.record(session, principal, "session.ended", principal.key_id)
    answer = see_other(admission.LOGIN_PATH)
    admission.remove_cookie(request, answer)
    return answer
