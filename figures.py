"""Pictures of the papers, drawn from runs and checkpoints of these scripts.

    python figures.py gallery runs/npid-demo-seed0               # NPID, Fig. 5: queries and their nearest images
    python figures.py gallery runs/npid-demo-seed0 random        # two networks side by side, one of them untrained
    python figures.py curves runs/npid-cifar10-proximal-seed0 runs/npid-cifar10-oscillating-seed0    # Fig. 3 and 4
    python figures.py curves runs/npid-cifar10-seed*             # runs that differ in the seed alone: their mean
    python figures.py density runs/npid-cifar10-seed0 runs/local_aggregation-cifar10-seed0           # LA, Fig. 2
    python figures.py neighbors runs/npid-cifar10-seed0          # LA, Fig. 3
    python figures.py mds runs/local_aggregation-cifar10-seed0   # LA, Fig. 4
    python figures.py edges runs/deepcluster-cifar10-seed0       # DeepCluster, Fig. 4.1 to 4.10
    python figures.py pca runs/deepcluster-cifar10-seed0         # Fig. 4.3
    python figures.py filters runs/deepcluster-cifar10-seed0     # Fig. 5.2
    python figures.py maximize runs/deepcluster-cifar10-seed0    # Fig. 5.4
    python figures.py linear runs/npid-cifar10-seed0             # NPID, Table 2: after eval_linear.py
    python figures.py lowshot runs/deepcluster-cifar10-seed0     # Fig. 5.1, after eval_linear.py --preset lowshot
    python figures.py semisup runs/npid-cifar10-seed0            # NPID, Fig. 6, after eval_linear.py --preset finetune
    python figures.py retrieval runs/npid-cifar10-seed0 runs/cld-cifar10-seed0    # CLD, Fig. A.3; DeepCluster, Fig. 5.3
    python figures.py queue runs/cld-cifar10-moco-queue*         # CLD, Fig. A.2, after eval_knn.py
    python figures.py ablation runs/npid-cifar10-*               # any table of ablations: the paper's figures, ours
    python figures.py detections runs/npid-shapes-seed0          # boxes and precision-recall, after eval_detection.py
    python figures.py all runs/npid-cifar10-seed0                # all that a run allows, with an index.md

A run is the output folder of a training script, or a checkpoint file. The picture goes to NAME.png in the first run's
folder, or to --out (.png, .pdf or .svg). Its small print says what was run.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import shlex
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, HPacker, OffsetImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

import common
import deepcluster
import local_aggregation

# ---- what every picture has ------------------------------------------------------------------------------------------

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe's and Ito's
WRONG, RIGHT = COLORS[1:3]
STYLE: Any = {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
              "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.titlesize": 11,
              "figure.titleweight": "bold", "text.parse_math": False}  # a $ in a name begins no formula
BESIDE: Any = dict(textcoords="offset points", fontsize=7)  # a number or a word beside a point
# Options that do not make a run another experiment; --data stands for its images.
IGNORED = {*common.FREE_OPTIONS, "seed"} - {"epochs", "data"}


class Source(NamedTuple):
    """What a picture was made from; foreign files and untrained networks have only a name, and no small print."""

    name: str
    options: dict[str, Any]
    data: dict[str, Any]
    git: str
    epochs: int
    also: str = ""  # what else tells it from the others

    def __str__(self) -> str:
        text = "{script}.py, preset {preset}, {arch} of width {width}, seed {seed}, ".format_map(self.options)
        return (f"{text}{self.data['images']:,} images of {self.data['name']}, "
                f"epoch {self.epochs} of {self.options['epochs']}{self.also}, commit {self.git}")


def experiment(source: Source) -> str:
    """The same for runs that differ in the seed alone."""
    images = {key: value for key, value in source.data.items() if key != "checksum"}  # a seed draws its own subset
    options = source.options | dict(data=images)
    return repr(sorted((key, value) for key, value in options.items() if key not in IGNORED))


def pooled(runs: Sequence[Source]) -> Source:
    """One source for the runs of an experiment."""
    seeds, git = ("/".join(dict.fromkeys(words)) for words in
                  ([str(source.options["seed"]) for source in runs], [source.git for source in runs]))
    return runs[0]._replace(options=runs[0].options | dict(seed=seeds), git=git,
                            epochs=min(source.epochs for source in runs))


def legend(sources: Sequence[Source]) -> dict[str, Source]:
    """The sources by what tells them apart: script and preset, else the options that differ, else the folders."""
    named = [source.options | dict(data=source.data["name"]) if source.options else {} for source in sources]
    runs = [options for options in named if options]
    # The script first; what only some scripts have says little
    keys = sorted(set[str]().union(*runs[:1]).intersection(*runs) - IGNORED, key=lambda key: (key != "script", key))
    keys = [key for key in keys if len({repr(options.get(key)) for options in runs}) > 1][:3]
    options = [", ".join(f"{key.replace('_', ' ')} {{{key}}}" for key in some) for some in (keys, [*keys, "seed"])]
    for form in ("{script} {preset}", *options, "{folder}"):
        names = [form.format_map(dict.fromkeys(keys) | options | dict(folder=source.name)) if options else source.name
                 for source, options in zip(sources, named, strict=True)]
        if len(set(names)) == len(names):
            return dict(zip(names, sources, strict=True))
    return {f"{source.name} ({i})": source for i, source in enumerate(sources, 1)}


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line: told apart without the colour, too."""
    return dict(color=COLORS[number % 7], linestyle=["-", "--", ":", "-."][number % 4], marker="osD^v"[number % 5])


def folder_of(name: str) -> Path:
    """The folder of a run that is named by itself or by a file in it."""
    return Path(name).parent if Path(name).is_file() else Path(name)


def mark(axes: Any, level: float, text: str) -> None:
    """A dotted line across the panel at y = level."""
    axes.axhline(level, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate(text, (1, level), (-3, 2), xycoords=("axes fraction", "data"), ha="right", color="0.4", **BESIDE)


def save(figure: Figure, title: str, note: str, runs: dict[str, Source], path: Path) -> None:
    """Write the file whole or not at all. A PNG has a palette, and as many dots as fit into 200 kB."""
    figure.suptitle(title, x=0.01, ha="left")
    small_print = [note] * bool(note) + [f"{label}: {source}" for label, source in runs.items() if source.options]
    letters = int(21 * figure.get_figwidth())
    small_print = [row for text in small_print for line in text.split("\n") for row in textwrap.wrap(line, letters)]
    figure.set_figheight(figure.get_figheight() + 0.107 * len(small_print))
    figure.supxlabel("\n".join(small_print), x=0.01, ha="left", fontsize=6, color="0.35")
    content = io.BytesIO()
    if path.suffix != ".png":
        figure.savefig(content, format=path.suffix[1:])
    else:
        for dpi, colors in ((160, 256), (130, 256), (110, 256), (100, 128), (90, 128), (90, 64), (70, 64)):
            content.seek(0)
            figure.savefig(content, format="png", dpi=dpi)
            image = Image.open(content).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
            content = io.BytesIO()
            image.save(content, "PNG", optimize=True)
            if content.tell() < 200_000:
                break
    common.write_whole(path, content.getbuffer())
    print(path)


# ---- networks and their features -------------------------------------------------------------------------------------


Kept = TypeVar("Kept")


def keep(args: argparse.Namespace, key: tuple[Any, ...], make: Callable[[], Kept]) -> Kept:
    """make(), once for each key: all pictures of `all` share their networks, images and features."""
    if key not in args.kept:
        args.kept[key] = make()
    found: Kept = args.kept[key]
    return found


def open_network(args: argparse.Namespace, name: str, first: common.Encoder | None) -> tuple[common.Encoder, Source]:
    """The encoder in a run's folder or in a file; "random": an untrained one like `first`, with a head if that has."""
    if name == "random":
        if first is None:
            raise common.Fault('name a run beside "random": the untrained network takes its architecture')
        torch.manual_seed(args.seed)
        stem = args.image_size < common.SMALL if args.image_size else first.data.get("small", False)
        channels = 2 if isinstance(getattr(first.backbone, "front", None), common.Sobel) else 3
        encoder = common.untrained_encoder(first.arch, first.width, stem, args.device, input_channels=channels)
        encoder = dataclasses.replace(encoder, head=encoder.head if first.head else None, options=first.options,
                                      data=first.data)
        return encoder, Source("untrained", {}, {}, "", 0)
    path = Path(name, "checkpoint.pth") if Path(name).is_dir() else Path(name)
    saved: dict[str, Any] = dict(options={})
    with contextlib.suppress(common.Fault):  # it is not ours
        saved = common.load_checkpoint(path)
    # A run has its own architecture, whatever that of a file beside it
    arch, width = (None, None) if saved["options"].get("arch") in common.ARCHITECTURES else (args.arch, args.width)
    encoder = common.load_encoder(path, arch, width, args.device, args.layer)
    if not saved["options"]:
        return encoder, Source(path.name, {}, {}, "", 0)
    return encoder, Source(path.resolve().parent.name, encoder.options, encoder.data, saved["git"], saved["epoch"])


def open_networks(args: argparse.Namespace) -> tuple[list[common.Encoder], dict[str, Source]]:
    """The encoder of each run, and what it was made from."""
    found, first = dict[str, tuple[common.Encoder, Source]](), None
    for name in sorted(args.runs, key=lambda name: name == "random"):
        found[name] = keep(args, ("network", name), functools.partial(open_network, args, name, first))
        first = first or found[name][0]
    encoders, sources = zip(*(found[name] for name in args.runs), strict=True)
    return list(encoders), legend(sources)


def load_train(encoders: Sequence[common.Encoder], args: argparse.Namespace) -> common.ImageSet:
    """The training images of the first encoder's own run, unless --data or --subset names others; if one of them is
    foreign, at the set's own size and with its mean and std, or --mean and --std."""
    split, first = "train" if {"data", "subset"} & set(args.typed) else "pretrain", encoders[0]
    if not all(encoder.data for encoder in encoders):
        first = dataclasses.replace(first, data={})
    return keep(args, ("images", first.sha256),
                lambda: common.load_train(argparse.Namespace(**vars(args)), first, split, args.device))


def side(encoder: common.Encoder, data: common.ImageSet, args: argparse.Namespace) -> int:
    """px of the images that the encoder sees: of --image-size, else of its run, of foreign ones the set's own."""
    size: int = args.image_size or encoder.data.get("size", data.size)
    return size


def sides(data: common.ImageSet, args: argparse.Namespace) -> str:
    """A line of small print, if the networks see images of different sizes."""
    encoders, runs = open_networks(args)
    found = {name: side(encoder, data, args) for name, encoder in zip(runs, encoders, strict=True)}
    words = "\nSide of the images: " + ", ".join(f"{size} px for {name}" for name, size in found.items()) + "."
    return words * (len(set(found.values())) > 1)


def extract(
    encoder: common.Encoder, data: common.ImageSet, args: argparse.Namespace,
    describe: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Unit rows (N, D) of all images, or describe(images), at the size and with the statistics of the encoder's run;
    a foreign encoder has those of `data`."""

    def embed(images: Tensor) -> Tensor:
        amp = common.amp_default(args.device) if args.amp is None else args.amp
        with torch.autocast(args.device.type, torch.bfloat16, amp):
            return (describe or encoder.embed)(images)

    def make() -> Tensor:
        mean, std = (encoder.data.get(key) or getattr(data, key) for key in ("mean", "std"))
        shown = dataclasses.replace(data, size=side(encoder, data, args), mean=mean, std=std)
        return common.extract(args.device, shown, embed, args.batch_size)

    # Network and images are kept, too: nothing else can take their ids.
    return make() if describe else keep(args, ("features", id(encoder), id(data)), make)


# ---- images beside images -------------------------------------------------------------------------------------------


class Strip(NamedTuple):
    """The K nearest images of R queries in one network (R, K, 3, S, S), whether right (R, K), names of the classes."""

    title: str
    images: Tensor
    right: Tensor | None  # None: they have no classes
    names: list[list[str]]
    notes: Sequence[str] = ()  # at the end of each row; default: how many are right


def labelled(encoders: Sequence[common.Encoder], args: argparse.Namespace, split: str) -> common.ImageSet:
    """Train or test images of the first encoder's run, those that have a class."""

    def choose() -> common.ImageSet:
        train = load_train(encoders, args)
        own = argparse.Namespace(**vars(args))
        common.images_of_run(own, encoders[0].options)
        data = train if split == "train" else common.load_test(own, train, args.device)
        known = data.labels >= 0
        return data if known.all() else data.select(known.nonzero()[:, 0])

    data = keep(args, (split, encoders[0].sha256), choose)
    if not len(data):
        raise common.Fault(f"{data.name} has no classes: name images that have a folder for each by --data")
    return data


def pictures(data: common.ImageSet, rows: Tensor, args: argparse.Namespace) -> tuple[Tensor, list[str]]:
    """Images at `rows` (R, 3, S, S) in [0, 1], and the names of their classes."""
    images = torch.cat(list(data.centers(rows, args.batch_size, args.device))).cpu()
    return images, [data.classes[label][:10] if label >= 0 else "" for label in data.labels[rows].tolist()]


def strip(title: str, train: common.ImageSet, index: Tensor, right: Tensor | None, args: argparse.Namespace) -> Strip:
    """The images at `index` (R, K) of `train`, right where `right` (R, K)."""
    images, names = pictures(train, index.flatten(), args)
    k = index.shape[1]
    return Strip(title, images.view(*index.shape, *images.shape[1:]), right,
                 [names[i : i + k] for i in range(0, len(names), k)])


def pick_queries(right: Tensor, labels: Tensor, rows: int, seed: int) -> list[int]:
    """`rows` queries with the most right neighbours, then as many with the fewest. right (a number), labels: (Q,).

    Of equally good ones the next is from the class that has the fewest so far, and drawn by `seed`.
    """
    if 2 * rows > len(right):
        raise common.Fault(f"--rows {rows} takes {2 * rows} queries, but there are only {len(right)} test images")
    order = torch.randperm(len(right), generator=common.generator(seed, "gallery")).tolist()
    count, label, chosen = right.tolist(), labels.tolist(), list[int]()
    for sign in (-1, 1):
        seen = Counter[int]()
        for _ in range(rows):
            left = [query for query in order if query not in chosen]
            chosen.append(min(left, key=lambda query: (sign * count[query], seen[label[query]])))
            seen[label[chosen[-1]]] += 1
    return chosen


def spread_out(order: list[int], labels: Tensor, rows: int) -> list[int]:
    """`rows` of the queries in `order`, no class twice before every other came once, in their order. labels: (Q,)."""
    seen, turn, classes = Counter[int](), dict[int, int](), labels.tolist()
    for query in order:
        label = classes[query]
        turn[query], seen[label] = seen[label], seen[label] + 1
    chosen = sorted(order, key=turn.__getitem__)[:rows]
    return [query for query in order if query in chosen]


def draw_gallery(queries: Tensor, names: list[str], strips: list[Strip], parts: dict[str, int]) -> Figure:
    """Queries (R, 3, S, S), to their right the neighbours, framed by whether the class is right, if they have one.

    parts: headings, each with the number of rows below it.
    """
    k = strips[0].images.shape[1]
    pitch, start = 1.08 * k + 0.9 + 0.7 * bool(strips[0].notes), 1.5  # in widths of an image
    tops, headings = list[float](), dict[str, float]()
    for heading, rows in parts.items():
        headings[heading] = 1.36 * len(tops) + 0.75 * len(headings)
        tops += [headings[heading] + 1.36 * row for row in range(rows)]
    width, inches = start + len(strips) * pitch, 0.62 if len(strips) == 1 else 0.5
    titles = [textwrap.fill(strip.title, int(13 * inches * pitch)) for strip in strips]  # 13 letters an inch
    lines = max(title.count("\n") for title in titles)
    figure = Figure((inches * width + 0.2, inches * (tops[-1] + 2.3) + 0.7 + 0.25 * lines), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.1, width), ylim=(tops[-1] + 1.4, -0.9), aspect="equal")
    axes.axis("off")

    def show(image: Tensor, x: float, y: float, color: str, text: str) -> None:
        axes.imshow(image.movedim(0, 2).numpy(), extent=(x, x + 1, y + 1, y))
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=1.8))
        axes.text(x + 0.5, y + 1.06, text, ha="center", va="top", fontsize=5.5, color=color)

    for heading, top in headings.items():
        axes.text(0, top - 0.12, heading, fontweight="bold", va="bottom")
    for image, name, y in zip(queries, names, tops, strict=True):
        show(image, 0, y, "black", name)
    for number, strip in enumerate(strips):
        left = start + number * pitch
        axes.text(left, -0.6, titles[number], va="bottom")
        for row, y in enumerate(tops):
            if strip.right is None:
                for column in range(k):
                    show(strip.images[row, column], left + 1.08 * column, y, "black", "")
                continue
            for column, right in enumerate(strip.right[row].tolist()):
                text = "✓" if right else f"✗ {strip.names[row][column]}"
                show(strip.images[row, column], left + 1.08 * column, y, RIGHT if right else WRONG, text)
            note = strip.notes[row] if strip.notes else f"{int(strip.right[row].sum())}/{k}"
            axes.text(left + 1.08 * k + 0.05, y + 0.5, note, va="center", fontsize=7 if not strip.notes else 6)
    return figure


def compare(
    args: argparse.Namespace, choose: Callable[[Tensor, Tensor], list[int]]
) -> tuple[dict[str, Source], common.ImageSet, common.ImageSet, list[int], list[Strip]]:
    """Runs, training and test images, which of the latter are queries, and a strip of their neighbours in each network.

    choose: labels (Q,) of all test images, how many of their neighbours in the first network are right (Q,) -> queries.
    """
    encoders, runs = open_networks(args)
    train, test = labelled(encoders, args, "train"), labelled(encoders, args, "test")
    chosen, strips = list[int](), list[Strip]()
    for encoder, title in zip(encoders, runs, strict=True):
        queries, keys = extract(encoder, test, args), extract(encoder, train, args)
        index = common.neighbors(queries, keys, args.num_neighbors)[1].cpu()
        right = train.labels[index] == test.labels[:, None]
        chosen = chosen or choose(test.labels, right.sum(1))
        title += f": {100 * right.float().mean():.1f} % right over all {len(test):,} test images"
        strips.append(strip(title, train, index[chosen], right[chosen], args))
    return runs, train, test, chosen, strips


def gallery(args: argparse.Namespace) -> None:
    """Test images and their nearest training images, best and worst cases (NPID, Fig. 5)."""
    runs, train, test, chosen, strips = compare(
        args, lambda labels, right: pick_queries(right, labels, args.rows, args.seed))
    k = args.num_neighbors
    parts = dict[str, int]()
    right = strips[0].right
    assert right is not None
    for word, half in (("best", slice(args.rows)), ("worst", slice(args.rows, None))):
        counts = sorted(set(right[half].sum(1).tolist()))
        span = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
        parts[f"{word} cases: {span} of {k} right"] = args.rows
    note = (f"Left: test images of {test.name}, chosen by neighbours in the first network, seed {args.seed}. Right: "
            f"the {k} nearest of {len(train):,} training images, nearest first; green and ✓: the class is right.")
    figure = draw_gallery(*pictures(test, torch.tensor(chosen), args), strips, parts)
    save(figure, f"Test images and their {k} nearest training images", note + sides(train, args), runs, args.out)


def votes(queries: Tensor, keys: Tensor, train: common.ImageSet) -> tuple[Tensor, Tensor, Tensor]:
    """Class (Q,) of the weighted kNN, its share of the votes (Q,), and the K = 200 neighbours (Q, K), nearest first."""
    parts, labels = list[tuple[Tensor, Tensor, Tensor]](), train.labels.to(keys.device)
    for some in torch.split(queries, 4096):
        similarity, index = common.neighbors(some, keys, min(200, len(keys)))
        scores = common.knn_scores(similarity, labels[index], len(train.classes), 0.07).cpu()  # mps has no float64
        best = scores.max(1)
        parts.append((best.indices, best.values.double() / scores.sum(1), index.cpu()))
    found, share, nearest = map(torch.cat, zip(*parts, strict=True))
    return found, share, nearest


def neighbors(args: argparse.Namespace) -> None:
    """Sure and unsure test images and their neighbours, trained and untrained (Local Aggregation, Fig. 3)."""
    encoders, runs = open_networks(args)
    train, test = labelled(encoders, args, "train"), labelled(encoders, args, "test")
    if args.num_neighbors > len(train):
        raise common.Fault(f"--k {args.num_neighbors} is more than the {len(train)} training images")
    chosen, parts, strips = list[int](), dict[str, int](), list[Strip]()
    for encoder, title in zip(encoders, runs, strict=True):
        found, share, index = votes(extract(encoder, test, args), extract(encoder, train, args), train)
        correct = found == test.labels
        if not chosen:  # by the first network, as far as there are any
            order = share.argsort(descending=True, stable=True)
            right, wrong = order[correct[order]].tolist(), order[~correct[order]].tolist()
            sure = spread_out(right, test.labels, args.rows)
            unsure = spread_out(wrong[::-1], test.labels, args.rows)[::-1]
            chosen = sure + unsure
            headings = {"right and surest": len(sure), "wrong and least sure": len(unsure)}
            parts = {heading: rows for heading, rows in headings.items() if rows}
        title += f": kNN accuracy {100 * correct.double().mean():.1f} %"
        nearest = index[chosen, : args.num_neighbors]
        shown = strip(title, train, nearest, train.labels[nearest] == test.labels[chosen, None], args)
        results = [f"{train.classes[found[query]][:10]}\n{100 * share[query]:.0f} %" for query in chosen]
        strips.append(shown._replace(notes=results))
    note = (f"Left: test images of {test.name}, of each class the one that the first network is surest of (below: "
            "least sure of and wrong), of these the surest (least sure). After each row the "
            f"class that the weighted kNN (K = {index.shape[1]}, tau = 0.07) finds, and its share of the votes; "
            f"{len(train):,} training images, nearest first; green and ✓: the class is right.")
    figure = draw_gallery(*pictures(test, torch.tensor(chosen), args), strips, parts)
    save(figure, "Nearest neighbours by confidence", note + sides(train, args), runs, args.out)


def retrieval(args: argparse.Namespace) -> None:
    """Retrievals of two networks side by side, for queries drawn at random (CLD, Fig. A.3); images without classes are
    each other's queries (DeepCluster, Fig. 5.3)."""
    if len(args.runs) != 2:
        raise common.Fault(f"retrieval compares two networks, not {len(args.runs)}: name two runs, or one")

    def choose(labels: Tensor, right: Tensor) -> list[int]:
        if args.rows > len(labels):
            raise common.Fault(f"--rows {args.rows} is more than the {len(labels)} images to choose from")
        order = torch.randperm(len(labels), generator=common.generator(args.seed, "retrieval")).tolist()
        return sorted(spread_out(order, labels, args.rows), key=lambda query: -int(right[query]))

    encoders, runs = open_networks(args)
    train = load_train(encoders, args)
    if (train.labels >= 0).any():
        runs, train, test, chosen, strips = compare(args, choose)
        note = (f"Left: test images of {test.name}, drawn by seed {args.seed}, a class at most once more than any "
                f"other, sorted by the first network. Right: the {args.num_neighbors} nearest of {len(train):,} "
                "training images; green and ✓: the class is right.")
    else:
        test, chosen, strips = train, choose(train.labels, train.labels), list[Strip]()
        rows = torch.tensor(chosen, device=args.device)
        for encoder, title in zip(encoders, runs, strict=True):
            features = extract(encoder, train, args)
            index = common.neighbors(features[rows], features, args.num_neighbors, exclude=rows)[1].cpu()
            strips.append(strip(title, train, index, None, args))
        note = (f"Left: images of {train.name}, drawn by seed {args.seed}. Right: of all {len(train):,} but itself the "
                f"{args.num_neighbors} nearest.")
    figure = draw_gallery(*pictures(test, torch.tensor(chosen), args), strips, {"random queries": args.rows})
    save(figure, "Retrievals side by side", note + sides(train, args), runs, args.out)


# ---- curves ----------------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]  # an epoch each
AXES = {"epoch": "epoch", "loss": "loss", "knn_top1": "top-1 in %"}
PANELS = {"Training loss": ("epoch", "loss"), "kNN accuracy": ("epoch", "knn_top1"),
          "kNN accuracy against loss": ("loss", "knn_top1")}


def read_log(name: str) -> tuple[Source, Rows, float | None]:
    """What was run, its epochs, and the loss of equal probabilities; None where noise is drawn: old logs differ."""
    path = folder_of(name) / "log.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True)
        header, *rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may not be whole yet
        rows = [row for row in rows if "epoch" in row and "loss" in row]
        folder, epochs = path.resolve().parent.name, max(row["epoch"] for row in rows)
        options = header["options"] | {key: header[key] for key in ("queue_size",) if key in header}  # the one in use
        options["epochs"] = max(options["epochs"], epochs)  # a run that had ended may have been trained on
        source = Source(folder, options, dict(header["data"]), header["git"], epochs)
        str(source)
    except OSError as error:
        raise common.Fault(f"cannot read {path} ({error.strerror}): name the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise common.Fault(f"{path} is no log of these scripts, or has no epoch yet") from None
    noise = {"nce", "sampled"} & {source.options.get("loss"), source.options.get("warmup_loss")}
    return source, rows, None if noise else header.get("chance_loss")


def series(runs: Sequence[Rows], x: str, y: str) -> Tensor:
    """(runs, E, 2): x and y of the E epochs in which every run has both."""
    found = [{row["epoch"]: (row[x], row[y]) for row in rows if x in row and y in row} for rows in runs]
    epochs = sorted(set(found[0]).intersection(*found[1:]))
    return torch.tensor([[values[epoch] for epoch in epochs] for values in found], dtype=torch.float64)


def draw_curves(groups: dict[str, list[Rows]], chance: dict[str, float], compare: bool) -> Figure:
    """Loss, kNN accuracy and, if `compare`, the one over the other; a group's runs differ in the seed alone."""
    monitored = any("knn_top1" in row for runs in groups.values() for rows in runs for row in rows)
    panels = list(PANELS.items())[: 2 + compare if monitored else 1]
    figure = Figure((3.6 * len(panels) + 0.6 + 2.4 * (not monitored), 3.6), layout="constrained")
    for axes, (title, (x, y)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(title=title, xlabel=AXES[x], ylabel=AXES[y])
        ends, digits = [], 2 if y == "loss" else 1
        for number, (label, runs) in enumerate(groups.items()):
            points, several, color = series(runs, x, y), len(runs) > 1, COLORS[number % 7]
            if not points.numel():
                continue
            for line in points if several else ():
                axes.plot(*line.T, color=color, linewidth=0.6, alpha=0.5)
            label += f" (mean of {len(runs)} seeds)" * several
            axes.plot(*points.mean(0).T, **look(number), markersize=3, label=label)
            where, end = points[:, -1, 0].mean().item(), points[:, -1, 1]
            text = f"{end.mean():.{digits}f}" + (f" ± {end.std():.{digits}f}" if several else "")
            ends.append((end.mean().item(), where, text, color))
        for text, level in chance.items() if y == "loss" else ():
            mark(axes, level, text)
        if x == "loss":
            axes.invert_xaxis()
            continue
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        low, high = axes.get_ylim()
        above = -math.inf  # values at the ends of lines, moved apart where they would overlap
        for value, where, text, color in sorted(ends):
            above = max(value, above + 0.055 * (high - low))
            axes.text(where, above, f"  {text}", va="center", color=color, fontsize=7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    beside = 2 * max(map(len, labels), default=0) < 14 * (figure.get_figwidth() - 2)  # of the title, in letters
    figure.legend(handles, labels, loc="outside upper right", ncols=min(1 + beside, len(groups)))
    return figure


def curves(args: argparse.Namespace) -> None:
    """Loss and kNN accuracy over the epochs of one or more runs (NPID, Fig. 3 and 4)."""
    groups, chance = dict[str, list[tuple[Source, Rows]]](), dict[str, float]()
    for name in args.runs:
        source, rows, level = read_log(name)
        key = experiment(source)
        while source.options["seed"] in [other.options["seed"] for other, _ in groups.get(key, [])]:
            key += name  # the same run once more, perhaps of changed code: not another seed
        groups.setdefault(key, []).append((source, rows))
        if level is not None:
            equal = abs(level - math.log(source.data["images"])) < 1e-3
            chance[f"chance, {'ln N = ' * equal}{level:.2f}"] = level
    sources = [pooled([source for source, _ in members]) for members in groups.values()]
    same = len({(source.options["script"], source.options.get("loss")) for source in sources}) == 1
    runs, lines = legend(sources), [[rows for _, rows in members] for members in groups.values()]
    figure = draw_curves(dict(zip(runs, lines, strict=True)), chance, compare=same)
    save(figure, "Learning curves", "", runs, args.out)


# ---- density ---------------------------------------------------------------------------------------------------------


def draw_density(panels: dict[str, dict[str, Tensor]]) -> Figure:
    """A histogram over images for each network, in a panel for each kind of density."""
    figure = Figure((8.4, 3.4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        room = 1.05 + 0.1 * len(lines)  # the legend stands above the histograms
        every = torch.cat(list(lines.values()))
        bins = torch.linspace(every.min().item(), every.max().item() + 1e-6, 61, dtype=torch.float64).tolist()
        for number, (label, values) in enumerate(lines.items()):
            color, dashes, mean = COLORS[number % 7], look(number)["linestyle"], values.mean().item()
            share = [100 / len(values)] * len(values)
            for style in (dict(histtype="stepfilled", alpha=0.25), dict(histtype="step", linestyle=dashes)):
                axes.hist(values.tolist(), bins, weights=share, color=color, **style)
            axes.axvline(mean, 0, 1 / room, color=color, linestyle=dashes, label=f"{label}: mean {mean:.3f}")
        axes.set(title=title, xlabel="mean dot product", ylabel="% of images in a bin")
        axes.set_ylim(top=axes.get_ylim()[1] * room)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.legend(loc="upper left", fontsize=7)
    return figure


def density(args: argparse.Namespace) -> None:
    """How closely features lie around each image, and in its wider surroundings (Local Aggregation, Fig. 2)."""
    encoders, runs = open_networks(args)
    banks = all(encoder.bank is not None for encoder in encoders) and not {"data", "subset"} & set(args.typed)
    kind = args.features or ("bank" if banks else "clean")
    if kind == "bank" and {"data", "subset"} & set(args.typed):
        raise common.Fault("--features bank has the images of the run: leave --data and --subset out")
    data = load_train(encoders, args) if kind == "clean" else None
    near, far, ranks, counts = dict[str, Tensor](), dict[str, Tensor](), set[tuple[int, int, int]](), set[str]()
    for encoder, (label, source) in zip(encoders, runs.items(), strict=True):
        features = encoder.bank if data is None else extract(encoder, data, args)
        if features is None:
            raise common.Fault(f"{source.name} has no memory bank: use --features clean")
        features = features.to(args.device).float()
        if not features.isfinite().all():
            raise common.Fault(f"the features of {source.name} are not finite")
        if len(features) < 10:
            raise common.Fault(f"{len(features)} images are too few to tell near ones from the background")
        rows = torch.randperm(len(features), generator=common.generator(args.seed, "density"))[: args.images]
        ranks.add(local_aggregation.density_ranks(len(features)))
        counts.add(f"{len(rows):,} of {len(features):,}")
        parts = [local_aggregation.density(features, part) for part in torch.split(rows.to(args.device), 1024)]
        near[label], far[label] = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    titles = ("Local density: " + " or ".join(f"the {local} nearest" for local in sorted({rank[0] for rank in ranks})),
              "Background density: " + " or ".join(f"ranks {first:,} to {last:,}" for _, first, last in sorted(ranks)))
    words = "of the memory bank, as training left them" if data is None else f"of {data.name}, without augmentation"
    note = f"Features {words}; {' or '.join(sorted(counts))} images, each against all others."
    note += "" if data is None else sides(data, args)
    figure = draw_density(dict(zip(titles, (near, far), strict=True)))
    save(figure, "Density of the embedding", note, runs, args.out)


# ---- mds -------------------------------------------------------------------------------------------------------------


def embed_mds(features: Tensor) -> Tensor:
    """Metric MDS (N, 2) of the Euclidean distances between rows (N, D): scikit-learn's, from the principal plane on."""
    from sklearn.manifold import MDS

    x = features.cpu().double()  # in this order: mps has no float64
    left, scale, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    if scale[0] <= 1e-6 * x.norm():
        raise common.Fault(f"the features of the {len(x)} images are all the same: there is nothing to see")
    start = F.pad(left[:, :2] * scale[:2], (0, max(0, 2 - len(scale))))
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of defaults that are not used here
        found = MDS(2, n_init=1, max_iter=1000, eps=1e-7).fit_transform(x.numpy(), init=start.numpy())
    return torch.from_numpy(found)


def two_parts(points: Tensor) -> tuple[Tensor, float]:
    """The parts of points (N, 2) that k-means finds, (N,), and their separation: distance over the mean spread."""
    found = common.kmeans(points, 2, seed=0)
    inside = (points.float() - found.centroids[found.labels.long()]).norm(dim=1).mean()
    return found.labels.cpu().long(), float((found.centroids[0] - found.centroids[1]).norm() / (inside + 1e-12))


class Cloud(NamedTuple):
    """A panel of MDS: points (N, 2) of the classes (N,), names of the classes, the images (N, 3, S, S)."""

    title: str
    points: Tensor
    labels: Tensor
    names: dict[int, str]
    images: Tensor


def draw_mds(clouds: list[Cloud]) -> Figure:
    """A panel for each cloud. Grey boxes: the class that falls apart most, three images from each of its two parts."""
    rows = len(clouds) // 2
    figure = Figure((9, 4.0 * rows + 0.7), layout="constrained")
    for axes, cloud in zip(figure.subplots(rows, 2, squeeze=False).flat, clouds, strict=True):
        split = dict[int, tuple[Tensor, float]]()
        for number, (label, name) in enumerate(cloud.names.items()):
            own = cloud.points[cloud.labels == label]
            split[label] = two_parts(own)
            axes.scatter(*own.T.numpy(), s=13, color=COLORS[number % 7], marker="osD^vP"[number % 6], label=name,
                         alpha=0.75, linewidths=0)
        label = max(split, key=lambda key: split[key][1])
        own, images = cloud.points[cloud.labels == label], cloud.images[cloud.labels == label]
        for part in range(2):
            members = (split[label][0] == part).nonzero()[:, 0]
            center = own[members].mean(0)
            nearest = members[(own[members] - center).norm(dim=1).argsort()[:3]]
            zoom = 26 / images.shape[-1]
            boxes: list[Any] = [OffsetImage(images[row].movedim(0, 2).numpy(), zoom=zoom) for row in nearest.tolist()]
            where = (0.2 + 0.6 * (float(center[0]) > float(own[:, 0].mean())), 0.07)
            axes.add_artist(AnnotationBbox(HPacker(children=boxes, pad=0, sep=2), tuple(center.tolist()), where,
                                           boxcoords="axes fraction", arrowprops=dict(arrowstyle="-", color="0.5"),
                                           bboxprops=dict(edgecolor="0.5", linewidth=1.2), pad=0.2))
        (x, y), reach = cloud.points.mean(0).tolist(), float((cloud.points - cloud.points.mean(0)).abs().max())
        title = textwrap.fill(f"{cloud.title}; boxes: {cloud.names[label].split(',')[0]}", 44)  # the panel's width
        axes.set(title=title, aspect="equal", xlabel="first axis", ylabel="second axis", xticks=[], yticks=[],
                 xlim=(x - 1.1 * reach, x + 1.1 * reach), ylim=(y - 1.4 * reach, y + 1.1 * reach))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return figure


def mds(args: argparse.Namespace) -> None:
    """Training images of classes with high and with low kNN accuracy in the plane (Local Aggregation, Fig. 4)."""
    encoders, runs = open_networks(args)
    train, test = labelled(encoders, args, "train"), labelled(encoders, args, "test")
    clouds = list[Cloud]()
    counts, tests = (torch.bincount(data.labels, minlength=len(train.classes)) for data in (train, test))
    present = ((counts > 2) & (tests > 0)).nonzero()[:, 0].tolist()
    count = min(args.classes, len(present) // 2)
    if not count:
        raise common.Fault(f"{train.name} has fewer than two classes with three training images and a test image")
    for encoder, name in zip(encoders, runs, strict=True):
        keys = extract(encoder, train, args)
        correct = votes(extract(encoder, test, args), keys, train)[0] == test.labels
        hits = torch.bincount(test.labels, correct.double(), len(train.classes))
        accuracy = (100 * hits / tests.clamp(min=1)).tolist()
        order = sorted(present, key=lambda label: -accuracy[label])
        for word, labels in (("high", order[:count]), ("low", order[-count:])):
            source = common.generator(args.seed, "mds")
            rows = [(train.labels == label).nonzero()[:, 0] for label in labels]
            index = torch.cat([own[torch.randperm(len(own), generator=source)[: args.images]] for own in rows])
            images = pictures(train, index, args)[0]
            names = {label: f"{train.classes[label][:14]}, {accuracy[label]:.0f} %" for label in labels}
            title = f"{name}: {word} accuracy" if len(runs) > 1 else f"classes with {word} kNN accuracy"
            clouds.append(Cloud(title, embed_mds(keys[index]), train.labels[index], names, images))
    note = (f"Metric MDS (Euclidean) of the features of at most {args.images} training images of each class, drawn by "
            f"seed {args.seed}; each panel on its own. In the legend each class's kNN accuracy among {len(test):,} "
            "test images.\nGrey boxes: the class that falls most clearly into two parts, and the images next to the "
            "centre of each part.")
    save(draw_mds(clouds), "The embedding in the plane", note + sides(train, args), runs, args.out)


# ---- filters ---------------------------------------------------------------------------------------------------------


def first_filters(network: nn.Module) -> Tensor:
    """Filters of the first convolution (C, 3, k, k), or those composed with Sobel's (C, 1, k + 2, k + 2)."""
    weight = next(module.weight for module in network.modules() if isinstance(module, nn.Conv2d)).detach().cpu().float()
    sobel = next((module for module in network.modules() if isinstance(module, common.Sobel)), None)
    return weight if sobel is None else F.conv_transpose2d(weight, sobel.kernels.cpu())


def draw_filters(panels: dict[str, Tensor]) -> Figure:
    """The filters of each network side by side, each from its own darkest to its own brightest value."""
    figure = Figure((4.2 * len(panels) + 0.4, 4.9), layout="constrained")
    for axes, (title, filters) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
        tiles = F.pad((filters - low) / (high - low + 1e-12), (1, 0, 1, 0), value=1.0)
        mosaic = make_grid(tiles, nrow=math.ceil(len(tiles) ** 0.5), padding=0, pad_value=1.0)
        axes.imshow(mosaic.movedim(0, 2).numpy(), interpolation="nearest")
        axes.set_title(title, wrap=True)
        axes.axis("off")
    return figure


def filters(args: argparse.Namespace) -> None:
    """Filters of the first layer, with Sobel's composed (DeepCluster, Fig. 5.2)."""
    encoders, runs = open_networks(args)
    panels = dict[str, Tensor]()
    for encoder, name in zip(encoders, runs, strict=True):
        found = first_filters(encoder.backbone)
        kind = "on RGB" if found.shape[1] == 3 else "on Sobel's gradients, composed with them"
        panels[f"{name}\n{len(found)} filters of {found.shape[2]} x {found.shape[3]} {kind}"] = found
    note = "Each filter from its own smallest (dark) to its own largest weight (bright)."
    save(draw_filters(panels), "Filters of the first layer", note, runs, args.out)


# ---- maximize --------------------------------------------------------------------------------------------------------

STAGES = ["conv1", "conv2", "conv3", "conv4", "conv5"]
CONTRAST = 0.35  # of the noise from which ascent starts, in standard deviations of the training images
LOUDEST = 1e3  # contrast at which it ends at most
RATE = 0.2  # length of a step, in RMS of the image
STARTS = 2  # noise images from which a channel starts


def rms(images: Tensor) -> Tensor:
    """Root of the mean square of each image: (B, 3, S, S) -> (B, 1, 1, 1)."""
    return images.square().mean((1, 2, 3), keepdim=True).sqrt()


def ascend(maps: Callable[[Tensor], Tensor], images: Tensor, peak: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) after at most `steps` of ascent on the mean of their channel's map, and that mean (B,).

    maps: images -> each one's map (B, H, W), not negative. A step is RATE times the image's RMS long, along the
    gradient of the mean, or where `peak` (B,) of the map's largest place: it can grow where the rest falls silent. Of
    all images on the way the one with the highest mean is returned. Regularised as in the thesis, by the L2 norm and a
    blur every 5 steps; but the norm is set, not penalised: it grows by the same factor at each step, to an RMS of
    LOUDEST. Left to itself it stays small in many channels: grey fires them by their bias, and all that is near to
    grey less. A step that ends in silence, where no gradient is, is taken again at a quarter of its length and of its
    growth; an image that has to do so often ends below LOUDEST.
    """
    sigma, first = torch.full((len(images),), 0.4, device=images.device), rms(images)
    last, slope, size, way, last_way = images, images * 0, first**0, first * 0, first * 0
    best, found = images, torch.zeros(len(images), device=images.device)
    for step in range(steps + 1):
        images = images.detach().requires_grad_()
        fired = maps(images).flatten(1)
        activation = fired.mean(1)
        (gradient,) = torch.autograd.grad(torch.where(peak, fired.amax(1), activation).sum(), images)
        images, activation = images.detach(), activation.detach()
        better, live = ((activation > level)[:, None, None, None] for level in (found, 0))
        best, found = torch.where(better, images, best), torch.maximum(found, activation)
        last, slope = torch.where(live, images, last), torch.where(live, gradient, slope)
        last_way, size = torch.where(live, way, last_way), torch.where(live, (1.5 * size).clamp(max=1), size / 4)
        images = last + RATE * size * rms(last) * slope / rms(slope).clamp(min=1e-12)
        if step % 5 == 4:
            images = common.gaussian_blur(images, sigma, 5)
        way = (last_way + size / steps).clamp(max=1)
        images = images * (first * (LOUDEST / first) ** way / rms(images))
    return best, found


class Optima(NamedTuple):
    """Of C channels: the images that fire them most (C, 3, S, S), and the mean activation of the maps (C,) on noise, on
    noise of those images' contrast and on those images."""

    images: Tensor
    before: Tensor
    loud: Tensor
    after: Tensor


def optima(network: Any, stage: int, channels: Tensor, noise: Tensor, steps: int) -> Optima:
    """Ascent for `channels` (C,) of a stage, each of which some of the noise images (B, 3, S, S) fire.

    Activation is the mean of a channel's map after its ReLU; on noise, the mean over all noise images, silent ones too.
    Each channel starts from the STARTS of them that fire it most, since silence has no gradient, towards the mean of
    its map and towards its largest place; of the four results the one with the highest mean is kept.
    """
    with torch.no_grad():
        rest = network.stages(noise)[stage].mean((2, 3))[:, channels]
    start = rest.topk(STARTS, 0).indices.repeat(2, 1)  # (2 STARTS, C)
    channel, place = channels.repeat(2 * STARTS), torch.arange(start.numel(), device=noise.device)

    def maps(images: Tensor) -> Tensor:
        fired: Tensor = network.stages(images)[stage][place, channel]
        return fired

    images, after = ascend(maps, noise[start.flatten()], place >= len(place) // 2, steps)
    after, best = after.view(start.shape).max(0)
    images = images.view(*start.shape, *noise.shape[1:])[best, place[: len(channels)]]
    with torch.no_grad():
        loud = [network.stages(noise / rms(noise) * contrast)[stage][:, index].mean()
                for index, contrast in zip(channels.tolist(), rms(images), strict=True)]
    return Optima(images, rest.mean(0), torch.stack(loud), after)


class Channel(NamedTuple):
    """A channel's image by ascent (3, S, S) in [0, 1]; its mean activation on noise, on noise of that image's contrast
    and on that image; its 9 images."""

    title: str
    optimum: Tensor
    before: float
    loud: float
    after: float
    images: Tensor


def stretch(images: Tensor) -> Tensor:
    """(B, 3, S, S) -> [0, 1]: each image's mean becomes grey, two standard deviations span the range."""
    mean, std = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
    return (0.5 + (images - mean) / (4 * std + 1e-12)).clamp(0, 1)


def draw_maximize(rows: dict[str, list[Channel]]) -> Figure:
    """A row for each stage; of each channel the optimum, and beside it the 9 images that fire it most."""
    columns = max(len(channels) for channels in rows.values())
    figure = Figure((1.75 * columns + 0.7, 1.08 * len(rows) + 0.9), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.5, 6.9 * columns), ylim=(4.1 * len(rows), -0.9), aspect="equal")
    axes.axis("off")
    for row, (stage, channels) in enumerate(rows.items()):
        axes.text(-0.4, 4.1 * row + 1.5, stage, rotation=90, va="center", ha="right", fontsize=9)
        for column, channel in enumerate(channels):
            x, y = 6.9 * column, 4.1 * row
            axes.imshow(channel.optimum.movedim(0, 2).numpy(), extent=(x, x + 3, y + 3, y))
            axes.text(x, y - 0.08, channel.title, fontsize=6, va="bottom")
            raised = " → ".join(f"{v:.2g}" if v < 10 else f"{v:,.0f}" for v in (channel.before, channel.after))
            axes.text(x + 6.15, y - 0.08, raised, fontsize=6, va="bottom", ha="right")
            for place, image in enumerate(channel.images):
                left, top = x + 3.15 + place % 3, y + place // 3
                axes.imshow(image.movedim(0, 2).numpy(), extent=(left, left + 0.96, top + 0.96, top))
    return figure


def maximize(args: argparse.Namespace) -> None:
    """Images by gradient ascent on channels of each stage, and those that fire them most (DeepCluster, Fig. 5.4)."""
    encoders, runs = open_networks(args)
    if len(encoders) > 1:
        raise common.Fault("maximize looks into one network: name one run")
    network = encoders[0].staged()
    data = load_train(encoders, args)
    data = data.select(torch.randperm(len(data), generator=common.generator(args.seed, "images"))[: args.images])
    wanted = [STAGES.index(stage) for stage in args.stages]

    def means(images: Tensor) -> Tensor:
        return torch.cat([network.stages(images)[stage].mean((2, 3)) for stage in wanted], 1)

    size = side(encoders[0], data, args)
    widths = [maps.shape[1] for maps in network.stages(torch.zeros(1, 3, size, size, device=args.device))]
    fired = torch.split(extract(encoders[0], data, args, means).cpu(), [widths[stage] for stage in wanted], 1)
    rows = dict[str, list[Channel]]()
    for stage, activation in zip(wanted, fired, strict=True):
        source = common.generator(args.seed, "maximize", stage)
        noise = CONTRAST * torch.randn(16, 3, size, size, generator=source).to(args.device)
        with torch.no_grad():
            fires = network.stages(noise)[stage].mean((2, 3)).amax(0).cpu() > 0
        alive = ((activation.amax(0) > 0) & fires).nonzero()[:, 0]
        chosen = alive[torch.randperm(len(alive), generator=source)[: args.channels]].sort().values
        if not len(chosen):
            continue
        most = optima(network, stage, chosen.to(args.device), noise, args.steps)
        levels = (level.tolist() for level in (most.before, most.loud, most.after))
        channels = rows[STAGES[stage]] = []
        found = zip(chosen.tolist(), stretch(most.images).cpu(), *levels, strict=True)
        for index, optimum, before, loud, after in found:
            top = activation[:, index].topk(min(9, len(data))).indices
            channels.append(Channel(f"channel {index}", optimum, before, loud, after, pictures(data, top, args)[0]))
    drawn = [channel for channels in rows.values() for channel in channels]
    if not drawn:
        raise common.Fault(f"{args.runs[0]}: no channel of {', '.join(args.stages)} fires on both noise and images")
    raised = sorted(channel.after / max(channel.before, 1e-12) for channel in drawn)
    above = sorted(channel.after / max(channel.loud, 1e-12) for channel in drawn)
    note = (f"Large: the best image of four ascents of {args.steps} steps on a channel's map, from noise of {CONTRAST} "
            f"times the training images' contrast to 1,000 times at most, blurred every 5 steps; shown at one "
            f"contrast. Above it the channel, drawn by seed {args.seed} from those that neither noise nor the training "
            f"images leave silent, and its mean activation on the noise and on the image: "
            f"{raised[len(raised) // 2]:,.0f} times as much in the median, {raised[0]:,.0f} at least; compared with "
            f"noise of the image's contrast {above[len(above) // 2]:,.0f} and {above[0]:.1f}. Small: the 9 of "
            f"{len(data):,} training images with the highest mean activation.")
    save(draw_maximize(rows), "What fires a channel most", note, runs, args.out)


# ---- edges -----------------------------------------------------------------------------------------------------------


def edge_curve(options: dict[str, Any], rows: Rows) -> list[tuple[int, float]]:
    """Epochs trained so far, ratio edge intra-class, where it was measured: other epochs have none or repeat it."""
    points, last = list[tuple[int, float]](), None
    for row in rows:
        found, trained = row.get("ratio_edge"), row["epoch"] - 1
        if found is not None and (found != last or trained % options["reassign_every"] == 0):
            points.append((trained, found))
        last = found
    return points


def draw_edges(boxes: dict[str, Tensor], chance: float, curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Box plots over classes of the networks, and means over the epochs of the runs."""
    panels = bool(boxes) + bool(curves)
    figure = Figure((4.4 * panels + 0.6, 3.8), layout="constrained")
    left, right = (figure.subplots(1, 2) if panels == 2 else [figure.subplots()] * 2)
    if boxes:
        shown = [values[~values.isnan()].tolist() for values in boxes.values()]
        left.boxplot(shown, widths=0.5, showmeans=True, medianprops=dict(color=COLORS[4], linewidth=1.6),
                     meanprops=dict(marker="D", markerfacecolor="black", markeredgecolor="black", markersize=4))
        for place, values in enumerate(shown, 1):
            mean = sum(values) / len(values)
            left.annotate(f"{mean:.1f}", (place + 0.3, mean), va="center", fontsize=7)
        mark(left, chance, f"random graph {chance:.1f}")
        left.set(title=f"{len(shown[0])} classes, final network", ylabel="edges that stay in their class, %")
        left.set_xticks(range(1, len(boxes) + 1), [textwrap.fill(name, 16) for name in boxes], fontsize=7)
    if curves:
        for number, (name, points) in enumerate(curves.items()):
            right.plot(*zip(*points, strict=True), **look(number), markersize=3, label=name)
        right.set(title="mean over classes", xlabel="epochs trained", ylabel="edges that stay in their class, %")
        right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        right.legend(fontsize=7)
    return figure


def descriptors(encoder: common.Encoder, data: common.ImageSet, args: argparse.Namespace) -> Tensor:
    """Unit rows (N, D) of all images; of DeepCluster's networks what it clusters: of the backbone's output before its
    last ReLU the whitened principal components."""
    if encoder.options.get("script") != "deepcluster":
        return extract(encoder, data, args)
    h = extract(encoder, data, args, functools.partial(encoder.backbone, relu_last=False))
    projection, offset, *_ = deepcluster.pca_of(h, encoder.options["feature_dim"])
    return torch.cat([deepcluster.whiten(rows, projection, offset) for rows in torch.split(h, 4096)])


def edges(args: argparse.Namespace) -> None:
    """Ratio edge intra-class, box plots and curves (DeepCluster, Fig. 4.1, 4.2, 4.4 to 4.7, 4.9, 4.10)."""
    sources, points = list[Source](), list[list[tuple[int, float]]]()
    drawn = [name for name in args.runs if Path(name).is_file() or Path(name, "checkpoint.pth").exists()]
    for name in args.runs:
        if name != "random" and (folder_of(name) / "log.jsonl").exists():
            try:
                source, rows, _ = read_log(name)
            except common.Fault:
                if name in drawn:  # in its first epoch a run has a network, but no curve
                    continue
                raise
            sources.append(source)
            points.append(edge_curve(source.options, rows))
    if not drawn and not any(points):
        raise common.Fault(f"{args.runs[0]} has neither a checkpoint nor a log with ratio_edge")
    boxes, chance, notes, runs = dict[str, Tensor](), math.nan, list[str](), dict[str, Source]()
    if drawn:
        named = [name for name in args.runs if name in (*drawn, "random")]
        boxed = argparse.Namespace(**vars(args) | dict(runs=named))
        encoders, runs = open_networks(boxed)
        data = labelled(encoders, args, "train")
        itself = torch.arange(len(data), device=args.device)
        for encoder, name in zip(encoders, runs, strict=True):
            features = descriptors(encoder, data, args)
            nearest = common.neighbors(features, features, args.num_neighbors, exclude=itself)[1].cpu()
            boxes[name] = 100 * common.ratio_edge_intra_class(nearest, data.labels)
        sizes = torch.bincount(data.labels).double()
        chance = float((100 * (sizes[sizes > 0] - 1) / (len(data) - 1)).mean())
        notes.append(f"Box plots: {args.num_neighbors} nearest neighbours among {len(data):,} training images of "
                     f"{data.name}, of DeepCluster's networks by whitened features before the last ReLU; orange: "
                     "median, diamond and number: mean, box: quartiles, whiskers: the last class "
                     "within 1.5 times their distance; rings: classes beyond." + sides(data, boxed))
    if any(points):
        notes.append("Curves: from the logs, 10 neighbours, by the descriptors that are clustered.")
    known = legend(sources)  # as the boxes are, whoever has a curve
    curves = {name: found for name, found in zip(known, points, strict=True) if found}
    figure, logs = draw_edges(boxes, chance, curves), {name: known[name] for name in curves}
    save(figure, "Ratio edge intra-class", "\n".join(notes), runs | logs, args.out)


# ---- pca -------------------------------------------------------------------------------------------------------------


def variance_kept(features: Tensor) -> Tensor:
    """Share in percent of the variance of rows (N, D) that the 1, 2, ... D largest eigenvalues have, (D,)."""
    total, square, count = deepcluster.moments(torch.split(features, 8192), features.shape[1], features.device)
    mean = total / count
    values: Tensor = torch.linalg.eigvalsh(square / count - mean.outer(mean)).flip(0).clamp(min=0)
    return 100 * values.cumsum(0) / values.sum().clamp(min=1e-300)


def draw_pca(curves: dict[str, Tensor]) -> Figure:
    """Share of the variance against the number of components, at most 256."""
    figure = Figure((5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (name, kept) in enumerate(curves.items()):
        shown = kept[:256].tolist()
        axes.plot(range(1, len(shown) + 1), shown, **look(number), markevery=0.1, markersize=4,
                  label=f"{name}: {shown[0]:.0f} % in the first")
    axes.set(xscale="log", xlabel="k, largest eigenvalues", ylabel="variance retained, %", ylim=(0, 102),
             title="share of the variance in k principal directions")
    ticks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= max(len(kept) for kept in curves.values())]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.legend()
    return figure


def pca(args: argparse.Namespace) -> None:
    """Share of the variance that the largest eigenvalues keep, before whitening (DeepCluster, Fig. 4.3)."""
    encoders, runs = open_networks(args)
    data = load_train(encoders, args)
    curves = dict[str, Tensor]()
    for encoder, name in zip(encoders, runs, strict=True):
        network: Any = encoder.backbone
        before_relu = functools.partial(network, relu_last=False) if args.layer != "head" else None
        curves[name] = variance_kept(extract(encoder, data, args, before_relu))
    layer = "Unit features of the heads" if args.layer == "head" else "Features of the backbones, before the last ReLU"
    note = f"{layer}; {len(data):,} training images of {data.name}."
    save(draw_pca(curves), "Principal components", note + sides(data, args), runs, args.out)


# ---- pictures from evaluations ---------------------------------------------------------------------------------------


def read_eval(name: str, baselines: bool = False) -> Rows:
    """The lines of eval.jsonl beside a run's checkpoint, oldest first, but for those of a checkpoint that has changed
    since; baselines: those of untrained networks, too."""
    path = folder_of(name) / "eval.jsonl"
    try:
        *lines, rest = path.read_text().split("\n")
        rows = [json.loads(line) for line in lines]
        with contextlib.suppress(ValueError):  # half a line, left by a kill; the next result takes its place
            rows.append(json.loads(rest))
    except OSError:
        return []
    except ValueError:
        raise common.Fault(f"{path} is no list of results: each line has to be JSON") from None
    rows = [row for row in rows if isinstance(row, dict)]
    names = [Path(str(row.get("checkpoint"))).name for row in rows]
    now = {name: checksum(path.parent / name) for name in set(names)}
    same = [now[name] in (None, row.get("checkpoint_sha256", now[name])) for row, name in zip(rows, names, strict=True)]
    if not all(same):
        note = f"{same.count(False)} results in {path} are left out: the checkpoint has changed since"
        print(f"note: {note}", file=sys.stderr)
    rows = [row for row, kept in zip(rows, same, strict=True) if kept]
    return rows if baselines else [row for row in rows if row.get("checkpoint") not in ("random", "pixels")]


def checksum(path: Path) -> str | None:
    """The checkpoint_sha256 that results of this file would have now; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def read_current(name: str, baselines: bool = False) -> Rows:
    """As read_eval, of the run's own files alone: not of copies of earlier epochs beside them."""
    own = ("checkpoint.pth", "backbone.pth", "random", "pixels")
    return [row for row in read_eval(name, baselines) if Path(row.get("checkpoint", own[0])).name in own]


def of_set(rows: Rows, data: str | None) -> Rows:
    """The results on a data set; if there are none, as of a network whose own images have no classes, those on any."""
    return [row for row in rows if row.get("data") == data] or rows


def last(rows: Rows, key: str) -> float | None:
    """The figure that was measured last, if any."""
    return next((float(row[key]) for row in reversed(rows) if row.get(key) is not None), None)


def agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the values that both have are the same: older results have fewer."""
    return all(one[key] == other[key] for key in one.keys() & other.keys())


def knn_results(runs: dict[str, Rows], k: int) -> dict[str, Rows]:
    """Of each run that was evaluated with this K the kNN with tau = 0.07 on the head's features, with training and test
    images that were chosen alike in all runs, best all test images: entries of "knn", with the rest of their line."""
    entries = {name: [row | entry for row in rows for entry in row.get("knn", []) if entry["num_neighbors"] == k]
               for name, rows in runs.items()}
    usual = dict(temperature=0.07, layer="head")
    found = {name: [row for row in rows if agree(row, usual)] for name, rows in entries.items() if rows}
    choices = [{key: row[key] for key in ("train_features", "subset", "test_subset", "image_size") if key in row}
               for row in next(iter(found.values()), [])[::-1]] or [{}]
    choices.sort(key=lambda choice: choice.get("test_subset") is not None)
    for choice in choices:
        alike = {name: [row for row in rows if agree(row, choice)] for name, rows in found.items()}
        if all(alike.values()):
            return alike
    name = next(name for name, rows in found.items() if not any(agree(row, choices[0]) for row in rows))
    options = "".join(f" --{key.replace('_', '-')} {value}".removesuffix(".0")
                      for key, value in choices[0].items() if value is not None)
    raise common.Fault(f"{name} has no kNN with tau = 0.07 on the head's features"
                       f"{', as the first run has it' * bool(options)}: run eval_knn.py "
                       f"{folder_of(name)}/checkpoint.pth --k {k}{options}")


def draw_queue(points: dict[str, dict[int, list[float]]]) -> Figure:
    """A panel for each figure of merit, by the size of the queue; several runs of a size: their mean, each a dot."""
    figure = Figure((3.1 * len(points) + 0.3, 3.4), layout="constrained")
    for number, (axes, (name, found)) in enumerate(zip(figure.subplots(1, len(points)), points.items(), strict=True)):
        sizes = sorted(found)
        means = [sum(found[size]) / len(found[size]) for size in sizes]
        axes.plot(sizes, means, **look(number))
        for place, (size, mean) in enumerate(zip(sizes, means, strict=True)):
            axes.scatter([size] * len(found[size]), found[size], s=8, color=COLORS[number % 7])
            below = mean == min(means[max(place - 1, 0) : place + 2])
            axes.annotate(f"{mean:.1f}", (size, mean), (0, -12 if below else 5), ha="center", **BESIDE)
        axes.set(title=name, xscale="log", xlabel="keys in the queue", ylabel="%")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.margins(0.12, 0.15)
        low, high = axes.get_ylim()
        room = max(0.0, 4 - (high - low)) / 2  # four points at least: a small difference should look small
        axes.set_ylim(low - room, high + room)
    return figure


def queue(args: argparse.Namespace) -> None:
    """NMI, retrieval and kNN accuracy of MoCo by the size of its queue (CLD, Fig. A.2)."""
    merits = {"NMI": "nmi", "retrieval: 1 nearest": "precision_at_1", "kNN accuracy": "top1"}
    sources, points = list[Source](), {name: dict[int, list[float]]() for name in merits}
    for name in args.runs:
        sources.append(read_log(name)[0])
        if not str(sources[-1].options.get("host")).startswith(("moco", "infomin")):
            raise common.Fault(f"{name} has no queue: it takes runs of cld.py --host moco")
    results = knn_results({name: of_set(read_current(name), source.data["name"])
                           for name, source in zip(args.runs, sources, strict=True)}, 200)
    for name, source in zip(args.runs, sources, strict=True):
        for merit, key in merits.items():
            value = last(results.get(name, []), key)
            if value is None:
                raise common.Fault(f"{name} has no {key} in eval.jsonl: run eval_knn.py "
                                   f"{folder_of(name)}/checkpoint.pth --retrieval --clustering")
            points[merit].setdefault(source.options["queue_size"], []).append(value)
    note = "Test images: their k-means against the classes, their nearest training image, weighted kNN."
    save(draw_queue(points), "MoCo by the size of its queue", note, legend(sources), args.out)


Points = list[tuple[float, float, float]]  # labels, mean accuracy, deviation over the draws


def draw_labels(curves: dict[str, Points], x: str, y: str) -> Figure:
    """Accuracy over the number of labels, a line for each network."""
    figure = Figure((5.4, 3.8), layout="constrained")
    axes = figure.subplots()
    ticks = sorted({labels for points in curves.values() for labels, *_ in points})
    for number, (name, points) in enumerate(curves.items()):
        labels, means, deviations = zip(*sorted(points), strict=True)
        axes.errorbar(labels, means, deviations, **look(number), capsize=3, markersize=4, label=name)
        for where, mean, deviation in zip(labels, means, deviations, strict=True):
            above = mean >= max(v for other in curves.values() for at, v, _ in other if at == where)
            axes.annotate(f"{mean:.1f}", (where, mean + deviation * (1 if above else -1)), (0, 6 if above else -12),
                          ha="center", color=COLORS[number % 7], **BESIDE)
    axes.set(xscale="log", xlabel=x, ylabel=y, title="all layers fine-tuned")
    axes.set_xticks(ticks, [f"{round(tick, 2):g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(0.08, 0.12)
    axes.legend(loc="upper left")
    return figure


def finetuned(
    args: argparse.Namespace, preset: str, key: str, labels: Callable[[dict[str, Any]], float], x: str, title: str
) -> None:
    """Accuracies of networks, untrained ones too if they were evaluated, after fine-tuning under `preset`."""
    sources, own, untrained = [read_log(name)[0] for name in args.runs], Rows(), Rows()
    for name, source in zip(args.runs, sources, strict=True):
        rows = of_set([row for row in read_current(name, baselines=True)
                       if row.get("preset") == preset and row.get("protocol") == "finetune"], source.data["name"])
        newest = {row["checkpoint"] == "random": dict(classes=source.data["classes"]) | row for row in rows}
        if False not in newest:
            raise common.Fault(f"{name} has no {preset} in eval.jsonl: run eval_linear.py "
                               f"{folder_of(name)}/checkpoint.pth --preset {preset}")
        own.append(newest[False])
        untrained = [newest[True]] if True in newest else untrained
    drawn = own + untrained
    points = [[(labels(row | entry), entry[key], entry[f"{key}_std"]) for entry in row["draws"]] for row in drawn]
    words = " or ".join(dict.fromkeys("{epochs} epochs, {test_images:,} test images of {data}".format_map(row)
                                      for row in drawn))
    draws = sorted({entry["draws"] for row in drawn for entry in row["draws"]})
    spread = f"mean and deviation of {'/'.join(map(str, draws))} draws" if max(draws) > 1 else "one draw of each"
    runs = legend(sources)
    names = [*runs, *["untrained"] * len(untrained)]
    figure = draw_labels(dict(zip(names, points, strict=True)), x, f"{key.replace('top', 'top-')} in %")
    save(figure, title, f"eval_linear.py --preset {preset}: {words}; {spread}.", runs, args.out)


def lowshot(args: argparse.Namespace) -> None:
    """Top-1 accuracy after fine-tuning on a few images of each class (DeepCluster, Fig. 5.1)."""
    finetuned(args, "lowshot", "top1", lambda row: row["labels"] / row["classes"], "labelled images of each class",
              "Low-shot learning")


def semisup(args: argparse.Namespace) -> None:
    """Top-5 accuracy after fine-tuning on a share of the labels (NPID, Fig. 6)."""
    finetuned(args, "finetune", "top5", lambda row: 100 * row["labels"] / row["train_images"],
              "labelled images, % of the training images", "Semi-supervised learning")


# ---- linear ----------------------------------------------------------------------------------------------------------


LAYERS = "conv1 conv2 conv3 conv4 conv5 pool5 backbone head"
SETTINGS = ("preset", "subset", "epochs", "images", "train_images", "test_images", "train_crops", "test_crops",
            "normalize", "batch_size", "lr_grid", "weight_decay_grid", "holdout", "schedule")


def settings_of(row: dict[str, Any]) -> dict[str, Any]:
    """How a line of eval_linear.py was measured, as far as it says so, whichever layers it has."""
    options: dict[str, Any] = dict(subset=None) | row.get("settings", {})
    return options | {key: row[key] for key in SETTINGS if key in row} | dict(layers=None)


def read_layers(names: Sequence[str], protocol: str, data: str | None) -> tuple[dict[str, dict[str, float]], Rows]:
    """The last results of `protocol` for each network in the eval.jsonl of these folders: top-1 in % by layer, all with
    the settings of the last; those with few labels, "draws", are something else. And the last line of each.

    data: the set; default: a run's own, named if they differ.
    """
    found, places = dict[tuple[str, str, str], Rows](), dict[tuple[str, str], str]()
    for name in names:
        rows = [row for row in read_eval(name, baselines=True) if row.get("protocol") == protocol and "layers" in row
                and "draws" not in row and data in (None, row["data"])]
        if not rows:
            raise common.Fault(f"{name} has no result of eval_linear.py, protocol {protocol}"
                               f"{f', --data {data}' if data else ''}: run it first")
        own = read_log(name)[0].data["name"] if (folder_of(name) / "log.jsonl").exists() else rows[-1]["data"]
        for row in of_set(rows, own):
            which = row["checkpoint_sha256"][:6] or "{arch}, width {width}, seed {seed}".format(**{"width": "?"} | row)
            found.setdefault((row["method"], which, row["data"]), []).append(row)
            # An untrained network is in no folder of its own
            place = folder_of(name).resolve().name if row["checkpoint_sha256"] else ""
            places.setdefault((row["method"], which), place)
    methods, sets = Counter(method for method, _ in places), {key[2] for key in found}
    shared = Counter((method, place) for (method, _), place in places.items())
    lines = dict[str, dict[str, float]]()
    for (method, which, images), rows in found.items():
        place = places[method, which]
        words = [place] * bool(place) + [which] * (shared[method, place] > 1)
        label = " ".join([method, *words * (methods[method] > 1)]) + f", {images}" * (len(sets) > 1)
        alike = [row for row in rows if agree(settings_of(row), settings_of(rows[-1]))]
        lines[label] = {entry["layer"]: entry["top1"] for row in alike for entry in row["layers"]}
    return lines, [rows[-1] for rows in found.values()]


def draw_layers(lines: dict[str, dict[str, float]], protocol: str) -> Figure:
    """Accuracy by layer, a line for each network."""
    figure = Figure((5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    layers = sorted({layer for line in lines.values() for layer in line}, key=LAYERS.find)
    for number, (label, line) in enumerate(lines.items()):
        own = sorted(line, key=LAYERS.find)
        axes.plot([layers.index(layer) for layer in own], [line[layer] for layer in own], **look(number), label=label)
        for layer, top1 in line.items():
            above = top1 >= max(other.get(layer, 0) for other in lines.values())
            axes.annotate(f"{top1:.1f}", (layers.index(layer), top1), (0, 6 if above else -12), ha="center",
                          color=COLORS[number % 7], **BESIDE)
    axes.set_xticks(range(len(layers)), layers)
    axes.set(ylabel="top-1 in %", title={"linear": "linear probes", "svm": "linear SVM"}[protocol])
    axes.margins(0.08, 0.12)
    axes.legend(loc="best")
    return figure


def linear(args: argparse.Namespace) -> None:
    """Accuracy of linear classifiers by layer, several networks side by side (NPID, Tables 2 and 3; LA, Table 1)."""
    lines, rows = read_layers(args.runs, args.protocol, args.data)
    form = "{train_images:,} training and {test_images:,} test images of {data}"
    words = [form.format_map(row) + f", {row['epochs']} epochs" * (args.protocol == "linear") for row in rows]
    logged = {name: read_log(name)[0] for name in args.runs if (folder_of(name) / "log.jsonl").exists()}
    runs = {source.name: source for source in logged.values()}  # as the lines are named, unless two folders are alike
    runs = runs if len(runs) == len(logged) else logged
    save(draw_layers(lines, args.protocol), f"Classification by layer{f', {args.data}' if args.data else ''}",
         f"eval_linear.py: {' or '.join(dict.fromkeys(words))}.", runs, args.out)


# ---- ablation --------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table of a paper: what its columns are (keys of MERITS), and of each row the preset, then a figure a column."""

    title: str
    script: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Any, ...]]


def step_of(options: dict[str, Any], log: Rows) -> float | None:
    """Milliseconds of a training step; an epoch that was resumed at its end had none."""
    speed = last([row for row in log if row.get("images_per_second")], "images_per_second")
    return speed and 1000 * options["batch_size"] / speed


K_OF = {"knn": 200, "nn": 1}  # of the columns that eval_knn.py fills
# What a figure is called, and where it comes from: (options of the run, log, evaluations) -> the figure.
MERITS: dict[str, tuple[str, Callable[[dict[str, Any], Rows, Rows], float | None]]] = {
    "knn": ("kNN, K = 200", lambda options, log, rows: last(rows, "top1")),
    "nn": ("nearest neighbour", lambda options, log, rows: last(rows, "top1")),
    "svm": ("linear SVM", lambda options, log, rows: last(
        [row for row in rows if "draws" not in row and row.get("layer", "head") == "head"], "svm_top1")),
    "linear1": ("linear, top-1", lambda options, log, rows: last(rows, "linear_top1")),
    "linear5": ("linear, top-5", lambda options, log, rows: last(rows, "linear_top5")),
    "mlp": ("MLP on frozen convolutions", lambda options, log, rows: last(rows, "mlp_top1")),
    "top1": ("accuracy", lambda options, log, rows: last(log, "test_top1")),
    "step": ("ms a mini-batch", lambda options, log, rows: step_of(options, log)),
}
LAMBDAS = {"npid": ((75.3, 92.4), (78.8, 94.4), (79.7, 95.1), (78.9, 94.4), (78.8, 94.5), (76.6, 93.2)),
           "moco": ((77.6, 93.8), (80.3, 95.0), (81.7, 95.7), (80.5, 95.2), (80.1, 94.8), (78.4, 94.1))}
TEMPERATURES = {"cifar100": ("knn", 57.9, 57.8, 58.1, 58.1, 57.6, 57.2),
                "imagenet100": ("linear1", 79.3, 79.6, 81.7, 80.7, 79.4, 79.0)}
TABLES: dict[str, Table] = {
    "npid-1": Table("NPID, Table 1: training objectives", "npid", ("knn", "svm"), {
        "parametric softmax": ("cifar10-parametric", 63.0, 60.3), "exact softmax": ("cifar10", 80.8, 75.4),
        "NCE, m = 1": ("cifar10-nce1", 42.5, 44.3), "NCE, m = 10": ("cifar10-nce10", 63.4, 60.2),
        "NCE, m = 512": ("cifar10-nce512", 78.4, 64.3), "NCE, m = 4096": ("cifar10-nce4096", 80.4, 70.2)}),
    "npid-2": Table("NPID, Table 2: ImageNet, kNN", "npid", ("knn",), {
        "AlexNet": ("imagenet-alexnet", 31.3), "VGG16": ("imagenet-vgg16", 33.9),
        "ResNet-18": ("imagenet-resnet18", 40.5), "ResNet-50": ("imagenet-resnet50", 42.5)}),
    "npid-4": Table("NPID, Table 4: size of the embedding", "npid", ("knn",), {
        "32": ("imagenet-dim32", 34.0), "64": ("imagenet-dim64", 38.8), "128": ("imagenet-resnet18", 40.5),
        "256": ("imagenet-dim256", 40.1)}),
    "npid-5": Table("NPID, Table 5: share of the training images", "npid", ("knn",), {
        "0.1 %": ("imagenet-0.1percent", 3.9), "1 %": ("imagenet-1percent", 10.7), "10 %": ("imagenet-10percent", 23.1),
        "30 %": ("imagenet-30percent", 31.7), "100 %": ("imagenet-resnet18", 40.5)}),
    "la-1": Table("Local Aggregation, Table 1: ImageNet, kNN", "local_aggregation", ("knn",), {
        "AlexNet": ("imagenet-alexnet", 38.1), "VGG16": ("imagenet-vgg16", 46.6), "ResNet-18": ("imagenet", 45.0),
        "ResNet-50": ("imagenet-resnet50", 49.4)}),
    "la-4": Table("Local Aggregation, Table 4: background neighbours", "local_aggregation", ("nn",), {
        "all images": ("table4-all", 30.2), "clusters": ("table4-clusters", 33.2),
        "nearest 4096": ("table4-nearest", 35.7)}),
    "la-5": Table("Local Aggregation, Table 5: close neighbours", "local_aggregation", ("nn",), {
        "only itself": ("table5-self", 33.9), "nearest": ("table5-nearest", 0.1), "(1, 10k)": ("table4-nearest", 35.7),
        "(3, 10k)": ("table5-3-10k", 36.2), "(10, 10k)": ("table5-10-10k", 36.1), "(10, 30k)": ("imagenet", 37.9)}),
    "la-supplement-1": Table("Local Aggregation, supplement, Table 1: (H, m)", "local_aggregation", ("nn",), {
        "R18 (1, 1k)": ("supplement1-1-1k", 35.2), "R18 (1, 10k)": ("table4-nearest", 35.7),
        "R18 (1, 20k)": ("supplement1-1-20k", 35.0), "R18 (3, 10k)": ("table5-3-10k", 36.2),
        "R18 (6, 10k)": ("supplement1-6-10k", 37.3), "R18 (10, 10k)": ("table5-10-10k", 36.1),
        "R18 (10, 30k)": ("imagenet", 37.9), "A (1, 10k)": ("supplement1-alexnet-1-10k", 30.6),
        "A (3, 10k)": ("supplement1-alexnet-3-10k", 31.1), "A (6, 10k)": ("supplement1-alexnet-6-10k", 30.4),
        "V (1, 10k)": ("supplement1-vgg16-1-10k", 38.9), "V (6, 10k)": ("imagenet-vgg16", 39.7),
        "R50 (1, 10k)": ("supplement1-resnet50-1-10k", 40.2), "R50 (6, 10k)": ("supplement1-resnet50-6-10k", 42.4),
        "R50 (10, 10k)": ("supplement1-resnet50-10-10k", 42.3), "R50 (10, 30k)": ("imagenet-resnet50", 43.4)}),
    "la-supplement-3": Table("Local Aggregation, supplement, Table 3: other settings", "local_aggregation", ("nn",), {
        "baseline": ("table4-nearest", 35.7), "k = 2048": ("supplement3-k2048", 35.4),
        "k = 8192": ("supplement3-k8192", 35.8), "clusters of central crops": ("supplement3-center-crop", 35.8),
        "clusters every 1,000 steps": ("supplement3-more-freq", 35.7)}),
    "deepcluster-4.1": Table("DeepCluster, Table 4.1: before or after the last ReLU", "deepcluster", ("mlp",), {
        # The printed heads are swapped: see the text.
        "PIC, before": ("table4.1-pic-before", 33.2), "PIC, after": ("table4.1-pic-after", 21.9),
        "100 clusters, before": ("table4.1-k100-before", 30.2), "100 clusters, after": ("table4.1-k100-after", 33.5),
        "1,000 clusters, before": ("table4.1-k1000-before", 33.8),
        "1,000 clusters, after": ("table4.1-k1000-after", 33.4),
        "10,000 clusters, before": ("table4.1-k10000-before", 33.1),
        "10,000 clusters, after": ("table4.1-k10000-after", 31.1)}),
    "deepcluster-4.2": Table("DeepCluster, Table 4.2: targets in a step, with labels", "deepcluster", ("top1",), {
        "all": ("table4.2", 56.1), "256": ("table4.2-256", 54.2), "512": ("table4.2-512", 55.6)}),
    "deepcluster-4.3": Table("DeepCluster, Table 4.3: targets in a step, time", "deepcluster", ("step",), {
        "all": ("pic-imagenet-sobel", 154.0), "256": ("table4.3-256", 177.0), "512": ("table4.3-512", 211.0),
        "1024": ("table4.3-1024", 277.0), "2048": ("table4.3-2048", 396.0), "4096": ("table4.3-4096", 713.0)}),
    "deepcluster-5.2": Table("DeepCluster, Table 5.2: MLP on frozen convolutions", "deepcluster", ("mlp",), {
        "PIC": ("pic-imagenet-sobel", 45.9), "k-means": ("kmeans-imagenet-sobel", 44.0),
        "k-means, RGB": ("kmeans-imagenet-rgb", 37.1), "k-means, 1M Flickr": ("kmeans-flickr1m-sobel", 39.6),
        "k-means, 2M Flickr": ("kmeans-flickr2m-sobel", 40.1)}),
    "cld-a1": Table("CLD, Table A.1: groups of Kitchen-HC", "cld", ("knn",), {
        f"{k}, {way}": (f"kitchen-{way.replace('-', '')}{k}", value)
        for k, values in ((10, (77.1, 78.9)), (64, (74.5, 76.3)), (128, (72.6, 73.4)), (256, (70.5, 70.8)))
        for way, value in zip(("spectral", "k-means"), values, strict=True)}),
    "cld-a2": Table("CLD, Table A.2: parts of the method, CIFAR-10", "cld", ("knn",), {
        "NPID alone": ("cifar10-no-cld", 80.8), "shared branch": ("cifar10-shared", 82.7),
        "separate branches": ("cifar10-separate", 84.2), "and across views": ("cifar10", 86.5)}),
    "cld-a2-cifar100": Table("CLD, Table A.2: parts of the method, CIFAR-100", "cld", ("knn",), {
        "NPID alone": ("cifar100-no-cld", 51.6), "shared branch": ("cifar100-shared", 53.3),
        "separate branches": ("cifar100-separate", 55.0), "and across views": ("cifar100", 57.5)}),
    **{f"cld-a3-{host}": Table(f"CLD, Table A.3: weight of the group loss, {host}", "cld", ("linear1", "linear5"), {
        f"{weight:g}": (f"imagenet100-{host}-lambda{weight:g}", *value)
        for weight, value in zip((0, 0.1, 0.25, 0.5, 1, 3), values, strict=True)}) for host, values in LAMBDAS.items()},
    **{f"cld-a4-{data}": Table(f"CLD, Table A.4: temperature, {data}", "cld", (merit,), {
        f"{t:g}": (f"{data}-temperature{t:g}", value)
        for t, value in zip((0.07, 0.1, 0.2, 0.3, 0.4, 0.5), values, strict=True)})
       for data, (merit, *values) in TEMPERATURES.items()},
}


def draw_ablation(table: Table, ours: dict[str, dict[str, list[float]]], given: Counter[str]) -> Figure:
    """The paper's bar and ours, mean and deviation of several runs, and how many of them have the figure. ours: column
    -> row -> figures; given: the number of runs of each row."""
    figure = Figure((1.6 + 3.6 * len(table.columns), 0.9 + 0.42 * len(table.rows)), layout="constrained")
    panels = figure.subplots(1, len(table.columns), sharey=True, squeeze=False)[0]
    for column, (axes, merit) in enumerate(zip(panels, table.columns, strict=True)):
        for place, (row, (_, *values)) in enumerate(table.rows.items()):
            found = torch.tensor(ours[merit].get(row, []), dtype=torch.float64)
            bars = [("the paper", values[column], f"{values[column]:.1f}", -0.2, "0.75")]
            if len(found):
                count = f"{len(found)}" + f" of {given[row]}" * (len(found) < given[row])
                text = f"{found.mean():.1f}" + (f" ± {found.std():.1f}" if len(found) > 1 else "")
                text += f" ({count})" * (given[row] > 1)
                bars.append(("ours", float(found.mean()), text, 0.2, COLORS[0]))
            else:
                text = "not evaluated" if row in given else "not run"
                axes.annotate(text, (0, place + 0.2), (3, 0), va="center", color="0.4", **BESIDE)
            for label, length, text, offset, color in bars:
                axes.barh(place + offset, length, 0.38, color=color, label=label)
                axes.annotate(text, (length, place + offset), (3, 0), va="center", **BESIDE)
        axes.set_yticks(range(len(table.rows)), list(table.rows))
        axes.set(title=MERITS[merit][0] + (", %" if merit != "step" else ""), ylim=(len(table.rows) - 0.5, -0.5))
        axes.margins(x=0.18)
        axes.grid(visible=False, axis="y")
    handles = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def ablation(args: argparse.Namespace) -> None:
    """A table of a paper as bars, the paper's figures beside ours (--table)."""
    logs = {name: read_log(name)[:2] for name in args.runs}
    evaluations = {name: of_set(read_current(name), source.data["name"]) for name, (source, _) in logs.items()}
    options = [source.options for source, _ in logs.values()]

    def row_of(options: dict[str, Any], table: Table) -> str | None:
        preset = options["preset"].removeprefix("thin-").removesuffix("-thin")
        if options["script"] == "cld":  # whose miniature of Table A.2 has rendered images too
            preset = preset.replace("shapes", "cifar10")
        rows = (row for row, (key, *_) in table.rows.items() if (table.script, key) == (options["script"], preset))
        return next(rows, None)

    def hits(key: str) -> int:
        return sum(row_of(own, TABLES[key]) is not None for own in options)

    table, sources = TABLES[args.table or max(TABLES, key=hits)], dict[tuple[str, str], list[Source]]()
    places = dict[str, str]()
    for name, (source, _) in logs.items():
        row = row_of(source.options, table)
        if row is None:
            others = [other.title for other in TABLES.values() if row_of(source.options, other)]
            what = (f"it is one of {' and of '.join(others)}" if others else
                    "its preset is {preset} of {script}.py".format_map(source.options))
            raise common.Fault(f"{name} is no row of {table.title if args.table or others else 'any table'}: {what}")
        places[name] = row
        sources.setdefault((row, experiment(source)), []).append(source)
    results = {column: knn_results(evaluations, K_OF[column]) if column in K_OF else evaluations
               for column in table.columns}
    monitored = not results.get("knn")  # a column has one protocol
    ours = {column: dict[str, list[float]]() for column in table.columns}
    for name, (source, log) in logs.items():
        for column in table.columns:
            value = MERITS[column][1](source.options, log, results[column].get(name, []))
            if column == "knn" and monitored:
                value = last(log, "knn_top1")
            if value is not None:
                ours[column].setdefault(places[name], []).append(value)
    if not any(ours.values()):
        raise common.Fault(f"{args.runs[0]} has no {MERITS[table.columns[0]][0]} yet: evaluate it first")
    note = ("Ours: the runs below after their last epoch; with fewer images, epochs or channels than the paper's they "
            "are miniatures, to be compared with each other alone.")
    if "knn" in table.columns:
        note += " kNN by " + ("the monitor in the logs." if monitored else "eval_knn.py.")
    shown = {"script", "preset", "arch", "width", "epochs", "data", "subset"}
    differ = [key for key in sorted(options[0].keys() - IGNORED - shown)
              if len({repr(other.get(key)) for other in options}) > 1]
    runs = dict[str, Source]()
    for (row, _), members in sources.items():
        if row in runs:
            note += f" {row} is a mean over different settings."
        also = "".join(f", {key.replace('_', ' ')} {members[0].options.get(key)}" for key in differ)
        runs[f"{row} ({members[0].name})" if row in runs else row] = pooled(members)._replace(also=also)
    save(draw_ablation(table, ours, Counter(places.values())), table.title, note, runs, args.out)


# ---- detections ------------------------------------------------------------------------------------------------------


def read_detections(name: str) -> dict[str, Any]:
    """What eval_detection.py left in its folder, or last in that of its network, unless that has changed."""
    path = Path(name, "detections.pth") if Path(name).is_dir() else Path(name)
    if not path.exists():
        path = max(Path(name).glob("detection-*/detections.pth"), key=lambda file: file.stat().st_mtime, default=path)
    try:
        content: dict[str, Any] = common.load_plain(path)
        saved = {key: content[key] for key in ("found", "truth", "classes", "images", "result", "git")}
    except OSError as error:
        raise common.Fault(f"cannot read {path} ({error.strerror}): name the folder of a run of "
                           "eval_detection.py") from None
    except Exception:  # garbage makes the unpickler raise almost anything
        raise common.Fault(f"{path} holds no detections of eval_detection.py") from None
    network = Path(name, Path(saved["result"]["checkpoint"]).name)
    if path.parent != Path(name) and checksum(network) not in (None, saved["result"]["checkpoint_sha256"]):
        raise common.Fault(f"{network} has changed since {path}: run eval_detection.py again, with --overwrite")
    return saved


def class_curves(saved: dict[str, Any]) -> Tensor:
    """Best precision at recall 0, 0.01, ... 1 or above, (C, 101) in percent, of classes with objects that count."""
    found, truth, curves = saved["found"], saved["truth"], list[Tensor]()
    for label in range(len(saved["classes"])):
        total = int(((truth["labels"] == label) & ~truth["difficult"]).sum())
        some = found["counted"] & (found["labels"] == label)
        if total:
            recall, precision = common.recall_precision(found["scores"][some], found["right"][some], total)
            reached = recall[:, None] >= torch.linspace(0, 1, 101, dtype=torch.float64)
            best = torch.cat([torch.where(reached, precision[:, None], 0.0), torch.zeros(1, 101)])
            curves.append(100 * best.amax(0))
    return torch.stack(curves)


def draw_detections(saved: dict[str, Any], pictures: Sequence[tuple[int, Any]], runs: dict[str, dict[str, Any]],
                    least: float) -> Figure:
    """Test images (position, pixels) with true boxes and those of the first run, and a precision-recall plot."""
    found, truth, classes = saved["found"], saved["truth"], saved["classes"]
    ends = truth["counts"].cumsum(0).tolist()
    columns = -(-len(pictures) // 2)
    figure = Figure((2.1 * columns + 4.2, 5.0), layout="constrained")
    grid = figure.add_gridspec(2, columns + 2)
    for place, (number, pixels) in enumerate(pictures):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        axes.imshow(pixels)
        axes.axis("off")
        shown = ((found["image"] == number) & (found["scores"] >= least)).nonzero()[:, 0]
        rows = range(ends[number] - int(truth["counts"][number]), ends[number])
        frames = [(truth["boxes"][row], "white", "--", "") for row in rows]
        for row in shown.tolist():
            color = RIGHT if found["right"][row] else WRONG if found["counted"][row] else "0.6"
            text = f"{classes[found['labels'][row]]} " + f"{found['scores'][row]:.2f}".removeprefix("0")
            frames.append((found["boxes"][row], color, "-", text))
        for box, color, dashes, text in frames:
            x1, y1, x2, y2 = box.tolist()
            axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=color,
                                     linestyle=dashes, linewidth=1.4))
            if not text:
                continue
            above = y1 > 0.05 * pixels.height
            axes.text(x1, y1 - 1 if above else y1 + 1, text, fontsize=5, color="white", clip_on=True,
                      va="bottom" if above else "top", bbox=dict(facecolor=color, edgecolor="none", pad=0.5))
    axes = figure.add_subplot(grid[:, columns:])
    axes.set(title="Precision and recall, overlap 0.5", xlabel="recall in %", ylabel="precision in %",
             xlim=(0, 100), ylim=(0, 102))
    for number, (label, other) in enumerate(runs.items()):
        curves = class_curves(other)
        if len(runs) == 1:
            axes.plot(range(101), curves.T, color="0.75", linewidth=0.7)
        style = look(number) | dict(marker="")
        axes.plot(range(101), curves.mean(0), **style, linewidth=2,
                  label=f"{label}: AP {other['result']['ap50_voc07']:.1f} (11-point)")
    if len(runs) == 1 and len(classes) > 1:
        axes.plot([], [], color="0.75", linewidth=0.7, label="its classes")
    axes.legend(loc="lower left", fontsize=7)
    return figure


def detections(args: argparse.Namespace) -> None:
    """Test images with true and found boxes, and precision over recall, of runs of eval_detection.py."""
    every = [read_detections(name) for name in args.runs]
    names = [folder_of(name).resolve().name for name in args.runs]
    runs = dict(zip(names if len(set(names)) == len(names) else args.runs, every, strict=True))
    saved = every[0]
    total = len(saved["images"])
    chosen = torch.randperm(total, generator=common.generator(args.seed, "detections"))[: args.images].sort().values
    pictures = list[tuple[int, Any]]()
    for number in chosen.tolist():
        path = Path(saved["images"][number])
        try:
            with Image.open(path) as image:
                pictures.append((number, common.rgb(image)))
        except common.UNREADABLE:
            raise common.Fault(f"cannot read the image {path}: draw where eval_detection.py ran") from None
    notes = [f"First run: {len(pictures)} of {total:,} test images, drawn with seed {args.seed}; white dashes: truth; "
             f"boxes of score {args.min_score:g} or more: green right, orange wrong, grey on a difficult object."]
    for label, other in runs.items():
        notes.append("{0}: eval_detection.py, preset {preset}, checkpoint {checkpoint}, {arch} of width {width}, seed "
                     "{seed}, {train_images:,} images of {data}, {iterations:,} iterations of {batch_size}, commit {1}"
                     .format(label, other["git"], **other["result"]))
    figure = draw_detections(saved, pictures, runs, args.min_score)
    save(figure, f"Detections in {saved['result']['data']}", "\n".join(notes), {}, args.out)


# ---- all -------------------------------------------------------------------------------------------------------------


def words_for(options: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The words of a command line that are options of another picture, too, but for --out."""
    known = {flag: action for action in options._actions for flag in action.option_strings if flag != "--out"}
    words = list[str]()
    for place, word in enumerate(argv, 1):
        if action := known.get(word.split("=")[0]):
            nargs = action.nargs if isinstance(action.nargs, int) else 1
            words += [word, *argv[place : place + nargs * ("=" not in word)]]
    return words


def every_picture(args: argparse.Namespace) -> None:
    """Every picture that the runs allow, and an index.md that shows them and says what the others lack."""
    with contextlib.suppress(FileExistsError):
        args.out.mkdir()
    shown, missing = list[str](), list[str]()
    for name, words in args.commands.items():
        own = parse_args([*words, "--out", str(args.out / f"{name}.png")])
        vars(own).update(device=args.device, kept=args.kept)
        try:
            own.draw(own)
        except common.Fault as fault:
            missing.append(f"* {name}: {fault}")
        else:
            doc, command = " ".join((own.draw.__doc__ or "").split()), shlex.join(["python", "figures.py", *words])
            shown.append(f"## {name}\n\n{doc}\n\n    {command}\n\n![{name}]({name}.png)\n")
    if not shown:
        with contextlib.suppress(OSError):  # it was there before, and is not empty
            args.out.rmdir()
        raise common.Fault(f"{args.runs[0]} allows no picture: {missing[0][2:]}")
    parts = [f"# Pictures of {', '.join(args.runs)}\n", *shown]
    if missing:
        parts += ["## Not made\n", *missing, ""]
    common.write_whole(args.out / "index.md", "\n".join(parts).encode())
    print(args.out / "index.md")


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True, help="picture; NAME --help: its options")

    def add(draw: Callable[[argparse.Namespace], None], network: bool = True, name: str | None = None,
            **counts: tuple[int, str]) -> argparse.ArgumentParser:
        """A picture with the options of all, and its own: numbers with their default and help text."""
        options = names.add_parser(name or draw.__name__, help=draw.__doc__, description=draw.__doc__,
                                   allow_abbrev=False, formatter_class=parser.formatter_class)
        options.set_defaults(draw=draw)
        options.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a checkpoint file"
                             + '; "random" for an untrained network' * network)
        options.add_argument("--out", type=Path, metavar="FILE", help="default: figures/, a folder, in the first run's"
                             if name == "all" else "default: NAME.png in the first run's folder")
        if network:
            options.add_argument("--layer", choices=["auto", "head", "backbone"], default="auto", help="features: the "
                                 "head's or the backbone's; auto: head of these scripts, backbone of foreign files "
                                 "and for pca")
            options.add_argument("--arch", choices=common.ARCHITECTURES, help="of files that do not say it")
            options.add_argument("--width", type=common.COUNT, help="of files that do not say it")
            common.add_statistics_options(options, "of files that do not say it; default: the data set's")
            options.add_argument("--seed", type=common.COUNT_OR_ZERO, default=0, help="of what is drawn at random")
            options.add_argument("--batch-size", type=common.COUNT, default=256, help="images in one forward pass")
            common.add_data_options(options)
            common.add_device_options(options)
        for key, (default, text) in counts.items():
            flags = ["--k", "--num-neighbors"] if key == "num_neighbors" else [f"--{key}"]
            options.add_argument(*flags, dest=key, type=common.COUNT, default=default, metavar="N", help=text)
        return options

    half, each = "queries in the upper and in the lower half", "neighbours of each query"
    add(gallery, rows=(4, half), num_neighbors=(10, each))
    add(neighbors, rows=(4, half), num_neighbors=(5, each))
    add(retrieval, rows=(8, "queries"), num_neighbors=(8, each))
    add(curves, network=False)
    options = add(density, images=(20_000, "the distribution over N images, drawn at random; their neighbours are "
                                           "sought among all"))
    options.add_argument("--features", choices=["bank", "clean"], help="the memory bank, or features without any "
                         "augmentation; default: the bank if every run has one, and neither --data nor --subset")
    options = add(mds)
    options.add_argument("--images", type=common.number(int, 3, 2**53), default=100, metavar="N", help="of each class")
    options.add_argument("--classes", type=common.number(int, 1, 7), default=6, metavar="N", help="classes in a panel; "
                         "at most half of all")
    add(filters)
    options = add(maximize, channels=(4, "of each stage, drawn at random"), steps=(200, "of gradient ascent"),
                  images=(10_000, "training images, drawn at random; those that fire a channel most are shown"))
    options.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES, help="rows")
    add(edges, num_neighbors=(10, "neighbours in the graph"))
    add(pca)
    for from_logs in (queue, lowshot, semisup):
        add(from_logs, network=False)
    options = add(linear, network=False)
    options.add_argument("--protocol", choices=["linear", "svm"], default="linear", help="of eval_linear.py")
    options.add_argument("--data", metavar="NAME", help="results on this set; default: those on a run's own")
    options = add(ablation, network=False)
    options.add_argument("--table", choices=list(TABLES), help="default: the one that has most of the runs")
    options = add(detections, network=False, images=(8, "test images to show"))
    options.add_argument("--min-score", type=common.SHARE, default=0.5, help="least score of the boxes that are shown")
    options.add_argument("--seed", type=common.COUNT_OR_ZERO, default=0, help="of the choice of images")
    every = dict(names.choices)
    add(every_picture, name="all")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.typed, args.kept = common.typed(names.choices[args.name], argv), dict[tuple[Any, ...], Any]()
    args.commands = {name: [name, *args.runs, *words_for(options, argv)] for name, options in every.items()}
    if args.draw in (neighbors, retrieval, edges, pca) and len(args.runs) == 1:
        args.runs.append("random")
    first = Path(next((name for name in args.runs if name != "random"), "."))
    args.out = args.out or (first if first.is_dir() else first.parent) / (
        "figures" if args.name == "all" else f"{args.name}.png")
    if args.name != "all" and args.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {args.out}: the name must end in .png, .pdf or .svg")
    if "out" in args.typed and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no directory {args.out.parent}")
    return args


def main(args: argparse.Namespace) -> None:
    if "device" in args:
        args.device = common.pick_device(args.device)
    with matplotlib.rc_context(STYLE):
        args.draw(args)


if __name__ == "__main__":
    common.launch(main, parse_args)
