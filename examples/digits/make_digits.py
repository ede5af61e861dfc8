"""Scikit-learn's scanned digits as three owners' records: every class common at one owner, rare at two.

    python examples/digits/make_digits.py OUT [SEED]

writes OUT/clinic-{a,b,c}/{train,holdout}.npz. 1,797 scans of 8×8: 112 of a class go to the owner where it is
common, 5 to each of the others, the rest (about 55 per class) is held out for evaluation by all.
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
    digits = load_digits()
    pixels = (digits.images / 16).astype(np.float32)  # scans have 17 grey values, 0 to 16
    owners, held_out = split_digits(seed)
    for owner, indices in owners.items():
        folder = out / owner
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "train.npz", images=pixels[indices], labels=digits.target[indices])
        np.savez(folder / "holdout.npz", images=pixels[held_out], labels=digits.target[held_out])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
