"""The file beside a preset's, which tells a training tool how to read it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ExportPreset = Literal[
    "openai",
    "trl",
    "trl-messages",
    "axolotl",
    "llamafactory",
    "llamafactory-alpaca",
    "llamafactory-v1",
    "rows",
]

# The entry under `datasets` of a configuration; a path in JSON is one in YAML too.
_AXOLOTL = """datasets:
  - path: {path}
    ds_type: json
    type: chat_template
    field_messages: messages
    field_tools: tools
    message_field_training: train
    roles_to_train: [assistant]
    train_on_eos: turn
"""
_SYSTEM_AND_TOOLS = {"system": "system", "tools": "tools"}
_LLAMAFACTORY: Mapping[str, dict[str, Any]] = {
    "llamafactory": {"formatting": "sharegpt", "columns": {"messages": "conversations", **_SYSTEM_AND_TOOLS}},
    "llamafactory-alpaca": {
        "formatting": "alpaca",
        "columns": {
            "prompt": "instruction",
            "query": "input",
            "response": "output",
            "history": "history",
            **_SYSTEM_AND_TOOLS,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Companion:
    """A file to write, and what it is."""

    path: Path
    content: str
    purpose: str


def companion(preset: ExportPreset, path: Path) -> Companion | None:
    """What goes beside the file at `path`; None: the tool needs nothing.

    In a folder whose dataset_info.json has other entries, they stay.

    Raises:
        ValueError: the folder has a dataset_info.json that cannot be added to.
    """
    if preset == "axolotl":
        text = _AXOLOTL.format(path=json.dumps(str(path), ensure_ascii=False))
        return Companion(path.with_suffix(".axolotl.yaml"), text, "the entry of axolotl's configuration")
    if preset in _LLAMAFACTORY:
        info = path.with_name("dataset_info.json")
        entries = {**_entries(info), path.stem: {"file_name": path.name, **_LLAMAFACTORY[preset]}}
        text = json.dumps(entries, ensure_ascii=False, indent=2) + "\n"
        return Companion(info, text, f"LLaMA-Factory knows it as {path.stem}, with dataset_dir the folder")
    return None


def _entries(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is no JSON object, so no entry can be added; move it, or export to another folder")
    return entries
