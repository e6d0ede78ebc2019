"""What docker-compose.yml and the Dockerfile say, as docker would read it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}|(?P<wrong>))")


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """`${NAME:-default}` and `$$` in every string, as compose has them; its other forms are not used."""
    if isinstance(value, dict):
        return {key: interpolated(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolated(each, variables) for each in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        assert match["wrong"] is None, f"a single $ in {value!r}"
        if match["dollar"]:
            return "$"
        found = variables.get(match["name"]) or match["default"]
        assert found is not None, f"{match['name']} has no default"
        return str(found)

    return _VARIABLE.sub(replaced, value)


def compose(**variables: str) -> dict[str, Any]:
    return dict(interpolated(yaml.safe_load(COMPOSE.read_text()), variables))


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in order, each on one line."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, rest.strip()) for line in text.splitlines() if line for name, _, rest in [line.partition(" ")]]


def stage(target: str) -> list[tuple[str, str]]:
    """The instructions of a stage, behind those of the stages that it is built on."""
    stages: dict[str, list[tuple[str, str]]] = {}
    own: list[tuple[str, str]] = []
    for name, rest in instructions():
        if name == "FROM":
            base, _, title = rest.partition(" AS ")
            own = stages[title] = list(stages.get(base, []))
        own.append((name, rest))
    return stages[target]


def image_environment(target: str) -> dict[str, str]:
    """What the image's ENV sets; `$PATH` in it is left as it is."""
    return dict(pair.split("=", 1) for name, rest in stage(target) if name == "ENV" for pair in rest.split())


def image_command(target: str) -> list[str]:
    return list(json.loads(next(rest for name, rest in stage(target) if name == "CMD")))


def target_of(service: Mapping[str, Any]) -> str | None:
    """The stage of the Dockerfile that the service's image is built from; None for an image that is not ours."""
    found = re.fullmatch(r"winnow-(api|worker)(-cuda)?:.*", service["image"])
    return found and found[1]


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))
