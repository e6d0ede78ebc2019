"""From messages to text with the spans that the loss counts: the model's own chat template, or a documented default.

A template is rendered once for each sequence of roles, with placeholders for the contents; what stands between them is the
skeleton. A sample's text is the skeleton filled in, so the place of every assistant reply is known exactly. Where the
template does more than fill in (it rewrites a content), the filled-in text differs from the rendered one, and that is an
error rather than a guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from worker.errors import DataError, ModelError

# For tokenizers without a chat template: the format of the Tulu models, used by LESS and RDS+ as well.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
)

_PLACEHOLDER = "\ue000{}\ue001"  # private-use characters: no template looks for them


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a sample, and [start, end) in characters of each reply with its end-of-turn token."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Skeleton:
    literals: list[str]  # one more than there are messages
    strips: bool  # whether the template strips white space around contents


@dataclass(slots=True)
class ChatFormat:
    """Renders messages for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    template: str = ""
    _skeletons: dict[tuple[str, ...], _Skeleton] = field(default_factory=dict)
    _special: tuple[str, ...] = ()
    _start: str = ""

    def __post_init__(self) -> None:
        own = self.tokenizer.chat_template
        self.template = own if isinstance(own, str) else DEFAULT_TEMPLATE
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
            DataError: the template refuses the roles or rewrites a content; names the sample.
        """
        skeleton = self._skeleton(messages, sample_id)
        contents = [m["content"].strip() if skeleton.strips else m["content"] for m in messages]
        text = skeleton.literals[0]
        spans: list[tuple[int, int]] = []
        for message, content, after in zip(messages, contents, skeleton.literals[1:], strict=True):
            if message["role"] == "assistant":
                spans.append((len(text), len(text) + len(content) + self._end_of_turn(after)))
            text += content + after
        if text != self._apply(messages, sample_id):
            raise DataError(
                f"Sample {sample_id!r}: the model's chat template rewrites a message instead of inserting it"
                " (reasoning tags, perhaps); write the message the way the template renders it, or as a `text` row."
            )
        return Rendered(text, spans)

    def _skeleton(self, messages: Sequence[dict[str, str]], sample_id: str) -> _Skeleton:
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            marks = [_PLACEHOLDER.format(i) for i in range(len(roles))]
            padded = [{"role": role, "content": f" {mark} "} for role, mark in zip(roles, marks, strict=True)]
            text = self._apply(padded, sample_id)
            strips = f" {marks[0]} " not in text
            literals: list[str] = []
            for mark in marks:
                before, found, text = text.partition(mark if strips else f" {mark} ")
                if not found or mark in text:
                    raise ModelError("The model's chat template drops or repeats messages; it cannot be used.")
                literals.append(before)
            self._skeletons[roles] = _Skeleton([*literals, text], strips)
        return self._skeletons[roles]

    def _apply(self, messages: Sequence[dict[str, str]], sample_id: str) -> str:
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=False
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"Sample {sample_id!r}: the model's chat template refuses the roles ({roles}): {error}"
            ) from error
        return self._start + str(rendered) if self.is_default else str(rendered)

    def _end_of_turn(self, after: str) -> int:
        """The length of the special token that ends a reply: the model must learn to stop, so it counts as response."""
        return next((len(token) for token in self._special if token and after.startswith(token)), 0)
