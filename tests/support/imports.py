"""Files of a dataset on the hub, and how a test asks for its import and waits for the end."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.world import DATASETS, Json, World


def lines(rows: list[Json]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[Json]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=7)
    return buffer.getvalue()


def card(**front: Any) -> bytes:
    return f"---\n{json.dumps(front)}\n---\n# A dataset\n".encode()


def ask(world: World, status: int = 202, /, **source: Any) -> Json:
    answer = world.client.post(DATASETS, json={"hub": source})
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def get(world: World, dataset_id: str, **params: Any) -> Json:
    return dict(world.call("GET", f"{DATASETS}/{dataset_id}", params=params).json())


def ended(world: World, dataset_id: str) -> Json:
    return dict(
        world.until(
            f"{dataset_id} is imported",
            lambda: found if (found := get(world, dataset_id, wait=5))["status"] != "importing" else None,
        )
    )
