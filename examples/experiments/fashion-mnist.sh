#!/bin/sh
# Fashion-MNIST in half its resolution, one split for each seed, then the experiment. Run again, it goes on.
# The data: Debian's dataset-fashion-mnist, or another folder with MNIST's four files.
set -eu
here=$(dirname "$0")
work=${1:?usage: fashion-mnist.sh FOLDER [DATA]}
data=${2:-/usr/share/datasets/fashion-mnist}
mkdir -p "$work"
cp "$here/fashion-mnist.yaml" "$work/"
[ -f "$work/all.npz" ] || python "$here/make_fashion_mnist.py" "$data" "$work/all.npz"
for seed in 0 1 2; do
  # Of each class 950 are held out, 50 go to each owner, and the other 4,950 to the owner for whom it is common.
  [ -d "$work/split-$seed" ] || feddiff split "$work/all.npz" --clients 2 --majority 5 --minority-records 50 \
    --holdout 0.158333 --seed "$seed" --out "$work/split-$seed"
  # Four arms release at ε = 1 and at 10: ε = 24.69 in all.
  sed 's/budget: {epsilon: "20"/budget: {epsilon: "25"/' "$work/split-$seed/owners.yaml" >"$work/owners.yaml"
  mv "$work/owners.yaml" "$work/split-$seed/owners.yaml"
done
feddiff experiment "$work/fashion-mnist.yaml"
