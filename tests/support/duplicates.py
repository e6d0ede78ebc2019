"""Rows that repeat others in known ways, and what the prepare stage finds in them."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.datasets import storage
from service.datasets.convert import convert
from service.datasets.rows.options import RowOptions
from service.plan.stages import JobInputs
from service.settings import UploadSettings, WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.stages.context import ModelCache, StageContext
from worker.stages.duplicates import Found, PoolRepeats

Row = dict[str, Any]
WORDS = [f"word{i}" for i in range(2_000)]


def says(name: str, *contents: str, **more: Any) -> Row:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"id": name, "messages": messages, **more}


def random_row(draw: np.random.Generator, name: str, words: int = 30) -> Row:
    return says(name, *(" ".join(draw.choice(WORDS, words)) for _ in range(2)))


def varied(row: Row, name: str, how: str) -> Row:
    """The row once more: `same`, `spaced`, in `case`, in another `form` of Unicode, or with a `changed` word."""
    question, answer = (message["content"] for message in row["messages"])
    match how:
        case "spaced":
            question, answer = f"  {question.replace(' ', '  ')}\n", answer.replace(" ", "\u00a0\t")
        case "case":
            question, answer = question.upper(), answer.title()
        case "form":  # full-width letters
            question = "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in question)
        case "changed":
            words = question.split()
            words[len(words) // 2] = "otherwise"
            question = " ".join(words)
    return says(name, question, answer)


def published(store: ArtifactStore, rows: Sequence[Row], folder: Path) -> str:
    """The fingerprint of the dataset."""
    (folder / "upload").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "upload").open("rb") as file:
        content = convert(file, RowOptions(), UploadSettings(), folder)
    storage.publish(store, content)
    return content.fingerprint


def context(store: ArtifactStore, pool: str, target: str, salt: str | None = None, **parameters: Any) -> StageContext:
    return StageContext(
        store=store,
        job=JobInputs(model={}, pool=pool, target=target, budget=1, parameters=parameters, salt=salt),
        prepared={},
        models=ModelCache(Path(), torch.device("cpu")),
        settings=WorkerSettings(),
        token_budget=0,
        report=lambda _: None,
        event=lambda *_: None,
    )


def found_in(
    store: ArtifactStore, pool: Sequence[Row], target: Sequence[Row], folder: Path, cuts: Sequence[int] = ()
) -> Found:
    """What is found in a pool that is cut into shards before these rows; made anew for other cuts."""
    of = context(store, published(store, pool, folder), published(store, target, folder), salt=str(cuts))
    ends = [0, *cuts, len(pool)]
    return PoolRepeats(of, list(pairwise(ends)), lambda: None).find()
