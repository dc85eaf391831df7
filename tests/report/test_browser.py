"""The report in a real browser: it makes no request, runs no foreign script, and sorts its table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.report.write_report import write_run_report
from finetune.system.display import SilentDisplay
from tests.browsers import NEEDS_BROWSER, open_browser
from tests.report.folders import HOSTILE, HOSTILE_FILE, write_folder

pytestmark = NEEDS_BROWSER
FRUIT = (
    "Delicious", "Pineapple", "Watermelon", "Grapefruit", "Pomegranate", "Nectarine", "Cantaloupe", "Mango",
    "Peach", "Kiwi", "Plum",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    classes = (*HOSTILE, "spare")
    folder = write_folder(tmp_path_factory.mktemp("hostile"), classes, per_class=12, spare="spare")
    write_run_report(folder, SilentDisplay(), command="finetune run --data '<b>'")
    return folder.report


def open_page(browser: Any, page: Path, width: int = 1280, scheme: str = "light") -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")  # discard earlier entries
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    address = page.as_uri()
    browser.get(address)
    # On a busy machine `get` may come back while the page before is still there, or half of this one.
    loaded = "return document.URL === arguments[0] && document.readyState === 'complete'"
    WebDriverWait(browser, 60).until(lambda driver: driver.execute_script(loaded, address))


def requests_of(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [one for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [one["params"]["request"]["url"] for one in sent]


@pytest.mark.slow
def test_the_page_opens_without_errors_or_requests(browser: Any, page: Path) -> None:
    open_page(browser, page)
    assert browser.get_log("browser") == []
    asked = {url.partition(":")[0] for url in requests_of(browser)}
    assert asked == {"file", "data"}
    broken = "return [...document.images].filter(one => !one.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.images.length") > 10


@pytest.mark.slow
def test_errors_and_requests_would_be_detected(browser: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.html"
    wrong.write_text("<img src='http://127.0.0.1:9/x.png'><script>nothing()</script>")
    open_page(browser, wrong)
    assert "http" in {url.partition(":")[0] for url in requests_of(browser)}
    assert browser.get_log("browser")


def test_hostile_names_are_text(browser: Any, page: Path) -> None:
    open_page(browser, page)
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.scripts.length") == 1
    assert (
        browser.execute_script("return document.querySelectorAll('[onerror], [onload], [style]').length") == 0
    )
    labels = browser.execute_script(
        "return [...document.querySelectorAll('#classes tbody th')].map(one => one.textContent)"
    )
    assert sorted(labels) == sorted([*HOSTILE, "spare"])
    shown = browser.execute_script("return document.body.textContent")
    assert HOSTILE_FILE in shown
    told = browser.execute_script(
        "return [...document.querySelectorAll('svg title')].map(one => one.textContent)"
    )
    assert any(HOSTILE[0] in words for words in told)


def test_an_injected_script_would_not_run(browser: Any, page: Path, tmp_path: Path) -> None:
    """The content security policy stops a script even if escaping should fail."""
    hole = tmp_path / "hole.html"
    bad = '<script>window.hacked=1</script><img src="x" onerror="window.hacked=1">'
    hole.write_text(page.read_text().replace("<main>", f"<main>{bad}", 1))
    open_page(browser, hole)
    assert browser.execute_script("return window.hacked") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def column(browser: Any, number: int) -> list[str]:
    rows = "[...document.querySelectorAll('#classes tbody tr')]"
    script = f"return {rows}.map(row => row.cells[{number}].textContent)"
    found: list[str] = browser.execute_script(script)
    return found


def test_the_table_sorts_by_number_with_empty_cells_last(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(browser, page)
    buttons = browser.find_elements(By.CSS_SELECTOR, "#classes th button")
    recall = buttons[2]
    state = (
        "return [...document.querySelectorAll('#classes thead th')].map(one => one.getAttribute('aria-sort'))"
    )
    assert browser.execute_script(state) == ["none", "none", "none", "ascending", "none", "none"]
    lowest_first = column(browser, 3)
    assert lowest_first[-1] == "n/a"
    assert [float(cell) for cell in lowest_first[:-1]] == sorted(map(float, lowest_first[:-1]))
    recall.click()
    rising = column(browser, 2)
    assert rising[-1] == "n/a" and "n/a" not in rising[:-1]
    assert [float(cell) for cell in rising[:-1]] == sorted(float(cell) for cell in rising[:-1])
    assert browser.execute_script(state) == ["none", "none", "ascending", "none", "none", "none"]
    recall.send_keys(Keys.ENTER)  # the keyboard works like the mouse
    falling = column(browser, 2)
    assert falling[-1] == "n/a"
    assert [float(cell) for cell in falling[:-1]] == sorted(map(float, falling[:-1]), reverse=True)
    assert browser.execute_script(state)[2] == "descending"
    predicted = buttons[5]
    predicted.click()
    counts = [int(cell) for cell in column(browser, 5)]
    assert counts == sorted(counts) and max(counts) >= 10 > min(counts)  # numeric order: 9 before 10
    buttons[0].click()
    assert column(browser, 0) != [*HOSTILE, "spare"] and sorted(column(browser, 0)) == sorted(
        [*HOSTILE, "spare"]
    )


def test_no_small_table_scrolls_sideways_on_a_desktop(browser: Any, tmp_path: Path) -> None:
    """22 classes make the widest matrix that is common; the table of mistakes moves below it."""
    names = [f"{first} {second}" for first in ("Golden", "Yellow") for second in FRUIT]
    folder = write_folder(tmp_path, names, per_class=3)
    write_run_report(folder, SilentDisplay())
    open_page(browser, folder.report)
    wide = (
        "return [...document.querySelectorAll('.scrolls, .tall')].filter(one => one.scrollWidth > "
        "one.clientWidth).map(one => one.getAttribute('aria-label'))"
    )
    assert browser.execute_script(wide) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(browser: Any, page: Path, scheme: str) -> None:
    open_page(browser, page, 390, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_plots_follow_the_dark_colour_scheme(browser: Any, page: Path) -> None:
    script = (
        "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        "getComputedStyle(document.querySelector('svg.plot text')).fill]"
    )
    open_page(browser, page)
    light = browser.execute_script(script)
    open_page(browser, page, scheme="dark")
    dark = browser.execute_script(script)
    assert all(one != other for one, other in zip(light, dark, strict=True))


@pytest.mark.slow
def test_the_saved_plots_open_alone(browser: Any, page: Path) -> None:
    plots = sorted((page.parent / "plots").glob("*.svg"))
    assert {plot.stem for plot in plots} == {
        "intervals", "loss", "accuracy", "learning_rate", "confusion_matrix", "reliability",
        "reliability_calibrated", "seconds",
    }  # fmt: skip
    for plot in plots:
        open_page(browser, plot)
        assert browser.get_log("browser") == []
        assert browser.execute_script("return document.documentElement.getBBox().width") > 50
