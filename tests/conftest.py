"""What several test files share."""

from hypothesis import settings

pytest_plugins = ["servers"]  # the fixtures s3_server and http_server

settings.register_profile("patient", deadline=None)  # on a busy machine any step may take a second
settings.load_profile("patient")
