#!/bin/sh
# One split of the digits for each seed, then the experiment. Run again, it goes on.
set -eu
here=$(dirname "$0")
work=${1:?usage: digits.sh FOLDER}
mkdir -p "$work"
cp "$here/digits.yaml" "$work/"
for seed in 5 6 7 8 9; do
  split="$work/digits-$seed"
  [ -f "$split/owners.yaml" ] && continue
  python "$here/../digits/make_digits.py" "$split" "$seed"
  cp "$here/../digits/owners.yaml" "$split/"
done
feddiff experiment "$work/digits.yaml"
