"""A server and a client for the tests of a module."""

import pytest

from .client import Client
from .server import HubServer


@pytest.fixture(scope="module")
def server():
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
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
    server.sizes.clear()
    return server
