"""Settings that come from files, as a container's secrets do, and passwords that go into a URL."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource, SettingsError

_FOLDER = "/run/secrets"


class SecretFiles(PydanticBaseSettingsSource):
    """A file `winnow_GROUP__NAME` in the folder is that setting.

    pydantic-settings' own sources of secrets read every file of the folder, the secrets of others too, and pass over what
    they cannot read or what links elsewhere. Here a file that is ours is read or refused.
    """

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("the files are read all at once")

    def __call__(self) -> dict[str, Any]:
        """The settings, nested by group.

        Raises:
            SettingsError: the folder that was asked for, or a file of ours, cannot be read or is empty; it names which.
        """
        asked = os.environ.get("WINNOW_SECRETS_DIR")
        folder = Path(asked or _FOLDER)
        if not asked and not folder.exists():
            return {}
        prefix = self.config["env_prefix"].lower()
        try:
            paths = sorted(path for path in folder.iterdir() if path.name.lower().startswith(prefix))
        except OSError as error:
            raise SettingsError(f"the folder of secrets {folder} cannot be read: {error.strerror}") from error
        found: dict[str, Any] = {}
        for path in paths:
            *groups, name = path.name.lower().removeprefix(prefix).split(self.config["env_nested_delimiter"])
            group = found
            for each in groups:
                group = group.setdefault(each, {})
            group[name] = _content(path)
        return found


def _content(path: Path) -> str:
    try:
        # As a shell's $(cat file) does, by which the servers of the other containers read theirs.
        content = path.read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise SettingsError(f"the secret file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SettingsError(f"the secret file {path} is not UTF-8 text") from None
    if not content:
        raise SettingsError(f"the secret file {path} is empty")
    return content


def with_password(url: str, password: str) -> str:
    """The URL with the password in it.

    Raises:
        ValueError: it has one already, or is no URL.
    """
    match = re.fullmatch(r"([^:/]+://)(?:([^/?#@:]*)(:[^/?#]*)?@)?(.*)", url, re.DOTALL)
    if match is None:
        raise ValueError("must be a URL")
    scheme, user, given, rest = match.groups()
    if (given or ":") != ":" or re.search(r"[?&]password=", rest):
        raise ValueError("holds a password, and there is a setting `password` too: take it out of one of them")
    return f"{scheme}{user or ''}:{quote(password, safe='')}@{rest}"


def without_password(url: str) -> str:
    """The URL as it may be shown; rather too much of it is hidden than too little."""
    hidden = re.sub(r"(://[^:@]*):.+@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", hidden)
