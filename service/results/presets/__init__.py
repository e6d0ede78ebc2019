"""Presets of an export: the selection as the lines of JSON that a training tool reads.

Each tool has a file here, with a function from a sample to the object of its line. A sample that the tool's format cannot hold
makes the whole export fail, before its first byte: none is left out or changed without a word.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from service.datasets.storage import Sample
from service.results.presets import axolotl, llamafactory, openai, rows, trl


class Preset(StrEnum):
    OPENAI = "openai"
    TRL = "trl"
    TRL_MESSAGES = "trl-messages"
    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    LLAMAFACTORY_ALPACA = "llamafactory-alpaca"
    LLAMAFACTORY_V1 = "llamafactory-v1"
    ROWS = "rows"


# Raise `Unsuitable`.
LINES: dict[Preset, Callable[[Sample], dict[str, Any]]] = {
    Preset.OPENAI: openai.line,
    Preset.TRL: trl.prompt_completion,
    Preset.TRL_MESSAGES: trl.conversation,
    Preset.AXOLOTL: axolotl.line,
    Preset.LLAMAFACTORY: llamafactory.sharegpt,
    Preset.LLAMAFACTORY_ALPACA: llamafactory.alpaca,
    Preset.LLAMAFACTORY_V1: llamafactory.v1,
    Preset.ROWS: rows.line,
}
