"""Batched augmentation: the same parameters give the same pixels as torchvision's operations one by one."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as reference
from PIL import Image
from torch import Tensor

import common

STEP = 1 / 255
IMAGENET_RATIO = (3 / 4, 4 / 3)


def random_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Floats of 8 bits, (count, 3, height, width): smooth, noisy, grey, black, white, saturated by turns."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, height, width, generator=generator)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    images[1::3] = noise[1::3]
    images[2::9] = images[2::9].mean(1, keepdim=True)
    images[5::9] = (noise[5::9] > 0.5).float()
    images[7::27], images[16::27] = 0.0, 1.0
    return (images * 255).round() / 255


def draws(count: int, seed: int = 0) -> common.Draw:
    """A source of uniform numbers, (count, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(count, *shape, generator=generator)


def random_boxes(count: int, height: int, width: int) -> Tensor:
    """Boxes (count, 4) of any place and shape inside the image; one is the whole, one a single pixel."""
    uniform = torch.rand(count, 4, generator=torch.Generator().manual_seed(1))
    size = (uniform[:, 2:] * torch.tensor([height, width])).long() + 1
    size[0], size[1] = torch.tensor([height, width]), torch.tensor([1, 1])
    corner = (uniform[:, :2] * (torch.tensor([height, width]) - size + 1)).long()
    return torch.cat([corner, size], 1)


def one_by_one(operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """operation(image, *parameters of the image) for every image, stacked."""
    rows = zip(images, *parameters, strict=True)
    return torch.stack([operation(row[0], *(value.tolist() for value in row[1:])) for row in rows])


def jitter_one(image: Tensor, factors: list[float], order: list[int]) -> Tensor:
    """torchvision's ColorJitter with given factors and order on one image."""
    operations = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for position in order:
        image = operations[position](image, factors[position])
    return image


def largest_error(result: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite for different shapes."""
    return float((result - expected).abs().max()) if result.shape == expected.shape else float("inf")


# ---- geometry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 56, 24), (21, 17, 64)])
def test_resized_crop_equals_torchvision(height: int, width: int, size: int) -> None:
    """Any box, larger or smaller than the target, gives torchvision's antialiased bilinear pixels."""
    images, boxes = random_images(40, height, width), random_boxes(40, height, width)
    expected = one_by_one(lambda image, box: reference.resized_crop(image, *box, [size, size]), images, boxes)
    assert largest_error(common.resized_crop(images, boxes, size), expected) < 1e-5
    bytes_ = (images * 255).round().byte()
    assert largest_error(common.resized_crop(bytes_, boxes, size), expected) < 1e-5


def test_resized_crop_equals_pil() -> None:
    """Pillow's own 8-bit resize of a cropped image agrees within two steps of 8 bits."""
    images, boxes = (random_images(40, 48, 36) * 255).byte(), random_boxes(40, 48, 36)
    result = common.resized_crop(images, boxes, 32)
    for image, (top, left, height, width), ours in zip(images, boxes.tolist(), result, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        cropped = picture.crop((left, top, left + width, top + height))
        theirs = np.array(cropped.resize((32, 32), Image.Resampling.BILINEAR))
        assert largest_error(ours, torch.from_numpy(theirs).permute(2, 0, 1) / 255) < 2.01 * STEP


def test_flip_mirrors_only_the_marked_images() -> None:
    """A flip is torchvision's, and the other images stay as they are."""
    images, where = random_images(8, 20, 24), torch.arange(8) % 3 == 0
    flipped = common.random_flip(images, lambda: 1 - where.float())
    assert torch.equal(flipped[where], reference.horizontal_flip(images[where]))
    assert torch.equal(flipped[~where], images[~where])


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 40), (33, 33)])
def test_resize_center_crop_equals_torchvision(height: int, width: int) -> None:
    """Shorter side to 37, central 32 x 32, enlarging or reducing: torchvision's Resize and CenterCrop."""
    images = random_images(6, height, width)
    expected = reference.center_crop(reference.resize(images, [37]), [32])
    assert largest_error(common.resize_center_crop(images, 37, 32), expected) < 1e-5
    bytes_ = (images * 255).round().byte()
    assert largest_error(common.resize_center_crop(bytes_, 37, 32), expected) < 1e-5


def test_boxes_follow_torchvisions_distribution() -> None:
    """Mean and spread of place, area and aspect agree with RandomResizedCrop's over many draws."""
    count = 3000
    for height, width, scale in [(32, 32, (0.2, 1.0)), (96, 50, (0.08, 1.0))]:
        crop = transforms.RandomResizedCrop(8, scale, IMAGENET_RATIO)
        torch.manual_seed(0)
        image = torch.zeros(3, height, width)
        theirs = torch.tensor([list(crop.make_params([image]).values()) for _ in range(count)]).double()
        ours = common.crop_boxes(draws(count)(22), height, width, scale, IMAGENET_RATIO).double()
        sides = torch.full((count,), height), torch.full((count,), width)
        assert torch.equal(ours, common.crop_boxes(draws(count)(22), *sides, scale, IMAGENET_RATIO).double())
        for boxes in (ours, theirs):
            box_height, box_width = boxes[:, 2].clone(), boxes[:, 3].clone()
            boxes[:, 2], boxes[:, 3] = box_height * box_width, box_width / box_height
        tolerance = 4 * theirs.std(0) * (2 / count) ** 0.5
        assert ((ours.mean(0) - theirs.mean(0)).abs() < tolerance).all()
        assert ((ours.std(0) / theirs.std(0) - 1).abs() < 0.08).all()


def test_boxes_lie_inside_images_of_any_size() -> None:
    """Every box is inside its own image and at least one pixel large, up to the largest number below 1."""
    sides = torch.randint(1, 700, (2, 4000), generator=torch.Generator().manual_seed(0))
    uniform = draws(4000)(22)
    uniform[:100] = 1 - 2**-24
    uniform[100:200] = 0
    boxes = common.crop_boxes(uniform, sides[0], sides[1], (0.08, 1.0), IMAGENET_RATIO)
    assert boxes.dtype == torch.int64
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sides.T).all()


@pytest.mark.parametrize(("height", "width"), [(20, 400), (400, 21), (10, 11)])
def test_boxes_fall_back_to_the_centre(height: int, width: int) -> None:
    """Where ten tries fail the box is torchvision's: central, of the nearest allowed ratio."""
    crop = transforms.RandomResizedCrop(8, (3.0, 3.0), IMAGENET_RATIO)
    theirs = list(crop.make_params([torch.zeros(3, height, width)]).values())
    ours = common.crop_boxes(draws(5)(22), height, width, (3.0, 3.0), IMAGENET_RATIO)
    assert ours.tolist() == [theirs] * 5


# ---- colour ------------------------------------------------------------------------------------------------


def test_hue_equals_torchvision() -> None:
    """A turn of hue by any amount equals torchvision's, for grey and saturated pixels too."""
    images = random_images(54, 16, 16)
    shift = torch.linspace(-0.5, 0.5, 54)
    expected = one_by_one(reference.adjust_hue, images, shift)
    assert largest_error(common.shift_hue(images, shift), expected) < 1e-5


def test_color_jitter_equals_torchvision_in_all_orders() -> None:
    """Brightness, contrast, saturation and hue in each of the 24 orders give torchvision's pixels."""
    orders = torch.tensor(list(permutations(range(4)))).repeat(3, 1)
    images = random_images(len(orders), 16, 16)
    uniform = draws(len(orders))(4)
    factors = torch.cat([2 * uniform[:, :3], uniform[:, 3:] - 0.5], 1)
    expected = one_by_one(jitter_one, images, factors, orders)
    assert largest_error(common.color_jitter(images, factors, orders), expected) < STEP / 10


@pytest.mark.parametrize("changed", range(4))
def test_color_jitter_by_one_factor(changed: int) -> None:
    """One factor away from its neutral value is that one operation of torchvision, whatever the order."""
    orders = torch.tensor(list(permutations(range(4))))
    factors = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(24, 1)
    factors[:, changed] = torch.linspace(0.3, 0.5, 24) if changed == 3 else torch.linspace(0, 2, 24)
    images = random_images(24, 16, 16)
    expected = one_by_one(jitter_one, images, factors, orders)
    assert largest_error(common.color_jitter(images, factors, orders), expected) < 1e-5


def test_grayscale_equals_torchvision_for_the_marked_images() -> None:
    """Marked images get three equal channels of torchvision's weights; the others stay as they are."""
    images, where = random_images(12, 8, 8), torch.arange(12) % 2 == 0
    result = common.random_grayscale(images, lambda: 1 - where.float(), 0.5)
    assert largest_error(result[where], reference.rgb_to_grayscale(images[where], 3)) < 1e-6
    assert torch.equal(result[~where], images[~where])


@pytest.mark.parametrize(("height", "width", "kernel_size"), [(32, 32, 5), (24, 40, 23), (9, 12, 3)])
def test_blur_equals_torchvision(height: int, width: int, kernel_size: int) -> None:
    """Each image's own sigma gives torchvision's blur, reflected borders included."""
    images, sigma = random_images(12, height, width), torch.linspace(0.1, 3.0, 12)
    expected = one_by_one(lambda image, s: reference.gaussian_blur(image, kernel_size, [s]), images, sigma)
    assert largest_error(common.gaussian_blur(images, sigma, kernel_size), expected) < 1e-5


@pytest.mark.parametrize("side", [1, 2, 5, 11, 12])
def test_blur_wider_than_the_image(side: int) -> None:
    """A kernel that reaches past the far border meets the image's reflection there, as NumPy pads it, again and again.

    torchvision refuses such images; CLD's kernel of 23 px is this wide below 12 px.
    """
    images, sigma = random_images(2, side, side), torch.tensor([0.5, 20.0])
    weights = torch.softmax(-0.5 * (torch.arange(-11, 12) / sigma[:, None]).square(), 1)
    mode: Any = "reflect" if side > 1 else "edge"
    padded = torch.from_numpy(np.pad(images.numpy(), [(0, 0)] * 2 + [(11, 11)] * 2, mode=mode))
    windows = padded.unfold(2, 23, 1).unfold(3, 23, 1)
    expected = torch.einsum("bchwij,bi,bj->bchw", windows, weights, weights)
    assert largest_error(common.gaussian_blur(images, sigma, 23), expected) < 1e-5


def test_normalize_equals_torchvision() -> None:
    """Channels are shifted and scaled as in torchvision."""
    images, mean, std = random_images(6, 8, 8), (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = reference.normalize(images, list(mean), list(std))
    assert largest_error(common.normalize(images, mean, std), expected) < 1e-5


# ---- chains and draws --------------------------------------------------------------------------------------


def recipe(images: Tensor, draw: common.Draw) -> Tensor:
    """Every random operation, one after the other."""
    boxes = common.crop_boxes(draw(common.CROP_NUMBERS), *images.shape[2:], (0.2, 1.0))
    images = common.random_flip(common.resized_crop(images, boxes, 24), draw)
    images = common.random_color_jitter(images, draw, 0.4, 0.4, 0.4, 0.4, probability=0.8)
    images = common.random_grayscale(images, draw, 0.2)
    images = common.random_blur(images, draw, (0.1, 2.0), 5, probability=0.5)
    return common.random_flip(images, draw)


def test_chain_equals_torchvision_in_all_orders() -> None:
    """Crop, flip, jitter in each of the 24 orders, grey and blur in a row stay within one step of 8 bits."""
    orders = torch.tensor(list(permutations(range(4)))).repeat(2, 1)
    count = len(orders)
    images, boxes, uniform = random_images(count, 40, 36), random_boxes(count, 40, 36), draws(count)(7)
    factors = torch.cat([0.6 + 0.8 * uniform[:, :3], 0.8 * uniform[:, 3:4] - 0.4], 1)
    flip, grey, sigma = uniform[:, 4] < 0.5, uniform[:, 5] < 0.2, 0.1 + 1.9 * uniform[:, 6]

    expected = one_by_one(lambda image, box: reference.resized_crop(image, *box, [24, 24]), images, boxes)
    expected = torch.where(common.per_image(flip), expected.flip(3), expected)
    expected = one_by_one(jitter_one, expected, factors, orders)
    expected = torch.where(common.per_image(grey), reference.rgb_to_grayscale(expected, 3), expected)
    expected = one_by_one(lambda image, s: reference.gaussian_blur(image, 5, [s]), expected, sigma)
    ours = common.random_flip(common.resized_crop(images, boxes, 24), lambda: uniform[:, 4])
    ours = common.random_grayscale(common.color_jitter(ours, factors, orders), lambda: uniform[:, 5], 0.2)
    assert largest_error(common.gaussian_blur(ours, sigma, 5), expected) < STEP


def test_neutral_parameters_change_no_bit() -> None:
    """The whole box, factors 1 and hue 0, probability 0: the same bits out as in."""
    images = random_images(30, 32, 32)
    whole = torch.tensor([0, 0, 32, 32]).repeat(30, 1)
    assert torch.equal(common.resized_crop(images, whole, 32), images)
    assert torch.equal(common.resized_crop((images * 255).round().byte(), whole, 32), images)
    assert torch.equal(common.resize_center_crop(images, 32, 32), images)
    factors, order = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(30, 1), torch.rand(30, 4).argsort(1)
    assert torch.equal(common.color_jitter(images, factors, order), images)
    draw = draws(30)
    assert torch.equal(common.random_color_jitter(images, draw, 0.4, 0.4, 0.4, 0.4, probability=0), images)
    assert torch.equal(common.random_color_jitter(images, draw, 0, 0, 0, 0), images)
    assert torch.equal(common.random_grayscale(images, draw, 0), images)
    assert torch.equal(common.random_blur(images, draw, (0.1, 2.0), 5, 0), images)


def test_probability_one_changes_every_image() -> None:
    """With probability 1 no image is left out."""
    images = random_images(30, 16, 16)[1::3]
    images = images[images.flatten(1).std(1) > 0]
    draw = draws(len(images))
    assert torch.equal(common.random_grayscale(images, draw, 1), common.luma(images).expand_as(images))
    for result in (
        common.random_blur(images, draw, (1.0, 2.0), 5, 1),
        common.random_color_jitter(images, draw, 0.4, 0.4, 0.4, 0.4, probability=1),
    ):
        assert ((result - images).flatten(1).abs().amax(1) > STEP).all()


def test_every_key_has_a_stream_of_its_own() -> None:
    """Keys that differ in a number, a name, their order, or only in where one part ends draw different numbers."""
    keys: list[tuple[int | str, ...]] = [
        (0, "a", 1, 11), (0, "a", 11, 1), (0, "a", 1, 1, 1), (0, "a", 111), (0, "a1", 11), (0, "b", 1, 11),
        (1, "a", 1, 11), (0, "a", "1", 11), (0, 1, "a", 11),
    ]
    assert len({torch.rand(1, generator=common.generator(*key)).item() for key in keys}) == len(keys)
    again = (torch.rand(3, generator=common.generator(0, "a", 1, 11)) for _ in range(2))
    assert torch.equal(*again)


@pytest.mark.parametrize("operation", ["jitter", "blur"])
def test_the_drawn_share_is_changed_whole(operation: str) -> None:
    """Images that a number of their own draws get what all get with probability 1, others nothing; sigma is uniform."""
    images = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def changed(probability: float) -> Tensor:
        if operation == "jitter":
            return common.random_color_jitter(images, draws(300), 0.4, 0.4, 0.4, 0.1, probability)
        return common.random_blur(images, draws(300), (0.1, 2.0), 5, probability)

    marked = draws(300)(9 if operation == "jitter" else 2)[:, -1] < 0.4
    torch.testing.assert_close(changed(0.4), common.choose(marked, changed(1.0), images), rtol=0, atol=1e-6)
    assert 90 < int(marked.sum()) < 150
    if operation == "blur":
        expected = common.gaussian_blur(images, 0.1 + 1.9 * draws(300)(2)[:, 0], 5)
        torch.testing.assert_close(changed(1.0), expected, rtol=0, atol=1e-6)


def test_images_of_a_batch_draw_for_themselves() -> None:
    """A batch of one image repeated comes out as different images, and half of the flips are drawn."""
    images = random_images(1, 32, 32).expand(200, -1, -1, -1)
    assert len(torch.unique(recipe(images, draws(200)).flatten(1), dim=0)) == 200
    flipped = (common.random_flip(images, draws(200)) != images).flatten(1).any(1)
    assert 70 < int(flipped.sum()) < 130


def test_jitter_draws_follow_torchvision() -> None:
    """Factors are uniform in [max(0, 1 - b), 1 + b], hue in [-h, h], all 24 orders are as frequent, and each is drawn
    for itself."""
    count, seen = 4000, []
    images = torch.zeros(count, 3, 1, 1)
    original = common.color_jitter
    try:
        common.color_jitter = lambda _, *parameters: seen.append(parameters)  # type: ignore[assignment]
        common.random_color_jitter(images, draws(count), 0.4, 1.5, 0.2, 0.3)
    finally:
        common.color_jitter = original
    factors, order = seen[0]
    low, high = torch.tensor([0.6, 0, 0.8, -0.3]), torch.tensor([1.4, 2.5, 1.2, 0.3])
    unit = (factors - low) / (high - low)
    assert float(unit.min()) > -1e-6 and float(unit.max()) < 1 + 1e-6
    assert (
        float((unit.mean(0) - 1 / 2).abs().max()) < 0.02 and float((unit.var(0) - 1 / 12).abs().max()) < 0.01
    )
    orders, times = torch.unique(order, dim=0, return_counts=True)
    assert len(orders) == 24 and int(times.min()) > count / 24 / 2
    assert float(torch.corrcoef(torch.cat([unit, order], 1).T)[:4].fill_diagonal_(0).abs().max()) < 0.08


def test_result_does_not_depend_on_the_neighbours() -> None:
    """Part of a batch with its part of the draws gives the pixels it has in the whole batch."""
    images = random_images(48, 32, 32)

    def part_of_draws(part: slice) -> common.Draw:
        draw = draws(48)
        return lambda *shape: draw(*shape)[part]

    whole = recipe(images, draws(48))
    for part in (slice(0, 1), slice(7, 30), slice(None, None, 2)):
        assert torch.equal(recipe(images[part], part_of_draws(part)), whole[part])


def test_autocast_costs_no_precision() -> None:
    """Inside an autocast region the pixels are the same."""
    images = random_images(8, 32, 32)
    plain = recipe(images, draws(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recipe(images, draws(8)), plain)


def test_operations_take_any_memory_format_and_keep_their_input() -> None:
    """Channels-last input gives the same pixels, and no operation writes into its input."""
    images = random_images(8, 32, 32)
    before = images.clone()
    plain = recipe(images, draws(8))
    assert torch.equal(images, before)
    last = recipe(images.contiguous(memory_format=torch.channels_last), draws(8))
    assert largest_error(last, plain) < 1e-5
