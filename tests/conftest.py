import pytest

from .loopback_hub import LoopbackHub


@pytest.fixture(scope="session")
def loopback_hub():
    """A Hub on 127.0.0.1 for clients in processes of their own. Tests share it: each has repo names of its own."""
    with LoopbackHub() as hub:
        yield hub
    assert hub.outside == [], "a client of the loopback hub tried to reach another host"
