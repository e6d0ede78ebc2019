"""A hub on loopback that dataset repositories are pushed to."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Self

from support.loopback import Quiet, answering


@dataclass
class PushHub:
    """`repositories`: id -> whether it is private; `files`: (id, path) -> content; `tokens`: all that were sent."""

    url: str
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[tuple[str, str], bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(*hub._get(self.path))

            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._send(*hub._post(self.path, body))

            def _send(self, status: int, answer: Any) -> None:
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        with answering(Handler) as url:
            hub = cls(url)
            yield hub

    def of(self, repository: str) -> dict[str, bytes]:
        return {path: content for (id, path), content in self.files.items() if id == repository}

    def _get(self, path: str) -> tuple[int, Any]:
        id = path.removeprefix("/api/datasets/").partition("/revision/")[0].partition("?")[0]
        if id not in self.repositories:
            return 404, {}
        return 200, {"_id": "1", "id": id, "private": self.repositories[id], "tags": [], "downloads": 0, "siblings": []}

    def _post(self, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            id = f"{asked['organization']}/{asked['name']}"
            is_private = asked.get("private", asked.get("visibility") == "private")
            status = 409 if id in self.repositories else 200
            self.repositories.setdefault(id, is_private)
            return status, {"url": f"{self.url}/datasets/{id}"}
        owner, _, rest = path.removeprefix("/api/datasets/").partition("/")
        name, _, action = rest.partition("/")
        id = f"{owner}/{name}"
        if action.startswith("preupload/"):
            asked = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return 200, {"files": asked}
        if action.startswith("commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[id, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = "c" * 40
            return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/datasets/{id}/commit/{commit}"}
        return 200, {"errors": [], "warnings": []}  # whether the card's head is valid
