"""A server and a client for all tests: to start one takes longer than most of them."""

import pytest

from .client import Client
from .folders import FILES, write
from .server import HubServer


@pytest.fixture(scope="session")
def server():
    with HubServer() as running:
        yield running


@pytest.fixture(scope="session")
def client(server, tmp_path_factory):
    running = Client(server.endpoint, tmp_path_factory.mktemp("home"))
    yield running
    running.close()


@pytest.fixture
def hub(server):
    """The server, empty and without faults."""
    server.repositories.clear()
    server.large.clear()
    server.faults.clear()
    server.requests.clear()
    return server


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "out", FILES)
