"""The pictures that README shows: `python benchmarks/readme_figures.py` makes grid.png, curve.png and report.png anew.

It runs README's training of the tiny model and its evaluation, each in a folder of its own; what is finished there is not
run again. It needs playwright and Debian's chromium, as the tests do.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--work-dir", type=Path, default=ROOT / "build" / "readme_figures", help="of training and evaluation"
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "figures")
    parser.add_argument("--num-epochs", help="fewer than README's, to try this script")
    parser.add_argument("--limit", help="fewer prompts in the evaluation, likewise")
    options = parser.parse_args()

    training, evaluation = options.work_dir / "out", options.work_dir / "eval"
    for folder in (options.output_dir, options.work_dir):
        folder.mkdir(parents=True, exist_ok=True)
    given = ["--num-epochs", options.num_epochs] if options.num_epochs else []
    texforce(options.work_dir, "train", "--model", "tiny", "--reward", "hps", *given, "--resume", "out")
    limit = ["--limit", options.limit] if options.limit else []
    texforce(options.work_dir, "eval", "--adapter", "out", *limit)
    shutil.copy(max((training / "grids").glob("*.png")), options.output_dir / "grid.png")
    shutil.copy(training / "curve.png", options.output_dir / "curve.png")
    take_picture(evaluation / "report.html", options.output_dir / "report.png")


def texforce(folder: Path, *arguments: str) -> None:
    """Run a command of texforce in a folder, so that the page names no path of this machine."""
    command = [sys.executable, "-m", "texforce.cli", *arguments]
    subprocess.run(command, cwd=folder, check=True)  # noqa: S603 - our own arguments


def take_picture(page: Path, path: Path) -> None:
    """Write a PNG of the top of a page as a desktop's browser shows it, down to the first row of prompts."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1100, "height": 2400})  # so that the first prompts' images are loaded
        view.goto(page.absolute().as_uri())
        view.locator(".card img").first.wait_for()
        view.wait_for_timeout(500)  # until the images are decoded
        end = max(card.bounding_box()["y"] + card.bounding_box()["height"] for card in view.locator(".card").all()[:3])
        view.screenshot(path=path, clip={"x": 0, "y": 0, "width": 1100, "height": end + 12})
        browser.close()


if __name__ == "__main__":
    main()
