"""The site in a browser: mathematics, phone, dark mode, gallery; the calculator by keyboard and with bad input."""

import functools
import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rora_theory.advice.setting import Setting
from rora_theory.advice.transfer import transfer

webdriver = pytest.importorskip("selenium.webdriver", reason="a browser: the extra browser")
build = pytest.importorskip("mkdocs.commands.build", reason="the site: the extra docs")
from mkdocs.config import load_config  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

ROOT = Path(__file__).parents[2]
PROGRAMS = [shutil.which("chromium"), shutil.which("chromedriver")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in PROGRAMS, reason="a browser: chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore"),  # of mkdocs
]
CONTRAST = """
const parse = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return [...c.slice(0, 3), c[3] ?? 1]; };
const over = (top, under) => top.slice(0, 3).map((each, i) => each * top[3] + under[i] * (1 - top[3]));
function background(node) {
  if (!node) return [255, 255, 255];
  const color = parse(getComputedStyle(node).backgroundColor);
  return color[3] === 1 ? color.slice(0, 3) : over(color, background(node.parentElement));
}
const light = (c) => c.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
const luminance = (c) => { const [r, g, b] = light(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const [selector, property] = arguments;
return [...document.querySelectorAll(selector)].filter((node) => node.getClientRects().length).map((node) => {
  const under = background(node);
  const top = over(parse(getComputedStyle(node)[property]), under);
  const pair = [luminance(top), luminance(under)].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
});
"""
BEYOND = """
return [...document.querySelectorAll("article *")].filter((node) => {
  if (getComputedStyle(node).position === "absolute") return false;
  if (node.closest("pre, [hidden], .md-typeset__scrollwrap, .arithmatex, thead")) return false;
  return node.getBoundingClientRect().right > innerWidth + 0.5;
}).map((node) => node.outerHTML.slice(0, 80));
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the documents as they are served."""
    folder = tmp_path_factory.mktemp("site")
    build.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS[0]
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(PROGRAMS[1]))
    yield browser
    browser.quit()


@pytest.fixture
def page(started, site) -> Iterator[Any]:
    """Open the calculator; no error may be left on the browser's console."""
    open_page(started, f"{site}/calculator/")
    yield started
    assert [line for line in started.get_log("browser") if "favicon.ico" not in line["message"]] == []


def open_page(browser: Any, address: str) -> None:
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    go(browser, address)


def go(browser: Any, address: str) -> None:
    """Open a page and wait until its scripts have run, as the driver may return earlier on a busy machine."""
    browser.get(address)
    WebDriverWait(browser, 10).until(lambda _: browser.execute_script("return document.readyState") == "complete")


def go_again(browser: Any) -> None:
    """Open the current address again, as a person who receives it does."""
    address = browser.current_url
    go(browser, "about:blank")
    go(browser, address)


def shown_answer(browser: Any) -> str:
    return browser.find_element(By.ID, "calculator-status").text


def type_text(browser: Any, name: str, text: str) -> None:
    """Replace the content of a field by typing."""
    field = browser.find_element(By.NAME, name)
    field.send_keys(Keys.CONTROL + "a", Keys.NULL, text or Keys.BACKSPACE)


def choose(field: Any, text: str) -> None:
    """Choose an option of a list by arrow keys, as letters that arrive a second late start a new search.

    The page is notified some time after.
    """
    position = [option.text for option in Select(field).options].index(text)
    field.send_keys(Keys.HOME, *[Keys.DOWN] * position)


def set_screen(browser: Any, width: int, height: int) -> None:
    """Emulate a screen of this size; a narrow one is a phone."""
    is_phone = width < 500
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1 + is_phone, "mobile": is_phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def advised_rate(rank: int, **to: Any) -> str:
    """Return the rate that the library advises for the page's tuned setting, as the page writes it."""
    rate = transfer(Setting(16, 32.0, 2e-4), rank, **to).learning_rate
    return re.sub(r"\.?0*e-0?", "e-", f"{rate:.2e}")


def test_keyboard_operation(page) -> None:
    """The four fields come first, then the folded ones; the address keeps what was typed."""
    assert shown_answer(page).startswith("At rank 128, keep lora_alpha=32 and multiply the learning rate by ")
    assert f", to {advised_rate(128)} (" in shown_answer(page)
    reached, keys = [], webdriver.ActionChains(page)
    typed = {"to-rank": "256", "to-alpha": "16", "steps": "64", "to-steps": "300"}
    page.execute_script("document.querySelector('#calculator-form').tabIndex = -1; document.activeElement.blur()")
    page.execute_script("document.querySelector('#calculator-form').focus()")
    for _ in range(14):
        keys.send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        name = focused.get_attribute("name") or focused.tag_name
        reached.append(name)
        if name == "summary":
            keys.send_keys(Keys.SPACE).perform()
        if name == "to-rule":
            keys.send_keys(Keys.DOWN, Keys.DOWN).perform()  # letters would have to come within a second
        if name in typed:
            keys.key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).send_keys(typed[name]).perform()
        outline = page.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"one does not see that {name} has the focus"
    first = ["from-rank", "alpha", "lr", "to-rank", "summary"]
    folded = [
        "to-alpha",
        "rule",
        "to-rule",
        "steps",
        "to-steps",
        "batch-size",
        "to-batch-size",
        "schedule",
        "to-schedule",
    ]
    assert reached == first + folded
    rate = advised_rate(256, rule="rslora", alpha=16.0, steps=64, to_steps=300)
    expected = shown_answer(page)
    assert f", to {rate} (" in expected
    assert "set lora_alpha=256 without use_rslora and divide the learning rate by" in expected
    assert "to-rank=256" in page.current_url
    go_again(page)
    assert shown_answer(page) == expected
    assert page.find_element(By.NAME, "to-alpha").is_displayed(), "what the address sets is not folded"


def test_accessible_names(page) -> None:
    page.find_element(By.CSS_SELECTOR, "#calculator-form summary").click()
    fields = page.find_elements(By.CSS_SELECTOR, "#calculator-form :is(input, select)")
    labels = [field.accessible_name for field in fields]
    assert len(set(labels)) == len(labels) == 13
    assert all(labels)
    assert "Steps of the new run" in labels
    (drawing,) = page.find_elements(By.CSS_SELECTOR, "#calculator-result svg")
    assert drawing.aria_role == "image"
    rate = advised_rate(128, alpha=256.0)
    assert (
        f"At rank 128: {advised_rate(128)} with alpha = 32, {advised_rate(128, rule='rslora', alpha=32.0)}"
        in drawing.accessible_name
    )
    assert f"{rate} with alpha = 2r" in drawing.accessible_name
    live = page.find_element(By.ID, "calculator-status")
    assert (live.get_attribute("aria-live"), live.aria_role) == ("polite", "status")
    table = page.find_element(By.CSS_SELECTOR, "#calculator-result table")
    assert table.accessible_name.startswith("Other choices")
    cells = [cell.text for cell in table.find_elements(By.CSS_SELECTOR, "tbody tr:nth-child(4) > *")]
    assert cells[0] == "alpha = 2r"
    assert cells[1].startswith(f"{rate} (")


def test_no_page_scrolls_sideways_on_a_phone(page, site) -> None:
    """Every page fits a common phone; pages with forms, figures, formulas and tables also fit the narrowest."""
    docs = Path(load_config(str(ROOT / "mkdocs.yml"))["docs_dir"])
    sources = [path.relative_to(docs) for path in sorted(docs.rglob("*.md"))]
    places = [(390, source.with_suffix("").as_posix().removesuffix("index")) for source in sources]
    results = "calculator/?steps=500&to-steps=900&to-alpha=32&to-rule=rslora"
    places += [(320, place) for place in ("", "gallery/", "reference/theory/", results)]
    too_wide = {}
    for width, place in places:
        set_screen(page, width, 700)
        go(page, f"{site}/{place}")
        page_width = page.execute_script("return document.documentElement.scrollWidth")
        beyond = page.execute_script(BEYOND)
        if page_width != width or beyond:
            too_wide[width, place] = (page_width, beyond)
    assert too_wide == {}


@pytest.mark.parametrize("place", ["reference/theory/", "explanation/law/"])
def test_mathematics_is_typeset(page, site, place) -> None:
    """Every formula is drawn, aligned equations in rows, and none shows its source or an error."""
    go(page, f"{site}/{place}")
    count = "return document.querySelectorAll('.arithmatex').length"
    drawn = "return document.querySelectorAll('.arithmatex mjx-container').length"
    WebDriverWait(page, 20).until(lambda _: page.execute_script(drawn) == page.execute_script(count) > 0)
    assert page.find_elements(By.CSS_SELECTOR, "mjx-merror, [data-mjx-error]") == []
    shown = page.find_element(By.TAG_NAME, "article").text
    for source in ("\\(", "\\[", "\\begin", "&=", ":math:", ".. math::"):
        assert source not in shown, source
    heights = page.execute_script(
        "return [...document.querySelectorAll('div.arithmatex')].map((node) => node.getBoundingClientRect().height)"
    )
    rows = "return [...document.querySelectorAll('div.arithmatex')].map((n) => n.querySelectorAll('mjx-mtr').length)"
    assert min(heights) > 20
    if place.startswith("reference"):
        aligned = max(page.execute_script(rows))
        assert aligned == 3, "the moments under SGD have three equations below each other"
        assert max(heights) > 3 * 20


def test_fields_answer_and_chart_are_one_screen(page, site) -> None:
    """On a common phone and on a laptop, with the advanced fields folded."""
    for width, height in ((390, 844), (1280, 720)):
        set_screen(page, width, height)
        go(page, f"{site}/calculator/")
        assert shown_answer(page)
        shown = [
            field for field in page.find_elements(By.CSS_SELECTOR, "#calculator-form input") if field.is_displayed()
        ]
        assert len(shown) == 4
        bottom = "return document.querySelector('#calculator-result svg').getBoundingClientRect().bottom"
        assert page.execute_script(bottom) <= height


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, site, scheme) -> None:
    """WCAG requires ratios of 4.5 for text and 3 for lines that carry information."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    go(page, f"{site}/assets/site.css")  # without the theme, which keeps the scheme that it showed
    page.execute_script("localStorage.clear()")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    go(page, f"{site}/calculator/?steps=500")
    shown_scheme = page.execute_script("return document.body.dataset.mdColorScheme")
    assert shown_scheme == {"light": "default", "dark": "slate"}[scheme]

    def lowest(selector: str, value: str = "color") -> float:
        return min(page.execute_script(CONTRAST, selector, value))

    enabled = "#calculator-form :is(label, input, select)"
    table = ".calculator-table :is(th, td, caption)"
    texts = (enabled, table, "#calculator-status", "#calculator-result pre code", "#calculator-result figcaption")
    ratios = {selector: lowest(selector) for selector in texts}
    ratios["figures"] = lowest("#calculator-result svg text", "fill")
    lines = {number: lowest(f".line-{number}", "stroke") for number in range(4)}
    lines["input"] = lowest("#calculator-form input", "borderTopColor")
    type_text(page, "alpha", "0")
    ratios["error"] = lowest("#calculator-status")
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}
    assert {name: ratio for name, ratio in lines.items() if ratio < 3} == {}


def test_bad_input_is_one_line(page, site) -> None:
    """The line appears for a field until it is corrected, and for an address."""
    before = shown_answer(page)
    for name, text, line in (
        ("to-rank", "", "New rank must be an integer of at least 1, got nothing."),
        ("lr", "2e", "Learning rate must be a number above 0, got 2e."),
        ("alpha", "0,5", "Alpha must be a number above 0, got 0,5."),
    ):
        field = page.find_element(By.NAME, name)
        old = field.get_attribute("value")
        type_text(page, name, text)
        assert shown_answer(page) == line
        assert field.get_attribute("aria-invalid") == "true"
        assert page.find_element(By.ID, "calculator-result").text == ""
        type_text(page, name, old)
        assert shown_answer(page) == before
        assert field.get_attribute("aria-invalid") is None
    go(page, f"{site}/calculator/?rule=muon&nothing=1")
    assert shown_answer(page) == "Rule must be one of lora, rslora, got muon."
    go(page, f"{site}/calculator/?lr=<b>")
    assert shown_answer(page) == "Learning rate must be a number above 0, got <b>."


def test_the_gallery_shows_a_questions_figures(page, site) -> None:
    go(page, f"{site}/gallery/")
    published = ROOT / "results/published"
    assert len(page.find_elements(By.CSS_SELECTOR, ".gallery img")) == len(list(published.rglob("*.png")))
    choose(page.find_element(By.ID, "gallery-filter"), "Real layers")
    WebDriverWait(page, 5).until(lambda _: page.current_url.endswith("?question=layers"))

    def shown_galleries() -> list[Any]:
        return [part for part in page.find_elements(By.CSS_SELECTOR, ".gallery") if part.is_displayed()]

    assert [part.get_attribute("data-question") for part in shown_galleries()] == ["layers"]
    go_again(page)
    (gallery,) = shown_galleries()
    assert gallery.get_attribute("data-question") == "layers"
    assert all(image.get_attribute("alt") for image in page.find_elements(By.CSS_SELECTOR, ".gallery img"))
    gallery.find_element(By.TAG_NAME, "img").click()
    WebDriverWait(page, 10).until(lambda _: page.current_url.endswith("published/real_layers/layers_vs_rank.png"))
    go(page, f"{site}/published/real_layers/manifest.json")
    manifest = json.loads((published / "real_layers/manifest.json").read_text())
    assert json.loads(page.find_element(By.TAG_NAME, "pre").text) == manifest
