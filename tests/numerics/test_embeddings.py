"""JVP and hidden embeddings against plain forwards, torch.func.jvp and central differences (METHOD 9, point 2)."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.hooks import attach_execution_device_hook
from peft import LoraConfig, inject_adapter_in_model
from support.numerics_reference import EXACT, FAMILIES, MIXED, build, ragged, relative_error

from worker.influence import EmbeddingOptions, embed, per_sample_gradients
from worker.influence.embeddings import plain_embeddings, plain_state
from worker.influence.forward_mode import random_tangents

POOLINGS = ("last", "response")


@torch.no_grad()
def central_differences(model, samples, options, step=1e-6):
    """`plain_embeddings` with differences in place of derivatives."""
    parameters = dict(model.base_model.named_parameters())
    tangents = random_tangents(model.base_model, options.blocks, options.tangents, options.seed)
    rows = torch.zeros(len(samples), options.tangents * 24, dtype=torch.float64)
    for i in range(len(samples)):
        if (state := plain_state(model, samples, i, options)) is not None:
            ends = [
                [
                    state({name: parameters[name] + sign * step * t[j] for name, t in tangents.items()})
                    for sign in (1, -1)
                ]
                for j in range(options.tangents)
            ]
            rows[i] = torch.nn.functional.normalize(torch.cat([ahead - behind for ahead, behind in ends]), dim=0)
    return rows


def attend_plainly(model):
    """The reference needs attention that forward mode can differentiate, in the model's own dtype."""
    model.config._attn_implementation = "eager" if model.config.model_type == "gpt2" else "plain_float64"


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("token_budget", [1, 29, 10_000])
def test_jvp_equals_forward_mode_one_at_a_time(family, pooling, token_budget):
    model, samples = build(family), ragged(*MIXED)
    options = EmbeddingOptions(pooling=pooling, blocks=2, tangents=3, seed=5)
    actual = embed(model, samples, options=options, token_budget=token_budget)
    attend_plainly(model)
    expected = plain_embeddings(model, samples, options)
    assert actual.shape == (len(samples), 72)
    for i in range(len(samples)):
        if expected[i].any():
            assert relative_error(actual[i], expected[i]) < 1e-10
        else:
            assert not actual[i].any()


@pytest.mark.parametrize("family", EXACT)
def test_jvp_equals_central_differences(family):
    model, samples = build(family), ragged(*MIXED)
    options = EmbeddingOptions(pooling="response", blocks=3, tangents=1, seed=2)
    actual = embed(model, samples, options=options, token_budget=50)
    attend_plainly(model)
    assert relative_error(actual, central_differences(model, samples, options)) < 1e-6


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_jvp_of_every_family(family, pooling):
    model, samples = build(family), ragged(*MIXED)
    options = EmbeddingOptions(pooling=pooling, blocks=2, tangents=2)
    actual = embed(model, samples, options=options, token_budget=50)
    model.config._attn_implementation = "eager"
    expected = plain_embeddings(model, samples, options)
    assert relative_error(actual, expected) < 2e-6, "float32 norms and softmax inside a float64 model leave up to 1e-6"


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_equals_a_plain_forward(family, pooling):
    model, samples = build(family), ragged(*MIXED)
    options = EmbeddingOptions(kind="hidden", pooling=pooling, blocks=2)
    actual = embed(model, samples, options=options, token_budget=33)
    norm = next(
        part for name, part in model.base_model.named_children() if name in ("norm", "ln_f", "final_layer_norm")
    )
    for i, (start, stop) in enumerate(pairwise(samples.offsets)):
        pooled = samples.response[start:stop].nonzero()[0] if pooling == "response" else np.arange(stop - start)[-1:]
        if not pooled.size:
            assert not actual[i].any()
            continue
        with torch.no_grad():
            ids = torch.from_numpy(samples.input_ids[start:stop]).long()[None]
            state = norm(model(ids, output_hidden_states=True).hidden_states[2])[0, pooled].mean(0)
        assert relative_error(actual[i], state / state.norm()) < 1e-6
    assert relative_error(plain_embeddings(model, samples, options), actual) < 1e-6


@pytest.mark.parametrize("token_budget", [1, 33, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_rds_is_the_position_weighted_mean_of_the_models_last_state(family, token_budget):
    model, samples = build(family), ragged(*MIXED)
    options = EmbeddingOptions(kind="rds", blocks=99)  # which `rds` does not look at
    actual = embed(model, samples, options=options, token_budget=token_budget)
    for i, (start, stop) in enumerate(pairwise(samples.offsets)):
        if start == stop:
            assert not actual[i].any()
            continue
        with torch.no_grad():
            ids = torch.from_numpy(samples.input_ids[start:stop]).long()[None]
            states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        mean = sum((place + 1) * state for place, state in enumerate(states)) / sum(range(1, len(states) + 1))
        assert relative_error(actual[i], mean / mean.norm()) < 1e-6


def with_adapters(family):
    """Adapters whose B is not zero, so that they change what the model computes."""
    model = build(family)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.3, fan_in_fan_out=family == "gpt2"
    )
    inject_adapter_in_model(config, model)
    model.to(torch.float64).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("family", EXACT)
def test_adapters_are_part_of_the_embedding(family):
    model, samples, plain = with_adapters(family), ragged(*MIXED), build(family)
    for kind in ("hidden", "rds"):
        options = EmbeddingOptions(kind=kind, blocks=2)
        assert relative_error(embed(model, samples, options=options), embed(plain, samples, options=options)) > 0.05
    options = EmbeddingOptions(blocks=2, tangents=2)
    actual = embed(model, samples, options=options, token_budget=29)
    model.eval()
    attend_plainly(model)
    assert relative_error(actual, plain_embeddings(model, samples, options)) < 1e-10


def test_quantised_weights_are_refused_by_jvp_alone():
    model = build("llama", torch.float32)
    layer = model.model.layers[1].mlp.up_proj
    packed = torch.nn.Parameter(layer.weight.detach().mul(32).round().to(torch.int8), requires_grad=False)
    layer.weight = packed
    layer.forward = lambda x: torch.nn.functional.linear(x, packed.to(x.dtype) / 32)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is torch.int8.*use kind='hidden'"):
        embed(model, ragged("..r"), options=EmbeddingOptions(blocks=2))
    for options in (
        EmbeddingOptions(kind="hidden", blocks=2),
        EmbeddingOptions(kind="rds"),
        EmbeddingOptions(blocks=1),
    ):
        assert embed(model, ragged("..r"), options=options).norm() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_a_model_spread_by_a_device_map(kind):
    """The hooks that move tensors between devices replace forward functions; the cut and the replaced ones must survive it."""
    options = EmbeddingOptions(kind=kind, blocks=2)
    expected = embed(build("llama"), ragged(*MIXED), options=options, token_budget=50)
    spread = build("llama")
    attach_execution_device_hook(spread, "cpu")
    assert relative_error(embed(spread, ragged(*MIXED), options=options, token_budget=50), expected) < 1e-12


def test_rows_have_unit_length_or_are_zero():
    rows = embed(build("llama", torch.float32), ragged(*MIXED), options=EmbeddingOptions(blocks=1), token_budget=50)
    assert rows.dtype == torch.float32
    lengths = rows.norm(dim=1)
    pooled = torch.tensor(["r" in text for text in MIXED])
    torch.testing.assert_close(lengths, pooled.float())


def test_directions_depend_on_seed_name_and_index_only():
    model = build("llama")
    two, three = (random_tangents(model.base_model, blocks, count, 4) for blocks, count in ((2, 2), (3, 3)))
    assert all(torch.equal(two[name], three[name][:2]) for name in two)
    name = "layers.1.self_attn.q_proj.weight"
    assert set(two) == {n for n, _ in model.base_model.named_parameters() if n.startswith(("layers.0.", "layers.1."))}
    assert not torch.equal(two[name][0], two[name][1])
    assert not torch.equal(two[name], random_tangents(model.base_model, 2, 2, 5)[name])
    assert not torch.equal(two[name], two[name.replace("1", "0")])
    pooled = torch.cat([tangent.flatten() for tangent in two.values()])
    assert abs(pooled.mean()) < 0.02
    assert abs(pooled.var() - 1) < 0.03


def test_long_embeddings_are_reduced_and_keep_their_angles():
    model, samples = build("gpt2"), ragged(*MIXED)
    whole = embed(model, samples, options=EmbeddingOptions(kind="hidden", blocks=2), token_budget=50)
    grams = []
    for seed in range(300):
        options = EmbeddingOptions(kind="hidden", blocks=2, max_dim=20, seed=seed)
        rows = embed(model, samples.slice(0, 2), options=options, token_budget=50)
        assert rows.shape == (2, 20)
        grams.append(float(rows[0] @ rows[1]))
    assert abs(sum(grams) / len(grams) - float(whole[0] @ whole[1])) < 0.05


@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_same_bits_twice_and_model_left_as_it_was(kind):
    model, samples = build("llama", torch.float32).train(), ragged(*MIXED)
    before = (model.config._attn_implementation, len(model.model.layers), list(model.model._modules))
    options = EmbeddingOptions(kind=kind, blocks=2)
    runs = [embed(model, samples, options=options, token_budget=40) for _ in range(2)]
    assert torch.equal(*runs)
    assert (model.config._attn_implementation, len(model.model.layers), list(model.model._modules)) == before
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_bfloat16_is_close_to_float32(kind):
    options = EmbeddingOptions(kind=kind, blocks=2)
    rows = [
        embed(build("llama", dtype), ragged(*MIXED), options=options, token_budget=40)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert rows[1].dtype == torch.float32
    assert relative_error(rows[1], rows[0]) < 0.05


def test_too_many_blocks_names_both():
    with pytest.raises(ValueError, match=r"blocks.*3 layers, not 4"):
        embed(build("llama"), ragged("..r"), options=EmbeddingOptions(blocks=4), token_budget=9)


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "rds+"), ("pooling", "mean"), ("blocks", 0), ("tangents", 0), ("max_dim", 0)]
)
def test_wrong_options_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        EmbeddingOptions(**{field: value})


def test_an_architecture_the_rules_do_not_cover_is_refused():
    model = build("llama")
    block = model.model.layers[0]
    original = block.mlp.forward
    squared = torch.nn.Module()
    squared.forward = lambda x: original(x) * original(x)
    block.mlp = squared
    with pytest.raises(ValueError, match="use kind='hidden'"):
        embed(model, ragged("..r"), options=EmbeddingOptions(blocks=2), token_budget=9)


def passes_of(model, call):
    """How often the first block runs in each of two calls."""
    seen = []
    handle = model.base_model.layers[0].register_forward_pre_hook(lambda *_: seen.append(None))
    counts = []
    for _ in range(2):
        seen.clear()
        call()
        counts.append(len(seen))
    handle.remove()
    return counts


@pytest.mark.parametrize(
    ("call", "checks"),
    [
        (lambda m, s: per_sample_gradients(m, s, projection=None), 2),  # the model's own logits, and ours
        (lambda m, s: embed(m, s, options=EmbeddingOptions(blocks=1)), 2),  # ours, and torch.func.jvp's
        (lambda m, s: embed(m, s, options=EmbeddingOptions(kind="hidden", blocks=1)), 0),
    ],
)
def test_a_model_is_checked_once(call, checks):
    model, samples = build("llama"), ragged("..rr", "..rr")
    assert passes_of(model, lambda: call(model, samples)) == [1 + checks, 1]
    other = build("llama")
    assert passes_of(other, lambda: call(other, samples)) == [1 + checks, 1], "each model object for itself"


def test_other_parameters_are_checked_too():
    """More blocks, or adapters that were added since, may hold what the rules do not cover."""
    model, samples = build("llama"), ragged("..rr")
    embed(model, samples, options=EmbeddingOptions(blocks=1))
    assert passes_of(model, lambda: embed(model, samples, options=EmbeddingOptions(blocks=2))) == [3, 1]
