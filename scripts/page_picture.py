"""A picture of the chat page, talking to a running `veneer serve`, for the guide.

    veneer serve smollm2-135m-instruct --adapters runs/capitals --adapters runs/commas --port 8765
    python scripts/page_picture.py http://127.0.0.1:8765 docs/guide/results/page.png "capitals: small river stone"

Adds a column in which all loaded adapters act, sends the prompt to every column, and waits for the answers.
"""

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

url, file, prompt = sys.argv[1:]
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
    page = browser.new_page(viewport={"width": 1200, "height": 560})
    page.set_default_timeout(120_000)
    page.goto(url)
    page.wait_for_selector(".pane h2")
    while page.locator(".pane").count() < 4:
        page.click("#add")
    pane = page.locator(".pane").nth(3)
    pane.locator("select").select_option("commas")
    pane.locator(".number").first.fill("0.7")
    pane.locator(".number").nth(1).fill("0.7")
    page.click("#open-settings")
    page.fill("#max-tokens", "24")
    page.click("#open-settings")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    for n in range(4):
        expect(page.locator(".pane").nth(n).locator(".speed")).to_contain_text("token", timeout=120_000)
    page.wait_for_timeout(3000)
    page.screenshot(path=file)
    browser.close()
