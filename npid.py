"""Non-Parametric Instance Discrimination (Wu, Xiong, Yu and Lin, CVPR 2018, arXiv:1805.01978).

Every image is a class of its own. A memory bank keeps one feature v_i for each image, and the bank is the classifier:

    P(i|f) = exp(v_i . f / tau) / sum_j exp(v_j . f / tau)                                            (2)

so no class weights are learnt, and what is learnt is a metric. The paper had to approximate the sum by
noise-contrastive estimation; here it is exact by default (`--loss softmax`), since the bank takes no gradient and (2)
is then one call of attention over it. `--loss nce` is the paper's, `--loss parametric` the baseline of its Table 1.

    python npid.py                              # rendered shapes, for a first try
    python npid.py --data cifar10               # Table 1, exact softmax: 80.8 kNN in the paper; 5.2 minutes on an H100
    python npid.py --preset cifar10-nce4096     # Table 1, NCE: 80.4 in the paper
    python npid.py --data imagenet              # ImageNet layout: train/ and val/ with a folder for each class
    torchrun --nproc-per-node 8 npid.py --preset imagenet-resnet50
    python npid.py --preset cifar10 --help      # every value of that preset

Differences from the paper and from the authors' code:
  * The paper damps the bank's change by a proximal term (eq. 9), the authors' code by averaging the bank. The two
    are not equivalent; both are here: `--proximal-weight` (the paper prints no value) and `--bank-momentum`.
  * The bank is written once a step, after the optimiser, with the features of that step's forward pass; all slots are
    unit vectors from the start.
  * NCE is computed in the log domain, without the 1e-7 that the code adds. Z is N times the mean over the noise draws
    of the first step (`--z first`, the paper's), bad if a fresh network's features are nearly alike: then `--z ema`.
  * CIFAR's recipe is the code's: jitter before grey, no flip, tau 0.1, batch 128, weight decay 5e-4; none in the paper.

log.jsonl has, in its first line, chance_loss, the loss at equal probabilities (ln N for the softmax); for each epoch:
loss; feature_std (1: features spread over the sphere, 0: all alike); z_over_n for NCE, Z / N (a random bank gives 2.2
at tau 0.07, D 128; null where float32 cannot hold it); knn_top1 each --knn-every epochs (K = 200, temperature tau).
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# ---- presets ---------------------------------------------------------------------------------------------------------
# "imagenet" is the base of all and serves any directory; a preset lists what differs. The paper's
# ImageNet rows use NCE, the base does not.

NCE = dict(data="imagenet", loss="nce", num_negatives=4096)
CIFAR = dict(temperature=0.1, batch_size=128, weight_decay=5e-4, flip=False)
# Few images in few epochs: the features of a fresh network are nearly alike (mean cosine 0.98), and a sharp softmax
# keeps them so for tens of epochs. At tau 0.2 the mean feature had a length of 0.16 after 29 epochs, at 0.1 of 0.83
# after 17. When they come apart depends on rounding, and so on the processor: in epochs 15 to 25 of `shapes`.
THIN = dict(subset=5000, width=16, temperature=0.2, batch_size=32, lr=0.03, schedule="cosine", weight_decay=5e-4,
            bank_momentum=0.0)
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": dict(loss="softmax", temperature=0.07, batch_size=256, lr=0.03, schedule="step", lr_drops=[120, 160],
                     epochs=200, weight_decay=1e-4, flip=True),
    "imagenet-alexnet": dict(NCE, arch="alexnet"),  # Tables 2 and 3; kNN 31.3
    "imagenet-vgg16": dict(NCE, arch="vgg16"),  # 33.9
    "imagenet-alexnet-bn": dict(NCE, arch="alexnet_bn_fc", batch_size=128),  # "IR (with BN)" of LA's tables, 34.9
    "imagenet-vgg16-bn": dict(NCE, arch="vgg16_bn_fc", batch_size=128),  # 42.1
    "imagenet-resnet18": dict(NCE, arch="resnet18"),
    "imagenet-resnet50": dict(NCE, arch="resnet50"),
    "imagenet-resnet50-sampled": dict(NCE, arch="resnet50", loss="sampled",
                                      num_negatives=65536),  # authors' README: 58.5 linear
    "imagenet-dim32": dict(NCE, feature_dim=32),  # Table 4
    "imagenet-dim64": dict(NCE, feature_dim=64),
    "imagenet-dim256": dict(NCE, feature_dim=256),
    "imagenet-0.1percent": dict(NCE, subset=0.001),  # Table 5
    "imagenet-1percent": dict(NCE, subset=0.01),
    "imagenet-10percent": dict(NCE, subset=0.1),
    "imagenet-30percent": dict(NCE, subset=0.3),
    "cifar10": dict(CIFAR, data="cifar10"),  # Table 1
    "cifar10-parametric": dict(CIFAR, data="cifar10", loss="parametric"),
    "cifar10-nce1": dict(CIFAR, data="cifar10", loss="nce", num_negatives=1),
    "cifar10-nce10": dict(CIFAR, data="cifar10", loss="nce", num_negatives=10),
    "cifar10-nce512": dict(CIFAR, data="cifar10", loss="nce", num_negatives=512),
    "cifar10-nce4096": dict(CIFAR, data="cifar10", loss="nce", num_negatives=4096),
    "cifar10-proximal": dict(CIFAR, data="cifar10", proximal_weight=1.0, bank_momentum=0.0),  # Fig. 3
    "cifar10-oscillating": dict(CIFAR, data="cifar10", bank_momentum=0.0),
    "cifar10-thin": dict(THIN, data="cifar10", epochs=50),
    "cifar100": dict(CIFAR, data="cifar100"),
    "stl10": dict(data="stl10", temperature=0.1, weight_decay=5e-4),
    "shapes": dict(CIFAR, data="shapes", schedule="cosine", flip=True),
    "demo": dict(THIN, data="shapes", epochs=48, knn_every=4, test_subset=2000),
    "smoke": dict(CIFAR, data="shapes", subset=256, test_subset=100, width=4, epochs=2, batch_size=32, knn_every=1),
}


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    method = parser.add_argument_group("method")
    method.add_argument("--loss", choices=["softmax", "nce", "sampled", "parametric"], default="softmax",
                        help="softmax: eq. (2), exact over the bank; nce: eq. (7); sampled: softmax over the image and "
                             "--num-negatives others; parametric: eq. (1), one learnt weight vector for each image")
    method.add_argument("--tau", "--temperature", dest="temperature", type=common.POSITIVE, default=0.07,
                        metavar="TAU", help="tau of eq. (2)")
    method.add_argument("--m", "--num-negatives", dest="num_negatives", type=common.COUNT, default=4096, metavar="M",
                        help="m of eq. (6), noise images drawn for each image (nce, sampled)")
    method.add_argument("--z", choices=["first", "ema", "exact"], default="first",
                        help="nce: Z of eq. (8); first: estimated in the first step (with --accumulate, in its first "
                             "part) and kept, as in the paper; ema: a running mean, momentum 0.99 per step; exact: "
                             "each image's own sum")
    method.add_argument("--bank-momentum", type=common.SHARE, default=0.5, metavar="SHARE",
                        help="share of the old feature in v_i <- normalize(share * v_i + (1 - share) * f_i); "
                             "0: the paper's")
    method.add_argument("--lambda", "--proximal-weight", dest="proximal_weight", type=common.NOT_NEGATIVE, default=0.0,
                        metavar="LAMBDA", help="lambda of eq. (9), weight of |f_i - v_i|^2")
    method.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="horizontal flips")
    method.add_argument("--knn-features", choices=["bank", "clean"], default="bank", help="train features of the kNN "
                        "monitor: the bank (free; augmented, up to an epoch old) or recomputed without augmentation")
    method.add_argument("--shard-bank", action="store_true", help="each rank keeps only its share of the bank's rows "
                        "(softmax): 512 N / ranks bytes; the same result, one more exchange per step")
    common.add_training_options(parser)
    args = common.parse(parser, PRESETS, argv)
    if args.shard_bank and (args.loss != "softmax" or args.proximal_weight):
        parser.error("--shard-bank goes with --loss softmax, without --proximal-weight")
    common.note_idle(args, dict(num_negatives=(args.loss in ("nce", "sampled"), "--loss nce or sampled"),
                                z=(args.loss == "nce", "--loss nce")))
    return args


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

    def __init__(self, arch: str, width: int, small: bool, feature_dim: int, num_classes: int = 0) -> None:
        super().__init__()
        self.backbone = common.backbone(arch, width, small)
        self.head = nn.Linear(self.backbone.dim, feature_dim)
        # Only for the parametric softmax, which learns a weight vector for each image.
        self.classes: nn.Parameter | None = None
        if num_classes:
            self.classes = nn.Parameter(torch.randn(num_classes, feature_dim) / feature_dim**0.5)

    def forward(self, images: Tensor) -> Tensor:
        feature: Tensor = self.head(self.backbone(images))
        return feature.float()


# ---- loss ------------------------------------------------------------------------------------------------------------
# z: (B, D) features on the unit sphere; index: (B,) their slots; bank: (N, D); noise: (B, m) slots. The exact softmax
# of eq. (2) is common.bank_softmax, which Local Aggregation and CLD share.


def parametric_softmax(features: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """-log P(i|v) of eq. (1), (B,). features: (B, D), not normalised; weights: (N, D), one row a class."""
    return F.cross_entropy(features @ weights.T, index, reduction="none")


def noise_scores(z: Tensor, noise: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """v_j . f / tau for each image's own noise draws: (B, m)."""
    # With many draws one product with the whole bank is faster: on a CPU from m = N / 16, on a GPU from m = N / D.
    cost_of_draw = 16 if z.device.type == "cpu" else z.shape[1]  # in rows of that product
    if cost_of_draw * noise.shape[1] > len(bank):
        return (z @ bank.T).gather(1, noise) / temperature
    return torch.einsum("bd,bmd->bm", z, bank[noise]) / temperature


def positive_scores(z: Tensor, index: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """v_i . f_i / tau: (B,)."""
    return (z * bank[index]).sum(1) / temperature


def nce(positive: Tensor, negative: Tensor, log_z: Tensor, num_images: int) -> Tensor:
    """J_NCE of eq. (7), (B,), with the posterior h = p / (p + m / N) of eq. (6) and p = exp(score) / Z of eq. (4).

    positive: (B,) scores of the images; negative: (B, m) of their noise; log_z: () or (B,).
    log h = -softplus(log(m / N) - log p), and 1 - h likewise.
    """
    offset = math.log(negative.shape[1] / num_images)  # log(m / N)
    image_term = F.softplus(offset - (positive - log_z))  # -log h(i)
    noise_term = F.softplus((negative - log_z.view(-1, 1)) - offset).sum(1)  # -sum of log(1 - h(j))
    return image_term + noise_term


def estimate_log_z(negative: Tensor, num_images: int) -> Tensor:
    """log Z of eq. (8), (): N times the mean of exp(score) over the noise of the batch; negative: (B, m) scores."""
    return negative.detach().flatten().logsumexp(0) - math.log(negative.numel()) + math.log(num_images)


def sampled_softmax(positive: Tensor, negative: Tensor) -> Tensor:
    """Cross-entropy of the image among itself and its m noise draws, (B,). positive: (B,), negative: (B, m) scores."""
    return torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive


def chance_loss(loss: str, m: int, num_images: int) -> float:
    """The loss where all images are equally probable: ln N, or a function of m where noise images are drawn."""
    if loss == "nce":  # h = 1 / (1 + m)
        return math.log1p(m) + m * math.log1p(1 / m)
    return math.log1p(m) if loss == "sampled" else math.log(num_images)


def proximal(z: Tensor, index: Tensor, bank: Tensor) -> Tensor:
    """|f_i - v_i|^2 of eq. (9), (B,): the pull towards the image's feature of the last visit."""
    return (z - bank[index]).square().sum(1)


class Normalizer(nn.Module):
    """The constant Z of eq. (8) as log Z; part of the checkpoint, so that a resumed run does not estimate it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_z", torch.tensor(math.nan))  # no estimate yet
        self.log_z: Tensor

    @torch.no_grad()
    def update(self, estimate: Tensor, momentum: float) -> Tensor:
        """Z <- momentum * Z + (1 - momentum) * exp(estimate), the first estimate whole; returns log Z."""
        mixed = self.log_z
        if momentum < 1:  # of 1 nothing is mixed in, and log(0) is an error
            mixed = torch.logaddexp(self.log_z + math.log(momentum), estimate + math.log(1 - momentum))
        return self.log_z.copy_(torch.where(self.log_z.isnan(), estimate, mixed))  # in place, for common.Graph


# ---- a bank in parts -------------------------------------------------------------------------------------------------


class ShardedBank(common.MemoryBank):
    """A bank of which each rank holds its share of the rows, for more images than fit one GPU; whole in checkpoints.

    features: (rows, D) from `start` on, of `size` in all: the same rows as in the whole bank.
    """

    CHUNK = 16_384  # rows drawn or sent at once

    def __init__(self, run: common.Run, size: int, dim: int, generator: torch.Generator) -> None:
        super().__init__(0, dim)
        rows = run.rows(size)
        self.size, self.start, self.run = size, rows.start, run
        self.features = torch.empty(rows.stop - rows.start, dim)
        self.whole = torch.empty(0)  # all rows, on rank 0 between `collect` and `state_dict`
        for begin in range(0, size, self.CHUNK):  # every rank draws all of them, so that they are those of the whole
            part = F.normalize(torch.randn(min(self.CHUNK, size - begin), dim, generator=generator), dim=1)
            first, last = max(begin, rows.start), min(begin + len(part), rows.stop)
            if first < last:
                self.features[first - rows.start : last - rows.start] = part[first - begin : last - begin]

    def update(self, z: Tensor, index: Tensor, momentum: float) -> None:
        """Write those rows of the whole batch, z (B, D) and index (B,), whose slots are here."""
        own = (index >= self.start) & (index < self.start + len(self.features))
        super().update(z[own], index[own] - self.start, momentum)

    def gathered(self, whole: Tensor) -> Tensor:
        """Copy all rows into `whole` (size, D), on any device. All ranks call it; an empty `whole` only sends."""
        world, share = self.run.world, -(-self.size // self.run.world)
        for begin in range(0, share, self.CHUNK):
            rows = self.features[begin : begin + self.CHUNK]
            padding = min(self.CHUNK, share - begin) - len(rows)  # gather needs equal shapes
            (parts,) = self.run.gather(F.pad(rows, (0, 0, 0, padding))[None])
            for rank, part in enumerate(parts if len(whole) else ()):
                first = rank * self.size // world + begin
                last = min(first + len(part), (rank + 1) * self.size // world)
                whole[first:last] = part[: last - first]
        return whole

    def collect(self) -> None:
        """Before state_dict, on all ranks: the whole bank comes to the first one's host memory."""
        self.whole = self.gathered(torch.empty(self.size if self.run.rank == 0 else 0, self.features.shape[1]))

    def state_dict(self, *args: Any, **options: Any) -> Any:
        whole, self.whole = self.whole, torch.empty(0)
        return dict(features=whole)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self.features.copy_(state_dict["features"][self.start : self.start + len(self.features)])


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all rows from attention over P parts of them, exact: O (P, B, D), LSE (P, B) -> (B, D), (B,)."""
    lse = lses.logsumexp(0)
    return ((lses - lse).exp().unsqueeze(-1) * outputs).sum(0), lse


def sharded_softmax(z: Tensor, index: Tensor, bank: ShardedBank, temperature: float) -> Tensor:
    """common.bank_softmax, exact, over a bank in parts: z (B, D) and index (B,) of this rank; returns (B,).

    Each rank attends to its own rows for the queries of all; the parts merge by their log-sum-exp. The gradient is
    (O - v_i) / tau.
    """
    run, batch = bank.run, len(z)
    queries, slots = run.gather(z.detach().float(), index)
    output, lse = common.bank_attention(queries, bank.features, temperature)
    place = slots - bank.start
    here = (place >= 0) & (place < len(bank.features))  # whether this rank has the query's own row
    positive = bank.features[place.clamp(0, len(bank.features) - 1)] * here[:, None]
    (parts,) = run.gather(torch.cat([output, lse[:, None], positive], 1)[None])  # (ranks, all queries, D + 1 + D)
    parts = parts[:, run.rank * batch : (run.rank + 1) * batch]  # the answers to this rank's queries
    outputs, lses, positives = torch.split(parts, [z.shape[1], 1, z.shape[1]], 2)
    output, lse = merge(outputs, lses[..., 0])
    own = positives.sum(0)  # v_i: the ranks without it sent zeros
    loss = lse - (z.detach() * own).sum(1) / temperature
    value: Tensor = loss + ((z - z.detach()) * (output - own) / temperature).sum(1)  # adds 0, and the gradient
    return value


# ---- training --------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    run = common.Run(args)
    data = common.load(args, "pretrain", run.device)
    test = common.load_monitor(args, data, run.device)
    if args.loss in ("nce", "sampled") and args.num_negatives > len(data):
        if "num_negatives" in args.typed:
            raise common.Fault(f"--m {args.num_negatives} is more than the {len(data)} images")
        if run.rank == 0:
            print(f"--m {len(data)}, from {args.num_negatives}: there are no more images", flush=True)
        args.num_negatives = len(data)
    run.describe(data, test, chance_loss=round(chance_loss(args.loss, args.num_negatives, len(data)), 4))
    steps = run.steps_per_epoch(len(data))

    torch.manual_seed(args.seed)
    num_classes = len(data) if args.loss == "parametric" else 0
    encoder = run.place(Encoder(args.arch, args.width, data.small, args.feature_dim, num_classes))
    model = run.parallel(encoder)
    bank: common.MemoryBank
    if args.shard_bank and run.world > 1:
        bank = ShardedBank(run, len(data), args.feature_dim, run.generator("bank")).to(run.device)
    else:
        bank = common.MemoryBank(len(data), args.feature_dim, run.generator("bank")).to(run.device)
    normalizer = Normalizer().to(run.device)
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    totals = common.Totals(run)
    state = dict(encoder=encoder, optimizer=optimizer, bank=bank, normalizer=normalizer, totals=totals)
    first_epoch, first_step = run.resume(state, steps)

    def embed(images: Tensor) -> Tensor:
        with run.autocast():
            return F.normalize(encoder(images))

    def train_step(
        images: Tensor, index: Tensor, noise: Tensor, draw: common.Draw
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """One step: from crops (B, 3, S, S), their slots (B,) and noise slots (B, m) to new weights and bank.

        Returns the loss and metrics for the log: dicts of each part of the batch (--accumulate), then one of the whole.
        """
        images = data.normalize(augment(images, draw, not data.small, args.flip))
        optimizer.zero_grad()
        z_parts, figures, loss = [], list[dict[str, Tensor]](), torch.zeros((), device=run.device)
        # i: slots of a part's images; j: slots of the noise images drawn for them
        for part, i, j in common.parts([model], *(x.chunk(args.accumulate) for x in (images, index, noise))):
            with run.autocast():
                feature = model(part)
            z = F.normalize(feature)
            if isinstance(bank, ShardedBank):
                losses = sharded_softmax(z, i, bank, args.temperature)
            elif args.loss == "softmax":
                losses = common.bank_softmax(z, i, bank.features, args.temperature, run.amp)
            elif encoder.classes is not None:  # --loss parametric
                losses = parametric_softmax(feature, i, encoder.classes)
            else:
                positive = positive_scores(z, i, bank.features, args.temperature)
                negative = noise_scores(z, j, bank.features, args.temperature)
                if args.loss == "sampled":
                    losses = sampled_softmax(positive, negative)
                elif args.z == "exact":
                    log_z = common.bank_attention(z.detach(), bank.features, args.temperature)[1]
                    losses = nce(positive, negative, log_z, len(data))
                    figures.append(dict(z_over_n=log_z.exp().mean() / len(data)))
                else:
                    (estimates,) = run.gather(estimate_log_z(negative, len(data)).view(1))
                    estimate = estimates.logsumexp(0) - math.log(run.world)  # log of the mean over ranks
                    z_momentum = 1.0 if args.z == "first" else 0.99 ** (1 / args.accumulate)  # 0.99 a step
                    log_z = normalizer.update(estimate, z_momentum)
                    losses = nce(positive, negative, log_z, len(data))
                    figures.append(dict(z_over_n=log_z.exp() / len(data)))
            if args.proximal_weight:
                losses = losses + args.proximal_weight * proximal(z, i, bank.features)
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

    graphed_step = run.graphed(train_step, data.small)  # on a CPU, or on several ranks, train_step itself
    for epoch in range(first_epoch, args.epochs):
        order = run.permutation(epoch, len(data))
        start = first_step if epoch == first_epoch else 0
        began = time.perf_counter()
        encoder.train()
        for step, index, (images,) in data.batches(run, order, common.Crop(data.size, SCALE), epoch, start):
            common.set_rate(optimizer, common.learning_rate(args, epoch + step / steps))
            noise = index[:, None]  # stands in where no noise is drawn, and is not read
            if args.loss in ("nce", "sampled"):
                source = run.generator("noise", epoch, step, device=run.device)
                shape = (args.batch_size, args.num_negatives)
                noise = torch.randint(len(data), shape, generator=source, device=run.device)[run.rows(args.batch_size)]
            loss, figures = graphed_step(images, index, noise, run.draw(epoch, step))
            for part_figures in figures:
                totals.add(**part_figures)
            run.after_step(state, epoch, step, loss)

        row = totals.means()  # waits for the device's last steps
        images_per_second = (steps - start) * args.batch_size / (time.perf_counter() - began)
        if test and (epoch + 1 == args.epochs or (epoch + 1) % args.knn_every == 0):
            encoder.eval()
            run.broadcast(encoder)
            if args.knn_features == "clean":
                features = common.extract(run, data, embed)
            elif isinstance(bank, ShardedBank):
                features = bank.gathered(torch.empty(len(data), args.feature_dim, device=run.device))
            else:
                features = bank.features
            row |= common.knn_monitor(features, data, common.extract(run, test, embed), test, args.temperature)
        run.log(epoch=epoch + 1, step=(epoch + 1) * steps, lr=common.rate(optimizer), **row,
                images_per_second=round(images_per_second), seconds=round(time.perf_counter() - began, 1),
                memory_gb=common.memory_gb(run.device))
        run.save(state, epoch + 1, 0)
    run.finish(encoder.backbone)


if __name__ == "__main__":
    common.launch(main, parse_args)
