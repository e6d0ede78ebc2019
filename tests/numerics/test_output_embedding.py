"""The embedding by the output layer against autograd of the layer that it imagines, one sample at a time."""

import pytest
import torch
import transformers as tf
from accelerate.hooks import attach_execution_device_hook
from support.numerics_reference import EXACT, FAMILIES, MIXED, build, ragged, relative_error, with_adapters

from worker.influence import EmbeddingOptions, GradientProjection, UnusableInput, backward, embed, exact_gradients
from worker.influence.output_embedding import output_embeddings, plain_output_embeddings

OPTIONS = EmbeddingOptions(kind="output")
WHOLE = GradientProjection(dim=4096)
"""More than the 24 x 24 values of a tiny model, which are then kept as they are."""
SMALL = GradientProjection(dim=96, directions=8, seed=3)
PREDICTED = ["r" in text[1:] for text in MIXED]

families = pytest.mark.parametrize("family", FAMILIES)


def check(actual, expected, tolerance):
    for i, is_predicted in enumerate(PREDICTED):
        if is_predicted:
            assert relative_error(actual[i], expected[i]) < tolerance
        else:
            assert not actual[i].any()
            assert not expected[i].any()


@pytest.mark.parametrize("projection", [WHOLE, SMALL], ids=["whole", "projected"])
@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("token_budget", [1, 29, 10_000])
def test_it_is_the_gradient_of_a_layer_before_the_head(family, token_budget, projection):
    model, samples = build(family), ragged(*MIXED)
    actual = output_embeddings(model, samples, projection=projection, token_budget=token_budget)
    assert (actual.dtype, actual.shape) == (torch.float64, (len(MIXED), min(576, projection.dim)))
    check(actual, plain_output_embeddings(model, samples, projection), 1e-10)


@pytest.mark.parametrize("tied", [True, False])
@families
def test_every_family_with_its_own_head_and_with_that_of_its_inputs(family, tied):
    """Among them one that caps its logits, whose derivative is a part of the residual."""
    model, samples = build(family, tie_word_embeddings=tied), ragged(*MIXED)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    actual = embed(model, samples, options=OPTIONS, token_budget=50)
    check(actual, plain_output_embeddings(model, samples, WHOLE), 2e-6)


def test_the_cap_of_logits_changes_it():
    capped, free = (build("gemma2", final_logit_softcapping=cap) for cap in (3.0, None))
    rows = [embed(model, ragged(*MIXED), options=OPTIONS) for model in (capped, free)]
    assert relative_error(*rows) > 0.01


def test_a_family_that_scales_its_logits_is_refused():
    config = tf.CohereConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        logit_scale=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with pytest.raises(UnusableInput, match="changes its logits"):
        embed(tf.AutoModelForCausalLM.from_config(config), ragged("..rr"), options=OPTIONS)


@pytest.mark.parametrize("positions", [1, 3])
def test_no_more_logits_are_held_than_a_piece_has(positions, monkeypatch):
    model, samples = build("gpt2"), ragged(*MIXED)
    expected = embed(model, samples, options=OPTIONS)
    monkeypatch.setattr(backward, "LOGIT_BYTES", positions * 61 * 8)
    monkeypatch.setattr(exact_gradients, "PIECE_BYTES", 1)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2].shape[:-1].numel()))
    assert relative_error(embed(model, samples, options=OPTIONS), expected) < 1e-12
    assert max(seen[2:]) == positions, "after the two passes that check the head"


def test_a_row_is_of_its_own_sample_alone():
    model, samples = build("llama"), ragged(*MIXED)
    together = embed(model, samples, options=OPTIONS, token_budget=10_000)
    order = torch.randperm(len(MIXED), generator=torch.Generator().manual_seed(0))
    shuffled = embed(model, samples.take(order.numpy()), options=OPTIONS, token_budget=30)
    assert relative_error(shuffled, together[order]) < 1e-12
    for i in range(len(MIXED)):
        alone = embed(model, samples.slice(i, i + 1), options=OPTIONS)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-12)


def test_rows_have_unit_length_or_are_zero():
    for options in (OPTIONS, EmbeddingOptions(kind="output", max_dim=50)):
        rows = embed(build("llama", torch.float32), ragged(*MIXED), options=options)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.tensor(PREDICTED).float())
    assert embed(build("llama"), ragged("....", "r", ""), options=OPTIONS).abs().sum() == 0
    assert embed(build("llama"), ragged(), options=OPTIONS).shape == (0, 576)


def test_projections_keep_angles_and_depend_on_the_seed():
    model, samples = build("gpt2"), ragged(*MIXED).slice(0, 2)
    whole = embed(model, samples, options=OPTIONS)
    rows = [embed(model, samples, options=EmbeddingOptions(kind="output", max_dim=64, seed=s)) for s in range(300)]
    assert all(row.shape == (2, 64) for row in rows)
    assert not torch.equal(rows[0], rows[1])
    mean = sum(float(row[0] @ row[1]) for row in rows) / len(rows)
    assert mean == pytest.approx(float(whole[0] @ whole[1]), abs=0.03)


def test_same_bits_twice_and_the_model_left_as_it_was():
    model, samples = build("llama", torch.float32).train(), ragged(*MIXED)
    runs = [embed(model, samples, options=OPTIONS, token_budget=40) for _ in range(2)]
    assert torch.equal(*runs)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_bfloat16_is_close_to_float32():
    rows = [
        embed(build("llama", dtype), ragged(*MIXED), options=OPTIONS, token_budget=40)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert rows[1].dtype == torch.float32
    assert relative_error(rows[1], rows[0]) < 0.05


def test_adapters_are_part_of_it():
    model, samples = with_adapters(build("gpt2")), ragged(*MIXED)
    actual = embed(model, samples, options=OPTIONS, token_budget=29)
    assert relative_error(actual, embed(build("gpt2"), samples, options=OPTIONS)) > 0.05
    check(actual, plain_output_embeddings(model.eval(), samples, WHOLE), 1e-10)


def test_weights_may_be_quantised():
    """No derivative passes through the blocks."""
    model = build("llama", torch.float32)
    layer = model.model.layers[1].mlp.up_proj
    packed = torch.nn.Parameter(layer.weight.detach().mul(32).round().to(torch.int8), requires_grad=False)
    rounded = build("llama", torch.float32)
    rounded.model.layers[1].mlp.up_proj.weight.data = packed.float() / 32
    layer.weight = packed
    layer.forward = lambda x: torch.nn.functional.linear(x, packed.to(x.dtype) / 32)
    rows = [embed(each, ragged(*MIXED), options=OPTIONS) for each in (model, rounded)]
    assert relative_error(*rows) < 1e-5


def test_a_model_spread_by_a_device_map():
    expected = embed(build("llama"), ragged(*MIXED), options=OPTIONS, token_budget=50)
    spread = build("llama")
    attach_execution_device_hook(spread, "cpu")
    assert relative_error(embed(spread, ragged(*MIXED), options=OPTIONS, token_budget=50), expected) < 1e-12
