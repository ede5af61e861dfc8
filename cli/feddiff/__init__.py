"""Federated diffusion training with a privacy budget that holds, from Python: what a notebook needs of the `feddiff`
command. `job = feddiff.load("owners.yaml", "job.yaml")`, `feddiff.plan(job)`, `feddiff.run(job, "runs/first")`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feddiff_protocol.errors import FeddiffError, PrivacyRefusal

    from .documents import LocalDataset, LocalJob
    from .notebook import Run, Samples, datasets, ledger, load, plan, run
    from .owner_stages import StageFailed
    from .plan_report import Budget, ClientPlan, OnePixel, PlanReport
    from .views import Ledger, OwnerReport, Report, RunCondition, RunStatus, StageStatus
else:

    def __getattr__(name: str) -> object:
        """Loaded when it is asked for: `feddiff --help` has no time for types."""
        if name not in __all__:
            raise AttributeError(f"module 'feddiff' has no attribute {name!r}")
        from . import notebook

        return getattr(notebook, name)

    def __dir__() -> list[str]:
        return __all__


__all__ = [
    "Budget",
    "ClientPlan",
    "FeddiffError",
    "Ledger",
    "LocalDataset",
    "LocalJob",
    "OnePixel",
    "OwnerReport",
    "PlanReport",
    "PrivacyRefusal",
    "Report",
    "Run",
    "RunCondition",
    "RunStatus",
    "Samples",
    "StageFailed",
    "StageStatus",
    "datasets",
    "ledger",
    "load",
    "plan",
    "run",
]
