"""Settings: nothing starts on a missing or weak secret, a wrong database or a name that is misspelt."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import ApiSettings, DatabaseSettings, Settings

SECRET = "s3cr3t-0123456789abcdef0123456789abcdef"
ENVIRONMENT = {
    "WINNOW_DATABASE__URL": "postgresql://user:hunter2@db/winnow",
    "WINNOW_BROKER__URL": "redis://broker:6379/0",
    "WINNOW_ARTIFACTS__URL": "s3://bucket/prefix",
    "WINNOW_MODELS__FOLDER": "/models",
    "WINNOW_SECRET_KEY": SECRET,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def wrong(settings: type[Settings]) -> set[tuple[str | int, ...]]:
    with pytest.raises(ValidationError) as caught:
        settings()
    return {error["loc"] for error in caught.value.errors()}


def test_the_environment_is_read(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WINNOW_LEDGER__LEASE_SECONDS", "37.5")
    environment.setenv("WINNOW_UPLOADS__MAX_ROWS", "10")
    environment.setenv("WINNOW_MODELS__HUB", "false")
    settings = ApiSettings()
    assert settings.database.url == "postgresql+psycopg://user:hunter2@db/winnow"
    assert (settings.ledger.lease_seconds, settings.ledger.beat_seconds) == (37.5, 10.0)
    assert settings.uploads.max_rows == 10
    assert settings.models.hub is False
    assert settings.models.folder == Path("/models")


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_api_does_not_start_without(environment: pytest.MonkeyPatch, name: str) -> None:
    environment.delenv(name)
    field = name.removeprefix("WINNOW_").lower().split("__")[0]
    assert {location[0] for location in wrong(ApiSettings)} == {field}


def test_a_worker_needs_no_secret_and_has_none(environment: pytest.MonkeyPatch) -> None:
    assert not hasattr(Settings(), "secret_key")
    environment.delenv("WINNOW_SECRET_KEY")
    Settings()


@pytest.mark.parametrize("secret", ["", "x" * 31])
def test_a_short_secret_is_refused(environment: pytest.MonkeyPatch, secret: str) -> None:
    environment.setenv("WINNOW_SECRET_KEY", secret)
    assert wrong(ApiSettings) == {("secret_key",)}


def test_the_secret_is_not_shown() -> None:
    settings = ApiSettings()
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert settings.secret_key.get_secret_value() == SECRET


def test_a_refusal_to_start_does_not_show_the_secrets_of_the_other_settings(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WINNOW_SECRET_KEY", "short-secret")
    with pytest.raises(ValidationError) as caught:
        ApiSettings()
    assert "short-secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://db/x", "postgresql+asyncpg://db/x", "", "db"])
def test_another_database_is_refused(environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("WINNOW_DATABASE__URL", url)
    assert wrong(ApiSettings) == {("database", "url")}


def test_the_driver_may_be_named() -> None:
    assert DatabaseSettings(url="postgresql+psycopg://db/x").url == "postgresql+psycopg://db/x"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WINNOW_LEDGER__LEASE_SECONDS", "0"),
        ("WINNOW_LEDGER__BEAT_SECONDS", "-1"),
        ("WINNOW_LEDGER__MAX_ATTEMPTS", "0"),
        ("WINNOW_LEDGER__SWEEP_SECONDS", "often"),
        ("WINNOW_WORKER__DEVICE", "tpu"),
        ("WINNOW_WORKER__THREADS", "-1"),
        ("WINNOW_DATABASE__POOL_SIZE", "0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)
    assert wrong(ApiSettings) == {tuple(name.removeprefix("WINNOW_").lower().split("__"))}


def test_a_misspelt_name_within_a_group_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WINNOW_LEDGER__LEASE_SECOND", "5")
    assert wrong(ApiSettings) == {("ledger", "lease_second")}


def test_settings_cannot_be_changed_after_the_start() -> None:
    settings = ApiSettings()
    for change in (
        lambda: setattr(settings, "secret_key", "x"),
        lambda: setattr(settings.ledger, "max_attempts", 9),
        lambda: setattr(settings.database, "url", "postgresql://x"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            change()


def test_a_beat_that_could_come_after_the_lease_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WINNOW_LEDGER__LEASE_SECONDS", "15")
    assert wrong(ApiSettings) == {("ledger",)}
