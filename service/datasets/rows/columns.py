"""The canonical form of whole columns at a time: what `rows.canonical` makes of rows, for batches in which every row is plain.

It never judges a row to be invalid. A batch with anything that is not clearly valid is left to `rows`, row by row, which
takes it or says what is wrong with it; so both always agree. Which form and columns a row has both learn from `RowOptions`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from service.datasets.rows.forms import CONVERSATIONS
from service.datasets.rows.messages import CALLS, CONTENT_KEYS, ROLE_KEYS, ROLE_OF, ROLES
from service.datasets.rows.options import Plan, RowOptions, Taken
from service.datasets.values import MAX_LABEL, NO_SOURCE, OTHER_SOURCES
from service.names import NOT_IN_NAMES

_REFUSED = re.sub(r"\\u([0-9a-fA-F]{4})", r"\\x{\1}", NOT_IN_NAMES)  # as RE2 writes it
_ESCAPED = {chr(code): json.dumps(chr(code))[1:-1] for code in range(32)}
_FREQUENT = "\n\r\t"
_MOST_PATTERNS = 256
_ROLE_OF = {said: role for said, role in ROLE_OF.items() if role != CALLS}

_Mask = np.ndarray[tuple[int], np.dtype[np.bool_]]
_Columns = Mapping[str, pa.Array]


@dataclass(frozen=True, slots=True)
class CanonicalColumns:
    """As many `CanonicalRow`s; `lines` are their lines, `taken` says what became of how many of them."""

    ids: pa.StringArray
    sources: pa.StringArray
    samples: pa.StringArray
    lines: pa.StringArray
    taken: tuple[tuple[Taken, int], ...]


class _NotPlain(Exception):
    """A value of the batch has to be looked at on its own."""


def canonical_columns(
    batch: pa.RecordBatch, start: int, options: RowOptions, max_row_bytes: int
) -> CanonicalColumns | None:
    """The canonical rows of a validated batch, whose first row has the number `start`; None if they cannot be told together."""
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    try:
        if len(columns) != batch.num_columns:
            raise _NotPlain
        present = {name: _present(column) for name, column in columns.items()}
        patterns = list(_patterns(present, batch.num_rows, options))
        ids = _ids(columns.get(options.id) if options.id is not None else None, start, batch.num_rows)
        named = [name for name in options.sources if present.get(name, False) is not False]
        sources = _sources(
            [columns[name] for name in named[: 1 if named and present[named[0]] is True else None]], batch.num_rows
        )
        samples = _samples(columns, patterns)
        source_json = pc.fill_null(_json(sources), "null")
        lines = _join("[", _json(ids), ",", source_json, ",", samples, "]\n")
        _require(pc.less_equal(pc.binary_length(lines), max_row_bytes))
    except _NotPlain:
        return None
    taken = tuple((plan.taken, batch.num_rows if rows is None else int(rows.sum())) for plan, rows in patterns)
    return CanonicalColumns(ids, sources, samples, lines, taken)


def _present(column: pa.Array) -> _Mask | bool:
    """Which rows have a value; True: all, False: none."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if column.null_count == 0:
        return True
    return column.is_valid().to_numpy(False) if column.null_count < len(column) else False


def _patterns(
    present: Mapping[str, _Mask | bool], rows: int, options: RowOptions
) -> Iterator[tuple[Plan, _Mask | None]]:
    """The plan of each set of names that rows have, and which rows; None: all."""
    mixed = [name for name, mask in present.items() if not isinstance(mask, bool)]
    if len(mixed) > 62:
        raise _NotPlain
    codes = np.zeros(rows, np.int64)
    for name in mixed:
        codes = 2 * codes + present[name]
    found = np.unique(codes) if mixed else codes[:1]
    if len(found) > _MOST_PATTERNS:
        raise _NotPlain
    for code in found.tolist():
        of_code = {name for i, name in enumerate(reversed(mixed)) if code >> i & 1}
        plan = options.plans[tuple(name for name, mask in present.items() if mask is True or name in of_code)]
        if plan is None or plan.media or plan.columns.get("prompt") in CONVERSATIONS:  # the last may be a list's JSON
            raise _NotPlain
        yield plan, codes == code if mixed else None


def _require(condition: pa.BooleanArray) -> None:
    """That it is true of every row; a null is not."""
    if not pc.all(condition, skip_nulls=False, min_count=0).as_py():
        raise _NotPlain


def _join(*parts: object) -> pa.StringArray:
    return pc.binary_join_element_wise(*parts, "")


def _json(strings: pa.StringArray) -> pa.StringArray:
    """Each as JSON writes it, in quotes, other letters than ASCII unchanged; null stays null."""
    escaped = pc.replace_substring(pc.replace_substring(strings, "\\", "\\\\"), '"', '\\"')
    if _has_any(escaped, r"[\x00-\x1f]"):
        for character in _FREQUENT:
            escaped = pc.replace_substring(escaped, character, _ESCAPED[character])
        if _has_any(escaped, r"[\x00-\x1f]"):
            for character, form in _ESCAPED.items():
                escaped = pc.replace_substring(escaped, character, form)
    return _join('"', escaped, '"')


def _has_any(strings: pa.StringArray, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(strings, pattern)).as_py())


def _text(column: pa.Array) -> pa.StringArray:
    """The column if it holds strings that content may be; nulls are for the caller."""
    if not pa.types.is_string(column.type) or pc.any(pc.match_substring(column, "\0")).as_py():
        raise _NotPlain
    return column


def _is_blank(text: pa.StringArray) -> pa.BooleanArray:
    return pc.equal(pc.utf8_ltrim_whitespace(text), "")


def _label(column: pa.Array) -> pa.StringArray:
    if not pa.types.is_string(column.type) or _has_any(column, _REFUSED):
        raise _NotPlain
    if (pc.max(pc.utf8_length(column)).as_py() or 0) > MAX_LABEL:
        raise _NotPlain
    return column


def _ids(column: pa.Array | None, start: int, rows: int) -> pa.StringArray:
    numbers = pa.array(np.arange(start, start + rows)).cast(pa.string())
    if column is None or _present(column) is False:
        return numbers
    if pa.types.is_floating(column.type):
        try:
            column = pc.if_else(pc.is_nan(column), None, column).cast(pa.int64())
        except pa.ArrowInvalid:  # not integers
            raise _NotPlain from None
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    ids = pc.coalesce(_label(column), numbers)
    _require(pc.not_equal(ids, ""))
    return ids


def _sources(columns: Sequence[pa.Array], rows: int) -> pa.StringArray:
    """Of each row the first of the columns that it has."""
    if not columns:
        return pa.nulls(rows, pa.string())
    if not all(pa.types.is_string(column.type) for column in columns):
        raise _NotPlain
    sources = _label(pc.coalesce(*columns))
    if pc.any(pc.is_in(sources, pa.array([NO_SOURCE, OTHER_SOURCES]))).as_py():
        raise _NotPlain
    return sources


def _samples(columns: _Columns, patterns: Sequence[tuple[Plan, _Mask | None]]) -> pa.StringArray:
    """In a batch of several forms each is made of its own rows, and they are put in order again."""
    groups: dict[tuple[tuple[str, str], ...], list[_Mask | None]] = {}
    for plan, mask in patterns:
        groups.setdefault(tuple(plan.columns.items()), []).append(mask)
    parts, places = [], []
    for slots, masks in groups.items():
        filled = {slot: columns[name] for slot, name in slots}
        if len(groups) == 1:
            return _sample(filled)
        mask = np.logical_or.reduce([each for each in masks if each is not None])
        parts.append(_sample({slot: column.filter(pa.array(mask)) for slot, column in filled.items()}))
        places.append(np.flatnonzero(mask))
    return pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(places))))


def _sample(filled: _Columns) -> pa.StringArray:
    """Of columns in which every row has a value, by their slots."""
    make = _MAKERS.get(frozenset(filled) - {"context", "system"})
    if make is None:
        raise _NotPlain
    return make(filled)


def _texts(filled: _Columns) -> pa.StringArray:
    text = _text(filled["text"])
    _require(pc.invert(_is_blank(text)))
    return _join('{"text":', _json(text), "}")


def _exchanges(filled: _Columns) -> pa.StringArray:
    user, assistant = _text(filled["prompt"]), _text(filled["completion"])
    blank = pc.and_(_is_blank(user), _is_blank(assistant))
    if "context" in filled:
        more = _text(filled["context"])
        blank = pc.and_(blank, _is_blank(more))
        user = pc.if_else(pc.equal(more, ""), user, _join(user, "\n\n", more))
    said = _join('{"content":', _json(user), ',"role":"user"},{"content":', _json(assistant), ',"role":"assistant"}]}')
    if "system" in filled:
        system = _text(filled["system"])
        blank = pc.and_(blank, _is_blank(system))
        first = _join('{"content":', _json(system), ',"role":"system"},')
        said = _join(pc.if_else(pc.equal(system, ""), "", first), said)
    _require(pc.invert(blank))
    return _join('{"messages":[', said)


def _conversations(filled: _Columns) -> pa.StringArray:
    lists = filled["messages"]
    if "system" in filled or not pa.types.is_list(lists.type) or not pa.types.is_struct(lists.type.value_type):
        raise _NotPlain
    messages = lists.flatten()
    if messages.null_count:
        raise _NotPlain
    given = dict(zip((field.name for field in messages.type), messages.flatten(), strict=True))
    if len(given) != messages.type.num_fields:
        raise _NotPlain
    used = {name: column for name, column in given.items() if column.null_count < len(column)}
    role, content = (next((used.pop(key) for key in keys if key in used), None) for keys in (ROLE_KEYS, CONTENT_KEYS))
    if used or role is None or content is None or not pa.types.is_string(role.type) or _text(content).null_count:
        raise _NotPlain
    codes = pc.index_in(role, _said_roles())
    if codes.null_count:
        raise _NotPlain
    roles = _CANONICAL_CODES[codes.to_numpy()]
    if (codes.to_numpy() != roles).any():
        role = _said_roles().take(pa.array(roles))
    lengths = pc.list_value_length(lists).to_numpy(False)
    if not lengths.all():
        raise _NotPlain
    is_reply = roles == ROLES.index("assistant")
    starts = np.cumsum(lengths) - lengths
    has_content = ~_is_blank(content).to_numpy(False)
    if not np.logical_or.reduceat(is_reply, starts).all() or not np.logical_or.reduceat(has_content, starts).all():
        raise _NotPlain
    is_system = roles == ROLES.index("system")
    # Such a message is left out, and a reply that is followed by others is told.
    if (is_system & pc.equal(content, "").to_numpy(False)).any() or not is_reply[starts + lengths - 1].all():
        raise _NotPlain
    said = _join('{"content":', _json(content), ',"role":"', role, '"}')
    offsets = pa.array(np.append(starts, len(said)), pa.int32())
    return _join('{"messages":[', pc.binary_join(pa.ListArray.from_arrays(offsets, said), ","), "]}")


@cache  # to make an array pyarrow imports pandas, half a second that most processes do not need
def _said_roles() -> pa.StringArray:
    """The canonical roles come first, so that their codes are their own."""
    return pa.array(list(_ROLE_OF))


_CANONICAL_CODES = np.array([ROLES.index(role) for role in _ROLE_OF.values()], np.int32)
_MAKERS: dict[frozenset[str], Callable[[_Columns], pa.StringArray]] = {
    frozenset({"text"}): _texts,
    frozenset({"prompt", "completion"}): _exchanges,
    frozenset({"messages"}): _conversations,
}
