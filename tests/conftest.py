"""What all tests share: quiet libraries, and the helpers beside this file (`tiny`) on the path."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny import save_model


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As `make test` has it for every process: sums over threads would differ in their last bits from those of a worker."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of three blocks; read only."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama")
