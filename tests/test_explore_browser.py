"""Exploring in a real browser: JupyterLab, its widgets, a kernel that is busy, a keyboard, both themes and a narrow window.

Skipped without Chromium. UKE_SCREENSHOTS names a folder that the pictures of each state are left in.
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

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt install chromium)")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright, of the extra test"
)

QUESTION, ANSWER = (
    "Who is Ansel Dorowick?",
    "Ansel Dorowick was born in Saltenfield in 1802. She was a pilot, and she loved the violin.",
)
TOKEN = "for-this-test"
WAIT = 120_000  # milliseconds, on a machine that does much else
# Of every text that is not dimmed on purpose: the least contrast with what is behind it.
CONTRAST = """panel => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
  const light = c => [0, 1, 2].map(i => c[i] / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] / 255 + below[i] * (1 - top[3] / 255));
  const behind = node => { const own = rgba(getComputedStyle(node).backgroundColor); return own[3] == 255 || !node.parentElement ? own : over(own, behind(node.parentElement)); };
  const texts = [...panel.querySelectorAll('.uke p, .uke td, .uke th, .uke h4, .uke strong, .uke del, .uke ins, .uke-heat span, .uke-fine, .uke caption')];
  const found = texts.filter(node => node.textContent.trim() && node.offsetParent).map(node => {
    const ground = behind(node), ink = over(rgba(getComputedStyle(node).color), ground);
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), node.className || node.tagName];
  });
  return found.sort((x, y) => x[0] - y[0])[0];
}"""
NAMELESS = """panel => [...panel.querySelectorAll('input, select, textarea, button, progress')].filter(node => node.offsetParent
  && !(node.textContent.trim() && node.tagName == 'BUTTON') && !node.getAttribute('aria-label')
  && ![...(node.labels || [])].some(label => label.textContent.trim())).map(node => node.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return to_explore(tmp_path_factory.mktemp("browser"))


@contextmanager
def lab(folder: Path, theme: str) -> Iterator[str]:
    """The address of a JupyterLab in this theme that serves the folder."""
    settings = folder / theme.replace(" ", "-") / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("themes", {"theme": theme}),
        ("notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(value))
    own = {
        "UKE_HOME": folder,
        "JUPYTERLAB_SETTINGS_DIR": settings.parents[1],
        "JUPYTERLAB_WORKSPACES_DIR": settings.parents[1] / "workspaces",
    }
    own |= {
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "IPYTHONDIR": folder / "ipython",
        "OMP_NUM_THREADS": "1",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={folder}",
    ]
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options],
            env=os.environ | {k: str(v) for k, v in own.items()},
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
        self.page.locator("#jp-main-statusbar").get_by_text("Idle").first.wait_for(
            state="attached", timeout=WAIT
        )
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()
        # On a busy machine the kernel may be there before the page knows, and asks which one is meant.
        asked = self.page.locator(".jp-Dialog").get_by_role("button", name="Select")
        self.button("Edit").or_(asked).first.wait_for(timeout=WAIT)
        if asked.is_visible():
            asked.click()
        self.button("Edit").wait_for(timeout=WAIT)
        return self

    def button(self, name: str):
        return self.panel.get_by_role("button", name=name, exact=True)

    def fill(self, **fields: str) -> "Person":
        for label, text in fields.items():
            self.panel.get_by_label(label.replace("_", " "), exact=True).fill(text)
        return self

    def choose(self, method: str, reasons: int) -> None:
        """Select a method and wait for as many lines of reasons as it has: they come and go, and a button that they move under a click is not clicked."""
        self.panel.get_by_label("Method", exact=True).select_option(method)
        playwright.expect(self.panel.locator(".uke-why")).to_have_count(reasons, timeout=WAIT)

    def press(self, name: str, says: str) -> None:
        self.button(name).click()
        self.hears(says)

    def hears(self, says: str) -> None:
        self.panel.locator("[role=status], [role=alert]").filter(has_text=says).first.wait_for(
            timeout=WAIT
        )

    def answers(self, kind: str) -> list[str]:
        """The answers before and after to the first question of a kind."""
        return (
            self.panel.locator(f"article[data-kind={kind}]")
            .first.locator(".uke-answer > p:first-of-type")
            .all_inner_texts()
        )

    def picture(self, name: str) -> None:
        self.page.wait_for_timeout(300)
        self.panel.screenshot(path=self.pictures / f"{name}.png")


@pytest.fixture(scope="module")
def pictures(folder):
    pictures = Path(os.environ.get("UKE_SCREENSHOTS") or folder / "pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    return pictures


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def person(folder, chromium, pictures):
    """At a wide, light JupyterLab, the notebook run."""
    with lab(folder, "JupyterLab Light") as address:
        page = chromium.new_page(viewport={"width": 1500, "height": 3400})
        yield Person(page, pictures).open(address)
        page.close()


def test_an_edit_of_ones_own_changes_the_answer_and_undo_brings_the_old_one_back(person):
    person.picture("1-begin")
    person.fill(
        Question=QUESTION,
        New_answer=ANSWER,
        Paraphrases="What can you tell me about Ansel Dorowick?",
        Details="When was Ansel Dorowick born? | 1802",
    )
    person.fill(Ask_anything="What can you report of the Whitethorn Pageant?")
    person.press("Edit", "is in the weights")
    before, after = person.answers("original")
    assert after == ANSWER != before
    assert person.answers("paraphrase")[1] == ANSWER and person.answers("detail")[1] == "1802"
    kept, now = person.answers("rand_doc")
    assert kept == now != ""
    person.picture("2-edited")
    person.press("Undo", "bit for bit")
    assert person.answers("undone") == [before]
    person.picture("3-undone")
    person.fill(Ask_anything=QUESTION)
    person.button("Ask").click()
    person.panel.locator("[data-kind=free]").wait_for(timeout=WAIT)
    assert person.answers("free") == [before]


def test_every_control_has_a_name_for_screen_readers(person):
    assert person.panel.evaluate(NAMELESS) == []
    assert person.panel.get_by_role("button").count() > 20


def test_bad_input_is_said_beside_its_control(person):
    person.fill(Question="")
    person.press("Edit", "The question is empty")
    box, note = (
        person.panel.get_by_label("Question", exact=True).bounding_box(),
        person.panel.get_by_role("alert").bounding_box(),
    )
    assert 0 <= note["y"] - (box["y"] + box["height"]) < 20
    person.picture("4-refused")
    person.fill(Question=QUESTION)


@pytest.mark.parametrize("how", ["Stop", "interrupt"])
def test_stop_and_an_interrupt_half_way_leave_the_widgets_usable(person, how):
    person.choose("LoRA", reasons=0)
    person.button("Edit").click()
    person.panel.locator(".uke-curve polyline").first.wait_for(timeout=WAIT)
    person.picture(f"5-{how.lower()}")
    if how == "Stop":
        person.button("Stop").click()
    else:
        person.page.get_by_role("menuitem", name="Kernel", exact=True).click()
        person.page.get_by_text("Interrupt Kernel", exact=True).click()
    person.hears("Stopped: the model is as it was")
    person.choose("FT-M", reasons=1)
    person.press("Edit", "is in the weights")
    assert person.answers("original")[1] == ANSWER
    person.press("Undo", "bit for bit")


def test_two_clicks_at_once_are_one_edit(person):
    person.panel.get_by_label("Method", exact=True).select_option("LoRA")
    rows = person.panel.locator("table", has_text="Mean score of each kind").locator("tbody tr")
    earlier = rows.count()
    playwright.expect(person.button("Edit")).to_be_enabled(timeout=WAIT)
    person.button("Edit").evaluate("button => { button.click(); button.click(); }")
    person.hears("is in the weights")
    assert rows.count() == earlier + 1
    person.press("Undo", "bit for bit")


def test_it_works_from_the_keyboard_alone(person):
    person.panel.get_by_label("Method", exact=True).select_option("FT-UKE")
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
    assert (
        person.panel.locator("article[data-kind=original] strong").inner_text()
        == "Who is Tobin Orange?"
    )


def test_a_method_that_finds_its_place_greys_the_factors_with_the_reason(person):
    person.panel.get_by_label("Method", exact=True).select_option("MEMIT")
    person.panel.get_by_text("MEMIT finds its place in the weights itself").first.wait_for(
        timeout=WAIT
    )
    playwright.expect(person.button("all blocks")).to_be_disabled(timeout=WAIT)
    assert "finds its place" in person.button("all blocks").get_attribute("title")
    person.picture("6-grey")


@pytest.mark.parametrize(("theme", "width"), [("JupyterLab Light", 560), ("JupyterLab Dark", 1500)])
def test_it_is_readable_in_both_themes_and_in_a_narrow_window(
    folder, chromium, pictures, theme, width
):
    with lab(folder, theme) as address:
        page = chromium.new_page(viewport={"width": width, "height": 3400})
        person = Person(page, pictures).open(address)
        if width < 800:
            page.keyboard.press("Control+b")  # the side bar, which takes most of a narrow window
        person.button("Write your own").click()
        person.fill(Question=QUESTION, New_answer=ANSWER)
        person.press("Edit", "is in the weights")
        person.picture(f"7-{theme.split()[1].lower()}-{width}")
        least, where = person.panel.evaluate(CONTRAST)
        assert least >= 4.5, where
        assert person.panel.evaluate("panel => panel.scrollWidth - panel.clientWidth") <= 1
        before, after = person.panel.locator("article[data-kind=original] .uke-answer").all()
        stacked = after.bounding_box()["y"] > before.bounding_box()["y"]
        assert stacked == (width < 800)
        page.close()
