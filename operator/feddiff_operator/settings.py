"""What the operator is told when it starts: `python -m feddiff_operator --help`."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NoReturn

from feddiff_protocol.api import NAME_PATTERN
from feddiff_protocol.errors import UsageInvalid

# A stream without bookmarks for 70 s is opened again by kopf; only silence that outlives that twice is a fault.
SMALLEST_LIVENESS_SECONDS = 150


@dataclass(frozen=True)
class Settings:
    """One operator's settings; every field is a flag of the same name with dashes (namespaces: --namespace)."""

    trainer_image: str
    namespaces: tuple[str, ...] = ()  # empty: all
    lease_namespace: str = "feddiff-system"
    lease_name: str = "feddiff-operator"
    lease_seconds: int = 15
    workers: int = 8
    api_qps: float = 50.0
    api_burst: int = 100
    resync_seconds: float = 600.0
    progress_seconds: float = 15.0  # 0: never
    port: int = 8080
    liveness_seconds: float = 240.0


def parse_settings(arguments: Sequence[str]) -> Settings:
    """The settings that a command line means. Raises UsageInvalid with one line that says what is wrong."""
    values = vars(_parser().parse_args(list(arguments)))
    values["namespaces"] = tuple(sorted(set(values["namespaces"])))
    settings = Settings(**values)
    if settings.api_burst < settings.api_qps:
        raise UsageInvalid(
            f"argument --api-burst: expected at least --api-qps, {settings.api_qps:g}, found {settings.api_burst}"
        )
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageInvalid(f"{message}; see --help")


class _Help(argparse.HelpFormatter):
    """Each flag's default in its line, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = bool(action.default) and action.default is not argparse.SUPPRESS
        return f"{action.help} (default: %(default)s)" if named else action.help


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m feddiff_operator",
        description="Carry out the FederatedDiffusionJobs of the cluster that KUBECONFIG names, or of the own cluster.",
        epilog="Exit codes: 0 stopped by a signal · 64 command line · 69 no answer · 78 no cluster named · 1 our bug.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.set_defaults(**{field.name: field.default for field in fields(Settings) if field.name in _FLAGS})
    parser.add_argument("--trainer-image", required=True, type=_text, metavar="IMAGE", help="image of every stage")
    parser.add_argument(
        "--namespace",
        dest="namespaces",
        action="append",
        default=[],
        type=_name,
        metavar="NAME",
        help="namespace to serve, of jobs or of datasets; repeat it for more; all unless said otherwise",
    )
    for name, (parse, metavar, text) in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=parse, metavar=metavar, help=text)
    return parser


def _text(text: str) -> str:
    if not text.strip() or len(text) > 1024:
        raise argparse.ArgumentTypeError(f"expected 1 to 1024 characters, found {text[:80]!r}")
    return text


def _name(text: str) -> str:
    if not re.fullmatch(NAME_PATTERN, text):
        raise argparse.ArgumentTypeError(f"expected a name like feddiff-system, found {text[:80]!r}")
    return text


def _whole(smallest: int, largest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,6}", text) or not smallest <= int(text) <= largest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {smallest} to {largest}, found {text!r}")
        return int(text)

    return parse


def _number(smallest: float, largest: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or not smallest <= float(text) <= largest:
            raise argparse.ArgumentTypeError(f"expected a number from {smallest:g} to {largest:g}, found {text!r}")
        return float(text)

    return parse


_FLAGS: dict[str, tuple[Callable[[str], object], str, str]] = {
    "lease_namespace": (_name, "NAME", "where the replicas elect their leader"),
    "lease_name": (_name, "NAME", "the Lease by which they do"),
    "lease_seconds": (_whole(1, 3600), "S", "how long a silent leader stays leader"),
    "workers": (_whole(1, 1000), "N", "how many jobs and datasets are worked on side by side"),
    "api_qps": (_number(0.1, 10_000), "N", "requests per second to the API server, in the long run"),
    "api_burst": (_whole(1, 100_000), "N", "requests that may go at once after a quiet time"),
    "resync_seconds": (_number(1, 86_400), "S", "everything is looked at again this often"),
    "progress_seconds": (_number(0, 3600), "S", "running stages are asked how far they are this often; 0: never"),
    "port": (_whole(0, 65535), "P", "/healthz, /readyz and /metrics; 0 takes a free one"),
    "liveness_seconds": (_number(SMALLEST_LIVENESS_SECONDS, 86_400), "S", "a watch silent for so long is dead"),
}
