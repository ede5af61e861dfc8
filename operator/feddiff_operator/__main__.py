"""`python -m feddiff_operator`: see --help."""

import sys

from feddiff_protocol.errors import FeddiffError

from .settings import parse_settings


def main() -> int:
    """The exit code; what is wrong is one line."""
    try:
        settings = parse_settings(sys.argv[1:])
        # Imported late: --help and a mistyped flag need no Kubernetes client.
        from .main import reconciler, run

        return run(settings, reconciler)
    except FeddiffError as error:
        print(f"feddiff-operator: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
