import pytest
from jobs import Server


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()
