"""Where the replies are in what a template rendered, whatever it made of the messages.

The conversation is rendered a second time with marks around every part of its messages, inside of their white space. Where
that gives the same text but for the marks, they say which character came from which message. A reply starts where the
prompt for it ends, which the template tells itself (`add_generation_prompt`), and ends with its end-of-turn token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from worker.text.marks import PENS, Kind, Mark, Pen, Trace, is_rewritten, marked, parts_of
from worker.text.templates import Message, Refused, Span, Template

REASONING_NOT_RENDERED = "reasoning_not_rendered"
CONTENT_NOT_RENDERED = "content_not_rendered"
CONTENT_REWRITTEN = "content_rewritten"

# Messages in all that are rendered to find the replies of one conversation: some ten seconds.
_MOST_RENDERED = 500_000
# What a template may write between prompt and reply of its own accord.
_EMPTY_THOUGHT = re.compile(r"(?:\s*(?:<think>)?\s*</think>\s*)?")
_BOUNDARY = re.compile(r"[\s>\])]")


@dataclass(frozen=True, slots=True)
class Found:
    """A rendered conversation: its text, the spans of each message, in order, and notes."""

    text: str
    spans: list[tuple[int, Span]]
    notes: list[str]


class ReplyFinder:
    """Finds replies in what one template renders. `special`: the tokenizer's special tokens, longest first."""

    def __init__(self, template: Template, special: Sequence[str]) -> None:
        self._template, self._special = template, special

    def find(self, messages: Sequence[Message], tools: list[Any] | None) -> Found:
        """The text of the conversation and where its replies are, whether they count or not.

        Raises:
            Refused: the template rejects the messages, drops one of them, or makes of it what cannot be traced.
        """
        output = self._template.render(messages, tools)
        trace, pen = self._traced(messages, tools, output.text)
        notes = self._notes(messages, trace, pen)
        own = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = None if output.tagged is None else _tagged(trace, output.tagged, set(own))
        if spans is None:
            untagged = _Search(self, messages, tools, trace, pen)
            spans = [(i, span) for i in own for span in untagged.spans(i)]
        return Found(output.text, sorted(spans, key=lambda one: one[1]), notes)

    def trace(self, messages: Sequence[Message], tools: list[Any] | None, pen: Pen, *, prompt: bool = False) -> Trace:
        return Trace.read(self._template.render(marked(messages, pen), tools, prompt=prompt).text, pen)

    def end_of_turn(self, after: str, limit: str, *, is_endless: bool) -> int:
        """The length of the special tokens that end a reply: the model must learn to stop, so they count as the reply.

        `after`: what follows it; `limit`: what would, were it the last. More than one token counts only where both say so.
        `is_endless`: no token ends the conversation, so that the one that begins the next turn ends a turn.
        """
        if run := self._special_run(after[: _shared(after, limit)]):
            return run
        # Another token ends the last turn than the others: theirs stands right before one that begins the next.
        first = self._special_run(after, only_first=True)
        ends_otherwise = self._special_run(limit) and self._special_run(after[first:].lstrip())
        return first if is_endless or ends_otherwise else 0

    def end_of_call(self, after: str, limit: str, *, is_endless: bool) -> int:
        """The length of what is left of a tool call after its function's name, and of what ends the turn."""
        shared = after[: _shared(after, limit)]
        full = len(shared.rstrip())
        special = max((shared.rfind(token) + len(token) for token in self._special if token in shared), default=0)
        if special >= full or not is_endless:
            return max(special, full)
        return full + self._special_run(after[full:], only_first=True)

    def has_special(self, text: str) -> bool:
        return any(token in text for token in self._special)

    def _special_run(self, text: str, *, only_first: bool = False) -> int:
        end = 0
        token = text.lstrip(" ")  # some templates write a space between the two
        skipped = len(text) - len(token)
        while found := next((one for one in self._special if token.startswith(one)), None):
            end += len(found)
            token = token[len(found) :]
            if only_first:
                break
        return skipped + end if end else 0

    def _traced(self, messages: Sequence[Message], tools: list[Any] | None, text: str) -> tuple[Trace, Pen]:
        for pen in PENS:
            try:
                trace = self.trace(messages, tools, pen)
            except Refused:
                continue
            if trace.text == text:
                return trace, pen
        raise Refused(
            "reply_not_found",
            "the model's chat template makes something else of a message than it is, so what is the reply cannot be told;"
            " write the row as `text`, as the template would render it",
        )

    def _notes(self, messages: Sequence[Message], trace: Trace, pen: Pen) -> list[str]:
        """What the template left out or rewrote of the messages, as codes.

        Raises:
            Refused: it left out a message, or a reply's tool calls.
        """
        there = {(mark.message, mark.kind, mark.part) for mark in trace.marks}
        notes = set()
        for i, message in enumerate(messages):
            parts = parts_of(message) if pen.all_roles or message["role"] == "assistant" else {}
            missing = {kind for kind, part in parts if (i, kind, part) not in there}
            if Kind.CALL in missing:
                raise Refused(
                    "tool_calls_not_rendered",
                    "the model's chat template leaves out a tool call of a reply; use a model whose template has them all",
                )
            if parts and all((i, *part) not in there for part in parts):
                raise Refused(
                    "template_drops_message", f"the model's chat template leaves out the {message['role']} message"
                )
            notes |= {REASONING_NOT_RENDERED} if Kind.REASONING in missing else set()
            notes |= {CONTENT_NOT_RENDERED} if Kind.CONTENT in missing else set()
        if is_rewritten(messages, trace):
            notes.add(CONTENT_REWRITTEN)
        return sorted(notes)


class _Search:
    """The replies of one conversation, by its marks."""

    def __init__(
        self, finder: ReplyFinder, messages: Sequence[Message], tools: list[Any] | None, trace: Trace, pen: Pen
    ) -> None:
        self._finder, self._messages, self._tools, self._trace, self._pen = finder, messages, tools, trace, pen
        self._places: dict[int, list[int]] = {}
        for place, mark in enumerate(trace.marks):
            self._places.setdefault(mark.message, []).append(place)
        self._left = _MOST_RENDERED
        # In long conversations the same text stands between turns again and again.
        self._headers: dict[tuple[str, str], int | None] = {}
        self._ends: dict[str, int] = {}
        self._is_endless = not finder.has_special(trace.after_last_mark())

    def spans(self, i: int) -> list[Span]:
        """Of message i: more than one where a template puts another message in between.

        Raises:
            Refused: the template writes a part of it twice, with another message in between.
        """
        marks = self._trace.marks
        runs: list[list[int]] = []
        seen: set[tuple[Kind, int, int]] = set()
        for place in self._places.get(i, ()):
            mark = marks[place]
            key = mark.kind, mark.part, mark.side
            if mark.kind is Kind.CALL and key in seen:
                continue  # the name of a function may be written again, with the result
            if runs and all(marks[k].message == i for k in range(runs[-1][-1], place)):
                runs[-1].append(place)
            elif key in seen:
                raise Refused("reply_not_found", "the model's chat template writes a reply twice")
            else:
                runs.append([place])
            seen.add(key)
        spans = [(marks[run[0]].place, self._end(i, run[-1])) for run in runs]
        if spans:
            spans[0] = (self._start(i, runs[0][0]), spans[0][1])
        return spans

    def _prefix(self, stop: int, *, prompt: bool = False, reply: Message | None = None) -> Trace | None:
        """The trace of the first messages alone; None where the template refuses them."""
        if stop == len(self._messages) and not prompt and reply is None:
            return self._trace
        messages = [*self._messages[:stop], *([] if reply is None else [reply])]
        if not messages:
            return None
        self._left -= len(messages)
        if self._left < 0:
            raise Refused("reply_not_found", "the conversation has too many turns to find the replies in; cut it")
        try:
            return self._finder.trace(messages, self._tools, self._pen, prompt=prompt)
        except Refused:
            return None

    def _start(self, i: int, place: int) -> int:
        """Where the prompt for message i ends; its first mark is at `place` in the list."""
        first = self._trace.marks[place].place
        begin = self._trace.marks[place - 1].place if place else 0
        owner = self._trace.marks[place - 1].message if place else -1
        gap = self._trace.text[begin:first]
        key = gap, self._messages[owner]["role"] if place else ""
        if key not in self._headers:
            self._headers[key] = self._header(i, owner, gap)
        header = self._headers[key]
        if header is None:
            return first
        start, text = begin + header, self._trace.text
        thought = _EMPTY_THOUGHT.match(text, start, first)
        start = start if thought is None else thought.end()
        is_text = self._trace.marks[place].kind is Kind.CONTENT
        return first if is_text and not text[start:first].strip() else start

    def _header(self, i: int, owner: int, gap: str) -> int | None:
        """How much of the gap before message i, which follows a mark of message `owner`, is prompt; None: nobody knows."""
        asked, unasked = self._prefix(i, prompt=True), self._prefix(i)
        if asked is not None and asked.last_message() == owner:
            prompt = asked.after_last_mark()
            without = 0 if unasked is None else _shared(prompt, unasked.after_last_mark())
            if len(prompt) > without:
                shared = _shared(prompt, gap)
                if shared < len(prompt):
                    shared = _boundary(prompt, shared)
                if shared > without:
                    return shared
        # The template ignores `add_generation_prompt`: what stands before any reply is the prompt.
        probe = self._prefix(i, reply={"role": "assistant", "content": "probe"})
        if probe is None:
            return None
        own = next((k for k, mark in enumerate(probe.marks) if mark.message == i), None)
        before = probe.marks[own - 1] if own else None
        if own is None or (before.message if before else -1) != owner:
            return None
        header = probe.text[before.place if before else 0 : probe.marks[own].place]
        shared = _shared(header, gap)
        return shared if shared == len(header) else _boundary(header, shared) or None

    def _end(self, i: int, place: int) -> int:
        """Where message i ends with its end-of-turn token, at its mark that is at `place` in the list."""
        marks, last = self._trace.marks, self._trace.marks[place]
        stop = marks[place + 1].place if place + 1 < len(marks) else len(self._trace.text)
        gap = self._trace.text[last.place : stop]
        if last.kind is Kind.CALL:
            return last.place + self._finder.end_of_call(
                gap, self._after_alone(i, last, gap), is_endless=self._is_endless
            )
        part = parts_of(self._messages[i])[last.kind, last.part]
        own = part[len(part.rstrip()) :]
        own = own if gap.startswith(own) and last.kind not in self._pen.outside else ""
        if gap not in self._ends:
            limit = self._after_alone(i, last, gap).removeprefix(own)
            self._ends[gap] = len(own) + self._finder.end_of_turn(
                gap.removeprefix(own), limit, is_endless=self._is_endless
            )
        return last.place + self._ends[gap]

    def _after_alone(self, i: int, last: Mark, otherwise: str) -> str:
        """What would follow the last mark like `last`, were message i the last one."""
        alone = self._prefix(i + 1)
        marks = [] if alone is None else alone.marks
        same = (i, last.kind, last.part, last.side)
        found = [k for k, mark in enumerate(marks) if (mark.message, mark.kind, mark.part, mark.side) == same]
        if alone is None or not found:
            return otherwise
        stop = marks[found[-1] + 1].place if found[-1] + 1 < len(marks) else len(alone.text)
        return alone.text[marks[found[-1]].place : stop]


def _shared(one: str, other: str) -> int:
    """The number of characters with which both begin."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)


def _boundary(text: str, stop: int) -> int:
    """The last place before `stop` at which a word or a tag of the text ends."""
    return next((end for end in range(stop, 0, -1) if _BOUNDARY.match(text, end - 1)), 0)


def _tagged(trace: Trace, tagged: Sequence[Span], own: set[int]) -> list[tuple[int, Span]] | None:
    """To whom each span belongs that the template marks as generated; None where that cannot be: it holds others' words."""
    spans: list[tuple[int, Span]] = []
    owner = None
    for start, end in tagged:
        inside = {m.message for m in trace.marks if start <= m.place < end or (m.side == 1 and start < m.place <= end)}
        if inside - own or len(inside) > 1:
            return None
        owner = next(iter(inside), owner)
        if owner is not None and start < end:
            spans.append((owner, (start, end)))
    return spans
