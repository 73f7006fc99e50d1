"""Claims about `shapes`, the built-in data set, and its scenes."""

import hashlib

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from common import Scene, render_scene, shapes


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def linear_accuracy(features: Tensor, labels: Tensor) -> float:
    """Percent of the second half that a linear classifier, fitted to the first half, gets right."""
    half, x = len(labels) // 2, ((features - features.mean(0)) / features.std(0)).numpy()
    model = LogisticRegression(max_iter=200).fit(x[:half], labels[:half].numpy())
    return 100 * float(model.score(x[half:], labels[half:].numpy()))


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """2,000 images and their labels."""
    return shapes(2000, seed=3)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Tensor, Scene]]:
    """Wanted labels and scenes, one to six objects each."""
    source = torch.Generator().manual_seed(0)
    wanted = [torch.randint(10, (1 + i % 6,), generator=source) for i in range(24)]
    return [(labels, render_scene(labels, seed)) for seed, labels in enumerate(wanted)]


def test_frozen() -> None:
    """The generator never changes: these are its bytes, on every machine."""
    images, labels = shapes(40, seed=0)
    scene = render_scene(torch.tensor([1, 4, 9]), seed=0)
    assert digest(images) == "9d63c35556debda1000372b65f3b0e8cbedff72901713ddd9523ac9544acdb5e"
    assert digest(labels) == "d753b663fd04355735b75c03f98b393ce926bf1c7bca5047163cf35d60853298"
    assert digest(scene.image) == "0ae124206963b3ab0e8f3b920074d501b3756ed887b3adfce1797eb4de7d1860"


def test_types(data: tuple[Tensor, Tensor]) -> None:
    """Images are uint8 (n, 3, size, size), labels int64 (n,), any size."""
    assert data[0].shape == (2000, 3, 32, 32) and data[0].dtype == torch.uint8
    assert data[1].shape == (2000,) and data[1].dtype == torch.int64
    assert shapes(7, seed=0, size=64)[0].shape == (7, 3, 64, 64)


def test_balance(data: tuple[Tensor, Tensor]) -> None:
    """Every ten images in a row hold each class once, in an order that varies."""
    blocks = data[1].view(-1, 10)
    assert (blocks.sort(1).values == torch.arange(10)).all()
    assert len({tuple(block) for block in blocks.tolist()}) == len(blocks)


def test_deterministic_and_prefix(data: tuple[Tensor, Tensor]) -> None:
    """A seed always gives the same images, a smaller n the first of them, whatever the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, labels = shapes(777, seed=3)
    torch.set_num_threads(threads)
    assert torch.equal(images, data[0][:777]) and torch.equal(labels, data[1][:777])


def test_global_randomness_untouched() -> None:
    """Rendering neither reads nor moves torch's global generator."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    shapes(10, seed=0)
    render_scene(torch.tensor([0]), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_seeds_differ(data: tuple[Tensor, Tensor]) -> None:
    """No image occurs twice, neither within a seed nor in two seeds."""
    images = torch.cat([data[0], shapes(2000, seed=4)[0]])
    assert len({image.numpy().tobytes() for image in images}) == 4000


def test_labels_unrelated_to_position(data: tuple[Tensor, Tensor]) -> None:
    """The index says nothing about the label: a linear classifier on it stays at chance."""
    index = torch.arange(2000.0)
    features = torch.stack([index, index % 2, index % 10, index % 100], 1)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert linear_accuracy(features[order], data[1][order]) < 14


def test_brightness_says_little(data: tuple[Tensor, Tensor]) -> None:
    """The mean brightness carries almost no class information (chance is 10)."""
    grey = data[0].float().mean((1, 2, 3))[:, None]
    assert linear_accuracy(torch.cat([grey, grey.square()], 1), data[1]) < 16


def test_hue_says_little(data: tuple[Tensor, Tensor]) -> None:
    """Neither does the mean hue."""
    red, green, blue = data[0].float().mean((2, 3)).unbind(1)
    across, up = 2 * red - green - blue, 3**0.5 * (green - blue)
    strength = torch.sqrt(across.square() + up.square())
    features = torch.stack([across / strength, up / strength], 1)
    assert linear_accuracy(features, data[1]) < 16


def test_boxes_are_tight(scenes: list[tuple[Tensor, Scene]]) -> None:
    """Each box is the smallest that holds its mask, and lies within the image."""
    for _, scene in scenes:
        for (x1, y1, x2, y2), mask in zip(scene.boxes.tolist(), scene.masks, strict=True):
            inside = mask[y1:y2, x1:x2]
            assert inside.sum() == mask.sum() > 0
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_masks_are_disjoint(scenes: list[tuple[Tensor, Scene]]) -> None:
    """No pixel belongs to two objects."""
    assert all(scene.masks.sum(0).max() == 1 for _, scene in scenes)


def test_scene_labels(scenes: list[tuple[Tensor, Scene]]) -> None:
    """A scene holds the wanted objects in the wanted order; hidden ones are left out, and that is rare."""
    for wanted, scene in scenes:
        assert len(scene.labels) == len(scene.boxes) == len(scene.masks)
        rest = iter(wanted.tolist())
        assert all(label in rest for label in scene.labels.tolist())
    assert sum(len(scene.labels) for _, scene in scenes) >= 0.95 * sum(len(wanted) for wanted, _ in scenes)
