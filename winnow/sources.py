"""How the command line names data: a file, a dataset of the service, a dataset of the hub, or a ready-made target."""

import re
from dataclasses import dataclass
from pathlib import Path

SPELLINGS = "a file, the id of a dataset (ds_...), org/name[@revision][:config]:split of the hub"
TARGET_SPELLINGS = f"{SPELLINGS}, or preset:name[:count]"

_PRESET = "preset:"
_HUB = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?:(?::(?P<config>[^:@\s]+))?:(?P<split>[^:@\s]+))?"
)


@dataclass(frozen=True, slots=True)
class File:
    path: Path


@dataclass(frozen=True, slots=True)
class Dataset:
    id: str


@dataclass(frozen=True, slots=True)
class HubSplit:
    """A split of a dataset on the hub; without a configuration that of its default one."""

    id: str
    split: str
    config: str | None = None
    revision: str = "main"


@dataclass(frozen=True, slots=True)
class Preset:
    """A ready-made target; without a count as many samples as it is made for."""

    name: str
    count: int | None = None


Source = File | Dataset | HubSplit | Preset


def read_source(text: str, *, of_target: bool) -> Source:
    """What the text names. A file that exists comes first, whatever it is called.

    Raises:
        ValueError: it names none of these; the message says how each is written.
    """
    path = Path(text)
    if path.is_file():
        return File(path)
    if text.startswith(_PRESET):
        return _preset(text, of_target)
    if text.startswith("ds_"):
        return Dataset(text)
    if text and path.is_dir():
        raise ValueError(f"{text}: it is a folder; name one of its files")
    found = _HUB.fullmatch(text)
    if found is None:
        spellings = TARGET_SPELLINGS if of_target else SPELLINGS
        raise ValueError(f"{text}: No such file. The {'target' if of_target else 'pool'} can be {spellings}")
    if found["split"] is None:
        raise ValueError(f"{text}: No such file. For a dataset of the hub add its split: {text}:train")
    return HubSplit(found["id"], found["split"], found["config"], found["revision"] or "main")


def _preset(text: str, of_target: bool) -> Preset:
    name, colon, count = text.removeprefix(_PRESET).partition(":")
    if not of_target:
        raise ValueError(f"{text}: presets are targets; the pool can be {SPELLINGS}")
    if not name:
        raise ValueError(f"{text}: name the preset, as in preset:gsm8k; `winnow targets` lists them")
    if not colon:
        return Preset(name)
    if not (count.isascii() and count.isdigit() and int(count)):
        raise ValueError(f"{text}: after the second colon comes how many samples are taken, as in preset:{name}:48")
    return Preset(name, int(count))
