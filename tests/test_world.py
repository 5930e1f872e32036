"""The tiny world: its sentences, its drawings, and the detector, against hand-computed scores and its own renderings."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from texforce import detector, prompt_sets, world
from texforce.detector import Detection
from texforce.world import Scene

ROOT = Path(world.__file__).parent
TINY = ROOT / "tiny"
RED, GREEN, BLUE, YELLOW = range(4)
CIRCLE, SQUARE, TRIANGLE, CROSS = range(4)
RED_CIRCLE, BLUE_SQUARE = (RED, CIRCLE), (BLUE, SQUARE)
PAIR = Scene("composition", (RED_CIRCLE, BLUE_SQUARE))
LEFT_OF = Scene("position", (RED_CIRCLE, BLUE_SQUARE), "left of")
THREE = Scene("count", (RED_CIRCLE,) * 3)


def scenes_and_prompts(tiny_build, kind: str, num_scenes: int, seed: int = 0) -> tuple[list[Scene], list[str]]:
    rng = random.Random(f"{seed} {kind}")
    scenes = [tiny_build.draw_scene(rng, kind) for _ in range(num_scenes)]
    return scenes, [tiny_build.caption(scene, rng, rare_probability=0.5) for scene in scenes]


def meaning(scene: Scene) -> tuple:
    """What a scene says, whichever way round it says it."""
    mirrored = {"right of": "left of", "below": "above"}
    if scene.relation in mirrored:
        return mirrored[scene.relation], scene.objects[::-1]
    return scene.relation, scene.objects if scene.relation else tuple(sorted(scene.objects))


# --- sentences ---


@pytest.mark.parametrize(("prompt", "scene"), [
    ("a red circle", Scene("colour", ((RED, CIRCLE),))),
    ("a crimson disc", Scene("colour", ((RED, CIRCLE),))),
    ("an emerald wedge", Scene("colour", ((GREEN, TRIANGLE),))),
    ("a red circle and a blue square", PAIR),
    ("a red disc left of a navy box", LEFT_OF),
    ("a golden plus below a green triangle", Scene("position", ((YELLOW, CROSS), (GREEN, TRIANGLE)), "below")),
    ("two blue boxes", Scene("count", ((BLUE, SQUARE),) * 2)),
    ("three crimson discs", THREE),
    ("four yellow pluses", Scene("count", ((YELLOW, CROSS),) * 4)),
    ("  A Red   CIRCLE\tand a blue square ", PAIR),
])  # fmt: skip
def test_sentences_mean_what_they_say(prompt, scene):
    assert world.parse(prompt) == scene


@pytest.mark.parametrize("prompt", [
    "", "a cat", "red circle", "a red", "the red circle", "a red circle.", "a pink circle", "a red hexagon", "a red circles",
    "one red circle", "five red circles", "three red circle", "two red circles and a blue square", "a red circle\nand",
    "a red circle a blue square", "a red circle beside a blue square", "a red circle and a blue square and a white cross",
])  # fmt: skip
def test_sentences_of_no_tiny_world_are_refused_with_an_example(prompt):
    with pytest.raises(ValueError, match=r"not a sentence of the tiny world.*a red circle left of a blue square"):
        world.parse(prompt)
    assert not world.is_world([prompt])


@pytest.mark.parametrize(("scene", "common", "rare"), [
    (Scene("colour", ((5, TRIANGLE),)), "an orange triangle", "an amber wedge"),
    (LEFT_OF, "a red circle left of a blue square", "a crimson disc left of a navy box"),
    (PAIR, "a red circle and a blue square", "a crimson disc and a navy box"),
    (Scene("count", ((GREEN, CROSS),) * 2), "two green crosses", "two emerald pluses"),
    (Scene("count", ((7, SQUARE),) * 4), "four white squares", "four ivory boxes"),
])  # fmt: skip
def test_scenes_are_spelt_in_english(tiny_build, scene, common, rare):
    assert tiny_build.caption(scene, random.Random(0), 0.0) == common
    assert tiny_build.caption(scene, random.Random(0), 1.0) == rare


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(prompt_sets.KINDS), st.integers(0, 2**32), st.floats(0, 1))
def test_parsing_a_caption_gives_its_scene_back(tiny_build, kind, seed, rare_probability):
    rng = random.Random(seed)
    scene = tiny_build.draw_scene(rng, kind)
    prompt = tiny_build.caption(scene, rng, rare_probability)
    assert world.parse(prompt) == scene
    assert world.is_world([prompt])


@pytest.mark.parametrize("kind", prompt_sets.KINDS)
def test_two_objects_of_a_drawn_scene_differ_in_colour_and_shape(tiny_build, kind):
    for scene in scenes_and_prompts(tiny_build, kind, 200)[0]:
        first, last = scene.objects[0], scene.objects[-1]
        assert len(scene.objects) in {"colour": (1,), "count": (2, 3, 4)}.get(kind, (2,))
        if kind in ("composition", "position"):
            assert first[0] != last[0]
            assert first[1] != last[1]
        assert (scene.relation in world.RELATIONS) == (kind == "position")


@pytest.mark.parametrize(
    "prompt", ["a crimson circle", "a red disc", "two red discs", "three blue boxes", "four cyan pluses", "A Red  Disc"]
)
def test_a_rare_word_is_known_in_singular_and_plural(prompt):
    assert world.has_rare_word(prompt)


def test_what_parse_reads_is_of_the_world_and_nothing_else():
    assert world.is_world(["A red  circle", " two crimson discs "])
    assert not world.is_world(["a red circle", "a red horse"])


@pytest.mark.parametrize("prompt", ["a red circle", "two white crosses", "a blue square left of a green triangle"])
def test_common_words_are_not_rare(prompt):
    assert not world.has_rare_word(prompt)


def test_rare_words_come_as_often_as_asked(tiny_build):
    rng = random.Random(0)
    scenes = [tiny_build.draw_scene(rng, "composition") for _ in range(500)]
    assert not any(world.has_rare_word(tiny_build.caption(scene, rng, 0.0)) for scene in scenes)
    words = [word for scene in scenes for word in tiny_build.caption(scene, rng, 0.25).split()]
    share = sum(word in world.RARE_WORDS for word in words) / 2000  # two colours and two shapes each
    assert share == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("kind", prompt_sets.KINDS)
def test_drawn_prompts_are_distinct_repeatable_and_of_the_side_asked_for(tiny_build, kind):
    train, heldout = (tiny_build.draw_prompts(20, kind, 0, heldout) for heldout in (False, True))
    common = tiny_build.draw_prompts(20, kind, 0, rare=False)
    assert len(set(train)) == len(set(heldout)) == len(set(common)) == 20
    assert not set(train) & set(heldout)
    assert not any(map(tiny_build.is_heldout, train + common))
    assert not any(map(world.has_rare_word, common))
    assert all(map(tiny_build.is_heldout, heldout))
    assert all(map(world.has_rare_word, train))
    assert not all(map(world.has_rare_word, heldout))
    assert {world.parse(prompt).kind for prompt in train + heldout + common} == {kind}
    assert tiny_build.draw_prompts(20, kind, 0) == train
    assert tiny_build.draw_prompts(20, kind, 1) != train


def test_more_prompts_than_a_kind_has_are_refused(tiny_build):
    assert len(world.COLOURS) * len(world.SHAPES) * 4 == 128
    with pytest.raises(ValueError, match=r"num_prompts: .* fewer than 129 .*'colour'"):
        tiny_build.draw_prompts(129, "colour", 0)


def test_a_fifth_of_all_sentences_is_held_out(tiny_build):
    prompts = scenes_and_prompts(tiny_build, "position", 4000)[1]
    assert sum(map(tiny_build.is_heldout, prompts)) / 4000 == pytest.approx(tiny_build.HELDOUT_FRACTION, abs=0.03)


def test_shipped_prompt_sets_are_disjoint_sentences_of_their_kind(tiny_build):
    everything = []
    for kind in prompt_sets.KINDS:
        for name, heldout in ((kind, False), (f"{kind}-heldout", True)):
            prompts = (prompt_sets.PROMPTS / f"{name}.txt").read_text().splitlines()
            assert prompts == prompt_sets.read_prompts(name)
            assert {world.parse(prompt).kind for prompt in prompts} == {kind}
            assert all(tiny_build.is_heldout(prompt) == heldout for prompt in prompts)
            everything += prompts
    assert not set(prompt_sets.read_prompts("common")) & set(everything)
    assert len(everything) == len(set(everything))
    assert sum(map(tiny_build.is_heldout, everything)) == 256
    assert len(prompt_sets.read_prompts("world-heldout")) == 256
    assert set(prompt_sets.read_prompts("world")) | set(prompt_sets.read_prompts("world-heldout")) == set(everything)


def test_the_recipe_draws_the_shipped_prompt_sets_again(tiny_build, tmp_path):
    tiny_build.build_prompts(tmp_path, seed=0)
    drawn = sorted((tmp_path / "prompts").iterdir())
    assert len(drawn) == 9
    assert all(path.read_bytes() == (prompt_sets.PROMPTS / path.name).read_bytes() for path in drawn)


# --- drawings ---


@pytest.mark.parametrize("shape", range(4))
def test_area_and_centre_of_a_shape_are_those_it_was_drawn_with(shape):
    centre, radius = torch.tensor([[30.3, 33.6]]), torch.tensor([18.0])
    cover = detector.coverage(torch.tensor([shape]), centre, radius, size=64)[0].double()
    assert cover.sum().item() == pytest.approx(detector.AREA_FACTORS[shape].item() * 18**2, rel=0.005)
    axis = torch.arange(64) + 0.5
    x, y = ((cover.sum(dim=dim) * axis).sum() / cover.sum() for dim in (0, 1))
    assert (x.item(), y.item()) == pytest.approx((30.3, 33.6), abs=0.03)


def test_coverage_of_a_circle_and_a_square_by_hand():
    centre = torch.tensor([[16.0, 16.0]]).expand(2, 2)
    circle, square = detector.coverage(torch.tensor([CIRCLE, SQUARE]), centre, torch.tensor([5.0, 5.0]))
    assert circle[16, 16] == square[16, 16] == 1
    assert circle[16, 22] == square[16, 22] == 0
    assert circle[16, 20].item() == pytest.approx(5.5 - (4.5**2 + 0.5**2) ** 0.5, abs=1e-5)
    assert square[16, 20].item() == pytest.approx(0.5 + 4.5 - 4.5, abs=1e-5)
    assert square[20, 20].item() == pytest.approx(0.5, abs=1e-5)  # a square has its corners
    assert circle[20, 20] == 0


def test_a_triangle_points_up_and_a_cross_has_arms():
    centre = torch.tensor([[16.0, 16.0]]).expand(2, 2)
    triangle, cross = detector.coverage(torch.tensor([TRIANGLE, CROSS]), centre, torch.tensor([5.0, 5.0]))
    widths = (triangle > 0.5).sum(dim=1)
    widths = widths[widths > 0]
    assert widths[0] <= 2
    assert (widths.diff() >= 0).all()
    assert (cross[16, 20], cross[20, 16], cross[20, 20]) == (1, 1, 0)


def test_rendering_is_reproducible_and_within_zero_and_one(tiny_build):
    scenes = [scene for kind in prompt_sets.KINDS for scene in scenes_and_prompts(tiny_build, kind, 20)[0]]
    first, second, other = (tiny_build.render(scenes, random.Random(seed)) for seed in (3, 3, 4))
    assert first.shape == (80, 3, 32, 32)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_colours_are_those_of_the_palette(tiny_build):
    images = tiny_build.render([Scene("colour", ((colour, SQUARE),)) for colour in range(8)], random.Random(0))
    contrast = (images - detector.BACKGROUND[:, None, None]).norm(dim=1).flatten(1)
    cores = images.flatten(2)[torch.arange(8), :, contrast.argmax(dim=1)]
    expected = torch.tensor([rgb for _, rgb in world.COLOURS.values()])
    torch.testing.assert_close(cores, expected, rtol=0, atol=1e-6)
    corners = images[:, :, 0, 0]
    torch.testing.assert_close(corners, detector.BACKGROUND.expand(8, 3), rtol=0, atol=1e-6)


def count_regions(mask: torch.Tensor) -> int:
    """Number of 8-connected regions of a mask (H, W), by flood filling."""
    unseen, num_regions = {tuple(pixel) for pixel in mask.nonzero().tolist()}, 0
    while unseen:
        num_regions, edge = num_regions + 1, [unseen.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy, dx in itertools.product((-1, 0, 1), repeat=2)} & unseen
            unseen -= near
            edge += near
    return num_regions


@pytest.mark.parametrize("kind", ["composition", "position", "count"])
def test_objects_of_a_drawing_do_not_touch(tiny_build, kind):
    scenes, _ = scenes_and_prompts(tiny_build, kind, 100)
    images = tiny_build.render(scenes, random.Random(0))
    painted = (images - detector.BACKGROUND[:, None, None]).norm(dim=1) > 0.25  # as the detector sees it
    num_regions = [count_regions(mask) for mask in painted]
    assert num_regions == [len(scene.objects) for scene in scenes]


@pytest.mark.parametrize("relation", world.RELATIONS)
def test_placed_objects_stand_as_the_relation_says(tiny_build, relation):
    rng = random.Random(0)
    for _ in range(100):
        (x, y), (other_x, other_y) = tiny_build.place(Scene("position", (RED_CIRCLE, BLUE_SQUARE), relation), rng)
        holds = {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}
        assert holds[relation]
        along, across = (x - other_x, y - other_y) if relation.endswith("of") else (y - other_y, x - other_x)
        assert abs(along) >= 12
        assert abs(across) <= 2


# --- the detector on renderings ---


@pytest.fixture(scope="module")
def renderings(tiny_build) -> dict[str, tuple[list[Scene], list[str], torch.Tensor]]:
    """100 scenes a kind, their captions of common and rare words, and their images."""
    drawn = {}
    for kind in prompt_sets.KINDS:
        scenes, prompts = scenes_and_prompts(tiny_build, kind, 100)
        drawn[kind] = scenes, prompts, tiny_build.render(scenes, random.Random(1))
    return drawn


@pytest.mark.parametrize("kind", prompt_sets.KINDS)
def test_renderings_are_judged_fully_right(renderings, kind):
    _, prompts, images = renderings[kind]
    assert 0.3 < sum(map(world.has_rare_word, prompts)) / len(prompts) < 0.99
    right = (detector.alignment(images, prompts) == 1).double().mean().item()
    print(f"{kind}: {right:.4f} of the renderings fully right")
    assert right >= 0.98


@pytest.mark.parametrize("kind", prompt_sets.KINDS)
def test_renderings_of_other_scenes_are_not_judged_right(renderings, kind):
    scenes, prompts, images = renderings[kind]
    different = torch.tensor([meaning(a) != meaning(b) for a, b in zip(scenes, scenes[1:] + scenes[:1], strict=True)])
    scores = detector.alignment(images, prompts[1:] + prompts[:1])[different]
    print(f"{kind}: {(scores == 1).double().mean():.4f} of {len(scores)} mismatched prompts judged right")
    assert len(scores) >= 80
    assert (scores == 1).double().mean() <= 0.02


@pytest.mark.parametrize("kind", ["composition", "position"])
def test_swapped_colours_are_never_judged_right(tiny_build, renderings, kind):
    scenes, _, images = renderings[kind]
    swapped = []
    for scene in scenes:
        (colour, shape), (other_colour, other_shape) = scene.objects
        swapped.append(Scene(kind, ((other_colour, shape), (colour, other_shape)), scene.relation))
    prompts = [tiny_build.caption(scene, random.Random(0)) for scene in swapped]
    assert (detector.alignment(images, prompts) == 1).double().mean() <= 0.02


@pytest.mark.parametrize("kind", prompt_sets.KINDS)
@pytest.mark.parametrize(("size", "mode"), [(64, "bilinear"), (64, "nearest"), (96, "bilinear")])
def test_other_image_sizes_are_judged_alike(renderings, kind, size, mode):
    _, prompts, images = renderings[kind]
    options = {} if mode == "nearest" else {"align_corners": False}
    larger = torch.nn.functional.interpolate(images, (size, size), mode=mode, **options)
    right = (detector.alignment(larger, prompts) == 1).double().mean().item()
    print(f"{kind} at {size} {mode}: {right:.4f}")
    assert right >= 0.95


@pytest.mark.parametrize("kind", ["composition", "position", "count"])
def test_detections_are_the_objects_in_their_places(tiny_build, kind):
    for seed, scene in enumerate(scenes_and_prompts(tiny_build, kind, 20)[0]):
        centres = tiny_build.place(scene, random.Random(seed))  # which is the first that rendering draws
        (found,) = detector.detect(tiny_build.render([scene], random.Random(seed)))
        expected = {
            (round(x / 14), round(y / 14)): (wanted, x, y) for wanted, (x, y) in zip(scene.objects, centres, strict=True)
        }
        assert len(found) == len(expected)
        for one in found:
            wanted, x, y = expected[round(one.x / 14), round(one.y / 14)]
            assert (one.colour, one.shape) == wanted
            assert (one.x, one.y) == pytest.approx((x, y), abs=0.3)


@pytest.mark.parametrize("kind", prompt_sets.KINDS)
def test_a_dark_image_scores_zero(tiny_build, kind):
    prompts = scenes_and_prompts(tiny_build, kind, 5)[1]
    for image in (torch.zeros(3, 1, 1), detector.BACKGROUND[:, None, None]):
        assert detector.alignment(image.expand(5, 3, 32, 32), prompts).tolist() == [0.0] * 5


def test_an_image_all_of_one_colour_is_never_right(tiny_build):
    prompts = [
        tiny_build.sentence(Scene("colour", ((colour, SQUARE),)), [(name, "square")])
        for colour, name in enumerate(world.COLOURS)
    ]
    images = detector.PALETTE[:, :, None, None].expand(8, 3, 32, 32)
    assert (detector.alignment(images, prompts) < 1).all()


def test_a_speck_is_no_object_and_an_unknown_colour_is_none(tiny_build):
    image = tiny_build.render([Scene("colour", (RED_CIRCLE,))], random.Random(0))
    speck = image.clone()
    speck[:, :, 0, 0] = 1.0
    assert detector.detect(speck) == detector.detect(image)
    grey = detector.BACKGROUND[:, None, None] + 0.4 * detector.coverage(
        torch.tensor([SQUARE]), torch.tensor([[16.0, 16.0]]), torch.tensor([5.0])
    )
    (found,) = detector.detect(grey[None])
    assert [(seen.colour, seen.shape) for seen in found] == [(-1, SQUARE)]
    assert (found[0].x, found[0].y) == pytest.approx((16, 16), abs=0.05)


def test_detection_of_one_image_does_not_depend_on_its_batch(renderings):
    _, _, images = renderings["count"]
    whole = detector.detect(images[:20])
    assert [detector.detect(image[None])[0] for image in images[:20]] == whole


def test_alignment_is_float32_one_an_image_and_takes_half_precision(renderings):
    _, prompts, images = renderings["composition"]
    scores = detector.alignment(images[:30].half(), prompts[:30])
    assert scores.dtype == torch.float32
    assert scores.shape == (30,)
    assert (scores == 1).double().mean() >= 0.95


def test_alignment_refuses_a_foreign_prompt(renderings):
    with pytest.raises(ValueError, match="'a cat' is not a sentence"):
        detector.alignment(renderings["colour"][2][:2], ["a red circle", "a cat"])


# --- captions ---


@pytest.mark.parametrize("kind", prompt_sets.KINDS)
def test_a_caption_means_what_was_drawn_in_common_words(renderings, kind):
    """Under the prompt of another image, and None under its own."""
    scenes, prompts, images = renderings[kind]
    own = detector.captions(images[:40], prompts[:40])
    others = detector.captions(images[:40], prompts[1:41])
    assert sum(caption is None for caption in own) >= 38
    told = [(caption, scene) for caption, scene in zip(others, scenes[:40], strict=True) if caption is not None]
    assert len(told) >= 25
    assert not any(world.has_rare_word(caption) for caption, _ in told)
    assert sum(meaning(world.parse(caption)) == meaning(scene) for caption, scene in told) >= len(told) - 2


def found(*objects: tuple[int, int, float, float]) -> list[Detection]:
    return [Detection(*numbers) for numbers in objects]


LEFT, RIGHT = (RED, CIRCLE, 8.0, 16.0), (BLUE, SQUARE, 24.0, 16.0)


@pytest.mark.parametrize(("detections", "scene", "caption"), [
    (found(LEFT), PAIR, "a red circle"),
    (found((5, TRIANGLE, 8.0, 8.0)), PAIR, "an orange triangle"),
    (found(LEFT, RIGHT), Scene("position", (RED_CIRCLE, BLUE_SQUARE), "right of"), "a red circle left of a blue square"),
    (found(LEFT, RIGHT), Scene("position", (BLUE_SQUARE, RED_CIRCLE), "left of"), "a blue square right of a red circle"),
    (found(LEFT, RIGHT), Scene("position", ((GREEN, CROSS), RED_CIRCLE), "above"), "a blue square right of a red circle"),
    (found(RIGHT, LEFT), THREE, "a blue square and a red circle"),
    (found(LEFT, (BLUE, SQUARE, 11.0, 16.0)), LEFT_OF, "a red circle and a blue square"),  # too near for a relation
    (found(LEFT, (RED, CIRCLE, 24.0, 16.0)), LEFT_OF, "two red circles"),
    (found(*[(YELLOW, CROSS, 4.0 + 8 * k, 8.0) for k in range(4)]), THREE, "four yellow crosses"),
    (found(*[(YELLOW, CROSS, 4.0 + 4 * k, 8.0) for k in range(5)]), THREE, None),
    (found(LEFT, LEFT, RIGHT), THREE, None),
    (found(LEFT, (-1, SQUARE, 24.0, 16.0)), PAIR, None),
    (found((RED, -1, 8.0, 8.0)), PAIR, None),
    ([], PAIR, None),
])  # fmt: skip
def test_captions_by_hand(detections, scene, caption):
    assert detector.describe(detections, scene) == caption
    if caption is not None:
        assert detector.judge(detections, world.parse(caption)) == 1


# --- scores by hand ---


def seen(colour: int, shape: int, x: float = 16.0, y: float = 16.0) -> Detection:
    return Detection(colour, shape, x, y)


@pytest.mark.parametrize(("detections", "expected"), [
    ([seen(RED, CIRCLE), seen(BLUE, SQUARE)], 1.0),
    ([seen(BLUE, SQUARE), seen(RED, CIRCLE)], 1.0),  # in any order
    ([seen(RED, SQUARE), seen(BLUE, CIRCLE)], 0.5),  # colours swapped: half of each
    ([seen(RED, CIRCLE), seen(GREEN, SQUARE)], 0.75),
    ([seen(RED, CIRCLE), seen(GREEN, TRIANGLE)], 0.5),
    ([seen(RED, CIRCLE), seen(-1, -1)], 0.5),
    ([seen(RED, CIRCLE)], 0.5),  # one is missing
    ([seen(RED, SQUARE)], 0.25),
    ([seen(RED, CIRCLE), seen(BLUE, SQUARE), seen(GREEN, CROSS)], 2 / 3),  # one too many
    ([seen(RED, CIRCLE), seen(BLUE, SQUARE), seen(RED, CIRCLE)], 2 / 3),
    ([seen(GREEN, CROSS)], 0.0),
    ([], 0.0),
    ([seen(RED, CIRCLE)] * 3 + [seen(BLUE, SQUARE)] * 3, 2 / 6),
    ([seen(RED, CIRCLE)] * 7, 0.0),  # beyond six objects an image is noise
])  # fmt: skip
def test_scores_of_a_composition_by_hand(detections, expected):
    assert detector.judge(detections, PAIR) == pytest.approx(expected)


@pytest.mark.parametrize(("detections", "expected"), [
    ([seen(RED, CIRCLE, 9), seen(BLUE, SQUARE, 23)], 1.0),
    ([seen(BLUE, SQUARE, 23), seen(RED, CIRCLE, 9)], 1.0),
    ([seen(RED, CIRCLE, 23), seen(BLUE, SQUARE, 9)], 0.75),  # the wrong way round
    ([seen(RED, CIRCLE, 9, 9), seen(BLUE, SQUARE, 12, 23)], 0.75),  # above rather than left of
    ([seen(RED, CIRCLE, 14), seen(BLUE, SQUARE, 17)], 0.75),  # too near to tell
    ([seen(RED, SQUARE, 9), seen(BLUE, CIRCLE, 23)], 0.75 * 0.5 + 0.25),  # something half right is left of it
    ([seen(RED, CIRCLE, 9), seen(GREEN, SQUARE, 23)], 0.75 * 0.75 + 0.25),
    ([seen(RED, CIRCLE, 9)], 0.75 * 0.5),
    ([seen(RED, CIRCLE, 9), seen(BLUE, SQUARE, 23), seen(GREEN, CROSS)], 0.75 * 2 / 3 + 0.25),
])  # fmt: skip
def test_scores_of_a_position_by_hand(detections, expected):
    assert detector.judge(detections, LEFT_OF) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("relation", "place"), [("left of", (9, 16)), ("right of", (23, 16)), ("above", (16, 9)), ("below", (16, 23))]
)
def test_each_relation_holds_in_its_direction_only(relation, place):
    for other, scene in ((other, Scene("position", PAIR.objects, other)) for other in world.RELATIONS):
        score = detector.judge([seen(*RED_CIRCLE, *place), seen(*BLUE_SQUARE)], scene)
        assert score == (1.0 if other == relation else 0.75)


@pytest.mark.parametrize(("detections", "expected"), [
    ([seen(RED, CIRCLE)] * 3, 1.0),
    ([seen(RED, CIRCLE)] * 2, 2 / 3),
    ([seen(RED, CIRCLE)] * 4, 3 / 4),
    ([seen(RED, CIRCLE)] * 2 + [seen(RED, SQUARE)], 2.5 / 3),
    ([seen(GREEN, CIRCLE)] * 3, 0.5),
    ([seen(RED, CIRCLE)], 1 / 3),
])  # fmt: skip
def test_scores_of_a_count_by_hand(detections, expected):
    assert detector.judge(detections, THREE) == pytest.approx(expected)


def test_a_score_is_one_only_if_everything_is_right():
    options = [seen(c, s, x) for c, s, x in itertools.product((RED, BLUE), (CIRCLE, SQUARE), (9, 23))]
    for num in (1, 2, 3):
        for detections in itertools.product(options, repeat=num):
            score = detector.judge(detections, LEFT_OF)
            assert 0 <= score <= 1
            right = num == 2 and {(d.colour, d.shape, d.x) for d in detections} == {(*RED_CIRCLE, 9), (*BLUE_SQUARE, 23)}
            assert (score == 1) == right


# --- the shipped weights ---


def test_reconstructions_of_the_tiny_vae_are_judged_right(renderings):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TINY / "vae")
    for kind, (_, prompts, images) in renderings.items():
        with torch.no_grad():
            decoded = vae.decode(vae.encode(2 * images[:60] - 1).latent_dist.mean).sample
        right = (detector.alignment((decoded / 2 + 0.5).clamp(0, 1), prompts[:60]) == 1).double().mean().item()
        print(f"{kind}: {right:.4f} of the reconstructions fully right")
        assert right >= 0.95


def test_the_tiny_model_is_a_plain_diffusers_pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(TINY)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red circle"] * 2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)


def test_the_shipped_weights_are_small():
    sizes = {path: path.stat().st_size for path in TINY.glob("*/*.safetensors")}
    assert len(sizes) == 3
    assert sum(sizes.values()) <= 12e6


def test_prompts_of_another_world_are_named_for_the_embedded_models_alone():
    note = world.foreign_note("tiny-flow", ["a red circle", "a horse", "a cat"])
    assert note.startswith("tiny-flow knows only coloured shapes, so 2 of 3 prompts mean nothing to it, as 'a horse';")
    assert world.foreign_note("tiny", ["two crimson discs", "A red  circle"]) is None
    assert world.foreign_note("stable-diffusion-v1-5/stable-diffusion-v1-5", ["a horse"]) is None
