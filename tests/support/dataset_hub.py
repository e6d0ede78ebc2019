"""A hub of datasets on loopback: repositories with branches that move, and files that are listed and downloaded."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from support.loopback import Quiet, answering

Files = Mapping[str, bytes]


@dataclass
class DatasetHub:
    """`commits`: (id, commit) -> files by path; `branches`: (id, branch) -> commit; `asked`: the path of each GET of a file.

    A file in `held` is delivered to its half only, until its event is set. `lies`: other bytes than the listing says.
    `tokens`: what was sent as authorization, with the last path it was sent for.
    """

    url: str
    commits: dict[tuple[str, str], Files] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    held: dict[str, threading.Event] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    tokens: dict[str | None, str] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

        with answering(Handler) as url:
            hub = cls(url)
            try:
                yield hub
            finally:
                for event in hub.held.values():
                    event.set()

    def put(self, id: str, files: Files, branch: str = "main") -> str:
        """A new commit at the head of the branch."""
        commit = hashlib.sha1(repr((id, sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[id, commit], self.branches[id, branch] = dict(files), commit
        return commit

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.tokens[request.headers.get("Authorization")] = path
        if path.startswith("/api/datasets/"):
            _send(request, *self._info(path.removeprefix("/api/datasets/")))
        elif path.startswith("/datasets/") and "/resolve/" in path:
            self._file(request, path.removeprefix("/datasets/"))
        else:
            _send(request, 404, {}, b"{}")  # the library asks about itself too

    def _info(self, path: str) -> tuple[int, dict[str, str], bytes]:
        id, _, revision = path.partition("/revision/")
        if not any(known == id for known, _ in self.commits):
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        commit = self.branches.get((id, revision or "main"), revision)
        if (id, commit) not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                **({"lfs": _lfs(content)} if name.endswith((".parquet", ".gz")) else {}),
            }
            for name, content in self.commits[id, commit].items()
        ]
        info = {"_id": "1", "id": id, "sha": commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}
        return 200, {}, json.dumps(info).encode()

    def _file(self, request: BaseHTTPRequestHandler, path: str) -> None:
        id, _, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        files = self.commits.get((id, commit))
        if files is None or name not in files:
            _send(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"{}")
            return
        if name in self.broken:
            _send(request, 500, {}, b"{}")
            return
        content = self.lies.get(name, files[name])
        etag = {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": commit}
        if request.command == "GET":
            self.asked.append(name)
        if request.command == "GET" and name in self.held:
            request.send_response(200)
            for header, value in {**etag, "Content-Length": str(len(content))}.items():
                request.send_header(header, value)
            request.end_headers()
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            self.held[name].wait()
            request.wfile.write(content[len(content) // 2 :])
            return
        _send(request, 200, etag, content)


def _lfs(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}


def _send(request: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes) -> None:
    first = request.headers.get("Range", "").removeprefix("bytes=").rstrip("-")
    if first.isdigit() and 0 < int(first) < len(body) and status == 200:
        status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{len(body) - 1}/{len(body)}"}
        body = body[int(first) :]
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
