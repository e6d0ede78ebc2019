"""The OpenAPI document is under version control: what clients are made from changes only where someone means it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.openapi_document import document

from service.jobs.schemas import JobRequest

KEPT = Path(__file__).parents[2] / "docs" / "openapi.json"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return document()


def test_the_document_is_the_one_that_is_kept(found: dict[str, Any]) -> None:
    kept = json.loads(KEPT.read_text())
    assert found == kept, (
        "the API's document has changed: if it was meant, run `make openapi` and look at the difference"
    )


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(method, path, each) for path, methods in document["paths"].items() for method, each in methods.items()]


def test_every_call_says_what_it_does_and_what_it_answers_with(found: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(found)]
    assert len(set(names)) == len(names)
    for method, path, operation in operations(found):
        assert operation["summary"], (method, path)
        assert not operation["summary"].endswith("."), (method, path)
        if not path.startswith("/v1"):
            continue
        assert {"401", "403", "429"} <= operation["responses"].keys(), (method, path)
        for status, response in operation["responses"].items():
            assert status < "400" or list(response["content"]) == ["application/problem+json"], (method, path, status)


def test_every_list_is_a_cursor_page(found: dict[str, Any]) -> None:
    schemas = found["components"]["schemas"]
    lists = {name: schema["properties"] for name, schema in schemas.items() if _is_list(schema)}
    assert len(lists) > 8
    assert {name for name, fields in lists.items() if not {"data", "has_more", "last_id"} <= fields.keys()} == set()


def _is_list(schema: dict[str, Any]) -> bool:
    return schema.get("properties", {}).get("object", {}).get("const") == "list"


def test_the_document_has_an_example_that_is_valid_and_every_problem(found: dict[str, Any]) -> None:
    examples = found["components"]["schemas"]["JobRequest"]["examples"]
    assert examples
    for example in examples:
        JobRequest.model_validate(example)
    post = found["paths"]["/v1/selection-jobs"]["post"]
    assert post["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/SelectionPlan")
    assert post["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/SelectionJobOut")
    assert "validate" in found["components"]["schemas"]["JobRequest"]["properties"]
    assert {"200", "202", "401", "422", "503"} <= post["responses"].keys()
    for status in ("401", "422", "503"):
        assert list(post["responses"][status]["content"]) == ["application/problem+json"]
    budget = found["components"]["schemas"]["JobRequest"]["properties"]["budget"]
    assert {option["type"] for option in budget["anyOf"]} == {"integer", "number"}


def refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from refs(child)


def test_every_reference_of_the_document_leads_somewhere(found: dict[str, Any]) -> None:
    for ref in set(refs(found)):
        node = found
        for step in ref.removeprefix("#/").split("/"):
            assert step in node, ref
            node = node[step]
