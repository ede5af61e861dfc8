"""Where every object lies. Two stores: the federation's, which all parties read, and each owner's own.

Client names end in a slash wherever a prefix is matched, so that client1 never stands for client10.
"""

import hashlib

PROBE = "probe-"  # starts the last part of what a check of a store may leave behind when it is killed


def release_name(job_uid: str, client: str, dataset_uid: str) -> str:
    """Name of a release and of its ledger entry: the same for every retry of one client of one job."""
    digest = hashlib.sha256("\0".join((job_uid, client, dataset_uid)).encode()).hexdigest()
    return f"prl-{digest[:40]}"


# Federation store
def client_prefix(job_uid: str, client: str) -> str:
    return f"{job_uid}/clients/{client}/"


def released_shard(job_uid: str, client: str, shard: str) -> str:
    return f"{client_prefix(job_uid, client)}shards/{shard}"


def manifest(job_uid: str, client: str) -> str:
    return f"{client_prefix(job_uid, client)}manifest.json"


def shared_denoiser(job_uid: str) -> str:
    return f"{job_uid}/shared/denoiser.safetensors"


def shared_checkpoints(job_uid: str) -> str:
    return f"{job_uid}/shared/checkpoints/"


def shared_samples(job_uid: str) -> str:
    return f"{job_uid}/shared/samples.safetensors"


def job_report(job_uid: str) -> str:
    return f"{job_uid}/report/job-report.html"


def job_prefixes(job_uid: str) -> tuple[str, ...]:
    """Below which lies all that the job's own stages make, not its clients."""
    made = (shared_denoiser(job_uid), job_report(job_uid))
    return tuple(f"{key.rpartition('/')[0]}/" for key in made)


# Owner store
def release_prefix(release: str) -> str:
    return f"releases/{release}/"


def seal(release: str) -> str:
    return f"{release_prefix(release)}seal.json"


def attempts_prefix(release: str) -> str:
    return f"{release_prefix(release)}attempts/"


def attempt_shard(release: str, attempt: str, shard: str) -> str:
    return f"{attempts_prefix(release)}{attempt}/{shard}"


def owner_prefix(job_uid: str, client: str) -> str:
    return f"jobs/{job_uid}/{client}/"


def personal_denoiser(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}personal/denoiser.safetensors"


def personal_checkpoints(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}personal/checkpoints/"


def samples(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}samples.safetensors"


def evaluation(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}evaluation.json"


def owner_report(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}owner-report.html"


def audit(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}audit.json"


def exports_prefix(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}exports/"


# The folder of a baseline, in an experiment
def measured_baseline(job_uid: str, client: str) -> str:
    return f"{owner_prefix(job_uid, client)}measured.json"
