"""The page of settings, from the classes that read them."""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from service.settings import ApiSettings


def page() -> str:
    """A table for each group, in the order of service/settings.py."""
    lines = [
        "# Settings",
        "",
        "Environment variables, or files of the same names in small letters in `/run/secrets` (`WINNOW_SECRETS_DIR`: another"
        " folder). Those in bold have no default. `secret_key`, `requests`, `uploads`, `datasets`, `limits`, `shares`, `web` and"
        " `webhooks` are the API's alone; the others are those of workers, too.",
    ]
    single = {name: field for name, field in ApiSettings.model_fields.items() if not _is_group(field)}
    lines += _table("WINNOW_", single)
    for name, field in ApiSettings.model_fields.items():
        if _is_group(field):
            group: Any = field.annotation
            lines += ["", f"## {name.capitalize()}", ""]
            lines += [_cell(group.__doc__ or "")]
            lines += _table(f"WINNOW_{name.upper()}__", group.model_fields)
    return "\n".join(lines)


def _table(prefix: str, fields: dict[str, FieldInfo]) -> list[str]:
    lines = ["", "| setting | default | |", "| --- | --- | --- |"]
    for name, field in fields.items():
        variable = f"`{prefix}{name.upper()}`"
        required = field.default is PydanticUndefined
        default = "" if required or field.default in (None, "") else f"`{_cell(_plain(field.default))}`"
        lines.append(
            f"| {f'**{variable}**' if required else variable} | {default} | {_cell(field.description or '')} |"
        )
    return lines


def _is_group(field: FieldInfo) -> bool:
    kind: Any = field.annotation
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _plain(value: object) -> object:
    return "[]" if value == () else value


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
