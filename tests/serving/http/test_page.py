"""The page of the server, in a browser."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from tests.serving.http.fake_server import FakeServer, classify, encode, load_examples, run

CHROMIUM = shutil.which("chromium")
FOUR = 20  # an example of this class
SEND = """([type, content]) => {
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "four.png", { type: "image/png" }));
  const values = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
  document.body.dispatchEvent(type === "drop" ? new DragEvent(type, values) : new ClipboardEvent(type, values));
}"""

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server on a free port."""
    with run(FakeServer()) as server:
        yield server


@pytest.fixture
def url(server: FakeServer) -> str:
    """Where the page is."""
    return server.url


# No wider: while it is open, `asyncio.run` fails in the tests of other modules.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The browser of this system."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty tab; what is open in it afterwards must have raised no error and kept to the content policy."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("dialog", lambda dialog: problems.append(f"a dialog: {dialog.message}"))
    yield page
    page.close()
    # The browser itself says so of every answer from 400 on, and of a server that is gone.
    assert [problem for problem in problems if not problem.startswith("Failed to load resource")] == []


@pytest.fixture
def opened(page: Page, url: str) -> Page:
    """A tab with the page, which knows the models."""
    page.goto(url)
    expect(page.locator("#examples img[src]").first).to_be_visible()
    return page


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A file with a handwritten 4."""
    assert load_examples()[1][FOUR] == 4
    path = tmp_path / "four.png"
    path.write_bytes(encode(FOUR))
    return path


def verdict(page: Page, text: str) -> None:
    """Wait until the sentence about the answer begins with a text."""
    expect(page.locator("#verdict")).to_have_text(re.compile("^" + re.escape(text)))


def test_a_chosen_file_is_classified(opened: Page, four: Path) -> None:
    """The five most probable classes have bars; version, variant, times and batch are named."""
    opened.get_by_label("Choose an image").set_input_files(four)
    verdict(opened, "digits/1 answers 4, with ")
    expected = classify(four.read_bytes(), "digits", "1")[:5]
    rows = opened.locator(".bars tr")
    expect(rows.locator("th")).to_have_text([item["label"] for item in expected])
    expect(rows.locator("td:last-child")).to_have_text([f"{100 * item['probability']:.1f}\u00a0%" for item in expected])
    widths = [bar.bounding_box()["width"] for bar in rows.locator(".bar").all()]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 5 * widths[1]
    expect(opened.locator(".answer h3")).to_have_text("digits/1 fp32 on CPUExecutionProvider")
    legend = ["decode 0.12\u00a0ms", "queue 0.05\u00a0ms", "compute 0.91\u00a0ms", "in a batch of 1 image"]
    expect(opened.locator(".legend li")).to_have_text(legend)
    expect(opened.get_by_alt_text("The image: four.png")).to_be_visible()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_dropped_or_pasted_image_is_classified(opened: Page, four: Path, way: str) -> None:
    """It may be dropped anywhere on the page."""
    opened.evaluate(SEND, [way, base64.b64encode(four.read_bytes()).decode()])
    verdict(opened, "digits/1 answers 4, with ")


def test_an_example_is_classified_by_keyboard(opened: Page) -> None:
    """What it is, and what the original answers, is beside the answer."""
    opened.get_by_label("Choose an image").focus()
    opened.keyboard.press("Tab")
    opened.keyboard.press("Tab")
    opened.keyboard.press("Enter")
    label = load_examples()[1][1]
    verdict(opened, f"digits/1 answers {label}, with ")
    known = f"Example 1 is {label}; the original of digits/1 answers {label}, with 98.7\u00a0%."
    expect(opened.locator("#answers")).to_contain_text(known)
    expect(opened.get_by_alt_text(f"Example 1, {label}")).to_be_visible()


def test_two_versions_are_compared(opened: Page, four: Path) -> None:
    """The largest difference of all classes is named; each listed class has its own."""
    opened.get_by_label("Choose an image").set_input_files(four)
    opened.get_by_label("Compare with").select_option("digits/2")
    first, second = (classify(four.read_bytes(), "digits", version) for version in "12")
    others = {item["label"]: item["probability"] for item in second}
    differences = {item["label"]: others[item["label"]] - item["probability"] for item in first}
    largest = max(differences, key=lambda label: abs(differences[label]))
    sentence = f"; the largest difference is {abs(differences[largest]):.2g}, of class {largest}."
    expect(opened.locator("#verdict")).to_contain_text(sentence)
    expect(opened.locator(".answer h3")).to_contain_text(["digits/1 fp32", "digits/2 int8"])
    rows = opened.locator(".differences tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.first).to_contain_text(f"\u2212{abs(differences[largest]):.2g}")
    opened.get_by_label("Compare with").select_option("nothing")
    expect(opened.locator(".answer")).to_have_count(1)


def test_versions_with_other_labels_are_not_compared(opened: Page, four: Path) -> None:
    """The page says so, and shows both answers."""
    opened.get_by_label("Choose an image").set_input_files(four)
    opened.get_by_label("Compare with").select_option("letters/1")
    expect(opened.locator("#verdict")).to_contain_text("have other labels, so their probabilities are not compared.")
    expect(opened.locator(".answer")).to_have_count(2)
    expect(opened.locator(".differences")).to_have_count(0)


def test_a_label_that_looks_like_a_script_is_text(opened: Page, four: Path) -> None:
    """Nothing of it runs; the tab would have seen a dialog."""
    opened.get_by_label("Model", exact=True).select_option("letters")
    opened.get_by_label("Choose an image").set_input_files(four)
    expect(opened.locator(".bars th", has_text="<script>alert(1)</script>")).to_be_visible()
    assert opened.locator("main script").count() == 0


def test_a_refused_image_may_be_sent_again(opened: Page, server: FakeServer, four: Path) -> None:
    """The page has the reason, the time to wait and the id of the request."""
    server.refusals = 1
    opened.get_by_label("Choose an image").set_input_files(four)
    expect(opened.get_by_role("alert").filter(has_text="as many requests")).to_have_text(
        "the server has as many requests as it can answer in time; try again in 3 s (request 4f1c) Try again"
    )
    opened.get_by_role("button", name="Try again").click()
    verdict(opened, "digits/1 answers 4")


def test_a_file_that_is_no_image_has_a_reason(opened: Page, tmp_path: Path) -> None:
    """It is that of the server."""
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    opened.get_by_label("Choose an image").set_input_files(path)
    expect(opened.locator("#classify-problem")).to_contain_text("image 0 is not an image of a known format")


def test_the_charts_follow_the_history(opened: Page, server: FakeServer) -> None:
    """A new sample moves the line, the figure and the words for those who do not see it."""
    chart = opened.locator(".chart", has_text="Requests a second")
    expect(chart.locator("b")).to_have_text("4")
    before = chart.locator(".line").get_attribute("d")
    server.add_sample(25.5)
    expect(chart.locator("b")).to_have_text("25.5")
    assert chart.locator(".line").get_attribute("d") != before
    expect(chart.get_by_role("img")).to_have_accessible_name(
        "Requests a second in the last ten minutes: 25.5 now, at most 25.5"
    )
    expect(opened.locator(".chart", has_text="Latency").locator("b")).to_have_text(["1.51", "3.27"])


def test_a_hidden_tab_asks_nothing(page: Page, url: str) -> None:
    """It goes on as soon as it is seen."""
    page.clock.install()
    page.goto(url)
    expect(page.locator(".chart b").first).to_have_text("4")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hide = """(hidden) => {
      Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    page.clock.run_for(60_000)
    assert not [url for url in asked if "history" in url or "status" in url]
    with page.expect_response("**/history?since=*"):
        page.evaluate(hide, False)


def test_the_models_are_described(opened: Page) -> None:
    """Versions with their proof, certificate and worst example; why one is refused; shadow and rollout."""
    card = opened.locator("#model-list > article", has=opened.get_by_role("heading", name="digits"))
    expect(card).to_contain_text(
        "Rollout of version 2 in place of 1: running step 2 of 4, 10\u00a0% of requests, for 42 s"
    )
    expect(card).to_contain_text(
        "Shadow: compared with version 2: 1,234 images of 50\u00a0% of requests, 99.68\u00a0% have"
    )
    version = card.locator("details").first
    expect(version).to_contain_text("proved in 1.2 s on AMD EPYC")
    expect(version).to_contain_text("not signed")
    row = version.locator("tbody tr", has_text="onnx-int8")
    cells = [
        "1, 3, 32",
        "0.031",
        "100.00\u00a0%",
        "96.11\u00a0%",
        "0 / 0",
        "0.75 points",
        "1.84\u00d7 at 1, 1.40\u00d7 at 32",
    ]
    expect(row.locator("td")).to_have_text(cells)
    card.get_by_text("Version 3").click()
    expect(card).to_contain_text("model.onnx is not the file that was exported")
    version.get_by_role("button", name="Classify example 20").click()
    verdict(opened, "digits/1 answers 4")
    expect(opened.locator("#answers")).to_contain_text("the original of digits/1 answers 9")


def test_a_refresh_leaves_focus_and_details_alone(page: Page, url: str) -> None:
    """What is open stays open, and the keyboard stays where it is."""
    page.clock.install()
    page.goto(url)
    summary = page.locator("summary", has_text="Version 2")
    summary.focus()
    page.keyboard.press("Enter")
    expect(page.locator("details[open]", has_text="Version 2").get_by_role("region")).to_be_visible()
    with page.expect_response(is_status):
        page.clock.run_for(6000)
    with page.expect_response(is_status):
        page.clock.run_for(6000)
    expect(summary).to_be_focused()
    expect(page.locator("details[open]", has_text="Version 2")).to_have_count(1)


def is_status(response: Response) -> bool:
    """Return whether a response is that of /status."""
    return response.url.endswith("/status")


def test_a_token_is_asked_for(page: Page, server: FakeServer, url: str) -> None:
    """A wrong one is refused; the right one is kept in the tab, and everything is asked again, images too."""
    server.token = "right"
    page.goto(url)
    field = page.get_by_label("This server asks for a token")
    field.fill("wrong")
    page.get_by_role("button", name="Use token").click()
    expect(page.locator("#token-problem")).to_have_text("The server does not accept this token.")
    field.fill("right")
    field.press("Enter")
    expect(field).to_be_hidden()
    expect(page.locator("#examples img[src]")).to_have_count(16)
    expect(page.locator(".chart b").first).to_have_text("4")
    page.locator("#examples button").first.click()
    verdict(page, "digits/1 answers")
    page.reload()
    expect(page.locator("#examples img[src]")).to_have_count(16)
    expect(field).to_be_hidden()


def test_a_server_that_is_gone_is_waited_for(opened: Page, four: Path) -> None:
    """The page says so in one line; what was asked meanwhile is answered when the server is back."""
    opened.context.set_offline(True)
    opened.get_by_label("Choose an image").set_input_files(four)
    expect(opened.get_by_text("The server does not answer; trying again.")).to_be_visible()
    opened.context.set_offline(False)
    expect(opened.get_by_text("The server does not answer; trying again.")).to_be_hidden()
    verdict(opened, "digits/1 answers 4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_the_page(opened: Page, scheme: Literal["light", "dark"]) -> None:
    """The checks of axe find nothing, with a comparison shown and every detail open."""
    opened.emulate_media(color_scheme=scheme)
    opened.locator("#examples button").first.click()
    opened.get_by_label("Compare with").select_option("digits/2")
    expect(opened.locator(".differences")).to_be_visible()
    for summary in opened.locator("details:not([open]) > summary").all()[::-1]:
        summary.click()
    expect(opened.locator(".worst img[src]")).to_have_count(3)
    expect(opened.locator("#answers")).to_have_css("opacity", "1")
    found = Axe().run(opened)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_the_page_of_the_api(page: Page, url: str, scheme: Literal["light", "dark"]) -> None:
    """It shows operations, parameters, schemas, examples and errors, and axe finds nothing."""
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{url}/docs#Overloaded")
    expect(page.locator("#Overloaded")).to_be_in_viewport()
    for summary in page.locator("summary").all():
        summary.click()
    operation = page.get_by_role("region", name="POST /classify/{model}")
    expect(operation.locator("tbody tr")).to_have_text("top_kqueryintegerClasses.")
    expect(operation.locator(".schema .schema")).to_have_text("label string Name of the class.")
    expect(operation.locator("pre")).to_contain_text("curl --data-binary @cat.jpg")
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["Classify", "Server", "Errors"])
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_a_phone_shows_the_page_without_scrolling_sideways(opened: Page, url: str) -> None:
    """360 pixels are enough, with a comparison and every detail open, and for the page of the API."""
    opened.set_viewport_size({"width": 360, "height": 740})
    opened.locator("#examples button").first.click()
    opened.get_by_label("Compare with").select_option("digits/2")
    expect(opened.locator(".differences")).to_be_visible()
    for summary in opened.locator("details:not([open]) > summary").all()[::-1]:
        summary.click()
    expect(opened.locator(".worst img[src]")).to_have_count(3)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    opened.goto(f"{url}/docs")
    for summary in opened.locator("summary").all():
        summary.click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
