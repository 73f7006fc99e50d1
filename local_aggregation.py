"""Local Aggregation (Zhuang, Zhai and Yamins, ICCV 2019, arXiv:1903.12355).

As in NPID there is a memory bank with one feature v_i for each image; but instead of being pushed away from all others,
an image is pulled towards its close neighbours C_i and away from the rest of its background neighbours B_i:

    L_i = -log [P(C_i & B_i | f_i) / P(B_i | f_i)],    P(A | f) = sum over j in A of exp(v_j . f / tau) / Z       (3, 2)

B_i are the k images nearest to f_i in the bank, found anew in each step. C_i are those that share a cluster with image
i in at least one of H k-means clusterings of the bank into m clusters, found anew in each epoch. & is their
intersection; Z, the sum over all N images, cancels. The first epochs train with NPID's loss, so that the first
clustering has something to find.

    python local_aggregation.py --arch resnet18 --H 10 --m 30000       # on rendered shapes; needs no data
    python local_aggregation.py --data cifar10                         # no published row
    python local_aggregation.py --data imagenet                        # Table 1, ResNet-18: 45.0 kNN in the paper
    torchrun --nproc-per-node 8 local_aggregation.py --preset imagenet-resnet50
    python local_aggregation.py --preset table5-3-10k                  # a row of an ablation

Choosing k and m. On ImageNet (N = 1.28 million) m = 30,000 makes clusters of 43 images and k = 4096 is 0.3 % of all. On
50,000 images the same numbers mean clusters of 1.7 images and 8 %; there small C_i do better (PAPERS.md has the
sweeps): H = 1, m = N/5, k = N/100 for whole sets of small images, with a third of the epochs as warm start, and three
quarters for few images. Longer runs may allow larger clusters: watch `nmi` and the kNN monitor. Defaults that do not
fit N or --epochs are scaled, and printed.

Differences from the paper and from the existing codes:
  * The warm start uses the exact softmax; `--warmup-loss nce` is the paper's, whose one Z fails on few images.
  * Image i is always in C_i and in B_i (it takes the place of the k-th nearest if it is not among them), so no
    intersection is empty, there is no epsilon in the logarithm, and no image is without gradient.
  * Clusters exist before the first step that needs them, and are recomputed at the first step of each epoch, whether
    or not B divides N. The k-means seeds follow from --seed: the same each epoch, or `--cluster-seeds redrawn`.
  * DBSCAN collapses, as the paper says: kept for Table 5's discussion as `--clustering dbscan`.
  * Rows of the bank are unit vectors after each update, as in both codes; eq. (5) does not say so. --weight-decay is
    lambda for half of eq. (4)'s square, as in both codes, and applies to all weights; the codes exempt batch
    normalisation. One code has a pre-activation ResNet-18, and batch normalisation only at the end of each of VGG16's
    blocks; here the ResNet is the standard one, and VGG16 has it after every layer.

log.jsonl has, beside NPID's keys: npid_loss and la_loss, each in its epochs; close_size, mean |C_i|; skewness, mean
distance of v_i to the centre of C_i (section 5.2); intersection, mean |B_i & C_i|, and alone, the share of images
with nothing but themselves in it; forced, the share that had to be put into their own B_i; objective, empty and splits
of the k-means; nmi with the clustering before; cluster_seconds; and, each --knn-every epochs and after the last,
local_density and background_density (Fig. 2: mean similarity to the 30 nearest, and to ranks 1000 to 4096, or the same
shares of fewer images).
"""

import argparse
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# ---- presets ---------------------------------------------------------------------------------------------------------
# "imagenet" is the base of all: ResNet-18's row of Table 1. The tables' rows change one thing of (H, m) = (1, 10k).

ABLATION = dict(data="imagenet", num_clusterings=1, num_clusters=10_000)
# Each network's epochs and drops are from the authors' configurations. VGG16's has batches of 256, but counts the steps
# of a warm start with batches of 128: 10 epochs, and 158 more. The paper has batches of 128, "typically" 200 epochs,
# and drops when the validation accuracy plateaus.
ALEXNET = dict(data="imagenet", arch="alexnet_bn_fc", epochs=160, lr_drops=[119, 142])
VGG16 = dict(data="imagenet", arch="vgg16_bn_fc", epochs=168, lr_drops=[126, 148])
RESNET50 = dict(data="imagenet", arch="resnet50", lr_drops=[152, 189])
# Clusters of five images: see "Choosing k and m". THIN has NPID's settings for few images in few epochs.
THIN = dict(subset=5000, width=16, temperature=0.2, batch_size=32, lr=0.03, schedule="cosine", weight_decay=5e-4,
            bank_momentum=0.0, num_clusterings=1, num_clusters=1000, num_neighbors=1024)
SMALL = dict(temperature=0.1, batch_size=128, weight_decay=5e-4, num_clusterings=1, num_clusters=10_000,
             num_neighbors=512, warmup_epochs=67)
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": dict(arch="resnet18", num_clusterings=10, num_clusters=30_000, num_neighbors=4096, temperature=0.07,
                     batch_size=128, lr=0.03, schedule="step", lr_drops=[160, 187], epochs=200, warmup_epochs=10,
                     weight_decay=1e-4, flip=True),
    "imagenet-alexnet": dict(ALEXNET, num_clusterings=3),  # Table 1
    "imagenet-vgg16": dict(VGG16, num_clusterings=6, num_clusters=10_000),
    "imagenet-resnet50": RESNET50,
    "table4-all": dict(ABLATION, background="all"),
    "table4-clusters": dict(ABLATION, background="clusters"),
    "table4-nearest": dict(ABLATION),
    "table5-self": dict(ABLATION, close="self"),
    "table5-nearest": dict(ABLATION, close="nearest"),
    "table5-3-10k": dict(ABLATION, num_clusterings=3),
    "table5-10-10k": dict(ABLATION, num_clusterings=10),
    "supplement1-1-1k": dict(ABLATION, num_clusters=1000),
    "supplement1-1-20k": dict(ABLATION, num_clusters=20_000),
    "supplement1-6-10k": dict(ABLATION, num_clusterings=6),
    "supplement1-alexnet-1-10k": ABLATION | ALEXNET,
    "supplement1-alexnet-3-10k": ABLATION | dict(ALEXNET, num_clusterings=3),
    "supplement1-alexnet-6-10k": ABLATION | dict(ALEXNET, num_clusterings=6),
    "supplement1-vgg16-1-10k": ABLATION | VGG16,
    "supplement1-resnet50-1-10k": ABLATION | RESNET50,
    "supplement1-resnet50-6-10k": ABLATION | dict(RESNET50, num_clusterings=6),
    "supplement1-resnet50-10-10k": ABLATION | dict(RESNET50, num_clusterings=10),
    "supplement3-k2048": dict(ABLATION, num_neighbors=2048),
    "supplement3-k8192": dict(ABLATION, num_neighbors=8192),
    "supplement3-center-crop": dict(ABLATION, cluster_on="center-crop"),
    "supplement3-more-freq": dict(ABLATION, recluster_every=1000),
    "dbscan": dict(ABLATION, clustering="dbscan"),
    "cifar10": dict(SMALL, data="cifar10", flip=False),
    "cifar10-thin": dict(THIN, data="cifar10", epochs=50, warmup_epochs=37),
    "cifar100": dict(SMALL, data="cifar100", flip=False),
    "stl10": dict(SMALL, data="stl10", num_clusters=21_000, num_neighbors=1024),
    "shapes": dict(SMALL, data="shapes", schedule="cosine"),
    "shapes-thin": dict(THIN, data="shapes", epochs=32, warmup_epochs=24, knn_every=4),
    "smoke": dict(SMALL, data="shapes", subset=256, test_subset=100, width=4, epochs=3, warmup_epochs=1, batch_size=32,
                  num_clusterings=3, num_clusters=16, num_neighbors=64, knn_every=1),
}
IMAGES = dict(cifar10=50_000, cifar100=50_000, shapes=50_000, stl10=105_000, imagenet=1_281_167)  # N that m is for
NOISE = 4096  # noise images of --warmup-loss nce, as the paper


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    method = parser.add_argument_group("method")
    method.add_argument("--H", "--num-clusterings", dest="num_clusterings", type=common.COUNT, default=10, metavar="H",
                        help="H, clusterings whose union makes C_i (section 3.1)")
    method.add_argument("--m", "--num-clusters", dest="num_clusters", type=common.COUNT, default=30_000, metavar="M",
                        help="m, clusters in each")
    method.add_argument("--k", "--num-neighbors", dest="num_neighbors", type=common.COUNT, default=4096, metavar="K",
                        help="k, size of B_i")
    method.add_argument("--tau", "--temperature", dest="temperature", type=common.POSITIVE, default=0.07, metavar="TAU",
                        help="tau of eq. (1)")
    method.add_argument("--bank-momentum", type=common.SHARE, default=0.5, metavar="SHARE",
                        help="1 - t of eq. (5), the share of the old feature")
    method.add_argument("--warmup-epochs", type=common.COUNT_OR_ZERO, default=10, metavar="N",
                        help="first epochs with NPID's loss")
    method.add_argument("--warmup-loss", choices=["softmax", "nce"], default="softmax",
                        help="NPID's softmax over all images, or its approximation with 4,096 noise images and one Z")
    method.add_argument("--background", choices=["nearest", "all", "clusters"], default="nearest",
                        help="B_i: the k nearest; all images; or by --background-clusters (Table 4)")
    method.add_argument("--background-clusters", type=common.COUNT, nargs=2, default=[3, 1000], metavar=("H", "M"),
                        help="clusterings and clusters for --background clusters")
    method.add_argument("--close", choices=["clusters", "self", "nearest"], default="clusters",
                        help="C_i: by clusterings; only i; or the --close-neighbors nearest, which collapses (Table 5)")
    method.add_argument("--close-neighbors", type=common.COUNT, default=43, metavar="K",
                        help="k' for --close nearest; the paper prints none")
    method.add_argument("--clustering", choices=["kmeans", "dbscan"], default="kmeans",
                        help="how C_i's clusters are found")
    method.add_argument("--dbscan-radius", type=common.POSITIVE, default=0.5,
                        help="largest distance of neighbours for dbscan")
    method.add_argument("--kmeans", choices=["torch", "faiss"], default="torch",
                        help="implementation of k-means; the objective is the same")
    method.add_argument("--kmeans-iterations", type=common.COUNT, default=20, metavar="N", help="Lloyd iterations")
    method.add_argument("--cluster-on", choices=["bank", "center-crop"], default="bank",
                        help="cluster the bank, or features recomputed from central crops (supplement, Table 3)")
    method.add_argument("--cluster-seeds", choices=["fixed", "redrawn"], default="fixed",
                        help="fixed: the same H seeds in all epochs, as in the authors' code; redrawn: new ones for "
                             "each clustering")
    method.add_argument("--recluster-every", type=common.COUNT_OR_ZERO, default=0, metavar="STEPS",
                        help="renew the clusters within an epoch too (supplement, Table 3: 1000); 0: once an epoch")
    method.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="horizontal flips")
    method.add_argument("--knn-features", choices=["bank", "clean"], default="bank", help="train features of the kNN "
                        "monitor: the bank (free; augmented, up to an epoch old) or recomputed without augmentation")
    common.add_training_options(parser)
    args = common.parse(parser, PRESETS, argv)
    if args.close == "nearest" and args.background != "nearest":
        parser.error("--close nearest goes with --background nearest")
    close, clustered = args.close == "clusters", "clusters" in (args.close, args.background)
    by_kmeans = close and args.clustering == "kmeans"
    idle = {name: (clustered, "clusters, see --close") for name in ("cluster_on", "cluster_seeds", "recluster_every")}
    idle |= {name: (by_kmeans or args.background == "clusters", "clusters by kmeans, see --close")
             for name in ("kmeans", "kmeans_iterations")}
    common.note_idle(args, idle | dict(
        background_clusters=(args.background == "clusters", "--background clusters"),
        close_neighbors=(args.close == "nearest", "--close nearest"),
        clustering=(close, "--close clusters"), num_clusterings=(close, "--close clusters"),
        dbscan_radius=(close and not by_kmeans, "--clustering dbscan"),
        num_clusters=(by_kmeans, "--close clusters by kmeans"),
        num_neighbors=(args.background == "nearest", "--background nearest"),
        warmup_loss=(args.warmup_epochs > 0, "--warmup-epochs above 0")))
    return args


def fit_to(count: int, args: argparse.Namespace) -> list[str]:
    """Shrink defaults that do not fit `count` images or --epochs; a typed size that does not is a fault, if it is used.

    m, and B_i's clusters, shrink where N is under half of what they are meant for, so that clusters keep their size; k
    to a tenth of N, wider than C_i, where it is over a quarter; the warm start to a third of the epochs. Returns notes.
    """
    notes, preset = list[str](), PRESETS["imagenet"] | PRESETS[args.preset]
    by_kmeans = args.close == "clusters" and args.clustering == "kmeans"
    near = args.background == "nearest"

    def fit(option: str, name: str, value: int, too_large: bool) -> None:
        given = getattr(args, name)
        if name in args.typed and given > count:
            raise common.Fault(f"{option} {given} is more than the {count} images; {value} would fit")
        if name not in args.typed and too_large:
            notes.append(f"{option} {value}, scaled from {given} to {count:,} images")
            setattr(args, name, value)

    if by_kmeans:
        meant_for = preset.get("subset", IMAGES.get(preset.get("data", "imagenet"), count))  # N of the preset's m
        fit("--m", "num_clusters", max(2, round(preset["num_clusters"] * count / meant_for)), 2 * count < meant_for)
    if near:
        fit("--k", "num_neighbors", max(2, count // 10), args.num_neighbors > count // 4)
    m, k = args.num_clusters, args.num_neighbors
    if args.clustering == "dbscan" and args.num_clusterings > 1:
        notes.append(f"note: all {args.num_clusterings} clusterings by dbscan are the same: --H 1 is enough")
    if 1 < args.epochs <= args.warmup_epochs and "warmup_epochs" not in args.typed:  # a single epoch is NPID's
        notes.append(f"--warmup-epochs {max(1, args.epochs // 3)}, a third of the epochs, from {args.warmup_epochs}")
        args.warmup_epochs = max(1, args.epochs // 3)
    if by_kmeans and m > count // 2:
        notes.append(f"warning: m = {m} clusters of {count:,} images hold {count / m:.1f} each: hardly any "
                     "image has a close neighbour but itself; ImageNet has 43 a cluster at m = 30000")
    if by_kmeans and near and count // m > k:
        notes.append(f"warning: clusters of {count // m} images are larger than B_i, k = {k}: raise --m or --k")
    if near and k > count // 4:
        notes.append(f"warning: k = {k} is {100 * k / count:.0f} % of the images: B_i is hardly local")
    if args.background == "clusters":
        (repeats, given), imagenet = args.background_clusters, IMAGES["imagenet"]  # which the default is for
        if 2 * count < imagenet and "background_clusters" not in [*args.typed, *preset]:
            fewer = max(2, round(given * count / imagenet))
            notes.append(f"--background-clusters {repeats} {fewer}, scaled from {given} to {count:,} images")
            args.background_clusters = [repeats, fewer]
        elif given > count:
            raise common.Fault(f"--background-clusters {repeats} {given}: there are only {count} images")
    if args.close == "nearest" and args.close_neighbors > (k - 1 if "close_neighbors" in args.typed else k // 10):
        if "close_neighbors" in args.typed:
            raise common.Fault(f"--close-neighbors {args.close_neighbors} would be all of B_i, k = {k}: lower it")
        notes.append(f"--close-neighbors {max(1, k // 100)}, from {args.close_neighbors}: B_i has {k} images")
        args.close_neighbors = max(1, k // 100)
    if args.warmup_epochs >= args.epochs:
        notes.append(f"warning: with --warmup-epochs {args.warmup_epochs} all {args.epochs} epochs are NPID's")
    return notes


# ---- augmentation ----------------------------------------------------------------------------------------------------

SCALE = (0.2, 1.0)  # of RandomResizedCrop


def augment(images: Tensor, draw: common.Draw, photographs: bool, flip: bool) -> Tensor:
    """Crops (B, 3, S, S) in [0, 1] -> augmented ones: grey before jitter on photographs, after it on small images."""
    if photographs:
        images = common.random_grayscale(images, draw, 0.2)
    images = common.random_color_jitter(images, draw, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4)
    if not photographs:
        images = common.random_grayscale(images, draw, 0.2)
    if flip:
        images = common.random_flip(images, draw)
    return images


# ---- model -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Image (B, 3, S, S) -> feature (B, D), not yet on the unit sphere."""

    def __init__(self, arch: str, width: int, small: bool, feature_dim: int) -> None:
        super().__init__()
        self.backbone = common.backbone(arch, width, small)
        self.head = nn.Linear(self.backbone.dim, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        feature: Tensor = self.head(self.backbone(images))
        return feature.float()


# ---- close and background neighbours ---------------------------------------------------------------------------------


class Clusters(nn.Module):
    """Clusterings of all images by index: labels (H, N) int32, part of the checkpoint. At first each image is alone."""

    def __init__(self, num_clusterings: int, num_images: int) -> None:
        super().__init__()
        self.register_buffer("labels", torch.arange(num_images, dtype=torch.int32).repeat(num_clusterings, 1))
        self.labels: Tensor

    def same(self, index: Tensor, columns: Tensor) -> Tensor:
        """Whether an image shares a cluster with another one in at least one clustering, (B, c) bool.

        index: (B,); columns: the others, the same for all images (c,) or each image's own (B, c).
        """
        same = torch.zeros(len(index), columns.shape[-1], dtype=torch.bool, device=index.device)
        for labels in self.labels:
            # One list of columns for each image: gather is five times faster than indexing, on a CPU.
            theirs = labels.expand(len(columns), -1).gather(1, columns) if columns.ndim > 1 else labels[columns]
            same |= theirs == labels[index, None]
        return same


def nearest(z: Tensor, index: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """B_i: the k slots nearest to z (B, D) in the bank (N, D), in any order, and always i.

    Where i is not among them, it takes the place of the farthest. Returns slots (B, k), their similarities (B, k) and
    whether i had to be put in (B,).
    """
    similarity, slots = common.neighbors(z, bank, k, best_first=False)
    itself, own = index[:, None], (z * bank[index]).sum(1, keepdim=True)
    forced = (slots != itself).all(1, keepdim=True)
    farthest = similarity.argmin(1, keepdim=True)
    slots.scatter_(1, farthest, torch.where(forced, itself, slots.gather(1, farthest)))
    similarity.scatter_(1, farthest, torch.where(forced, own, similarity.gather(1, farthest)))
    return slots, similarity, forced[:, 0]


def most_similar(similarity: Tensor, count: int) -> Tensor:
    """C_i = N_k' (Table 5): which of B_i are the `count` nearest, (B, k) bool. similarity: (B, k), in any order."""
    places = similarity.topk(min(count, similarity.shape[1])).indices
    return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, places, True)


# ---- loss ------------------------------------------------------------------------------------------------------------
# The bank takes no gradient, so the gradient of L_i with respect to f_i has a closed form: (mean of v over B_i - mean
# over C_i & B_i) / tau, weighted by the softmax of v.f / tau in each set. No graph of similarities is kept.


def with_gradient(z: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """`value` (B,), whose gradient with respect to z (B, D) is `gradient` (B, D)."""
    return value + ((z - z.detach()) * gradient).sum(1)


def local_aggregation(
    z: Tensor, slots: Tensor, similarity: Tensor, close: Tensor, bank: Tensor, temperature: float
) -> Tensor:
    """L(C_i, B_i) of eq. (3), (B,), with B_i listed.

    z: (B, D); slots of B_i, their similarity to z, and which are in C_i: (B, k).
    """
    scores = similarity.detach() / temperature
    close_scores = scores.masked_fill(~close, -math.inf)
    weights = scores.softmax(1) - close_scores.softmax(1)
    if z.device.type == "cuda":  # the same sums: there four times as fast, on a CPU half
        total = torch.bmm(weights[:, None], bank[slots])[:, 0]
    else:
        total = F.embedding_bag(slots, bank, mode="sum", per_sample_weights=weights)
    return with_gradient(z, scores.logsumexp(1) - close_scores.logsumexp(1), total / temperature)


def local_aggregation_dense(
    z: Tensor, index: Tensor, background: Clusters, close: Clusters, bank: Tensor, temperature: float,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """L(C_i, B_i) of eq. (3) and |B_i & C_i|, both (B,), where B_i is given by clusters too and has any size.

    By a running maximum and sum over chunks of the bank, as in common.bank_attention, for both sets at once.
    """
    query = z.detach() / temperature
    peak = torch.full((2, len(z), 1), -math.inf, device=z.device)
    total, output = torch.zeros_like(peak), torch.zeros(2, *z.shape, device=z.device)  # of B_i, and of C_i & B_i
    size = torch.zeros(len(z), device=z.device)
    chunk = chunk or (8192 if z.device.type == "cpu" else max(8192, (1 << 25) // len(z)))
    for start in range(0, len(bank), chunk):
        slots = torch.arange(start, min(start + chunk, len(bank)), device=z.device)
        rows = bank[slots]
        inside = background.same(index, slots)
        both = inside & close.same(index, slots)
        scores = (query @ rows.T).masked_fill(~torch.stack([inside, both]), -math.inf)
        new_peak = torch.maximum(peak, scores.amax(2, keepdim=True))
        base = new_peak.clamp(min=torch.finfo().min)  # a chunk without members: exp(-inf - base) is 0, not NaN
        weights, decay = (scores - base).exp(), (peak - base).exp()
        total = total * decay + weights.sum(2, keepdim=True)
        output = output * decay + weights @ rows
        peak = new_peak
        size += both.sum(1)
    log_p = (peak + total.log())[..., 0]  # log P(B_i) and log P(C_i & B_i), but for Z, which cancels
    output /= total  # means of v over each set
    return with_gradient(z, log_p[0] - log_p[1], (output[0] - output[1]) / temperature), size


def noise_scores(z: Tensor, noise: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """v_j . f / tau of the noise slots (B, m), for the paper's warm start."""
    # With many draws one product with the whole bank is faster: on a CPU from m = N / 16, on a GPU from m = N / D.
    cost_of_draw = 16 if z.device.type == "cpu" else z.shape[1]  # in rows of that product
    if cost_of_draw * noise.shape[1] > len(bank):
        return (z @ bank.T).gather(1, noise) / temperature
    return torch.einsum("bd,bmd->bm", z, bank[noise]) / temperature


def nce(positive: Tensor, negative: Tensor, log_z: Tensor, num_images: int) -> Tensor:
    """NPID's loss by noise-contrastive estimation, (B,): see npid.py. positive: (B,), negative: (B, m) scores."""
    offset = math.log(negative.shape[1] / num_images) + log_z  # log(Z m / N)
    return F.softplus(offset - positive) + F.softplus(negative - offset).sum(1)


class Constant(nn.Module):
    """NPID's log Z: the first estimate, kept from then on, in checkpoints too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(math.nan))  # no estimate yet
        self.value: Tensor

    def first(self, value: Tensor) -> Tensor:
        """The first `value` that this was ever given."""
        return self.value.copy_(torch.where(self.value.isnan(), value, self.value))  # in place, for common.Graph


# ---- clustering ------------------------------------------------------------------------------------------------------


def cluster(
    run: common.Run, features: Tensor, num_clusterings: int, num_clusters: int, key: Sequence[int | str],
    iterations: int = 20, backend: str = "torch", radius: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Labels (H, N) int32 of H clusterings of features (N, D), shared out over the ranks, and k-means' figures of them.

    The seeds follow from `key` and the number of the clustering. radius: DBSCAN's, in place of k-means.
    """
    share = -(-num_clusterings // run.world)  # all ranks have room for as many, since gather needs equal shapes
    first = run.rank * share
    labels = torch.zeros(share, len(features), dtype=torch.int32, device=features.device)
    figures = torch.zeros(share, 3, device=features.device)
    for turn, number in enumerate(range(first, min(first + share, num_clusterings))):
        if radius is not None:
            labels[turn] = dbscan(features, radius)
        else:
            seed = int(torch.randint(2**31, (), generator=run.generator("cluster", *key, number)))
            found = common.kmeans(features, num_clusters, iterations=iterations, seed=seed, backend=backend)
            labels[turn] = found.labels
            figures[turn] = torch.tensor([found.objective[-1] / len(features), found.empty, found.splits])
    run.barrier()
    labels, figures = (part[:num_clusterings] for part in run.gather(labels, figures))
    objective, empty, splits = figures.mean(0).tolist()
    return labels, {} if radius is not None else dict(objective=round(objective, 5), empty=empty, splits=splits)


def dbscan(features: Tensor, radius: float) -> Tensor:
    """Labels (N,) int32 by density; what DBSCAN calls noise is alone. Quadratic in N."""
    from sklearn.cluster import DBSCAN

    labels = torch.from_numpy(DBSCAN(eps=radius, min_samples=5, n_jobs=-1).fit_predict(features.cpu().numpy()))
    alone = labels.max() + (labels < 0).cumsum(0)
    return torch.where(labels < 0, alone, labels).to(features.device, torch.int32)


@torch.no_grad()
def health(clusters: Clusters, before: Tensor, bank: Tensor, rows: Tensor) -> dict[str, float]:
    """close_size and skewness, means over the sampled images `rows` (R,), and nmi of the first clustering with before.

    before: the previous labels (H, N); no nmi if every image was still alone, in clusters 0 to N - 1.
    """
    from sklearn.metrics import normalized_mutual_info_score

    sizes, distances = [], []
    for part in torch.split(rows, 64):
        close = clusters.same(part, torch.arange(len(bank), device=bank.device)).float()
        sizes.append(close.sum(1))
        distances.append((close @ bank / sizes[-1][:, None] - bank[part]).norm(dim=1))
    figures = dict(close_size=round(torch.cat(sizes).mean().item(), 2),
                   skewness=round(torch.cat(distances).mean().item(), 4))
    if int(before[0].max()) + 1 < len(bank):
        nmi = normalized_mutual_info_score(before[0].cpu().numpy(), clusters.labels[0].cpu().numpy(),
                                           average_method="arithmetic")
        figures["nmi"] = round(float(nmi), 4)
    return figures


def density_ranks(images: int) -> tuple[int, int, int]:
    """The 30 nearest, and ranks 1000 to 4096 for the background (Fig. 2); of fewer images than that the same shares."""
    shrink = min(1, (images - 1) / 4096)
    first, last = (max(2, round(rank * shrink)) for rank in (1000, 4096))
    return min(30, first - 1), first, last


@torch.no_grad()
def density(bank: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Local and background density of the images `rows` (R,), each (R,): mean similarities at those ranks in the bank
    (N, D), of each image without itself."""
    local, first, last = density_ranks(len(bank))
    similarity = common.neighbors(bank[rows], bank, last, exclude=rows)[0]
    return similarity[:, :local].mean(1), similarity[:, first - 1 :].mean(1)


# ---- training --------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    run = common.Run(args)
    data = common.load(args, "pretrain", run.device)
    test = common.load_monitor(args, data, run.device)
    notes = fit_to(len(data), args)
    # NPID's loss where all images are equally probable, as chance_loss of npid.py
    chance = math.log(len(data)) if args.warmup_loss == "softmax" else math.log1p(NOISE) + NOISE * math.log1p(1 / NOISE)
    facts: dict[str, Any] = dict(chance_loss=round(chance, 4))
    if args.background == "clusters" or (args.close, args.clustering) == ("clusters", "kmeans"):
        # Is Faiss there, and on what?
        facts["kmeans_backend"] = common.kmeans(torch.zeros(1, 1, device=run.device), 1, backend=args.kmeans).backend
    run.describe(data, test, **facts)
    if notes and run.rank == 0:
        print(*notes, sep="\n", flush=True)
    steps = run.steps_per_epoch(len(data))
    if args.recluster_every >= steps:
        common.note(f"note: --recluster-every {args.recluster_every} has no effect: an epoch has {steps} steps")

    torch.manual_seed(args.seed)
    encoder = run.place(Encoder(args.arch, args.width, data.small, args.feature_dim))
    model = run.parallel(encoder)
    bank = common.MemoryBank(len(data), args.feature_dim, run.generator("bank")).to(run.device)
    clusters = Clusters(args.num_clusterings, len(data)).to(run.device)
    background = Clusters(args.background_clusters[0] if args.background == "clusters" else 1, len(data)).to(run.device)
    background.labels.zero_()  # all images in one cluster: --background all
    constant = Constant().to(run.device)
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    totals = common.Totals(run)
    state = dict(encoder=encoder, optimizer=optimizer, bank=bank, clusters=clusters, background=background,
                 constant=constant, totals=totals)
    first_epoch, first_step = run.resume(state, steps)
    sample = torch.randperm(len(data), generator=run.generator("sample"))[:1000].to(run.device)  # for health figures
    radius = args.dbscan_radius if args.clustering == "dbscan" else None

    def embed(images: Tensor) -> Tensor:
        with run.autocast():
            return F.normalize(encoder(images))

    def train_step(
        warming: bool, images: Tensor, index: Tensor, noise: Tensor, draw: common.Draw
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """One step: from crops (B, 3, S, S), their slots (B,) and noise slots (B, m) to new weights and bank.

        warming: with NPID's loss. Returns the loss and metrics for the log: dicts of each part of the batch
        (--accumulate), then one of the whole.
        """
        images = data.normalize(augment(images, draw, not data.small, args.flip))
        optimizer.zero_grad()
        z_parts, figures, loss = [], list[dict[str, Tensor]](), torch.zeros((), device=run.device)
        # i: slots of a part's images; j: slots of the noise images drawn for them
        for part, i, j in common.parts([model], *(x.chunk(args.accumulate) for x in (images, index, noise))):
            with run.autocast():
                feature = model(part)
            z = F.normalize(feature)
            if warming and args.warmup_loss == "softmax":
                losses = common.bank_softmax(z, i, bank.features, args.temperature, run.amp)
            elif warming:
                positive = (z * bank.features[i]).sum(1) / args.temperature
                negative = noise_scores(z, j, bank.features, args.temperature)
                # NPID's eq. (8): log Z from this rank's noise, then the log of the mean over ranks
                estimate = negative.detach().flatten().logsumexp(0) + math.log(len(data) / negative.numel())
                (estimates,) = run.gather(estimate.view(1))
                log_z = constant.first(estimates.logsumexp(0) - math.log(run.world))
                losses = nce(positive, negative, log_z, len(data))
            elif args.background == "nearest":
                slots, similarity, forced = nearest(z.detach(), i, bank.features, args.num_neighbors)
                close = clusters.same(i, slots)  # of --close self and nearest: i alone
                if args.close == "nearest":
                    close |= most_similar(similarity, args.close_neighbors)
                losses = local_aggregation(z, slots, similarity, close, bank.features, args.temperature)
                size = close.sum(1)
                figures.append(dict(forced=forced.float().mean()))
            else:
                losses, size = local_aggregation_dense(z, i, background, clusters, bank.features, args.temperature)
            if warming:
                figures.append(dict(npid_loss=losses.detach().mean()))
            else:
                figures.append(dict(la_loss=losses.detach().mean(), intersection=size.float().mean(),
                                    alone=(size == 1).float().mean()))
            part_loss = losses.mean() / args.accumulate
            part_loss.backward()
            loss += part_loss.detach()
            z_parts.append(z.detach())
        optimizer.step()
        all_z, all_index = run.gather(torch.cat(z_parts), index)
        bank.update(all_z, all_index, args.bank_momentum)
        figures.append(dict(loss=loss))
        if len(all_z) > 1:  # of unit vectors spread over the sphere each component has the deviation 1 / sqrt(D)
            figures.append(dict(feature_std=all_z.std(0).mean() * args.feature_dim**0.5))
        return loss, figures

    # On a CPU, or on several ranks, train_step itself
    graphed_steps = {warming: run.graphed(functools.partial(train_step, warming), data.small)
                     for warming in (True, False)}
    for epoch in range(first_epoch, args.epochs):
        order = run.permutation(epoch, len(data))
        start = first_step if epoch == first_epoch else 0
        began = time.perf_counter()
        encoder.train()
        warming = epoch < args.warmup_epochs
        if not warming:
            graphed_steps.pop(True, None)  # whose graph keeps the memory of a step
        for step, index, (images,) in data.batches(run, order, common.Crop(data.size, SCALE), epoch, start):
            common.set_rate(optimizer, common.learning_rate(args, epoch + step / steps))
            due = step == 0 or (args.recluster_every and step % args.recluster_every == 0)
            if not warming and due and "clusters" in (args.close, args.background):
                clustering_began = time.perf_counter()
                features = bank.features
                if args.cluster_on == "center-crop":
                    encoder.eval()
                    run.broadcast(encoder)
                    features = common.extract(run, data, embed)
                    encoder.train()
                key = (epoch, step) if args.cluster_seeds == "redrawn" else ()
                clustered = dict[str, float]()
                if args.background == "clusters":
                    clusterings, num_clusters = args.background_clusters
                    labels, _ = cluster(run, features, clusterings, num_clusters, ("background", *key),
                                        args.kmeans_iterations, args.kmeans)
                    background.labels.copy_(labels)
                before = clusters.labels.clone()
                if args.close == "clusters":
                    labels, clustered = cluster(run, features, args.num_clusterings, args.num_clusters,
                                                ("close", *key), args.kmeans_iterations, args.kmeans, radius)
                    clusters.labels.copy_(labels)
                clustered["cluster_seconds"] = round(time.perf_counter() - clustering_began, 2)
                if args.close == "clusters":
                    clustered |= health(clusters, before, bank.features, sample)
                totals.add(**{name: torch.tensor(value, device=run.device) for name, value in clustered.items()})

            noise = index[:, None]  # stands in where no noise is drawn, and is not read
            if warming and args.warmup_loss == "nce":
                source = run.generator("noise", epoch, step, device=run.device)
                shape = (args.batch_size, NOISE)
                noise = torch.randint(len(data), shape, generator=source, device=run.device)[run.rows(args.batch_size)]
            loss, figures = graphed_steps[warming](images, index, noise, run.draw(epoch, step))
            for part_figures in figures:
                totals.add(**part_figures)
            run.after_step(state, epoch, step, loss)

        row = totals.means()  # waits for the device's last steps
        images_per_second = (steps - start) * args.batch_size / (time.perf_counter() - began)
        monitored = epoch + 1 == args.epochs or (epoch + 1) % (args.knn_every or args.epochs) == 0
        if monitored and test:
            encoder.eval()
            run.broadcast(encoder)
            features = bank.features if args.knn_features == "bank" else common.extract(run, data, embed)
            row |= common.knn_monitor(features, data, common.extract(run, test, embed), test, args.temperature)
        if monitored and len(data) > 2:  # density needs two other images
            local, around = density(bank.features, sample)
            row |= dict(local_density=local.mean().item(), background_density=around.mean().item())
        run.log(epoch=epoch + 1, step=(epoch + 1) * steps, lr=common.rate(optimizer), **row,
                images_per_second=round(images_per_second), seconds=round(time.perf_counter() - began, 1),
                memory_gb=common.memory_gb(run.device))
        run.save(state, epoch + 1, 0)
    run.finish(encoder.backbone)


if __name__ == "__main__":
    common.launch(main, parse_args)
