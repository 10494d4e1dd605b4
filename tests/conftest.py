"""Fixtures that several test files share."""

pytest_plugins = ["servers"]  # s3_server, http_server
