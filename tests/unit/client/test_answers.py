"""The client's models of answers: those of docs/openapi.json, of an older service and of a newer one."""

from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from support import client_models
from support.client_models import SCHEMAS, class_name
from support.scripted_server import Connect, Server

from winnow import UnexpectedAnswer, answers

MODELS = sorted(name for names in client_models.by_module().values() for name in names if client_models.is_model(name))


def test_the_models_are_those_that_the_document_describes() -> None:
    for module, text in client_models.modules().items():
        assert (client_models.FOLDER / f"{module}.py").read_text() == text, (
            f"docs/openapi.json has changed, and winnow/answers/{module}.py not with it: run `make openapi`"
            " (PYTHONPATH=.:tests .venv/bin/python tests/support/client_models.py), look at the diff and commit it"
        )


def test_every_answer_of_the_api_has_a_model() -> None:
    named = {name for names in client_models.answers().values() for name in names}
    assert len(named) > 20
    assert {name for name in named if not hasattr(answers, class_name(name))} == set()


def sample(schema: dict[str, Any]) -> Any:
    """A value of the schema, with a field in each object, and a value in each enumeration, that it does not have yet."""
    match schema:
        case {"$ref": ref}:
            return sample(SCHEMAS[ref.rpartition("/")[2]])
        case {"anyOf": options}:
            return sample(options[0])
        case {"properties": properties}:
            return {name: sample(each) for name, each in properties.items()} | {"of_a_later_version": [1]}
        case {"enum": _}:
            return "of a later version"
        case {"const": value}:
            return value
        case {"type": "string", "format": "date-time"}:
            return datetime(2026, 1, 31, 12, 0, 0, 250_000, UTC).isoformat().replace("+00:00", "Z")
        case {"type": "array", "prefixItems": items}:
            return [sample(item) for item in items]
        case {"type": "array", "items": items}:
            return [sample(items), sample(items)]
        case {"type": "object"}:
            patterns = schema.get("patternProperties", {}).values()
            values = next(iter(patterns), schema.get("additionalProperties"))
            return {"key": sample(values if isinstance(values, dict) else {})}
        case {"type": kind}:
            return {"string": "a text", "integer": 7, "number": 0.25, "boolean": True, "null": None}[kind]
    return {"any": ["thing", None]}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_every_field_also_those_of_a_later_version(name: str) -> None:
    sent = sample(SCHEMAS[name])
    model = getattr(answers, class_name(name))
    answer = model.model_validate(sent)
    assert answer.to_dict() == sent
    assert {field.alias or attribute for attribute, field in model.model_fields.items()} == SCHEMAS[name][
        "properties"
    ].keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_type_of_a_field_is_that_of_the_document(name: str) -> None:
    """A value of another type is refused, so that nobody computes with a text."""
    model = getattr(answers, class_name(name))
    wrong: dict[str, Any] = {
        "string": 3,
        "integer": "text",
        "number": "text",
        "boolean": "text",
        "array": 3,
        "object": 3,
    }
    for field, schema in SCHEMAS[name]["properties"].items():
        kind = schema.get("type", "object" if "$ref" in schema and client_models.is_model(_name(schema)) else None)
        if kind in wrong and "const" not in schema:
            with pytest.raises(ValueError, match="validation error"):
                model.model_validate({field: "text" if schema.get("format") == "date-time" else wrong[kind]})


def _name(schema: dict[str, Any]) -> str:
    return str(schema["$ref"].rpartition("/")[2])


def test_what_an_older_service_does_not_send_is_none() -> None:
    job = answers.SelectionJob.model_validate({"id": "job_1"})
    assert (job.id, job.status, job.get("status", "unknown"), "status" in job) == ("job_1", None, "unknown", False)
    with pytest.raises(KeyError):
        job["status"]
    assert {**job} == {"id": "job_1"}


@pytest.mark.parametrize("body", [b'{"id": 3}', b"<html>", b"[]"])
def test_what_is_no_answer_of_the_service_is_an_error(connect: Connect, body: bytes) -> None:
    with connect(Server(httpx.Response(200, content=body))) as winnow, pytest.raises(UnexpectedAnswer) as caught:
        winnow.job("job_1")
    assert "http://winnow.test" in str(caught.value)
