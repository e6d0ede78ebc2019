"""The client's calls for what a job has found."""

import os
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Generic, Literal, TypeVar

from winnow import original_rows
from winnow.answers import (
    Dataset,
    Provenance,
    ResultCharts,
    Sample,
    Selected,
    SelectionJob,
    SelectionResult,
    Weight,
)
from winnow.companions import ExportPreset, companion
from winnow.dataset_calls import SkippedRow
from winnow.transport import Connection
from winnow.twins import call

R = TypeVar("R", bound=SelectionResult)
Order = Literal["asc", "desc"]

_SUFFIXES = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


class ResultCalls(Connection, Generic[R]):
    """Results are read and downloaded. `R` is what the summary is in Python."""

    _results_type: type[R]

    @call
    async def results(self, job_id: str) -> R:
        """The summary of a succeeded job."""
        return await self._one(self._results_type, "GET", f"/selection-jobs/{job_id}/results")

    @call
    async def charts(self, job_id: str) -> ResultCharts:
        """What pictures of the result are drawn from: histograms, pairs, sources, targets, a map, other budgets.

        Raises:
            NotFound: `no_charts`, the job is of a version that made none.
        """
        return await self._one(ResultCharts, "GET", f"/selection-jobs/{job_id}/results/charts")

    @call
    def selected(
        self,
        job_id: str,
        *,
        sort: Literal["rank", "index", "influence", "weight"] | None = None,
        order: Order | None = None,
        source: str | None = None,
        exact: bool | None = None,
        text: str | None = None,
        include: Literal["text"] | None = None,
    ) -> AsyncGenerator[Selected]:
        """The selected samples. The arguments are those of `samples`; `sort` is by default `rank`, the order in which
        they were selected."""
        filters = {"source": source, "exact": exact, "text": text, "include": include}
        return self._pages(Selected, f"/selection-jobs/{job_id}/selected", sort=sort, order=order, **filters)

    @call
    def samples(
        self,
        job_id: str,
        *,
        sort: Literal["index", "influence", "weight"] | None = None,
        order: Order | None = None,
        source: str | None = None,
        exact: bool | None = None,
        selected: bool | None = None,
        text: str | None = None,
        include: Literal["text"] | None = None,
    ) -> AsyncGenerator[Weight]:
        """Samples of the pool, in pages: to look at some. `weights` streams all of them.

        Args:
            sort: by default `index`, the order of the pool.
            order: None: `desc` for influence and weight, `asc` for the others.
            source: only samples of this source; None: of any, and so on for the next two.
            exact: only those whose influence was computed, or only the others.
            selected: only those that were selected, or only the others.
            text: only samples that say this, in letters of either case.
            include: "text" adds how each begins, the first 2,000 characters.
        """
        filters = {"source": source, "exact": exact, "selected": selected, "text": text, "include": include}
        return self._pages(Weight, f"/selection-jobs/{job_id}/weights", sort=sort, order=order, **filters)

    @call
    async def weights(self, job_id: str) -> AsyncGenerator[Weight]:
        """Every sample of the pool in order: index, id, source, influence (None: it took no part), weight, exact.

        Raises:
            Unreachable: the stream was interrupted; the entries yielded so far are correct.
        """
        async with self._stream(f"/selection-jobs/{job_id}/weights", {"stream": "true"}) as response:
            async for line in self._lines(response):
                yield self._read(Weight, line)

    @call
    async def sample(self, job_id: str, sample: int | str, *, landmarks: int = 5, target: int | None = None) -> Sample:
        """One sample of the pool and the explanation of its influence: on every target, and through which exact samples.

        Args:
            sample: its position in the pool, or its id, a string, which takes longer in a large pool.
            landmarks: how many of the nearest exact samples are listed, at most 100.
            target: index of a target sample, to explain the influence on it alone; None: the mean over all.
        """
        params = {"landmarks": landmarks} | ({} if target is None else {"target": target})
        path = f"/selection-jobs/{job_id}/samples"
        if isinstance(sample, str):
            return await self._one(Sample, "GET", path, params={"id": sample, **params})
        return await self._one(Sample, "GET", f"{path}/{sample}", params=params)

    @call
    async def export(
        self,
        job_id: str,
        path: str | os.PathLike[str],
        format: Literal["jsonl", "csv", "parquet"] | None = None,
        selected_only: bool = True,
        include: Literal["messages"] | None = "messages",
        escape_formulas: bool = True,
        preset: ExportPreset | None = None,
        repeat: bool = False,
    ) -> Path:
        """Downloads the selection with its content, ready to train on; the file appears only once it is complete.

        Args:
            format: None: by the suffix of the path.
            selected_only: False: every sample of the pool, in its order.
            include: None: without the content. With it, the file uploaded again gives the same samples.
            escape_formulas: in CSV, an apostrophe goes before an id, source or text that a spreadsheet would take for a formula.
            preset: the selection with its content in the pool's order, as the JSON lines that a training tool reads.
                A file that tells the tool how is written beside it, where it needs one (`winnow.companions`).
            repeat: with a preset, each line as often as the sample's weight, rounded so that the total stays.

        Raises:
            ValueError: neither `format` nor the suffix of the path names one, or not that of the preset.
            WinnowError: `pool_deleted`, the content went with the pool; what is left is exported with `include=None`.
                `preset_unsuitable`, the tool's format cannot hold a sample.
        """
        path = Path(path)
        chosen = format or _SUFFIXES.get(path.suffix)
        if chosen is None:
            raise ValueError(f"path: {path.name} ends in none of {', '.join(_SUFFIXES)}; pass the format")
        if preset is None:
            params = {"format": chosen, "selected_only": str(selected_only).lower()}
            if include is not None:
                params["include"] = include
            if not escape_formulas:
                params["escape_formulas"] = "false"
        elif not selected_only or include is None or not escape_formulas:
            raise ValueError(
                "a preset is the selection with its content; omit selected_only, include and escape_formulas"
            )
        elif chosen != "jsonl":
            raise ValueError(
                f"path: {path.name} is to be {chosen}, and a preset is written as JSON lines; end it in .jsonl"
            )
        else:
            params = {"preset": preset}
        if repeat:
            params["repeat"] = "true"
        told = None if preset is None else companion(preset, path)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            async with self._stream(f"/selection-jobs/{job_id}/export", params) as response:
                with part.open("xb") as file:
                    async for chunk in self._chunks(response):
                        file.write(chunk)
            part.replace(path)
            if told is not None:
                told.path.write_text(told.content)
        finally:
            part.unlink(missing_ok=True)
        return path

    @call
    async def copy_rows(self, job_id: str, source: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
        """Copies the selected rows out of `source`, the file that was uploaded as the pool: as they stand there, with all their
        columns, in their order. The file at `path` appears only once it is complete.

        Args:
            source: of JSON lines, CSV, TSV or Parquet.
            path: of the same kind.

        Raises:
            ValueError: `source` is not the file that the pool was made of, or of another kind; or `path` is.
            NotFound: the pool was deleted.
        """
        source, path = Path(source), Path(path)
        job = await self._one(SelectionJob, "GET", f"/selection-jobs/{job_id}")
        pool = await self._one(Dataset, "GET", f"/datasets/{job.pool}")
        await self._off_loop(lambda: original_rows.check(source, path, pool.detected))
        selected = {each.index async for each in self._pages(Selected, f"/selection-jobs/{job_id}/selected")}
        skipped: set[int] = set()
        if pool.skipped:
            async with self._stream(f"/datasets/{pool.id}/skipped", {}) as response:
                skipped = {self._read(SkippedRow, line).number async for line in self._lines(response)}
        part = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
        try:
            await self._off_loop(lambda: original_rows.copy(source, part, pool, selected=selected, skipped=skipped))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    @call
    async def provenance(self, job_id: str, chunks: bool = False) -> Provenance:
        """The audit record of a succeeded job; `chunks` adds the leaves of its Merkle tree."""
        params = {"chunks": "true"} if chunks else {}
        return await self._one(Provenance, "GET", f"/selection-jobs/{job_id}/provenance", params=params)
