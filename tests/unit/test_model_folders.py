"""Which model folders are used, which are refused, and what makes two of them the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model

from worker import models
from worker.errors import ModelError
from worker.stages.context import ModelCache

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "m"))


def find(folder: Path) -> models.ModelFolder:
    return models.find({"kind": "registered", "name": folder.name}, folder.parent)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestFingerprint:
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    def test_it_changes_with_every_file_that_counts(self, folder: Path, name: str) -> None:
        before = find(folder)
        with (folder / name).open("ab") as file:
            file.write(b" ")
        after = find(folder)
        assert before.fingerprint != after.fingerprint
        assert (before.tokenizer_fingerprint != after.tokenizer_fingerprint) == name.startswith("tokenizer")

    def test_it_does_not_change_with_files_that_are_never_read(self, folder: Path) -> None:
        before = find(folder).fingerprint
        (folder / "README.md").write_text("hello")
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        assert find(folder).fingerprint == before

    def test_it_depends_on_no_path(self, folder: Path, tiny_llama: Path) -> None:
        assert find(folder).fingerprint == find(tiny_llama).fingerprint


class TestRefused:
    def test_a_folder_without_config(self, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        with pytest.raises(ModelError, match=r"'m' has no config\.json"):
            find(tmp_path / "m")

    def test_pickled_weights_alone(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="no safetensors weights"):
            find(folder)

    def test_weights_that_are_missing(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights["model.layers.1.mlp.down_proj.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lacks 1 of its weights, model.layers.1.mlp.down_proj.weight"):
            models.load_model(find(folder), torch.float32, CPU)

    def test_weights_of_another_shape(self, folder: Path) -> None:
        change_config(folder, intermediate_size=96)
        with pytest.raises(ModelError, match="could not be loaded"):
            models.load_model(find(folder), torch.float32, CPU)

    def test_weights_that_are_no_safetensors(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"\x80\x04garbage that is no header")
        with pytest.raises(ModelError, match="could not be loaded"):
            models.load_model(find(folder), torch.float32, CPU)

    @pytest.mark.parametrize("model_type", ["bert", "opt", "unheard-of"])
    def test_another_architecture(self, folder: Path, model_type: str) -> None:
        change_config(folder, model_type=model_type)
        with pytest.raises(ModelError, match=model_type):
            models.load_config(find(folder))

    def test_a_config_that_is_no_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(ModelError, match="configuration could not be read"):
            models.load_config(find(folder))

    def test_a_folder_without_a_fast_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match="tokenizer"):
            models.load_tokenizer(find(folder))


def test_code_that_comes_with_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    code = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tokenizer", None],
    }
    change_config(folder, auto_map=code, model_type="its-own")
    with pytest.raises(ModelError):
        models.load_model(find(folder), torch.float32, CPU)
    change_config(folder, model_type="llama")  # a known type with code beside it: the code is not needed
    models.load_model(find(folder), torch.float32, CPU)
    models.load_tokenizer(find(folder))
    assert not ran.exists()


class TestCache:
    def test_a_model_is_loaded_once_and_hashed_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = ModelCache(folder.parent, CPU)
        model = {"kind": "registered", "name": "m"}
        first = cache.load(model, cache.folder(model).fingerprint, torch.float32)
        monkeypatch.setattr(models, "_file_sha256", lambda _: pytest.fail("hashed again"))
        assert cache.load(model, cache.folder(model).fingerprint, torch.float32) is first

    def test_a_model_that_was_replaced_is_another_one(self, folder: Path) -> None:
        cache = ModelCache(folder.parent, CPU)
        model = {"kind": "registered", "name": "m"}
        old = cache.folder(model).fingerprint
        before = cache.load(model, old, torch.float32)
        shutil.rmtree(folder)
        save_model(folder, seed=1)
        with pytest.raises(ModelError, match="files changed while the job was running"):
            cache.load(model, old, torch.float32)
        after = cache.load(model, cache.folder(model).fingerprint, torch.float32)
        assert not torch.equal(before.lm_head.weight, after.lm_head.weight)

    def test_another_dtype_is_loaded_anew(self, folder: Path) -> None:
        cache = ModelCache(folder.parent, CPU)
        model = {"kind": "registered", "name": "m"}
        fingerprint = cache.folder(model).fingerprint
        assert cache.load(model, fingerprint, torch.float32).dtype == torch.float32
        assert cache.load(model, fingerprint, torch.bfloat16).dtype == torch.bfloat16


def test_auto_is_a_dtype_that_the_cpu_multiplies_natively() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert models.choose_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert models.choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.choose_device("auto") == CPU
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        models.choose_device("cuda")
