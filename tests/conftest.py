"""What every test gets: no way to the user's own store, and hypothesis without a clock."""

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "loraforge",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("loraforge")


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "default-store"))
