"""What pictures of a result are drawn from, against plain numpy on the arrays of whole jobs and of pools made up."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.local_job import Ran, remembering
from support.tiny import pool_rows, save_model, target_rows, write_jsonl

from service.plan.stages import JobInputs, Stage
from service.results.chart_schemas import MAP_SAMPLES, MAP_SELECTED, MAX_PAIRS, MAX_TARGETS, Charts
from worker import charts, local_run
from worker.charts import pool as pool_charts
from worker.charts.sample_map import _projected, _shown, principal_components
from worker.charts.samples import PoolSamples, even_part, figures

POOL, TARGET, BUDGET, MUTE, MUTE_TARGET = 60, 18, 8, 11, 4
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"  # an empty reply has nothing to predict
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("charts")
    rows = {"pool": pool_rows(POOL), "target": target_rows(TARGET, "python_function")}
    for name, mute in (("pool", MUTE), ("target", MUTE_TARGET)):
        rows[name][mute]["messages"][-1]["content"] = ""
    return {name: write_jsonl(folder / f"{name}.jsonl", each) for name, each in rows.items()}


@pytest.fixture(scope="module")
def ran(files: dict[str, Path]) -> Callable[..., Ran]:
    folder = files["pool"].parent
    model = save_model(folder / "bare", template=BARE)
    return remembering(model, files["pool"], files["target"], folder / "store", budget=BUDGET, validate=False)


@pytest.fixture(scope="module")
def read(ran: Callable[..., Ran], files: dict[str, Path]) -> Callable[..., Charts]:
    def call(**changes: Any) -> Charts:
        found = ran(**changes)
        store = found.compute.store
        pool, target = (local_run._register(store, files[name]).fingerprint for name in ("pool", "target"))
        parameters = {"method": "influence_distillation", "selection": "round_robin", "seed": 0, **changes}
        job = JobInputs(model={}, pool=pool, target=target, budget=BUDGET, parameters=parameters)
        return charts.read(store, job, found.done, found.arrays)

    return call


REFINED: dict[str, Any] = {"refine": {"size": 2, "rounds": 1}}
EVERY: list[dict[str, Any]] = [
    {"refine": 0},
    REFINED,
    {"refine": 0, "selection": "weighted"},
    *({"method": method} for method in ("exact_influence", "rds_plus", "random")),
]


@pytest.mark.parametrize("changes", EVERY, ids=str)
def test_what_is_counted_adds_up_for_every_method(
    ran: Callable[..., Ran], read: Callable[..., Charts], changes: dict[str, Any]
) -> None:
    found, arrays = read(**changes), ran(**changes).arrays
    assert sum(each.pool for each in found.sources) == POOL
    assert sum(each.left_out for each in found.sources) == 1
    assert sum(each.selected for each in found.sources) == sum(found.lengths.selected) == BUDGET
    assert sum(each.weight_share for each in found.sources) == pytest.approx(1, abs=1e-4)
    assert sum(found.lengths.all) == POOL - 1
    assert found.targets.count == len(found.targets.data) == TARGET
    assert [each.index for each in found.targets.data if not each.counts] == (
        [] if changes.get("method") == "random" else [MUTE_TARGET]
    )
    if changes.get("method") == "random":
        assert (found.influence, found.map, found.budgets, found.targets.turns) == (None, None, None, None)
        return
    assert found.influence is not None
    assert sum(found.influence.all) == POOL - 1
    assert sum(found.influence.exact) == arrays["exact"].sum()
    assert sum(found.influence.selected) == BUDGET
    assert found.map is not None
    assert found.map.of == ("influence" if changes.get("method") == "exact_influence" else "embedding")
    assert found.map.index == [i for i in range(POOL) if i != MUTE]
    assert [i for i, chosen in zip(found.map.index, found.map.selected, strict=True) if chosen] == sorted(
        arrays["selected"].tolist()
    )


def test_pairs_of_landmarks_are_predicted_without_them(ran: Callable[..., Ran], read: Callable[..., Charts]) -> None:
    """The mean over targets has the Spearman correlation that the result says."""
    found, job = read(refine=0), ran(refine=0)
    assert found.landmarks is not None
    assert found.landmarks.count == len(found.landmarks.index) == job.arrays["exact"].sum()
    assert found.landmarks.index == np.flatnonzero(job.arrays["exact"]).tolist()
    assert found.landmarks.exact == pytest.approx(job.arrays["influence"][found.landmarks.index], rel=1e-4)
    ranks = [np.argsort(np.argsort(values)) for values in (found.landmarks.predicted, found.landmarks.exact)]
    fidelity = job.done[Stage.PROPAGATE][-1].result["fidelity"]
    assert np.corrcoef(*ranks)[0, 1] == pytest.approx(fidelity["mean_spearman"], abs=1e-9)


def test_a_shortlist_is_shown_as_it_was_predicted_and_as_it_is(
    ran: Callable[..., Ran], read: Callable[..., Charts]
) -> None:
    before, after = ran(refine=0).arrays, ran(**REFINED).arrays
    found = read(**REFINED).shortlist
    assert found is not None
    assert found.index == np.flatnonzero(after["exact"] & ~before["exact"]).tolist()
    assert found.count == len(found.index) == 2 * BUDGET
    assert found.before == pytest.approx(before["influence"][found.index], rel=1e-4)
    assert found.after == pytest.approx(after["influence"][found.index], rel=1e-4)
    assert read(refine=0).shortlist is None


def test_targets_say_what_they_took(ran: Callable[..., Ran], read: Callable[..., Charts]) -> None:
    found, job = read(refine=0), ran(refine=0)
    P = np.load(job.path(Stage.PROPAGATE, -1))[:, :TARGET]
    selected = job.arrays["selected"].tolist()
    taking = sorted((each for each in found.targets.data if each.took), key=lambda each: each.turn or 0)
    assert found.targets.turns == TARGET - 1
    assert [index for each in taking for index in each.first] == selected  # fewer picks than turns: one each
    free = [i for i in range(POOL) if i != MUTE]
    for each in taking:
        best = max(free, key=lambda i: (P[i, each.index], -i))
        assert each.first == [best]
        free.remove(best)
    counting = [each for each in found.targets.data if each.counts]
    means = [each.influence for each in counting]
    assert means == pytest.approx(P[selected].mean(axis=0)[[each.index for each in counting]], rel=1e-4)
    fidelity = job.done[Stage.PROPAGATE][-1].result["fidelity"]
    assert [each.spearman for each in counting] == pytest.approx(fidelity["spearman"], rel=1e-4)
    assert [each.id for each in found.targets.data] == [row["id"] for row in target_rows(TARGET, "python_function")]


def test_planned_and_spent_seconds_stand_side_by_side() -> None:
    spent = [{"stage": "embed", "units": 2, "reused": 1, "wall_seconds": 3.0, "compute_seconds": 2.5, "more": 1}]
    plan = {"stages": [{"stage": "refine", "seconds": 7.0}, {"stage": "embed", "seconds": None}]}
    found = [each.model_dump() for each in charts.stages(spent, plan)]
    assert [(each["stage"], each["planned_seconds"], each["wall_seconds"]) for each in found] == [
        ("embed", None, 3.0),
        ("refine", 7.0, 0),
    ]
    assert charts.stages(spent, None)[0].reused == 1


def made_up(n: int, k: int, sources: int, seed: int = 3) -> PoolSamples:
    """A pool of samples whose selection is random; every eleventh took no part."""
    rng = np.random.default_rng(seed)
    influence = rng.normal(size=n).astype(np.float32)
    eligible = np.arange(n) % 11 != 0
    influence[~eligible] = np.nan
    selected = rng.permutation(np.flatnonzero(eligible))[:k]
    weight = np.zeros(n, np.float32)
    weight[selected] = rng.random(k, dtype=np.float32)
    return PoolSamples(
        influence=influence,
        weight=weight,
        exact=eligible & (rng.random(n) < 0.2),
        eligible=eligible,
        selected=selected,
        length=np.minimum(rng.geometric(0.005, n), 512).astype(np.int32),
        source=(rng.integers(0, sources + 1, n)).astype(np.int16),
        names=tuple(f"source {i}" for i in range(sources)),
        has_influence=True,
    )


def test_a_source_has_the_share_of_its_own_weights() -> None:
    samples = made_up(500, 60, 4)
    found = {each.source: each for each in pool_charts.sources(samples)}
    assert len({each.weight_share for each in found.values()}) == 5, "four sources and the rest, all different"
    for place, name in enumerate(samples.names):
        own = [i for i in range(500) if samples.source[i] == place]
        expected = sum(float(samples.weight[i]) for i in own) / float(samples.weight.sum())
        assert found[name].weight_share == pytest.approx(expected, abs=1e-4)
        assert found[name].selected == len(set(own) & set(samples.selected.tolist()))


def test_a_budget_is_cut_from_the_jobs_own_order() -> None:
    samples = made_up(5_000, 400, 12)
    for selection in ("round_robin", "top_k", "weighted"):
        found = pool_charts.budgets(samples, selection)
        assert found is not None
        assert found.order == ("influence" if selection == "weighted" else "rank_then_influence")
        free = sorted(np.flatnonzero(samples.eligible).tolist(), key=lambda i: (-samples.influence[i], i))
        if selection != "weighted":
            own = dict.fromkeys(samples.selected.tolist())
            free = [*own, *(i for i in free if i not in own)]
        assert 400 in found.count
        assert found.count[-1] == samples.eligible.sum()
        assert found.count == sorted(set(found.count))
        for place, count in enumerate(found.count):
            taken = free[:count]
            assert found.mean_influence[place] == pytest.approx(
                samples.influence[taken].mean(dtype=float), rel=1e-4, abs=1e-6
            )
            assert found.exact[place] == samples.exact[taken].sum()
            for each in found.sources[:-1]:
                number = samples.names.index(each.source)
                assert each.counts[place] == (samples.source[taken] == number).sum()
            assert sum(each.counts[place] for each in found.sources) == count
        assert found.sources[-1].is_rest


def test_sources_beyond_the_largest_are_one() -> None:
    samples = made_up(20_000, 400, 300)
    found = pool_charts.sources(samples)
    assert [each.is_rest for each in found] == [False] * 100 + [True]
    for each in found[:-1]:
        own = samples.source == samples.names.index(each.source)
        assert each.pool == own.sum()
        assert each.left_out == (own & ~samples.eligible).sum()
        assert each.mean_influence == pytest.approx(np.nanmean(samples.influence[own]), rel=1e-3, abs=1e-5)
    named = {each.source for each in found[:-1]}
    rest = ~np.isin(samples.source, [i for i, name in enumerate(samples.names) if name in named])
    assert (found[-1].pool, found[-1].selected) == (rest.sum(), rest[samples.selected].sum())


def test_lengths_are_binned_with_their_mean_influence() -> None:
    samples = made_up(5_000, 400, 3)
    found = pool_charts.length_bins(samples)
    for place, (low, high) in enumerate(zip(found.edges, found.edges[1:], strict=False)):
        inside = (samples.length >= low) & (samples.length < high)
        chosen = samples.influence[samples.selected][inside[samples.selected]]
        assert found.all[place] == (inside & samples.eligible).sum()
        assert found.selected[place] == len(chosen)
        if len(chosen):
            assert found.selected_mean_influence[place] == pytest.approx(chosen.mean(dtype=float), abs=1e-4)
        else:
            assert found.selected_mean_influence[place] is None


def test_one_value_has_bins_of_its_own() -> None:
    samples = made_up(100, 5, 1)
    samples.influence[samples.eligible] = 1e-4
    samples.length[:] = 7
    found = pool_charts.influence_bins(samples)
    assert found is not None
    assert sum(found.all) == samples.eligible.sum()
    assert sum(pool_charts.length_bins(samples).all) == samples.eligible.sum()


class TestMap:
    def test_points_are_the_principal_components(self) -> None:
        rng = np.random.default_rng(0)
        rows = (rng.normal(size=(400, 20)) * np.linspace(3, 0.1, 20)).astype(np.float32)
        points, shares = principal_components(rows)
        centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
        U, s, _ = np.linalg.svd(centred, full_matrices=False)
        expected = U[:, :2] * s[:2]
        np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-6)
        np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:2], rtol=1e-6)
        np.testing.assert_array_equal(principal_components(rows)[0], points)

    @pytest.mark.parametrize("rows", [np.ones((5, 3)), np.ones((1, 4)), np.arange(6.0).reshape(6, 1)])
    def test_rows_without_two_directions_have_points_too(self, rows: np.ndarray) -> None:
        points, shares = principal_components(rows.astype(np.float32))
        assert points.shape == (len(rows), 2)
        assert np.isfinite(points).all()
        assert len(shares) == 2
        np.testing.assert_array_equal(points[:, 1], 0)

    def test_a_wide_row_keeps_its_distances(self) -> None:
        rows = np.random.default_rng(1).normal(size=(30, 4_000)).astype(np.float16)
        near = _projected(rows, 5)
        assert near.shape == (30, 512)
        for i in range(1, 30):
            distances = [np.linalg.norm(X[i].astype(float) - X[0].astype(float)) for X in (rows, near)]
            assert distances[1] == pytest.approx(distances[0], rel=0.2)
        np.testing.assert_array_equal(_projected(rows, 5), near)

    def test_of_many_samples_the_selected_and_some_others_are_shown(self) -> None:
        samples = made_up(50_000, 4_000, 3)
        shown = _shown(samples, 7)
        assert len(shown) == len(set(shown.tolist())) == MAP_SAMPLES
        assert samples.is_selected[shown].sum() == MAP_SELECTED
        assert samples.eligible[shown].all()
        np.testing.assert_array_equal(_shown(samples, 7), shown)
        assert not np.array_equal(_shown(samples, 8), shown)


def test_a_million_samples_are_a_small_answer_made_in_bounded_memory() -> None:
    samples, rng = made_up(1_000_000, 50_000, 1_000), np.random.default_rng(0)

    def pairs(count: int) -> list[list[Any]]:
        index = np.sort(rng.permutation(1_000_000)[:count])
        return [index.tolist(), *(figures(rng.normal(size=count)) for _ in range(2))]

    tracemalloc.start()
    counted = {
        "influence": pool_charts.influence_bins(samples),
        "sources": pool_charts.sources(samples),
        "lengths": pool_charts.length_bins(samples),
        "budgets": pool_charts.budgets(samples, "round_robin"),
    }
    shown = _shown(samples, 0)
    assert tracemalloc.get_traced_memory()[1] < 150 * 2**20  # the arrays themselves are 20 MiB
    tracemalloc.stop()
    landmarks = dict(zip(("index", "predicted", "exact"), pairs(MAX_PAIRS), strict=True))
    shortlist = dict(zip(("index", "before", "after"), pairs(MAX_PAIRS), strict=True))
    target = {"counts": True, "r2": 0.12345, "spearman": 0.12345, "influence": 0.12345, "took": 50}
    targets = [
        {**target, "index": i, "id": f"target-{i}", "turn": i, "first": [999_999] * 2} for i in range(MAX_TARGETS)
    ]
    points = {"x": figures(rng.normal(size=MAP_SAMPLES)), "y": figures(rng.normal(size=MAP_SAMPLES))}
    of_samples = {"influence": figures(samples.influence[shown]), "selected": samples.is_selected[shown].tolist()}
    found = Charts.model_validate(
        {
            **counted,
            "landmarks": {"count": 4096, **landmarks},
            "shortlist": {"count": 120_000, **shortlist},
            "targets": {"count": 2_000, "turns": 2_000, "data": targets},
            "map": {
                "of": "embedding",
                "shares": [0.1, 0.1],
                "count": 909_090,
                "index": shown.tolist(),
                **points,
                **of_samples,
            },
            "stages": [],
        }
    )
    assert len(found.model_dump_json()) < 500_000
    assert len(gzip.compress(found.model_dump_json().encode())) < 200_000


def test_an_even_part_of_many_is_shown() -> None:
    assert even_part(np.arange(10), 20).tolist() == list(range(10))
    part = even_part(np.arange(10_900), MAX_PAIRS)
    assert len(part) == MAX_PAIRS
    assert part[0] == 0
    assert set(np.diff(part).tolist()) == {5, 6}
    assert even_part(np.arange(0), 5).size == 0
