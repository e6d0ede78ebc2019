"""One chat template: what it renders, within its time, and in which form it takes contents."""

import re
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from worker.errors import ModelError

Message = dict[str, Any]
Span = tuple[int, int]

_SAMPLE_SECONDS = 30.0  # a sample of a megabyte takes some milliseconds, one of thousands of turns some seconds
# Put before templates that write today's date: a sample's tokens must not depend on the day.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%m', '07') | replace('%Y', '2024') }}{% endmacro %}{{ '' }}"
)
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\ue000probe\ue001"


class Refused(Exception):
    """The template does not render these messages, or not all of them; `reason` is a code of `UnusableRow`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Output:
    """`text`, and [start, end) in characters of what the template marks as generated; None where it marks nothing ever."""

    text: str
    tagged: list[Span] | None


class Template:
    """A template with all that it is given besides messages: `variables`; `start` is put before what it writes."""

    def __init__(self, source: str, variables: Mapping[str, Any], start: str = "") -> None:
        self._source = (_FIXED_DATE if "strftime_now" in source else "") + source
        self._start = start
        # Only what it names: each is copied for every sample.
        self._variables = {name: value for name, value in variables.items() if name in source}
        self.has_tags = _TAG.search(source) is not None

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None, *, prompt: bool = False) -> Output:
        """The template's rendering. With `prompt`, what asks the model for a reply follows.

        Raises:
            Refused: the template raises an error for these messages.
            ModelError: it is no valid template.
        """
        if self._takes_lists:
            messages = [{**message, "content": _listed(message["content"])} for message in messages]
        return self._render(messages, tools, prompt)

    def _render(self, messages: Sequence[Message], tools: list[Any] | None, prompt: bool) -> Output:
        try:
            # Declared as a string; it is the texts and the spans of each.
            rendered: Any = chat_template_utils.render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self._source,
                return_assistant_tokens_mask=self.has_tags,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except (MemoryError, TooSlow):
            raise
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"The model's chat template is not valid: {error}") from error
        except Exception as error:  # a template computes what it likes: any error may come of it
            roles = ", ".join(str(message["role"]) for message in messages)
            raise Refused(
                "template_refuses", f"the model's chat template rejects the messages ({roles}): {error}"
            ) from error
        (text, *_), (tagged, *_) = rendered if self.has_tags else (rendered[0], [[]])
        moved = len(self._start)
        spans = [(start + moved, end + moved) for start, end in tagged] if self.has_tags else None
        return Output(self._start + str(text), spans)

    @cached_property
    def _takes_lists(self) -> bool:
        """Whether contents must be lists of parts: the template drops one that is a string, but not one in a list."""

        def takes(content: Any) -> bool:
            try:
                return _PROBE in self._render([{"role": "user", "content": content}], None, False).text
            except Refused:
                return False

        return not takes(_PROBE) and takes(_listed(_PROBE))


def _listed(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


class TooSlow(Exception):
    """A sample took longer than `TimeLimit` allows."""


class TimeLimit:
    """Ends a template that loops for ever, the one thing that the sandbox does not prevent: 30 seconds for one sample, however
    often it is rendered.

    Raises:
        TooSlow: inside, when they are over.
    """

    def __enter__(self) -> None:
        # Only the main thread can be interrupted, and stages run in it.
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGALRM, _interrupt)
            signal.setitimer(signal.ITIMER_REAL, _SAMPLE_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)


def _interrupt(*_: object) -> None:
    raise TooSlow(f"takes more than {_SAMPLE_SECONDS:g} seconds")
