"""Embeddings from tokens against a plain float64 twin of one sample at a time (METHOD 10)."""

import numpy as np
import pytest
import torch

from worker.influence import Samples, TextScales, text_embeddings
from worker.influence import text_embedding as module
from worker.influence.text_embedding import DIRECTIONS, HIDDEN_WEIGHT, PARTS, plain_text_parts, text_parts

IDS, SEED = 40, 3


def drawn(count, seed=0, longest=30):
    """Samples of tokens of which some are frequent; among them some without prompt, without reply, of one token and of none."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest, count)
    prompts = draw.integers(1, lengths)
    lengths[:4], prompts[:4] = (5, 6, 1, 0), (0, 6, 0, 0)
    ids = np.minimum(draw.zipf(1.3, lengths.sum()), IDS - 3).astype(np.int32)
    response = np.concatenate([np.arange(n) >= k for n, k in zip(lengths, prompts, strict=True)])
    return Samples(input_ids=ids, response=response, offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def one(prompt, reply):
    ids = np.array([*prompt, *reply], np.int32)
    response = np.arange(len(ids)) >= len(prompt)
    return Samples(input_ids=ids, response=response, offsets=np.array([0, len(ids)]))


def test_parts_equal_those_of_one_sample_with_lists_and_sets(monkeypatch):
    samples = drawn(60)
    whole = text_parts(samples, SEED)
    assert list(whole) == list(PARTS)
    for table in (1, 3 * IDS, 1 << 20):  # blocks of one sample, of a few, and of all
        monkeypatch.setattr(module, "_TABLE", table)
        found = text_parts(samples, SEED)
        for i in range(len(samples)):
            for name, expected in plain_text_parts(samples.slice(i, i + 1), SEED).items():
                torch.testing.assert_close(found[name][i].double(), expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(found[name], whole[name]) for name in found)


def test_figures_that_are_known():
    """The prompt is 5 6, the reply 6 6 7: two of three are of the prompt, two are distinct."""
    found = text_parts(one([5, 6], [6, 6, 7]), SEED)
    assert found["scalars"][0].tolist() == pytest.approx([np.log(4), np.log(3), 2 / 3, 2 / 3])
    six, seven = module._signs(np.array([6, 7]), SEED)
    torch.testing.assert_close(found["reply"][0], torch.nn.functional.normalize(2 * six + seven, dim=0))


def test_the_cosine_of_two_replies_is_that_of_their_counts():
    """In the mean over seeds: an entry's error has a standard deviation of 1 / √q."""
    counts = torch.zeros(2, IDS)
    replies = [[1, 1, 2, 3, 9, 9, 9, 4], [1, 2, 2, 7, 9, 9, 30, 31]]
    for row, reply in zip(counts, replies, strict=True):
        row.index_add_(0, torch.tensor(reply), torch.ones(8))
    expected = float(torch.nn.functional.cosine_similarity(counts[:1], counts[1:]))
    a, b = (one([], reply) for reply in replies)
    cosines = torch.tensor([float(text_parts(a, s)["reply"][0] @ text_parts(b, s)["reply"][0]) for s in range(200)])
    assert float(cosines.mean()) == pytest.approx(expected, abs=4 / (200 * DIRECTIONS) ** 0.5)
    assert 0.3 / DIRECTIONS**0.5 < float(cosines.std()) < 1.5 / DIRECTIONS**0.5


def test_directions_are_random_signs_of_the_token_and_the_seed_alone():
    tokens = np.array([0, 7, 5000, 262_143])
    signs = module._signs(tokens, SEED)
    assert signs.abs().eq(1).all()
    assert signs.shape == (4, DIRECTIONS)
    for place, token in enumerate(tokens):
        assert torch.equal(module._signs(np.array([token]), SEED)[0], signs[place])
    assert not torch.equal(module._signs(tokens, SEED + 1), signs)
    many = torch.nn.functional.normalize(module._signs(np.arange(400), SEED), dim=1)
    cosine = (many @ many.T)[~torch.eye(400, dtype=torch.bool)]
    assert float(cosine.std()) == pytest.approx(DIRECTIONS**-0.5, rel=0.05)
    assert abs(float(cosine.mean())) < 0.01


def test_every_part_has_its_weight_as_its_mean_squared_distance():
    samples = drawn(60)
    hidden = torch.nn.functional.normalize(torch.randn(60, 9, generator=torch.Generator().manual_seed(1)), dim=1)
    scales = TextScales.of(samples, SEED, hidden)
    rows = text_embeddings(samples, scales, hidden)
    widths = {name: values.shape[1] for name, values in text_parts(samples, SEED).items()}
    parts = rows.double().split([*widths.values(), 9], dim=1)
    weights = [*(part.weight for part in PARTS.values()), HIDDEN_WEIGHT]
    for part, weight in zip(parts, weights, strict=True):
        apart = torch.pdist(part).square().mean()
        assert float(apart) == pytest.approx(weight, rel=1e-4)
        torch.testing.assert_close(part.mean(dim=0), torch.zeros(part.shape[1], dtype=torch.float64), atol=1e-5, rtol=0)
    deviations = parts[list(PARTS).index("scalars")].std(dim=0)
    torch.testing.assert_close(deviations, deviations[:1].expand_as(deviations), rtol=1e-4, atol=1e-6)
    assert torch.equal(text_embeddings(samples, scales), rows[:, :-9])


def test_a_row_depends_on_its_own_sample_only_and_is_finite():
    samples = drawn(60)
    scales = TextScales.of(samples.slice(4, 40), SEED)
    whole = text_embeddings(samples, scales)
    assert torch.isfinite(whole).all()
    assert torch.isfinite(whole.half()).all()
    parts = [text_embeddings(samples.slice(start, start + 15), scales) for start in range(0, 60, 15)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
    assert text_embeddings(samples.slice(0, 0), scales).shape == (0, whole.shape[1])


def test_the_order_of_the_tokens_of_a_side_does_not_matter():
    samples = drawn(60)
    scales = TextScales.of(samples, SEED)
    turned = samples.take(range(60))
    for start, stop in zip(turned.offsets[:-1], turned.offsets[1:], strict=True):
        turned.input_ids[start:stop], turned.response[start:stop] = (
            turned.input_ids[start:stop][::-1].copy(),
            turned.response[start:stop][::-1].copy(),
        )
    torch.testing.assert_close(text_embeddings(turned, scales), text_embeddings(samples, scales), rtol=1e-5, atol=1e-5)


def test_what_does_not_vary_says_nothing():
    samples = drawn(60).take([7, 7, 7])
    assert not text_embeddings(samples, TextScales.of(samples, SEED)).any()
    assert not text_embeddings(samples, TextScales.of(samples.slice(0, 1), SEED)).any()


def test_hidden_states_that_are_not_finite_do_not_count():
    samples = drawn(60)
    hidden = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    broken = torch.cat([hidden, torch.full((1, 4), torch.nan)])
    scales = [TextScales.of(samples, SEED, states).scales["hidden"] for states in (hidden, broken)]
    assert torch.equal(scales[0].scale, scales[1].scale)
