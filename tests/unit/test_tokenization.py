"""Tokenised samples: what is cut and counted, and the artifact that keeps them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import CHATML, make_tokenizer, turns

from service.datasets.storage import Sample
from service.storage.artifacts import ArtifactStore
from worker.text import token_files, tokenization
from worker.text.tokenization import ROW_GROUP, Tokenised, response_window, tokenise


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path))


def tokenised(*samples: Sample, max_length: int = 1_000, template: str | None = CHATML) -> list[Tokenised]:
    return list(tokenise(samples, make_tokenizer(template), max_length=max_length, report=lambda _: None))


REFUSES_NO = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('said no') }}{% endif %}" + CHATML


def chat(*contents: str, index: int = 0) -> Sample:
    return Sample(index, f"row-{index}", None, turns(*contents), None)


def text(content: str) -> Sample:
    return Sample(0, "row-0", None, None, content)


class TestTokenise:
    def test_tokens_are_those_of_the_rendered_conversation(self) -> None:
        tokenizer = make_tokenizer(CHATML)
        (row,) = tokenised(chat("Hello there", "General"))
        expected = tokenizer.apply_chat_template(turns("Hello there", "General"), return_dict=False)
        assert row.input_ids.tolist() == expected
        assert row.input_ids.dtype == np.int32

    def test_a_text_row_counts_all_but_its_first_token(self) -> None:
        (row,) = tokenised(text("The quick brown fox"), template=None)
        assert row.response.all()
        assert row.predicted == len(row.input_ids) - 1
        assert make_tokenizer(None).decode(row.input_ids) == "The quick brown fox</s>"

    def test_samples_come_in_order_across_chunks_and_progress_is_reported(self) -> None:
        count = ROW_GROUP + 3
        seen: list[int] = []
        samples = (chat("q", f"answer {i}", index=i) for i in range(count))
        tokenizer = make_tokenizer(CHATML)
        rows = list(tokenise(samples, tokenizer, max_length=100, report=seen.append))
        assert [row.index for row in rows] == list(range(count))
        assert tokenizer.decode(rows[-1].input_ids[rows[-1].response]) == f"answer {count - 1}<|im_end|>"
        assert seen == [ROW_GROUP, count]

    def test_a_long_prompt_loses_its_beginning_and_keeps_the_response(self) -> None:
        (whole,) = tokenised(chat("word " * 300, "short answer"))
        (cut,) = tokenised(chat("word " * 300, "short answer"), max_length=50)
        assert len(cut.input_ids) == 50
        assert (cut.truncated, cut.response_truncated) == (True, False)
        assert cut.predicted == whole.predicted
        assert make_tokenizer(CHATML).decode(cut.input_ids[cut.response]) == "short answer<|im_end|>"

    def test_a_long_response_loses_its_end(self) -> None:
        (cut,) = tokenised(chat("question", "word " * 300), max_length=50)
        assert (cut.truncated, cut.response_truncated) == (True, True)
        assert cut.predicted == 50 - 1  # the token before them is the only one that is not predicted
        first = make_tokenizer(CHATML).decode(cut.input_ids[cut.response])
        assert first.startswith("word word")

    def test_what_fits_is_not_cut(self) -> None:
        (whole,) = tokenised(chat("question", "answer"))
        (fits,) = tokenised(chat("question", "answer"), max_length=len(whole.input_ids))
        assert (fits.truncated, fits.response_truncated) == (False, False)
        assert fits.input_ids.tolist() == whole.input_ids.tolist()

    def test_a_prompt_that_fills_max_length_leaves_room_for_the_reply(self) -> None:
        (row,) = tokenised(chat("word " * 300, "yes"), max_length=16)
        assert (len(row.input_ids), row.unusable) == (16, None)
        assert row.predicted > 0

    def test_an_empty_reply_without_an_end_token_is_unusable(self) -> None:
        template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        row, one_token = tokenised(chat("question", ""), text("a"), template=template)[0], tokenised(text(""))[0]
        for each in (row, one_token):
            assert (each.unusable, len(each.input_ids), each.predicted, each.truncated) == ("no_reply", 0, 0, False)
            assert each.detail

    @pytest.mark.parametrize("refused", [(0,), (ROW_GROUP - 1,), (ROW_GROUP, ROW_GROUP + 1), range(ROW_GROUP)])
    def test_rows_that_cannot_be_rendered_come_without_tokens_and_with_the_reason(self, refused: Sequence[int]) -> None:
        count = ROW_GROUP + 2
        samples = [chat("no" if i in refused else "yes", f"answer {i}", index=i) for i in range(count)]
        rows = tokenised(*samples, template=REFUSES_NO)
        assert [row.index for row in rows if row.unusable] == list(refused)
        for row in rows:
            assert (row.predicted == 0) == (row.unusable is not None) == (len(row.input_ids) == 0)
        assert "said no" in (rows[refused[0]].detail or "")
        whole = tokenised(*(sample for sample in samples if sample.index not in refused), template=REFUSES_NO)
        kept = [row for row in rows if row.unusable is None]
        assert [row.input_ids.tolist() for row in kept] == [row.input_ids.tolist() for row in whole]

    def test_the_detail_is_text_that_every_store_and_terminal_takes(self) -> None:
        row = tokenization._unusable(0, "why", "a\n\tb \x00\ud800\x1b[2J\u202e" + "x" * 1_000)
        assert row.detail is not None
        assert row.detail.startswith("a b \ufffd\ufffd\ufffd[2J\ufffdxxx")
        assert len(row.detail) == 300


def best_window(response: list[bool], max_length: int) -> tuple[int, int]:
    """The reference: every window in turn; a window's first token is predicted by nothing."""
    if len(response) <= max_length:
        return 0, len(response)
    starts = range(len(response) - max_length + 1)
    start = max(starts, key=lambda s: (sum(response[s + 1 : s + max_length]), -s))
    return start, start + max_length


@given(response=st.lists(st.booleans(), max_size=40), max_length=st.integers(1, 45))
def test_the_window_keeps_the_most_predicted_tokens(response: list[bool], max_length: int) -> None:
    window = response_window(np.array(response, dtype=bool), max_length)
    assert (window.start, window.stop) == best_window(response, max_length)


def rows_of(count: int) -> list[Tokenised]:
    """Rows that tell themselves apart: row i has i % 7 + 1 tokens, all of value i."""
    rows = []
    for i in range(count):
        length = i % 7 + 1
        response = np.arange(length) >= length // 2
        rows.append(Tokenised(i, np.full(length, i, np.int32), response, i % 3 == 0, i % 9 == 0))
    return rows


def read_everything(store: ArtifactStore, key: str, start: int, stop: int, chosen: np.ndarray) -> list[object]:
    counts = token_files.read_counts(store, key)
    found = (token_files.read_tokens(store, key, start, stop), token_files.read_all(store, key))
    taken = [*found, token_files.read_rows(store, key, chosen)] if len(chosen) else found
    return [
        counts.summary(),
        token_files.read_indices(store, key).tolist(),
        *((each.input_ids.tolist(), each.response.tolist(), each.offsets.tolist()) for each in taken),
    ]


class TestArtifact:
    COUNT = 2 * ROW_GROUP + 100

    @pytest.fixture
    def key(self, store: ArtifactStore) -> str:
        token_files.write_tokens(store, "tokens", rows_of(self.COUNT))
        return "tokens"

    @pytest.mark.parametrize(
        ("start", "stop"),
        [(0, 1), (0, COUNT), (5, 9), (ROW_GROUP - 1, ROW_GROUP + 1), (ROW_GROUP, 2 * ROW_GROUP), (COUNT - 1, COUNT)],
    )
    def test_a_range_reads_back(self, store: ArtifactStore, key: str, start: int, stop: int) -> None:
        samples = token_files.read_tokens(store, key, start, stop)
        expected = rows_of(self.COUNT)[start:stop]
        assert samples.input_ids.tolist() == np.concatenate([r.input_ids for r in expected]).tolist()
        assert samples.response.tolist() == np.concatenate([r.response for r in expected]).tolist()
        assert samples.lengths.tolist() == [len(r.input_ids) for r in expected]

    def test_counts_read_back(self, store: ArtifactStore, key: str) -> None:
        counts, expected = token_files.read_counts(store, key), rows_of(self.COUNT)
        assert counts.length.tolist() == [len(r.input_ids) for r in expected]
        assert counts.predicted.tolist() == [r.predicted for r in expected]
        assert counts.truncated.tolist() == [r.truncated for r in expected]
        assert counts.response_truncated.tolist() == [r.response_truncated for r in expected]

    def test_what_was_cut_noted_and_left_out_is_counted(self, store: ArtifactStore) -> None:
        rows = tokenised(
            chat("question", "answer"),
            chat("word " * 300, "short", index=1),
            chat("q", "word " * 300, index=2),
            max_length=50,
        )
        rows[1] = replace(rows[1], notes=("folded", "left"))
        rows[2] = replace(rows[2], notes=("folded",))
        unusable = [tokenization._unusable(3 + i, reason, f"{reason} {i}") for i, reason in enumerate("bab")]
        token_files.write_part(store, "rows", "tokens", [*rows, *unusable])
        counts = token_files.read_counts(store, "tokens")
        assert {reason: found.tolist() for reason, found in counts.unusable.items()} == {"a": [4], "b": [3, 5]}
        assert counts.usable.tolist() == [True] * 3 + [False] * 3
        assert counts.notes == {"folded": 2, "left": 1}
        assert token_files.About.of(store, "tokens").unusable[:2] == [
            {"index": 3, "reason": "b", "detail": "b 0"},
            {"index": 4, "reason": "a", "detail": "a 1"},
        ]
        assert len(token_files.read_tokens(store, "tokens", 3, 6)) == 3
        summary = counts.summary()
        lengths = [len(row.input_ids) for row in rows]
        assert summary == {
            "samples": 6,
            "tokens": sum(lengths),
            "squares": sum(length**2 for length in lengths),
            "response_tokens": sum(row.predicted for row in rows),
            "longest": 50,
            "truncated": 2,
            "truncated_responses": 1,
        }

    def test_copied_rows_read_like_any_artifact(self, store: ArtifactStore, key: str) -> None:
        """The chosen rows are spread over all row groups of the source: ranges must not depend on where they came from."""
        chosen = np.flatnonzero(np.random.default_rng(0).random(self.COUNT) < 0.7)
        assert len(chosen) > ROW_GROUP
        token_files.copy_rows(store, key, "copy", chosen)
        assert token_files.read_indices(store, "copy").tolist() == chosen.tolist()
        for start, stop in [(0, len(chosen)), (600, 900), (ROW_GROUP - 2, ROW_GROUP + 2)]:
            samples = token_files.read_tokens(store, "copy", start, stop)
            assert len(samples) == stop - start
            assert samples.input_ids[samples.offsets[:-1]].tolist() == chosen[start:stop].tolist()

    def test_no_row_may_be_chosen_from_a_group(self, store: ArtifactStore, key: str) -> None:
        chosen = np.array([3, 2 * ROW_GROUP + 5])
        token_files.copy_rows(store, key, "copy", chosen)
        assert token_files.read_tokens(store, "copy", 1, 2).input_ids[0] == 2 * ROW_GROUP + 5

    @given(
        cuts=st.lists(st.integers(1, COUNT - 1), max_size=5, unique=True).map(sorted),
        start=st.integers(0, COUNT - 1),
        length=st.integers(1, COUNT),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=15, deadline=None)
    def test_parts_read_like_one_file(self, cuts: list[int], start: int, length: int, seed: int) -> None:
        rows = rows_of(self.COUNT)
        chosen = np.flatnonzero(np.random.default_rng(seed).random(self.COUNT) < 0.3)
        with TemporaryDirectory() as folder:
            store = ArtifactStore(folder)
            token_files.write_part(store, "one", "whole", rows)
            bounds = list(pairwise([0, *cuts, self.COUNT]))
            for low, high in bounds:
                token_files.write_part(store, f"rows{low}", f"counts{low}", rows[low:high])
            token_files.write_whole(store, "parts", [f"counts{low}" for low, _ in bounds])
            one, parts = (read_everything(store, key, start, start + length, chosen) for key in ("whole", "parts"))
            assert one == parts
            for key in ("whole", "parts"):
                token_files.copy_rows(store, key, f"copy of {key}", chosen)
            assert Path(folder, "copy of whole").read_bytes() == Path(folder, "copy of parts").read_bytes()
            assert [rows for _, rows in token_files.About.of(store, "parts").parts] == [b - a for a, b in bounds]

    def test_what_stands_for_parts_adds_up(self, store: ArtifactStore) -> None:
        """The first hundred unusable rows are named, from whichever parts they are."""
        rows = [
            replace(row, notes=("folded",)) if row.index % 2 else tokenization._unusable(row.index, "odd", "no")
            for row in rows_of(300)
        ]
        for low in (0, 100, 200):
            token_files.write_part(store, f"rows{low}", f"counts{low}", rows[low : low + 100])
        token_files.write_whole(store, "parts", ["counts0", "counts100", "counts200"])
        counts, about = token_files.read_counts(store, "parts"), token_files.About.of(store, "parts")
        assert counts.notes == {"folded": 150}
        assert counts.unusable["odd"].tolist() == list(range(0, 300, 2))
        assert [row["index"] for row in about.unusable] == list(range(0, 200, 2))

    def test_a_failed_writing_leaves_nothing(self, store: ArtifactStore, tmp_path: Path) -> None:
        def broken() -> object:
            yield rows_of(1)[0]
            raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            token_files.write_tokens(store, "tokens", broken())
        assert not store.exists("tokens")
        assert not any(path.is_file() for path in tmp_path.rglob("*"))
