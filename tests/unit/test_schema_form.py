"""A form of a schema, and what a filled one stands for."""

from typing import Any

import pytest

from service.jobs.schemas import JobRequest
from service.plan.parameters import Parameters
from service.web import schema_form

FIELDS = schema_form.fields(Parameters.model_json_schema())
LEAVES = {leaf.path: leaf for field in FIELDS for leaf in field.leaves()}


def test_every_parameter_has_a_field_with_its_description() -> None:
    def described(schema: dict[str, Any], model: Any, path: str = "") -> None:
        for name, prop in schema["properties"].items():
            options = [option for option in prop.get("anyOf", [prop]) if option.get("type") != "null"]
            ref = options[0].get("$ref", "").rpartition("/")[2] if len(options) == 1 else ""
            if ref:
                described(model["$defs"][ref], model, f"{path}{name}.")
            else:
                assert LEAVES[f"{path}{name}"].description == prop.get("description", "")

    whole = Parameters.model_json_schema()
    described(whole, whole)
    assert {"warmup", "warmup.lora"} == {group.path for field in FIELDS for group in field.groups()}


def test_an_empty_form_is_an_empty_request() -> None:
    assert schema_form.values(dict.fromkeys(LEAVES, ""), FIELDS) == {}


def test_defaults_are_those_of_the_model() -> None:
    written = Parameters().model_dump(mode="json")
    for path, leaf in LEAVES.items():
        if path.startswith("warmup.") or not leaf.default:
            continue
        value: Any = written
        for part in path.split("."):
            value = value[part]
        assert schema_form.values({path: leaf.default}, FIELDS) == nested(path, value), path


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return dict(value)


@pytest.mark.parametrize(
    ("form", "request_"),
    [
        ({"landmarks.count": "128"}, {"landmarks": {"count": 128}}),
        ({"kernel.ridge": "1e-2", "kernel.kind": "rbf"}, {"kernel": {"ridge": 0.01, "kind": "rbf"}}),
        ({"refine.size": "auto"}, {"refine": {"size": "auto"}}),
        ({"refine.size": "2"}, {"refine": {"size": 2}}),
        ({"validate": "false"}, {"validate": False}),
        ({"gradient.modules": "7"}, {"gradient": {"modules": "7"}}),
        ({"optimizer.betas": "[0.8, 0.9]"}, {"optimizer": {"betas": [0.8, 0.9]}}),
        ({"template_arguments": '{"enable_thinking": false}'}, {"template_arguments": {"enable_thinking": False}}),
        ({"warmup.samples": "100"}, {}),
        ({"warmup": "on", "warmup.samples": "100"}, {"warmup": {"samples": 100}}),
        ({"warmup": "on", "warmup.lora": "on"}, {"warmup": {"lora": {}}}),
        ({"warmup.lora": "on", "warmup.lora.rank": "8"}, {}),
        ({"gradient.projection_dim": "null"}, {"gradient": {"projection_dim": None}}),
        ({"min_fidelity": "NaN"}, {"min_fidelity": "NaN"}),
        ({"seed": "many"}, {"seed": "many"}),
        ({"nobody": "knows"}, {}),
    ],
)
def test_a_filled_form_is_the_request(form: dict[str, str], request_: dict[str, Any]) -> None:
    assert schema_form.values(form, FIELDS) == request_


@pytest.mark.parametrize(
    ("param", "path"),
    [("landmarks.count", "landmarks.count"), ("refine.size.float", "refine.size"), ("pool", "pool"), ("nothing", "")],
)
def test_an_error_is_shown_at_its_field(param: str, path: str) -> None:
    fields = schema_form.fields(JobRequest.model_json_schema(), ("pool", "target"))
    assert schema_form.error_path(param, fields, ("pool",)) == path
