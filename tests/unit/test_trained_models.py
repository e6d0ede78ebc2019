"""Whole jobs on models that were warmed up, that are adapters, or that come with an optimiser's state."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.local_job import (
    Ran,
    close,
    down_projections,
    gradients_of,
    is_optimum,
    load,
    loss_of,
    run,
    unit,
    write_files,
)

from service.plan import shards
from service.plan.stages import Stage
from worker.errors import ParameterError
from worker.influence import save_state, state_of
from worker.loading import adapters
from worker.stages.warmup import _drawn
from worker.text import token_files

POOL, TARGET = 40, 5
PLAIN = {"projection_dim": None, "normalize": False}
WHOLE = {"projection_dim": None}
ADAMW = {"type": "adamw", "learning_rate": 0.02, "weight_decay": 0.1}
WARMUP = {"samples": 24, "batch_size": 8, "learning_rate": 1e-3}
EXACT = {"method": "exact_influence", "validate": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_files(tmp_path_factory.mktemp("files"), POOL, TARGET)


def adam(
    state: Path,
    names: list[str],
    weights: list[torch.Tensor],
    decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b of METHOD 1 over all weights, float64 (d,), from the file of a state."""
    with safe_open(state, framework="pt") as file:
        step = int(file.metadata()["step"]) + 1
        m, v = (
            torch.cat([file.get_tensor(f"{kind}.{name}").flatten() for name in names]).double()
            for kind in ("first", "second")
        )
    root = (v / (1 - betas[1] ** step)).sqrt() + eps
    a = (1 - betas[0]) / (1 - betas[0] ** step) / root
    b = (
        betas[0] * m / (1 - betas[0] ** step) / root
        + decay * torch.cat([w.detach().flatten() for w in weights]).double()
    )
    return a, b


@pytest.fixture(scope="module")
def warm(tiny_llama: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Plain inner products after a warm-up, second order by the Fisher matrix, with the offset."""
    weighted = {"selection": "weighted", "curvature": {"type": "fisher"}, "gradient": PLAIN}
    folder = tmp_path_factory.mktemp("warm")
    return run(tiny_llama, *files, folder, warmup=WARMUP, optimizer=ADAMW, **weighted, method="exact_influence")


@pytest.fixture(scope="module")
def trained(warm: Ran, tiny_llama: Path) -> Any:
    model = load(tiny_llama)
    with warm.compute.store.local(warm.done[Stage.WARMUP][0].result["checkpoint"]) as path:
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


class TestWarmup:
    def test_it_learns_and_says_so(self, warm: Ran) -> None:
        found = warm.summary["warmup"]
        assert (found["samples"], found["steps"]) == (24, 3)
        assert warm.done[Stage.WARMUP][0].result["loss_last"] < warm.done[Stage.WARMUP][0].result["loss_first"]

    def test_its_samples_are_drawn_by_the_seed(self, warm: Ran) -> None:
        context: Any = SimpleNamespace(store=warm.compute.store, prepared=warm.prepared)
        one, again, other = (
            _drawn(context, warm.prepared["pool_tokens"], 24, seed).input_ids.tolist() for seed in (0, 0, 1)
        )
        first = token_files.read_tokens(warm.compute.store, warm.prepared["pool_tokens"], 0, 24).input_ids.tolist()
        assert one == again
        assert one not in (other, first)

    def test_influence_is_scaled_by_its_state_at_its_checkpoint(self, warm: Ran, trained: Any) -> None:
        weights = down_projections(trained)
        G_S, G_T = gradients_of(warm, trained, list(weights.values()))
        with warm.compute.store.local(warm.done[Stage.WARMUP][0].result["optimizer_state"]) as state:
            a, b = adam(state, list(weights), list(weights.values()), decay=0.1)
        P = (G_S * a) @ G_T.T
        close(warm.arrays["influence"], P.mean(dim=1), 1e-3)
        p = P.mean(dim=1) - 0.02 * P @ (G_T @ b) / TARGET
        is_optimum(warm, p.numpy(), (P @ P.T / (POOL * TARGET)).numpy(), 0.02)

    def test_normalised_the_pools_side_alone_is_scaled(
        self, warm: Ran, trained: Any, tiny_llama: Path, files: tuple[Path, Path]
    ) -> None:
        store = Path(warm.compute.store.root)
        ran = run(tiny_llama, *files, store, warmup=WARMUP, optimizer=ADAMW, gradient=WHOLE, **EXACT)
        assert ran.keys(Stage.WARMUP) == warm.keys(Stage.WARMUP)
        weights = down_projections(trained)
        G_S, G_T = gradients_of(warm, trained, list(weights.values()))
        with warm.compute.store.local(warm.done[Stage.WARMUP][0].result["optimizer_state"]) as state:
            a, _ = adam(state, list(weights), list(weights.values()), decay=0.1)
        expected = (unit(G_S * a) @ unit(G_T).T).mean(dim=1)
        close(ran.arrays["influence"], expected, 1e-3)
        cold = run(tiny_llama, *files, store, gradient=WHOLE, **EXACT)
        assert np.abs(ran.arrays["influence"] - cold.arrays["influence"]).max() > 0.1 * float(expected.abs().max())

    def test_factored_scaling_reports_its_error(self, warm: Ran, tiny_llama: Path, files: tuple[Path, Path]) -> None:
        optimizer = {**ADAMW, "scaling": "factored"}
        ran = run(tiny_llama, *files, Path(warm.compute.store.root), warmup=WARMUP, optimizer=optimizer, **EXACT)
        assert 0 < ran.summary["scaling_error"] < 1
        exactly = run(tiny_llama, *files, Path(warm.compute.store.root), warmup=WARMUP, optimizer=ADAMW, **EXACT)
        operations = [one.done[Stage.LANDMARK_GRADIENTS][0].result["operations"] for one in (ran, exactly)]
        assert operations[0] == operations[1], "layers this narrow are formed in full either way"
        assert warm.summary["scaling_error"] is None

    def test_validation_steps_from_its_checkpoint(self, warm: Ran, trained: Any) -> None:
        targets, found = warm.tokens("target"), warm.summary["validation"]
        with torch.no_grad():
            expected = np.mean([float(loss_of(trained, targets, j)) for j in range(TARGET)])
        assert found["loss"] == pytest.approx(expected, rel=1e-4)
        assert found["selection"]["measured"] != 0

    @pytest.mark.parametrize("kind", ["ggn", "hessian"])
    @pytest.mark.parametrize("optimizer", [ADAMW, {"type": "adam", "learning_rate": 1e-4}])
    def test_second_order_with_adam(
        self, warm: Ran, tiny_llama: Path, files: tuple[Path, Path], kind: str, optimizer: dict[str, Any]
    ) -> None:
        curvature = {"type": kind, "rank": 3}
        ran = run(
            tiny_llama, *files, Path(warm.compute.store.root), warmup=WARMUP, optimizer=optimizer, refine=0.2, validate=False,
            selection="weighted", curvature=curvature, gradient={"projection_dim": 512, "normalize": False},
        )  # fmt: skip
        assert ran.summary["solution"]["kkt_residual"] < 1e-8
        assert ran.arrays["exact"][ran.selected].all()

    def test_with_lora_influence_is_measured_on_the_adapters(
        self, tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
    ) -> None:
        lora = {**WARMUP, "lora": {"rank": 2, "alpha": 4, "modules": "mlp"}}
        ran = run(tiny_llama, *files, tmp_path, warmup=lora, gradient=WHOLE, **EXACT)
        assert {unit_.spec["modules"] for unit_ in ran.done[Stage.LANDMARK_GRADIENTS]} == {"lora"}
        model = load(tiny_llama)
        with ran.compute.store.local(ran.done[Stage.WARMUP][0].result["checkpoint"]) as path:
            adapters.load_checkpoint(model, path)
        weights = list(adapters.trainable(model).values())
        G_S, G_T = gradients_of(ran, model, weights)
        expected = (unit(G_S) @ unit(G_T).T).mean(dim=1)
        close(ran.arrays["influence"], expected)


def test_a_registered_adapter_is_measured_on_its_own_weights(
    tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["down_proj", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name of old
        wrapped = get_peft_model(load(tiny_llama), config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "tuned")
    written = tmp_path / "tuned" / "adapter_config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), "base_model_name_or_path": "base"}))
    resolved = {"kind": "registered", "name": "tuned", "base": {"kind": "registered", "name": "base"}}
    ran = run(tmp_path / "tuned", *files, tmp_path / "store", resolved=resolved, gradient=WHOLE, refine=1.0)
    assert ran.prepared["is_adapter"]
    weights = [p for name, p in wrapped.eval().named_parameters() if "lora_" in name]
    G_S, G_T = gradients_of(ran, wrapped, weights)
    expected = (unit(G_S) @ unit(G_T).T).mean(dim=1)
    close(ran.arrays["influence"], expected)


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the state of a plain training of one step."""
    folder = tmp_path_factory.mktemp("registered") / "m"
    shutil.copytree(tiny_llama, folder)
    model = load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
    optimizer.step()
    save_state(state_of(optimizer, model), folder / "optimizer.safetensors")
    return folder


class TestRegisteredState:
    def test_it_scales_the_gradients(self, model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
        named: dict[str, Any] = {"betas": (0.8, 0.99), "eps": 1e-3}
        ran = run(model, *files, tmp_path, optimizer={"type": "adam", **named}, gradient=PLAIN, **EXACT)
        plain = load(model)
        weights = down_projections(plain)
        G_S, G_T = gradients_of(ran, plain, list(weights.values()))
        a, _ = adam(model / "optimizer.safetensors", list(weights), list(weights.values()), decay=0.0, **named)
        expected = (G_S * a @ G_T.T).mean(dim=1)
        close(ran.arrays["influence"], expected, 1e-3)

    def test_the_momentum_of_sgd_drifts(self, model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
        state = {name: value for name, value in load_file(model / "optimizer.safetensors").items() if "first." in name}
        model = shutil.copytree(model, tmp_path / "m")
        save_file(state, model / "optimizer.safetensors", metadata={"step": "1"})
        sgd = {"type": "sgd", "learning_rate": 0.5, "momentum": 0.9}
        weighted = {"selection": "weighted", "curvature": {"type": "fisher"}, "gradient": PLAIN, **EXACT}
        ran = run(model, *files, tmp_path, optimizer=sgd, **weighted)
        plain = load(model)
        weights = down_projections(plain)
        G_S, G_T = gradients_of(ran, plain, list(weights.values()))
        b = 0.9 * torch.cat([state[f"first.{name}"].flatten() for name in weights]).double()
        P = G_S @ G_T.T
        p = P.mean(dim=1) - 0.5 * P @ (G_T @ b) / TARGET
        is_optimum(ran, p.numpy(), (P @ P.T / (POOL * TARGET)).numpy(), 0.5)

    def test_a_parameter_that_it_lacks_is_named(self, model: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
        lacking = tmp_path / "lacking"
        shutil.copytree(model, lacking)
        name = "second.model.layers.1.mlp.down_proj.weight"
        state = {key: value for key, value in load_file(lacking / "optimizer.safetensors").items() if key != name}
        save_file(state, lacking / "optimizer.safetensors", metadata={"step": "1"})
        with pytest.raises(ParameterError, match=name.replace(".", r"\.")):
            run(lacking, *files, tmp_path / "store", optimizer={"type": "adamw"})
        (lacking / "optimizer.safetensors").unlink()
        with pytest.raises(ParameterError, match=r"needs a warmup, or optimizer\.safetensors"):
            run(lacking, *files, tmp_path / "store", optimizer={"type": "adamw"})


class TestTheSame:
    JOBS = (
        {"embedding": {"kind": "auto"}, "validate": True},
        {
            "warmup": WARMUP,
            "optimizer": ADAMW,
            "selection": "weighted",
            "curvature": {"type": "ggn", "rank": 3},
            "gradient": {"normalize": False},
        },
    )

    @pytest.mark.parametrize("changes", JOBS)
    def test_job_twice_gives_the_same_bits(
        self, tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        """Each with a store of its own, so that nothing of the first is reused."""
        one, two = (run(tiny_llama, *files, tmp_path / name, **changes) for name in ("one", "two"))
        assert all(one.arrays[name].tobytes() == two.arrays[name].tobytes() for name in one.arrays)
        assert one.summary == two.summary
        assert [one.keys(stage) for stage in one.done] == [two.keys(stage) for stage in two.done]

    @pytest.mark.parametrize("changes", JOBS)
    def test_selection_comes_of_other_shards(
        self, tiny_llama: Path, files: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, changes: dict[str, Any]
    ) -> None:
        one = run(tiny_llama, *files, tmp_path / "one", **changes)
        monkeypatch.setattr(shards, "EMBED_SHARD_TOKENS", 700)
        monkeypatch.setattr(shards, "GRADIENT_SHARD_TOKENS", 300)
        two = run(tiny_llama, *files, tmp_path / "two", **changes)
        assert len(two.done[Stage.EMBED]) > len(one.done[Stage.EMBED]) == 1
        assert len(two.done[Stage.LANDMARK_GRADIENTS]) > 1
        assert one.selected == two.selected
        assert one.arrays["weight"] == pytest.approx(two.arrays["weight"], rel=1e-3)
