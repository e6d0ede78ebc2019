"""What all tests share: quiet libraries, servers, and a model; the helpers are in support/."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings
from support.reaper import Reaper
from support.servers import Servers
from support.tiny import save_model

# The same examples in every run, so that a run is red for what changed; `make fuzz` looks for others.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("fuzz", derandomize=False, print_blob=True)
settings.load_profile("repeatable")


class _Reaping:
    """The first process of a run has one reaper; those of pytest-xdist are in its run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._reaper = config, Reaper()

    def pytest_keyboard_interrupt(self) -> None:
        if self._config.pluginmanager.has_plugin("dsession"):
            self._reaper.reap()  # the other processes end without a teardown; alone, this one has yet to do its own

    def pytest_unconfigure(self) -> None:
        self._reaper.reap()


class _Naming:
    """Names a test once it has failed: a run that is stopped never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and (reporter := self._config.pluginmanager.get_plugin("terminalreporter")):
            reporter.write_line(
                f"\n{report.nodeid} failed in its {report.when} after {report.duration:.0f} s", red=True
            )
            reporter.write_line(report.longreprtext[-1_500:])


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reaping(config))
        config.pluginmanager.register(_Naming(config))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test has an id of its own: of those that share one pytest-xdist runs a single one, without a word."""
    twice = [name for name, count in Counter(item.nodeid for item in items).items() if count > 1]
    if twice:
        raise pytest.UsageError(f"several tests are called {twice[0]}")


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


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """A real PostgreSQL and a real broker, started once a session."""
    with Servers.started(tmp_path_factory.mktemp("servers")) as started:
        yield started
