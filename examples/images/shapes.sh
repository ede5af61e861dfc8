#!/bin/sh
# Two owners train on 64×64 colour images: each has two kinds of shapes often, the two others rarely. Run again, it goes on.
set -eu
here=$(dirname "$0")
work=${1:?usage: shapes.sh FOLDER}
[ -d "$work/shapes" ] || python "$here/make_shapes.py" "$work/shapes"
[ -d "$work/split" ] || feddiff split "$work/shapes" --clients 2 --majority 2 --minority-records 8 --holdout 0.2 \
  --out "$work/split"
feddiff run "$work/split/owners.yaml" "$here/job.yaml" --dir "$work/run" --processes 1
feddiff report "$work/run"
