"""How the rows of an upload are read: the caller's options, and the form and the columns that they and a row's names choose."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

from service.datasets.rows.forms import (
    CONVERSATIONS,
    FORMS,
    ID,
    IMPLIED_SOURCE,
    MEDIA,
    PREFERENCES,
    REPLIES,
    SOURCE,
    Form,
)
from service.datasets.rows.template import RowTemplate
from service.datasets.values import MAX_LABEL, parsed, quoted, shown
from service.http.errors import Unprocessable
from service.names import check_name

MAX_TOLD = 100


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a row's fields. `columns`: of each filled slot its column, `id` and `source` among the slots; `left`:
    the fields that were left alone, those of messages as `messages[].name`; `notes`: codes of `messages.NOTES`. Of each at most a
    hundred."""

    form: str
    columns: tuple[tuple[str, str], ...] = ()
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """How rows with certain names are taken: the column of each slot. `media`: columns of pictures or sounds beside them."""

    form: str
    columns: dict[str, str]
    id: str | None
    source: str | None
    source_is_implied: bool
    media: tuple[str, ...]
    taken: Taken


class _Plans(dict[tuple[str, ...], Plan | None]):
    """The plan for the names that are present in a row, made once; None: they are in no form."""

    # Rows may have as many sets of names as there are rows, and names of any length.
    _MOST, _MOST_CHARACTERS = 1_024, 8_192

    def __init__(self, options: "RowOptions") -> None:
        super().__init__()
        self._options = options

    def __missing__(self, names: tuple[str, ...]) -> Plan | None:
        found = self._options._plan(names)
        if sum(map(len, names)) <= self._MOST_CHARACTERS:
            if len(self) >= self._MOST:
                self.clear()
            self[names] = found
        return found


@dataclass(frozen=True, slots=True)
class RowOptions:
    """How the rows of an upload are read. `columns`: pairs of a slot, or a known column, and the column that stands for it."""

    form: Form = Form.AUTO
    columns: tuple[tuple[str, str], ...] = ()
    template: RowTemplate | None = None
    plans: _Plans = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", _Plans(self))

    @classmethod
    def parse(cls, form: Form = Form.AUTO, columns: str | None = None, template: str | None = None) -> Self:
        """From the parameters of a query.

        Raises:
            Unprocessable: one of them cannot be used; the error names it.
        """
        mapped = _mapping(columns) if columns is not None else ()
        if template is None:
            options = cls(form, mapped)
            if not options.eligible:
                names = " and ".join(slot for slot, _ in mapped if slot not in (ID, SOURCE))
                which = "no form" if form is Form.AUTO else f"format={form}"
                raise Unprocessable(
                    f"columns: {which} has {names} together. The slots of each: {_described()}", param="columns"
                )
            return options
        if form is not Form.AUTO:
            raise Unprocessable("format: a template makes its own messages; leave format out.", param="format")
        if others := [slot for slot, _ in mapped if slot not in (ID, SOURCE)]:
            raise Unprocessable(
                f"columns: beside a template only {ID} and {SOURCE} can be named, not {others[0]}; the template names the rest.",
                param="columns",
            )
        return cls(form, mapped, RowTemplate.parse(template))

    @property
    def wanted(self) -> tuple[str, ...] | None:
        """The columns that are looked at, in no order that matters; None: all."""
        named = [column for _, column in self.columns]
        if self.template is not None:
            return (
                None
                if self.template.takes_all
                else tuple(dict.fromkeys([ID, SOURCE, IMPLIED_SOURCE, *named, *self.template.names]))
            )
        forms = [column for form in self.eligible for slots in FORMS[form] for of in slots.values() for column in of]
        conversations = CONVERSATIONS if named else ()
        known = [ID, SOURCE, IMPLIED_SOURCE, *named, *forms, *conversations, *PREFERENCES, *MEDIA, *REPLIES]
        return tuple(dict.fromkeys(known))

    @property
    def eligible(self) -> tuple[Form, ...]:
        """The forms in which each named slot has its place, in their order."""
        forms = FORMS if self.form is Form.AUTO else (self.form,)
        return tuple(form for form in forms if self._filled(form) is not None)

    @property
    def id(self) -> str | None:
        return next(self._labels(ID, (ID,)), None)

    @property
    def sources(self) -> tuple[str, ...]:
        """The columns that name the source, the first that a row has."""
        return tuple(self._labels(SOURCE, (SOURCE, IMPLIED_SOURCE)))

    def _labels(self, slot: str, usual: tuple[str, ...]) -> Iterator[str]:
        mapped = [column for name, column in self.columns if name == slot]
        others = {column for _, column in self.columns}
        yield from mapped or (name for name in usual if name not in others)

    def _filled(self, form: Form) -> dict[str, str] | None:
        """The slots of the form that the named columns fill; None if one of them has no place in it, or two have the same."""
        slots = {**FORMS[form].required, **FORMS[form].optional}
        filled: dict[str, str] = {}
        for name, column in self.columns:
            if name in (ID, SOURCE):
                continue
            slot = next((slot for slot, columns in slots.items() if name == slot or name in columns), None)
            if slot is None or slot in filled:
                return None
            filled[slot] = column
        return filled

    def _plan(self, names: tuple[str, ...]) -> Plan | None:
        present = dict.fromkeys(names)
        columns: dict[str, str] = {}
        if self.template is not None:
            form, template = "template", self.template
            read = [(f"template.{shown(name)}", name) for name in names if template.takes_all or name in template.names]
        else:
            fitting = ((form, self._columns(form, present)) for form in self.eligible)
            found = next(((form, columns) for form, columns in fitting if columns is not None), None)
            if found is None:
                return None
            form, columns = found
            read = list(columns.items())
        id = self.id if self.id in present else None
        source = next((name for name in self.sources if name in present), None)
        read += [(slot, column) for slot, column in ((ID, id), (SOURCE, source)) if column is not None]
        used = {column for _, column in read}
        left = [name for name in names if name not in used]
        told = tuple((slot, shown(column)) for slot, column in read[:MAX_TOLD])
        taken = Taken(form, told, tuple(map(shown, left[:MAX_TOLD])))
        implied = source == IMPLIED_SOURCE and (SOURCE, IMPLIED_SOURCE) not in self.columns
        media = tuple(name for name in MEDIA if name in left and self.template is None)
        return Plan(form, columns, id, source, implied, media, taken)

    def _columns(self, form: Form, present: Mapping[str, object]) -> dict[str, str] | None:
        """The column of each slot that the row can fill; None if it cannot fill one that is required."""
        filled = self._filled(form) or {}
        named = {column for _, column in self.columns}
        columns: dict[str, str] = {}
        for slots in FORMS[form]:
            for slot, known in slots.items():
                if slot == "prompt" and form is Form.PROMPT_COMPLETION and "completion" in filled:
                    known = (*known, *CONVERSATIONS)
                choice = (filled[slot],) if slot in filled else tuple(name for name in known if name not in named)
                found = next((name for name in choice if name in present), None)
                if found is not None:
                    columns[slot] = found
                elif slot in FORMS[form].required:
                    return None
        return columns


def _mapping(text: str) -> tuple[tuple[str, str], ...]:
    """`slot:column,slot:column`, or a JSON object, in which a column's name may have a comma."""
    if text.lstrip().startswith("{"):
        try:
            given = parsed(text)
        except ValueError as error:
            raise Unprocessable(f"columns: it is not a JSON object: {error}", param="columns") from None
        pairs = list(given.items())
    else:
        pairs = [
            (slot.strip(), column.strip()) for slot, _, column in (pair.partition(":") for pair in text.split(","))
        ]
    known = _known_slots()
    for slot, column in pairs:
        if slot not in known:
            raise Unprocessable(
                f"columns: {quoted(slot)} is no slot. Write columns=slot:column,... with the slots {', '.join(known)}.",
                param="columns",
            )
        if not isinstance(column, str) or not 0 < len(column) <= MAX_LABEL:
            raise Unprocessable(
                f"columns: {slot} needs the name of a column, of at most {MAX_LABEL} characters: {slot}:column.",
                param="columns",
            )
        try:
            check_name(column)
        except ValueError as error:
            raise Unprocessable(f"columns: the column of {slot} {error}", param="columns") from None
    if repeated := [slot for slot, _ in pairs if [other for other, _ in pairs].count(slot) > 1]:
        raise Unprocessable(f"columns: {repeated[0]} is named twice; name one column for it.", param="columns")
    return tuple(pairs)


def _known_slots() -> tuple[str, ...]:
    slots = [slots for form in FORMS.values() for slots in form]
    columns = [column for of in slots for each in of.values() for column in each]
    return tuple(dict.fromkeys([ID, SOURCE, *(slot for of in slots for slot in of), *columns]))


def _described() -> str:
    return "; ".join(f"{form} ({', '.join([*slots.required, *slots.optional])})" for form, slots in FORMS.items())
