"""A hub of models on loopback, which speaks the little that the service asks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Self
from urllib.parse import unquote, urlsplit

from support.loopback import Quiet, answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server knows: (id, revision) -> its files; and what it was asked."""

    url: str
    models: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    failures: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    body: bytes | None = None
    asked: list[str] = field(default_factory=list)

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        class Handler(Quiet, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = hub.answer(self.path)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        with answering(Handler) as url:
            hub = cls(url)
            hub.models["org/model", "main"] = ["config.json", "model.safetensors"]
            hub.models["org/model", "refs/pr/1"] = ["config.json", "model-00001-of-00002.safetensors"]
            hub.models["org/adapter", "main"] = ["adapter_config.json", "adapter_model.safetensors"]
            hub.models["org/pickles", "main"] = ["config.json", "pytorch_model.bin"]
            yield hub

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if not path.startswith("/api/models/"):  # the library asks about itself too
            return 404, {}, b"{}"
        repo, _, revision = unquote(urlsplit(path).path).removeprefix("/api/models/").partition("/revision/")
        self.asked.append(f"{repo}@{revision}")
        if repo in self.failures:
            return *self.failures[repo], b"{}"
        if not any(known == repo for known, _ in self.models):
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if (repo, revision) not in self.models:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        files = [{"rfilename": name} for name in self.models[repo, revision]]
        model = {
            "_id": "1",
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "siblings": files,
            "tags": [],
            "private": False,
        }
        return 200, {}, self.body or json.dumps(model).encode()
