"""What the presets of an export write of a sample, what they refuse, and how rows are repeated."""

import json
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat.chat_completion_tool_param import ChatCompletionToolParam
from pydantic import TypeAdapter
from support.preset_samples import SAMPLES, TOOLS

from service.http.errors import Unprocessable
from service.results.presets import LINES, Preset
from service.results.presets.conversations import Unsuitable
from service.results.presets.stream import copies, stream

REFUSED = {
    Preset.OPENAI: {"reasoning", "text", "uncalled"},
    Preset.TRL: {"several", "mixed", "calls", "parallel", "first", "text"},
    Preset.TRL_MESSAGES: {"last", "mixed", "text"},
    Preset.AXOLOTL: {"text"},
    Preset.LLAMAFACTORY: {"last", "mixed", "parallel", "reasoning", "named", "first", "uncalled", "text"},
    Preset.LLAMAFACTORY_ALPACA: {
        *("last", "mixed", "calls", "parallel", "reasoning", "named", "first", "uncalled", "text")
    },
    Preset.LLAMAFACTORY_V1: {"named", "text"},
    Preset.ROWS: set(),
}


def line(preset: Preset, name: str) -> dict[str, Any]:
    return LINES[preset](SAMPLES[name])


@pytest.mark.parametrize("preset", Preset)
def test_a_preset_refuses_just_what_its_format_cannot_hold(preset: Preset) -> None:
    for name in SAMPLES:
        with pytest.raises(Unsuitable) if name in REFUSED[preset] else nullcontext():
            line(preset, name)


def test_openai_marks_replies_that_do_not_count_and_ends_with_one_that_does() -> None:
    replies = [message for message in line(Preset.OPENAI, "mixed")["messages"] if message["role"] == "assistant"]
    assert [reply.get("weight", 1) for reply in replies] == [1, 0, 1]
    assert [message["content"] for message in line(Preset.OPENAI, "trailing")["messages"]] == ["a", "b"]
    assert "tools" not in line(Preset.OPENAI, "plain")


def test_openai_gives_each_call_an_id_and_each_answer_that_of_its_call() -> None:
    found = line(Preset.OPENAI, "parallel")
    _, called, first, second, _ = found["messages"]
    assert [call["id"] for call in called["tool_calls"]] == ["call_0", "own"]
    assert [call["function"]["arguments"] for call in called["tool_calls"]] == ['{"port":"Brest"}', "x"]
    assert (first["tool_call_id"], second["tool_call_id"]) == ("own", "call_0")
    assert found["tools"] == TOOLS


@pytest.mark.parametrize("name", sorted(SAMPLES.keys() - REFUSED[Preset.OPENAI]))
def test_openai_has_the_types_of_openai(name: str) -> None:
    found = line(Preset.OPENAI, name)
    assert found.keys() <= {"messages", "tools"}
    for message in found["messages"]:
        TypeAdapter(ChatCompletionMessageParam).validate_python(message)
    for tool in found.get("tools", []):
        TypeAdapter(ChatCompletionToolParam).validate_python(tool)


def test_trl_splits_before_the_one_reply_that_counts() -> None:
    found = line(Preset.TRL, "last")
    assert [message["content"] for message in found["prompt"]] == ["a", "b", "c"]
    assert found["completion"] == [{"role": "assistant", "content": "d"}]
    assert json.loads(line(Preset.TRL_MESSAGES, "calls")["tools"]) == TOOLS
    assert "counts" not in json.dumps([line(Preset.TRL, "last"), line(Preset.TRL_MESSAGES, "trailing")])


def test_axolotl_says_of_each_message_whether_it_is_trained_on() -> None:
    trained = [message["train"] for message in line(Preset.AXOLOTL, "mixed")["messages"]]
    assert trained == [False, True, False, False, False, True]


def test_the_dialects_of_llama_factory() -> None:
    turns = line(Preset.LLAMAFACTORY, "calls")["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "function_call", "observation", "gpt"]
    assert json.loads(turns[1]["value"]) == [{"name": "tide", "arguments": {"port": "Brest"}}]
    assert json.loads(line(Preset.LLAMAFACTORY, "calls")["tools"]) == TOOLS
    found = line(Preset.LLAMAFACTORY_ALPACA, "several")
    assert (found["history"], found["instruction"], found["output"]) == ([["a", "b"]], "c", "d")
    assert line(Preset.LLAMAFACTORY_ALPACA, "plain")["system"] == "Be brief."
    weights = [message["loss_weight"] for message in line(Preset.LLAMAFACTORY_V1, "mixed")["messages"]]
    assert weights == [0, 1, 0, 0, 0, 1]
    parts = [part["type"] for part in line(Preset.LLAMAFACTORY_V1, "parallel")["messages"][1]["content"]]
    assert parts == ["text", "tool_call", "tool_call"]
    assert line(Preset.LLAMAFACTORY_V1, "reasoning")["messages"][1]["content"][0] == {
        "type": "reasoning",
        "value": "hm",
    }


@pytest.mark.parametrize("preset", [Preset.LLAMAFACTORY, Preset.LLAMAFACTORY_ALPACA, Preset.LLAMAFACTORY_V1])
def test_all_lines_for_llama_factory_have_the_same_fields(preset: Preset) -> None:
    assert len({tuple(line(preset, name)) for name in SAMPLES.keys() - REFUSED[preset]}) == 1


def test_rows_are_what_is_kept() -> None:
    for name, sample in SAMPLES.items():
        found = line(Preset.ROWS, name)
        assert (found["id"], found.get("source"), found.get("text")) == (sample.id, sample.source, sample.text)
        assert (found.get("messages"), found.get("tools")) == (sample.messages, sample.tools)


def test_nothing_is_written_where_a_sample_is_refused() -> None:
    samples = [(SAMPLES["plain"], 1.0)] * 5_000 + [(SAMPLES["text"], 1.0)]  # the first fill more than one part
    with pytest.raises(Unprocessable) as refused:
        next(stream(lambda: samples, Preset.TRL, repeated=False))
    assert (refused.value.problem_code, refused.value.param) == ("preset_unsuitable", "preset")
    assert all(part in refused.value.detail for part in ("text", "99", "preset=rows"))


@given(st.lists(st.floats(0, 9, width=32), max_size=50))
def test_rows_are_repeated_by_their_weight_and_the_total_stays(weights: list[float]) -> None:
    found = list(copies(enumerate(weights)))
    assert found == sorted(found)
    assert abs(len(found) - sum(weights)) <= 0.5 + 1e-9
    assert all(abs(found.count(i) - weight) < 1 + 1e-9 for i, weight in enumerate(weights))


def test_a_whole_weight_is_that_many_copies() -> None:
    assert list(copies(zip("abcd", [2.0, 0.0, 1.0, 3.0], strict=True))) == [*"aacddd"]
    assert list(copies(zip("abcd", [0.5, 0.5, 0.25, 1.75], strict=True))) == [*"add"]
