"""The forms that a row may have, and the one table of known columns.

A field that is null, or NaN, counts as absent. Of the forms whose required slots all have a column in the row, the first one
is taken, and of the columns of a slot the first that the row has; what else the row has is left alone, and that is told.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Form(StrEnum):
    AUTO = "auto"
    MESSAGES = "messages"
    CONVERSATIONS = "conversations"
    PROMPT_COMPLETION = "prompt_completion"
    INSTRUCTION = "instruction"
    QUESTION_ANSWER = "question_answer"
    INPUTS_TARGETS = "inputs_targets"
    TEXT = "text"


class Slots(NamedTuple):
    """The slots of a form, and for each the columns that may fill it, the first that a row has."""

    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]


_Known = dict[str, tuple[str, ...]]
_SYSTEM: _Known = {"system": ("system", "system_prompt")}
_TOOLS: _Known = {"tools": ("tools",)}
# In the order in which they are tried.
FORMS: dict[Form, Slots] = {
    Form.MESSAGES: Slots({"messages": ("messages",)}, _TOOLS),
    Form.CONVERSATIONS: Slots({"messages": ("conversations", "conversation")}, _SYSTEM | _TOOLS),
    Form.PROMPT_COMPLETION: Slots({"prompt": ("prompt",), "completion": ("completion",)}, _SYSTEM | _TOOLS),
    Form.INSTRUCTION: Slots(
        {"prompt": ("instruction",), "completion": ("output", "response")},
        {"context": ("input", "context"), **_SYSTEM, "history": ("history",)},
    ),
    Form.QUESTION_ANSWER: Slots(
        {"prompt": ("question", "query"), "completion": ("answer", "response")},
        {"context": ("context",), **_SYSTEM},
    ),
    Form.INPUTS_TARGETS: Slots({"prompt": ("inputs", "input"), "completion": ("targets", "output")}, {}),
    Form.TEXT: Slots({"text": ("text",)}, {}),
}
ID, SOURCE = "id", "source"
# Names the source where there is no column `source`, if it holds strings.
IMPLIED_SOURCE = "dataset"
# A completion that the caller names may answer the conversation of a row whose messages hold no reply.
CONVERSATIONS = (*FORMS[Form.MESSAGES].required["messages"], *FORMS[Form.CONVERSATIONS].required["messages"])
PREFERENCES = ("chosen", "rejected")
MEDIA = ("images", "image", "audio", "audios", "videos", "video")
# Columns in which benchmarks have the reply; an error proposes those that the row has.
REPLIES = (
    "chosen",
    "ground_truth",
    "completion",
    "response",
    "answer",
    "output",
    "solution",
    "target",
    "targets",
    "label",
)
