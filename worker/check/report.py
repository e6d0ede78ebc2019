"""What a check found, in lines for a terminal."""

from collections.abc import Iterator
from typing import Any

from winnow import marked_text, render
from winnow.marked_text import marked, printable
from worker.summary import RENDERING

_NAMED = 10
_OF_MODEL = ("tokens", "kept_tokens", "counted_tokens")
_QUANTILES = ("total", "min", "median", "p90", "p99", "max")


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Everything of `examine.examine` that a reader needs, the shown rows first."""
    for row in found.get("shown", ()):
        yield from _shown(row)
    refused = found["refused"]
    if refused is not None:
        yield f"{found['file']}: refused ({refused['code']})"
        if found["bad_rows"] is None:
            yield f"  {printable(refused['detail'])}"
        else:
            yield from _bad_rows(found["bad_rows"])
        return
    detected, model = found["detected"], found["model"]
    packed = "" if detected["compression"] is None else f", {detected['compression']}"
    yield f"{found['file']}: {detected['container']}{packed}, {found['bytes']:,} bytes, usable: {render.rows(found['rows'])}"
    yield from render.detection(detected)
    sources = sorted(found["sources"].items(), key=lambda entry: -entry[1])
    more = f", and {len(sources) - _NAMED:,} more" if len(sources) > _NAMED else ""
    yield f"  sources: {', '.join(f'{name} {rows:,}' for name, rows in sources[:_NAMED])}{more}"
    if found["bad_rows"] is not None:
        yield from _bad_rows(found["bad_rows"])
        yield (
            "An upload refuses the file for them; with --on-bad-row skip it is stored without them."
            if found["upload"] == "refused"
            else "An upload is stored without them, with a report that names each."
        )
    lengths = {
        "characters": found["characters"]["all"],
        "counted characters": found["characters"]["counted"],
        **({} if model is None else {name.replace("_", " "): model[name] for name in _OF_MODEL}),
    }
    yield ""
    yield f"{'a row has':<20}{''.join(f'{name:>14}' for name in _QUANTILES)}"
    for name, summary in lengths.items():
        if summary is not None:
            yield f"{name:<20}{''.join(f'{summary[column]:>14,}' for column in _QUANTILES)}"
    if model is not None:
        yield ""
        yield from _of_model(model)


def _bad_rows(bad: dict[str, Any]) -> Iterator[str]:
    yield f"{_rows(bad['count'])} cannot be used:"
    for each in bad["by_reason"][:_NAMED]:
        first = each["first"]
        which = "" if each["rows"] == 1 else "the first is "
        yield f"  {_rows(each['rows'])}: {which}{first['unit']} {first['number']}: {printable(first['reason'])}"
    if more := bad["more_reasons"] + sum(each["rows"] for each in bad["by_reason"][_NAMED:]):
        yield f"  {_rows(more)} for other reasons"


def _of_model(model: dict[str, Any]) -> Iterator[str]:
    template = "its own chat template" if model["chat_template"] != "default" else "no chat template: the default one"
    yield f"{model['name']}: {template}; rows are cut to {model['max_length']:,} tokens"
    if model["truncated"]:
        yield f"  {_rows(model['truncated'])} cut, {model['truncated_responses']:,} of them in what is learnt"
    for code, rows in model["rendering"].items():
        yield f"  {_rows(rows)}: {RENDERING.get(code, code)}"
    unusable = model["unusable"]
    for reason, rows in unusable["by_reason"].items():
        yield f"  {_rows(rows)} unusable: {reason}"
    for row in unusable["first"][:_NAMED]:
        yield f"    row {row['index']} (id {row['id']}): {row['reason']}: {printable(row['detail'])}"
    if more := unusable["count"] - len(unusable["first"][:_NAMED]):
        yield f"    and {_rows(more)} more"
    if model["too_many_unusable"]:
        yield f"  A job would fail (too_many_unusable): max_unusable allows a share of {model['max_unusable']:g}."


def _shown(row: dict[str, Any]) -> Iterator[str]:
    if "tokens" in row:
        yield from marked_text.lines(row, row)
    else:
        yield f"--- row {row['index']} (id {row['id']})"
        yield marked(row["text"], row["spans"])


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"
