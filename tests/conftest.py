"""What holds for every test."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _calibrations_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes what was measured for the person whose machine this is."""
    os.environ["XDG_DATA_HOME"] = str(tmp_path_factory.mktemp("data"))
