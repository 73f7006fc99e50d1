"""Classification with frozen or fine-tuned features: the protocols of the four papers, from one pass over the images.

    python eval_linear.py runs/npid-cifar10-seed0/checkpoint.pth                      # linear probes, conv1 to conv5
    python eval_linear.py runs/npid-cifar10-seed0/checkpoint.pth --preset svm-head    # NPID, Table 1: linear SVM
    python eval_linear.py runs/npid-imagenet-seed0/checkpoint.pth --preset svm        # NPID, Table 2: SVM on each layer
    python eval_linear.py runs/deepcluster-imagenet-seed0/checkpoint.pth --data places205       # thesis, Table 5.4
    python eval_linear.py runs/deepcluster-imagenet-seed0/checkpoint.pth --preset mlp # thesis, Table 5.2: new FC layers
    python eval_linear.py runs/npid-imagenet-seed0/checkpoint.pth --preset finetune   # NPID, Fig. 6: 1 to 20 %
    python eval_linear.py runs/cld-imagenet-seed0/checkpoint.pth --preset finetune-cld   # class-balanced 1 % and 10 %
    python eval_linear.py runs/deepcluster-imagenet-seed0/checkpoint.pth --preset lowshot  # thesis, Fig. 5.1: n a class
    python eval_linear.py runs/deepcluster-imagenet-seed0/checkpoint.pth --preset voc07     # VOC07, fc6-8
    python eval_linear.py runs/deepcluster-imagenet-seed0/checkpoint.pth --preset voc07-svm # VOC07, SVM on each layer
    python eval_linear.py resnet50.pth --arch resnet50 --data imagenet --preset linear-moco # torchvision's names
    python eval_linear.py --weights random --arch alexnet_bn --data imagenet           # a baseline
    python eval_linear.py runs/npid-cifar10-seed0/checkpoint.pth --preset mlp --help   # every value of that preset

Features. Stages conv1 to conv5 are AlexNet's convolutions, the last of each of VGG16's blocks, the stem and the four
groups of a ResNet, after batch normalisation and ReLU and before max-pooling, average-pooled to at most --layer-size
dimensions (AlexNet at 224 px: the thesis's kernels, 9,600 or 9,216; else the largest square that fits). The network
runs once over --train-crops and --test-crops of each image; its features are kept below OUTPUT/features, named by
weights, data, crops and layer, and used again by every other protocol. A layer that takes more than --memory stays on
the disk, except for SVMs, which hold it in memory as float32.

Model selection. Learning rates, weight decays and the best epoch are chosen on a held-out share of the training images
(--holdout), then the chosen setting is trained again on all of them; C of an SVM by cross-validation (--folds). "top1"
is the accuracy at the chosen epoch, "last_top1" that at the last epoch, with the setting that is best there. Test
images are never used to choose.

Differences from the papers' code: probes see fixed crops (the centre, with its mirror image, or ten) where the papers
draw a new crop each time, so that one pass is enough; probes start at zero; the authors choose the best epoch on the
validation images, the thesis its settings by k-fold cross-validation. Local Aggregation's code pools layers above
200,000 numbers only: ResNets as `--layer-size 50176` does conv1, conv2 and conv4, 100352 conv3 and conv5, at six to
eight times the disk. VOC07 is tested on ten fixed crops, in the thesis's code on ten random ones like those of training
unless told otherwise. SVMs have the squared hinge loss, LIBLINEAR's default, with a penalised intercept.

The last line of the output is the result as JSON, also appended to eval.jsonl beside the checkpoint; accuracies and
average precisions in percent. A killed run started again goes on.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

# ---- presets ---------------------------------------------------------------------------------------------------------
# "linear" is the base of all; a preset lists what differs. Grids are lists: what is best on held-out images is taken.

CONV = [f"conv{i}" for i in range(1, 6)]
LAYERS = [*CONV, "pool5", "backbone", "head"]
VOC_TUNED = dict(data="voc07", protocol="voc07", train_crops=1, batch_size=16, weight_decay=[1e-6], schedule="step",
                 lr_drop_factor=0.5, crop_scale=[0.1, 0.5])
VOC_SVM = dict(data="voc07", protocol="voc07-svm", train_crops=1, test_crops=1, normalize="l2", positive_weight=2.0)
LINEAR_LA = dict(lr=[0.01], weight_decay=[1e-4], batch_size=128, schedule="step")
FINETUNE = dict(protocol="finetune", lr=[0.01], weight_decay=[1e-4], schedule="step", train_crops=1)
PRESETS: dict[str, dict[str, Any]] = {
    # Thesis, Tables 5.3 and 5.4. Its grid is in its code alone: one rate, decays from 1e-7 to 1e-4.
    "linear": dict(protocol="linear", layers=CONV, train_crops=2, epochs=90, batch_size=256,
                   lr=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3], weight_decay=[1e-6, 1e-4, 1e-2],
                   schedule="inverse-sqrt", lr_drops=[], lr_drop_factor=0.1),
    # Local Aggregation. Epochs and drops are its configurations' for each network, and so is AlexNet's lack of weight
    # decay; the paper has "typically" 90 epochs, and 1e-4 for all.
    "linear-la": dict(LINEAR_LA, epochs=70, lr_drops=[30, 60]),
    "linear-la-alexnet": dict(LINEAR_LA, weight_decay=[0.0], epochs=65, lr_drops=[45, 55]),
    "linear-la-vgg16": dict(LINEAR_LA, epochs=51, lr_drops=[11, 41]),
    "linear-moco": dict(layers=["backbone"], test_crops=1, lr=[30.0], weight_decay=[0.0], epochs=100, schedule="step",
                        lr_drops=[60, 80]),  # CLD on ImageNet
    "svm": dict(protocol="svm", train_crops=1, cost=[0.01, 0.1, 1.0, 10.0]),  # NPID, Tables 2 and 3
    "svm-head": dict(protocol="svm", layers=["head"], train_crops=1, test_crops=1, cost=[0.01, 0.1, 1.0, 10.0]),
    "mlp": dict(protocol="mlp", layers=["pool5"], train_crops=10, lr=[0.01], weight_decay=[1e-4]),  # thesis, Table 5.2
    "finetune": dict(FINETUNE, labels=[0.01, 0.02, 0.04, 0.1, 0.2], balanced=False, epochs=70, lr_drops=[30, 60],
                     test_crops=1),
    "finetune-cld": dict(FINETUNE, labels=[0.01, 0.1], epochs=20, head_factor=[100.0], lr_drops=[12, 16],
                         lr_drop_factor=0.2, test_crops=1),
    "lowshot": dict(FINETUNE, per_class=[4, 16, 64], draws=10, lr=[0.001, 0.01], epochs=70, lr_drops=[30, 60],
                    holdout=0.25),
    # fc6-8: 80,000 steps of 16 images, the rate halved every 5,000. All: 150,000, halved every 20,000, as in the
    # published solver. Batch statistics of the convolutions are fixed.
    "voc07": dict(VOC_TUNED, trainable="fc", epochs=256, lr=[0.003], lr_drops=list(range(16, 256, 16))),
    "voc07-all": dict(VOC_TUNED, epochs=479, lr=[0.001], lr_drops=list(range(64, 479, 64))),
    "voc07-svm": dict(VOC_SVM, layers=[*CONV, "backbone"],
                      cost=[0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0]),
    "voc07-lowshot": dict(VOC_SVM, layers=["conv5", "backbone"], cost=[0.1, 1.0, 10.0],
                          per_class=[1, 2, 4, 8, 16, 32, 64, 96], draws=5),
    "smoke": dict(layers=["conv1", "conv5"], layer_size=64, train_crops=1, test_crops=1, epochs=2, batch_size=16,
                  subset=60, test_subset=40),
}


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)  # options without a default here have one in the preset "linear"
    common.add_network_options(parser, nargs="?")
    what = parser.add_argument_group("protocol")
    what.add_argument("--weights", metavar="FILE|random", help="the same as the first argument")
    what.add_argument("--protocol", choices=list(PROTOCOLS), help="linear probes; linear svm; mlp on "
                      "frozen convolutions; finetune; voc07: multi-label fine-tuning; voc07-svm: multi-label SVMs")
    what.add_argument("--layers", choices=LAYERS, nargs="+", help="features to classify; pool5: what "
                      "fc6 of AlexNet and VGG16 sees, else conv5; backbone: its output, of ResNets the mean of the "
                      "last map; head: the unit embedding")
    what.add_argument("--layer-size", type=common.COUNT, default=10_000, metavar="N", help="average a stage's map "
                      "until it has at most N numbers, or one for each channel")
    what.add_argument("--train-crops", type=int, choices=[1, 2, 10], help="the centre, with its mirror "
                      "image, or ten crops; each epoch draws one of them for each image, SVMs take all")
    what.add_argument("--test-crops", type=int, choices=[1, 10], help="10: mean prediction over ten; default: 10, "
                      "but 1 for small images")
    what.add_argument("--normalize", choices=["none", "l2", "standard"], default="none", help="of features: unit rows, "
                      "or zero mean and unit variance of each dimension over the training images")
    what.add_argument("--holdout", type=common.number(float, 0, 0.5, open_low=True), default=0.1, metavar="SHARE",
                      help="share of the labelled images of each class held out to choose rates, decays, epochs")
    what.add_argument("--labels", type=common.count_or_share, nargs="+", metavar="N", help="finetune, voc07, "
                      "SVMs: numbers or shares of labelled training images, all by default")
    what.add_argument("--per-class", type=common.COUNT, nargs="+", metavar="N", help="finetune, svm: N labelled images "
                      "of each class; voc07-svm: N with the class and up to 19 N without")
    what.add_argument("--label-list", type=Path, metavar="FILE", help="finetune, voc07, SVMs: the labelled images by "
                      "file name, one a line, as in the lists of 1 %% and 10 %% of ImageNet that others use")
    what.add_argument("--draws", type=common.COUNT, default=1, metavar="N", help="of labelled images: mean "
                      "and std; the headline is the mean for the last of --labels or --per-class")
    what.add_argument("--balanced", action=argparse.BooleanOptionalAction, default=True, help="--labels: the same "
                      "number of each class, plus or minus one")
    what.add_argument("--trainable", choices=["fc", "all"], default="all", help="voc07: the fully connected layers, "
                      "which start anew, or everything")
    what.add_argument("--train-batchnorm", action="store_true", help="voc07 fc: also scale and shift of the batch "
                      "normalisation below, as in the ECCV paper's first figure")
    optim = parser.add_argument_group("optimization")
    optim.add_argument("--epochs", type=common.COUNT, help="passes over the training images")
    optim.add_argument("--batch-size", type=common.COUNT, metavar="B", help="lowered to the number of labelled images "
                       "if that is less")
    optim.add_argument("--accumulate", type=common.COUNT, default=1, metavar="N", help="fine-tuning: forward and "
                       "backward in N parts")
    optim.add_argument("--lr", type=common.POSITIVE, nargs="+", help="learning rates to choose from; a fine-tuning "
                       "whose loss is not finite ends the run")
    optim.add_argument("--weight-decay", type=common.NOT_NEGATIVE, nargs="+", help="to choose from")
    optim.add_argument("--head-factor", type=common.POSITIVE, nargs="+", default=[1.0], metavar="X", help="mlp, "
                       "finetune, voc07: the new last layer learns X times faster; to choose from")
    optim.add_argument("--momentum", type=common.SHARE, default=0.9, help="of SGD")
    optim.add_argument("--schedule", choices=["inverse-sqrt", "step", "cosine", "constant"], help="inverse-sqrt: lr / "
                       "sqrt(1 + lr wd t) after t steps; step: at each of --lr-drops")
    optim.add_argument("--lr-drops", type=common.COUNT, nargs="*", metavar="EPOCH", help="for step")
    optim.add_argument("--lr-drop-factor", type=common.number(float, 0, 1, open_low=True), metavar="X",
                       help="lr <- X lr at a drop")
    optim.add_argument("--hidden", type=common.SIZE, metavar="N", help="mlp: units of its two hidden layers; default: "
                       "4096 at width 64")
    optim.add_argument("--dropout", type=common.number(float, 0, 0.99), default=0.5, help="before hidden layers")
    optim.add_argument("--crop-scale", type=common.SHARE, nargs=2, default=[0.2, 1.0], metavar=("LOW", "HIGH"),
                       help="fine-tuning: share of the image's area that a training crop has")
    optim.add_argument("--cost", "--C", dest="cost", type=common.POSITIVE, nargs="+", default=[1.0], metavar="C",
                       help="C of the SVM, to choose from; the middle one where a class has too few images to choose")
    optim.add_argument("--folds", type=common.number(int, 2, 100), default=3, help="of C's cross-validation")
    optim.add_argument("--positive-weight", type=common.POSITIVE, default=1.0, metavar="X", help="weight of images "
                       "with the class in its SVM")
    optim.add_argument("--seed", type=common.COUNT_OR_ZERO, default=0, help="of subset, held-out part, draws, order")
    common.add_data_options(parser)
    machine = parser.add_argument_group("features")
    machine.add_argument("--features", type=Path, metavar="DIR", help="where features are kept; default: "
                         "OUTPUT/features")
    machine.add_argument("--feature-type", choices=["bfloat16", "float32"], help="default: bfloat16 where the network "
                         "runs in it")
    machine.add_argument("--memory", type=common.POSITIVE, metavar="GB", help="features of a layer that take more stay "
                         "on the disk, but not for SVMs, which hold a layer in float32; default: a quarter of what the "
                         "device has free")
    machine.add_argument("--image-batch", type=common.COUNT, default=128, metavar="N",
                         help="images in one forward pass")
    common.add_device_options(parser)
    run = common.add_run_options(parser, "a folder for each setting in eval_linear/ beside the checkpoint")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the "
                     "network that is fine-tuned")
    run.add_argument("--sync-bn", action="store_true", help="batch statistics over all GPUs")
    words = list(sys.argv[1:] if argv is None else argv)  # of these --protocol X alone takes the preset X
    flat = [part for word in words for part in word.split("=", 1)]
    if "--preset" not in flat and "--protocol" in flat[:-1] and flat[flat.index("--protocol") + 1] in PRESETS:
        words += ["--preset", flat[flat.index("--protocol") + 1]]
    args = common.parse(parser, PRESETS, words, base="linear")
    args.typed = common.typed(parser, argv)
    ways = {"labels", "per_class", "label_list"}
    if len(ways & set(args.typed)) > 1:
        parser.error("--labels, --per-class and --label-list each say which images are labelled: give one of them")
    if ways & set(args.typed):  # instead of the preset's
        vars(args).update(dict.fromkeys(ways - set(args.typed)))
    if (args.checkpoint is None) == (args.weights is None):
        parser.error("name one checkpoint: a file, or random")
    args.checkpoint = args.checkpoint or args.weights
    del args.weights
    svms, tuned = "svm" in args.protocol, args.protocol in ("finetune", "voc07")
    if not (svms or tuned) and any(getattr(args, way) for way in ways):
        parser.error(f"--labels, --per-class and --label-list are for fine-tuning and SVMs, not for {args.protocol}: "
                     "use --subset")
    if args.protocol == "voc07" and args.per_class:
        parser.error("--per-class is for one class an image, and for voc07-svm: use --labels")
    if not tuned and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error(f"--protocol {args.protocol} takes one process: start it without a launcher, or with one GPU")
    for name in ("layers", "labels", "per_class"):  # each once
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or ())) or None)
    if args.protocol == "mlp" and len(args.layers) > 1:
        parser.error("--protocol mlp takes one of --layers")
    grid = len(args.lr) * len(args.weight_decay) * len(args.head_factor)
    needs = {  # options: whether they are used, and what they need for that
        "layers layer_size train_crops normalize features feature_type memory": (not tuned, "a frozen network"),
        "epochs batch_size lr weight_decay momentum schedule": (not svms, "--protocol linear, mlp, finetune or voc07"),
        "holdout": (not svms and (not tuned or grid > 1), "rates, decays or epochs to choose from"),
        "lr_drop_factor": (args.schedule == "step" and not svms, "--schedule step"),
        "head_factor accumulate dropout": (tuned or args.protocol == "mlp", "--protocol mlp, finetune or voc07"),
        "hidden": (args.protocol == "mlp", "--protocol mlp"), "crop_scale": (tuned, "--protocol finetune or voc07"),
        "trainable": (args.protocol == "voc07", "--protocol voc07"),
        "train_batchnorm": (args.protocol == "voc07" and args.trainable == "fc", "--protocol voc07 --trainable fc"),
        "cost positive_weight": (svms, "--protocol svm or voc07-svm"),
        "folds": (svms and len(args.cost) > 1, "SVMs and several of --cost"),
        "balanced": (bool(args.labels) and "voc07" not in args.protocol, "--labels, one class an image"),
        "draws": (bool(args.labels or args.per_class), "--labels or --per-class"),
        "file_list val_list imbalance": ("voc07" not in args.protocol, "one class an image"),
    }
    common.note_idle(args, {name: need for names, need in needs.items() for name in names.split()})
    if "output" not in args.typed:
        untrained = Path("runs") / f"eval_linear-random-{args.arch or 'resnet18'}-seed{args.seed}"
        args.output = untrained if args.checkpoint == "random" else Path(args.checkpoint).parent / "eval_linear"
    args.features = args.features or args.output / "features"
    return args


# ---- data and labels -------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Images and their targets: (N,) class numbers, or (N, C) with 1 present, -1 absent, 0 left out."""

    train: common.ImageSet
    test: common.ImageSet
    train_targets: Tensor
    test_targets: Tensor


def presence(data: common.VocSet) -> Tensor:
    """(N, C) int64: 1 the class is there, 0 only as difficult objects (left out by VOC), -1 it is not."""
    found = torch.full((len(data), len(data.classes)), -1)
    for row, image in zip(found, data.images, strict=True):
        row[image.labels[image.difficult]] = 0
        row[image.labels[~image.difficult]] = 1
    return found


def voc_images(
    args: argparse.Namespace, split: str, classes: list[str] | None, spec: common.DataSet
) -> tuple[common.ImageSet, Tensor]:
    """A set in VOC's layout as images without a class each, and its targets (N, C)."""
    found = common.load_voc(args, split, classes=classes)
    paths = [image.path for image in found.images]
    root = Path(os.path.commonpath([path.parent for path in paths]))
    files = np.array([os.fsencode(path.relative_to(root)) for path in paths])
    data = common.ImageSet(found.name, *spec, torch.full((len(paths),), -1), found.classes, torch.arange(len(paths)),
                           root=root, files=files, workers=args.workers, bad=common.BadImages(args.max_bad_images))
    return data, presence(found)


def open_task(args: argparse.Namespace, encoder: common.Encoder | None, device: torch.device) -> Task:
    """Labelled training and test images at the encoder's size and channel statistics."""
    if args.protocol.startswith("voc07"):
        known = encoder.data if encoder else {}
        size = args.image_size or known.get("size", common.IMAGENET.size)
        spec = common.DataSet(size, *common.statistics(args, known, common.IMAGENET))
        train, targets = voc_images(args, "train", None, spec)
        test, test_targets = voc_images(args, "test", train.classes, spec)
        common.note_shared(*([part.path(row) for row in range(len(part))] for part in (train, test)))
        for part, found, split in ((train, targets, "training"), (test, test_targets, "test")):
            if not (found > 0).any():
                raise common.Fault(f"the {len(part)} {split} images of {part.name} have no objects that count")
        return Task(train, test, targets, test_targets)
    train = common.load_train(args, encoder, "train", device)
    test = common.load_test(args, train, device)
    labelled = (train.labels >= 0).nonzero()[:, 0]
    if not len(labelled):
        raise common.Fault(f"{train.name} has no classes: name images that have a folder for each by --data")
    if stray := int((test.labels < 0).sum()):
        raise common.Fault(f"{stray:,} of the {len(test):,} test images of {test.name} are in no class folder")
    train = train if len(labelled) == len(train) else train.select(labelled)
    return Task(train, test, train.labels, test.labels)


def hold_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Positions to hold out: a share, 0.5 at most, of labels (N,) or targets (N, C), but at least one. Of labels each
    class gives that share, give or take half an image, and keeps one of two or more."""
    classes = labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.long)
    return common.balanced(classes, max(1, round(share * len(labels))), seed, "holdout", share=True)


def say_draw(name: str, targets: Tensor, rows: Tensor, seed: int, draw: int) -> dict[str, Any]:
    """Print which labels are used: how many, the fewest and the most of a class, a checksum of positions and labels."""
    facts: dict[str, Any] = dict(labels=len(rows), draw=draw)
    if targets.ndim == 1:
        counts = torch.bincount(targets[rows], minlength=int(targets.max()) + 1)
        facts |= dict(least_of_a_class=int(counts.min()), most_of_a_class=int(counts.max()))
    content = rows.numpy().tobytes() + targets[rows].numpy().tobytes()
    facts["checksum"] = hashlib.blake2b(content, digest_size=8).hexdigest()
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items())
    if common.first_rank():
        print(f"{name}: of {len(targets):,} images {text}, seed {seed}", flush=True)
    return facts


def draws(args: argparse.Namespace, task: Task) -> list[tuple[dict[str, Any], Tensor]]:
    """(facts, rows) of each set of labelled images that --labels, --per-class or --label-list ask for; else all."""
    targets, classes, wanted = task.train_targets, len(task.train.classes), list[tuple[str, int, bool]]()
    if args.label_list:
        rows = listed(args.label_list, task.train)
        return [(say_draw(args.label_list.name, targets, rows, args.seed, 0), rows)]
    for count in args.per_class or ():
        fewest = int(torch.bincount(targets, minlength=classes).min())
        if count > fewest:
            raise common.Fault(f"--per-class: a class of {task.train.name} has {fewest} images")
        wanted.append((f"{count} a class", count * classes, True))
    for part in args.labels or ():
        wanted.append((f"{part:g}", round(part * len(targets)) if part < 1 else int(part), args.balanced))
    if not wanted:
        return [(dict(labels=len(targets), draw=0), torch.arange(len(targets)))]
    found = []
    for name, count, balanced in wanted:
        if not 1 <= count <= len(targets):
            raise common.Fault(f"--labels {name}: {task.train.name} has {len(targets)} labelled images here")
        labels = targets if balanced and targets.ndim == 1 else torch.zeros(len(targets), dtype=torch.long)
        for draw in range(args.draws):
            rows = common.balanced(labels, count, args.seed, "labels", name, draw)
            found.append((say_draw(f"labels, {name}", targets, rows, args.seed, draw), rows))
    return found


def listed(path: Path, data: common.ImageSet) -> Tensor:
    """Positions of the images that a text file names; images of one name are told apart by the folder before it."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin it with a mark
    except UnicodeDecodeError:
        raise common.Fault(f"cannot read {path} (not text)") from None
    if data.files is None:
        raise common.Fault(f"--label-list is for directories of large images, and {data.name} is held decoded")
    files = [Path(os.fsdecode(file)).parts[-2:] for file in data.files]
    depth = 1 if len({file[-1] for file in files}) == len(files) else 2
    names = {"/".join(Path(line.strip()).parts[-depth:]) for line in text.splitlines() if line.strip()}
    if not names:
        raise common.Fault(f"{path} names no image: one file name a line is needed")
    rows = [row for row, file in enumerate(files) if names & {file[-1], "/".join(file)}]
    if len(rows) != len(names):
        raise common.Fault(f"{path} names {len(names)} images, of which {data.name} has {len(rows)}" +
                           "; some share a name: put the folder before it, as in a/1.jpg" * (depth > 1))
    return torch.tensor(rows)


# ---- features --------------------------------------------------------------------------------------------------------

ALEXNET_SIDES = [55, 27, 13, 13, 13]  # of its maps at 224 px
ALEXNET_POOLS = [(6, 3), (4, 0), (3, 1), (3, 1), (2, 0)]  # kernel = stride, padding (the mean counts it): thesis's code


def pool(maps: Sequence[Tensor], stage: int, layer_size: int) -> Tensor:
    """Average of a stage's map (B, C, H, W) to at most layer_size numbers: (B, d)."""
    channels, height, width = maps[stage].shape[1:]
    if layer_size == 10_000 and [m.shape[-1] for m in maps] == ALEXNET_SIDES:
        kernel, padding = ALEXNET_POOLS[stage]
        return F.avg_pool2d(maps[stage].float(), kernel, kernel, padding).flatten(1)
    side = max(1, math.isqrt(layer_size // channels))
    return F.adaptive_avg_pool2d(maps[stage].float(), (min(side, height), min(side, width))).flatten(1)


def layer_features(encoder: common.Encoder, images: Tensor, layers: Sequence[str], layer_size: int) -> list[Tensor]:
    """The features of each layer, (B, d) float32, of normalised images (B, 3, S, S)."""
    found = dict[str, Tensor]()
    if {*CONV, "pool5"} & set(layers):
        network = encoder.staged()
        maps = network.stages(images)
        found |= {name: pool(maps, stage, layer_size) for stage, name in enumerate(CONV) if name in layers}
        if "pool5" in layers and isinstance(network, common.PlainNet):
            above = network.features[network.stage_ends[-1] + 1 :]
            found["pool5"] = network.avgpool(above(maps[4])).flatten(1).float()
        elif "pool5" in layers:
            found["pool5"] = pool(maps, 4, layer_size)
    if "backbone" in layers:
        found["backbone"] = encoder.backbone(images).float()
    if "head" in layers:
        found["head"] = encoder.embed(images)
    return [found[name] for name in layers]


def crops_of(data: common.ImageSet, rows: Tensor, crops: int, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Normalised crops (b, V, 3, S, S) of the images at `rows`; the central one is the first or, of ten, the fifth."""
    for images in data.centers(rows, max(1, batch // crops), device, ten=crops == 10):
        images = data.normalize(images)
        yield images if crops == 10 else torch.stack([images, images.flip(-1)][:crops], 1)


def weights_checksum(encoder: common.Encoder) -> str:
    """Of the file, or of an untrained network's weights."""
    if encoder.sha256:
        return encoder.sha256
    content = hashlib.sha256()
    for part in (encoder.backbone, encoder.head):
        for weight in part.state_dict().values() if part is not None else ():
            content.update(weight.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def images_checksum(data: common.ImageSet) -> str:
    """Of the images' positions, and of all pixels that are held, or of the sizes of up to 20,000 files and the content
    of some uncompressed ones, whose sizes tell nothing; `identity` has the names of all files, but few sizes."""
    content = hashlib.blake2b(data.ids.numpy().tobytes(), digest_size=16)
    if data.pixels is not None:
        for part in torch.split(data.pixels, 8192):
            content.update(part.cpu().contiguous().numpy().data)
    elif len(data) <= 20_000:  # where a look at each is quick
        content.update(repr([common.file_size(data.path(row)) for row in range(len(data))]).encode())
    for row in range(0, len(data), max(1, len(data) // 64)) if data.pixels is None else ():
        path = data.path(row)
        if path.suffix.lower() in (".bmp", ".ppm", ".pgm", ".tif", ".tiff"):
            with contextlib.suppress(OSError):  # counts as an unreadable image
                content.update(path.read_bytes())
    return content.hexdigest()


class FeatureFile(NamedTuple):
    """Where the features of one layer lie, what they are of, their shape (N, V, d) and type."""

    path: Path
    key: dict[str, Any]
    shape: tuple[int, int, int]
    kind: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.kind.itemsize

    def rows_done(self) -> int:
        """How many rows are there; none if they are not of this key."""
        try:
            found = json.loads(self.path.with_suffix(".json").read_text())
            return int(found["rows"]) if found["key"] == self.key else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def mark(self, rows: int) -> None:
        """Note that so many rows are done, once the disk has them."""
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        common.write_whole(self.path.with_suffix(".json"), json.dumps(dict(rows=rows, key=self.key)).encode())


@torch.no_grad()
def cached_features(
    args: argparse.Namespace, encoder: common.Encoder, sets: Sequence[tuple[common.ImageSet, str, int]],
    device: torch.device,
) -> list[dict[str, Tensor]]:
    """The features (N, V, d) of each of --layers for each of the `sets` (images, split, V), mapped from files that are
    made if they are not there.

    A file belongs to one set of weights, images, crops and one layer: its name is a checksum of these, the .json beside
    it spells them out and says how many rows are done: a killed pass goes on behind them.
    """
    amp = common.amp_default(device) if args.amp is None else args.amp
    kind = args.feature_type or ("bfloat16" if amp else "float32")

    def encode(images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            return layer_features(encoder, images.to(memory_format=torch.channels_last), layers, args.layer_size)

    wanted, weights = list[list[FeatureFile]](), weights_checksum(encoder)
    for data, split, crops in sets:
        # An image of zeros tells the size of each layer.
        probe = encode(torch.zeros(1, 3, data.size, data.size, device=device), args.layers)
        checksums, files = dict(weights=weights, images=images_checksum(data)), list[FeatureFile]()
        for layer, sample in zip(args.layers, probe, strict=True):
            key = dict(checksums, data=data.identity(), crops=crops, layer=layer, layer_size=args.layer_size,
                       size=sample.shape[1], type=kind, amp=amp, format=1)
            digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
            files.append(FeatureFile(args.features / f"{split}-{layer}-{digest}.bin", key,
                                     (len(data), crops, sample.shape[1]), getattr(torch, kind)))
        wanted.append(files)
    args.features.mkdir(parents=True, exist_ok=True)
    with (args.features / "lock").open("w") as lock:  # of two runs at once the second finds what the first has made
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print(f"waiting for another run that writes features to {args.features}", flush=True)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        except OSError as error:
            common.note(f"note: {args.features} cannot be locked ({error.strerror}): start nothing else there")
        make_room([file for files in wanted for file in files], args.features)
        found = list[dict[str, Tensor]]()
        for (data, split, crops), files in zip(sets, wanted, strict=True):
            # torch.from_file takes no names of other bytes than UTF-8
            mapped = [torch.from_numpy(np.memmap(file.path, np.uint8, "r+")).view(file.kind).view(file.shape)
                      for file in files]
            todo = [(file, values) for file, values in zip(files, mapped, strict=True) if file.rows_done() < len(data)]
            if todo:
                layers, first = [file.key["layer"] for file, _ in todo], min(file.rows_done() for file, _ in todo)
                gigabytes = sum(file.bytes for file, _ in todo) / 1e9
                print(f"features of {len(data):,} {split} images, {crops} crops, {', '.join(layers)}: "
                      f"{gigabytes:.2f} GB in {args.features}" + f", going on at image {first:,}" * (first > 0),
                      flush=True)
                batches = crops_of(data, torch.arange(first, len(data)), crops, args.image_batch, device)
                fill(todo, first, functools.partial(encode, layers=layers), batches)
            found.append(dict(zip(args.layers, mapped, strict=True)))
    return found


def both_features(
    args: argparse.Namespace, encoder: common.Encoder, task: Task, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The features of the training and of the test images, by layer."""
    train, test = cached_features(args, encoder, [(task.train, "train", args.train_crops),
                                                  (task.test, "test", args.test_crops)], device)
    if device.type == "cuda":  # TF32 for the probes; not before, since images are resized by products, too
        torch.set_float32_matmul_precision("high")
    return train, test


def make_room(files: Sequence[FeatureFile], folder: Path) -> None:
    """Take the room of all new files on the disk at once, or none: a full disk must not show in the middle."""
    found = [file.path.stat().st_size if file.path.exists() else 0 for file in files]
    new = [file for file, size in zip(files, found, strict=True) if size != file.bytes]
    size, free = sum(file.bytes for file in files) - sum(found), shutil.disk_usage(folder).free
    if size > free:
        raise common.Fault(f"the features take {size / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free: name "
                           "another --features, fewer --layers or crops, or a --subset")
    if new:
        print(f"features take {size / 1e9:.2f} GB of the {free / 1e9:.1f} GB free in {folder}", flush=True)
    try:
        for file in new:
            file.path.with_suffix(".json").unlink(missing_ok=True)
            with file.path.open("wb") as out:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(out.fileno(), 0, file.bytes)
                else:
                    out.truncate(file.bytes)
    except OSError:  # a quota, which the free space does not show
        for file in new:
            file.path.unlink(missing_ok=True)
        raise


def fill(
    parts: list[tuple[FeatureFile, Tensor]], first: int, encode: Callable[[Tensor], list[Tensor]],
    batches: Iterator[Tensor],
) -> None:
    """Write the features of all crops from row `first` on into the tensors (N, V, d) that map the files."""
    from tqdm import tqdm

    def mark() -> None:
        for file, _ in parts:
            file.mark(row)

    row, marked = first, time.monotonic()
    bar = tqdm(total=len(parts[0][1]), initial=first, unit="image", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    try:
        for views in batches:
            for (_, values), found in zip(parts, encode(views.flatten(0, 1)), strict=True):
                values[row : row + len(views)] = found.view(len(views), *values.shape[1:])
            row += len(views)
            bar.update(len(views))
            if time.monotonic() - marked > 30:
                mark()
                marked = time.monotonic()
    finally:
        bar.close()
        mark()


class Layer:
    """The features of one layer, in memory where they fit, and how they are normalised.

    like: the training images' layer, whose mean and deviations those of the test images take.
    """

    def __init__(self, values: Tensor, args: argparse.Namespace, device: torch.device, like: "Layer | None" = None):
        budget = 1e9 * args.memory if args.memory else free_memory(device) / 4
        self.values = values.to(device, copy=True) if values.nbytes <= budget else values
        views, self.size = values.shape[1:]  # numbers of a feature
        self.center = 4 if views == 10 else 0  # which crop is the central one
        self.device, self.unit = device, args.normalize == "l2"
        self.mean: Tensor | None = like.mean if like else None
        self.scale: Tensor | None = like.scale if like else None
        if args.normalize == "standard" and like is None:
            place = torch.device("cpu") if device.type == "mps" else device  # which has no float64
            count, total, squares = 0, torch.zeros(()), torch.zeros(())
            for part in torch.split(self.values, 1024):
                part = part.to(place).flatten(0, 1).double()
                count, total, squares = count + len(part), total + part.sum(0), squares + part.square().sum(0)
            self.mean = (total / count).float().to(device)
            deviation = (squares / count - (total / count).square()).clamp(min=0).sqrt()
            least = 1e-3 * deviation.mean() + 1e-12  # so that a nearly constant dimension is not blown up
            self.scale = (1 / deviation.clamp(min=least)).float().to(device)

    def __len__(self) -> int:
        return len(self.values)

    def normal(self, x: Tensor) -> Tensor:
        """(..., d) as stored -> float32, normalised."""
        x = x.to(self.device, non_blocking=self.device.type == "cuda").float()
        if self.mean is not None and self.scale is not None:
            x = (x - self.mean) * self.scale
        return F.normalize(x, dim=-1) if self.unit else x

    def crop(self, rows: Tensor, views: Tensor) -> Tensor:
        """(b, d): of each of the images at `rows` (b,) the crop that `views` (b,) names."""
        return self.normal(self.values[rows.to(self.values.device), views.to(self.values.device)])

    def crops(self, rows: Tensor) -> Tensor:
        """(b, V, d): all crops of the images at `rows`."""
        return self.normal(self.values[rows.to(self.values.device)])

    def centers(self, rows: Tensor) -> Tensor:
        """(b, d): of the central crop."""
        return self.crop(rows, torch.full_like(rows, self.center))


def free_memory(device: torch.device) -> float:
    """Bytes that a device has free, or a guess."""
    if device.type == "cuda":  # where PyTorch keeps blocks that it does not use at present
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    return 4e9


# ---- figures of merit ------------------------------------------------------------------------------------------------


def top_k(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy in percent of the first and of the first five classes. scores: (N, C); labels: (N,)."""
    best = scores.topk(min(5, scores.shape[1]), 1).indices.cpu() == labels[:, None]
    return dict(top1=round(100 * best[:, 0].double().mean().item(), 2),
                top5=round(100 * best.any(1).double().mean().item(), 2))


def precisions(scores: Tensor, targets: Tensor, eleven_points: bool) -> list[float]:
    """Average precision of each class in percent, nan where no image has it; images with target 0 are left out."""
    columns = zip(scores.cpu().T, targets.cpu().T, strict=True)
    return [common.average_precision(score[target != 0], target[target != 0] > 0, int((target > 0).sum()),
                                     eleven_points) for score, target in columns]


def mean_ap(scores: Tensor, targets: Tensor) -> dict[str, Any]:
    """Mean average precision in percent, scores and targets (N, C), images with target 0 left out for that class.

    map_11_points: VOC2007's; map_area: that of VOC2010 and later; map_sklearn: the area without interpolation, which
    the thesis's code reports.
    """
    from sklearn.metrics import average_precision_score

    eleven, area = precisions(scores, targets, True), precisions(scores, targets, False)
    theirs = [100 * float(average_precision_score((target[target != 0] > 0).numpy(), score[target != 0].numpy()))
              if (target > 0).any() else math.nan for score, target in zip(scores.cpu().T, targets.T, strict=True)]
    rows = [*zip(eleven, area, theirs, strict=True)]
    means = torch.tensor(rows).nanmean(0).tolist()  # a class that no image has counts for nothing
    return dict(zip(("map_11_points", "map_area", "map_sklearn"), (round(mean, 2) for mean in means), strict=True),
                ap_11_points=[None if math.isnan(value) else round(value, 2) for value in eleven])


def merit(scores: Tensor, targets: Tensor) -> dict[str, Any]:
    """top_k of labels (N,), mean_ap of targets (N, C)."""
    return top_k(scores, targets) if targets.ndim == 1 else mean_ap(scores, targets)


class Ledger:
    """What trainings have found so far; part of the checkpoint, so that a resumed run repeats none of them."""

    def __init__(self, task: Task) -> None:
        targets = [part.numpy().tobytes() for part in (task.train_targets, task.test_targets)]
        self.test = task.test.identity() | dict(targets=hashlib.blake2b(b"".join(targets), digest_size=8).hexdigest(),
                                                images=[images_checksum(part) for part in (task.train, task.test)])
        self.history = list[Any]()  # held-out accuracies of the search at work
        self.chosen = dict[str, Any]()
        self.best = dict[str, Any]()  # test figures at the chosen epoch
        self.rows = list[dict[str, Any]]()  # of finished trainings

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if common.differences(state["test"], self.test):
            raise common.Fault("the images are not those that this run began with, or images have other classes: use "
                               "--overwrite, or another --output")
        vars(self).update(state)


def rate(args: argparse.Namespace, lr: float, decay: float, epoch: float, step: int) -> float:
    """The learning rate after `epoch` epochs, `step` steps."""
    if args.schedule == "inverse-sqrt":
        return lr / math.sqrt(1 + lr * decay * step)
    if args.schedule == "step":
        return float(lr * args.lr_drop_factor ** sum(epoch >= drop for drop in args.lr_drops))
    return lr * (0.5 * (1 + math.cos(math.pi * epoch / args.epochs)) if args.schedule == "cosine" else 1)


# ---- linear probes ---------------------------------------------------------------------------------------------------


class Probes:
    """G linear classifiers of the same features, trained side by side: their weights are one matrix (G C, d).

    A step is that of SGD with momentum on softmax cross-entropy, G C rows in one product, without autograd:
    gradient = (p - y)^T x / B. Biases do not decay.
    """

    def __init__(self) -> None:
        self.weight = self.bias = self.weight_momentum = self.bias_momentum = torch.zeros(0)

    def reset(self, count: int, classes: int, size: int, device: torch.device) -> None:
        """Start anew: all zero, since the problem is convex."""
        self.weight, self.weight_momentum = (torch.zeros(count * classes, size, device=device) for _ in range(2))
        self.bias, self.bias_momentum = (torch.zeros(count * classes, device=device) for _ in range(2))

    def logits(self, x: Tensor, count: int) -> Tensor:
        """(B, d) -> (B, G, C)."""
        return torch.addmm(self.bias, x, self.weight.T).view(len(x), count, -1)

    def step(self, x: Tensor, y: Tensor, lr: Tensor, decay: Tensor, momentum: float) -> None:
        """x: (B, d); y: (B,); lr, decay: (G,)."""
        error = self.logits(x, len(lr)).softmax(2)
        error[torch.arange(len(x), device=x.device), :, y] -= 1
        error = error.div_(len(x)).view(len(x), -1)
        repeats = len(self.bias) // len(lr)
        lr, decay = lr.repeat_interleave(repeats), decay.repeat_interleave(repeats)[:, None]
        torch.addmm(self.weight_momentum, error.T, x, beta=momentum, out=self.weight_momentum)
        self.weight_momentum.addcmul_(self.weight, decay)
        self.bias_momentum.mul_(momentum).add_(error.sum(0))
        self.weight.addcmul_(self.weight_momentum, lr[:, None], value=-1)
        self.bias.addcmul_(self.bias_momentum, lr, value=-1)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        vars(self).update(state)


def probe_accuracy(probes: Probes, count: int, layer: Layer, rows: Tensor, labels: Tensor) -> list[float]:
    """Percent right of each of G probes on the central crops of the images at `rows`; nothing of a diverged one is."""
    hits = torch.zeros(count, device=layer.device)
    for part in torch.split(rows, 1024):
        best, answers = probes.logits(layer.centers(part), count).max(2)
        hits += ((answers == labels[part].to(layer.device)[:, None]) & best.isfinite()).sum(0)
    return (100 * hits / len(rows)).tolist()


def probe_figures(probes: Probes, which: int, layer: Layer, labels: Tensor) -> dict[str, float]:
    """Accuracies of one of two probes, by the mean probability over all crops, and by that of the central one."""
    mean, center = list[Tensor](), list[Tensor]()
    for rows in torch.split(torch.arange(len(layer)), 256):
        x = layer.crops(rows)
        answers = probes.logits(x.flatten(0, 1), 2)[:, which].softmax(1).view(*x.shape[:2], -1)
        mean.append(answers.mean(1))
        center.append(answers[:, layer.center])
    return top_k(torch.cat(mean), labels) | dict(center_top1=top_k(torch.cat(center), labels)["top1"])


def linear(args: argparse.Namespace, run: common.Run, encoder: common.Encoder, task: Task) -> dict[str, Any]:
    """Linear probes on every layer (thesis, section 5.1; Local Aggregation, Table 1): all rates and decays at once."""
    classes, labels = len(task.train.classes), task.train_targets
    every = torch.arange(len(labels))
    held = hold_out(labels, args.holdout, args.seed)
    fitted = every[~torch.isin(every, held)]
    if not len(fitted):
        raise common.Fault("one labelled image is too few to choose by: raise --subset")
    grid = list(itertools.product(args.lr, args.weight_decay))
    # Each layer's probes train twice: to choose, then with the best settings on all images. To `run`, whose args are a
    # copy, the epochs of all jobs are one training.
    jobs = [(layer, search) for layer in args.layers for search in (True, False)]
    run.args.epochs = len(jobs) * args.epochs
    run.args.batch_size = min(args.batch_size, len(fitted))
    train, test = both_features(args, encoder, task, run.device)
    probes, ledger = Probes(), Ledger(task)
    state: dict[str, Any] = dict(probes=probes, ledger=ledger)
    first_epoch, first_step = run.resume(state, run.steps_per_epoch(len(every)))
    # A checkpoint's tensors lie on the CPU.
    probes.load_state_dict({name: value.to(run.device) for name, value in probes.state_dict().items()})
    truths = labels.to(run.device)
    began = time.perf_counter()

    for epoch in range(first_epoch, run.args.epochs):
        job, local = divmod(epoch, args.epochs)  # local: the epoch within the job
        name, search = jobs[job]
        if epoch == first_epoch or (search and local == 0):  # the first epoch of this process or of a layer
            train_layer: Any = None  # what they take is free before the next are made
            test_layer: Any = None
            train_layer = Layer(train[name], args, run.device)
            test_layer = Layer(test[name], args, run.device, train_layer)
        rows = fitted if search else every
        settings = grid if search else [ledger.chosen[which][:2] for which in ("best", "last")]
        steps, start = run.steps_per_epoch(len(rows)), first_step if epoch == first_epoch else 0
        if local == start == 0:
            probes.reset(len(settings), classes, train_layer.size, run.device)
            began = time.perf_counter() if search else began
        # All that the steps need is copied at once: a copy in each would wait for the device.
        decays = torch.tensor([decay for _, decay in settings], device=run.device)
        rates = torch.tensor([[rate(args, lr, decay, local + step / steps, local * steps + step)
                               for lr, decay in settings] for step in range(steps)], device=run.device)
        order = rows[run.permutation(epoch, len(rows))].to(train_layer.values.device)
        views = torch.randint(args.train_crops, (len(rows),), generator=run.generator("views", epoch)).to(order.device)
        for step in range(start, steps):
            part = slice(step * run.args.batch_size, (step + 1) * run.args.batch_size)
            index = order[part]
            probes.step(train_layer.crop(index, views[part]), truths[index.to(run.device)], rates[step], decays,
                        args.momentum)
            run.after_step(state, epoch, step, torch.zeros(()))
        last = local + 1 == args.epochs
        if search:
            ledger.history.append(probe_accuracy(probes, len(grid), train_layer, held, labels))
            if last:
                ledger.chosen = choose(torch.tensor(ledger.history), grid, classes, len(held), name)
        else:
            if local + 1 == ledger.chosen["best"][2]:  # the chosen epoch
                ledger.best = probe_figures(probes, 0, test_layer, task.test_targets)
            if last:
                ended = probe_figures(probes, 1, test_layer, task.test_targets)
                chosen = dict(zip(("lr", "weight_decay", "epoch", "holdout_top1"), ledger.chosen["best"], strict=True))
                row = dict(layer=name, size=train_layer.size, **chosen, **ledger.best,
                           last_lr=ledger.chosen["last"][0], last_weight_decay=ledger.chosen["last"][1],
                           last_top1=ended["top1"], last_top5=ended["top5"])
                ledger.rows.append(row)
                ledger.history, ledger.chosen, ledger.best = [], {}, {}
                run.log(**row, epochs=args.epochs, seconds=round(time.perf_counter() - began, 1))
        if last:
            run.save(state, epoch + 1, 0)
    best = max(ledger.rows, key=lambda row: row["holdout_top1"])
    return dict(linear_top1=best["top1"], linear_top5=best["top5"], layer=best["layer"], layers=ledger.rows)


def choose(
    history: Tensor, grid: Sequence[tuple[float, float]], classes: int, held: int, name: str
) -> dict[str, list[float]]:
    """Of accuracies (epochs, G) on `held` images the best setting, [lr, decay, epoch, accuracy], of all epochs and of
    the last.

    Of equal ones the earliest epoch, then the first in the grid.
    """
    found = dict[str, list[float]]()
    for key, table, first in (("best", history, 0), ("last", history[-1:], len(history) - 1)):
        row, column = divmod(int(table.flatten().argmax()), len(grid))
        found[key] = [*grid[column], first + row + 1, round(table[row, column].item(), 2)]
    top, rates, chance = found["best"], {lr for lr, _ in grid}, 1 / classes
    if top[3] <= 100 * (chance + 4 * math.sqrt(chance * (1 - chance) / held)):  # the best of many at chance
        common.note(f"note: {name} is near chance ({top[3]} % of held-out images): features of another scale need "
                    "other --lr, or --normalize")
    elif len(rates) > 2 and top[0] in (min(rates), max(rates)):
        common.note(f"note: the best rate for {name}, {top[0]:g}, is at the end of the grid: widen --lr")
    return found


# ---- linear SVM ------------------------------------------------------------------------------------------------------


def fit_svm(x: Tensor, y: Tensor, cost: Tensor) -> Tensor:
    """K support vector machines of the same x (N, d): the w (K, d) of least |w|^2 / 2 + sum_i cost_i max(0, 1 - y_i
    w.x_i)^2, LIBLINEAR's primal with squared hinge. y: (N, K), 1 or -1; cost: (N, K), 0 leaves an image out.

    Newton's method on the active images (Keerthi and DeCoste, 2005): conjugate gradients for the step, an exact line
    search along it; all K at once, each product with x serves all. The error of w is at most the norm of the gradient
    (the problem is strongly convex): done when that is under |w| / 1000, or what rounding makes of the active images'
    outputs, or after 100 steps.
    """
    if len(x) < x.shape[1]:  # the solution lies in the span of the images: solve in its coordinates
        basis, coordinates = torch.linalg.qr(x.T)
        w: Tensor = fit_svm(coordinates.T.contiguous(), y, cost) @ basis.T
        return w
    w, squares = x.new_zeros(y.shape[1], x.shape[1]), x.square().sum(1)
    outputs, eps = torch.zeros_like(y), torch.finfo(x.dtype).eps
    for number in range(100):
        slack = (1 - y * outputs).clamp_(min=0)
        gradient = w - 2 * (cost * y * slack).T @ x
        active = 2 * cost * (slack > 0)
        rounding = 4 * eps * (active.square().T @ squares).sqrt()
        todo = (gradient.norm(dim=1) > torch.maximum(1e-3 * w.norm(dim=1), rounding)).nonzero()[:, 0]
        if not len(todo):
            break
        # Ten steps are the rule. Where a plane parts the classes, one that errs by a tenth leaves hardly any active.
        step = newton_step(x, active[:, todo], -gradient[todo], 0.1 if number < 12 else 1e-3)
        change = x @ step.T
        length = line_search(w[todo], step, y[:, todo], outputs[:, todo], change, cost[:, todo])
        w[todo] += length[:, None] * step
        outputs[:, todo] += length * change
    return w


def newton_step(x: Tensor, active: Tensor, target: Tensor, accuracy: float) -> Tensor:
    """(I + X^T diag(active_k) X) p_k = target_k for all k, by conjugate gradients to that share of the target."""
    p, residual, direction = torch.zeros_like(target), target.clone(), target.clone()
    size = residual.square().sum(1)
    goal = accuracy**2 * size
    for _ in range(100):
        if (size <= goal).all():
            break
        product = direction + (active * (x @ direction.T)).T @ x
        alpha = torch.where(size > goal, size / (direction * product).sum(1), 0)
        p += alpha[:, None] * direction
        residual -= alpha[:, None] * product
        new = torch.where(size > goal, residual.square().sum(1), size)
        direction = residual + torch.where(size > goal, new / size, 0)[:, None] * direction  # a residual may be just 0
        size = new
    return p


def line_search(w: Tensor, step: Tensor, y: Tensor, outputs: Tensor, change: Tensor, cost: Tensor) -> Tensor:
    """The length (K,) that minimises the objective along each step: a zero of its piecewise linear slope."""
    linear_term, square_term = (w * step).sum(1), step.square().sum(1)
    low, high = torch.zeros_like(linear_term), torch.full_like(linear_term, math.inf)
    length = torch.ones_like(low)
    for _ in range(20):
        slack = 1 - y * (outputs + length * change)
        pull = cost * change * (slack > 0)
        slope = linear_term + length * square_term - 2 * (pull * y * slack).sum(0)
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
        newton = length - slope / (square_term + 2 * (pull * change).sum(0)).clamp(min=1e-30)
        inside = (newton > low) & (newton < high)
        length = torch.where(inside, newton, torch.where(high < math.inf, (low + high) / 2, 2 * low))
    return length


def fit_svms(
    x: Tensor, targets: Tensor, costs: Tensor, positive_weight: float, pause: Callable[[], None] = lambda: None
) -> Tensor:
    """Weights (A, C, d) for costs (A, C) of C classes, in blocks that bound the memory, with a `pause` before each.

    x: (N, d); targets: (N, C).
    """
    flat, found = costs.flatten(), list[Tensor]()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # in TF32 the gradient would never get small
    # Machine m has cost m // C and class m % C; a block's targets (N, block) have at most 2e8 numbers, 0.8 GB.
    for block in torch.split(torch.arange(len(flat)), max(1, int(2e8 / len(x)))):
        pause()
        y = targets[:, block % targets.shape[1]].to(x)
        weight = torch.where(y > 0, positive_weight, 1.0) * (y != 0)
        found.append(fit_svm(x, torch.where(y == 0, 1.0, y), weight.to(x) * flat[block].to(x)))
    torch.set_float32_matmul_precision(precision)
    return torch.cat(found).view(*costs.shape, -1)


note_once = functools.cache(common.note)  # for what would be said of each layer and draw


def cross_validate(
    x: Tensor, targets: Tensor, args: argparse.Namespace, several: bool, key: Sequence[int | str], views: int = 1,
    pause: Callable[[], None] = lambda: None,
) -> Tensor:
    """The cost (C,) of each class: one for all that classifies most left-out images right, or, where an image may have
    `several` classes, the one of the best average precision for each. The middle one if a fold would lack a class that
    has images.

    x: (n V, d), the V crops of an image one after the other, all in one fold; targets: (n V, C). A fold is left out by
    targets of 0: a copy of the other rows may be too large.
    """
    count, images = targets.shape[1], targets[::views]
    costs = torch.tensor(sorted(args.cost), dtype=torch.float64)
    # In parts, since what is summed becomes int64 first.
    with_class = torch.stack([(part > 0).sum(0) for part in torch.split(images, 8192)]).sum(0)
    fewest, middle = min(with_class[with_class > 0].tolist(), default=0), costs[len(costs) // 2]
    if fewest < args.folds and len(costs) > 1:
        note_once(f"note: a class has fewer images than --folds {args.folds}: C is not chosen, but {middle:g} for all")
    if fewest < args.folds or len(costs) == 1:
        return middle.repeat(count)
    order = torch.randperm(len(images), generator=common.generator(*key, "folds"))
    if not several:
        order = order[images.argmax(1).cpu()[order].argsort(stable=True)]
    fold = torch.empty(len(images), dtype=torch.long)
    fold[order] = torch.arange(len(images)) % args.folds
    fold = fold.repeat_interleave(views).to(x.device)
    merits = torch.zeros(len(costs), count)
    for left_out in range(args.folds):
        rows = (fold == left_out).nonzero()[:, 0]
        weights = fit_svms(x, targets.index_fill(0, rows, 0), costs[:, None].expand(-1, count), args.positive_weight,
                           pause)
        truth = targets[rows]
        for number, weight in enumerate(weights):
            scores = torch.cat([x[part] @ weight.T for part in torch.split(rows, 8192)])
            if several:
                merits[number] += torch.tensor(precisions(scores, truth, False)).nan_to_num(0)
            else:
                merits[number] += (scores.argmax(1) == truth.argmax(1)).sum().item() / len(rows)
    best: Tensor = costs[merits.argmax(0)]
    usual = best[with_class.cpu() > 0].mode().values
    if len(costs) > 2 and usual in costs[[0, -1]]:
        common.note(f"note: the best cost, {usual.item():g}, is at the end of the grid: widen --C, or try --normalize")
    return best


def one_vs_rest(labels: Tensor, classes: int) -> Tensor:
    """Class numbers (n,) as targets (n, C), 1 or -1: int8, of ImageNet 1.3 GB."""
    return torch.full((len(labels), classes), -1, dtype=torch.int8).scatter_(1, labels[:, None], 1)


def with_intercept(layer: Layer, rows: Tensor) -> Tensor:
    """(n V, d + 1) float32: all crops of the images at `rows` and a 1, for the intercept. In place: up to 47 GB."""
    views = layer.values.shape[1]
    x = torch.ones(len(rows) * views, layer.size + 1, device=layer.device)
    for part, place in zip(torch.split(rows, 1024), torch.split(x, 1024 * views), strict=True):
        place[:, :-1] = layer.crops(part).flatten(0, 1)
    return x


def svm_draws(args: argparse.Namespace, task: Task) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
    """(facts, rows, targets (n, C)) of each draw of labelled images."""
    every, classes, found = task.train_targets, task.train.classes, []
    if every.ndim == 1:
        return [(facts, rows, one_vs_rest(every[rows], len(classes))) for facts, rows in draws(args, task)]
    if not args.per_class:
        return [(facts, rows, every[rows]) for facts, rows in draws(args, task)]
    for wanted, draw in itertools.product(args.per_class, range(args.draws)):
        shown = torch.zeros_like(every)
        for number, target in enumerate(every.T):
            for sign, count in ((1, wanted), (-1, 19 * wanted)):  # as if each of VOC's other 19 classes gave as many
                rows = (target == sign).nonzero()[:, 0]
                if sign > 0 and len(rows) < wanted:
                    raise common.Fault(f"--per-class {wanted}: {task.train.name} has {len(rows)} images of "
                                       f"{classes[number]}")
                source = common.generator(args.seed, "shots", wanted, draw, number, sign)
                shown[rows[torch.randperm(len(rows), generator=source)[:count]], number] = sign
        rows = shown.abs().sum(1).nonzero()[:, 0]
        facts = say_draw(f"{wanted} with and up to {19 * wanted} without each class", shown, rows, args.seed, draw)
        found.append((facts | dict(per_class=wanted), rows, shown[rows]))
    return found


def svm(args: argparse.Namespace, run: common.Run, encoder: common.Encoder, task: Task) -> dict[str, Any]:
    """One-vs-rest linear SVM on every layer (NPID, Tables 1 to 3; VOC07 and its low-shot variant)."""
    found, several = svm_draws(args, task), task.train_targets.ndim == 2
    jobs = [(layer, number) for layer in args.layers for number in range(len(found))]
    run.args.epochs = len(jobs)
    train, test = both_features(args, encoder, task, run.device)
    ledger = Ledger(task)
    state: dict[str, Any] = dict(ledger=ledger)
    first, _ = run.resume(state, 1)

    def pause() -> None:
        """On a signal save and stop at once, not at the end of a layer, on ImageNet an hour; it is then begun anew."""
        if run.signal:
            run.save(state, epoch, 0)
            run.stop(run.signal, epoch, 0)

    for epoch in range(first, len(jobs)):
        pause()
        began = time.perf_counter()
        name, number = jobs[epoch]
        if epoch == first or number == 0:  # the first of this process or of a layer
            train_layer: Any = None  # what they take is free before the next are made
            test_layer: Any = None
            train_layer = Layer(train[name], args, run.device)
            test_layer = Layer(test[name], args, run.device, train_layer)
        facts, rows, targets = found[number]
        x = with_intercept(train_layer, rows)
        targets = targets.to(run.device).repeat_interleave(args.train_crops, 0)
        cost = cross_validate(x, targets, args, several, (args.seed, number), args.train_crops, pause)
        weight = fit_svms(x, targets, cost[None], args.positive_weight, pause)[0]
        del x  # the next turn makes its own
        scores = torch.cat([(F.pad(test_layer.crops(part), (0, 1), value=1.0) @ weight.T).mean(1)
                            for part in torch.split(torch.arange(len(test_layer)), 256)])
        row = dict(layer=name, size=train_layer.size, **facts, cost=sorted(set(cost.tolist())),
                   **merit(scores, task.test_targets))
        ledger.rows.append(row)
        run.log(**row, seconds=round(time.perf_counter() - began, 1))
        if run.bar is not None:
            run.bar.update()
        run.save(state, epoch + 1, 0)
    means = spread(ledger.rows, ("layer", "per_class" if "per_class" in ledger.rows[-1] else "labels"))
    end = means[-1]
    result = dict[str, Any](map_voc07_svm=end["map_11_points"]) if several else dict[str, Any](svm_top1=end["top1"])
    result |= dict(layer=end["layer"], layers=ledger.rows)
    return result | (dict(draws=means) if args.per_class or args.labels or args.label_list else {})


def spread(rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the draws, for each value of `keys`."""
    groups = dict[tuple[Any, ...], list[dict[str, Any]]]()
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    found = []
    for values, members in groups.items():
        entry = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
        entry["draws"] = len(members)
        for key in ("top1", "top5", "map_11_points", "map_area"):
            if key in members[0]:
                figures = torch.tensor([row[key] for row in members], dtype=torch.float64)
                entry |= {key: round(figures.mean().item(), 2),
                          f"{key}_std": round(figures.std().item() if len(members) > 1 else 0.0, 2)}
        found.append(entry)
    return found


# ---- networks that train by backpropagation: an MLP on frozen features, fine-tuning, VOC07 ---------------------------


class Classifier(nn.Module):
    """A body (B, ...) -> (B, d) and a last layer of its own: logits (B, C), float32 under autocast too: rounded to
    bfloat16's 8 bits many would be equal."""

    def __init__(self, body: nn.Module, size: int, classes: int) -> None:
        super().__init__()
        self.body, self.last = body, nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.last(features.float())
        return logits


def masked_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy summed over classes, mean over images; targets 1, -1, and 0 for what does not count."""
    losses = F.binary_cross_entropy_with_logits(logits, (targets > 0).float(), reduction="none")
    return (losses * (targets != 0)).sum(1).mean()


Batches = Callable[[Tensor, int, int], Iterator[tuple[int, Tensor, Tensor]]]  # order, epoch, start -> step, index, x


def train_networks(
    args: argparse.Namespace, run: common.Run, task: Task, model: Classifier,
    found: list[tuple[dict[str, Any], Tensor]], batches: Batches, crops: Callable[[bool, Tensor], Iterator[Tensor]],
    reset: Callable[[int], None], every_epoch: bool,
) -> list[dict[str, Any]]:
    """Train `model` for each draw of labelled images with each setting of the grid, then with the best one on all.

    found: facts and rows of each draw. crops(test, rows): what `model` sees of test or training images, in parts (b, V,
    ...). reset(number): draw the new layers of a training. every_epoch: the best epoch is chosen too, else only the
    setting is, by the last epoch; with one setting nothing is held out then.
    """
    targets, multi = task.train_targets, task.train_targets.ndim == 2
    key = "map_area" if multi else "top1"
    every_test = torch.arange(len(task.test))

    @torch.no_grad()
    def scores(test: bool, rows: Tensor) -> Tensor:
        """Means over crops (n, C), each rank of its share: all have the same in the end, and choose the same."""
        answers = list[Tensor]()
        for views in crops(test, rows[run.share(len(rows))]):
            with run.autocast():
                logits = model(views.flatten(0, 1))
            answers.append((logits if multi else logits.softmax(1)).view(*views.shape[:2], -1).mean(1))
        return run.gather(torch.cat(answers))[0][: len(rows)]

    criterion: Any = masked_bce if multi else F.cross_entropy
    grid = list(itertools.product(args.lr, args.weight_decay, args.head_factor))
    search = every_epoch or len(grid) > 1
    fewest = min(len(rows) for _, rows in found)
    if fewest - search * max(1, round(args.holdout * fewest)) < run.world:
        raise common.Fault(f"{fewest} labelled images are too few{' to choose by' * search}: take more")
    for _, rows in found if search else ():
        held = rows[hold_out(targets[rows], args.holdout, args.seed)]
        if multi and not (targets[held] > 0).any():
            raise common.Fault("the held-out images have no objects that count, nothing to choose by: take more "
                               "images, raise --holdout, or name one setting")
        # With an image of each class, all settings would have nothing right, and the first be taken.
        if not multi and not torch.isin(targets[held], targets[rows[~torch.isin(rows, held)]]).any():
            raise common.Fault("the held-out images are the only ones of their classes, nothing to choose by: take "
                               "more of each class, or name one setting")
    # Trainings: each draw with each setting of the grid (rate, decay, factor), then, None, with what was best.
    jobs = list(itertools.product(found, [*(grid if search else ()), None]))
    run.args.epochs = len(jobs) * args.epochs
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    body = [w for w in model.body.parameters() if w.requires_grad]  # none where only the last layer trains
    groups = [dict(params=part) for part in (body, list(model.last.parameters())) if part]
    optimizer = torch.optim.SGD(groups, args.lr[0], momentum=args.momentum)
    network, ledger, totals = run.parallel(model), Ledger(task), common.Totals(run)
    state: dict[str, Any] = dict(model=model, optimizer=optimizer, ledger=ledger, totals=totals)
    truths = targets.to(run.device)  # once: in each step it would wait for the device
    first_epoch, first_step = run.resume(state, max(1, max(len(rows) for _, rows in found) // args.batch_size))

    for epoch in range(first_epoch, run.args.epochs):
        number, local = divmod(epoch, args.epochs)
        (facts, rows), setting = jobs[number]
        held = rows[hold_out(targets[rows], args.holdout, args.seed)]
        if setting is not None:
            rows = rows[~torch.isin(rows, held)]
        # The best on held-out images, of equal ones the first; without a search the one setting after its last epoch.
        best, best_epoch, holdout = max(ledger.history, key=lambda entry: entry[2],
                                        default=(grid[0], args.epochs, None))
        lr, decay, factor = setting or best
        run.args.batch_size = min(args.batch_size, len(rows) // run.world * run.world)
        steps, first = run.steps_per_epoch(len(rows)), first_step if epoch == first_epoch else 0
        accumulate = -(-run.args.batch_size * args.accumulate // args.batch_size)  # parts no larger than asked for
        if local == first == 0:
            model.load_state_dict(initial)
            reset(number)
            optimizer.state.clear()
        began = time.perf_counter()
        model.train()
        for layer in model.modules() if multi else ():  # VOC07: batch statistics stay as they are
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        order = rows[run.permutation(epoch, len(rows))]
        for step, index, x in batches(order, epoch, first):
            now = rate(args, lr, decay, local + step / steps, local * steps + step)
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = now, decay
            optimizer.param_groups[-1]["lr"] *= factor
            optimizer.zero_grad()
            loss = torch.zeros((), device=run.device)
            y = truths[index.to(run.device)]
            for part, truth in common.parts([network], x.tensor_split(accumulate), y.tensor_split(accumulate)):
                with run.autocast():
                    logits = network(part)
                part_loss = criterion(logits, truth) * (len(part) / len(x))
                part_loss.backward()
                loss += part_loss.detach()
            if multi:
                nn.utils.clip_grad_norm_(model.parameters(), 10)  # as in DeepCluster's eval_voc_classif.py
            optimizer.step()
            totals.add(loss=loss)
            run.after_step(state, epoch, step, loss)
        last, row = local + 1 == args.epochs, dict[str, Any](totals.means())
        model.eval()
        run.broadcast(model)
        if setting is not None and (last or every_epoch):
            row["holdout"] = merit(scores(False, held), targets[held])[key]
            ledger.history.append([[lr, decay, factor], local + 1, row["holdout"]])
        if setting is None:
            if last or local + 1 == best_epoch:
                ended = merit(scores(True, every_test), task.test_targets)
            if local + 1 == best_epoch:
                ledger.best = ended
            if last:
                row |= dict(facts, best_lr=lr, weight_decay=decay, head_factor=factor, best_epoch=best_epoch,
                            **({"holdout": holdout} if search else {}), **ledger.best,
                            **{f"last_{name}": value for name, value in ended.items() if name in ("top1", "top5", key)})
                ledger.rows.append(row)
                ledger.history, ledger.best = [], {}
        run.log(epoch=epoch + 1, training=number + 1, lr=rate(args, lr, decay, local, local * steps), **row,
                seconds=round(time.perf_counter() - began, 1))
        if last or not args.save_minutes:  # epochs on few labels are shorter than a checkpoint takes
            run.save(state, epoch + 1, 0)
    return ledger.rows


def mlp(args: argparse.Namespace, run: common.Run, encoder: common.Encoder, task: Task) -> dict[str, Any]:
    """Three new fully connected layers on frozen convolutions (thesis, Tables 4.1 and 5.2)."""
    train, test = both_features(args, encoder, task, run.device)
    train_layer = Layer(train[args.layers[0]], args, run.device)
    test_layer = Layer(test[args.layers[0]], args, run.device, train_layer)
    hidden = args.hidden or max(16, 64 * encoder.width)
    layers = [nn.Dropout(args.dropout), nn.Linear(train_layer.size, hidden), nn.ReLU(inplace=True),  # fc6
              nn.Dropout(args.dropout), nn.Linear(hidden, hidden), nn.ReLU(inplace=True)]  # fc7
    model = run.place(Classifier(nn.Sequential(*layers), hidden, len(task.train.classes)))

    def batches(order: Tensor, epoch: int, start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        views = torch.randint(args.train_crops, (len(order),), generator=run.generator("views", epoch))
        order, views = order.to(train_layer.values.device), views.to(train_layer.values.device)
        for step in range(start, len(order) // run.args.batch_size):
            part = slice(step * run.args.batch_size, (step + 1) * run.args.batch_size)
            run.seed_step(epoch, step)
            yield step, order[part], train_layer.crop(order[part], views[part])

    def crops(test: bool, rows: Tensor) -> Iterator[Tensor]:
        parts = torch.split(rows, 256)
        return (test_layer.crops(part) if test else train_layer.centers(part)[:, None] for part in parts)

    def reset(number: int) -> None:
        torch.manual_seed(common.generator(args.seed, "mlp").initial_seed())
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    (row,) = train_networks(args, run, task, model, [({}, torch.arange(len(task.train_targets)))], batches, crops,
                            reset, every_epoch=True)
    return dict(mlp_top1=row["top1"], mlp_top5=row["top5"], hidden=hidden, layer=args.layers[0], runs=[row])


def finetune(args: argparse.Namespace, run: common.Run, encoder: common.Encoder, task: Task) -> dict[str, Any]:
    """The whole network and a new last layer on some labels (NPID, Fig. 6; thesis, Fig. 5.1; CLD), or VOC07's classes
    with fc6-8 or everything (thesis, Table 5.5)."""
    multi = task.train_targets.ndim == 2
    backbone: Any = encoder.backbone.requires_grad_(True)
    for layer in backbone.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = args.dropout
    model = run.place(Classifier(backbone, backbone.dim, len(task.train.classes)))
    # The layers above the convolutions: fc6 and fc7 of AlexNet and VGG16.
    above = [layer for layer in getattr(backbone, "classifier", nn.Identity()).modules()
             if isinstance(layer, nn.Linear)]
    norms = [layer for layer in backbone.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if multi and args.trainable == "fc":
        kept = {id(w) for layer in [*above, *(norms if args.train_batchnorm else ())] for w in layer.parameters()}
        for weight in backbone.parameters():
            weight.requires_grad_(id(weight) in kept)
    scale = (min(args.crop_scale), max(args.crop_scale))
    crop = common.Crop(task.train.size, scale, (1.0, 1.0)) if multi else common.Crop(task.train.size, scale)

    def batches(order: Tensor, epoch: int, start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        for step, index, (images,) in task.train.batches(run, order, crop, epoch, start):
            yield step, index, task.train.normalize(common.random_flip(images, run.draw(epoch, step)))

    def crops(test: bool, rows: Tensor) -> Iterator[Tensor]:
        data, count = (task.test, args.test_crops) if test else (task.train, 1)
        return crops_of(data, rows, count, args.image_batch, run.device)

    def reset(number: int) -> None:
        torch.manual_seed(common.generator(args.seed, "last layer", number).initial_seed())
        for layer in [*above, model.last] if multi else [model.last]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.bias, 0.1 if multi else 0.0)  # 0.1 in eval_voc_classif.py

    rows = train_networks(args, run, task, model, draws(args, task), batches, crops, reset, every_epoch=False)
    means = spread(rows, ["labels"])
    if multi:
        return dict(map_voc07_classification=means[-1]["map_11_points"], trainable=args.trainable, draws=means,
                    runs=rows)
    return dict(finetune_top1=means[-1]["top1"], finetune_top5=means[-1]["top5"], draws=means, runs=rows)


# ---- evaluation ------------------------------------------------------------------------------------------------------

PROTOCOLS: dict[str, Callable[[argparse.Namespace, common.Run, common.Encoder, Task], dict[str, Any]]] = {
    "linear": linear, "svm": svm, "mlp": mlp, "finetune": finetune, "voc07": finetune, "voc07-svm": svm,
}


def folder_of(args: argparse.Namespace, encoder: common.Encoder | None) -> Path:
    """The folder of this protocol with these settings and weights: others lie beside it."""
    options = {key: value for key, value in common.plain_options(args).items()
               if key not in common.FREE_OPTIONS or key in ("epochs", "test_subset")}
    options |= dict(data=args.data, weights=encoder.sha256 if encoder else "random")
    # Other test images, other figures.
    options |= {name: str(getattr(args, name)) for name in ("val_dir", "val_list") if getattr(args, name)}
    if args.label_list:  # whatever its name
        options["listed"] = hashlib.blake2b(args.label_list.read_bytes(), digest_size=8).hexdigest()
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=4).hexdigest()
    return Path(args.output) / f"{args.preset}-{digest}"


def main(args: argparse.Namespace) -> None:
    device = common.pick_device(args.device)
    encoder, path = None, Path(args.checkpoint)
    if args.checkpoint != "random":
        encoder = common.chosen_encoder(args, device, "head" if "head" in args.layers else "auto")
        before = common.maybe_before_head(encoder.report["unexpected"]) if encoder.options else []
        if before and "head" in args.layers and "layers" not in args.typed:
            raise common.Fault(f"{path} has {before[0]}, perhaps of a layer before its head, which would be left out: "
                               "take --layers backbone, or --layers head if it stands elsewhere")
        if not args.protocol.startswith("voc07"):
            common.images_of_run(args, encoder.options)
    # Of its own: a protocol trains several times --epochs, and a batch may be smaller.
    run = common.Run(argparse.Namespace(**vars(args) | dict(output=folder_of(args, encoder))))
    task = open_task(args, encoder, device)
    if encoder is None:
        torch.manual_seed(args.seed)
        encoder = common.chosen_encoder(args, device, small=task.train.small)
    args.test_crops = run.args.test_crops = args.test_crops or (1 if task.train.small else 10)
    encoder.backbone.to(memory_format=torch.channels_last)
    run.describe(task.train, task.test, checkpoint_sha256=encoder.sha256)
    result = PROTOCOLS[args.protocol](args, run, encoder, task)
    run.close()
    if run.rank:
        return
    options = encoder.options
    method = f"{options['script']} {options['preset']}" if options else path.stem
    facts = dict(protocol=args.protocol, preset=args.preset, checkpoint=args.checkpoint,
                 checkpoint_sha256=encoder.sha256, arch=encoder.arch, width=encoder.width,
                 method="untrained" if args.checkpoint == "random" else method, data=task.train.name,
                 classes=len(task.train.classes), subset=args.subset, train_images=len(task.train),
                 test_images=len(task.test), train_crops=args.train_crops, test_crops=args.test_crops,
                 normalize=args.normalize, epochs=args.epochs, batch_size=args.batch_size, seed=args.seed, amp=run.amp,
                 git=run.header["git"], images=run.data, settings=run.settings())
    if args.protocol in ("linear", "mlp"):
        facts |= dict(lr_grid=args.lr, weight_decay_grid=args.weight_decay, holdout=args.holdout,
                      schedule=args.schedule)
    common.publish(args, facts | result)


if __name__ == "__main__":
    common.launch(main, parse_args)
