"""Parameters: what is refused and where, defaults that depend on others, and what was stored staying readable."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.jobs.schemas import JobRequest
from service.plan.artifact_keys import rendering, tokens_key
from service.plan.parameters import JobParameters, Parameters

ADAMW = {"type": "adamw"}
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"method": "exact_influence", "selection": "weighted"},
    {"method": "exact_influence", "selection": "weighted", "optimizer": {"type": "sgd"}, "curvature": {"type": "ggn"}},
    {"method": "rds_plus", "warmup": {"samples": 10}},
    {"method": "random", "validate": False, "quantization": "nf4"},
    {"optimizer": {**ADAMW, "weight_decay": 0.1, "scaling": "factored"}, "warmup": {"lora": {"modules": "mlp"}}},
    {"optimizer": {"type": "sgd", "momentum": 0.9, "weight_decay": 0.01}},
    {"selection": "weighted", "optimizer": ADAMW, "curvature": {"type": "hessian", "rank": 64}, "warmup": {}},
    {"selection": "weighted", "gradient": {"normalize": True}},
    {"refine": {"size": 2.4, "rounds": 4}},
    {"refine": {"max_cost": 0.5, "min_captured": 0.9}, "kernel": {"kind": "laplacian", "bandwidth": 1.5}},
    {"refine": {"share": 0.3, "rounds": 2}, "embedding": {"kind": "text_hidden", "blocks": 2}},
    {"refine": 0, "min_fidelity": 0.9, "embedding": {"kind": "hidden", "blocks": 2, "pooling": "last"}},
    {"embedding": {"kind": "rds"}, "kernel": {"kind": "linear"}, "quantization": "int8"},
    {"embedding": {"kind": "output"}, "quantization": "nf4"},
    {"gradient": {"modules": "self_attn.o_proj", "projection_dim": None}, "landmarks": {"choice": "stratified"}},
    {"warmup": {"lora": {}}, "gradient": {"modules": "lora"}},
    {
        "reasoning": "strip",
        "template_arguments": {"enable_thinking": False, "effort": "low", "n": 3, "x": 0.5, "no": None},
    },
    {"method": "random", "reasoning": "strip"},
]


@pytest.mark.parametrize("given", ACCEPTED)
def test_the_echo_of_accepted_parameters_is_accepted_and_the_same(given: dict[str, Any]) -> None:
    echo = Parameters.model_validate(given).model_dump(mode="json")
    assert "validate" in echo
    assert Parameters.model_validate(echo).model_dump(mode="json") == echo
    assert JobParameters.model_validate(echo).model_dump(mode="json") == echo


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"method": "exact_influence", "landmarks": {"count": 8}}, "landmarks", "approximates nothing"),
    ({"method": "exact_influence", "embedding": {"kind": "jvp"}}, "embedding", "approximates nothing"),
    ({"method": "exact_influence", "kernel": {"ridge": 1}}, "kernel", "approximates nothing"),
    ({"method": "exact_influence", "refine": 0.5}, "refine", "approximates nothing"),
    ({"method": "exact_influence", "min_fidelity": 0.5}, "min_fidelity", "approximates nothing"),
    ({"method": "rds_plus", "gradient": {"normalize": True}}, "gradient", "hidden states"),
    ({"method": "rds_plus", "optimizer": ADAMW}, "optimizer", "hidden states"),
    ({"method": "rds_plus", "curvature": {"type": "ggn"}}, "curvature", "hidden states"),
    ({"method": "rds_plus", "embedding": {"kind": "hidden", "tangents": 4}}, "embedding", "hidden states"),
    ({"method": "rds_plus", "selection": "weighted"}, "selection", "needs gradients"),
    ({"method": "random", "selection": "top_k"}, "selection", "seed alone"),
    ({"method": "random", "warmup": {}}, "warmup", "seed alone"),
    ({"method": "random", "optimizer": {"type": "sgd", "momentum": 0.9}}, "optimizer", "seed alone"),
    ({"embedding": {"kind": "hidden", "tangents": 3}}, "embedding.tangents", "embedding.kind jvp, not hidden"),
    ({"embedding": {"kind": "text", "blocks": 3}}, "embedding.blocks", "not text"),
    ({"refine": {"share": 0.2, "size": 2}}, "refine.share", "takes the place"),
    ({"refine": {"size": 2, "max_cost": 0.5}}, "refine.max_cost", "size auto"),
    ({"refine": {"share": 0.2, "min_captured": 0.5}}, "refine.min_captured", "size auto"),
    ({"embedding": {"kind": "rds", "blocks": 3}}, "embedding.blocks", "not rds"),
    ({"embedding": {"kind": "rds", "pooling": "last"}}, "embedding.pooling", "not rds"),
    ({"embedding": {"kind": "output", "blocks": 3}}, "embedding.blocks", "not output"),
    ({"embedding": {"kind": "output", "pooling": "last"}}, "embedding.pooling", "not output"),
    ({"embedding": {"kind": "output", "tangents": 3}}, "embedding.tangents", "not output"),
    ({"kernel": {"kind": "linear", "bandwidth": 1.0}}, "kernel.bandwidth", "rbf, not linear"),
    ({"optimizer": {**ADAMW, "momentum": 0.9}}, "optimizer.momentum", "optimizer.type sgd, not adamw"),
    ({"optimizer": {"weight_decay": 0.1}}, "optimizer.weight_decay", "not none"),
    ({"optimizer": {"type": "sgd", "betas": [0.8, 0.9]}}, "optimizer.betas", "adam or adamw, not"),
    ({"optimizer": {"type": "sgd", "eps": 1e-4}}, "optimizer.eps", "adam or adamw, not"),
    ({"optimizer": {"scaling": "factored"}}, "optimizer.scaling", "adam or adamw, not"),
    ({"optimizer": {**ADAMW, "betas": [0.9, 1.0]}}, "optimizer.betas.1", "less than 1"),
    ({"optimizer": {"type": "sgd"}, "curvature": {"type": "ggn"}}, "curvature.type", "selection weighted, not"),
    ({"selection": "weighted", "curvature": {"type": "fisher"}}, "curvature.type", "other than none"),
    ({"selection": "weighted", "curvature": {"rank": 8}}, "curvature.rank", "ggn or hessian, not none"),
    (
        {"selection": "weighted", "optimizer": ADAMW, "curvature": {"type": "fisher", "rank": 8}, "warmup": {}},
        "curvature.rank",
        "not fisher",
    ),
    (
        {
            "selection": "weighted",
            "optimizer": {"type": "sgd"},
            "curvature": {"type": "ggn"},
            "gradient": {"normalize": True},
        },
        "gradient.normalize",
        "must be false",
    ),
    ({"quantization": "nf4", "embedding": {"kind": "jvp"}}, "embedding.kind", "derivatives by the weights"),
    ({"quantization": "int8", "warmup": {}}, "warmup.lora", "cannot be trained"),
    ({"warmup": {}, "optimizer": {"type": "sgd", "momentum": 0.9}}, "optimizer.momentum", "registered sgd state"),
    ({"warmup": {"lora": {}}, "gradient": {"modules": "o_proj"}}, "gradient.modules", "adapters"),
]
BAD_ARGUMENTS: list[dict[str, Any]] = [
    {"messages": "x"},
    {"bos_token": "x"},
    {"no-name": 1},
    {"x" * 65: 1},
    {"x": [1]},
    {"x": {"y": 1}},
    {"x": "y" * 1001},
    {"x": "\x00"},
    {"x": 2**60},
    {f"x{i}": i for i in range(33)},
]


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS)
def test_arguments_of_templates_are_few_short_scalars(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        Parameters.model_validate({"template_arguments": arguments})
    assert {error["loc"][0] for error in refused.value.errors()} == {"template_arguments"}


def test_tokens_depend_on_how_they_are_rendered_and_not_on_defaults() -> None:
    def key(**parameters: Any) -> str:
        return tokens_key("d", "t", 64, None, rendering(Parameters.model_validate(parameters).model_dump(mode="json")))

    thinking = {"template_arguments": {"enable_thinking": True}}
    assert key() == key(reasoning="keep", template_arguments={}) == tokens_key("d", "t", 64, None, rendering({}))
    keys = [key(), key(reasoning="strip"), key(**thinking), key(template_arguments={"enable_thinking": 1})]
    assert len({*keys, key(reasoning="strip", **thinking)}) == len(keys) + 1


@pytest.mark.parametrize(("given", "path", "reason"), REFUSED)
def test_what_cannot_be_used_is_refused_at_its_field_with_the_reason(
    given: dict[str, Any], path: str, reason: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        Parameters.model_validate(given)
    (error,) = refused.value.errors()
    assert ".".join(map(str, error["loc"])) == path
    assert reason in error["msg"]


def test_all_refusals_are_reported_together() -> None:
    with pytest.raises(ValidationError) as refused:
        Parameters.model_validate({"kernel": {"kind": "linear", "bandwidth": 1}, "optimizer": {"weight_decay": 1}})
    assert [error["loc"] for error in refused.value.errors()] == [
        ("kernel", "bandwidth"),
        ("optimizer", "weight_decay"),
    ]


@pytest.mark.parametrize(("given", "path", "reason"), [case for case in REFUSED if case[1] != "optimizer.betas.1"])
def test_what_an_older_version_accepted_stays_readable(given: dict[str, Any], path: str, reason: str) -> None:
    assert JobParameters.model_validate(given).method == given.get("method", "influence_distillation")


@pytest.mark.parametrize(
    ("given", "normalize"),
    [
        ({}, True),
        ({"selection": "weighted"}, True),
        ({"selection": "weighted", "gradient": {"normalize": False}}, False),
        ({"selection": "weighted", "optimizer": {"type": "sgd"}, "curvature": {"type": "fisher"}}, False),
        ({"gradient": {"normalize": False, "projection_dim": 64}}, False),
        ({"method": "rds_plus"}, None),
        ({"method": "random"}, None),
    ],
)
def test_influence_is_a_cosine_unless_there_is_a_curvature(given: dict[str, Any], normalize: bool | None) -> None:
    assert Parameters.model_validate(given).gradient.normalize is normalize


@pytest.mark.parametrize(("short", "full"), [
    ("auto", {}), (0, {"size": 0}), (0.2, {"share": 0.2, "rounds": 1}), (1.0, {"share": 1.0, "rounds": 1}),
])  # fmt: skip
def test_refine_has_short_forms(short: Any, full: dict[str, Any]) -> None:
    assert Parameters.model_validate({"refine": short}) == Parameters.model_validate({"refine": full})


@pytest.mark.parametrize("refine", [2.4, -0.1, "some", True, None, {"size": -1}, {"size": 0.5}, {"rounds": 0}])
def test_refine_is_refused_where_it_says_nothing(refine: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        Parameters.model_validate({"refine": refine})
    assert {error["loc"][0] for error in refused.value.errors()} == {"refine"}


def test_who_gives_multiples_of_the_budget_as_a_number_is_shown_how() -> None:
    with pytest.raises(ValidationError) as refused:
        Parameters.model_validate({"refine": 2.4})
    (error,) = refused.value.errors()
    assert (error["loc"], '{"size": 2.4}' in error["msg"]) == (("refine",), True)


@pytest.mark.parametrize(("kind", "rate"), [("none", 1e-3), ("sgd", 1e-3), ("adam", 2e-5), ("adamw", 2e-5)])
def test_the_learning_rate_follows_the_optimizer(kind: str, rate: float) -> None:
    parameters = Parameters.model_validate({"optimizer": {"type": kind}})
    assert parameters.optimizer.learning_rate == rate
    assert Parameters.model_validate({"optimizer": {"type": kind, "learning_rate": 0.5}}).optimizer.learning_rate == 0.5


def test_a_default_that_is_written_out_is_not_taken_for_what_was_sent() -> None:
    sent = {"model": "m", "pool": "p", "target": "t", "budget": 1, "optimizer": {"type": "sgd"}, "validate": False}
    request = JobRequest.model_validate(sent)
    assert request.model_dump(mode="json", exclude_unset=True) == sent
    assert request.parameters() == Parameters(optimizer={"type": "sgd"}, validate=False).model_dump(mode="json")


def test_defaults_are_not_shared() -> None:
    curved = {"selection": "weighted", "optimizer": {"type": "sgd"}, "curvature": {"type": "ggn"}}
    changed = Parameters.model_validate(curved)
    assert (changed.gradient.normalize, Parameters().gradient.normalize) == (False, True)
