"""Whose key a request carries, as far as earlier requests have shown: so that it waits with its tenant's, not with all others."""

from fastapi import Request

_MOST = 10_000


class Callers:
    """Keeps no key, only Python's hash of the header, which no client can compute. It decides about nothing but the order."""

    def __init__(self) -> None:
        self._tenants: dict[int, str] = {}

    def remember(self, request: Request, tenant_id: str) -> None:
        """For a request that was authenticated."""
        if len(self._tenants) >= _MOST:
            self._tenants.clear()
        self._tenants[self._header(request)] = tenant_id

    def tenant_of(self, request: Request) -> str:
        """The tenant, or what all who are not known have in common."""
        return self._tenants.get(self._header(request), "")

    @staticmethod
    def _header(request: Request) -> int:
        return hash(request.headers.get("authorization") or request.headers.get("cookie"))
