"""The OpenAPI document: FastAPI's own, with every error described as what it is, one problem+json schema."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from service.http.errors import MEDIA_TYPE, FieldError, Problem, RequestTimeout, TooLarge, responses

_REF = "#/components/schemas/{model}"
_FRAMEWORKS_OWN = ("HTTPValidationError", "ValidationError")  # bodies that no route answers with

_WITH_BODY = ("post", "put", "patch")


def install(app: FastAPI, bodies: Sequence[type[BaseModel]] = ()) -> None:
    """Makes `app.openapi()` give the document; it is built once. `bodies`: models that only descriptions of bodies name."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _build(app, bodies)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # the way FastAPI documents for extending it


def _build(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(m, "serialization") for m in (Problem, FieldError)]
    models += [(m, "validation") for m in bodies]
    _, definitions = models_json_schema(models, ref_template=_REF)
    schemas = document["components"]["schemas"]
    schemas.update(definitions["$defs"])
    for name in _FRAMEWORKS_OWN:
        schemas.pop(name, None)
    problem = {MEDIA_TYPE: {"schema": {"$ref": _REF.format(model="Problem")}}}
    for operations in document["paths"].values():
        for method, operation in operations.items():
            if method in _WITH_BODY:  # read or not: bodies.py looks at it first
                for status, response in responses(RequestTimeout, TooLarge).items():
                    operation["responses"].setdefault(str(status), response)
            for parameter in operation.get("parameters", []):
                schema = parameter["schema"]
                some = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
                if len(some) == 1:  # a parameter cannot be sent as null: one that reads `null` is refused
                    del schema["anyOf"]
                    schema.update(some[0])
            for status, response in operation["responses"].items():
                if status >= "400":
                    response["content"] = problem
    return document
