"""Which part of a sample is the response, for the templates that models come with."""

from typing import Any

import pytest
from support.tiny import CHATML, GEMMA, LLAMA2, LLAMA3, MISTRAL, QWEN3, make_tokenizer, turns

from service.datasets.storage import Sample
from worker.errors import ModelError, UnusableRow
from worker.text.chat_templates import DEFAULT_TEMPLATE, ChatFormat, Rendered
from worker.text.tokenization import tokenise


def rendered(template: Any, messages: list[dict[str, str]], **tokenizer: Any) -> Rendered:
    return ChatFormat(make_tokenizer(template, **tokenizer)).render(Sample(0, "x", None, messages, None))


def responses(template: Any, messages: list[dict[str, str]], **tokenizer: Any) -> list[str]:
    """The text of each span."""
    found = rendered(template, messages, **tokenizer)
    return [found.text[start:end] for start, end in found.spans]


def text_of(template: Any, messages: list[dict[str, str]], **tokenizer: Any) -> str:
    return rendered(template, messages, **tokenizer).text


def counted_tokens(template: str | None, messages: list[dict[str, str]]) -> tuple[str, str]:
    """What the tokens outside and inside of the response decode to."""
    tokenizer = make_tokenizer(template)
    (row,) = tokenise([Sample(0, "x", None, messages, None)], tokenizer, max_length=10_000, report=lambda _: None)
    return tokenizer.decode(row.input_ids[~row.response]), tokenizer.decode(row.input_ids[row.response])


ANSWERS = ("Lyon, I think.", "Sorry: Paris.")
DIALOGUE = turns("Capital of France?", ANSWERS[0], "Sure?", ANSWERS[1])

# What ends a reply in each template, and belongs to the response.
ENDS = {
    CHATML: "<|im_end|>",
    LLAMA3: "<|eot_id|>",
    GEMMA: "<end_of_turn>",
    MISTRAL: "</s>",
    QWEN3: "<|im_end|>",
    LLAMA2: " </s>",
    None: "</s>",
}
NAMES = ["chatml", "llama3", "gemma", "mistral", "qwen3", "llama2", "default"]


@pytest.mark.parametrize("template", ENDS, ids=NAMES)
class TestEveryTemplate:
    def test_replies_and_their_end_of_turn_are_the_response(self, template: str | None) -> None:
        assert responses(template, DIALOGUE) == [answer + ENDS[template] for answer in ANSWERS]

    def test_the_tokens_are_those_of_the_spans(self, template: str | None) -> None:
        prompt, response = counted_tokens(template, DIALOGUE)
        before = " " if template in (MISTRAL, LLAMA2) else ""  # one token with the first word
        assert response == "".join(before + answer + ENDS[template] for answer in ANSWERS)
        assert "Capital of France?" in prompt
        assert not any(answer in prompt for answer in ANSWERS)

    @pytest.mark.parametrize("word", ["a", "assistant", "user", "model", "\n", "<|assistant|>", "INST"])
    def test_contents_like_the_headers_are_told_apart(self, template: str | None, word: str) -> None:
        def kept(content: str) -> str:
            if template == QWEN3:
                return content.lstrip("\n")
            return content if template in (CHATML, None) else content.strip()

        messages = turns(word, "x" + word, word, word + "x")
        assert responses(template, messages) == [kept(c) + ENDS[template] for c in ("x" + word, word + "x")]

    def test_contents_in_other_scripts(self, template: str | None) -> None:
        replies = ("naïve – 東京 🗼 é", "﷽ \u200d🏳️‍🌈")
        found = responses(template, turns("où?", replies[0], "و؟", replies[1]))
        assert found == [reply + ENDS[template] for reply in replies]
        assert counted_tokens(template, turns("où?", replies[0]))[1].lstrip() == replies[0] + ENDS[template]

    def test_the_text_is_what_the_tokenizer_would_render(self, template: str | None) -> None:
        tokenizer = make_tokenizer(template or DEFAULT_TEMPLATE)
        if template == LLAMA3:
            tokenizer.chat_template = LLAMA3.replace("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024")
        assert text_of(template, DIALOGUE) == tokenizer.apply_chat_template(DIALOGUE, tokenize=False)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, QWEN3, LLAMA2, None])
def test_the_system_message_is_no_response(template: str | None) -> None:
    messages = turns("Hi", "Hello", "Bye", "Ciao", system="Be brief.")
    assert responses(template, messages) == ["Hello" + ENDS[template], "Ciao" + ENDS[template]]
    assert "Be brief." in text_of(template, messages)


def test_a_system_message_may_come_after_the_first_turn_in_the_text() -> None:
    text = text_of(MISTRAL, turns("One", "1", "Two", "2", system="Count."))
    assert text == "<s>[INST] One[/INST] 1</s>[INST] Count.\n\nTwo[/INST] 2</s>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "  padded \n<|im_end|>"),
        (LLAMA3, "padded<|eot_id|>"),
        (MISTRAL, "padded</s>"),
        (QWEN3, "  padded \n<|im_end|>"),
        (LLAMA2, "padded </s>"),
    ],
)
def test_white_space_is_stripped_where_the_template_strips_it(template: str, expected: str) -> None:
    assert responses(template, turns(" hi ", "  padded \n")) == [expected]


def test_leading_line_feeds_alone_may_be_stripped() -> None:
    assert responses(QWEN3, turns("hi", "\n\n  indented")) == ["  indented<|im_end|>"]


def test_an_empty_thought_is_part_of_the_prompt() -> None:
    prompt, response = counted_tokens(QWEN3, turns("hi", "hello"))
    assert prompt.endswith("<think>\n\n</think>\n\n\n")  # the last line feed follows the end of the turn
    assert response == "hello<|im_end|>"


def test_what_follows_the_end_of_turn_is_no_response() -> None:
    assert text_of(CHATML, turns("hi", "hello")).endswith("hello<|im_end|>\n")
    assert responses(CHATML, turns("hi", "hello")) == ["hello<|im_end|>"]


def test_a_reply_that_ends_the_text_without_a_token_is_the_response_alone() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert responses(template, turns("a", "b")) == ["b"]


def reason(template: str, messages: list[dict[str, str]]) -> str:
    with pytest.raises(UnusableRow) as caught:
        rendered(template, messages)
    return caught.value.reason


class TestWhatATemplateDoesNotTake:
    def test_a_system_message_goes_to_the_users_turn_after_it(self) -> None:
        found = rendered(GEMMA, [*turns("hi", "hello", system="Be brief."), *turns("so", "no", system="Be blunt.")])
        assert found.notes == ("system_folded",)
        assert "<start_of_turn>user\nBe brief.\n\nhi<end_of_turn>" in found.text
        assert "<start_of_turn>user\nBe blunt.\n\nso<end_of_turn>" in found.text

    def test_a_system_message_that_is_dropped_without_a_word_goes_there_too(self) -> None:
        template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
        found = rendered(template, turns("hi", "hello", system="Be brief."))
        assert (found.text, found.notes) == ("Be brief.\n\nhi\nhello\n", ("system_folded",))
        assert rendered(template, turns("hi", "hello")).notes == ()

    def test_turns_of_the_user_that_follow_one_another_become_one(self) -> None:
        found = rendered(MISTRAL, [*turns("hi"), *turns("you", "hello")])
        assert (found.text, found.notes) == ("<s>[INST] hi\n\nyou[/INST] hello</s>", ("user_turns_merged",))

    def test_an_order_of_roles_that_cannot_be_helped(self) -> None:
        assert reason(MISTRAL, [*turns("hi", "hello"), {"role": "assistant", "content": "again"}]) == "template_refuses"

    def test_a_message_that_is_dropped(self) -> None:
        template = "{% for m in messages if m['role'] != 'user' %}{{ m['content'] }}\n{% endfor %}"
        assert reason(template, turns("hi", "hello")) == "template_drops_message"

    def test_a_template_with_a_fault(self) -> None:
        assert reason("{{ messages[0].nothing.more }}", turns("hi", "hello")) == "template_refuses"
        assert reason("{{ 1 // 0 }}", turns("hi", "hello")) == "template_refuses"
        with pytest.raises(ModelError):
            rendered("{% for %}", turns("hi", "hello"))

    def test_a_reply_that_is_made_something_else_of(self) -> None:
        template = "{% for m in messages %}{{ m['content'] | length }} {{ m['content'] }}\n{% endfor %}"
        assert reason(template, turns("hi", "hello")) == "reply_not_found"


class TestRewriting:
    def test_a_thought_that_is_cut_out_is_told(self) -> None:
        found = rendered(QWEN3, turns("hi", "<think>hm</think>hello"))
        assert [found.text[a:b] for a, b in found.spans] == ["hello<|im_end|>"]
        assert found.notes == ("reasoning_not_rendered",)

    def test_a_content_that_is_rewritten_is_told(self) -> None:
        template = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
        found = rendered(template, turns("hi", "hello"))
        assert ([found.text[a:b] for a, b in found.spans], found.notes) == (["HELLO"], ("content_rewritten",))

    def test_a_users_message_may_be_written_twice(self) -> None:
        template = "{{ messages[0]['content'] }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        assert responses(template, turns("hi", "hello")) == ["hello"]


def test_the_date_in_a_template_does_not_change_from_day_to_day() -> None:
    assert "Today: 26 Jul 2024\n" in text_of(LLAMA3, DIALOGUE)


def test_of_several_templates_the_default_is_used() -> None:
    tokenizer = make_tokenizer({"default": CHATML, "tool_use": GEMMA})
    chat = ChatFormat(tokenizer)
    assert not chat.is_default
    messages = turns("hi", "hello")
    assert chat.render(Sample(0, "x", None, messages, None)).text == text_of(CHATML, messages)
    assert "<start_of_turn>" in chat.render(Sample(0, "x", None, messages, None, [{"name": "f"}])).text


class TestStartToken:
    def test_the_default_template_takes_it_where_the_tokenizer_adds_it(self) -> None:
        assert text_of(None, turns("hi", "yes"), adds_bos=True) == "<s><|user|>\nhi\n<|assistant|>\nyes</s>\n"
        assert text_of(None, turns("hi", "yes"), adds_bos=False) == "<|user|>\nhi\n<|assistant|>\nyes</s>\n"

    def test_a_template_of_the_models_own_writes_it_itself(self) -> None:
        assert text_of(CHATML, turns("hi", "yes"), adds_bos=True).startswith("<|im_start|>")
        assert text_of(GEMMA, turns("hi", "yes"), adds_bos=True).count("<s>") == 1

    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_of_a_text_all_but_the_start_token_is_response(self, adds_bos: bool) -> None:
        chat = ChatFormat(make_tokenizer(None, adds_bos=adds_bos))
        found = chat.render(Sample(0, "x", None, None, "plain text"))
        assert found.text == "<s>" * adds_bos + "plain text</s>"
        assert [found.text[a:b] for a, b in found.spans] == ["plain text</s>"]
