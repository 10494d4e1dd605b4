"""What several test files share."""

import pytest
from hypothesis import settings

pytest_plugins = ["servers", "slurm_lab"]  # the fixtures s3_server, http_server and cluster

settings.register_profile("patient", deadline=None)  # on a busy machine any step may take a second
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--longer", type=int, default=1, help="times as many kills and mutations as usual")


@pytest.fixture(scope="session")
def longer(request: pytest.FixtureRequest) -> int:
    """How many times as many faults as usual the tests inject: `--longer N` for a night's run."""
    return request.config.getoption("--longer")
