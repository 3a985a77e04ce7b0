"""The pages in a browser: on a phone and a desk, by day and by night; it fits, can be read, and asks nobody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from typing import TYPE_CHECKING, Any

import own_run
import pytest
from fake_run import write_run

from pipeline import report

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"),
]

# Of every text that is shown: its contrast to what it stands on, by WCAG 2.2; the worst ones.
CONTRAST = """
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const parse = text => text.match(/[\\d.]+/g).map(Number);
const ground = node => { for (; node; node = node.parentElement) {
  const c = parse(getComputedStyle(node).backgroundColor);
  if (c.length < 4 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const worst = {};
for (let node; node = walker.nextNode();) {
  if (!node.data.trim() || !node.parentElement.getClientRects().length) continue;
  const a = light(parse(getComputedStyle(node.parentElement).color).slice(0, 3)), b = light(ground(node.parentElement));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) worst[node.data.trim().slice(0, 40)] = ratio;
}
return worst;
"""


@pytest.fixture(scope="module", params=["the paper's", "one's own"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("run")
    if request.param == "the paper's":
        write_run(root)
        report.run(root=root)
        return (root / report.path()).as_uri()
    own_run.write_run(root)
    with chdir(root):
        report.run("leaves")
    return (root / report.path("leaves")).as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    home = tmp_path_factory.mktemp("browser")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={home}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_can_be_read(browser: Any, address: str, width: int, scheme: str) -> None:
    view = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    for log in ("performance", "browser"):
        browser.get_log(log)  # what the browser did for itself
    browser.get(address)
    assert browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(CONTRAST) == {}
    lost = "return [...document.images].filter(i => !i.alt || !i.complete || !i.naturalWidth).map(i => i.alt)"
    assert browser.execute_script(lost) == []
    told = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in told if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("data:", "file:"))} == set()
    assert {url for url in asked if url.startswith("file:")} == {address}
    assert browser.get_log("browser") == []


def test_it_prints(browser: Any, address: str) -> None:
    """On paper nothing is behind a scroll bar."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 794, "height": 1123, "deviceScaleFactor": 1, "mobile": False}
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.get(address)
    hidden = """return [...document.querySelectorAll("body *")].filter(node => node.clientHeight
      && node.scrollHeight > node.clientHeight + 2 && /auto|scroll|hidden/.test(getComputedStyle(node).overflowY)
    ).map(node => node.className)"""
    assert browser.execute_script(hidden) == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
