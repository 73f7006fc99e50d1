"""The papers' settings and augmentations, written down a second time: a number that slips in a script shows here."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cld
import common
import deepcluster
import local_aggregation
import npid

# ---- settings --------------------------------------------------------------------------------------------------------

NPID = dict(loss="nce", num_negatives=4096, temperature=0.07, batch_size=256, lr=0.03, schedule="step",
            lr_drops=[120, 160], epochs=200, weight_decay=1e-4, momentum=0.9, bank_momentum=0.5, feature_dim=128,
            proximal_weight=0.0, flip=True, z="first")
TABLE1 = dict(NPID, loss="softmax", arch="resnet18", width=64, temperature=0.1, batch_size=128, weight_decay=5e-4,
              flip=False)
LA = dict(k=4096, temperature=0.07, batch_size=128, lr=0.03, schedule="step", weight_decay=1e-4, momentum=0.9,
          bank_momentum=0.5, feature_dim=128, warmup_epochs=10, flip=True, close="clusters", background="nearest",
          clustering="kmeans", cluster_on="bank", recluster_every=0)
DEEPCLUSTER = dict(arch="alexnet_bn", head="full", sobel=True, descriptors="before", feature_dim=256, batch_size=256,
                   schedule="constant", momentum=0.9, weight_decay=1e-5, dropout=0.5, epochs=500, reassign_every=1,
                   sampling="clusters", crop="random-sized", min_crop=0.08, empties="half", num_neighbors=5, sigma=0.2,
                   singletons="redistribute")
CLD = dict(momentum=0.9, bank_momentum=0.5, feature_dim=128, epochs=200, kmeans_iterations=5, clustering="spherical",
           branches="separate", cross_view=True)
CLD_CIFAR = dict(CLD, arch="resnet18", batch_size=256, lr=0.06, schedule="cosine", warmup_epochs=5, weight_decay=7e-4,
                 group_weight=1.0, temperature=0.1, group_temperature=0.2, host="npid", head="linear")
CLD_MOCO = dict(CLD_CIFAR, host="moco", temperature=0.07, head="norm-linear", key_momentum=0.999)
CLD_IMAGENET = dict(CLD, arch="resnet50", batch_size=512, lr=0.2, schedule="cosine", weight_decay=1e-4,
                    group_weight=0.25, num_groups=120, queue_size=65536, key_momentum=0.999, groups_over="local",
                    head="norm-mlp")
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "npid imagenet-resnet50": ("1.2", dict(NPID, arch="resnet50")),
    "npid imagenet-alexnet": ("1.2", dict(NPID, arch="alexnet")),
    "npid imagenet-vgg16-bn": ("LA, Table 1", dict(NPID, arch="vgg16_bn_fc", batch_size=128)),
    "npid imagenet": ("exact instead of NCE", dict(NPID, loss="softmax")),
    "npid cifar10": ("Table 1", TABLE1),
    "npid cifar10-nce1": ("Table 1", dict(TABLE1, loss="nce", num_negatives=1)),
    "npid cifar10-nce512": ("Table 1", dict(TABLE1, loss="nce", num_negatives=512)),
    "npid cifar10-nce4096": ("Table 1", dict(TABLE1, loss="nce")),
    "npid cifar10-parametric": ("Table 1", dict(TABLE1, loss="parametric")),
    "npid imagenet-dim32": ("Table 4", dict(NPID, arch="resnet18", feature_dim=32)),
    "npid imagenet-30percent": ("Table 5", dict(NPID, arch="resnet18", subset=0.3)),
    "local_aggregation imagenet": ("Table 1", dict(LA, arch="resnet18", H=10, m=30_000, epochs=200,
                                                   lr_drops=[160, 187])),
    "local_aggregation imagenet-alexnet": ("Table 1", dict(LA, arch="alexnet_bn_fc", H=3, m=30_000, epochs=160,
                                                           lr_drops=[119, 142])),
    "local_aggregation imagenet-vgg16": ("Table 1", dict(LA, arch="vgg16_bn_fc", H=6, m=10_000, epochs=178,
                                                         lr_drops=[136, 158])),
    "local_aggregation imagenet-resnet50": ("Table 1", dict(LA, arch="resnet50", H=10, m=30_000, epochs=200,
                                                            lr_drops=[152, 189])),
    "deepcluster kmeans-imagenet-sobel": ("Table 5.1", dict(DEEPCLUSTER, lr=0.02, clustering="kmeans",
                                                            num_clusters=10_000)),
    "deepcluster kmeans-imagenet-rgb": ("Table 5.1", dict(DEEPCLUSTER, lr=0.02, clustering="kmeans", num_clusters=1000,
                                                          sobel=False, weight_decay=1e-6)),
    "deepcluster pic-imagenet-sobel": ("Table 5.1", dict(DEEPCLUSTER, lr=0.05, clustering="pic")),
    "cld cifar10": ("released", dict(CLD_CIFAR, num_groups=128)),
    "cld cifar100": ("released", dict(CLD_CIFAR, num_groups=200)),
    "cld cifar10-no-cld": ("Table A.2", dict(CLD_CIFAR, group_weight=0.0)),
    "cld cifar10-shared": ("Table A.2", dict(CLD_CIFAR, branches="shared", cross_view=False)),
    "cld cifar10-separate": ("Table A.2", dict(CLD_CIFAR, cross_view=False)),
    "cld cifar10-moco-cld": ("released", dict(CLD_MOCO, weight_decay=8e-4, group_weight=0.8, num_groups=200,
                                              queue_size=12_288, augment="mocov2", erase=1.0)),
    "cld cifar100-moco-cld": ("released", dict(CLD_MOCO, lr=0.03, batch_size=128, group_weight=0.25, num_groups=100,
                                               queue_size=4096)),
    "cld imagenet-mocov2-cld": ("released", dict(CLD_IMAGENET, host="mocov2", temperature=0.2, group_temperature=0.4)),
    "cld imagenet-infomin-cld": ("released", dict(CLD_IMAGENET, host="infomin", temperature=0.15, group_temperature=0.8,
                                                  epochs=100)),
    "cld imagenet100": ("supplement", dict(CLD, batch_size=512, lr=0.8, weight_decay=1e-4, group_weight=0.25,
                                           temperature=0.2, group_temperature=0.2)),
    "cld stl10": ("supplement", dict(CLD, batch_size=256, lr=0.03, weight_decay=1e-4)),
    "cld kitchen-kmeans10": ("Table A.1", dict(CLD, batch_size=256, lr=0.03, weight_decay=1e-4, epochs=80,
                                               image_size=32, num_groups=10)),
}


@pytest.mark.parametrize("row", SETTINGS)
def test_a_preset_has_the_papers_settings(row: str) -> None:
    """What a paper, its supplement or its released scripts print for a run is what its preset sets."""
    (script, preset), (source, wanted) = row.split(), SETTINGS[row]
    args = vars(importlib.import_module(script).parse_args(["--preset", preset]))
    assert {key: args[key] for key in wanted} == wanted, source


def test_small_images_have_their_own_statistics() -> None:
    """Means and deviations of CIFAR-10 and ImageNet are those of the authors' scripts."""
    assert common.DATASETS["cifar10"][1:] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert common.DATASETS["imagenet"] == (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert common.DATASETS["stl10"][1:] == ((0.5,) * 3, (0.5,) * 3)


# ---- augmentation ----------------------------------------------------------------------------------------------------


def draws(count: int) -> common.Draw:
    """The same numbers each time."""
    return common.Draw(torch.Generator().manual_seed(0), count, slice(None), common.CPU)


def grey(images: Tensor, draw: common.Draw) -> Tensor:
    return common.random_grayscale(images, draw, 0.2)


def flip(images: Tensor, draw: common.Draw) -> Tensor:
    return common.random_flip(images, draw)


def jitter(
    brightness: float, contrast: float, saturation: float, hue: float, probability: float
) -> Callable[[Tensor, common.Draw], Tensor]:
    return lambda images, draw: common.random_color_jitter(images, draw, brightness, contrast, saturation, hue,
                                                           probability)


def blur(probability: float) -> Callable[[Tensor, common.Draw], Tensor]:
    return lambda images, draw: common.random_blur(images, draw, (0.1, 2.0), 23, probability)


def solarize(images: Tensor, draw: common.Draw) -> Tensor:
    """A fifth of the images, their bright half inverted."""
    return common.choose(draw() < 0.2, torch.where(images < 0.5, images, 1 - images), images)


INSTANCE, MOCO2 = jitter(0.4, 0.4, 0.4, 0.4, 1.0), jitter(0.4, 0.4, 0.4, 0.1, 0.8)
BYOL, INFOMIN = jitter(0.4, 0.4, 0.2, 0.1, 0.8), jitter(0.8, 0.8, 0.8, 0.2, 0.8)
RECIPES: dict[str, tuple[Callable[..., Tensor], list[Callable[[Tensor, common.Draw], Tensor]]]] = {
    **{f"{script.__name__}, {kind}": (functools.partial(script.augment, photographs=kind == "photographs", flip=flips),
                                      steps)
       for script in (npid, local_aggregation)
       for kind, flips, steps in (("photographs", True, [grey, INSTANCE, flip]), ("CIFAR", False, [INSTANCE, grey]),
                                  ("small", True, [INSTANCE, grey, flip]))},
    "deepcluster": (functools.partial(deepcluster.augment, flip="horizontal", size=24), [flip]),
    **{f"cld {name}, view {view}": (functools.partial(cld.augment, name=name, view=view, photographs=True), steps)
       for name, views in (("plain", [[grey, INSTANCE, flip]] * 3), ("mocov2", [[MOCO2, blur(0.5), grey, flip]] * 3),
                           ("byol", [[BYOL, blur(1.0), grey, flip], [BYOL, blur(0.1), grey, solarize, flip]]),
                           ("infomin", [[INFOMIN, blur(0.5), cld.rand_augment, grey, flip]] * 3))
       for view, steps in enumerate(views)},
    "cld plain, small": (functools.partial(cld.augment, name="plain", view=0, photographs=False),
                         [INSTANCE, grey, flip]),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_its_steps_in_their_order(recipe: str) -> None:
    """Each recipe is the chain of operations that its source has, of the same strengths, shares and order."""
    augment, steps = RECIPES[recipe]
    images, draw = torch.rand(64, 3, 24, 24), draws(64)
    expected = images
    for step in steps:
        expected = step(expected, draw)
    torch.testing.assert_close(augment(images, draws(64)), expected, rtol=0, atol=1e-6)


def test_crops_have_the_papers_areas() -> None:
    """A crop has 20 to 100 % of the image; of DeepCluster and BYOL 8 to 100 %."""
    assert npid.SCALE == local_aggregation.SCALE == (0.2, 1.0)
    assert {name: recipe.scale for name, recipe in cld.RECIPES.items()} == dict(
        plain=(0.2, 1.0), mocov2=(0.2, 1.0), byol=(0.08, 1.0), infomin=(0.2, 1.0))
    assert common.Crop(32, (0.2, 1.0)).ratio == (3 / 4, 4 / 3)
