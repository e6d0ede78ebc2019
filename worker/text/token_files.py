"""Tokens in the artifact store: files of rows, and what stands for all rows of a dataset.

A file of rows is Parquet (columns index, input_ids, response, and the counts), written and read in row groups, so that a pool is
never held whole. The tokens of a dataset are such files, one a shard, under the name of a small one: Parquet of the counts of all
rows, whose metadata names the shards' files, the notes, and the first unusable rows. The readers take the key of either.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice, pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from service.plan.artifact_keys import rows_key
from service.storage.artifacts import ArtifactStore
from worker.influence import Samples
from worker.text.tokenization import ROW_GROUP, TokenCounts, Tokenised

NAMED = 100
"""Unusable rows of a dataset that are named."""
_ABOUT = b"winnow"  # in the metadata

_COUNTS = {
    "length": pa.int32(),
    "predicted": pa.int32(),
    "truncated": pa.bool_(),
    "response_truncated": pa.bool_(),
    "unusable": pa.string(),
}
_SCHEMA = pa.schema(
    {"index": pa.int64(), "input_ids": pa.list_(pa.int32()), "response": pa.list_(pa.bool_()), **_COUNTS}
)

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class About:
    """What is kept of a dataset's rows beside their counts. `parts`: the files of rows with their numbers of rows, in order;
    `unusable`: the first rows that take no part, {index, reason, detail}; `notes`: in how many rows each was made;
    `chat_template`: whose they were rendered with, in words."""

    parts: Sequence[tuple[str, int]]
    chat_template: str
    unusable: Sequence[dict[str, Any]]
    notes: Mapping[str, int]

    @classmethod
    def of(cls, store: ArtifactStore, key: str) -> Self:
        """Of a file of rows: that it is its only part."""
        with store.open(key) as file, pq.ParquetFile(file) as parquet:
            kept = (parquet.metadata.metadata or {}).get(_ABOUT)
            if kept is None:
                return cls([(key, parquet.metadata.num_rows)], "", [], {})
        found = json.loads(kept)
        parts = [(part, rows) for part, rows in found["parts"]]
        return cls(**{**found, "parts": parts})

    @property
    def files(self) -> Iterator[tuple[str, int, int]]:
        """Of each part the key, the first row, and the row after the last."""
        ends = np.cumsum([0, *(rows for _, rows in self.parts)]).tolist()
        for (part, _), (start, stop) in zip(self.parts, pairwise(ends), strict=True):
            yield part, start, stop

    @classmethod
    def of_all(cls, parts: Sequence[Self]) -> Self:
        """Of the dataset that the parts are, in order."""
        return cls(
            parts=[part for each in parts for part in each.parts],
            chat_template=parts[0].chat_template,
            unusable=[row for each in parts for row in each.unusable][:NAMED],
            notes=sum((Counter(each.notes) for each in parts), Counter()),
        )

    def schema(self) -> pa.Schema:
        kept = {each.name: getattr(self, each.name) for each in fields(self)}
        return pa.schema(_COUNTS, metadata={_ABOUT: json.dumps(kept).encode()})


@dataclass(slots=True)
class _Seen:
    """The counts of the rows that have passed: some 20 bytes a row."""

    counts: list[pa.Table] = field(default_factory=list)
    unusable: list[dict[str, Any]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[Tokenised], table: pa.Table) -> None:
        self.counts.append(table.select(list(_COUNTS)))
        named = (row for row in rows if row.unusable is not None)
        for row in islice(named, NAMED - len(self.unusable)):
            self.unusable.append({"index": row.index, "reason": row.unusable, "detail": row.detail})
        for row in rows:
            self.notes.update(row.notes)


def write_tokens(store: ArtifactStore, key: str, rows: Iterable[Tokenised]) -> None:
    """Writes a file of rows, a row group at a time."""
    _write(store, key, rows)


def write_part(
    store: ArtifactStore, key: str, counts: str, rows: Iterable[Tokenised], chat_template: str = "default"
) -> None:
    """Writes a file of rows and, under the key `counts`, what stands for them: if that is there, so are the rows."""
    seen = _write(store, key, rows)
    parts = [(key, sum(map(len, seen.counts)))]
    about = About(parts=parts, chat_template=chat_template, unusable=seen.unusable, notes=seen.notes)
    _write_counts(store, counts, about, [pa.concat_tables(seen.counts)])


def write_whole(store: ArtifactStore, key: str, parts: Sequence[str]) -> None:
    """Writes what stands for a dataset out of what stands for its parts, in order; the rows are not read, and of the counts those
    of one part at a time."""
    about = About.of_all([About.of(store, part) for part in parts])
    _write_counts(store, key, about, (_read(store, part, list(_COUNTS)) for part in parts))


def _write(store: ArtifactStore, key: str, rows: Iterable[Tokenised]) -> _Seen:
    remaining, seen = iter(rows), _Seen()
    with store.writing(key) as path, pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        while chunk := list(islice(remaining, ROW_GROUP)):
            columns = {
                "index": [row.index for row in chunk],
                "input_ids": [row.input_ids for row in chunk],
                "response": [row.response for row in chunk],
                "length": [len(row.input_ids) for row in chunk],
                "predicted": [row.predicted for row in chunk],
                "truncated": [row.truncated for row in chunk],
                "response_truncated": [row.response_truncated for row in chunk],
                "unusable": [row.unusable for row in chunk],
            }
            table = pa.table(columns, schema=_SCHEMA)
            writer.write_table(table)
            seen.add(chunk, table)
    return seen


def _write_counts(store: ArtifactStore, key: str, about: About, counts: Iterable[pa.Table]) -> None:
    schema = about.schema()
    with store.writing(key) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in counts:
            writer.write_table(table.cast(schema))


def _read(store: ArtifactStore, key: str, columns: list[str]) -> pa.Table:
    with store.open(key) as file, pq.ParquetFile(file, read_dictionary=["unusable"]) as parquet:
        return parquet.read(columns=columns, use_threads=False)


def read_counts(store: ArtifactStore, key: str) -> TokenCounts:
    """The counts of all rows, without their tokens; some 50 bytes a row."""
    table = _read(store, key, list(_COUNTS))
    length, predicted, truncated, response_truncated = (table.column(name).to_numpy() for name in list(_COUNTS)[:4])
    return TokenCounts(
        length.astype(np.int64),
        predicted.astype(np.int64),
        truncated,
        response_truncated,
        unusable=_rows_of_each(table.column("unusable")),
        notes=About.of(store, key).notes,
    )


def _rows_of_each(column: pa.ChunkedArray) -> dict[str, Indices]:
    """Of each value of a column of dictionaries that is not null, its rows."""
    rows = np.flatnonzero(column.is_valid().to_numpy())
    found = column.drop_null().unify_dictionaries().combine_chunks()
    values, codes = found.dictionary.to_pylist(), found.indices.to_numpy()
    by_value = {value: rows[codes == code] for code, value in enumerate(values)}
    return {value: by_value[value] for value in sorted(by_value) if by_value[value].size}


def read_indices(store: ArtifactStore, key: str) -> Indices:
    """The places in the dataset of all rows, int64 (n,)."""
    parts = About.of(store, key).parts
    if parts[0][0] != key:
        return np.arange(sum(rows for _, rows in parts), dtype=np.int64)
    return np.asarray(_read(store, key, ["index"]).column("index").to_numpy(), dtype=np.int64)


def read_tokens(store: ArtifactStore, key: str, start: int, stop: int) -> Samples:
    """Rows [start, stop) of the artifact; reads only their row groups."""
    tables = []
    for part, first, end in About.of(store, key).files:
        low, high = max(start, first) - first, min(stop, end) - first
        if low < high:
            groups = range(low // ROW_GROUP, -(-high // ROW_GROUP))
            with store.local(part) as path, pq.ParquetFile(path) as file:
                table = file.read_row_groups(list(groups), columns=["input_ids", "response"])
            tables.append(table.slice(low - groups.start * ROW_GROUP, high - low))
    return _as_samples(pa.concat_tables(tables))


def read_all(store: ArtifactStore, key: str) -> Samples:
    """All rows of a small artifact, such as a target."""
    return read_tokens(store, key, 0, sum(rows for _, rows in About.of(store, key).parts))


def _as_samples(table: pa.Table) -> Samples:
    tokens, response = (table.column(name).combine_chunks() for name in ("input_ids", "response"))
    lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
    return Samples(
        input_ids=tokens.flatten().to_numpy().astype(np.int32),
        response=response.flatten().to_numpy(zero_copy_only=False).astype(bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def read_rows(store: ArtifactStore, key: str, indices: Indices) -> Samples:
    """The samples at those rising places in the dataset that the artifact holds; read group by group."""
    rows = np.flatnonzero(np.isin(read_indices(store, key), indices))
    return _as_samples(pa.concat_tables(_taken(store, key, rows, ["input_ids", "response"])))


def _taken(store: ArtifactStore, key: str, rows: Indices, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rising rows of the artifact, a row group at a time."""
    for part, first, end in About.of(store, key).files:
        low, high = np.searchsorted(rows, [first, end])
        if low == high:
            continue
        inside = rows[low:high] - first
        with store.local(part) as path, pq.ParquetFile(path) as file:
            for group in np.unique(inside // ROW_GROUP).tolist():
                own = inside[inside // ROW_GROUP == group] - group * ROW_GROUP
                yield file.read_row_group(group, columns=columns).take(pa.array(own))


def rows_artifact(store: ArtifactStore, source: str, indices: Indices) -> str:
    """The key of an artifact with the rows of `source` at the rising `indices`; written if it is not there yet."""
    key = rows_key(source, indices)
    if not store.is_whole(key):
        copy_rows(store, source, key, indices)
    return key


def copy_rows(store: ArtifactStore, source: str, key: str, indices: Indices) -> None:
    """Writes the rows of `source` at the rising `indices` as another artifact, in full row groups like any other."""
    with store.writing(key) as target, pq.ParquetWriter(target, _SCHEMA, compression="zstd") as writer:
        pending = _SCHEMA.empty_table()
        for taken in _taken(store, source, indices):
            pending = pa.concat_tables([pending, taken])
            if len(pending) >= ROW_GROUP:
                writer.write_table(pending.slice(0, ROW_GROUP))
                pending = pending.slice(ROW_GROUP)
        if len(pending):
            writer.write_table(pending)
