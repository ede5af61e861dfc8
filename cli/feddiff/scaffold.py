"""The files that `feddiff init` writes: a commented job with its datasets, and what to do next."""

from pathlib import Path

from feddiff_protocol.errors import OutputFailed, UsageInvalid

MOST_OWNERS = 26

DATASET = """\
# What owner {name} offers. Written by the data owner; paths are relative to this file.
apiVersion: feddiff.dev/v1alpha1
kind: PrivateDataset
metadata: {{name: images, namespace: owner-{name}}}
spec:
  # npz: arrays `images` (N×H×W or N×H×W×C) and `labels`. Also: idx, folder.
  source: {{format: npz, path: owner-{name}/train.npz, holdoutPath: owner-{name}/holdout.npz}}
  # Public facts. records is published, part of every average, and checked against the records.
  image: {{channels: 1, height: 28, width: 28}}
  classes: {{count: 2, records: [1000, 1000], names: [healthy, ill]}}
  # What may be spent on all releases together, ever, per image. epsilon may be raised, never lowered. Mechanism
  # privunit needs a part set aside from the start: pureEpsilon.
  budget: {{epsilon: "20", delta: "1e-5", unit: image}}
  # Whose jobs may use it, each for at most this epsilon. Nobody may by default.
  access: [{{namespace: research, maxEpsilon: "10"}}]
---
"""

JOB = """\
# What the researcher asks for.
apiVersion: feddiff.dev/v1alpha1
kind: FederatedDiffusionJob
metadata: {{name: first, namespace: research}}
spec:
  clients:
{clients}
  privacy:
    mechanism: summary        # per class one noisy mean and second moment; `gaussian` noises every image (the paper)
    epsilon: "10"             # per image, of this job's one release from each owner
    delta: "1e-5"
    # Public constants: choose them without looking at the records (`feddiff check` tells their owner the effect).
    clipNorm: "20"            # largest Euclidean norm of an image with pixels in [0, 1]; longer ones are scaled down
    momentClipNorm: "8"       # the same for an image minus the mean of its class
  diffusion: {{splitSigma: "8"}}
  shared: {{images: 2000000, batch: 256, replicas: 1}}
  personal: {{images: 1000000, batch: 256}}
  sampling: {{imagesPerClass: 100, steps: 20}}
"""

README = """\
# Next steps

1. Put each owner's records where `job.yaml` says, and correct shape, classes and numbers of records there.
2. `feddiff check job.yaml` (each data owner): do the records fit, and how many would the clip norms touch?
3. `feddiff plan job.yaml`: what would be promised, what would it cost each budget? Nothing starts.
4. `feddiff run job.yaml`: the run itself. Interrupted? The same command goes on.
5. `feddiff report runs/first` and `feddiff ledger job.yaml`.

`owner-*/feddiff/` holds each owner's ledger of what was spent. Never delete it: it is the memory of the promise.
"""


def write_scaffold(folder: Path, num_owners: int) -> list[Path]:
    """The files written below `folder`. Raises OutputFailed where one of them exists."""
    if not 1 <= num_owners <= MOST_OWNERS:
        raise UsageInvalid(f"--owners: expected 1 to {MOST_OWNERS}, found {num_owners}")
    texts = {"job.yaml": job_text(num_owners), "README.md": README}
    if there := [name for name in texts if (folder / name).exists()]:
        raise OutputFailed(f"{folder / there[0]} exists; name another folder")
    try:
        for owner in _owners(num_owners):
            (folder / f"owner-{owner}").mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputFailed(f"{folder}: cannot be written: {error.strerror}") from None
    return [folder / name for name in texts]


def job_text(num_owners: int) -> str:
    owners = _owners(num_owners)
    clients = "\n".join(
        f"    - {{name: {owner}, dataset: {{namespace: owner-{owner}, name: images}}}}" for owner in owners
    )
    return "".join(DATASET.format(name=owner) for owner in owners) + JOB.format(clients=clients)


def _owners(num_owners: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[:num_owners]
