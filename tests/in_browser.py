"""The page of a run in a real browser: Debian's chromium, or what CHROMIUM names.

By its name this file is left out unless one asks for it: pip install -r requirements-browser.txt,
then python -m pytest tests/in_browser.py
"""

import os
import shutil
import time
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from helpers import made_up_page
from playwright.sync_api import sync_playwright

EVIL = "<script>alert(1)</script>" + 14 * "long"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """30 clips of a bell, of a class with an evil name, and of a drum; the first 6 are mistakes."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(made_up_page(folder, ["bell", EVIL, "drum"], 30))
    return folder / "report.html"


@pytest.fixture
def opened(browser):
    """Opens a file in a new window; at the end nothing but the file was asked for, and the console
    is empty.
    """
    contexts, heard = [], []

    def call(file: Path, **options):
        contexts.append(
            browser.new_context(**{"viewport": {"width": 1000, "height": 800}, **options})
        )
        page = contexts[-1].new_page()
        for event in ("console", "pageerror", "dialog", "crash"):
            page.on(
                event,
                lambda what, event=event: heard.append((event, str(getattr(what, "text", what)))),
            )
        page.on(
            "request",
            lambda one: one.url.startswith(("data:", file.as_uri())) or heard.append(one.url),
        )
        page.goto(file.as_uri())
        return page

    yield call
    for context in contexts:
        context.close()
    assert heard == []


def shown(page) -> list[str]:
    """The paths of the clips that are listed."""
    return page.locator(".cards li:visible .path").all_text_contents()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_every_width_light_and_dark(opened, file, width, scheme):
    """Nothing to scroll sideways, and nothing that axe-core finds: contrast, names, order,
    keyboard.
    """
    page = opened(file, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.get_by_role("button", name=f"2 of {EVIL}").click()  # whose name is told
    assert page.evaluate("document.documentElement.scrollWidth") == width
    heads = page.locator(".matrix th span").evaluate_all(
        "all => all.map(a => a.scrollHeight - a.clientHeight)"
    )
    assert max(heads) <= 1  # nothing is cut off
    assert page.locator("pre").evaluate("one => one.scrollWidth - one.clientWidth") == 0
    found = Axe().run(page).response
    assert found["violations"] == [] and len(found["passes"]) > 20
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[scheme]


def test_a_table_that_does_not_fit_says_so(opened, tmp_path):
    names = [f"sound {k}" for k in range(12)]
    (tmp_path / "page.html").write_text(made_up_page(tmp_path, names, 36))
    page = opened(tmp_path / "page.html", viewport={"width": 390, "height": 800})
    hints = page.get_by_text("wider than the screen")
    assert [hint.is_visible() for hint in hints.all()] == [True, False]  # the matrix, the classes
    page.set_viewport_size({"width": 1200, "height": 800})
    page.wait_for_function("document.querySelectorAll('p[hidden] + .wide').length === 2")


def test_views(opened, file):
    page = opened(file)
    assert shown(page) == [f"{i}.wav" for i in (5, 4, 3, 2, 1, 0)]  # the surest mistake first
    page.get_by_role("button", name="Right answers").click()
    assert shown(page) == [f"{i}.wav" for i in range(6, 30)]
    page.get_by_role("button", name="Both").click()
    assert len(shown(page)) == 30
    assert page.locator("#listed").inner_text() == "30 of the 30 clips on this page"


def test_a_cell_of_the_matrix_leads_to_its_clips(opened, file):
    """By keyboard; and what is read aloud says which."""
    page = opened(file)
    cell = page.get_by_role("button", name=f"2 of bell, answered {EVIL}")
    cell.focus()
    page.keyboard.press("Enter")
    assert shown(page) == ["3.wav", "0.wav"] and cell.get_attribute("aria-pressed") == "true"
    said = f"2 of bell, answered {EVIL}: 2 of them are on this page, 0 more in predictions.csv"
    assert page.get_by_role("status").inner_text() == said
    assert page.evaluate("document.activeElement.id") == "clips"
    assert page.locator("[aria-pressed=true]").count() == 1


def test_a_player_plays_its_clip(opened, file):
    """By the space bar, one at a time; and the sound is the tone of the clip."""
    page = opened(file)
    for name in ("5.wav", "4.wav"):
        page.locator(f"audio[aria-label='{name}']").focus()
        page.keyboard.press("Space")
        page.wait_for_function(
            "name => document.querySelector(`[aria-label='${name}']`).currentTime > 0", arg=name
        )
    assert (
        page.locator("audio").evaluate_all("all => all.filter(a => !a.paused && !a.ended).length")
        <= 1
    )
    seconds, hertz = page.evaluate("""async () => {
        const content = document.querySelector("audio[aria-label='4.wav']").src.split(",")[1];
        const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
        const sound = await new OfflineAudioContext(1, 1, 16000).decodeAudioData(bytes.buffer);
        const wave = sound.getChannelData(0).slice(2000, 7000);
        let crossings = 0;
        for (let i = 1; i < wave.length; i++) crossings += wave[i - 1] < 0 && wave[i] >= 0;
        return [sound.duration, crossings / wave.length * 16000];
    }""")
    assert seconds == pytest.approx(0.5, abs=0.15) and hertz == pytest.approx(580, abs=5)


def test_names_are_text(opened, file):
    page = opened(file)
    assert page.locator("script").count() == 1
    assert page.locator(".matrix tbody th").all_inner_texts() == ["bell", EVIL, "drum"]


def test_paper_and_browsers_without_scripts(opened, file):
    page = opened(file, java_script_enabled=False)
    assert len(shown(page)) == 30 and not page.locator(".views").is_visible()
    page.emulate_media(media="print")
    assert not page.locator("audio").first.is_visible() and not page.locator("nav").is_visible()


def test_a_wide_matrix_fits_on_paper(opened, tmp_path):
    (tmp_path / "page.html").write_text(
        made_up_page(tmp_path, [f"sound {k}" for k in range(20)], 60)
    )
    # A4 without its margins
    page = opened(tmp_path / "page.html", viewport={"width": 718, "height": 1000})
    page.emulate_media(media="print")
    assert page.locator(".matrix").evaluate("table => table.getBoundingClientRect().right") <= 718
    assert page.pdf()[:4] == b"%PDF"


def test_500_clips_stay_quick(opened, tmp_path):
    classes = [f"class {k}" for k in range(50)]
    (tmp_path / "page.html").write_text(made_up_page(tmp_path, classes, 500))
    start = time.perf_counter()
    page = opened(tmp_path / "page.html")
    assert time.perf_counter() - start < 20
    milliseconds = page.evaluate("""async () => {
        const times = [];
        // 20 cells, 3 views
        for (const button of [...document.querySelectorAll("button")].slice(-23)) {
            const start = performance.now();
            button.click();
            await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
            times.push(performance.now() - start);
        }
        return times;
    }""")
    assert len(milliseconds) == 23 and max(milliseconds) < 3000 and sorted(milliseconds)[11] < 250
