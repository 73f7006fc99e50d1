"""Pictures of the papers, drawn from runs and checkpoints of these scripts.

    python figures.py gallery runs/npid-demo-seed0               # NPID, Fig. 5: queries and their nearest images
    python figures.py gallery runs/npid-demo-seed0 random        # two networks side by side, one of them untrained
    python figures.py curves runs/npid-cifar10-proximal-seed0 runs/npid-cifar10-oscillating-seed0    # Fig. 3 and 4
    python figures.py curves runs/npid-cifar10-seed*             # runs that differ in the seed alone: their mean
    python figures.py density runs/npid-cifar10-seed0 runs/local_aggregation-cifar10-seed0           # LA, Fig. 2

A run is the output folder of a training script, or a checkpoint file. The picture goes to NAME.png in the first run's
folder, or to --out (.png, .pdf or .svg). Its small print says what was run.
"""

import argparse
import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import common

# ---- what every picture has ------------------------------------------------------------------------------------------

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe's and Ito's
WRONG, RIGHT = COLORS[1:3]
STYLE: Any = {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
              "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.titlesize": 11,
              "figure.titleweight": "bold"}
IGNORED = {*common.FREE_OPTIONS, "seed"} - {"epochs", "amp"}  # options that do not make a run another experiment


class Source(NamedTuple):
    """What a picture was made from; foreign files and untrained networks have only a name, and no small print."""

    name: str
    options: dict[str, Any]
    data: dict[str, Any]
    git: str
    epochs: int

    def __str__(self) -> str:
        text = "{script}.py, preset {preset}, {arch} of width {width}, seed {seed}, ".format_map(self.options)
        return (f"{text}{self.data['images']:,} images of {self.data['name']}, "
                f"epoch {self.epochs} of {self.options['epochs']}, commit {self.git}")


def legend(sources: Sequence[Source]) -> list[str]:
    """What tells the sources apart: script and preset, else the options that differ, else the folders."""
    runs = [source.options for source in sources if source.options]
    keys = sorted({key for options in runs for key in options} - IGNORED)
    keys = [key for key in keys if len({repr(options.get(key)) for options in runs}) > 1][:3]
    options = [", ".join(f"{key.replace('_', ' ')} {{{key}}}" for key in some) for some in (keys, [*keys, "seed"])]
    for form in ("{script} {preset}", *options):
        names = [form.format_map(dict.fromkeys(keys) | s.options) if s.options else s.name for s in sources]
        if len(set(names)) == len(names):
            return names
    names = [source.name for source in sources]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, 1)]


def look(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line: told apart without the colour, too."""
    return dict(color=COLORS[number % 7], linestyle=["-", "--", ":", "-."][number % 4], marker="osD^v"[number % 5])


def save(figure: Figure, title: str, note: str, runs: dict[str, Source], path: Path) -> None:
    """Write the file whole or not at all. A PNG has a palette, and as many dots as fit into 200 kB."""
    figure.suptitle(title, x=0.01, ha="left")
    small_print = [note] * bool(note) + [f"{label}: {source}" for label, source in runs.items() if source.options]
    figure.supxlabel("\n".join(small_print), x=0.01, ha="left", fontsize=6, color="0.35")
    content = io.BytesIO()
    if path.suffix != ".png":
        figure.savefig(content, format=path.suffix[1:])
    else:
        from PIL import Image

        for dpi, colors in ((160, 256), (130, 256), (110, 256), (100, 128), (90, 128), (90, 64), (70, 64)):
            content.seek(0)
            figure.savefig(content, format="png", dpi=dpi)
            image = Image.open(content).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
            content = io.BytesIO()
            image.save(content, "PNG", optimize=True)
            if content.tell() < 200_000:
                break
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content.getvalue())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    print(path)


# ---- networks and their features -------------------------------------------------------------------------------------


def open_networks(args: argparse.Namespace, device: torch.device) -> tuple[list[common.Encoder], list[Source]]:
    """The encoder of each run; "random" is an untrained one of the first run's architecture."""
    small = args.image_size < common.SMALL if args.image_size else None
    encoders, sources = dict[str, common.Encoder](), {"random": Source("untrained", {}, {}, "", 0)}
    for name in [name for name in args.runs if name != "random"]:
        path = Path(name, "checkpoint.pth") if Path(name).is_dir() else Path(name)
        encoder = encoders[name] = common.load_encoder(path, args.arch, args.width, small, device, args.layer)
        sources[name] = Source(path.name, {}, {}, "", 0)
        if encoder.options:
            saved = common.load_checkpoint(path)
            folder = path.resolve().parent.name
            sources[name] = Source(folder, encoder.options, encoder.data, saved["git"], saved["epoch"])
    if not encoders:
        raise common.Fault('name a run beside "random": the untrained network takes its architecture')
    if "random" in args.runs:
        first = next(iter(encoders.values()))
        arch, width = args.arch or first.options["arch"], args.width or first.options.get("width", 64)
        torch.manual_seed(args.seed)
        stem = first.data.get("small", False) if small is None else small
        encoder = common.untrained_encoder(arch, width, stem, device)
        encoders["random"] = dataclasses.replace(encoder, options=first.options, data=first.data)
    return [encoders[name] for name in args.runs], [sources[name] for name in args.runs]


def load_data(encoder: common.Encoder, args: argparse.Namespace, device: torch.device) -> Sequence[common.ImageSet]:
    """The train and test images of the encoder's own run, unless --data or --subset names others."""
    split = "train" if {"data", "subset"} & set(args.typed) else "pretrain"
    return encoder.load_data(argparse.Namespace(**vars(args)), split, device)


def extract(encoder: common.Encoder, data: common.ImageSet, args: argparse.Namespace, device: torch.device) -> Tensor:
    """Unit rows (N, D) of all images, at the size and with the channel statistics of the encoder's own run."""
    if encoder.data:
        size, mean, std = args.image_size or encoder.data["size"], encoder.data["mean"], encoder.data["std"]
        data = dataclasses.replace(data, size=size, mean=tuple(mean), std=tuple(std))

    def embed(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, common.amp_default(device) if args.amp is None else args.amp):
            return encoder.embed(images)

    return common.extract(device, data, embed, args.batch_size)


# ---- gallery ---------------------------------------------------------------------------------------------------------


class Strip(NamedTuple):
    """The K nearest images of R queries in one network (R, K, 3, S, S), whether right (R, K), names of the classes."""

    title: str
    images: Tensor
    right: Tensor
    names: list[list[str]]


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


def draw_gallery(queries: Tensor, names: list[str], strips: list[Strip]) -> Figure:
    """Queries (R, 3, S, S), best cases first; to their right the neighbours, framed by whether the class is right."""
    rows, k = strips[0].right.shape
    pitch, start = 1.08 * k + 0.9, 1.5  # in widths of an image
    tops = [1.36 * row + 0.75 * (row >= rows // 2) for row in range(rows)]
    width, inches = start + len(strips) * pitch, 0.62 if len(strips) == 1 else 0.5
    figure = Figure((inches * width + 0.2, inches * (tops[-1] + 2.3) + 0.7), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.1, width), ylim=(tops[-1] + 1.4, -0.9), aspect="equal")
    axes.axis("off")

    def show(image: Tensor, x: float, y: float, color: str, text: str) -> None:
        axes.imshow(image.movedim(0, 2).numpy(), extent=(x, x + 1, y + 1, y))
        axes.add_patch(Rectangle((x, y), 1, 1, fill=False, edgecolor=color, linewidth=1.8))
        axes.text(x + 0.5, y + 1.06, text, ha="center", va="top", fontsize=5.5, color=color)

    for word, half in (("best", slice(rows // 2)), ("worst", slice(rows // 2, None))):
        counts = sorted(set(strips[0].right[half].sum(1).tolist()))
        span = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
        axes.text(0, tops[half][0] - 0.12, f"{word} cases: {span} of {k} right", fontweight="bold", va="bottom")
    for image, name, y in zip(queries, names, tops, strict=True):
        show(image, 0, y, "black", name)
    for number, strip in enumerate(strips):
        left = start + number * pitch
        axes.text(left, -0.6, strip.title, va="bottom")
        for row, y in enumerate(tops):
            for column, right in enumerate(strip.right[row].tolist()):
                text = "✓" if right else f"✗ {strip.names[row][column]}"
                show(strip.images[row, column], left + 1.08 * column, y, RIGHT if right else WRONG, text)
            axes.text(left + 1.08 * k + 0.05, y + 0.5, f"{int(strip.right[row].sum())}/{k}", va="center", fontsize=7)
    return figure


def gallery(args: argparse.Namespace) -> None:
    """Test images and their nearest training images, best and worst cases (NPID, Fig. 5)."""
    device, k = common.pick_device(args.device), args.num_neighbors
    encoders, sources = open_networks(args, device)
    sets = load_data(encoders[0], args, device)
    train, test = (data.select((data.labels >= 0).nonzero()[:, 0]) for data in sets)
    if not len(train) or not len(test):
        raise common.Fault(f"{train.name} has no classes: the gallery needs a folder for each class")

    def pictures(data: common.ImageSet, rows: Tensor) -> tuple[Tensor, list[str]]:
        images = torch.cat(list(data.centers(rows, args.batch_size, device))).cpu()
        return images, [data.classes[label][:9] for label in data.labels[rows].tolist()]

    chosen, strips = list[int](), list[Strip]()
    runs = dict(zip(legend(sources), sources, strict=True))
    for encoder, title in zip(encoders, runs, strict=True):
        queries, keys = extract(encoder, test, args, device), extract(encoder, train, args, device)
        index = common.neighbors(queries, keys, k)[1].cpu()
        right = train.labels[index] == test.labels[:, None]
        chosen = chosen or pick_queries(right.sum(1), test.labels, args.rows, args.seed)
        images, names = pictures(train, index[chosen].flatten())
        title += f": {100 * right.float().mean():.1f} % right over all {len(test):,} test images"
        images = images.view(len(chosen), k, *images.shape[1:])
        strips.append(Strip(title, images, right[chosen], [names[i : i + k] for i in range(0, len(names), k)]))
    note = (f"Left: test images of {test.name}, chosen by neighbours in the first network, seed {args.seed}. Right: "
            f"the {k} nearest of {len(train):,} training images, nearest first; green and ✓: the class is right.")
    figure = draw_gallery(*pictures(test, torch.tensor(chosen)), strips)
    save(figure, f"Test images and their {k} nearest training images", note, runs, args.out)


# ---- curves ----------------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]  # an epoch each
AXES = {"epoch": "epoch", "loss": "loss", "knn_top1": "top-1 in %"}
PANELS = {"Training loss": ("epoch", "loss"), "kNN accuracy": ("epoch", "knn_top1"),
          "kNN accuracy against loss": ("loss", "knn_top1")}


def read_log(name: str) -> tuple[Source, Rows, float | None]:
    """What was run, its epochs, and the loss of equal probabilities where it is known."""
    path = (Path(name).parent if Path(name).is_file() else Path(name)) / "log.jsonl"
    try:
        lines = path.read_text().splitlines(keepends=True)
        header, *rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may not be whole yet
        rows = [row for row in rows if "epoch" in row and "loss" in row]
        folder, epochs = path.resolve().parent.name, max(row["epoch"] for row in rows)
        source = Source(folder, dict(header["options"]), dict(header["data"]), header["git"], epochs)
        str(source)
    except OSError as error:
        raise common.Fault(f"cannot read {path} ({error.strerror}): name the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise common.Fault(f"{path} is no log of these scripts, or has no epoch yet") from None
    return source, rows, header.get("chance_loss") if source.options.get("loss") not in ("nce", "sampled") else None


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
            points = series(runs, x, y)
            if points.numel():
                several = len(runs) > 1
                for line in points if several else ():
                    axes.plot(*line.T, color=COLORS[number % 7], linewidth=0.6, alpha=0.5)
                label += f" (mean of {len(runs)} seeds)" * several
                axes.plot(*points.mean(0).T, **look(number), markersize=3, label=label)
                end = points[:, -1, 1]
                text = f"{end.mean():.{digits}f}" + (f" ± {end.std():.{digits}f}" if several else "")
                ends.append((end.mean().item(), points[:, -1, 0].mean().item(), text, COLORS[number % 7]))
        for text, level in chance.items() if y == "loss" else ():
            axes.axhline(level, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(text, (0, level), (3, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                          color="0.4", fontsize=7)
        if x == "loss":
            axes.invert_xaxis()
            continue
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        low, high = axes.get_ylim()
        above = -math.inf  # values at the ends of lines, moved apart where they would overlap
        for value, where, text, color in sorted(ends):
            above = max(value, above + 0.055 * (high - low))
            axes.text(where, above, f"  {text}", va="center", color=color, fontsize=7)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=min(2, len(groups)))
    return figure


def curves(args: argparse.Namespace) -> None:
    """Loss and kNN accuracy over the epochs of one or more runs (NPID, Fig. 3 and 4)."""
    groups, chance = dict[str, list[tuple[Source, Rows]]](), dict[str, float]()
    for name in args.runs:
        source, rows, level = read_log(name)
        key = repr(sorted((key, value) for key, value in source.options.items() if key not in IGNORED))
        if source.options["seed"] in [other.options["seed"] for other, _ in groups.get(key, [])]:
            key += name  # the same run once more, perhaps of changed code: not another seed
        groups.setdefault(key, []).append((source, rows))
        if level is not None:
            equal = abs(level - math.log(source.data["images"])) < 1e-3
            chance[f"chance, {'ln N = ' * equal}{level:.2f}"] = level
    sources = []
    for members in groups.values():
        first, seeds = members[0][0], "/".join(str(source.options["seed"]) for source, _ in members)
        git, epochs = "/".join({source.git: "" for source, _ in members}), min(source.epochs for source, _ in members)
        sources.append(first._replace(options=first.options | dict(seed=seeds), git=git, epochs=epochs))
    same = len({(source.options["script"], source.options.get("loss")) for source in sources}) == 1
    labels, lines = legend(sources), [[rows for _, rows in members] for members in groups.values()]
    figure = draw_curves(dict(zip(labels, lines, strict=True)), chance, compare=same)
    save(figure, "Learning curves", "", dict(zip(labels, sources, strict=True)), args.out)


# ---- density ---------------------------------------------------------------------------------------------------------


def density_ranks(images: int) -> tuple[int, int, int]:
    """The paper's 30 nearest, and ranks 1000 to 4096 for the background; of fewer images the same shares of 4,096."""
    share = min(1.0, (images - 1) / 4096)
    first, last = round(1000 * share), round(4096 * share)
    if first < 2:
        raise common.Fault(f"{images} images are too few to tell near ones from the background")
    return min(30, first - 1), first, last


def densities(features: Tensor, rows: Tensor, local: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Mean dot product of features[rows] with their `local` nearest, and with ranks first ... last; self left out."""
    near, far = list[Tensor](), list[Tensor]()
    for part in torch.split(rows, 1024):
        similarity = common.neighbors(features[part], features, last, exclude=part)[0].cpu()
        near.append(similarity[:, :local].mean(1))
        far.append(similarity[:, first - 1 :].mean(1))
    return torch.cat(near), torch.cat(far)


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
    device = common.pick_device(args.device)
    encoders, sources = open_networks(args, device)
    banks = all(encoder.bank is not None for encoder in encoders) and not {"data", "subset"} & set(args.typed)
    kind = args.features or ("bank" if banks else "clean")
    data = load_data(encoders[0], args, device)[0] if kind == "clean" else None
    near, far, ranks, counts = dict[str, Tensor](), dict[str, Tensor](), set[tuple[int, int, int]](), set[str]()
    runs = dict(zip(legend(sources), sources, strict=True))
    for encoder, (label, source) in zip(encoders, runs.items(), strict=True):
        features = encoder.bank if data is None else extract(encoder, data, args, device)
        if features is None:
            raise common.Fault(f"{source.name} has no memory bank: use --features clean")
        features = features.to(device).float()
        if not features.isfinite().all():
            raise common.Fault(f"the features of {source.name} are not finite")
        rows = torch.randperm(len(features), generator=common.generator(args.seed, "density"))[: args.images]
        ranks.add(density_ranks(len(features)))
        counts.add(f"{len(rows):,} of {len(features):,}")
        near[label], far[label] = densities(features, rows.to(device), *density_ranks(len(features)))
    titles = ("Local density: " + " or ".join(f"the {local} nearest" for local in sorted({rank[0] for rank in ranks})),
              "Background density: " + " or ".join(f"ranks {first:,} to {last:,}" for _, first, last in sorted(ranks)))
    words = "of the memory bank, as training left them" if data is None else f"of {data.name}, without augmentation"
    note = f"Features {words}; {' or '.join(sorted(counts))} images, each against all others."
    figure = draw_density(dict(zip(titles, (near, far), strict=True)))
    save(figure, "Density of the embedding", note, runs, args.out)


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True, help="picture; NAME --help: its options")

    def add(draw: Callable[[argparse.Namespace], None], network: bool = True) -> argparse.ArgumentParser:
        options = names.add_parser(draw.__name__, help=draw.__doc__, description=draw.__doc__, allow_abbrev=False,
                                   formatter_class=parser.formatter_class)
        options.set_defaults(draw=draw, options=options)
        options.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a checkpoint file"
                             + '; "random" for an untrained network' * network)
        options.add_argument("--out", type=Path, metavar="FILE", help="default: NAME.png in the first run's folder")
        if network:
            options.add_argument("--layer", choices=["auto", "head", "backbone"], default="auto", help="features: the "
                                 "head's or the backbone's; auto: head of these scripts, backbone of foreign files")
            options.add_argument("--arch", choices=common.ARCHITECTURES, help="of files that do not say it")
            options.add_argument("--width", type=common.COUNT, help="of files that do not say it")
            options.add_argument("--seed", type=common.COUNT_OR_ZERO, default=0, help="of what is drawn at random")
            options.add_argument("--batch-size", type=common.COUNT, default=256, help="images in one forward pass")
            common.add_data_options(options)
            common.add_device_options(options)
        return options

    options = add(gallery)
    options.add_argument("--rows", type=common.COUNT, default=4, help="queries in the upper and in the lower half")
    options.add_argument("--k", "--num-neighbors", dest="num_neighbors", type=common.COUNT, default=10, metavar="K",
                         help="neighbours of each query")
    add(curves, network=False)
    options = add(density)
    options.add_argument("--features", choices=["bank", "clean"], help="the memory bank, or features without any "
                         "augmentation; default: the bank if every run has one, and neither --data nor --subset")
    options.add_argument("--images", type=common.COUNT, default=20_000, metavar="N", help="the distribution over N "
                         "images, drawn at random; their neighbours are sought among all")
    args = parser.parse_args(argv)
    args.typed = common.typed(args.options, argv)
    first = Path(next((name for name in args.runs if name != "random"), "."))
    args.out = args.out or (first if first.is_dir() else first.parent) / f"{args.name}.png"
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {args.out}: the name must end in .png, .pdf or .svg")
    if "out" in args.typed and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no directory {args.out.parent}")
    return args


def main(args: argparse.Namespace) -> None:
    with matplotlib.rc_context(STYLE):
        args.draw(args)


if __name__ == "__main__":
    common.launch(main, parse_args)
