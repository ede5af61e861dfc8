#!/bin/sh
# Three data owners train a diffusion model together: first with the paper's mechanism, then with ours.
set -eu
here=$(dirname "$0")
demo=${1:?usage: demo.sh FOLDER}
mkdir -p "$demo"
cp "$here/owners.yaml" "$here/gaussian.yaml" "$here/summary.yaml" "$demo/"
[ -f "$demo/clinic-a/train.npz" ] || python "$here/make_digits.py" "$demo"
feddiff run "$demo/owners.yaml" "$demo/gaussian.yaml"
feddiff run "$demo/owners.yaml" "$demo/summary.yaml"
feddiff ledger "$demo/owners.yaml"
feddiff report "$demo/runs/digits-summary"
