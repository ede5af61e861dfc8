"""One labelled data set divided among clients, to study heterogeneity: `python -m feddiff_trainer.split SPEC.json`.

Every record goes to one client at most, or to the hold-out that all share. The same spec gives the same files. The
answer, one JSON object on stdout, is what each client's dataset has to declare.

Shapes: N records, K classes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from feddiff_protocol.api import WHOLE, Positive, ShareOrNothing, SourceSpec, Wire
from feddiff_protocol.errors import OutputFailed, UsageInvalid

from .answering import answered
from .records import Records, described, read_records
from .split_page import split_page

Rows = NDArray[np.int64]
FEWEST_RECORDS = 2  # that a dataset may declare


class SplitSpec(Wire):
    """Each client gets `minorityRecords` of every class; what is left of a class is shared by the clients for which it
    is one of `majority` classes: equally, or in proportions drawn from a Dirichlet distribution."""

    source: SourceSpec
    clients: tuple[Annotated[str, Field(max_length=63)], ...]
    majority: Annotated[int, Field(ge=1), WHOLE] | None = None  # every class is one, unless given
    minority_records: Annotated[int, Field(ge=0), WHOLE] = 0
    dirichlet: Positive | None = None
    holdout: ShareOrNothing
    seed: Annotated[int, Field(ge=0), WHOLE] = 0
    output: str


@dataclass(frozen=True)
class Split:
    """Rows of the records, ascending: of every client, and held out for all."""

    clients: tuple[Rows, ...]
    holdout: Rows


def divide(labels_N: Rows, num_classes: int, spec: SplitSpec) -> Split:
    """Who gets which records. Raises UsageInvalid where a class has too few, or a client would get hardly any."""
    generator = np.random.default_rng(spec.seed)
    order_N = generator.permutation(len(labels_N))
    shares: list[list[Rows]] = [[] for _ in spec.clients]
    held_out, dealt = [], 0
    for k in range(num_classes):
        rows = order_N[labels_N[order_N] == k]
        num_held_out = round(float(spec.holdout) * len(rows))
        held_out.append(rows[:num_held_out])
        parts = _divide_class(rows[num_held_out:], k, num_classes, spec, generator, dealt)
        for share, part in zip(shares, parts, strict=True):
            share.append(part)
        dealt += len(rows) - num_held_out
    clients = tuple(np.sort(np.concatenate(share)) for share in shares)
    for name, client_rows in zip(spec.clients, clients, strict=True):
        if len(client_rows) < FEWEST_RECORDS:
            raise UsageInvalid(
                f"client {name}: expected at least {FEWEST_RECORDS} records, found {len(client_rows)}; raise"
                " --dirichlet or --minority-records, or ask for fewer clients"
            )
    return Split(clients, np.sort(np.concatenate(held_out)))


def _divide_class(
    rows: Rows, k: int, num_classes: int, spec: SplitSpec, generator: np.random.Generator, dealt: int
) -> list[Rows]:
    """One part of the class's rows, which come in random order, for each client; `dealt`: of the classes before."""
    num_clients, fewest = len(spec.clients), spec.minority_records
    members = [i for i in range(num_clients) if k in majority_classes(i, num_classes, spec.majority)]
    needed = num_clients * fewest
    if len(rows) < needed:
        raise UsageInvalid(
            f"--minority-records: expected at most {len(rows) // num_clients} for {num_clients} clients, since class"
            f" {k} has {len(rows)} records that are not held out, found {fewest}; lower it, or ask for fewer clients"
        )
    parts = [[part] for part in np.split(rows[:needed], num_clients)]
    rest = rows[needed:]
    if members:
        ends = _ends(len(rest), len(members), spec, generator, dealt)
        for member, part in zip(members, np.split(rest, ends[:-1]), strict=True):
            parts[member].append(part)
    return [np.concatenate(part) for part in parts]


def majority_classes(client: int, num_classes: int, num_majority: int | None) -> Sequence[int]:
    """Dealt like cards, in order: each class is a majority class for as many clients as any other, or one fewer."""
    if num_majority is None:
        return range(num_classes)
    return [(client * num_majority + j) % num_classes for j in range(num_majority)]


def _ends(num_rows: int, num_members: int, spec: SplitSpec, generator: np.random.Generator, dealt: int) -> Rows:
    """Where each member's part ends. Equal ones are dealt in turn, from the member on at which the classes before
    ended: else the same ones would get fewer of every class. Proportions by Dir(α) for each class: Yurochkin et al.
    2019, section 4."""
    if spec.dirichlet is None:
        turn = (np.arange(num_members) - dealt) % num_members
        return np.cumsum(num_rows // num_members + (turn < num_rows % num_members))
    proportions = generator.dirichlet(np.full(num_members, float(spec.dirichlet)))
    ends: Rows = np.rint(np.cumsum(proportions) / proportions.sum() * num_rows).astype(np.int64)
    return ends


# ---- The files -------------------------------------------------------------------------------------------------------


def split(spec: SplitSpec) -> dict[str, Any]:
    """What every dataset declares; OUTPUT/<client>/train.npz, holdout.npz and split.html are written.

    Raises DataInvalid, InputMissing for the records, UsageInvalid for a split that they do not allow, OutputFailed.
    """
    path = Path(spec.source.path)
    labels_path = Path(spec.source.labels_path) if spec.source.labels_path else None
    (channels, height, width), num_classes, names = described(spec.source.format.value, path, labels_path)
    if spec.majority is not None and spec.majority > num_classes:
        raise UsageInvalid(f"--majority: expected at most the number of classes, {num_classes}, found {spec.majority}")
    records = read_records(
        spec.source.format.value,
        path,
        labels_path=labels_path,
        channels=channels,
        height=height,
        width=width,
        num_classes=num_classes,
        class_names=names,
    )
    divided = divide(records.labels_N, num_classes, spec)
    counts = [np.bincount(records.labels_N[rows], minlength=num_classes).tolist() for rows in divided.clients]
    page = split_page(spec.clients, names, counts, len(divided.holdout), len(records))
    _write_all(Path(spec.output), spec.clients, records, divided, page)
    return {
        "image": {"channels": channels, "height": height, "width": width},
        "classes": {"count": num_classes, "names": list(names)},
        "records": dict(zip(spec.clients, counts, strict=True)),
        "holdout": len(divided.holdout),
        "undealt": len(records) - len(divided.holdout) - sum(len(rows) for rows in divided.clients),
    }


def _write_all(output: Path, clients: Sequence[str], records: Records, divided: Split, page: bytes) -> None:
    try:
        for client, rows in zip(clients, divided.clients, strict=True):
            (output / client).mkdir(parents=True)
            _write(output / client / "train.npz", records, rows)
        if len(divided.holdout):
            _write(output / "holdout.npz", records, divided.holdout)
        (output / "split.html").write_bytes(page)
    except OSError as error:
        raise OutputFailed(
            f"{output}: cannot be written: {error.strerror or error}; make room, or name another"
        ) from None


def _write(path: Path, records: Records, rows: Rows) -> None:
    np.savez(path, images=records.pixels_NCHW[rows], labels=records.labels_N[rows])


def main() -> int:
    return answered(SplitSpec, split, "feddiff split")


if __name__ == "__main__":
    sys.exit(main())
