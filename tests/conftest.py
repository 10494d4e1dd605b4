"""What several test files share."""

from hypothesis import settings

pytest_plugins = ["servers", "slurm_lab"]  # the fixtures s3_server, http_server and cluster

settings.register_profile("patient", deadline=None)  # on a busy machine any step may take a second
settings.load_profile("patient")
