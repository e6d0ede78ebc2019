"""The client's calls for datasets; `winnow.client` has the others."""

import json
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

from winnow.answers import Answer, Dataset, PendingRows, Preset, Row, Upload
from winnow.importing import Importing
from winnow.in_memory import as_file
from winnow.transport import Json
from winnow.twins import call
from winnow.uploading import OnProgress, Uploading

_MOST_ROWS = 100  # of a page
_HELD_SECONDS = 20.0  # for which the service is asked to hold a request


class ArrowStream(Protocol):
    """Rows in columns, as pandas, Polars and PyArrow have them."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Source = str | os.PathLike[str] | bytes | ArrowStream | Iterable[Mapping[str, Any]]


class SkippedRow(Answer):
    """A row of an upload that its dataset was left without."""

    unit: str
    """What `number` counts: `line` or `row`"""
    number: int
    reason: str


class _Presets(Answer):
    data: list[Preset]


class _RowPage(Answer):
    data: list[Row]
    has_more: bool
    last_id: int | None


class DatasetCalls(Uploading, Importing):
    """Uploads and imports, and what became of them."""

    @call
    async def upload_dataset(
        self,
        source: Source,
        name: str | None = None,
        format: str | None = None,
        *,
        columns: Mapping[str, str] | str | None = None,
        template: Mapping[str, str] | str | None = None,
        on_bad_row: Literal["refuse", "skip"] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Dataset:
        """Uploads a file (JSONL, JSON, CSV, TSV, text, Parquet or Arrow, also gzip or zstd of it) or rows that are in memory.

        A file is streamed. Rows are first written to a temporary one, some thousands at a time, so that they may be more than
        fits into memory: as Parquet where they are columns, else as JSONL. An unnamed index of a pandas DataFrame is left out.

        A file of 64 MiB or more is sent in parts: a connection that breaks costs its part, and
        after an error, or an end of this process, the same call goes on where it was. So it does where rows were refused.

        Returns the dataset; its `detected` says what was taken of the file.

        Args:
            source: the path of a file, or its content; or a DataFrame of pandas or Polars, a `datasets.Dataset`, whatever else
                gives an Arrow stream, or an iterable of dicts.
            name: name of the dataset; None: the file's name.
            format: the form of the rows; needed only where they fit more than one.
            columns: which columns hold what, where their names do not say so: {"prompt": "question"} or "prompt:question,...".
            template: Jinja templates over a row that make its messages: {"user": ..., "assistant": ..., "system": ...}.
            on_bad_row: "skip" keeps the other rows, and `skipped_rows` names those that were left out; else one refuses the file.
            on_progress: called with an `UploadProgress` now and then, in whichever thread; first bytes, then rows.

        Raises:
            ValueError: what is no file has no name, or no rows.
            TypeError: a row holds what JSON has no form for.
            WinnowError: `errors` names the rows that cannot be used.
        """
        if name is None:
            if not isinstance(source, str | os.PathLike):
                raise ValueError("name: what is no file needs a name; pass one")
            name = Path(source).name
        given = {
            "name": name,
            "format": format,
            "columns": _text(columns),
            "template": _text(template),
            "on_bad_row": on_bad_row,
        }
        params = {key: value for key, value in given.items() if value is not None}
        if isinstance(source, str | os.PathLike | bytes):
            return await self._upload(source, params, on_progress)
        with ExitStack() as until_sent:
            files: list[Path] = []
            await self._off_loop(lambda: files.append(until_sent.enter_context(as_file(source))))
            return await self._upload(files[0], params, on_progress)

    @call
    def uploads(self) -> AsyncGenerator[Upload]:
        """Your uploads in parts of which no dataset was made yet, newest first; they count into your limits."""
        return self._pages(Upload, "/uploads")

    @call
    async def delete_upload(self, upload_id: str) -> None:
        """Gives up an upload in parts."""
        await self._call("DELETE", f"/uploads/{upload_id}")

    @call
    def datasets(self) -> AsyncGenerator[Dataset]:
        """Your datasets, newest first."""
        return self._pages(Dataset, "/datasets")

    @call
    async def targets(self) -> list[Preset]:
        """The ready-made targets: name, hub, why that split, template, how many samples there are and are taken, licence."""
        return (await self._one(_Presets, "GET", "/targets")).data

    @call
    async def rows(
        self,
        dataset_id: str,
        *,
        model: str | None = None,
        limit: int | None = None,
        after: int | None = None,
        reasoning: Literal["keep", "strip"] | None = None,
        template_arguments: Mapping[str, Any] | str | None = None,
        max_length: int | None = None,
        timeout: float | None = None,
        on_wait: Callable[[str], object] | None = None,
    ) -> AsyncGenerator[Row]:
        """The rows of a dataset, in order; each of their messages says whether the loss `counts` it.

        Args:
            model: with it each row also has `rendered`: the text that a job with this model reads, what of it the loss counts,
                and its tokens; or why the row would take no part. A worker computes it.
            limit: how many rows at most; None: all.
            after: the index of the row before the first.
            reasoning: as of a job, like the next two; they need a model.
            template_arguments: what else the chat template is given.
            max_length: where rows are cut, in tokens.
            timeout: seconds to wait for a page at most; None: until a worker has rendered it.
            on_wait: called with the reason, when it changes, while a page is waited for.

        Raises:
            TimeoutError: no worker has rendered a page in time; says what it waits for.
            WinnowError: there is no such dataset or model, or the model cannot be used.
        """
        given: Json = {
            "model": model,
            "after": after,
            "reasoning": reasoning,
            "template_arguments": _text(template_arguments),
            "max_length": max_length,
        }
        left = limit
        while left is None or left > 0:
            size = {} if left is None else {"limit": min(left, _MOST_ROWS)}
            params = {name: value for name, value in {**given, **size}.items() if value is not None}
            page = await self._page_of_rows(dataset_id, params, timeout, on_wait)
            for row in page.data:
                yield row
            if not page.has_more:
                return
            given["after"] = page.last_id
            left = None if left is None else left - len(page.data)

    async def _page_of_rows(
        self, dataset_id: str, params: Json, timeout: float | None, on_wait: Callable[[str], object] | None
    ) -> "_RowPage":
        started, why = time.monotonic(), None
        held: float = _HELD_SECONDS if "model" in params else 0
        while True:
            if timeout is not None:
                held = max(0, min(held, started + timeout - time.monotonic()))
            asked = time.monotonic()
            path = f"/datasets/{dataset_id}/rows"
            response = await self._call("GET", path, params={**params, **({"wait": int(held)} if held else {})})
            if response.status_code != httpx.codes.ACCEPTED:
                return self._read(_RowPage, response.content)
            detail = self._read(PendingRows, response.content).detail
            if on_wait is not None and detail != why:
                on_wait(detail)
            why = detail
            if timeout is not None and time.monotonic() >= started + timeout:
                raise TimeoutError(f"the rows are not rendered after {timeout:g} seconds: {detail}")
            # The service stops, does not hold requests, or waits for whole seconds only.
            await self._sleep(min(1.0, max(0.0, asked + held - time.monotonic())) or 0.1)

    @call
    async def skipped_rows(self, dataset_id: str) -> AsyncGenerator[SkippedRow]:
        """The rows of the upload that the dataset was left without: unit (line or row), number and reason.

        Raises:
            Unreachable: the stream was interrupted; the entries yielded so far are correct.
        """
        async with self._stream(f"/datasets/{dataset_id}/skipped", {}) as response:
            async for line in self._lines(response):
                yield self._read(SkippedRow, line)

    @call
    async def delete_dataset(self, dataset_id: str) -> None:
        """Deletes a dataset; jobs over it keep their results."""
        await self._call("DELETE", f"/datasets/{dataset_id}")


def _text(option: Mapping[str, Any] | str | None) -> str | None:
    return option if option is None or isinstance(option, str) else json.dumps(dict(option))
