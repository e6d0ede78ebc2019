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
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from service.secret_files import SecretFiles, with_password, without_password

# Words of a key that was never changed, which no random key contains.
_WEAK = re.compile(r"change.?me|replace.?me|example|your.?secret|insecure", re.IGNORECASE)


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class _Server(_Group):
    """Where a server answers. `url` holds the password, wherever it came from; representations and dumps do not."""

    # Before the URL: its validator puts it there.
    password: SecretStr | None = Field(
        default=None, min_length=1, description="Inserted into the URL, which must have none"
    )
    url: str

    @field_validator("url")
    @classmethod
    def _insert_password(cls, url: str, info: ValidationInfo) -> str:
        password: SecretStr | None = info.data.get("password")
        return url if password is None else with_password(url, password.get_secret_value())

    @field_serializer("url")
    def _hide_password(self, url: str) -> str:
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
            raise ValueError("must be a postgresql:// URL; PostgreSQL is the only supported database")
        return url


class BrokerSettings(_Server):
    url: str = Field(description="Redis protocol URL: redis://...")


class ArtifactSettings(_Group):
    url: str = Field(description="A folder, or any fsspec URL (s3://bucket/prefix)")


class ModelSettings(_Group):
    folder: Path = Field(
        description="Each subfolder with config.json or adapter_config.json is a model registered under its name"
    )
    hub: tuple[Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")], ...] = Field(
        default=(), description='Models of the Hugging Face Hub that jobs may use, as a list of patterns: ["Qwen/*"]'
    )


class DatasetSettings(_Group):
    hub: tuple[Annotated[str, Field(pattern=r"^[^/\s]+/[^/\s]+$")], ...] = Field(
        default=(),
        description='Datasets of the Hugging Face Hub that may be imported, as a list of patterns: ["allenai/*"]',
    )


class LedgerSettings(_Group):
    """A worker without a heartbeat for `lease_seconds` loses its unit to another one."""

    lease_seconds: float = Field(default=60.0, gt=0)
    beat_seconds: float = Field(default=10.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    retry_seconds: float = Field(
        default=10.0, ge=0, description="Before the second attempt; six times that before the third"
    )
    cancel_seconds: float = Field(default=120.0, gt=0, description="Time from a cancellation until it is enforced")
    turn_seconds: float = Field(
        default=60.0, ge=0, description="How long workers stay with one tenant while others wait"
    )
    unable_seconds: float = Field(
        default=300.0, ge=0, description="A job that no live worker can do fails after this long"
    )
    sweep_seconds: float = Field(
        default=5.0, gt=0, description="How often the dispatcher looks for work without a notification"
    )

    @model_validator(mode="after")
    def _beats_in_time(self) -> Self:
        if self.beat_seconds > self.lease_seconds / 2:
            raise ValueError(
                "beat_seconds must be at most half of lease_seconds, or one late heartbeat loses the lease"
            )
        return self


class RequestSettings(_Group):
    """What a request's body may have; `bytes_per_second` holds for uploads too."""

    max_body_bytes: int = Field(default=2**20, ge=1024, description="Largest body of any call but an upload")
    grace_seconds: float = Field(default=10.0, gt=0, description="Time for a body however slow its sender is")
    bytes_per_second: int = Field(
        default=4096, ge=1, description="A sender who is slower on average, after the grace, is answered 408"
    )


class UploadSettings(_Group):
    max_bytes: int = Field(default=8 * 2**30, description="Largest upload, before and after decompression")
    max_rows: int = Field(default=10_000_000)
    max_row_bytes: int = Field(default=2**20)
    part_bytes: int = Field(
        default=8 * 2**20,
        ge=1,
        lt=2**31,
        description="Size of a part of uploads in parts: what a broken connection costs",
    )
    idle_seconds: float = Field(default=60.0, gt=0, description="An upload that sends nothing for this long is aborted")
    max_expansion: float = Field(
        default=200.0, ge=1, description="How many times its size an upload may have after decompression"
    )
    free_expansion_bytes: int = Field(
        default=64 * 2**20, ge=0, description="What any upload may have after decompression"
    )
    base_seconds: float = Field(default=10.0, gt=0, description="Processor time for the conversion of any upload")
    seconds_per_mib: float = Field(
        default=5.0, gt=0, description="More of it for each MiB of the file, and for each that it expands to"
    )
    parquet_memory_bytes: int = Field(
        default=2**29,
        ge=2**27,
        description="Memory limit (RLIMIT_DATA) of the process that reads a Parquet or Arrow file, or unpacks zstd",
    )


class LimitSettings(_Group):
    """What one API key may use, unless the key has its own limits. 0: no limit."""

    requests_per_minute: int = Field(default=3_000, ge=0)
    concurrent_jobs: int = Field(default=100, ge=0, description="Jobs that have not ended")
    stored_bytes: int = Field(
        default=100 * 2**30, ge=0, description="Total size of the rows of its datasets, and of its uploads in parts"
    )
    samples_per_day: int = Field(default=50_000_000, ge=0, description="Pool and target rows of its jobs in 24 hours")
    open_uploads: int = Field(default=20, ge=0, description="Uploads in parts of which no dataset was made yet")


class ShareSettings(_Group):
    """What requests in progress may hold at a time; who finds nothing free is told when to retry."""

    tenant_fraction: float = Field(
        default=0.5, gt=0, le=1, description="Of each, and of the database connections, for one tenant"
    )
    streams: int = Field(default=1_000, ge=1, description="Streams of events")
    waiters: int = Field(default=2_000, ge=1, description="Requests that wait for the end of a job (`?wait=`)")
    downloads: int = Field(default=32, ge=1, description="Streams of results, each with up to a few MiB in memory")
    uploads: int = Field(
        default=64, ge=1, description="Uploads that are received or converted, each with its file in TMPDIR"
    )
    readers: int = Field(
        default=4,
        ge=1,
        description="Uploads that are converted in each API process; the others wait, and no tenant behind another",
    )


class WebSettings(_Group):
    """The pages."""

    session_hours: float = Field(default=12.0, gt=0, le=24 * 365, description="A browser is logged out after so long")


class WebhookSettings(_Group):
    allowed_networks: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(), description="Private networks that webhooks may be delivered to, in addition to public addresses"
    )
    ca_file: FilePath | None = Field(default=None, description="Certificates (PEM) to trust instead of the system's")
    timeout_seconds: float = Field(default=10.0, gt=0, description="For one attempt, from connecting to the response")


class RetentionSettings(_Group):
    """What is deleted automatically; never anything that an unfinished job needs."""

    artifacts_days: float = Field(
        default=30.0, ge=0, description="Artifacts unused for this long are deleted; 0: never"
    )
    artifacts_bytes: int = Field(
        default=0,
        ge=0,
        description="Above this size the oldest are deleted, but none younger than an hour; 0: no limit",
    )
    uploads_hours: float = Field(
        default=24.0, ge=0, description="An upload in parts is deleted after so long without a part; 0: never"
    )
    results_days: float = Field(default=0.0, ge=0, description="Finished jobs are deleted after this long; 0: never")
    sweep_minutes: float = Field(default=60.0, gt=0, description="How often retention is applied")


class LogSettings(_Group):
    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class TelemetrySettings(_Group):
    endpoint: str = Field(default="", description="OTLP endpoint over HTTP (http://collector:4318); empty: no traces")


class WorkerSettings(_Group):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tasks: tuple[str, ...] | None = Field(
        default=None,
        description='Kinds of tasks that it does beside jobs, as a list (["preview"]; []: none); unset: all',
    )
    threads: int = Field(default=0, ge=0, description="CPU threads of the compute process; 0: torch's default")
    token_budget: int = Field(default=0, ge=0, description="Padded tokens per batch; 0: the device's default")
    cancel_grace_seconds: float = Field(
        default=10.0, gt=0, description="Time from a cancellation to SIGTERM, and from there to SIGKILL"
    )
    prove_seconds: float = Field(
        default=30.0,
        gt=0,
        description="How often a worker looks whether what it lacks (store, device, model) is there now",
    )
    stall_seconds: float = Field(
        default=300.0, gt=0, description="A compute process that sends nothing for this long is terminated"
    )
    memory_bytes: int = Field(
        default=0,
        ge=-1,
        description="Memory limit (RLIMIT_DATA) of the compute process; 0: on a CPU nine tenths of the container's or machine's"
        " memory, with CUDA none; -1: no limit",
    )
    metrics_host: str = Field(
        default="127.0.0.1", description="Address of the metrics server; 0.0.0.0: all addresses of the host"
    )
    metrics_port: int = Field(default=0, ge=0, le=65535, description="Port of the metrics server; 0: off")


class _Read(BaseSettings):
    # Errors name the variable and never quote its value, which may be a secret.
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
        description="At least 32 characters; API keys are stored as HMACs under it, and secrets encrypted with it"
    )
    requests: RequestSettings = RequestSettings()
    uploads: UploadSettings = UploadSettings()
    datasets: DatasetSettings = DatasetSettings()
    limits: LimitSettings = LimitSettings()
    shares: ShareSettings = ShareSettings()
    web: WebSettings = WebSettings()
    webhooks: WebhookSettings = WebhookSettings()

    @field_validator("secret_key")
    @classmethod
    def _long_enough(cls, key: SecretStr) -> SecretStr:
        if len(key.get_secret_value()) < 32:
            raise ValueError("must have at least 32 characters; generate one with: openssl rand -hex 32")
        if _WEAK.search(key.get_secret_value()) or len(set(key.get_secret_value())) < 8:
            raise ValueError(
                "is an example or a pattern that anyone can guess; generate one with: openssl rand -hex 32"
            )
        return key


def database_settings() -> DatabaseSettings:
    """For what needs nothing but the database, such as migrations.

    Raises:
        ValueError: a setting is missing or wrong, or its file cannot be read; it names which.
    """
    return _DatabaseOnly().database


def settings_problem(error: ValueError) -> str:
    """What is wrong with which variable; never what it was set to."""
    if not isinstance(error, ValidationError):
        return str(error)
    wrong = [("__".join(str(part) for part in e["loc"]).upper(), e["msg"]) for e in error.errors()]
    return "; ".join(f"WINNOW_{name}: {message.removeprefix('Value error, ')}" for name, message in wrong)


@lru_cache(maxsize=1)
def api_settings() -> ApiSettings:
    return ApiSettings()


@lru_cache(maxsize=1)
def worker_settings() -> Settings:
    return Settings()
