"""Whether a store can carry releases: `python -m feddiff_trainer.store_check SPEC.json`.

Every question is put to the store itself, with the keys of whoever asks, and answered in one finding; JSON on stdout.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from feddiff_protocol.errors import InputMissing

from .answering import answered
from .bucket_check import check_bucket
from .store_probes import Finding, StoreCheckSpec, behaviour, failed, fine, probe_prefix, warning
from .stores import FolderStore

MOUNTS = Path("/proc/mounts")
FORGETFUL = frozenset({"tmpfs", "ramfs"})
UNPROVEN = ("nfs", "cifs", "smb", "fuse", "9p")  # never tested with two machines and a loss of power
_ESCAPED_IN_MOUNTS = {r"\040": " ", r"\011": "\t", r"\134": "\\"}


def check_store(spec: StoreCheckSpec) -> list[Finding]:
    """What was found, in the order asked; nothing follows a finding that makes the rest meaningless."""
    if spec.uri.startswith("file://"):
        return list(_check_folder(spec))
    return list(check_bucket(spec))


# ---- Folders -----------------------------------------------------------------------------------------------------


def _check_folder(spec: StoreCheckSpec) -> Iterator[Finding]:
    store = FolderStore(spec.uri)
    if not store.root.is_dir():
        expected, advice = f"a folder at {store.root}", "make it, or mount what should be there"
        yield failed("folder", InputMissing, expected=expected, found="none", advice=advice)
        return
    yield _filesystem(store.root)
    if spec.whose == "owner":
        yield _mode(store.root)
    prefix = probe_prefix(spec)
    before = [folder for folder in _folders_of(store.root, prefix) if folder.exists()]
    yield from behaviour(spec, store, prefix)
    for folder in _folders_of(store.root, prefix):
        if folder not in before:
            with suppress(OSError):
                folder.rmdir()


def _folders_of(root: Path, prefix: str) -> list[Path]:
    """The folders that a key below `prefix` needs, the innermost first."""
    inner = root / prefix
    return [folder for folder in (inner, *inner.parents) if folder != root and folder.is_relative_to(root)]


def _filesystem(root: Path) -> Finding:
    kind, room = filesystem_of(root, MOUNTS.read_text() if MOUNTS.exists() else ""), shutil.disk_usage(root).free
    found = f"{kind}, {room >> 20:,} MiB free"
    if kind in FORGETFUL:
        advice = "use a disk: a seal that is lost can never be made again"
        return warning("folder", expected="a disk that outlives a reboot", found=found, advice=advice)
    if kind.startswith(UNPROVEN):
        advice = "feddiff is tested on local disks: ask whether fsync and hard links hold across machines"
        return warning("folder", expected="a local disk", found=found, advice=advice)
    return fine("folder", found)


def filesystem_of(path: Path, mounts: str) -> str:
    """The kind of file system that `path` lies on, by the lines of /proc/mounts; "unknown" without them."""
    kinds: dict[Path, str] = {}
    for line in mounts.splitlines():
        _, where, kind, *_ = line.split(" ")
        for escaped, plain in _ESCAPED_IN_MOUNTS.items():
            where = where.replace(escaped, plain)
        kinds[Path(where)] = kind
    real = path.resolve()
    return next((kinds[each] for each in (real, *real.parents) if each in kinds), "unknown")


def _mode(root: Path) -> Finding:
    mode = root.stat().st_mode & 0o777
    if mode & 0o077 == 0:
        return fine("permissions", f"{mode:03o}, the owner's alone")
    advice = f"chmod 700 {root}: seals, personal denoisers and samples are the owner's alone"
    return warning("permissions", expected="700", found=f"{mode:03o}", advice=advice)


# ---- The process -------------------------------------------------------------------------------------------------


def main() -> int:
    """The exit code: 0 once the questions were put, whatever was found."""
    return answered(StoreCheckSpec, lambda spec: {"findings": [finding.to_wire() for finding in check_store(spec)]})


if __name__ == "__main__":
    sys.exit(main())
