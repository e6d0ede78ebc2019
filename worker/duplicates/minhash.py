"""MinHash over shingles of words, for many texts at once: Broder's signatures, and the bands of locality-sensitive hashing.

A shingle is two words in a row; the last word of a text has the end as its second. Two texts of Jaccard similarity J share a band
of `ROWS` minima with probability J^ROWS, and one of the `BANDS` with 1 − (1 − J^ROWS)^BANDS. All hashes are arithmetic modulo
2⁶⁴ on constants that are written here, the same on every machine.

Suffixes: c bytes, w words, m texts.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

BANDS, ROWS = 16, 5
THRESHOLD = 0.7
"""Jaccard similarity of the shingles, and of the words that are learnt, from which on two samples are near duplicates."""
NO_KEY = 0
"""The band key of a text without words, which is near nothing."""

_SEED = 0x57494E4E4F57
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2⁶⁴
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_SPACE, _END = 0x20, 0x0A

Hashes = npt.NDArray[np.uint64]
Starts = npt.NDArray[np.int64]


def detection(jaccard: float) -> float:
    """The probability that two texts of this similarity share a band."""
    return float(1 - (1 - jaccard**ROWS) ** BANDS)


def word_hashes(texts: Sequence[str]) -> tuple[Hashes, Starts]:
    """A hash of each word (w,) and where the words of each text start, (m + 1,). Words are separated by one space.

    Polynomial hashes of all words, each a difference of two prefix sums over the bytes of all texts.
    """
    counts = np.array([text.count(" ") + 1 if text else 0 for text in texts], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    joined = "\n".join(text for text in texts if text)
    if not joined:
        return np.empty(0, np.uint64), starts
    bytes_c = np.frombuffer(f"{joined}\n".encode(), np.uint8)
    powers_c, inverses_c = _powers(_padded(len(bytes_c)))
    sums_c = np.cumsum(_table()[bytes_c] * powers_c[: len(bytes_c)])
    ends_w = np.flatnonzero((bytes_c == _SPACE) | (bytes_c == _END))
    starts_w = np.concatenate([[0], ends_w[:-1] + 1])
    before_w = np.where(starts_w > 0, sums_c[starts_w - 1], np.uint64(0))
    return mixed((sums_c[ends_w - 1] - before_w) * inverses_c[starts_w]), starts


def shingle_hashes(words_w: Hashes, starts: Starts) -> Hashes:
    """A hash of each shingle (w,): a text has as many as words."""
    following_w = np.concatenate([words_w[1:], words_w[:1]])
    following_w[starts[1:][np.diff(starts) > 0] - 1] = _SEED
    return mixed(words_w * _BASE + following_w)


def band_keys(shingles_w: Hashes, starts: Starts) -> npt.NDArray[np.uint32]:
    """(BANDS, m) uint32: two texts with the same key in a band are candidates; `NO_KEY` for texts without words."""
    has_words = np.diff(starts) > 0
    keys = np.full((BANDS, len(has_words)), NO_KEY, np.uint32)
    if not has_words.any():
        return keys
    first_m, low_w = starts[:-1][has_words], shingles_w.astype(np.uint32)
    for band, factors in enumerate(_factors()):
        key_m = np.full(len(first_m), band + 1, np.uint64)
        for factor in factors:
            key_m = mixed(key_m * _BASE + np.minimum.reduceat(low_w * factor, first_m))
        keys[band, has_words] = np.maximum((key_m >> np.uint64(32)).astype(np.uint32), NO_KEY + 1)
    return keys


def are_near(a: Hashes, b: Hashes) -> bool:
    """Whether the Jaccard similarity of two sets, arrays without duplicates, reaches `THRESHOLD`; that of two empty ones is 1."""
    smaller, larger = sorted((len(a), len(b)))
    if smaller < THRESHOLD * larger:
        return False
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common >= THRESHOLD * (smaller + larger - common)


def mixed(values: Hashes) -> Hashes:
    """The finaliser of SplitMix64: every bit depends on all."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _table() -> Hashes:
    """A random number for each byte."""
    return mixed(np.arange(1, 257, dtype=np.uint64) * _BASE + np.uint64(_SEED))


@cache
def _factors() -> npt.NDArray[np.uint32]:
    """(BANDS, ROWS): odd multipliers, each a permutation of the hashes modulo 2³²."""
    drawn = mixed(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * _BASE + np.uint64(_SEED + 1))
    return (drawn.astype(np.uint32) | np.uint32(1)).reshape(BANDS, ROWS)


def _padded(length: int) -> int:
    return 1 << max(20, (length - 1).bit_length())


@cache
def _powers(length: int) -> tuple[Hashes, Hashes]:
    """The powers 0 to length − 1 of the base and of its inverse."""
    powers = []
    for base in (_BASE, _INVERSE):
        factors = np.full(length, base)
        factors[0] = 1
        powers.append(np.multiply.accumulate(factors))
    return powers[0], powers[1]
