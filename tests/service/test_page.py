"""The page in a real browser: from an archive to a prediction, at two widths, light and dark."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from finetune.service.settings import ServiceSettings
from finetune.service.work import dispatcher
from tests.browsers import NEEDS_BROWSER, open_browser
from tests.conftest import FinishedRun, draw_folder
from tests.service.servers import Scripts, Served, serving
from tests.service.test_api import TOKEN, WAIT
from tests.sweeps import slow_except

HTML = {"Accept": "text/html"}


def needs_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Skip a test where there is no browser."""
    for mark in NEEDS_BROWSER:
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "TICK", 0.02)


@pytest.fixture
def served(tmp_path: Path, finished_run: FinishedRun) -> Iterator[Served]:
    scripts = Scripts({"wait": WAIT, "run": f"cp -r {finished_run('freeze')}/. $OUT"})
    with serving(ServiceSettings(tmp_path / "store"), scripts) as server:
        yield server


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    draw_folder(tmp_path / "images", {"red": 3, "blue": 3})
    with zipfile.ZipFile(tmp_path / "colours.zip", "w") as packed:
        for path in sorted((tmp_path / "images").rglob("*.jpg")):
            packed.write(path, path.relative_to(tmp_path / "images"))
    return tmp_path / "colours.zip"


def wait_until(browser: Any, act: Any, seconds: float = 60) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(act)


@needs_browser
def test_from_an_archive_to_a_prediction(served: Served, archive: Path) -> None:
    from selenium.webdriver.common.by import By

    with open_browser() as browser:
        browser.get(f"{served.client.base_url}/")
        browser.find_element(By.ID, "file").send_keys(str(archive))
        wait_until(browser, lambda one: "/datasets/" in one.current_url)
        form = wait_until(browser, lambda one: one.find_elements(By.ID, "start"))[0]
        assert browser.find_element(By.ID, "strategy").get_attribute("value") == "auto"
        label = browser.find_element(By.ID, "label")
        assert label.get_attribute("value") == "colours.zip"
        label.clear()
        label.send_keys("run")
        form.find_element(By.TAG_NAME, "button").click()
        wait_until(browser, lambda one: "/jobs/" in one.current_url)
        name = wait_until(browser, lambda one: one.find_elements(By.ID, "name"))[0]
        assert "%" in browser.find_element(By.CLASS_NAME, "metrics").text
        name.send_keys("colours")
        browser.find_element(By.CSS_SELECTOR, "#promote button").click()
        wait_until(browser, lambda one: "/models/colours" in one.current_url)
        image = archive.parent / "images" / "red" / "000.jpg"
        browser.find_element(By.ID, "file").send_keys(str(image))
        rows = wait_until(browser, lambda one: one.find_elements(By.CSS_SELECTOR, "#classes li"), 120)
        assert rows[0].text.split()[0] in {"red", "green", "blue"}
        assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


@pytest.mark.slow
@needs_browser
def test_a_running_job_is_shown_as_it_goes(served: Served, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    served.scripts.scripts["slow"] = (
        'printf \'{"phase": "training, epoch 1/2", "done": 3, "total": 9}\' > $OUT/progress.json;'
        "printf 'epoch,lr,train_loss,eval_loss,eval_accuracy\\n1,0.1,1.5,1.2,0.5\\n' > $OUT/history.csv;"
        "echo line; while [ ! -e $OUT/go ]; do sleep 0.1; done; touch $OUT/done"
    )
    job = served.submit("slow")
    with open_browser() as browser:
        browser.get(f"{served.client.base_url}/jobs/{job}")
        wait_until(browser, lambda one: "training" in one.find_element(By.ID, "phase").text)
        assert browser.find_element(By.ID, "done").get_attribute("value") == "3"
        wait_until(browser, lambda one: "line" in one.find_element(By.ID, "lines").text)
        [run] = tmp_path.glob("store/jobs/*/run")
        (run / "go").touch()
        wait_until(browser, lambda one: one.find_element(By.ID, "state").text == "succeeded")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", slow_except([390], [390, 1200]))
def test_no_page_is_wider_than_the_window(served: Served, archive: Path, width: int) -> None:
    dataset = served.client.post("/v1/datasets", content=archive.read_bytes()).json()["id"]
    job = served.submit("run")
    served.wait(job, "succeeded")
    served.client.put("/v1/models/colours", json={"job": job})
    with open_browser() as browser:
        browser.set_window_size(width, 900)
        for path in ("", f"datasets/{dataset}", f"jobs/{job}", "models/colours", "docs", "jobs/none"):
            browser.get(f"{served.client.base_url}/{path}")
            wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, path


@pytest.mark.slow
@needs_browser
def test_names_are_escaped_and_no_script_of_others_runs(served: Served) -> None:
    bad = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
    job = served.submit(bad)
    served.wait(job, "succeeded")
    page = served.client.get(f"/jobs/{job}", headers=HTML)
    assert bad not in page.text and "&lt;script&gt;" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy
    with open_browser() as browser:
        browser.get(f"{served.client.base_url}/")
        assert browser.title == "finetune"


def test_errors_are_pages_for_browsers_and_problems_for_programs(served: Served) -> None:
    page = served.client.get("/jobs/none", headers=HTML)
    assert page.status_code == 404 and "there is no job of that id" in page.text and "<html" in page.text
    assert served.client.get("/v1/jobs/none", headers=HTML).json()["status"] == 404
    assert served.client.get("/compare", headers=HTML).status_code == 422


def test_two_jobs_are_compared(served: Served) -> None:
    jobs = [served.submit("run") for _ in range(2)]
    for job in jobs:
        served.wait(job, "succeeded")
    page = served.client.get("/compare", params={"job": jobs}, headers=HTML)
    assert page.status_code == 200, page.text
    for title in ("accuracy", "macro F1", "ROC AUC", "log loss", "images"):
        assert f">{title}</th>" in page.text, title


def test_people_log_in_once(tmp_path: Path) -> None:
    settings = ServiceSettings(tmp_path / "store", token=TOKEN)
    with serving(settings) as served, httpx.Client(base_url=served.client.base_url, headers=HTML) as browser:
        asked = browser.get("/")
        assert asked.status_code == 401 and "Token of this server" in asked.text
        assert browser.get("/static/page.css").status_code == 200
        wrong = browser.post("/login", data={"token": "wrong"})
        assert wrong.status_code == 401 and "not the token" in wrong.text
        right = browser.post("/login", data={"token": TOKEN})
        cookie = right.headers["set-cookie"].lower()
        assert right.status_code == 303 and "httponly" in cookie and "samesite=strict" in cookie
        assert "Train a classifier" in browser.get("/").text
        assert browser.get("/v1/jobs").status_code == 200
