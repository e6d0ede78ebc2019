"""The file of a preset, line by line."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import TypeVar

from service.datasets.storage import Sample
from service.datasets.values import shown
from service.http.errors import Unprocessable
from service.results.formats import ByteStream
from service.results.presets import LINES, Preset
from service.results.presets.conversations import Unsuitable, to_json

_PART_BYTES = 2**18
T = TypeVar("T")


def stream(samples: Callable[[], Iterable[tuple[Sample, float]]], preset: Preset, *, repeated: bool) -> ByteStream:
    """One JSON object a line, of the samples and weights that `samples` iterates over anew each time it is called.

    `repeated`: each line stands as often as the weight of its sample says (`copies`).

    Raises (before the first bytes):
        Unprocessable: `preset_unsuitable`, the format cannot hold one of the samples.
    """
    if preset is not Preset.ROWS:
        for sample, _ in samples():
            _line(sample, preset)
    found = copies(samples()) if repeated else (sample for sample, _ in samples())
    part: list[bytes] = []
    size = 0
    for sample in found:
        part.append(_line(sample, preset))
        size += len(part[-1])
        if size >= _PART_BYTES:
            yield b"".join(part)
            part, size = [], 0
    if part:
        yield b"".join(part)


def copies(items: Iterable[tuple[T, float]]) -> Iterator[T]:
    """Each item as often as its weight says, rounded up or down so that after every item as many stand there as the weights so
    far add up to, to the nearest whole number."""
    total, stand = 0.0, 0
    for item, weight in items:
        total += weight
        count = math.floor(total + 0.5) - stand
        stand += count
        yield from repeat(item, count)


def _line(sample: Sample, preset: Preset) -> bytes:
    try:
        return f"{to_json(LINES[preset](sample))}\n".encode()
    except Unsuitable as error:
        raise Unprocessable(
            f"preset={preset} cannot hold the sample {shown(sample.id)} (index {sample.index}): {error.reason}. {error.remedy}",
            param="preset",
            code="preset_unsuitable",
        ) from error
