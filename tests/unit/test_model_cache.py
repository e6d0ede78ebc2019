"""The model that a compute process keeps: loaded and hashed once, and never another than the job was prepared with."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import save_model

from worker.errors import ModelNotHere
from worker.loading import folders, models
from worker.stages.context import ModelCache

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "m"))


def test_a_model_is_loaded_once_and_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ModelCache(folder.parent, CPU)
    model = {"kind": "registered", "name": "m"}
    first = cache.load(model, cache.folder(model).fingerprint, torch.float32)
    monkeypatch.setattr(folders, "_sha256", lambda _: pytest.fail("hashed again"))
    assert cache.load(model, cache.folder(model).fingerprint, torch.float32) is first


def test_a_model_that_was_replaced_is_another_one(folder: Path) -> None:
    cache = ModelCache(folder.parent, CPU)
    model = {"kind": "registered", "name": "m"}
    old = cache.folder(model).fingerprint
    before = cache.load(model, old, torch.float32)
    shutil.rmtree(folder)
    save_model(folder, seed=1)
    with pytest.raises(ModelNotHere, match="changed while the job was running"):
        cache.load(model, old, torch.float32)
    after = cache.load(model, cache.folder(model).fingerprint, torch.float32)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_a_model_that_changes_while_it_is_loaded_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ModelCache(folder.parent, CPU)
    model = {"kind": "registered", "name": "m"}
    fingerprint, load_model = cache.folder(model).fingerprint, models.load_model

    def replaced_meanwhile(*given: Any) -> Any:
        loaded = load_model(*given)
        save_model(folder, seed=1)
        return loaded

    monkeypatch.setattr(models, "load_model", replaced_meanwhile)
    with pytest.raises(ModelNotHere):
        cache.load(model, fingerprint, torch.float32)


def test_what_was_computed_while_the_model_changed_does_not_count(folder: Path) -> None:
    cache = ModelCache(folder.parent, CPU)
    model = {"kind": "registered", "name": "m"}
    fingerprint = cache.folder(model).fingerprint

    def compute(meanwhile: Callable[[], object], *, loads: bool = True) -> None:
        with cache.checking():
            if loads:
                cache.load(model, fingerprint, torch.float32)
            meanwhile()

    compute(lambda: None)
    compute(lambda: os.utime(folder / "model.safetensors"))  # the same bytes
    with pytest.raises(ModelNotHere):
        compute(lambda: save_model(folder, seed=1))
    compute(lambda: None, loads=False)


def test_another_dtype_is_loaded_separately(folder: Path) -> None:
    cache = ModelCache(folder.parent, CPU)
    model = {"kind": "registered", "name": "m"}
    fingerprint = cache.folder(model).fingerprint
    assert cache.load(model, fingerprint, torch.float32).dtype == torch.float32
    assert cache.load(model, fingerprint, torch.bfloat16).dtype == torch.bfloat16
