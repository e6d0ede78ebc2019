"""`Idempotency-Key`: a repeated POST has one effect and one answer.

The answer is written in the transaction of the effect: either both are there or neither. While that transaction is open, it holds
a lock on the key, so a crash leaves nothing behind that would block a later request.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

from fastapi import Depends, FastAPI, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse

from service.auth.authentication import PrincipalDep
from service.auth.principal import Principal
from service.db.engine import SessionDep
from service.db.locks import try_advisory_lock
from service.http.errors import Conflict, Unprocessable
from service.idempotency import repository
from service.storage.encryption import DecryptionError, Encryptor

HEADER = "Idempotency-Key"
_KEY = r"^[\x21-\x7e]{1,255}$"

KeyHeader = Annotated[
    str | None,
    Header(
        alias=HEADER,
        pattern=_KEY,
        description="Chosen by you, new for each call (a UUID). Within 24 hours, the same request gets the same answer and"
        " has no second effect; a different request is refused (422). One that arrives while the first runs is refused (409)"
        " or gets the answer of the first.",
    ),
]


class Replayed(Exception):
    """The request was answered before; this is the answer."""

    def __init__(self, response: Response) -> None:
        super().__init__("answered before")
        self.response = response


class IdempotentRequest:
    """A request whose effect and answer are written in one transaction. Without a key, nothing is kept.

    Call `begin` before the effect and `keep` after it, in the effect's transaction; before lengthy work, call `replay` first, so
    that a repeated request skips it.
    """

    def __init__(self, encryptor: Encryptor, principal: Principal, key: str | None, request_sha256: bytes) -> None:
        self._encryptor, self._tenant_id = encryptor, principal.tenant_id
        self.key, self._request_sha256 = key, request_sha256

    @property
    def lock(self) -> str | None:
        """The advisory lock that is held while the effect is written; None without a key."""
        return None if self.key is None else f"idempotency/{self._tenant_id}/{self.key}"

    def begin(self, session: Session) -> None:
        """Takes the key until the transaction ends.

        Raises:
            Replayed: the request has been answered; its answer.
            Unprocessable: the key was used for another request.
            Conflict: a request with this key is running.
        """
        if self.lock is not None and not try_advisory_lock(session, self.lock):
            raise in_use()
        self.replay(session)

    def replay(self, session: Session) -> None:
        """Answers a request that was answered before.

        Raises:
            Replayed: the request has been answered; its answer.
            Unprocessable: the key was used for another request.
            Conflict: the answer cannot be decrypted any more.
        """
        found = None if self.key is None else repository.find(session, self._tenant_id, self.key)
        if found is not None:
            self.answer_again(found)

    def answer_again(self, found: Any) -> NoReturn:
        """Answers with a kept answer: a row of `IdempotencyKey`, or its columns. It raises as `replay` does."""
        if found.request_sha256 != self._request_sha256:
            raise Unprocessable(
                f"This {HEADER} was already used for a different request (call or body); use a new key for a new request.",
                param=HEADER,
                code="idempotency_key_reused",
            )
        try:
            body = self._encryptor.decrypt(found.sealed_body)
        except DecryptionError as error:
            raise Conflict(
                f"The answer to this {HEADER} can no longer be decrypted: the server's secret key has changed. The request took"
                " effect; check its result before you repeat it with a new key.",
                param=HEADER,
                code="idempotency_answer_lost",
            ) from error
        raise Replayed(Response(body, found.status, {**found.headers, "Idempotent-Replayed": "true"}))

    def keep(
        self, session: Session, answer: BaseModel, status: int, headers: Mapping[str, str] | None = None
    ) -> JSONResponse:
        """The answer, kept with the key in the session's transaction."""
        response = JSONResponse(answer.model_dump(mode="json"), status, headers)
        if (kept := self.sealed(response)) is not None:
            repository.put(session, self._tenant_id, **kept)
        return response

    def sealed(self, response: Response) -> dict[str, Any] | None:
        """The columns under which an answer is kept, but for its tenant's; None: it is not."""
        if self.key is None:
            return None
        return {
            "key": self.key,
            "request_sha256": self._request_sha256,
            "status": response.status_code,
            "headers": {name: value for name, value in response.headers.items() if name != "content-length"},
            "sealed_body": self._encryptor.encrypt(bytes(response.body)),
        }


def in_use() -> Conflict:
    """Of a key under which another request runs."""
    return Conflict(
        f"A request with this {HEADER} is still running; retry when it has finished.",
        param=HEADER,
        code="idempotency_key_in_use",
        headers={"Retry-After": "1"},
        retry=True,
    )


def is_answered(session: Session, principal: Principal, key: str) -> bool:
    """Whether an answer is kept under the key, to this request or to another one."""
    return repository.find(session, principal.tenant_id, key) is not None


def request_digest(request: Request, body_sha256: bytes) -> bytes:
    """Identifies a request by method, path, query and body."""
    line = f"{request.method} {request.url.path}?{request.url.query}\n"
    return hashlib.sha256(line.encode() + body_sha256).digest()


async def _digest(request: Request) -> bytes:
    return request_digest(request, hashlib.sha256(await request.body()).digest())


async def _keyed(
    request: Request,
    principal: PrincipalDep,
    digest: Annotated[bytes, Depends(_digest)],
    key: KeyHeader = None,
) -> IdempotentRequest:
    return IdempotentRequest(request.app.state.encryptor, principal, key, digest)


# For a route that looks itself whether the request was answered.
KeyedDep = Annotated[IdempotentRequest, Depends(_keyed)]


def _unanswered(session: SessionDep, idempotent: KeyedDep) -> IdempotentRequest:
    idempotent.replay(session)
    return idempotent


# For a route that does lengthy work before it calls `begin`.
UnansweredDep = Annotated[IdempotentRequest, Depends(_unanswered)]


def _begun(session: SessionDep, idempotent: UnansweredDep) -> IdempotentRequest:
    idempotent.begin(session)
    return idempotent


IdempotentDep = Annotated[IdempotentRequest, Depends(_begun)]


def install(app: FastAPI) -> None:
    @app.exception_handler(Replayed)
    async def _replayed(request: Request, replayed: Replayed) -> Any:  # noqa: ARG001
        return replayed.response
