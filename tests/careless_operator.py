"""The operator, but for one thing: it writes a status whatever has become of the object since it was read. The tests
of races must fail with it."""

import sys

from feddiff_operator.__main__ import main
from feddiff_operator.cluster import FIELD_MANAGER, Cluster, Kind, Object


async def replace_status(self: Cluster, kind: Kind, obj: Object) -> Object:
    """The same status, by a patch that names no resourceVersion."""
    path = kind.path(obj["metadata"]["namespace"], obj["metadata"]["name"], "status")
    change = [{"op": "add", "path": "/status", "value": obj["status"]}]
    answer = await self._call("PATCH", path, {"fieldManager": FIELD_MANAGER}, change, "application/json-patch+json")
    return answer.changed()


if __name__ == "__main__":
    Cluster.replace_status = replace_status  # type: ignore[method-assign]
    sys.exit(main())
