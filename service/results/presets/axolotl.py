"""axolotl's dataset type `chat_template`: `train` says of each message whether it is learnt (`message_field_training`)."""

from typing import Any

from service.datasets.rows.messages import counts
from service.datasets.storage import Sample
from service.results.presets.conversations import learnt, to_json, without_mark


def line(sample: Sample) -> dict[str, Any]:
    messages = [{**without_mark(message), "train": counts(message)} for message in learnt(sample)]
    # As text, since the parameters of tools have no common type.
    return {"messages": messages, "tools": to_json(sample.tools)} if sample.tools else {"messages": messages}
