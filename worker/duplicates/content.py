"""What a sample says, normalised: NFKC, without case, runs of white space as one space."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.datasets.storage import Sample

# Characters of scripts that put no spaces between words: each is a word of its own.
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)
_DIGEST_BYTES = 16
_MAX_WORDS = 2**20  # characters: a row has at most a megabyte, but its normal form may be many times longer


@dataclass(frozen=True, slots=True)
class Said:
    """`digest`: equal where nothing differs but case, white space and Unicode forms, uint64 (2,). `words`: of all turns but
    system messages, joined by one space. `learnt`: those of the replies that count, or of the plain text."""

    digest: npt.NDArray[np.uint64]
    words: str
    learnt: str


def said_in(sample: Sample) -> Said:
    """Two samples have one digest only if they have the same roles, replies that count and tools too. The words leave out system
    messages and tools, which samples that differ in all else often share."""
    if sample.messages is None:
        text = _normal(sample.text or "")
        return Said(_digest([text]), *2 * (_words(text),))
    turns = [_normalised(message) for message in sample.messages]
    spoken = [(turn, _words(_spoken(turn))) for turn in turns if turn["role"] != "system"]
    return Said(
        _digest([turns, _normalised(sample.tools)]),
        " ".join(words for _, words in spoken if words),
        " ".join(words for turn, words in spoken if words and turn["role"] == "assistant" and turn.get("counts", True)),
    )


def _spoken(turn: Mapping[str, Any]) -> str:
    calls = json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else ""
    return " ".join(filter(None, (turn.get("reasoning_content"), turn.get("content"), calls)))


def _words(text: str) -> str:
    return text if text.isascii() else " ".join(_UNSPACED.sub(r" \1 ", text[:_MAX_WORDS]).split())[:_MAX_WORDS].strip()


def _normal(text: str) -> str:
    folded = (
        text.lower()
        if text.isascii()
        else unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    )
    return " ".join(folded.split())


def _normalised(value: Any) -> Any:
    """The same with every text in it normalised; of an object, the keys stay."""
    if isinstance(value, str):
        return _normal(value)
    if isinstance(value, list):
        return [_normalised(each) for each in value]
    if isinstance(value, dict):
        return {key: _normalised(each) for key, each in value.items()}
    return value


def _digest(content: Any) -> npt.NDArray[np.uint64]:
    canonical = json.dumps(content, sort_keys=True).encode()
    return np.frombuffer(hashlib.blake2b(canonical, digest_size=_DIGEST_BYTES).digest(), dtype="<u8").astype(np.uint64)
