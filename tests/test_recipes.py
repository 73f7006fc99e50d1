"""The papers' settings and augmentations, written down a second time: a number that slips in a script shows here."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cld
import common
import deepcluster
import figures
import local_aggregation
import npid

# ---- settings --------------------------------------------------------------------------------------------------------

NPID = dict(loss="nce", num_negatives=4096, temperature=0.07, batch_size=256, lr=0.03, schedule="step",
            lr_drops=[120, 160], epochs=200, weight_decay=1e-4, momentum=0.9, bank_momentum=0.5, feature_dim=128,
            proximal_weight=0.0, flip=True, z="first")
TABLE1 = dict(NPID, loss="softmax", arch="resnet18", width=64, temperature=0.1, batch_size=128, weight_decay=5e-4,
              flip=False)
LA = dict(num_neighbors=4096, temperature=0.07, batch_size=128, lr=0.03, schedule="step", weight_decay=1e-4,
          momentum=0.9, bank_momentum=0.5, feature_dim=128, warmup_epochs=10, flip=True, close="clusters",
          background="nearest", clustering="kmeans", cluster_on="bank", recluster_every=0)
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
CLD_100 = dict(CLD, data="imagenet100", arch="resnet50", batch_size=512, lr=0.8, weight_decay=1e-4, temperature=0.2,
               group_temperature=0.2)
KITCHEN = dict(CLD, batch_size=256, lr=0.03, weight_decay=1e-4, epochs=80, image_size=32)
STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5"]
LINEAR = dict(protocol="linear", layers=STAGES, layer_size=10_000, batch_size=256, momentum=0.9)
LINEAR_LA = dict(LINEAR, lr=[0.01], weight_decay=[1e-4], batch_size=128, schedule="step", lr_drop_factor=0.1)
FINETUNE = dict(protocol="finetune", lr=[0.01], schedule="step", momentum=0.9, head_factor=[1.0])
VOC = dict(data="voc07", protocol="voc07", batch_size=16, weight_decay=[1e-6], momentum=0.9, schedule="step",
           crop_scale=[0.1, 0.5])  # 5,011 images: a step is 16 / 5011 of an epoch
VOC_SVM = dict(data="voc07", protocol="voc07-svm", positive_weight=2.0, normalize="l2")
MOCO = dict(train_sizes=[480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], test_size=800, batch_size=16, lr=0.02,
            momentum=0.9, weight_decay=1e-4, warmup=100, freeze=0, bn="tuned", sync_bn=True, extra_bn=True)
FASTER = dict(data="voc07", lr=0.001, lr_drops=[50_000], momentum=0.9, bn="frozen")
FASTER_LA = dict(FASTER, iterations=70_000, weight_decay=1e-4, rois=128)
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
    "local_aggregation imagenet": ("Table 1", dict(LA, arch="resnet18", num_clusterings=10, num_clusters=30_000,
                                                   epochs=200, lr_drops=[160, 187])),
    "local_aggregation imagenet-alexnet": ("Table 1", dict(LA, arch="alexnet_bn_fc", num_clusterings=3,
                                                           num_clusters=30_000, epochs=160, lr_drops=[119, 142])),
    "local_aggregation imagenet-vgg16": ("Table 1", dict(LA, arch="vgg16_bn_fc", num_clusterings=6, num_clusters=10_000,
                                                         epochs=168, lr_drops=[126, 148])),
    "local_aggregation imagenet-resnet50": ("Table 1", dict(LA, arch="resnet50", num_clusterings=10,
                                                            num_clusters=30_000, epochs=200, lr_drops=[152, 189])),
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
    "cld imagenet100": ("supplement", dict(CLD_100, group_weight=0.25)),
    "cld imagenet-lt": ("supplement", dict(CLD, data="imagenet", file_list=Path("ImageNet_LT_train.txt"),
                                           batch_size=256, lr=0.03, weight_decay=1e-4)),
    "cld stl10": ("supplement", dict(CLD, batch_size=256, lr=0.03, weight_decay=1e-4)),
    **{f"cld kitchen-kmeans{k}": ("Table A.1", dict(KITCHEN, num_groups=k)) for k in (10, 64, 128, 256)},
    **{f"cld kitchen-spectral{k}": ("Table A.1", dict(KITCHEN, num_groups=k, clustering="spectral"))
       for k in (10, 64, 128, 256)},
    **{f"cld imagenet100-{host}-lambda{weight:g}": ("Table A.3", dict(CLD_100, host=host, group_weight=weight))
       for host in ("npid", "moco") for weight in (0, 0.1, 0.25, 0.5, 1, 3)},
    **{f"cld {data}-temperature{t:g}": ("Table A.4", dict(data=data, host="moco", group_weight=0.25, temperature=t,
                                                          group_temperature=t, head="linear"))
       for data in ("cifar100", "imagenet100") for t in (0.07, 0.1, 0.2, 0.3, 0.4, 0.5)},
    "eval_linear linear": ("thesis, Table 5.3", dict(LINEAR, epochs=90, schedule="inverse-sqrt")),
    "eval_linear linear-la": ("LA, ResNets", dict(LINEAR_LA, epochs=70, lr_drops=[30, 60])),
    "eval_linear linear-la-alexnet": ("LA", dict(LINEAR_LA, weight_decay=[0.0], epochs=65, lr_drops=[45, 55])),
    "eval_linear linear-la-vgg16": ("LA", dict(LINEAR_LA, epochs=51, lr_drops=[11, 41])),
    "eval_linear linear-moco": ("MoCo", dict(LINEAR, layers=["backbone"], lr=[30.0], weight_decay=[0.0], epochs=100,
                                             schedule="step", lr_drops=[60, 80], lr_drop_factor=0.1, test_crops=1)),
    "eval_linear svm": ("NPID, Table 2", dict(protocol="svm", layers=STAGES, cost=[0.01, 0.1, 1.0, 10.0])),
    "eval_linear svm-head": ("NPID, Table 1", dict(protocol="svm", layers=["head"], cost=[0.01, 0.1, 1.0, 10.0])),
    "eval_linear mlp": ("thesis, Table 5.2", dict(protocol="mlp", layers=["pool5"], epochs=90, dropout=0.5)),
    "eval_linear finetune": ("NPID, Fig. 6", dict(FINETUNE, labels=[0.01, 0.02, 0.04, 0.1, 0.2], balanced=False,
                                                  epochs=70, lr_drops=[30, 60], lr_drop_factor=0.1)),
    "eval_linear finetune-cld": ("supplement", dict(FINETUNE, labels=[0.01, 0.1], balanced=True, weight_decay=[1e-4],
                                                    batch_size=256, epochs=20, head_factor=[100.0], lr_drops=[12, 16],
                                                    lr_drop_factor=0.2)),
    "eval_linear lowshot": ("thesis, Fig. 5.1", dict(protocol="finetune", per_class=[4, 16, 64], draws=10)),
    "eval_linear voc07": ("80,000 steps", dict(
        VOC, trainable="fc", lr=[0.003], epochs=256, lr_drop_factor=0.5,
        lr_drops=[16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240])),
    "eval_linear voc07-all": ("150,000 steps", dict(VOC, trainable="all", lr=[0.001], epochs=479, lr_drop_factor=0.5,
                                                    lr_drops=[64, 128, 192, 256, 320, 384, 448])),
    "eval_linear voc07-svm": ("VISSL", dict(VOC_SVM, cost=[0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000])),
    "eval_linear voc07-lowshot": ("VISSL", dict(VOC_SVM, draws=5, per_class=[1, 2, 4, 8, 16, 32, 64, 96])),
    "eval_detection voc07": ("supplement", dict(MOCO, data="voc07", iterations=9000)),
    "eval_detection voc0712": ("supplement", dict(MOCO, data="voc0712", iterations=24_000, lr_drops=[18_000, 22_000])),
    "eval_detection voc07-la-resnet50": ("LA, B.4", dict(FASTER_LA, arch="resnet50", freeze=4)),
    "eval_detection voc07-la-vgg16": ("LA, B.4", dict(FASTER_LA, freeze=2)),
    "eval_detection voc07-la-alexnet": ("LA, B.4", dict(FASTER_LA, freeze=0)),
    "eval_detection voc07-npid-resnet50": ("NPID, 4.4", dict(FASTER, arch="resnet50", freeze=3)),
    "eval_detection voc07-fast-vgg16": ("NPID, 4.4", dict(FASTER, freeze=1, batch_size=2, rois=64)),
    "eval_detection voc07-fast-alexnet": ("NPID, 4.4", dict(FASTER, freeze=1, batch_size=2, rois=64)),
    "eval_segmentation voc12": ("thesis, Table 5.5", dict(data="voc12", freeze=0)),  # it prints no more
}


@pytest.mark.parametrize("row", SETTINGS)
def test_a_preset_has_the_papers_settings(row: str) -> None:
    """What a paper, its supplement or its released scripts print for a run is what its preset sets."""
    (script, preset), (source, wanted) = row.split(), SETTINGS[row]
    words = ["random"] * script.startswith("eval_") + ["--proposals", "regions.txt"] * preset.startswith("voc07-fast")
    args = vars(importlib.import_module(script).parse_args([*words, "--preset", preset]))
    assert {key: args[key] for key in wanted} == wanted, source


def test_small_images_have_their_own_statistics() -> None:
    """Means and deviations of CIFAR-10 and ImageNet are those of the authors' scripts."""
    assert common.DATASETS["cifar10"][1:] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert common.DATASETS["imagenet"] == (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert common.DATASETS["stl10"][1:] == ((0.5,) * 3, (0.5,) * 3)


# ---- tables ----------------------------------------------------------------------------------------------------------

# The presets of each table of figures.py, and under each column's name the figures that the paper prints for them.
PRINTED: dict[str, dict[str, str]] = {
    "npid-1": dict(presets="cifar10-parametric cifar10 cifar10-nce1 cifar10-nce10 cifar10-nce512 cifar10-nce4096",
                   knn="63.0 80.8 42.5 63.4 78.4 80.4", svm="60.3 75.4 44.3 60.2 64.3 70.2"),
    "npid-2": dict(presets="imagenet-alexnet imagenet-vgg16 imagenet-resnet18 imagenet-resnet50",
                   knn="31.3 33.9 40.5 42.5"),
    "npid-4": dict(presets="imagenet-dim32 imagenet-dim64 imagenet-resnet18 imagenet-dim256",
                   knn="34.0 38.8 40.5 40.1"),
    "npid-5": dict(presets="imagenet-0.1percent imagenet-1percent imagenet-10percent imagenet-30percent "
                   "imagenet-resnet18", knn="3.9 10.7 23.1 31.7 40.5"),
    "la-1": dict(presets="imagenet-alexnet imagenet-vgg16 imagenet imagenet-resnet50", knn="38.1 46.6 45.0 49.4"),
    "la-4": dict(presets="table4-all table4-clusters table4-nearest", nn="30.2 33.2 35.7"),
    "la-5": dict(presets="table5-self table5-nearest table4-nearest table5-3-10k table5-10-10k imagenet",
                 nn="33.9 0.1 35.7 36.2 36.1 37.9"),
    "la-supplement-1": dict(
        presets="supplement1-1-1k table4-nearest supplement1-1-20k table5-3-10k supplement1-6-10k table5-10-10k "
        "imagenet supplement1-alexnet-1-10k supplement1-alexnet-3-10k supplement1-alexnet-6-10k "
        "supplement1-vgg16-1-10k imagenet-vgg16 "
        "supplement1-resnet50-1-10k supplement1-resnet50-6-10k supplement1-resnet50-10-10k imagenet-resnet50",
        nn="35.2 35.7 35.0 36.2 37.3 36.1 37.9 30.6 31.1 30.4 38.9 39.7 40.2 42.4 42.3 43.4"),
    "la-supplement-3": dict(presets="table4-nearest supplement3-k2048 supplement3-k8192 supplement3-center-crop "
                            "supplement3-more-freq", nn="35.7 35.4 35.8 35.8 35.7"),
    "deepcluster-4.1": dict(  # its heads are printed the wrong way round: the text has "before" as the better one
        presets=" ".join(f"table4.1-{way}-{when}" for way in ("pic", "k100", "k1000", "k10000")
                         for when in ("before", "after")),
        mlp="33.2 21.9 30.2 33.5 33.8 33.4 33.1 31.1"),
    "deepcluster-4.2": dict(presets="table4.2 table4.2-256 table4.2-512", top1="56.1 54.2 55.6"),
    "deepcluster-4.3": dict(presets="pic-imagenet-sobel table4.3-256 table4.3-512 table4.3-1024 table4.3-2048 "
                            "table4.3-4096", step="154.0 177.0 211.0 277.0 396.0 713.0"),
    "deepcluster-5.2": dict(presets="pic-imagenet-sobel kmeans-imagenet-sobel kmeans-imagenet-rgb "
                            "kmeans-flickr1m-sobel kmeans-flickr2m-sobel", mlp="45.9 44.0 37.1 39.6 40.1"),
    "cld-a1": dict(presets=" ".join(f"kitchen-spectral{k} kitchen-kmeans{k}" for k in (10, 64, 128, 256)),
                   knn="77.1 78.9 74.5 76.3 72.6 73.4 70.5 70.8"),
    "cld-a2": dict(presets="cifar10-no-cld cifar10-shared cifar10-separate cifar10", knn="80.8 82.7 84.2 86.5"),
    "cld-a2-cifar100": dict(presets="cifar100-no-cld cifar100-shared cifar100-separate cifar100",
                            knn="51.6 53.3 55.0 57.5"),
    "cld-a3-npid": dict(presets=" ".join(f"imagenet100-npid-lambda{w}" for w in (0, 0.1, 0.25, 0.5, 1, 3)),
                        linear1="75.3 78.8 79.7 78.9 78.8 76.6", linear5="92.4 94.4 95.1 94.4 94.5 93.2"),
    "cld-a3-moco": dict(presets=" ".join(f"imagenet100-moco-lambda{w}" for w in (0, 0.1, 0.25, 0.5, 1, 3)),
                        linear1="77.6 80.3 81.7 80.5 80.1 78.4", linear5="93.8 95.0 95.7 95.2 94.8 94.1"),
    "cld-a4-cifar100": dict(presets=" ".join(f"cifar100-temperature{t}" for t in (0.07, 0.1, 0.2, 0.3, 0.4, 0.5)),
                            knn="57.9 57.8 58.1 58.1 57.6 57.2"),
    "cld-a4-imagenet100": dict(presets=" ".join(f"imagenet100-temperature{t}" for t in (0.07, 0.1, 0.2, 0.3, 0.4, 0.5)),
                               linear1="79.3 79.6 81.7 80.7 79.4 79.0"),
}


@pytest.mark.parametrize("key", figures.TABLES)
def test_a_table_has_the_papers_figures(key: str) -> None:
    """Beside each preset figures.py has what the paper prints for it."""
    table = figures.TABLES[key]
    columns = zip(("presets", *table.columns), zip(*table.rows.values(), strict=True), strict=True)
    assert {name: " ".join(map(str, column)) for name, column in columns} == PRINTED[key]


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
