"""Datasets, their rows, uploads in parts, and ready-made targets. Made of docs/openapi.json by `make openapi`: change that."""

from datetime import datetime
from typing import Any, Literal, TypeAlias

from winnow.answers.base import Answer


class DetectedForm(Answer):
    """Rows of which the same columns were taken."""

    form: str
    columns: dict[str, str]
    """The column that each part was taken from, also `id` and `source`"""
    rows: int


class Note(Answer):
    """What is worth knowing of rows that were kept."""

    code: str
    rows: int
    message: str


class Detected(Answer):
    """What an upload was found to be, and what was taken of it. Lists are limited; the rest is counted."""

    container: str
    """Of the file: jsonl, parquet, ..."""
    compression: str | None
    forms: list[DetectedForm]
    """The most frequent first, at most 50"""
    more_forms: int
    source_columns: list[str]
    left_alone: list[str]
    """Columns, and keys of messages (`messages[].score`), that had values and were not taken; at most 100"""
    more_left_alone: int
    """Further ones, counted up to 10,000"""
    notes: list[Note]
    sha256: str | None
    """Of the file as it was uploaded; null: it was imported, or uploaded to a version that did not keep it"""


Form: TypeAlias = (
    Literal[
        "auto",
        "messages",
        "conversations",
        "prompt_completion",
        "instruction",
        "question_answer",
        "inputs_targets",
        "text",
    ]
    | str
)


OnBadRow: TypeAlias = Literal["refuse", "skip"] | str


class Choice(Answer):
    """Of a ready-made target, how many samples were to be taken, and which."""

    name: str
    count: int
    seed: int


class ImportedFile(Answer):
    """The object `ImportedFile` of the API."""

    path: str
    size: int
    sha256: str


class Read(Answer):
    """What an import has read."""

    config: str
    split: str
    files: list[ImportedFile]
    """Those that rows were taken of, in order"""


class Origin(Answer):
    """Where an imported dataset comes from: what was asked, and the commit."""

    id: str
    revision: str
    commit: str
    config: str | None
    split: str | None
    format: Form
    columns: dict[str, str] | None
    template: dict[str, str] | None
    on_bad_row: OnBadRow
    limit: int | None
    preset: Choice | None
    """Of a ready-made target: only chosen rows were taken"""
    read: Read | None
    """null before it is ready"""


class ImportProgress(Answer):
    """How far an import is."""

    rows: int
    """Rows read"""
    bytes: int
    """Bytes downloaded"""
    total_bytes: int | None
    """Of all files of the split; with `limit` fewer may be needed"""


class ImportFailure(Answer):
    """Why an import has failed."""

    code: str
    detail: str
    errors: list[dict[str, Any]] | None
    """Rows that cannot be used, as of an upload"""


class Dataset(Answer):
    """An uploaded dataset, or one that is imported from the hub: until it is `ready`, what describes its rows is null."""

    object: Literal["dataset"] | str
    id: str
    name: str
    status: Literal["importing", "ready", "failed"] | str
    fingerprint: str | None
    """sha256 of the rows in their canonical form: equal content, equal fingerprint"""
    row_count: int | None
    byte_count: int | None
    """Bytes of the rows in their canonical form"""
    sources: dict[str, int] | None
    """Rows by source: at most 1,000 by name, the others under `(other)`; rows without a source under `(none)`"""
    detected: Detected | None
    """What was taken of the upload; null where that was not yet recorded"""
    skipped: int
    """Rows of the upload that could not be used and were left out (`on_bad_row=skip`); GET .../skipped names them"""
    hub: Origin | None
    """Where an imported dataset comes from; null: it was uploaded"""
    progress: ImportProgress | None
    """While it is imported"""
    error: ImportFailure | None
    """Why its import has failed"""
    created_at: datetime


class FunctionCall(Answer):
    """The object `FunctionCall` of the API."""

    name: str
    arguments: dict[str, Any] | str
    """An object, or a string that is not the JSON of one"""


class ToolCall(Answer):
    """The object `ToolCall` of the API."""

    type: Literal["function"] | str
    id: str | None
    function: FunctionCall


class Message(Answer):
    """A message; what it does not have is null."""

    role: Literal["system", "user", "assistant", "tool"] | str
    content: str
    counts: bool
    """Whether the loss counts it: the model learns it"""
    reasoning_content: str | None
    tool_calls: list[ToolCall] | None
    tool_call_id: str | None
    name: str | None


class TokenCounts(Answer):
    """The tokens of a row for a job."""

    total: int
    """Before the row is cut to `max_length`"""
    kept: int
    """After it"""
    prompt: int
    """Of those that are kept: what is only read"""
    counted: int
    """Of those that are kept: what the loss counts"""


class Unusable(Answer):
    """Why a row would take no part in a job."""

    reason: str
    """A code, as in a job's `unusable`"""
    detail: str


class Rendered(Answer):
    """A row as a job with the model would read it. Places are in characters of `text`, from 0; the end is excluded."""

    text: str | None
    """What the model's chat template makes of the row; null where it makes nothing of it"""
    spans: list[tuple[int, int]]
    """What the loss counts: [start, end)"""
    kept: tuple[int, int] | None
    """What is left of the text after the cut to `max_length`; null for an unusable row"""
    tokens: TokenCounts | None
    """null for an unusable row"""
    truncated: bool
    """Whether the row is cut"""
    response_truncated: bool
    """Whether some of what the loss would count is cut"""
    notes: list[str]
    """Codes of what the text does not say as the messages do, as in a job's `rendering`"""
    unusable: Unusable | None
    """null: the row takes part"""


class Row(Answer):
    """A row, and with `model` what the model makes of it."""

    index: int
    """Position in the dataset, from 0"""
    id: str
    """The row's own id, or its index if it has none"""
    source: str | None
    messages: list[Message] | None
    tools: list[dict[str, Any]] | None
    text: str | None
    rendered: Rendered | None
    """null without `model`"""


class PendingRows(Answer):
    """The rows are not rendered yet: repeat the request."""

    object: Literal["dataset.rows.pending"] | str
    status: Literal["pending", "running"] | str
    """`pending`: no worker has begun"""
    detail: str
    """What it waits for"""


class HubSplit(Answer):
    """A split of a dataset on the hub."""

    id: str
    config: str
    split: str


class Spread(Answer):
    """What the samples of a target are spread over: each value has as many of them as any other, where it has as many
    rows."""

    over: str
    column: str
    """The column that says it"""
    until: str | None
    """Only what stands before this in the column; null: all of it"""


class Preset(Answer):
    """A ready-made target."""

    name: str
    title: str
    hub: HubSplit
    why: str
    """Why this split"""
    template: dict[str, str]
    """What makes a conversation of a row, as `template` of an upload"""
    copies: int
    """How many samples a row holds; the template takes the one with the number `copy`, from 1"""
    spread: Spread | None
    """null: samples are drawn from the whole split alike"""
    samples: int
    """How many there are"""
    count: int
    """How many are taken where the request does not say"""
    licence: str
    homepage: str
    allowed: bool
    """Whether this server imports the dataset (WINNOW_DATASETS__HUB); else no job can name it"""


class Upload(Answer):
    """A file that is sent in parts."""

    object: Literal["upload"] | str
    id: str
    bytes: int
    sha256: str
    part_bytes: int
    """Size of each part but the last, which has the rest"""
    parts: int
    """How many there are to send"""
    received: int
    """How many have come; the number of the next one"""
    rows_read: int
    """While a dataset is made of it: rows read so far"""
    created_at: datetime
    expires_at: datetime | None
    """When it is removed if nothing is sent; null: never"""
