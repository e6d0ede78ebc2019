"""From messages to text with the spans that the loss counts: the model's own chat template, or a documented default.

A template is rendered twice for each sequence of roles, with placeholders for the contents, bare and with white space around
them; what stands between them is the skeleton. A sample's text is the skeleton filled in, so the place of every assistant
reply is known exactly. Where the template does more than fill in (it rewrites a content), the filled-in text differs from
the rendered one, and that is an error rather than a guess.
"""

import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from worker.errors import DataError, ModelError

# For tokenizers without a chat template: the format of the Tulu models, used by LESS and RDS+ as well.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)

_RENDER_SECONDS = 30  # a sample of a megabyte takes some milliseconds
_PLACEHOLDER = "\ue000{}\ue001"  # private-use characters: no template looks for them
# White space put around a placeholder, and what str.strip must be told to do as the template does, by what is left of it.
_LEFT, _RIGHT = "\n\f", "\v\n"
_STRIPPED_LEFT: dict[str, str | None] = {_LEFT: "", "\f": "\n", "": None}
_STRIPPED_RIGHT: dict[str, str | None] = {_RIGHT: "", "\v": "\n", "": None}
# Stands before templates that write today's date: they get a fixed one, for a sample's tokens must not depend on the day.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%Y', '2024') }}{% endmacro %}{{ '' }}"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a sample, and [start, end) in characters of each reply with its end-of-turn token."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of a message's content: `left` and `right` are stripped from it (None: white space), `after` follows it."""

    message: int
    left: str | None
    right: str | None
    after: str


@dataclass(frozen=True, slots=True)
class _Skeleton:
    start: str
    slots: list[_Slot]  # in the order of the text, which need not be that of the messages


@dataclass(slots=True)
class ChatFormat:
    """Renders messages for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    template: str = ""
    _skeletons: dict[tuple[str, ...], _Skeleton] = field(default_factory=dict)
    _special: tuple[str, ...] = ()
    _start: str = ""

    def __post_init__(self) -> None:
        own: Any = self.tokenizer.chat_template
        self.template = (own.get("default") if isinstance(own, dict) else own) or DEFAULT_TEMPLATE
        if "strftime_now" in self.template:
            self.template = _FIXED_DATE + self.template
        special = {str(token) for token in self.tokenizer.all_special_tokens}
        special |= {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        self._special = tuple(sorted(special, key=len, reverse=True))
        # A chat template writes the start token itself; text and the default template take it where the tokenizer would.
        bos = self.tokenizer.bos_token_id
        if bos is not None and self.tokenizer("a").input_ids[0] == bos:
            self._start = str(self.tokenizer.bos_token)

    @property
    def is_default(self) -> bool:
        return self.template == DEFAULT_TEMPLATE

    def render_text(self, text: str) -> Rendered:
        """A plain text: all of it counts, and the end token after it."""
        start, end = self._start, str(self.tokenizer.eos_token or "")
        return Rendered(start + text + end, [(len(start), len(start) + len(text) + len(end))])

    def render(self, messages: Sequence[dict[str, str]], sample_id: str) -> Rendered:
        """The sample's text by the template, and where its replies are.

        Raises:
            DataError: the template refuses the roles, drops a message or rewrites a content; names the sample.
        """
        skeleton = self._skeleton(messages, sample_id)
        text = skeleton.start
        spans: list[tuple[int, int]] = []
        for slot in skeleton.slots:
            message = messages[slot.message]
            content = message["content"].lstrip(slot.left).rstrip(slot.right)
            if message["role"] == "assistant":
                spans.append((len(text), len(text) + len(content) + self._end_of_turn(slot.after)))
            text += content + slot.after
        if text != self._apply(messages, sample_id):
            raise _rewrites(sample_id)
        return Rendered(text, spans)

    def _skeleton(self, messages: Sequence[dict[str, str]], sample_id: str) -> _Skeleton:
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles, sample_id)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...], sample_id: str) -> _Skeleton:
        marks = [_PLACEHOLDER.format(i) for i in range(len(roles))]
        pairs = list(zip(roles, marks, strict=True))
        bare = self._apply([{"role": role, "content": mark} for role, mark in pairs], sample_id)
        padded = self._apply([{"role": role, "content": _LEFT + mark + _RIGHT} for role, mark in pairs], sample_id)
        for role, mark in pairs:
            if bare.count(mark) != 1 or padded.count(mark) != 1:
                raise DataError(
                    f"Sample {sample_id!r}: the model's chat template drops or repeats its {role} message;"
                    " leave that message out, or write the sample as a `text` row."
                )
        order = sorted(range(len(roles)), key=lambda i: bare.index(marks[i]))
        literals = _between(bare, [marks[i] for i in order])
        strips = _strips(literals, _between(padded, [marks[i] for i in order]))
        if strips is None:
            raise _rewrites(sample_id)
        slots = [_Slot(i, *strip, after) for i, strip, after in zip(order, strips, literals[1:], strict=True)]
        return _Skeleton(literals[0], slots)

    def _apply(self, messages: Sequence[dict[str, str]], sample_id: str) -> str:
        try:
            with _in_time():
                rendered: Any = self.tokenizer.apply_chat_template(
                    list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=False
                )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"Sample {sample_id!r}: the model's chat template refuses the roles ({roles}): {error}"
            ) from error
        return self._start + str(rendered) if self.is_default else str(rendered)

    def _end_of_turn(self, after: str) -> int:
        """The length of the special token that ends a reply: the model must learn to stop, so it counts as response."""
        token = after.lstrip(" ")  # some templates write a space between the two
        end = next((len(special) for special in self._special if special and token.startswith(special)), 0)
        return len(after) - len(token) + end if end else 0


@contextmanager
def _in_time() -> Iterator[None]:
    """Ends a template that loops for ever: the sandbox keeps it from everything but that."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # the only one that can be interrupted; stages run in it
        yield
        return

    def interrupt(*_: object) -> None:
        raise ModelError(f"The model's chat template takes more than {_RENDER_SECONDS} seconds for one sample.")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, _RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _between(text: str, marks: Sequence[str]) -> list[str]:
    """What stands before, between and after the marks."""
    parts: list[str] = []
    for mark in marks:
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def _strips(literals: Sequence[str], padded: Sequence[str]) -> list[tuple[str | None, str | None]] | None:
    """What the template strips from the left and the right of each content; None where it does something else.

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


def _rewrites(sample_id: str) -> DataError:
    return DataError(
        f"Sample {sample_id!r}: the model's chat template rewrites a message instead of inserting it"
        " (reasoning tags, perhaps); write the message the way the template renders it, or as a `text` row."
    )
