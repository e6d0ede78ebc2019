"""Browsers that log in: by an API key, or by a link that works once; and how a session begins, is recognised and ends.

A cookie holds a random token, of which the database has the HMAC alone. A session is worth what its key is worth: it ends with
the key's revocation or expiry, and at the latest after its own time. The callers commit.
"""

import hmac
import secrets
from dataclasses import replace
from datetime import timedelta

from sqlalchemy.orm import Session

from service.auth import repository
from service.auth.authentication import commit_use, key_digest, principal_of, unauthorized, valid_key
from service.auth.principal import Principal
from service.auth.tables import BrowserSession, LoginLink
from service.http.errors import Unauthorized

LINK_LIFETIME = timedelta(minutes=15)
_MOST = 100
"""Sessions of one key at a time; a further one ends the oldest."""


def begin_by_key(session: Session, key: str, secret_key: str, lifetime: timedelta) -> tuple[Principal, str]:
    """The principal, and the token of a new session.

    Raises:
        Unauthorized: the key is malformed, unknown, expired or revoked.
    """
    return _begin(session, principal_of(valid_key(session, key, secret_key)), secret_key, lifetime)


def begin_by_link(session: Session, link: str, secret_key: str, lifetime: timedelta) -> tuple[Principal, str]:
    """The principal, and the token of a new session; the link is used up.

    Raises:
        Unauthorized: the link is unknown, expired or used, or its key is not valid any more.
    """
    row = repository.key_of_link(session, key_digest(secret_key, link))
    if row is None:
        raise Unauthorized("This login link has expired or has been used. Log in with an API key, or make a new link.")
    return _begin(session, principal_of(row), secret_key, lifetime)


def _begin(session: Session, principal: Principal, secret_key: str, lifetime: timedelta) -> tuple[Principal, str]:
    repository.remove_expired_logins(session)
    repository.remove_oldest_browser_sessions(session, principal.key_id, _MOST - 1)
    token = secrets.token_urlsafe(32)
    expires_at = repository.time_after(session, lifetime)
    session.add(BrowserSession(digest=key_digest(secret_key, token), key_id=principal.key_id, expires_at=expires_at))
    return principal, token


def identify(session: Session, token: str, secret_key: str) -> Principal:
    """The principal of a session. Commits the use of its key; the database session must be new.

    Raises:
        Unauthorized: the session is unknown or has ended, or its key is not valid any more.
    """
    digest = key_digest(secret_key, token)
    row = repository.key_of_browser(session, digest)
    if row is None:
        raise unauthorized("This session has ended.")
    commit_use(session, row)
    return replace(principal_of(row), browser=digest)


def end(session: Session, token: str, secret_key: str) -> bool:
    """False if it had ended before."""
    return repository.end_browser_session(session, key_digest(secret_key, token))


def make_link(session: Session, key: str, secret_key: str) -> str:
    """The token of a new login link of the key.

    Raises:
        Unauthorized: the key is not valid.
    """
    row, token = valid_key(session, key, secret_key), secrets.token_urlsafe(32)
    expires_at = repository.time_after(session, LINK_LIFETIME)
    session.add(LoginLink(digest=key_digest(secret_key, token), key_id=row.id, expires_at=expires_at))
    return token


def form_token(token: str, secret_key: str) -> str:
    """What the forms of a session's pages send back, so that no other site's form is taken for one of them."""
    return key_digest(secret_key, f"form/{token}").hex()


def is_form_token(sent: str, token: str, secret_key: str) -> bool:
    return hmac.compare_digest(sent.encode(), form_token(token, secret_key).encode())
