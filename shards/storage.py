"""A path or URL into the store that it names."""

import os
from urllib.parse import unquote, urlsplit

from pydantic import TypeAdapter, ValidationError

from shards.local_store import LocalStore
from shards.record import explain_invalid
from shards.store import StorageConfig, Store

_BUCKETS, _SERVERS = ("s3", "gs", "az", "abfs", "abfss"), ("http", "https")


def is_remote(url: str) -> bool:
    """Whether a path or URL is that of a bucket or server that is read here."""
    scheme, separator, _ = url.partition("://")
    return bool(separator) and scheme in (*_BUCKETS, *_SERVERS)


def storage_options(text: str) -> StorageConfig:
    """Storage options from their JSON. Raises ValueError that doesn't repeat what was given: it may hold a secret."""
    try:
        return TypeAdapter(StorageConfig).validate_json(text)
    except ValidationError as error:
        raise ValueError(f"The storage options are not right: {explain_invalid(error)}.") from None


def open_store(url: str | os.PathLike[str], options: StorageConfig | None = None) -> Store:
    """The store at a path or URL, or at those of its manifest.json; nothing is touched or contacted until it is used.

    Raises ValueError for a URL with a password, user name or query, which would end up in manifests and logs, and for
    one of which a part would have no effect."""
    options = options or StorageConfig()
    text = os.fspath(url).removesuffix("/manifest.json")
    scheme, colon, rest = text.partition(":")
    if scheme in ("file", *_BUCKETS, *_SERVERS) and colon and not rest.startswith("//"):
        raise ValueError(f"{text}: a URL has two slashes behind its colon; for a path of that name write ./{text}.")
    parts = urlsplit(text if "://" in text else "")
    if parts.fragment:
        raise ValueError(f"{text.partition('#')[0]}#...: what follows # in a URL has no effect; in a name write %23.")
    if parts.scheme in ("", "file"):
        if parts.query or parts.netloc not in ("", "localhost"):
            raise ValueError(
                f"{text}: a file:// URL has no host and no query, as in file:///data/sounds; in a name write %3F for ?."
            )
        return LocalStore(unquote(parts.path) if parts.scheme else text, options)
    for each in (parts, urlsplit(options.endpoint or "")):
        if each.password or each.query or (each.username and parts.scheme not in ("abfs", "abfss")):
            raise ValueError(
                f"The URL of {each.hostname} holds a user name, password or query. It would be stored and printed; "
                "give credentials by the environment, a profile or http_token_file."
            )
    if not parts.hostname:
        raise ValueError(f"{text}: a server or bucket must be named behind {parts.scheme}://.")
    if parts.scheme in _SERVERS:
        from shards.http_store import HttpStore

        return HttpStore(text, options)
    if parts.scheme in _BUCKETS:
        from shards.object_store import ObjectStore

        return ObjectStore(text, options)
    raise ValueError(
        f"{text}: there is no {parts.scheme}:// here; use a path, file://, s3://, gs://, az://, abfs:// or http(s)://."
    )


def open_object(url: str | os.PathLike[str], options: StorageConfig | None = None) -> tuple[Store, str]:
    """The store that holds the object at a path or URL, and the object's name in it."""
    folder, name = os.path.split(url)
    return open_store(folder, options), name


def check_writable(store: Store) -> None:
    """Put an empty object and remove it, so that hours of work aren't done for a place that can't take the result.

    Raises the OSError that the place gave, with what to do."""
    name = ".tmp-writable"  # the same for all, so that what a killed process left goes the next time
    try:
        store.write(name, b"")
        store.delete(name)
    except OSError as error:
        raise type(error)(
            f"{store.url} can't be written to, so nothing was begun. Make the folder or bucket, or give the right to "
            f"put and delete there, or name another place. ({error})"
        ) from None
