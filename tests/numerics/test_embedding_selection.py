"""Which embeddings `auto` offers, and which it takes."""

import json

import pytest
import torch
from scipy import stats

from worker.influence import KernelRidge
from worker.influence.embedding_selection import embedding_candidates, select_embedding


def test_candidates_are_the_text_the_state_after_the_first_blocks_and_both():
    offered = embedding_candidates(4, 30)
    assert [(each["kind"], each["pooling"], each["blocks"]) for each, _ in offered] == [
        ("text", "response", 4),
        ("text_hidden", "response", 4),
        ("hidden", "response", 4),
    ]
    assert [cost for _, cost in offered] == pytest.approx([0, 4 / 30, 4 / 30])
    assert [(each["blocks"], cost) for each, cost in embedding_candidates(4, 3)] == [(3, 0.0), (3, 1.0), (3, 1.0)]


def test_a_pass_through_the_whole_model_is_a_candidate_where_that_is_affordable():
    *cheap, (output, cost) = embedding_candidates(4, 30, with_output=True)
    assert cheap == embedding_candidates(4, 30)
    assert (output["kind"], cost) == ("output", 1.0)


def problem(noises, count=80, t=5):
    """Embeddings that carry what influence follows, under more and more noise."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(count, 6, generator=generator)
    P = truth @ torch.randn(6, t, generator=generator)
    noisy = [truth + noise * torch.randn(count, 6, generator=generator) for noise in noises]
    return [torch.nn.functional.normalize(E, dim=1) for E in noisy], P


def test_a_clearly_better_embedding_is_worth_its_cost():
    embeddings, P = problem([3.0, 0.1])
    index, table = select_embedding(
        embeddings, P, options=[{"kind": "hidden"}, {"kind": "jvp"}], costs=[0.2, 1.0], ridge=0.05
    )
    assert index == 1
    assert [entry["chosen"] for entry in table] == [False, True]
    assert json.loads(json.dumps(table)) == table
    for entry, E in zip(table, embeddings, strict=True):
        left_out = KernelRidge.fit(E, P, ridge=0.05).leave_one_out().mean(1)
        assert entry["mean_spearman"] == pytest.approx(stats.spearmanr(P.mean(1), left_out).statistic)
        exact = P.double().mean(1)
        unexplained = float((exact - left_out).square().sum() / (exact - exact.mean()).square().sum())
        assert entry["mean_r2"] == pytest.approx(1 - unexplained)
    assert table[1] | {"mean_spearman": 0, "mean_r2": 0} == {
        "kind": "jvp",
        "cost": 1.0,
        "mean_spearman": 0,
        "mean_r2": 0,
        "chosen": True,
    }


def test_of_two_that_are_as_good_the_cheaper_and_of_equal_costs_the_better():
    (good, better), P = problem([0.05, 0.05])
    names = [{"kind": "a"}, {"kind": "b"}]
    scores = [entry["mean_spearman"] for entry in select_embedding([good, better], P, options=names, costs=[1, 1])[1]]
    assert 0 < abs(scores[0] - scores[1]) < 0.01
    for costs in ((1.0, 2.0), (2.0, 1.0)):
        assert select_embedding([good, better], P, options=names, costs=costs)[0] == costs.index(1.0)
    assert select_embedding([good, better], P, options=names, costs=[1.0, 1.0])[0] == scores.index(max(scores))


def test_constant_influence_takes_the_cheapest():
    embeddings, P = problem([0.1, 0.1])
    index, table = select_embedding(embeddings, torch.ones_like(P), options=[{}, {}], costs=[2.0, 1.0])
    assert index == 1
    assert table[0]["mean_spearman"] is None


def test_candidates_must_be_described():
    embeddings, P = problem([0.1, 0.1])
    with pytest.raises(ValueError, match="there are 2, 1 and 2"):
        select_embedding(embeddings, P, options=[{}], costs=[1.0, 2.0])
    with pytest.raises(ValueError, match="there are 0, 0 and 0"):
        select_embedding([], P, options=[], costs=[])
