"""Hooked, projected, batched gradients against autograd.grad one sample at a time (METHOD 9, point 1)."""

import numpy as np
import pytest
import torch
from numerics_reference import EXACT, FAMILIES, MIXED, VOCAB, build, one_by_one_gradients, ragged, relative_error

from worker.influence import FactoredProjection, Samples, per_sample_gradients

FLOAT32_INTERNALS = 1e-6  # what float32 norms and softmax inside a float64 model leave


@pytest.mark.parametrize("projection", [None, FactoredProjection(dim=192, seed=3)], ids=["full", "projected"])
@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("token_budget", [1, 23, 10_000])
def test_equals_autograd_one_sample_at_a_time(family, token_budget, projection):
    model, samples = build(family), ragged(*MIXED)
    expected, loss = one_by_one_gradients(model, samples, projection)
    result = per_sample_gradients(model, samples, projection=projection, token_budget=token_budget)
    assert result.values.dtype == torch.float64
    torch.testing.assert_close(result.loss, loss, rtol=1e-10, atol=1e-12)
    for i in range(len(samples)):
        if expected[i].norm() > 0:
            assert relative_error(result.values[i], expected[i]) < 1e-10
        else:
            assert not result.values[i].any()
    assert result.nonfinite.numel() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model, samples = build(family), ragged(*MIXED)
    projection = FactoredProjection(dim=192, seed=1)
    expected, loss = one_by_one_gradients(model, samples, projection)
    result = per_sample_gradients(model, samples, projection=projection, token_budget=30)
    assert relative_error(result.values, expected) < FLOAT32_INTERNALS
    torch.testing.assert_close(result.loss, loss, rtol=FLOAT32_INTERNALS, atol=0)


@pytest.mark.parametrize("family", EXACT)
def test_does_not_depend_on_order_or_company(family):
    model, samples = build(family), ragged(*MIXED)
    projection = FactoredProjection(dim=192)
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
        per_sample_gradients(model, samples, projection=FactoredProjection(dim=192), token_budget=40) for _ in range(2)
    ]
    assert torch.equal(runs[0].values, runs[1].values)
    assert torch.equal(runs[0].loss, runs[1].loss)


def test_float32_and_bfloat16_are_close_to_float64():
    samples, projection = ragged(*MIXED), FactoredProjection(dim=192)
    exact = per_sample_gradients(build("llama"), samples, projection=projection, token_budget=40)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
        result = per_sample_gradients(build("llama", dtype), samples, projection=projection, token_budget=40)
        assert result.values.dtype == torch.float32
        assert relative_error(result.values.double(), exact.values) < tolerance


def test_bfloat16_outer_products_accumulate_in_float32():
    """A thousand equal small terms: a bfloat16 sum would stop growing near 256 times a term."""
    from worker.influence.gradients import _PerSample

    model = torch.nn.Embedding(1, 1)
    model.get_input_embeddings = lambda: model
    use = _PerSample(model, {"layer": torch.nn.Linear(1, 1)}, None, None, 1)
    ones = torch.ones(1, 1001, 1, dtype=torch.bfloat16)
    use.start(torch.arange(1))
    use.take("layer", use.keep("layer", ones), ones)
    use.finish(torch.arange(1))
    assert use.values_nk.item() == 1001


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
    result = per_sample_gradients(model, samples, projection=FactoredProjection(dim=192), token_budget=99)
    affected = [i for i in range(3) if samples.input_ids[4] in samples.input_ids[4 * i : 4 * i + 3]]
    assert result.nonfinite.tolist() == affected


@pytest.mark.parametrize("limit", [19, 6])
def test_out_of_memory_halves_the_budget(limit):
    model, samples = build("gpt2"), ragged(*MIXED)
    projection = FactoredProjection(dim=192)
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
