"""The contact sheet in a real browser: what it shows, and what its filters do.

The browser is the system's own (`apt-get install chromium`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edgedit.apps.batch.ledger import Ledger
from edgedit.apps.batch.report import write_report
from edgedit.apps.batch.run import Summary

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the path"),
]


def test_the_sheet_shows_and_filters_pictures_and_runs_nothing_of_a_prompt(
    write_jobs: Callable[..., Path],
    draw_batch: Callable[..., Summary],
    open_ledger: Callable[..., Ledger],
    tmp_path: Path,
) -> None:
    jobs = [
        {"id": "red", "prompt": "a red cat", "steps": 1, "metadata": {"shop": "north"}},
        {"id": "evil", "prompt": "</script><img src=x onerror='document.title=\"hit\"'><!-- cat", "steps": 1},
        {"id": "blue", "prompt": "a blue cat", "steps": 1, "seed": 2**64 - 1},
        {"id": "nan", "prompt": "a green dog", "steps": 1, "guidance_scale": 1e38},
    ]
    draw_batch(write_jobs(jobs), retries=0)
    sheet = tmp_path / "out" / "report.html"
    with open_ledger() as ledger:
        assert write_report(ledger, sheet) == 4
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(sheet.as_uri())
        cards = page.locator("#sheet li")
        assert cards.count() == 4
        assert page.title() == "Batch out"
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.locator("#sheet img").count() == 3
        assert page.locator("#facts").inner_text().startswith("3 of 4 pictures, 1 failed, model tiny")
        for words, shown in (("north", 1), ("CAT red", 1), ("18446744073709551615", 1), ("cat", 3), ("zebra", 0)):
            page.fill("#text", words)
            assert cards.count() == shown, words
        page.fill("#text", "")
        page.select_option("#state", "failed")
        assert cards.count() == 1
        assert "not numbers" in cards.first.inner_text()
        page.select_option("#state", "done")
        assert cards.count() == 3
        cards.first.locator("a").click()
        assert page.url.endswith("/out/0000/red.png")
        browser.close()
    assert faults == []
