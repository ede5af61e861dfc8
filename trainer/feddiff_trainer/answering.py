"""The frame around every process that somebody asks for outside a job: a spec comes in, an answer goes out on stdout.

    if __name__ == "__main__":
        sys.exit(main())      # main returns answered(CheckSpec, check)

No receipt, no telemetry: for stages there is `stage`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from feddiff_protocol.api import Wire, parse
from feddiff_protocol.errors import FeddiffError, InputMissing

S = TypeVar("S", bound=Wire)


def answered(spec_type: type[S], answer: Callable[[S], dict[str, Any]], called: str = "") -> int:
    """The exit code; `answer` to the spec that argv names is on stdout as JSON, a mistake of the user is one line on
    stderr, which calls the spec by its path unless it is `called` something else."""
    try:
        path = Path(sys.argv[1])
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputMissing(f"{path}: expected a JSON spec that can be read, found: {error}") from None
        print(json.dumps(answer(parse(spec_type, document, called or str(path)))))
        return 0
    except FeddiffError as error:
        print(f"feddiff: {error}", file=sys.stderr)
        return error.exit_code
