"""The page of a real server, in a browser."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from axe_playwright_python.sync_playwright import Axe
from onnx import numpy_helper
from PIL import Image
from playwright.sync_api import Browser, Page, Response, expect, sync_playwright

from export import manifest
from serving.config import Limits
from serving.http import server
from serving.rollouts.record import RolloutSettings
from serving.rollouts.shadows import ShadowSettings
from tests.acceptance.versions import publish
from tests.conftest import edit_manifest
from tests.serving.http.site import HttpSite, ask, connect, open_http, serve
from tests.versions import COLORS, SIDE, write_version

CHROMIUM = shutil.which("chromium")
LABELS = (*COLORS, "cyan", "magenta", "yellow")
SCRIPT = "<script>alert(1)</script>"
GONE = "The server does not answer; trying again."
NUMBER = re.compile(r"\d")
TOKEN = "right"
SEND = """([type, content]) => {
  const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "red.png", { type: "image/png" }));
  const values = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
  document.body.dispatchEvent(type === "drop" ? new DragEvent(type, values) : new ClipboardEvent(type, values));
}"""

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs chromium")


def encode(*pixel: int) -> bytes:
    """Return an image of one color as PNG."""
    file = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE, 3), pixel, np.uint8)).save(file, "PNG")
    return file.getvalue()


RED = encode(120, 60, 30)


def classify(site: HttpSite, version: str, content: bytes = RED) -> list[dict[str, Any]]:
    """Return the classes that a server names, the most probable first."""
    model, _, number = version.partition("/")
    reply = ask(site.address, f"/classify/{model}?version={number}&top_k=100", content)
    classes: list[dict[str, Any]] = reply.json["classifications"][0]["classes"]
    return classes


def soften(factor: float, model: onnx.ModelProto) -> None:
    """Have a graph of colors be less sure, so that no probability is 0 or 1."""
    weights = model.graph.initializer[0]
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(factor), weights.name))


def plant_figures(content: dict[str, Any]) -> None:
    """Put into a manifest that the ONNX variant differs a little from the original, and is faster."""
    variant = content["certificate"]["variants"][0]
    variant["rows"][-1]["max_difference"] = 2.03e-6
    variant["speedup"] = {"1": 1.84, "32": 1.4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with colors/1, the less sure colors/2, colors/3, which was damaged, and letters/1."""
    root = tmp_path_factory.mktemp("page")
    source, folder = write_version(root / "source" / "colors" / "1", LABELS, len(LABELS)), root / "models"
    for version, factor in enumerate((0.02, 0.01, 0.01), 1):
        publish(source, folder / "colors" / str(version), partial(soften, factor))
    publish(source, folder / "letters" / "1", partial(soften, 0.02), (SCRIPT, *LABELS[1:]))
    edit_manifest(folder / "colors" / "1", plant_figures)
    (folder / "colors" / "3" / "model.onnx").write_bytes(b"damaged")
    (folder / "colors" / "stable").symlink_to("1")
    return folder


@pytest.fixture(scope="module")
def site(models: Path) -> Iterator[HttpSite]:
    """A server of all versions, with a rollout and a shadow; it takes a sample of its traffic five times a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "INTERVAL_SECONDS", 0.2)
        patch.setattr(server, "SWEEP_SECONDS", 0.05)
        with serve(models, "all") as running:
            running.rollouts.roll_out("colors", 2, RolloutSettings(steps=(50.0, 100.0)))
            running.shadows.set("colors", ShadowSettings("2", 50.0))
            status = running.rollouts.find("colors"), running.shadows.find("colors")
            shadows = [found.shadow for found in status if found and found.shadow]
            while not all(shadow.agreement.counts().all_images for shadow in shadows):
                ask(running.address, "/classify/colors", RED)
            running.rollouts.look()
            yield running


@pytest.fixture
def own_site(models: Path) -> Iterator[HttpSite]:
    """A server for a test that changes it; it answers one call at a time."""
    with serve(models, "all", limits=Limits(max_calls=1)) as running:
        yield running


@pytest.fixture
def url(site: HttpSite) -> str:
    """Where the page is."""
    return site.http.url


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


def open_page(page: Page, url: str) -> Page:
    """Open the page in a tab, and wait until it knows the models."""
    page.goto(url)
    expect(page.locator("#examples img[src]")).to_have_count(6)
    return page


@pytest.fixture
def opened(page: Page, url: str) -> Page:
    """A tab with the page, which knows the models."""
    return open_page(page, url)


@pytest.fixture
def red(tmp_path: Path) -> Path:
    """A file with a red image."""
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    return path


def verdict(page: Page, text: str) -> None:
    """Wait until the sentence about the answer begins with a text."""
    expect(page.locator("#verdict")).to_have_text(re.compile("^" + re.escape(text)))


def test_a_chosen_file_is_classified(opened: Page, site: HttpSite, red: Path) -> None:
    """The five most probable classes have bars; version, variant, times and batch are named."""
    opened.get_by_label("Choose an image").set_input_files(red)
    verdict(opened, "colors/1 answers red, with ")
    expected = classify(site, "colors/1")[:5]
    rows = opened.locator(".bars tr")
    expect(rows.locator("th")).to_have_text([item["label"] for item in expected])
    expect(rows.locator("td:last-child")).to_have_text([f"{100 * item['probability']:.1f}\u00a0%" for item in expected])
    widths = [bar.bounding_box()["width"] for bar in rows.locator(".bar").all()]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] / widths[1] == pytest.approx(expected[0]["probability"] / expected[1]["probability"], rel=0.05)
    expect(opened.locator(".answer h3")).to_have_text("colors/1 fp32 on CPU")
    times = [re.compile(rf"^{words} \d+\.\d\d\u00a0ms$") for words in ("reading it", "waiting", "computing")]
    expect(opened.locator(".legend li")).to_have_text([*times, "in a batch of 1 image"])
    expect(opened.get_by_alt_text("The image: red.png")).to_be_visible()


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_dropped_or_pasted_image_is_classified(opened: Page, way: str) -> None:
    """It may be dropped anywhere on the page."""
    opened.evaluate(SEND, [way, base64.b64encode(RED).decode()])
    verdict(opened, "colors/1 answers red, with ")


def test_an_example_is_classified_by_keyboard(opened: Page, site: HttpSite) -> None:
    """What it is, and what the original answers, is beside the answer."""
    second = ask(site.address, "/models/colors/versions/1/examples").json["examples"][1]
    index, label, probability = second["index"], second["label"], second["probability"]
    opened.get_by_label("Choose an image").focus()
    opened.keyboard.press("Tab")
    opened.keyboard.press("Tab")
    opened.keyboard.press("Enter")
    verdict(opened, f"colors/1 answers {label}, with ")
    original = f"the Keras model that colors/1 was made of answers {label}, with {100 * probability:.1f}\u00a0%."
    expect(opened.locator("#answers")).to_contain_text(f"Example {index} is {label}; {original}")
    expect(opened.get_by_alt_text(f"Example {index}, {label}")).to_be_visible()


def test_two_versions_are_compared(opened: Page, site: HttpSite, red: Path) -> None:
    """The largest difference of all classes is named; each listed class has its own."""
    opened.get_by_label("Choose an image").set_input_files(red)
    opened.get_by_label("Compare with").select_option("colors/2")
    first, second = (
        {item["label"]: 100 * item["probability"] for item in classify(site, f"colors/{version}")} for version in "12"
    )
    assert first["red"] - second["red"] > 10
    sentence = f"; the largest difference is {first['red'] - second['red']:.1f}\u00a0points, of class red."
    expect(opened.locator("#verdict")).to_contain_text(sentence)
    expect(opened.locator(".answer h3")).to_contain_text(["colors/1 fp32", "colors/2 fp32"])
    rows = opened.locator(".differences tbody tr")
    assert rows.count() in (5, 6)  # all classes that are among the five most probable of either
    cells = [f"{first['red']:.1f}\u00a0%", f"{second['red']:.1f}\u00a0%", f"\u2212{first['red'] - second['red']:.1f}"]
    expect(rows.first.locator("td")).to_have_text(cells)
    opened.get_by_label("Compare with").select_option("nothing")
    expect(opened.locator(".answer")).to_have_count(1)


def test_other_labels_are_text_and_not_compared(opened: Page, red: Path) -> None:
    """The page says so, and shows both answers; of a label that looks like a script nothing runs."""
    opened.get_by_label("Choose an image").set_input_files(red)
    opened.get_by_label("Compare with").select_option("letters/1")
    expect(opened.locator("#verdict")).to_contain_text("have other labels, so their probabilities are not compared.")
    expect(opened.locator(".answer")).to_have_count(2)
    expect(opened.locator(".differences")).to_have_count(0)
    expect(opened.locator(".bars th", has_text=SCRIPT)).to_be_visible()  # the tab would have seen a dialog
    assert opened.locator("main script").count() == 0


def test_a_refused_image_may_be_sent_again(page: Page, own_site: HttpSite, red: Path) -> None:
    """The page has the reason, the time to wait and the id of the request."""
    open_page(page, own_site.http.url)
    with connect(own_site.address) as other:
        other.sendall(b"POST /classify/colors HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n" + bytes(9))
        while ask(own_site.address, "/status").status != 429:
            pass  # soon it is read
        page.get_by_label("Choose an image").set_input_files(red)
        refusal = r"too many requests over HTTP are being read; try again in 1 s \(request [\w-]+\) Try again"
        expect(page.locator("#classify-problem")).to_have_text(re.compile(f"^{refusal}$"))
    while ask(own_site.address, "/status").status != 200:
        pass
    page.get_by_role("button", name="Try again").click()
    verdict(page, "colors/1 answers red")


def test_a_file_that_is_no_image_has_a_reason(opened: Page, tmp_path: Path) -> None:
    """It is that of the server."""
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    opened.get_by_label("Choose an image").set_input_files(path)
    expect(opened.locator("#classify-problem")).to_contain_text("image 0 is not")


@contextlib.contextmanager
def send_requests(site: HttpSite) -> Iterator[None]:
    """Send one request after another until the end of the block."""
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            classify(site, "colors/1")

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_the_charts_follow_the_traffic(opened: Page, site: HttpSite) -> None:
    """Requests move the line, the figures and the words for those who do not see it."""
    chart, times = (opened.locator(".chart", has_text=name) for name in ("Requests a second", "Time to answer in ms"))
    expect(chart.locator("b")).to_have_text("0")
    expect(times.locator("b")).to_have_text(["\u2013", "\u2013"])
    with send_requests(site):
        expect(chart.locator("b")).to_have_text(re.compile(r"[1-9]"))
        expect(times.locator("b")).to_have_text([NUMBER, NUMBER])
        title = re.compile(r"^Requests a second in the last minute: [1-9][\d.]* now, at most [1-9][\d.]*$")
        expect(chart.get_by_role("img")).to_have_accessible_name(title)
        heights = {float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", chart.locator(".line").get_attribute("d"))}
        assert min(heights) < max(heights) == 72  # from the axis up


def test_figures_are_for_people(opened: Page) -> None:
    """Probabilities differ by percentage points, times are in the largest units, and what computes has a short name."""
    figures = """async () => {
      const { points, signed, difference, duration, variant } = await import("/page/format.js");
      return [
        [0.0182, 0.0042, 0.00042, 1e-7, 0].map(points),
        [0.0182, -0.0182, -1e-7].map(signed),
        [0.0312, 2.03e-6, 0].map(difference),
        [42, 3700, 200000].map(duration),
        variant({ precision: "int8", provider: "CUDAExecutionProvider" }),
      ];
    }"""
    assert opened.evaluate(figures) == [
        ["1.8\u00a0points", "0.42\u00a0points", "0.042\u00a0points", "below\u00a00.001\u00a0points", "0\u00a0points"],
        ["+1.8", "\u22121.8", "below\u00a00.001"],
        ["0.031", "2.0e-6", "0"],
        ["42 s", "1 h 1 min", "2 d 7 h"],
        "int8 on CUDA",
    ]


def test_a_hidden_tab_asks_nothing(page: Page, url: str) -> None:
    """It goes on as soon as it is seen."""
    page.clock.install()
    page.goto(url)
    expect(page.locator(".chart b").first).to_have_text(NUMBER)
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


def test_the_models_are_described(opened: Page, models: Path) -> None:
    """Versions with their proof, certificate and worst example; why one is refused; shadow and rollout."""
    card = opened.locator("#model-list > article", has=opened.get_by_role("heading", name="colors"))
    state = r"running step 1 of 2, 50\u00a0% of requests, for \d+ s; waits for the checks that are undecided\."
    expect(card).to_contain_text(re.compile(f"Rollout of version 2 in place of 1: {state}"))
    expect(card.locator("tr", has_text="same class").first).to_contain_text("undecided")
    shadow = r"computed by version 2, too: [\d,]+ images? compared, 100\.00\u00a0% with the same class"
    expect(card).to_contain_text(re.compile(rf"Shadow, 50\u00a0% of requests {shadow}"))
    version = card.locator("details").first
    expect(version).to_contain_text("largest difference")
    expect(version).to_contain_text("not signed")
    expect(version).to_contain_text(re.compile(r"[\d,]+ answered"))
    variant = manifest.read(models / "colors" / "1").certificate.variants[0]
    cells = [
        ", ".join(str(row.batch_size) for row in variant.rows),
        "2.0e-6",
        "100.00\u00a0%",
        "100.00\u00a0%",
        "0 / 0",
        f"{100 * max(row.drop_bound for row in variant.rows):.2f} points",
        "1.84\u00d7 at 1, 1.40\u00d7 at 32",
    ]
    expect(version.locator("tbody tr", has_text="onnx").locator("td")).to_have_text(cells)
    card.get_by_text("Version 3").click()
    expect(card).to_contain_text("model.onnx is not the file that was exported")
    worst = variant.rows[-1].worst[0]
    version.get_by_role("button", name=f"Classify example {worst}").click()
    verdict(opened, "colors/1 answers ")
    expect(opened.locator("#answers")).to_contain_text(f"Example {worst} is ")


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


def test_a_token_is_asked_for(page: Page, models: Path) -> None:
    """A wrong one is refused; the right one is kept in the tab, and everything is asked again, images too."""
    with serve(models, token=TOKEN) as site:
        page.goto(site.http.url)
        field = page.get_by_label("This server asks for a token")
        field.fill("wrong")
        page.get_by_role("button", name="Use token").click()
        expect(page.locator("#token-problem")).to_have_text("The server does not accept this token.")
        field.fill(TOKEN)
        field.press("Enter")
        expect(field).to_be_hidden()
        expect(page.locator("#examples img[src]")).to_have_count(6)
        page.locator("#examples button").first.click()
        verdict(page, "colors/1 answers")
        page.reload()
        expect(page.locator("#examples img[src]")).to_have_count(6)
        expect(field).to_be_hidden()


def test_a_server_that_is_gone_is_waited_for(page: Page, own_site: HttpSite, red: Path) -> None:
    """The page says so in one line; what was asked meanwhile is answered when the server is back."""
    open_page(page, own_site.http.url)
    own_site.http.stop()
    page.get_by_label("Choose an image").set_input_files(red)
    expect(page.get_by_text(GONE)).to_be_visible()
    port = int(own_site.address.rpartition(":")[2])
    with open_http(own_site.server, own_site.pages, port=port):
        expect(page.get_by_text(GONE)).to_be_hidden()
        verdict(page, "colors/1 answers red")


def open_details(page: Page) -> None:
    """Open every detail of what is in a tab."""
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_the_page(opened: Page, scheme: Literal["light", "dark"]) -> None:
    """The checks of axe find nothing, with a comparison shown and every detail open."""
    opened.emulate_media(color_scheme=scheme)
    opened.locator("#examples button").first.click()
    opened.get_by_label("Compare with").select_option("colors/2")
    expect(opened.locator(".differences")).to_be_visible()
    open_details(opened)
    expect(opened.locator(".worst img[src]")).to_have_count(1)
    expect(opened.locator("#answers")).to_have_css("opacity", "1")
    found = Axe().run(opened)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everybody_can_use_the_page_of_the_api(page: Page, url: str, scheme: Literal["light", "dark"]) -> None:
    """It shows operations, parameters, schemas, examples and errors, and axe finds nothing."""
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{url}docs#Overloaded")
    expect(page.locator("#Overloaded")).to_be_in_viewport()
    open_details(page)
    operation = page.get_by_role("region", name="POST /classify/{name}")
    expect(operation.locator("tbody tr", has_text="top_k")).to_contain_text("queryintegerhow many classes")
    expect(operation.locator(".schema .schema .schema")).to_contain_text("label string")
    address = url.removeprefix("http://")
    expect(operation.locator("pre")).to_have_text(f"curl --data-binary @cat.jpg '{address}classify/digits?top_k=3'")
    groups = ["This server", "KServe v2", "TensorFlow Serving", "Probes", "Errors"]
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(groups)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_a_phone_shows_the_page_without_scrolling_sideways(opened: Page, url: str) -> None:
    """360 pixels are enough, with a comparison and every detail open, and for the page of the API."""
    opened.set_viewport_size({"width": 360, "height": 740})
    opened.locator("#examples button").first.click()
    opened.get_by_label("Compare with").select_option("colors/2")
    expect(opened.locator(".differences")).to_be_visible()
    open_details(opened)
    expect(opened.locator(".worst img[src]")).to_have_count(1)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
    opened.goto(f"{url}docs")
    expect(opened.locator("details").first).to_be_visible()
    open_details(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
