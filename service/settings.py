"""Settings, read from the environment (`WINNOW_DATABASE__URL`, `WINNOW_LEDGER__LEASE_SECONDS`, ...), grouped and frozen.

Any of them may be a file instead, named like its variable in small letters, in /run/secrets (`WINNOW_SECRETS_DIR`: another
folder): `winnow_secret_key`, `winnow_database__password`. The environment wins. Nothing secret has a default: the API refuses
to start without `WINNOW_SECRET_KEY`.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from service.secret_files import SecretFiles, with_password, without_password

# What a key that was never changed says, and what no random one does.
_WEAK = re.compile(r"change.?me|replace.?me|example|your.?secret|insecure", re.IGNORECASE)


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class _Server(_Group):
    """Where a server answers. `url` holds the password, wherever that came from; what is shown or dumped does not."""

    # Before the URL: its validator puts it there.
    password: SecretStr | None = Field(default=None, min_length=1, description="Goes into the URL, which then has none")
    url: str

    @field_validator("url")
    @classmethod
    def _complete(cls, url: str, info: ValidationInfo) -> str:
        password: SecretStr | None = info.data.get("password")
        return url if password is None else with_password(url, password.get_secret_value())

    @field_serializer("url")
    def _shown(self, url: str) -> str:
        return without_password(url)

    def __repr_args__(self) -> Iterator[tuple[str | None, object]]:
        for name, value in super().__repr_args__():
            yield name, without_password(self.url) if name == "url" else value


class DatabaseSettings(_Server):
    url: str = Field(description="SQLAlchemy URL of a PostgreSQL 15+ database: postgresql+psycopg://...")
    pool_size: int = Field(default=10, ge=1)

    @field_validator("url")
    @classmethod
    def _postgres_only(cls, url: str) -> str:
        if url.startswith("postgresql://"):
            return "postgresql+psycopg://" + url.removeprefix("postgresql://")
        if not url.startswith("postgresql+psycopg://"):
            raise ValueError("must be a postgresql:// URL; PostgreSQL is the only database that is supported")
        return url


class BrokerSettings(_Server):
    url: str = Field(description="Redis protocol URL: redis://...")


class ArtifactSettings(_Group):
    url: str = Field(description="A folder, or any fsspec URL (s3://bucket/prefix)")


class ModelSettings(_Group):
    folder: Path = Field(
        description="A folder in it with config.json or adapter_config.json is a model registered by its name"
    )
    hub: tuple[Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")], ...] = Field(
        default=(), description='Models of the Hugging Face Hub that a job may name, as a list of patterns: ["Qwen/*"]'
    )


class LedgerSettings(_Group):
    """How long a claim holds. A worker that does not beat for `lease_seconds` loses its unit to another one."""

    lease_seconds: float = Field(default=60.0, gt=0)
    beat_seconds: float = Field(default=10.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    retry_seconds: float = Field(
        default=10.0, ge=0, description="Before the second attempt; six times that before the third"
    )
    cancel_seconds: float = Field(default=120.0, gt=0, description="From a cancel until it is carried through by force")
    turn_seconds: float = Field(
        default=60.0, ge=0, description="For so long workers stay with a tenant before another one's turn"
    )
    sweep_seconds: float = Field(default=5.0, gt=0, description="How often the dispatcher looks without being notified")

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        if self.beat_seconds > self.lease_seconds / 2:
            raise ValueError("beat_seconds must be at most half of lease_seconds, or one late beat loses the lease")
        return self


class UploadSettings(_Group):
    max_bytes: int = Field(default=8 * 2**30, description="Largest upload, and largest content once decompressed")
    max_rows: int = Field(default=10_000_000)
    max_row_bytes: int = Field(default=2**20)
    idle_seconds: float = Field(default=60.0, gt=0, description="A sender who is silent for so long has broken off")
    parquet_memory_bytes: int = Field(
        default=2**29, ge=2**27, description="Most data of the process that reads a Parquet file (RLIMIT_DATA)"
    )


class LimitSettings(_Group):
    """What one API key may use; a key may have limits of its own. 0: no limit."""

    requests_per_minute: int = Field(default=3_000, ge=0, description="Of each API process")
    concurrent_jobs: int = Field(default=100, ge=0, description="Jobs that have not ended")
    stored_bytes: int = Field(default=100 * 2**30, ge=0, description="Of its datasets' rows")
    samples_per_day: int = Field(default=50_000_000, ge=0, description="Pool and target rows of its jobs in 24 hours")


class WebhookSettings(_Group):
    allowed_networks: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(), description="Private networks that webhooks may be delivered to; else public addresses only"
    )
    ca_file: FilePath | None = Field(default=None, description="Certificates (PEM) to trust instead of the system's")
    timeout_seconds: float = Field(default=10.0, gt=0, description="Of one attempt, from connecting to the answer")


class RetentionSettings(_Group):
    """What is thrown away by itself. Nothing that a job which is not finished needs is ever collected."""

    artifacts_days: float = Field(
        default=30.0, ge=0, description="An artifact that none used for so long; 0: kept for ever"
    )
    artifacts_bytes: int = Field(default=0, ge=0, description="Beyond this the oldest go, after an hour; 0: no bound")
    results_days: float = Field(
        default=0.0, ge=0, description="Finished jobs are deleted after so long; 0: kept for ever"
    )
    sweep_minutes: float = Field(default=60.0, gt=0, description="How often it is looked at")


class LogSettings(_Group):
    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class TelemetrySettings(_Group):
    endpoint: str = Field(default="", description="OTLP over HTTP (http://collector:4318); empty: no traces are made")


class WorkerSettings(_Group):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0, description="CPU threads of the compute child; 0: what torch chooses")
    token_budget: int = Field(default=0, ge=0, description="Padded tokens a batch; 0: the default of the device")
    cancel_grace_seconds: float = Field(default=10.0, gt=0, description="From a cancel to SIGTERM, and on to SIGKILL")
    stall_seconds: float = Field(
        default=300.0, gt=0, description="A compute process that says nothing for so long is ended"
    )
    memory_bytes: int = Field(
        default=0,
        ge=-1,
        description="Most data of the compute process (RLIMIT_DATA); 0: on a CPU nine tenths of the container's or machine's"
        " memory, with CUDA none; -1: no limit",
    )
    metrics_host: str = Field(
        default="127.0.0.1", description="The address that it is read at; 0.0.0.0: any of the host's"
    )
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Where Prometheus reads the worker; 0: nowhere")


class _Read(BaseSettings):
    # A refusal names the variable and never quotes what was given: it may be a secret.
    model_config = SettingsConfigDict(
        env_prefix="WINNOW_",
        env_nested_delimiter="__",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, SecretFiles(settings_cls)


class _DatabaseOnly(_Read):
    database: DatabaseSettings


class Settings(_Read):
    """What the API and the workers share."""

    database: DatabaseSettings
    broker: BrokerSettings
    artifacts: ArtifactSettings
    models: ModelSettings
    ledger: LedgerSettings = LedgerSettings()
    worker: WorkerSettings = WorkerSettings()
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()


class ApiSettings(Settings):
    """The API's settings: the shared ones, and what only the API may know."""

    secret_key: SecretStr = Field(
        description="At least 32 characters; API keys are stored as HMAC under it, and secrets sealed"
    )
    uploads: UploadSettings = UploadSettings()
    limits: LimitSettings = LimitSettings()
    webhooks: WebhookSettings = WebhookSettings()

    @field_validator("secret_key")
    @classmethod
    def _long_enough(cls, key: SecretStr) -> SecretStr:
        if len(key.get_secret_value()) < 32:
            raise ValueError("must have at least 32 characters; make one with: openssl rand -hex 32")
        if _WEAK.search(key.get_secret_value()) or len(set(key.get_secret_value())) < 8:
            raise ValueError("is an example or a pattern, which anyone may guess; make one with: openssl rand -hex 32")
        return key


def database_settings() -> DatabaseSettings:
    """For what needs the database and nothing else, as migrations do.

    Raises:
        ValueError: a setting is missing or wrong, or its file cannot be read; it names which.
    """
    return _DatabaseOnly().database


@lru_cache(maxsize=1)
def api_settings() -> ApiSettings:
    return ApiSettings()


@lru_cache(maxsize=1)
def worker_settings() -> Settings:
    return Settings()
