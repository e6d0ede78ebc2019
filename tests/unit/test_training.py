"""The warm-up: what it trains, that it is the training it says, what it leaves behind, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.tiny import make_tokenizer, pool_rows, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from service.datasets.storage import Sample
from service.plan.parameters import Parameters
from service.plan.stages import JobInputs
from service.settings import WorkerSettings
from service.storage.artifacts import ArtifactStore
from worker.errors import ModelError, OutOfMemory, ParameterError
from worker.influence import OptimizerOptions, Samples, load_state, per_sample_gradients, sample_losses, state_of
from worker.loading import adapters
from worker.stages import warmup
from worker.stages.context import ModelCache, StageContext
from worker.text import token_files, tokenization
from worker.training import Training, train

CPU = torch.device("cpu")
COUNT = 22


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    """A store with the tokens of 22 samples with a response and 2 without."""
    store = ArtifactStore(str(tmp_path_factory.mktemp("store")))
    rows = pool_rows(COUNT + 2)
    rows[3]["messages"], rows[9]["messages"] = ([{"role": "user", "content": "?"}] for _ in range(2))
    samples = (Sample(i, row["id"], None, row["messages"], None) for i, row in enumerate(rows))
    token_files.write_tokens(
        store, "tokens", tokenization.tokenise(samples, make_tokenizer(), max_length=96, report=lambda _: None)
    )
    return store


@pytest.fixture(scope="module")
def samples(store: ArtifactStore) -> Samples:
    usable = np.flatnonzero(token_files.read_counts(store, "tokens").predicted)
    assert usable.size == COUNT
    return token_files.read_rows(store, "tokens", usable)


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def training(**changes: Any) -> Training:
    given = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 8, "optimizer": OptimizerOptions(), "seed": 5}
    return Training(**{**given, "token_budget": 256, **changes})


def trained(model: Any, samples: Samples, **changes: Any) -> tuple[torch.optim.Optimizer, list[float]]:
    silent = lambda *_: None  # noqa: E731
    return train(model, adapters.trainable(model), samples, training(**changes), report=silent, progress=silent)


# Training


def test_it_lowers_the_loss(tiny_llama: Path, samples: Samples) -> None:
    model = model_of(tiny_llama)
    before = sample_losses(model, samples).mean()
    _, losses = trained(model, samples, epochs=6)
    assert sample_losses(model, samples).mean() < 0.8 * before
    assert losses[-1] < losses[0]
    assert len(losses) == 6 * 3


def test_two_runs_end_in_the_same_bits(tiny_llama: Path, samples: Samples) -> None:
    first, second, other = (model_of(tiny_llama) for _ in range(3))
    trained(first, samples)
    trained(second, samples)
    trained(other, samples, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def plain_loop(model: Any, samples: Samples, optimizer: torch.optim.Optimizer, how: Training) -> None:
    """The same training as anyone would write it: a sample at a time, the model's own logits."""
    random = np.random.default_rng([how.seed, 0x3A1])
    counted, step = samples.predictable(), 0
    steps = how.steps(len(samples))
    for _ in range(how.epochs):
        order = random.permutation(len(samples))
        for start in range(0, len(samples), how.batch_size):
            batch = order[start : start + how.batch_size]
            optimizer.param_groups[0]["lr"] = how.rate(step, steps)
            for i in batch:
                span = slice(samples.offsets[i], samples.offsets[i + 1])
                ids = torch.from_numpy(samples.input_ids[span].astype(np.int64))
                places = torch.from_numpy(np.flatnonzero(counted[span]))
                logits = model(input_ids=ids[None]).logits[0, places - 1]
                (nn.functional.cross_entropy(logits, ids[places]) / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1


@pytest.mark.parametrize(
    ("family", "options", "kind"),
    [
        ("llama", {"type": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.95)}, torch.optim.AdamW),
        ("gpt2", {"type": "adam", "eps": 1e-6}, torch.optim.Adam),
        ("gemma2", {"type": "sgd"}, torch.optim.AdamW),
    ],
)
def test_it_is_the_training_of_a_plain_loop_and_leaves_its_state_by_name(
    tmp_path: Path, samples: Samples, family: str, options: dict[str, Any], kind: Callable[..., torch.optim.Optimizer]
) -> None:
    folder = save_model(tmp_path / family, family)
    ours, plain = model_of(folder), model_of(folder)
    how = training(optimizer=OptimizerOptions(**options))
    optimizer, _ = trained(ours, samples, optimizer=how.optimizer)
    decay = options.get("weight_decay", 0.0)
    reference = kind(plain.parameters(), betas=how.optimizer.betas, eps=how.optimizer.eps, weight_decay=decay)
    plain_loop(plain, samples, reference, how)
    found, wanted = state_of(optimizer, ours), state_of(reference, plain)
    names = {name for name, _ in plain.named_parameters()}
    assert found.step == wanted.step == 6
    assert found.first.keys() == found.second.keys() == names
    for name in names:
        for a, b in ((found.first, wanted.first), (found.second, wanted.second)):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4 * float(b[name].abs().max()))


def test_batches_are_cut_into_passes_without_a_change(tiny_llama: Path, samples: Samples) -> None:
    whole, cut = model_of(tiny_llama), model_of(tiny_llama)
    first, second = trained(whole, samples, token_budget=10_000)[1], trained(cut, samples, token_budget=1)[1]
    assert first == pytest.approx(second, rel=1e-4)


def test_the_rate_rises_over_the_first_steps_and_stays(samples: Samples) -> None:
    how = training(learning_rate=1.0)
    assert [how.rate(step, 100) for step in (0, 1, 2, 3, 99)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1, 1, 1]
    assert how.rate(0, 3) == 1.0


def test_progress_counts_samples_and_the_report_steps(tiny_llama: Path, samples: Samples) -> None:
    model, seen, steps = model_of(tiny_llama), [], []  # type: ignore[var-annotated]
    parameters, report, progress = (
        adapters.trainable(model),
        lambda *step: steps.append(step),
        lambda *done: seen.append(done),
    )
    train(model, parameters, samples, training(), report=report, progress=progress)
    assert seen == sorted(seen)
    assert seen[-1] == (2 * COUNT, 2 * COUNT)
    assert [step[:2] for step in steps] == [(i, 6) for i in range(1, 7)]


class TestMemory:
    @staticmethod
    def limited(folder: Path, most: int) -> Any:
        """A model that runs out of memory for more than `most` tokens: in its second block, on the way back, when gradients of
        the third were accumulated already."""
        model = model_of(folder)

        def hook(module: nn.Module, _: Any, grad: Any) -> None:
            if grad[0].shape[0] * grad[0].shape[1] > most:
                raise torch.OutOfMemoryError("no memory")

        model.model.layers[1].mlp.register_full_backward_hook(hook)
        return model

    def test_what_does_not_fit_is_cut_smaller_and_comes_out_the_same(self, tiny_llama: Path, samples: Samples) -> None:
        narrow, wide = self.limited(tiny_llama, 200), model_of(tiny_llama)
        losses = trained(narrow, samples, token_budget=800)[1]
        assert losses == pytest.approx(trained(wide, samples, token_budget=200)[1], rel=1e-4)

    def test_a_sample_that_does_not_fit_alone_is_an_error_that_says_what_to_lower(
        self, tiny_llama: Path, samples: Samples
    ) -> None:
        with pytest.raises(OutOfMemory, match=r"single sample of \d+ tokens.*lower max_length"):
            trained(self.limited(tiny_llama, 4), samples)

    def test_gradients_halve_too_and_say_what_to_lower(self, tiny_llama: Path, samples: Samples) -> None:
        whole = per_sample_gradients(model_of(tiny_llama), samples, projection=None)
        halved = per_sample_gradients(self.limited(tiny_llama, 200), samples, projection=None, token_budget=800)
        torch.testing.assert_close(halved.values, whole.values, rtol=1e-3, atol=1e-5)
        with pytest.raises(torch.OutOfMemoryError, match=r"single sample.*lower the maximum sample length"):
            per_sample_gradients(self.limited(tiny_llama, 4), samples, projection=None)


class TestRefused:
    def test_a_loss_that_explodes(self, tiny_llama: Path, samples: Samples) -> None:
        with pytest.raises(ParameterError, match=r"not finite at step \d+.*lower warmup\.learning_rate"):
            trained(model_of(tiny_llama), samples, learning_rate=1e30)

    def test_a_gradient_that_explodes_though_the_loss_does_not(self, tiny_llama: Path, samples: Samples) -> None:
        model = model_of(tiny_llama)
        model.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(ParameterError, match=r"not finite at step 1 .*warmup\.learning_rate"):
            trained(model, samples)

    def test_a_sample_without_a_response(self, tiny_llama: Path, store: ArtifactStore) -> None:
        with pytest.raises(ValueError, match="at least one predicted response token"):
            trained(model_of(tiny_llama), token_files.read_all(store, "tokens"))


# The stage


def context_of(
    store: ArtifactStore, folder: Path, *, is_adapter: bool = False, model: dict[str, Any] | None = None, **given: Any
) -> tuple[StageContext, list[tuple[str, dict[str, Any]]]]:
    warm = {"samples": 16, "learning_rate": 3e-3, "batch_size": 8, **given.pop("warmup", {})}
    parameters = Parameters(optimizer={"type": "adamw"}, warmup=warm, **given).model_dump(mode="json")
    model = model or {"kind": "registered", "name": folder.name}
    cache, events = ModelCache(folder.parent, CPU), []  # type: ignore[var-annotated]
    dtype = "float32" if parameters["dtype"] == "auto" else parameters["dtype"]
    context = StageContext(
        store=store,
        job=JobInputs(model=model, pool="p", target="t", budget=1, parameters=parameters),
        prepared={
            "model_fingerprint": cache.folder(model).fingerprint,
            "dtype": dtype,
            "is_adapter": is_adapter,
            "pool_tokens": "tokens",
        },
        models=cache,
        settings=WorkerSettings(),
        token_budget=256,
        report=lambda _: None,
        event=lambda kind, data: events.append((kind, data)),
    )
    return context, events


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(20)[None]).logits
    return found


@pytest.fixture
def catch(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The model that the stage trained, as it left it."""
    caught: dict[str, Any] = {}

    def save(model: Any, path: Path, added: Any) -> None:
        caught["model"] = model
        adapters.save_checkpoint(model, path, added)

    monkeypatch.setattr(warmup, "save_checkpoint", save)
    return caught


def test_the_stage_leaves_checkpoint_state_and_losses(
    tiny_llama: Path, store: ArtifactStore, catch: dict[str, Any]
) -> None:
    context, events = context_of(store, tiny_llama, warmup={"epochs": 2})
    plain = logits(context.model())
    result = warmup.run(context, "checkpoints/full.safetensors", {"tokens": "tokens"})
    assert (result["samples"], result["steps"], result["adapter"]) == (16, 4, False)
    assert result["trained_parameters"] == sum(p.numel() for p in catch["model"].parameters())
    assert len(result["losses"]) == 4
    assert (result["loss_first"], result["loss_last"]) == (result["losses"][0], result["losses"][-1])
    kinds, data = zip(*events, strict=True)
    assert set(kinds) == {"warmup.step"}
    assert [data[0]["step"], data[-1]["step"]] == [1, 4]
    assert (data[-1]["steps"], data[-1]["loss"], data[-1]["learning_rate"]) == (4, result["loss_last"], 3e-3)
    assert [loss for event in data for loss in event["losses"]] == result["losses"]
    with store.local(result["optimizer_state"]) as path:
        state = load_state(path)
    assert result["optimizer_state"] == "checkpoints/full.optimizer.safetensors"
    assert state.step == 4
    assert state.second.keys() == dict(catch["model"].named_parameters()).keys()
    assert torch.equal(logits(context.model("checkpoints/full.safetensors")), logits(catch["model"]))
    assert torch.equal(logits(context.model()), plain)  # and not the one that was trained


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_the_adapters_alone(
    tmp_path: Path, store: ArtifactStore, catch: dict[str, Any], family: str, dtype: str
) -> None:
    folder = save_model(tmp_path / family, family)
    context, _ = context_of(store, folder, dtype=dtype, warmup={"lora": {"rank": 4, "modules": "mlp"}})
    key = f"checkpoints/{family}-{dtype}.safetensors"
    result = warmup.run(context, key, {"tokens": "tokens"})
    model, before = catch["model"], {name: p.clone() for name, p in context.model().named_parameters()}
    trained = adapters.trainable(model)
    assert result["adapter"]
    assert result["loss_last"] < result["loss_first"]
    assert all(".mlp." in name and p.dtype == torch.float32 for name, p in trained.items())
    rest = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name not in trained}
    assert rest.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in rest.items())
    with store.local(key) as path, safe_open(path, framework="pt") as file:
        assert set(file.keys()) == trained.keys()
    measured = context.model(key)
    assert type(measured).__name__ == type(context.model()).__name__
    assert torch.equal(logits(context.model(key)), logits(model))
    assert measured.dtype == getattr(torch, dtype)


def test_adapters_begin_by_the_seed_of_the_job(tiny_llama: Path, store: ArtifactStore, catch: dict[str, Any]) -> None:
    begun = []
    for seed in (0, 0, 1):
        context, _ = context_of(store, tiny_llama, seed=seed, warmup={"lora": {"rank": 4}, "learning_rate": 1e-9})
        warmup.run(context, f"checkpoints/seed-{seed}.safetensors", {"tokens": "tokens"})
        begun.append(torch.cat([p.detach().flatten() for p in adapters.trainable(catch["model"]).values()]))
    assert torch.equal(begun[0], begun[1])
    assert (begun[0] - begun[2]).abs().max() > 1e-2


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_adapters_of_a_quantised_model_are_trained(
    tiny_llama: Path, store: ArtifactStore, catch: dict[str, Any], quantization: str
) -> None:
    warm = {"epochs": 3, "lora": {"rank": 4}}
    context, _ = context_of(store, tiny_llama, quantization=quantization, embedding={"kind": "hidden"}, warmup=warm)
    result = warmup.run(context, f"checkpoints/{quantization}.safetensors", {"tokens": "tokens"})
    assert result["loss_last"] < result["loss_first"]
    measured = context.model(result["checkpoint"])
    torch.testing.assert_close(logits(measured), logits(catch["model"]))


def test_an_adapter_that_is_registered_is_what_is_trained(
    tiny_llama: Path, tmp_path: Path, store: ArtifactStore, catch: dict[str, Any]
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "m")
    model = model_of(base)
    adapters.add_lora(model, {"rank": 2, "alpha": 4.0, "modules": "attention"}, seed=0)
    tensors = {f"base_model.model.{name.replace('.default', '')}": p for name, p in adapters.trainable(model).items()}
    (tmp_path / "tuned").mkdir()
    save_file(tensors, tmp_path / "tuned" / "adapter_model.safetensors")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "base_model_name_or_path": "m", "r": 2, "lora_alpha": 4, "target_modules": modules}
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps(config))
    named = {"kind": "registered", "name": "tuned", "base": {"kind": "registered", "name": "m"}}
    context, _ = context_of(store, tmp_path / "tuned", is_adapter=True, model=named)
    result = warmup.run(context, "checkpoints/tuned.safetensors", {"tokens": "tokens"})
    assert result["adapter"]
    assert result["trained_parameters"] == sum(t.numel() for t in tensors.values())
    assert torch.equal(logits(context.model(result["checkpoint"])), logits(catch["model"]))
    assert not torch.equal(logits(context.model()), logits(catch["model"]))


def test_the_modules_of_lora_are_found_by_our_own_look_at_the_model(tmp_path: Path) -> None:
    model = model_of(save_model(tmp_path / "gpt2", "gpt2"))
    assert adapters.target_modules(model, "all-linear") == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert adapters.target_modules(model, "attention") == ["attn.c_attn", "attn.c_proj"]
    assert adapters.target_modules(model, "mlp") == ["mlp.c_fc", "mlp.c_proj"]


def test_adapters_are_not_added_twice(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    adapters.add_lora(model, {"rank": 2, "alpha": 4.0, "modules": "attention"}, seed=0)
    with pytest.raises(ParameterError, match=r"warmup\.lora: the model is already an adapter"):
        adapters.add_lora(model, {"rank": 2, "alpha": 4.0, "modules": "mlp"}, seed=0)


def test_a_checkpoint_of_another_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = model_of(tiny_llama)
    adapters.save_checkpoint(model, tmp_path / "full", None)
    added = adapters.add_lora(model, {"rank": 2, "alpha": 4.0, "modules": "mlp"}, seed=0)
    adapters.save_checkpoint(model, tmp_path / "lora", added)
    with pytest.raises(ModelError, match="lacks"):
        adapters.load_checkpoint(model, tmp_path / "full")
    other = model_of(save_model(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(ModelError, match="lacks"):
        adapters.load_checkpoint(other, tmp_path / "full")
