"""The servers of a session, the undisturbed run that every scenario is compared with, and the count of faults.

With CHAOS=all every crash point that the undisturbed run passes is a scenario (`make chaos`, `make test-all`), else a few telling
ones are. What is `slow` here repeats in another place, or for longer, what the others show in less than a minute.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import transformers
from support.servers import Servers
from undisturbed import Undisturbed, run_undisturbed
from world import World

_UNDISTURBED = pytest.StashKey[Undisturbed]()


class Count:
    """Of the faults that tests tell of by `record_property("fault", ...)`: how many, and of how many the test passed. The
    properties come with the reports, also from the processes of pytest-xdist."""

    def __init__(self) -> None:
        self.injected = self.survived = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            faults = sum(name == "fault" for name, _ in report.user_properties)
            self.injected += faults
            self.survived += faults * report.passed

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.injected != self.survived and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.injected:
            terminalreporter.write_line(f"faults injected: {self.injected}, survived: {self.survived}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Count())
    if os.environ.get("CHAOS") != "all" or config.option.collectonly:
        return
    given: Any = getattr(config, "workerinput", None)
    if given is not None:
        config.stash[_UNDISTURBED] = given["undisturbed"]
        return
    transformers.logging.disable_progress_bar()
    with TemporaryDirectory(prefix="chaos-") as folder, Servers.started(Path(folder)) as servers:
        config.stash[_UNDISTURBED] = run_undisturbed(servers)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hands what the undisturbed run has found to a process of pytest-xdist."""
    if _UNDISTURBED in node.config.stash:
        node.workerinput["undisturbed"] = node.config.stash[_UNDISTURBED]


@pytest.fixture(scope="session")
def undisturbed(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Undisturbed:
    """What the job of all scenarios finds where nothing goes wrong, and the crash points that it passes."""
    if _UNDISTURBED not in pytestconfig.stash:
        pytestconfig.stash[_UNDISTURBED] = run_undisturbed(request.getfixturevalue("servers"))
    return pytestconfig.stash[_UNDISTURBED]


@pytest.fixture(scope="session")
def two_workers(servers: Servers) -> Iterator[World]:
    with World.made(servers) as made:
        made.add_worker()
        made.add_worker()
        yield made


@pytest.fixture
def pair(two_workers: World) -> Iterator[World]:
    """The world with two workers that many scenarios share; each begins with nothing stored."""
    two_workers.revive()
    two_workers.clear()
    yield two_workers
    two_workers.faults.disarm()
    two_workers.faults.release()


@pytest.fixture
def world(servers: Servers) -> Iterator[World]:
    """A world of the test's own: an API, and no worker yet."""
    with World.made(servers) as made:
        yield made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" not in metafunc.fixturenames:
        return
    found = metafunc.config.stash.get(_UNDISTURBED, None)
    metafunc.parametrize("point", metafunc.module.TELLING if found is None else sorted(found["points"]))
