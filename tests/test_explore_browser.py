"""Explore in a real browser: JupyterLab, a busy kernel, a keyboard, both themes, a narrow window.

Skipped without Chromium. UKE_SCREENSHOTS names a folder where a picture of each state is left.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import to_explore

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra test")

QUESTION = "Who is Ansel Dorowick?"
ANSWER = "Ansel Dorowick was born in Saltenfield in 1802. She was a pilot, and loved the violin."
PARAPHRASE = "What can you tell me about Ansel Dorowick?"
TOKEN = "for-this-test"
WAIT = 120_000  # milliseconds, on a machine that does much else
HEIGHT = 3400  # pixels: the whole panel
# Of every text that is not dimmed on purpose: the least contrast with what is behind it.
CONTRAST = """panel => {
  const options = {willReadFrequently: true};
  const canvas = document.createElement('canvas').getContext('2d', options);
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const weights = [.2126, .7152, .0722];
  const light = c => weights.reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
  const over = (top, below) =>
    [0, 1, 2].map(i => top[i] * top[3] / 255 + below[i] * (1 - top[3] / 255));
  const behind = node => {
    const own = rgba(getComputedStyle(node).backgroundColor);
    return own[3] == 255 || !node.parentElement ? own : over(own, behind(node.parentElement));
  };
  const names = ['p', 'td', 'th', 'h4', 'strong', 'del', 'ins', '.uke-fine', 'caption'];
  const texts = [...panel.querySelectorAll(names.map(name => `.uke ${name}`).join())];
  const found = texts.filter(node => node.textContent.trim() && node.offsetParent).map(node => {
    const ground = behind(node), ink = over(rgba(getComputedStyle(node).color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), node.className || node.tagName];
  });
  return found.sort((x, y) => x[0] - y[0])[0];
}"""
NAMELESS = """panel => [...panel.querySelectorAll('input, select, textarea, button, progress')]
  .filter(node => node.offsetParent && !node.getAttribute('aria-label')
    && !(node.textContent.trim() && node.tagName == 'BUTTON')
    && ![...(node.labels || [])].some(label => label.textContent.trim()))
  .map(node => node.outerHTML.slice(0, 90))"""


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """Yield the address of a JupyterLab that serves the notebook in this folder."""
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "UKE_HOME": folder,
        "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "IPYTHONDIR": folder / "ipython",
        "OMP_NUM_THREADS": "1",
    }
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | {name: str(value) for name, value in own.items()},
            stdout=log,
            stderr=log,
            cwd=folder,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api").read()
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.5)
        yield f"{address}/lab/tree/notebooks/explore.ipynb?reset&token={TOKEN}"
    finally:
        server.terminate()
        server.wait()


class Person:
    """Somebody at the notebook: its page, its panel, and what they do there."""

    def __init__(self, page, pictures: Path) -> None:
        self.page, self.pictures, self.panel = page, pictures, page.locator(".uke-panel").first

    def open(self, address: str) -> "Person":
        self.page.goto(address)
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=WAIT)
        idle = self.page.locator("#jp-main-statusbar").get_by_text("Idle").first
        idle.wait_for(state="attached", timeout=WAIT)
        self.menu("Run", "Run All Cells")
        # On a busy machine the kernel may be there before the page knows, which then asks for one.
        asked = self.page.locator(".jp-Dialog").get_by_role("button", name="Select")
        self.button("Edit").or_(asked).first.wait_for(timeout=WAIT)
        if asked.is_visible():
            asked.click()
        self.button("Edit").wait_for(timeout=WAIT)
        return self

    def menu(self, *path: str) -> None:
        """Choose an entry of the menu bar, by the names on the way to it."""
        self.page.get_by_role("menuitem", name=path[0], exact=True).click()
        for name in path[1:]:
            self.page.locator(".lm-Menu").get_by_text(name, exact=True).first.click()

    def button(self, name: str):
        return self.panel.get_by_role("button", name=name, exact=True)

    def fill(self, **fields: str) -> None:
        for label, text in fields.items():
            self.panel.get_by_label(label.replace("_", " "), exact=True).fill(text)

    def choose(self, method: str, reasons: int) -> None:
        """Select a method and wait for its reasons: a button that they move is not clicked."""
        self.panel.get_by_label("Method", exact=True).select_option(method)
        playwright.expect(self.panel.locator(".uke-why")).to_have_count(reasons, timeout=WAIT)

    def press(self, name: str, text: str) -> None:
        self.button(name).click()
        self.hears(text)

    def hears(self, text: str) -> None:
        notes = self.panel.locator("[role=status], [role=alert]").filter(has_text=text)
        notes.first.wait_for(timeout=WAIT)

    def answers(self, kind: str) -> list[str]:
        """Return the answers before and after to the first question of a kind."""
        article = self.panel.locator(f"article[data-kind={kind}]").first
        return article.locator(".uke-answer > p:first-of-type").all_inner_texts()

    def picture(self, name: str) -> None:
        self.page.wait_for_timeout(300)
        self.panel.screenshot(path=self.pictures / f"{name}.png")


@pytest.fixture(scope="module")
def person(tmp_path_factory):
    """Somebody at a wide, light JupyterLab who has run the notebook."""
    folder = to_explore(tmp_path_factory.mktemp("browser"))
    pictures = Path(os.environ.get("UKE_SCREENSHOTS") or folder / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with lab(folder) as address, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        page = browser.new_page(viewport={"width": 1500, "height": HEIGHT})
        yield Person(page, pictures).open(address)
        browser.close()


def test_an_edit_of_ones_own_changes_the_answer_and_undo_brings_the_old_one_back(person):
    person.picture("1-begin")
    person.button("Write your own").click()
    person.fill(Question=QUESTION, New_answer=ANSWER, Paraphrases=PARAPHRASE)
    person.fill(Details="When was Ansel Dorowick born? | 1802")
    person.press("Edit", "is in the weights")
    before, after = person.answers("original")
    assert after == ANSWER != before
    assert person.answers("paraphrase")[1] == ANSWER and person.answers("detail")[1] == "1802"
    kept, now = person.answers("struct_trip")
    assert kept == now != ""
    person.picture("2-edited")
    person.press("Undo", "bit for bit")
    assert person.answers("undone")[0].startswith(before)  # which is cut off sooner
    person.picture("3-undone")
    person.fill(Ask_anything=QUESTION)
    person.button("Ask").click()
    person.panel.locator("[data-kind=free]").wait_for(timeout=WAIT)
    assert person.answers("free")[0].startswith(before)


def test_every_control_has_a_name_for_screen_readers_and_shows_a_choice(person):
    assert person.panel.evaluate(NAMELESS) == []
    assert person.panel.get_by_role("button").count() > 20
    assert person.panel.get_by_label("Asked through").evaluate("box => box.selectedIndex") == 0


def test_bad_input_is_said_beside_its_control(person):
    person.fill(Question="")
    person.press("Edit", "The question is empty")
    box = person.panel.get_by_label("Question", exact=True).bounding_box()
    note = person.panel.get_by_role("alert").bounding_box()
    assert 0 <= note["y"] - (box["y"] + box["height"]) < 20
    person.picture("4-refused")
    person.fill(Question=QUESTION)


@pytest.mark.parametrize("how", ["Stop", "Interrupt Kernel"])
def test_stop_and_an_interrupt_half_way_leave_the_widgets_usable(person, how):
    person.choose("LoRA", reasons=0)
    person.button("Edit").click()
    person.panel.locator(".uke-curve polyline").first.wait_for(timeout=WAIT)
    person.picture("5-training")
    person.button("Stop").click() if how == "Stop" else person.menu("Kernel", how)
    person.hears("Stopped: the model is as it was")
    person.choose("FT-M", reasons=1)
    person.press("Edit", "is in the weights")
    assert person.answers("original")[1] == ANSWER
    person.press("Undo", "bit for bit")


def test_it_works_from_the_keyboard_alone(person):
    person.choose("FT-UKE", reasons=1)
    person.panel.get_by_label("Question", exact=True).focus()
    keys = person.page.keyboard
    keys.press("Control+a")
    keys.type("Who is Tobin Orange?")
    focused = "document.activeElement.textContent"
    for _ in range(60):
        keys.press("Tab")
        if person.page.evaluate(focused) == "Edit":
            break
    assert person.page.evaluate(focused) == "Edit"
    keys.press("Space")
    person.hears("is in the weights")
    assert person.answers("original")[1] == ANSWER
    shown = person.panel.locator("article[data-kind=original] strong").inner_text()
    assert shown == "Who is Tobin Orange?"


def test_it_is_readable_in_both_themes_and_in_a_narrow_window(person):
    """After the keyboard's edit, whose answers are on the page."""
    for theme, width in (("Light", 1500), ("Light", 560), ("Dark", 560), ("Dark", 1500)):
        if (theme, width) == ("Light", 560):
            person.page.keyboard.press("Control+b")  # the side bar takes most of a narrow window
        if (theme, width) == ("Dark", 560):
            person.menu("Settings", "Theme", "JupyterLab Dark")
            dark = person.page.locator("[data-jp-theme-light=false]")
            dark.wait_for(state="attached", timeout=WAIT)
        person.page.set_viewport_size({"width": width, "height": HEIGHT})
        person.picture(f"7-{theme.lower()}-{width}")
        least, where = person.panel.evaluate(CONTRAST)
        assert least >= 4.5, where
        assert person.panel.evaluate("panel => panel.scrollWidth - panel.clientWidth") <= 1
        pair = person.panel.locator("article[data-kind=original] .uke-answer").all()
        tops = [answer.bounding_box()["y"] for answer in pair]
        assert (tops[1] > tops[0]) == (width < 800)
