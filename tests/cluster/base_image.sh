#!/usr/bin/env bash
# Build localhost/python:3.11 (Debian 12 and its Python, 200 MB), the base that Dockerfiles take as
# --build-arg BASE=localhost/python:3.11 where no image registry is reachable. Needs root, mmdebstrap, buildah; 30 s.
set -euo pipefail
tar=$(mktemp --suffix .tar)
trap 'rm -f "$tar"' EXIT
mmdebstrap --mode=root --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates,libgomp1 \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$tar" /etc/apt/sources.list.d/*.sources
container=$(buildah from scratch)
buildah add -q "$container" "$tar" / >/dev/null
buildah commit -q --rm "$container" localhost/python:3.11
