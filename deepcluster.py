"""DeepCluster (Mathilde Caron, master's thesis 2018; as a paper ECCV 2018, arXiv:1807.05520).

A network with random weights already tells images apart a little. Each epoch (in the thesis: what lies between two
clusterings) builds on that: cluster the descriptors of all images, then learn to predict the clusters.

    h = penultimate layer before its ReLU, of the central crop; x = normalise(whiten(PCA(h)))      (sections 3.3, 4.2)
    y = k-means or power iteration clustering of x; the last layer is reinitialised                (3.3, 4.6)
    an epoch of cross-entropy on y, with mini-batches drawn uniformly over the clusters            (3.2)

    python deepcluster.py                                  # rendered shapes, for a first try
    python deepcluster.py --preset demo                    # the same in small, on a CPU
    python deepcluster.py --data cifar10                   # ResNet-18, RGB, ten clusters a class
    python deepcluster.py --data cifar10 --clustering pic --sigma median
    python deepcluster.py --data imagenet                  # AlexNet, Sobel, 10,000 clusters: 44.0 in Table 5.2
    torchrun --nproc-per-node 8 deepcluster.py --preset pic-imagenet-sobel      # 45.9 in Table 5.2
    python deepcluster.py --output runs/deepcluster-cifar10-seed0 --assign DIR  # clusters of new images, as CSV

Differences from the thesis and from the authors' code:
  * The code's sampler draws positions in the data set, but uses them in the list sorted by cluster, so in effect it
    samples uniformly over images. Here each cluster has N/K draws, plus or minus one; theirs is `--sampling released`.
  * Empty clusters take half of a random other one after each assignment, as the thesis says (`--empties half`);
    `split` perturbs centroids while training, as Faiss does; `--kmeans faiss` is Faiss itself.
  * PIC runs in float64. In float32 its kernel vanishes beyond a squared distance of 0.39, in float64 beyond 1.19; where
    neighbours are further away every image is a singleton, and `--sigma median` takes sigma from the distances.
  * PCA drops directions whose variance is rounding noise, so constant or rank-deficient descriptors give no NaN.
  * The last layer has its own SGD without momentum, as in the code; the thesis says only that the layer is new.
  * Descriptors of more than ONE_PASS bytes are never held: a first pass over the images sums their covariance, a second
    one projects them, which costs another forward pass. Those of more than WIDEST dimensions are first reduced by
    a random projection, which is not exact.
  * DeepCluster-v2 would be another script: classifier, descriptors, clustering and optimiser are all different.

log.jsonl has, for each epoch: loss; chance_loss, ln of the number of clusters, or of --targets-per-step; clusters;
empties, clusters without an image before they were filled; splits in Faiss's way; singletons before they were
redistributed; largest_share, that of the images in the largest cluster; nmi_previous, NMI with the previous clustering;
pca_variance, the share that is kept; seconds of each part, 0 where a resumed epoch did not repeat it. From labels, each
--knn-every epochs: ratio_edge, the ratio edge intra-class of section 4.1 in percent, by the network before the epoch
(in the first row: untrained); nmi_labels of the last clustering; knn_top1 of descriptors after the epoch, and test_top1
of the last layer with --clustering labels. Epochs between clusterings repeat the row above, except what --knn-every
measures anew.
assignments/epochNNNN.npz holds `cluster`, a number for each line of assignments/images.txt.
"""

import argparse
import csv
import functools
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

import common

# ---- presets ---------------------------------------------------------------------------------------------------------
# "imagenet" is the base of all and serves any directory; a preset lists what differs. flickr*: directories of YFCC100M.

IMAGENET = dict(data="imagenet")
PIC = dict(data="imagenet", clustering="pic", lr=0.05)
FLICKR = dict(knn_every=0)  # YFCC100M has no labels
PART = dict(images_per_epoch=1_200_000)
LABELS = dict(data="imagenet", clustering="labels", sampling="images", epochs=90, knn_every=1)
CIFAR = dict(arch="resnet18", sobel=False, batch_size=128, lr=0.05, weight_decay=5e-4, epochs=200, min_crop=0.2)
# Few images give few updates: small batches, and two epochs for each new last layer to learn.
THIN = dict(CIFAR, num_clusters=250, subset=5000, width=16, epochs=30, batch_size=32, reassign_every=2, knn_every=5)
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": dict(arch="alexnet_bn", clustering="kmeans", num_clusters=10_000, sobel=True, feature_dim=256,
                     dropout=0.5, batch_size=256, lr=0.02, schedule="constant", weight_decay=1e-5, epochs=500,
                     min_crop=0.08),
    # Table 5.1. Flickr's epochs are as long as three of ImageNet's, so that all five models have as many updates.
    "pic-imagenet-sobel": PIC,
    "kmeans-imagenet-sobel": IMAGENET,
    "kmeans-imagenet-rgb": dict(IMAGENET, num_clusters=1000, sobel=False, weight_decay=1e-6),
    "kmeans-flickr1m-sobel": dict(FLICKR, data="flickr1m", epochs=167, updates_per_epoch=3 * 5005),
    "kmeans-flickr2m-sobel": dict(FLICKR, data="flickr2m", epochs=167, updates_per_epoch=3 * 5005, **PART),
    # Chapter 4
    "fig4.1-labels": dict(LABELS, sobel=False),
    **{f"fig4.2-{head}": dict(PIC, head=head, descriptors="after") for head in ("full", "2fc", "no-relu")},
    **{f"table4.1-pic-{side}": dict(PIC, descriptors=side, epochs=85) for side in ("before", "after")},
    **{f"table4.1-k{k}-{side}": dict(IMAGENET, num_clusters=k, descriptors=side, epochs=85)
       for k in (100, 1000, 10_000) for side in ("before", "after")},
    **{f"fig4.4-{flip}-flip": dict(PIC, flip=flip, epochs=50) for flip in ("no", "horizontal", "vertical")},
    **{f"fig4.4-{crop}-crop": dict(PIC, crop=crop, epochs=50) for crop in ("random", "central")},
    **{f"fig4.5-{n}": dict(PIC, reassign_every=n) for n in (1, 3, 10, 30)},
    **{f"fig4.6-{arch}-{'sobel' if sobel else 'rgb'}": dict(PIC, arch=net, sobel=sobel, epochs=50)
       for arch, net in (("alexnet", "alexnet_bn"), ("vgg16", "vgg16_bn"), ("resnet101", "resnet101"))
       for sobel in (True, False)},
    **{f"fig4.7-{how}": dict(PIC, sobel=False, singletons=how, epochs=20) for how in ("redistribute", "keep", "drop")},
    "table4.2": LABELS,
    **{f"table4.2-{n}": dict(LABELS, targets_per_step=n) for n in (256, 512)},
    **{f"table4.3-{n}": dict(PIC, targets_per_step=n) for n in (256, 512, 1024, 2048, 4096)},  # also Fig. 4.8 (b)
    "fig4.9-flickr1m": dict(PIC | FLICKR, data="flickr1m", updates_per_epoch=5005),
    "fig4.9-flickr2m": dict(PIC | FLICKR | PART, data="flickr2m", updates_per_epoch=5005),
    "fig4.9-flickr2m-pool": dict(PIC | FLICKR | PART, data="flickr2m", updates_per_epoch=5005, cluster_pool=True),
    # The figure has a point every 11,700 updates: an epoch of the presets with 1M images, ten of those with 100,000.
    **{f"fig4.10-{pool}-{n}": dict(PIC | FLICKR, data=f"flickr{pool}", images_per_epoch=n,
                                   updates_per_epoch=n * 117 // 10_000)
       for pool, n in (("100k", 100_000), ("1m", 100_000), ("1m", 1_000_000), ("10m", 100_000), ("10m", 1_000_000))},
    # Local Aggregation's DC-ResNets, on the unpooled map: -A without hidden layers, -B with two; rate and epochs of
    # DeepCluster's code
    **{f"imagenet-{arch}-{kind}": dict(IMAGENET, arch=arch, head=head, lr=0.05, epochs=200)
       for arch in ("resnet18", "resnet50") for kind, head in (("a", "map"), ("b", "full"))},
    "imagenet-vgg16": dict(IMAGENET, arch="vgg16_bn", lr=0.05),
    # Small images: ten clusters a class, as the thesis has for ImageNet. On CIFAR-10 k = 30 is nearly as good as 100,
    # and k = 1,000 six points of kNN worse (held-out training images: results/dc-choice, PAPERS.md).
    "cifar10": dict(CIFAR, data="cifar10", num_clusters=100),
    "cifar100": dict(CIFAR, data="cifar100", num_clusters=1000),
    "stl10": dict(CIFAR, data="stl10", num_clusters=100),
    "shapes": dict(CIFAR, data="shapes", num_clusters=100),
    "cifar10-thin": dict(THIN, data="cifar10"),
    "demo": dict(THIN, data="shapes"),
    "smoke": dict(CIFAR, data="shapes", num_clusters=20, subset=256, test_subset=100, width=4, epochs=2, batch_size=32,
                  knn_every=1),
}


# ---- options ---------------------------------------------------------------------------------------------------------


def bandwidth(text: str) -> float | str:
    """An argparse type: a positive number or "median"."""
    return text if text == "median" else float(common.POSITIVE(text))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    method = parser.add_argument_group("method: descriptors (--feature-dim: dimensions that PCA keeps)")
    method.add_argument("--sobel", action=argparse.BooleanOptionalAction, default=True,
                        help="the network sees the gradients of the grey image, not RGB")
    method.add_argument("--head", choices=["full", "2fc", "no-relu", "map", "pooled"],
                        help="section 4.2: full FC-ReLU-FC-ReLU-FC, 2fc FC-ReLU-FC, no-relu FC-ReLU-FC-FC, of a ResNet "
                             "on its unpooled last map; map, pooled: one FC on a ResNet's map or on its mean; default: "
                             "full, of ResNets pooled")
    method.add_argument("--descriptors", choices=["before", "after"], default="before", help="taken before "
                        "or after the last ReLU (heads full, 2fc)")
    method.add_argument("--dropout", type=common.SHARE, default=0.5, help="before hidden FCs")
    method = parser.add_argument_group("method: clustering")
    method.add_argument("--clustering", choices=["kmeans", "pic", "labels"], default="kmeans",
                        help="labels: the true ones, once (Table 4.2, Fig. 4.1); nothing else trains on labels")
    method.add_argument("--k", "--num-clusters", dest="num_clusters", type=common.COUNT, default=10_000, metavar="K",
                        help="k of k-means; many more than there are classes")
    method.add_argument("--kmeans", choices=["torch", "faiss"], default="torch", help="implementation of k-means")
    method.add_argument("--empties", choices=["half", "split"], default="half", help="an empty cluster takes half of "
                        "the images of a random other one (thesis), or splits a centroid drawn by size (Faiss)")
    method.add_argument("--num-neighbors", type=common.COUNT, default=5, metavar="N", help="of PIC's graph")
    method.add_argument("--sigma", type=bandwidth, default=0.2, help="of PIC's kernel exp(-d^2 / sigma^2); median: the "
                        "median distance to the neighbours")
    method.add_argument("--singletons", choices=["redistribute", "keep", "drop"], default="redistribute",
                        help="PIC's clusters of one image: into the nearest neighbour's, kept, or left out")
    method.add_argument("--reassign-every", type=common.COUNT, default=1, metavar="EPOCHS", help="epochs "
                        "between clusterings (section 4.4)")
    method.add_argument("--images-per-epoch", type=common.COUNT, metavar="N", help="algorithm 2: cluster and train on "
                        "a new random part of the images each epoch; default: all")
    method.add_argument("--cluster-pool", action="store_true", help="with --images-per-epoch N: cluster all images, "
                        "and draw N of them, or as many as --updates-per-epoch takes, for training")
    method = parser.add_argument_group("method: training")
    method.add_argument("--sampling", choices=["clusters", "images", "released"], default="clusters",
                        help="mini-batches uniform over clusters, over images, or as the authors' code does it")
    method.add_argument("--updates-per-epoch", type=common.COUNT, metavar="N", help="default: images / batch size; the "
                        "thesis takes three times that on Flickr")
    method.add_argument("--targets-per-step", type=common.COUNT, metavar="N", help="stochastic gradient over targets, "
                        "section 4.7: the batch's clusters and random others, N in all; default: all clusters")
    method.add_argument("--crop", choices=["random-sized", "random", "central"], default="random-sized",
                        help="training crop (section 4.3)")
    method.add_argument("--min-crop", type=common.SHARE, default=0.08, metavar="SHARE", help="least share of "
                        "the area, if random-sized")
    method.add_argument("--flip", choices=["no", "horizontal", "vertical"], default="horizontal", help="section 4.3")
    parser.add_argument("--assign", metavar="NAME|DIR", help="train nothing: write the clusters of these images, as "
                        "--data takes them, by the centroids in --output to its assigned.csv")
    common.add_training_options(parser)
    args = common.parse(parser, PRESETS, argv)
    plain = args.arch.partition("_")[0] in common.PLAIN_STAGES
    args.head = args.head or ("full" if plain else "pooled")
    if plain and args.head in ("map", "pooled"):
        raise common.Fault(f"--head {args.head} is for ResNets: {args.arch} has its own hidden layers")
    if args.cluster_pool and not args.images_per_epoch:
        raise common.Fault("--cluster-pool needs --images-per-epoch: without it all images are clustered anyway")
    if args.clustering == "labels" and args.images_per_epoch:
        raise common.Fault("--clustering labels is made once, of all images: it takes no --images-per-epoch")
    if args.kmeans == "faiss" and args.empties == "half":
        if "empties" in args.typed:
            raise common.Fault("--kmeans faiss splits empty clusters itself: use --empties split")
        args.empties = "split"
    needed = dict(kmeans=("num_clusters", "kmeans", "empties"), pic=("num_neighbors", "sigma", "singletons"))
    idle = {name: (args.clustering == way, f"--clustering {way}") for way, names in needed.items() for name in names}
    common.note_idle(args, idle | dict(min_crop=(args.crop == "random-sized", "--crop random-sized"),
                                       reassign_every=(args.clustering != "labels", "--clustering kmeans or pic"),
                                       descriptors=(args.head in ("full", "2fc"), "--head full or 2fc"),
                                       dropout=(args.head not in ("map", "pooled"), "hidden layers, see --head")))
    if args.assign and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise common.Fault("--assign takes one process: start it without a launcher")
    return args


# ---- augmentation ----------------------------------------------------------------------------------------------------


def training_crop(args: argparse.Namespace, data: common.ImageSet) -> common.Crop:
    """What is cut from an image before `augment`, by section 4.3; the central crop is that of the descriptors."""
    if args.crop == "random-sized":
        return common.Crop(data.size, (args.min_crop, 1.0))
    if args.crop == "random":  # one size, that of 224 px where the shorter side has 256; it fits into any format
        return common.Crop(data.size, ((7 / 8) ** 2,) * 2, (1.0, 1.0), of_square=True)
    # The central square, since it fits nowhere else; `augment` cuts out its middle.
    return common.Crop(data.shorter_side, (1.0, 1.0), (1.0, 1.0))


def augment(images: Tensor, draw: common.Draw, flip: str, size: int) -> Tensor:
    """Crops (B, 3, S', S') in [0, 1] -> their middle (B, 3, size, size), half of them mirrored."""
    edge = (images.shape[-1] - size) // 2
    images = images[..., edge : edge + size, edge : edge + size]
    if flip == "no":
        return images
    if flip == "horizontal":
        return common.random_flip(images, draw)
    return common.random_flip(images.transpose(2, 3), draw).transpose(2, 3)


# ---- model -----------------------------------------------------------------------------------------------------------


class Dropout(nn.Dropout):
    """Dropout by numbers that follow from the step and the position in the global batch, on any number of ranks."""

    uniform: Callable[[int], Tensor] | None = None  # d -> numbers in [0, 1), (b, d), the next in each call

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, features: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return features
        assert self.uniform is not None
        kept = self.uniform(features.shape[1]) >= self.p
        return features * kept / max(1 - self.p, 1e-30)  # p may be 1: then nothing is kept


class Encoder(nn.Module):
    """Image (B, 3, S, S) -> penultimate layer (B, dim), before its ReLU if the head has one there."""

    def __init__(self, arch: str, width: int, small: bool, size: int, head: str, sobel: bool, dropout: float) -> None:
        super().__init__()
        self.backbone = common.backbone(arch, width, small, 2 if sobel else 3)
        self.head, self.rectified, self.dim = head, head in ("full", "2fc"), self.backbone.dim
        self.mlp = hidden_layers = nn.Sequential()  # a ResNet's own, if the head has any
        if isinstance(self.backbone, common.PlainNet):
            hidden_layers = self.backbone.classifier  # fc6 and fc7
            for place, layer in enumerate(hidden_layers):
                if isinstance(layer, nn.Dropout):
                    hidden_layers[place] = Dropout(dropout)
        elif head != "pooled":
            self.dim *= (-(-size // (8 if small else 32))) ** 2  # pixels of the last map, whose stride is 8 or 32
            if head != "map":
                hidden = 4096 * width // 64
                self.mlp = hidden_layers = nn.Sequential(
                    Dropout(dropout), nn.Linear(self.dim, hidden), nn.ReLU(inplace=True),
                    Dropout(dropout), nn.Linear(hidden, hidden),
                )
                self.dim = hidden
        if head == "2fc":
            first_relu = [type(layer) for layer in hidden_layers].index(nn.ReLU)
            del hidden_layers[first_relu:]  # it, dropout and the second hidden layer

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.backbone, common.PlainNet) or self.head == "pooled":
            h: Tensor = self.backbone(images, relu_last=False)
        else:
            h = self.mlp(self.backbone.stages(images)[-1].flatten(1))
        return h.float()

    def seed_dropout(self, uniform: Callable[[int], Tensor]) -> None:
        """The numbers of the next forward pass."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.uniform = uniform

    def activate(self, h: Tensor) -> Tensor:
        """What the last layer sees."""
        return F.relu(h) if self.rectified else h


class TopLayer(nn.Module):
    """The last fully connected layer, (B, dim) -> logits (B, K): anew after each clustering, K as it comes."""

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__()
        self.dim, self.device = dim, device
        self.reset(1, torch.Generator())

    def reset(self, num_clusters: int, generator: torch.Generator) -> None:
        """Weights N(0, 0.01), biases 0."""
        weight = torch.randn(num_clusters, self.dim, generator=generator).mul_(0.01)
        self.weight = nn.Parameter(weight.to(self.device))
        self.bias = nn.Parameter(torch.zeros(num_clusters, device=self.device))

    def forward(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits of all clusters, or of `rows`."""
        if rows is None:
            return F.linear(features, self.weight, self.bias)
        return F.linear(features, self.weight[rows], self.bias[rows])

    @torch.no_grad()
    def step(self, lr: float | Tensor, weight_decay: float, rows: Tensor | None = None) -> None:
        """Its own SGD, without momentum: nothing to keep. Only the clusters `rows` move and decay."""
        where = slice(None) if rows is None else rows
        for p in (self.weight, self.bias):
            assert p.grad is not None
            p[where] -= lr * (p.grad[where] + weight_decay * p[where])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.reset(len(state_dict["weight"]), torch.Generator())
        return super().load_state_dict(state_dict, strict, assign)


class Clusters:
    """What a clustering leaves behind for the epoch and its line of the log; part of the checkpoint."""

    def __init__(self, num_images: int) -> None:
        self.pseudo_labels = torch.full((num_images,), -1, dtype=torch.int32)  # -1: in no cluster, not trained on
        self.figures: dict[str, float] = {}
        self.final: dict[str, Tensor] = {}  # once training has ended, for --assign: centroids, projection, offset

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


# ---- descriptors -----------------------------------------------------------------------------------------------------

ONE_PASS = 1 << 30  # bytes of descriptors (N, d) that may be held; larger ones are streamed twice
WIDEST = 8192  # largest d of descriptors whose covariance (d, d) is computed directly


def exact(device: torch.device) -> torch.device:
    """Where to compute in float64: on this device, or on the CPU for mps, which has none."""
    return common.CPU if device.type == "mps" else device


def moments(
    batches: Iterable[Tensor], dim: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, int]:
    """Sum (dim,) and second moment (dim, dim), in float64, and number of the rows (b, dim) that stream by.

    dtype: of the products within a batch, of rows less the first batch's mean, lest float32 lose small variances beside
    a large mean; that shift is undone at the end.
    """
    device = exact(device)
    shift = torch.zeros(dim, device=device)
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    square, count = torch.zeros(dim, dim, dtype=torch.float64, device=device), 0
    for batch in batches:
        rows = batch.to(device)
        shift = shift if count else rows.mean(0)
        rows = rows.to(dtype) - shift
        total += rows.sum(0)
        square += rows.T @ rows
        count += len(rows)
    shift = shift.double()
    cross = shift.outer(total)  # sum of (r + s)(r + s)^T = sum of r r^T + s t^T + t s^T + n s s^T, t = sum of r
    return total + count * shift, square + cross + cross.T + count * shift.outer(shift), count


def pca_whiten(total: Tensor, square: Tensor, count: int, dim: int) -> tuple[Tensor, Tensor, float, float]:
    """Projection (d, q) and offset (q,): h @ projection - offset is white; variance kept; span.

    total: (d,) and square: (d, d) of `count` rows; q = min(dim, d, count - 1). Directions whose variance is nothing but
    the rounding of float32 descriptors are projected to zero. Variance kept: its share. Span: the length of descriptors
    over the smallest deviation kept; float32's error is 6e-8 of that length.
    """
    if not square.isfinite().all():
        raise common.Fault("the descriptors are not finite, or very large: lower --lr")
    mean = total / count
    values, vectors = torch.linalg.eigh(square / count - mean.outer(mean))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    keep = max(1, min(dim, len(mean), count - 1))
    # Rounding: deviations of 1e-5 of the largest one, or of 3e-7, five times float32's 6e-8, of the mean's length.
    noise = torch.maximum(1e-10 * values[0], 1e-13 * mean.square().sum())
    scale = torch.where(values > noise, values, math.inf)[:keep].rsqrt()  # 1 / sqrt(inf) = 0
    projection = vectors[:, :keep] * scale
    span = math.sqrt(float(mean.square().sum() + values.sum()) / max(float(values[keep - 1]), 1e-300))
    return projection, mean @ projection, float(values[:keep].sum() / values.sum().clamp(min=1e-300)), span


MILD = 500  # spans up to this are safe in float32: a deviation changes by 1 % at most


def pca_of(h: Tensor, dim: int) -> tuple[Tensor, Tensor, float, float]:
    """pca_whiten of rows h (N, d) in memory, in float32 where that will do: three times as fast on a CPU."""
    for dtype in (torch.float32, torch.float64):
        found = pca_whiten(*moments(torch.split(h, 4096), h.shape[1], h.device, dtype), dim)
        if found[3] < MILD:  # its span
            break
    return found


def whiten(h: Tensor, projection: Tensor, offset: Tensor) -> Tensor:
    """x (b, q) of h (b, d), unit rows; zero where h is the mean. In the projection's precision."""
    return F.normalize(h.to(projection) @ projection - offset).float().to(h.device)


def rank0(run: common.Run, tensor: Tensor) -> Tensor:
    """Rank 0's tensor on every rank: what it clustered."""
    run.barrier()
    return run.gather(tensor)[0][: len(tensor)]


@torch.no_grad()
def describe(
    run: common.Run, data: common.ImageSet, encode: Callable[[Tensor], Tensor], width: int, dim: int
) -> tuple[Tensor, Tensor, Tensor, float, dict[str, float]]:
    """x (N, q), projection (width, q), offset (q,), the variance kept, seconds. encode: images -> h (b, width)."""
    began = time.perf_counter()
    sketch = None
    if width > WIDEST:
        sketch = torch.randn(width, WIDEST, generator=run.generator("sketch")).to(run.device).div_(WIDEST**0.5)
        width = WIDEST

    def short(images: Tensor) -> Tensor:
        return encode(images) if sketch is None else encode(images) @ sketch

    held = None
    if 4 * len(data) * width <= ONE_PASS:
        held = common.extract(run, data, short)
        extracted = time.perf_counter()
        projection, offset, variance, span = pca_of(held, dim)
    else:
        centers = data.centers(torch.arange(len(data))[run.rows(len(data))], 256, run.device)
        total, square, _ = moments((short(data.normalize(images)) for images in centers), width, run.device)
        total, square = run.mean(total) * run.world, run.mean(square) * run.world  # sums over ranks
        extracted = time.perf_counter()
        projection, offset, variance, span = pca_whiten(total, square, len(data), dim)
    projection, offset = rank0(run, projection), rank0(run, offset)
    if float(rank0(run, torch.tensor([span], device=run.device))) < MILD:
        projection, offset = projection.float(), offset.float()
    pca = time.perf_counter() - extracted
    if held is not None:
        x = torch.cat([whiten(rows, projection, offset) for rows in torch.split(held, 4096)])
    else:
        x = common.extract(run, data, lambda images: whiten(short(images), projection, offset))
    seconds = dict(descriptor_seconds=round(time.perf_counter() - began - pca, 2), pca_seconds=round(pca, 2))
    if sketch is not None:
        projection = sketch.to(projection) @ projection
    return x, projection, offset, round(variance, 4), seconds


# ---- k-means ---------------------------------------------------------------------------------------------------------


def fill_empty(labels: Tensor, k: int, random: np.random.Generator) -> tuple[Tensor, int]:
    """Each empty cluster takes half of the images of a random other one (section 3.2). labels: (N,); also how many."""
    counts = torch.bincount(labels, minlength=k).cpu().numpy()
    empty = np.flatnonzero(counts == 0)
    if len(empty) == 0:
        return labels, 0
    shuffle = torch.from_numpy(random.permutation(len(labels))).to(labels.device)
    order = shuffle[labels[shuffle].argsort(stable=True)]  # a cluster holds order[start : start + count], shuffled
    starts = counts.cumsum() - counts
    labels = labels.clone()
    for cluster in empty.tolist():
        donors = np.flatnonzero(counts > 1)
        if len(donors) == 0:  # fewer images than clusters
            break
        donor = random.choice(donors)
        counts[cluster] = counts[donor] // 2
        counts[donor] -= counts[cluster]
        starts[cluster] = starts[donor] + counts[donor]
        labels[order[starts[cluster] : starts[cluster] + counts[cluster]]] = cluster
    return labels, len(empty)


@torch.no_grad()
def kmeans_half(x: Tensor, k: int, seed: int, iterations: int = 20) -> tuple[Tensor, int]:
    """Lloyd's k-means from k random rows of x (N, D), no cluster left empty: labels (N,), empties of the last step."""
    random = np.random.default_rng(seed)
    centroids = x[torch.from_numpy(random.permutation(len(x))[:k]).to(x.device)]
    int8, float16 = common.low_chunks(x, k), common.half_rows(x)  # the rows again, for fast first products
    labels, empties = torch.full((len(x),), -1, device=x.device), 0
    for iteration in range(iterations + 1):
        fast = float16 if iteration < iterations else None  # the labels that are returned are float32's
        before = labels
        labels, empties = fill_empty(common.nearest(x, centroids, int8, fast), k, random)
        settled = empties == 0 and torch.equal(labels, before)
        if iteration == iterations or (settled and float16 is None):
            break
        float16 = None if settled else float16  # float32 decides whether this is a fixed point
        sums, counts = common.cluster_sums(x, labels, k)
        centroids = sums / counts[:, None]
    return labels, empties


# ---- power iteration clustering --------------------------------------------------------------------------------------
# Section 4.6, in float64 on the CPU, where the order of sums is the same in every run.


class Graph(NamedTuple):
    """W = A + A^T, sparse and symmetric: W[rows[e], columns[e]] = weights[e], rows ascending, each pair once."""

    rows: Tensor
    columns: Tensor
    weights: Tensor
    nearest: Tensor  # (N, k), nearest first


def affinity(x: Tensor, nearest: Tensor, sigma: float | str) -> Graph:
    """A_ij = exp(-|x_i - x_j|^2 / sigma^2) if j is among the nearest (N, k) of i, else 0. x: (N, D)."""
    n, k = nearest.shape
    x = x.to(exact(x.device))
    parts = zip(torch.split(x, 4096), torch.split(nearest.to(x.device), 4096), strict=True)
    squares = torch.cat([(rows[:, None].double() - x[near]).square().sum(2) for rows, near in parts]).cpu()
    sigma2 = squares.flatten().median() if sigma == "median" else torch.tensor(float(sigma) ** 2)
    weights = (-squares / sigma2.clamp(min=1e-30)).exp().flatten()
    i, j = torch.arange(n).repeat_interleave(k), nearest.cpu().flatten()
    # The edge (i, j) as one number, i n + j: `unique` sorts by rows, and merges A_ij with A_ji of A^T.
    key, place = torch.unique(torch.cat([i * n + j, j * n + i]), return_inverse=True)
    weights = weights.new_zeros(len(key)).index_add_(0, place, torch.cat([weights, weights]))
    return Graph(key // n, key % n, weights, nearest.cpu())


def power_iteration(graph: Graph, alpha: float = 0.001, iterations: int = 200) -> Tensor:
    """v (N,) after 200 times v <- alpha W v + (1 - alpha) / N, v <- v / sum(v), from v = 1 / N."""
    n = len(graph.nearest)
    matrix = csr_matrix((graph.weights.numpy(), (graph.rows.numpy(), graph.columns.numpy())), shape=(n, n))
    v = np.full(n, 1 / n)
    for _ in range(iterations):
        v = alpha * (matrix @ v) + (1 - alpha) / n
        v /= v.sum()
    return torch.from_numpy(v)


def basins(graph: Graph, v: Tensor) -> Tensor:
    """Basin (N,) of each image, where it ends by going to the neighbour with the largest W_ij (v_j - v_i) > 0."""
    n = len(v)
    gain = graph.weights * (v[graph.columns] - v[graph.rows])
    best = torch.zeros(n, dtype=torch.float64).scatter_reduce_(0, graph.rows, gain, "amax")
    chosen = torch.where((gain > 0) & (gain == best[graph.rows]), graph.columns, n)  # of equal gains the first
    pointer = torch.full((n,), n).scatter_reduce_(0, graph.rows, chosen, "amin")
    pointer = torch.where(pointer == n, torch.arange(n), pointer)
    while not torch.equal(pointer, pointer[pointer]):  # each turn goes twice as far
        pointer = pointer[pointer]
    labels: Tensor = torch.unique(pointer, return_inverse=True)[1]
    return labels


def treat_singletons(labels: Tensor, nearest: Tensor, how: str) -> tuple[Tensor, int]:
    """Clusters of one image redistributed, kept or dropped (-1). labels: (N,) -> (N,), and how many there were.

    redistribute: to the cluster of its nearest neighbour that is no singleton; if all are, it stays alone.
    """
    single = torch.bincount(labels)[labels] == 1
    if how == "redistribute":
        host = ~single[nearest]
        first = nearest.gather(1, host.byte().argmax(1, keepdim=True))[:, 0]
        labels = torch.where(single & host.any(1), labels[first], labels)
    if how == "drop":
        labels = torch.where(single, -1, labels)
    used = torch.unique(labels[labels >= 0])  # numbered anew, without gaps
    return torch.where(labels >= 0, torch.searchsorted(used, labels), -1), int(single.sum())


def own_neighbors(x: Tensor, k: int, run: common.Run | None = None) -> Tensor:
    """The k (or N - 1) other rows of x (N, D) nearest to each, (N, k), nearest first; each rank looks for a share."""
    rows = (torch.arange(len(x)) if run is None else run.share(len(x))).to(x.device)
    nearest = common.neighbors(x[rows], x, min(k, len(x) - 1), exclude=rows)[1]
    return nearest if run is None else run.gather(nearest)[0][: len(x)]


def pic(x: Tensor, nearest: Tensor, sigma: float | str, singletons: str) -> tuple[Tensor, int]:
    """Clusters (N,) of unit rows x (N, D), -1: dropped; and the number of singletons among the basins.

    nearest: own_neighbors(x, k), (N, k).
    """
    graph = affinity(x, nearest, sigma)
    return treat_singletons(basins(graph, power_iteration(graph)), graph.nearest, singletons)


def cluster_means(x: Tensor, labels: Tensor) -> Tensor:
    """Centroids (K, D) of unit rows x (N, D); labels: (N,). An empty cluster's lies at 1e3, out of reach."""
    sums, counts = common.cluster_sums(x, labels.to(x.device).long(), int(labels.max()) + 1)
    return torch.where(counts[:, None] > 0, sums / counts[:, None], 1e3)


# ---- sampling --------------------------------------------------------------------------------------------------------


def uniform_order(labels: Tensor, count: int, source: torch.Generator) -> Tensor:
    """`count` positions, each cluster as often as every other, plus or minus one; a cluster's images in turn, shuffled.

    labels: (N,), -1: not drawn. The thesis picks a random cluster, then a random image of it: the same on average.
    """
    shuffle = torch.randperm(len(labels), generator=source)
    shuffle = shuffle[labels[shuffle] >= 0]
    members = shuffle[labels[shuffle].argsort(stable=True)]
    clusters, sizes = torch.unique_consecutive(labels[members], return_counts=True)
    quota = torch.full((len(clusters),), count // len(clusters))
    quota[torch.randperm(len(clusters), generator=source)[: count % len(clusters)]] += 1
    turn = torch.arange(count) - (quota.cumsum(0) - quota).repeat_interleave(quota)  # 0, 1, 2, ... in each quota
    starts = sizes.cumsum(0) - sizes
    order = members[starts.repeat_interleave(quota) + turn % sizes.repeat_interleave(quota)]
    return order[torch.randperm(count, generator=source)]


def training_order(labels: Tensor, count: int, sampling: str, source: torch.Generator) -> Tensor:
    """`count` positions of images with a label, (count,) int64: uniform over clusters or over images."""
    if sampling == "images":
        return uniform_order(torch.where(labels >= 0, 0, -1), count, source)
    order = uniform_order(labels, count, source)
    if sampling == "released":
        # The code's mistake: positions in data set order index the images sorted by cluster.
        kept = (labels >= 0).nonzero()[:, 0]
        order = kept[labels[kept].argsort(stable=True)][torch.searchsorted(kept, order)]
    return order


def target_rows(targets: Tensor, num_clusters: int, count: int, source: torch.Generator) -> Tensor:
    """Clusters whose weights a step uses and moves, ascending: its targets' and random others, `count` in all."""
    present = torch.unique(targets)
    draw = torch.rand(num_clusters, generator=source)
    draw[present] = -1  # below all draws: among the smallest
    count = min(num_clusters, max(count, len(present)))
    return draw.topk(count, largest=False).indices.sort().values


# ---- figures of merit ------------------------------------------------------------------------------------------------


def nmi(a: Tensor, b: Tensor) -> float:
    """I(a; b) / sqrt(H(a) H(b)) of two labellings (N,), as in the ECCV paper."""
    return round(float(normalized_mutual_info_score(a.cpu().numpy(), b.cpu().numpy(), average_method="geometric")), 4)


def label_figures(x: Tensor, pseudo_labels: Tensor, labels: Tensor, run: common.Run | None = None) -> dict[str, float]:
    """Mean ratio edge intra-class (%) of the 10-NN graph of x (N, D), NMI of clusters with labels (N,).

    -1: a label that is not known, or no cluster; the NMI is one of the images that have both.
    With `run` all ranks have to call it.
    """
    known = labels >= 0
    if known.sum() < 2:
        return {}
    x, pseudo_labels, labels = x[known.to(x.device)], pseudo_labels[known], labels[known]
    ratio = 100 * float(common.ratio_edge_intra_class(own_neighbors(x, 10, run).cpu(), labels).nanmean())
    clustered = pseudo_labels >= 0
    figures = dict(ratio_edge=round(ratio, 2))
    return figures | (dict(nmi_labels=nmi(pseudo_labels[clustered], labels[clustered])) if clustered.any() else {})


def partition_figures(pseudo_labels: Tensor, previous: Tensor, among: int | None = None) -> dict[str, float]:
    """Number of clusters, share of the largest one, NMI with the clustering before. Both (N,), -1: in no cluster.

    among: how many clusters a step's loss chooses among, with --targets-per-step.
    """
    sizes = torch.unique(pseudo_labels[pseudo_labels >= 0], return_counts=True)[1]
    figures = dict(clusters=len(sizes), largest_share=round(float(sizes.max() / sizes.sum()), 4),
                   chance_loss=round(math.log(min(len(sizes), among or len(sizes))), 4))
    both = (pseudo_labels >= 0) & (previous >= 0)
    return figures | (dict(nmi_previous=nmi(pseudo_labels[both], previous[both])) if both.any() else {})


# ---- assignments -----------------------------------------------------------------------------------------------------


def image_names(data: common.ImageSet) -> list[str]:
    """What a row of the assignments stands for: the path of its file, or set/position."""
    if data.files is None:
        return [f"{data.name}/{row}" for row in data.ids.tolist()]
    return [f"{data.root}/{os.fsdecode(file)}" for file in data.files]


def save_assignments(folder: Path, epoch: int, labels: Tensor, data: common.ImageSet) -> None:
    """assignments/images.txt and epochNNNN.npz with `cluster`, -1 for images that were not clustered.

    The first epoch removes those of a run that was in the folder before, and what --assign wrote by its centroids.
    """
    folder.mkdir(exist_ok=True)
    if epoch == 1:
        for old in [folder / "images.txt", *folder.glob("epoch*.npz"), folder.parent / "assigned.csv"]:
            old.unlink(missing_ok=True)
    if not (folder / "images.txt").exists():
        common.write_whole(folder / "images.txt", "".join(f"{name}\n" for name in image_names(data)).encode(
            errors="surrogateescape"))
    content = io.BytesIO()
    np.savez_compressed(content, cluster=labels.cpu().numpy())
    common.write_whole(folder / f"epoch{epoch:04d}.npz", content.getbuffer())


def assign_images(args: argparse.Namespace) -> None:
    """Write path, cluster of each image of --assign: the nearest centroid, by the network in --output."""
    saved, device = common.load_checkpoint(args.output / "checkpoint.pth"), common.pick_device(args.device)
    options, known = argparse.Namespace(**saved["options"]), saved["data"]
    if options.script != args.script or not (final := saved["state"]["clusters"].get("final")):
        raise common.Fault(f"{args.output} holds no run of {args.script} that has ended: let the command that trains "
                           "it come to its end")
    projection, offset = final["projection"].to(exact(device)), final["offset"].to(exact(device))
    args.data, args.subset, args.image_size = args.assign, None, known["size"]
    data = common.load(args, "pretrain", device)
    data.mean, data.std = tuple(known["mean"]), tuple(known["std"])
    encoder = Encoder(options.arch, options.width, known["small"], known["size"], options.head, options.sobel, 0.0)
    encoder.load_state_dict(saved["state"]["encoder"])
    encoder.eval().to(device)

    def embed(images: Tensor) -> Tensor:
        h = encoder(images)
        h = encoder.activate(h) if options.descriptors == "after" else h
        return whiten(h, projection, offset)

    labels = common.nearest(common.extract(device, data, embed), final["centroids"].to(device))
    path, content = args.output / "assigned.csv", io.StringIO()
    csv.writer(content).writerows([("path", "cluster"), *zip(image_names(data), labels.tolist(), strict=True)])
    common.write_whole(path, content.getvalue().encode(errors="surrogateescape"))
    print(json.dumps(dict(assigned=str(path), images=len(data), clusters=len(torch.unique(labels)))))


# ---- training --------------------------------------------------------------------------------------------------------


def dropout_numbers(run: common.Run, epoch: int, step: int, part: int) -> Callable[[int], Tensor]:
    """d -> uniform numbers (b, d) of a step's `part` on this rank, of --accumulate: rows of the global batch's."""
    source = run.generator("dropout", epoch, step, device=run.device)
    batch, share = run.args.batch_size, run.args.batch_size // run.world // run.args.accumulate
    first = run.rows(batch).start + part * share
    return lambda dim: torch.rand(batch, dim, generator=source, device=run.device)[first : first + share]


def fit_sizes(args: argparse.Namespace, num_images: int) -> str:
    """Lower --k and --feature-dim where they are only defaults and leave under 10 images per cluster or dimension.

    With as many whitened dimensions as images, all images are equally far apart, and every clustering is meaningless.
    Returns what to tell the user.
    """
    k, dim = args.num_clusters, args.feature_dim
    if args.clustering == "kmeans" and "num_clusters" in args.typed and k > num_images:
        raise common.Fault(f"--k {k} is more than the {num_images} images that are clustered")
    if args.clustering == "pic" and "num_neighbors" in args.typed and args.num_neighbors >= num_images:
        raise common.Fault(f"--num-neighbors {args.num_neighbors}: an image has {num_images - 1} others")
    if args.clustering == "kmeans" and "num_clusters" not in args.typed and 10 * k > num_images:
        args.num_clusters = max(min(2, num_images), num_images // 20)  # of a single cluster nothing is learnt
    if "feature_dim" not in args.typed and 10 * dim > num_images:
        args.feature_dim = max(1, num_images // 10)
    sizes = {"--k": (k, args.num_clusters), "--feature-dim": (dim, args.feature_dim)}
    return "".join(f"{name} {new}, lowered from {old} for {num_images:,} images\n"
                   for name, (old, new) in sizes.items() if new != old)


def main(args: argparse.Namespace) -> None:
    if args.assign:
        assign_images(args)
        return
    run = common.Run(args)
    data = common.load(args, "pretrain", run.device)
    test = common.load_monitor(args, data, run.device)
    trained = min(args.images_per_epoch or len(data), len(data))
    if "images_per_epoch" in args.typed and trained < args.images_per_epoch:
        raise common.Fault(f"--images-per-epoch {args.images_per_epoch} is more than the {len(data)} images")
    pool_size = len(data) if args.cluster_pool else trained
    note = fit_sizes(args, pool_size)
    if args.clustering == "labels" and (data.labels < 0).any():
        raise common.Fault("--clustering labels: not every image has a class")
    facts = dict[str, str]()
    if args.clustering == "kmeans":  # is Faiss there, and on what?
        facts["kmeans_backend"] = common.kmeans(torch.zeros(1, 1, device=run.device), 1, backend=args.kmeans).backend
    run.describe(data, test, **facts)
    if run.rank == 0:
        print(note, end="", flush=True)
    steps = args.updates_per_epoch or run.steps_per_epoch(trained)

    torch.manual_seed(args.seed)
    encoder = run.place(Encoder(args.arch, args.width, data.small, data.size, args.head, args.sobel, args.dropout))
    model = run.parallel(encoder)
    top = TopLayer(encoder.dim, run.device)
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    clusters = Clusters(len(data))
    totals = common.Totals(run)
    state = dict(encoder=encoder, optimizer=optimizer, top=top, clusters=clusters, totals=totals)
    first_epoch, first_step = run.resume(state, steps)

    def encode(images: Tensor) -> Tensor:
        h: Tensor = encoder(images)
        return encoder.activate(h) if args.descriptors == "after" else h

    def descriptors_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, float, dict[str, float]]:
        """`describe` of these images, by the network in evaluation mode."""
        encoder.eval()
        run.broadcast(encoder)
        chosen = data if len(rows) == len(data) else data.select(rows)  # not a copy of all pixels
        return describe(run, chosen, encode, encoder.dim, args.feature_dim)

    def knn(test: common.ImageSet) -> dict[str, float]:
        """Accuracy of the whitened descriptors, whose PCA is that of all training images; K = 200, tau = 0.07."""
        x, projection, offset, *_ = descriptors_of(torch.arange(len(data)))
        queries = common.extract(run, test, lambda images: whiten(encode(images), projection, offset))
        return common.knn_monitor(x, data, queries, test, temperature=0.07)

    def train_step(
        images: Tensor, targets: Tensor, draw: common.Draw, rows: Tensor | None = None,
        dropout: Callable[[int], Callable[[int], Tensor]] | None = None,
    ) -> Tensor:
        """One step: from crops (B, 3, S, S) and their clusters (B,), among `rows` if any, to new weights and the loss.

        dropout: part of the batch (--accumulate) -> its numbers. The last layer is the loop's `classifier`.
        """
        images = data.normalize(augment(images, draw, args.flip, data.size))
        optimizer.zero_grad()
        top.zero_grad()
        loss = torch.zeros((), device=run.device)
        chunks = images.chunk(args.accumulate), targets.chunk(args.accumulate)
        for part_number, (part, target) in enumerate(common.parts([model, classifier], *chunks)):
            if dropout is not None:
                encoder.seed_dropout(dropout(part_number))
            with run.autocast():
                h = model(part)
            part_loss = F.cross_entropy(classifier(encoder.activate(h), rows), target) / args.accumulate
            part_loss.backward()
            loss += part_loss.detach()
        optimizer.step()
        top.step(optimizer.param_groups[0]["lr"], args.weight_decay, rows)
        return loss

    # Neither targets of changing number nor numbers for dropout fit into a graph.
    drops = any(isinstance(module, Dropout) and module.p for module in encoder.modules())
    graphable = not args.targets_per_step and not drops
    crop = training_crop(args, data)
    for epoch in range(first_epoch, args.epochs):
        start = first_step if epoch == first_epoch else 0
        began, seconds = time.perf_counter(), dict(descriptor_seconds=0.0, pca_seconds=0.0, cluster_seconds=0.0)
        clusters.final = {}  # of a run that had ended and now has more epochs

        # The epoch whose clustering this one trains on, and the images that were clustered then
        assigned = 0 if args.clustering == "labels" else epoch - epoch % args.reassign_every
        pool = torch.randperm(len(data), generator=run.generator("pool", assigned))[:pool_size].sort().values
        anew = start == 0 and epoch == assigned  # not on resuming within the epoch: the checkpoint has the clusters
        monitored = test is not None and (epoch + 1 == args.epochs or (epoch + 1) % args.knn_every == 0)
        judged = start == 0 and (monitored or (epoch == 0 and test is not None))  # by true labels
        if args.clustering != "labels" and (anew or judged):  # Fig. 4.5: between clusterings too
            if run.rank == 0 and epoch == first_epoch:
                print(f"descriptors of {pool_size:,} images, before the first step of the epoch", flush=True)
            x, _, _, variance, took = descriptors_of(pool)
            seconds |= took
        if anew:
            labels, figures = data.labels[pool], dict[str, float]()
            if args.clustering != "labels":
                clock = time.perf_counter()
                seed = run.generator("clustering", epoch).initial_seed() % 2**31  # Faiss's seeds have 31 bits
                labels = torch.zeros(pool_size)  # rank 0's take their place
                if args.clustering == "pic":
                    nearest = own_neighbors(x, args.num_neighbors, run)
                if run.rank == 0:
                    if args.clustering == "pic":
                        labels, figures["singletons"] = pic(x, nearest, args.sigma, args.singletons)
                    elif args.empties == "half":
                        labels, figures["empties"] = kmeans_half(x, args.num_clusters, seed)
                    else:
                        result = common.kmeans(x, args.num_clusters, seed=seed, backend=args.kmeans)
                        labels, figures["empties"], figures["splits"] = result.labels, result.empty, result.splits
                    seconds["cluster_seconds"] = round(time.perf_counter() - clock, 2)
                    figures["pca_variance"] = variance
                labels = rank0(run, labels.long().to(run.device)).cpu()
                if not (labels >= 0).any():
                    raise common.Fault("every image is a singleton, none is left to train on: try --sigma median")
            previous, clusters.pseudo_labels = clusters.pseudo_labels, torch.full_like(clusters.pseudo_labels, -1)
            clusters.pseudo_labels[pool] = labels.int()
            among = args.targets_per_step and max(args.targets_per_step, args.batch_size)
            clusters.figures = figures | partition_figures(clusters.pseudo_labels, previous, among)
            count = args.num_clusters if args.clustering == "kmeans" else int(labels.max()) + 1
            top.reset(count, run.generator("top", epoch))
            if run.rank == 0:
                save_assignments(run.output / "assignments", epoch + 1, clusters.pseudo_labels, data)
        if judged and args.clustering != "labels":
            clusters.figures |= label_figures(x, clusters.pseudo_labels[pool], data.labels[pool], run)

        draws = steps * args.batch_size
        order = training_order(clusters.pseudo_labels.long(), draws, args.sampling, run.generator("order", epoch))
        pseudo_labels = clusters.pseudo_labels.long().to(run.device)
        classifier = run.parallel(top)  # in each epoch: its parameters may be new
        encoder.train()
        graphed_step = run.graphed(train_step, data.small)  # in each epoch anew, since its last layer may be new
        began_training = time.perf_counter()
        for step, index, (images,) in data.batches(run, order, crop, epoch, start):
            common.set_rate(optimizer, common.learning_rate(args, epoch + step / steps))
            draw, targets = run.draw(epoch, step), pseudo_labels[index]
            rows = None
            if args.targets_per_step:
                source = run.generator("targets", epoch, step)
                batch = order[step * args.batch_size : (step + 1) * args.batch_size]  # of all ranks, on the CPU
                rows = target_rows(clusters.pseudo_labels[batch].long(), len(top.weight), args.targets_per_step, source)
                rows = common.sent(rows, run.device)
                targets = torch.searchsorted(rows, targets)
            if graphable:
                loss = graphed_step(images, targets, draw)
            else:
                dropout = functools.partial(dropout_numbers, run, epoch, step)
                loss = train_step(images, targets, draw, rows, dropout)
            totals.add(loss=loss)
            run.after_step(state, epoch, step, loss)

        row = totals.means() | clusters.figures  # waits for the device's last steps
        train_seconds = time.perf_counter() - began_training
        if monitored and test is not None:
            row |= knn(test)
            if args.clustering == "labels":  # Table 4.2
                guesses = common.extract(run, test, lambda images: top(encoder.activate(encoder(images))).argmax(1))
                row["test_top1"] = round(100 * float((guesses.cpu() == test.labels).double().mean()), 2)
        run.log(epoch=epoch + 1, step=(epoch + 1) * steps, lr=common.rate(optimizer), **row, **seconds,
                images_per_second=round((steps - start) * args.batch_size / train_seconds),
                train_seconds=round(train_seconds, 1), seconds=round(time.perf_counter() - began, 1),
                memory_gb=common.memory_gb(run.device))
        run.save(state, epoch + 1, 0)

    if not clusters.final:  # means of the last clusters among the descriptors of the final network
        kept = (clusters.pseudo_labels >= 0).nonzero()[:, 0]
        x, projection, offset, *_ = descriptors_of(kept)
        centroids = cluster_means(x, clusters.pseudo_labels[kept])
        clusters.final = dict(centroids=centroids, projection=projection, offset=offset)
        run.save(state, args.epochs, 0)
    run.finish(encoder.backbone)


if __name__ == "__main__":
    common.launch(main, parse_args)
