#!/usr/bin/env bash
# Build this checkout's images for the tests' node: OUT/operator.tar and OUT/trainer.tar, which hold
# localhost/feddiff-{operator,trainer} under the chart's own version. Nothing is done when no input changed.
# usage: images.sh [OUT]     OUT: $FEDDIFF_IMAGES, else ~/.cache/feddiff/images
# Needs root, buildah, mmdebstrap and Python with pip; 15 GB of disk when torch brings CUDA's libraries. A +cpu wheel of
# torch in one of pip's --find-links folders is taken instead, and all is ten times smaller.
set -euo pipefail
out=${1:-${FEDDIFF_IMAGES:-$HOME/.cache/feddiff/images}}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/../.."
exec 9>"$out/lock"
flock 9

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
base=localhost/python:3.11
buildah inspect --type image "$base" >/dev/null 2>&1 || tests/cluster/base_image.sh >/dev/null

# The image of room $1: the wheel holds all rooms, but only protocol and its own are run there.
stamp_of() {
  find protocol "$1" pyproject.toml constraints.txt tests/cluster/images.sh tests/cluster/base_image.sh \
    -type f -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-64
}

# Wheels of room $1 and of all it needs, for the base's Python, whichever runs this. What others made is fetched only when
# a version changes.
wheels_of() {
  local wheels="$out/$1/wheels" needs
  needs=$(cat pyproject.toml constraints.txt | sha256sum)
  mkdir -p "$wheels"
  rm -f "$wheels"/feddiff-*.whl
  "$python" -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir "$wheels" .
  if [ "$(cat "$out/$1/needs" 2>/dev/null)" != "$needs" ]; then
    mkdir "$out/$1/new"
    "$python" -m pip download -q --disable-pip-version-check --only-binary :all: --python-version 3.11 \
      --constraint constraints.txt --find-links "$wheels" --dest "$out/$1/new" "$(echo "$wheels"/feddiff-*.whl)[$1]"
    rm -rf "$wheels"
    mv "$out/$1/new" "$wheels"
    echo "$needs" >"$out/$1/needs"
  fi
}

# The image of room $1, in an archive.
build() {
  local room=$1 image="localhost/feddiff-$1:$version" stamp before
  stamp=$(stamp_of "$room")
  if [ -e "$out/$room.tar" ] && [ "$(cat "$out/$room.stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
  echo "building $image" >&2
  rm -rf "$out/$room/new" "$out/$room.tar" "$out/$room.stamp"
  wheels_of "$room"
  before=$(buildah images -q "$image" 2>/dev/null || true)
  buildah bud -q --isolation chroot --file "$room/Dockerfile" --tag "$image" --build-arg "BASE=$base" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$stamp" $("extra_$room") "$out/$room" >/dev/null
  # After, not before: what both have in common, torch above all, stays.
  if [ -n "$before" ] && [ "$before" != "$(buildah images -q "$image")" ]; then buildah rmi "$before" >/dev/null || true; fi
  buildah push -q "$image" "docker-archive:$out/$room.tar:$image"
  echo "$stamp" >"$out/$room.stamp"
}
extra_operator() { :; }
# torch's layer is made once for each of its builds; REVISION, which follows it, makes all above it anew.
extra_trainer() {
  local torch
  torch=$(basename "$out"/trainer/wheels/torch-*.whl | cut -d- -f2)
  echo "--layers --build-arg TORCH=torch==$torch"
}

build operator
build trainer
