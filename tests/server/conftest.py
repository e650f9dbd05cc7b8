import pytest

from tests.hub import Server


@pytest.fixture(scope="package")
def server(tmp_path_factory):
    """One server for this folder, with a canary's token, which no output of it may hold."""
    with Server(tmp_path_factory.mktemp("hub") / "store", "--quota", "200MB", "--max-file", "150MB") as server:
        yield server


@pytest.fixture(scope="package")
def alice(server):
    return server.add_user("alice")


@pytest.fixture(scope="package")
def bob(server):
    return server.add_user("bob")


@pytest.fixture(scope="package", autouse=True)
def _online():
    """Clients in this process reach our server, though peers' tests beside these may have told them to stay offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield
