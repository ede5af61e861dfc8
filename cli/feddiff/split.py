"""`feddiff split`: one labelled data set becomes the records, datasets and job of a federation to study."""

import json
import tempfile
from decimal import Decimal
from pathlib import Path
from typing import Any

from feddiff_protocol.api import SourceFormat
from feddiff_protocol.errors import OutputFailed, UsageInvalid
from feddiff_protocol.promise import LARGEST_MOMENTS

from .documents import load_job
from .owner_stages import run_module

SPLIT_MODULE = "feddiff_trainer.split"
OWNERS, JOB, PAGE = "owners.yaml", "job.yaml", "split.html"
MOST_CLIENTS = 1000
DATASET, RESEARCH = "images", "research"
LARGEST_IMAGE = 784  # values of one that is summarised pixel by pixel: 28×28

OWNERS_HEADER = """\
# Written by `feddiff split`: one dataset for each of {clients} clients. The same file goes to `feddiff run`.
"""
DATASET_TEXT = """\
apiVersion: feddiff.dev/v1alpha1
kind: PrivateDataset
metadata: {{name: {dataset}, namespace: {client}}}
spec:
  source: {{format: npz, path: {client}/train.npz{holdout}}}
  image: {{channels: {channels}, height: {height}, width: {width}}}
  classes: {{count: {count}, records: {records}{names}}}
  budget: {{epsilon: "20", delta: "1e-5", unit: image}}
  access: [{{namespace: {research}, maxEpsilon: "10"}}]
"""
JOB_TEXT = """\
# Written by `feddiff split`. Change what the study is about; docs/api.md has every field.
apiVersion: feddiff.dev/v1alpha1
kind: FederatedDiffusionJob
metadata: {{name: split, namespace: {research}}}
spec:
  clients:
{clients}
  privacy:
    mechanism: {mechanism}
    epsilon: "10"             # per image, of this job's one release from each client
    delta: "1e-5"
    # From the number of values in an image alone. For private records choose them without looking at the records.
{clips}
{diffusion}  shared: {{images: 2000000, batch: 256, replicas: 1}}
  personal: {{images: 200000, batch: 64{release_sigma}}}
  sampling: {{imagesPerClass: 100, steps: 20}}
"""


def split_data(
    data: Path,
    out: Path,
    *,
    num_clients: int,
    labels: Path | None,
    majority: int | None,
    minority_records: int,
    dirichlet: str | None,
    holdout: str,
    seed: int,
) -> dict[str, Any]:
    """What the trainer answered; below `out` lie records, owners.yaml, job.yaml and split.html.

    Raises UsageInvalid for options that do not fit the records, OutputFailed where `out` holds anything.
    """
    if not 2 <= num_clients <= MOST_CLIENTS:
        raise UsageInvalid(f"--clients: expected 2 to {MOST_CLIENTS}, found {num_clients}")
    source = {"format": format_of(data, labels).value, "path": str(data.resolve())}
    if labels is not None:
        source["labelsPath"] = str(labels.resolve())
    clients = client_names(num_clients)
    spec = {
        "source": source,
        "clients": clients,
        "majority": majority,
        "minorityRecords": minority_records,
        "dirichlet": dirichlet,
        "holdout": holdout,
        "seed": seed,
        "output": str(out.resolve()),
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputFailed(f"--out: {out}: expected a new or an empty folder, found something in it; name another")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="feddiff-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        answer: dict[str, Any] = json.loads(run_module(SPLIT_MODULE, path))
    (out / OWNERS).write_text(owners_text(answer), encoding="utf-8")
    (out / JOB).write_text(job_text(answer), encoding="utf-8")
    load_job([out / OWNERS, out / JOB])
    return answer


def format_of(data: Path, labels: Path | None) -> SourceFormat:
    """By what is there: a folder, a .npz or .parquet file, or any other file with one of labels beside it."""
    if data.suffix == ".parquet" or (data.is_dir() and any(data.glob("*.parquet"))):
        return SourceFormat.PARQUET
    if data.is_dir():
        return SourceFormat.FOLDER
    if data.suffix == ".npz":
        return SourceFormat.NPZ
    if labels is None:
        raise UsageInvalid(
            f"{data}: expected a folder of images, a .npz or .parquet file, or MNIST's images with --labels, found none"
            " of them; name one"
        )
    return SourceFormat.IDX


def client_names(num_clients: int) -> list[str]:
    """client-000, client-001, …: as many digits as the last one needs."""
    digits = len(str(num_clients - 1))
    return [f"client-{i:0{digits}}" for i in range(num_clients)]


# ---- The documents ---------------------------------------------------------------------------------------------------


def owners_text(answer: dict[str, Any]) -> str:
    """One PrivateDataset for each client, in a namespace of its own."""
    names, holdout = answer["classes"]["names"], ", holdoutPath: holdout.npz" if answer["holdout"] else ""
    datasets = [
        DATASET_TEXT.format(
            dataset=DATASET,
            client=client,
            holdout=holdout,
            **answer["image"],
            count=answer["classes"]["count"],
            records=records,
            names=f", names: {json.dumps(names, ensure_ascii=False)}" if names else "",
            research=RESEARCH,
        )
        for client, records in answer["records"].items()
    ]
    return OWNERS_HEADER.format(clients=len(datasets)) + "---\n".join(datasets)


def job_text(answer: dict[str, Any]) -> str:
    """A job for all clients: `summary`, of squares where images are large, or `gaussian` where no squares fit and the
    second moments of such images would not."""
    image, num_classes = answer["image"], answer["classes"]["count"]
    side = block_side(**image)
    size = image["channels"] * image["height"] * image["width"] // side**2
    summary = num_classes * size * (size + 1) // 2 <= LARGEST_MOMENTS
    clips = f'    clipNorm: "{clip_norm(size, 5 if summary else 3)}"'
    if summary:
        clips += f'\n    momentClipNorm: "{clip_norm(size, 2)}"'
    if side > 1:
        clips += f"\n    blockSide: {side}              # means of such squares stand for an image: it is large"
    return JOB_TEXT.format(
        research=RESEARCH,
        clients="\n".join(
            f"    - {{name: {client}, dataset: {{namespace: {client}, name: {DATASET}}}}}"
            for client in answer["records"]
        ),
        mechanism="summary" if summary else "gaussian",
        clips=clips,
        diffusion='  diffusion: {splitSigma: "8"}\n' if summary else "",
        release_sigma=', releaseSigma: "1"' if side > 1 else "",
    )


def block_side(channels: int, height: int, width: int) -> int:
    """The side of the smallest squares that leave few values of such an image; 1 where none do."""
    fitting = (side for side in range(1, 65) if height % side == width % side == 0)
    return next((side for side in fitting if channels * height * width // side**2 <= LARGEST_IMAGE), 1)


def clip_norm(size: int, sevenths: int) -> str:
    """So many sevenths of the norm of a white image: of a summary 20 and 8 at 28×28, as `feddiff init` has them.

    A mean of clipped images is the darker for it. Five sevenths (√½, where two images can be as far apart as a black
    and a white one) leave nearly every image as it is, and the noise hardly shows on a mean of hundreds of records
    (docs/results.md). Where every image leaves, noise is all that matters: three.
    """
    norm = (Decimal(size).sqrt() * sevenths / 7).quantize(Decimal("0.01"))
    return f"{norm.normalize():f}"
