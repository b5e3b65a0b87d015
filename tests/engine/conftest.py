"""One server at a time for all engine tests; a failed test shows the end of its server's log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.support import Servers

SERVERS = pytest.StashKey[Servers]()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Servers]:
    """Tests that ask for the same configuration one after another share a server."""
    servers = request.config.stash[SERVERS] = Servers(tmp_path_factory.mktemp("servers"))
    yield servers
    servers.stop()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    servers = item.config.stash.get(SERVERS, None)
    if report.failed and servers is not None and servers.process is not None:
        report.sections.append(("end of the server's log", servers.process.log_tail(60)))
        if servers.process.has_ended:  # for tests/matrix: what the engine said comes before what its parents say
            # on the test, as the report of its end is the one whose properties are written down
            item.user_properties.append(("log of the server that ended", servers.process.log_tail(500)))
    return report
