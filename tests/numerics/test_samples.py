"""Ragged samples and token batches."""

import numpy as np
import pytest
from support.numerics_reference import MIXED, ragged

from worker.influence import Samples, token_batches
from worker.influence.samples import last_marked


def test_counts_against_plain_python():
    samples = ragged(*MIXED)
    assert len(samples) == len(MIXED)
    assert samples.lengths.tolist() == [len(text) for text in MIXED]
    assert samples.predicted().tolist() == [text[1:].count("r") for text in MIXED]
    assert last_marked(samples.response, samples.offsets).tolist() == [text.rfind("r") for text in MIXED]
    assert last_marked(samples.predictable(), samples.offsets).tolist() == [
        text.rfind("r") if text.rfind("r") > 0 else -1 for text in MIXED
    ]


@pytest.mark.parametrize("indices", [[3, 0, 9, 3], [], [5], list(range(9, -1, -1))])
def test_take_and_slice_keep_tokens_together(indices):
    samples = ragged(*MIXED)
    taken = samples.take(indices)
    assert len(taken) == len(indices)
    for row, i in enumerate(indices):
        part, alone = taken.slice(row, row + 1), samples.slice(i, i + 1)
        assert part.input_ids.tolist() == alone.input_ids.tolist()
        assert part.response.tolist() == alone.response.tolist()
        assert part.offsets.tolist() == [0, len(MIXED[i])]


def test_no_samples_at_all():
    empty = ragged().slice(0, 0)
    assert len(empty) == 0
    assert empty.predicted().tolist() == []
    assert token_batches(empty.lengths, 5) == []


@pytest.mark.parametrize("budget", [1, 7, 40, 1000])
def test_batches_hold_every_sample_once_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(0, 20, 200)
    batches = token_batches(lengths, budget)
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(lengths[b].max() * b.size <= budget or b.size == 1 for b in batches)
    flat = lengths[np.concatenate(batches)]
    assert (np.diff(flat) <= 0).all()
    assert [b.tolist() for b in batches] == [b.tolist() for b in token_batches(lengths, budget)]
    for one in batches[:-1]:  # none could have been larger
        assert max(lengths[one].max(), 1) * (one.size + 1) > budget


def test_wrong_arrays_are_named():
    ids, marks, offsets = np.zeros(4, np.int32), np.zeros(4, bool), np.array([0, 4], np.int64)
    with pytest.raises(ValueError, match="input_ids must be a flat int32"):
        Samples(input_ids=ids.astype(np.int64), response=marks, offsets=offsets)
    with pytest.raises(ValueError, match="response must be a flat bool"):
        Samples(input_ids=ids, response=marks.astype(np.int8), offsets=offsets)
    with pytest.raises(ValueError, match="4 tokens but response has 3"):
        Samples(input_ids=ids, response=marks[:3], offsets=offsets)
    for wrong in ([0, 3], [1, 4], [0, 3, 2, 4], []):
        with pytest.raises(ValueError, match="offsets must rise from 0"):
            Samples(input_ids=ids, response=marks, offsets=np.array(wrong, np.int64))
    with pytest.raises(ValueError, match="slice 0:2"):
        Samples(input_ids=ids, response=marks, offsets=offsets).slice(0, 2)
    with pytest.raises(ValueError, match="from 0 to 0"):
        Samples(input_ids=ids, response=marks, offsets=offsets).take([1])
