#!/bin/sh
# One split of the digits for each seed, then an experiment, digits.yaml unless said. Run again, it goes on.
set -eu
here=$(dirname "$0")
work=${1:?usage: digits.sh FOLDER [EXPERIMENT]}
experiment=${2:-digits.yaml}
mkdir -p "$work"
cp "$here/$experiment" "$work/"
for seed in 5 6 7 8 9; do
  split="$work/digits-$seed"
  [ -f "$split/owners.yaml" ] && continue
  python "$here/../digits/make_digits.py" "$split" "$seed"
  # Budgets for every value that an experiment tries: these digits are public.
  sed 's/epsilon: "20"/epsilon: "50000"/; s/maxEpsilon: "10"/maxEpsilon: "5000"/' "$here/../digits/owners.yaml" \
    >"$split/owners.yaml"
done
feddiff experiment "$work/$experiment"
