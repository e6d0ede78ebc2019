"""Which samples of a dataset have a source or say a text, and the ids of scattered ones, read from the artifact store.

A row group is read once a call and held alone, whatever the number of samples asked for.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from service.datasets import storage
from service.storage.artifacts import ArtifactStore
from winnow import marked_text

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def ids_at(store: ArtifactStore, fingerprint: str, indices: Sequence[int]) -> tuple[list[str], list[str | None]]:
    """Ids and sources of the samples at the indices, in their order.

    Raises:
        FileNotFoundError: no dataset of this fingerprint is in the store.
    """
    ids = [""] * len(indices)
    sources: list[str | None] = [None] * len(indices)
    for places, rows in _taken(store, storage.ids_key(fingerprint), np.asarray(indices, np.int64), ["id", "source"]):
        columns = (rows.column(name).to_pylist() for name in ("id", "source"))
        for place, id, source in zip(places.tolist(), *columns, strict=True):
            ids[place], sources[place] = id, source
    return ids, sources


def beginnings(store: ArtifactStore, fingerprint: str, indices: Sequence[int], length: int) -> list[str]:
    """The first `length` characters of what the samples at the indices say, each message under its role, in their order.

    Raises:
        FileNotFoundError: the rows are not in the store; the dataset was deleted.
    """
    found = [""] * len(indices)
    for places, rows in _taken(store, storage.rows_key(fingerprint), np.asarray(indices, np.int64), ["sample"]):
        for place, sample in zip(places.tolist(), rows.column("sample"), strict=True):
            content = {"messages": None, "text": None, "tools": None, **json.loads(sample.as_py())}
            found[place] = marked_text.plain(content)[0][:length]
    return found


def has_source(store: ArtifactStore, fingerprint: str, source: str, indices: Indices) -> Mask:
    """(n,) bool: which of the samples at the indices are of the source.

    Raises:
        FileNotFoundError: no dataset of this fingerprint is in the store.
    """
    found = np.zeros(len(indices), bool)
    for places, rows in _taken(store, storage.ids_key(fingerprint), indices, ["source"]):
        found[places] = pc.fill_null(pc.equal(rows.column("source"), source), False).to_numpy()
    return found


def says(store: ArtifactStore, fingerprint: str, text: str, indices: Indices) -> Mask:
    """(n,) bool: which of the samples at the indices say the text, in letters of either case: in the content or the reasoning of
    a message, or in their text.

    Raises:
        FileNotFoundError: the rows are not in the store; the dataset was deleted.
    """
    found = np.zeros(len(indices), bool)
    wanted = text.lower()
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    for places, rows in _taken(store, storage.rows_key(fingerprint), indices, ["sample"]):
        samples = rows.column("sample")
        # The row's JSON first, which no Python object is made of: few rows have the text in it anywhere.
        likely = pc.match_substring(samples, escaped, ignore_case=True).to_numpy()
        for place, sample in zip(places[likely].tolist(), samples.filter(pa.array(likely)), strict=True):
            found[place] = any(wanted in said.lower() for said in _said(json.loads(sample.as_py())))
    return found


def _said(content: dict[str, Any]) -> Iterator[str]:
    if "text" in content:
        yield content["text"]
    for message in content.get("messages") or ():
        yield message["content"]
        yield message.get("reasoning_content", "")


def _taken(
    store: ArtifactStore, key: str, indices: Indices, columns: list[str]
) -> Iterator[tuple[npt.NDArray[np.intp], pa.Table]]:
    """For each row group that has any of the rows: their places in `indices`, and their columns in this order."""
    with storage.open_parquet(store, key) as parquet:
        starts = storage.group_starts(parquet)
        group_of = np.searchsorted(starts, indices, side="right") - 1
        order = np.argsort(group_of, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(group_of[order])) + 1):
            if places.size:
                group = int(group_of[places[0]])
                rows = parquet.read_row_group(group, columns=columns, use_threads=False)
                yield places, rows.take(indices[places] - starts[group])
