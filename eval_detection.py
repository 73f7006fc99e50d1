"""Object detection on PASCAL VOC: a pretrained network fine-tuned as Faster R-CNN or Fast R-CNN.

Protocols: NPID, Table 6; Local Aggregation, Table 3 and its appendix B.4; CLD, supplement 2.4, which is MoCo's
(ResNet-50 C4: layer1 to layer3 see the image, layer4 each region); the thesis, Table 5.5. The parts are torchvision's;
there is nothing else to install. The preset is the protocol.

    python eval_detection.py runs/npid-shapes-seed0/checkpoint.pth            # a rendered set: no data needed
    python eval_detection.py random --arch resnet18 --width 16                # the untrained network beside it
    python eval_detection.py resnet50.pth --arch resnet50 --preset voc0712    # CLD, MoCo: trainval07+12, 24k iterations
    python eval_detection.py runs/cld-imagenet-mocov2-cld-seed0/checkpoint.pth --preset voc07    # 9,000 iterations
    torchrun --nproc-per-node 8 eval_detection.py runs/cld-imagenet-mocov2-cld-seed0/checkpoint.pth --preset voc0712
    python eval_detection.py vgg16_bn.pth --arch vgg16_bn --preset voc07-la-vgg16       # LA: Faster R-CNN, VGG16
    python eval_detection.py alexnet.pth --arch alexnet --preset voc07-fast-alexnet --proposals trainval.mat test.mat
    python eval_detection.py runs/npid-shapes-seed0/checkpoint.pth --data my_folder      # any folder in VOC's layout
    python eval_detection.py resnet50.pth --arch resnet50 --preset voc0712 --batch-size 8     # half the rate, twice the
                                                                                              # iterations; says so
Data: voc07, voc12 and voc0712 lie in --data-dir as VOCdevkit/VOC2007 and VOC2012, or are downloaded; any other folder
needs JPEGImages/, Annotations/ and ImageSets/Main/; `shapes` is rendered. Images without boxes are trained on as
background. Boxes are clipped at the border of their image, and dropped if nothing is left; one line says how many. A
class that training does not have, broken XML and an unreadable image are errors that name the file. In the test
objects marked as difficult are ignored.

--proposals takes files of boxes for Fast R-CNN, which together cover all images of both lists. Text: a line an image,
`ID x1 y1 x2 y2 x1 y1 x2 y2 ...`, pixels counted from 1 and the last one included, as in VOC's XML. MATLAB's .mat: the
selective-search files that came with Fast R-CNN, `images` (IDs) and `boxes` (n x 4 each: y1 x1 y2 x2, from 1).

Metrics, in percent: ap50_voc07 is VOC2007's 11-point AP at an IoU of 0.5, the mean over classes (NPID, LA, thesis);
ap50_voc10 the same as area under the curve, as in VOC2010 and later; ap_voc07 and ap75_voc07 are the 11-point AP
averaged over IoU 0.5 to 0.95, and at 0.75 (AP and AP75 of MoCo's tables on VOC2007, which CLD compares with); ap, ap50,
ap75 are COCO's by its own library, difficult objects ignored. The last line of the output is the result as JSON; it is
appended to eval.jsonl in --output and beside the checkpoint. detections.pth has the boxes, for figures.py; backbone.pth
the network as fine-tuned.

Differences: the box loss is smooth L1 with beta 1/9 (torchvision's), where MoCo's code has plain L1 and the older
protocols have beta 1 for regions; RoIAlign everywhere, where the older protocols had RoI pooling; of the proposals in
files the first 2,000 of an image, where Fast R-CNN took all; regions with an IoU under 0.1 are background too; biases
have the learning rate and weight decay of weights; images of a batch are not grouped by shape. AlexNet and VGG16 are
those of these scripts. What is drawn in a step follows from (seed, step) and the position in the batch; only dropout,
and which anchors and regions are trained on, depend on the number of ranks, too.

log.jsonl has, each --log-every iterations: the losses of anchors (objectness, rpn_box_reg) and regions (classifier,
box_reg), their sum, the rate, time and memory.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_convert, box_iou, clip_boxes_to_image, roi_align
from tqdm import tqdm

import common

# ---- presets ---------------------------------------------------------------------------------------------------------
# "voc07" is the base of all and serves any folder: CLD's and MoCo's protocol. A preset lists what differs.

OLD = dict(train_sizes=[600], test_size=600, max_size=1000, batch_size=1, lr=0.001, warmup=0, iterations=70_000,
           lr_drops=[50_000], bn="frozen", sync_bn=False, extra_bn=False, precise_bn=0, rois=128,
           anchor_sizes=[128, 256, 512], boundary_anchors="drop", test_candidates=6000, test_proposals=300, nms=0.3,
           min_score=0.0, train_difficult=False)
# NPID prints rate and drop; the decay is the pipelines' own, the number of iterations Faster R-CNN's, for Fast R-CNN
# too, whose own 40,000 would end before the first drop. Of the drops "after every 50K iterations" 70,000 have one.
NPID = dict(OLD, weight_decay=5e-4)
FAST = dict(NPID, batch_size=2, rois=64, freeze=1, test_proposals=2000)
PRESETS: dict[str, dict[str, Any]] = {
    "voc07": dict(data="voc07", train_sizes=list(range(480, 801, 32)), test_size=800, max_size=1333, batch_size=16,
                  lr=0.02, warmup=100, iterations=9000, lr_drops=[6750, 8250], weight_decay=1e-4, freeze=0, bn="tuned",
                  sync_bn=True, extra_bn=True, precise_bn=200, rois=512, roi_size=14,
                  anchor_sizes=[32, 64, 128, 256, 512], boundary_anchors="keep", train_proposals=2000,
                  test_proposals=1000, nms=0.5, min_score=0.05, train_difficult=True),
    "voc0712": dict(data="voc0712", iterations=24_000, lr_drops=[18_000, 22_000]),
    "voc12": dict(data="voc12"),  # train -> val
    "voc07-la-resnet50": dict(OLD, arch="resnet50", freeze=4),  # LA, Table 3: 69.1
    "voc07-la-vgg16": dict(OLD, freeze=2),  # 68.4
    "voc07-la-alexnet": dict(OLD),  # 53.5
    "voc07-npid-resnet50": dict(NPID, arch="resnet50", freeze=3),  # NPID, Table 6: 65.4
    "voc07-fast-vgg16": dict(FAST),  # 60.5; DeepCluster 65.9
    "voc07-fast-alexnet": dict(FAST),  # 48.1; with --freeze 0, since it trains all layers, thesis, Table 5.5: 53.9
    "shapes": dict(data="shapes", small=True, train_sizes=[56, 64, 72], test_size=64, max_size=128, batch_size=8,
                   lr=0.02, iterations=1000, lr_drops=[800, 950], precise_bn=50, rois=32, roi_size=8,
                   anchor_sizes=[12, 18, 24], train_proposals=200, test_proposals=50, log_every=50),
}


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    model = common.add_network_options(parser)
    model.add_argument("--small", action=argparse.BooleanOptionalAction, default=False, help="3x3 stem of a random "
                       "network; files show what they have")
    model.add_argument("--freeze", type=int, choices=range(6), default=0, help="how many of the first stages are "
                       "frozen: 1 the stem or conv1, 2 layer1 or conv2 too, ...; never layer4 of a ResNet")
    model.add_argument("--bn", choices=["frozen", "tuned"], default="tuned", help="frozen: statistics, scale and shift "
                       "stay, and --extra-bn has no effect; tuned: batch statistics")
    model.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=True, help="batch statistics over "
                       "all GPUs")
    model.add_argument("--extra-bn", action=argparse.BooleanOptionalAction, default=True, help="a batch normalisation "
                       "after layer4 (ResNets)")
    model.add_argument("--precise-bn", type=common.COUNT_OR_ZERO, metavar="N", help="after training, recompute the "
                       "batch statistics for the test: the mean of N batches (0: keep the running ones)")
    model.add_argument("--dropout", type=common.SHARE, default=0.5, help="after fc6 and fc7 (AlexNet, VGG16)")
    regions = parser.add_argument_group("regions")
    regions.add_argument("--proposals", nargs="+", metavar="FILE", help="Fast R-CNN: regions from files, "
                         "see above; default: Faster R-CNN, which proposes its own")
    regions.add_argument("--anchor-sizes", type=common.SIZE, nargs="+", metavar="PX", help="each in the aspect "
                         "ratios 1:2, 1:1, 2:1")
    regions.add_argument("--boundary-anchors", choices=["keep", "drop"], default="keep", help="whether anchors that "
                         "cross the border of the image are trained on")
    regions.add_argument("--train-proposals", type=common.COUNT, metavar="N", help="best regions of an image, training")
    regions.add_argument("--test-proposals", type=common.COUNT, metavar="N", help="best regions of an image, test")
    regions.add_argument("--test-candidates", type=common.COUNT, metavar="N", help="best anchors of an image, test, of "
                         "which those regions are chosen (default: 6 x --test-proposals)")
    regions.add_argument("--rois", type=common.number(int, 4, 2**53), metavar="N", help="regions of an image that "
                         "are trained on, at most a quarter of them on objects")
    regions.add_argument("--roi-size", type=common.SIZE, metavar="CELLS", help="side of RoIAlign (ResNets; AlexNet and "
                         "VGG16 take what fc6 was trained on)")
    regions.add_argument("--nms", type=common.SHARE, help="IoU threshold of non-maximum suppression in a class")
    regions.add_argument("--min-score", type=common.SHARE, help="least score of a detection")
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="shapes", metavar="NAME|DIR", help=f"shapes, {', '.join(common.VOC_LISTS)}, or "
                      "any folder in VOC's layout")
    common.add_set_options(data)
    data.add_argument("--train-list", metavar="NAME", help="of ImageSets/Main (trainval, or train where that is not, "
                      "or where the test is val)")
    data.add_argument("--test-list", metavar="NAME", help="of ImageSets/Main (test, or val where that is not)")
    data.add_argument("--train-difficult", action=argparse.BooleanOptionalAction, default=True, help="train on objects "
                      "marked as difficult, too")
    data.add_argument("--train-sizes", type=common.SIZE, nargs="+", metavar="PX", help="shorter sides, one is drawn "
                      "for each image")
    data.add_argument("--test-size", type=common.SIZE, metavar="PX", help="shorter side in the test")
    data.add_argument("--max-size", type=common.SIZE, metavar="PX", help="longer side at most")
    optim = parser.add_argument_group("optimization")
    optim.add_argument("--iterations", type=common.COUNT, metavar="N", help="optimisation steps; typed, they leave "
                       "--lr-drops as they are")
    optim.add_argument("--batch-size", type=common.COUNT, metavar="B", help="images in a step, the sum over all ranks; "
                       "if not the preset's, the rate scales with it and iterations inversely, unless given")
    optim.add_argument("--accumulate", type=common.COUNT, default=1, metavar="N", help="forward and backward in N "
                       "parts, for small devices; batch statistics are then those of a part")
    optim.add_argument("--lr", type=common.POSITIVE, help="learning rate")
    optim.add_argument("--lr-drops", type=common.COUNT, nargs="*", metavar="N", help="iterations at which the "
                       "rate is divided by 10")
    optim.add_argument("--warmup", type=common.COUNT_OR_ZERO, metavar="N", help="iterations in which the rate rises "
                       "from a thousandth")
    optim.add_argument("--momentum", type=common.SHARE, default=0.9, help="of SGD")
    optim.add_argument("--weight-decay", type=common.NOT_NEGATIVE, help="of SGD; not of batch normalisation")
    optim.add_argument("--seed", type=common.COUNT_OR_ZERO, default=0, help="of new layers, order, draws")
    common.add_device_options(parser)
    run = common.add_run_options(parser, "detection-<preset>-seed<seed> beside the checkpoint")
    run.add_argument("--log-every", type=common.COUNT, default=100, metavar="N", help="a log line every N iterations")
    args = common.parse(parser, PRESETS, argv, base="voc07")
    if "output" not in args.typed:
        place = Path("runs") if args.checkpoint == "random" else Path(args.checkpoint).parent
        args.output = place / f"detection-{'random-' * (args.checkpoint == 'random')}{args.preset}-seed{args.seed}"
    if args.preset.startswith("voc07-fast") and not args.proposals:
        parser.error(f"--preset {args.preset} is Fast R-CNN: name files of regions with --proposals")
    preset = PRESETS["voc07"] | PRESETS[args.preset]
    scale_to_batch(args, preset["batch_size"])
    common.note_drops(args, args.iterations, preset["iterations"])
    own = dict.fromkeys(("anchor_sizes", "boundary_anchors", "test_candidates"), (not args.proposals, "Faster R-CNN"))
    common.note_idle(args, own | dict(small=(args.checkpoint == "random", "a random network")))
    args.epochs, args.schedule, args.compile = 1, "iterations", False  # the whole training is one epoch of the run
    return args


def scale_to_batch(args: argparse.Namespace, usual: int) -> None:
    """Another batch size than the preset's: the rate in proportion, the iterations inversely, unless they are typed."""
    if args.batch_size == usual:
        return
    ratio = args.batch_size / usual
    if "lr" not in args.typed:
        args.lr *= ratio
    if "iterations" not in args.typed:
        args.iterations = max(1, round(args.iterations / ratio))
        if "lr_drops" not in args.typed:
            args.lr_drops = [max(1, round(drop / ratio)) for drop in args.lr_drops]
        if "warmup" not in args.typed:
            args.warmup = round(args.warmup / ratio)


# ---- data ------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """What becomes of the image at `row`: scaled to a shorter side of `side` px, perhaps mirrored."""

    row: int
    side: int
    flip: bool


def scaled(size: tuple[int, int], side: int, longest: int) -> tuple[int, int]:
    """Width and height of an image of `size` whose shorter side becomes `side`, or whose longer one `longest`."""
    factor = min(side / min(size), longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class Decoder(torch.utils.data.Dataset[tuple[Sample, Tensor]]):
    """Sample -> itself and its pixels (h, w, 3) uint8, none of them for a file that cannot be read."""

    def __init__(self, data: common.VocSet, longest: int) -> None:
        self.data, self.longest = data, longest

    def __getitem__(self, sample: Any) -> tuple[Sample, Tensor]:
        image = self.data.images[sample.row]
        try:
            with Image.open(image.path) as file:
                pixels = common.rgb(file).resize(scaled(image.size, sample.side, self.longest),
                                                 Image.Resampling.BILINEAR)
        except common.UNREADABLE:
            return sample, torch.empty(0, 0, 3, dtype=torch.uint8)
        if sample.flip:
            pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return sample, torch.from_numpy(np.array(pixels))


def joined(items: list[tuple[Sample, Tensor]]) -> tuple[list[Sample], list[torch.Size], Tensor]:
    """Samples, shapes and pixels of a batch: one tensor, since each that a worker sends keeps a file open."""
    pixels = [part for _, part in items]
    return [sample for sample, _ in items], [part.shape for part in pixels], torch.cat([p.flatten() for p in pixels])


def decoded(data: common.VocSet, args: argparse.Namespace, batches: Any) -> Iterator[list[tuple[Sample, Tensor]]]:
    """The images of each batch of samples, decoded by workers."""
    loader: Any = torch.utils.data.DataLoader(
        Decoder(data, args.max_size), batch_sampler=batches, num_workers=args.workers, collate_fn=joined,
        worker_init_fn=common.ignore_signals,
    )
    for samples, shapes, pixels in loader:
        for sample, shape in zip(samples, shapes, strict=True):
            if not shape.numel():
                raise common.Fault(f"cannot read the image {data.images[sample.row].path}: mend it, or take it off "
                                   "its list")
        parts = pixels.split([shape.numel() for shape in shapes])
        yield [(sample, part.view(shape).permute(2, 0, 1))
               for sample, shape, part in zip(samples, shapes, parts, strict=True)]


def training_batches(
    run: common.Run, data: common.VocSet, args: argparse.Namespace, steps: range
) -> Iterator[tuple[int, list[tuple[Sample, Tensor]]]]:
    """This rank's images of each step: the next of an endless row of permutations of all images."""
    rows, count, batch, sizes = run.rows(args.batch_size), len(data), args.batch_size, args.train_sizes

    def samples(step: int) -> list[Sample]:
        places = torch.arange(step * batch, (step + 1) * batch)
        rounds, inner = places // count, places % count
        order = torch.cat([run.permutation(i, count)[inner[rounds == i]] for i in sorted(set(rounds.tolist()))])[rows]
        draw = common.Draw(run.generator("augment", 0, step), batch, rows, common.CPU)(2)
        return [Sample(row, sizes[int(len(sizes) * u)], v < 0.5)
                for row, (u, v) in zip(order.tolist(), draw.tolist(), strict=True)]

    batches = decoded(data, args, (samples(step) for step in steps))
    for step, images in zip(steps, batches, strict=True):
        run.seed_step(0, step)
        yield step, images


def move_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int], flip: bool = False) -> Tensor:
    """Boxes (K, 4) of an image of size `old` in the same of size `new`, mirrored if `flip`."""
    boxes = boxes * torch.tensor([new[0] / old[0], new[1] / old[1]] * 2)
    if flip:
        boxes = torch.stack([new[0] - boxes[:, 2], boxes[:, 1], new[0] - boxes[:, 0], boxes[:, 3]], 1)
    return boxes


def in_parts(images: list[tuple[Sample, Tensor]], count: int) -> list[list[tuple[Sample, Tensor]]]:
    """The images in `count` equal parts."""
    length = len(images) // count
    return [images[start : start + length] for start in range(0, len(images), length)]


class Batch(NamedTuple):
    """Images (B, 3, H, W) padded with zeros at the right and below, their own (height, width), and what is in them."""

    images: Tensor
    sizes: list[tuple[int, int]]
    targets: list[dict[str, Tensor]]  # boxes (K, 4), labels (K,) from 1: 0 is background
    proposals: list[Tensor] | None  # (P, 4)


def collate(
    part: list[tuple[Sample, Tensor]], data: common.VocSet, proposals: list[Tensor] | None, args: argparse.Namespace,
    device: torch.device,
) -> Batch:
    """Decoded images with their boxes on the device, normalised."""
    sizes = [(pixels.shape[1], pixels.shape[2]) for _, pixels in part]
    sides = [-(-max(lengths) // 32) * 32 for lengths in zip(*sizes, strict=True)]
    images = torch.zeros(len(part), 3, *sides, device=device)
    targets, regions = list[dict[str, Tensor]](), list[Tensor]()
    for canvas, (height, width), (sample, pixels) in zip(images, sizes, part, strict=True):
        canvas[:, :height, :width] = common.normalize(pixels[None].to(device).float() / 255, data.mean, data.std)[0]
        image = data.images[sample.row]
        kept = ~image.difficult | args.train_difficult
        boxes = move_boxes(image.boxes[kept], image.size, (width, height), sample.flip)
        targets.append(dict(boxes=boxes.to(device), labels=(image.labels[kept] + 1).to(device)))
        if proposals:
            regions.append(move_boxes(proposals[sample.row], image.size, (width, height), sample.flip).to(device))
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images, sizes, targets, regions if proposals else None)


def read_proposals(names: Sequence[str], data: common.VocSet, limit: int) -> list[Tensor]:
    """The first `limit` regions (P, 4) of each image, half-open from 0, from text or .mat files (see the docstring)."""
    found = dict[str, Any]()
    for path in map(Path, names):
        try:
            if path.suffix == ".mat":
                from scipy.io import loadmat

                content = loadmat(path)
                for name, boxes in zip(content["images"].flat, content["boxes"].flat, strict=True):
                    found[str(np.asarray(name).item())] = np.asarray(boxes, np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
            else:
                for line in path.read_text().splitlines():
                    if line.strip():
                        name, *numbers = line.split()
                        found[name] = np.array(numbers, np.float32).reshape(-1, 4)
        except Exception as error:  # a damaged .mat raises almost anything
            reason = getattr(error, "strerror", None) or error
            raise common.Fault(f"{path} is no file of proposals ({reason}): see the top of --help") from None
    regions = []
    for image in data.images:
        if image.path.stem not in found:
            raise common.Fault(f"no proposals for {image.path.stem} in {', '.join(names)}")
        boxes = torch.from_numpy(found[image.path.stem][:limit] - np.array([1, 1, 0, 0], np.float32))
        boxes = clip_boxes_to_image(boxes, image.size[::-1])
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
        if not len(boxes):
            raise common.Fault(f"{image.path.stem} has no proposal with a pixel of the image in it")
        regions.append(boxes)
    return regions


# ---- model -----------------------------------------------------------------------------------------------------------


def split(network: nn.Module, args: argparse.Namespace) -> tuple[list[nn.Module], nn.Module, int, int, int, float]:
    """Stages that see the image, head that sees a region, stride of the map, side of RoIAlign, size of the feature, and
    by how many px the cells of the map lie beyond the middle of their stride, where RoIAlign takes them.

    ResNets: stem, layer1, layer2, layer3, and layer4 as the head; cells are taken as they are, as in Detectron2.
    AlexNet and VGG16: the convolutions of each stage without the last max-pooling, and fc6 and fc7 as the head;
    AlexNet's cells lie 7.5 px beyond, since its max-pooling has no padding.
    """
    stages: list[nn.Module]
    if isinstance(network, common.ResNet):
        stem = nn.Sequential(network.front, network.conv1, network.bn1, nn.ReLU(inplace=True), network.maxpool)
        norm = [nn.BatchNorm2d(network.dim)] if args.extra_bn else []
        head = nn.Sequential(network.layer4, *norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        small = isinstance(network.maxpool, nn.Identity)
        stages = [stem, network.layer1, network.layer2, network.layer3]
        return stages, head, 4 if small else 16, args.roi_size, network.dim, 0.0
    if not isinstance(network, common.PlainNet):
        raise common.Fault(f"detection takes ResNets, AlexNet and VGG16, not {type(network).__name__}: tell `split` "
                           "its stages")
    layers, stages, start = list(network.features), [], 0
    for end in network.stage_ends:  # a max-pooling opens the stage after it
        stages.append(nn.Sequential(*[network.front] * (not start), *layers[start : end + 1]))
        start = end + 1
    middle, stride = 0.5, 1  # of the first cell, and from cell to cell, in px
    for layer in layers[:start]:
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            kernel, step, padding = (size if isinstance(size, int) else int(size[0])
                                     for size in (layer.kernel_size, layer.stride, layer.padding))
            middle += ((kernel - 1) / 2 - padding) * stride
            stride *= step
    linear = [layer for layer in network.classifier if isinstance(layer, nn.Linear)]  # fc6 and, mostly, fc7
    drop = nn.Dropout(args.dropout)
    hidden = [part for layer in linear for part in (layer, nn.ReLU(inplace=True), drop)]
    head = nn.Sequential(nn.Flatten(), *hidden)
    channels = [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)][-1]
    side = round((linear[0].in_features / channels) ** 0.5)
    return stages, head, stride, side, network.dim, middle - stride / 2


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors in float32 whatever the map's type, one stride apart whatever the padding of the convolutions."""

    def __init__(self, sizes: Sequence[int], stride: int) -> None:
        super().__init__((tuple(sizes),), ((0.5, 1.0, 2.0),))
        self.stride = stride

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        (features,) = feature_maps
        self.set_cell_anchors(torch.float32, features.device)
        stride = torch.tensor(self.stride, device=features.device)
        (anchors,) = self.grid_anchors([list(features.shape[-2:])], [[stride, stride]])
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):  # type: ignore[misc]
    """Torchvision's, its last layers in float32: 8 bits are too few for boxes and for the order of scores."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        hidden = [self.conv(part) for part in x]
        with torch.autocast(x[0].device.type, enabled=False):
            return [self.cls_logits(h.float()) for h in hidden], [self.bbox_pred(h.float()) for h in hidden]


class Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """Torchvision's; with `drop` anchors that cross the border of the image are not trained on, as in the first
    Faster R-CNN: an object's best anchor is then the best of those inside."""

    drop = False
    image_sizes: list[tuple[int, int]]

    def forward(self, images: ImageList, features: Any, targets: Any = None) -> tuple[list[Tensor], dict[str, Tensor]]:
        self.image_sizes = images.image_sizes
        found: tuple[list[Tensor], dict[str, Tensor]] = super().forward(images, features, targets)
        return found

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: Any) -> tuple[list[Tensor], list[Tensor]]:
        labels, matched = list[Tensor](), list[Tensor]()
        for boxes, target, (height, width) in zip(anchors, targets, self.image_sizes, strict=True):
            inside = ((boxes[:, :2] >= 0) & (boxes[:, 2:] <= boxes.new_tensor([width, height]))).all(1)
            if not (self.drop and inside.any()):
                inside = torch.ones_like(inside)
            (own_labels,), (own_matched,) = super().assign_targets_to_anchors([boxes[inside]], [target])
            labels.append(own_labels.new_full((len(boxes),), -1).masked_scatter(inside, own_labels))
            matched.append(boxes.masked_scatter(inside[:, None], own_matched))
        return labels, matched


class Predictor(nn.Module):
    """Feature (R, dim) -> scores (R, 1 + C) and offsets (R, 4 (1 + C)) of the classes, class 0 the background."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.scores, self.offsets = nn.Linear(dim, 1 + num_classes), nn.Linear(dim, 4 * (1 + num_classes))
        for layer, std in ((self.scores, 0.01), (self.offsets, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(features.device.type, enabled=False):
            return self.scores(features.float()), self.offsets(features.float())


class Detector(nn.Module):
    """Faster R-CNN, or Fast R-CNN where the proposals are given."""

    def __init__(self, network: nn.Module, num_classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        stages, head, stride, side, dim, beyond = split(network, args)
        if args.freeze > len(stages):
            raise common.Fault(f"--freeze {args.freeze}: this network has {len(stages)} stages that see the image")
        self.trunk, self.freeze, self.frozen_bn = nn.Sequential(*stages), args.freeze, args.bn == "frozen"
        channels = [layer.out_channels for layer in self.trunk.modules() if isinstance(layer, nn.Conv2d)][-1]
        self.proposals: Proposals | None = None
        if not args.proposals:
            anchors = Anchors(args.anchor_sizes, stride)
            best = dict(training=args.train_proposals, testing=args.test_proposals)
            candidates = dict(training=6 * args.train_proposals,
                              testing=args.test_candidates or 6 * args.test_proposals)
            self.proposals = Proposals(
                anchors, ProposalHead(channels, anchors.num_anchors_per_location()[0]), fg_iou_thresh=0.7,
                bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=candidates,
                post_nms_top_n=best, nms_thresh=0.7,
            )
            self.proposals.drop = args.boundary_anchors == "drop"

        def align(features: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Any:
            """Maps {"0": (B, C, h, w)}, boxes B x (P, 4) px -> (sum of P, C, side, side); pixel centres at halves."""
            boxes = [part - beyond for part in boxes]
            return roi_align(features["0"].float().contiguous(), boxes, side, 1 / stride, aligned=True)

        self.regions = RoIHeads(
            align, head, Predictor(dim, num_classes), fg_iou_thresh=0.5, bg_iou_thresh=0.5,
            batch_size_per_image=args.rois, positive_fraction=0.25, bbox_reg_weights=None, score_thresh=args.min_score,
            nms_thresh=args.nms, detections_per_img=100,
        )
        self.requires_grad_(True)
        self.frozen().requires_grad_(False)

    def frozen(self) -> nn.ModuleList:
        """What stays as it is: the first stages and, if so asked, every batch normalisation."""
        norms = [part for part in self.modules() if isinstance(part, nn.BatchNorm2d | nn.SyncBatchNorm)]
        return nn.ModuleList([*self.trunk[: self.freeze], *norms * self.frozen_bn])

    def train(self, mode: bool = True) -> "Detector":
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        self.frozen().eval()
        return self

    def forward(self, batch: Batch) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image in its own px (boxes, labels from 1, scores), and losses; either is empty."""
        features = {"0": self.trunk(batch.images)}
        targets = batch.targets if self.training else None
        regions, losses = batch.proposals, dict[str, Tensor]()
        if self.proposals is not None:
            regions, losses = self.proposals(ImageList(batch.images, batch.sizes), features, targets)
        detections, more = self.regions(features, regions, batch.sizes, targets)
        return detections, losses | more


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters; those of batch normalisation do not decay."""
    norms = {id(parameter) for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
             for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [dict(params=[p for p in trained if id(p) not in norms], weight_decay=weight_decay),
            dict(params=[p for p in trained if id(p) in norms], weight_decay=0.0)]


@torch.no_grad()
def precise_statistics(model: nn.Module, batches: Iterator[Batch], run: common.Run) -> None:
    """Batch statistics as the mean of those of `batches` and of the ranks, in place of the running ones."""
    norms = [module for module in model.modules()
             if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.training]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the plain mean
    for batch in batches if norms else ():
        run.pause(0, run.steps)
        with run.autocast():
            model(batch)
    for module in norms:
        module.momentum = 0.1
        for statistic in (module.running_mean, module.running_var):
            if statistic is not None:
                statistic.copy_(run.mean(statistic))


# ---- detections and their figures ------------------------------------------------------------------------------------


class Detections(NamedTuple):
    """M boxes found in all images, image after image."""

    image: Tensor  # (M,) int64: position in the set
    boxes: Tensor  # (M, 4) px, half-open
    labels: Tensor  # (M,) int64 from 0
    scores: Tensor  # (M,)


def match(found: Detections, data: common.VocSet) -> tuple[Tensor, Tensor]:
    """For each box the object of its class that it overlaps most: its overlap and its number in the set, -1: none."""
    overlap, partner = torch.zeros(len(found.scores)), torch.full((len(found.scores),), -1)
    parts = torch.split(torch.arange(len(found.image)), torch.bincount(found.image, minlength=len(data)).tolist())
    first = 0
    for image, rows in zip(data.images, parts, strict=True):
        if len(rows) and len(image.boxes):
            table = box_iou(found.boxes[rows].double(), image.boxes.double()).float()
            table[found.labels[rows][:, None] != image.labels] = -1
            best, column = table.max(1)
            overlap[rows] = best.clamp(min=0)
            partner[rows] = torch.where(best > 0, column + first, -1)
        first += len(image.boxes)
    return overlap, partner


def judge(scores: Tensor, overlap: Tensor, partner: Tensor, difficult: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """VOC's rules: (right (M,), counted (M,)). difficult: (objects,) bool; least: the overlap that makes a hit.

    The box of highest score that hits an object is right, others that hit it are wrong; a box that hits a difficult
    object does not count.
    """
    hit = (overlap >= least) & (partner >= 0)
    ignored = hit & difficult[partner]
    order = scores.argsort(descending=True, stable=True)
    claims = order[(hit & ~ignored)[order]]
    turn = torch.arange(len(claims))
    first = torch.full((len(difficult),), len(claims)).scatter_reduce(0, partner[claims], turn, "amin")
    right = torch.zeros_like(hit)
    right[claims] = first[partner[claims]] == turn
    return right, ~ignored


def voc_precision(found: Detections, data: common.VocSet, overlaps: Sequence[float], eleven_points: bool) -> Tensor:
    """Average precision in percent (len(overlaps), C); nan for a class without objects that count."""
    overlap, partner = match(found, data)
    labels = torch.cat([image.labels for image in data.images])
    difficult = torch.cat([image.difficult for image in data.images])
    totals = torch.bincount(labels[~difficult], minlength=len(data.classes)).tolist()
    rows = []
    for least in overlaps:
        right, counted = judge(found.scores, overlap, partner, difficult, least)
        some = [counted & (found.labels == label) for label in range(len(data.classes))]
        rows.append([common.average_precision(found.scores[one], right[one], total, eleven_points)
                     for one, total in zip(some, totals, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def coco_precision(found: Detections, data: common.VocSet) -> dict[str, float]:
    """COCO's AP over overlaps 0.5 to 0.95, AP50 and AP75 by pycocotools, in percent; difficult objects are ignored."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:  # no reason to lose VOC's, which a whole training was for
        common.note("note: no COCO figures without pycocotools")
        return {}

    class Evaluation(COCOeval):  # type: ignore[misc]
        def _prepare(self) -> None:  # the library itself ignores only crowds
            super()._prepare()
            for objects in self._gts.values():
                for item in objects:
                    item["ignore"] = item["difficult"]

    objects = list[dict[str, Any]]()
    for number, image in enumerate(data.images):
        boxes = box_convert(image.boxes, "xyxy", "xywh").tolist()
        columns = boxes, image.labels.tolist(), image.difficult.tolist()
        for box, label, difficult in zip(*columns, strict=True):
            objects.append(dict(id=len(objects) + 1, image_id=number, category_id=label, bbox=box, iscrowd=0,
                                area=box[2] * box[3], difficult=int(difficult)))
    boxes = box_convert(found.boxes, "xyxy", "xywh").tolist()
    answers = [dict(image_id=image, category_id=label, bbox=box, score=score) for image, label, box, score in
               zip(found.image.tolist(), found.labels.tolist(), boxes, found.scores.tolist(), strict=True)]
    if not answers:
        return dict(ap=0.0, ap50=0.0, ap75=0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dict(images=[dict(id=i) for i in range(len(data))], annotations=objects, info={},
                             categories=[dict(id=i, name=name) for i, name in enumerate(data.classes)])
        truth.createIndex()
        evaluation = Evaluation(truth, truth.loadRes(answers), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # overlap, recall, class, area

    def mean(part: Any) -> float:
        return round(100 * float(part[part > -1].mean()), 2) if (part > -1).any() else 0.0

    return dict(ap=mean(precision), ap50=mean(precision[0]), ap75=mean(precision[5]))


def figures(found: Detections, data: common.VocSet) -> dict[str, Any]:
    """All figures of the docstring, in percent, and ap50_voc07 of each class that has objects."""
    overlaps = [0.5 + 0.05 * i for i in range(10)]
    eleven, area = voc_precision(found, data, overlaps, True), voc_precision(found, data, [0.5], False)
    means = dict(ap50_voc07=eleven[0], ap50_voc10=area[0], ap_voc07=eleven, ap75_voc07=eleven[5])
    classes = {name: round(value, 2) for name, value in zip(data.classes, eleven[0].tolist(), strict=True)
               if value == value}
    return ({name: round(value.nanmean().item(), 2) for name, value in means.items()} | coco_precision(found, data)
            | dict(ap50_voc07_by_class=classes))


@torch.no_grad()
def detect(
    model: Detector, data: common.VocSet, proposals: list[Tensor] | None, args: argparse.Namespace, run: common.Run
) -> Detections:
    """At most 100 boxes in each image, one image at a time; shared out over the ranks, the same on all."""
    model.eval()
    rows = run.share(len(data)).tolist()
    packed = torch.full((len(rows), 100, 6), -1.0)
    batches = tqdm(decoded(data, args, [[Sample(row, args.test_size, False)] for row in rows]), total=len(rows),
                   desc="test", unit="image", dynamic_ncols=True, leave=False, disable=run.rank > 0 or None)
    for number, (place, part) in enumerate(zip(packed, batches, strict=True)):
        if number % 10 == 0:  # ranks wait here for each other
            run.pause(1, 0)
        batch = collate(part, data, proposals, args, run.device)
        with run.autocast():
            ((answer,), _) = model(batch)
        sample, (height, width) = part[0][0], batch.sizes[0]
        boxes = move_boxes(answer["boxes"].cpu(), (width, height), data.images[sample.row].size)
        labels, scores = answer["labels"].cpu()[:, None] - 1, answer["scores"].cpu()[:, None]
        place[: len(boxes)] = torch.cat([boxes, labels, scores], 1)
    packed = run.gather(packed.to(run.device))[0][: len(data)].cpu()
    image, slot = (packed[..., 5] >= 0).nonzero(as_tuple=True)
    values = packed[image, slot]
    return Detections(image, values[:, :4], values[:, 4].long(), values[:, 5])


# ---- training --------------------------------------------------------------------------------------------------------


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Up from a thousandth in --warmup steps, a tenth after each of --lr-drops."""
    factor = 0.1 ** sum(step >= drop for drop in args.lr_drops)
    if step < args.warmup:
        factor *= 0.001 + 0.999 * step / args.warmup
    return float(args.lr * factor)


def load(args: argparse.Namespace) -> tuple[common.VocSet, common.VocSet]:
    """Training and test images, with the same classes."""
    data = common.load_voc(args, "train")
    test = common.load_voc(args, "test", classes=data.classes)
    common.note_shared([image.path for image in data.images], [image.path for image in test.images])
    data.size = test.size = args.test_size
    if not any((args.train_difficult | ~image.difficult).any() for image in data.images):
        raise common.Fault(f"the {len(data)} training images of {data.name} have no boxes")
    if not any((~image.difficult).any() for image in test.images):
        raise common.Fault(f"the {len(test)} test images of {test.name} have no boxes that count")
    return data, test


def main(args: argparse.Namespace) -> None:
    run = common.Run(args)
    usual = (PRESETS["voc07"] | PRESETS[args.preset])["batch_size"]
    if run.rank == 0 and args.batch_size != usual:
        print(f"--batch-size {args.batch_size}, from {usual}: lr {args.lr:g}, {args.iterations:,} iterations, drops at "
              f"{args.lr_drops}", flush=True)
    torch.manual_seed(args.seed)
    encoder = common.chosen_encoder(args, run.device, "backbone", args.small)
    wanted, plain = args.preset.rpartition("-")[2], encoder.arch.partition("_")[0] in common.PLAIN_STAGES
    if wanted in common.PLAIN_STAGES and not encoder.arch.startswith(wanted):
        raise common.Fault(f"--preset {args.preset} is for {wanted}, not {encoder.arch}: name --arch, or take another "
                           "preset")
    common.note_idle(args, dict(dropout=(plain, "AlexNet or VGG16"), roi_size=(not plain, "a ResNet"),
                                precise_bn=(args.bn == "tuned", "--bn tuned"),
                                extra_bn=(not plain and args.bn == "tuned", "a ResNet and --bn tuned")))
    data, test = load(args)
    usual_data = common.DATASETS["shapes"] if args.data == "shapes" else common.IMAGENET
    data.mean, data.std = test.mean, test.std = common.statistics(args, encoder.data, usual_data)
    train_regions = read_proposals(args.proposals, data, args.train_proposals) if args.proposals else None
    test_regions = read_proposals(args.proposals, test, args.test_proposals) if args.proposals else None
    run.describe(data, test, test=test.identity())
    run.header["options"] |= dict(checkpoint_sha256=encoder.sha256)

    model = run.place(Detector(encoder.backbone, len(data.classes), args))
    parallel = run.parallel(model)
    optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), args.lr, momentum=args.momentum)
    totals = common.Totals(run)
    state = dict(model=model, optimizer=optimizer, totals=totals)
    finished, first = run.resume(state, args.iterations)

    def batch_of(part: list[tuple[Sample, Tensor]]) -> Batch:
        return collate(part, data, train_regions, args, run.device)

    began, since = time.perf_counter(), first
    for step, images in training_batches(run, data, args, range(first, 0 if finished else args.iterations)):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        optimizer.zero_grad()
        loss = torch.zeros((), device=run.device)
        for (part,) in common.parts([parallel], in_parts(images, args.accumulate)):
            with run.autocast():
                _, losses = parallel(batch_of(part))
            part_loss = torch.stack(list(losses.values())).sum() / args.accumulate
            part_loss.backward()
            loss += part_loss.detach()
            totals.add(**losses)
        optimizer.step()
        totals.add(loss=loss)
        if (step + 1) % args.log_every == 0 or step + 1 == args.iterations:
            row = {name: round(value, 5) for name, value in totals.means().items()}
            seconds, count = time.perf_counter() - began, step + 1 - since
            run.log(iteration=step + 1, lr=optimizer.param_groups[0]["lr"], **row, seconds=round(seconds, 1),
                    seconds_per_iteration=round(seconds / count, 4), memory_gb=common.memory_gb(run.device))
            began, since = time.perf_counter(), step + 1
        run.after_step(state, 0, step, loss)
    if not finished:
        run.save(state, 0, args.iterations)
        if args.precise_bn:
            more = training_batches(run, data, args, range(args.iterations, args.iterations + args.precise_bn))
            model.train()
            parts = (part for _, images in more for part in in_parts(images, args.accumulate))
            precise_statistics(model, map(batch_of, parts), run)
        run.broadcast(model)
        run.save(state, 1, 0)

    found = detect(model, test, test_regions, args, run)
    result = dict(protocol="detection", checkpoint=args.checkpoint, checkpoint_sha256=encoder.sha256,
                  preset=args.preset, data=test.name, arch=encoder.arch, width=encoder.width,
                  train_images=len(data), test_images=len(test),
                  test_list=args.test_list, test_subset=args.test_subset, iterations=args.iterations,
                  batch_size=args.batch_size, seed=args.seed, settings=run.settings(), **figures(found, test))
    if run.rank == 0:
        keys, counts = ("boxes", "labels", "difficult"), torch.tensor([len(image.boxes) for image in test.images])
        truth = {key: torch.cat([getattr(image, key) for image in test.images]) for key in keys}
        right, counted = judge(found.scores, *match(found, test), truth["difficult"], 0.5)
        common.write_checkpoint(args.output / "detections.pth", dict(
            found=found._asdict() | dict(right=right, counted=counted), truth=truth | dict(counts=counts),
            classes=test.classes, images=[str(image.path) for image in test.images], result=result,
            git=run.header["git"],
        ))
    run.finish(encoder.backbone)
    if run.rank == 0:
        common.publish(args, result)


if __name__ == "__main__":
    common.launch(main, parse_args)
