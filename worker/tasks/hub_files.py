"""Which data files of a hub repository are a split of a dataset: what `datasets` says, which is given names only.

The repository's files are listed by the hub's API, and each of a kind that can be read is made as an empty file of its name in a
temporary folder, with the card. `datasets` then tells configs, splits and their files as it does of any folder: it downloads
nothing, sees no token, and runs no code, for a folder holds none that was made here.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # before `datasets` is imported: it counts loads on a server of its own

import datasets
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from worker.errors import ImportFailed

CARDS = ("README.md", ".huggingface.yaml")
KINDS = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".arrow")
PACKED = (".gz", ".zst")
MAX_CARD_BYTES = 8 * 2**20
_MAX_FILES = 100_000
_NAMED = 20  # configs or splits in an error
# What a config may set that does not change how its files are read, or that is found out from the files.
_HARMLESS = frozenset(
    {"data_files", "data_dir", "default", "description", "version", "features", "drop_labels", "sep", "delimiter"}
)


@dataclass(frozen=True, slots=True)
class Split:
    """Files of a split, by their paths in the repository, in order."""

    config: str
    name: str
    files: Sequence[str]


def readable(paths: Sequence[str]) -> list[str]:
    """Those of the repository's files whose kind can be read.

    Raises:
        ImportFailed: there is none, or there are too many.
    """
    found = [path for path in paths if _is_safe(path) and _kind(path) in KINDS]
    if not found:
        others = sorted({PurePosixPath(path).suffix for path in paths} - {"", ".md"})[:_NAMED]
        has = f"; it has {', '.join(others)}" if others else ""
        raise ImportFailed(
            "no_data_files",
            f"The repository has no data files that can be read ({', '.join(KINDS)}, also gzip or zstd){has}."
            " Convert it, and upload the file.",
        )
    if len(found) > _MAX_FILES:
        raise ImportFailed("no_data_files", f"The repository has more than {_MAX_FILES:,} data files.")
    return found


def _kind(path: str) -> str:
    name = PurePosixPath(path)
    return (name.with_suffix("") if name.suffix in PACKED else name).suffix.lower()


def _is_safe(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return (
        bool(parts) and ".." not in parts and not path.startswith(("/", "~")) and "\\" not in path and "\0" not in path
    )


def find_split(folder: Path, paths: Sequence[str], config: str | None, split: str | None) -> Split:
    """The split's files; `folder` holds the card, if there is one, and gets an empty file for each of the `paths`.

    Raises:
        ImportFailed: the config or the split does not exist, or has to be named; the message names those that exist.
    """
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    try:
        set_by_configs = _configs_of_card(folder)
        names = datasets.get_dataset_config_names(str(folder))
        chosen = config or _only(names, datasets.get_dataset_default_config_name(str(folder)))
        if chosen is None or chosen not in names:
            what = f"has no config {config!r}" if config else "has several configs, none of which is the default"
            raise ImportFailed(
                "config_not_found", f"The dataset {what}; it has {_listed(names)}. Name one as `config`."
            )
        _check(chosen, set_by_configs.get(chosen, {}))
        builder = datasets.load_dataset_builder(str(folder), name=chosen, cache_dir=str(folder / ".cache"))
        files: Mapping[str, Sequence[str]] = {str(name): found for name, found in builder.config.data_files.items()}
    except ImportFailed:
        raise
    except Exception as error:  # whatever it raises on a card or a tree that it cannot make sense of
        raise ImportFailed(
            "dataset_not_usable", f"The dataset's files or its card cannot be made sense of: {_told(error, folder)}"
        ) from error
    name = split or _only(list(files), None)
    if name is None or name not in files:
        what = f"has no split {split!r}" if split else "has several splits"
        raise ImportFailed(
            "split_not_found", f"The config {chosen!r} {what}; it has {_listed(files)}. Name one as `split`."
        )
    root = folder.resolve()
    found = [Path(file).resolve() for file in files[name]]
    if not all(file.is_relative_to(root) for file in found):
        raise ImportFailed("dataset_not_usable", "The dataset's card names files outside of its repository.")
    return Split(chosen, name, [file.relative_to(root).as_posix() for file in found])


def _configs_of_card(folder: Path) -> dict[str, dict[str, Any]]:
    """What the card sets for each config, after a look that it names no file elsewhere, which would be fetched.

    Raises:
        ImportFailed: it does.
    """
    configs: dict[str, dict[str, Any]] = {}
    for name in CARDS:
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            data = DatasetCard(text if name == "README.md" else f"---\n{text}\n---\n").data
            configs |= MetadataConfigs.from_dataset_card_data(data)
    for path in _strings(
        [configs_set.get(key) for configs_set in configs.values() for key in ("data_files", "data_dir")]
    ):
        if "://" in path or "::" in path or path.startswith(("/", "~")) or ".." in PurePosixPath(path).parts:
            raise ImportFailed(
                "dataset_not_usable", f"The dataset's card names {path[:200]!r}, outside of its repository."
            )
    return configs


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _check(name: str, config: Mapping[str, Any]) -> None:
    if others := sorted(config.keys() - _HARMLESS):
        raise ImportFailed(
            "dataset_not_usable",
            f"The config {name!r} sets {', '.join(map(str, others))[:200]}, which changes how its files are read and is not"
            " supported. Convert it, and upload the file.",
        )


def _only(names: Sequence[str], default: str | None) -> str | None:
    return default or (names[0] if len(names) == 1 else None)


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:_NAMED])
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _told(error: Exception, folder: Path) -> str:
    return f"{type(error).__name__}: {str(error).replace(str(folder), 'the repository')[:500]}"
