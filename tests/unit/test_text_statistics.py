"""The statistics of a text pool and the embeddings made with them: as stages on stored tokens, and from a model's files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.local_job import load
from support.tiny import save_model

from service.plan import operations
from service.plan.stages import JobInputs
from service.settings import WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.errors import ModelError
from worker.influence import EmbeddingOptions, Samples, embed, text_embedding
from worker.influence.text_embedding import HIDDEN_WEIGHT, TextStatistics, plain_text_parts
from worker.loading import folders
from worker.loading.input_embeddings import input_embedding_blocks
from worker.stages import embed as embed_stage
from worker.stages import text_statistics
from worker.stages.context import ModelCache, StageContext
from worker.text import token_files
from worker.text.tokenization import Tokenised

ROWS, EMPTY = 60, 5
CPU = torch.device("cpu")


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
    """A model, and a pool in two files of tokens."""

    def __init__(self, folder: Path) -> None:
        self.model = save_model(folder / "tiny")
        self.folder = folders.find({"kind": "registered", "name": "tiny"}, folder)
        self.store = ArtifactStore(str(folder / "store"))
        self.cache = ModelCache(folder, CPU)
        self.done: list[int] = []
        self.rows = tokenised(ROWS)
        for part, rows in (("a", self.rows[:35]), ("b", self.rows[35:])):
            token_files.write_part(self.store, f"tokens/{part}.parquet", f"tokens/{part}.counts", rows)
        token_files.write_whole(self.store, "tokens/pool", ["tokens/a.counts", "tokens/b.counts"])
        token_files.write_tokens(self.store, "tokens/all.parquet", self.rows)
        token_files.write_tokens(self.store, "tokens/landmarks.parquet", self.rows[10:40])

    def context(self) -> StageContext:
        job = JobInputs(
            model={"kind": "registered", "name": "tiny"},
            pool="pool",
            target="target",
            budget=1,
            parameters={"seed": 0, "quantization": "none"},
        )
        return StageContext(
            store=self.store,
            job=job,
            prepared={"model_fingerprint": self.folder.fingerprint, "dtype": "float32"},
            models=self.cache,
            settings=WorkerSettings(),
            token_budget=100,
            report=self.done.append,
            event=lambda *_: None,
        )

    def statistics(self, tokens: str = "tokens/pool", hidden_blocks: int | None = None) -> tuple[str, dict[str, Any]]:
        key = f"statistics/{tokens.replace('/', '-')}-{hidden_blocks}.safetensors"
        spec = {
            "tokens": tokens,
            "scaled_on": "tokens/landmarks.parquet",
            "checkpoint": None,
            "hidden_blocks": hidden_blocks,
        }
        return key, text_statistics.run(self.context(), key, spec)

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        with self.store.local(key) as path:
            return load_file(path)

    def embedded(self, kind: str, statistics: str, start: int = 0, stop: int = ROWS) -> torch.Tensor:
        options = {"kind": kind, "pooling": None, "blocks": 2, "tangents": 2}
        spec = {
            "tokens": "tokens/pool",
            "start": start,
            "stop": stop,
            "of": ROWS,
            "checkpoint": None,
            "options": options,
            "statistics": statistics,
        }
        found = embed_stage.run(self.context(), "embeddings/found.safetensors", spec, dataset="pool")
        rows = self.tensors("embeddings/found.safetensors")["embeddings"]
        assert found["width"] == rows.shape[1]
        assert found["nonfinite"] == []
        assert (found["operations"] == 0) == (kind == "text")
        return rows


def test_counts_are_those_of_the_pool_however_it_is_cut(world: World) -> None:
    key, result = world.statistics()
    counted = np.bincount(np.concatenate([row.input_ids for row in world.rows]))
    kept = world.tensors(key)
    assert kept["tokens"].tolist() == np.flatnonzero(counted).tolist()
    assert kept["surprisal"].numpy() == pytest.approx(-np.log(counted[counted > 0] / counted.sum()))
    assert result == {
        "tokens": int(counted.sum()),
        "vocabulary": int((counted > 0).sum()),
        "scaled_on": 30,
        "columns": load(world.model).get_input_embeddings().weight.shape[1],
    }
    assert world.done == [8, 16, 24, 32, 35, 43, 51, 59, 60]
    again, _ = world.statistics("tokens/all.parquet")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in world.tensors(again).items())


def test_tokens_are_read_a_row_group_at_a_time(world: World) -> None:
    parts = list(token_files.iter_tokens(world.store, "tokens/pool"))
    assert [len(part) for part in parts] == [8, 8, 8, 8, 3, 8, 8, 8, 1]
    whole = token_files.read_all(world.store, "tokens/pool")
    assert np.concatenate([part.input_ids for part in parts]).tolist() == whole.input_ids.tolist()
    assert np.concatenate([part.response for part in parts]).tolist() == whole.response.tolist()


def test_text_embeddings_of_a_shard_need_no_model(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = world.statistics()
    monkeypatch.setattr(ModelCache, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    rows = world.embedded("text", key, 3, 40)
    statistics = TextStatistics.of_tensors(world.tensors(key))
    samples = token_files.read_tokens(world.store, "tokens/pool", 3, 40)
    for i in range(len(samples)):
        parts = plain_text_parts(samples.slice(i, i + 1), statistics.vocabulary)
        expected = torch.cat([statistics.scales[name].apply(part) for name, part in parts.items()])
        torch.testing.assert_close(rows[i].double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.isfinite(rows).all()


def test_the_hidden_state_stands_beside_the_text(world: World) -> None:
    key, _ = world.statistics(hidden_blocks=2)
    both, text = world.embedded("text_hidden", key), world.embedded("text", key)
    assert torch.equal(both[:, : text.shape[1]], text)
    samples = token_files.read_all(world.store, "tokens/pool")
    options = EmbeddingOptions(kind="hidden", pooling="response", blocks=2)
    states = embed(load(world.model), samples, options=options)
    beside = both[:, text.shape[1] :].double()
    assert float(torch.pdist(beside[10:40]).square().mean()) == pytest.approx(HIDDEN_WEIGHT, rel=1e-2)
    ratio = torch.pdist(beside) / torch.pdist(states.double())
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-2, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_input_embeddings_are_read_from_the_files(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.loading.input_embeddings._ROWS", 100)
    folder = save_model(tmp_path / "tiny", family)
    found = list(input_embedding_blocks(folders.find({"kind": "registered", "name": "tiny"}, tmp_path)))
    assert {len(block) for block in found[:-1]} == {100}
    assert torch.equal(torch.cat(found), load(folder).get_input_embeddings().weight)


def rename(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda kept: {name if "embed_tokens" in key else key: tensor for key, tensor in kept.items()}


@pytest.mark.parametrize("name", ["embed_tokens.weight", "language_model.model.embed_tokens.weight"])
def test_names_of_other_prefixes_are_the_same_matrix(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / "tiny")
    expected = load(folder).get_input_embeddings().weight.clone()
    file = folder / "model.safetensors"
    save_file(rename(name)(load_file(file)), file, metadata={"format": "pt"})
    found = list(input_embedding_blocks(folders.find({"kind": "registered", "name": "tiny"}, tmp_path)))
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename("else.weight"), "have no input embeddings \\(model.embed_tokens.weight\\)"),
        (lambda kept: {n: t[:5].clone() if "embed_tokens" in n else t for n, t in kept.items()}, "has not the shape"),
    ],
)
def test_a_matrix_that_is_not_there_is_named(tmp_path: Path, change: Any, message: str) -> None:
    file = save_model(tmp_path / "tiny") / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        list(input_embedding_blocks(folders.find({"kind": "registered", "name": "tiny"}, tmp_path)))


def test_the_plan_counts_with_the_cores_own_numbers() -> None:
    one = Samples(input_ids=np.zeros(1, np.int32), response=np.ones(1, bool), offsets=np.array([0, 1]))
    vocabulary = text_embedding.Vocabulary.of(np.ones(1, np.int64), [torch.ones(1, 300)], seed=0)
    parts = text_embedding.text_parts(one, vocabulary)
    assert text_embedding.MAX_DIRECTIONS == operations.TEXT_DIRECTIONS == parts["reply"].shape[1]
    assert parts["scalars"].shape[1] == operations.TEXT_SCALARS
