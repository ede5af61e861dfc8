"""Scikit-learn's scanned digits as three owners' records: every class common at one owner, rare at two.

    python examples/digits/make_digits.py OUT [SEED]

writes OUT/clinic-{a,b,c}/{train,holdout}.npz. 1,797 scans of 8×8: 112 of a class go to the owner where it is
common, 5 to each of the others, the rest (about 55 per class) is held out for evaluation by all. Where OUT ends in
.npz all of them go into that file, for `feddiff split`.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

OWNERS = ("clinic-a", "clinic-b", "clinic-c")
COMMON, RARE, SEED = 112, 5, 0


def split_digits(seed: int = SEED) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Indices of each owner's records and of the held-out ones; class c is common at owner c mod 3."""
    labels = load_digits().target
    order = np.random.default_rng(seed).permutation(len(labels))
    held = {owner: [] for owner in OWNERS}
    rest = []
    for digit in range(10):
        indices = order[labels[order] == digit]
        sizes = [COMMON if digit % 3 == owner else RARE for owner in range(len(OWNERS))]
        *shares, left = np.split(indices, np.cumsum(sizes))
        for owner, share in zip(OWNERS, shares, strict=True):
            held[owner].append(share)
        rest.append(left)
    return {owner: np.concatenate(shares) for owner, shares in held.items()}, np.concatenate(rest)


def main(out: Path, seed: int = SEED) -> None:
    if out.suffix == ".npz":
        write(out, np.arange(len(load_digits().target)))
        return
    owners, held_out = split_digits(seed)
    for owner, indices in owners.items():
        folder = out / owner
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.npz", indices)
        write(folder / "holdout.npz", held_out)


def write(path: Path, indices: np.ndarray) -> None:
    digits = load_digits()  # scans have 17 grey values, 0 to 16
    np.savez(path, images=(digits.images[indices] / 16).astype(np.float32), labels=digits.target[indices])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
