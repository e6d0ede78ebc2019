"""Which model folders are used, which are refused, and what makes two of them the same."""

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHATML, make_tokenizer, save_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from worker import models, placement
from worker.adapters import trainable
from worker.errors import ModelError, ParameterError
from worker.influence import OptimizerState, Samples, per_sample_gradients, save_state
from worker.influence.models import linear_layers
from worker.stages.context import ModelCache

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "m"))


def find(folder: Path) -> models.ModelFolder:
    return models.find({"kind": "registered", "name": folder.name}, folder.parent)


def change_config(folder: Path, file: str = "config.json", **changes: object) -> None:
    path = folder / file
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

    def test_it_changes_with_the_optimisers_state(self, folder: Path) -> None:
        found = [find(folder)]
        for content in (b"state", b"state of another day"):
            (folder / "optimizer.safetensors").write_bytes(content)
            found.append(find(folder))
        assert len({one.fingerprint for one in found}) == 3
        assert not found[1].is_current, "a worker would go on with the state it has"

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


# Adapters


@pytest.fixture
def adapter(folder: Path) -> Path:
    """An adapter as peft saves it, of the model `m`, registered beside it as `tuned`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, rank_pattern={"q_proj": 2}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of old
        wrapped = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(folder.parent / "tuned")
    change_config(folder.parent / "tuned", file="adapter_config.json", base_model_name_or_path="m")
    torch.save(logits(wrapped.eval()), folder.parent / "logits.pt")
    return folder.parent / "tuned"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(20)[None]).logits.float()
    return found


TUNED = {"kind": "registered", "name": "tuned", "base": {"kind": "registered", "name": "m"}}


class TestAdapters:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_computes_what_peft_does_in_a_model_of_its_own_class(self, adapter: Path, dtype: torch.dtype) -> None:
        found = models.find(TUNED, adapter.parent)
        model = models.load_model(found, dtype, CPU)
        assert found.is_adapter
        assert type(model) is LlamaForCausalLM
        assert model.base_model is model.model
        wanted = torch.load(adapter.parent / "logits.pt")
        tolerance = 1e-6 if dtype == torch.float32 else 5e-2
        assert (logits(model) - wanted).abs().max() < tolerance * wanted.abs().max()
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
        assert len(linear_layers(model, "lora")) == 3 * 2 * 2

    def test_influence_is_measured_on_it(self, adapter: Path) -> None:
        ids = np.arange(20, dtype=np.int32)
        samples = Samples(input_ids=ids, response=ids > 9, offsets=np.array([0, 20]))
        for dtype in (torch.float32, torch.bfloat16):
            model = models.load_model(models.find(TUNED, adapter.parent), dtype, CPU)
            gradients = per_sample_gradients(model, samples, modules="lora", projection=None)
            assert gradients.values.shape == (1, 3 * (2 * (32 + 32) + 4 * (48 + 32)))
            assert gradients.values.abs().sum() > 0
            assert not len(gradients.nonfinite)

    def test_the_fingerprint_covers_adapter_and_base(self, adapter: Path, folder: Path) -> None:
        prints = {models.find(TUNED, adapter.parent).fingerprint, find(folder).fingerprint}
        cached = ModelCache(adapter.parent, CPU)
        cached.folder(TUNED)
        for changed in (adapter / "adapter_config.json", folder / "config.json"):
            with changed.open("ab") as file:
                file.write(b" ")
            prints |= {models.find(TUNED, adapter.parent).fingerprint, cached.folder(TUNED).fingerprint}
        assert len(prints) == 4

    def test_the_tokenizer_is_the_adapters_own_or_else_the_bases(self, adapter: Path, folder: Path) -> None:
        assert models.find(TUNED, adapter.parent).tokenizer_fingerprint == find(folder).tokenizer_fingerprint
        assert models.load_tokenizer(models.find(TUNED, adapter.parent)).chat_template == CHATML
        make_tokenizer("{{ messages }}").save_pretrained(adapter)
        own = models.find(TUNED, adapter.parent)
        assert own.tokenizer_fingerprint != find(folder).tokenizer_fingerprint
        assert models.load_tokenizer(own).chat_template == "{{ messages }}"

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"peft_type": "IA3"}, "only LORA"),
            ({"use_dora": True}, "use_dora"),
            ({"target_modules": ["no_proj"]}, "could not be loaded.*no_proj"),
            ({"target_modules": ["q_proj"]}, "that the model has not"),
            ({"target_modules": ["q_proj", "up_proj", "down_proj"]}, "lacks"),
            ({"r": 5}, "could not be loaded"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, adapter: Path, change: dict[str, object], said: str) -> None:
        change_config(adapter, file="adapter_config.json", **change)
        with pytest.raises(ModelError, match=said):
            models.load_model(models.find(TUNED, adapter.parent), torch.float32, CPU)

    def test_one_without_weights_or_without_its_base_is_refused(self, adapter: Path, folder: Path) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(ModelError, match="no safetensors weights"):
            models.find(TUNED, adapter.parent)
        shutil.rmtree(folder)
        with pytest.raises(ModelError, match=r"'m' has no config\.json"):
            models.find(TUNED, adapter.parent)


# The registered state of an optimiser

ADAMW = {"type": "adamw"}
DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]


def write_state(folder: Path, names: Iterable[str], shape: tuple[int, ...] = (32, 48)) -> None:
    first, second = ({name: torch.zeros(shape) for name in names} for _ in range(2))
    save_state(OptimizerState(step=1, first=first, second=second), folder / "optimizer.safetensors")


class TestOptimizerState:
    def test_one_of_the_measured_layers_is_accepted(self, folder: Path) -> None:
        write_state(folder, DOWN)
        models.check_optimizer_state(find(folder), "down_proj", ADAMW)
        models.load_model(find(folder), torch.float32, CPU)  # which the state is no part of

    def test_a_parameter_that_is_missing_is_named(self, folder: Path) -> None:
        write_state(folder, DOWN[:2])
        with pytest.raises(ParameterError, match=r"first\.model\.layers\.2\.mlp\.down_proj\.weight .*not at all"):
            models.check_optimizer_state(find(folder), "down_proj", ADAMW)
        with pytest.raises(ParameterError, match=r"self_attn\.o_proj\.weight"):
            models.check_optimizer_state(find(folder), "self_attn.o_proj", ADAMW)

    def test_a_parameter_of_another_shape_is_named(self, folder: Path) -> None:
        write_state(folder, DOWN, (48, 32))
        with pytest.raises(ParameterError, match=r"down_proj\.weight of shape \(32, 48\), and has it as \(48, 32\)"):
            models.check_optimizer_state(find(folder), "down_proj", ADAMW)

    def test_the_momentum_of_sgd_is_enough_for_sgd(self, folder: Path) -> None:
        zeros = {name: torch.zeros(32, 48) for name in DOWN}
        save_state(OptimizerState(step=1, first=zeros, second={}), folder / "optimizer.safetensors")
        models.check_optimizer_state(find(folder), "down_proj", {"type": "sgd"})
        with pytest.raises(ParameterError, match=r"second\.model"):
            models.check_optimizer_state(find(folder), "down_proj", ADAMW)

    def test_the_state_of_adam_is_none_for_sgd(self, folder: Path) -> None:
        write_state(folder, DOWN)
        with pytest.raises(ParameterError, match=r"is that of Adam \(it has second\.model"):
            models.check_optimizer_state(find(folder), "down_proj", {"type": "sgd"})

    def test_of_an_adapter_it_is_that_of_the_adapters(self, adapter: Path) -> None:
        write_state(adapter, DOWN)
        with pytest.raises(ParameterError, match=r"lora_A\.default\.weight"):
            models.check_optimizer_state(models.find(TUNED, adapter.parent), "down_proj", ADAMW)
        model = models.load_model(models.find(TUNED, adapter.parent), torch.float32, CPU)
        first, second = ({name: p.detach().clone() for name, p in trainable(model).items()} for _ in range(2))
        save_state(OptimizerState(step=1, first=first, second=second), adapter / "optimizer.safetensors")
        models.check_optimizer_state(models.find(TUNED, adapter.parent), "down_proj", ADAMW)

    def test_no_file_and_no_safetensors_are_errors(self, folder: Path) -> None:
        with pytest.raises(ParameterError, match=r"needs a warmup, or optimizer\.safetensors"):
            models.check_optimizer_state(find(folder), "down_proj", ADAMW)
        (folder / "optimizer.safetensors").write_bytes(b"pickle")
        with pytest.raises(ParameterError, match="is no safetensors file"):
            models.check_optimizer_state(find(folder), "down_proj", ADAMW)


# Large models


class TestPlacement:
    def test_what_fits_one_gpu_stays_on_it(self) -> None:
        assert placement.share_out(80, [100, 100]) is None
        assert placement.share_out(800, [100]) is None
        assert placement.share_out(800, []) is None

    def test_what_does_not_fit_is_shared_out(self) -> None:
        assert placement.share_out(81, [100, 50]) == {0: 80, 1: 40}

    def test_what_fits_nowhere_says_what_to_do(self) -> None:
        with pytest.raises(ParameterError, match=r"take 130.0 GiB.*2 GPUs have room for 128.0 GiB.*quantization"):
            placement.share_out(130 * 2**30, [80 * 2**30, 80 * 2**30])

    def test_the_bytes_of_weights_are_read_from_the_headers(self, folder: Path) -> None:
        files = [folder / "model.safetensors"]
        model = models.load_model(find(folder), torch.float32, CPU)
        values = sum(p.numel() for p in model.parameters())
        flat = sum(p.numel() for p in model.parameters() if p.ndim == 1)
        assert placement.weight_bytes(files, torch.float32, "none") == 4 * values
        assert placement.weight_bytes(files, torch.bfloat16, "none") == 2 * values
        assert placement.weight_bytes(files, torch.bfloat16, "nf4") == (values - flat) // 2 + 2 * flat

    def test_several_gpus_are_asked_for_where_there_are_some(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On this machine, where there are none, the request to transformers is what can be seen."""
        asked: dict[str, Any] = {}
        load = AutoModelForCausalLM.from_pretrained
        monkeypatch.setattr(placement, "free_memory", lambda _: [100_000, 100_000])

        def caught(path: Path, **given: Any) -> Any:
            asked.update({name: given.pop(name) for name in ("device_map", "max_memory")})
            return load(path, **given)

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", caught)
        models.load_model(find(folder), torch.bfloat16, CPU)
        assert asked == {"device_map": "auto", "max_memory": {0: 80_000, 1: 80_000}}

    def test_no_bitsandbytes_says_what_to_install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "find_spec", lambda _: None)
        with pytest.raises(ParameterError, match=r"install winnow\[quantised\] on the workers"):
            models.load_model(find(folder), torch.float32, CPU, "int8")


def test_a_quantised_layer_without_a_derivative_is_refused() -> None:
    class Linear(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach())

    Linear.__module__ = "bitsandbytes.nn.modules"
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Linear(4, 4))
    with pytest.raises(ParameterError, match="no derivative of quantised layers"):
        placement.check_derivative(model)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_gradients_of_a_quantised_model_are_those_of_its_values(folder: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    model, plain = (models.load_model(find(folder), torch.float32, CPU, quantization) for _ in range(2))
    assert model.get_parameter("model.layers.0.mlp.down_proj.weight").dtype in (torch.int8, torch.uint8)
    plain.dequantize()
    ids = np.arange(20, dtype=np.int32)
    samples = Samples(input_ids=ids, response=ids > 9, offsets=np.array([0, 20]))
    exact = per_sample_gradients(plain.float(), samples, projection=None).values.flatten()
    for _ in range(2):  # the pass without gradients between the two must not change the second
        found = per_sample_gradients(model, samples, projection=None).values.flatten()
        assert torch.nn.functional.cosine_similarity(exact, found, dim=0) > 0.99
        logits(model)


def test_auto_is_a_dtype_that_the_cpu_multiplies_natively() -> None:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert models.choose_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert models.choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.choose_device("auto") == CPU
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        models.choose_device("cuda")
