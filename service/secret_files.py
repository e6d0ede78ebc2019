"""Settings that come from files, as a container's secrets do, and passwords that go into a URL."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from pydantic_settings import EnvSettingsSource, SettingsError

_FOLDER = "/run/secrets"


class SecretFiles(EnvSettingsSource):
    """Reads each file `winnow_GROUP__NAME` of the folder as if it were the environment variable of that name.

    The secrets sources of pydantic-settings read every file of the folder, other services' secrets too, and pass over what
    they cannot read or what links elsewhere. This one reads only our files, and rejects what it cannot read.
    """

    def _load_env_vars(self) -> Mapping[str, str | None]:
        """The content of our files by their names.

        Raises:
            SettingsError: the folder of WINNOW_SECRETS_DIR, or one of the files, cannot be read or is empty; it names which.
        """
        asked = os.environ.get("WINNOW_SECRETS_DIR")
        folder = Path(asked or _FOLDER)
        if not asked and not folder.exists():
            return {}
        try:
            paths = sorted(path for path in folder.iterdir() if path.name.lower().startswith(self.env_prefix.lower()))
        except OSError as error:
            raise SettingsError(f"the folder of secrets {folder} cannot be read: {error.strerror}") from error
        return {path.name.lower(): _content(path) for path in paths}


def _content(path: Path) -> str:
    try:
        # Like a shell's $(cat file), with which the servers of the other containers read theirs.
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
        raise ValueError("contains a password, but the setting `password` is set too: remove one of the two")
    return f"{scheme}{user or ''}:{quote(password, safe='')}@{rest}"


def without_password(url: str) -> str:
    """The URL without its password, for display; when in doubt it hides too much."""
    hidden = re.sub(r"(://[^:@]*):.+@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", hidden)
