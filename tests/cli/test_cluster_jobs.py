"""Jobs of a cluster in lines and tables."""

from cluster_objects import NOW, job, shown, status
from feddiff.cluster_jobs import job_document, jobs_document, print_job, print_jobs


def test_lines_are_plain_and_aligned_elsewhere_and_a_table_on_a_terminal() -> None:
    given = job(status("Training", "Training", "", clientsSummary="8/10", progress="37 %", trainer="2/2"))
    document = jobs_document([given, {**given, "metadata": {**given["metadata"], "name": "second-and-longer"}}])
    header, first, second = shown(print_jobs, document, NOW).splitlines()
    assert first.split() == ["research", "first", "Training", "8/10", "37", "%", "4", "2/2", "24h"]
    assert header.index("phase") == first.index("Training") == second.index("Training")
    assert "┃" in shown(print_jobs, document, NOW, terminal=True)
    assert shown(print_jobs, jobs_document([]), NOW) == "no jobs here\n"


def test_a_status_of_an_older_spec_and_dropped_clients_are_said() -> None:
    dropped = [{"client": "b", "reason": "release failed"}]
    given = job(status("Training", "Training", "", dropped=dropped, numDropped=3))
    given["metadata"]["generation"] = 2
    document = job_document(given)
    text = shown(print_job, document, NOW)
    assert document["upToDate"] is False
    assert "the operator has not looked at it yet" in text
    assert "client b no longer takes part: release failed" in text
    assert "and 2 more clients" in text
