"""The embed stage of a shard from its text: on stored tokens, without a model where none is needed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.local_job import load, run
from support.tiny import pool_rows, save_model, target_rows, write_jsonl

from service.plan import limits, operations
from service.plan.stages import JobInputs, Stage
from service.settings import WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.influence import EmbeddingOptions, Samples, TextScales, embed, kernel_ridge, text_embedding
from worker.influence.text_embedding import HIDDEN_WEIGHT, plain_text_parts, text_parts
from worker.loading import folders
from worker.stages import embed as embed_stage
from worker.stages.context import ModelCache, StageContext
from worker.text import token_files
from worker.text.tokenization import Tokenised

ROWS, EMPTY, SEED = 60, 5, 0


def tokenised(count: int) -> list[Tokenised]:
    """Rows of random tokens; one has no tokens, as one that cannot be used."""
    draw = np.random.default_rng(0)
    rows = []
    for index in range(count):
        length = 0 if index == EMPTY else int(draw.integers(2, 20))
        ids = draw.integers(20, 200, length).astype(np.int32)
        response = np.arange(length) >= length // 2
        rows.append(Tokenised(index=index, input_ids=ids, response=response, truncated=False, response_truncated=False))
    return rows


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "World":
    monkeypatch.setattr(token_files, "ROW_GROUP", 8)
    return World(tmp_path)


class World:
    """A model, a pool in two files of tokens, and some of its rows."""

    def __init__(self, folder: Path) -> None:
        self.model = save_model(folder / "tiny")
        self.fingerprint = folders.find({"kind": "registered", "name": "tiny"}, folder).fingerprint
        self.store = ArtifactStore(str(folder / "store"))
        self.cache = ModelCache(folder, torch.device("cpu"))
        rows = tokenised(ROWS)
        for part, own in (("a", rows[:35]), ("b", rows[35:])):
            token_files.write_part(self.store, f"tokens/{part}.parquet", f"tokens/{part}.counts", own)
        token_files.write_whole(self.store, "tokens/pool", ["tokens/a.counts", "tokens/b.counts"])
        token_files.write_tokens(self.store, "tokens/landmarks.parquet", rows[10:40])

    def embedded(self, kind: str, start: int = 0, stop: int = ROWS) -> torch.Tensor:
        spec: dict[str, Any] = {
            "tokens": "tokens/pool",
            "scaled_on": "tokens/landmarks.parquet",
            "start": start,
            "stop": stop,
            "of": ROWS,
            "checkpoint": None,
            "options": {"kind": kind, "pooling": "response", "blocks": 2, "tangents": 2},
        }
        done: list[int] = []
        context = StageContext(
            store=self.store,
            job=JobInputs(
                model={"kind": "registered", "name": "tiny"},
                pool="pool",
                target="target",
                budget=1,
                parameters={"seed": SEED, "quantization": "none"},
            ),
            prepared={"model_fingerprint": self.fingerprint, "dtype": "float32"},
            models=self.cache,
            settings=WorkerSettings(),
            token_budget=100,
            report=done.append,
            event=lambda *_: None,
        )
        found = embed_stage.run(context, "embeddings/found.safetensors", spec, dataset="pool")
        with self.store.local("embeddings/found.safetensors") as path:
            rows = load_file(path)["embeddings"]
        assert (found["width"], found["nonfinite"]) == (rows.shape[1], [])
        assert (found["operations"] == 0) == (kind == "text")
        # A sample that cannot be used has no tokens, and no state of a model.
        assert done[-1] == stop - start - (kind == "text_hidden" and start <= EMPTY < stop)
        return rows


def test_a_shard_is_embedded_without_a_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelCache, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    rows = world.embedded("text", 3, 40)
    scales = TextScales.of(token_files.read_all(world.store, "tokens/landmarks.parquet"), SEED)
    samples = token_files.read_tokens(world.store, "tokens/pool", 3, 40)
    for i in range(len(samples)):
        parts = plain_text_parts(samples.slice(i, i + 1), SEED)
        expected = torch.cat([scales.scales[name].apply(part) for name, part in parts.items()])
        torch.testing.assert_close(rows[i].double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.isfinite(rows).all()
    assert torch.equal(world.embedded("text")[3:40], rows), "the scales are others in another shard"


def test_the_hidden_state_stands_beside_the_text(world: World) -> None:
    both, text = world.embedded("text_hidden"), world.embedded("text")
    assert torch.equal(both[:, : text.shape[1]], text)
    samples = token_files.read_all(world.store, "tokens/pool")
    options = EmbeddingOptions(kind="hidden", pooling="response", blocks=2)
    states = embed(load(world.model), samples, options=options)
    beside = both[:, text.shape[1] :].double()
    assert float(torch.pdist(beside[10:40]).square().mean()) == pytest.approx(HIDDEN_WEIGHT, rel=1e-2)
    ratio = torch.pdist(beside) / torch.pdist(states.double())
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-2, atol=0)
    torch.testing.assert_close(world.embedded("text_hidden", 3, 40), both[3:40], rtol=2e-3, atol=2e-3)


def test_the_plan_counts_with_the_cores_own_numbers() -> None:
    one = Samples(input_ids=np.zeros(1, np.int32), response=np.ones(1, bool), offsets=np.array([0, 1]))
    parts = text_parts(one, SEED)
    assert text_embedding.DIRECTIONS == operations.TEXT_DIRECTIONS == parts["reply"].shape[1]
    assert parts["scalars"].shape[1] == operations.TEXT_SCALARS
    assert limits.FITS_CHOSEN_ON == kernel_ridge.CHOSEN_ON


@pytest.mark.parametrize("kind", ["text", "text_hidden", "auto"])
def test_a_whole_job(tmp_path: Path, kind: str) -> None:
    files = [write_jsonl(tmp_path / "pool.jsonl", pool_rows(40))]
    files.append(write_jsonl(tmp_path / "target.jsonl", target_rows(4, "python_function")))
    given: dict[str, Any] = {"budget": 4, "validate": False, "embedding": {"kind": kind}, "kernel": {"kind": "auto"}}
    ran = run(save_model(tmp_path / "tiny"), files[0], files[1], tmp_path / "store", **given)
    if kind == "auto":
        table = ran.summary["embedding"]["candidates"]
        assert [entry["kind"] for entry in table] == ["text", "text_hidden", "hidden"]
        assert [entry["cost"] for entry in table] == pytest.approx([0, 2 / 3, 2 / 3])
        kind = next(entry["kind"] for entry in table if entry["chosen"])
    text, hidden = 2 * text_embedding.DIRECTIONS + 4, 32
    width = {"text": text, "hidden": hidden, "text_hidden": text + hidden}[kind]
    assert load_file(ran.path(Stage.EMBED))["embeddings"].shape == (40, width)
    assert ran.done[Stage.PROPAGATE][-1].result["kernel"] in ("rbf", "laplacian")
    assert len(ran.selected) == 4
