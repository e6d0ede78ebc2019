"""What tells a registered model from another one under its name, without its weights being read from end to end."""

import json
import os
from pathlib import Path

import pytest

from service.models.fingerprints import sampled_fingerprint, signature

SIZE = 3 * 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(os.urandom(SIZE))
    return tmp_path


def test_it_depends_on_what_is_computed_with_and_on_nothing_else(folder: Path) -> None:
    first = sampled_fingerprint(folder)
    (folder / "README.md").write_text("x")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    os.utime(folder / "model.safetensors", (0, 0))
    os.mkfifo(folder / "tokenizer.json")
    assert sampled_fingerprint(folder) == first


@pytest.mark.parametrize("change", ["other weights", "first byte", "last byte", "longer", "config", "more", "renamed"])
def test_another_model_has_another_one(folder: Path, change: str) -> None:
    first, weights = sampled_fingerprint(folder), folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    match change:
        case "other weights":
            content[:] = os.urandom(SIZE)
        case "first byte":
            content[0] ^= 1
        case "last byte":
            content[-1] ^= 1
        case "longer":
            content += b"\0"
        case "config":
            (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 1}))
        case "more":
            (folder / "adapter_config.json").write_text("{}")
        case "renamed":
            weights = weights.rename(folder / "model-1.safetensors")
    weights.write_bytes(content)
    assert sampled_fingerprint(folder) not in (None, first)


def test_a_file_that_was_written_long_after_it_was_looked_at_counts(folder: Path) -> None:
    """What it was is remembered then."""
    weights = folder / "model.safetensors"
    found = []
    for content, seconds in ((b"a", 1), (b"a", 1), (b"b", 2)):
        weights.write_bytes(content * SIZE)
        for path in folder.iterdir():
            os.utime(path, (seconds, seconds))
        found.append(sampled_fingerprint(folder))
    assert found[0] == found[1] != found[2]


def test_a_host_that_holds_the_configuration_alone_has_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert sampled_fingerprint(folder) is None


def test_the_signature_changes_when_a_file_is_replaced_by_one_alike(folder: Path) -> None:
    first, weights = signature(folder), folder / "model.safetensors"
    (folder / "new").write_bytes(weights.read_bytes())
    os.replace(folder / "new", weights)
    assert signature(folder) != first
    assert signature(folder / "gone") == ()
