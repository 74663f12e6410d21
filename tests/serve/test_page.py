"""The page in headless Chromium, by clicks and keys, as wide as a desktop and as a phone."""

import io
import json
import shutil
import socket
import threading
import time

import pytest
from PIL import Image

from flaxkd.serve import app
from tests.serve.conftest import LIMITS

pytest.importorskip("selenium", reason='the page is tested with pip install -e ".[test-browser]"')

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("the page is tested where there are chromium and chromedriver", allow_module_level=True)


@pytest.fixture(scope="module")
def address(models):
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = app.make(models, limits=LIMITS, batch_size=4)
    server = uvicorn.Server(uvicorn.Config(made, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.time() + 300
    while not (server.started and made.state.server.device.ready):
        assert time.time() < end and thread.is_alive()
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    folder = tmp_path_factory.mktemp("saved")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.saved = folder
    yield browser
    browser.quit()


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(request, chromium, address):
    width, height = request.param
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    chromium.get(address)
    waits(chromium, lambda: chromium.find_elements(By.NAME, "model"))
    yield chromium
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    assert not [each for each in chromium.get_log("browser") if each["level"] == "SEVERE"]


def waits(page, condition):
    return WebDriverWait(page, 60).until(lambda _: condition())


def find(page, name: str):
    return page.find_element(By.ID, name)


def said(page) -> str:
    return find(page, "status").text


def drawn(page) -> list:
    waits(page, lambda: said(page).startswith("Done"))
    return page.find_elements(By.CSS_SELECTOR, ".card .picture img")


def opened(page) -> None:
    """The settings, which a phone shows when asked."""
    if not find(page, "seed").is_displayed():
        page.find_element(By.CSS_SELECTOR, "#settings summary").click()


def fill(page, name: str, value: str) -> None:
    field = find(page, name)
    field.clear()
    field.send_keys(value)


def test_teacher_and_student_side_by_side_with_their_times(page):
    fill(page, "prompt", "green apple")
    opened(page)
    fill(page, "seed", "7")
    find(page, "draw").click()
    images = drawn(page)
    assert said(page) == "Done. Seed 7." and len(images) == 2
    assert abs(images[0].rect["y"] - images[1].rect["y"]) < 2 and images[0].rect["x"] < images[1].rect["x"]
    assert [image.get_attribute("alt") for image in images] == [
        f"green apple, drawn by {name} with seed 7" for name in ("teacher", "student")
    ]
    times = [each.text for each in page.find_elements(By.CSS_SELECTOR, ".time")]
    assert all("steps/s" in time for time in times) and ("as fast" in times[1] or "slower" in times[1])
    page.find_element(By.LINK_TEXT, "Save").click()
    file = page.saved / "teacher-7.png"
    waits(page, file.is_file)
    assert Image.open(io.BytesIO(file.read_bytes())).text["prompt"] == "green apple"
    file.unlink()


def test_the_history_outlives_the_page_and_fills_the_form(page):
    opened(page)
    fill(page, "prompt", "red apple")
    fill(page, "seed", "11")
    page.find_elements(By.NAME, "model")[1].click()  # the teacher alone
    find(page, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    assert len(drawn(page)) == 1
    page.refresh()
    entries = waits(page, lambda: page.find_elements(By.CSS_SELECTOR, "#history button"))
    assert entries[0].get_attribute("aria-label") == "Show red apple by teacher, seed 11"
    waits(page, lambda: page.find_elements(By.NAME, "model"))
    fill(page, "prompt", "other")
    entries[0].click()
    opened(page)
    assert [find(page, name).get_attribute("value") for name in ("prompt", "seed")] == ["red apple", "11"]
    assert page.find_element(By.CSS_SELECTOR, ".card .picture img").is_displayed()
    find(page, "forget").click()
    waits(page, lambda: not page.find_elements(By.CSS_SELECTOR, "#history button"))


def test_a_picture_to_start_from_several_pictures_and_a_mistake(page):
    opened(page)
    assert not find(page, "strength").is_displayed()
    find(page, "draw").click()
    drawn(page)
    page.find_element(By.XPATH, "//button[text()='Start from it']").click()
    waits(page, lambda: find(page, "strength").is_displayed())
    fill(page, "count", "2")
    find(page, "draw").click()
    waits(page, lambda: said(page) == "Drawing." or said(page).startswith("Done"))
    assert len(drawn(page)) == 4
    find(page, "without").click()
    assert not find(page, "strength").is_displayed()
    for box in page.find_elements(By.NAME, "model"):
        box.click()
    find(page, "draw").click()
    waits(page, lambda: said(page) == "Choose a model.")


def test_escape_cancels(page):
    opened(page)
    fill(page, "count", "6")
    page.execute_script("arguments[0].value = 20; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
                        find(page, "steps"))  # fmt: skip
    find(page, "draw").click()
    find(page, "prompt").send_keys(Keys.ESCAPE)
    waits(page, lambda: said(page) == "Cancelled." or said(page).startswith("Done"))
    waits(page, lambda: find(page, "draw").is_enabled() and not find(page, "cancel").is_enabled())


def test_everything_has_a_name_and_is_reached_by_the_keyboard(page):
    opened(page)
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = {"button", "textbox", "checkbox", "slider", "spinbutton", "combobox"}
    found = [node for node in nodes if node.get("role", {}).get("value") in controls and not node["ignored"]]
    names = [node.get("name", {}).get("value", "").strip() for node in found]
    assert len(names) >= 12 and all(names), json.dumps(names)
    find(page, "prompt").click()
    reached = []
    for _ in range(12):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("name"))
    order = ["model", "model", "draw", "negative", "steps", "guidance", "sampler", "size", "seed", "count", "image"]
    assert [each for each in reached if each in order] == order
