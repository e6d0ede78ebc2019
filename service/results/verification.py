"""Whether what is stored of a result is what its audit record says: the server's own check, beside that of a download."""

from dataclasses import dataclass

import numpy as np
from sqlalchemy.orm import Session

from service.results import repository
from service.results.service import FinishedJob
from winnow.merkle import CHUNK_SIZE, SELECTION_ROW, chunk_sha256, merkle_root, selection_sha256


@dataclass(frozen=True, slots=True)
class Verified:
    """`damaged`: [start, stop) of the samples of each chunk whose values are not those of its hash. `is_root`: whether all values
    together have the recorded Merkle root; `is_selection`: the selection its recorded hash, None where a record of an earlier
    version has none."""

    chunks: int
    damaged: list[tuple[int, int]]
    is_root: bool
    is_selection: bool | None

    @property
    def is_intact(self) -> bool:
        return self.is_root and self.is_selection is not False and not self.damaged


def verify(session: Session, job: FinishedJob) -> Verified:
    """Hashes all weights, a chunk at a time, and the selection, in 25 bytes a selected sample."""
    record = repository.provenance(session, job.id)
    stored = repository.chunk_hashes(session, job.id)
    count = repository.result(session, job.id).sample_count
    leaves, damaged = [], []
    for number, expected in enumerate(stored):
        start, stop = number * CHUNK_SIZE, min((number + 1) * CHUNK_SIZE, count)
        try:
            found = repository.weights(session, job.id, start, stop)
        except RuntimeError:  # arrays of another length than the pool has samples
            damaged.append((start, stop))
            continue
        leaves.append(chunk_sha256(found.influence, found.weight, found.exact))
        if leaves[-1].hex() != expected:
            damaged.append((start, stop))
    selection = record.record.get("selection_sha256")
    return Verified(
        chunks=len(stored),
        damaged=damaged,
        is_root=bool(leaves) and merkle_root(leaves) == record.weights_root,
        is_selection=None if selection is None else _selection(session, job.id) == selection,
    )


def _selection(session: Session, job_id: str) -> str:
    rows = repository.selection(session, job_id)
    return selection_sha256(np.fromiter(rows, SELECTION_ROW))
