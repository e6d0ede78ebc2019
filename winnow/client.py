"""The Python client of the service: `Winnow` blocks, `AsyncWinnow` has the same methods for asyncio.

    with Winnow() as winnow:  # the service of `winnow login`, of the environment, or of `winnow up`
        pool = winnow.upload_dataset("pool.jsonl")
        target = winnow.upload_dataset("target.jsonl")
        job = winnow.create_job(model="smollm2-135m-instruct", pool=pool, target=target, budget=60)
        job.wait()  # or: for event in job.follow(): ...
        results = job.results()
        frame = results.to_pandas()
        results.export("selection.parquet")

    async with AsyncWinnow("http://localhost:8000", api_key) as winnow:
        job = await winnow.job("job_...")
        events = [event async for event in job.events()]

Every method raises a `WinnowError` if the service refuses, of a class for each kind of refusal, and `Unreachable` if it does not
respond.
"""

from winnow.account_calls import AccountCalls
from winnow.dataset_calls import DatasetCalls
from winnow.errors import Unreachable, WinnowError
from winnow.handles import AsyncJob, AsyncResults, Job, Results
from winnow.job_calls import J, JobCalls, JobFailed
from winnow.result_calls import R, ResultCalls
from winnow.transport import AsyncConnection, Json, SyncConnection

__all__ = ["AsyncWinnow", "JobFailed", "Json", "Unreachable", "Winnow", "WinnowError"]


class Calls(DatasetCalls, JobCalls[J], ResultCalls[R], AccountCalls):
    """The calls of the service, written once for both clients."""


class Winnow(Calls[Job, Results], SyncConnection):
    """The client for ordinary code: each method returns its result, a list of entries as an iterator."""

    _job_type = Job
    _results_type = Results


class AsyncWinnow(Calls[AsyncJob, AsyncResults], AsyncConnection):
    """The client for asyncio: each method is awaited; a list of entries is read with `async for`."""

    _job_type = AsyncJob
    _results_type = AsyncResults
