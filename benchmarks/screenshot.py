"""The picture of an evaluation's report that README shows: `python benchmarks/screenshot.py eval/report.html`.

It needs playwright and Debian's chromium, as the tests do.
"""

import argparse
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("report", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "figures" / "report.png")
    options = parser.parse_args()

    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1530})
        page.goto(options.report.absolute().as_uri())
        page.locator(".card").first.wait_for()
        page.screenshot(path=options.output)
        browser.close()


if __name__ == "__main__":
    main()
