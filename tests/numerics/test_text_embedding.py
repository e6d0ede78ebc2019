"""Embeddings from tokens against a plain float64 twin of one sample at a time (METHOD 10)."""

import numpy as np
import pytest
import torch

from worker.influence import Samples, TextStatistics, Vocabulary, text_embeddings, with_tokens_of
from worker.influence import text_embedding as module
from worker.influence.text_embedding import HIDDEN_WEIGHT, PARTS, plain_text_parts, text_parts

IDS = 40


def drawn(count, seed=0, longest=30):
    """Samples of tokens of which some are frequent; among them some without prompt, without reply, of one token and of none."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest, count)
    prompts = draw.integers(1, lengths)
    lengths[:4], prompts[:4] = (5, 6, 1, 0), (0, 6, 0, 0)
    ids = np.minimum(draw.zipf(1.3, lengths.sum()), IDS - 3).astype(np.int32)
    response = np.concatenate([np.arange(n) >= k for n, k in zip(lengths, prompts, strict=True)])
    return Samples(input_ids=ids, response=response, offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def matrix(width=6, rows=IDS, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def counted(samples):
    return with_tokens_of(samples, np.zeros(0, np.int64))


def vocabulary_of(samples, width=6, seed=3):
    return Vocabulary.of(counted(samples), [matrix(width)], seed=seed)


def test_parts_equal_those_of_one_sample_with_lists_and_sets(monkeypatch):
    samples = drawn(60)
    vocabulary = vocabulary_of(samples)
    whole = text_parts(samples, vocabulary)
    assert list(whole) == list(PARTS)
    for table in (1, 3 * vocabulary.tokens.size, 1 << 20):  # blocks of one sample, of three, and of all
        monkeypatch.setattr(module, "_TABLE", table)
        found = text_parts(samples, vocabulary)
        for i in range(len(samples)):
            for name, expected in plain_text_parts(samples.slice(i, i + 1), vocabulary).items():
                torch.testing.assert_close(found[name][i].double(), expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(found[name], whole[name]) for name in found)


def test_figures_that_are_known():
    """The prompt is 5 6, the reply 6 6 7: two of three are of the prompt, two are distinct."""
    samples = Samples(
        input_ids=np.array([5, 6, 6, 6, 7], np.int32),
        response=np.array([False, False, True, True, True]),
        offsets=np.array([0, 5]),
    )
    vocabulary = Vocabulary.of(counted(samples), [matrix()], seed=0)
    assert vocabulary.tokens.tolist() == [5, 6, 7]
    assert vocabulary.surprisal == pytest.approx(-np.log([1 / 5, 3 / 5, 1 / 5]))
    surprisal = -(2 * np.log(3 / 5) + np.log(1 / 5)) / 3
    expected = [np.log(4), np.log(3), np.log(6), surprisal, 2 / 3, 2 / 3]
    assert text_parts(samples, vocabulary)["scalars"][0].tolist() == pytest.approx(expected)


def test_counts_do_not_depend_on_how_the_pool_is_cut():
    samples = drawn(60)
    counts = np.zeros(0, np.int64)
    for start in range(0, 60, 7):
        counts = with_tokens_of(samples.slice(start, min(start + 7, 60)), counts)
    assert np.array_equal(counts, counted(samples))
    assert np.array_equal(counts, np.bincount(samples.input_ids))
    assert counts.dtype == np.int64


def test_rows_of_the_vocabulary_are_the_projected_ones_however_the_matrix_is_cut():
    samples = drawn(60)
    vocabulary = vocabulary_of(samples, width=6)
    picked = matrix(6)[torch.from_numpy(vocabulary.tokens)]
    size = picked.square().mean().sqrt()
    torch.testing.assert_close(vocabulary.W_Vq, picked / size, rtol=1e-3, atol=1e-3)  # no wider than is kept: as it is
    wide = module.MAX_DIRECTIONS + 100
    whole = vocabulary_of(samples, width=wide)
    assert whole.W_Vq.shape == (vocabulary.tokens.size, module.MAX_DIRECTIONS)
    again = Vocabulary.of(counted(samples), matrix(wide).split(7), seed=3)
    torch.testing.assert_close(again.W_Vq, whole.W_Vq, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(vocabulary_of(samples, width=wide, seed=4).W_Vq, whole.W_Vq, atol=0.1)
    cosine, picked = torch.nn.functional.normalize(whole.W_Vq, dim=1), matrix(wide)[torch.from_numpy(whole.tokens)]
    expected = torch.nn.functional.normalize(picked, dim=1)
    error = (cosine @ cosine.T - expected @ expected.T)[~torch.eye(len(cosine), dtype=torch.bool)]
    assert float(error.std()) == pytest.approx(module.MAX_DIRECTIONS**-0.5, rel=0.2)
    half = Vocabulary.of(counted(samples), [matrix(6).bfloat16()], seed=3)
    torch.testing.assert_close(half.W_Vq, vocabulary.W_Vq, rtol=0.02, atol=0.02)


def test_every_part_has_its_weight_as_its_mean_squared_distance():
    samples = drawn(60)
    hidden = torch.nn.functional.normalize(torch.randn(60, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    statistics = TextStatistics.of(vocabulary_of(samples), samples, hidden)
    rows = text_embeddings(samples, statistics, hidden)
    widths = {name: values.shape[1] for name, values in text_parts(samples, statistics.vocabulary).items()}
    parts = rows.double().split([*widths.values(), 9], dim=1)
    weights = [*(part.weight for part in PARTS.values()), HIDDEN_WEIGHT]
    for part, weight in zip(parts, weights, strict=True):
        apart = torch.pdist(part).square().mean()
        assert float(apart) == pytest.approx(weight, rel=1e-4)
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(part.shape[1], dtype=torch.float64), atol=1e-5, rtol=0)
    deviations = parts[list(PARTS).index("scalars")].std(dim=0)
    torch.testing.assert_close(deviations, deviations[:1].expand_as(deviations), rtol=1e-4, atol=1e-6)
    assert torch.equal(text_embeddings(samples, statistics), rows[:, :-9])


def test_a_row_depends_on_its_own_sample_only_and_is_finite():
    samples = drawn(60)
    statistics = TextStatistics.of(vocabulary_of(samples), samples.slice(4, 40))
    whole = text_embeddings(samples, statistics)
    assert torch.isfinite(whole).all()
    assert torch.isfinite(whole.half()).all()
    parts = [text_embeddings(samples.slice(start, start + 15), statistics) for start in range(0, 60, 15)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    assert text_embeddings(samples.slice(0, 0), statistics).shape == (0, whole.shape[1])


def test_statistics_come_back_from_their_tensors():
    samples = drawn(60)
    statistics = TextStatistics.of(vocabulary_of(samples), samples, torch.randn(60, 4))
    kept = statistics.tensors()
    assert all(tensor.is_contiguous() for tensor in kept.values())
    again = TextStatistics.of_tensors(kept)
    hidden = torch.randn(60, 4)
    assert torch.equal(text_embeddings(samples, again, hidden), text_embeddings(samples, statistics, hidden))


def test_what_does_not_vary_says_nothing():
    samples = drawn(60).take([7, 7, 7])
    statistics = TextStatistics.of(vocabulary_of(samples), samples)
    assert not text_embeddings(samples, statistics).any()
    one = TextStatistics.of(statistics.vocabulary, samples.slice(0, 1))
    assert not text_embeddings(samples, one).any()


def test_hidden_states_that_are_not_finite_do_not_count():
    samples = drawn(60)
    hidden = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    broken = torch.cat([hidden, torch.full((1, 4), torch.nan)])
    vocabulary = vocabulary_of(samples)
    scales = [TextStatistics.of(vocabulary, samples, states).scales["hidden"] for states in (hidden, broken)]
    assert torch.equal(scales[0].scale, scales[1].scale)


def test_tokens_that_are_not_known_are_named():
    samples = drawn(60)
    vocabulary = vocabulary_of(samples)
    for token in (IDS - 1, 10**6):
        strange = Samples(input_ids=np.array([token], np.int32), response=np.array([True]), offsets=np.array([0, 1]))
        with pytest.raises(
            ValueError, match=f"token {token} is none of the {vocabulary.tokens.size} that were counted"
        ):
            text_parts(strange, vocabulary)
    last = int(vocabulary.tokens[-1])
    with pytest.raises(ValueError, match=f"no embedding of token {last}: it has {last} of them"):
        Vocabulary.of(counted(samples), [matrix(rows=last)], seed=0)
    with pytest.raises(ValueError, match="not finite"):
        Vocabulary.of(counted(samples), [torch.full((IDS, 4), torch.nan)], seed=0)
