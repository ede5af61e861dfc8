#!/bin/sh
# Scikit-learn's digits, dealt to 4, 32 and 128 clients, then clients.yaml. Run again, it goes on.
set -eu
here=$(dirname "$0")
work=${1:?usage: clients.sh FOLDER}
mkdir -p "$work"
cp "$here/clients.yaml" "$work/"
[ -f "$work/all.npz" ] || python "$here/../digits/make_digits.py" "$work/all.npz"
for seed in 0; do
  for clients in 4 32 128; do
    split="$work/of-$clients-$seed"
    [ -f "$split/owners.yaml" ] && continue
    feddiff split "$work/all.npz" --out "$split" --clients $clients --holdout 0.33 --seed $seed
  done
done
feddiff experiment "$work/clients.yaml"
