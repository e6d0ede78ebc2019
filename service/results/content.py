"""The samples' content as columns of an export: uploaded again, the file gives the same samples.

In JSON lines, and as JSON in the cells of CSV, they are what they are. In Parquet all messages have one type, with the fields
that any message of the pool needs; what has no fixed fields is JSON in a string: the arguments of calls, and tools.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from service.datasets import storage
from service.results.formats import Format
from service.storage.artifacts import ArtifactStore

_SCANNED_ROWS = 256  # at a time; a row may have a megabyte
_JSON = pa.json_(pa.string())
_TOOL_CALL = pa.struct(
    {
        "id": pa.string(),
        "type": pa.string(),
        "function": pa.struct({"name": pa.string(), "arguments": pa.string()}),
    }
)
# Of a message besides its role and content, with what shows that a canonical sample has some. Keys are in order there, so a name
# that is a message's own is known by what follows; a sample that only speaks of one adds a field of nulls.
_FIELDS: dict[str, tuple[pa.DataType, str]] = {
    "reasoning_content": (pa.string(), r'"reasoning_content":"'),
    "tool_calls": (pa.list_(_TOOL_CALL), r'"tool_calls":\['),
    "tool_call_id": (pa.string(), r'"tool_call_id":"'),
    "name": (pa.string(), r'"name":"(?:[^"\\]|\\.)*","(?:reasoning_content|role)":"'),
    "counts": (pa.bool_(), r'"counts":false'),
}
_COLUMNS = {"messages": r'^\{"messages":', "tools": r'\],"tools":\[', "text": r'^\{"text":'}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class Layout:
    """What a pool's content needs: of the columns `messages`, `tools` and `text`, and of the fields of its messages."""

    columns: tuple[str, ...]
    fields: tuple[str, ...]

    def content(self, samples: Sequence[storage.Sample], format: Format) -> dict[str, pa.Array]:
        """The columns, by name."""
        return {name: self._column(name, samples, format) for name in self.columns}

    def _column(self, name: str, samples: Sequence[storage.Sample], format: Format) -> pa.Array:
        values = [getattr(sample, name) for sample in samples]
        if name == "text":
            return pa.array(values, pa.string())
        if name == "messages":
            values = [None if value is None else [_in_order(message) for message in value] for value in values]
            if format is Format.PARQUET:
                flat = [
                    None if value is None else [_with_text_arguments(message) for message in value] for value in values
                ]
                return pa.array(flat, self._messages())
        texts = [None if value is None else _encode(value) for value in values]
        # As an extension, Parquet would keep a type that few readers know.
        return pa.array(texts, pa.string() if format is Format.PARQUET else _JSON)

    def _messages(self) -> pa.DataType:
        more = {name: _FIELDS[name][0] for name in self.fields}
        return pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), **more}))


def layout(store: ArtifactStore, fingerprint: str) -> Layout:
    """The layout of a pool's content.

    A file's columns must be known before its first row is written, hence this scan of all rows.
    """
    wanted = {**_COLUMNS, **{name: pattern for name, (_, pattern) in _FIELDS.items()}}
    found: set[str] = set()
    with store.open(storage.rows_key(fingerprint)) as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
        for batch in parquet.iter_batches(_SCANNED_ROWS, columns=["sample"], use_threads=False):
            for name in wanted.keys() - found:
                if pc.any(pc.match_substring_regex(batch.column("sample"), wanted[name])).as_py():
                    found.add(name)
            if len(found) == len(wanted):
                break
    return Layout(*(tuple(name for name in names if name in found) for names in (_COLUMNS, _FIELDS)))


def size(sample: storage.Sample) -> int:
    """About how many characters the content of a sample takes."""
    if sample.messages is None:
        return len(sample.text or "")
    length = 0 if sample.tools is None else len(_encode(sample.tools))
    for message in sample.messages:
        length += len(message["content"]) + len(message.get("reasoning_content", ""))
        if "tool_calls" in message:
            length += len(_encode(message["tool_calls"]))
    return length


def _in_order(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": message["content"], **message}


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    return {
        **call,
        "function": {**function, "arguments": arguments if isinstance(arguments, str) else _encode(arguments)},
    }
