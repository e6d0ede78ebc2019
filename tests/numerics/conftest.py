import pytest
import transformers


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers():
    transformers.logging.set_verbosity_error()
