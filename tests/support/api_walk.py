"""Every route of the API once and more, with requests that succeed: what a test watches while it goes on."""

import gzip
import hashlib
import json
import re
from typing import Any

import httpx

from service.ids import new_id
from support.jobs import HandmadeJobs, plain_rows, published, write_pool
from support.world import DATASETS, JOBS

HOOK = "https://127.0.0.1:8443/hook"


class Walk:
    """Takes a client of any transport; `walked`: the routes that have succeeded, as the OpenAPI document names them."""

    def __init__(self, world: HandmadeJobs, client: httpx.Client) -> None:
        self._world, self._client = world, client
        paths = world.app.openapi()["paths"]
        self._routes = [
            (method.upper(), path, re.compile(re.sub(r"{\w+}", "[^/]+", path)))
            for path, of in paths.items()
            for method in of
        ]
        self.walked: set[tuple[str, str]] = set()

    def missing(self) -> set[tuple[str, str]]:
        return {(method, path) for method, path, _ in self._routes} - self.walked

    def call(self, method: str, url: str, **more: Any) -> httpx.Response:
        answer = self._client.request(method, url, **more)
        assert answer.is_success, (method, url, answer.text)
        for of, path, pattern in self._routes:
            if of == method and pattern.fullmatch(url.partition("?")[0]):
                self.walked.add((of, path))
        return answer

    def all(self, model: str, target: Any = None) -> None:
        for step in (self.system, self.datasets, self.uploads, self.keys, self.webhooks):
            step()
        self.jobs(model, target)
        self.results()
        self.pages()

    def system(self) -> None:
        for path in ("/healthz", "/readyz", "/metrics"):
            self.call("GET", path)
        for path in ("models", "targets", "usage", "audit-log", "workers"):
            self.call("GET", f"/v1/{path}")
        for path in ("/docs", "/docs/start.js", "/docs/swagger-ui.css", "/openapi.json"):
            self.call("GET", path)
        assert self._client.get("/nowhere").status_code == 404

    def pages(self) -> None:
        """The pages of what the other steps have left, and a form that changes something."""
        key = self._client.headers["authorization"].removeprefix("Bearer ")
        assert self._client.post("/login", data={"key": key}).status_code == 303
        job = self.call("GET", JOBS).json()["data"][0]
        pool = self.call("POST", DATASETS, params={"name": "pool"}, content=self.rows(8, "page")).json()["id"]
        paths = ["/jobs", "/jobs/rows", "/jobs/new", "/datasets", f"/datasets/{pool}"]
        for path in (*paths, *(f"/jobs/{job['id']}{part}" for part in ("", "/live", "/log"))):
            assert self._client.get(path, headers={"accept": "text/html"}).status_code == 200, path
        found = re.search(r'name="form_token" value="(\w+)"', self._client.get("/jobs").text)
        assert found is not None
        filled = {"form_token": found[1], "model": job["model"]["name"], "pool": pool, "target": pool, "budget": "2"}
        assert self._client.post("/jobs/new/plan", data=filled).status_code == 200
        assert self._client.post("/jobs/new", data=filled).status_code == 303
        self._client.cookies.clear()

    def rows(self, count: int, tag: str) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in plain_rows(count, tag)).encode()

    def datasets(self) -> None:
        large = self.rows(100_000, "large")
        bad = self.rows(3, "bad") + b"no row\n"
        for name, content, more in (
            ("large", large, {}),
            ("packed", gzip.compress(large), {}),
            ("bad", bad, {"on_bad_row": "skip"}),
        ):
            headers = {"idempotency-key": f"walk-{name}"}
            for _ in range(2):
                made = self.call(
                    "POST", DATASETS, params={"name": name, **more}, content=content, headers=headers
                ).json()
        self.call("POST", DATASETS, params={"name": "form"}, files={"file": ("rows.jsonl", large)})
        self.call("GET", DATASETS)
        one = f"{DATASETS}/{made['id']}"
        self.call("GET", one)
        assert self._client.get(one, params={"wait": 1}).status_code == 200
        self.call("GET", f"{one}/skipped")
        self.call("GET", f"{one}/rows", params={"limit": 2})
        refused = self._client.post(DATASETS, params={"name": "bad"}, content=bad)
        assert refused.status_code == 422
        self.call("DELETE", one)

    def imported(self, hub_id: str) -> None:
        self.call("POST", DATASETS, json={"hub": {"id": hub_id, "config": "main", "split": "train"}})

    def uploads(self) -> None:
        content = self.rows(10, "parts")
        wanted = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for is_kept in (True, False):
            upload = self.call("POST", "/v1/uploads", json=wanted).json()["id"]
            if is_kept:
                self.call("PUT", f"/v1/uploads/{upload}/parts/0", content=content)
            self.call("GET", f"/v1/uploads/{upload}")
            self.call("GET", "/v1/uploads")
            if is_kept:
                self.call("POST", DATASETS, params={"name": "parts", "upload": upload})
            else:
                self.call("DELETE", f"/v1/uploads/{upload}")

    def keys(self) -> None:
        made = self.call("POST", "/v1/keys", json={"name": "another", "scopes": ["read"]}).json()["id"]
        self.call("GET", "/v1/keys")
        self.call("GET", f"/v1/keys/{made}")
        self.call("DELETE", f"/v1/keys/{made}")

    def webhooks(self) -> None:
        one = f"/v1/webhooks/{self.call('POST', '/v1/webhooks', json={'url': HOOK}).json()['id']}"
        self.call("GET", "/v1/webhooks")
        self.call("GET", one)
        self.call("PATCH", one, json={"url": f"{HOOK}/2"})
        self.call("POST", f"{one}/rotate-secret")
        self.call("POST", f"{one}/test")
        delivery = self.call("GET", f"{one}/deliveries").json()["data"][0]["id"]
        self.call("GET", f"{one}/deliveries/{delivery}")
        self.call("POST", f"{one}/deliveries/{delivery}/replay")
        self.call("DELETE", one)

    def jobs(self, model: Any, target: Any = None) -> None:
        pool = self.call("POST", DATASETS, params={"name": "pool"}, content=self.rows(8, "pool")).json()["id"]
        key = {"idempotency-key": new_id("key")}
        body = {"model": model, "pool": pool, "target": target or pool, "budget": 2}
        self.call("POST", JOBS, json={**body, "target": pool, "dry_run": True})
        job = self.call("POST", JOBS, json=body, headers=key).json()["id"]
        self.call("POST", JOBS, json=body, headers=key)
        one = f"{JOBS}/{job}"
        self.call("GET", one)
        self.call("GET", f"{one}/queue")
        self.call("PATCH", one, json={"name": "walked", "labels": {"by": "walk"}})
        self.call("GET", one, params={"wait": 1})
        self.call("GET", JOBS, params={"status": "queued", "name": "walk", "label": ["by:walk"]})
        self.call("GET", f"{one}/events")
        self.call("POST", f"{one}/cancel")
        with self._client.stream("GET", f"{one}/events", headers={"accept": "text/event-stream"}) as stream:
            assert stream.status_code == 200
            next(stream.iter_lines())
        self._world.until("the job ends", lambda: self.call("GET", one).json()["status"] == "cancelled")
        again = self.call("POST", f"{one}/retry").json()["id"]
        self.call("POST", f"{JOBS}/{again}/cancel")
        self.call("DELETE", one)

    def results(self) -> None:
        world = self._world
        content = write_pool(
            world.store, world.folder / "walk", [(f"{i}", "s", {"text": f"x {i}"}) for i in range(20_000)]
        )
        one = f"{JOBS}/{published(world.sessions, world.key, content)}"
        for path in ("results/charts", "weights", "selected", "provenance"):
            self.call("GET", f"{one}/{path}")
        etag = self.call("GET", f"{one}/results").headers["etag"]
        assert self._client.get(f"{one}/results", headers={"if-none-match": etag}).status_code == 304
        self.call("GET", f"{one}/weights", params={"limit": 10_000})
        self.call("GET", f"{one}/weights", params={"stream": True})
        for kind in ("jsonl", "csv", "parquet"):
            for accept in ("identity", "gzip"):
                self.call("GET", f"{one}/export", params={"format": kind}, headers={"accept-encoding": accept})
        small = f"{JOBS}/{world.succeeded_with_results()['id']}"
        self.call("GET", f"{small}/samples/0")
        self.call("GET", f"{small}/samples", params={"id": "0"})
        self.call("POST", f"{small}/reproduce")
