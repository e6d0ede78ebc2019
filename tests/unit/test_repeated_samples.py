"""What repeats is found, exactly where only the form differs and nearly up to some words; and nothing else is."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.duplicates import Row, context, found_in, published, random_row, says, varied

from service.datasets.storage import Sample
from service.storage.artifacts import ArtifactStore
from worker.duplicates import exclusions, minhash
from worker.duplicates.content import said_in
from worker.duplicates.matching import NONE
from worker.duplicates.repeats import Repeats
from worker.errors import Cancelled
from worker.stages.duplicates import PoolRepeats

EXACT, NEAR = ("same", "spaced", "case", "form"), ("changed",)
DRAW = np.random.default_rng(0)
TARGET = [random_row(DRAW, f"t{i}") for i in range(3)]
LONG = " ".join(f"told{i}" for i in range(300))
OTHERS = [random_row(DRAW, f"o{i}") for i in range(20)]

Search = Callable[..., tuple[Repeats, Repeats]]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def search(store: ArtifactStore, tmp_path: Path) -> Search:
    def call(pool: list[Row], target: list[Row] = TARGET, *cuts: int) -> tuple[Repeats, Repeats]:
        found = found_in(store, pool, target, tmp_path, cuts)
        return found.duplicates, found.overlap

    return call


@pytest.mark.parametrize("how", [*EXACT, *NEAR])
def test_what_is_planted_is_found_in_the_pool_and_in_the_target(search: Search, how: str) -> None:
    again = [varied(OTHERS[5], "again", how), varied(TARGET[1], "taken", how)]
    duplicates, overlap = search([*OTHERS, *again])
    assert duplicates.same_as.tolist() == [NONE] * 20 + [5, NONE]
    assert overlap.same_as.tolist() == [NONE] * 21 + [1]
    assert (duplicates.is_exact[20], overlap.is_exact[21]) == (how in EXACT, how in EXACT)
    nearly = {"exact": 0, "near": 1} if how in NEAR else {"exact": 1, "near": 0}
    assert duplicates.counts == overlap.counts == {**nearly, "repeated": 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param((LONG, "Yes."), (LONG, "No."), id="another short reply"),
        pytest.param(("a b c d e f g h", "x"), ("h g f e d c b a", "x"), id="another order"),
        pytest.param(("one two three", "four five"), ("one six three", "four five"), id="a changed word among few"),
        pytest.param(("same question", "same reply"), ("same reply", "same question"), id="turned round"),
    ],
)
def test_what_differs_is_no_repeat(search: Search, one: tuple[str, str], other: tuple[str, str]) -> None:
    duplicates, _ = search([says("one", *one), says("other", *other)])
    assert not duplicates.is_repeat.any()


def test_a_long_context_makes_no_duplicates_of_what_is_asked_of_it(search: Search) -> None:
    pool = [says(str(i), f"{LONG} Which {i}?", row["messages"][1]["content"]) for i, row in enumerate(OTHERS[:5])]
    assert not search(pool)[0].is_repeat.any()


def test_shared_system_messages_and_tools_do_not_make_samples_alike(search: Search) -> None:
    rules = {"role": "system", "content": LONG}
    pool = [{**row, "messages": [rules, *row["messages"]]} for row in OTHERS]
    assert not search(pool)[0].is_repeat.any()
    assert search([*pool, {**pool[3], "id": "again"}])[0].same_as[-1] == 3


def test_words_are_found_where_a_script_puts_no_spaces(search: Search) -> None:
    text = "以下の文章を読んで、質問に答えてください。東京は日本の首都であり、世界でも有数の大都市です。"
    pool = [
        says("one", text, "はい、わかりました。"),
        says("other", text.replace("首都", "中心"), "はい、わかりました。"),
    ]
    duplicates, _ = search([*pool, says("else", text[::-1], "いいえ、わかりません。")])
    assert duplicates.same_as.tolist() == [NONE, 0, NONE]
    assert not duplicates.is_exact.any()


def test_a_group_is_what_is_near_its_first_row_and_no_chain(search: Search) -> None:
    """Each differs from the one before in some words, and the last from the first in most."""
    words = OTHERS[0]["messages"][0]["content"].split() + OTHERS[1]["messages"][0]["content"].split()
    chain = []
    for step in range(8):
        changed = [f"new{i}" if i < 4 * step else word for i, word in enumerate(words)]
        chain.append(says(f"step{step}", " ".join(changed), "Done."))
    duplicates, _ = search(chain)
    first = np.where(duplicates.is_repeat, duplicates.same_as, np.arange(8))
    said = [{*pairwise(row["messages"][0]["content"].split())} for row in chain]
    assert len(set(first.tolist())) > 1
    for row in np.flatnonzero(duplicates.is_repeat).tolist():
        assert first[first[row]] == first[row], "the first of a group repeats none"
        common, together = said[row] & said[first[row]], said[row] | said[first[row]]
        assert len(common) / len(together) > 0.6
    assert duplicates.is_repeat[[1, 2]].all()


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_is_found_does_not_depend_on_how_the_pool_is_cut(tmp_path: Path, data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows = [random_row(draw, f"r{i}", words=20) for i in range(12)]
    for i, (of, how) in enumerate(
        data.draw(st.lists(st.tuples(st.integers(0, 11), st.sampled_from([*EXACT, *NEAR])), max_size=12))
    ):
        rows.append(varied(rows[of], f"again{i}", how))
    rows = [rows[i] for i in data.draw(st.permutations(range(len(rows))))]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(rows) - 1), max_size=5)))
    store = ArtifactStore(str(tmp_path / "store"))
    whole, cut = (found_in(store, rows, rows[:2], tmp_path, at) for at in ((), cuts))
    for one, other in ((whole.duplicates, cut.duplicates), (whole.overlap, cut.overlap)):
        assert one.same_as.tolist() == other.same_as.tolist()
        assert one.is_exact.tolist() == other.is_exact.tolist()
    assert whole.overlap.same_as[:2].tolist() == [0, 1] or whole.duplicates.same_as[1] == 0


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_as_many_as_the_formula_says(similarity: float) -> None:
    pairs, size = 3_000, 300
    common = round(2 * size * similarity / (1 + similarity))
    one, other = np.random.default_rng(1).integers(0, 2**63, (2, pairs, size), dtype=np.uint64)
    other[:, :common] = one[:, :common]
    starts = np.arange(pairs + 1) * size
    keys = [minhash.band_keys(each.ravel(), starts) for each in (one, other)]
    expected = minhash.detection(common / (2 * size - common))
    error = 4 * np.sqrt(expected * (1 - expected) / pairs) + 1e-3
    assert (keys[0] == keys[1]).any(axis=0).mean() == pytest.approx(expected, abs=error)


def test_hashes_are_those_of_words_and_pairs_wherever_they_stand() -> None:
    texts = ["a b c", "", "c a b c", "ab c"]
    words, starts = minhash.word_hashes(texts)
    assert starts.tolist() == [0, 3, 3, 7, 9]
    named = [word for text in texts for word in text.split()]
    assert all((words[i] == words[j]) == (named[i] == named[j]) for i in range(9) for j in range(9))
    shingles = minhash.shingle_hashes(words, starts)
    pairs = [pair for text in texts for pair in pairwise([*text.split(), "\n"]) if text]
    assert all((shingles[i] == shingles[j]) == (pairs[i] == pairs[j]) for i in range(9) for j in range(9))
    assert not minhash.band_keys(shingles, starts)[:, 1].any()


def test_signatures_are_the_same_on_every_machine() -> None:
    """Artifacts of several workers lie in one store."""
    words, starts = minhash.word_hashes(["the quick brown fox", "jumps over the lazy dog"])
    keys = minhash.band_keys(minhash.shingle_hashes(words, starts), starts)
    assert keys[:2].tolist() == [[3035548763, 397806922], [2908391467, 3166922943]]


def test_a_template_that_all_rows_share_costs_no_comparison_of_all_with_all(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = OTHERS[0]["messages"][0]["content"]
    pool = [says(str(i), f"{frame} " + " ".join(f"own{i}x{j}" for j in range(25)), "Yes.") for i in range(300)]
    compared = 0

    def counted(*sets: minhash.Hashes) -> bool:
        nonlocal compared
        compared += 1
        return near(*sets)

    near = minhash.are_near
    monkeypatch.setattr("worker.duplicates.matching.are_near", counted)
    duplicates, _ = search([*pool, varied(pool[299], "again", "changed")])
    assert duplicates.same_as.tolist() == [NONE] * 300 + [299]
    assert compared <= 32 * 301


def test_a_search_can_be_stopped_and_goes_on_from_the_shards_that_are_there(
    store: ArtifactStore, tmp_path: Path
) -> None:
    of = context(store, published(store, OTHERS, tmp_path), published(store, TARGET, tmp_path))
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        PoolRepeats(of, [(0, 10), (10, 20)], stop).find()
    first, second = PoolRepeats(of, [(0, 10), (10, 20)], stop).signatures
    assert store.exists(first)
    assert not store.exists(second)
    written = store.modified(first)
    found = PoolRepeats(of, [(0, 10), (10, 20)], lambda: None).find()
    assert store.modified(first) == written
    assert not found.duplicates.is_repeat.any()
    assert not list(store.temporary_folder.glob("winnow.*"))


def test_a_second_target_is_searched_without_the_first_ones_work(store: ArtifactStore, tmp_path: Path) -> None:
    pool = published(store, OTHERS, tmp_path)
    shards = [(0, 20)]
    first = PoolRepeats(context(store, pool, published(store, TARGET, tmp_path)), shards, lambda: None).find()
    written = {key: store.modified(key) for key in (first.keys["duplicates"], *first.signatures)}
    other = published(store, OTHERS[3:5], tmp_path)
    second = PoolRepeats(context(store, pool, other), shards, lambda: None).find()
    assert second.overlap.same_as[3:5].tolist() == [0, 1]
    assert second.overlap.counts["exact"] == 2
    assert first.keys["duplicates"] == second.keys["duplicates"]
    assert {key: store.modified(key) for key in written} == written


def repeats(*same_as: int) -> Repeats:
    return Repeats(np.array(same_as), np.zeros(len(same_as), bool))


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [0, 0, 0, 0, 0, 0]),
        ({"duplicates": "keep", "overlap": "keep"}, [0, 0, 0, 0, 0, 0]),
        ({"duplicates": "one", "overlap": "keep"}, [0, 0, 1, 0, 1, 0]),
        ({"duplicates": "keep", "overlap": "exclude"}, [0, 2, 0, 0, 0, 0]),
        ({"duplicates": "one", "overlap": "exclude"}, [0, 2, 0, 0, 1, 0]),
    ],
)
def test_the_first_that_can_be_used_stays(parameters: dict[str, str], expected: list[int]) -> None:
    """Rows 0, 1, 2 and 4 are one group, of which 0 cannot be used; 1 repeats the target."""
    usable = np.array([False, True, True, True, True, True])
    group, target = repeats(NONE, 0, 0, NONE, 0, NONE), repeats(NONE, 1, NONE, NONE, NONE, NONE)
    assert exclusions.excluded(parameters, usable, group, target).tolist() == expected


def test_repeats_come_back_from_the_store(store: ArtifactStore) -> None:
    written = Repeats(np.array([NONE, 0, NONE, 2]), np.array([False, True, False, False]))
    key = f"duplicates/00/{'0' * 64}.parquet"
    written.write(store, key)
    read = Repeats.read(store, key)
    assert (read.same_as.tolist(), read.is_exact.tolist()) == ([NONE, 0, NONE, 2], [False, True, False, False])
    assert read.counts == {"exact": 1, "near": 1, "repeated": 2}


def test_only_replies_that_count_are_learnt() -> None:
    messages = [
        {"role": "user", "content": "A Question"},
        {"role": "assistant", "content": "First", "counts": False},
        {"role": "assistant", "content": "Second", "reasoning_content": "Because"},
    ]
    said = said_in(Sample(0, "one", None, messages, None))
    assert (said.words, said.learnt) == ("a question first because second", "because second")
    plain = said_in(Sample(0, "two", None, None, " Some  TEXT"))
    assert (plain.words, plain.learnt) == ("some text", "some text")
