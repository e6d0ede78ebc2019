"""Of a result: which rows took no part, and which repeat others. Made of docs/openapi.json by `make openapi`: change that."""

from typing import Literal

from winnow.answers.base import Answer


class UnusableRow(Answer):
    """The object `UnusableRow` of the API."""

    index: int
    id: str
    reason: str
    detail: str | None


class UnusableRows(Answer):
    """The object `UnusableRows` of the API."""

    count: int
    by_reason: dict[str, int]
    first: list[UnusableRow]
    """At most a hundred"""


class UnusableCounts(Answer):
    """The object `UnusableCounts` of the API."""

    pool: UnusableRows
    target: UnusableRows


class NamedSample(Answer):
    """The object `NamedSample` of the API."""

    index: int
    id: str


class NonfiniteRows(Answer):
    """The object `NonfiniteRows` of the API."""

    count: int
    samples: list[NamedSample]
    """At most a hundred"""


class Nonfinite(Answer):
    """The object `Nonfinite` of the API."""

    pool: NonfiniteRows
    target: NonfiniteRows


class ExcludedRow(Answer):
    """The object `ExcludedRow` of the API."""

    index: int
    id: str
    reason: Literal["duplicate", "overlap"] | str
    same_as: str
    """Id of the sample of the pool, or of the target, that it repeats"""


class Excluded(Answer):
    """The object `Excluded` of the API."""

    count: int
    by_reason: dict[str, int]
    first: list[ExcludedRow]
    """At most a hundred"""


class RepeatsInPool(Answer):
    """The object `RepeatsInPool` of the API."""

    exact: int
    """Samples that repeat another exactly: case, white space and Unicode forms aside"""
    near: int
    """Samples that repeat another but for some words"""
    repeated: int
    """How many other samples they repeat"""


class Repeat(Answer):
    """The object `Repeat` of the API."""

    id: str
    """Of the selected sample"""
    same_as: str
    """Id of the sample that it repeats"""


class RepeatsFound(Answer):
    """The object `RepeatsFound` of the API."""

    pool: RepeatsInPool | None
    """null in results of earlier versions"""
    excluded: int | None
    """Samples that an option left out"""
    count: int
    """Selected samples that repeat one"""
    first: list[Repeat]
    """At most a hundred of these"""


class Repeats(Answer):
    """The object `Repeats` of the API."""

    duplicates: RepeatsFound | None
    """Of another sample of the pool"""
    overlap: RepeatsFound | None
    """Of a sample of the target"""


class RenderingNotes(Answer):
    """How often the rendered text is not all that the messages say, by the code of a note."""

    pool: dict[str, int]
    target: dict[str, int]
