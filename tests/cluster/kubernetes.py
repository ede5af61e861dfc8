#!/usr/bin/env python3
"""A real Kubernetes on this machine, for tests.

    kubernetes.py up DIR          etcd, API server and controller-manager on a loopback address of their own (4 s)
    kubernetes.py up DIR --node   also scheduler, containerd, kubelet, kube-proxy and CoreDNS, so that pods run (root)
    kubernetes.py down DIR        stops what `up` started; DIR keeps the data, the logs and the audit log
    kubernetes.py load DIR IMAGE.tar...   imports docker or OCI archives into the node

`up` on a DIR that was used before starts the same cluster again: same certificates, address and data.
The programs are built by tests/cluster/build.sh.
"""

import argparse
import base64
import contextlib
import datetime
import functools
import http.client
import ipaddress
import itertools
import json
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PROGRAMS = Path(os.environ.get("FEDDIFF_KUBE", Path.home() / ".cache/feddiff/kube"))
RUN = Path("/run/feddiff-test")  # the node's sockets and mounts; short, since a socket's path has at most 107 bytes
NODE_ADDRESS = "10.244.0.1"  # of the pods' bridge: what pods have to reach listens here
POD_CIDR, SERVICE_CIDR = "10.244.0.0/24", "10.96.0.0/16"
NODE_NAME = "node-1"


class ProgramsMissing(Exception):
    """The cluster's programs are not built."""


class CommandFailed(Exception):
    """kubectl or helm ended with an error; the message is what it said."""


class ControlPlane:
    """etcd, API server and controller-manager in `directory`. Many can run side by side.

    A context manager: up on entering, down on leaving. Should this process be killed, all is stopped as well.
    """

    def __init__(self, directory: Path, programs: Path = PROGRAMS) -> None:
        self.directory = directory.resolve()
        self.programs = programs
        self.processes = Processes(self.directory)
        self.authority = Authority(self.directory / "ca")
        self._guard: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count(1)

    # ---- what tests use

    @property
    def kubeconfig(self) -> Path:
        """Of a user who may do everything."""
        return self.user("admin", ["system:masters"])

    @property
    def audit_log(self) -> Path:
        """One JSON line per request: user, verb, object, response status."""
        return self.directory / "audit.log"

    def kubectl(self, *argv: str | Path, stdin: str | None = None, user: Path | None = None) -> str:
        """What kubectl prints, run as the administrator or with `user`'s kubeconfig. Raises CommandFailed."""
        return self._tool("kubectl", argv, stdin, user)

    def helm(self, *argv: str | Path, stdin: str | None = None, user: Path | None = None) -> str:
        """What helm prints. Raises CommandFailed."""
        return self._tool("helm", argv, stdin, user)

    def request(self, method: str, path: str, body: Any = None, content: str = "application/json") -> tuple[int, Any]:
        """Status and JSON of one call to the API server as the administrator; cheap enough for thousands."""
        connection = http.client.HTTPSConnection(self.address, 6443, context=self.administrator, timeout=60)
        with contextlib.closing(connection):
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": content, "Accept": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        return response.status, json.loads(text) if text.startswith("{") else text

    @functools.cached_property
    def administrator(self) -> ssl.SSLContext:
        """For connections to `https://{address}:6443` by a user who may do everything."""
        context = ssl.create_default_context(cafile=self.authority.certificate_path)
        context.load_cert_chain(*self.authority.client("admin", ["system:masters"]))
        return context

    def user(self, name: str, groups: Iterable[str] = ()) -> Path:
        """A kubeconfig for `name` in `groups`, at any time: the user's certificate is signed by the cluster's CA."""
        groups = list(groups)
        who = "+".join([name, *groups]).replace(":", ".")  # KUBECONFIG is a list with colons
        path = self.directory / "users" / f"{who}.kubeconfig"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.touch(0o600)
            path.write_text(json.dumps(self._kubeconfig(name, groups), indent=1))
        return path

    def namespace(self, prefix: str = "test") -> str:
        """The name of a new namespace, ready for pods."""
        name = f"{prefix}-{next(self._numbers)}-{secrets.token_hex(3)}"
        status, answer = self.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        assert status == 201, answer
        self._wait("service account", lambda: self._found(f"/api/v1/namespaces/{name}/serviceaccounts/default"), 30)
        return name

    def start(self, component: str) -> None:
        """Starts one of `components`, without waiting for it to be ready."""
        self.processes.start(component, self.components()[component])

    def kill(self, component: str) -> None:
        """`component` is gone, as by kill -9."""
        self.processes.kill(component)

    def restart(self, component: str) -> None:
        """Kills and starts `component`, and waits until the cluster is ready again."""
        self.kill(component)
        self.start(component)
        self._wait_until_ready()

    # ---- life

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, outlive: bool = False) -> None:
        """The cluster is ready. With `outlive` it stays when this process ends; `down` stops it."""
        if not (self.programs / "kube").exists():
            raise ProgramsMissing(f"run tests/cluster/build.sh: {self.programs / 'kube'} is missing")
        if running := self.processes.running():
            raise SystemExit(f"{self.directory}: {', '.join(running)} already running; stop them with `down`")
        self._write_files()
        if not outlive:
            self._guard = guard(self.directory)
        try:
            self._start_all()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Every process of the cluster is gone, at once, as after a power cut; `up` carries on from its data."""
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None
        for component in self.processes.running():
            self.kill(component)

    def _start_all(self) -> None:
        self.start("etcd")
        self.start("kube-apiserver")
        self._wait("kube-apiserver", lambda: self.request("GET", "/readyz")[0] == 200, 60)
        self.start("kube-controller-manager")
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        self._wait("kube-apiserver", lambda: self.request("GET", "/readyz")[0] == 200, 60)
        self._wait("service account", lambda: self._found("/api/v1/namespaces/default/serviceaccounts/default"), 60)

    def _wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not _without_answer_false(condition):
            for component in self.processes.ended():
                raise RuntimeError(f"{component} ended: {_tail(self.processes.log(component))}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} not ready after {seconds} s; see {self.directory / 'logs'}")
            time.sleep(0.03)

    def _found(self, path: str) -> bool:
        return self.request("GET", path)[0] == 200

    # ---- files

    @property
    def address(self) -> str:
        """127.x.y.z, drawn once per cluster: clusters side by side use the same ports and never meet."""
        file = self.directory / "address"
        if not file.exists():
            drawn = [64 + secrets.randbelow(64), secrets.randbelow(256), 1 + secrets.randbelow(254)]
            file.write_text(".".join(map(str, [127, *drawn])))
        return file.read_text()

    def _write_files(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.authority.create()
        names = [f"kubernetes{rest}" for rest in ("", ".default", ".default.svc", ".default.svc.cluster.local")]
        self.authority.server("apiserver", [self.address, "10.96.0.1", "localhost", *names])
        self.authority.key_pair("service-accounts")
        policy = {"omitStages": ["RequestReceived"], "rules": [{"level": "Metadata"}]}
        self._write("audit-policy.json", {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", **policy})

    def _write(self, name: str, value: Any) -> Path:
        path = self.directory / name
        path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
        return path

    def _kubeconfig(self, name: str, groups: Iterable[str]) -> dict[str, Any]:
        certificate, key = self.authority.client(name, groups)
        cluster = {
            "server": f"https://{self.address}:6443",
            "certificate-authority-data": _base64(self.authority.certificate_path),
        }
        credentials = {"client-certificate-data": _base64(certificate), "client-key-data": _base64(key)}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": credentials}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
        }

    def _tool(self, program: str, argv: Iterable[str | Path], stdin: str | None, user: Path | None) -> str:
        command = [str(self.programs / program), "--kubeconfig", str(user or self.kubeconfig), *map(str, argv)]
        environment = {**os.environ, "NO_PROXY": "*", "KUBECACHEDIR": f"{self.directory}/discovery"}
        done = subprocess.run(command, input=stdin or "", text=True, capture_output=True, env=environment)
        if done.returncode:
            raise CommandFailed(f"{program} {' '.join(map(str, argv))}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    # ---- components

    def components(self) -> dict[str, list[str]]:
        """The command line of each process, in the order in which they start."""
        return {
            "etcd": self._kube("etcd", *self._etcd()),
            "kube-apiserver": self._kube("kube-apiserver", *self._apiserver()),
            "kube-controller-manager": self._kube("kube-controller-manager", *self._controller_manager()),
        }

    def _kube(self, component: str, *flags: str) -> list[str]:
        return [str(self.programs / "kube"), component, *flags]

    def _etcd(self) -> Iterable[str]:
        client, peer = f"http://{self.address}:2379", f"http://{self.address}:2380"
        yield f"--data-dir={self.directory}/etcd"
        yield from (f"--listen-client-urls={client}", f"--advertise-client-urls={client}")
        yield from (f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}")
        yield f"--initial-cluster=default={peer}"
        yield "--unsafe-no-fsync"  # survives kill -9, though not a power cut: the kernel keeps what was written
        yield "--log-level=warn"

    def _apiserver(self) -> Iterable[str]:
        files, authority = self.directory, self.authority
        yield f"--etcd-servers=http://{self.address}:2379"
        yield from (f"--bind-address={self.address}", "--secure-port=6443", *self._advertised())
        certificate, key = authority.paths("apiserver")
        yield from (f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}", f"--cert-dir={files}/certs")
        yield f"--client-ca-file={authority.certificate_path}"
        yield from ("--anonymous-auth=false", "--authorization-mode=Node,RBAC")
        yield "--enable-admission-plugins=NodeRestriction"
        yield "--allow-privileged=true"
        public, private = authority.paths("service-accounts")
        yield from (f"--service-account-key-file={public}", f"--service-account-signing-key-file={private}")
        yield "--service-account-issuer=https://kubernetes.default.svc.cluster.local"
        yield f"--service-cluster-ip-range={SERVICE_CIDR}"
        yield f"--audit-policy-file={files}/audit-policy.json"
        yield from (f"--audit-log-path={self.audit_log}", "--audit-log-maxsize=1000")
        yield "--event-ttl=24h"

    def _advertised(self) -> Iterable[str]:
        return ["--endpoint-reconciler-type=none"]  # a loopback address cannot be the endpoint of a Service

    def _controller_manager(self) -> Iterable[str]:
        yield f"--kubeconfig={self.user('system:kube-controller-manager')}"
        yield f"--service-account-private-key-file={self.authority.paths('service-accounts')[1]}"
        yield f"--root-ca-file={self.authority.certificate_path}"
        yield from ("--use-service-account-credentials=true", "--leader-elect=false")
        yield from (f"--bind-address={self.address}", "--secure-port=10257", f"--cert-dir={self.directory}/certs-cm")
        without = ("node-ipam", "cloud-node-lifecycle", "service-lb", "node-route")
        yield "--controllers=*," + ",".join(f"-{name}-controller" for name in without)
        yield from ("--kube-api-qps=200", "--kube-api-burst=400")
        yield from ("--node-monitor-period=1s", "--node-monitor-grace-period=12s")  # a lost node is noticed soon


class Node(ControlPlane):
    """A control plane and one node on which pods really run. Needs root, and there is one per machine.

    NetworkPolicies are stored but not enforced: the bridge has no policy engine.
    """

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.forget_images()

    def forget_images(self) -> None:
        """10 GB with ours; a stopped node's logs stay."""
        shutil.rmtree(self.directory / "containerd", ignore_errors=True)

    @property
    def address(self) -> str:
        return NODE_ADDRESS

    def load(self, *archives: Path) -> None:
        """Imports docker or OCI archives; pods use them with imagePullPolicy Never or IfNotPresent.

        What a new node has unpacked is kept beside the archives, and the next new one has it in seconds.
        """
        kept, root = archives[0].parent / "unpacked", self.directory / "containerd"
        note = kept / "holds"
        holds = "".join(f"{archive.name} {archive.stat().st_mtime_ns}\n" for archive in archives)
        new = self._images() == {PAUSE}
        if new and note.exists() and note.read_text() == holds:
            with self._without_containerd():
                linked = _linked(kept / "containerd", root)
            if linked:
                return
        self._import(*archives)
        if new:
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            with self._without_containerd():
                if _linked(root, kept / "containerd"):
                    note.write_text(holds)

    def _images(self) -> set[str]:
        return {name for name in self._ctr("images", "ls", "-q").split() if not name.startswith("sha256:")}

    def _import(self, *archives: Path) -> None:
        for archive in archives:
            self._ctr("images", "import", str(archive))

    def _ctr(self, *argv: str) -> str:
        command = [*CTR, "-n", "k8s.io", *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            free = shutil.disk_usage(self.directory).free >> 30
            raise CommandFailed(f"{' '.join(command)}: {done.stderr.strip()} ({free} GiB are free)")
        return done.stdout

    @contextlib.contextmanager
    def _without_containerd(self) -> Iterator[None]:
        self.kill("containerd")
        yield
        self._start_containerd()

    def _start_containerd(self) -> None:
        self.start("containerd")
        self._wait("containerd", lambda: subprocess.run([*CTR, "version"], capture_output=True).returncode == 0, 30)

    def up(self, outlive: bool = False) -> None:
        if os.geteuid():
            raise SystemExit("a node needs root; a control plane alone does not")
        owner = RUN / "directory"
        if owner.exists() and (other := Node(Path(owner.read_text()), self.programs)).directory != self.directory:
            if other.processes.running():
                raise SystemExit(f"a node runs already in {other.directory}; stop it with `down`")
            other.down()  # it was killed: its pods and mounts are still here
        RUN.mkdir(parents=True, exist_ok=True)
        owner.write_text(str(self.directory))
        super().up(outlive)

    def down(self) -> None:
        super().down()
        _kill_containers()
        _unmount_below(self.directory, RUN)
        shutil.rmtree(RUN, ignore_errors=True)
        subprocess.run(self._kube("kube-proxy", "--cleanup"), capture_output=True)
        _ip("link", "del", "cni0")

    def _start_all(self) -> None:
        _make_bridge()
        super()._start_all()
        self._start_containerd()
        self._import(self.programs / "pause.tar")
        self.kubectl("apply", "-f", "-", stdin=json.dumps(MAY_VIEW))
        for component in ("kube-scheduler", "kubelet", "kube-proxy", "coredns"):
            self.start(component)
        self._wait("node", self._node_ready, 90)

    def _node_ready(self) -> bool:
        status, node = self.request("GET", f"/api/v1/nodes/{NODE_NAME}")
        conditions = node["status"]["conditions"] if status == 200 else []
        return ("Ready", "True") in {(each["type"], each["status"]) for each in conditions}

    def components(self) -> dict[str, list[str]]:
        return super().components() | {
            "containerd": ["containerd", "--config", f"{self.directory}/containerd.toml"],
            "kube-scheduler": self._kube("kube-scheduler", *self._scheduler()),
            "kubelet": self._kube("kubelet", *self._kubelet()),
            "kube-proxy": self._kube("kube-proxy", f"--config={self.directory}/proxy.json"),
            "coredns": self._kube("coredns", "-conf", f"{self.directory}/Corefile"),
        }

    def _advertised(self) -> Iterable[str]:
        certificate, key = self.authority.client("kube-apiserver", ["system:masters"])  # to read a pod's log
        yield from (f"--kubelet-client-certificate={certificate}", f"--kubelet-client-key={key}")
        yield from ("--kubelet-preferred-address-types=InternalIP", f"--advertise-address={NODE_ADDRESS}")

    def _scheduler(self) -> Iterable[str]:
        yield from (f"--kubeconfig={self.user('system:kube-scheduler')}", "--leader-elect=false")
        yield from ("--bind-address=127.0.0.1", f"--cert-dir={self.directory}/certs-scheduler")

    def _kubelet(self) -> Iterable[str]:
        yield f"--config={self.directory}/kubelet.json"
        yield f"--kubeconfig={self.user(f'system:node:{NODE_NAME}', ['system:nodes'])}"
        yield from (f"--root-dir={self.directory}/kubelet", f"--cert-dir={self.directory}/certs-kubelet")
        yield from (f"--hostname-override={NODE_NAME}", f"--node-ip={NODE_ADDRESS}")

    def _write_files(self) -> None:
        super()._write_files()
        (self.directory / "cni").mkdir(exist_ok=True)
        self._write("cni/10-bridge.conflist", NETWORK)
        self._write("containerd.toml", CONTAINERD.format(directory=self.directory, run=RUN, pause=PAUSE))
        self._write("resolv.conf", f"nameserver {NODE_ADDRESS}\n")
        self._write("kubelet.json", kubelet_configuration(self.directory, self.authority.certificate_path))
        self._write("proxy.json", proxy_configuration(self.user("system:kube-proxy")))
        self._write("Corefile", COREFILE.format(address=NODE_ADDRESS, kubeconfig=self.user("coredns")))


# ---- the node's parts

PAUSE = "localhost/pause:1"  # what holds a pod's network
CTR = ["ctr", "-a", f"{RUN}/containerd.sock"]
CONTAINERD = """version = 2
root = "{directory}/containerd"
state = "{run}/containerd"
[grpc]
address = "{run}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true  # machines without CAP_SYS_RESOURCE cannot lower it, and every sandbox would fail
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{directory}/cni"
"""
COREFILE = """.:53 {{
  bind {address}
  errors
  ready 127.0.0.1:8181
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {kubeconfig} test
    pods insecure
    ttl 5
  }}
}}
"""
MAY_VIEW = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "ClusterRoleBinding",
    "metadata": {"name": "coredns"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
    "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "coredns"}],
}
ADDRESSES = {  # in RUN: after a reboot every address is free again
    "type": "host-local",
    "ranges": [[{"subnet": POD_CIDR, "rangeStart": "10.244.0.10"}]],
    "routes": [{"dst": "0.0.0.0/0"}],
    "dataDir": f"{RUN}/ipam",
}
NETWORK = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [
        {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": ADDRESSES},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ],
}


def kubelet_configuration(directory: Path, ca_certificate: Path) -> dict[str, Any]:
    """Of a small node whose images are never collected and which never thinks that its disk is full."""
    x509_clients = {"clientCAFile": str(ca_certificate)}
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": NODE_ADDRESS,
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": x509_clients},
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "containerRuntimeEndpoint": f"unix://{RUN}/containerd.sock",
        "clusterDNS": [NODE_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": f"{directory}/resolv.conf",
        "podCIDR": POD_CIDR,
        "podLogsDir": f"{directory}/pod-logs",
        "volumePluginDir": f"{directory}/volume-plugins",
        "imageGCHighThresholdPercent": 100,
        "imageMinimumGCAge": "24h",
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "nodeStatusUpdateFrequency": "4s",
        "syncFrequency": "10s",
        "seccompDefault": True,
    }


def proxy_configuration(kubeconfig: Path) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clusterCIDR": POD_CIDR,
        "hostnameOverride": NODE_NAME,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "bindAddress": "127.0.0.1",
        "metricsBindAddress": "127.0.0.1:10249",
        "healthzBindAddress": "127.0.0.1:10256",
        "conntrack": {"maxPerCore": 0, "min": 0},
    }


def _linked(source: Path, target: Path) -> bool:
    """Whether `target` is now what `source` is: by hard links, which take no room, and databases of its own. Nothing
    else that is there is ever written to. False across file systems, and `target` is as it was."""
    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of one that was killed
    if subprocess.run(["cp", "-al", source, new], capture_output=True).returncode:
        shutil.rmtree(new, ignore_errors=True)
        return False
    for database in new.glob("*/*.db"):
        database.unlink()
        shutil.copy2(source / database.relative_to(new), database)
    shutil.rmtree(target, ignore_errors=True)
    new.replace(target)
    return True


def _ip(*argv: str) -> int:
    return subprocess.run(["ip", *argv], capture_output=True).returncode


def _make_bridge() -> None:
    if _ip("link", "show", "cni0"):
        _ip("link", "add", "cni0", "type", "bridge")
    _ip("addr", "replace", f"{NODE_ADDRESS}/24", "dev", "cni0")
    _ip("link", "set", "cni0", "up")
    for setting in ("ipv4/ip_forward", "bridge/bridge-nf-call-iptables", "ipv4/conf/all/route_localnet"):
        if (file := Path("/proc/sys/net") / setting).exists():
            file.write_text("1")


def _kill_containers() -> None:
    """Kills each container's first process and its shim: shims outlive containerd, so that it can restart."""
    commands = {int(each.name): each for each in Path("/proc").iterdir() if each.name.isdigit()}
    shims = {pid for pid, folder in commands.items() if f"{RUN}/containerd.sock" in _command(folder)}
    containers = {pid for pid, folder in commands.items() if _parent(folder) in shims}
    for pid in containers | shims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _command(process: Path) -> str:
    with contextlib.suppress(OSError):
        command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        return command if "containerd-shim" in command else ""
    return ""


def _parent(process: Path) -> int:
    with contextlib.suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _unmount_below(*folders: Path) -> None:
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        mount = Path(line.split()[1])
        if any(mount.is_relative_to(folder) for folder in folders):
            subprocess.run(["umount", "-l", str(mount)], capture_output=True)


# ---- processes


class Processes:
    """Named processes in `directory`, remembered in a file, so that whoever comes later can stop them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = directory / "processes.json"
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def log(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    def start(self, name: str, command: list[str]) -> None:
        self.log(name).parent.mkdir(exist_ok=True)
        environment = {**os.environ, "NO_PROXY": "*"}
        with self.log(name).open("ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        self._children[child.pid] = child
        self._remember(self._known() | {name: [child.pid, _start_time(child.pid)]})

    def kill(self, name: str) -> None:
        known = self._known()
        pid, started = known.pop(name)
        if _start_time(pid) == started:
            os.kill(pid, signal.SIGKILL)
        if child := self._children.pop(pid, None):
            child.wait()
        while _start_time(pid) == started:
            time.sleep(0.01)
        self._remember(known)

    def running(self) -> list[str]:
        return [name for name, (pid, started) in self._known().items() if _start_time(pid) == started]

    def ended(self) -> list[str]:
        """Those that were started and not killed, and are gone all the same."""
        return [name for name in self._known() if name not in self.running()]

    def _known(self) -> dict[str, list[int]]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def _remember(self, known: dict[str, list[int]]) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(known))
        new.replace(self._file)


def _start_time(pid: int) -> int:
    """In clock ticks after boot, 0 if there is no such process: a pid alone may be another process by now."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0 if state == "Z" else int(fields[18])


def guard(directory: Path) -> subprocess.Popen[bytes]:
    """A process that runs `down` once this one is gone: its standard input then ends."""
    down = [sys.executable, __file__, "down", str(directory)]
    return subprocess.Popen(
        ["sh", "-c", 'read -r _; exec "$@"', "guard", *down],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _without_answer_false(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except (OSError, http.client.HTTPException):
        return False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-3:])


# ---- certificates


class Authority:
    """The cluster's certificate authority: keys and certificates in `folder`, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate_path = self.paths("ca")[0]

    def paths(self, name: str) -> tuple[Path, Path]:
        """Files of the certificate (or bare public key) and of the private key."""
        return self.folder / f"{name}.crt", self.folder / f"{name}.key"

    def create(self) -> None:
        self.folder.mkdir(exist_ok=True)
        if not self.certificate_path.exists():
            key = self._new_key("ca")
            builder = self._builder(CA_NAME, key.public_key())
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            self._sign("ca", builder, key)

    def server(self, name: str, hosts: Iterable[str]) -> tuple[Path, Path]:
        alternatives = x509.SubjectAlternativeName([_alternative_name(host) for host in hosts])
        return self._issue(name, _name(name), alternatives)

    def client(self, user: str, groups: Iterable[str]) -> tuple[Path, Path]:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        groups = list(groups)
        return self._issue("+".join([user, *groups]), _name(user, *groups), usage)

    def key_pair(self, name: str) -> None:
        public, private = self.paths(name)
        if not private.exists():
            key = self._new_key(name)
            public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    def _issue(self, name: str, subject: x509.Name, extension: x509.ExtensionType) -> tuple[Path, Path]:
        if not self.paths(name)[0].exists():
            builder = self._builder(subject, self._new_key(name).public_key())
            ca_key = load_pem_private_key(self.paths("ca")[1].read_bytes(), None)
            assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
            self._sign(name, builder.add_extension(extension, critical=False), ca_key)
        return self.paths(name)

    def _new_key(self, name: str) -> ec.EllipticCurvePrivateKey:
        key = ec.generate_private_key(ec.SECP256R1())  # a hundred times faster than RSA
        path = self.paths(name)[1]
        path.touch(0o600)
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        return key

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(CA_NAME).public_key(key)
        builder = builder.serial_number(x509.random_serial_number())
        return builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(days=30)
        )

    def _sign(self, name: str, builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> None:
        self.paths(name)[0].write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))


def _name(user: str, *groups: str) -> x509.Name:
    organizations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*organizations, x509.NameAttribute(NameOID.COMMON_NAME, user)])


CA_NAME = _name("feddiff-test-ca")


def _alternative_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


# ---- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["up", "down", "load"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("archives", type=Path, nargs="*")
    parser.add_argument("--node", action="store_true")
    arguments = parser.parse_args()
    was_node = (arguments.directory / "containerd.toml").exists()
    cluster = (Node if arguments.node or was_node else ControlPlane)(arguments.directory)
    if arguments.command == "up":
        cluster.up(outlive=True)
        print(f"export KUBECONFIG={cluster.kubeconfig}")
    elif arguments.command == "down":
        cluster.down()
    elif isinstance(cluster, Node):
        cluster.load(*arguments.archives)
    else:
        sys.exit(f"{arguments.directory} has no node; start it with --node")


if __name__ == "__main__":
    main()
