"""Which model folders are used, which are refused, and what makes two of them the same."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.tiny import CHATML, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from worker.errors import DeviceNotHere, ModelError, ParameterError
from worker.influence import OptimizerState, Samples, per_sample_gradients, save_state
from worker.influence.causal_lm import linear_layers
from worker.loading import folders, models, placement
from worker.loading.adapters import trainable
from worker.loading.folders import ModelFolder
from worker.loading.optimizer_state import check_optimizer_state
from worker.stages.context import ModelCache

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "m"))


def find(folder: Path) -> ModelFolder:
    return folders.find({"kind": "registered", "name": folder.name}, folder.parent)


def change_config(folder: Path, file: str = "config.json", **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_without_weights_none_are_fetched_or_needed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str] | None) -> str:
        files = [path.name for path in tiny_llama.iterdir()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(tiny_llama / name, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(folders, "snapshot_download", download)
    model = {"kind": "hub", "id": "org/model", "commit": "0" * 40}
    found = folders.find(model, tmp_path, weights=False)
    assert not list(tmp_path.glob("*.safetensors"))
    assert models.load_config(found).model_type == "llama"
    assert models.load_tokenizer(found).is_fast
    assert found.tokenizer_fingerprint == find(tiny_llama).tokenizer_fingerprint
    with pytest.raises(ModelError, match="no safetensors"):
        folders.find({"kind": "registered", "name": tmp_path.name}, tmp_path.parent)


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


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> None:
    models.load_model(find(folder), torch.float32, CPU)
    models.load_tokenizer(find(folder))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"'m' has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "configuration could not be read"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "no safetensors weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04garbage"), "could not be loaded"),
        (drop_a_weight, "lacks 1 of its weights, including model.layers.1.mlp.down_proj.weight"),
        (lambda folder: change_config(folder, intermediate_size=96), "could not be loaded"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        *[(lambda f, kind=kind: change_config(f, model_type=kind), kind) for kind in ("bert", "opt", "unheard-of")],
    ],
)
def test_a_model_that_cannot_be_used_is_refused(folder: Path, damage: Callable[[Path], Any], problem: str) -> None:
    load(folder)
    damage(folder)
    with pytest.raises(ModelError, match=problem):
        load(folder)


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


def tuned(adapter: Path) -> ModelFolder:
    return folders.find(TUNED, adapter.parent)


class TestAdapters:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_computes_what_peft_does_in_a_model_of_its_own_class(self, adapter: Path, dtype: torch.dtype) -> None:
        found = tuned(adapter)
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
            model = models.load_model(tuned(adapter), dtype, CPU)
            gradients = per_sample_gradients(model, samples, modules="lora", projection=None)
            assert gradients.values.shape == (1, 3 * (2 * (32 + 32) + 4 * (48 + 32)))
            assert gradients.values.abs().sum() > 0
            assert not len(gradients.nonfinite)

    def test_the_fingerprint_covers_adapter_and_base(self, adapter: Path, folder: Path) -> None:
        prints = {tuned(adapter).fingerprint, find(folder).fingerprint}
        cached = ModelCache(adapter.parent, CPU)
        cached.folder(TUNED)
        for changed in (adapter / "adapter_config.json", folder / "config.json"):
            with changed.open("ab") as file:
                file.write(b" ")
            prints |= {tuned(adapter).fingerprint, cached.folder(TUNED).fingerprint}
        assert len(prints) == 4

    def test_the_tokenizer_is_the_adapters_own_or_else_the_bases(self, adapter: Path, folder: Path) -> None:
        assert tuned(adapter).tokenizer_fingerprint == find(folder).tokenizer_fingerprint
        assert models.load_tokenizer(tuned(adapter)).chat_template == CHATML
        make_tokenizer("{{ messages }}").save_pretrained(adapter)
        own = tuned(adapter)
        assert own.tokenizer_fingerprint != find(folder).tokenizer_fingerprint
        assert models.load_tokenizer(own).chat_template == "{{ messages }}"

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"peft_type": "IA3"}, "only LORA"),
            ({"use_dora": True}, "use_dora"),
            ({"target_modules": ["no_proj"]}, "could not be loaded.*no_proj"),
            ({"target_modules": ["q_proj"]}, "that the model does not have"),
            ({"target_modules": ["q_proj", "up_proj", "down_proj"]}, "lacks"),
            ({"r": 5}, "could not be loaded"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, adapter: Path, change: dict[str, object], said: str) -> None:
        change_config(adapter, file="adapter_config.json", **change)
        with pytest.raises(ModelError, match=said):
            models.load_model(tuned(adapter), torch.float32, CPU)

    def test_one_without_weights_or_without_its_base_is_refused(self, adapter: Path, folder: Path) -> None:
        (adapter / "adapter_model.safetensors").unlink()
        with pytest.raises(ModelError, match="no safetensors weights"):
            tuned(adapter)
        shutil.rmtree(folder)
        with pytest.raises(ModelError, match=r"'m' has no config\.json"):
            tuned(adapter)


# The registered state of an optimiser

ADAMW = {"type": "adamw"}
DOWN = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]


def write_state(folder: Path, names: Iterable[str], shape: tuple[int, ...] = (32, 48)) -> None:
    first, second = ({name: torch.zeros(shape) for name in names} for _ in range(2))
    save_state(OptimizerState(step=1, first=first, second=second), folder / "optimizer.safetensors")


class TestOptimizerState:
    def test_one_of_the_measured_layers_is_accepted(self, folder: Path) -> None:
        write_state(folder, DOWN)
        check_optimizer_state(find(folder), "down_proj", ADAMW)
        models.load_model(find(folder), torch.float32, CPU)  # the state is not a part of it

    @pytest.mark.parametrize(
        ("state", "modules", "optimizer", "problem"),
        [
            (None, "down_proj", "adamw", r"needs a warmup, or optimizer\.safetensors"),
            (b"pickle", "down_proj", "adamw", "is not a safetensors file"),
            (
                (DOWN[:2], (32, 48)),
                "down_proj",
                "adamw",
                r"first\.model\.layers\.2\.mlp\.down_proj\.weight .*not at all",
            ),
            ((DOWN[:2], (32, 48)), "self_attn.o_proj", "adamw", r"self_attn\.o_proj\.weight"),
            ((DOWN, (48, 32)), "down_proj", "adamw", r"weight of shape \(32, 48\), but has it as \(48, 32\)"),
            ((DOWN, (32, 48)), "down_proj", "sgd", r"is an Adam state \(it has second\.model"),
        ],
    )
    def test_one_that_does_not_fit_is_refused(
        self, folder: Path, state: Any, modules: str, optimizer: str, problem: str
    ) -> None:
        if isinstance(state, bytes):
            (folder / "optimizer.safetensors").write_bytes(state)
        elif state is not None:
            write_state(folder, *state)
        with pytest.raises(ParameterError, match=problem):
            check_optimizer_state(find(folder), modules, {"type": optimizer})

    def test_the_momentum_of_sgd_is_enough_for_sgd(self, folder: Path) -> None:
        zeros = {name: torch.zeros(32, 48) for name in DOWN}
        save_state(OptimizerState(step=1, first=zeros, second={}), folder / "optimizer.safetensors")
        check_optimizer_state(find(folder), "down_proj", {"type": "sgd"})
        with pytest.raises(ParameterError, match=r"second\.model"):
            check_optimizer_state(find(folder), "down_proj", ADAMW)

    def test_of_an_adapter_it_is_that_of_the_adapters(self, adapter: Path) -> None:
        write_state(adapter, DOWN)
        with pytest.raises(ParameterError, match=r"lora_A\.default\.weight"):
            check_optimizer_state(tuned(adapter), "down_proj", ADAMW)
        model = models.load_model(tuned(adapter), torch.float32, CPU)
        first, second = ({name: p.detach().clone() for name, p in trainable(model).items()} for _ in range(2))
        save_state(OptimizerState(step=1, first=first, second=second), adapter / "optimizer.safetensors")
        check_optimizer_state(tuned(adapter), "down_proj", ADAMW)


# Large models


class TestPlacement:
    def test_what_fits_one_gpu_stays_on_it(self) -> None:
        assert placement.share_out(80, [100, 100]) is None
        assert placement.share_out(800, [100]) is None
        assert placement.share_out(800, []) is None

    def test_what_does_not_fit_is_shared_out(self) -> None:
        assert placement.share_out(81, [100, 50]) == {0: 80, 1: 40}

    def test_what_fits_nowhere_says_what_to_do(self) -> None:
        with pytest.raises(ParameterError, match=r"take 130.0 GiB.*2 GPUs have space for 128.0 GiB.*quantization"):
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
        with pytest.raises(ParameterError, match=r"install winnow-select\[quantised\] on the workers"):
            models.load_model(find(folder), torch.float32, CPU, "int8")


def test_a_quantised_layer_without_a_derivative_is_refused() -> None:
    class Linear(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach())

    Linear.__module__ = "bitsandbytes.nn.modules"
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Linear(4, 4))
    with pytest.raises(ParameterError, match="does not support derivatives of quantised layers"):
        placement.check_derivative(model)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_gradients_of_a_quantised_model_are_those_of_its_values(folder: Path, quantization: str) -> None:
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
    assert placement.choose_dtype("auto", CPU) == (torch.bfloat16 if native else torch.float32)
    assert placement.choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placement.choose_device("auto") == CPU
    with pytest.raises(DeviceNotHere, match="sees no CUDA device"):
        placement.choose_device("cuda")
