"""An export with its content, uploaded again, is the same samples: ids, sources, messages, tools, and what counts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from datasets import load_dataset
from support.jobs import published
from support.tiny import save_model

from service.datasets import storage
from service.datasets.tables import Dataset
from service.results.formats import Format

if TYPE_CHECKING:
    from support.world import World

CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "tide", "arguments": {"port": "Brest", "days": [1, None, 2.5]}},
}
OTHER = {"type": "function", "function": {"name": "moon", "arguments": "no object"}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "tide", "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "moon", "description": 'é, "quoted"\n'}},
]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PLAIN = [
    {"id": "a", "source": "one", "messages": [said("user", "a, b"), said("assistant", 'say "c"\r\nand\td')]},
    {"id": "=1+1", "source": "@two", "messages": [said("user", ""), said("assistant", " é\u2028😀 ")]},
    {
        "messages": [
            said("system", "s"),
            said("user", "a"),
            said("assistant", "b"),
            said("user", "c"),
            said("assistant", "d"),
        ]
    },
]
FULL = [
    *PLAIN,
    {"id": 17, "text": '\'=a, "b"\r\n c '},
    {"id": "007", "text": "7"},
    {
        "id": "calls",
        "tools": TOOLS,
        "messages": [
            said("user", "When?"),
            said("assistant", "", tool_calls=[CALL, OTHER], reasoning_content="Look it up."),
            said("tool", "04:12", tool_call_id="c1", name="tide"),
            said("assistant", "At 04:12."),
        ],
    },
    {
        "id": "weights",
        "messages": [
            said("user", "a", name="Ann"),
            said("assistant", "bad", weight=0),
            said("user", "c"),
            said("assistant", "good"),
            said("user", "bye"),
        ],
    },
    {
        "id": "prompt",
        "prompt": [said("user", "a"), said("assistant", "b"), said("user", "c")],
        "completion": [said("assistant", "d")],
    },
    {"id": "null", "messages": [said("user", "null"), said("assistant", "NaN")], "source": "null"},
]
POOLS = {"plain": PLAIN, "text": [{"text": "a"}, {"text": 'b,\n"c"'}], "full": FULL}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("format", Format)
@pytest.mark.parametrize("selected_only", [False, True])
def test_an_export_uploads_again_unchanged(api: "World", pool: str, format: Format, selected_only: bool) -> None:
    rows = "\n".join(map(json.dumps, POOLS[pool])).encode()
    first = upload(api, rows, "pool.jsonl")
    with api.sessions() as session:
        content = session.get_one(Dataset, first["id"])
    samples = list(storage.iter_samples(api.store, content.fingerprint))
    order = np.random.default_rng(1).permutation(len(samples))[: len(samples) // 2 + 1]
    chosen = [samples[i] for i in order]
    selection = {"selected": order, "sample_ids": [s.id for s in chosen], "sources": [s.source for s in chosen]}
    job_id = published(api.sessions, api.key, content, **selection)
    params = {"format": format.value, "include": "messages", "selected_only": selected_only}
    if format is Format.CSV:
        params["escape_formulas"] = False
    export = api.client.get(f"/v1/selection-jobs/{job_id}/export", params=params)
    assert export.status_code == 200, export.text
    again = upload(api, export.content, f"export.{format}")
    if not selected_only:
        assert again["fingerprint"] == first["fingerprint"]
    wanted = chosen if selected_only else samples
    found = list(storage.iter_samples(api.store, again["fingerprint"]))
    assert [content_of(sample) for sample in found] == [content_of(sample) for sample in wanted]
    assert "weight" in again["detected"]["left_alone"]


@pytest.mark.filterwarnings("default")  # TRL's own
@pytest.mark.parametrize(("format", "pool"), [(Format.JSONL, "plain"), (Format.PARQUET, "full")])
def test_a_trainer_takes_an_export(api: "World", format: Format, pool: str, tmp_path: Path) -> None:
    """`datasets.load_dataset` reads the file, and TRL's SFTTrainer makes a step on it."""
    from trl import SFTConfig, SFTTrainer

    rows = "\n".join(map(json.dumps, POOLS[pool])).encode()
    with api.sessions() as session:
        content = session.get_one(Dataset, upload(api, rows, "pool.jsonl")["id"])
    samples = list(storage.iter_samples(api.store, content.fingerprint))
    job_id = published(
        api.sessions,
        api.key,
        content,
        selected=np.arange(len(samples)),
        sample_ids=[sample.id for sample in samples],
        sources=[sample.source for sample in samples],
    )
    params = {"format": format.value, "include": "messages"}
    path = tmp_path / f"train.{format}"
    path.write_bytes(api.client.get(f"/v1/selection-jobs/{job_id}/export", params=params).content)
    builder = "json" if format is Format.JSONL else "parquet"
    data = load_dataset(builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    conversations = data.filter(lambda row: row["messages"] is not None)
    conversations = conversations.select_columns([name for name in ("messages", "tools") if name in data.column_names])
    assert len(conversations) == sum(sample.messages is not None for sample in samples)
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    trainer = SFTTrainer(
        model=str(save_model(tmp_path / "model")),
        train_dataset=conversations,
        args=SFTConfig(output_dir=str(tmp_path / "out"), **options),
    )
    assert trainer.train().training_loss > 0


def upload(api: "World", rows: bytes, name: str) -> dict[str, Any]:
    answer = api.client.post("/v1/datasets", params={"name": name}, content=rows)
    assert answer.status_code == 201, answer.text
    return answer.json()


def content_of(sample: storage.Sample) -> tuple[Any, ...]:
    return sample.id, sample.source, sample.messages, sample.text, sample.tools
