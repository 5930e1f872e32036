"""The detector of the tiny world: draws shapes, reads them off images, and judges and describes what it found."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .world import COLOUR_WORDS, COLOURS, COUNTS, IMAGE_SIZE, RELATIONS, SHAPE_WORDS, SHAPES, Scene, parse, plural

BACKGROUND = torch.tensor([0.08, 0.08, 0.08])
PALETTE = torch.tensor([rgb for _, rgb in COLOURS.values()])  # (8, 3)
# Area of each shape over the square of its radius, in the order of SHAPES; it turns a measured area into a radius.
AREA_FACTORS = torch.tensor([3.1416, 3.24, 2.2733, 2.56])


def coverage(shapes: Tensor, centres: Tensor, radii: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """How much of each pixel each shape covers, (M, size, size) in [0, 1].

    Shapes (M,) are indices into SHAPES; centres (M, 2) as x, y and radii (M,) are in pixels. A shape's centre is its
    centre of mass, so that the detector finds it again from the pixels.
    """
    axis = torch.arange(size) + 0.5
    x = (axis[None, None, :] - centres[:, 0, None, None]) / radii[:, None, None]
    y = (axis[None, :, None] - centres[:, 1, None, None]) / radii[:, None, None]
    x, y = torch.broadcast_tensors(x, y)
    square = torch.maximum(x.abs(), y.abs()) - 0.9
    triangle = torch.maximum(y - 0.6614, 0.8660 * x.abs() - 0.5 * y - 0.6614)  # equilateral, pointing up
    arm = torch.minimum(
        torch.maximum(x.abs() - 1.0, y.abs() - 0.4),
        torch.maximum(y.abs() - 1.0, x.abs() - 0.4),
    )
    distances = torch.stack([(x.square() + y.square()).sqrt() - 1.0, square, triangle, arm], dim=1)
    distance = distances[torch.arange(len(shapes)), shapes] * radii[:, None, None]
    return (0.5 - distance).clamp(0, 1)


@dataclass(frozen=True)
class Detection:
    """One shape found in an image; colour and shape are indices, or -1 where nothing known fits."""

    colour: int
    shape: int
    x: float
    y: float


def _label_components(mask: Tensor) -> Tensor:
    """Label the 4-connected regions of masks (N, H, W): every pixel gets its region's largest index, background 0."""
    labels = torch.arange(1, mask.numel() + 1).reshape(mask.shape) * mask
    while True:
        padded = torch.nn.functional.pad(labels, (1, 1, 1, 1))
        shifted = [
            padded[:, 1:-1, 1:-1],
            padded[:, :-2, 1:-1],
            padded[:, 2:, 1:-1],
            padded[:, 1:-1, :-2],
            padded[:, 1:-1, 2:],
        ]
        spread = torch.stack(shifted).amax(dim=0) * mask
        if torch.equal(spread, labels):
            return labels
        labels = spread


@torch.no_grad()
def detect(
    images: Tensor, min_area: int = 8, max_area: int = 300, max_colour_distance: float = 0.35, min_overlap: float = 0.6
) -> list[list[Detection]]:
    """Find the shapes in images (N, 3, H, W) in [0, 1]; other sizes are resized to 32 x 32.

    A region that stands out from the ground is one shape. Its colour is the nearest of the palette, its shape the one
    whose drawing at the same place with the same area overlaps it most; what covers more than max_area pixels has none.
    """
    images = images.detach().float().cpu().clamp(0, 1)
    if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
        images = torch.nn.functional.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
    contrast = (images - BACKGROUND[:, None, None]).norm(dim=1)
    found: list[list[Detection]] = [[] for _ in range(len(images))]
    regions = _label_components(contrast > 0.25)
    labels = regions.unique()
    labels = labels[labels > 0]
    index = (labels - 1) // (IMAGE_SIZE * IMAGE_SIZE)
    masks = regions[index] == labels[:, None, None]
    big = masks.sum(dim=(1, 2)) >= min_area
    masks, index = masks[big], index[big]
    if len(masks) == 0:
        return found
    weights = masks * contrast[index].square()  # the rim is mixed with the ground: let the core decide the colour
    colours = (weights[:, None] * images[index]).sum(dim=(2, 3)) / weights.sum(dim=(1, 2))[:, None]
    colour_distances = torch.cdist(colours, PALETTE)
    near = torch.nn.functional.max_pool2d(masks[:, None].float(), 3, 1, 1)[:, 0]
    solid = (colours - BACKGROUND).norm(dim=1)[:, None, None]
    cover = near * (contrast[index] / solid).clamp(0, 1)
    area = cover.sum(dim=(1, 2))
    axis = torch.arange(IMAGE_SIZE) + 0.5
    centres = (
        torch.stack([(cover.sum(dim=1) * axis).sum(dim=1), (cover.sum(dim=2) * axis).sum(dim=1)], dim=1) / area[:, None]
    )
    overlaps = torch.stack([_overlap(cover, shape, centres, area) for shape in range(len(SHAPES))], dim=1)
    overlaps[area > max_area] = 0
    for i, colour, distance, shape, overlap, centre in zip(
        index.tolist(),
        colour_distances.argmin(dim=1).tolist(),
        colour_distances.amin(dim=1).tolist(),
        overlaps.argmax(dim=1).tolist(),
        overlaps.amax(dim=1).tolist(),
        centres.tolist(),
        strict=True,
    ):
        known_colour = colour if distance <= max_colour_distance else -1
        known_shape = shape if overlap >= min_overlap else -1
        found[i].append(Detection(known_colour, known_shape, *centre))
    return found


def _overlap(cover: Tensor, shape: int, centres: Tensor, area: Tensor) -> Tensor:
    """Intersection over union of each region with one shape drawn at its place and area, (M,)."""
    shapes = torch.full((len(cover),), shape)
    drawn = coverage(shapes, centres, (area / AREA_FACTORS[shape]).sqrt())
    return torch.minimum(cover, drawn).sum(dim=(1, 2)) / torch.maximum(cover, drawn).sum(dim=(1, 2))


def judge(detections: Sequence[Detection], scene: Scene) -> float:
    """How much of a scene an image shows, from 0 to 1; 1 only if everything is right and nothing is too much.

    Objects are matched one to one in the best order, half a point each for colour and shape; missing and surplus objects
    count as wrong. In a position prompt the relation is a quarter of the score.
    """
    wanted = scene.objects
    size = max(len(wanted), len(detections))
    if not detections or size > 6:
        return 0.0
    best = 0.0
    for order in itertools.permutations(range(size), len(wanted)):
        pairs = [(want, detections[k]) for want, k in zip(wanted, order, strict=True) if k < len(detections)]
        points = sum(0.5 * (want[0] == seen.colour) + 0.5 * (want[1] == seen.shape) for want, seen in pairs) / size
        if scene.relation:
            points = 0.75 * points + 0.25 * (len(pairs) == 2 and _related(pairs[0][1], pairs[1][1], scene.relation))
        best = max(best, points)
    return best


def _related(first: Detection, second: Detection, relation: str) -> bool:
    dx, dy = first.x - second.x, first.y - second.y
    direction_x, direction_y = RELATIONS[relation]
    along, across = (dx * direction_x, dy) if direction_x else (dy * direction_y, dx)
    return along >= 4 and along > abs(across)


def alignment(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The detector's score of images (N, 3, H, W) in [0, 1] for N prompts: (N,) float32, 1 is fully right.

    Raises:
        InputError: a prompt is not a sentence of the tiny world.
    """
    scenes = [parse(prompt) for prompt in prompts]
    return torch.tensor([judge(found, scene) for found, scene in zip(detect(images), scenes, strict=True)])


def alignment_exact(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The same, 1 where the image is fully right and 0 elsewhere: (N,) float32."""
    return (alignment(images, prompts) == 1).float()


def captions(images: Tensor, prompts: Sequence[str]) -> list[str | None]:
    """What images (N, 3, H, W) in [0, 1] show: N sentences in common words, None where an image is fully right as it is.

    None too where the detector is unsure of a shape, or no sentence of the tiny world describes all that it found.

    Raises:
        InputError: a prompt is not a sentence of the tiny world.
    """
    scenes = [parse(prompt) for prompt in prompts]
    pairs = zip(detect(images), scenes, strict=True)
    return [None if judge(found, scene) == 1 else describe(found, scene) for found, scene in pairs]


def describe(detections: Sequence[Detection], scene: Scene) -> str | None:
    """The sentence that is fully right for what was found, as near to a scene as it can be; None if there is none.

    Two objects come in the order of the scene's, with their relation if the scene has one: so as often as the prompts' own.
    """
    if not detections or any(-1 in (seen.colour, seen.shape) for seen in detections):
        return None
    nouns = {(COLOUR_WORDS[seen.colour][0], SHAPE_WORDS[seen.shape][0]) for seen in detections}
    if len(nouns) == 1 and len(detections) in COUNTS:
        ((colour, shape),) = nouns
        return f"{COUNTS[len(detections)]} {colour} {plural(shape)}"
    if len(detections) > 2:
        return None
    first, last = scene.objects[0], scene.objects[-1]
    ordered = sorted(detections, key=lambda seen: _num_wrong(seen, first) - _num_wrong(seen, last))
    relations = RELATIONS if scene.relation and len(ordered) == 2 else ()
    link = next((relation for relation in relations if _related(ordered[0], ordered[1], relation)), "and")
    return f" {link} ".join(_noun(seen) for seen in ordered)


def _num_wrong(seen: Detection, wanted: tuple[int, int]) -> int:
    return (seen.colour != wanted[0]) + (seen.shape != wanted[1])


def _noun(seen: Detection) -> str:
    colour = COLOUR_WORDS[seen.colour][0]
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {SHAPE_WORDS[seen.shape][0]}"
