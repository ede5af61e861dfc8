"""README.md of an exported shared denoiser: what was promised, whom it was trained with, what it can do and cannot.

All of it is public: the job's own words, what every release says of itself, and hashes.
"""

import html
import json
from collections.abc import Mapping, Sequence

from feddiff_protocol.api import Mechanism, Timeline
from feddiff_protocol.manifest import Manifest
from feddiff_protocol.promise import NOT_COVERED, Promise, promise_of
from feddiff_protocol.stages import TrainSharedSpec

from .report import num, promise_sentence, promise_terms, tidy

LEARNED_FROM = {
    Mechanism.GAUSSIAN: "noised images: all detail that the noise left",
    Mechanism.SUMMARY: "each class's pooled mean and covariance, and nothing else",
    Mechanism.PRIVUNIT: "the mean and covariance of each class's noised directions, and nothing else",
}
SAMPLERS = {
    "heun": "deterministic, second order (Heun)",
    "ddpm": "ancestral (DDPM)",
    "dpm": "deterministic, second order (DPM-Solver++)",
}


def model_card(
    run: TrainSharedSpec,
    manifests: Sequence[Manifest],
    class_names: Sequence[str],
    sha256: str,
    licence: str,
    versions: Mapping[str, str],
) -> str:
    """Markdown, its head as model hubs read it; `licence` is theirs to list, "unknown" if nobody said."""
    promise = promise_of(run.privacy, run.diffusion)
    parts = [
        _head(licence),
        f"# {run.job.name}: the shared denoiser",
        f"A class-conditional diffusion model of {run.image.height}×{run.image.width} images with "
        f"{num(run.image.channels, 'channel')}, made by feddiff of what {num(len(manifests), 'data owner')} released"
        " under differential privacy, and of nothing else of theirs.",
        "## Use",
        _use(run),
        "## What was promised",
        promise_sentence(run, promise),
        _table(["", ""], [list(term) for term in promise_terms(run, promise)]),
        "The shared denoiser is computed from these releases alone, so it reveals no more than they do, whatever is"
        " done with it. k counts this job's releases: owners who took part in other jobs have spent more, as their"
        " ledgers say. Not covered:",
        _list(NOT_COVERED),
        "## Data",
        _data(run, manifests, class_names),
        "## What it can do, and what it cannot",
        _list(_abilities(run, promise)),
        "## Schedule",
        _schedule(run, promise),
        "## Licence",
        _licence(licence),
        "## Where it comes from",
        _provenance(run, sha256, versions),
    ]
    return "\n\n".join(parts) + "\n"


USE = """\
```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)  # runs FOLDER/denoiser/pipeline.py
images = pipeline([0, 0], generator=torch.Generator().manual_seed(0)).images  # one for each label
```

feddiff is not needed. Seed 0 and the labels of the job's report, in its order, give its samples, on a CPU of the kind
that drew them{apart}. With FOLDER/denoiser on the path, `import pipeline` and `pipeline.load("FOLDER")` give the same
pipeline by {needed} alone."""


def _use(run: TrainSharedSpec) -> str:
    closed_form = run.shared.denoiser == "closedForm"
    own = closed_form or run.network.backbone == "unet"
    return USE.format(
        needed="torch and safetensors" if own else "torch, safetensors and the network of diffusers",
        apart=", up to one level of 255, since diffusers computes in float32" if closed_form else "",
    )


TAGS = ("feddiff", "differential-privacy", "federated-learning", "diffusion", "class-conditional")


def _head(licence: str) -> str:
    return f"---\nlicense: {json.dumps(licence)}\nlibrary_name: diffusers\ntags: [{', '.join(TAGS)}]\n---"


def _data(run: TrainSharedSpec, manifests: Sequence[Manifest], class_names: Sequence[str]) -> str:
    names = class_names or [f"class {label}" for label in range(run.num_classes)]
    by_class = zip(*(manifest.counts for manifest in manifests), strict=True)
    lines = [[str(label), names[label], str(sum(counts))] for label, counts in enumerate(by_class)]
    owners = [[manifest.client, str(sum(manifest.counts))] for manifest in manifests]
    return "\n\n".join(
        [
            f"{sum(int(line[2]) for line in lines)} records, as the owners declared in public:",
            _table(["label", "class", "records"], lines),
            _table(["data owner", "records"], owners),
        ]
    )


def _abilities(run: TrainSharedSpec, promise: Promise) -> list[str]:
    split = f"σ = {promise.split_sigma:.4g} (noise-to-signal, pixels in [-1, 1])"
    if run.shared.denoiser == "closedForm":
        made = "It is the denoiser of the pooled Gaussian, in closed form: the best affine one, at any noise level."
    elif run.diffusion.timeline is Timeline.RESTARTED:
        made = f"It was trained on released images as if they were clean: what it draws has their noise, {split}."
    else:
        made = f"It was trained at noise levels above the split alone, {split}; below it, it has learned nothing."
    return [
        made,
        f"It has seen {LEARNED_FROM[run.privacy.mechanism]}.",
        "Its samples are estimates at the split: shapes by class, blurred or noisy. In feddiff an owner's personal"
        " denoiser goes on from there; that one is not private and not in here.",
        "It can start another denoiser's sampling, show what the releases tell of a class, or draw images for a task"
        " that needs no detail. It cannot stand in for real records where detail counts.",
        "Nobody has measured its quality or its bias for any purpose. Classes with few records are known worst.",
        "It knows the labels above and no text.",
    ]


def _schedule(run: TrainSharedSpec, promise: Promise) -> str:
    diffusion, sampling = run.diffusion, run.sampling
    return (
        f"Linear β from {tidy(diffusion.beta_start)} to {tidy(diffusion.beta_end)} over T = {diffusion.steps} steps;"
        f" split at step {promise.split_step}, σ = {promise.split_sigma:.4g}. Samples take {sampling.steps} steps from"
        f" pure noise to an image, those below the split left out; the sampler is {SAMPLERS[sampling.sampler]}."
    )


def _licence(licence: str) -> str:
    said = "Nobody has said; ask the data owners." if licence == "unknown" else f"{_plain(licence)}."
    return f"Weights: {said} The code, denoiser/pipeline.py, is feddiff's: Apache-2.0."


def _provenance(run: TrainSharedSpec, sha256: str, versions: Mapping[str, str]) -> str:
    hashes = [[f"manifest of {each.client}", f"`{each.manifest_sha256}`"] for each in run.releases]
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return "\n\n".join(
        [
            f"Job {run.job.namespace}/{run.job.name}, uid {run.job.uid}. Exported with {named}.",
            _table(["object in the federation's store", "SHA-256"], [["shared denoiser", f"`{sha256}`"], *hashes]),
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _plain(text: str) -> str:
    """One line of text in which an owner's words are neither markup nor the end of a cell."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("[", "&#91;")
