"""Every unit test runs without the user's own profiles, records, results and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_door import as_json, cli, extra_backend, install, own_profile  # noqa: F401 - fixtures of any test here
from hypothesis import HealthCheck, settings

settings.register_profile(
    "bidispatch", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)
settings.load_profile("bidispatch")


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Point bidispatch at empty folders; return the one that holds `config` and `records`."""
    home = tmp_path_factory.mktemp("home")
    for name in ("BIDISPATCH_PROFILE", "BIDISPATCH_IMPL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BIDISPATCH_CONFIG_DIR", str(home / "config"))
    monkeypatch.setenv("BIDISPATCH_RECORDS_DIR", str(home / "records"))
    monkeypatch.setenv("BIDISPATCH_RESULTS_DIR", str(home / "results"))
    return home
