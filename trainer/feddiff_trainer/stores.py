"""Where bytes are kept: folders (file://) and buckets (s3://) behind one small interface.

What a release rests on is `create`: of all that create one key, exactly one is told True. Whatever it answers, the
object is then complete and survives a loss of power.
"""

import errno
import hashlib
import io
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar
from urllib.parse import unquote

from feddiff_protocol import layout
from feddiff_protocol.errors import (
    ConfigurationInvalid,
    DataInvalid,
    FeddiffError,
    InputMissing,
    OutputFailed,
    PrivacyRefusal,
    StorageFailed,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from obstore.store import BackoffConfig, RetryConfig

T = TypeVar("T")

KEY_LENGTH = 512
# Of one call, before it ends in 69. The four attempts that a stage has unless told otherwise so outlive two
# minutes without a store. Half of a pod's grace period: a call that waits hears no signal.
BUCKET_PATIENCE_SECONDS = 30.0
BUCKET_PAUSE_SECONDS = 2.0  # at most, between two tries
PIECE_BYTES = 1 << 20
_KEY_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # a leading dot is for files in the making

# What a store's operation may end in; not all of FeddiffError, which a signal may raise anywhere.
FAILURES = (InputMissing, OutputFailed, StorageFailed, StoreUnavailable)

# Room comes back: somebody makes it, or what filled it ends.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# A second try would meet the same wall.
UNWRITABLE = frozenset(
    {
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,  # a file where a folder should be
        errno.ENAMETOOLONG,
    }
)
# obstore names these for a single object; for a list and a deletion they come as text in a "Generic S3 error".
_REFUSED = re.compile(r"401 Unauthorized|403 Forbidden|404 Not Found|\(code: AccessDenied\)")
UNREADABLE = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR})


class Store(Protocol):
    """Objects under keys like `releases/x/seal.json`. Every method raises one of the errors of the tree."""

    uri: str

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises InputMissing when there is none."""
        ...

    def stream(self, key: str) -> Iterator[bytes | memoryview]:
        """The object's bytes in pieces, for whoever must not take more than it expects. Raises as `get`."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """`data` is at `key`, whole and durable, whatever was there."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """True: `data` is at `key`, whole and durable. False: something else was there first and is kept."""
        ...

    def exists(self, key: str) -> bool: ...

    def list(self, prefix: str) -> list[str]:
        """Keys below `prefix`, which ends in a slash, in order."""
        ...

    def delete(self, key: str) -> None:
        """Nothing is at `key`, whether or not something was."""
        ...


def open_store(uri: str, whose: Literal["owner", "federation"] | None = None) -> Store:
    """The store that `uri` names. Buckets take credentials, endpoint and region from AWS_… in the environment, where
    OWNER_AWS_… or FEDERATION_AWS_…, as `whose` says, come first: an owner's stages use both stores."""
    if uri.startswith("file://"):
        return FolderStore(uri)
    if uri.startswith("s3://"):
        with settings_of(whose):
            return BucketStore(uri)
    raise ConfigurationInvalid(f"store {uri}: expected file:///folder or s3://bucket/prefix; correct the address")


@contextmanager
def settings_of(whose: str | None) -> Iterator[None]:
    """AWS_… in the environment are those of `whose`, a key of its own without the session of another."""
    # In the environment, as obstore's own config refuses what it ignores there (AWS_PROFILE, AWS_ALLOW_HTTP).
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    prefix = f"{whose or ''}_".upper()
    own = {name.removeprefix(prefix): value for name, value in os.environ.items() if name.startswith(f"{prefix}AWS_")}
    if "AWS_ACCESS_KEY_ID" in own:
        os.environ.pop("AWS_SESSION_TOKEN", None)
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
        os.environ.update(before)


def get_verified(store: Store, key: str, sha256: str, most_bytes: int) -> bytes:
    """The object whose hash the planner handed over. Raises DataInvalid if the store holds another, or one of more
    than `most_bytes`."""
    data, found = read_hashed(store, key, most_bytes)
    _refuse_another(key, sha256, found)
    return data


def check_verified(store: Store, key: str, sha256: str) -> None:
    """Returns if the store holds the object whose hash the planner handed over; DataInvalid if it holds another."""
    digest = hashlib.sha256()
    for piece in store.stream(key):
        digest.update(piece)
    _refuse_another(key, sha256, digest.hexdigest())


def _refuse_another(key: str, expected: str, found: str) -> None:
    if found != expected:
        raise DataInvalid(f"{key}: expected SHA-256 {expected}, found {found}; somebody replaced it: make it again")


def read_hashed(store: Store, key: str, most_bytes: int) -> tuple[bytes, str]:
    """The object and its SHA-256, taken while it streams in. Raises DataInvalid if it has more than `most_bytes`,
    having read little more than them: whoever put it there may be hostile."""
    data, digest = io.BytesIO(), hashlib.sha256()  # unlike a bytearray, it hands its bytes out without a copy
    for piece in store.stream(key):
        digest.update(piece)
        data.write(piece)
        if data.tell() > most_bytes:
            raise DataInvalid(f"{key}: expected at most {most_bytes} bytes, found more; do not use it")
    return data.getvalue(), digest.hexdigest()


def check_creates_once(store: Store, prefix: str) -> None:
    """Returns if `store` honours create-if-absent below `prefix`. Raises PrivacyRefusal if it does not: then two
    attempts could both believe that theirs is the release."""
    key = f"{prefix}{layout.PROBE}{secrets.token_hex(16)}"
    try:
        answers = store.create(key, b"first"), store.create(key, b"second"), store.get(key)
    finally:
        with suppress(*FAILURES):
            store.delete(key)
    if answers != (True, False, b"first"):
        raise PrivacyRefusal(
            f"store {store.uri}: expected that an object is created once, found that a second create went through;"
            " a retry could release twice, so nothing was sent; use a store with conditional writes"
        )


def _checked(key: str) -> str:
    """`key`, if it stays below the store's root."""
    if len(key) > KEY_LENGTH or not all(_KEY_PART.fullmatch(part) for part in key.split("/")):
        raise StorageFailed(
            f"object key {key[:80]!r}: expected parts of letters, digits, '.', '_' and '-' between single slashes,"
            " none starting with a dot; do not use it"
        )
    return key


def _checked_prefix(prefix: str) -> str:
    assert prefix.endswith("/")  # client1/ must not match client10/
    return f"{_checked(prefix[:-1])}/"


# ---- Folders -------------------------------------------------------------------------------------------------


class FolderStore:
    """Objects as files below a folder.

    Not obstore's: that one makes a file visible before its bytes are on the disk, so that a loss of power could
    leave an empty seal, which nothing could ever repair without a second draw.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        path = unquote(uri.removeprefix("file://"))
        if not path.startswith("/") or "\0" in path:
            raise ConfigurationInvalid(f"store {uri}: expected file:/// and an absolute folder; correct the address")
        self.root = Path(path)

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with _read_errors(f"{self.uri}/{key}"):
            return path.read_bytes()

    def stream(self, key: str) -> Iterator[bytes]:
        path = self._path(key)
        with _read_errors(f"{self.uri}/{key}"), path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _write_errors(f"{self.uri}/{key}"), self._whole_file(path, data) as file:
            os.replace(file, path)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _write_errors(f"{self.uri}/{key}"), self._whole_file(path, data) as file:
            try:
                os.link(file, path)  # unlike a rename, fails where something is
            except FileExistsError:
                return False
            return True

    def exists(self, key: str) -> bool:
        path = self._path(key)
        with _read_errors(f"{self.uri}/{key}"):
            return path.is_file()

    def list(self, prefix: str) -> list[str]:
        folder = self.root / _checked_prefix(prefix)
        with _read_errors(f"{self.uri}/{prefix}"):
            return sorted(self._keys_below(folder))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _write_errors(f"{self.uri}/{key}"):
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / _checked(key)

    def _keys_below(self, folder: Path) -> Iterator[str]:
        for parent, _, names in os.walk(folder, onerror=_raise_unless_absent):
            for name in names:
                if not name.startswith("."):
                    yield (Path(parent) / name).relative_to(self.root).as_posix()

    @contextmanager
    def _whole_file(self, path: Path, data: bytes) -> Iterator[Path]:
        """A durable file with `data`, hidden from `list`, next to `path`; whatever name it got is durable after."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.parent / f".{path.name}.{secrets.token_hex(8)}"
        try:
            _write_durably(file, data)
            yield file
        finally:
            file.unlink(missing_ok=True)
            self._sync_folders(path.parent)

    def _sync_folders(self, folder: Path) -> None:
        # Up to the root's own entry: any of them may just have been made.
        for parent in (folder, *folder.parents):
            sync_folder(parent)
            if parent == self.root.parent:
                return


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


@contextmanager
def _read_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in UNREADABLE:
            raise InputMissing(f"{where}: expected an object that can be read, found: {reason}") from error
        raise StorageFailed(f"{where}: reading failed: {reason}; try again") from error


@contextmanager
def _write_errors(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in UNWRITABLE:
            raise OutputFailed(
                f"{where}: expected a place that can be written, found: {reason}; give permission, then run it again"
            ) from error
        if error.errno in FULL:
            raise StorageFailed(
                f"{where}: expected room to write, found: {reason}; make room, then try again"
            ) from error
        raise StorageFailed(f"{where}: writing failed: {reason}; try again") from error


# ---- Buckets -------------------------------------------------------------------------------------------------


class BucketStore:
    """Objects in an S3 bucket, below the address's prefix; `create` is PUT with If-None-Match: *."""

    def __init__(self, uri: str) -> None:
        # Loaded here: a local run has no bucket.
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import S3Store

        self.uri = uri
        self._obstore = obstore
        try:
            self._bucket = S3Store.from_url(uri, retry_config=_patience())
        except (BaseError, ValueError) as error:
            raise ConfigurationInvalid(f"store {uri}: {_first_line(error)}; correct the address or AWS_…") from error

    def get(self, key: str) -> bytes:
        return self._call(key, lambda: bytes(self._obstore.get(self._bucket, _checked(key)).bytes()), InputMissing)

    def stream(self, key: str) -> Iterator[bytes | memoryview]:
        pieces = self._call(key, lambda: self._obstore.get(self._bucket, _checked(key)).stream(), InputMissing)
        while piece := self._call(key, lambda: next(pieces, None), InputMissing):
            yield memoryview(piece)

    def put(self, key: str, data: bytes) -> None:
        self._call(key, lambda: self._obstore.put(self._bucket, _checked(key), data), OutputFailed)

    def create(self, key: str, data: bytes) -> bool:
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def create() -> bool:
            try:
                self._obstore.put(self._bucket, _checked(key), data, mode="create")
            except (AlreadyExistsError, PreconditionError):
                return False
            return True

        return self._call(key, create, OutputFailed)

    def exists(self, key: str) -> bool:
        def exists() -> bool:
            try:
                self._obstore.head(self._bucket, _checked(key))
            except FileNotFoundError:
                return False
            return True

        return self._call(key, exists, InputMissing)

    def list(self, prefix: str) -> list[str]:
        def keys() -> list[str]:
            batches = self._obstore.list(self._bucket, _checked_prefix(prefix))
            return sorted(entry["path"] for batch in batches for entry in batch)

        return self._call(prefix, keys, InputMissing)

    def delete(self, key: str) -> None:
        def delete() -> None:
            with suppress(FileNotFoundError):
                self._obstore.delete(self._bucket, _checked(key))

        self._call(key, delete, OutputFailed)

    def _call(self, key: str, call: Callable[[], T], refused: type[FeddiffError]) -> T:
        """What `call` returns, its errors as ours; `refused` is for an object that may not be touched."""
        from obstore.exceptions import (
            BaseError,
            InvalidPathError,
            NotSupportedError,
            PermissionDeniedError,
            UnauthenticatedError,
            UnknownConfigurationKeyError,
        )

        where = f"{self.uri}/{key}"
        try:
            return call()
        except (FileNotFoundError, PermissionDeniedError, UnauthenticatedError) as error:
            raise refused(f"{where}: {_first_line(error)}; check the address and who may use it") from error
        except (InvalidPathError, NotSupportedError, UnknownConfigurationKeyError) as error:
            raise ConfigurationInvalid(f"{where}: {_first_line(error)}; use another store or setting") from error
        except (BaseError, OSError) as error:
            if _REFUSED.search(str(error)):
                raise refused(f"{where}: {_first_line(error)}; check the address and who may use it") from error
            raise StoreUnavailable(f"{where}: the store does not answer: {_first_line(error)}; try again") from error


def _patience() -> "RetryConfig":
    """How obstore tries a call again, for as long as we have patience."""
    first, most, all_of_them = (
        timedelta(seconds=each) for each in (BUCKET_PAUSE_SECONDS / 20, BUCKET_PAUSE_SECONDS, BUCKET_PATIENCE_SECONDS)
    )
    pauses: BackoffConfig = {"init_backoff": first, "max_backoff": most, "base": 2}
    return {"max_retries": 10_000, "retry_timeout": all_of_them, "backoff": pauses}


def _first_line(error: Exception) -> str:
    # obstore appends the whole request for debugging.
    return str(error).split("\n", 1)[0][:300]
