"""The client's calls for datasets that the service imports from the hub."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from winnow.answers import Dataset
from winnow.errors import WinnowError
from winnow.transport import Connection, Json
from winnow.twins import call

_WAIT_SECONDS = 30


class ImportFailed(WinnowError):
    """The import has failed; `dataset` is its last state, `errors` the rows that cannot be used."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        problem = dataset.error
        assert problem is not None  # of an import that has failed
        super().__init__(None, problem.code, problem.detail, errors=problem.errors)


class Importing(Connection):
    """Imports are asked for, and awaited."""

    @call
    async def import_dataset(
        self,
        id: str,
        split: str | None = None,
        config: str | None = None,
        revision: str = "main",
        *,
        name: str | None = None,
        limit: int | None = None,
        format: str | None = None,
        columns: Mapping[str, str] | str | None = None,
        template: Mapping[str, str] | str | None = None,
        on_bad_row: Literal["refuse", "skip"] | None = None,
    ) -> Dataset:
        """Asks the service to import a split of a dataset of the Hugging Face Hub, and returns the dataset, which is `importing`:
        a job may name it at once, and waits for it; `imported` waits here.

        Args:
            id: owner/name on the hub.
            split: None: the only one.
            config: None: the default, or the only one.
            revision: a branch, a tag or a commit; the service takes what it is now.
            limit: only so many rows, the first ones.

        The others are those of `upload_dataset`.

        Raises:
            WinnowError: it is not allowed, or the hub has no such dataset; `param` names the field.
        """
        source: Json = {
            "id": id,
            "revision": revision,
            "config": config,
            "split": split,
            "limit": limit,
            "format": format,
            "columns": _mapping(columns),
            "template": _mapping(template),
            "on_bad_row": on_bad_row,
        }
        body = {"hub": {key: value for key, value in source.items() if value is not None}, "name": name}
        return await self._one(Dataset, "POST", "/datasets", json=body)

    @call
    async def dataset(self, dataset_id: str) -> Dataset:
        """The dataset as it is now."""
        return await self._one(Dataset, "GET", f"/datasets/{dataset_id}")

    @call
    async def imported(self, dataset_id: str, on_update: Callable[[Dataset], object] | None = None) -> Dataset:
        """Returns the dataset once its import has succeeded; `on_update` is called with it about every second until then.

        Raises:
            ImportFailed: it has failed.
        """
        seconds = _WAIT_SECONDS if on_update is None else 1
        held = {"params": {"wait": seconds}, "timeout": self._held(seconds)}
        while True:
            dataset = await self._one(Dataset, "GET", f"/datasets/{dataset_id}", **held)
            if dataset.status == "failed":
                raise ImportFailed(dataset)
            if on_update is not None:
                on_update(dataset)
            if dataset.status == "ready":
                return dataset


def _mapping(option: Mapping[str, str] | str | None) -> dict[str, Any] | None:
    """As an object: of `slot:column,slot:column`, or of JSON.

    Raises:
        ValueError: it is neither.
    """
    if option is None or isinstance(option, Mapping):
        return None if option is None else dict(option)
    if option.lstrip().startswith("{"):
        found = json.loads(option)
        return dict(found)
    pairs = [pair.partition(":") for pair in option.split(",")]
    if any(not column for _, _, column in pairs):
        raise ValueError(f"{option}: expected part:column,part:column, or a JSON object")
    return {slot.strip(): column.strip() for slot, _, column in pairs}
