"""What a model makes of single rows, and how a terminal shows it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.templates import THINKING
from support.tiny import CHATML, make_tokenizer, save_model, turns

from service.datasets.storage import Sample
from service.names import NOT_IN_TEXT
from service.plan.parameters import Parameters
from winnow import marked_text
from winnow.marked_text import marked, printable
from worker.loading import folders
from worker.text.preview import Renderer
from worker.text.tokenization import tokenise

REFUSING = "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('it was asked to') }}{% endif %}"
PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
# Marked and read back: neither mark is in the texts.
OPEN, CLOSE = "\u27e6", "\u27e7"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, template in (("chatml", CHATML), ("thinking", THINKING.plain), ("refusing", REFUSING + PLAIN)):
        save_model(folder / name, template=template)
    return folder


def renderer(models: Path, name: str, **parameters: Any) -> Renderer:
    folder = folders.find({"kind": "registered", "name": name}, models, weights=False)
    return Renderer(folder, Parameters.model_validate({"method": "random", **parameters}))


def chat(*contents: str, index: int = 0) -> Sample:
    return Sample(index, f"row-{index}", None, turns(*contents), None)


def pieces(row: dict[str, Any], spans: Sequence[tuple[int, int]]) -> list[str]:
    return [row["text"][start:end] for start, end in spans]


class TestRows:
    def test_the_text_its_spans_and_its_tokens(self, models: Path) -> None:
        row = renderer(models, "chatml").row(chat("ask", "reply", "more", "again"))
        assert row["text"] == "".join(
            f"<|im_start|>{role}\n{content}<|im_end|>\n"
            for role, content in zip(["user", "assistant"] * 2, ["ask", "reply", "more", "again"], strict=True)
        )
        assert pieces(row, row["spans"]) == ["reply<|im_end|>", "again<|im_end|>"]
        assert row["kept"] == (0, len(row["text"]))
        tokens = row["tokens"]
        counted = sum(len(make_tokenizer(CHATML)(piece).input_ids) for piece in pieces(row, row["spans"]))
        assert tokens["counted"] == counted
        assert tokens["prompt"] + tokens["counted"] == tokens["kept"] == tokens["total"]
        assert (row["truncated"], row["response_truncated"], row["unusable"]) == (False, False, None)

    @pytest.mark.parametrize(
        ("contents", "is_response_cut"), [(("word " * 200, "reply"), False), (("ask", "word " * 200), True)]
    )
    def test_what_is_left_after_the_cut_is_what_a_job_has(
        self, models: Path, contents: tuple[str, ...], is_response_cut: bool
    ) -> None:
        sample = chat(*contents)
        row = renderer(models, "chatml", max_length=32).row(sample)
        (job,) = tokenise([sample], make_tokenizer(CHATML), max_length=32, report=lambda _: None)
        assert row["tokens"] == {
            "total": job.whole,
            "kept": 32,
            "counted": job.predicted,
            "prompt": 32 - job.predicted,
        }
        assert (row["truncated"], row["response_truncated"]) == (True, is_response_cut)
        start, end = row["kept"]
        assert row["text"][start:end] == make_tokenizer(CHATML).decode(job.input_ids)
        assert "".join(pieces(row, row["spans"])) == make_tokenizer(CHATML).decode(job.input_ids[job.response])

    def test_a_text_counts_as_a_whole(self, models: Path) -> None:
        row = renderer(models, "chatml").row(Sample(0, "t", None, None, "The quick brown fox"))
        assert pieces(row, row["spans"]) == [row["text"]] == ["The quick brown fox</s>"]
        assert row["tokens"]["prompt"] == 1, "nothing predicts the first token"

    def test_arguments_of_a_job_change_the_text(self, models: Path) -> None:
        thought = Sample(
            0, "r", None, [turns("2 + 2?")[0], {"role": "assistant", "content": "4", "reasoning_content": "R"}], None
        )
        kept, stripped = (renderer(models, "thinking", reasoning=how).row(thought) for how in ("keep", "strip"))
        assert pieces(kept, kept["spans"]) == ["<think>\nR\n</think>\n\n4<|im_end|>"]
        assert pieces(stripped, stripped["spans"]) == ["4<|im_end|>"]
        dropped = renderer(models, "chatml").row(thought)
        assert dropped["notes"] == ["reasoning_not_rendered"]

    def test_a_row_that_takes_no_part_has_a_reason(self, models: Path) -> None:
        by = renderer(models, "refusing")
        refused, empty = by.row(chat("refuse", "never")), by.row(chat("say nothing", ""))
        assert (refused["unusable"]["reason"], refused["text"], refused["tokens"]) == ("template_refuses", None, None)
        assert "it was asked to" in refused["unusable"]["detail"]
        assert (empty["unusable"]["reason"], empty["text"], empty["spans"]) == ("no_reply", "say nothing\n\n", [])

    def test_a_page_of_long_texts_is_short(self, models: Path) -> None:
        samples = [chat("ask", "a" * 100, index=i) for i in range(5)]
        by = renderer(models, "chatml")
        whole = len(by.row(samples[0])["text"])
        assert [len(by.page(samples, max_characters=most)) for most in (1, whole, whole + 1, 10**9)] == [1, 1, 2, 5]


class TestMarked:
    def test_what_counts_is_in_brackets_and_what_was_cut_is_counted(self) -> None:
        assert marked("ab cd ef", [(3, 5)]) == "ab ⟦cd⟧ ef"
        assert marked("ab cd ef", [(6, 8), (0, 2)]) == "⟦ab⟧ cd ⟦ef⟧"
        assert marked("ab cd ef", [(3, 5)], (1, 7)) == "[1 character cut]b ⟦cd⟧ e[1 character cut]"

    def test_it_escapes_what_names_and_messages_must_not_have(self) -> None:
        refused = re.compile(rf"{NOT_IN_TEXT}|\r")
        for code in range(0x3000):
            assert (printable(chr(code)) != chr(code)) == (refused.search(chr(code)) is not None)

    def test_a_row_has_a_heading(self, models: Path) -> None:
        by = renderer(models, "chatml", max_length=32)
        sample = chat("word " * 100, "reply\x1b[31m")
        heading, text = marked_text.lines({"index": 7, "id": "x\x1by"}, by.row(sample))
        assert heading.startswith("--- row 7 (id x\\x1by): 32 tokens, cut from ")
        assert text.startswith("[")
        assert "⟦reply\\x1b[31m<|im_end|>⟧" in text
        (refused,) = marked_text.lines({"index": 0, "id": "r"}, renderer(models, "refusing").row(chat("refuse", "no")))
        assert "unusable: template_refuses" in refused
