"""From datasets to tokens: the tokens of a sample, those that the loss counts, and what was truncated.

Tokenised samples are Parquet artifacts (columns index, input_ids, response), written and read in row groups, so that a pool
is never held whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from service.datasets.storage import Sample
from service.plan.artifact_keys import rows_key
from service.storage.artifacts import ArtifactStore
from worker.errors import UnusableRow
from worker.influence import Samples
from worker.text.chat_templates import ChatFormat, Rendered
from worker.text.templates import Span

ROW_GROUP = 1024
NO_REPLY = "no_reply"
"""The reason of a row that has no token to learn from; `ChatFormat.render` has others."""
_MAX_DETAIL = 300  # characters: it may quote a template, and is kept by row

_SCHEMA = pa.schema(
    {
        "index": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "response": pa.list_(pa.bool_()),
        "length": pa.int32(),
        "predicted": pa.int32(),
        "truncated": pa.bool_(),
        "response_truncated": pa.bool_(),
        "unusable": pa.string(),
        "detail": pa.string(),
        "notes": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True, slots=True)
class Tokenised:
    """One sample: its place in the dataset, its tokens, int32 (T,), which of them are response, bool (T,), what was cut.

    `whole`: how many tokens it had before. `kept`: [start, end) in characters of its text, what is left of that. `notes`: codes
    of what the rendered text does not say as the sample does. A sample that takes no part in the job has no tokens, but the code
    of a reason, `unusable`, and a `detail` in words.
    """

    index: int
    input_ids: npt.NDArray[np.int32]
    response: npt.NDArray[np.bool_]
    truncated: bool
    response_truncated: bool
    whole: int = 0
    kept: Span = (0, 0)
    notes: tuple[str, ...] = ()
    unusable: str | None = None
    detail: str | None = None

    @property
    def predicted(self) -> int:
        """How many tokens the loss counts: responses that have a token before them."""
        return int(self.response[1:].sum())


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Of every sample of an artifact: tokens, tokens that the loss counts (int64 (n,)), what was cut (bool (n,)).

    `unusable`: of each reason, the rising rows (m,) that take no part; they have no tokens, and no others lack tokens that the
    loss counts. `notes`: in how many rows each was made.
    """

    length: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]
    response_truncated: npt.NDArray[np.bool_]
    unusable: Mapping[str, npt.NDArray[np.int64]]
    notes: Mapping[str, int]

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """Which rows take part in a job, bool (n,)."""
        return self.predicted > 0

    def summary(self) -> dict[str, int]:
        """The counts that a job reports."""
        return {
            "samples": len(self.length),
            "tokens": int(self.length.sum()),
            "squares": int(np.square(self.length).sum()),
            "response_tokens": int(self.predicted.sum()),
            "longest": int(self.length.max()),
            "truncated": int(self.truncated.sum()),
            "truncated_responses": int(self.response_truncated.sum()),
        }


def tokenise(
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    report: Callable[[int], None],
    rendered: Mapping[str, Any] | None = None,
) -> Iterator[Tokenised]:
    """Tokenises in order and cuts to `max_length` tokens; `report` gets the number of samples done. A sample that cannot be
    rendered, or has nothing to learn from, comes without tokens and with the reason. `rendered`: keyword arguments of
    `ChatFormat`."""
    chat = ChatFormat(tokenizer, **(rendered or {}))
    remaining = iter(samples)
    done = 0
    while chunk := list(islice(remaining, ROW_GROUP)):
        for _, row in with_texts(chunk, tokenizer, chat, max_length):
            yield row
        done += len(chunk)
        report(done)


def with_texts(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, max_length: int
) -> Iterator[tuple[Rendered | None, Tokenised]]:
    """The text of each sample, or None where it cannot be rendered, and its tokens."""
    made = [_rendered(chat, sample) for sample in samples]
    encoded = _encoded(tokenizer, [each.text for each in made if isinstance(each, Rendered)])
    for sample, each in zip(samples, made, strict=True):
        if isinstance(each, UnusableRow):
            yield None, _unusable(sample.index, each.reason, each.message)
        else:
            yield each, _cut(sample.index, each, *next(encoded), max_length)


def _rendered(chat: ChatFormat, sample: Sample) -> Rendered | UnusableRow:
    try:
        return chat.render(sample)
    except UnusableRow as row:
        return row


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[tuple[list[int], list[Span]]]:
    """The tokens of each text, and the characters of each token."""
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        yield from zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)


def _unusable(index: int, reason: str, detail: str) -> Tokenised:
    # It may quote anything of the row or of the template, and is stored, and printed on terminals.
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(detail.split()))
    if len(text) > _MAX_DETAIL:
        text = f"{text[: _MAX_DETAIL - 3]}..."
    nothing = np.empty(0, np.int32), np.empty(0, np.bool_)
    return Tokenised(index, *nothing, truncated=False, response_truncated=False, unusable=reason, detail=text)


def _response_mask(rendered: Rendered, offsets: list[Span]) -> npt.NDArray[np.bool_]:
    """A token belongs to the response if it shares a character with one of the spans."""
    places = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(places), dtype=bool)
    for start, end in rendered.spans:
        mask |= (places[:, 0] < end) & (places[:, 1] > start)
    return mask


def _cut(index: int, rendered: Rendered, ids: list[int], offsets: list[Span], max_length: int) -> Tokenised:
    response = _response_mask(rendered, offsets)
    window = response_window(response, max_length)
    kept = response[window]
    if not kept[1:].any():
        return _unusable(index, NO_REPLY, "it has no token to learn from: its replies are empty")
    return Tokenised(
        index=index,
        input_ids=np.array(ids[window], np.int32),
        response=kept,
        truncated=len(kept) < len(response),
        response_truncated=int(kept.sum()) < int(response.sum()),
        whole=len(response),
        kept=(offsets[window.start][0], offsets[window.stop - 1][1]),
        notes=rendered.notes,
    )


def response_window(response: npt.NDArray[np.bool_], max_length: int) -> slice:
    """The window of at most `max_length` tokens with the most predicted response tokens; the earliest one if several tie.

    So a long prompt loses its beginning, and a response too long for the window loses its end.
    """
    length = len(response)
    if length <= max_length:
        return slice(0, length)
    before = np.concatenate([[0], np.cumsum(response)])
    starts = np.arange(length - max_length + 1)
    kept = before[starts + max_length] - before[starts + 1]  # the first token of a window is predicted by nothing
    start = int(np.argmax(kept))
    return slice(start, start + max_length)


def write_tokens(store: ArtifactStore, key: str, rows: Iterable[Tokenised]) -> None:
    """Writes the artifact, a row group at a time."""
    remaining = iter(rows)
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
                "detail": [row.detail for row in chunk],
                "notes": [row.notes or None for row in chunk],
            }
            writer.write_table(pa.table(columns, schema=_SCHEMA))


def read_counts(store: ArtifactStore, key: str) -> TokenCounts:
    """The counts of all rows, without their tokens."""
    names = ["length", "predicted", "truncated", "response_truncated"]
    with store.local(key) as path:
        table = pq.read_table(path, columns=[*names, "unusable", "notes"], memory_map=False)
    length, predicted, truncated, response_truncated = (table.column(name).to_numpy() for name in names)
    return TokenCounts(
        length.astype(np.int64),
        predicted.astype(np.int64),
        truncated,
        response_truncated,
        unusable=_rows_of_each(table.column("unusable")),
        notes={
            each["values"]: each["counts"]
            for each in pc.value_counts(pc.list_flatten(table.column("notes"))).to_pylist()
        },
    )


def _rows_of_each(column: pa.ChunkedArray) -> dict[str, npt.NDArray[np.int64]]:
    """Of each value that is not null, its rows."""
    values = sorted(pc.unique(column.drop_null()).to_pylist())
    return {value: np.flatnonzero(pc.fill_null(pc.equal(column, value), False).to_numpy()) for value in values}


def first_unusable(store: ArtifactStore, key: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a dataset that take no part, at most `count`: {index, reason, detail}."""
    with store.local(key) as path:
        table = pq.read_table(path, columns=["index", "unusable", "detail"], memory_map=False)
    first = table.filter(pc.is_valid(table.column("unusable"))).slice(0, count)
    return list(first.rename_columns(["index", "reason", "detail"]).to_pylist())


def read_indices(store: ArtifactStore, key: str) -> npt.NDArray[np.int64]:
    """The places in the dataset of all rows, int64 (n,)."""
    with store.local(key) as path:
        column = pq.read_table(path, columns=["index"]).column("index")
    return np.asarray(column.to_numpy(), dtype=np.int64)


def read_tokens(store: ArtifactStore, key: str, start: int, stop: int) -> Samples:
    """Rows [start, stop) of the artifact; reads only their row groups."""
    groups = range(start // ROW_GROUP, -(-stop // ROW_GROUP))
    with store.local(key) as path:
        table = pq.ParquetFile(path).read_row_groups(list(groups), columns=["input_ids", "response"])
    return _as_samples(table.slice(start - groups.start * ROW_GROUP, stop - start))


def read_all(store: ArtifactStore, key: str) -> Samples:
    """All rows of a small artifact, such as a target."""
    with store.local(key) as path:
        return _as_samples(pq.read_table(path, columns=["input_ids", "response"], memory_map=False))


def _as_samples(table: pa.Table) -> Samples:
    tokens, response = (table.column(name).combine_chunks() for name in ("input_ids", "response"))
    lengths = tokens.value_lengths().to_numpy(zero_copy_only=False)
    return Samples(
        input_ids=tokens.flatten().to_numpy().astype(np.int32),
        response=response.flatten().to_numpy(zero_copy_only=False).astype(bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def read_rows(store: ArtifactStore, key: str, indices: npt.NDArray[np.int64]) -> Samples:
    """The samples at those rising places in the dataset that the artifact holds; read group by group."""
    parts = []
    with store.local(key) as path:
        file = pq.ParquetFile(path)
        for group in range(file.metadata.num_row_groups):
            places = file.read_row_group(group, columns=["index"]).column("index").to_numpy()
            wanted = np.flatnonzero(np.isin(places, indices))
            if len(wanted):
                parts.append(file.read_row_group(group, columns=["input_ids", "response"]).take(pa.array(wanted)))
    return _as_samples(pa.concat_tables(parts))


def rows_artifact(store: ArtifactStore, source: str, indices: npt.NDArray[np.int64]) -> str:
    """The key of an artifact with the rows of `source` at the rising `indices`; written if it is not there yet."""
    key = rows_key(source, indices)
    if not store.is_whole(key):
        copy_rows(store, source, key, indices)
    return key


def copy_rows(store: ArtifactStore, source: str, key: str, indices: npt.NDArray[np.int64]) -> None:
    """Writes the rows of `source` at the rising `indices` as another artifact, in full row groups like any other."""
    with (
        store.local(source) as path,
        store.writing(key) as target,
        pq.ParquetWriter(target, _SCHEMA, compression="zstd") as writer,
    ):
        file = pq.ParquetFile(path)
        pending = _SCHEMA.empty_table()
        for group in range(file.metadata.num_row_groups):
            inside = indices[(indices >= group * ROW_GROUP) & (indices < (group + 1) * ROW_GROUP)]
            if len(inside):
                taken = file.read_row_group(group).take(pa.array(inside - group * ROW_GROUP))
                pending = pa.concat_tables([pending, taken])
            if len(pending) >= ROW_GROUP:
                writer.write_table(pending.slice(0, ROW_GROUP))
                pending = pending.slice(ROW_GROUP)
        if len(pending):
            writer.write_table(pending)
