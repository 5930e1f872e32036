"""The report in a real browser: chromium, headless, driven by playwright."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from texforce import files, measures, report, views
from texforce.config import TrainOptions, resolve

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"document.title='run'\"> & \"quoted\" 'text' </script><script>document.title='run'</script>"
CATEGORIES = ["colour", "count", '<b>"bold"</b>']
NUM_PROMPTS = 200
FILM = [
    "a violet box",
    "two red circles",
    "a green cross",
    "an ivory wedge above a navy disc",
    "a red circle",
    "a cyan plus",
]


def write_evaluation(
    folder: Path, num_prompts: int, size: int = 8, num_images: int = 1, systems=("base", "te", "both")
) -> dict:
    """What an evaluation leaves behind before its report: images, and the results, of random scores."""
    random = np.random.default_rng(0)
    prompts = [HOSTILE, *(f"prompt number {i}" for i in range(1, num_prompts))]
    categories = [CATEGORIES[i % 3] for i in range(num_prompts)]
    scores = {
        name: {measure: random.normal(k, 1, (num_prompts, num_images)) for measure in ("hps", "clip")}
        for k, name in enumerate(systems)
    }
    scores["base"]["hps"][5:6] = np.nan
    told = measures.summarise(scores, "base", categories, 0)
    for k, name in enumerate(systems):
        (folder / "images" / name).mkdir(parents=True)
        noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(k))
        files.write_image(folder / "first.png", noise, {})  # which replaces the one before, whose links stay
        for i in range(num_prompts):
            for j in range(num_images):
                os.link(folder / "first.png", folder / "images" / name / f"{i:05d}_{j}.png")
    curve = [{"strength": s, "measures": told["te"]} for s in (0, 0.5, 1)] if "te" in systems else []
    return {
        "benchmark": {"name": 'set <i>"x"</i>', "num_prompts": num_prompts},
        "model": "tiny", "num_images": num_images, "sampler": "ddim", "num_inference_steps": 8, "guidance_scale": 3.0,
        "eta": 1.0, "seed": 0, "negative_prompt": None, "rewards": {},
        "confidence": 0.95, "num_prompts_measured": num_prompts, "versions": {"texforce": "0"}, "commit": None,
        "prompts_cut": [], "num_tokens": 24, "timings": {"date": "2026-01-02 03:04 UTC"}, "command": "texforce eval",
        "trainings": {HOSTILE: "text-encoder trained by ppo on hps: 96 images, seed 0"},
        "strengths": {"te": {"chosen_by": "hps", "best": 0.5, "curve": curve}} if curve else {},
        "systems": {
            name: {"strength": 0.5 if name == "te" else 1, "images": f"images/{name}", "measures": told[name]}
            | {"adapters": [{"path": HOSTILE, "weight": 0.5}] if name == "te" else [], "unets": []}
            | {"scores": {measure: [measures.to_json(row) for row in table] for measure, table in scores[name].items()}}
            for name in systems
        },
        "prompts": [
            {"prompt": prompt, "category": category, "seeds": [7] * num_images, "validation": False}
            for prompt, category in zip(prompts, categories, strict=True)
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("evaluation")
    results = write_evaluation(folder, NUM_PROMPTS)
    report.write(folder, results)
    return folder, results


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", "/tmp")  # noqa: S108 - the path of a socket there has at most 108 letters
        with playwright.sync_playwright() as driver:
            if not CHROMIUM and not Path(driver.chromium.executable_path).exists():
                pytest.skip(
                    "no chromium: apt-get install chromium (Debian), playwright install chromium, or one on the PATH"
                )
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # it opens our own pages only
            yield browser
            browser.close()


@pytest.fixture
def visit(browser):
    """A function that opens a folder's report; afterwards nothing else was asked for, and nothing complained."""
    seen, wrong, pages = [], [], []

    def open_page(folder: Path, **options):
        page = browser.new_page(**options)
        pages.append(page)
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((folder / "report.html").as_uri())
        page.wait_for_selector(".card")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not wrong
    assert all(url.startswith("data:") or url.endswith("/report.html") for url in seen), seen


def value_of(page, expression: str):
    """The value of a JavaScript expression, by the browser's own protocol.

    playwright's `evaluate` and `wait_for_function` call eval in the page, which its Content Security Policy forbids.
    """
    session = page.context.new_cdp_session(page)
    answer = session.send("Runtime.evaluate", {"expression": expression, "returnByValue": True})
    session.detach()
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


def cards(page) -> list[int]:
    """The prompts shown, by index."""
    return value_of(page, "[...document.querySelectorAll('.card')].map(card => Number(card.dataset.index))")


def show_all(page, num_cards: int) -> None:
    """Scroll down until all cards are made, a page of them at a time."""
    while page.locator(".card").count() < num_cards:
        page.locator("footer").scroll_into_view_if_needed()


def order_by(results: dict, sign: float, system: str = "te", measure: str = "hps") -> list[int]:
    own, base = (np.array(results["systems"][name]["scores"][measure], dtype=float)[:, 0] for name in (system, "base"))
    change = np.nan_to_num(sign * (own - base), nan=-np.inf)
    return sorted(range(len(change)), key=lambda i: (-change[i], i))


@pytest.mark.slow
def test_a_thousand_prompts_are_on_the_screen_within_two_seconds(visit, tmp_path):
    results = write_evaluation(tmp_path, 1000, size=80)  # noise does not compress: 20 kB, as a large image's thumbnail
    report.write(tmp_path, results)
    page = visit(tmp_path)
    paints = value_of(page, "performance.getEntriesByType('paint').map(entry => [entry.name, entry.startTime])")
    assert dict(paints)["first-contentful-paint"] < 2000
    assert page.text_content("#count") == "1000 of 1000 prompts"
    assert len(cards(page)) < 200  # the others are made when one gets there
    page.locator("footer").scroll_into_view_if_needed()
    page.locator(".card").nth(95).wait_for()


def test_prompts_are_sorted_by_gain_and_loss_of_what_is_chosen(visit, evaluation):
    page, results = visit(evaluation[0]), evaluation[1]
    assert cards(page) == order_by(results, 1)[: len(cards(page))]
    page.select_option("#order", "loss")
    assert cards(page) == order_by(results, -1)[: len(cards(page))]
    page.select_option("#system", label="both")
    page.select_option("#measure", label="clip")
    assert cards(page) == order_by(results, -1, "both", "clip")[: len(cards(page))]
    page.select_option("#order", "given")
    assert cards(page)[:5] == [0, 1, 2, 3, 4]
    page.select_option("#order", "gain")
    page.select_option("#system", label="te at 0.5")
    page.select_option("#measure", label="hps")
    for order in ("gain", "loss"):  # prompt 5 has no change, as the base has no score there: it is the last one
        page.select_option("#order", order)
        show_all(page, NUM_PROMPTS)
        assert cards(page)[-1] == 5
        value_of(page, "scrollTo(0, 0)")


@pytest.mark.slow
def test_the_gallery_grows_again_after_its_end_was_seen(visit, evaluation):
    page = visit(evaluation[0])
    page.fill("#text", "number 1")
    num_cards = int(page.text_content("#count").split()[0])
    assert num_cards > 96
    for order in ("loss", "gain"):
        show_all(page, num_cards)
        page.select_option("#order", order)
    page.locator(".card").nth(num_cards - 1).wait_for(state="attached")


def test_prompts_are_filtered_by_category_and_text(visit, evaluation):
    page = visit(evaluation[0])
    page.select_option("#category", label=CATEGORIES[2])
    assert page.text_content("#count") == "66 of 200 prompts"
    assert {i % 3 for i in cards(page)} == {2}
    page.fill("#text", "NUMBER 19")
    assert sorted(cards(page)) == [191, 194, 197]
    page.select_option("#category", "")
    page.fill("#text", 'onerror="')
    assert cards(page) == [0]
    page.fill("#text", "no such thing")
    assert cards(page) == []
    assert page.text_content("#count") == "0 of 200 prompts"
    assert page.locator("#none").text_content().startswith("No prompt matches.")
    page.click("#clear")
    assert page.text_content("#count") == "200 of 200 prompts"
    assert not page.locator("#none").is_visible()


def test_a_prompt_is_text_and_never_markup(visit, evaluation):
    page = visit(evaluation[0])
    page.fill("#text", "quoted")
    assert page.text_content(".card h3") == HOSTILE
    page.click(".card")
    assert page.text_content("#large-prompt") == HOSTILE
    assert page.locator("dialog[open] img").first.get_attribute("alt") == f"base, image 1: {HOSTILE}"
    assert page.locator('img[src="x"]').count() == 0
    assert page.locator("b").count() == page.locator("h1 i").count() == 0  # of the category and the benchmark
    assert page.title() == 'texforce eval: set <i>"x"</i>'


def test_the_keyboard_is_enough(visit, evaluation):
    page = visit(evaluation[0])
    page.keyboard.press("/")
    assert page.locator("#text:focus").count() == 1
    page.keyboard.type("number 1/j")
    assert page.input_value("#text") == "number 1/j"
    page.keyboard.press("Escape")  # leaves the field as it is
    assert (page.input_value("#text"), cards(page)) == ("number 1/j", [])
    page.fill("#text", "")
    page.keyboard.press("Escape")
    for key, place in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        assert page.locator(".card:focus").get_attribute("data-place") == str(place)
    page.keyboard.press("Enter")
    shown = cards(page)
    assert page.text_content("#large-prompt") == page.locator(".card h3").nth(1).text_content()
    assert page.locator("dialog section").count() == 3
    page.keyboard.press("ArrowRight")
    assert page.text_content("#large-prompt") == page.locator(".card h3").nth(2).text_content()
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    page.locator('.card:focus[data-place="2"]').wait_for()  # the dialog's event of being closed comes a little later
    assert cards(page) == shown


def test_plots_follow_their_measure(visit, evaluation):
    page = visit(evaluation[0])
    figures = page.locator("figure")
    assert figures.count() == 2  # strength and category
    for k in range(2):
        assert figures.nth(k).locator("[data-plot]:visible").get_attribute("data-plot") == "hps"
        figures.nth(k).locator("select").select_option("clip")
        assert figures.nth(k).locator("[data-plot]:visible").get_attribute("data-plot") == "clip"
    assert figures.nth(1).locator("svg:visible circle").count() == 2 * (1 + len(CATEGORIES))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.quick(1)
def test_plots_fill_their_panel_have_axis_titles_and_are_legible(visit, evaluation, width):
    page = visit(evaluation[0], viewport={"width": width, "height": 800})
    for k in range(2):
        figure = page.locator("figure").nth(k)
        box, plot = figure.bounding_box(), figure.locator("svg:visible")
        assert plot.bounding_box()["width"] > 0.7 * box["width"]
        for text in plot.locator("text").all():
            place = text.bounding_box()
            assert place["height"] >= 12
            assert place["x"] >= box["x"]
            assert place["x"] + place["width"] <= box["x"] + box["width"]
        assert any("change of hps" in title for title in plot.locator(".title").all_text_contents())
    assert figure.locator("svg:visible .label").all_text_contents() == [
        f"{name} ({count})" for name, count in (("all", NUM_PROMPTS), *zip(CATEGORIES, (67, 67, 66), strict=True))
    ]


def colour_of(page, selector: str) -> str:
    return value_of(page, f"getComputedStyle(document.querySelector({selector!r})).stroke")


@pytest.mark.slow
def test_plots_have_colours_of_their_own_in_the_dark(visit, evaluation):
    light, dark = (visit(evaluation[0], color_scheme=scheme) for scheme in ("light", "dark"))
    for selector in ("g.colour-0", "g.colour-1", "svg .grid", "svg .zero"):
        assert colour_of(light, selector) != colour_of(dark, selector)


def test_the_verdict_and_the_facts_stand_on_top(visit, evaluation):
    page, results = visit(evaluation[0]), evaluation[1]
    paired = results["systems"]["te"]["measures"]["hps"]["paired"]
    better, _, worse = (share for _, share in report.percents(results["systems"]["te"]["measures"]["hps"]))
    text = f"hps +{paired['mean']:.2f} [{paired['low']:.2f}, {paired['high']:.2f}]; "  # two digits of the interval's width
    text += f"{better} % of prompts better, {worse} % worse"
    verdicts = [text.replace("\xa0", " ") for text in page.locator(".verdict").all_text_contents()]
    assert verdicts[0] == f"te at 0.5 against the base model{text}"
    assert len(verdicts) == 2
    facts = dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))
    assert facts["date"] == "2026-01-02 03:04 UTC"
    assert facts["command"] == "texforce eval"
    assert facts["model"] == "tiny, 8 ddim steps, guidance 3, eta 1"
    assert facts["te at 0.5"] == f"adapter {HOSTILE} times 0.5 (text-encoder trained by ppo on hps: 96 images, seed 0)"
    assert facts["base"] == "the model as it is"


def test_the_summary_has_a_row_for_each_measure_and_a_column_for_each_system(visit, evaluation):
    page, results = visit(evaluation[0]), evaluation[1]
    assert page.locator("thead th").all_text_contents() == ["", "base", "te at 0.5", "both"]
    assert page.locator("tbody th").all_text_contents() == ["hps", "clip"]
    cell = page.locator("tbody tr").nth(0).locator("td").nth(2)
    shares = report.percents(results["systems"]["both"]["measures"]["hps"])
    assert cell.locator(".quiet").text_content().replace("\xa0", " ") == ", ".join(f"{n} % {name}" for name, n in shares)
    widths = value_of(
        page, "[...document.querySelectorAll('tbody td:last-child .shares')[0].children].map(e => e.offsetWidth)"
    )
    assert [round(100 * width / sum(widths)) for width in widths] == pytest.approx([share for _, share in shares], abs=2)


def test_numbers_have_one_minus_sign(visit, evaluation):
    text = visit(evaluation[0]).inner_text("main")
    assert re.search("\N{MINUS SIGN}\\d", text)
    assert not re.search(r"(?<![\w-])-\d", text)


def test_no_number_is_less_than_nothing_by_nothing():
    assert report.interval({"mean": -1e-9, "low": -0.25, "high": -0.0}, "+", 2) == "+0.00 [-0.25, 0.00]"
    table = views.results_table({"num_images": 1, "seconds": 1.0, "heldout": {"hps": {"base": 1e-7, "tuned": 0.0}}})
    assert [next(iter(column.cells)) for column in table.columns[1:]] == ["0.0000", "0.0000", "+0.0000"]


def test_a_change_that_is_not_nothing_keeps_its_digits_where_there_is_no_interval():
    one = {"mean": -0.00023, "low": None, "high": None}
    assert report.interval(one, "+", report.decimals(one)) == "-0.00023"
    assert report.decimals(one | {"mean": 0.25}) == report.decimals(one | {"mean": 0.0}) == 3


def test_only_numbers_have_it_and_names_keep_their_hyphens(tmp_path):
    assert report.minus("hps-v2 -0.02 [-0.3, +1], my-file.py:f, 2026-11-30") == (
        "hps-v2 \N{MINUS SIGN}0.02 [\N{MINUS SIGN}0.3, +1], my-file.py:f, 2026-11-30"
    )


def test_the_page_says_how_images_were_drawn_and_in_which_steps_adapters_are_on(tmp_path):
    results = write_evaluation(tmp_path, 3, systems=("base", "te"))
    results |= {"clip_skip": 2, "width": 64, "prompt_weights": True, "negative_prompt": "blurry", "long_prompt": "chunk"}
    results["systems"]["te"]["adapter_steps"] = "0.5-1"
    facts = {fact.name: fact.text for fact in report.evaluation_page(tmp_path, results).facts}
    for words in ("negative prompt 'blurry'", "weights in prompts read", "long prompt chunk", "clip skip 2", "width 64"):
        assert words in facts["model"]
    assert "on in the steps 0.5-1 alone" in facts["te at 0.5"]
    assert "steps 0.5" not in facts["base"]


@pytest.mark.parametrize(("options", "expected"), [
    ({}, "text-encoder trained by matching on hps, seed 3"),
    ({"relabel": "world"}, "text-encoder trained by matching on hps and failed images relabelled by world, seed 3"),
    ({"relabel": "world", "reward": "none"},
     "text-encoder trained by matching on failed images relabelled by world, seed 3"),
    ({"lora_layers": "last:1", "lora_modules": ["q_proj", "v_proj"], "adapter_steps": "0-0.5"},
     "text-encoder (blocks last:1, projections q_proj, v_proj, in the steps 0-0.5) trained by matching on hps, seed 3"),
    ({"target": "tokens"}, "tokens trained by matching on hps, seed 3"),
])  # fmt: skip
def test_a_training_is_described_with_what_it_has_of_its_own(options, expected):
    usual = {"target": "text-encoder", "algorithm": "matching", "reward": "hps", "seed": 3}
    assert report.describe_method(usual | options) == expected


@pytest.mark.parametrize(("mean", "low", "high", "expected"), [
    (0.2, 0.1, 0.3, "gain"), (-0.2, -0.3, -0.1, "loss"), (0.2, -0.1, 0.5, ""), (-0.2, -0.5, 0.1, ""),
    (0.04, 0.03, 0.05, ""), (-0.04, -0.05, -0.03, ""), (0.2, None, None, ""),
])  # fmt: skip
def test_a_change_is_coloured_if_it_is_large_and_its_interval_does_not_hold_0(mean, low, high, expected):
    assert report.direction({"mean": mean, "low": low, "high": high}, 1.0) == expected


@pytest.mark.quick(3)
@pytest.mark.parametrize(("change", "kind"), [(0.001, "quiet"), (-0.001, "quiet"), (0.8, "gain"), (-0.8, "loss")])
def test_a_cards_change_is_coloured_by_its_size(visit, tmp_path, change, kind):
    results = write_evaluation(tmp_path, 3, systems=("base", "te"))
    scores = {name: results["systems"][name]["scores"] for name in ("base", "te")}
    scores["te"]["hps"][1] = [scores["base"]["hps"][1][0] + change]
    report.write(tmp_path, results)
    shown = visit(tmp_path).locator('.card[data-index="1"] .about span').nth(1)
    assert shown.get_attribute("class") == kind
    assert (shown.get_attribute("style") == "--size: 100") == (abs(change) > 0.5)


def test_a_mark_says_of_each_image_whether_it_is_right(visit, tmp_path):
    results = write_evaluation(tmp_path, 2, num_images=2, systems=("base", "te"))
    rights = {"base": [[1.0, 0.0], [0.0, None]], "te": [[1.0, 1.0], [0.0, 0.0]]}
    for name, system in results["systems"].items():
        system["scores"]["alignment_exact"] = rights[name]
        system["measures"]["alignment_exact"] = system["measures"]["clip"]
    report.write(tmp_path, results)
    page = visit(tmp_path)
    for index, expected in ((0, ["right", "wrong", "right", "right"]), (1, ["wrong", "wrong", "wrong"])):
        marks = page.locator(f'.card[data-index="{index}"] .mark').all()
        assert [mark.get_attribute("title") for mark in marks] == expected


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_colour_scheme(visit, evaluation, scheme):
    page = visit(evaluation[0], viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    assert value_of(page, "document.documentElement.scrollWidth") <= 360
    page.locator(".card").first.tap()
    assert value_of(page, "document.querySelector('dialog').scrollWidth") <= 360
    background, text = (
        sum(map(int, value_of(page, f"getComputedStyle(document.body).{name}").strip("rgb()").split(",")))
        for name in ("backgroundColor", "color")
    )
    assert (background < text) == (scheme == "dark")


def test_the_base_alone_and_prompts_without_categories_are_shown_too(visit, tmp_path):
    results = write_evaluation(tmp_path, 3, size=300, num_images=2, systems=("base",))
    for prompt in results["prompts"]:
        prompt["category"] = ""
    report.write(tmp_path, results)
    page = visit(tmp_path)
    assert len(cards(page)) == 3
    assert page.locator("figure").count() == 0
    assert page.locator(".card img").count() == 6
    assert page.locator(".card img").first.get_attribute("src").startswith("data:image/webp")
    assert value_of(page, "document.querySelector('.card img').naturalWidth") == 256


def test_the_page_names_no_other_host(evaluation):
    text = (evaluation[0] / "report.html").read_text()
    assert "://" not in text
    assert text.count("</script>") == 2
    assert not any(mark in text for mark in ("{{", "{%", "{#"))


def test_results_that_lack_something_the_page_shows_are_a_bug_and_no_page(evaluation, tmp_path):
    folder, results = evaluation
    (tmp_path / "images").symlink_to(folder / "images")
    with pytest.raises(KeyError, match="model"):
        report.write(tmp_path, {name: value for name, value in results.items() if name != "model"})
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_with_many_images_only_the_first_of_each_prompt_is_in_the_page(tmp_path, monkeypatch):
    results = write_evaluation(tmp_path, 4, num_images=3)
    for limit, expected in ((report.MAX_IMAGES, 36), (24, 24), (1, 12)):
        monkeypatch.setattr(report, "MAX_IMAGES", limit)
        report.write(tmp_path, results)
        assert (tmp_path / "report.html").read_text().count("data:image/png") == expected


# --- the page of a training ---


def write_training(folder: Path, num_measured: int, state: str = report.RUNNING, prompts=FILM, shown: int = 4) -> dict:
    """The page of a training in which prompt i gains i times 0.1 an epoch, but for the first, which loses.

    Each epoch has images of its own grey; prompt i is right from epoch i on. Returns the addresses of the images by epoch.
    """
    config = resolve(TrainOptions(model="tiny", reward="hps", num_epochs=8, output_dir=str(folder)))
    images = {}
    for epoch in range(num_measured + 1):
        picture = torch.full((3, 8, 8), epoch / 10)
        images[epoch] = report.embed(files.to_image(picture))
    frames = [
        {
            "epoch": epoch,
            "scores": {
                "hps": [(-1.0 if i == 0 else 0.1 * i) * epoch for i in range(len(prompts))],
                "alignment_exact": [float(epoch >= i) for i in range(len(prompts))],
            },
            "images": {str(i): address for i in range(shown)},
        }
        for epoch, address in images.items()
    ]
    epochs = [
        {"epoch": frame["epoch"], "num_images": 100 * frame["epoch"], "seconds": 1.0, "reward_mean": 0.1}
        | {"heldout": {name: float(np.mean(values)) for name, values in frame["scores"].items()}}
        for frame in frames
    ]
    report.write_training(report.Training(config, prompts, epochs, frames, f"texforce train --resume {folder}", state))
    return images


def move_slider(page, value: int) -> None:
    page.locator("#system").fill(str(value))


@pytest.mark.parametrize(("options", "judge"), [
    ({"reward": "hps"}, "alignment_exact"), ({"reward": "hps=1,jpeg=0.1", "eval_reward": ["clip"]}, "alignment_exact"),
    ({"reward": "alignment"}, None), ({"reward": "hps", "relabel": "world"}, None),
    ({"reward": "alignment", "eval_reward": ["hps"]}, "hps"),
])  # fmt: skip
def test_a_second_verdict_is_by_what_did_not_teach(options, judge):
    config = resolve(TrainOptions(model="tiny", **options))
    parts = {"hps=1,jpeg=0.1": ["hps", "jpeg"]}.get(config.reward, [])
    names = dict.fromkeys([config.reward, *parts, *(config.eval_reward or ()), "alignment", "alignment_exact"])
    frames = [{"epoch": n, "scores": {name: [0.1 * n, 0.2 * n] for name in names}, "images": {}} for n in range(2)]
    verdict = report.verdict_of(report.Training(config, ["a red circle"] * 2, [], frames, ""))
    first, *second = verdict.split(". Not trained on: ")
    assert first.startswith(f"{config.reward} +0.15")
    assert [text.partition(" ")[0] for text in second] == ([judge] if judge else [])


@pytest.mark.parametrize(("number", "told"), [(24, "; hps for common words fell"), (6, "")])
def test_a_verdict_says_for_which_prompts_the_measure_fell(number, told):
    """Only for groups of at least 20 prompts: with fewer, the interval says little."""
    common, rare = ["a red circle"] * number, ["a crimson disc"] * (4 * number)
    steps = np.linspace(0.9, 1.1, 5 * number)
    scores = [
        [*np.linspace(0, 1, 5 * number)],
        [*np.linspace(0, 1, 5 * number) + steps * ([-0.5] * number + [0.5] * 4 * number)],
    ]
    frames = [{"epoch": n, "scores": {"hps": scores[n]}, "images": {}} for n in range(2)]
    config = resolve(TrainOptions(model="tiny", reward="hps"))
    assert report.verdict_of(report.Training(config, common + rare, [], frames, "")).endswith(f"20 % worse{told}")


def test_pages_say_what_each_measure_is(visit, tmp_path):
    write_training(tmp_path, 1)
    text = visit(tmp_path).text_content("body")
    assert "hps: preference by the tiny world's own scorer, which is not HPSv2.1; alignment_exact: 1 where" in text
    for checkpoint, is_own in ((None, True), (["hps=hub"], False), (["clip=hub"], True)):
        options = {"reward": "hps=1,clip=1", "reward_checkpoint": checkpoint}
        assert report.takes_own_hps(resolve(TrainOptions(model="tiny", **options))) == is_own


def test_a_slider_leads_through_the_epochs_of_a_training(visit, tmp_path):
    images = write_training(tmp_path, 3)
    page = visit(tmp_path)
    assert page.text_content("#epoch") == "3"  # the newest first
    assert cards(page) == [3, 2, 1, 0]  # by their gain at the end
    for epoch in (1, 2, 3):
        move_slider(page, epoch)
        assert page.text_content("#epoch") == str(epoch)
        assert cards(page) == [3, 2, 1, 0]
        for place in range(4):
            sources = [image.get_attribute("src") for image in page.locator(".card").nth(place).locator("img").all()]
            assert sources == [images[0], images[epoch]]
        assert page.locator(".card").nth(0).locator(".about span").nth(1).text_content() == f"+{0.3 * epoch:.2f}"
    page.select_option("#order", "least")
    assert cards(page) == [1, 2, 3, 0]
    page.select_option("#order", "loss")
    assert cards(page)[0] == 0


@pytest.mark.slow
def test_a_training_of_a_thousand_prompts_is_on_the_screen_within_two_seconds(visit, tmp_path):
    write_training(tmp_path, 40, prompts=[f"a red circle {i}" for i in range(1000)], shown=16)
    page = visit(tmp_path)
    paints = value_of(page, "performance.getEntriesByType('paint').map(entry => [entry.name, entry.startTime])")
    assert dict(paints)["first-contentful-paint"] < 2000
    page.locator(".card").nth(15).wait_for()
    move_slider(page, 1)
    assert page.text_content("#epoch") != "40"


def test_the_images_of_a_training_are_marked_right_or_wrong(visit, tmp_path):
    write_training(tmp_path, 3)
    page = visit(tmp_path)
    for epoch in (1, 3):
        move_slider(page, epoch)
        for i in range(4):
            marks = page.locator(f'.card[data-index="{i}"] .mark').all()
            assert [mark.get_attribute("title") == "right" for mark in marks] == [i == 0, epoch >= i]


def test_rare_words_are_underlined_in_prompts_of_the_tiny_world_only(visit, tmp_path):
    write_training(tmp_path, 1)
    page = visit(tmp_path)
    assert page.locator('.card[data-index="3"] u').all_text_contents() == ["ivory", "wedge", "navy", "disc"]
    assert page.locator('.card[data-index="1"] u').count() == 0
    write_training(tmp_path, 1, prompts=[*FILM[:5], "an ivory tower"], shown=6)
    assert visit(tmp_path).locator("u").count() == 0


def test_the_page_of_a_training_loads_itself_anew_until_its_end(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RELOAD_SECONDS", 3)
    write_training(tmp_path, 2)
    page = visit(tmp_path)
    assert page.text_content("#state") == "running"
    write_training(tmp_path, 3, report.FINISHED)
    page.locator("#state", has_text="finished").wait_for()
    write_training(tmp_path, 4, report.FINISHED)
    page.wait_for_timeout(1000)  # without an end it would be loaded at once
    assert value_of(page, "document.getElementById('system').max") == "3"


def test_a_page_that_loads_itself_anew_stays_as_it_was(visit, tmp_path):
    write_training(tmp_path, 2)
    page = visit(tmp_path, viewport={"width": 800, "height": 600})
    page.select_option("#order", "loss")
    page.fill("#text", "a")
    plots = page.locator("select[data-plots]")
    plots.select_option(label="alignment_exact")
    value_of(page, "document.getElementById('text').focus()")
    value_of(page, "scrollTo(0, 300)")
    write_training(tmp_path, 3)
    value_of(page, "reload()")
    page.locator("#epoch", has_text="3").wait_for()  # who saw the newest epoch sees the newest one
    assert (page.input_value("#order"), page.input_value("#text")) == ("loss", "a")
    assert value_of(page, "document.activeElement.id") == "text"
    assert value_of(page, "scrollY") == 300
    assert value_of(page, "document.querySelector('select[data-plots]').selectedOptions[0].text") == "alignment_exact"
    shown = page.locator("figure", has=plots).locator("[data-plot]:not([hidden])")
    assert [plot.get_attribute("data-plot") for plot in shown.all()] == [plots.input_value()]
    move_slider(page, 1)
    write_training(tmp_path, 4)
    value_of(page, "reload()")
    page.locator("#system[max='4']").wait_for()
    page.locator("#epoch", has_text="1").wait_for()


def test_a_page_that_was_opened_before_the_first_measurement_sorts_by_gain_once_there_is_one(visit, tmp_path):
    write_training(tmp_path, 0)
    page = visit(tmp_path)
    assert page.input_value("#order") == "tuned"
    write_training(tmp_path, 1)
    value_of(page, "reload()")
    page.locator("#epoch", has_text="1").wait_for()
    assert page.input_value("#order") == "gain"


def test_the_slider_stays_at_its_epoch_though_other_epochs_are_shown(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_FRAMES", 4)
    write_training(tmp_path, 3)  # epochs 0, 1, 2, 3
    page = visit(tmp_path)
    move_slider(page, 2)
    write_training(tmp_path, 6)  # epochs 0, 2, 4, 6
    value_of(page, "reload()")
    page.locator("#epoch", has_text="2").wait_for()
    assert page.input_value("#system") == "1"


def test_a_training_that_has_stopped_does_not_load_itself_either(visit, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RELOAD_SECONDS", 0.2)
    write_training(tmp_path, 1, "stopped after epoch 1")
    page = visit(tmp_path)
    write_training(tmp_path, 2)
    page.wait_for_timeout(800)
    assert page.text_content("#state") == "stopped after epoch 1"


def test_a_training_has_a_curve_for_each_measure_with_the_base_as_a_line(visit, tmp_path):
    write_training(tmp_path, 4)
    page = visit(tmp_path)
    figures = page.locator("figure")
    assert figures.nth(0).locator("figcaption").text_content().split() == ["hps:", "0.000", "\N{RIGHTWARDS ARROW}", "0.333"]
    for k, measure in enumerate(("hps", "alignment_exact")):
        plot = figures.nth(k).locator("svg")
        assert plot.locator("circle").count() == 5
        assert plot.locator(".zero").get_attribute("y1") == plot.locator("circle").first.get_attribute("cy")
        assert plot.locator(".title").all_text_contents() == ["images", measure]
    keys = figures.nth(0).locator(".keys > span").all_text_contents()
    assert keys == ["training prompts, as sampled", "held-out prompts"]


def test_a_training_says_what_changed_most_and_least_among_all_its_prompts(visit, tmp_path):
    write_training(tmp_path, 2)
    sections = visit(tmp_path).locator("section")
    found = {
        section.locator("h3").text_content(): section.locator("tbody th").all_text_contents() for section in sections.all()
    }
    assert found == {
        "hps: prompts that gained most": [FILM[5], FILM[4]],
        "hps: prompts that lost most": [FILM[0], FILM[1]],
        "hps: prompts that changed least": [FILM[1], FILM[2]],
    }
    assert sections.nth(0).locator("td").nth(1).text_content().split() == ["1.000", "+1.000"]


def test_a_training_whose_scores_are_missing_has_a_page_all_the_same(visit, tmp_path):
    config = resolve(TrainOptions(model="tiny", reward="hps", num_epochs=8, output_dir=str(tmp_path)))
    images = {"0": report.embed(files.to_image(torch.zeros(3, 8, 8)))}
    frames = [{"epoch": n, "scores": {"hps": [None, None if n else 0.5]}, "images": images} for n in (0, 1)]
    epochs = [{"epoch": n, "num_images": n, "seconds": 1.0, "reward_mean": 0.1, "heldout": {"hps": 0.5}} for n in (0, 1)]
    report.write_training(report.Training(config, ["a", "b"], epochs, frames, "texforce"))
    page = visit(tmp_path)
    assert page.locator("section tbody tr").count() == 0
    assert "none" in page.text_content("main table")


@pytest.mark.slow
def test_a_training_has_the_commands_to_go_on_and_to_use_it_and_its_settings(visit, tmp_path):
    def commands() -> dict[str, str]:
        page = visit(tmp_path)
        own = page.locator("h2", has_text="Commands").locator("+ .panel")
        return dict(zip(own.locator("dt").all_text_contents(), own.locator("dd code").all_text_contents(), strict=True))

    write_training(tmp_path, 0)
    assert commands() == {"go on, once it has stopped": f"texforce train --resume {tmp_path}"}
    write_training(tmp_path, 1)
    assert commands()["use"] == f"texforce sample --adapter {tmp_path} --prompt 'a violet box' --compare"
    write_training(tmp_path, 8, report.FINISHED)
    assert commands()["train on"] == f"texforce train --resume {tmp_path} --num-epochs 16 --force-resume"
    page = visit(tmp_path)
    page.click("summary")
    settings = page.locator("details")
    assert (
        dict(
            zip(settings.locator("dt").all_text_contents(), settings.locator("dd").all_text_contents(), strict=True)
        ).items()
        >= {"reward": "hps", "num_epochs": "8", "output_dir": str(tmp_path)}.items()
    )


@pytest.mark.parametrize("num_measured", [0, 3])
def test_the_page_of_a_training_fits_a_phone(visit, tmp_path, num_measured):
    write_training(tmp_path, num_measured, prompts=[HOSTILE, *FILM[1:]])
    page = visit(tmp_path, viewport={"width": 390, "height": 844})
    assert value_of(page, "document.documentElement.scrollWidth") <= 390
    assert page.title() == "texforce train: hps on tiny"
    page.fill("#text", "nothing like this")
    assert page.locator("#none").is_visible()


def test_a_page_holds_the_images_of_some_measurements_only_from_the_first_to_the_last(monkeypatch):
    monkeypatch.setattr(report, "MAX_FRAMES", 4)
    for count, expected in ((1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (100, [0, 33, 66, 99])):
        assert [frame["epoch"] for frame in report._some_frames([{"epoch": n} for n in range(count)])] == expected


def test_the_training_reward_of_many_epochs_is_shown_by_means_of_neighbours(monkeypatch):
    monkeypatch.setattr(report, "NUM_MEANS", 2)
    assert report._thinned([]) == []
    assert report._thinned([(1, 1.0), (2, 3.0), (3, 5.0)]) == [(2, 2.0), (3, 5.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.2), (0.73, 0.741), (0, 8192), (1e-7, 3e-7), (5, 5)])
def test_an_axis_has_at_most_five_round_ticks(low, high):
    axis = report.Axis([low, high], 0, 100)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 5
    assert all(axis.low <= value <= axis.high for value, _ in ticks)
    assert all(len(text.lstrip("\N{MINUS SIGN}")) <= 8 for _, text in ticks)
