"""One operator's ledger in a process of its own: `python racer.py KUBECONFIG [careless]`.

Every line of standard input is a list of jobs. All of them ask for their budget at once, and those who get it are
charged; the line that comes back names them. `careless`: the ledger compares no versions when it writes.
"""

import asyncio
import json
import sys
from datetime import UTC, datetime
from typing import Any

from careless_operator import replace_status
from feddiff_operator.cluster import Cluster
from feddiff_operator.ledger import ClusterLedger
from feddiff_protocol.api import FederatedDiffusionJob
from feddiff_protocol.errors import PrivacyRefusal


class Careless(Cluster):
    replace_status = replace_status


async def admitted(book: ClusterLedger, document: dict[str, Any]) -> str | None:
    """The job's uid, which is its name here, once it is charged."""
    job, uid = FederatedDiffusionJob.model_validate(document), document["metadata"]["name"]
    try:
        if await book.reserve(job, uid, "c") is not None:
            return None
        await book.charge(job, uid, "c")
    except PrivacyRefusal:  # the careless one comes here
        return None
    return uid


async def main(kubeconfig: str, kind: type[Cluster]) -> None:
    async with await kind.from_kubeconfig(kubeconfig, qps=5000, burst=5000) as cluster:
        book = ClusterLedger(cluster, lambda: datetime.now(UTC))
        print(json.dumps("ready"), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            answers = await asyncio.gather(*(admitted(book, each) for each in json.loads(line)))
            print(json.dumps([each for each in answers if each]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Careless if sys.argv[2:] == ["careless"] else Cluster))
