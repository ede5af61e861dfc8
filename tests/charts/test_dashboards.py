"""The dashboards are what charts/dashboards.py makes, every panel explains itself, and every link leads somewhere.

That their expressions return data is shown on a real Prometheus by tests/operator/test_on_prometheus.py.
"""

import copy
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "charts/feddiff/dashboards"
Object = dict[str, Any]

specification = importlib.util.spec_from_file_location("dashboards", ROOT / "charts/dashboards.py")
assert specification and specification.loader
dashboards = importlib.util.module_from_spec(specification)
specification.loader.exec_module(dashboards)

SHIPPED: dict[str, Object] = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def test_the_files_are_what_the_script_makes() -> None:
    made = {f"{name}.json": dashboards.text(each) for name, each in dashboards.DASHBOARDS.items()}
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == made, "run `make manifests`"


def test_there_is_one_for_each_who_asks() -> None:
    assert SHIPPED.keys() == {"fleet", "job", "budgets", "operator"}
    uids = [each["uid"] for each in SHIPPED.values()]
    assert len(set(uids)) == 4 and all(len(uid) <= 40 for uid in uids)  # Grafana's limit
    assert all("feddiff" in each["tags"] for each in SHIPPED.values())  # the links at the top find them by it


def unexplained(dashboard: Object) -> Iterator[str]:
    """What a reader of this dashboard would have to guess."""
    titles = [panel["title"] for panel in dashboard["panels"]]
    yield from (f"{title}: a title twice" for title in set(titles) if titles.count(title) > 1)
    for panel in dashboard["panels"]:
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        if not title or len(panel["description"].split()) < 6:
            yield f"{title}: no description"
        if not defaults.get("unit"):
            yield f"{title}: no unit"
        if not panel["targets"] or any(not target["legendFormat"] for target in panel["targets"]):
            yield f"{title}: no legend"
        if panel["datasource"]["uid"] != "${datasource}" or any(
            target["datasource"] != panel["datasource"] for target in panel["targets"]
        ):
            yield f"{title}: its own data source"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_panel_has_title_unit_description_and_legend(name: str) -> None:
    assert list(unexplained(SHIPPED[name])) == []
    poor = copy.deepcopy(SHIPPED[name])
    poor["panels"][0].update(title=poor["panels"][1]["title"], description="")
    poor["panels"][2]["fieldConfig"]["defaults"].pop("unit")
    assert len(list(unexplained(poor))) == 3


def misplaced(panels: list[Object]) -> set[tuple[int, int]]:
    """Cells of the 24 columns that two panels claim, or that none does above the last row's end."""
    cells = [cell for panel in panels for cell in _cells(panel["gridPos"])]
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    everything = {(x, y) for x in range(24) for y in range(bottom)}
    return {cell for cell in cells if cells.count(cell) > 1} | (everything ^ set(cells))


def _cells(place: Object) -> list[tuple[int, int]]:
    columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return [(x, y) for x in columns for y in rows]


@pytest.mark.parametrize("name", SHIPPED)
def test_panels_fill_the_width_and_none_hides_another(name: str) -> None:
    panels = SHIPPED[name]["panels"]
    assert misplaced(panels) == set()
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert misplaced(panels[1:])


def test_links_and_expressions_name_what_there_is() -> None:
    text = json.dumps(SHIPPED)
    uids = {each["uid"]: {v["name"] for v in each["templating"]["list"]} for each in SHIPPED.values()}
    links = re.findall(r"/d/([\w-]+)\?(\S+?)\"", text)
    assert links
    for uid, query in links:
        assert set(re.findall(r"var-(\w+)=", query)) <= uids[uid]
    for each in SHIPPED.values():
        expressions = json.dumps([panel["targets"] for panel in each["panels"]])
        used = set(re.findall(r"\$\{?(\w+)", expressions)) - {"__rate_interval"}
        assert used == uids[each["uid"]]
