"""TRL's SFTTrainer: `prompt` and `completion`, of which it trains on the completion alone, or `messages`, of which it trains on
all tokens unless it is given `assistant_only_loss=True`."""

from typing import Any

from service.datasets.rows.messages import Message, counts
from service.datasets.storage import Sample
from service.results.presets.conversations import Unsuitable, learnt, to_json, without_mark


def prompt_completion(sample: Sample) -> dict[str, Any]:
    *prompt, reply = learnt(sample)
    if any(map(counts, prompt)):
        raise Unsuitable("more than one reply of it counts", "Use preset=trl-messages with assistant_only_loss=True.")
    if not prompt:
        raise Unsuitable("nothing comes before its reply", "Use preset=trl-messages with assistant_only_loss=True.")
    return _with_tools({"prompt": [*map(without_mark, prompt)], "completion": [without_mark(reply)]}, sample)


def conversation(sample: Sample) -> dict[str, Any]:
    messages: list[Message] = learnt(sample)
    if any("counts" in message for message in messages):
        raise Unsuitable(
            "a reply before its last one does not count",
            "preset=trl holds it if only the last counts, preset=axolotl in any case.",
        )
    return _with_tools({"messages": [*map(without_mark, messages)]}, sample)


def _with_tools(line: dict[str, Any], sample: Sample) -> dict[str, Any]:
    # As text, since the parameters of tools have no common type.
    return {**line, "tools": to_json(sample.tools)} if sample.tools else line
