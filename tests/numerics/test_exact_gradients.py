"""Hooked, projected, batched gradients against autograd.grad one sample at a time (METHOD 9, point 1)."""

import numpy as np
import pytest
import torch
import transformers
from support.numerics_reference import (
    EXACT,
    FAMILIES,
    MIXED,
    VOCAB,
    build,
    plain_losses,
    ragged,
    random_state,
    relative_error,
    with_adapters,
)

from worker.influence import (
    GradientProjection,
    OptimizerOptions,
    Samples,
    exact_gradients,
    gradient_scaling,
    per_sample_gradients,
)
from worker.influence.causal_lm import linear_layers
from worker.influence.exact_gradients import plain_gradients

PROJECTIONS = pytest.mark.parametrize(
    "projection", [None, GradientProjection(dim=192, seed=3, directions=40)], ids=["full", "projected"]
)
ADAM = OptimizerOptions(type="adam")

FLOAT32_INTERNALS = 1e-6  # what float32 norms and softmax inside a float64 model leave


@PROJECTIONS
@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("token_budget", [1, 23, 10_000])
def test_equals_autograd_one_sample_at_a_time(family, token_budget, projection):
    model, samples = build(family), ragged(*MIXED)
    expected = plain_gradients(model, samples, projection=projection)
    result = per_sample_gradients(model, samples, projection=projection, token_budget=token_budget)
    assert result.values.dtype == torch.float64
    torch.testing.assert_close(result.loss, plain_losses(model, samples), rtol=1e-10, atol=1e-12)
    for i in range(len(samples)):
        if expected[i].norm() > 0:
            assert relative_error(result.values[i], expected[i]) < 1e-10
        else:
            assert not result.values[i].any()
    assert result.nonfinite.numel() == 0


@PROJECTIONS
@pytest.mark.parametrize("kind", ["exact", "factored"])
@pytest.mark.parametrize("family", EXACT)
def test_scaled_gradients(family, kind, projection, monkeypatch):
    monkeypatch.setattr(exact_gradients, "PIECE_BYTES", 3 * 24 * 96 * 8)  # pieces of three samples, or of seven
    model, samples = build(family), ragged(*MIXED)
    scaling = gradient_scaling(model, "down_proj", ADAM, random_state(model), kind)
    expected = plain_gradients(model, samples, projection=projection, scaling=scaling)
    for budget in (1, 23, 10_000):
        result = per_sample_gradients(model, samples, projection=projection, scaling=scaling, token_budget=budget)
        assert relative_error(result.values, expected) < 1e-10
    assert not result.values[[2, 4, 5]].any()


@pytest.mark.parametrize("kind", ["exact", "factored"])
@pytest.mark.parametrize("family", ["qwen2", "gemma", "gpt_neox"])
def test_scaled_gradients_of_other_families(family, kind):
    model, samples, projection = build(family), ragged(*MIXED), GradientProjection(dim=192)
    scaling = gradient_scaling(model, "down_proj", ADAM, random_state(model), kind)
    expected = plain_gradients(model, samples, projection=projection, scaling=scaling)
    result = per_sample_gradients(model, samples, projection=projection, scaling=scaling, token_budget=40)
    assert relative_error(result.values, expected) < FLOAT32_INTERNALS


@pytest.mark.parametrize("kind", ["exact", "factored"])
def test_scaling_in_bfloat16_is_close(kind):
    samples, projection, model = ragged(*MIXED), GradientProjection(dim=192), build("llama")
    state = random_state(model)
    results = []
    for each in (model, build("llama", torch.bfloat16)):
        scaling = gradient_scaling(each, "down_proj", ADAM, state, kind)
        results.append(per_sample_gradients(each, samples, projection=projection, scaling=scaling).values.double())
    assert relative_error(results[1], results[0]) < 0.08


def test_a_scaling_of_other_modules_is_refused():
    model = build("llama")
    scaling = gradient_scaling(model, "o_proj", ADAM, random_state(model))
    with pytest.raises(ValueError, match=r"scaling has no layer layers.0.mlp.down_proj \(3 missing\)"):
        per_sample_gradients(model, ragged("..r"), projection=None, scaling=scaling)


@PROJECTIONS
@pytest.mark.parametrize("family", EXACT)
def test_adapters(family, projection):
    model, samples = with_adapters(build(family)), ragged(*MIXED)
    result = per_sample_gradients(model, samples, modules="lora", projection=projection, token_budget=30)
    model.eval()
    assert len(linear_layers(model, "lora")) == 12
    assert relative_error(result.values, plain_gradients(model, samples, modules="lora", projection=projection)) < 1e-10
    how = {"projection": projection, "scaling": gradient_scaling(model, "lora", ADAM, random_state(model))}
    result = per_sample_gradients(model, samples, modules="lora", **how)
    assert relative_error(result.values, plain_gradients(model, samples, modules="lora", **how)) < 1e-10


@pytest.mark.parametrize("family", EXACT)
def test_a_wrapped_layer_keeps_its_name_and_projection(family):
    """The role is the base layer inside of the wrapper; adapters that add nothing change nothing."""
    plain, samples, projection = build(family), ragged(*MIXED), GradientProjection(dim=192)
    expected = per_sample_gradients(plain, samples, projection=projection, token_budget=30).values
    wrapped = with_adapters(build(family))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    result = per_sample_gradients(wrapped, samples, projection=projection, token_budget=30).values
    assert relative_error(result, expected) < 1e-12


def test_float32_adapters_on_a_bfloat16_model():
    samples, projection = ragged(*MIXED), GradientProjection(dim=192)
    exact, mixed = with_adapters(build("llama")), with_adapters(build("llama", torch.bfloat16))
    for name, parameter in mixed.named_parameters():
        if "lora_" in name:
            parameter.data = dict(exact.named_parameters())[name].data.float()
    results = [per_sample_gradients(m, samples, modules="lora", projection=projection).values for m in (exact, mixed)]
    assert relative_error(results[1].double(), results[0]) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, samples = build(family), ragged(*MIXED)
    projection = GradientProjection(dim=192, seed=1)
    result = per_sample_gradients(model, samples, projection=projection, token_budget=30)
    assert relative_error(result.values, plain_gradients(model, samples, projection=projection)) < FLOAT32_INTERNALS
    torch.testing.assert_close(result.loss, plain_losses(model, samples), rtol=FLOAT32_INTERNALS, atol=0)


@pytest.mark.parametrize("family", EXACT)
def test_does_not_depend_on_order_or_company(family):
    model, samples = build(family), ragged(*MIXED)
    projection = GradientProjection(dim=192)
    whole = per_sample_gradients(model, samples, projection=projection, token_budget=1000).values
    order = np.random.default_rng(1).permutation(len(samples))
    shuffled = per_sample_gradients(model, samples.take(order), projection=projection, token_budget=17).values
    assert relative_error(shuffled, whole[order]) < 1e-12
    assert relative_error(whole[0], whole[-1]) > 1e-3, "different tokens, the same marks"
    twice = per_sample_gradients(model, samples.take([0, 8, 0]), projection=projection, token_budget=1000).values
    torch.testing.assert_close(twice[0], twice[2], rtol=1e-13, atol=1e-15)


def test_samples_without_predicted_tokens_are_zero():
    result = per_sample_gradients(build("gpt2"), ragged("...", "r", ""), projection=None, token_budget=8)
    assert result.values.shape == (3, 3 * 24 * 96)
    assert not result.values.any()
    assert not result.loss.any()


def test_same_bits_twice():
    model, samples = build("llama", torch.float32), ragged(*MIXED)
    runs = [
        per_sample_gradients(model, samples, projection=GradientProjection(dim=192), token_budget=40) for _ in range(2)
    ]
    assert torch.equal(runs[0].values, runs[1].values)
    assert torch.equal(runs[0].loss, runs[1].loss)


def test_float32_and_bfloat16_are_close_to_float64():
    samples, projection = ragged(*MIXED), GradientProjection(dim=192)
    exact = per_sample_gradients(build("llama"), samples, projection=projection, token_budget=40)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
        result = per_sample_gradients(build("llama", dtype), samples, projection=projection, token_budget=40)
        assert result.values.dtype == torch.float32
        assert relative_error(result.values.double(), exact.values) < tolerance


def test_bfloat16_outer_products_accumulate_in_float32():
    """A thousand equal small terms: a bfloat16 sum would stop growing near 256 times a term."""
    from worker.influence.exact_gradients import _PerSample

    model = torch.nn.Embedding(1, 1)
    model.get_input_embeddings = lambda: model
    use = _PerSample(model, {"layer": torch.nn.Linear(1, 1)}, None, None, 1)
    ones = torch.ones(1, 1001, 1, dtype=torch.bfloat16)
    use.start(torch.arange(1))
    use.on_output_grad("layer", use.save_input("layer", ones), ones)
    use.finish(torch.arange(1))
    assert use.values.item() == 1001


def test_dropout_is_off_and_the_model_is_left_as_it_was():
    samples = ragged(*MIXED)
    plain = per_sample_gradients(build("gpt2"), samples, projection=None, token_budget=40).values
    model = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.wpe.weight.requires_grad_(False)
    noisy = per_sample_gradients(model, samples, projection=None, token_budget=40).values
    assert torch.equal(plain, noisy)
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["transformer.wpe.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes itself
@pytest.mark.parametrize("modules", ["down_proj", "lora"])
def test_four_bit_weights_equal_what_they_stand_for(modules, tmp_path):
    import bitsandbytes

    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    build("llama", torch.float32, **sizes).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    load = transformers.AutoModelForCausalLM.from_pretrained
    quantised, plain = load(tmp_path, quantization_config=config), load(tmp_path)
    for name, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight
    if modules == "lora":
        quantised, plain = with_adapters(quantised), with_adapters(plain)
    gradients = [per_sample_gradients(m, ragged(*MIXED), modules=modules, projection=None) for m in (quantised, plain)]
    assert relative_error(gradients[0].values, gradients[1].values) < 1e-4


@pytest.mark.parametrize(("modules", "values"), [("self_attn.o_proj", 24 * 32), ("k_proj", 16 * 24)])
def test_other_layers_by_the_end_of_their_name(modules, values):
    model, samples = build("llama"), ragged("..rrr")
    result = per_sample_gradients(model, samples, modules=modules, projection=None, token_budget=99)
    loss = model(torch.from_numpy(samples.input_ids.astype(np.int64))[None]).logits[0, 1:4]
    loss = torch.nn.functional.cross_entropy(loss, torch.from_numpy(samples.input_ids[2:].astype(np.int64)))
    weights = [p for name, p in model.named_parameters() if name.endswith(f"{modules}.weight")]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
    assert result.values.shape == (1, 3 * values)
    assert relative_error(result.values[0], expected) < FLOAT32_INTERNALS


def test_nonfinite_samples_are_named():
    model, samples = build("llama", torch.float32), ragged("..rr", "..rr", "..rr")
    with torch.no_grad():
        model.model.embed_tokens.weight[int(samples.input_ids[4])] = float("nan")
    result = per_sample_gradients(model, samples, projection=GradientProjection(dim=192), token_budget=99)
    affected = [i for i in range(3) if samples.input_ids[4] in samples.input_ids[4 * i : 4 * i + 3]]
    assert result.nonfinite.tolist() == affected


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_a_gradient_that_alone_is_not_finite_is_named_too(what):
    model, samples = build("llama", torch.float32), ragged("..rr", "...rr", "..rr")
    never = int(samples.input_ids[-1])  # gets no probability at all: the loss is infinite, its derivative is not
    affected = [i for i in range(3) if never in samples.take(np.array([i])).input_ids[-2:]] if what == "loss" else [1]

    def rule_out(module, args, output):
        return output + torch.where(torch.arange(VOCAB) == never, -torch.inf, 0.0)

    def explode(module, args, output):
        scale = torch.where(torch.tensor(output.shape[1] == 4), torch.inf, 1.0)  # of the longer sample
        if output.requires_grad:
            output.register_hook(lambda grad: grad * scale)

    hooked = (model.lm_head, rule_out) if what == "loss" else (model.model.layers[1].mlp.up_proj, explode)
    handle = hooked[0].register_forward_hook(hooked[1])
    found = per_sample_gradients(model, samples, projection=GradientProjection(dim=192), token_budget=4)
    handle.remove()
    assert found.nonfinite.tolist() == affected
    assert torch.nonzero(~torch.isfinite(found.loss)).flatten().tolist() == (affected if what == "loss" else [])


@pytest.mark.parametrize("limit", [19, 6])
def test_out_of_memory_halves_the_budget(limit):
    model, samples = build("gpt2"), ragged(*MIXED)
    projection = GradientProjection(dim=192)
    expected = per_sample_gradients(model, samples, projection=projection, token_budget=1000).values
    done = []

    def scarce(module, args):
        if args[0].shape[0] * args[0].shape[1] > limit:
            raise torch.OutOfMemoryError("no memory")

    model.transformer.h[1].register_forward_pre_hook(scarce)
    call = {"projection": projection, "token_budget": 1000, "progress": lambda *counts: done.append(counts)}
    if limit < 18:
        with pytest.raises(torch.OutOfMemoryError, match=r"18 tokens does not fit.*lower"):
            per_sample_gradients(model, samples, **call)
    else:
        assert relative_error(per_sample_gradients(model, samples, **call).values, expected) < 1e-12
        assert done[-1] == (7, 7)
        assert len(done) > 2


def test_the_default_token_budget_changes_nothing():
    model, samples = build("gpt2"), ragged(*MIXED)
    values = [
        per_sample_gradients(model, samples, projection=None, **budget).values for budget in ({}, {"token_budget": 9})
    ]
    assert relative_error(*values) < 1e-12


def test_errors_say_what_to_do():
    model = build("llama")
    with pytest.raises(ValueError, match=r"modules='fc9'.*mlp.down_proj.*self_attn.q_proj"):
        per_sample_gradients(model, ragged("..r"), modules="fc9", projection=None, token_budget=9)
    with pytest.raises(ValueError, match=r"modules='lora' matches no linear layer"):
        per_sample_gradients(model, ragged("..r"), modules="lora", projection=None)
    with pytest.raises(ValueError, match="token_budget"):
        per_sample_gradients(model, ragged("..r"), projection=None, token_budget=0)
    with pytest.raises(ValueError, match=r"sample 1 has 70 tokens.*context is 64"):
        per_sample_gradients(model, ragged("..r", "r" * 70), projection=None, token_budget=9)
    good = ragged("..r", "..r")
    ids = good.input_ids.copy()
    ids[4] = VOCAB
    bad = Samples(input_ids=ids, response=good.response, offsets=good.offsets)
    with pytest.raises(ValueError, match=f"sample 1 has token id {VOCAB}"):
        per_sample_gradients(model, bad, projection=None, token_budget=9)


def test_a_family_that_scales_its_logits_is_refused():
    model = build("llama")
    original = model.forward

    def scaled(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="changes its logits"):
        per_sample_gradients(model, ragged("..r"), projection=None, token_budget=9)
