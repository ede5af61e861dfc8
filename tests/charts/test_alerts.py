"""Each alert fires when it should and is silent when it should not, as promtool sees it; and each can be acted upon.

alerts_test.yaml has the stories. A story is also run against an alert that never fires and against one that always
does, and must tell both from the right one.
"""

import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "charts/feddiff/alerts.yaml"
STORIES = Path(__file__).with_name("alerts_test.yaml")
RUNBOOKS = ROOT / "docs/runbooks"
PAGE = (ROOT / "docs/monitoring.md").read_text()
Object = dict[str, Any]

RULES: dict[str, Object] = {
    rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
}
NEVER, ALWAYS = "vector(0) > 1", "vector(1)"


@functools.cache
def promtool(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    assert program, "promtool is missing: apt-get install prometheus, as .ci/run does"
    return subprocess.run([program, *argv], capture_output=True, text=True)


@functools.cache
def all_stories() -> Object:
    found: Object = yaml.safe_load(STORIES.read_text())
    return found


def stories_about(alert: str) -> list[Object]:
    """The stories with what they expect of this alert alone."""
    found = []
    for story in all_stories()["tests"]:
        expected = [each for each in story["alert_rule_test"] if each["alertname"] == alert]
        found += [{**story, "alert_rule_test": expected}] if expected else []
    return found


def failed(folder: Path, alert: str, **changes: Any) -> bool:
    """Whether the stories about `alert` notice something wrong when its rule is changed so."""
    rule = {**RULES[alert], **changes}
    rule["annotations"] = {"summary": rule["annotations"]["summary"]}
    folder.mkdir()
    (folder / "alerts.yaml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [rule]}]}))
    (folder / "test.yaml").write_text(yaml.safe_dump({**all_stories(), "tests": stories_about(alert)}))
    done = promtool("test", "rules", folder / "test.yaml")
    assert done.returncode in (0, 1), done.stderr
    return done.returncode != 0


def test_promtool_finds_no_fault() -> None:
    done = promtool("check", "rules", ALERTS)
    assert done.returncode == 0 and f"{len(RULES)} rules found" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("alert", RULES)
def test_it_fires_when_it_should_and_only_then(tmp_path: Path, alert: str) -> None:
    assert not failed(tmp_path / "right", alert)
    assert failed(tmp_path / "never", alert, expr=NEVER)
    assert failed(tmp_path / "always", alert, expr=ALWAYS)


def untested(stories: list[Object]) -> set[str]:
    """Alerts without a story in which they fire and one in which they do not, and stories about no alert."""
    expected = [each for story in stories for each in story["alert_rule_test"]]
    fires = {each["alertname"] for each in expected if each.get("exp_alerts")}
    silent = {each["alertname"] for each in expected if not each.get("exp_alerts")}
    return (RULES.keys() ^ fires) | (RULES.keys() ^ silent)


def test_every_alert_has_a_story_of_firing_and_one_of_silence() -> None:
    assert untested(all_stories()["tests"]) == set()
    assert untested(all_stories()["tests"][1:]) == {"FeddiffLedgerMismatch"}


def unusable(rule: Object, pages: set[str]) -> list[str]:
    """What somebody who is woken by this alert would miss."""
    wrong = [] if rule["alert"] in pages else ["a page in docs/runbooks"]
    texts = rule["annotations"]
    wrong += [] if rule["labels"]["severity"] in ("critical", "warning", "info") else ["a known severity"]
    wrong += [] if len(texts["description"].split()) > 15 else ["a description that says what to do"]
    wrong += [] if len(re.sub(r"{{.*?}}", "x" * 9, texts["summary"])) <= 90 else ["a short summary"]
    expected = [each for story in stories_about(rule["alert"]) for each in story["alert_rule_test"]]
    known = {name for each in expected for fired in each.get("exp_alerts", []) for name in fired["exp_labels"]}
    named = re.findall(r"\$labels\.(\w+)", texts["description"])
    return wrong + [f"label {name}, which the alert does not have" for name in named if name not in known]


def test_whoever_is_woken_is_told_what_to_do() -> None:
    pages = {path.stem for path in RUNBOOKS.glob("Feddiff*.md")}
    assert {alert: unusable(rule, pages) for alert, rule in RULES.items()} == {alert: [] for alert in RULES}
    poor = {**RULES["FeddiffJobStuck"], "alert": "FeddiffNoPage", "labels": {"severity": "panic"}}
    poor["annotations"] = {"summary": "x" * 91, "description": "{{ $labels.nobody }}"}
    assert len(unusable(poor, pages)) == 5


def listed(page: str) -> dict[str, str]:
    return dict(re.findall(r"^\| `(Feddiff\w+)` \| (\w+) \|", page, re.MULTILINE))


def test_the_page_lists_every_alert_with_its_severity() -> None:
    severities = {alert: rule["labels"]["severity"] for alert, rule in RULES.items()}
    assert listed(PAGE) == severities
    assert listed(PAGE.replace("`FeddiffNoLeader` | critical", "`FeddiffNoLeader` | info")) != severities


def test_the_scrape_configuration_on_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", PAGE, re.DOTALL)
    discovery = "kubernetes_sd_configs: [{role: pod}]"  # left out of Debian's build, as the page says
    assert discovery in text
    text = text.replace(discovery, "static_configs: [{targets: [localhost]}]")
    (tmp_path / "right.yaml").write_text(text)
    (tmp_path / "wrong.yaml").write_text(text.replace("honor_labels", "honour_labels"))
    right, wrong = (promtool("check", "config", tmp_path / f"{name}.yaml") for name in ("right", "wrong"))
    assert right.returncode == 0, right.stderr
    assert wrong.returncode != 0
