"""The same request as curl, Python and the command line have it. The key stays in the environment."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Snippet:
    title: str
    text: str


def of_request(request: Json, host: str) -> list[Snippet]:
    """`request`: the body of the job's POST, as it was sent; empty where a version that did not keep it has made the job."""
    if not request:
        return []
    return [
        Snippet("curl", _curl(request, host)),
        Snippet("Python", _python(request, host)),
        Snippet("Command line", _command(request, host)),
    ]


def _curl(request: Json, host: str) -> str:
    body = json.dumps(request, indent=2, ensure_ascii=False)
    return (
        f'curl -sH "Authorization: Bearer $WINNOW_API_KEY" -H "Content-Type: application/json" \\\n'
        f"  {host}/v1/selection-jobs -d {shlex.quote(body)}"
    )


def _python(request: Json, host: str) -> str:
    arguments = "".join(f"        {name}={value!r},\n" for name, value in request.items())
    return (
        "import os\n\nfrom winnow.client import Winnow\n\n"
        f'with Winnow({host!r}, os.environ["WINNOW_API_KEY"]) as winnow:\n'
        f"    job = winnow.create_job(\n{arguments}    )\n"
    )


def _command(request: Json, host: str) -> str:
    rest = {name: value for name, value in request.items() if name not in ("pool", "target", "model", "budget")}
    model, target = request["model"], request["target"]
    whole = [f"{name}={_json(request[name])}" for name in ("model", "target") if isinstance(request[name], dict)]
    model = model["id"] if isinstance(model, dict) else model
    target = f"preset:{target['preset']}" if isinstance(target, dict) else target
    parts = ["winnow", "submit", request["pool"], target, "--model", model, "--budget", str(request["budget"])]
    lines = [shlex.join(parts), *(f"  --set {shlex.quote(setting)}" for setting in (*whole, *_settings(rest)))]
    return f"export WINNOW_URL={shlex.quote(host)}\n" + " \\\n".join(lines)


def _settings(values: Json, path: str = "") -> Iterator[str]:
    """`NAME=VALUE` for each value; those of an object by a path, unless one of its names cannot be part of one."""
    for name, value in values.items():
        if isinstance(value, dict) and value and not any(set(key) & set(".=") for key in value):
            yield from _settings(value, f"{path}{name}.")
        else:
            yield f"{path}{name}={_json(value)}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
