"""A report in a real browser: nothing overflows, nothing is fetched, and everyone can read it."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import bnnflow as bf
from tests.problems import built

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no playwright to drive a browser with"
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (390, 768, 1400)
CONTRAST = 4.5  # of text that is not large (WCAG 2.1, level AA)
NAMED = (
    '<img src=x onerror="document.title=1"> & $x_1$'  # by a user, who may name as he likes
)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium of the system, which is closed whatever happens."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on the path")
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=found,
            args=["--no-sandbox"],
            ignore_default_args=["--hide-scrollbars"],
        )
        try:
            yield opened
        finally:
            opened.close()


# ---------------------------------------- reports


def problem(classes: bool) -> tuple[bf.BayesianModel, torch.Tensor, torch.Tensor]:
    """Return a model of thirty rows, and twenty more rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, generator=generator)
    y = x[:, 0].sin() + 0.3 * torch.randn(50, generator=generator)
    likelihood: bf.likelihoods.Likelihood = bf.likelihoods.Gaussian(0.3)
    if classes:
        y = torch.bucketize(y, torch.tensor([-0.4, 0.4]))
        likelihood = bf.likelihoods.Categorical()
    net = built(
        lambda: nn.Sequential(
            nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3 if classes else 1)
        ),
        torch.float32,
    )
    prior = bf.priors.Normal(1.0)
    return bf.BayesianModel(net, prior, likelihood, x[:30], y[:30]), x[30:], y[30:]


def chains(model: bf.BayesianModel) -> bf.Draws:
    return bf.sample(model, bf.HMC(), chains=4, warmup=30, draws=30, seed=0, progress=False)


def near(draws: bf.Draws, count: int) -> dict[str, torch.Tensor]:
    """Return so many methods, each a little farther from the draws than the last."""
    noise = torch.randn(draws.flat.shape, generator=torch.Generator().manual_seed(1))
    return {f"{NAMED} {i}": draws.flat + 0.1 * i * noise for i in range(count)}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Reports of four kinds."""
    folder = tmp_path_factory.mktemp("reports")
    numbers, x, y = problem(classes=False)
    labels, x_labels, y_labels = problem(classes=True)
    draws, draws_of_labels = chains(numbers), chains(labels)
    several = {"HMC": draws, **near(draws, 1)}
    several_of_labels = {"HMC": draws_of_labels, **near(draws_of_labels, 1)}
    bf.report(numbers, several, x, y, folder / "regression.html", title=NAMED)
    bf.report(labels, several_of_labels, x_labels, y_labels, folder / "classes.html")
    bf.report(numbers, draws, x, y, folder / "one.html")
    eleven = {"HMC": draws_of_labels, **near(draws_of_labels, 10)}
    bf.report(labels, eleven, x_labels, y_labels, folder / "eleven.html")
    return {path.stem: path for path in folder.glob("*.html")}


KINDS = ("regression", "classes", "one", "eleven")


@contextmanager
def shown(browser, path: Path, width: int = 1400, **options) -> Iterator:
    """Open a page on which no message is written and which asks for nothing but itself."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **options)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(path.as_uri())
        yield page
    finally:
        page.close()
    assert said == []
    assert asked == [path.as_uri()]


def unfold(page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


# ---------------------------------------- what every page must be


@pytest.mark.crossed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_is_as_wide_as_the_window(browser, reports, kind, width) -> None:
    with shown(browser, reports[kind], width) as page:
        for _ in range(2):  # folded and unfolded
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width
            unfold(page)
        tables = page.eval_on_selector_all(
            ".scroll",
            "all => all.map(e => [e.scrollWidth > e.clientWidth, e.offsetHeight > e.clientHeight])",
        )
        assert all(cut == bar for cut, bar in tables), "what is cut off has a bar to see"
        cut_off = any(cut for cut, _ in tables)
        assert cut_off == (width < 768) or width == 768


@pytest.mark.crossed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser, reports, kind, scheme) -> None:
    with shown(browser, reports[kind], color_scheme=scheme) as page:
        unfold(page)
        assert faint(page) == []


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_on_paper(browser, reports, kind) -> None:
    with shown(browser, reports[kind], color_scheme="dark") as page:
        paper = page.pdf(format="A4")
        assert paper.startswith(b"%PDF")
        assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
        page.emulate_media(media="print")
        assert faint(page) == []
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_can_be_heard(browser, reports, kind) -> None:
    """Pictures have names, headings leave no level out, tables say what their cells are of."""
    with shown(browser, reports[kind]) as page:
        pictures = page.eval_on_selector_all(
            "svg, img", "all => all.map(e => e.getAttribute('aria-label') || e.alt || '')"
        )
        assert pictures
        assert all(len(name) > 10 for name in pictures)
        levels = page.eval_on_selector_all(
            "h1, h2, h3, h4, h5, h6", "all => all.map(each => Number(each.tagName[1]))"
        )
        assert levels[0] == 1
        assert levels.count(1) == 1
        steps = [b - a for a, b in itertools.pairwise(levels)]
        assert max(steps) == 1
        assert page.eval_on_selector_all("th:not([scope])", "all => all.length") == 0
        assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("kind", ["regression", "eleven"])
def test_what_a_user_named_is_text(browser, reports, kind) -> None:
    with shown(browser, reports[kind]) as page:
        assert page.locator("img").count() == 0
        assert NAMED in page.inner_text("main")
        assert page.title() != "1"


# ---------------------------------------- what one can do


@pytest.mark.parametrize("kind", ["classes", "eleven"])
def test_tables_are_sorted_by_mouse_and_keyboard(browser, reports, kind) -> None:
    with shown(browser, reports[kind]) as page:
        table = page.locator("table.sortable").first
        names = table.locator("thead th").all_inner_texts()
        column = names.index("LPPD")
        button = table.locator("thead th").nth(column).get_by_role("button")
        button.click()
        rising = scores(table, column)
        assert rising == sorted(rising)
        assert table.locator("[aria-sort=ascending]").inner_text() == "LPPD"
        button.press("Enter")
        assert scores(table, column) == rising[::-1]
        page.keyboard.press("Space")
        assert scores(table, column) == rising
        table.locator("thead th").first.get_by_role("button").click()
        assert table.locator("[aria-sort]").count() == 1
        methods = table.locator("tbody th").all_inner_texts()
        assert methods == sorted(methods, key=str.casefold)


def scores(table, column: int) -> list[float]:
    cells = table.locator("tbody tr").locator(f"td:nth-of-type({column})")
    return [float(each.get_attribute("data-value")) for each in cells.all()]


def test_the_keyboard_reaches_and_unfolds_everything(browser, reports) -> None:
    with shown(browser, reports["eleven"]) as page:
        wanted = page.eval_on_selector_all("summary, th button", "all => all.length")
        reached, unfolded = set(), 0
        for _ in range(10 * wanted):
            page.keyboard.press("Tab")
            place = page.evaluate(
                "[...document.querySelectorAll('summary, th button')]"
                ".indexOf(document.activeElement)"
            )
            reached.add(place)
            summary = page.evaluate("document.activeElement.tagName") == "SUMMARY"
            if summary and not page.evaluate("document.activeElement.parentElement.open"):
                page.keyboard.press("Enter")
                unfolded += page.evaluate("document.activeElement.parentElement.open")
            if place == -1 and len(reached) > wanted:
                break
        assert reached >= set(range(wanted))
        assert unfolded > 10


def test_a_page_reads_without_scripts(browser, reports) -> None:
    with shown(browser, reports["eleven"], java_script_enabled=False) as page:
        assert page.locator("table.sortable tbody tr").count() >= 11
        assert page.locator("summary").count() > 10


# ---------------------------------------- contrast

# The colour of every piece of text, and all that is painted below its middle, from the top to the
# bottom: the backgrounds of boxes and the fills of shapes, each with its opacity.
PAINTED = """() => {
  const see = (element) => {
    let opacity = 1;
    for (let each = element; each; each = each.parentElement)
      opacity *= Number(getComputedStyle(each).opacity);
    const style = getComputedStyle(element);
    const shape = element instanceof SVGElement;
    if (["svg", "g", "text"].includes(element.tagName)) return [0, 0, 0, 0];
    if (shape) opacity *= Number(style.fillOpacity);
    const paint = shape ? style.fill : style.backgroundColor;
    const [r, g, b, a = 1] = (paint.match(/[0-9.]+/g) ?? [0, 0, 0, 0]).map(Number);
    return [r, g, b, a * opacity];
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode, element = text.parentElement;
    if (!text.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const range = document.createRange();
    range.selectNodeContents(text);
    const box = range.getClientRects()[0];
    if (!box || box.width === 0) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const below = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    const from = below.indexOf(element);
    if (from < 0) continue;  // scrolled out of its box, or under another
    found.push([text.data.trim(), colour.match(/[0-9.]+/g).map(Number),
      below.slice(element instanceof SVGElement ? from + 1 : from).map(see)]);
  }
  return found;
}"""


def faint(page) -> list[tuple[str, float]]:
    """Return text whose contrast is too little. The window is made as high as the page."""
    size = page.viewport_size
    high = page.evaluate("document.documentElement.scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": high + 10})
    seen = page.evaluate(PAINTED)
    page.set_viewport_size(size)
    assert len(seen) > 100
    looked = [(text, contrast(colour, below)) for text, colour, below in seen]
    return [(text, round(value, 2)) for text, value in looked if value < CONTRAST]


def contrast(colour: list[float], below: list[list[float]]) -> float:
    """Return the contrast of a colour with what is painted below it (WCAG 2.1)."""
    ground = [255.0, 255.0, 255.0]
    for *paint, opacity in reversed(below):
        ground = [
            opacity * over + (1 - opacity) * under
            for over, under in zip(paint, ground, strict=True)
        ]
    low, high = sorted((luminance(colour[:3]), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: list[float]) -> float:
    parts = [value / 255 for value in colour]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
