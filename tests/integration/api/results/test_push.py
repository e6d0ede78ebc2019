"""A selection is pushed to a hub on loopback: private, with a card, and a record that the file is verified against."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from support.push_hub import PushHub
from support.results import K, Published
from typer.testing import CliRunner

from winnow.cli.main import app
from winnow.client import Winnow
from winnow.pushing import DATA
from winnow.verify import Record, verify


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    with PushHub.running() as hub:
        for name in ("ENDPOINT", "HF_ENDPOINT"):
            monkeypatch.setattr(constants, name, hub.url, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


def test_a_selection_is_pushed_private_with_its_card(world: Published, url: str, hub: PushHub, tmp_path: Path) -> None:
    with Winnow(url, world.key) as winnow:
        results = winnow.results(world.job_id)
        address = results.push("org/chosen")
        root = results.provenance().weights_root
    assert address.startswith(f"{hub.url}/datasets/org/chosen/commit/")
    assert (hub.repositories, hub.tokens) == ({"org/chosen": True}, {"Bearer hf_test"})
    files = hub.of("org/chosen")
    assert files.keys() == {"README.md", "provenance.json", DATA}
    card = files["README.md"].decode()
    assert all(part in card for part in (world.job_id, root, f"path: {DATA}"))
    path = tmp_path / "train.parquet"
    path.write_bytes(files[DATA])
    assert pq.read_metadata(path).num_rows == K
    published = json.loads(files["provenance.json"])
    assert published["record"].keys() <= {"seed", "selection_sha256"}
    assert verify(path, Record.of_provenance(published)).selected == K


def test_a_public_repository_is_not_written_to_unless_that_is_said(world: Published, url: str, hub: PushHub) -> None:
    hub.repositories["org/open"] = False
    words = ["push", world.job_id, "org/open", "--url", url, "--api-key", world.key]
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, "org/open" in refused.stderr, hub.files) == (1, True, {})
    done = CliRunner().invoke(app, [*words, "--public"])
    assert (done.exit_code, len(hub.of("org/open"))) == (0, 3)
    assert done.stdout.startswith(f"Pushed {hub.url}")
