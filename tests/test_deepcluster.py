"""DeepCluster: each step against a slow reference, what it does with poor input, and runs that stop and go on."""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Rank
from PIL import Image
from torch import Tensor

import common
import deepcluster as dc

TINY = ["--preset", "smoke", "--subset", "64", "--batch-size", "16", "--image-size", "16",
        "--k", "8", "--device", "cpu", "--knn-every", "0"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit_rows(n: int, d: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=seeded(seed)))


def blobs(sizes: list[int], d: int = 8, spread: float = 0.02) -> Tensor:
    """Unit rows in tight groups around orthogonal directions."""
    centers = torch.eye(d)[: len(sizes)].repeat_interleave(torch.tensor(sizes), 0)
    return F.normalize(centers + spread * torch.randn(len(centers), d, generator=seeded()))


def same_partition(a: Tensor, b: Tensor) -> bool:
    """Whether two labellings are the same up to the names of the clusters."""
    pairs = len(torch.unique(torch.stack([a.long(), b.long()]), dim=1).T)
    return pairs == len(torch.unique(a)) == len(torch.unique(b))


# ---- presets and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", dc.PRESETS)
def test_presets_parse(preset: str) -> None:
    """Every preset names options that exist; the five models have the values of Table 5.1."""
    args = dc.parse_args(["--preset", preset])
    table = {
        "pic-imagenet-sobel": ("pic", True, 0.05, 1e-5, 500),
        "kmeans-imagenet-sobel": ("kmeans", True, 0.02, 1e-5, 500),
        "kmeans-imagenet-rgb": ("kmeans", False, 0.02, 1e-6, 500),
        "kmeans-flickr1m-sobel": ("kmeans", True, 0.02, 1e-5, 167),
        "kmeans-flickr2m-sobel": ("kmeans", True, 0.02, 1e-5, 167),
    }
    if preset in table:
        assert (args.clustering, args.sobel, args.lr, args.weight_decay, args.epochs) == table[preset]
        assert (args.arch, args.batch_size, args.schedule, args.dropout) == ("alexnet_bn", 256, "constant", 0.5)
        assert args.num_clusters == (1000 if preset.endswith("rgb") else 10_000)


CHAPTER_4: dict[str, dict[str, Any]] = {
    "fig4.1-labels": dict(clustering="labels", sobel=False, cluster_pool=False),
    "fig4.2-no-relu": dict(clustering="pic", head="no-relu", descriptors="after", sobel=True),
    "fig4.2-2fc": dict(clustering="pic", head="2fc", descriptors="after"),
    "table4.1-pic-after": dict(clustering="pic", descriptors="after", epochs=85),
    "table4.1-k100-before": dict(clustering="kmeans", num_clusters=100, descriptors="before", epochs=85),
    "table4.1-k10000-after": dict(clustering="kmeans", num_clusters=10_000, descriptors="after", epochs=85),
    "fig4.4-vertical-flip": dict(clustering="pic", flip="vertical", crop="random-sized", min_crop=0.08, epochs=50),
    "fig4.4-central-crop": dict(clustering="pic", flip="horizontal", crop="central", epochs=50),
    "fig4.5-30": dict(clustering="pic", reassign_every=30, updates_per_epoch=None),
    "fig4.6-vgg16-rgb": dict(clustering="pic", arch="vgg16_bn", sobel=False, epochs=50),
    "fig4.6-resnet101-sobel": dict(clustering="pic", arch="resnet101", sobel=True, epochs=50),
    "fig4.7-drop": dict(clustering="pic", singletons="drop", sobel=False, epochs=20),
    "table4.2-512": dict(clustering="labels", targets_per_step=512, sampling="images", sobel=True, epochs=90),
    "table4.3-4096": dict(clustering="pic", targets_per_step=4096, sigma=0.2, num_neighbors=5),
    "fig4.9-flickr1m": dict(updates_per_epoch=5005, images_per_epoch=None),
    "fig4.9-flickr2m-pool": dict(updates_per_epoch=5005, images_per_epoch=1_200_000, cluster_pool=True),
    "fig4.10-10m-100000": dict(updates_per_epoch=1170, images_per_epoch=100_000, cluster_pool=False),
    "fig4.10-1m-1000000": dict(updates_per_epoch=11_700, images_per_epoch=1_000_000, cluster_pool=False),
    "kmeans-flickr2m-sobel": dict(updates_per_epoch=3 * 5005),
    "imagenet-resnet18-a": dict(arch="resnet18", head="map", num_clusters=10_000),
    "imagenet-resnet50-b": dict(arch="resnet50", head="full", num_clusters=10_000),
}


@pytest.mark.parametrize("preset", CHAPTER_4)
def test_ablations(preset: str) -> None:
    """The ablations of chapter 4 and the ResNets of Local Aggregation have what their text says."""
    args = vars(dc.parse_args(["--preset", preset]))
    assert {name: args[name] for name in CHAPTER_4[preset]} == CHAPTER_4[preset]


def fitted(images: int, *options: str) -> tuple[int, int]:
    args = dc.parse_args(["--preset", "imagenet", *options])
    dc.fit_sizes(args, images)
    return args.num_clusters, args.feature_dim


def test_sizes_that_do_not_fit() -> None:
    """A typed k or number of neighbours above that of images is an error; sizes of presets are lowered, typed not."""
    with pytest.raises(common.Fault, match="--k 101 is more than the 100 images"):
        fitted(100, "--k", "101")
    with pytest.raises(common.Fault, match="--num-neighbors 100: an image has 99 others"):
        fitted(100, "--clustering", "pic", "--num-neighbors", "100")
    fitted(100, "--clustering", "pic", "--num-neighbors", "99")
    assert fitted(101, "--k", "101", "--feature-dim", "90") == (101, 90)
    assert fitted(1000) == (50, 100)
    assert fitted(5000) == (250, 256)
    assert fitted(1_281_167) == (10_000, 256)
    assert fitted(100_000)[0] == 10_000 and fitted(99_999)[0] == 4999  # under ten images a cluster


def test_a_default_is_not_lowered_to_one_cluster() -> None:
    """Of a few images two clusters are made, unless one is asked for: with one there is nothing to tell apart."""
    assert [fitted(images)[0] for images in (39, 20, 2, 1)] == [2, 2, 2, 1]
    assert fitted(39, "--k", "1")[0] == 1


@pytest.mark.parametrize("options", [
    "--arch alexnet_bn --head map", "--kmeans faiss --empties half", "--cluster-pool",
    "--clustering labels --images-per-epoch 32",
])
def test_options_that_exclude_each_other(options: str) -> None:
    """An option that cannot have an effect is an error."""
    with pytest.raises(common.Fault):
        dc.parse_args(["--preset", "smoke", *options.split()])


# ---- augmentation ----------------------------------------------------------------------------------------------------


def test_flips() -> None:
    """Section 4.3: half of the images mirrored from left to right, or upside down, or none."""
    images = torch.rand(400, 3, 6, 6, generator=seeded())
    draw = common.Draw(seeded(), 400, slice(0, 400), common.CPU)
    assert torch.equal(dc.augment(images, draw, "no", 6), images)
    for flip, axis in (("horizontal", 3), ("vertical", 2)):
        found = dc.augment(images, draw, flip, 6)
        mirrored = (found == images.flip(axis)).flatten(1).all(1)
        assert 150 < int(mirrored.sum()) < 250 and torch.equal(found[~mirrored], images[~mirrored])


def crops_of(data: common.ImageSet, *options: str) -> tuple[common.Crop, Tensor]:
    """What is cut, and the boxes (200, 4) of it in images of the data's size."""
    crop = dc.training_crop(dc.parse_args(["--preset", "smoke", *options]), data)
    height, width = (256, 341) if data.pixels is None else data.pixels.shape[2:]
    uniform = torch.rand(200, common.CROP_NUMBERS, generator=seeded())
    return crop, common.crop_boxes(uniform, height, width, *crop[1:]).double()


def test_crops() -> None:
    """Section 4.3: of random size from --min-crop on and random ratio, of one size at random places, or central."""
    photographs = dataclasses.replace(image_set(4), size=224, pixels=None)
    for least in (0.08, 0.5):
        crop, boxes = crops_of(photographs, "--min-crop", str(least))
        area, ratio = boxes[:, 2] * boxes[:, 3] / 256 / 341, boxes[:, 3] / boxes[:, 2]
        assert crop.size == 224 and least - 0.01 < area.min() < least + 0.05 and 0.9 < area.max() <= 1
        assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.34
    crop, boxes = crops_of(photographs, "--crop", "random")
    assert crop.size == 224 and (boxes[:, 2:] == 224).all() and boxes[:, 0].unique().numel() > 25
    crop, boxes = crops_of(photographs, "--crop", "central")
    assert crop.size == 256 and torch.equal(boxes.unique(dim=0), torch.tensor([[0.0, 42, 256, 256]]).double())
    for side in (8, 32):
        small = image_set(4, side)
        crop, boxes = crops_of(small, "--crop", "central")
        assert crop.size == side and torch.equal(boxes.unique(dim=0), torch.tensor([[0.0, 0, side, side]]).double())


@pytest.mark.parametrize("side", [(32, 32), (256, 455), (1920, 1080)])
def test_random_crops_of_any_format(side: tuple[int, int]) -> None:
    """--crop random is Resize(256) and RandomCrop(224): 7/8 of the shorter side, at any place, of any format."""
    crop = dc.training_crop(dc.parse_args(["--crop", "random"]), image_set(4))
    top, left, height, width = common.crop_boxes(torch.rand(2000, 22, generator=seeded()), *side, *crop[1:]).T
    assert (height == round(min(side) * 7 / 8)).all() and torch.equal(height, width)
    for place, free in ((top, side[0] - height), (left, side[1] - width)):
        assert place.min() <= 0.02 * free[0] and place.max() >= 0.98 * free[0]


@pytest.mark.parametrize("held", [True, False])
def test_central_crops_are_those_of_the_descriptors(held: bool, tmp_path: Path) -> None:
    """--crop central trains on what descriptors are made of: of a photograph the middle of its central square."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 12, 18, 3), dtype=np.uint8)
    folder = folder_of(tmp_path / "data", [np.kron(image, np.ones((16, 16, 1), np.uint8)) for image in noise])
    args = dc.parse_args(["--preset", "smoke", "--data", str(folder), "--subset", "4", "--image-size", "112",
                          "--crop", "central", "--flip", "no", "--batch-size", "4", "--workers", "0"])
    data = common.load(args, "pretrain", common.CPU)
    if held:
        pixels = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in sorted(folder.iterdir())]
        data = dataclasses.replace(data, pixels=torch.stack(pixels), files=None)
    run: Any = Rank()
    run.args, run.cuts, run.graphed = args, {}, lambda function, small: function
    (_, _, (cut,)), *_ = data.batches(run, torch.arange(4), dc.training_crop(args, data), 0)
    draw = common.Draw(seeded(), 4, slice(0, 4), common.CPU)
    (center,) = data.centers(torch.arange(4), 4, common.CPU)
    torch.testing.assert_close(dc.augment(cut, draw, "no", data.size), center, atol=0.02, rtol=0)


# ---- model -----------------------------------------------------------------------------------------------------------


def test_sobel_of_a_constant_is_zero_inside() -> None:
    """Property 6: no gradient away from the border, zeros beyond it, no parameters, no weights; right on a ramp."""
    sobel = common.Sobel()
    constant = sobel(torch.full((2, 3, 9, 9), 0.7))
    assert constant[:, :, 1:-1, 1:-1].abs().max() < 1e-6
    torch.testing.assert_close(constant[:, 0, 1:-1, 0], torch.full((2, 7), -2.8))
    assert not list(sobel.parameters()) and not sobel.state_dict()
    ramp = torch.arange(7.0).expand(1, 3, 7, 7)  # grows by 1 a pixel to the right
    x, y = sobel(ramp)[0, :, 1:-1, 1:-1]
    assert torch.equal(x.abs(), torch.full((5, 5), 8.0)) and not y.any()
    assert torch.equal(sobel(ramp.transpose(2, 3))[0, 1, 1:-1, 1:-1], x.T)


@pytest.mark.parametrize("sobel", [True, False])
@pytest.mark.parametrize("width", [2, 4])  # layers of two channels are no Sobel filter
@pytest.mark.parametrize("arch", ["alexnet_bn", "resnet18"])
def test_sobel_survives_save_and_load(arch: str, width: int, sobel: bool, tmp_path: Path) -> None:
    """A backbone that was trained on gradients is loaded with its Sobel filter, by any evaluation, others without."""
    encoder = dc.Encoder(arch, width, True, 32, "full" if arch == "alexnet_bn" else "pooled", sobel, 0.0).eval()
    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pth")
    loaded = common.load_encoder(tmp_path / "backbone.pth", arch, width)
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        assert torch.equal(loaded.backbone(images), encoder.backbone(images))


@pytest.mark.parametrize("sobel", [False, True])
@pytest.mark.parametrize(("arch", "head"), [
    *itertools.product(("alexnet", "vgg16_bn", "alexnet_bn_fc"), ("full", "2fc", "no-relu")),
    *itertools.product(("resnet18", "resnet50"), ("full", "2fc", "no-relu", "map", "pooled")),
])
def test_every_head_is_read_by_the_evaluations(arch: str, head: str, sobel: bool, tmp_path: Path) -> None:
    """Checkpoint and backbone.pth of any head: no weight is missing, and the backbone computes what it computed."""
    encoder = dc.Encoder(arch, 4, True, 32, head, sobel, 0.5).eval()
    torch.save(encoder.backbone.state_dict(), tmp_path / "backbone.pth")
    torch.save(dict(options=dict(arch=arch, width=4, head=head, script="deepcluster"), data=dict(small=True),
                    state=dict(encoder=encoder.state_dict())), tmp_path / "checkpoint.pth")
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    for name, said in (("checkpoint.pth", None), ("backbone.pth", arch)):
        loaded = common.load_encoder(tmp_path / name, said, 4)
        assert loaded.report["missing"] == [] and loaded.head is None
        assert all(name.startswith("mlp.") for name in loaded.report["unexpected"])
        with torch.no_grad():
            torch.testing.assert_close(loaded.backbone(images), encoder.backbone(images), atol=1e-7, rtol=1e-4)


def test_a_lost_fc6_is_refused(tmp_path: Path) -> None:
    """A plain network may end with fc6, but not without it, nor with half of a layer."""
    weights = common.backbone("alexnet_bn", 4, True).state_dict()
    for lost in (["classifier.1.weight", "classifier.4.weight"], ["classifier.1.weight"]):
        torch.save({name: w for name, w in weights.items() if name not in lost}, tmp_path / "file.pth")
        with pytest.raises(common.Fault, match=r"% of the weights"):
            common.load_encoder(tmp_path / "file.pth", "alexnet_bn", 4)


@pytest.mark.parametrize(
    ("arch", "head", "size", "dim"),
    [("alexnet_bn", "full", 32, 256), ("alexnet_bn", "2fc", 32, 256), ("vgg16_bn", "no-relu", 32, 256),
     ("alexnet", "2fc", 32, 256), ("vgg16_bn_fc", "2fc", 32, 256),
     ("resnet18", "pooled", 32, 32), ("resnet18", "map", 32, 512), ("resnet18", "map", 224, 32 * 49),
     ("resnet50", "map", 96, 128 * 9), ("resnet18", "map", 20, 32 * 9), ("resnet18", "full", 72, 256),
     ("resnet18", "full", 32, 256), ("resnet18", "2fc", 48, 256)],
)
def test_heads(arch: str, head: str, size: int, dim: int) -> None:
    """Descriptors have the announced size, and negative numbers unless they are a ResNet's own output."""
    encoder = dc.Encoder(arch, 4, size < 64, size, head, False, 0.5).eval()
    with torch.no_grad():
        h = encoder(torch.randn(2, 3, size, size, generator=seeded()))
    assert h.shape == (2, dim) and encoder.dim == dim
    hidden = head not in ("map", "pooled")
    assert bool((h < 0).any()) == hidden
    assert bool((encoder.activate(h) < 0).any()) == (head == "no-relu")
    linear = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == {"full": 2, "2fc": 1, "no-relu": 2, "map": 0, "pooled": 0}[head]


def test_reset_of_the_last_layer() -> None:
    """Property 8: zero features give zero logits, the weights are N(0, 0.01), the trunk's momentum is not touched."""
    encoder, top = torch.nn.Linear(6, 5), dc.TopLayer(5, torch.device("cpu"))
    optimizer = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9)
    top.reset(4, seeded())
    F.cross_entropy(top(encoder(torch.randn(8, 6))), torch.arange(8) % 4).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in encoder.parameters()]
    top.reset(2000, seeded(1))
    assert not top(torch.zeros(3, 5)).any() and abs(float(top.weight.detach().std()) - 0.01) < 3e-4
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m)
               for p, m in zip(encoder.parameters(), momentum, strict=True))
    other = dc.TopLayer(5, torch.device("cpu"))
    other.load_state_dict(top.state_dict())
    assert torch.equal(other.weight, top.weight)


def test_dropout() -> None:
    """As PyTorch's, but by given numbers: those below p drop a unit, the others are scaled; p = 1 drops all."""
    numbers = torch.rand(64, 10, generator=seeded())
    x = torch.randn(64, 10, generator=seeded(1), requires_grad=True)
    for p in (0.0, 0.3, 1.0):
        layer = dc.Dropout(p)
        layer.uniform = lambda dim: numbers[:, :dim]
        expected = torch.where(numbers >= p, x / max(1 - p, 1e-9), 0)
        torch.testing.assert_close(layer(x), expected)
        gradient = torch.autograd.grad(layer(x).sum(), x)[0]
        assert gradient.isfinite().all() and torch.equal(layer.eval()(x), x)
    for arch, head, count in (("alexnet_bn", "full", 2), ("vgg16_bn", "full", 1), ("alexnet_bn", "2fc", 1),
                              ("resnet18", "full", 2), ("resnet18", "2fc", 1), ("resnet18", "map", 0)):
        modules = [*dc.Encoder(arch, 4, True, 32, head, False, 0.5).modules()]
        found = [module for module in modules if isinstance(module, torch.nn.Dropout)]
        assert len(found) == count and all(type(module) is dc.Dropout and module.p == 0.5 for module in found)


def test_numbers_of_dropout() -> None:
    """Parts of a step on any rank are rows of the same numbers; each step and each call has others."""

    def numbers(world: int, rank: int, accumulate: int, part: int, step: int = 3) -> Tensor:
        run: Any = Rank(rank, world)
        run.args = argparse.Namespace(seed=0, batch_size=16, accumulate=accumulate)
        uniform = dc.dropout_numbers(run, 2, step, part)
        return torch.cat([uniform(10), uniform(10)], 1)

    whole = numbers(1, 0, 1, 0)
    assert whole.shape == (16, 20) and len(whole.unique()) > 310 and not torch.equal(whole, numbers(1, 0, 1, 0, step=4))
    for world, accumulate in ((2, 1), (1, 4), (2, 2)):
        parts = [numbers(world, rank, accumulate, part) for rank in range(world) for part in range(accumulate)]
        assert torch.equal(torch.cat(parts), whole)


def test_last_layer_has_plain_sgd() -> None:
    """A step of the last layer is torch.optim.SGD without momentum."""
    top, twin = dc.TopLayer(5, torch.device("cpu")), torch.nn.Linear(5, 7)
    top.reset(7, seeded())
    twin.load_state_dict(top.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), 0.3, weight_decay=0.01)
    x, y = torch.randn(16, 5, generator=seeded()), torch.arange(16) % 7
    for layer in (top, twin):
        F.cross_entropy(layer(x), y).backward()  # type: ignore[no-untyped-call]
    top.step(0.3, 0.01)
    optimizer.step()
    torch.testing.assert_close(top.weight, twin.weight)
    torch.testing.assert_close(top.bias, twin.bias)


# ---- descriptors -----------------------------------------------------------------------------------------------------


def projected(h: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, float]:
    projection, offset, variance, _ = dc.pca_whiten(*dc.moments(torch.split(h, 64), h.shape[1], h.device), dim)
    return dc.whiten(h, projection, offset), projection, offset, variance


@pytest.mark.parametrize(("n", "d", "dim"), [(500, 40, 16), (500, 40, 64), (30, 40, 256)])
def test_whitened_covariance_is_the_identity(n: int, d: int, dim: int) -> None:
    """Property 7, and the projection is that of a float64 SVD up to signs; min(dim, d, N - 1) numbers are kept."""
    h = torch.randn(n, d, generator=seeded()) @ torch.randn(d, d, generator=seeded(1)) + 5
    x, projection, offset, variance = projected(h, dim)
    keep = min(dim, d, n - 1)
    white = h.double() @ projection - offset
    assert x.shape == (n, keep)
    torch.testing.assert_close(white.T @ white / n, torch.eye(keep, dtype=torch.float64), atol=1e-6, rtol=0)
    centred = h.double() - h.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    agreement = (u[:, :keep].T @ white / n**0.5).abs()
    torch.testing.assert_close(agreement, torch.eye(keep, dtype=torch.float64), atol=1e-5, rtol=0)
    assert variance == pytest.approx(float(s[:keep].square().sum() / s.square().sum()))
    torch.testing.assert_close(x.norm(dim=1), torch.ones(n))


@pytest.mark.parametrize(("smallest", "mean", "precision"), [(0.1, 1.0, torch.float32), (1e-4, 1.0, torch.float64),
                                                            (0.1, 10.0, torch.float32), (0.1, 1e3, torch.float64)])
def test_precision_follows_the_descriptors(smallest: float, mean: float, precision: torch.dtype) -> None:
    """Small directions and long means get products of float64; both ways the descriptors are white to 1e-3."""
    scale = torch.logspace(0, math.log10(smallest), 20, dtype=torch.float64).float()
    turn = torch.linalg.qr(torch.randn(20, 20, generator=seeded(1), dtype=torch.float64))[0]
    h = (torch.randn(9000, 20, generator=seeded()).double() * scale @ turn + mean).float()
    projection, offset, _, span = dc.pca_of(h, 20)
    assert (span < dc.MILD) == (precision == torch.float32)
    length = math.sqrt(20 * mean**2 + float(scale.square().sum()))
    assert span == pytest.approx(length / smallest, rel=0.05)
    projection, offset = projection.to(precision), offset.to(precision)
    white = (h.to(precision) @ projection - offset).double()
    torch.testing.assert_close(white.T @ white / len(h), torch.eye(20, dtype=torch.float64), atol=1e-3, rtol=0)


def test_rank_deficient_descriptors() -> None:
    """300 numbers of rank 100: 100 white directions and zeros, no NaN; so for a constant column and repeated rows."""
    h = torch.randn(400, 100, generator=seeded()) @ torch.randn(100, 300, generator=seeded(1))
    h[:, 7] = 3.0
    h = torch.cat([h, h])
    x, projection, offset, _ = projected(h, 256)
    alive = (projection != 0).any(0)
    assert int(alive.sum()) in (100, 101) and x.isfinite().all()
    white = (h.double() @ projection - offset)[:, alive]
    covariance = white.T @ white / len(h)
    torch.testing.assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e6])
def test_equal_descriptors(value: float) -> None:
    """All images equal: zero rows, whatever the value; a tiny rounding noise is not blown up."""
    h = torch.full((50, 20), value)
    assert not projected(h, 8)[0].any()
    noisy = h * (1 + 6e-8 * torch.randn(50, 20, generator=seeded()))
    assert not projected(noisy, 8)[0].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_descriptors_of_a_network_that_diverges(value: float) -> None:
    """Descriptors that are not finite, or whose squares are not, end with a word on --lr, not within the PCA."""
    h = torch.randn(50, 20, generator=seeded())
    h[3, 4] = value
    with pytest.raises(common.Fault, match="lower --lr"):
        dc.pca_of(h, 8)


def test_float64_is_never_asked_of_mps() -> None:
    """PCA, PIC and --assign compute in float64: on the CPU where the device has none."""
    assert dc.exact(torch.device("mps")) == common.CPU and dc.exact(torch.device("cuda", 1)) == torch.device("cuda", 1)


def image_set(n: int, size: int = 8) -> common.ImageSet:
    pixels = torch.randint(256, (n, 3, size, size), generator=seeded(), dtype=torch.uint8)
    return common.ImageSet("noise", size, (0.5,) * 3, (0.25,) * 3, torch.zeros(n, dtype=torch.long), ["a"],
                           torch.arange(n), pixels)


def test_streamed_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes that hold no (N, d) matrix give what one pass gives; wide descriptors are shortened, consistently."""
    data, matrix = image_set(600), torch.randn(192, 50, generator=seeded()) / 14
    encode = lambda images: (images.flatten(1) @ matrix).relu()  # noqa: E731
    whole, projection, offset, variance, _ = dc.describe(Rank(), data, encode, 50, 12)  # type: ignore[arg-type]
    largest = [0]
    extract = common.extract

    def watched(*args: Any) -> Tensor:
        found = extract(*args)
        largest[0] = max(largest[0], found.shape[1])
        return found

    monkeypatch.setattr(dc, "ONE_PASS", 0)
    monkeypatch.setattr(common, "extract", watched)
    streamed = dc.describe(Rank(), data, encode, 50, 12)  # type: ignore[arg-type]
    torch.testing.assert_close(streamed[0] @ streamed[0].T, whole @ whole.T, atol=1e-5, rtol=0)
    assert largest[0] == 12 and streamed[3] == variance
    monkeypatch.setattr(dc, "ONE_PASS", 4 * 50 * len(data) - 1)  # a byte too little for descriptors of 50 numbers
    dc.describe(Rank(), data, encode, 50, 12)  # type: ignore[arg-type]
    assert largest[0] == 12
    monkeypatch.setattr(dc, "WIDEST", 30)
    x, projection, offset, *_ = dc.describe(Rank(), data, encode, 50, 12)  # type: ignore[arg-type]
    assert projection.shape == (50, 12)
    h = extract(torch.device("cpu"), data, encode)
    torch.testing.assert_close(dc.whiten(h, projection, offset), x, atol=1e-4, rtol=0)


# ---- k-means ---------------------------------------------------------------------------------------------------------


def test_assignment_commutes_with_permutation() -> None:
    """Property 1, with given centroids."""
    x, centroids, order = unit_rows(300, 16), unit_rows(20, 16, 1), torch.randperm(300, generator=seeded())
    assert torch.equal(common.nearest(x[order], centroids), common.nearest(x, centroids)[order])


def test_objective_never_rises() -> None:
    """Property 2: where no cluster is empty, each iteration of k-means lowers the sum of squared distances."""
    x, objectives = unit_rows(400, 8), []
    for iterations in range(8):
        labels, empties = dc.kmeans_half(x, 10, seed=3, iterations=iterations)
        assert empties == 0
        means = dc.cluster_means(x, labels)
        objectives.append(float((x - means[labels]).square().sum()))
    assert all(b <= a + 1e-4 for a, b in itertools.pairwise(objectives)) and objectives[-1] < objectives[0]


def test_kmeans_agrees_with_the_shared_one() -> None:
    """Where no cluster is empty, k-means that halves clusters and the one that splits them are the same."""
    x = unit_rows(400, 8)
    found = common.kmeans(x, 10, iterations=20, seed=3)
    assert found.splits == 0 and torch.equal(found.labels.long(), dc.kmeans_half(x, 10, seed=3)[0])


def test_empty_clusters_take_half_of_others() -> None:
    """Section 3.2: an empty cluster takes half of the images of a random one that has any; nothing else moves."""
    labels = torch.tensor([0] * 10 + [1] * 7 + [3] * 1)
    filled, empties = dc.fill_empty(labels, 4, np.random.default_rng(0))
    assert empties == 1
    moved = filled == 2
    donors = torch.unique(labels[moved])
    assert len(donors) == 1 and int(moved.sum()) == int((labels == donors).sum()) // 2
    assert torch.equal(filled[~moved], labels[~moved])
    halves = [(dc.fill_empty(labels, 4, np.random.default_rng(seed))[0] == 2).nonzero()[:, 0] for seed in range(30)]
    assert {int(labels[rows[0]]) for rows in halves} == {0, 1}  # any that can be halved
    assert len({tuple(rows.tolist()) for rows in halves}) > 10  # any half of it
    nearly_all, empties = dc.fill_empty(torch.zeros(50, dtype=torch.long), 50, np.random.default_rng(0))
    assert empties == 49 and torch.equal(nearly_all.sort().values, torch.arange(50))
    untouched, empties = dc.fill_empty(torch.arange(5), 5, np.random.default_rng(0))
    assert empties == 0 and torch.equal(untouched, torch.arange(5))


@pytest.mark.parametrize("distinct", [0, 4, 40])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_kmeans_of_duplicates(distinct: int, k: int) -> None:
    """Equal and repeated rows, one cluster, as many clusters as rows: every cluster has an image, twice the same."""
    x = unit_rows(distinct, 6).repeat(40 // distinct, 1) if distinct else torch.zeros(40, 6)
    labels, _ = dc.kmeans_half(x, k, seed=1)
    assert torch.equal(torch.unique(labels), torch.arange(k))
    assert torch.equal(labels, dc.kmeans_half(x, k, seed=1)[0])
    assert dc.cluster_means(x, labels).isfinite().all()


def test_half_precision_only_leads_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: iterations in float16 end as low as those in float32, which makes the last labels."""
    x, used = unit_rows(3000, 32), list[Tensor]()
    exact = dc.kmeans_half(x, 40, seed=3)[0]
    rough = common._Half.nearest
    monkeypatch.setattr(common, "TENSOR_CORES", {"cpu"})
    monkeypatch.setattr(common._Half, "nearest", lambda *args: used.append(rough(*args)) or used[-1])
    assert torch.equal(dc.kmeans_half(x, 40, seed=3, iterations=0)[0], common.nearest(x, x[torch.from_numpy(
        np.random.default_rng(3).permutation(len(x))[:40])])) and not used
    labels = dc.kmeans_half(x, 40, seed=3)[0]
    spread = [float((x - dc.cluster_means(x, found)[found]).square().sum()) for found in (labels, exact)]
    assert len(used) > 10 and spread[0] == pytest.approx(spread[1], rel=5e-3)


def test_float32_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float16 moves no label any more, k-means goes on in float32 until that moves none either."""
    x = unit_rows(300, 8)
    monkeypatch.setattr(common, "TENSOR_CORES", {"cpu"})
    monkeypatch.setattr(common._Half, "nearest", lambda half, centroids: torch.arange(300) % 10)
    labels, _ = dc.kmeans_half(x, 10, seed=3, iterations=500)
    assert torch.equal(labels, common.nearest(x, dc.cluster_means(x, labels)))


# ---- power iteration clustering --------------------------------------------------------------------------------------


def graph_of(edges: dict[tuple[int, int], float], n: int) -> dc.Graph:
    """A graph with these symmetric weights."""
    both = sorted([(i, j, w) for (i, j), w in edges.items()] + [(j, i, w) for (i, j), w in edges.items()])
    rows, columns, weights = zip(*both, strict=True)
    return dc.Graph(torch.tensor(rows), torch.tensor(columns), torch.tensor(weights, dtype=torch.float64),
                    torch.zeros(n, 1, dtype=torch.long))


def slow_pic(x: Tensor, k: int, sigma: float) -> tuple[Tensor, Tensor]:
    """v and basins from dense matrices and loops, by the equations."""
    d = torch.cdist(x.double(), x.double()) ** 2
    n = len(x)
    a = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        near = [j for j in d[i].argsort().tolist() if j != i][:k]
        a[i, near] = (-d[i, near] / sigma**2).exp()
    w = a + a.T
    v = torch.full((n,), 1 / n, dtype=torch.float64)
    for _ in range(200):
        v = 0.001 * w @ v + 0.999 / n
        v = v / v.sum()
    ends = []
    for i in range(n):
        while True:
            gains = w[i] * (v - v[i])
            if gains.max() <= 0:
                break
            i = int(gains.argmax())
        ends.append(i)
    return v, torch.tensor(ends)


def fast_pic(x: Tensor, k: int, sigma: float | str) -> tuple[dc.Graph, Tensor]:
    nearest = common.neighbors(x, x, k, exclude=torch.arange(len(x)))[1]
    graph = dc.affinity(x, nearest, sigma)
    return graph, dc.power_iteration(graph)


def test_pic_equals_the_dense_form() -> None:
    """Affinity, power iteration and basins on the list of edges are those of dense matrices and loops."""
    x = F.normalize(blobs([40, 30, 30]) + 0.1 * torch.randn(100, 8, generator=seeded(5)))
    graph, v = fast_pic(x, 5, 0.4)
    slow_v, ends = slow_pic(x, 5, 0.4)
    torch.testing.assert_close(v, slow_v, atol=1e-12, rtol=0)
    assert torch.equal(torch.unique(ends, return_inverse=True)[1], dc.basins(graph, v))


def test_pic_on_graphs_with_known_answers() -> None:
    """A path flows to its peaks, a saddle to the steeper side; a star is one basin; an image without edges is alone."""
    path = graph_of({(i, i + 1): 1.0 for i in range(6)}, 7)
    v = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.5, 2.5, 2.0], dtype=torch.float64)
    assert dc.basins(path, v).tolist() == [0, 0, 0, 0, 1, 1, 1]  # 4 has 0.5 to the left, 1 to the right
    heavy = graph_of({(i, i + 1): 3.0 if i == 3 else 1.0 for i in range(6)}, 7)
    assert dc.basins(heavy, v).tolist() == [0, 0, 0, 0, 0, 1, 1]  # the weight counts, not the step alone
    line = graph_of({(i, i + 1): 1.0 for i in range(99)}, 100)
    assert not dc.basins(line, torch.linspace(1, 0, 100, dtype=torch.float64)).any()  # however far it is to the peak
    star = graph_of({(0, i): 1.0 for i in range(1, 6)}, 7)
    v = dc.power_iteration(star)
    assert dc.basins(star, v).tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert float(v[0]) > float(v[1]) > float(v[6]) and float(v.sum()) == pytest.approx(1)
    edges = {(0, 1): 1.0, (1, 2): 1.5, (0, 2): 1.0, (3, 4): 1.5, (4, 5): 1.0, (3, 5): 1.0, (2, 3): 1e-3}
    triangles = graph_of(edges, 6)
    assert dc.basins(triangles, dc.power_iteration(triangles)).tolist() == [0, 0, 0, 1, 1, 1]


def test_power_iteration_climbs_density() -> None:
    """After 200 steps with alpha = 0.001 v is an affine function of the weighted degree."""
    graph, v = fast_pic(unit_rows(500, 6), 5, 0.5)
    degree = torch.zeros(500, dtype=torch.float64).index_add_(0, graph.rows, graph.weights)
    assert float(torch.corrcoef(torch.stack([degree, v]))[0, 1]) > 0.9999


@pytest.mark.parametrize(("rows", "world"), [(50, 3), (7, 8), (64, 2)])
def test_ranks_share_the_search(rows: int, world: int) -> None:
    """Each rank looks for the neighbours of its share of the rows; together they are those of one rank."""
    x, parts = unit_rows(rows, 6), list[Tensor]()

    class Share(Rank):
        def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            parts.extend(tensors)
            return tensors

    for rank in range(world):
        run: Any = Share(rank, world)
        dc.own_neighbors(x, 5, run)
    assert len({part.shape for part in parts}) == 1
    assert torch.equal(torch.cat(parts)[:rows], dc.own_neighbors(x, 5))
    assert not (dc.own_neighbors(x, 5) == torch.arange(rows)[:, None]).any()
    assert dc.own_neighbors(x[:3], 5).shape == (3, 2)


def pic(x: Tensor, k: int, *options: Any) -> tuple[Tensor, int]:
    return dc.pic(x, dc.own_neighbors(x, k), *options)


def test_pic_of_two_blobs() -> None:
    """Property 3: no cluster crosses two disconnected blobs; there are at least two clusters, not always two."""
    labels, _ = pic(blobs([60, 40]), 5, 0.2, "redistribute")
    assert not set(labels[:60].tolist()) & set(labels[60:].tolist())
    assert 2 <= len(torch.unique(labels)) <= 30


def test_pic_does_not_depend_on_the_order() -> None:
    """Property 4: permuted rows have the same partition."""
    x, order = blobs([50, 40, 30], spread=0.1), torch.randperm(120, generator=seeded())
    labels, singletons = pic(x, 5, 0.3, "redistribute")
    permuted, again = pic(x[order], 5, 0.3, "redistribute")
    assert same_partition(labels[order], permuted) and singletons == again


def test_sigma() -> None:
    """Far neighbours vanish at sigma 0.2: only singletons, all dropped if asked; the median brings them back. Equal
    images are neighbours also where the median is 0."""
    x = unit_rows(300, 256)
    assert pic(x, 5, 0.2, "keep")[1] == 300
    assert (pic(x, 5, 0.2, "drop")[0] == -1).all()
    labels, singletons = pic(x, 5, "median", "keep")
    assert singletons < 150 and len(torch.unique(labels)) < 200
    distances = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    nearest = torch.tensor([[1], [0], [1], [2]])  # distances 1, 1, 2, 4: the (lower) median is 1
    expected = torch.tensor([2 * math.exp(-1), math.exp(-4), math.exp(-16)], dtype=torch.float64)
    torch.testing.assert_close(dc.affinity(distances, nearest, "median").weights[[0, 2, 4]], expected)
    assert dc.affinity(0 * distances, nearest, "median").weights.tolist() == [2, 2, 1, 1, 1, 1]


def test_singletons() -> None:
    """A singleton goes to its nearest neighbour that is none, stays one if all five are, or is kept or dropped."""
    labels = torch.tensor([0, 0, 1, 2, 3, 3, 4])
    nearest = torch.tensor([[1, 2], [0, 2], [3, 4], [2, 6], [5, 0], [4, 0], [3, 2]])
    moved, count = dc.treat_singletons(labels, nearest, "redistribute")
    assert count == 3 and moved.tolist() == [0, 0, 2, 1, 2, 2, 3]
    kept, _ = dc.treat_singletons(labels, nearest, "keep")
    assert torch.equal(kept, labels)
    dropped, _ = dc.treat_singletons(labels, nearest, "drop")
    assert dropped.tolist() == [0, 0, -1, -1, 1, 1, -1]


@pytest.mark.parametrize("how", ["redistribute", "keep", "drop"])
@pytest.mark.parametrize("distinct", [0, 2, 3])
@pytest.mark.parametrize("sigma", [0.2, "median"])
def test_pic_of_duplicates(distinct: int, how: str, sigma: float | str) -> None:
    """Equal and repeated rows, two rows: names 0 ... K - 1 or -1, no NaN, twice the same."""
    x = unit_rows(distinct, 6).repeat(10 if distinct == 3 else 1, 1) if distinct else torch.zeros(30, 6)
    labels, _ = pic(x, 5, sigma, how)
    kept = labels[labels >= 0]
    assert torch.equal(torch.unique(kept), torch.arange(len(torch.unique(kept)))) and len(labels) == len(x)
    assert torch.equal(labels, pic(x, 5, sigma, how)[0])


def test_no_image_is_nearest_to_an_empty_cluster() -> None:
    """Centroids are the means of the clusters' images; one without images draws none, though means of unit rows that
    point everywhere lie near 0, as a mean of nothing might."""
    x, labels = unit_rows(60, 16), torch.tensor([0, 1, 3]).repeat(20)
    found = dc.cluster_means(x, labels)
    for cluster in (0, 1, 3):
        torch.testing.assert_close(found[cluster], x[labels == cluster].mean(0))
    assert set(common.nearest(torch.cat([x, -x]), found).tolist()) == {0, 1, 3}


# ---- sampling --------------------------------------------------------------------------------------------------------


def skewed() -> Tensor:
    """1,000 images, 950 of them in one of 50 clusters; cluster 7 is empty, 10 images are in none."""
    labels = torch.cat([torch.full((950,), 3), torch.arange(50).clamp(max=49)])
    labels[labels == 7] = 8
    labels[:10] = -1
    return labels[torch.randperm(1000, generator=seeded())]


def test_uniform_over_clusters() -> None:
    """Property 5: with one cluster of 95 % every non-empty cluster has N/K draws, plus or minus one, all of its own."""
    labels = skewed()
    order = dc.uniform_order(labels, 1000, seeded())
    counts = torch.bincount(labels[order], minlength=50)
    assert len(order) == 1000 and (labels[order] >= 0).all() and counts[7] == 0
    assert set(counts[torch.arange(50) != 7].tolist()) == {20, 21}
    draws = torch.bincount(order, minlength=1000)
    for cluster in range(50):
        own = draws[labels == cluster]
        if len(own):
            assert int(own.max() - own.min()) <= 1  # its images in turn
    halves = torch.bincount(labels[order[:500]], minlength=50)
    assert halves[torch.arange(50) != 7].min() > 0  # shuffled, not cluster by cluster
    assert not torch.equal(order, dc.uniform_order(labels, 1000, seeded(1)))
    assert torch.equal(order, dc.uniform_order(labels, 1000, seeded()))


def test_fewer_draws_than_clusters() -> None:
    """An epoch shorter than the number of clusters draws that many different ones."""
    order = dc.uniform_order(torch.arange(100), 30, seeded())
    assert len(torch.unique(order)) == 30


def test_every_image_has_its_turn() -> None:
    """Over many epochs every image of a cluster is drawn, and every cluster has the draw more that does not divide."""
    labels = torch.arange(3).repeat(100)
    orders = [dc.uniform_order(labels, 100, seeded(seed)) for seed in range(20)]
    assert len(torch.cat(orders).unique()) >= 290
    assert {int(labels[order].bincount().argmax()) for order in orders} == {0, 1, 2}


def test_released_sampling_is_not_uniform() -> None:
    """The released code's order is one over images: it delivers about 95 % from the cluster that holds 95 %."""
    labels = skewed()
    order = dc.training_order(labels, 1000, "released", seeded())
    assert 0.9 < float((labels[order] == 3).double().mean()) < 0.97
    assert (labels[order] >= 0).all()


def test_sampling_over_images() -> None:
    """`images` draws each image that has a cluster once, cluster 0 included, before any comes again; others never."""
    labels = skewed()
    known = (labels >= 0).nonzero()[:, 0]
    once, more = (dc.training_order(labels, count, "images", seeded()) for count in (len(known), len(known) + 7))
    assert torch.equal(once.sort().values, known) and not torch.equal(once, known)
    assert sorted(torch.bincount(more)[known].tolist()) == [1] * (len(known) - 7) + [2] * 7
    assert (labels == 0).any() and (labels == -1).any()


def test_figures_of_a_partition() -> None:
    """Clusters in use, the share of the largest and ln of their number; NMI over images that both clusterings have."""
    now, before = torch.tensor([0, 0, 2, 2, 2, -1, 0, 2]), torch.tensor([1, 1, 0, 0, 1, 0, -1, 0])
    figures = dc.partition_figures(now, before)
    rows = torch.tensor([0, 1, 2, 3, 4, 7])
    assert figures == dict(clusters=2, largest_share=round(4 / 7, 4), chance_loss=round(math.log(2), 4),
                           nmi_previous=dc.nmi(now[rows], before[rows]))
    assert 0 < figures["nmi_previous"] < 1
    assert "nmi_previous" not in dc.partition_figures(now, torch.full_like(now, -1))


def test_gradient_over_some_targets() -> None:
    """Section 4.7: the batch's clusters are always among the rows, other rows do not move; all rows: exact."""
    targets = torch.tensor([4, 9, 4, 17])
    rows = dc.target_rows(targets, 50, 10, seeded())
    assert len(torch.unique(rows)) == 10 and set(targets.tolist()) <= set(rows.tolist())
    assert torch.equal(rows, rows.sort().values)
    assert dc.target_rows(targets, 50, 1, seeded()).tolist() == [4, 9, 17]
    top = dc.TopLayer(6, torch.device("cpu"))
    top.reset(50, seeded())
    before, x = top.weight.detach().clone(), torch.randn(4, 6, generator=seeded())
    F.cross_entropy(top(x, rows), torch.searchsorted(rows, targets)).backward()  # type: ignore[no-untyped-call]
    top.step(0.1, 0.1, rows)
    others = torch.ones(50, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(top.weight[others], before[others]) and not torch.equal(top.weight[rows], before[rows])
    every = dc.target_rows(targets, 50, 80, seeded())
    torch.testing.assert_close(F.cross_entropy(top(x, every), torch.searchsorted(every, targets)),
                               F.cross_entropy(top(x), targets))


# ---- figures of merit ------------------------------------------------------------------------------------------------


def test_nmi() -> None:
    """Property 9: 1 for the same partition under any names; I / sqrt(H H) against the definition."""
    a = torch.randint(6, (500,), generator=seeded())
    b = (a + torch.randint(2, (500,), generator=seeded(1))) % 6
    assert dc.nmi(a, a) == 1 and dc.nmi(a, torch.randperm(6, generator=seeded())[a]) == 1
    assert dc.nmi(a, torch.zeros(500)) == 0
    joint = torch.zeros(6, 6).index_put_((a, b), torch.tensor(1 / 500), accumulate=True).double()
    pa, pb = joint.sum(1), joint.sum(0)
    information = float((joint * (joint / pa.outer(pb)).log()).nansum())
    entropies = float((pa * pa.log()).sum() * (pb * pb.log()).sum())
    assert dc.nmi(a, b) == pytest.approx(information / math.sqrt(entropies), abs=1e-4)


def test_label_figures() -> None:
    """Separate classes: 100 % and 1; the 10 neighbours do not count the image itself, against all distances; images
    without a label take no part, in the NMI none without a cluster; none with a label: no figure."""
    rows, classes = unit_rows(60, 5), torch.arange(60) % 3
    nearest = (torch.cdist(rows, rows) + 9 * torch.eye(60)).argsort(1)[:, :10]
    inside = 100 * float((classes[nearest] == classes[:, None]).double().mean())  # of equal classes: the mean over them
    assert dc.label_figures(rows, classes, classes)["ratio_edge"] == pytest.approx(inside, abs=0.01)
    x, truth = blobs([40, 40]), torch.arange(2).repeat_interleave(40)
    assert dc.label_figures(x, truth, truth) == dict(ratio_edge=100.0, nmi_labels=1.0)
    some = torch.where(torch.arange(80) % 3 == 0, -1, truth)
    assert dc.label_figures(x, some, truth) == dict(ratio_edge=100.0, nmi_labels=1.0)
    assert dc.label_figures(x, torch.full((80,), -1), truth) == dict(ratio_edge=100.0)
    truth[::2] = -1
    assert dc.label_figures(x, truth.clamp(min=0), truth)["ratio_edge"] == 100
    assert dc.label_figures(x, truth, torch.full((80,), -1)) == {}


# ---- whole runs ------------------------------------------------------------------------------------------------------


def _child(argv: list[str], output: Path, before: Callable[[], None] | None, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if before:
        before()
    sys.stdout = sys.stderr = (output.parent / f"{output.name}-out{rank}").open("a", 1)
    try:
        dc.main(dc.parse_args([*argv, "--output", str(output)]))
    except common.Fault as fault:
        print(fault)
        os._exit(2)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def train(output: Path, *options: str, before: Callable[[], None] | None = None, world: int = 1) -> int:
    """Run the script with the TINY options in processes of their own: the exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = [([*TINY, *options], output, before, rank, world, port) for rank in range(world)]
    processes = [context.Process(target=_child, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "the script hangs"
    return max(process.exitcode or 0 for process in processes)


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The epochs' lines of the log without times and memory."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()[1:]]
    return [{key: value for key, value in line.items() if "second" not in key and key != "memory_gb"} for line in lines]


def state_of(output: Path) -> dict[str, Any]:
    state: dict[str, Any] = common.load_checkpoint(output / "checkpoint.pth")["state"]
    return state


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dictionaries, lists and tensors are equal bit by bit."""
    if isinstance(a, dict):
        return bool(a.keys() == b.keys()) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def clusters_of(output: Path, epoch: int) -> Tensor:
    return torch.from_numpy(np.load(output / "assignments" / f"epoch{epoch:04d}.npz")["cluster"])


def killed_after(epoch: int, step: int) -> Callable[[], None]:
    """Save after this step, then die without a word."""

    def patch() -> None:
        original = common.Run.after_step

        def deadly(self: common.Run, state: dict[str, Any], *at: Any) -> None:
            original(self, state, *at)
            if at[:2] == (epoch, step):
                self.save(state, epoch, step + 1)
                self.written()
                os._exit(9)

        common.Run.after_step = deadly  # type: ignore[method-assign,assignment]

    return patch


def recorded(file: Path) -> Callable[[], None]:
    """Keep index and augmented images of every step in a file."""

    def patch() -> None:
        steps, batches, augment = list[Any](), common.ImageSet.batches, dc.augment

        def watched(*args: Any) -> Any:
            for step, index, images in batches(*args):
                steps.append([index])
                yield step, index, images

        def kept(*args: Any) -> Tensor:
            images = augment(*args)
            steps[-1].append(images.clone())
            torch.save(steps, file)
            return images

        common.ImageSet.batches, dc.augment = watched, kept  # type: ignore[method-assign]

    return patch


def test_training_is_that_of_plain_pytorch(tmp_path: Path) -> None:
    """Two epochs by torch.optim and nn.Linear on the recorded images and clusters: the same weights and statistics."""
    options = ["--arch", "alexnet_bn", "--sobel", "--dropout", "0", "--epochs", "2", "--no-amp",
               "--weight-decay", "0.01", "--momentum", "0.5", "--schedule", "cosine", "--seed", "3"]
    assert train(tmp_path / "run", *options, before=recorded(tmp_path / "steps")) == 0
    args, steps = dc.parse_args([*TINY, *options]), torch.load(tmp_path / "steps")
    torch.manual_seed(args.seed)
    encoder = dc.Encoder("alexnet_bn", args.width, True, 16, "full", True, 0.0).train()
    trunk = torch.optim.SGD(encoder.parameters(), args.lr, momentum=0.5, weight_decay=0.01)
    for epoch in range(2):
        top, start = torch.nn.Linear(encoder.dim, 8), dc.TopLayer(encoder.dim, common.CPU)
        start.reset(8, common.generator(args.seed, "top", epoch))
        top.load_state_dict(start.state_dict())
        last = torch.optim.SGD(top.parameters(), args.lr, weight_decay=0.01)
        labels = clusters_of(tmp_path / "run", epoch + 1)
        for number in range(4 * epoch, 4 * epoch + 4):
            index, images = steps[number]
            loss = F.cross_entropy(top(encoder((images - 0.5) / 0.25).relu()), labels[index].long())
            for optimizer in (trunk, last):
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in (trunk, last):
                optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * number / 8)) / 2
                optimizer.step()
    found = state_of(tmp_path / "run")
    torch.testing.assert_close(found["encoder"], encoder.state_dict(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["top"], top.state_dict(), atol=1e-5, rtol=1e-4)


EFFECTS = [
    "", "--no-sobel", "--head 2fc", "--head no-relu", "--descriptors after", "--dropout 0.1", "--feature-dim 3",
    "--k 5", "--sampling images", "--sampling released", "--targets-per-step 4", "--updates-per-epoch 3",
    "--images-per-epoch 48", "--crop random", "--crop central", "--min-crop 0.9", "--flip no", "--flip vertical",
    "--clustering labels", *(f"--clustering pic --feature-dim 20 {more}" for more in (
        "--sigma 0.2", "--sigma median", "--sigma 0.2 --num-neighbors 3", "--sigma 0.2 --singletons keep",
        "--sigma 0.2 --singletons drop")),
]


def test_every_option_has_an_effect(tmp_path: Path) -> None:
    """Each option of the method leads to other weights within an epoch, and no two to the same."""
    weights = dict[str, str]()
    for number, options in enumerate(EFFECTS):
        output = tmp_path / str(number)
        assert train(output, "--arch", "alexnet_bn", "--sobel", "--epochs", "1", *options.split()) == 0, options
        encoder = state_of(output)["encoder"]
        found = str([float(weight.double().sum()) for weight in encoder.values()])
        assert found not in weights, (options, weights[found])
        weights[found] = options


RESUMED = {
    "kmeans": ["--epochs", "3"],
    "pic": ["--epochs", "3", "--clustering", "pic", "--sigma", "median", "--knn-every", "2"],
    "dropout": ["--epochs", "3", "--arch", "alexnet_bn", "--sobel", "--dropout", "0.5", "--reassign-every", "2",
                "--images-per-epoch", "48", "--targets-per-step", "4"],
}


@pytest.mark.parametrize("method", RESUMED)
def test_resume_is_exact(method: str, tmp_path: Path) -> None:
    """Killed within an epoch, a run does not cluster again; between epochs it clusters as it would have: same bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train(whole, *RESUMED[method]) == 0
    for epoch, step in ((0, 1), (1, 2)):  # the last step of epoch 1 in "dropout": a stop between the epochs
        assert train(broken, *RESUMED[method], before=killed_after(epoch, step)) == 9
    assert train(broken, *RESUMED[method]) == 0
    assert same(state_of(whole), state_of(broken)) and rows_of(whole) == rows_of(broken)
    assert "resumed" in (tmp_path / "broken-out0").read_text()
    assert [p.name for p in sorted((whole / "assignments").glob("*.npz"))] == [
        p.name for p in sorted((broken / "assignments").glob("*.npz"))]
    assert state_of(whole)["clusters"]["final"].keys() == {"centroids", "projection", "offset"}


def no_reclustering() -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("clustered again")

    dc.kmeans_half = fail  # type: ignore[assignment]


def test_no_clustering_within_an_epoch(tmp_path: Path) -> None:
    """A resume within an epoch goes on with the labels, the last layer and the figures of the checkpoint."""
    assert train(tmp_path / "run", "--epochs", "1", before=killed_after(0, 1)) == 9
    saved = state_of(tmp_path / "run")["clusters"]
    assert train(tmp_path / "run", "--epochs", "1", before=no_reclustering) == 0
    ended = state_of(tmp_path / "run")["clusters"]
    assert same(saved | dict(final=ended["final"]), ended)


def batch_statistics_fixed() -> None:
    """Batch normalisation by running statistics, the same on any number of ranks."""

    def train(self: dc.Encoder, mode: bool = True) -> dc.Encoder:
        torch.nn.Module.train(self, mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

    dc.Encoder.train = train  # type: ignore[method-assign]


def streaming() -> None:
    batch_statistics_fixed()
    dc.ONE_PASS = 0


TWO_RANKS = {
    "kmeans": "",
    "pic": "--targets-per-step 6 --clustering pic --sigma median",
    "dropout": "--arch alexnet_bn --sobel --dropout 0.5 --accumulate 2 --no-amp",
}


@pytest.mark.parametrize("before", [batch_statistics_fixed, streaming])
@pytest.mark.parametrize("method", TWO_RANKS)
def test_two_ranks_equal_one(before: Callable[[], None], method: str, tmp_path: Path) -> None:
    """Two gloo ranks cluster all descriptors once, in the images' order, and train as one: clusters, dropout."""
    options = ["--epochs", "2", "--lr", "0.01", *TWO_RANKS[method].split()]
    assert train(tmp_path / "one", *options, before=before) == 0
    assert train(tmp_path / "two", *options, before=before, world=2) == 0
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    assert torch.equal(clusters_of(tmp_path / "one", 1), clusters_of(tmp_path / "two", 1))
    assert torch.equal(clusters_of(tmp_path / "one", 2), clusters_of(tmp_path / "two", 2))
    torch.testing.assert_close(two["encoder"], one["encoder"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two["top"], one["top"], atol=1e-5, rtol=1e-4)


def half_described() -> None:
    """At most 32 images may be described at once."""
    describe = dc.describe

    def checked(run: common.Run, data: common.ImageSet, *rest: Any) -> Any:
        assert len(data) <= 32
        return describe(run, data, *rest)

    dc.describe = checked  # type: ignore[assignment]


def test_reassignment_and_parts(tmp_path: Path) -> None:
    """--reassign-every, --images-per-epoch and --cluster-pool: who is clustered, and when. No others are described,
    not for the centroids of --assign either."""
    options = ["--epochs", "3", "--reassign-every", "2", "--images-per-epoch", "32"]
    assert train(tmp_path / "a", *options, before=half_described) == 0
    assert [(tmp_path / "a/assignments" / f"epoch{e:04d}.npz").exists() for e in (1, 2, 3)] == [True, False, True]
    first, third = clusters_of(tmp_path / "a", 1), clusters_of(tmp_path / "a", 3)
    assert int((first >= 0).sum()) == int((third >= 0).sum()) == 32 and not torch.equal(first >= 0, third >= 0)
    assert [row["step"] for row in rows_of(tmp_path / "a")] == [2, 4, 6]
    assert train(tmp_path / "b", "--epochs", "1", "--images-per-epoch", "32", "--cluster-pool") == 0
    assert (clusters_of(tmp_path / "b", 1) >= 0).all() and rows_of(tmp_path / "b")[0]["step"] == 2
    assert train(tmp_path / "c", "--epochs", "1", "--updates-per-epoch", "9") == 0
    assert rows_of(tmp_path / "c")[0]["step"] == 9
    assert train(tmp_path / "d", "--images-per-epoch", "65") == 2


def watched_draws(file: Path) -> Callable[[], None]:
    """A line of the file for each k-means, with its seed, for each epoch's order of the images, and for the clusters of
    each step, with theirs."""

    def patch() -> None:
        kmeans, order, rows = dc.kmeans_half, dc.training_order, dc.target_rows

        def clustered(x: Tensor, k: int, seed: int, *rest: Any) -> Any:
            common.append_line(file, json.dumps(["seed", seed]))
            return kmeans(x, k, seed, *rest)

        def ordered(*args: Any) -> Tensor:
            found = order(*args)
            common.append_line(file, json.dumps(["order", *found.tolist()]))
            return found

        def aimed(*args: Any) -> Tensor:
            common.append_line(file, json.dumps(["targets", args[3].initial_seed()]))
            return rows(*args)

        dc.kmeans_half, dc.training_order, dc.target_rows = clustered, ordered, aimed

    return patch


def test_every_clustering_and_every_epoch_draws_anew(tmp_path: Path) -> None:
    """Each clustering starts from other images, of others, each epoch on the same clusters has an order of its own, and
    each step other clusters beside its targets; figures by labels are those of the images that were clustered."""
    options = ["--epochs", "3", "--reassign-every", "2", "--images-per-epoch", "40", "--knn-every", "2",
               "--targets-per-step", "4"]
    assert train(tmp_path / "run", *options, before=watched_draws(tmp_path / "draws")) == 0
    draws = [tuple(json.loads(line)) for line in (tmp_path / "draws").read_text().splitlines()]
    epoch = ["order", "targets", "targets"]
    assert [draw[0] for draw in draws] == ["seed", *epoch, *epoch, "seed", *epoch] and len(set(draws)) == 11
    labels = common.load(dc.parse_args(TINY), "pretrain", common.CPU).labels
    for epoch, made in ((1, 1), (2, 1), (3, 3)):
        clusters = clusters_of(tmp_path / "run", made)
        kept = (clusters >= 0).nonzero()[:, 0]
        assert len(kept) == 40
        assert rows_of(tmp_path / "run")[epoch - 1]["nmi_labels"] == dc.nmi(clusters[kept], labels[kept])
    one, two = (clusters_of(tmp_path / "run", made) >= 0 for made in (1, 3))
    assert not torch.equal(one, two)


def no_exchange() -> None:
    """Within a step nothing is gathered from other ranks, nor from the device."""
    batches, after_step, gather, within = common.ImageSet.batches, common.Run.after_step, common.Run.gather, [False]

    def watched(*args: Any) -> Any:
        for step in batches(*args):
            within[0] = True
            yield step

    def after(*args: Any) -> None:
        within[0] = False
        after_step(*args)

    def checked(self: common.Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert not within[0], "gathered within a step"
        return gather(self, *tensors)

    common.ImageSet.batches, common.Run.after_step = watched, after  # type: ignore[method-assign]
    common.Run.gather = checked  # type: ignore[method-assign]


def test_targets_of_a_step_are_known_beforehand(tmp_path: Path) -> None:
    """--targets-per-step takes all ranks' clusters from the order: no rank waits for another's, nor for its device."""
    assert train(tmp_path / "run", "--epochs", "2", "--targets-per-step", "4", before=no_exchange) == 0


def test_figures_of_clusters_that_serve_several_epochs(tmp_path: Path) -> None:
    """Figure 4.5: between clusterings, too, a monitored epoch has the ratio edge of the network before it, with the
    bits of a run without monitor; a resume within the epoch keeps it."""
    assert train(tmp_path / "each", "--epochs", "2", "--knn-every", "1") == 0
    kept = ["--epochs", "3", "--reassign-every", "3"]
    assert train(tmp_path / "kept", *kept, "--knn-every", "1") == 0
    (_, measured), rows = rows_of(tmp_path / "each"), rows_of(tmp_path / "kept")
    edges = [row["ratio_edge"] for row in rows]
    assert edges[1] == measured["ratio_edge"] and len(set(edges)) == 3
    assert rows[0]["nmi_labels"] == rows[1]["nmi_labels"] == rows[2]["nmi_labels"]
    assert train(tmp_path / "blind", *kept) == 0
    assert same(state_of(tmp_path / "kept")["encoder"], state_of(tmp_path / "blind")["encoder"])
    assert train(tmp_path / "broken", *kept, "--knn-every", "1", before=killed_after(1, 1)) == 9
    assert train(tmp_path / "broken", *kept, "--knn-every", "1") == 0 and rows_of(tmp_path / "broken") == rows
    assert train(tmp_path / "rare", *kept, "--knn-every", "3") == 0
    rare = rows_of(tmp_path / "rare")
    assert [row["ratio_edge"] for row in rare] == [edges[0], edges[0], edges[2]]


def test_other_clusterings(tmp_path: Path) -> None:
    """Faiss, and centroids that are split as Faiss does it; all figures of an epoch are there."""
    pytest.importorskip("faiss")
    for name, options in {"faiss": ["--kmeans", "faiss"], "split": ["--empties", "split"]}.items():
        assert train(tmp_path / name, "--epochs", "1", *options) == 0
        header = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        assert header["kmeans_backend"].split()[0] == {"faiss": "faiss", "split": "torch"}[name]
        row = rows_of(tmp_path / name)[0]
        assert 2 <= row["clusters"] <= 8 and row["chance_loss"] == round(math.log(row["clusters"]), 4)
        assert {"loss", "empties", "largest_share", "pca_variance", "lr"} <= row.keys()


def test_only_k_means_is_named(tmp_path: Path) -> None:
    """A run names k-means' back end if it has k-means, not with PIC."""
    for name in ("kmeans", "pic"):
        assert train(tmp_path / name, "--epochs", "1", "--clustering", name) == 0
        header = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        assert ("kmeans_backend" in header) == (name == "kmeans")


def test_chance_among_some_targets(tmp_path: Path) -> None:
    """With --targets-per-step, too, the loss of a network that learns nothing is chance_loss, not far below it."""
    for targets, chance in ((1, 16), (20, 20), (65, 64)):  # a batch has 16 clusters
        output = tmp_path / str(targets)
        options = ["--epochs", "1", "--lr", "1e-9", "--k", "64", "--targets-per-step", str(targets)]
        assert train(output, *options) == 0
        row = rows_of(output)[0]
        assert row["chance_loss"] == round(math.log(chance), 4) and abs(row["loss"] - row["chance_loss"]) < 0.1


def shuffled_labels() -> None:
    original = common.load

    def load(*args: Any) -> common.ImageSet:
        data = original(*args)
        data.labels = data.labels[torch.randperm(len(data), generator=seeded())]
        return data

    common.load = load


def test_labels_are_for_figures_alone(tmp_path: Path) -> None:
    """Other labels, or no figures: the same weights. With --clustering labels, once: other weights, and an accuracy."""
    options = ["--epochs", "2", "--knn-every", "1"]
    assert train(tmp_path / "a", *options) == 0
    assert train(tmp_path / "b", *options, before=shuffled_labels) == 0
    assert train(tmp_path / "c", "--epochs", "2") == 0
    a, b, c = (state_of(tmp_path / name) for name in "abc")
    assert same(a["encoder"], b["encoder"]) and same(a["encoder"], c["encoder"]) and same(a["top"], b["top"])
    assert "ratio_edge" in rows_of(tmp_path / "a")[0] and "ratio_edge" not in rows_of(tmp_path / "c")[0]
    labels = [*options, "--clustering", "labels", "--sampling", "images"]
    assert train(tmp_path / "d", *labels) == 0
    assert [path.name for path in (tmp_path / "d/assignments").glob("*.npz")] == ["epoch0001.npz"]
    assert rows_of(tmp_path / "d")[1]["clusters"] == 10 and "test_top1" in rows_of(tmp_path / "d")[1]


def test_the_monitor_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor's kNN, at tau = 0.07, is of the training and test images' whitened descriptors, whose PCA is that of
    the training images, by the network in evaluation mode; with --clustering labels test_top1 is the accuracy in % of
    its last layer."""
    asked, monitor = list[Any](), common.knn_monitor
    monkeypatch.setattr(common, "knn_monitor", lambda *x, **more: (asked.append((x, more)), monitor(*x, **more))[1])
    words = [*TINY, "--epochs", "1", "--knn-every", "1", "--test-subset", "40", "--no-amp", "--output", str(tmp_path)]
    dc.main(dc.parse_args([*words, "--clustering", "labels", "--sampling", "images"]))
    (((keys, train, queries, test), more),) = asked
    assert more == dict(temperature=0.07)
    encoder, state = common.load_encoder(tmp_path / "checkpoint.pth"), state_of(tmp_path)
    final = state["clusters"]["final"]
    for features, images in ((keys, train), (queries, test)):
        (pixels,) = images.centers(torch.arange(len(images)), 64, common.CPU)
        h = encoder.backbone(images.normalize(pixels), relu_last=False)
        torch.testing.assert_close(features, dc.whiten(h, final["projection"], final["offset"]), atol=1e-4, rtol=0)
    guesses = (h.relu() @ state["top"]["weight"].T + state["top"]["bias"]).argmax(1)
    assert rows_of(tmp_path)[0]["test_top1"] == round(100 * float((guesses == test.labels).double().mean()), 2) > 0


def folder_of(path: Path, images: list[Any]) -> Path:
    path.mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(path / f"{i:03d}.png")
    return path


def no_description() -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("descriptors again")

    dc.describe = fail  # type: ignore[assignment]


def test_nothing_of_an_earlier_run_is_left(tmp_path: Path) -> None:
    """--overwrite with other images: their names, their assignments, and no centroids until the new run has ended."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)
    first, second = folder_of(tmp_path / "first", [*noise[:40]]), folder_of(tmp_path / "second", [*noise[40:]])
    run, options = tmp_path / "run", ["--subset", "40", "--k", "4", "--epochs", "2", "--overwrite", "--data"]
    assert train(run, *options, str(first)) == 0 and state_of(run)["clusters"]["final"]
    assert train(run, "--assign", str(first)) == 0 and (run / "assigned.csv").exists()
    assert train(run, *options, str(second), before=killed_after(0, 1)) == 9
    names = (run / "assignments/images.txt").read_text().splitlines()
    assert names == [str(file) for file in sorted(second.iterdir())]
    assert [path.name for path in (run / "assignments").glob("*.npz")] == ["epoch0001.npz"]
    assert not (run / "assigned.csv").exists()
    assert train(run, "--assign", str(first)) == 2


def test_finished_run_computes_nothing(tmp_path: Path) -> None:
    """Started again, a finished run does not describe all images anew, and its centroids are still there."""
    run = tmp_path / "run"
    assert train(run, "--epochs", "1") == 0
    saved = state_of(run)
    assert train(run, "--epochs", "1", before=no_description) == 0 and same(saved, state_of(run))
    assert train(run, "--assign", "shapes") == 0


def killed_before_the_centroids() -> None:
    save = common.Run.save

    def deadly(self: common.Run, *words: Any) -> None:
        save(self, *words)
        self.written()
        os._exit(9)

    common.Run.save = deadly  # type: ignore[method-assign]


def test_last_epoch_is_saved_before_the_centroids(tmp_path: Path) -> None:
    """Killed while the images are described for --assign, a run has its last epoch, and makes up for the centroids."""
    for name in ("whole", "broken"):
        if name == "broken":
            assert train(tmp_path / name, "--epochs", "1", before=killed_before_the_centroids) == 9
        assert train(tmp_path / name, "--epochs", "1") == 0
    assert "already finished" in (tmp_path / "broken-out0").read_text()
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "broken"))


def test_finished_run_is_trained_on(tmp_path: Path) -> None:
    """With more --epochs a finished run ends as one that had them from the start; until then it has no centroids."""
    assert train(tmp_path / "whole", "--epochs", "2") == 0
    run = tmp_path / "run"
    assert train(run, "--epochs", "1") == 0
    assert train(run, "--epochs", "2", before=killed_after(1, 1)) == 9
    assert train(run, "--assign", "shapes") == 2
    assert "that has ended" in (tmp_path / "run-out0").read_text()
    assert train(run, "--epochs", "2") == 0
    assert same(state_of(tmp_path / "whole"), state_of(run)) and rows_of(tmp_path / "whole") == rows_of(run)


def test_equal_images(tmp_path: Path) -> None:
    """A folder of equal pictures: k-means and PIC train to the end, finite, on as many clusters as they found."""
    data = folder_of(tmp_path / "equal", [np.full((16, 16, 3), 90, np.uint8)] * 40)
    for name, options in {"k": ["--k", "5"], "one": ["--k", "1"], "p": ["--clustering", "pic"]}.items():
        assert train(tmp_path / name, "--epochs", "2", "--data", str(data), "--subset", "40", *options) == 0
        row = rows_of(tmp_path / name)[-1]
        assert math.isfinite(row["loss"]) and row["clusters"] == {"k": 5, "one": 1}.get(name, row["clusters"])
    assert rows_of(tmp_path / "one")[-1]["loss"] == 0
    assert train(tmp_path / "many", "--data", str(data), "--subset", "40", "--k", "41") == 2
    assert "--k 41 is more than the 40 images" in (tmp_path / "many-out0").read_text()


def test_only_singletons(tmp_path: Path) -> None:
    """If PIC finds singletons alone and drops them, the run ends with a word on sigma."""
    options = ["--clustering", "pic", "--sigma", "0.001", "--singletons", "drop"]
    assert train(tmp_path / "run", *options) == 2
    assert "--sigma median" in (tmp_path / "run-out0").read_text()


def test_assignments_name_their_files(tmp_path: Path) -> None:
    """A row of epochNNNN.npz belongs to a line of images.txt; --assign gives each image the nearest cluster."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 1, 1, 3), dtype=np.uint8)
    pictures = [np.broadcast_to(noise[i % 4], (16, 16, 3)).copy() for i in range(48)]  # four colours
    data = folder_of(tmp_path / "colours", pictures)
    options = ["--epochs", "1", "--data", str(data), "--subset", "48", "--k", "4", "--lr", "1e-9"]
    assert train(tmp_path / "run", *options) == 0
    names = (tmp_path / "run/assignments/images.txt").read_text().splitlines()
    clusters = clusters_of(tmp_path / "run", 1)
    assert names == [str(file) for file in sorted(data.iterdir())] and len(clusters) == len(names)
    new = folder_of(tmp_path / "new", pictures[:8])
    assert train(tmp_path / "run", "--assign", str(new)) == 0
    with (tmp_path / "run/assigned.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(file) for file in sorted(new.iterdir())]
    assert same_partition(torch.tensor([int(row["cluster"]) for row in rows]), torch.arange(8) % 4)
    assert train(tmp_path / "none", "--assign", str(new)) == 2


def test_assigned_clusters_are_the_nearest(tmp_path: Path) -> None:
    """--assign: by descriptors as they were clustered, after the ReLU if so, of the network in evaluation mode."""
    noise = np.random.default_rng(0).integers(0, 256, (332, 16, 16, 3), dtype=np.uint8)
    data, new = folder_of(tmp_path / "data", [*noise[:32]]), folder_of(tmp_path / "new", [*noise[32:]])
    options = ["--epochs", "1", "--subset", "32", "--k", "6", "--arch", "alexnet_bn", "--sobel",
               "--descriptors", "after"]
    assert train(tmp_path / "run", "--data", str(data), *options) == 0
    assert train(tmp_path / "run", "--assign", str(new)) == 0
    encoder = dc.Encoder("alexnet_bn", 4, True, 16, "full", True, 0.0).eval()
    encoder.load_state_dict(state_of(tmp_path / "run")["encoder"])
    images = torch.from_numpy(noise).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        h = encoder(common.normalize(images, common.IMAGENET.mean, common.IMAGENET.std)).relu()
    found = state_of(tmp_path / "run")["clusters"]["final"]
    x = F.normalize(h.to(found["projection"]) @ found["projection"] - found["offset"]).float()
    labels = clusters_of(tmp_path / "run", 1)
    means = torch.stack([x[:32][labels == cluster].mean(0) for cluster in range(6)])
    expected = torch.cdist(x[32:], means).argmin(1)
    with (tmp_path / "run/assigned.csv").open() as file:
        assert [int(row["cluster"]) for row in csv.DictReader(file)] == expected.tolist()
    assert len(expected.unique()) > 2


def test_assigned_images_are_seen_as_those_of_the_run(tmp_path: Path) -> None:
    """By the mean and deviation of the run's images, rendered ones here, though a folder has others."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    assert train(tmp_path / "run", "--epochs", "1", "--k", "6") == 0
    assert train(tmp_path / "run", "--assign", str(folder_of(tmp_path / "new", [*noise]))) == 0
    encoder = dc.Encoder("resnet18", 4, True, 16, "pooled", False, 0.0).eval()
    encoder.load_state_dict(state_of(tmp_path / "run")["encoder"])
    images, spec = torch.from_numpy(noise).permute(0, 3, 1, 2) / 255, common.DATASETS["shapes"]
    final = state_of(tmp_path / "run")["clusters"]["final"]
    with torch.no_grad():
        x = dc.whiten(encoder(common.normalize(images, spec.mean, spec.std)), final["projection"], final["offset"])
    expected = torch.cdist(x, final["centroids"]).argmin(1)
    with (tmp_path / "run/assigned.csv").open() as file:
        assert [int(row["cluster"]) for row in csv.DictReader(file)] == expected.tolist()
    assert len(expected.unique()) > 2
