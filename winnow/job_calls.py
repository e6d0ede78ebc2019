"""The client's calls for jobs, until they have ended."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Generic, TypeVar

import httpx

from winnow.answers import Answer, Dataset, Event, QueuePlace, SelectionJob, SelectionPlan
from winnow.errors import Unreachable, WinnowError
from winnow.transport import Connection, Json
from winnow.twins import call

J = TypeVar("J", bound=SelectionJob)

_POLL_SECONDS = 2.0
_WAIT_SECONDS = 30.0
_LAST_EVENTS = frozenset({"job.succeeded", "job.failed", "job.cancelled"})


class JobFailed(WinnowError):
    """The awaited job has failed or was cancelled; `job` is its last state, `problem` its error (None: it was cancelled)."""

    def __init__(self, job: SelectionJob) -> None:
        self.job = job
        self.problem = job.error
        cancelled = ("cancelled", f"Job {job.id} was cancelled.")
        super().__init__(None, *(cancelled if job.error is None else (job.error.code, job.error.detail)))


class JobCalls(Connection, Generic[J]):
    """Jobs are posted, awaited and ended. `J` is what a job is in Python."""

    _job_type: type[J]

    @call
    async def create_job(self, /, **request: Any) -> J:
        """Posts a selection job: model, pool, target, budget, and any other field of the request.

        Pool and target are datasets, their ids, or what else the request has for them. The job that is returned has calls of its
        own: `job.wait()`, `job.results()`.
        """
        return await self._one(self._job_type, "POST", "/selection-jobs", json=_request(request))

    @call
    async def plan(self, /, **request: Any) -> SelectionPlan:
        """What a selection job would do and cost; nothing is created. Takes the same fields as `create_job`."""
        return await self._one(SelectionPlan, "POST", "/selection-jobs", json=_request(request) | {"dry_run": True})

    @call
    async def job(self, job_id: str) -> J:
        """The job as it is now: its status, phase, stages and error."""
        return await self._one(self._job_type, "GET", f"/selection-jobs/{job_id}")

    @call
    def jobs(
        self, status: str | None = None, name: str | None = None, labels: Mapping[str, str] | None = None
    ) -> AsyncGenerator[J]:
        """Your jobs, newest first: those in the state, whose name contains `name`, and that have all of the labels."""
        wanted = None if labels is None else [f"{key}:{value}" for key, value in labels.items()]
        return self._pages(self._job_type, "/selection-jobs", status=status, name=name, label=wanted)

    @call
    async def change_job(self, job_id: str, /, **changes: Any) -> J:
        """Changes what the job is called, in any state of it: name (None: none any more), labels (None as a value removes one,
        those that are not named stay)."""
        return await self._one(self._job_type, "PATCH", f"/selection-jobs/{job_id}", json=changes)

    @call
    async def queue_place(self, job_id: str) -> QueuePlace:
        """How many jobs start before a queued one, and when it may start: `starts_at`, or None and `no_estimate` says why."""
        return await self._one(QueuePlace, "GET", f"/selection-jobs/{job_id}/queue")

    @call
    async def delete_job(self, job_id: str) -> None:
        """Deletes a job that has ended; its provenance stays."""
        await self._call("DELETE", f"/selection-jobs/{job_id}")

    @call
    async def cancel(self, job_id: str) -> J:
        """Asks the job to stop; the job that is returned may still be `cancelling`."""
        return await self._one(self._job_type, "POST", f"/selection-jobs/{job_id}/cancel")

    @call
    async def retry(self, job_id: str) -> J:
        """Retries a failed or cancelled job as a new one, which is returned."""
        return await self._one(self._job_type, "POST", f"/selection-jobs/{job_id}/retry")

    @call
    async def reproduce(self, job_id: str) -> J:
        """Posts a job that recomputes a succeeded one from its provenance; returns the new job."""
        return await self._one(self._job_type, "POST", f"/selection-jobs/{job_id}/reproduce")

    @call
    def events(self, job_id: str) -> AsyncGenerator[Event]:
        """What has happened to the job so far, oldest first."""
        return self._pages(Event, f"/selection-jobs/{job_id}/events")

    @call
    async def follow(self, job_id: str, after: int = 0) -> AsyncGenerator[Event]:
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
                            event = self._read(Event, line.removeprefix(b"data: "))
                            after, left = event.id, self._retries
                            yield event
                            if event.type in _LAST_EVENTS:
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
        on_update: Callable[[J], object] | None = None,
        timeout: float | None = None,
        poll_seconds: float = _POLL_SECONDS,
    ) -> J:
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
        seen: J | None = None
        held = 0.0
        while True:
            asked = time.monotonic()
            job = await self._job_after(job_id, held)
            if on_update is not None and job != seen:
                on_update(job)
            seen = job
            if job.status == "succeeded":
                return job
            if job.status in ("failed", "cancelled"):
                raise JobFailed(job)
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"job {job_id} is still {job.status} after {timeout} seconds")
            if (early := held - (time.monotonic() - asked)) > 0:  # the service stops, or does not hold requests
                await self._sleep(min(early, left, _POLL_SECONDS))
            held = min(pause, left)
            if held < 1:  # the service waits for whole seconds
                await self._sleep(held)

    async def _job_after(self, job_id: str, seconds: float) -> J:
        """The job, as soon as it has ended or after so many whole seconds."""
        path = f"/selection-jobs/{job_id}"
        if seconds < 1:
            return await self._one(self._job_type, "GET", path)
        held = {"params": {"wait": int(seconds)}, "timeout": self._held(seconds)}
        return await self._one(self._job_type, "GET", path, **held)


def _request(fields: Json) -> Json:
    """The fields as JSON: a dataset is named by its id."""
    return {name: _named(value) for name, value in fields.items()}


def _named(value: Any) -> Any:
    if isinstance(value, Dataset):
        return value.id
    return value.to_dict() if isinstance(value, Answer) else value
