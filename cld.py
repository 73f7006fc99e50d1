"""Cross-Level Instance-Group Discrimination (Wang, Liu and Yu, CVPR 2021, arXiv:2008.03813).

Telling instances apart also pushes similar images apart. CLD adds to a host method a second branch on the same trunk:
k-means groups the batch in each of two views, x and x'. An image in one view has to find, among the other view's group
centroids M', the group g' that it belongs to there. That pulls an image towards similar ones, and only whole groups
push it away:

    L = L_instance(f_I) + lambda * mean of CE(f_G(x) . M' / T_G, g') and CE(f_G(x') . M / T_G, g)

`--host` is npid (softmax over a bank of all images), moco or mocov2 (a queue of keys), byol, or infomin. Each is a
small class below with `instance_loss` and `after_step`; the loop is the same for all. `--lambda 0` is the host alone,
bit for bit.

    python cld.py                                  # NPID+CLD on rendered shapes, for a first try
    python cld.py --data cifar10                   # Table A.2: 86.5 kNN in the paper, 80.8 without CLD
    python cld.py --data cifar10 --host byol       # any host with any preset
    torchrun --nproc-per-node 8 cld.py --preset imagenet-mocov2-cld      # 70.0 linear in the authors' README
    python cld.py --preset cifar10 --help          # every value of that preset

Differences from the paper and from the authors' code:
  * k-means is spherical, as the supplement's eq. (1) writes it; `--clustering euclidean` is the code's, with plain
    means as centroids. As in the code it starts from the first rows, and the gradient reaches the centroids alone.
  * Spectral clustering takes the eigenvectors of the Laplacian's k smallest eigenvalues; those of the largest, as the
    text has it, do not separate two blobs. The affinity is |cosine|, with an empty diagonal.
  * An empty group keeps its centroid while k-means runs and is no class in the loss; in the code one of logit 0.
  * Without --accumulate the whole batch is grouped at once, on any number of GPUs. `--groups-over local` is the code's:
    its 120 groups of 64 images are single images and empty classes. Here there are at most as many as rows.
  * The bank is written once a step, after the optimiser's step, with the mean of both views; in the code twice.
  * The key encoder is a moving average of the parameters alone. It stays in training mode and has batch statistics of
    its own, which no evaluation reads. Against information leaking through them there is --sync-bn for both encoders,
    in place of MoCo's shuffling.
  * InfoMin's nine patches, 55 px wide, are cut from a crop of the usual size and scale; in its own code they are 64 px
    wide, from a crop of 255 px and scale (0.6, 1). Its RandAugment has torchvision's 14 operations, always at full
    strength, in either direction, on a grey ground; its own code has 15 (additive solarising, no identity), of a
    strength drawn near the full one, which only raise colour, contrast, brightness and sharpness.
    BYOL is trained with SGD, not LARS.
  * Rates change with each step, and the cosine runs to 0 over all epochs, times the warm-up's factor. In the code
    CIFAR's cosine begins after the warm-up and ends at 1e-6, and ImageNet's rate changes once an epoch.
  * `cifar10` and `cifar100` are the released scripts' settings, `cifar10-supplement` and `cifar100-supplement` the
    text's. For MoCo+CLD on CIFAR the scripts have normalised heads; the published figures are of linear ones.
  * STL-10, at 96 px, has the stem of photographs, and grey before jitter; in the code CIFAR's, and grey after jitter.

log.jsonl has, for each epoch: loss, instance_loss, group_loss; instance_accuracy (how often an image's own slot or key
is nearest; npid: over 32 rows); group_accuracy; groups_alive in a view; intra and inter, mean cosine of f_G with its
centroid and of two centroids; feature_std of f_I (1: spread over the sphere, 0: collapsed); knn_top1 (K = 200,
temperature T_I, no bank).
"""

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as ops

import common

# ---- presets ---------------------------------------------------------------------------------------------------------
# "imagenet" is the base of all, the supplement's settings, and serves any directory; a preset lists what differs.

# Few images: a sharp softmax and a slow bank leave a fresh network's features alike, as npid.py says.
THIN: dict[str, Any] = dict(subset=5000, width=16, epochs=20, batch_size=64, schedule="cosine", warmup_epochs=1,
                            temperature=0.2, bank_momentum=0.0, weight_decay=7e-4, group_weight=1.0, num_groups=32,
                            knn_every=5)
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": dict(host="npid", group_weight=0.25, temperature=0.2, group_temperature=0.2, num_groups=120, lr=0.03,
                     batch_size=256, schedule="step", lr_drops=[120, 160], epochs=200, weight_decay=1e-4),
    "imagenet100": dict(data="imagenet100", arch="resnet50", batch_size=512, lr=0.8),
    "imagenet-lt": dict(data="imagenet", arch="resnet50", file_list="ImageNet_LT_train.txt"),
    "stl10": dict(data="stl10"),
    "shapes": dict(data="shapes", schedule="cosine", warmup_epochs=5, temperature=0.1, num_groups=64, queue_size=4096),
    "instances": dict(THIN, data="shapes", instances=500),  # correlated, in place of Kitchen-HC
    "demo": dict(THIN, data="shapes", knn_every=2),
    "smoke": dict(THIN, data="shapes", subset=256, test_subset=100, width=4, epochs=2, batch_size=32, feature_dim=32,
                  num_groups=8, queue_size=64, knn_every=1),
}

# What the rows of Table A.2 leave out of the method: here of THIN, further down of the paper's own settings.
NO_CLD = dict(group_weight=0.0)
ABLATION: dict[str, dict[str, Any]] = {
    "": {}, "-no-cld": NO_CLD, "-separate": dict(cross_view=False),
    "-shared": dict(branches="shared", cross_view=False),
}
PRESETS |= {f"thin-{data}{part}": dict(THIN, data=data, **row) for data in ("cifar10", "shapes")
            for part, row in ABLATION.items()}

# Settings of the released scripts; their rate, 0.03 x B / 128, is 0.06 at B = 256.
NPID = dict(schedule="cosine", warmup_epochs=5, temperature=0.1, lr=0.06, weight_decay=7e-4, group_weight=1.0)
MOCO = dict(NPID, host="moco", head="norm-linear", temperature=0.07)
CIFAR: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cifar10": (dict(NPID, num_groups=128), dict(MOCO, augment="mocov2", erase=1.0, weight_decay=8e-4, group_weight=0.8,
                                                 num_groups=200, queue_size=12288)),
    "cifar100": (dict(NPID, num_groups=200), dict(MOCO, lr=0.03, batch_size=128, group_weight=0.25, num_groups=100,
                                                  queue_size=4096)),
}
for name, (npid, moco) in CIFAR.items():
    PRESETS |= {f"{name}{part}": dict(npid, data=name, **row) for part, row in ABLATION.items()}
    PRESETS[f"{name}-supplement"] = dict(data=name)
    PRESETS[f"{name}-lt"] = dict(npid, data=name, imbalance=100.0)  # the paper does not print its ratio
    PRESETS[f"{name}-moco"] = dict(moco, data=name, head="linear", **NO_CLD)
    PRESETS[f"{name}-moco-cld"] = dict(moco, data=name)
    PRESETS[f"{name}-moco-cld-linear"] = dict(moco, data=name, head="linear")

IMAGENET = dict(data="imagenet", arch="resnet50", batch_size=512, lr=0.2, schedule="cosine", groups_over="local",
                sync_bn=True)
MOCOV2 = dict(IMAGENET, host="mocov2", group_temperature=0.4)
INFOMIN = dict(IMAGENET, host="infomin", group_temperature=0.8, temperature=0.15, warmup_epochs=5)
for name, row in (("mocov2", MOCOV2), ("infomin", dict(INFOMIN, epochs=100)), ("infomin-200", INFOMIN)):
    PRESETS[f"imagenet-{name}"] = dict(row, **NO_CLD)
    PRESETS[f"imagenet-{name}-cld-mlp"] = dict(row)
    PRESETS[f"imagenet-{name}-cld"] = dict(row, head="norm-mlp")

NPID_100, MOCO_100 = PRESETS["imagenet100"], dict(PRESETS["imagenet100"], host="moco", sync_bn=True)
KITCHEN = dict(data="kitchen-hc", image_size=32, epochs=80, lr_drops=[48, 64])  # crops, see tools/crop_boxes.py
PRESETS |= {f"kitchen-kmeans{k}": dict(KITCHEN, num_groups=k) for k in (10, 64, 128, 256)}  # Table A.1
PRESETS |= {f"kitchen-spectral{k}": dict(KITCHEN, num_groups=k, clustering="spectral") for k in (10, 64, 128, 256)}
PRESETS |= {f"imagenet100-{host}-lambda{w:g}": dict(row, group_weight=w)
            for host, row in (("npid", NPID_100), ("moco", MOCO_100))
            for w in (0.0, 0.1, 0.25, 0.5, 1.0, 3.0)}  # Table A.3
PRESETS |= {f"{name}-temperature{t:g}": dict(row, temperature=t, group_temperature=t)
            for name, row in (("cifar100", PRESETS["cifar100-moco-cld-linear"]), ("imagenet100", MOCO_100))
            for t in (0.07, 0.1, 0.2, 0.3, 0.4, 0.5)}  # Table A.4; its 58.1 has linear heads in the authors' README
PRESETS |= {f"{name}-queue{size}": dict(row, queue_size=size, **NO_CLD)  # Fig. A.2; it prints no sizes, these are ours
            for name, row in (("cifar10-moco", PRESETS["cifar10-moco"]), ("imagenet100-moco", MOCO_100))
            for size in (1024, 4096, 16384, 65536) if size < 50_000 or name != "cifar10-moco"}


# ---- options ---------------------------------------------------------------------------------------------------------


HOSTS: dict[str, dict[str, Any]] = {  # the defaults of their options
    "npid": dict(head="linear", augment="plain", key_momentum=0.0),
    "moco": dict(head="linear", augment="plain", key_momentum=0.999),
    "mocov2": dict(head="mlp", augment="mocov2", key_momentum=0.999),
    "byol": dict(head="bn-mlp", augment="byol", key_momentum=0.996),
    "infomin": dict(head="mlp", augment="infomin", key_momentum=0.999),
}
CROPS = dict(npid=2, moco=3, mocov2=3, byol=2, infomin=4)  # two views, a third for the keys, a fourth for the patches


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    method = parser.add_argument_group("method")
    method.add_argument("--host", choices=list(HOSTS), default="npid", help="method that CLD is added to")
    method.add_argument("--lambda", "--group-weight", dest="group_weight", type=common.NOT_NEGATIVE, default=0.25,
                        metavar="LAMBDA", help="lambda, weight of the cross-level loss; 0: the host alone")
    method.add_argument("--T-I", "--temperature", dest="temperature", type=common.POSITIVE, default=0.2, metavar="T_I",
                        help="T_I of the instance loss (not of byol)")
    method.add_argument("--T-G", "--group-temperature", dest="group_temperature", type=common.POSITIVE, default=0.2,
                        metavar="T_G", help="T_G of the cross-level loss")
    method.add_argument("--k", "--num-groups", dest="num_groups", type=common.COUNT, default=120, metavar="K",
                        help="groups of a view; at most its rows; fewer for highly correlated data")
    method.add_argument("--clustering", choices=["spherical", "euclidean", "spectral"], default="spherical",
                        help="spherical: k-means by the supplement's eq. (1); euclidean: the authors' code; spectral: "
                        "the supplement's section 3")
    method.add_argument("--kmeans-iterations", type=common.COUNT, default=5, metavar="N", help="of k-means, in each "
                        "training step")
    method.add_argument("--groups-over", choices=["all", "local"], default="all",
                        help="all: groups of the batch of all ranks; local: of each rank's own part, as in the code; "
                        "either way, of one part of --accumulate at a time")
    method.add_argument("--branches", choices=["separate", "shared"], default="separate",
                        help="f_G has a head of its own or is f_I (Table A.2)")
    method.add_argument("--cross-view", action=argparse.BooleanOptionalAction, default=True,
                        help="compare a view with the other's groups; --no-cross-view: with its own (Table A.2)")
    method.add_argument("--head", choices=["linear", "norm-linear", "mlp", "norm-mlp", "bn-mlp"],
                        help="of both branches, which share the hidden layer of an MLP; default: the host's")
    method.add_argument("--bank-momentum", type=common.SHARE, default=0.5, metavar="SHARE",
                        help="npid: share of the old feature in v_i <- normalize(share * v_i + (1 - share) * f_i)")
    method.add_argument("--queue-size", type=common.COUNT, default=65536, metavar="N", help="moco, infomin: keys kept")
    method.add_argument("--key-momentum", type=common.SHARE, metavar="M", help="of the momentum encoder; byol's "
                        "grows to 1 at --epochs; default: 0.999, byol 0.996")
    method.add_argument("--augment", choices=list(RECIPES), help="default: the host's")
    method.add_argument("--erase", type=common.SHARE, default=0.0, metavar="P", help="probability that a box of a "
                        "view is erased")
    method.add_argument("--warmup-epochs", type=common.COUNT_OR_ZERO, default=0, metavar="N", help="first epochs, in "
                        "which the rate rises from lr / 100 to lr")
    method.add_argument("--instances", type=common.COUNT, metavar="N", help="shapes only: train on crops of N rendered "
                        "images, a correlated set")
    common.add_training_options(parser)
    args = common.parse(parser, PRESETS, argv)
    for key, value in HOSTS[args.host].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.instances and args.imbalance:
        parser.error("--instances renders images anew, of classes of equal size: leave --imbalance out")
    of_groups = ("num_groups", "group_temperature", "clustering", "kmeans_iterations", "groups_over", "branches",
                 "cross_view")
    idle = {name: (args.group_weight > 0, "--lambda above 0") for name in of_groups}
    common.note_idle(args, idle | dict(bank_momentum=(args.host == "npid", "--host npid"),
                                       key_momentum=(args.host != "npid", "another --host than npid"),
                                       queue_size=(CROPS[args.host] > 2, "--host moco, mocov2 or infomin")))
    return args


# ---- training sets ---------------------------------------------------------------------------------------------------


def views_of_instances(data: common.ImageSet, count: int, seed: int) -> common.ImageSet:
    """As many images, but crops of only `count` rendered ones: a stand-in for sets such as Kitchen-HC."""
    if data.name != "shapes" or data.pixels is None:
        raise common.Fault(f"--instances renders shapes, not {data.name}")
    pixels, labels = common.shapes(count, seed, size=2 * data.size)
    instance = torch.arange(len(data)) % count
    source, views = common.generator(seed, "instances"), list[Tensor]()
    for part in torch.split(instance, 1000):
        draw = common.Draw(source, len(part), slice(None), common.CPU)
        boxes = common.crop_boxes(draw(common.CROP_NUMBERS), pixels.shape[2], pixels.shape[3], (0.3, 1.0))
        images = common.random_flip(common.resized_crop(pixels[part], boxes, data.size), draw)
        views.append(common.to_bytes(common.random_color_jitter(images, draw, 0.2, 0.2, 0.2, 0.05)))
    return dataclasses.replace(data, pixels=torch.cat(views).to(data.pixels.device), labels=labels[instance])


# ---- augmentation ----------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """Colour jitter (strengths, share of the images); shares of blurred and solarised images in views 1 and 2."""

    jitter: tuple[float, float, float, float]
    jittered: float
    blurred: tuple[float, float] = (0.0, 0.0)
    solarized: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (0.2, 1.0)  # of RandomResizedCrop


RECIPES = {
    "plain": Recipe((0.4, 0.4, 0.4, 0.4), 1.0),
    "mocov2": Recipe((0.4, 0.4, 0.4, 0.1), 0.8, (0.5, 0.5)),
    "byol": Recipe((0.4, 0.4, 0.2, 0.1), 0.8, (1.0, 0.1), (0.0, 0.2), (0.08, 1.0)),
    "infomin": Recipe((0.8, 0.8, 0.8, 0.2), 0.8, (0.5, 0.5)),
}


def augment(images: Tensor, draw: common.Draw, name: str, view: int, photographs: bool) -> Tensor:
    """Crops (B, 3, S, S) in [0, 1] -> the same, augmented by a recipe, for view 0, 1, ... of the images."""
    recipe, which = RECIPES[name], min(view, 1)  # the keys' crop and the patches': as view 2
    grey_first = name == "plain" and photographs  # as NPID and MoCo have it
    if grey_first:
        images = common.random_grayscale(images, draw, 0.2)
    images = common.random_color_jitter(images, draw, *recipe.jitter, probability=recipe.jittered)
    if recipe.blurred[which]:
        images = common.random_blur(images, draw, (0.1, 2.0), kernel_size=23, probability=recipe.blurred[which])
    if name == "infomin":
        images = rand_augment(images, draw)
    if not grey_first:
        images = common.random_grayscale(images, draw, 0.2)
    if recipe.solarized[which]:
        images = common.choose(draw() < recipe.solarized[which], torch.minimum(images, 1 - images), images)
    return common.random_flip(images, draw)


@torch.no_grad()
def random_erase(images: Tensor, draw: common.Draw, probability: float) -> Tensor:
    """Each normalised image (B, 3, S, S) loses, with this probability, a box of 2 to 33 % of its area to zeros."""
    boxes = common.crop_boxes(draw(common.CROP_NUMBERS), images.shape[2], images.shape[3], (0.02, 0.33), (0.3, 3.3))
    top, left, height, width = boxes.T[..., None]
    side = torch.arange(images.shape[2], device=images.device)
    down, across = (side >= top) & (side < top + height), (side >= left) & (side < left + width)
    box = down[:, None, :, None] & across[:, None, None, :] & common.per_image(draw() < probability)
    return images.masked_fill(box, 0)


def strong_operations(side: int) -> list[Callable[[Tensor], Tensor]]:
    """RandAugment's 14 operations on images (b, 3, side, side), at full strength and once of each sign: 28."""
    # Full strength of RandAugment: shear 0.3, and 150 px of images of 331 px
    lean, slide = math.degrees(math.atan(0.3)), int(150 / 331 * side)
    still: dict[str, Any] = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0], fill=[0.5])

    def of(sign: int) -> list[Callable[[Tensor], Tensor]]:
        return [
            lambda images: ops.affine(images, **still | dict(shear=[sign * lean, 0.0], center=[0, 0])),
            lambda images: ops.affine(images, **still | dict(shear=[0.0, sign * lean], center=[0, 0])),
            lambda images: ops.affine(images, **still | dict(translate=[sign * slide, 0])),
            lambda images: ops.affine(images, **still | dict(translate=[0, sign * slide])),
            lambda images: ops.rotate(images, sign * 30.0, fill=[0.5]),
            lambda images: ops.adjust_brightness(images, 1 + 0.9 * sign),
            lambda images: ops.adjust_saturation(images, 1 + 0.9 * sign),
            lambda images: ops.adjust_contrast(images, 1 + 0.9 * sign),
            lambda images: ops.adjust_sharpness(images, 1 + 0.9 * sign),
            lambda images: ops.posterize(images, 4), lambda images: ops.solarize(images, 0.0),
            ops.autocontrast, ops.equalize, lambda images: images,
        ]

    return of(1) + of(-1)


@torch.no_grad()
def rand_augment(images: Tensor, draw: common.Draw) -> Tensor:
    """RandAugment of InfoMin: two operations at full strength, each with probability 1/2, drawn for each image."""
    operations = strong_operations(images.shape[3])
    numbers = common.Draw(draw.source, draw.batch_size, draw.rows, common.CPU)(2, 2)  # read without a wait for the GPU
    images = images.clone()
    for number in numbers.unbind(1):
        which = torch.where(number[:, 1] < 0.5, (number[:, 0] * len(operations)).long(), len(operations))
        counts = which.bincount(minlength=len(operations) + 1).tolist()
        order = common.sent(which.argsort(stable=True), images.device)
        together = torch.split(order, counts)  # the last ones stay as they are
        for operation, rows in zip(operations, together, strict=False):
            if len(rows):
                images[rows] = operation(images[rows])
    return images


def patches(images: Tensor, draw: common.Draw) -> Tensor:
    """Jigsaw of InfoMin: a patch of each cell, 3 x 3, of crops (B, 3, S, S), in random order: (B, 9, 3, P, P)."""
    images = common.random_flip(images, draw)
    cell = images.shape[3] // 3
    size = max(1, 3 * cell // 4)  # as 64 of 85 pixels: 55 of 74 at 224 px
    offset = (draw(9, 2) * (cell - size + 1)).long()
    thirds = torch.arange(3, device=images.device)
    corner = offset + cell * torch.cartesian_prod(thirds, thirds)  # (B, 9, 2): top, left
    boxes = F.pad(corner, (0, 2), value=size).unbind(1)
    cut = torch.stack([common.resized_crop(images, box, size) for box in boxes], 1)
    return cut[torch.arange(len(cut), device=cut.device)[:, None], draw(9).argsort(1)]


# ---- model -----------------------------------------------------------------------------------------------------------


class NormLinear(nn.Module):
    """Cosines (..., O) of an input (..., I) with each of O directions: in [-1, 1] whatever the lengths of both."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(F.normalize(torch.empty(outputs, inputs).uniform_(-1, 1)))

    def forward(self, h: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(F.normalize(h, dim=-1), F.normalize(self.direction, dim=1))


class Jigsaw(nn.Module):
    """Trunk features of nine patches (9 B, I) -> one feature (B, D), not normalised; `layer`: that of the heads."""

    def __init__(self, inputs: int, outputs: int, layer: type[nn.Linear | NormLinear]) -> None:
        super().__init__()
        self.patch = nn.Sequential(nn.Linear(inputs, inputs), nn.ReLU(inplace=True), layer(inputs, outputs))
        self.join = layer(9 * outputs, outputs)

    def forward(self, h: Tensor) -> Tensor:
        joined: Tensor = self.join(self.patch(h).view(len(h) // 9, -1))
        return joined


class Encoder(nn.Module):
    """A trunk with the heads of both branches, and what a host trains besides.

    The group head comes last and leaves the random stream as it found it, so that no other weights depend on it.
    """

    def __init__(
        self, arch: str, width: int, small: bool, feature_dim: int, head: str, groups: bool, host: str = "npid"
    ) -> None:
        super().__init__()
        self.backbone = common.backbone(arch, width, small)
        hidden, layer = self.backbone.dim, NormLinear if head.startswith("norm") else nn.Linear
        self.neck: nn.Module = nn.Identity()
        if head == "bn-mlp":  # BYOL's: 4096 for a ResNet-50
            self.neck = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.BatchNorm1d(2 * hidden), nn.ReLU(inplace=True))
            hidden *= 2
        elif head.endswith("mlp"):
            self.neck = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(inplace=True))
        self.head = layer(hidden, feature_dim)
        self.predictor = self.jigsaw = self.group_head = None
        if host == "byol":
            self.predictor = nn.Sequential(nn.Linear(feature_dim, hidden), nn.BatchNorm1d(hidden),
                                           nn.ReLU(inplace=True), nn.Linear(hidden, feature_dim))
        elif host == "infomin":
            self.jigsaw = Jigsaw(self.backbone.dim, feature_dim, layer)
        if groups:
            with torch.random.fork_rng([]):
                self.group_head = layer(hidden, feature_dim)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """f_I and f_G of one view (B, 3, S, S), (B, D) each, not normalised; the same if there is no group head."""
        h = self.neck(self.backbone(images))
        instance: Tensor = self.head(h)
        return instance, instance if self.group_head is None else self.group_head(h)

    def forward(self, views: Tensor, cut: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views (V, B, 3, S, S) and patches (B, 9, 3, P, P) -> unit f_I, f_G (V, B, D) and jigsaw feature (B, D).

        Each view passes alone: batch statistics are those of one view. BYOL's f_I is its prediction.
        """
        instance, grouping = (torch.stack(part) for part in zip(*map(self.embed, views), strict=True))
        if self.predictor is not None:
            instance = torch.stack([self.predictor(part) for part in instance])
        jigsaw = None
        if self.jigsaw is not None and cut is not None:
            jigsaw = F.normalize(self.jigsaw(self.backbone(cut.flatten(0, 1))).float(), dim=1)
        return F.normalize(instance.float(), dim=2), F.normalize(grouping.float(), dim=2), jigsaw


def key_copy(encoder: Encoder) -> Encoder:
    """A copy for keys and targets: without gradient, and without what only the encoder that learns has."""
    keys = copy.deepcopy(encoder).requires_grad_(False)
    keys.predictor = keys.jigsaw = keys.group_head = None
    return keys


@torch.no_grad()
def follow(keys: nn.Module, encoder: nn.Module, momentum: float) -> None:
    """theta_key <- momentum * theta_key + (1 - momentum) * theta: the parameters, not the batch statistics."""
    own, online = dict(keys.named_parameters()), dict(encoder.named_parameters())
    torch._foreach_lerp_([*own.values()], [online[name] for name in own], 1 - momentum)  # a GPU: few launches for all


# ---- groups and the cross-level loss ---------------------------------------------------------------------------------
# z: (V, B, D) unit features f_G of V views, which are grouped independently of each other, at once.


class Groups(NamedTuple):
    """labels: (V, B) in 0..k-1; centroids: (V, k, D), with gradient; alive: (V, k), whether a group has a row."""

    labels: Tensor
    centroids: Tensor
    alive: Tensor


def group_means(z: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean (V, k, D) of each group's rows, 0 if it has none, and whether it has one (V, k)."""
    member = z.new_zeros(len(z), k, z.shape[1]).scatter_(1, labels[:, None], 1.0)  # (V, k, B), 1 for a group's rows
    counts = member.sum(2)
    return member @ z / counts.clamp(min=1)[..., None], counts > 0  # not index_add: GPUs add in any order


def nearest(z: Tensor, centroids: Tensor, spherical: bool) -> Tensor:
    """The centroid of largest cosine (supplement, eq. 1) or of least Euclidean distance for each row: (V, B)."""
    scores = z @ centroids.mT
    if not spherical:  # -|z - c|^2 / 2, but for |z|^2, which is the same for all centroids
        scores = scores - 0.5 * centroids.square().sum(2)[:, None]
    return scores.max(2).indices


@torch.no_grad()
def em_labels(z: Tensor, k: int, iterations: int, spherical: bool = True, start: Tensor | None = None) -> Tensor:
    """Labels (V, B) after so many assignments of k-means, from `start` (V, k, D) or the first k rows."""
    centroids = z[:, :k] if start is None else start
    labels = nearest(z, centroids, spherical)
    for _ in range(iterations - 1):
        means, alive = group_means(z, labels, k)
        centroids = torch.where(alive[..., None], F.normalize(means, dim=2) if spherical else means, centroids)
        labels = nearest(z, centroids, spherical)
    return labels


@torch.no_grad()
def spectral_embedding(z: Tensor, k: int) -> Tensor:
    """Unit rows (V, B, k) of the normalised Laplacian's eigenvectors of k smallest eigenvalues (supplement, eq. 2).

    The affinity is |cosine| without the diagonal: plain cosines can have negative degrees.
    """
    affinity = (z @ z.mT).abs().nan_to_num()  # of a network that diverges: its loss will say so
    affinity.diagonal(dim1=1, dim2=2).zero_()
    scale = affinity.sum(2).clamp(min=1e-12).rsqrt()
    laplacian = torch.eye(z.shape[1], device=z.device) - scale[:, :, None] * affinity * scale[:, None]
    return F.normalize(torch.linalg.eigh(laplacian).eigenvectors[..., :k], dim=2)


def group(z: Tensor, k: int, iterations: int, clustering: str = "spherical", start: Tensor | None = None) -> Groups:
    """Local clustering. Centroids are means of f_G and pass gradients on to it; assignments do not."""
    k = min(k, z.shape[1])
    space = spectral_embedding(z, k) if clustering == "spectral" else z
    labels = em_labels(space, k, iterations, clustering != "euclidean", start)
    means, alive = group_means(z, labels, k)
    return Groups(labels, means if clustering == "euclidean" else F.normalize(means, dim=2), alive)


def group_loss(z: Tensor, groups: Groups, temperature: float, cross_view: bool = True) -> tuple[Tensor, Tensor]:
    """Cross-level loss (B,): CE(f_G(x) . M' / T_G, g'), mean over the views x; and the accuracy, ()."""
    labels, centroids, alive = (part.roll(1, 0) if cross_view else part for part in groups)  # x meets M', g'
    logits = (z @ centroids.mT / temperature).masked_fill(~alive[:, None], -math.inf)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    return losses.mean(0), (logits.argmax(2) == labels).float().mean()


@torch.no_grad()
def group_figures(z: Tensor, groups: Groups) -> dict[str, Tensor]:
    """Groups alive in a view, mean cosine of a row with its centroid, mean cosine of two centroids that are alive."""
    unit = F.normalize(groups.centroids, dim=2) * groups.alive[..., None]
    own = unit.gather(1, groups.labels[..., None].expand_as(z))
    count = groups.alive.sum(1).float()
    pairs = unit.sum(1).square().sum(1) - count  # |sum|^2 less the squares: of all ordered pairs
    return dict(groups_alive=count.mean(), intra=(z * own).sum(2).mean(),
                inter=(pairs / (count * (count - 1)).clamp(min=1)).mean())


def gather_branch(run: common.Run, z: Tensor) -> Tensor:
    """f_G of all ranks, for groups of the whole batch: (V, B of this rank, D) -> (V, B of all, D).

    All ranks compute the same loss from it, each with its own rows' gradient: times the ranks, by which DDP divides.
    """
    parts = list(run.gather(z.detach()[None])[0])
    parts[run.rank] = z.detach() + run.world * (z - z.detach())  # the value is z
    return torch.cat(parts, 1)


# ---- hosts -----------------------------------------------------------------------------------------------------------
# One more needs its class here, a line in HOSTS and in CROPS, and its branch in `main`. Each has
#   state                                     parts of the checkpoint
#   targets(views)                            features of the momentum encoder, unit rows, without gradient
#   instance_loss(z, jigsaw, targets, index)  unit f_I (2, B, D), jigsaw feature, slots -> losses (B,), accuracy (), and
#                                             what after_step will write
#   after_step(encoder, written, progress)    after the optimiser's step: what outlives a step is written, once;
#                                             written: of all ranks; progress: the share of all steps that is done

InstanceLoss = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class Npid:
    """Every image is a class: the exact softmax over the bank, for both views."""

    def __init__(self, bank: common.MemoryBank, temperature: float, bank_momentum: float, amp: bool = False) -> None:
        self.bank, self.temperature, self.bank_momentum, self.amp = bank, temperature, bank_momentum, amp
        self.state: dict[str, Any] = dict(bank=bank)

    def targets(self, views: Tensor) -> Tensor:
        return views.new_empty(0)  # the bank is all

    def instance_loss(self, z: Tensor, jigsaw: Tensor | None, targets: Tensor, index: Tensor) -> InstanceLoss:
        losses = [common.bank_softmax(view, index, self.bank.features, self.temperature, self.amp) for view in z]
        found = (z[0, :32].detach() @ self.bank.features.T).argmax(1)  # of all rows it would be (B, N) numbers
        written = F.normalize(z.detach().mean(0), dim=1), index
        return torch.stack(losses).mean(0), (found == index[:32]).float().mean(), written

    def after_step(self, encoder: Encoder, written: tuple[Tensor, ...], progress: float) -> None:
        z, index = written
        self.bank.update(z, index, self.bank_momentum)


class Queue(common.MemoryBank):
    """The latest keys, unit rows (K, D), and which of them is the oldest: both are buffers of the checkpoint."""

    pointer: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator) -> None:
        super().__init__(size, dim, generator)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def push(self, keys: Tensor) -> None:
        """The oldest rows make way for keys (B, D), B <= K."""
        size = len(self.features)
        self.update(keys, (self.pointer + torch.arange(len(keys), device=keys.device)) % size, momentum=0.0)
        self.pointer.add_(len(keys)).remainder_(size)


def info_nce(z: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """-log of the share of a row's own key among it and the queue, (V, B); how often it is nearest, ().

    z: (V, B, D); keys: (B, D); queue: (K, D); unit rows.
    """
    positive, negative = (z * keys).sum(2) / temperature, z @ queue.T / temperature
    losses = torch.logaddexp(positive, negative.logsumexp(2)) - positive
    return losses, (positive > negative.amax(2)).float().mean()


class Moco:
    """A queue of keys made by a momentum encoder. InfoMin: the patches have to find the key as well."""

    def __init__(self, keys: Encoder, queue: Queue, temperature: float, key_momentum: float) -> None:
        self.keys, self.queue, self.temperature, self.key_momentum = keys, queue, temperature, key_momentum
        self.state: dict[str, Any] = dict(key_encoder=keys, queue=queue)

    @torch.no_grad()
    def targets(self, views: Tensor) -> Tensor:
        features: Tensor = self.keys(views[2:])[0][0]  # f_I of the third crop, (B, D)
        return features

    def instance_loss(self, z: Tensor, jigsaw: Tensor | None, targets: Tensor, index: Tensor) -> InstanceLoss:
        losses, accuracy = info_nce(z, targets, self.queue.features, self.temperature)
        if jigsaw is None:
            return losses.mean(0), accuracy, (targets,)
        patched, _ = info_nce(jigsaw[None], targets, self.queue.features, self.temperature)
        return (losses.mean(0) + patched[0]) / 2, accuracy, (targets,)

    def after_step(self, encoder: Encoder, written: tuple[Tensor, ...], progress: float) -> None:
        follow(self.keys, encoder, self.key_momentum)
        (new_keys,) = written
        self.queue.push(new_keys)


class Byol:
    """No negatives: a view's prediction has to match the momentum encoder's feature of the other view."""

    def __init__(self, keys: Encoder, key_momentum: float) -> None:
        self.keys, self.key_momentum = keys, key_momentum
        self.state: dict[str, Any] = dict(key_encoder=keys)

    @torch.no_grad()
    def targets(self, views: Tensor) -> Tensor:
        features: Tensor = self.keys(views)[0]
        return features.flip(0)  # a view's target is the other view

    def instance_loss(self, z: Tensor, jigsaw: Tensor | None, targets: Tensor, index: Tensor) -> InstanceLoss:
        found = (z.detach() @ targets.mT).argmax(2)  # among the batch, to have a figure
        accuracy = (found == torch.arange(z.shape[1], device=z.device)).float().mean()
        return (2 - 2 * (z * targets).sum(2)).sum(0), accuracy, ()

    def after_step(self, encoder: Encoder, written: tuple[Tensor, ...], progress: float) -> None:
        left = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0 on a cosine
        follow(self.keys, encoder, 1 - (1 - self.key_momentum) * left)


# ---- training --------------------------------------------------------------------------------------------------------


def warm_up(progress: float, epochs: int) -> float:
    """Factor of the learning rate after `progress` epochs: from 0.01 to 1 in the first `epochs`."""
    return min(1.0, 0.01 + 0.99 * progress / epochs) if epochs else 1.0


def main(args: argparse.Namespace) -> None:
    run = common.Run(args)
    common.note_idle(args, dict(groups_over=(run.world > 1 or not args.group_weight, "several ranks")))
    data = common.load(args, "pretrain", run.device)
    test = common.load_monitor(args, data, run.device)
    if args.instances:
        data = views_of_instances(data, args.instances, seed=0)
        test = test and views_of_instances(test, args.instances, seed=1)
    rows = args.batch_size // args.accumulate // (1 if args.groups_over == "all" else run.world)  # grouped at once
    num_groups, queue_size = min(args.num_groups, rows), min(args.queue_size, len(data))
    if args.group_weight and num_groups == rows:
        common.note(f"warning: {rows} rows are grouped at once: --num-groups {args.num_groups} makes {rows} groups of "
                    "one row each; lower it, or see --groups-over")
    if CROPS[args.host] > 2:  # a crop for the keys: there is a queue
        if args.batch_size > args.queue_size:
            raise common.Fault(f"--queue-size {args.queue_size} is less than a batch of {args.batch_size}: raise it")
        if queue_size < args.queue_size and "queue_size" in args.typed:
            raise common.Fault(f"--queue-size {args.queue_size} is more than the {len(data):,} images: lower it")
        if queue_size < args.queue_size and run.rank == 0:
            print(f"--queue-size {queue_size}, from {args.queue_size}: there are no more images", flush=True)
    run.describe(data, test, num_groups=num_groups, queue_size=queue_size)
    if args.warmup_epochs >= args.epochs and "warmup_epochs" not in args.typed:
        common.note(f"note: --warmup-epochs {args.warmup_epochs} of {args.epochs} epochs: the rate never reaches --lr")
    steps = run.steps_per_epoch(len(data))

    torch.manual_seed(args.seed)
    groups_apart = args.group_weight > 0 and args.branches == "separate"
    encoder = Encoder(args.arch, args.width, data.small, args.feature_dim, args.head, groups_apart, args.host)
    keys = key_copy(encoder)
    encoder = run.place(encoder)
    model = run.parallel(encoder)
    host: Npid | Moco | Byol
    if args.host == "npid":
        bank = common.MemoryBank(len(data), args.feature_dim, run.generator("bank")).to(run.device)
        host = Npid(bank, args.temperature, args.bank_momentum, run.amp)
    elif args.host == "byol":
        host = Byol(run.place(keys), args.key_momentum)
    else:
        queue = Queue(queue_size, args.feature_dim, run.generator("queue")).to(run.device)
        host = Moco(run.place(keys), queue, args.temperature, args.key_momentum)
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    totals = common.Totals(run)
    state = dict(encoder=encoder, optimizer=optimizer, **host.state, totals=totals)
    first_epoch, first_step = run.resume(state, steps)
    crop = common.Crop(data.size, RECIPES[args.augment].scale)

    def embed(images: Tensor) -> Tensor:
        with run.autocast():
            return F.normalize(encoder.embed(images)[0].float())

    def train_step(
        crops: Tensor, index: Tensor, draw: common.Draw
    ) -> tuple[Tensor, list[dict[str, Tensor]], tuple[Tensor, ...]]:
        """One step: from crops (V, B, 3, S, S) and their slots (B,) to new weights.

        Returns the loss, metrics for the log of each part of the batch (--accumulate), and what the host will write.
        """
        # InfoMin's patches; without them an empty tensor, which --accumulate can split
        cut = data.normalize(patches(crops[3], draw)) if len(crops) == 4 else crops.new_empty(len(index), 0)
        views = torch.stack([data.normalize(augment(images, draw, args.augment, view, not data.small))
                             for view, images in enumerate(crops[:3])])
        if args.erase:
            views = torch.stack([random_erase(images, draw, args.erase) for images in views])

        optimizer.zero_grad()
        all_figures, written = list[dict[str, Tensor]](), list[tuple[Tensor, ...]]()
        loss = torch.zeros((), device=run.device)
        chunks = views.chunk(args.accumulate, 1), cut.chunk(args.accumulate), index.chunk(args.accumulate)
        for part, pieces, i in common.parts([model], *chunks):  # views (V, b, ...), patches and slots
            with run.autocast():
                z, g, jigsaw = model(part[:2], pieces)
                targets = host.targets(part)
            losses, accuracy, to_write = host.instance_loss(z, jigsaw, targets, i)
            part_loss = losses.mean()
            figures = dict(instance_loss=part_loss, instance_accuracy=accuracy)
            if z.shape[1] > 1:  # a single row has no deviation
                figures["feature_std"] = z[0].detach().std(0).mean() * z.shape[2] ** 0.5
            if args.group_weight:
                if args.groups_over == "all":
                    g = gather_branch(run, g)
                groups = group(g, num_groups, args.kmeans_iterations, args.clustering)
                cross, group_accuracy = group_loss(g, groups, args.group_temperature, args.cross_view)
                part_loss = part_loss + args.group_weight * cross.mean()
                figures |= dict(group_loss=cross.mean(), group_accuracy=group_accuracy) | group_figures(g, groups)
            (part_loss / args.accumulate).backward()
            all_figures.append({name: figure.detach() for name, figure in dict(loss=part_loss, **figures).items()})
            written.append(to_write)
            loss += part_loss.detach() / args.accumulate
        optimizer.step()
        return loss, all_figures, run.gather(*map(torch.cat, zip(*written, strict=True)))

    # A graph cannot hold what copies from the CPU (InfoMin's patches, rotations) or waits for the GPU (eigenvectors).
    graphable = "infomin" not in (args.host, args.augment) and args.clustering != "spectral"
    graphed_step = run.graphed(train_step, data.small) if graphable else train_step
    for epoch in range(first_epoch, args.epochs):
        order = run.permutation(epoch, len(data))
        start = first_step if epoch == first_epoch else 0
        began = time.perf_counter()
        encoder.train()
        for step, index, crops in data.batches(run, order, crop, epoch, start, CROPS[args.host]):
            lr = common.learning_rate(args, epoch + step / steps) * warm_up(epoch + step / steps, args.warmup_epochs)
            common.set_rate(optimizer, lr)
            loss, all_figures, written = graphed_step(crops, index, run.draw(epoch, step))
            host.after_step(encoder, written, (epoch + (step + 1) / steps) / args.epochs)
            for figures in all_figures:
                totals.add(**figures)
            run.after_step(state, epoch, step, loss)

        row = totals.means()  # waits for the device's last steps
        images_per_second = (steps - start) * args.batch_size / (time.perf_counter() - began)
        if test and (epoch + 1 == args.epochs or (epoch + 1) % args.knn_every == 0):
            encoder.eval()
            run.broadcast(encoder)
            features = common.extract(run, data, embed)
            row |= common.knn_monitor(features, data, common.extract(run, test, embed), test, args.temperature)
        run.log(epoch=epoch + 1, step=(epoch + 1) * steps, lr=common.rate(optimizer), **row,
                images_per_second=round(images_per_second), seconds=round(time.perf_counter() - began, 1),
                memory_gb=common.memory_gb(run.device))
        run.save(state, epoch + 1, 0)
    run.finish(encoder.backbone)


if __name__ == "__main__":
    common.launch(main, parse_args)
