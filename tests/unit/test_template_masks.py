"""What counts under templates that rewrite messages, against twins that mark it themselves ({% generation %})."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.templates import CHANNELS, CUTTING, ENDLESS, LISTS, PROMPTED, THINKING, TWINS, Twins
from support.tiny import make_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from service.datasets.storage import Sample
from worker.errors import UnusableRow
from worker.text import replies
from worker.text.chat_templates import ChatFormat, Rendered

Message = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]

ARGUMENTS = st.dictionaries(
    st.sampled_from(["a", "b"]), st.integers(0, 9) | st.sampled_from(["x", "<|im_end|>", "y z"])
)
# Prompts hold a word that replies do not, and both hold what templates look for.
WORDS = st.lists(
    st.sampled_from(["a", "é", "\n", " ", "<|im_start|>assistant\n", "<|im_end|>", "918", "</s>"]), max_size=4
)
SAID = WORDS.map(lambda words: "".join([*words, "reply", *words[::-1]]))
ASKED = WORDS.map(lambda words: "".join([*words, "PROMPT", *words[::-1]]))


@st.composite
def conversations(draw: st.DrawFn, twins: Twins) -> list[Message]:
    """What the template takes as it is, and ends with a reply that counts."""
    messages: list[Message] = []
    if twins.system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(ASKED)})
    for last in [*([False] * draw(st.integers(0, 2))), True]:
        messages.append({"role": "user", "content": draw(ASKED)})
        if twins.calls and draw(st.booleans()):
            call = {"type": "function", "function": {"name": "look", "arguments": draw(ARGUMENTS)}}
            messages.append({**_reply(draw, twins), "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(ASKED)})
        messages.append(_reply(draw, twins))
        if not last and draw(st.booleans()):
            messages[-1]["counts"] = False
    return messages


def _reply(draw: st.DrawFn, twins: Twins) -> Message:
    message = {"role": "assistant", "content": draw(SAID)}
    if twins.thinks and draw(st.booleans()):
        message["reasoning_content"] = draw(SAID)
    return message


def rendered(template: str, messages: list[Message], tools: Any = None, **options: Any) -> Rendered:
    return ChatFormat(make_tokenizer(template), **options).render(Sample(0, "x", None, messages, None, tools))


def parts(found: Rendered) -> list[str]:
    return [found.text[start:end] for start, end in found.spans]


def truth(twins: Twins, messages: list[Message], tools: Any) -> tuple[str, list[tuple[int, int]]]:
    """What transformers makes of the twin; arguments are text where it wants text, contents lists where it wants lists."""
    given_messages = []
    for message in messages:
        one = {name: value for name, value in message.items() if name != "counts"}
        if twins is LISTS:
            one["content"] = [{"type": "text", "text": one["content"]}]
        if twins is CUTTING and "tool_calls" in one:
            (call,) = one["tool_calls"]
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            one["tool_calls"] = [{**call, "function": {**call["function"], "arguments": text}}]
        given_messages.append(one)
    tokens = make_tokenizer(None).special_tokens_map
    texts, spans = render_jinja_template(
        [given_messages], tools=tools, chat_template=twins.marked, return_assistant_tokens_mask=True, **tokens
    )
    counted = [m.get("counts", True) for m in messages if m["role"] == "assistant"]
    return texts[0], [span for span, counts in zip(spans[0], counted, strict=True) if counts]


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_spans_are_those_of_a_twin_that_marks_them(name: str, data: st.DataObject) -> None:
    twins = TWINS[name]
    messages = data.draw(conversations(twins))
    tools = TOOLS if twins.calls and data.draw(st.booleans()) else None
    text, spans = truth(twins, messages, tools)
    for template in (twins.plain, twins.marked):
        found = rendered(template, messages, tools)
        assert found.text == text
        assert parts(found) == [text[start:end] for start, end in spans]
        assert found.spans == spans
        assert not any("PROMPT" in part for part in parts(found))


ROLES = st.sampled_from(["system", "user", "assistant", "assistant", "tool"])
ANY = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLES, ASKED | st.text(max_size=5)), max_size=7
)


@pytest.mark.parametrize("name", TWINS)
@settings(max_examples=60, deadline=None)
@given(messages=ANY)
def test_any_conversation_is_rendered_or_unusable(name: str, messages: list[Message]) -> None:
    messages = [
        {**m, "content": m["content"].replace("PROMPT", "reply")} if m["role"] == "assistant" else m for m in messages
    ]
    try:
        found = rendered(TWINS[name].plain, messages)
    except UnusableRow as error:
        assert (bool(error.reason), bool(error.message)) == (True, True)  # noqa: PT017
        return
    ends = [0]
    for start, end in found.spans:
        assert ends[-1] <= start <= end <= len(found.text)
        ends.append(end)
    assert not any("PROMPT" in part for part in parts(found))


ASK = {"role": "user", "content": "why?"}
THOUGHT = {"role": "assistant", "content": "so", "reasoning_content": "hm"}


class TestReasoning:
    def test_it_counts_where_it_is_rendered(self) -> None:
        found = rendered(THINKING.plain, [ASK, THOUGHT])
        assert (parts(found), found.notes) == (["<think>\nhm\n</think>\n\nso<|im_end|>"], ())

    def test_what_is_not_rendered_is_told(self) -> None:
        found = rendered(THINKING.plain, [ASK, THOUGHT, ASK, THOUGHT])
        assert parts(found) == ["so<|im_end|>", "<think>\nhm\n</think>\n\nso<|im_end|>"]
        assert found.notes == ("reasoning_not_rendered",)

    def test_what_the_prompt_opens_is_prompt(self) -> None:
        assert parts(rendered(PROMPTED.plain, [ASK, THOUGHT])) == ["hm\n</think>\n\nso<|im_end|>"]

    @pytest.mark.parametrize("content", ["<think>hm</think>so", "hm</think>\n\nso", "<think>\nhm\n</think>\n\nso"])
    def test_it_may_stand_in_the_content(self, content: str) -> None:
        (part,) = parts(rendered(THINKING.plain, [ASK, {"role": "assistant", "content": content}]))
        assert part.startswith("<think>\nhm")
        assert part.endswith("so<|im_end|>")

    @pytest.mark.parametrize("reply", [THOUGHT, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso"}])
    def test_it_can_be_stripped(self, reply: Message) -> None:
        found = rendered(THINKING.plain, [ASK, reply, ASK, reply], reasoning="strip")
        assert (parts(found), found.notes) == (["so<|im_end|>", "so<|im_end|>"], ())
        assert "hm" not in found.text

    def test_of_a_reply_that_was_nothing_else_the_end_is_left(self) -> None:
        lone = {"role": "assistant", "content": "", "reasoning_content": "hm"}
        assert parts(rendered(THINKING.plain, [ASK, lone], reasoning="strip")) == ["<|im_end|>"]
        assert parts(rendered(ENDLESS.plain, [ASK, lone], reasoning="strip")) == [""]


class TestCalls:
    def call(self, name: str = "look") -> Message:
        function = {"name": name, "arguments": {"x": 1}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    def test_the_name_of_a_function_in_a_result_does_not_count(self) -> None:
        found = rendered(CHANNELS.plain, [ASK, self.call(), {"role": "tool", "content": "sun"}, THOUGHT])
        assert parts(found)[0].endswith('{"x": 1}<|eot_id|>')
        assert "to=assistant" in found.text.replace(parts(found)[0], "")

    def test_a_template_that_leaves_them_out_makes_the_row_unusable(self) -> None:
        with pytest.raises(UnusableRow) as caught:
            rendered(LISTS.plain, [ASK, self.call()])
        assert caught.value.reason == "tool_calls_not_rendered"

    def test_one_of_several_that_is_left_out_does_too(self) -> None:
        twice = {**self.call(), "tool_calls": [*self.call()["tool_calls"], *self.call()["tool_calls"]]}
        with pytest.raises(UnusableRow) as caught:
            rendered(
                CHANNELS.plain, [ASK, twice, {"role": "tool", "content": "sun"}, {"role": "tool", "content": "rain"}]
            )
        assert caught.value.reason == "tool_calls_not_rendered"
        (part,) = parts(rendered(THINKING.plain, [ASK, twice]))
        assert part.count("<tool_call>") == 2

    def test_a_result_in_the_middle_of_a_reply_does_not_count(self) -> None:
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}{{ '<start_of_turn>user\\n' + m.content + '<end_of_turn>' }}"
            "{% elif m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}{% if m.tool_calls %}"
            "{{ '<call>' + m.tool_calls[0].function.name + '</call>' }}"
            "{% if loop.nextitem %}{{ '<result>' + loop.nextitem.content + '</result>' }}{% endif %}{% endif %}"
            "{{ m.content }}{{ '<end_of_turn>' if not m.tool_calls }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
        )
        said = {**self.call(), "content": "Let me look."}
        found = rendered(
            template, [ASK, said, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "so"}]
        )
        assert parts(found) == ["<call>look</call>", "Let me look.", "so<end_of_turn>"]

    def test_tools_that_are_left_out_are_told(self) -> None:
        assert rendered(CUTTING.plain, [ASK, self.call()], TOOLS).notes == ("tools_not_rendered",)
        assert rendered(THINKING.plain, [ASK, self.call()], TOOLS).notes == ()

    def test_arguments_are_json_for_a_template_that_prints_them(self) -> None:
        template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
        )
        assert parts(rendered(template, [ASK, self.call()])) == ['look{"x": 1}<|im_end|>']


def test_a_template_that_marks_more_than_replies_is_not_believed() -> None:
    template = (
        "{% for m in messages %}{% generation %}<|im_start|>{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    assert parts(rendered(template, [ASK, {"role": "assistant", "content": "so"}])) == ["so<|im_end|>"]
    whole = (
        "{% generation %}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% endgeneration %}"
    )
    assert parts(rendered(whole, [ASK, {"role": "assistant", "content": "so"}])) == ["so<|im_end|>"]


def test_a_conversation_of_very_many_calls_is_unusable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "_MOST_RENDERED", 100)
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        THOUGHT,
    ]
    assert len(parts(rendered(THINKING.plain, turns * 3))) == 6
    with pytest.raises(UnusableRow) as caught:
        rendered(THINKING.plain, turns * 30)
    assert caught.value.reason == "reply_not_found"


def test_a_reply_that_is_written_twice_makes_the_row_unusable() -> None:
    template = (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(UnusableRow) as caught:
        rendered(template, [ASK, {"role": "assistant", "content": "so"}])
    assert caught.value.reason == "reply_not_found"


def test_messages_after_the_last_reply_are_left_out() -> None:
    found = rendered(THINKING.plain, [ASK, THOUGHT, {"role": "user", "content": "and now?"}])
    assert (found.notes, parts(found)) == (("trailing_messages",), ["<think>\nhm\n</think>\n\nso<|im_end|>"])
    assert "and now" not in found.text


def test_arguments_go_to_the_template() -> None:
    template = "{% if shout is defined and shout %}LOUD {% endif %}" + CUTTING.plain
    messages = [ASK, {"role": "assistant", "content": "so"}]
    assert rendered(template, messages, template_arguments={"shout": True}).text.startswith("LOUD ")
    assert not rendered(template, messages).text.startswith("LOUD ")


@pytest.mark.parametrize("content", ["a\ue0000000\ue001b", "\ue100" + "0\ue101", "73918264500000546281937"])
def test_contents_that_look_like_marks_are_contents(content: str) -> None:
    found = rendered(THINKING.plain, [ASK, {**THOUGHT, "content": content}])
    assert parts(found) == [f"<think>\nhm\n</think>\n\n{content}<|im_end|>"]
    assert parts(rendered(THINKING.plain, [ASK, {"role": "assistant", "content": content}])) == [f"{content}<|im_end|>"]
