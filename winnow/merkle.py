"""Hashes of the published weights, so that a download can be verified against the audit record."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

CHUNK_SIZE = 16_384
"""Samples in a leaf of the tree."""

JOB_METADATA, ROOT_METADATA = b"winnow.job_id", b"winnow.weights_root"
"""In the schema of an exported Parquet file: the job that it belongs to, and the Merkle root of its weights."""


def chunk_sha256(
    influence: npt.NDArray[np.float32], weight: npt.NDArray[np.float32], exact: npt.NDArray[np.bool_]
) -> bytes:
    """sha256 of the three arrays' bytes, one after the other: float32, float32, uint8 (0 or 1), little-endian.

    An influence that a sample does not have is NaN, hashed as the one of bits 0x7fc00000.
    """
    digest = hashlib.sha256()
    known = np.where(np.isnan(influence), np.float32(np.nan), influence)
    for array, dtype in ((known, "<f4"), (weight, "<f4"), (exact, "u1")):
        digest.update(array.astype(dtype).tobytes())
    return digest.digest()


SELECTION_ROW = np.dtype([("rank", "<i8"), ("index", "<i8"), ("influence", "<f4"), ("weight", "<f4"), ("exact", "u1")])
"""A selected sample as it is hashed: 25 bytes without gaps, little-endian; `exact` is 0 or 1."""


def selection_sha256(rows: npt.NDArray[np.void]) -> str:
    """sha256, in hex, of the `SELECTION_ROW` of each selected sample in rank order."""
    return hashlib.sha256(rows.astype(SELECTION_ROW).tobytes()).hexdigest()


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """The Merkle root over the chunks' hashes in chunk order.

    A leaf is a chunk's `chunk_sha256`. A level is made from the one below by pairing from the left:
    node = sha256(0x01 || left || right); the last node of an odd level is promoted unchanged. One leaf is its own root.

    Raises:
        ValueError: there are no leaves.
    """
    if not leaves:
        raise ValueError("leaves: a Merkle root needs at least one")
    level = list(leaves)
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\x01" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]
