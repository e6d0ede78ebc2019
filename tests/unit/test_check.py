"""`winnow check`: what an upload would become, and what a model makes of it, without a server."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.progress import Progress, TaskID
from support.distribution import PROJECT
from support.tiny import make_tokenizer, pool_rows, save_model, turns, write_jsonl
from typer.testing import CliRunner

from service.datasets.bad_rows import OnBadRow
from service.datasets.rows.options import RowOptions
from service.datasets.storage import Sample
from winnow.cli.main import EXTRAS
from winnow.marked_text import marked
from worker.check.command import check
from worker.check.examine import Options, examine
from worker.text.chat_templates import ChatFormat
from worker.text.tokenization import tokenise

# It refuses a row that asks for it, and has no token that ends a turn: an empty reply leaves nothing to learn.
REFUSING = (
    "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('it was asked to') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two registered models, of which one has no chat template; without their weights."""
    folder = tmp_path_factory.mktemp("models")
    for name, template in (("refusing", REFUSING), ("bare", None)):
        save_model(folder / name, template=template)
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
    return folder


def checked(file: Path, *words: str, status: int) -> dict[str, Any]:
    done = CliRunner().invoke(check, [str(file), "--json", *words])
    assert done.exit_code == status, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def printed(file: Path, *words: str, status: int) -> str:
    done = CliRunner().invoke(check, [str(file), *words])
    assert done.exit_code == status, done.output
    return done.stdout


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write_jsonl(path, rows)


def _packed(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(",".join(row) + "\n" for row in [list(rows[0]), *(list(row.values()) for row in rows)]))


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("write", "container", "compression"),
    [
        (_jsonl, "jsonl", None),
        (_packed, "json", "gzip"),
        (_csv, "csv", None),
        (_parquet, "parquet", None),
    ],
)
def test_a_file_of_any_kind_is_told_as_an_upload_would_take_it(
    write: Callable[[Path, list[dict[str, Any]]], None], container: str, compression: str | None, tmp_path: Path
) -> None:
    rows = [{"question": "q" * i, "answer": "a" * 2 * i, "dataset": "d", "level": "x"} for i in range(1, 101)]
    path = tmp_path / f"data.{container}"
    write(path, rows)
    found = checked(path, status=0)
    assert (found["upload"], found["rows"], found["refused"], found["bad_rows"]) == ("stored", 100, None, None)
    detected = found["detected"]
    assert (detected["container"], detected["compression"]) == (container, compression)
    assert [(form["form"], form["rows"]) for form in detected["forms"]] == [("question_answer", 100)]
    assert (detected["source_columns"], detected["left_alone"]) == (["dataset"], ["level"])
    assert found["sources"] == {"d": 100}
    assert found["characters"]["counted"] == {
        "total": 2 * 5050, "min": 2, "median": 100, "p90": 180, "p99": 198, "max": 200,
    }  # fmt: skip
    assert found["characters"]["all"] == {
        "total": 3 * 5050, "min": 3, "median": 150, "p90": 270, "p99": 297, "max": 300,
    }  # fmt: skip
    assert found["model"] is None


class TestBadRows:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        rows = [{"text": "t"}, {"nothing": "a"}, {"text": 1}, {"text": "u", "id": "0"}, {"nothing": "b"}, {"text": 2}]
        return write_jsonl(tmp_path / "data.jsonl", [*rows, {"other": 17}, {"other": 18}])

    def test_they_are_all_counted_by_reason_and_named_by_line(self, file: Path) -> None:
        found = checked(file, status=1)
        assert (found["upload"], found["rows"]) == ("refused", 1)
        bad = found["bad_rows"]
        assert bad["count"] == 7
        assert sorted(row["number"] for row in bad["first"]) == [2, 3, 4, 5, 6, 7, 8]
        assert [(each["rows"], each["first"]["number"]) for each in bad["by_reason"]] == [
            (2, 2),
            (2, 3),
            (2, 7),
            (1, 4),
        ]
        assert bad["more_reasons"] == 0

    def test_reasons_that_differ_in_what_they_quote_are_one(self, tmp_path: Path) -> None:
        rows = [{"id": id, "text": "t"} for id in ("a", "b", "a", "b", "b")]
        bad = checked(write_jsonl(tmp_path / "data.jsonl", rows), status=1)["bad_rows"]
        assert [(each["rows"], each["first"]["number"]) for each in bad["by_reason"]] == [(3, 3)]

    def test_skipping_them_stores_the_rest_and_is_no_success_either(self, file: Path) -> None:
        assert checked(file, "--on-bad-row", "skip", status=1)["upload"] == "stored"

    def test_a_file_of_nothing_else_is_refused_and_they_are_counted(self, tmp_path: Path) -> None:
        file = write_jsonl(tmp_path / "data.jsonl", [{"nothing": i} for i in range(30)])
        found = checked(file, "--on-bad-row", "skip", status=2)
        assert (found["upload"], found["refused"]["code"]) == ("refused", "invalid_rows")
        assert found["bad_rows"]["count"] == found["bad_rows"]["by_reason"][0]["rows"] == 30
        assert "line 1" in printed(file, status=2)


@pytest.mark.parametrize(
    ("content", "words", "code"),
    [
        (b"PK\x03\x04 a zip", (), "invalid_file"),
        (b'{"text": "t"}\n', ("--columns", "source:topic"), "invalid_request"),
    ],
)
def test_a_file_that_is_refused_as_a_whole(content: bytes, words: tuple[str, ...], code: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(content)
    found = checked(tmp_path / "data", *words, status=2)
    assert found["refused"]["code"] == code
    assert found["refused"]["detail"]


def test_columns_and_templates_are_those_of_an_upload(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [{"puzzle": "1 + 1", "solution": "2"}])
    mapped = checked(file, "--columns", "prompt:puzzle,completion:solution", "--show", "1", status=0)
    assert mapped["shown"][0]["text"].count("2") == 1
    assert mapped["characters"]["counted"]["total"] == 1


def test_a_template_makes_the_rows(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [{"puzzle": "1 + 1", "choices": ["3", "2"], "right": 1}])
    template = json.dumps({"user": "{{ puzzle }} = ?", "assistant": "{{ choices[right] }}"})
    found = checked(file, "--template", template, "--show", "1", status=0)
    assert found["shown"][0]["text"] == "user: 1 + 1 = ?\nassistant: 2\n"
    assert found["shown"][0]["spans"] == [[27, 28]]


def test_only_what_is_learnt_counts(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "unlearnt", "weight": 0},
        {"role": "assistant", "content": "", "reasoning_content": "think", "tool_calls": [call]},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "reply"},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages, "tools": tools}])
    found = checked(file, "--show", "1", status=0)
    counted = "think" + json.dumps(call["function"], sort_keys=True) + "reply"
    assert found["characters"]["counted"]["total"] == len(counted)
    assert found["characters"]["all"]["total"] == len(counted + "ask" + "unlearnt" + "result" + json.dumps(tools))
    text, spans = found["shown"][0]["text"], found["shown"][0]["spans"]
    assert [text[start:end].replace("\n", "") for start, end in spans] == [counted[: -len("reply")], "reply"]


def test_reasons_beyond_the_first_hundred_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.check.bad_rows._MAX_REASONS", 1)
    monkeypatch.setattr("worker.check.bad_rows._NAMED", 2)
    file = write_jsonl(tmp_path / "data.jsonl", [{"text": "t"}, {"text": 1}, {"a": 1}, {"b": 1}, {"text": 2}])
    bad = checked(file, status=1)["bad_rows"]
    assert (bad["count"], bad["more_reasons"]) == (4, 2)
    assert [(each["rows"], each["first"]["number"]) for each in bad["by_reason"]] == [(2, 2)]
    assert [row["number"] for row in bad["first"]] == [2, 3]
    assert "line 2" in printed(file, status=1)


def test_the_progress_follows_the_file_and_its_rows(tmp_path: Path) -> None:
    file = write_jsonl(
        tmp_path / "data.jsonl", ({"text": "t" * 500} if i % 2 else {"nothing": i} for i in range(3_000))
    )
    seen: list[tuple[float, int]] = []

    class Seen(Progress):
        def update(self, task_id: TaskID, **changes: Any) -> None:
            seen.append((changes["completed"] / (self.tasks[task_id].total or 0), changes["rows"]))

    options = Options(file=file, reading=RowOptions(), on_bad_row=OnBadRow.REFUSE, model=None, show=0)
    examine(options, Seen(disable=True))
    reading, measuring = seen[:3], seen[3:]
    assert [rows for _, rows in reading] == [1000, 2000, 3000]
    assert [share for share, _ in reading] == sorted(share for share, _ in reading)
    assert 0.2 < reading[0][0] < 0.8
    assert [rows for _, rows in measuring] == [1000, 1500]
    assert reading[-1][0] == measuring[-1][0] == 1


class TestWithAModel:
    def rows(self) -> list[dict[str, Any]]:
        rows = pool_rows(30)
        for i in (3, 20):
            rows[i]["messages"] = turns("refuse", "never")
        rows[5] = {"id": "row-5", "text": "All of it counts, but for the first token."}
        rows[7]["messages"] = turns("say nothing", "")
        rows[11]["messages"] = turns("say much", "word " * 500)
        return rows

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return write_jsonl(tmp_path / "data.jsonl", self.rows())

    def test_tokens_are_those_of_a_job(self, file: Path, models: Path) -> None:
        words = ("--model", "refusing", "--models", str(models), "--max-length", "64")
        found = checked(file, *words, status=1)["model"]
        samples = [
            Sample(i, row["id"], None, row.get("messages"), row.get("text")) for i, row in enumerate(self.rows())
        ]
        tokenizer = make_tokenizer(REFUSING)
        cut, whole = (
            [
                row
                for row in tokenise(samples, tokenizer, max_length=longest, report=lambda _: None)
                if row.unusable is None
            ]
            for longest in (64, 10_000)
        )
        lengths = {
            "tokens": [len(row.input_ids) for row in whole],
            "kept_tokens": [len(row.input_ids) for row in cut],
            "counted_tokens": [row.predicted for row in cut],
        }
        for name, values in lengths.items():
            got = found[name]
            assert (got["total"], got["min"], got["max"]) == (sum(values), min(values), max(values))
            assert got["median"] == np.quantile(values, 0.5, method="inverted_cdf")
        assert found["tokens"]["max"] > 500
        assert found["truncated"] == sum(row.truncated for row in cut) > found["truncated_responses"] > 0
        assert found["truncated_responses"] == sum(row.response_truncated for row in cut)
        assert (found["max_length"], found["chat_template"]) == (64, "the model's own")

    def test_unusable_rows_are_counted_by_reason_and_named(self, file: Path, models: Path) -> None:
        found = checked(file, "--model", str(models / "refusing"), status=1)["model"]
        assert found["max_length"] == found["kept_tokens"]["max"] == 256, "what the model was made for"
        unusable = found["unusable"]
        assert unusable["by_reason"] == {"template_refuses": 2, "no_reply": 1}
        named = [(row["index"], row["id"], row["reason"]) for row in unusable["first"]]
        assert named == [(3, "row-3", "template_refuses"), (7, "row-7", "no_reply"), (20, "row-20", "template_refuses")]
        assert not found["too_many_unusable"]
        strict = checked(file, "--model", str(models / "refusing"), "--set", "max_unusable=0.09", status=1)["model"]
        assert strict["too_many_unusable"]

    def test_a_model_without_a_template_takes_what_the_other_refuses(self, file: Path, models: Path) -> None:
        found = checked(file, "--model", "bare", "--models", str(models), status=0)["model"]
        assert (found["chat_template"], found["unusable"]["count"]) == ("default", 0)

    def test_the_text_is_shown_with_what_counts(self, file: Path, models: Path) -> None:
        words = ("--model", str(models / "refusing"), "--show", "4")
        shown = checked(file, *words, status=1)["shown"]
        chat = ChatFormat(make_tokenizer(REFUSING))
        for row, given in zip(shown[:3], self.rows(), strict=False):
            expected = chat.render(Sample(row["index"], row["id"], None, given["messages"], None))
            assert (row["text"], [tuple(span) for span in row["spans"]]) == (expected.text, expected.spans)
            assert (row["unusable"], row["truncated"]) == (None, False)
        assert (shown[3]["unusable"]["reason"], shown[3]["text"]) == ("template_refuses", None)
        text = printed(file, *words, status=1)
        assert all(marked(row["text"], row["spans"]).strip() in text for row in shown[:3])

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--model", "absent"), "No model is registered as 'absent'. Registered: bare, refusing."),
            (("--model", "/nowhere/at/all"), "no such folder"),
            (("--model", "bare", "--set", "reasoning=some"), "--set reasoning"),
            (("--model", "bare", "--max-length", "3"), "--set max_length"),
            (("--max-length", "100"), "--model"),
            (("--format", "tables"), "--format tables: expected one of"),
            (("--columns", "nonsense"), "columns"),
        ],
    )
    def test_a_mistake_is_told_before_the_file_is_read(
        self, words: tuple[str, ...], message: str, file: Path, models: Path
    ) -> None:
        done = CliRunner().invoke(check, [str(file), *words, "--models", str(models)])
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in " ".join(done.stderr.split())


def test_control_characters_of_a_row_do_not_reach_the_terminal(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "data.jsonl", [{"text": "red \x1b[31m \u202e line\nnext"}])
    text = printed(file, "--show", "1", status=0)
    assert "⟦red \\x1b[31m \\u202e line\nnext⟧" in text
    assert "\x1b" not in text


def test_the_command_is_installed_with_what_it_needs() -> None:
    module, _, name = PROJECT["entry-points"]["winnow.commands"]["check"].partition(":")
    assert (module, name, EXTRAS[module]) == ("worker.check.command", "check", "server")
