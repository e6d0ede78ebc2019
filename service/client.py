"""A synchronous Python client of the service.

with Winnow("http://localhost:8000", api_key) as winnow:
    pool = winnow.upload_dataset("pool.jsonl")
    target = winnow.upload_dataset("target.jsonl")
    job = winnow.create_job(model="smollm2-135m-instruct", pool=pool["id"], target=target["id"], budget=60)
    winnow.wait(job["id"], on_update=print)  # or: for event in winnow.follow(job["id"]): ...
    winnow.export(job["id"], "selection.parquet", selected_only=True, include="messages")
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import httpx

from service.transport import Connection, Json, Unreachable, WinnowError

__all__ = ["JobFailed", "Json", "Unreachable", "Winnow", "WinnowError"]

_POLL_SECONDS = 2.0
_WAIT_SECONDS = 30.0
_LAST_EVENTS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})
_SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


class JobFailed(WinnowError):
    """The awaited job has failed or was cancelled; `job` is its last state, `problem` its error."""

    def __init__(self, job: Json) -> None:
        self.job = job
        self.problem: Json = job.get("error") or {"code": "cancelled", "detail": f"Job {job['id']} was cancelled."}
        super().__init__(None, self.problem["code"], self.problem["detail"])


class Winnow(Connection):
    """The calls of the service, as methods; close it, or use it in a `with` block."""

    def upload_dataset(
        self,
        source: str | os.PathLike[str] | bytes,
        name: str | None = None,
        format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = "auto",
    ) -> Json:
        """Uploads JSONL, gzipped JSONL or Parquet; a file is streamed.

        Args:
            source: the path of a file, or the content itself.
            name: None: the file's name.
            format: the form of the rows; it needs to be named only where rows fit more than one.

        Raises:
            ValueError: content without a name.
            WinnowError: `errors` names the rows that cannot be used.
        """
        if name is None:
            if isinstance(source, bytes):
                raise ValueError("name: content needs a name; pass one")
            name = Path(source).name
        # The answer comes once every row was checked, which may take minutes.
        timeout = httpx.Timeout(self._http.timeout.connect, read=None)
        options: Json = {"params": {"name": name, "format": format}, "timeout": timeout}

        headers = {"Idempotency-Key": str(uuid.uuid4())}

        def send() -> httpx.Response:
            if isinstance(source, bytes):
                return self._http.post("/datasets", content=source, headers=headers, **options)
            with open(source, "rb") as file:
                return self._http.post("/datasets", content=file, headers=headers, **options)

        return cast(Json, self._send("POST", send).json())

    def datasets(self) -> Iterator[Json]:
        """Your datasets, newest first."""
        return self._pages("/datasets", {})

    def delete_dataset(self, dataset_id: str) -> None:
        self._call("DELETE", f"/datasets/{dataset_id}")

    def models(self) -> list[Json]:
        """The registered models; a job may name those of the hub beside them."""
        return cast(list[Json], self._json("GET", "/models")["data"])

    def create_job(self, **request: Any) -> Json:
        """Posts a selection job: model, pool, target, budget, and what else the API knows."""
        return self._json("POST", "/selection-jobs", json=request)

    def plan(self, **request: Any) -> Json:
        """What a selection job would do and cost; nothing is created. Takes what `create_job` takes."""
        return self._json("POST", "/selection-jobs", json={**request, "dry_run": True})

    def job(self, job_id: str) -> Json:
        return self._json("GET", f"/selection-jobs/{job_id}")

    def jobs(self, status: str | None = None) -> Iterator[Json]:
        """Your jobs, newest first."""
        return self._pages("/selection-jobs", {} if status is None else {"status": status})

    def delete_job(self, job_id: str) -> None:
        """Deletes a job that has ended; its provenance stays."""
        self._call("DELETE", f"/selection-jobs/{job_id}")

    def cancel(self, job_id: str) -> Json:
        """Asks the job to stop; it may still be `cancelling` in the answer."""
        return self._json("POST", f"/selection-jobs/{job_id}/cancel")

    def retry(self, job_id: str) -> Json:
        """Posts a failed or cancelled job again; returns the new one."""
        return self._json("POST", f"/selection-jobs/{job_id}/retry")

    def reproduce(self, job_id: str) -> Json:
        """Posts a job that computes a succeeded one anew from its provenance; returns the new one."""
        return self._json("POST", f"/selection-jobs/{job_id}/reproduce")

    def events(self, job_id: str) -> Iterator[Json]:
        """What has happened to the job so far, oldest first."""
        return self._pages(f"/selection-jobs/{job_id}/events", {})

    def follow(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """What happens to the job, each event as it happens, oldest first; ends when the job has.

        A stream that breaks off is continued where it was.

        Args:
            after: the `id` of an event: only those that follow it.

        Raises:
            Unreachable: several streams one after the other broke off before they had sent anything.
        """
        left = self._retries
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            try:
                with self._stream(f"/selection-jobs/{job_id}/events", {}, headers) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        return
                    for line in _lines(response):
                        if line.startswith(b"data: "):
                            event = json.loads(line.removeprefix(b"data: "))
                            after, left = event["id"], self._retries
                            yield event
                            if event["type"] in _LAST_EVENTS:
                                return
            except Unreachable:
                left -= 1
                if left < 0:
                    raise
            time.sleep(_POLL_SECONDS)

    def wait(
        self,
        job_id: str,
        on_update: Callable[[Json], object] | None = None,
        timeout: float | None = None,
        poll_seconds: float = _POLL_SECONDS,
    ) -> Json:
        """Returns when the job has succeeded; `on_update` gets the job whenever it has changed.

        Args:
            timeout: seconds to wait at most; the job goes on all the same.
            poll_seconds: how often to look for a change to tell `on_update` of. The end is told of at once.

        Raises:
            JobFailed: it failed or was cancelled.
            TimeoutError: it had not ended in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pause = _WAIT_SECONDS if on_update is None else poll_seconds
        seen: Json | None = None
        held = 0.0
        while True:
            asked = time.monotonic()
            job = self._job_after(job_id, held)
            if on_update is not None and job != seen:
                on_update(job)
            seen = job
            if job["status"] == "succeeded":
                return job
            if job["status"] in ("failed", "cancelled"):
                raise JobFailed(job)
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"job {job_id} is still {job['status']} after {timeout} seconds")
            if (early := held - (time.monotonic() - asked)) > 0:  # the service stops, or does not hold requests
                time.sleep(min(early, left, _POLL_SECONDS))
            held = min(pause, left)
            if held < 1:  # the service waits for whole seconds
                time.sleep(held)

    def _job_after(self, job_id: str, seconds: float) -> Json:
        """The job, when it has ended or so many whole seconds later."""
        if seconds < 1:
            return self.job(job_id)
        usual = self._http.timeout
        timeout = httpx.Timeout(usual.connect, read=None if usual.read is None else usual.read + seconds)
        return self._json("GET", f"/selection-jobs/{job_id}", params={"wait": int(seconds)}, timeout=timeout)

    def results(self, job_id: str) -> Json:
        """The summary of a succeeded job."""
        return self._json("GET", f"/selection-jobs/{job_id}/results")

    def provenance(self, job_id: str, chunks: bool = False) -> Json:
        """The audit record of a succeeded job; `chunks` adds the hashes that its Merkle root is over."""
        params = {"chunks": "true"} if chunks else {}
        return self._json("GET", f"/selection-jobs/{job_id}/provenance", params=params)

    def audit_log(self, **filters: str | None) -> Iterator[Json]:
        """Who did what in the tenant, newest first: for a key with the scope admin.

        Args:
            filters: action, object_id, key_id, created_after, created_before.
        """
        return self._pages("/audit-log", {name: value for name, value in filters.items() if value is not None})

    def selected(self, job_id: str) -> Iterator[Json]:
        """The selected samples in rank order."""
        return self._pages(f"/selection-jobs/{job_id}/selected", {})

    def sample(self, job_id: str, index: int, *, landmarks: int = 10, target: int | None = None) -> Json:
        """One sample of the pool, and why it has its influence: on every target, and by which landmarks.

        Args:
            landmarks: how many of those that spoke for it are named, at most 100.
            target: the index of a target sample, to explain the influence on it alone; None: the mean over all.
        """
        params = {"landmarks": landmarks} | ({} if target is None else {"target": target})
        return self._json("GET", f"/selection-jobs/{job_id}/samples/{index}", params=params)

    def weights(self, job_id: str) -> Iterator[Json]:
        """Every sample of the pool in order: index, id, source, influence, weight, exact.

        Raises:
            Unreachable: the stream broke off; what was yielded until then is right.
        """
        with self._stream(f"/selection-jobs/{job_id}/weights", {"stream": "true"}) as response:
            yield from map(json.loads, _lines(response))

    def export(
        self,
        job_id: str,
        path: str | os.PathLike[str],
        format: Literal["jsonl", "csv", "parquet"] | None = None,
        selected_only: bool = False,
        include: Literal["messages"] | None = None,
    ) -> Path:
        """Downloads all samples, or the selection; the file appears only once it is whole.

        Args:
            format: None: by the suffix of the path.
            include: "messages" adds the samples' content (not in CSV).

        Raises:
            ValueError: the path has no suffix that names a format, and none is given.
        """
        path = Path(path)
        chosen = format or _SUFFIXES.get(path.suffix)
        if chosen is None:
            raise ValueError(f"path: {path.name} ends in none of {', '.join(_SUFFIXES)}; pass format")
        params = {"format": chosen, "selected_only": str(selected_only).lower()}
        if include is not None:
            params["include"] = include
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            with self._stream(f"/selection-jobs/{job_id}/export", params) as response, part.open("xb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    def create_key(self, name: str, **request: Any) -> Json:
        """Makes an API key of your tenant; `key` in the answer is shown nowhere again.

        Args:
            request: scopes, expires_at or expires_in_days, limits.
        """
        return self._json("POST", "/keys", json={"name": name, **request})

    def keys(self) -> Iterator[Json]:
        """Your tenant's API keys, newest first, revoked ones too."""
        return self._pages("/keys", {})

    def revoke_key(self, key_id: str) -> None:
        self._call("DELETE", f"/keys/{key_id}")

    def create_webhook(self, url: str, **request: Any) -> Json:
        """Has you told of your jobs; `secret` in the answer, for a Standard Webhooks library, is shown nowhere again.

        Args:
            request: events, description.
        """
        return self._json("POST", "/webhooks", json={"url": url, **request})

    def webhooks(self) -> Iterator[Json]:
        """Newest first."""
        return self._pages("/webhooks", {})

    def change_webhook(self, webhook_id: str, **changes: Any) -> Json:
        """Changes url, events, description or enabled."""
        return self._json("PATCH", f"/webhooks/{webhook_id}", json=changes)

    def delete_webhook(self, webhook_id: str) -> None:
        self._call("DELETE", f"/webhooks/{webhook_id}")

    def rotate_webhook_secret(self, webhook_id: str) -> Json:
        """A new `secret`; for 24 hours messages are signed with the one before it as well."""
        return self._json("POST", f"/webhooks/{webhook_id}/rotate-secret")

    def test_webhook(self, webhook_id: str) -> Json:
        """Sends a message of the type `webhook.test`; its delivery."""
        return self._json("POST", f"/webhooks/{webhook_id}/test")

    def deliveries(self, webhook_id: str, state: str | None = None) -> Iterator[Json]:
        """The messages of a webhook, newest first."""
        return self._pages(f"/webhooks/{webhook_id}/deliveries", {} if state is None else {"state": state})

    def delivery(self, webhook_id: str, delivery_id: str) -> Json:
        """A message with its payload and every attempt to deliver it."""
        return self._json("GET", f"/webhooks/{webhook_id}/deliveries/{delivery_id}")

    def replay(self, webhook_id: str, delivery_id: str) -> Json:
        """Sends a message again, under the same id."""
        return self._json("POST", f"/webhooks/{webhook_id}/deliveries/{delivery_id}/replay")

    def usage(self) -> Json:
        """What your key has used of its limits."""
        return self._json("GET", "/usage")


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Split at line feeds only: text may hold the other characters at which str.splitlines breaks."""
    rest = b""
    for chunk in response.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
