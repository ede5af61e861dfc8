#!/usr/bin/env python3
"""A real S3 server for tests: SeaweedFS's own program, from PyPI, with an identity for every party.

    with Weed(folder, {"clinic-a": ["Read:clinic-a", "Write:clinic-a", "List:clinic-a"]}, ["clinic-a"]) as server:
        server.environment("clinic-a")      # AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, …

An action is `Read`, `Write` or `List` of a bucket, or of a part of it: `Write:clinic-a/feddiff/*`.

As a program, `weed.py FOLDER ADDRESS OWNER...`, it serves a federation until its parent ends: a bucket `federation` and
one per owner, and in FOLDER/<identity>.env the keys of `trainer`, of each owner for its own store, of
`federation-<owner>`, each with its least policy for s3://federation/jobs and s3://<owner>/feddiff, and of the
`administrator`. FOLDER/ready says that it stores.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from feddiff_protocol.access import Role, least_access, seaweedfs_actions

FEDERATION = "s3://federation/jobs"
ADMINISTRATOR = "administrator"
READY_SECONDS = 60


class Weed:
    """The server in `folder`, on free ports of `address`, until it is left. Should this process be killed, the kernel
    kills the server."""

    def __init__(
        self, folder: Path, actions: Mapping[str, Iterable[str]], buckets: Iterable[str], address: str = "127.0.0.1"
    ) -> None:
        self.folder, self.buckets, self.address = folder, list(buckets), address
        self._actions = {ADMINISTRATOR: ["Admin"], **{name: list(allowed) for name, allowed in actions.items()}}
        self._keys = {name: (secrets.token_hex(10), secrets.token_hex(20)) for name in self._actions}
        names = [f"{part}.port{kind}" for part in ("master", "volume", "filer", "s3") for kind in ("", ".grpc")]
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self._ports['s3.port']}"

    def environment(self, identity: str) -> dict[str, str]:
        """What a stage, or a Secret, needs to reach the server as `identity`."""
        key, secret = self._keys[identity]
        return {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def client(self, identity: str = ADMINISTRATOR) -> Any:
        """boto3's S3 client as `identity`: another implementation than the one under test."""
        return client_of(self.environment(identity))

    def write_keys(self) -> None:
        """An env file per identity in the folder: `kubectl create secret generic --from-env-file` takes it."""
        for identity in self._keys:
            file = self.folder / f"{identity}.env"
            file.touch(0o600)
            file.write_text("".join(f"{name}={value}\n" for name, value in self.environment(identity).items()))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """It stores; after a `stop`, at the same address, what it held before, for the same keys."""
        self.folder.mkdir(parents=True, exist_ok=True)
        identities = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": self._actions[name]}
            for name, (key, secret) in self._keys.items()
        ]
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}, indent=1))
        with (self.folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), stdout=log, stderr=log, preexec_fn=_die_with_parent)
        try:
            self._wait_until_it_stores()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """It is gone, as by kill -9: on SIGTERM it takes 18 s."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _command(self) -> list[str]:
        weed = Path(sys.executable).with_name("weed")
        return [
            str(weed),
            "server",
            *(f"-ip={self.address}", f"-ip.bind={self.address}", f"-dir={self.folder}"),
            *("-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=200"),
            *(f"-filer.localSocket={self.folder}/filer.sock", f"-s3.localSocket={self.folder}/s3.sock"),
            *(f"-{name}={port}" for name, port in self._ports.items()),
            *("-s3", f"-s3.config={self.folder}/identities.json", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            "-s3.autoCreateBucket=false",
        ]

    def _wait_until_it_stores(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                return self._make_buckets(self.client())
            except (BotoCoreError, ClientError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self.folder / "weed.log").read_text()[-3000:]
                    raise RuntimeError(f"the S3 server is not ready: {error}\n{log}") from error
                time.sleep(0.1)

    def _make_buckets(self, client: Any) -> None:
        made = {each["Name"] for each in client.list_buckets()["Buckets"]}
        for bucket in self.buckets:
            if bucket not in made:
                client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=bucket, Key="ready", Body=b"-")
            client.delete_object(Bucket=bucket, Key="ready")


def client_of(environment: Mapping[str, str]) -> Any:
    """boto3's S3 client with the address and keys in `environment`."""
    return boto3.session.Session().client(
        "s3",
        environment["AWS_REGION"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"max_attempts": 1}, s3={"addressing_style": "path"}),
    )


def environment_in(file: Path) -> dict[str, str]:
    """The variables in an env file, as `kubectl create secret --from-env-file` reads it."""
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


_LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        os._exit(1)


def federation_of(owners: Iterable[str], clients: Mapping[str, str] | None = None) -> dict[str, list[str]]:
    """The least that each identity of a federation needs; clients are called as their owners, or as `clients` says."""
    may = {"trainer": seaweedfs_actions(least_access(Role.TRAINER), FEDERATION)}
    for owner in owners:
        client = (clients or {}).get(owner, owner)
        may[owner] = seaweedfs_actions(least_access(Role.OWNER), f"s3://{owner}/feddiff")
        may[f"federation-{owner}"] = seaweedfs_actions(least_access(Role.FEDERATION, client), FEDERATION)
    return may


def main() -> None:
    _die_with_parent()
    folder, address, *owners = sys.argv[1:]
    may = federation_of(owners)
    with Weed(Path(folder).resolve(), may, ["federation", *owners], address) as server:
        server.write_keys()
        (server.folder / "ready").touch()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
