"""The import that a ready-made target is: which split of the hub, and which of its rows."""

from dataclasses import dataclass

from service.datasets import hub
from service.datasets.bad_rows import OnBadRow
from service.datasets.import_schemas import Choice, HubSource
from service.datasets.presets import PRESETS
from service.datasets.tables import Dataset
from service.http.errors import ApiError
from service.settings import DatasetSettings

_ROW_BYTES = 1_000  # what a sample may have, for plans
_NO_CONTENT = "0" * 64
_FIELDS = {"hub.id": "target.preset", "hub.revision": "target.revision"}


class PresetSource(HubSource):
    """A source of which the chosen rows alone are taken. Requests with equal ones share a dataset."""

    preset: Choice


@dataclass(frozen=True, slots=True)
class PresetImport:
    """What is to be imported, at a commit."""

    source: PresetSource
    commit: str

    @property
    def title(self) -> str:
        return f"preset:{self.source.preset.name}:{self.source.preset.count}"

    def expected(self) -> Dataset:
        """A dataset as it may become, for a plan; there is none of its content."""
        count = self.source.preset.count
        return Dataset(id=self.title, fingerprint=_NO_CONTENT, row_count=count, byte_count=count * _ROW_BYTES)


def resolve(preset: str, count: int | None, seed: int, revision: str, *, settings: DatasetSettings) -> PresetImport:
    """The import of a preset that there is; without a count that of as many samples as its list says. Asks the hub.

    Raises:
        Unprocessable: the server does not allow it, or the hub has none; `param` names the field of a job's request.
        Unavailable: the hub does not answer.
    """
    found = PRESETS[preset]
    source = PresetSource(
        **found.hub.model_dump(),
        revision=revision,
        template=found.template,
        on_bad_row=OnBadRow.SKIP,
        preset=Choice(name=preset, count=count or found.count, seed=seed),
    )
    try:
        return PresetImport(source, hub.commit_of(source, settings))
    except ApiError as error:
        error.param = _FIELDS.get(error.param or "", error.param)
        raise
