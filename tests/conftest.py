"""What all tests share: quiet libraries, and the helpers beside this file (`tiny`) on the path."""

from pathlib import Path

import pytest
import transformers
from tiny import save_model


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of three blocks; read only."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama")
