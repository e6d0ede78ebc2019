"""A job and its results as objects that have calls of their own, for both clients."""

import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from winnow import html
from winnow.answers import Event, Provenance, ResultCharts, Sample, Selected, SelectionJob, SelectionResult, Weight
from winnow.optional import require
from winnow.transport import Connection, Handle
from winnow.twins import Blocking, NonBlocking, call

if TYPE_CHECKING:  # imported by the methods that need them
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset

J = TypeVar("J")
R = TypeVar("R")


class _JobHandle(SelectionJob, Handle):
    def _become(self, other: SelectionJob) -> None:
        """Takes the state of the same job as it was read later."""
        for name in ("__dict__", "__pydantic_fields_set__", "__pydantic_extra__"):
            object.__setattr__(self, name, getattr(other, name))

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return html.job(self)


class _JobCalls(Generic[J, R]):
    """The calls of a job. Those that change it, and `refresh` and `wait`, bring the object up to date and return it."""

    if TYPE_CHECKING:
        id: str
        _client: Any

        def _become(self, other: SelectionJob) -> None: ...

    @call
    async def refresh(self) -> J:
        """The job as it is now."""
        return self._now(await _calls(self).job(self._client, self.id))

    @call
    async def wait(
        self,
        timeout: float | None = None,
        *,
        progress: bool | None = None,
        on_update: Callable[[Any], object] | None = None,
    ) -> J:
        """Returns the job once it has succeeded.

        Args:
            timeout: seconds to wait at most; the job goes on regardless.
            progress: whether bars show how far it is; None: where a terminal or a notebook is there to show them.
            on_update: called with the job whenever it has changed.

        Raises:
            JobFailed: it failed or was cancelled.
            TimeoutError: it had not ended in time.
        """
        from winnow.progress import watching

        with watching(progress) as watch:

            def update(job: SelectionJob) -> None:
                self._become(job)
                for each in (watch, on_update):
                    if each is not None:
                        each(cast(SelectionJob, self))

            is_watched = watch is not None or on_update is not None
            seconds = {"poll_seconds": 1.0} if watch is not None else {}
            job = await _calls(self).wait(self._client, self.id, update if is_watched else None, timeout, **seconds)
        return self._now(job)

    @call
    async def cancel(self) -> J:
        """Asks the job to stop; it may still be `cancelling`."""
        return self._now(await _calls(self).cancel(self._client, self.id))

    @call
    async def delete(self) -> None:
        """Deletes the job, which has ended; its provenance stays."""
        await _calls(self).delete_job(self._client, self.id)

    @call
    async def retry(self) -> J:
        """Retries the job, which failed or was cancelled, as a new one, which is returned."""
        job: J = await _calls(self).retry(self._client, self.id)
        return job

    @call
    async def reproduce(self) -> J:
        """Posts a job that recomputes this one from its provenance; returns the new job."""
        job: J = await _calls(self).reproduce(self._client, self.id)
        return job

    @call
    async def events(self) -> AsyncGenerator[Event]:
        """What has happened to the job so far, oldest first."""
        async for event in _calls(self).events(self._client, self.id):
            yield event

    @call
    async def follow(self, after: int = 0) -> AsyncGenerator[Event]:
        """The events of the job, each as it happens, oldest first; ends with the job.

        Args:
            after: the `id` of an event; only later ones are yielded.
        """
        async for event in _calls(self).follow(self._client, self.id, after):
            yield event

    @call
    async def results(self) -> R:
        """What the job has found, once it has succeeded."""
        results: R = await _calls(self).results(self._client, self.id)
        return results

    def _now(self, job: SelectionJob) -> J:
        self._become(job)
        return self  # type: ignore[return-value]  # J is the class of this object


class _ResultsHandle(SelectionResult, Handle):
    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return html.results(self)


class _ResultsCalls:
    """The calls of a result."""

    if TYPE_CHECKING:
        job_id: str
        _client: Any

    @call
    async def selected(self, /, **wanted: Any) -> AsyncGenerator[Selected]:
        """The selected samples, read page by page; what may be wanted is that of `selected` of the client."""
        async for entry in _calls(self).selected(self._client, self.job_id, **wanted):
            yield entry

    @call
    async def samples(self, /, **wanted: Any) -> AsyncGenerator[Weight]:
        """Samples of the pool, read page by page; what may be wanted is that of `samples` of the client."""
        async for entry in _calls(self).samples(self._client, self.job_id, **wanted):
            yield entry

    @call
    async def weights(self) -> AsyncGenerator[Weight]:
        """Every sample of the pool in order, streamed."""
        async for entry in _calls(self).weights(self._client, self.job_id):
            yield entry

    @call
    async def sample(self, sample: int | str, *, landmarks: int = 5, target: int | None = None) -> Sample:
        """One sample of the pool and the explanation of its influence, as `sample` of the client."""
        found: Sample = await _calls(self).sample(self._client, self.job_id, sample, landmarks=landmarks, target=target)
        return found

    @call
    async def charts(self) -> ResultCharts:
        """What pictures of the result are drawn from, as `charts` of the client."""
        charts: ResultCharts = await _calls(self).charts(self._client, self.job_id)
        return charts

    @call
    async def provenance(self, chunks: bool = False) -> Provenance:
        """The audit record; `chunks` adds the leaves of its Merkle tree."""
        record: Provenance = await _calls(self).provenance(self._client, self.job_id, chunks)
        return record

    @call
    async def export(self, path: str | Path, /, **options: Any) -> Path:
        """Downloads the selection with its content to a file, as `export` of the client."""
        written: Path = await _calls(self).export(self._client, self.job_id, path, **options)
        return written

    @call
    async def copy_rows(self, source: str | Path, path: str | Path) -> Path:
        """Copies the selected rows out of the file that was uploaded, as `copy_rows` of the client."""
        written: Path = await _calls(self).copy_rows(self._client, self.job_id, source, path)
        return written

    @call
    async def push(self, repository: str, *, public: bool = False) -> str:
        """Pushes the selection with its content to a dataset repository of the Hugging Face Hub, with a card of its provenance,
        fidelity and verdict; returns the address of the commit.

        Args:
            repository: owner/name. It is created, and private unless it is to be `public`.

        Raises:
            ModuleNotFoundError: huggingface_hub is not installed.
            ValueError: the repository is there, and public.
            OSError: the hub refuses; its token is that of `hf auth login` or HF_TOKEN.
        """
        from winnow import pushing

        require("huggingface_hub", "hub", "pushing to the hub")
        commits: list[str] = []
        client: Connection = self._client
        with tempfile.TemporaryDirectory(prefix="winnow-") as name:
            await self._publish(Path(name))
            await client._off_loop(
                lambda: commits.append(pushing.upload(Path(name), repository, self.job_id, public=public))
            )
        return commits[0]

    async def _publish(self, folder: Path) -> Provenance:
        """Writes what is published of a selection into the folder: samples, card, and the record that they are verified by."""
        from winnow import pushing

        (folder / pushing.DATA).parent.mkdir()
        await _calls(self).export(self._client, self.job_id, folder / pushing.DATA)
        provenance: Provenance = await _calls(self).provenance(self._client, self.job_id)
        pushing.describe(folder, cast(SelectionResult, self), provenance)
        return provenance

    @call
    async def log_to_wandb(self, run: Any = None) -> Any:
        """Logs the selection with its content to a run of Weights & Biases, as an artifact of the type dataset that
        holds what `push` publishes; returns the artifact, whose metadata are counts, fidelity, verdict and the Merkle root.

        Args:
            run: what `wandb.init` has returned; None: the run that is active.

        Raises:
            ModuleNotFoundError: wandb is not installed.
            ValueError: no run is active.
        """
        from winnow import tracking

        require("wandb", "wandb", "logging to Weights & Biases")
        run = tracking.wandb_run(run)
        artifacts: list[Any] = []
        client: Connection = self._client
        with tempfile.TemporaryDirectory(prefix="winnow-") as name:
            provenance = await self._publish(Path(name))
            results = cast(SelectionResult, self)
            await client._off_loop(
                lambda: artifacts.append(tracking.log_artifact(run, Path(name), results, provenance))
            )
        return artifacts[0]

    @call
    async def log_to_mlflow(self, context: str = "training") -> Any:
        """Logs the selection as an input of the active run of MLflow, or of one that it starts: its columns, size, address and
        digest, counts, fidelity and verdict, not its rows; returns the dataset of MLflow.

        Args:
            context: what the run uses it for.

        Raises:
            ModuleNotFoundError: mlflow or pandas is not installed.
        """
        from winnow import tracking

        require("mlflow", "mlflow", "logging to MLflow")
        require("pandas", "mlflow", "logging to MLflow")
        table = await self._table(True, "messages")
        provenance: Provenance = await _calls(self).provenance(self._client, self.job_id)
        client: Connection = self._client
        source = f"{client.url}/v1/selection-jobs/{self.job_id}/export?selected_only=true&include=messages"
        # On this thread, to which the active run belongs.
        return tracking.log_input(table, source, cast(SelectionResult, self), provenance, context)

    @call
    async def to_arrow(
        self, *, selected_only: bool = True, include: Literal["messages"] | None = "messages"
    ) -> "pa.Table":
        """The selection with its content, in rank order, as a table in memory.

        Args:
            selected_only: False: every sample of the pool, in its order. Of a large pool rather use `export`.
            include: None: without the content.
        """
        return await self._table(selected_only, include)

    @call
    async def to_pandas(
        self, *, selected_only: bool = True, include: Literal["messages"] | None = "messages"
    ) -> "pd.DataFrame":
        """The selection with its content, in rank order, as a DataFrame; the options are those of `to_arrow`.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas  # noqa: F401  # before the download

        return (await self._table(selected_only, include)).to_pandas()

    @call
    async def to_dataset(
        self, *, selected_only: bool = True, include: Literal["messages"] | None = "messages"
    ) -> "Dataset":
        """The selection with its content, in rank order, as a `datasets.Dataset`; the options are those of `to_arrow`.

        Raises:
            ModuleNotFoundError: the library `datasets` is not installed.
        """
        import datasets

        return datasets.Dataset(await self._table(selected_only, include))

    async def _table(self, selected_only: bool, include: str | None) -> "pa.Table":
        import pyarrow.parquet as pq

        tables: list[pa.Table] = []
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            path = Path(folder) / "export.parquet"
            options = {"selected_only": selected_only, "include": include}
            await _calls(self).export(self._client, self.job_id, path, **options)
            client: Connection = self._client
            await client._off_loop(lambda: tables.append(pq.read_table(path, memory_map=False)))
        return tables[0]


def _calls(handle: Any) -> Any:
    """The client's class, whose methods are the coroutines that both clients run."""
    if handle._client is None:
        raise RuntimeError("this was read from no service, so it has no calls; get it from a client")
    return type(handle._client)


class Results(_ResultsHandle, _ResultsCalls, Blocking):
    """What a job has found: the summary's fields, and calls for the rest."""


class AsyncResults(_ResultsHandle, _ResultsCalls, NonBlocking):
    """What a job has found, for asyncio."""


class Job(_JobHandle, _JobCalls["Job", Results], Blocking):
    """A selection job: its fields as they were when it was last read, and its calls."""


class AsyncJob(_JobHandle, _JobCalls["AsyncJob", AsyncResults], NonBlocking):
    """A selection job, for asyncio."""
