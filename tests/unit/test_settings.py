"""Settings: nothing starts on a missing or weak secret, a wrong database or a name that is misspelt."""

from pathlib import Path

import pytest
import redis
from pydantic import SecretStr, ValidationError
from sqlalchemy.engine import make_url

from service.settings import ApiSettings, BrokerSettings, DatabaseSettings, Settings, database_settings

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
    monkeypatch.setenv("WINNOW_SECRETS_DIR", str(tmp_path))
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
    environment.setenv("WINNOW_MODELS__HUB", '["Qwen/*", "HuggingFaceTB/SmolLM2-*"]')
    settings = ApiSettings()
    assert settings.database.url == "postgresql+psycopg://user:hunter2@db/winnow"
    assert (settings.ledger.lease_seconds, settings.ledger.beat_seconds) == (37.5, 10.0)
    assert settings.uploads.max_rows == 10
    assert settings.models.hub == ("Qwen/*", "HuggingFaceTB/SmolLM2-*")
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


def test_the_secret_is_not_shown() -> None:
    settings = ApiSettings()
    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert settings.secret_key.get_secret_value() == SECRET


def test_a_refusal_to_start_does_not_show_the_secrets_of_the_other_settings(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WINNOW_SECRET_KEY", "short-secret")
    with pytest.raises(ValidationError) as caught:
        ApiSettings()
    assert "short-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "location"),
    [
        *(
            ("SECRET_KEY", secret, ("secret_key",))
            for secret in ("", "x" * 31, "x" * 64, "0123" * 16, "change-me-" + "0123456789abcdef" * 2)
        ),
        ("SECRET_KEY", "an example, replace it: 0123456789abcdef", ("secret_key",)),
        *(
            ("DATABASE__URL", url, ("database", "url"))
            for url in ("sqlite:///x.db", "mysql://db/x", "postgresql+asyncpg://db/x", "", "db")
        ),
        ("DATABASE__POOL_SIZE", "0", ("database", "pool_size")),
        ("LEDGER__LEASE_SECONDS", "0", ("ledger", "lease_seconds")),
        ("LEDGER__LEASE_SECONDS", "15", ("ledger",)),  # the default heartbeat could come after the end of the lease
        ("LEDGER__LEASE_SECOND", "5", ("ledger", "lease_second")),
        ("LEDGER__BEAT_SECONDS", "-1", ("ledger", "beat_seconds")),
        ("LEDGER__MAX_ATTEMPTS", "0", ("ledger", "max_attempts")),
        ("LEDGER__SWEEP_SECONDS", "often", ("ledger", "sweep_seconds")),
        ("WORKER__DEVICE", "tpu", ("worker", "device")),
        ("WORKER__THREADS", "-1", ("worker", "threads")),
        ("WORKER__MEMORY_BYTES", "-2", ("worker", "memory_bytes")),
    ],
)
def test_an_invalid_value_or_a_misspelt_name_is_refused_by_its_name(
    environment: pytest.MonkeyPatch, name: str, value: str, location: tuple[str, ...]
) -> None:
    environment.setenv(f"WINNOW_{name}", value)
    assert wrong(ApiSettings) == {location}


def test_the_driver_may_be_named() -> None:
    assert DatabaseSettings(url="postgresql+psycopg://db/x").url == "postgresql+psycopg://db/x"


def test_settings_cannot_be_changed_after_the_start() -> None:
    settings = ApiSettings()
    for change in (
        lambda: setattr(settings, "secret_key", "x"),
        lambda: setattr(settings.ledger, "max_attempts", 9),
        lambda: setattr(settings.database, "url", "postgresql://x"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            change()


PASSWORD = "p@ss/w:r d%?#[+&'"


@pytest.fixture
def files(environment: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The secrets as a container has them: files, and an environment that holds none."""
    environment.delenv("WINNOW_SECRET_KEY")
    environment.setenv("WINNOW_DATABASE__URL", "postgresql://user@db/winnow")
    (tmp_path / "winnow_secret_key").write_text(SECRET + "\n")
    (tmp_path / "winnow_database__password").write_text(PASSWORD + "\n")
    (tmp_path / "winnow_broker__password").write_text(PASSWORD)
    return tmp_path


def test_secrets_are_read_from_files_and_passwords_go_into_the_urls(files: Path) -> None:
    (files / "grafana_password").write_text("")  # not ours: whatever it holds
    settings = ApiSettings()
    assert settings.secret_key.get_secret_value() == SECRET
    assert make_url(settings.database.url) == make_url("postgresql+psycopg://user@db/winnow").set(password=PASSWORD)
    broker = redis.ConnectionPool.from_url(settings.broker.url).connection_kwargs
    assert (broker["host"], broker["port"], broker["db"], broker["password"]) == ("broker", 6379, 0, PASSWORD)
    assert database_settings() == settings.database


def test_the_environment_wins_over_the_files(files: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WINNOW_SECRET_KEY", SECRET[::-1])
    environment.setenv("WINNOW_BROKER__PASSWORD", "other")
    settings = ApiSettings()
    assert settings.secret_key.get_secret_value() == SECRET[::-1]
    assert settings.broker.url == "redis://:other@broker:6379/0"
    assert make_url(settings.database.url).password == PASSWORD


@pytest.mark.parametrize("name", ["winnow_secret_key", "winnow_database__password", "winnow_broker__password"])
def test_a_secret_file_that_is_empty_or_cannot_be_read_is_named(files: Path, name: str) -> None:
    (files / name).write_text("\n")
    with pytest.raises(ValueError, match=rf"{files / name} is empty"):
        ApiSettings()
    (files / name).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=rf"{files / name} is not UTF-8"):
        ApiSettings()
    (files / name).unlink()
    (files / name).mkdir()  # as docker leaves one where the host has no such file
    with pytest.raises(ValueError, match=rf"{files / name} cannot be read: Is a directory"):
        ApiSettings()
    (files / name).rmdir()
    (files / name).symlink_to(files / "nowhere")
    with pytest.raises(ValueError, match=rf"{files / name} cannot be read: No such file"):
        ApiSettings()


def test_a_folder_of_secrets_that_is_not_there_is_refused_where_it_was_asked_for(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("WINNOW_SECRETS_DIR", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none cannot be read"):
        Settings()
    environment.delenv("WINNOW_SECRETS_DIR")
    environment.setattr("service.secret_files._FOLDER", str(tmp_path / "none"))
    Settings()


def test_a_secret_that_is_neither_in_the_environment_nor_in_a_file_is_missing(files: Path) -> None:
    (files / "winnow_secret_key").unlink()
    assert wrong(ApiSettings) == {("secret_key",)}


def test_a_misspelt_file_within_a_group_is_refused(files: Path) -> None:
    (files / "winnow_broker__pasword").write_text("x")
    assert wrong(ApiSettings) == {("broker", "pasword")}


@pytest.mark.parametrize(
    "url", ["postgresql://user:one@db/x", "postgresql://:one@db/x", "postgresql://db/x?password=one"]
)
def test_two_passwords_are_refused_and_neither_is_shown(files: Path, environment: pytest.MonkeyPatch, url: str) -> None:
    environment.setenv("WINNOW_DATABASE__URL", url)
    with pytest.raises(ValidationError, match="remove one of the two") as caught:
        ApiSettings()
    assert {error["loc"] for error in caught.value.errors()} == {("database", "url")}
    assert "one@" not in str(caught.value)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "full"),
    [
        ("postgresql://db/x", "postgresql+psycopg://:a%2Fb@db/x"),
        ("postgresql://user:@/x?host=/run", "postgresql+psycopg://user:a%2Fb@/x?host=/run"),
        ("postgresql+psycopg://user@[::1]:5432/x", "postgresql+psycopg://user:a%2Fb@[::1]:5432/x"),
    ],
)
def test_the_password_keeps_the_rest_of_the_url(url: str, full: str) -> None:
    assert DatabaseSettings(url=url, password=SecretStr("a/b")).url == full


def test_no_password_is_shown(files: Path) -> None:
    settings = ApiSettings()
    shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert "***@db/winnow" in shown
    for server in (settings.database, settings.broker):
        assert make_url(server.url).render_as_string(hide_password=False).partition("@")[0] not in shown
    assert "p%40ss" not in shown
    assert "p@ss" not in shown


@pytest.mark.parametrize(
    "url", ["redis://:hunter2@b/0", "redis://u:hun/ter@2@b", "rediss://b:1/0?password=hunter2&x=1"]
)
def test_a_password_in_a_url_is_not_shown(url: str) -> None:
    shown = repr(BrokerSettings(url=url))
    assert "***" in shown
    assert "hun" not in shown
