"""Semantic segmentation on PASCAL VOC: a pretrained network fine-tuned as a fully convolutional one.

Protocol: the thesis, Table 5.5, VOC2012 train -> val: AlexNet's fc6 and fc7 become convolutions, a linear layer scores
each position, and the scores are interpolated to the image (FCN-32s). The thesis prints no hyper-parameters: rate,
scales and schedule are those usual today. ResNets take torchvision's FCN head on layer4, whose strides become
dilations.

    python eval_segmentation.py runs/npid-shapes-seed0/checkpoint.pth             # a rendered set: no data needed
    python eval_segmentation.py random --arch resnet18 --width 16                 # the untrained network beside it
    python eval_segmentation.py runs/deepcluster-imagenet-seed0/checkpoint.pth --preset voc12     # Table 5.5: 43.2
    torchrun --nproc-per-node 4 eval_segmentation.py resnet50.pth --arch resnet50 --preset voc12
    python eval_segmentation.py runs/npid-shapes-seed0/checkpoint.pth --data my_folder      # any folder in VOC's layout

Data: voc12 and voc07 lie in --data-dir as VOCdevkit/VOC2012 and VOC2007, or are downloaded; any other folder needs
JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/; `shapes` is rendered. A mask is an 8-bit image as large as
its picture: 0 is the background, 1 the first class, 255 void, which is ignored in training and test. A mask of
another kind or size, or with a class that does not exist, is an error that names the file.

The last line of the output is the result as JSON, also appended to eval.jsonl in --output and beside the checkpoint:
miou is the intersection over union of predicted and true pixels, mean over background and classes, counted over all
test images at their own size, in percent; pixel_accuracy the share of pixels that are right. log.jsonl has the loss and
the rate each --log-every iterations. What is drawn in a step follows from (seed, step) and the position in the batch,
dropout also from the number of ranks. Where the names of a folder's classes are not known, they are class 1, class 2,
...
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead
from tqdm import tqdm

import common

# ---- presets ---------------------------------------------------------------------------------------------------------
# "voc12" is the base of all and serves any folder.

PRESETS: dict[str, dict[str, Any]] = {
    "voc12": dict(data="voc12", test_size=520, scales=[0.5, 2.0], crop=480, output_stride=8, batch_size=16, lr=0.01,
                  iterations=30_000, weight_decay=1e-4, freeze=0, bn="tuned"),
    "voc07": dict(data="voc07"),
    "shapes": dict(data="shapes", small=True, test_size=64, scales=[0.8, 1.25], crop=64, output_stride=4, batch_size=8,
                   lr=0.05, iterations=1000, log_every=50),
}


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    model = common.add_network_options(parser)
    model.add_argument("--small", action=argparse.BooleanOptionalAction, default=False, help="3x3 stem of a random "
                       "network; files show what they have")
    model.add_argument("--output-stride", type=int, choices=[1, 2, 4, 8, 16, 32], metavar="PX", help="of the last map "
                       "of a ResNet: dilations in place of the last strides")
    model.add_argument("--freeze", type=int, choices=range(6), default=0, help="how many of the first stages are "
                       "frozen: 1 the stem or conv1, 2 layer1 or conv2 too, ...")
    model.add_argument("--bn", choices=["frozen", "tuned"], default="tuned", help="of the network; frozen: statistics, "
                       "scale and shift stay; tuned: batch statistics")
    model.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=True, help="batch statistics over "
                       "all GPUs")
    model.add_argument("--dropout", type=common.SHARE, default=0.5, help="after fc6 and fc7 (AlexNet, VGG16)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="shapes", metavar="NAME|DIR", help=f"shapes, {', '.join(common.VOC_LISTS)}, or "
                      "any folder in VOC's layout")
    common.add_set_options(data)
    data.add_argument("--train-list", metavar="NAME", help="of ImageSets/Segmentation (voc12: train; else trainval, or "
                      "train where that is not, or where the test is val)")
    data.add_argument("--test-list", metavar="NAME", help="of ImageSets/Segmentation (voc12: val; else test, or val "
                      "where that is not)")
    data.add_argument("--test-size", type=common.SIZE, metavar="PX", help="shorter side that the network sees in the "
                      "test")
    data.add_argument("--scales", type=common.POSITIVE, nargs=2, metavar=("LOW", "HIGH"), help="shorter side in "
                      "training, relative to --test-size, drawn for each image")
    data.add_argument("--crop", type=common.SIZE, metavar="PX", help="side of the square that is trained on")
    optim = parser.add_argument_group("optimization")
    optim.add_argument("--iterations", type=common.COUNT, metavar="N", help="optimisation steps")
    optim.add_argument("--batch-size", type=common.COUNT, metavar="B", help="images in a step, the sum over all ranks")
    optim.add_argument("--accumulate", type=common.COUNT, default=1, metavar="N", help="forward and backward in N "
                       "parts, for small devices; batch statistics are then those of a part")
    optim.add_argument("--lr", type=common.POSITIVE, help="learning rate for just this batch size; falls to 0 as "
                       "(1 - iteration / iterations)^0.9")
    optim.add_argument("--momentum", type=common.SHARE, default=0.9, help="of SGD")
    optim.add_argument("--weight-decay", type=common.NOT_NEGATIVE, help="of SGD")
    optim.add_argument("--seed", type=common.COUNT_OR_ZERO, default=0, help="of new layers, order, draws")
    common.add_device_options(parser)
    run = common.add_run_options(parser, "segmentation-<preset>-seed<seed> beside the checkpoint")
    run.add_argument("--log-every", type=common.COUNT, default=100, metavar="N", help="a line of the log every N "
                     "iterations")
    args = common.parse(parser, PRESETS, argv, base="voc12")
    if "output" not in args.typed:
        place = Path("runs") if args.checkpoint == "random" else Path(args.checkpoint).parent
        args.output = place / f"segmentation-{'random-' * (args.checkpoint == 'random')}{args.preset}-seed{args.seed}"
    common.note_idle(args, dict(small=(args.checkpoint == "random", "a random network")))
    args.epochs, args.schedule, args.compile = 1, "iterations", False  # the whole training is one epoch of the run
    return args


# ---- data ------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What becomes of the image at `row`: scaled to a shorter side of `side` px, perhaps mirrored; with `crop` a square
    of so many px, at the share (x, y) of what is left over."""

    row: int
    side: int
    flip: bool = False
    crop: int = 0
    x: float = 0.0
    y: float = 0.0


def read_mask(image: common.VocImage, num_classes: int) -> Image.Image:
    """The mask of an image, its values the classes; a Fault if it is no mask, or not of this image or these classes."""
    try:
        with Image.open(image.mask) as file:
            mask = file.copy()
    except common.UNREADABLE as error:
        reason = getattr(error, "strerror", None) or "damaged or empty"
        raise common.Fault(f"cannot read the mask {image.mask} ({reason})") from None
    if mask.mode not in ("P", "L"):
        raise common.Fault(f"{image.mask} is no mask as VOC's are: it needs 8 bits a pixel, the number of its class")
    if mask.size != image.size:
        raise common.Fault(f"{image.mask} has {mask.size[0]} x {mask.size[1]} px, its image {image.path.name} "
                           f"{image.size[0]} x {image.size[1]}")
    values = np.unique(np.asarray(mask))
    strange = values[(values > num_classes) & (values != common.VOID)]
    if len(strange):
        raise common.Fault(f"{image.mask} has the value {strange[0]}, but there are {num_classes} classes")
    return mask


class Decoder(torch.utils.data.Dataset[tuple[Tensor, Tensor] | str]):
    """Sample -> pixels (3, h, w) uint8 and classes (h, w) uint8, of a test image (no crop) at the mask's own size; what
    is wrong with the file instead, as a text, where that is so."""

    def __init__(self, data: common.VocSet) -> None:
        self.data, self.mean = data, tuple(round(255 * value) for value in data.mean)

    def __getitem__(self, sample: Any) -> tuple[Tensor, Tensor] | str:
        image = self.data.images[sample.row]
        try:
            mask = read_mask(image, len(self.data.classes))
            with Image.open(image.path) as file:
                pixels = common.rgb(file)
        except common.Fault as fault:
            return str(fault)
        except common.UNREADABLE:
            return f"cannot read the image {image.path}: mend it, or take it off its list"
        factor = sample.side / min(image.size)
        size = (max(1, round(image.size[0] * factor)), max(1, round(image.size[1] * factor)))
        pixels = pixels.resize(size, Image.Resampling.BILINEAR)
        if sample.crop:
            mask = mask.resize(size, Image.Resampling.NEAREST)
            if sample.flip:
                pixels, mask = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (pixels, mask))
            left, top = (round(share * max(0, length - sample.crop))
                         for share, length in zip((sample.x, sample.y), size, strict=True))
            whole = Image.new("RGB", (sample.crop, sample.crop), self.mean)
            void = Image.new("L", (sample.crop, sample.crop), common.VOID)
            whole.paste(pixels, (-left, -top))
            void.paste(Image.fromarray(np.asarray(mask)), (-left, -top))
            pixels, mask = whole, void
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), torch.from_numpy(np.array(mask))


def joined(items: list[tuple[Tensor, Tensor] | str]) -> Any:
    """A batch as two tensors, since each that a worker sends keeps a file open; or the first that is wrong with it."""
    wrong = [item for item in items if isinstance(item, str)]
    return wrong[0] if wrong else torch.utils.data.default_collate(items)


def decoded(data: common.VocSet, args: argparse.Namespace, batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (b, 3, h, w) and masks (b, h, w) of each batch of samples, decoded by workers."""
    loader: Any = torch.utils.data.DataLoader(
        Decoder(data), batch_sampler=batches, num_workers=args.workers, collate_fn=joined,
        worker_init_fn=common.ignore_signals,
    )
    for batch in loader:
        if isinstance(batch, str):
            raise common.Fault(batch)
        yield batch


def training_batches(
    run: common.Run, data: common.VocSet, args: argparse.Namespace, steps: range
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(step, images (b, 3, S, S) in [0, 1], classes (b, S, S)) of this rank: next of an endless row of permutations."""
    rows, count, batch = run.rows(args.batch_size), len(data), args.batch_size

    def samples(step: int) -> list[Sample]:
        places = torch.arange(step * batch, (step + 1) * batch)
        rounds, inner = places // count, places % count
        order = torch.cat([run.permutation(i, count)[inner[rounds == i]] for i in sorted(set(rounds.tolist()))])[rows]
        draw = common.Draw(run.generator("augment", 0, step), batch, rows, common.CPU)(4)
        low, high = args.scales
        return [Sample(row, max(1, round(args.test_size * (low + (high - low) * u))), v < 0.5, args.crop, x, y)
                for row, (u, v, x, y) in zip(order.tolist(), draw.tolist(), strict=True)]

    batches = decoded(data, args, (samples(step) for step in steps))
    for step, (images, masks) in zip(steps, batches, strict=True):
        run.seed_step(0, step)
        yield step, images.to(run.device).float() / 255, masks.to(run.device).long()


# ---- model -----------------------------------------------------------------------------------------------------------


def dilate(layer: nn.Module, before: int, after: int) -> None:
    """Take the stride out of a ResNet's layer: the 3x3 convolution that had it is dilated by `before`, those behind it
    by `after`; the weights then see the same pixels as with the stride, at more places."""
    for module in layer.modules():
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (3, 3):
                holes = after if module.stride == (1, 1) else before
                module.dilation = module.padding = (holes, holes)
            module.stride = (1, 1)


class Segmenter(nn.Module):
    """Image (B, 3, H, W) -> scores (B, 1 + C, h, w) of ground and classes at the stride of the last map."""

    def __init__(self, network: nn.Module, num_classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        stages: list[nn.Module]
        head: nn.Module
        self.copies: list[tuple[nn.Linear, nn.Conv2d]] = []  # a plain list: the linear layers are no part of this
        if isinstance(network, common.ResNet):
            small, holes = isinstance(network.maxpool, nn.Identity), 1
            stride = 1 if small else 4
            for layer in (network.layer2, network.layer3, network.layer4):
                if stride == args.output_stride:
                    dilate(layer, holes, 2 * holes)
                    holes *= 2
                else:
                    stride *= 2
            if stride != args.output_stride:
                raise common.Fault(f"--output-stride {args.output_stride}: this network has {stride} down to "
                                   f"{1 if small else 4}")
            stem = nn.Sequential(network.front, network.conv1, network.bn1, nn.ReLU(inplace=True), network.maxpool)
            stages = [stem, network.layer1, network.layer2, network.layer3, network.layer4]
            head = FCNHead(network.dim, 1 + num_classes)
        else:
            if not isinstance(network, common.PlainNet):
                raise common.Fault(f"segmentation takes ResNets, AlexNet and VGG16, not {type(network).__name__}: tell "
                                   "`Segmenter` its stages")
            layers, start, stages = list(network.features), 0, []
            for end in network.stage_ends:
                stages.append(nn.Sequential(*[network.front] * (not start), *layers[start : end + 1]))
                start = end + 1
            channels = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)][-1]
            linear = [layer for layer in network.classifier if isinstance(layer, nn.Linear)]  # fc6 and, mostly, fc7
            fc = [convolution(layer, inputs) for layer, inputs in zip(linear, (channels, network.dim), strict=False)]
            self.copies = list(zip(linear, fc, strict=True))
            drop, act = nn.Dropout(args.dropout), nn.ReLU(inplace=True)
            hidden = [part for layer in fc for part in (layer, act, drop)]
            score = nn.Conv2d(network.dim, 1 + num_classes, 1)
            nn.init.zeros_(score.weight)  # as in the first FCN
            nn.init.zeros_(score.bias)  # type: ignore[arg-type]
            head = nn.Sequential(*layers[start:], *hidden, score)
        self.trunk, self.head = nn.Sequential(*stages), head
        self.freeze, self.frozen_bn = args.freeze, args.bn == "frozen"
        self.requires_grad_(True)
        self.frozen().requires_grad_(False)

    def frozen(self) -> nn.ModuleList:
        """What stays as it is: the first stages and, if so asked, the network's batch normalisations."""
        norms = [part for part in self.trunk.modules() if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm)]
        return nn.ModuleList([*self.trunk[: self.freeze], *norms * self.frozen_bn])

    def train(self, mode: bool = True) -> "Segmenter":
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        self.frozen().eval()
        return self

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the network's fc6 and fc7 what the convolutions made of them have learnt."""
        for layer, conv in self.copies:
            layer.weight.copy_(conv.weight.reshape_as(layer.weight))  # in the order of dimensions, not of memory
            layer.bias.copy_(conv.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.trunk(images))
        return scores.float()


def convolution(layer: nn.Linear, channels: int) -> nn.Conv2d:
    """A linear layer on a map of so many channels as a convolution that sees as much around each place."""
    side = round((layer.in_features / channels) ** 0.5)
    conv = nn.Conv2d(channels, layer.out_features, side, padding=side // 2)
    conv.load_state_dict(dict(weight=layer.weight.view(-1, channels, side, side), bias=layer.bias))
    return conv


# ---- loss and figures ------------------------------------------------------------------------------------------------


def pixel_loss(scores: Tensor, classes: Tensor, count: Tensor) -> Tensor:
    """Cross-entropy, sum over the pixels that are not void, divided by `count`, (). scores (B, 1 + C, h, w) are
    interpolated to classes (B, H, W)."""
    scores = F.interpolate(scores, classes.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, classes, ignore_index=common.VOID, reduction="sum") / count


def confusion(found: Tensor, classes: Tensor, count: int) -> Tensor:
    """Pixels of each true class (rows) found as each class (columns), (count, count) int64; void ones left out."""
    some = classes != common.VOID
    pairs = classes[some].long() * count + found[some].long()
    return torch.bincount(pairs, minlength=count**2).view(count, count)


def figures(table: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """miou, pixel_accuracy and iou_by_class of a confusion table, in percent; classes in neither mask are left out."""
    hits = table.diag().double()
    iou = 100 * hits / (table.sum(0) + table.sum(1) - table.diag())
    shares = {name: round(share, 2) for name, share in zip(names, iou.tolist(), strict=True) if share == share}
    return dict(miou=round(iou.nanmean().item(), 2), pixel_accuracy=round(100 * (hits.sum() / table.sum()).item(), 2),
                iou_by_class=shares)


@torch.no_grad()
def confusion_table(model: Segmenter, data: common.VocSet, args: argparse.Namespace, run: common.Run) -> Tensor:
    """The confusion table of all test images, one at a time at their own size; shared out over the ranks."""
    model.eval()
    rows = list(range(len(data)))[run.rank :: run.world]
    count = 1 + len(data.classes)
    table = torch.zeros(count, count, dtype=torch.int64, device=run.device)
    batches = tqdm(decoded(data, args, [[Sample(row, args.test_size)] for row in rows]), total=len(rows),
                   desc="test", unit="image", dynamic_ncols=True, leave=False, disable=run.rank > 0 or None)
    for number, (pixels, mask) in enumerate(batches):
        if number % 10 == 0 and number < len(data) // run.world:  # ranks, which all have so many, wait for each other
            run.pause(1, 0)
        height, width = pixels.shape[2:]
        image = common.normalize(pixels.to(run.device).float() / 255, data.mean, data.std)
        # Zeros at the right and below, so that the map has whole cells.
        image = F.pad(image, (0, -width % 32, 0, -height % 32)).contiguous(memory_format=torch.channels_last)
        with run.autocast():
            scores = model(image)
        scores = F.interpolate(scores, image.shape[2:], mode="bilinear", align_corners=False)[..., :height, :width]
        scores = F.interpolate(scores, mask.shape[1:], mode="bilinear", align_corners=False)
        table += confusion(scores.argmax(1), mask.to(run.device), count)
    (tables,) = run.gather(table[None])
    return tables.sum(0)


# ---- training --------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[common.VocSet, common.VocSet]:
    """Training and test images, with the same classes: those of the annotations, else as many as the masks have."""
    data = common.load_voc(args, "train", "Segmentation")
    if not data.classes:
        masks = (np.asarray(read_mask(image, common.VOID)) for image in data.images)
        top = max(int(mask[mask != common.VOID].max(initial=0)) for mask in masks)
        data.classes = [f"class {i}" for i in range(1, top + 1)]
    test = common.load_voc(args, "test", "Segmentation", data.classes)
    for part, split in ((data, "training"), (test, "test")):  # what is wrong with a mask shows before the training
        colours: list[Any] = [read_mask(image, len(data.classes)).getcolors() for image in part.images]
        if {value for mask in colours for _, value in mask} <= {0, common.VOID}:  # ground alone gives a mean of 100
            raise common.Fault(f"no pixel of the {len(part)} {split} masks of {part.name} has a class: 0 is the "
                               f"background, {common.VOID} void, the first class 1")
    common.note_shared([image.path for image in data.images], [image.path for image in test.images])
    data.size = test.size = args.test_size
    return data, test


def main(args: argparse.Namespace) -> None:
    run = common.Run(args)
    torch.manual_seed(args.seed)
    encoder = common.chosen_encoder(args, run.device, "backbone", args.small)
    plain = encoder.arch.partition("_")[0] in common.PLAIN_STAGES
    common.note_idle(args, dict(dropout=(plain, "AlexNet or VGG16"), output_stride=(not plain, "a ResNet")))
    data, test = load(args)
    usual = common.DATASETS["shapes"] if args.data == "shapes" else common.IMAGENET
    data.mean, data.std = test.mean, test.std = common.statistics(args, encoder.data, usual)
    run.describe(data, test, test=test.identity())
    run.header["options"] |= dict(checkpoint_sha256=encoder.sha256)

    model = run.place(Segmenter(encoder.backbone, len(data.classes), args))
    parallel = run.parallel(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    totals = common.Totals(run)
    state = dict(model=model, optimizer=optimizer, totals=totals)
    finished, first = run.resume(state, args.iterations)

    began, since = time.perf_counter(), first
    steps = range(first, 0 if finished else args.iterations)
    for step, images, classes in training_batches(run, data, args, steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.iterations) ** 0.9
        images = common.normalize(images, data.mean, data.std).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        known = run.mean((classes != common.VOID).sum().float()).clamp(min=1)  # so that each pixel weighs the same
        loss = torch.zeros((), device=run.device)
        for part, truth in common.parts([parallel], images.chunk(args.accumulate), classes.chunk(args.accumulate)):
            with run.autocast():
                scores = parallel(part)
            part_loss: Any = pixel_loss(scores, truth, known)
            part_loss.backward()
            loss += part_loss.detach()
        optimizer.step()
        totals.add(loss=loss)
        if (step + 1) % args.log_every == 0 or step + 1 == args.iterations:
            seconds, count = time.perf_counter() - began, step + 1 - since
            run.log(iteration=step + 1, lr=optimizer.param_groups[0]["lr"], loss=round(totals.means()["loss"], 5),
                    seconds=round(seconds, 1), images_per_second=round(count * args.batch_size / seconds, 1),
                    memory_gb=common.memory_gb(run.device))
            began, since = time.perf_counter(), step + 1
        run.after_step(state, 0, step, loss)
    if not finished:
        run.broadcast(model)
        run.save(state, 1, 0)

    table = confusion_table(model, test, args, run)
    result = dict(protocol="segmentation", checkpoint=args.checkpoint, checkpoint_sha256=encoder.sha256,
                  preset=args.preset, data=test.name, arch=encoder.arch, width=encoder.width,
                  train_images=len(data), test_images=len(test),
                  test_list=args.test_list, test_subset=args.test_subset, iterations=args.iterations,
                  batch_size=args.batch_size, seed=args.seed, settings=run.settings(),
                  **figures(table.cpu(), ["ground", *test.classes]))
    model.write_back()
    run.finish(encoder.backbone)
    if run.rank == 0:
        common.publish(args, result)


if __name__ == "__main__":
    common.launch(main, parse_args)
