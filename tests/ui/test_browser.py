"""The whole path in a browser: three folders to a slider that is moved by hand. Needs Chromium; without one it is skipped."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slider_plugin.ui.try_routes import can_export

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
WAIT = 60_000  # milliseconds; a process that imports torch beside others takes its time
SHOTS = os.environ.get("SLIDER_UI_SHOTS")
"""A folder for screenshots."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")


@pytest.fixture
def page() -> Iterator[Any]:
    """A browser's page; whatever goes wrong in it fails the test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = browser.new_page(viewport={"width": 1280, "height": 900})
        found.set_default_timeout(WAIT)
        wrong: list[str] = []
        found.on("pageerror", lambda error: wrong.append(str(error)))
        found.on(
            "console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text and not SHOTS else None
        )
        yield found
        browser.close()
        assert not wrong


def shot(page: Any, name: str, full: bool = False) -> None:
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=full)


def pick(page: Any, field: str, *folders: str) -> None:
    """Choose a folder in the picker, as people do."""
    page.get_by_label(field).locator("xpath=..").get_by_role("button").click()
    picker = page.locator("#picker")
    for folder in folders:
        picker.locator("ul.files button", has_text=folder).click()
        picker.locator("nav.crumbs button", has_text=folder).wait_for()
    picker.get_by_role("button", name="Use this folder").click()


def settled(page: Any) -> None:
    """Until everything that was typed is saved and answered."""
    page.wait_for_selector("#plan:not([data-stale]) form")


def advanced(page: Any, section: str) -> Any:
    part = page.locator(f"#adv-{section}")
    if part.get_attribute("open") is None:
        part.locator("summary").click()
    return part


def test_from_three_folders_to_a_slider_that_is_moved(server: Any, place: Path, page: Any) -> None:
    page.goto(server.url)
    shot(page, "empty")
    page.get_by_label("Name").fill("size")
    page.get_by_label("Model family").select_option("sd1")
    page.get_by_role("button", name="Set it up").click()
    set_up(page)
    start_stop_resume(page, place)
    try_it(page, place)
    keep_the_page(page, place)


def set_up(page: Any) -> None:
    page.wait_for_selector("#start")
    pick(page, "Model folder", "model")
    pick(page, "Folder of bucket more", "data", "more")
    page.locator(".bucket", has=page.locator("[value=more]")).locator(".thumbs img").first.wait_for()
    pick(page, "Folder of bucket less", "data", "less")
    page.get_by_role("button", name="Add a bucket").click()
    page.get_by_label("Name of bucket 3").fill("plain")
    page.locator(".bucket").nth(2).get_by_text("neutral").click()
    pick(page, "Folder of bucket bucket-1", "data", "plain")
    switch = advanced(page, "adapter").get_by_label("Use slider LoRA targets")
    assert switch.is_checked(), "a new run begins with it"
    switch.uncheck()
    settled(page)
    switch.check()
    fields = {
        "lora_rank": "4",
        "resolution": "64",
        "max_train_steps": "4000",
        "learning_rate": "0.002",
        "train_batch_size": "4",
    }
    fields |= {"checkpoint_step_interval": "50", "validation_step_interval": "20", "validation_num_inference_steps": "4"}
    for key, value in (fields | {"validation_strengths": "-1, 0, 1"}).items():
        page.locator(f"#f-k-{key}").fill(value)
    page.get_by_label("Mixed precision").select_option("no")
    page.get_by_role("button", name="Add a prompt").click()
    page.get_by_label("Prompt 1", exact=True).fill("a large red circle on a white background, bright light")
    settled(page)
    page.wait_for_selector("#plan:not([data-stale]) #start:not([disabled])")
    page.locator("#plan dt", has_text="targets").wait_for()
    assert "28 modules (slider)" in page.locator("#plan").inner_text()
    shot(page, "setup", full=True)


def start_stop_resume(page: Any, place: Path) -> None:
    page.click("#start")
    live, output = page.locator("#live"), place / "runs" / "size" / "output"
    live.locator(".badge.running").wait_for()
    live.locator("figure.chart svg").wait_for()
    page.locator("#strips img.strip").first.wait_for()
    shot(page, "watch", full=True)
    live.get_by_role("button", name="Stop").click()
    live.locator(".badge.stopped").wait_for()
    stopped = steps(output)
    assert 0 < stopped < 4000 and (output / f"checkpoint-{stopped:06d}").is_dir()
    page.get_by_role("link", name="Set up").click()
    page.get_by_label("Steps", exact=False).first.wait_for()
    page.locator("#f-k-max_train_steps").fill(str(stopped + 15))
    settled(page)
    page.wait_for_selector("#plan:not([data-stale]) #start:not([disabled])")
    page.get_by_role("button", name="Resume").click()
    live.locator(".badge.finished").wait_for()
    assert steps(output) == stopped + 15
    assert (output / "slider.safetensors").is_file()


def steps(output: Path) -> int:
    return int(json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def try_it(page: Any, place: Path) -> None:
    page.get_by_role("link", name="Try", exact=True).click()
    picture, dial = page.locator("[data-part=picture]"), page.locator("[data-part=range]")
    page.locator("[data-part=picture][src]").wait_for()
    seen = [picture.get_attribute("src")]
    dial.focus()
    page.keyboard.press("ArrowRight")
    seen.append(picture.get_attribute("src"))
    assert page.locator("[data-part=value]").inner_text() == "+1"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    seen.append(picture.get_attribute("src"))
    assert page.locator("[data-part=value]").inner_text() == "\N{MINUS SIGN}1"
    assert len(set(seen)) == 3
    pixels = [page.request.get(server_path(page, str(source))).body() for source in seen]
    assert len(set(pixels)) == 3, "the slider changes what is drawn"
    page.get_by_label("Compare with strength 0").check()
    assert page.locator("[data-part=base]").get_attribute("src") == seen[0]
    shot(page, "try")
    page.get_by_label("Strengths", exact=True).fill("-1.5")
    page.get_by_role("button", name="Draw").click()
    page.locator("[data-strength='-1.5']").wait_for()
    page.locator("[data-strength='-1.5']").click()
    assert "scale-1.5" in str(picture.get_attribute("src"))
    page.locator("#jobs a", has_text="slider.safetensors").wait_for()
    if can_export():
        page.get_by_role("button", name="diffusers").click()
        page.locator("#jobs a", has_text="size_diffusers.safetensors").wait_for()
    else:
        assert not page.get_by_role("button", name="diffusers").count()


def server_path(page: Any, path: str) -> str:
    return "/".join(page.url.split("/")[:3]) + path


def keep_the_page(page: Any, place: Path) -> None:
    """The saved page needs no server: its slider moves in a file."""
    page.get_by_role("link", name="Watch").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Save as one file").click()
    kept = place / "kept.html"
    download.value.save_as(kept)
    page.context.set_offline(True)
    page.goto(kept.as_uri())
    picture = page.locator("[data-part=picture]")
    before = picture.get_attribute("src")
    assert str(before).startswith("data:image/png")
    page.locator("[data-part=range]").focus()
    page.keyboard.press("ArrowRight")
    assert picture.get_attribute("src") != before
    page.context.set_offline(False)


def test_pages_fit_a_phone_and_every_field_has_its_name(server: Any, place: Path, page: Any) -> None:
    """No page scrolls sideways at 360 pixels, every control has an accessible name, and Tab reaches it."""
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(server.url)
    page.get_by_label("Name").fill("one")
    page.get_by_label("Model family").select_option("sd1")
    page.get_by_role("button", name="Set it up").click()
    page.get_by_role("button", name="Add a prompt").click()
    page.get_by_label("Prompt 1", exact=True).wait_for()
    for part in page.locator("details:not(.bucket details)").all():
        if part.get_attribute("open") is None:
            part.locator("summary").first.click()
    for path in ("/runs/one/setup", "/runs/one/watch", "/runs/one/try", "/"):
        if not page.url.endswith(path):
            page.goto(server_path(page, path))
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        nameless = page.evaluate(
            """[...document.querySelectorAll("input:not([type=hidden]), select, textarea, button, a")].filter((one) =>
            !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim())).map((one) => one.outerHTML)"""
        )
        assert not nameless, path
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the page"


def test_a_plan_is_never_that_of_an_earlier_form(server: Any, place: Path, page: Any) -> None:
    """Between a key that is pressed and the answer to it nothing can be started."""
    page.goto(server.url)
    page.get_by_label("Name").fill("one")
    page.get_by_label("Model family").select_option("sd1")
    page.get_by_role("button", name="Set it up").click()
    for field, value in (("k-pretrained_model_name_or_path", "model"), ("b-0-instance_data_dir", "data/more"),
                         ("b-1-instance_data_dir", "data/less"), ("k-resolution", "64")):  # fmt: skip
        page.locator(f"#f-{field}").fill(value)
    page.wait_for_selector("#plan:not([data-stale]) #start:not([disabled])")
    page.locator("#f-k-lora_rank").press_sequentially("0")
    assert page.locator("#start").is_disabled()
    page.wait_for_selector("#plan:not([data-stale]) form")
    assert page.locator("#start").is_disabled() and page.locator("#f-k-lora_rank").get_attribute("aria-invalid") == "true"
    page.locator("#f-k-lora_rank").fill("2")
    page.wait_for_selector("#plan:not([data-stale]) #start:not([disabled])")
    assert "LoRA of rank 2" in page.locator("#plan").inner_text()
    assert page.locator("#f-k-lora_rank").get_attribute("aria-invalid") is None
