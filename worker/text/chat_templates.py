"""From samples to text with the spans that the loss counts: the model's own chat template, or a documented default.

The text is always the template's rendering of the conversation. For plain messages, what the template writes around their
contents is learnt once for each sequence of roles, with placeholders for the contents, bare and with white space around
them: the skeleton. Filled in, it gives the text and the place of every reply; the text is compared with the rendering. Other
messages, and templates that do more than fill in, go to `ReplyFinder`.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from service.datasets.storage import Sample
from worker.errors import ModelError, UnusableRow
from worker.text import conversations
from worker.text.replies import ReplyFinder
from worker.text.templates import Message, Refused, Span, Template, TimeLimit, TooSlow

# For tokenizers without a chat template: the format of the Tulu models, used by LESS and RDS+ as well.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

TOOLS_NOT_RENDERED = "tools_not_rendered"
_MAX_SLOW = 10  # samples that may take too long: with more, the template is at fault, and the job would take for ever

_PLACEHOLDER = "\ue100{}\ue101"  # private-use characters: no template looks for them
_PLACE = re.compile(_PLACEHOLDER.format(r"(\d+)"))
# White space put around a placeholder, and the argument of str.strip that removes what the template does, by what it left.
_LEFT, _RIGHT = "\n\f", "\v\n"
_STRIPPED_LEFT: dict[str, str | None] = {_LEFT: "", "\f": "\n", "": None}
_STRIPPED_RIGHT: dict[str, str | None] = {_RIGHT: "", "\v": "\n", "": None}


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a sample, and [start, end) in characters of each reply with its end-of-turn token.

    `notes`: short codes of what the text does not say as the sample does, such as `system_folded`.
    """

    text: str
    spans: list[Span]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of a message's content: `left` and `right` are stripped from it (None: white space), `after` follows it.

    A reply's span begins `lead` characters before its content, and ends `tail` characters after it.
    """

    message: int
    left: str | None
    right: str | None
    after: str
    lead: int
    tail: int


@dataclass(frozen=True, slots=True)
class _Skeleton:
    start: str
    slots: list[_Slot]  # in the order of the text, which need not be that of the messages


@dataclass(slots=True)
class _Format:
    """One of the templates of a tokenizer, and what is known of it."""

    template: Template
    finder: ReplyFinder
    skeletons: dict[tuple[str, ...], _Skeleton | Refused | None] = field(default_factory=dict)


class ChatFormat:
    """Renders samples for one tokenizer.

    `reasoning`: "strip" takes the reasoning out of replies first; "keep" gives it to the template, which may leave it out.
    `template_arguments`: what else the template is given, by name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reasoning: str = "keep",
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._strip = reasoning == "strip"
        self._slow = 0
        own: Any = tokenizer.chat_template
        templates = own if isinstance(own, dict) else {"default": own}
        source = templates.get("default") or DEFAULT_TEMPLATE
        self.is_default = source == DEFAULT_TEMPLATE
        # A chat template writes the start token itself; text and the default template take it where the tokenizer would.
        bos = tokenizer.bos_token_id
        adds_start = bos is not None and tokenizer("a").input_ids[0] == bos
        self._start, self._end = str(tokenizer.bos_token) if adds_start else "", str(tokenizer.eos_token or "")
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = tuple(sorted(filter(None, special), key=len, reverse=True))
        self._variables = {**tokenizer.special_tokens_map, **(template_arguments or {})}
        self._plain = self._format(source)
        self._with_tools = self._format(templates["tool_use"]) if templates.get("tool_use") else self._plain

    def _format(self, source: str) -> _Format:
        template = Template(source, self._variables, self._start if source == DEFAULT_TEMPLATE else "")
        return _Format(template, ReplyFinder(template, self._special))

    def render(self, sample: Sample) -> Rendered:
        """The sample's text, and where its replies are that count.

        Raises:
            UnusableRow: the template does not render this conversation, takes too long for it, or nothing of it counts.
            ModelError: the template is not valid, or has taken too long for more than ten samples.
        """
        if sample.messages is None:
            return self._text(sample.text or "")
        try:
            with TimeLimit():
                return self._conversation(sample, sample.messages)
        except TooSlow as error:
            self._slow += 1
            if self._slow > _MAX_SLOW:
                raise ModelError(f"The model's chat template {error} for each of {self._slow} samples.") from error
            raise UnusableRow("template_too_slow", f"the model's chat template {error} for it") from error

    def _conversation(self, sample: Sample, conversation: Sequence[Message]) -> Rendered:
        messages, counted, notes = conversations.prepared(conversation, strip=self._strip)
        if not any(counted):
            raise UnusableRow("no_reply", "no message of the assistant counts; an upload without such rows has none")
        form = self._with_tools if sample.tools else self._plain
        refusal: Refused | None = None
        for given, counts, changes in conversations.variants(messages, counted):
            try:
                rendered = self._rendered(form, given, sample.tools, counts)
            except Refused as error:
                refusal = error
                continue
            if not rendered.spans:
                raise UnusableRow("no_reply", "the model's chat template renders no reply that counts")
            if notes or changes:
                return Rendered(rendered.text, rendered.spans, (*notes, *changes, *rendered.notes))
            return rendered
        assert refusal is not None
        raise UnusableRow(refusal.reason, str(refusal)) from refusal

    def _text(self, text: str) -> Rendered:
        """A plain text: all of it counts, and the end token after it."""
        start, end = self._start, self._end
        return Rendered(start + text + end, [(len(start), len(start) + len(text) + len(end))])

    def _rendered(
        self, form: _Format, messages: list[Message], tools: list[Any] | None, counted: Sequence[bool]
    ) -> Rendered:
        if not tools and conversations.is_plain(messages):
            skeleton = _skeleton(form, messages)
            if skeleton is not None:
                text, spans = _filled(skeleton, messages, counted)
                if text == form.template.render(messages).text:
                    return Rendered(text, spans)
        return self._found(form, messages, tools, counted)

    def _found(
        self, form: _Format, messages: list[Message], tools: list[Any] | None, counted: Sequence[bool]
    ) -> Rendered:
        """Arguments of tool calls are objects where the template takes them, and writes them as JSON."""
        as_text = conversations.with_text_arguments(messages)
        try:
            found = form.finder.find(messages, tools)
            again = as_text is not None and conversations.has_python_arguments(messages, found.text)
        except Refused as error:
            if as_text is None or error.reason != "template_refuses":
                raise
            again = True
        if again and as_text is not None:
            messages = as_text
            found = form.finder.find(messages, tools)
        notes = found.notes
        if tools and form.template.render(messages).text == found.text:
            notes = [*notes, TOOLS_NOT_RENDERED]
        return Rendered(found.text, [span for i, span in found.spans if counted[i]], tuple(notes))


def _filled(skeleton: _Skeleton, messages: Sequence[Message], counted: Sequence[bool]) -> tuple[str, list[Span]]:
    text = skeleton.start
    spans: list[Span] = []
    for slot in skeleton.slots:
        content = messages[slot.message]["content"].lstrip(slot.left).rstrip(slot.right)
        if counted[slot.message]:
            spans.append((len(text) - slot.lead, len(text) + len(content) + slot.tail))
        text += content + slot.after
    return text, spans


def _skeleton(form: _Format, messages: Sequence[Message]) -> _Skeleton | None:
    """Of the messages' roles; None where the template does more than fill in contents.

    Raises:
        Refused: the template rejects the roles, or drops a message.
    """
    roles = tuple(message["role"] for message in messages)
    if roles not in form.skeletons:
        try:
            form.skeletons[roles] = _make_skeleton(form, roles)
        except Refused as error:
            form.skeletons[roles] = error
    known = form.skeletons[roles]
    if isinstance(known, Refused):
        raise known
    return known


def _make_skeleton(form: _Format, roles: tuple[str, ...]) -> _Skeleton | None:
    marks = [_PLACEHOLDER.format(i) for i in range(len(roles))]
    pairs = list(zip(roles, marks, strict=True))
    found = form.finder.find([{"role": role, "content": mark} for role, mark in pairs], None)
    bare = found.text
    padded = form.template.render([{"role": role, "content": _LEFT + mark + _RIGHT} for role, mark in pairs]).text
    literals, order = _PLACE.split(bare)[::2], [int(number) for number in _PLACE.findall(bare)]
    if sorted(order) != list(range(len(roles))) or order != [int(number) for number in _PLACE.findall(padded)]:
        return None
    places = {int(match[1]): match.span() for match in _PLACE.finditer(bare)}
    strips = _strips(literals, _PLACE.split(padded)[::2])
    if strips is None:
        return None
    spans: dict[int, list[Span]] = {}
    for i, span in found.spans:
        spans.setdefault(i, []).append(span)
    slots = []
    for i, strip, after in zip(order, strips, literals[1:], strict=True):
        start, stop = places[i]
        own = spans.get(i, [])
        whole = [begin <= start and stop <= end for begin, end in own]
        if whole != ([True] if roles[i] == "assistant" else []):
            return None
        (begin, end), *_ = own or [(start, start)]
        slots.append(_Slot(i, *strip, after, start - begin, end - stop))
    return _Skeleton(literals[0], slots)


def _strips(literals: Sequence[str], padded: Sequence[str]) -> list[tuple[str | None, str | None]] | None:
    """What the template strips from the left and the right of each content; None if it does something else.

    Between two contents stands what is left of the first one's padding, the literal, and what is left of the second one's.
    """
    rights: list[str | None] = []
    lefts: list[str | None] = []
    for i, (literal, found) in enumerate(zip(literals, padded, strict=True)):
        remains = itertools.product(
            _STRIPPED_RIGHT if i > 0 else [""], _STRIPPED_LEFT if i < len(literals) - 1 else [""]
        )
        match = next(((right, left) for right, left in remains if right + literal + left == found), None)
        if match is None:
            return None
        if i > 0:
            rights.append(_STRIPPED_RIGHT[match[0]])
        if i < len(literals) - 1:
            lefts.append(_STRIPPED_LEFT[match[1]])
    return list(zip(lefts, rights, strict=True))
