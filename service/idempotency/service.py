"""`Idempotency-Key`: a POST that is sent again has one effect and one answer.

The answer is kept in the transaction of what it tells of: either both are there or neither. While that transaction is open, it
holds a lock on the key, so a crash leaves nothing behind that a later request would have to wait for.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse

from service.database import SessionDep
from service.errors import Conflict, Unprocessable
from service.idempotency import repository
from service.sealing import Sealer, Unsealable
from service.tenants.caller import Caller
from service.tenants.service import CallerDep

HEADER = "Idempotency-Key"
_KEY = r"^[\x21-\x7e]{1,255}$"

KeyHeader = Annotated[
    str | None,
    Header(
        alias=HEADER,
        pattern=_KEY,
        description="Yours, new for each call (a UUID). Sent again within 24 hours, the same request gets the same answer and"
        " has no second effect; another request with it is refused (422), one that comes while the first runs as well (409).",
    ),
]


class Replayed(Exception):
    """The request was answered before; this is the answer."""

    def __init__(self, response: Response) -> None:
        super().__init__("answered before")
        self.response = response


class Once:
    """The one effect of a request. Without a key it only makes the answer."""

    def __init__(
        self, session: Session, sealer: Sealer, caller: Caller, key: str | None, request_sha256: bytes
    ) -> None:
        """Takes the key for the session's transaction.

        Raises:
            Replayed: the request has been answered; its answer.
            Unprocessable: the key was used for another request.
            Conflict: a request with this key is running.
        """
        self._session, self._sealer, self._caller, self._key = session, sealer, caller, key
        self._request_sha256 = request_sha256
        if key is None:
            return
        if not repository.lock_if_free(session, caller.tenant_id, key):
            raise Conflict(
                f"A request with this {HEADER} is running; send it again when it has ended.",
                param=HEADER,
                code="idempotency_key_in_use",
                headers={"Retry-After": "1"},
                retry=True,
            )
        found = repository.find(session, caller.tenant_id, key)
        if found is None:
            return
        if found.request_sha256 != request_sha256:
            raise Unprocessable(
                f"This {HEADER} was used for another request (another call, or another body); use a new one for a new request.",
                param=HEADER,
                code="idempotency_key_reused",
            )
        try:
            body = sealer.unseal(found.sealed_body)
        except Unsealable as error:
            raise Conflict(
                f"The answer to this {HEADER} cannot be read any more: the server's secret key was changed. The request had its"
                " effect; look for it before you send it again with a new key.",
                param=HEADER,
                code="idempotency_answer_lost",
            ) from error
        raise Replayed(Response(body, found.status, {**found.headers, "Idempotent-Replayed": "true"}))

    def keep(self, answer: BaseModel, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The answer, kept with the key in the session's transaction."""
        response = JSONResponse(answer.model_dump(mode="json"), status, headers)
        if self._key is not None:
            kept = {name: value for name, value in response.headers.items() if name != "content-length"}
            repository.put(
                self._session,
                self._caller.tenant_id,
                self._key,
                request_sha256=self._request_sha256,
                status=status,
                headers=kept,
                sealed_body=self._sealer.seal(bytes(response.body)),
            )
        return response


def request_digest(request: Request, body_sha256: bytes) -> bytes:
    """What makes a request the same: method, path, query and body."""
    line = f"{request.method} {request.url.path}?{request.url.query}\n"
    return hashlib.sha256(line.encode() + body_sha256).digest()


async def _digest(request: Request) -> bytes:
    return request_digest(request, hashlib.sha256(await request.body()).digest())


def _once(
    request: Request,
    session: SessionDep,
    caller: CallerDep,
    digest: Annotated[bytes, Depends(_digest)],
    key: KeyHeader = None,
) -> Once:
    return Once(session, request.app.state.sealer, caller, key, digest)


OnceDep = Annotated[Once, Depends(_once)]


def install(app: FastAPI) -> None:
    @app.exception_handler(Replayed)
    async def _replayed(request: Request, replayed: Replayed) -> Any:  # noqa: ARG001
        return replayed.response
