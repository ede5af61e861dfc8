"""Which version of a job is the newest: a watch shows what we have written ourselves only a moment later."""

from .children import Children
from .cluster import FDJ, Cluster, Conflict, Object


class Versions:
    """Jobs as the watches show them, unless we have written or read something newer."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._ours: dict[tuple[str, str], Object] = {}  # what we have written or read, by namespace and name

    async def newest(self, namespace: str, name: str, children: Children) -> Object | None:
        """The newest version of the job that we know of; where no watch has shown it, as it is now."""
        seen, ours = children.job(namespace, name), self._ours.get((namespace, name))
        if seen is None:
            self._ours.pop((namespace, name), None)
            return await self._cluster.get(FDJ, namespace, name)
        if ours is not None and ours["metadata"]["uid"] == seen["metadata"]["uid"] and _version(ours) > _version(seen):
            return ours
        self._ours.pop((namespace, name), None)
        return seen

    async def is_current(self, found: Object) -> bool:
        """Whether the job is still as it was found: asked before anything is charged, started, stopped or deleted on
        its behalf, since a watch may be late. If not, the next look is at what it is now."""
        metadata = found["metadata"]
        now = await self._cluster.get(FDJ, metadata["namespace"], metadata["name"])
        if now is None or now["metadata"]["uid"] != metadata["uid"]:
            raise Conflict(f"job {metadata['namespace']}/{metadata['name']} is gone, which no watch has shown yet")
        self.remember(now)
        return bool(now["metadata"]["resourceVersion"] == metadata["resourceVersion"])

    def remember(self, found: Object) -> Object:
        self._ours[found["metadata"]["namespace"], found["metadata"]["name"]] = found
        return found


def _version(found: Object) -> int:
    """Later versions of one object have larger numbers; what is no number is never taken for newer."""
    text = str(found["metadata"].get("resourceVersion", ""))
    return int(text) if text.isdecimal() else 0
