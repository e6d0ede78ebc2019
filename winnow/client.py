"""The Python client of the service: `Winnow` blocks, `AsyncWinnow` has the same methods for asyncio.

    with Winnow("http://localhost:8000", api_key) as winnow:
        pool = winnow.upload_dataset("pool.jsonl")
        target = winnow.upload_dataset("target.jsonl")
        job = winnow.create_job(model="smollm2-135m-instruct", pool=pool["id"], target=target["id"], budget=60)
        winnow.wait(job["id"], on_update=print)  # or: for event in winnow.follow(job["id"]): ...
        winnow.export(job["id"], "selection.parquet", selected_only=True, include="messages")

    async with AsyncWinnow("http://localhost:8000", api_key) as winnow:
        job = await winnow.job("job_...")
        events = [event async for event in winnow.events(job["id"])]

Every method raises `WinnowError` if the service refuses, and its subclass `Unreachable` if it does not respond.
"""

import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Literal, cast

import httpx

from winnow.dataset_calls import DatasetCalls
from winnow.transport import AsyncConnection, Json, SyncConnection, Unreachable, WinnowError, call

__all__ = ["AsyncWinnow", "JobFailed", "Json", "Unreachable", "Winnow", "WinnowError"]

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


class Calls(DatasetCalls):
    """The calls of the service, written once for both clients."""

    @call
    async def models(self) -> list[Json]:
        """The registered models; a job may also use one from the hub."""
        return cast(list[Json], (await self._json("GET", "/models"))["data"])

    @call
    async def create_job(self, /, **request: Any) -> Json:
        """Posts a selection job: model, pool, target, budget, and any other field of the request."""
        return await self._json("POST", "/selection-jobs", json=request)

    @call
    async def plan(self, /, **request: Any) -> Json:
        """What a selection job would do and cost; nothing is created. Takes the same fields as `create_job`."""
        return await self._json("POST", "/selection-jobs", json={**request, "dry_run": True})

    @call
    async def job(self, job_id: str) -> Json:
        """The job as it is now: its status, phase, stages and error."""
        return await self._json("GET", f"/selection-jobs/{job_id}")

    @call
    def jobs(self, status: str | None = None) -> AsyncGenerator[Json]:
        """Your jobs, newest first."""
        return self._pages("/selection-jobs", {"status": status})

    @call
    async def delete_job(self, job_id: str) -> None:
        """Deletes a job that has ended; its provenance stays."""
        await self._call("DELETE", f"/selection-jobs/{job_id}")

    @call
    async def cancel(self, job_id: str) -> Json:
        """Asks the job to stop; the job that is returned may still be `cancelling`."""
        return await self._json("POST", f"/selection-jobs/{job_id}/cancel")

    @call
    async def retry(self, job_id: str) -> Json:
        """Retries a failed or cancelled job as a new one, which is returned."""
        return await self._json("POST", f"/selection-jobs/{job_id}/retry")

    @call
    async def reproduce(self, job_id: str) -> Json:
        """Posts a job that recomputes a succeeded one from its provenance; returns the new job."""
        return await self._json("POST", f"/selection-jobs/{job_id}/reproduce")

    @call
    def events(self, job_id: str) -> AsyncGenerator[Json]:
        """What has happened to the job so far, oldest first."""
        return self._pages(f"/selection-jobs/{job_id}/events", {})

    @call
    async def follow(self, job_id: str, after: int = 0) -> AsyncGenerator[Json]:
        """The events of the job, each as it happens, oldest first; ends with the job.

        A stream that is interrupted is continued where it stopped.

        Args:
            after: the `id` of an event; only later ones are yielded.

        Raises:
            Unreachable: several streams in succession were interrupted before they had sent anything.
        """
        left = self._retries
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            try:
                async with self._stream(f"/selection-jobs/{job_id}/events", {}, headers) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        return
                    async for line in self._lines(response):
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
            await self._sleep(_POLL_SECONDS)

    @call
    async def wait(
        self,
        job_id: str,
        on_update: Callable[[Json], object] | None = None,
        timeout: float | None = None,
        poll_seconds: float = _POLL_SECONDS,
    ) -> Json:
        """Returns the job once it has succeeded; `on_update` is called with the job whenever it has changed.

        Args:
            timeout: seconds to wait at most; the job goes on regardless.
            poll_seconds: how often to look for changes if there is an `on_update`. The end is reported at once.

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
            job = await self._job_after(job_id, held)
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
                await self._sleep(min(early, left, _POLL_SECONDS))
            held = min(pause, left)
            if held < 1:  # the service waits for whole seconds
                await self._sleep(held)

    async def _job_after(self, job_id: str, seconds: float) -> Json:
        """The job, as soon as it has ended or after so many whole seconds."""
        if seconds < 1:
            return await self._json("GET", f"/selection-jobs/{job_id}")
        usual = self._http.timeout
        timeout = httpx.Timeout(usual.connect, read=None if usual.read is None else usual.read + seconds)
        return await self._json("GET", f"/selection-jobs/{job_id}", params={"wait": int(seconds)}, timeout=timeout)

    @call
    async def results(self, job_id: str) -> Json:
        """The summary of a succeeded job."""
        return await self._json("GET", f"/selection-jobs/{job_id}/results")

    @call
    async def charts(self, job_id: str) -> Json:
        """What pictures of the result are drawn from: histograms, pairs, sources, targets, a map, other budgets.

        Raises:
            WinnowError: 404 `no_charts`, the job is of a version that made none.
        """
        return await self._json("GET", f"/selection-jobs/{job_id}/results/charts")

    @call
    async def provenance(self, job_id: str, chunks: bool = False) -> Json:
        """The audit record of a succeeded job; `chunks` adds the leaves of its Merkle tree."""
        params = {"chunks": "true"} if chunks else {}
        return await self._json("GET", f"/selection-jobs/{job_id}/provenance", params=params)

    @call
    def audit_log(self, /, **filters: str | None) -> AsyncGenerator[Json]:
        """Who did what in the tenant, newest first; needs a key with the scope admin.

        Args:
            filters: action, object_id, key_id, created_after, created_before.
        """
        return self._pages("/audit-log", filters)

    @call
    def selected(self, job_id: str) -> AsyncGenerator[Json]:
        """The selected samples in rank order."""
        return self._pages(f"/selection-jobs/{job_id}/selected", {})

    @call
    async def sample(self, job_id: str, index: int, *, landmarks: int = 10, target: int | None = None) -> Json:
        """One sample of the pool and the explanation of its influence: on every target, and through which landmarks.

        Args:
            landmarks: how many of those that contributed most are named, at most 100.
            target: index of a target sample, to explain the influence on it alone; None: the mean over all.
        """
        params = {"landmarks": landmarks} | ({} if target is None else {"target": target})
        return await self._json("GET", f"/selection-jobs/{job_id}/samples/{index}", params=params)

    @call
    async def weights(self, job_id: str) -> AsyncGenerator[Json]:
        """Every sample of the pool in order: index, id, source, influence (None: it took no part), weight, exact.

        Raises:
            Unreachable: the stream was interrupted; the entries yielded so far are correct.
        """
        async with self._stream(f"/selection-jobs/{job_id}/weights", {"stream": "true"}) as response:
            async for line in self._lines(response):
                yield json.loads(line)

    @call
    async def export(
        self,
        job_id: str,
        path: str | os.PathLike[str],
        format: Literal["jsonl", "csv", "parquet"] | None = None,
        selected_only: bool = False,
        include: Literal["messages"] | None = None,
        escape_formulas: bool = True,
    ) -> Path:
        """Downloads all samples, or the selection; the file appears only once it is complete.

        Args:
            format: None: by the suffix of the path.
            include: "messages" adds the samples' content; uploaded again, the file gives the same samples.
            escape_formulas: in CSV, an apostrophe goes before an id, source or text that a spreadsheet would take for a formula.

        Raises:
            ValueError: neither `format` nor the suffix of the path names one.
        """
        path = Path(path)
        chosen = format or _SUFFIXES.get(path.suffix)
        if chosen is None:
            raise ValueError(f"path: {path.name} ends in none of {', '.join(_SUFFIXES)}; pass the format")
        params = {"format": chosen, "selected_only": str(selected_only).lower()}
        if include is not None:
            params["include"] = include
        if not escape_formulas:
            params["escape_formulas"] = "false"
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            async with self._stream(f"/selection-jobs/{job_id}/export", params) as response:
                with part.open("xb") as file:
                    async for chunk in self._chunks(response):
                        file.write(chunk)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    @call
    async def create_key(self, /, name: str, **request: Any) -> Json:
        """Makes an API key of your tenant; its `key` is shown only this once.

        Args:
            request: scopes, expires_at or expires_in_days, limits.
        """
        return await self._json("POST", "/keys", json={"name": name, **request})

    @call
    def keys(self) -> AsyncGenerator[Json]:
        """Your tenant's API keys, newest first, revoked ones too."""
        return self._pages("/keys", {})

    @call
    async def revoke_key(self, key_id: str) -> None:
        """Revokes an API key; safe to repeat."""
        await self._call("DELETE", f"/keys/{key_id}")

    @call
    async def create_webhook(self, /, url: str, **request: Any) -> Json:
        """Registers a URL to be notified of your jobs; its `secret`, for a Standard Webhooks library, is shown only this once.

        Args:
            request: events, description.
        """
        return await self._json("POST", "/webhooks", json={"url": url, **request})

    @call
    def webhooks(self) -> AsyncGenerator[Json]:
        """Your tenant's webhooks, newest first."""
        return self._pages("/webhooks", {})

    @call
    async def change_webhook(self, /, webhook_id: str, **changes: Any) -> Json:
        """Changes url, events, description or enabled."""
        return await self._json("PATCH", f"/webhooks/{webhook_id}", json=changes)

    @call
    async def delete_webhook(self, webhook_id: str) -> None:
        """Deletes a webhook with its deliveries."""
        await self._call("DELETE", f"/webhooks/{webhook_id}")

    @call
    async def rotate_webhook_secret(self, webhook_id: str) -> Json:
        """Makes a new `secret`; for 24 hours messages are also signed with the previous one."""
        return await self._json("POST", f"/webhooks/{webhook_id}/rotate-secret")

    @call
    async def test_webhook(self, webhook_id: str) -> Json:
        """Sends a message of the type `webhook.test`; returns its delivery."""
        return await self._json("POST", f"/webhooks/{webhook_id}/test")

    @call
    def deliveries(self, webhook_id: str, state: str | None = None) -> AsyncGenerator[Json]:
        """The messages of a webhook, newest first."""
        return self._pages(f"/webhooks/{webhook_id}/deliveries", {"state": state})

    @call
    async def delivery(self, webhook_id: str, delivery_id: str) -> Json:
        """A message with its payload and every attempt to deliver it."""
        return await self._json("GET", f"/webhooks/{webhook_id}/deliveries/{delivery_id}")

    @call
    async def replay(self, webhook_id: str, delivery_id: str) -> Json:
        """Resends a message under the same id."""
        return await self._json("POST", f"/webhooks/{webhook_id}/deliveries/{delivery_id}/replay")

    @call
    async def usage(self) -> Json:
        """What your key has used of its limits."""
        return await self._json("GET", "/usage")


class Winnow(Calls, SyncConnection):
    """The client for ordinary code: each method returns its result, a list of entries as an iterator."""


class AsyncWinnow(Calls, AsyncConnection):
    """The client for asyncio: each method is awaited; a list of entries is read with `async for`."""
