"""`winnow doctor`: runs every check of the service, with the settings that API and workers read, from this machine."""

from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import Engine
from sqlalchemy.exc import ArgumentError

from service.db.engine import make_engine
from service.health.checks import CHECKS, CheckResult, System, run_checks
from service.settings import (
    ApiSettings,
    ArtifactSettings,
    BrokerSettings,
    DatabaseSettings,
    ModelSettings,
    Settings,
    settings_problem,
)
from winnow.stack import running_stack


def examine(home: Path | None = None, *, deep: bool = False) -> list[CheckResult]:
    """All results in order, for the settings in the environment, or for the stack running from `home`. `deep`: every file of
    the artifact store is read, which may take hours."""
    remedy = "set them in the environment or in files, as for the API and the workers"
    try:
        settings = _settings(home)
        engine = _engine(settings)
    except LookupError as error:
        problem, remedy = str(error), "start one with `winnow up`, or omit --home"
    except ValueError as error:
        problem = settings_problem(error)
    else:
        has_key = "with" if isinstance(settings, ApiSettings) else "without"
        try:
            return [
                CheckResult("settings", "ok", f"readable, {has_key} the API's secret key"),
                *run_checks(System(settings, engine, deep=deep)),
            ]
        finally:
            engine.dispose()
    return [
        CheckResult("settings", "FAIL", problem, remedy),
        *(CheckResult(check.name, "skipped", "not checked without settings") for check in CHECKS),
    ]


def _engine(settings: Settings) -> Engine:
    try:
        return make_engine(DatabaseSettings(url=settings.database.url, pool_size=1))
    except (ArgumentError, ValueError):  # they quote a part of the URL, which may be of a password
        advice = "special characters in a password must be percent-encoded (%XX)"
        raise ValueError(f"WINNOW_DATABASE__URL is not a valid URL; {advice}") from None


def _settings(home: Path | None) -> Settings:
    if home is not None:
        stack = running_stack(home)
        if stack is None:
            raise LookupError(f"no stack is running from {home}")
        return Settings(
            database=DatabaseSettings(url=stack.database_url),
            broker=BrokerSettings(url=stack.broker_url),
            artifacts=ArtifactSettings(url=str(stack.home / "artifacts")),
            models=ModelSettings(folder=stack.home / "models", hub=("*/*",)),
        )
    try:
        return ApiSettings()
    except ValidationError as error:
        if any(e["loc"] != ("secret_key",) or e["type"] != "missing" for e in error.errors()):
            raise
        return Settings()  # as on a worker's machine
