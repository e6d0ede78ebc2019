"""The signatures of a dataset's rows, shard by shard: a small artifact each, that depends on the rows alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from service.datasets.storage import Sample
from service.plan.artifact_keys import artifact_key
from service.plan.stages import Stage
from service.storage.artifacts import ArtifactStore
from worker.duplicates.content import Said, said_in
from worker.duplicates.minhash import band_keys, shingle_hashes, word_hashes

_BATCH_CHARACTERS = 2**19


@dataclass(frozen=True, slots=True)
class Signatures:
    """Of n rows: `digests` uint64 (n, 2) and `keys` uint32 (BANDS, n)."""

    digests: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.uint32]


def signatures_key(dataset: str, rows: tuple[int, int], salt: str | None) -> str:
    """Of the rows [start, stop) of the dataset with this fingerprint."""
    salted = {} if salt is None else {"salt": salt}
    return artifact_key(Stage.PREPARE, "signatures", ".safetensors", dataset=dataset, rows=list(rows), **salted)


def signatures_of(samples: Iterable[Sample], beat: Callable[[], None]) -> Signatures:
    """`beat` is called now and then, and may raise."""
    digests, keys = [], []
    for batch in batches(samples):
        digests += [said.digest for said in batch]
        words, starts = word_hashes([said.words for said in batch])
        keys.append(band_keys(shingle_hashes(words, starts), starts))
        beat()
    return Signatures(np.stack(digests), np.concatenate(keys, axis=1))


def batches(samples: Iterable[Sample]) -> Iterator[Sequence[Said]]:
    """What they say, of so many samples at a time as have half a million characters."""
    batch: list[Said] = []
    size = 0
    for sample in samples:
        batch.append(said_in(sample))
        size += len(batch[-1].words)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write(store: ArtifactStore, key: str, signatures: Signatures) -> None:
    with store.writing(key) as path:
        save_file({"digests": signatures.digests, "keys": signatures.keys}, path)


def read(store: ArtifactStore, key: str) -> Signatures:
    with store.local(key) as path:
        found = load_file(path)
    return Signatures(found["digests"], found["keys"])
