"""A click through the page in headless Chromium."""

import re
import shutil
import time
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright

pytest_plugins = ["over_http"]
pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """`with visit(url, …) as page`: options of a browser context. Nothing may be said on the console."""

    @contextmanager
    def make(url, **options):
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 800}} | options)
        page, said = context.new_page(), []
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(url) else said.append(request.url))
        page.goto(url)
        yield page
        context.close()
        assert [line for line in said if not any(code in line for code in ("401", "403", "404"))] == []

    return make


def column(page, number):
    return page.locator(".pane").nth(number)


def ask_for_much(served, page):
    """Returns in the middle of a long answer."""
    served.engine.words = 60
    page.fill("#prompt", "go on")
    page.click("#send")
    expect(column(page, 0).locator(".assistant")).to_contain_text("more")


def test_talk_with_base_and_adapters_side_by_side(serve, visit):
    with serve(delay=0.01) as served, visit(served.url) as page:
        expect(page.locator("#status")).to_have_text("tiny · 2 adapters loaded")
        expect(page.locator(".pane h2")).to_have_text(["tiny (base)", "first"])
        page.click("#add")
        expect(page.locator(".pane h2")).to_have_text(["tiny (base)", "first", "second"])
        column(page, 2).locator("select").select_option("first")
        column(page, 2).locator(".number").first.fill("0.7")
        expect(column(page, 2).locator("h2")).to_have_text("second × 0.7 + first")
        page.fill("#prompt", "hello <b>there</b>")
        page.press("#prompt", "Enter")
        answers = [column(page, n).locator(".assistant") for n in range(3)]
        for answer, who in zip(answers, ["base", "first*1", "second*0.7+first*1"]):
            expect(answer).to_have_text(re.compile(rf"^{re.escape(who)} heard \d+ tokens: None$"))
            expect(answer).to_be_visible()
        expect(column(page, 0).locator(".user")).to_have_text("hello <b>there</b>")
        expect(column(page, 1).locator(".speed")).to_have_text(
            re.compile(r"^[\d.]+ tokens/s · \d+ tokens · first after")
        )
        page.fill("#prompt", "and then?")
        page.click("#send")
        expect(page.locator(".assistant")).to_have_count(6)
        expect(page.locator("#send")).to_be_enabled()
        prompts = [len(t.request.prompt) for t in served.engine.tickets]
        assert min(prompts[3:]) > max(prompts[:3])  # the history goes along
        page.click("#clear")
        expect(page.locator(".turn")).to_have_count(0)
        column(page, 2).locator(".remove").click()
        expect(page.locator(".pane")).to_have_count(2)


def test_load_and_unload(serve, visit):
    with serve() as served:
        (served.folder / "third").mkdir()
        (served.folder / "third" / "adapter_config.json").write_text("{}")
        with visit(served.url) as page:
            page.click("#open-adapters")
            expect(page.locator("#loaded tr")).to_have_count(2)
            assert page.locator("#offered option").evaluate_all("all => all.map(one => one.value)") == [
                str(served.folder / "third")
            ]
            page.fill("#load-path", str(served.folder / "third"))
            page.locator("#load-path").dispatch_event("change")
            expect(page.locator("#load-name")).to_have_value("third")
            page.click("#load button")
            expect(page.locator("#load-said")).to_have_text("Success: LoRA adapter 'third' added successfully.")
            expect(page.locator("#loaded tr")).to_have_count(3)
            page.fill("#load-path", "/etc")
            page.fill("#load-name", "etc")
            page.click("#load button")
            expect(page.locator("#load-said")).to_have_class("wide error")
            page.locator("#loaded tr", has_text="first").get_by_role("button").click()
            expect(page.locator("#loaded tr")).to_have_count(2)
            expect(page.locator(".pane h2")).to_have_text(["tiny (base)", "tiny (base)"])  # its column lost it
            assert served.registry.names() == ["second", "third"]


def test_stop_and_failure(serve, visit):
    with serve(delay=0.05) as served, visit(served.url) as page:
        ask_for_much(served, page)
        page.click("#stop")
        expect(page.locator("#send")).to_be_visible()
        expect(column(page, 0).locator(".speed")).to_contain_text("stopped")
        page.wait_for_timeout(300)
        assert served.engine.finished["cancelled"] == 2
        served.engine.broken = True
        page.fill("#prompt", "again")
        page.click("#send")
        expect(column(page, 0).locator(".turn.error")).to_contain_text("it broke")


def test_answers_that_fit_and_adapters_that_are_there(serve, visit):
    """A small context halves the answers that are asked for; after a failure the page looks what is loaded."""
    with serve(context=100) as served, visit(served.url) as page:
        expect(page.locator("#status")).to_have_text("tiny · 2 adapters loaded")
        expect(page.locator("#max-tokens")).to_have_value("50")
        served.registry.unload("first")
        page.fill("#prompt", "hello")
        page.click("#send")
        expect(column(page, 1).locator(".turn.error")).to_contain_text("does not exist")
        expect(page.locator("#status")).to_have_text("tiny · 1 adapter loaded")
        expect(page.locator(".pane h2")).to_have_text(["tiny (base)", "tiny (base)"])


def test_a_double_click_sends_once_and_stops_nothing(serve, visit):
    with serve(delay=0.02) as served, visit(served.url) as page:
        page.fill("#prompt", "hello")
        page.dblclick("#send")
        expect(column(page, 0).locator(".assistant")).to_have_text(re.compile("base heard .*: None"))
        expect(page.locator(".user")).to_have_count(2)  # one for each column
        assert served.engine.finished == {"stop": 2}


def test_what_was_said_before_a_failure_stays(serve, visit):
    with serve(delay=0.05) as served, visit(served.url) as page:
        ask_for_much(served, page)
        served.engine.broken = True
        expect(column(page, 0).locator(".turn.error")).to_contain_text("it broke")
        expect(column(page, 0).locator(".assistant").first).to_contain_text("base heard")
        served.engine.broken, served.engine.words = False, 0
        page.fill("#prompt", "again")
        page.click("#send")
        expect(column(page, 0).locator(".assistant").last).to_have_text(re.compile("base heard .*: None"))
        first, *_, last = (ticket.request.prompt for ticket in served.engine.tickets)
        assert len(last) > 2 * len(first)  # what it had said went along


def test_a_message_that_was_stopped_before_its_answer_comes_back(serve, visit):
    with serve(delay=0.05) as served, visit(served.url) as page:
        served.engine.submit, submit = (lambda request: time.sleep(1.5) or submit(request)), served.engine.submit
        page.fill("#prompt", "a long message")
        page.click("#send")
        page.wait_for_timeout(600)
        page.click("#stop")
        expect(page.locator("#prompt")).to_have_value("a long message")
        expect(page.locator(".turn")).to_have_count(0)


def test_with_a_key(serve, visit):
    with serve(api_key="secret") as served, visit(served.url) as page:
        expect(page.locator("#status")).to_contain_text("API key is needed")
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        expect(page.locator("#status")).to_have_text("tiny · 2 adapters loaded")
        page.fill("#prompt", "hello")
        page.click("#send")
        expect(column(page, 0).locator(".assistant")).to_contain_text("base heard")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(serve, visit, scheme):
    options = {"viewport": {"width": 390, "height": 780}, "color_scheme": scheme, "is_mobile": True, "has_touch": True}
    with serve() as served, visit(served.url, **options) as page:
        for drawer in (None, "#open-adapters", "#open-settings"):
            if drawer:
                page.click(drawer)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            box = page.locator("#send").bounding_box()
            assert box["y"] + box["height"] <= 780 and box["height"] >= 32
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (light == "rgb(251, 251, 250)") == (scheme == "light")
