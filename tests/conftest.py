"""What several test files share."""

import signal

import pytest
from hypothesis import settings

pytest_plugins = ["servers", "slurm_lab"]  # the fixtures s3_server, http_server and cluster

settings.register_profile("patient", deadline=None)  # on a busy machine any step may take a second
settings.load_profile("patient")
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs, and theirs, ignore


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--longer", type=int, default=1, help="times as many kills and mutations as usual")


@pytest.fixture(scope="session")
def longer(request: pytest.FixtureRequest) -> int:
    """How many times as many faults as usual the tests inject: `--longer N` for a night's run."""
    return request.config.getoption("--longer")
