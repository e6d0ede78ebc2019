"""What a model's config.json and adapter_config.json may say. A file of another form, size or kind is an error of that model
alone, whatever is in its place; no message holds a path."""

import os
import stat
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_MAX_BYTES = 2**24

# Several times what the largest models have; no array that a size is put into becomes one that no machine can hold by accident.
MAX_BLOCKS = 1_000
_Width = Annotated[int, Field(ge=1, le=2**17)]
_Heads = Annotated[int, Field(ge=1, le=2**12)]
_Inner = Annotated[int, Field(ge=1, le=2**20)]


class UnusableConfig(ValueError):
    """The configuration cannot be used; the message is the end of a sentence and names the file and the entry."""


class _Config(BaseModel):
    """Entries that are not listed are kept and not checked."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


_C = TypeVar("_C", bound=_Config)


class ModelConfig(_Config):
    """The entries of a config.json that the service computes with. One that is missing makes a job's cost unknown."""

    model_type: Annotated[str, Field(max_length=100)]
    num_hidden_layers: Annotated[
        int, Field(ge=1, le=MAX_BLOCKS, validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    ]
    hidden_size: _Width | None = Field(default=None, validation_alias=AliasChoices("hidden_size", "n_embd"))
    num_attention_heads: _Heads | None = Field(
        default=None, validation_alias=AliasChoices("num_attention_heads", "n_head")
    )
    num_key_value_heads: _Heads | None = None
    head_dim: Annotated[int, Field(ge=1, le=2**13)] | None = None
    intermediate_size: _Inner | None = None
    n_inner: _Inner | None = None
    vocab_size: Annotated[int, Field(ge=1, le=2**22)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**30)] | None = Field(
        default=None, validation_alias=AliasChoices("max_position_embeddings", "n_positions")
    )

    @model_validator(mode="after")
    def _heads_share(self) -> Self:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads is not None and shared is not None and heads % shared:
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {shared}")
        if heads is not None and self.hidden_size is not None and self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        return self


class AdapterConfig(_Config):
    """The entries of an adapter_config.json that every LoRA adapter has."""

    base_model_name_or_path: Annotated[str, Field(max_length=500)]
    peft_type: Annotated[str, Field(max_length=100)] | None = None
    revision: Annotated[str, Field(max_length=200)] | None = None
    r: Annotated[int, Field(ge=1, le=2**16)] = 8  # as peft has it
    target_modules: str | list[str] | None = None


def read_config(path: Path) -> ModelConfig:
    """
    Raises:
        UnusableConfig: the file is missing, is none, or says what no model can have.
    """
    return _read(path, ModelConfig)


def read_adapter_config(path: Path) -> AdapterConfig:
    """
    Raises:
        UnusableConfig: the file is missing, is none, or says what no adapter can have.
    """
    return _read(path, AdapterConfig)


def _read(path: Path, kind: type[_C]) -> _C:
    try:
        return kind.model_validate_json(_content(path))
    except OSError as error:
        raise UnusableConfig(f"its {path.name} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"{part}: " for part in first["loc"][:1])
        raise UnusableConfig(
            f"its {path.name} is not usable: {place}{first['msg'].removeprefix('Value error, ')}"
        ) from error


def _content(path: Path) -> bytes:
    """Of a regular file that is not too large; a pipe or a device in its place is not waited for."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnusableConfig(f"its {path.name} is not a regular file")
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise UnusableConfig(f"its {path.name} has more than {_MAX_BYTES:,} bytes")
    return content


def entries(config: _Config) -> dict[str, Any]:
    """All that the file says, by the names of this module; without what is null."""
    return config.model_dump(exclude_none=True)
