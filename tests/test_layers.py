"""The arrows between the rooms, and that asking for help costs no heavy import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_import_contract_is_kept() -> None:
    pytest.importorskip("importlinter")
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import feddiff.main",
        "import feddiff.main, sys; sys.argv = ['feddiff', '--help']\ntry: feddiff.main.main()\nexcept SystemExit: pass",
        "import feddiff.notebook",
        "import feddiff.engine, feddiff.views, feddiff.plan_report, feddiff.owner_stages, feddiff.progress",
        "import feddiff.on_cluster, feddiff.cluster_jobs, feddiff.cluster_why, feddiff.cluster_budgets",
        "import feddiff.owner, feddiff.store_checks",
    ],
)
def test_the_command_line_loads_neither_torch_nor_numpy_nor_boto3(statement: str) -> None:
    script = (
        f"{statement}\nimport sys; print(sorted({{'torch', 'numpy', 'boto3', 'feddiff_trainer'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_loads_no_types_no_event_log_and_no_cluster() -> None:
    heavy = {"pydantic", "structlog", "yaml", "sqlite3", "rich", "kubernetes", "urllib3"}
    script = f"import feddiff.main, sys; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_a_cluster_loads_its_client_only_when_one_is_asked_for() -> None:
    script = "import feddiff.on_cluster, sys; print(sorted({'kubernetes', 'urllib3', 'aiohttp'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
