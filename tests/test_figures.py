"""Figures: what is drawn is what was measured, and input that is not a run ends with one line."""

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import shlex
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import common
import figures
import local_aggregation
import npid

FEW = ["--test-subset", "40"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small NPID run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["npid.py"])
        npid.main(npid.parse_args(["--preset", "smoke", "--device", "cpu", "--output", str(folder)]))
    return folder


def draw(*argv: Any) -> None:
    figures.main(figures.parse_args([str(word) for word in argv]))


def image(path: Path) -> np.ndarray[Any, Any]:
    """The picture as (H, W, 3), after a look at its size and that there is something on it."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert 5_000 < path.stat().st_size < 200_000
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 2
    return pixels


def other(run: Path, folder: Path, **options: Any) -> Path:
    """A run with the log of `run` under other options, its figures moved by a tenth."""
    folder.mkdir()
    header, *rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    header["options"] |= options
    rows = [row | dict(loss=row["loss"] + 0.1, knn_top1=row["knn_top1"] + 0.1) for row in rows]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    return folder


def texts(figure: Figure) -> list[str]:
    """What is written into the panels."""
    return [text.get_text().strip() for axes in figure.axes for text in axes.texts]


# gallery


def test_queries_are_the_best_and_the_worst() -> None:
    """Most right first, then fewest; among equals each class once before any class twice; the seed decides the rest."""
    right = torch.tensor([10, 10, 10, 10, 3, 0, 0, 0, 0, 1])
    labels = torch.tensor([0, 0, 0, 1, 2, 5, 5, 6, 5, 7])
    for seed in range(5):
        chosen = figures.pick_queries(right, labels, 3, seed)
        assert chosen == figures.pick_queries(right, labels, 3, seed)
        assert set(chosen[:3]) < {0, 1, 2, 3} and 3 in chosen[:2]
        assert set(chosen[3:]) < {5, 6, 7, 8} and 7 in chosen[3:5]
    assert len({tuple(figures.pick_queries(right, labels, 3, seed)) for seed in range(9)}) > 1
    assert sorted(figures.pick_queries(right, labels, 5, 0)) == list(range(10))
    with pytest.raises(common.Fault, match="--rows 6"):
        figures.pick_queries(right, labels, 6, 0)


def test_frames_are_green_where_the_class_is_right() -> None:
    """Colour of each frame, on the figure and among its pixels, and a mark that does not need the colour."""
    right = torch.rand(4, 3, generator=common.generator("frames")) < 0.5
    grey = torch.full((4, 3, 3, 8, 8), 0.5)
    strip = figures.Strip("network", grey, right, [["cat", "dog", "cow"]] * 4)
    figure = figures.draw_gallery(grey[:, 0], ["cat"] * 4, [strip], {"best": 2, "worst": 2})
    figure.set_dpi(300)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels, axes = np.asarray(canvas.buffer_rgba())[:, :, :3], figure.axes[0]  # type: ignore[no-untyped-call]
    frames = [patch for patch in axes.patches if matplotlib.colors.to_hex(patch.get_edgecolor()) != "#000000"]
    assert len(frames) == right.numel()
    for frame, expected in zip(frames, right.flatten().tolist(), strict=True):
        color = figures.RIGHT if expected else figures.WRONG
        assert matplotlib.colors.to_hex(frame.get_edgecolor()) == color.lower()
        x, y = axes.transData.transform(frame.get_xy() + np.array([0.5, 0.0]))  # type: ignore[attr-defined]
        drawn = pixels[len(pixels) - 1 - int(y), int(x)] / 255
        assert np.abs(drawn - matplotlib.colors.to_rgb(color)).max() < 0.15
    words = texts(figure)
    assert words.count("✓") == int(right.sum()) and sum(word.startswith("✗ ") for word in words) == int((~right).sum())
    assert [f"{row.sum()}/3" for row in right] == [word for word in words if word.endswith("/3")]


@pytest.mark.parametrize("shift", [0, 1])
def test_neighbours_of_known_features(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """Features that are the class have only right neighbours, those of the next class only wrong ones of that class."""
    seen = list[figures.Strip]()
    drawn = figures.draw_gallery

    def extract(encoder: Any, data: common.ImageSet, *rest: Any) -> torch.Tensor:
        return F.one_hot((data.labels + shift * (len(data) == 40)) % 10, 10).float()

    def spy(queries: torch.Tensor, names: list[str], strips: list[figures.Strip], parts: dict[str, int]) -> Figure:
        seen.extend(strips)
        expected = [f"class {(int(name[-1]) + shift) % 10}" for name in names]
        assert all(row == [name] * 10 for strip in strips for row, name in zip(strip.names, expected, strict=True))
        return drawn(queries, names, strips, parts)

    monkeypatch.setattr(figures, "extract", extract)
    monkeypatch.setattr(figures, "draw_gallery", spy)
    draw("gallery", run, *FEW, "--rows", 2, "--out", tmp_path / "picture.png")
    assert all((strip.right == (shift == 0)).all() for strip in seen)
    assert seen[0].title == f"npid smoke: {100 - 100 * shift:.1f} % right over all 40 test images"


def test_titles_of_strips_do_not_overlap() -> None:
    """Titles of networks side by side are broken where a few neighbours leave them little room."""
    grey, right = torch.full((2, 3, 3, 4, 4), 0.5), torch.ones(2, 3, dtype=torch.bool)
    names = ["deepcluster smoke", "resnet18-f37072fd.pth"]
    titles = [f"{name}: 48.3 % right over all 10,000 test images" for name in names]
    strips = [figures.Strip(title, grey, right, [["cat", "dog", "cow"]] * 2) for title in titles]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.draw_gallery(grey[:, 0], ["cat"] * 2, strips, {"best": 2})
        figure.canvas.draw()
    first, second = (text.get_window_extent() for text in figure.axes[0].texts
                     if " ".join(text.get_text().split()) in titles)
    assert first.x1 < second.x0 and second.x1 <= figure.bbox.x1


def test_gallery_side_by_side(run: Path) -> None:
    """Two networks stand beside each other, and the picture goes to the first one's folder."""
    draw("gallery", run, "random", *FEW, "--rows", 1, "--k", 4)
    height, width, _ = image(run / "gallery.png").shape
    assert width > 1.5 * height and not list(run.glob("*.tmp"))


# curves


def test_series_are_the_epochs_that_all_runs_have() -> None:
    """A run that has got less far, or looked less often, shortens the mean."""
    long = [dict(epoch=e, loss=e / 2, **({"knn_top1": 3 * e} if e % 2 else {})) for e in (1, 2, 3, 4, 5)]
    short = [dict(epoch=e, loss=float(e), knn_top1=e) for e in (1, 2, 3)]
    both = [long, short]
    assert figures.series(both, "epoch", "loss").tolist() == [[[1, 0.5], [2, 1], [3, 1.5]], [[1, 1], [2, 2], [3, 3]]]
    assert figures.series(both, "loss", "knn_top1").tolist() == [[[0.5, 3], [1.5, 9]], [[1, 1], [3, 3]]]


def test_curves_label_what_they_show() -> None:
    """Each seed's line and their mean, at its end the final mean and deviation, the chance line, a legend; loss falls
    to the right."""
    runs = [[dict(epoch=e, loss=9 - e + seed, knn_top1=10.0 * e) for e in (1, 2, 3)] for seed in (0, 1)]
    figure = figures.draw_curves({"two": runs, "one": runs[:1]}, {"chance, ln N = 8.52": 8.52}, compare=True)
    loss, accuracy, both = figure.axes
    assert sorted(text.get_text().strip() for text in loss.texts) == ["6.00", "6.50 ± 0.71", "chance, ln N = 8.52"]
    assert sorted(text.get_text().strip() for text in accuracy.texts) == ["30.0", "30.0 ± 0.0"]
    heights = sorted(text.get_position()[1] for text in accuracy.texts)
    assert heights[1] - heights[0] > 0.05 * np.ptp(accuracy.get_ylim())  # they do not overlap
    assert [list(line.get_ydata()) for line in loss.lines[:4]] == [[8, 7, 6], [9, 8, 7], [8.5, 7.5, 6.5], [8, 7, 6]]
    assert both.xaxis_inverted() and len(figures.draw_curves({"one": runs[:1]}, {}, compare=False).axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["two (mean of 2 seeds)", "one"]
    without = [[dict(epoch=1, loss=2.0)]]
    assert len(figures.draw_curves({"one": without}, {}, compare=True).axes) == 1


def test_a_single_epoch_has_a_whole_number() -> None:
    """The axis of epochs has no fractions, however few epochs there are."""
    curves = figures.draw_curves({"one": [[dict(epoch=1, loss=2.0)]]}, {}, compare=False)
    for figure, epoch in ((curves, 1), (figures.draw_edges({}, 10.0, {"one": [(0, 12.0)]}), 0)):
        ticks, (low, high) = figure.axes[0].get_xticks(), figure.axes[0].get_xlim()
        assert [tick for tick in ticks if low <= tick <= high] == [epoch]


@pytest.mark.parametrize("label", ["npid cifar10", "npid-cifar10-cosine-of-thirty-epochs-with-momentum-seed0"])
def test_the_legend_of_curves_stands_beside_the_title(label: str) -> None:
    """However long the names: it begins behind the title and ends within the figure."""
    rows: list[figures.Rows] = [[dict(epoch=1, loss=2.0, knn_top1=20.0), dict(epoch=2, loss=1.0, knn_top1=30.0)]]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.draw_curves({f"{label}{number}": rows for number in range(3)}, {}, compare=False)
        title = figure.suptitle("Learning curves", x=0.01, ha="left")
        FigureCanvasAgg(figure).draw()
    legend, words = figure.legends[0].get_window_extent(), title.get_window_extent()
    assert words.x1 < legend.x0 and legend.x1 <= figure.bbox.x1


def test_curves_of_runs_and_seeds(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that differ in the seed alone become one line, others are named by what differs, the loss of chance is that
    of the log, called ln N where it is."""
    seen = list[Any]()
    drawn = figures.draw_curves

    def spy(groups: Any, chance: Any, compare: bool) -> Figure:
        seen.append((groups, chance))
        return drawn(groups, chance, compare)

    monkeypatch.setattr(figures, "draw_curves", spy)
    seed = other(run, tmp_path / "seed", seed=1, output="elsewhere")
    proximal = other(run, tmp_path / "proximal", proximal_weight=1.0)
    again = other(run, tmp_path / "again")
    draw("curves", run, seed, proximal, again, "--out", tmp_path / "picture.png")
    image(tmp_path / "picture.png")
    groups, chance = seen[0]
    assert [len(runs) for runs in groups.values()] == [2, 1, 1]
    assert chance == {"chance, ln N = 5.55": round(math.log(256), 4)}
    draw("curves", run / "checkpoint.pth", proximal, "--out", tmp_path / "picture.svg")
    assert list(seen[1][0]) == ["proximal weight 0.0", "proximal weight 1.0"]
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    nce = [other(run, tmp_path / "nce", loss="nce", preset="other"),
           other(run, tmp_path / "la", script="local_aggregation", warmup_loss="nce")]
    draw("curves", run, *nce, "--out", tmp_path / "picture.png")
    assert list(seen[2][0]) == ["npid smoke", "npid other", "local_aggregation smoke"] and len(seen[2][1]) == 1
    draw("curves", *nce, "--out", tmp_path / "picture.png")
    assert seen[3][1] == {}
    draw("curves", run, run, run, "--out", tmp_path / "picture.png")
    assert [len(runs) for runs in seen[4][0].values()] == [1, 1, 1]
    text = (again / "log.jsonl").read_text()
    (again / "log.jsonl").write_text(text.replace('"chance_loss": 5.5452', '"chance_loss": 2.3026'))  # ten clusters
    draw("curves", again, "--out", tmp_path / "picture.png")
    assert seen[5][1] == {"chance, 2.30": 2.3026}


def test_a_run_that_is_trained_on_has_its_new_epochs(run: Path, tmp_path: Path) -> None:
    """Its log begins with the epochs that it had at first; it goes with runs that had all from the start."""
    whole, longer = other(run, tmp_path / "whole", seed=1), other(run, tmp_path / "longer", epochs=1)
    first, second = (figures.read_log(str(name))[0] for name in (whole, longer))
    assert "epoch 2 of 2" in str(second) and figures.experiment(first) == figures.experiment(second)


def test_curves_of_other_images_are_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on other images are another line, named by them, whatever their seeds; a subset may differ with the seed."""
    seen = list[Any]()
    monkeypatch.setattr(figures, "draw_curves", lambda groups, *_, **__: seen.append(groups) or Figure())
    logs = []
    for seed, (data, checksum) in enumerate((("cifar10", "a"), ("cifar10", "b"), ("shapes", "a"))):
        options = dict(script="npid", preset="smoke", arch="resnet18", width=4, seed=seed, epochs=1, data=data)
        header = dict(options=options, data=dict(name=data, images=64, checksum=checksum), git="0")
        logs.append(tmp_path / str(seed))
        logs[-1].mkdir()
        lines = [json.dumps(line) + "\n" for line in (header, dict(epoch=1, loss=2.0))]
        (logs[-1] / "log.jsonl").write_text("".join(lines))
    draw("curves", *logs, "--out", tmp_path / "curves.png")
    assert [(name, len(runs)) for name, runs in seen[0].items()] == [("data cifar10", 2), ("data shapes", 1)]


# density


def test_density_of_bank_and_of_features(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bank where every network has one, else features of all; labels say the mean and the ranks, lines the mean,
    heights the percentage of images."""
    seen = list[dict[str, dict[str, torch.Tensor]]]()
    drawn = figures.draw_density

    def spy(panels: dict[str, dict[str, torch.Tensor]]) -> Figure:
        seen.append(panels)
        return drawn(panels)

    monkeypatch.setattr(figures, "draw_density", spy)
    draw("density", run, "--out", tmp_path / "bank.png", "--images", 100)
    draw("density", run, "random", *FEW, "--out", tmp_path / "clean.png")
    for name in ("bank.png", "clean.png"):
        image(tmp_path / name)
    titles = ["Local density: the 30 nearest", "Background density: ranks 62 to 255"]
    assert [list(panels) for panels in seen] == [titles, titles]
    bank = torch.load(run / "checkpoint.pth", weights_only=True)["state"]["bank"]["features"]
    rows = torch.randperm(256, generator=common.generator(0, "density"))[:100]
    expected = local_aggregation.density(bank, rows)
    for values, lines in zip(expected, seen[0].values(), strict=True):
        assert torch.equal(lines["npid smoke"], values)
    assert [len(lines["untrained"]) for lines in seen[1].values()] == [256, 256]
    legend = drawn(seen[0]).axes[0].get_legend()
    assert legend is not None and legend.get_texts()[0].get_text() == f"npid smoke: mean {expected[0].mean():.3f}"
    values = torch.tensor([0.0, 0, 0, 1])
    axes = drawn({key: {"one": values} for key in "ab"}).axes[0]
    assert max(bar.get_xy()[:, 1].max() for bar in axes.patches) == 75  # type: ignore[attr-defined]
    assert [line.get_xdata() for line in axes.lines] == [[0.25, 0.25]]  # the mean


# neighbors, retrieval


def test_queries_are_spread_over_classes() -> None:
    """No class comes twice before every other came once; the order stays."""
    labels = torch.tensor([0, 0, 0, 1, 0, 1, 2])
    assert figures.spread_out([2, 0, 1, 3, 4, 5, 6], labels, 2) == [2, 3]
    assert figures.spread_out([2, 0, 1, 3, 4, 5, 6], labels, 4) == [2, 0, 3, 6]
    assert figures.spread_out([6, 1], labels, 4) == [6, 1]


def test_votes_are_the_weighted_knn() -> None:
    """Class and share of the votes equal a float64 loop over the neighbours; accuracy equals common.knn_accuracy."""
    source = common.generator("votes")
    keys, queries = (F.normalize(torch.randn(n, 8, generator=source), dim=1) for n in (60, 30))
    labels, truth = torch.arange(60) % 4, torch.arange(30) % 4
    train = common.ImageSet("toy", 8, (0, 0, 0), (1, 1, 1), labels, list("abcd"), torch.arange(60))
    found, share, nearest = figures.votes(queries, keys, train)
    for query in range(30):
        weights = [0.0] * 4
        for key in range(60):
            weights[int(labels[key])] += math.exp(float(queries[query].double() @ keys[key].double()) / 0.07)
        assert found[query] == weights.index(max(weights))
        assert share[query] == pytest.approx(max(weights) / sum(weights), abs=1e-6)
    assert nearest.shape == (30, 60)
    top1 = common.knn_accuracy(queries, truth, keys, labels, 4, num_neighbors=[60])[60, 0.07][0]
    assert 100 * (found == truth).double().mean() == pytest.approx(top1)


def test_neighbors_and_retrieval(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both show the run beside the untrained network; notes are the votes; retrieval's queries are of three classes."""
    seen = list[tuple[list[str], list[figures.Strip], dict[str, int]]]()
    drawn = figures.draw_gallery

    def spy(queries: torch.Tensor, names: list[str], strips: list[figures.Strip], parts: dict[str, int]) -> Figure:
        seen.append((names, strips, parts))
        return drawn(queries, names, strips, parts)

    monkeypatch.setattr(figures, "draw_gallery", spy)
    for name in ("neighbors", "retrieval"):
        draw(name, run, "--test-subset", 100, "--rows", 3, "--k", 4, "--out", tmp_path / f"{name}.png")
        image(tmp_path / f"{name}.png")
    (names, strips, parts), (queries, found, random) = seen
    assert [strip.title.split(":")[0] for strip in strips] == ["npid smoke", "untrained"]
    assert len(names) == 6 and list(parts.values()) == [3, 3]
    assert list(parts) == ["right and surest", "wrong and least sure"]
    shares = [int(note.split()[-2]) for note in strips[0].notes]
    assert shares[:3] == sorted(shares[:3], reverse=True) and shares[3:] == sorted(shares[3:], reverse=True)
    assert all(note.split("\n")[0] == name for note, name in zip(strips[0].notes[:3], names, strict=False))
    assert found[0].right is not None
    counts = found[0].right.sum(1).tolist()
    assert len(set(queries)) == 3 and counts == sorted(counts, reverse=True) and random == {"random queries": 3}


def test_retrieval_without_classes_or_test_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder of images alone: queries are some of them, beside each of both networks' nearest others."""
    seen = list[tuple[torch.Tensor, list[str], list[figures.Strip]]]()
    drawn = figures.draw_gallery
    monkeypatch.setattr(figures, "draw_gallery", lambda *found: (seen.append(found[:3]), drawn(*found))[1])
    (tmp_path / "flat").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"flat/{number}.png")
    words = ["--data", tmp_path / "flat", "--rows", 3, "--k", 4, "--batch-size", 50]
    draw("retrieval", run, *words, "--out", tmp_path / "retrieval.png")
    image(tmp_path / "retrieval.png")
    queries, names, strips = seen[0]
    assert names == ["", "", ""] and [strip.title for strip in strips] == ["npid smoke", "untrained"]
    args = figures.parse_args(["retrieval", *map(str, [run, *words])])
    args.device = torch.device("cpu")
    (encoder, _), _ = figures.open_networks(args)
    every = torch.cat(list(figures.load_train([encoder], args).centers(torch.arange(50), 50, args.device)))
    features = figures.extract(encoder, figures.load_train([encoder], args), args).double()
    for query, shown in zip(queries, strips[0].images, strict=True):
        itself = int((every - query).abs().amax((1, 2, 3)).argmin())
        nearest = (features @ features[itself]).argsort(descending=True).tolist()
        nearest.remove(itself)
        assert torch.equal(shown, every[nearest[:4]]) and strips[0].right is None
    draw("pca", run, "--data", tmp_path / "flat", "--out", tmp_path / "pca.png")
    with pytest.raises(common.Fault, match=r"no classes.* --data"):
        draw("gallery", run, "--data", tmp_path / "flat", "--out", tmp_path / "gallery.png")


# mds


def test_mds_is_that_of_scikit_learn() -> None:
    """Metric MDS of the distance matrix as scikit-learn finds it from the same start; points of a plane come back."""
    from sklearn.manifold import MDS

    source = common.generator("mds")
    features = F.normalize(torch.randn(60, 16, generator=source), dim=1)
    x = features.double().numpy()
    left, scale, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))
    with pytest.MonkeyPatch.context(), warnings.catch_warnings(action="ignore"):
        reference = MDS(2, n_init=1, max_iter=1000, eps=1e-7, dissimilarity="precomputed")
        expected = reference.fit_transform(distances, init=left[:, :2] * scale[:2])

    def between(points: Any) -> Any:
        return np.sqrt(((points[:, None] - points[None]) ** 2).sum(2))

    found = figures.embed_mds(features).numpy()
    assert np.abs(between(found) - between(expected)).max() < 1e-3
    stress = ((between(found) - distances) ** 2).sum()
    assert stress < ((between(left[:, :2] * scale[:2]) - distances) ** 2).sum()  # that of the principal plane
    plane = torch.randn(40, 2, generator=source) @ torch.linalg.qr(torch.randn(9, 2, generator=source))[0].T
    assert np.abs(between(figures.embed_mds(plane).numpy()) - between(plane.double().numpy())).max() < 1e-3


def test_mds_of_a_collapsed_network() -> None:
    """Features that are equal but for rounding have no distances to show: a fault, not a warning for each step."""
    same = torch.randn(16, generator=common.generator("same")).repeat(10, 1)
    for features in (same, same * (1 + 1e-7 * torch.randn(10, 1, generator=common.generator("rounding")))):
        with pytest.raises(common.Fault, match="the 10 images are all the same"):
            figures.embed_mds(features)


def test_mds_panels(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes with the highest kNN accuracy on the left, with the lowest on the right, as many images of each."""
    seen = list[figures.Cloud]()
    drawn = figures.draw_mds

    def spy(clouds: list[figures.Cloud]) -> Figure:
        seen.extend(clouds)
        return drawn(clouds)

    monkeypatch.setattr(figures, "draw_mds", spy)
    draw("mds", run, *FEW, "--images", 12, "--out", tmp_path / "mds.png")
    image(tmp_path / "mds.png")
    assert [len(cloud.names) for cloud in seen] == [5, 5] and not set(seen[0].names) & set(seen[1].names)
    accuracies = [[float(name.split()[-2]) for name in cloud.names.values()] for cloud in seen]
    assert min(accuracies[0]) >= max(accuracies[1]) and all(a == sorted(a, reverse=True) for a in accuracies)
    assert max(accuracies[0]) > 0 and {each % 25 for both in accuracies for each in both} == {0}  # of 4 test images
    assert all(torch.bincount(cloud.labels).tolist().count(12) == 5 for cloud in seen)
    assert seen[0].points.shape == (60, 2) and seen[0].images.shape == (60, 3, 32, 32)


def test_boxes_of_mds_are_of_the_class_that_falls_apart() -> None:
    """Of a class that is two heaps, rather than of one that is only wide, the images next to the centre of each."""
    heap = torch.tensor([0, 0.1, -0.1, 1, -1])
    along = torch.cat([torch.linspace(-50, 50, 30), heap - 10, heap + 10])
    points, labels = torch.stack([along, torch.zeros(40)], 1), torch.tensor([0] * 30 + [1] * 10)
    images = torch.arange(40)[:, None, None, None].expand(-1, 3, 8, 8) / 40
    figure = figures.draw_mds([figures.Cloud("cloud", points, labels, {0: "one, 9 %", 1: "two, 8 %"}, images)] * 2)
    assert figure.axes[0].get_title() == "cloud; boxes: two"
    boxes: list[Any] = list(figure.axes[0].artists)
    shown = [{round(40 * float(part.get_data().mean())) for part in box.offsetbox.get_children()} for box in boxes]
    assert sorted(map(sorted, shown)) == [[30, 31, 32], [35, 36, 37]]


def test_titles_of_mds_stay_in_the_picture() -> None:
    """A long title, of a network and a class, is broken to the width of its panel."""
    clouds = [figures.Cloud(f"deepcluster cifar10-thin: {word} accuracy", torch.rand(20, 2), torch.arange(20) % 2,
                            {0: "aircraft carrier, 50 %", 1: "container ship, 40 %"}, torch.rand(20, 3, 8, 8))
              for word in ("high", "low")]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.draw_mds(clouds)
        FigureCanvasAgg(figure).draw()
    first, second = (axes.title.get_window_extent() for axes in figure.axes)
    assert first.x0 >= 0 and first.x1 < second.x0 and second.x1 <= figure.bbox.x1


def test_mds_of_classes_without_test_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no accuracy, neither high nor low: their images are in no panel."""
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)):
        for split in ("train", "val")[: 2 - (number % 4 == 3)]:  # the last of four classes is trained on alone
            path = tmp_path / "set" / split / f"class {number % 4}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    seen = list[figures.Cloud]()
    monkeypatch.setattr(figures, "draw_mds", lambda clouds: seen.extend(clouds) or Figure())
    draw("mds", run, "--data", tmp_path / "set", "--classes", 2, "--out", tmp_path / "mds.png")
    names = [name.split(",")[0] for cloud in seen for name in cloud.names.values()]
    assert len(names) == 2 and "class 3" not in names


# untrained networks


@pytest.mark.parametrize(("channels", "words"), [(3, []), (3, ["--layer", "backbone"]), (2, [])])
def test_the_untrained_network_is_like_the_run(run: Path, tmp_path: Path, channels: int, words: list[str]) -> None:
    """It has a head if the run's network has one, and sees Sobel's gradients if that does, whatever comes first."""
    name = str(run)
    if channels == 2:
        name = str(tmp_path / "sobel.pth")
        torch.save(common.backbone("resnet18", 4, True, 2).state_dict(), name)
        words = ["--arch", "resnet18", "--width", "4", "--image-size", "32"]
    args = figures.parse_args(["gallery", "random", name, *words])
    args.device = torch.device("cpu")
    (untrained, own), names = figures.open_networks(args)
    assert next(iter(names)) == "untrained" and (own.head is None) == (untrained.head is None) == bool(words)
    images = torch.rand(2, 3, 32, 32)
    assert untrained.embed(images).shape == own.embed(images).shape
    for encoder in (untrained, own):
        assert isinstance(encoder.backbone.front, common.Sobel) == (channels == 2)


def test_a_network_of_ones_own_needs_no_more_than_its_output(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `front` there is an untrained one beside it; without `stages`, pictures of them are a fault, no crash."""
    args = figures.parse_args(["gallery", "random", str(run)])
    args.device = torch.device("cpu")
    _, own = figures.open_networks(args)[0]
    own = dataclasses.replace(own, backbone=torch.nn.Flatten())
    assert figures.open_network(args, "random", own)[0].backbone.front
    monkeypatch.setattr(figures, "open_networks", lambda args: ([own], {}))
    with pytest.raises(common.Fault, match="no `stages`"):
        figures.maximize(args)


# foreign networks


def test_foreign_networks_see_the_images_as_alone(run: Path, tmp_path: Path) -> None:
    """Beside a run, before or after it, a foreign network has the features that it has alone, and the run has its own;
    the small print has the sides of the images where they differ."""
    torch.save(common.backbone("resnet18", 4).state_dict(), tmp_path / "foreign.pth")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 48, 48, 3), dtype=np.uint8)):
        path = tmp_path / "set" / ("train", "val")[number % 2] / str(number % 3) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    own, foreign = str(run), str(tmp_path / "foreign.pth")
    found, words = dict[str, list[torch.Tensor]](), list[str]()
    for names in ([own, foreign], [foreign, own], [foreign]):
        options = ["--data", str(tmp_path / "set"), "--arch", "resnet18", "--width", "4", "--layer", "backbone"]
        args = figures.parse_args(["gallery", *names, *options])
        args.device = torch.device("cpu")
        encoders, _ = figures.open_networks(args)
        test = figures.labelled(encoders, args, "test")
        for name, encoder in zip(names, encoders, strict=True):
            found.setdefault(name, []).append(figures.extract(encoder, test, args))
        words.append(figures.sides(test, args))
    assert [len(features) for features in found.values()] == [2, 3]
    assert all(torch.equal(features[0], other) for features in found.values() for other in features)
    assert words == ["\nSide of the images: 32 px for npid smoke, 48 px for foreign.pth.",
                     "\nSide of the images: 48 px for foreign.pth, 32 px for npid smoke.", ""]


def test_foreign_networks_have_the_statistics_that_are_named(run: Path, tmp_path: Path) -> None:
    """--mean and --std are those of a foreign network; a run beside it keeps its own."""
    torch.save(common.backbone("resnet18", 4).state_dict(), tmp_path / "foreign.pth")
    words = ["gallery", str(run), str(tmp_path / "foreign.pth"), "--arch", "resnet18", "--width", "4", *FEW]
    found = list[list[torch.Tensor]]()
    for options in ([], ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"], ["--std", "0.1", "0.2", "0.3"]):
        args = figures.parse_args([*words, *options])
        args.device = torch.device("cpu")
        encoders, _ = figures.open_networks(args)
        test = figures.labelled(encoders, args, "test")
        found.append([figures.extract(encoder, test, args) for encoder in encoders])
    (own, usual), (_, same), (kept, other) = found
    assert torch.equal(own, kept) and torch.equal(usual, same)  # of shapes both are 0.5
    assert (usual - other).abs().max() > 0.01


def test_a_run_beside_a_network_of_another_architecture(run: Path, tmp_path: Path) -> None:
    """--arch and --width are the foreign file's; the run keeps its own, and so does the untrained one like it."""
    torch.save(common.backbone("resnet34", 8, True).state_dict(), tmp_path / "foreign.pth")
    own, foreign = str(run), str(tmp_path / "foreign.pth")
    for names, dims in (([own, foreign, "random"], [32, 64, 32]), ([foreign, own], [64, 32]),
                        (["random", foreign], [64, 64])):
        args = figures.parse_args(["gallery", *names, "--arch", "resnet34", "--width", "8"])
        args.device = torch.device("cpu")
        assert [encoder.backbone.dim for encoder in figures.open_networks(args)[0]] == dims


@pytest.mark.parametrize(("small", "size"), [(False, 32), (True, 96)])
def test_the_stem_is_the_file_s(tmp_path: Path, small: bool, size: int) -> None:
    """A file keeps its stem whatever --image-size says."""
    torch.save(common.backbone("resnet18", 4, small).state_dict(), tmp_path / "foreign.pth")
    draw("filters", tmp_path / "foreign.pth", "--arch", "resnet18", "--width", 4, "--image-size", size)


# filters


def test_filters_with_sobel_are_composed() -> None:
    """A grey image through the composed filter is what Sobel and the first convolution make of it; RGB filters stay."""
    torch.manual_seed(0)
    network = common.backbone("resnet18", 4, True, 2)
    composed = figures.first_filters(network)
    assert composed.shape == (4, 1, 5, 5)
    grey = torch.rand(2, 1, 16, 16)
    expected = network.conv1(network.front(grey.expand(-1, 3, -1, -1)))  # type: ignore[operator]
    assert (F.conv2d(grey, composed) - expected[:, :, 2:-2, 2:-2]).abs().max() < 1e-5
    plain = common.backbone("alexnet", 4)
    assert torch.equal(figures.first_filters(plain), plain.features[0].weight)  # type: ignore[index,union-attr]


def test_filters_side_by_side(run: Path, tmp_path: Path) -> None:
    """A panel for each network, each of its tiles from black to white."""
    draw("filters", run, "random", "--out", tmp_path / "filters.png")
    image(tmp_path / "filters.png")
    tiles = np.asarray(figures.draw_filters({"one": torch.randn(5, 3, 3, 3)}).axes[0].get_images()[0].get_array())
    assert tiles.shape == (8, 12, 3) and tiles.max() == 1  # 5 of 6 places, a white line each
    own = [tiles[4 * row + 1 : 4 * row + 4, 4 * column + 1 : 4 * column + 4] for row in (0, 1) for column in (0, 1, 2)]
    assert [(tile.min(), tile.max()) for tile in own[:5]] == [(0, 1)] * 5


# maximize


def test_ascent_raises_the_activation(run: Path) -> None:
    """Gradient ascent raises each channel of conv1 to conv3 that noise fires at least tenfold over that noise, and
    twofold over noise of the image's own contrast; of conv4, after two epochs of training, most channels; what is said
    of an image is its activation."""
    network: Any = common.load_encoder(run / "checkpoint.pth").backbone
    noise = figures.CONTRAST * torch.randn(8, 3, 32, 32, generator=common.generator("noise"))
    for stage, share in enumerate((1, 1, 1, 0.8, 0)):  # conv5 has few live ones, other ones on other processors
        rest = network.stages(noise)[stage].mean((2, 3))
        live = (rest.amax(0) > 0).nonzero()[:8, 0]
        most = figures.optima(network, stage, live, noise, 100)
        raised = most.after / most.before
        assert (len(live) >= 3 or not share) and (raised > 10).sum() >= share * len(live), (stage, raised)
        assert stage > 2 or (most.after > 2 * most.loud).all(), stage
        maps, index = network.stages(most.images)[stage], torch.arange(len(live))
        assert torch.allclose(maps[index, live].mean((1, 2)), most.after, rtol=1e-3), stage
        assert torch.allclose(most.before, rest.mean(0)[live]), stage
    assert most.images.isfinite().all() and not most.images.requires_grad


def test_ascent_of_an_image_does_not_depend_on_the_others() -> None:
    """Each image goes its own way, and the best on that way is returned, never less than the start."""
    peak, start = torch.tensor([False, True, False]), torch.randn(3, 3, 8, 8, generator=common.generator("alone"))

    def maps(images: torch.Tensor) -> torch.Tensor:
        return torch.relu(0.5 + images[:, 0] - images[:, 1] * images[:, 2])

    together, found = figures.ascend(maps, start, peak, 5)
    alone = figures.ascend(maps, start[1:2], peak[1:2], 5)[0]
    assert torch.allclose(alone[0], together[1], rtol=1e-3, atol=1e-3)
    assert (found >= maps(start).mean((1, 2))).all() and torch.allclose(maps(together).mean((1, 2)), found)


def test_ascent_goes_round_silence() -> None:
    """A channel that fires most just before it falls silent: steps beyond are taken again, shorter, and find more."""
    up = F.normalize(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)).flatten(), dim=0)

    def maps(images: torch.Tensor) -> torch.Tensor:
        along = F.normalize(images.flatten(1), dim=1) @ up
        return torch.where(along < 0.2, along, 0).clamp(min=0)[:, None, None].expand(-1, 2, 2)

    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    noise += ((0.02 - F.normalize(noise.flatten(1), dim=1) @ up)[:, None] * 14 * up).view_as(noise)
    start = maps(noise).mean((1, 2))
    assert (start > 0.01).all() and (start < 0.04).all()
    images, found = figures.ascend(maps, noise, torch.zeros(4, dtype=torch.bool), 40)
    torch.testing.assert_close(maps(images).mean((1, 2)), found)
    assert (found > 0.1).all()


def test_ascent_leaves_the_channels_bias_behind() -> None:
    """A channel that grey fires, and any weak pattern fires less, is raised tenfold too; one of which only a place can
    grow, as the rest falls silent, by its largest place."""
    start = 0.1 * torch.randn(4, 3, 8, 8, generator=common.generator("bias"))

    def grey(images: torch.Tensor) -> torch.Tensor:
        pattern = images[:, 0].mean((1, 2)).abs()
        bias = torch.relu(1 - 30 * images.square().mean((1, 2, 3)).clamp(max=0.03))
        return (bias + torch.relu(0.2 * pattern - 1))[:, None, None]

    def one_place(images: torch.Tensor) -> torch.Tensor:
        bright = images[:, 0]
        return torch.relu(1 + 3 * bright - bright.abs().sum((1, 2), keepdim=True))

    for maps, images, peak in ((grey, start, False), (one_place, 0.1 * start, True)):
        rest = maps(images).mean((1, 2))
        found = figures.ascend(maps, images, torch.full((4,), peak), 100)[1]
        assert (rest > 0).all() and (found > 10 * rest).all(), (maps, rest, found)


def test_maximize_shows_the_images_that_fire_most(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nine images are those with the highest mean activation of the channel, in order, and only live channels; the
    small print has the middle and the least of how much higher the channels of all stages are raised."""
    seen, notes, save = list[dict[str, list[figures.Channel]]](), list[str](), figures.save
    monkeypatch.setattr(figures, "save", lambda *x: (notes.append(x[2]), save(*x)))
    drawn = figures.draw_maximize

    def spy(rows: dict[str, list[figures.Channel]]) -> Figure:
        seen.append(rows)
        return drawn(rows)

    monkeypatch.setattr(figures, "draw_maximize", spy)
    draw("maximize", run, "--stages", "conv1", "conv3", "--channels", 2, "--steps", 20, "--out", tmp_path / "m.png")
    image(tmp_path / "m.png")
    assert list(seen[0]) == ["conv1", "conv3"]
    quiet, loud = (sorted(channel.after / getattr(channel, key) for row in seen[0].values() for channel in row)
                   for key in ("before", "loud"))
    assert f": {quiet[2]:,.0f} times as much in the median, {quiet[0]:,.0f} at least;" in notes[0]
    assert f"noise of the image's contrast {loud[2]:,.0f} and {loud[0]:.1f}." in notes[0]
    encoder = common.load_encoder(run / "checkpoint.pth")
    network: Any = encoder.backbone
    args = figures.parse_args(["maximize", str(run)])
    args.device = torch.device("cpu")
    data = figures.load_train([encoder], args)
    pixels = torch.cat(list(data.centers(torch.arange(256), 256, torch.device("cpu"))))
    maps = network.stages(data.normalize(pixels))
    for stage, channels in zip((0, 2), seen[0].values(), strict=True):
        for channel in channels:
            fired = maps[stage].mean((2, 3))[:, int(channel.title.split()[1])]
            assert channel.after > channel.before >= 0 and fired.max() > 0
            shown = [int((pixels - picture).abs().amax((1, 2, 3)).argmin()) for picture in channel.images]
            assert torch.allclose(fired[shown], fired.topk(9).values, rtol=0.02, atol=1e-3)


# edges


def test_edges_of_networks_and_logs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of the run and of the untrained network, a class's share of edges to itself among all others' neighbours;
    curves where a figure was measured, by epochs before it."""
    seen = list[Any]()
    drawn = figures.draw_edges

    def spy(boxes: Any, chance: float, curves: Any) -> Figure:
        seen.append((boxes, chance, curves))
        return drawn(boxes, chance, curves)

    monkeypatch.setattr(figures, "draw_edges", spy)
    draw("edges", run, "--out", tmp_path / "boxes.png")
    boxes, chance, curves = seen[0]
    assert list(boxes) == ["npid smoke", "untrained"] and boxes["untrained"].shape == (10,) and not curves
    args = figures.parse_args(["edges", str(run)])
    args.device = torch.device("cpu")
    encoders, _ = figures.open_networks(args)
    data = figures.load_train(encoders, args)
    features = figures.extract(encoders[0], data, args)
    nearest = (features @ features.T).fill_diagonal_(-2).topk(args.num_neighbors).indices
    same = (data.labels[nearest] == data.labels[:, None]).double().mean(1)
    expected = [100 * same[data.labels == label].mean().item() for label in range(10)]
    assert boxes["npid smoke"].tolist() == pytest.approx(expected, abs=0.5)  # products in other orders may tie
    assert chance == pytest.approx(100 * (25.6 - 1) / 255, rel=0.01)
    logs = [other(run, tmp_path / f"dc{every}", script="deepcluster", reassign_every=every) for every in (1, 2)]
    for log in logs:
        header, *_ = (log / "log.jsonl").read_text().splitlines()
        measured = enumerate((11.0, 11.0, 13.0, 14.0), 1)
        rows = [json.dumps(dict(epoch=e, loss=1.0, ratio_edge=edge)) for e, edge in measured]
        (log / "log.jsonl").write_text("\n".join([header, *rows, ""]))
    draw("edges", *logs, "--out", tmp_path / "curves.png")
    assert not seen[1][0]
    every, each_second = [(0, 11.0), (1, 11.0), (2, 13.0), (3, 14.0)], [(0, 11.0), (2, 13.0), (3, 14.0)]
    assert list(seen[1][2].values()) == [every, each_second]
    for name in ("boxes", "curves"):
        image(tmp_path / f"{name}.png")


def test_edges_are_labelled_by_the_mean_over_classes() -> None:
    """The number beside a box is the mean, as the diamond is, of the classes that have images."""
    figure = figures.draw_edges({"run": torch.tensor([10.0, 20, math.nan, 90])}, 10.0, {})
    assert "40.0" in texts(figure) and figure.axes[0].get_title() == "3 classes, final network"


def test_edges_name_a_curve_as_its_box(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve has the name that tells its run from all others, those without a curve included."""
    pic, kmeans = (other(run, tmp_path / how, script="deepcluster", clustering=how, reassign_every=1)
                   for how in ("pic", "kmeans"))
    with (kmeans / "log.jsonl").open("a") as log:
        print(json.dumps(dict(epoch=3, loss=1.0, ratio_edge=12.0)), file=log)
    seen = list[Any]()
    monkeypatch.setattr(figures, "draw_edges", lambda *drawn: (seen.append(drawn), Figure())[1])
    draw("edges", pic, kmeans, "--out", tmp_path / "edges.png")
    assert seen[0][2] == {"clustering kmeans, epochs 3": [(2, 12.0)]}


def test_edges_within_the_first_epoch(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose log has no epoch yet has the boxes of its checkpoint."""
    begun = shutil.copytree(run, tmp_path / "begun")
    (begun / "log.jsonl").write_text((run / "log.jsonl").read_text().splitlines()[0] + "\n")
    seen = list[Any]()
    monkeypatch.setattr(figures, "draw_edges", lambda *drawn: (seen.append(drawn), Figure())[1])
    draw("edges", begun)
    assert list(seen[0][0]) == ["npid smoke", "untrained"] and not seen[0][2]


def test_edges_of_deepcluster_are_of_its_descriptors(run: Path) -> None:
    """Rows of a run of deepcluster.py are the whitened features before the last ReLU, as scikit-learn's PCA has them up
    to signs; of other runs the unit features."""
    from sklearn.decomposition import PCA

    args = figures.parse_args(["edges", str(run)])
    args.device = torch.device("cpu")
    (encoder, _), _ = figures.open_networks(args)
    data = figures.load_train([encoder], args)
    assert torch.equal(figures.descriptors(encoder, data, args), figures.extract(encoder, data, args))
    network: Any = common.untrained_encoder("alexnet_bn", 4, True, args.device).backbone  # a ResNet ends with a mean
    encoder = dataclasses.replace(encoder, backbone=network, options=dict(script="deepcluster", feature_dim=16))
    h = figures.extract(encoder, data, args, functools.partial(network, relu_last=False))
    expected = F.normalize(torch.from_numpy(PCA(16, whiten=True).fit_transform(h.double().numpy())))
    found = figures.descriptors(encoder, data, args).double()
    assert found.shape == (len(data), 16)
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-3, rtol=1e-3)


# pca


def test_variance_kept_is_that_of_scikit_learn() -> None:
    """Cumulative shares of the eigenvalues as scikit-learn's PCA has them, up to all of the variance."""
    from sklearn.decomposition import PCA

    features = torch.randn(80, 12, generator=common.generator("pca")) * torch.arange(1, 13) + 5
    expected = 100 * np.cumsum(PCA().fit(features.double().numpy()).explained_variance_ratio_)
    assert np.abs(figures.variance_kept(features).numpy() - expected).max() < 1e-6


def test_pca_of_run_and_untrained(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of the raw features of both backbones before their last ReLU, or with --layer head of the unit
    embeddings."""
    seen = list[dict[str, torch.Tensor]]()
    drawn = figures.draw_pca
    monkeypatch.setattr(figures, "draw_pca", lambda curves: (seen.append(curves), drawn(curves))[1])
    draw("pca", run, "--out", tmp_path / "pca.png")
    draw("pca", run, "--layer", "head", "--out", tmp_path / "head.svg")
    image(tmp_path / "pca.png")
    assert list(seen[0]) == ["npid smoke", "untrained"]
    assert [len(curve) for curve in seen[0].values()] == [32, 32] and len(seen[1]["npid smoke"]) == 128
    assert all(curve[-1] == pytest.approx(100) for curve in seen[0].values())
    args = figures.parse_args(["pca", str(run)])
    args.device = torch.device("cpu")
    network: Any = common.untrained_encoder("alexnet_bn", 4, True, args.device).backbone  # a ResNet ends with a mean
    encoder = dataclasses.replace(figures.open_networks(args)[0][0], backbone=network)
    features = figures.extract(encoder, figures.load_train([encoder], args), args,
                               functools.partial(network, relu_last=False))
    monkeypatch.setattr(figures, "open_networks", lambda _: ([encoder], {"a": figures.Source("a", {}, {}, "", 0)}))
    draw("pca", run, "--out", tmp_path / "plain.png")
    torch.testing.assert_close(seen[2]["a"], figures.variance_kept(features))


# pictures from evaluations


def evaluated(run: Path, folder: Path, lines: list[dict[str, Any]], **options: Any) -> Path:
    """A run with results of evaluations."""
    other(run, folder, **options)
    lines = [dict(checkpoint=f"{folder}/checkpoint.pth") | line for line in lines]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_queue_line_is_the_mean_of_the_runs() -> None:
    """The line passes through the mean of the runs of each size, by size; the dots are the runs."""
    figure = figures.draw_queue({"kNN": {256: [70.0], 64: [50.0, 60.0]}, "other": {64: [1.0]}})
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[64, 55], [256, 70]]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["55.0", "70.0"]
    dots = torch.cat([torch.tensor(dots.get_offsets().tolist()) for dots in figure.axes[0].collections])
    assert dots.tolist() == [[64, 50], [64, 60], [256, 70]]


def test_queue(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last evaluation of each run, not of pixels, by the size of its queue; runs of the same size are averaged."""
    seen = list[dict[str, dict[int, list[float]]]]()
    drawn = figures.draw_queue
    monkeypatch.setattr(figures, "draw_queue", lambda points: (seen.append(points), drawn(points))[1])
    runs = []
    for size, seed, top1 in ((64, 0, 30.0), (64, 1, 34.0), (256, 0, 40.0)):
        entry = dict(num_neighbors=200, temperature=0.07, top1=top1)
        line = dict(protocol="knn", knn=[entry], nmi=top1 / 2, precision_at_1=top1 - 5)
        lines = [line | dict(nmi=1.0, precision_at_1=1.0), line, line | dict(checkpoint="random", nmi=5.0)]
        lines += [line | dict(checkpoint="pixels", nmi=6.0), line | dict(layer="backbone", nmi=2.0)]
        host = "infomin" if size == 256 else "moco"
        runs.append(evaluated(run, tmp_path / f"q{size}-{seed}", lines, host=host, queue_size=size, seed=seed))
    draw("queue", *runs, "--out", tmp_path / "queue.png")
    image(tmp_path / "queue.png")
    assert seen[0]["kNN accuracy"] == {64: [30.0, 34.0], 256: [40.0]}
    assert seen[0]["NMI"] == {64: [15.0, 17.0], 256: [20.0]}


@pytest.mark.parametrize(("name", "host"), [("queue", "moco"), ("lowshot", None)])
def test_command_that_is_missing_names_the_checkpoint(run: Path, tmp_path: Path, name: str, host: str | None) -> None:
    """Of a run that is named by its checkpoint the message says the command with that file, not one below it."""
    folder = evaluated(run, tmp_path / "few", [], host=host, queue_size=64)
    (folder / "checkpoint.pth").touch()
    with pytest.raises(common.Fault, match=r"run eval_\w+\.py \S*few/checkpoint\.pth --"):
        draw(name, folder / "checkpoint.pth")


def test_lowshot_and_semisup(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of each class, or their share; mean and deviation over draws as evaluated; untrained as the baseline. The
    classes are those of the evaluated set; those of the run's own, which may have none, where a result has no such."""
    seen = list[dict[str, Any]]()
    drawn = figures.draw_labels
    monkeypatch.setattr(figures, "draw_labels", lambda curves, *rest: (seen.append(curves), drawn(curves, *rest))[1])
    draws = [dict(labels=n, draws=2, top1=n / 2, top1_std=1.0, top5=n / 4, top5_std=0.5) for n in (40, 160)]
    facts = dict(protocol="finetune", data="shapes", epochs=7, train_images=400, test_images=100)
    lines = [facts | dict(preset=preset, draws=[dict(entry, **{unused: 0.0}) for entry in draws])
             for preset, unused in (("lowshot", "top5"), ("finetune", "top1"))]
    lines += [line | dict(checkpoint="random", draws=[dict(entry, top1=3.0) for entry in draws]) for line in lines]
    lines += [line | dict(protocol="svm", draws=[dict(entry, top1=1.0, top5=1.0) for entry in draws]) for line in lines]
    folder = evaluated(run, tmp_path / "few", lines)
    for name in ("lowshot", "semisup"):
        draw(name, folder, "--out", tmp_path / f"{name}.png")
        image(tmp_path / f"{name}.png")
    assert seen[0] == {"npid smoke": [(4, 20, 1), (16, 80, 1)], "untrained": [(4, 3, 1), (16, 3, 1)]}
    assert seen[1]["npid smoke"] == [(10, 10, 0.5), (40, 40, 0.5)]
    unlabelled = evaluated(run, tmp_path / "unlabelled", [line | dict(classes=20) for line in lines])
    log = (unlabelled / "log.jsonl").read_text()
    (unlabelled / "log.jsonl").write_text(log.replace('"classes": 10', '"classes": 0'))
    draw("lowshot", unlabelled, "--out", tmp_path / "lowshot.png")
    assert log.count('"classes": 10') == 1 and seen[2]["npid smoke"] == [(2, 20, 1), (8, 80, 1)]
    draw("lowshot", folder, evaluated(run, tmp_path / "alone", lines[:2], seed=1), "--out", tmp_path / "lowshot.png")
    assert seen[3]["untrained"] == [(4, 3, 1), (16, 3, 1)] and len(seen[3]) == 3


def test_shares_of_labels_are_short() -> None:
    """Beside the axis stand at most two decimals of a share, and whole numbers as they are, by size as the line is."""
    (axes,) = figures.draw_labels({"a": [(13000, 30, 1), (9.765625, 20, 1)]}, "x", "y").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9.77", "13000"]
    assert axes.lines[0].get_xydata().tolist() == [[9.765625, 20], [13000, 30]]


def test_small_print_has_no_path(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`linear` calls runs by their folders, and by the words typed only where two folders have one name."""
    seen = list[list[str]]()
    monkeypatch.setattr(figures, "save", lambda figure, title, note, runs, path: seen.append(list(runs)))
    line = dict(protocol="linear", method="npid", checkpoint="x", checkpoint_sha256="abc", data="shapes", epochs=1,
                train_images=9, test_images=9, layers=[dict(layer="conv1", top1=9.0)])
    (tmp_path / "more").mkdir()
    one, two, alike = (evaluated(run, tmp_path / name, [line]) for name in ("one", "two", "more/one"))
    draw("linear", one, two)
    draw("linear", one, alike)
    assert seen == [["one", "two"], [str(one), str(alike)]]


def test_caption_of_what_is_drawn(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small print has epochs, images and draws of the evaluations that are drawn, not of older ones."""
    notes = list[str]()
    monkeypatch.setattr(figures, "save", lambda figure, title, note, *_: notes.append(note))
    runs = []
    for name, epochs, draws in (("a", 7, 5), ("b", 9, 1)):
        line = dict(preset="lowshot", protocol="finetune", data="shapes", train_images=400, test_images=100)
        lines = [line | dict(epochs=old, draws=[dict(labels=40, draws=count, top1=20.0, top1_std=0.0)])
                 for old, count in ((epochs + 20, 3), (epochs, draws))]
        layers = dict(protocol="linear", method="npid", checkpoint_sha256=name, layers=[dict(layer="conv1", top1=9.0)])
        lines += [line | layers | dict(epochs=old) for old in (epochs + 20, epochs)]
        lines.append(line | layers | dict(epochs=epochs, protocol="svm"))
        runs.append(evaluated(run, tmp_path / name, lines, seed=epochs))
    draw("lowshot", *runs)
    assert notes[0].split(": ")[1] == ("7 epochs, 100 test images of shapes or 9 epochs, 100 test images of shapes; "
                                       "mean and deviation of 1/5 draws.")
    draw("linear", *runs)
    draw("linear", *runs, "--protocol", "svm")
    assert notes[2] == "eval_linear.py: 400 training and 100 test images of shapes."
    assert notes[1] == ("eval_linear.py: 400 training and 100 test images of shapes, 7 epochs or 400 training and 100 "
                        "test images of shapes, 9 epochs.")


def test_time_of_a_step(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows from the images a second, also where the last epoch was resumed, even at its very end."""
    seen = list[Any]()
    monkeypatch.setattr(figures, "draw_ablation", lambda table, ours, given: seen.append(ours) or Figure())
    for last in (640, 0):
        folder = other(run, tmp_path / f"{last}", script="deepcluster", preset="table4.3-256", batch_size=128)
        header = (folder / "log.jsonl").read_text().splitlines()[0]
        rows = [json.dumps(dict(epoch=epoch, loss=1.0, step=10 * epoch, train_seconds=6.4, images_per_second=speed))
                for epoch, speed in ((1, 400), (2, last))]
        (folder / "log.jsonl").write_text("\n".join([header, *rows, ""]))
        draw("ablation", folder, "--out", tmp_path / "steps.png")
    assert [ours["step"] for ours in seen] == [{"256": [200.0]}, {"256": [320.0]}]


def test_columns_of_tables_have_figures_of_their_own() -> None:
    """Linear probes and MLPs are what was evaluated last, accuracy what the log says of its last epoch."""
    log = [dict(test_top1=1.0), dict(test_top1=2.0)]
    rows = [dict(linear_top1=3.0), dict(linear_top1=4.0, linear_top5=5.0, test_top1=6.0), dict(mlp_top1=7.0)]
    found = [figures.MERITS[key][1]({}, log, rows) for key in ("linear1", "linear5", "mlp", "top1")]
    assert found == [4.0, 5.0, 7.0, 2.0]


def test_bars_are_as_long_as_their_figures() -> None:
    """The paper's bar of each column above the mean of ours, with its number at its end, rows from the top down."""
    table = figures.TABLES["npid-1"]
    number, row = list(enumerate(table.rows))[1]
    ours = {"knn": {row: [50.0, 53.0]}, "svm": {row: [40.0]}}
    figure = figures.draw_ablation(table, ours, Counter({row: 2}))
    for column, (axes, mean, text) in enumerate(zip(figure.axes, (51.5, 40.0), ("51.5 ± 2.1 (2)", "40.0 (1 of 2)"),
                                                    strict=True)):
        bars = [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in axes.patches]
        assert [length for _, length in bars if length != mean] == [row[column + 1] for row in table.rows.values()]
        assert (pytest.approx(number + 0.2), mean) in bars and axes.yaxis_inverted()
        assert [note.xy[0] for note in axes.texts if note.get_text() == text] == [mean]


def test_tables_name_presets_that_exist() -> None:
    """Every row of every table is a preset of its script, as many figures as columns; the columns are known."""
    for key, table in figures.TABLES.items():
        presets = importlib.import_module(table.script).PRESETS
        assert set(table.columns) <= set(figures.MERITS), key
        for row, (preset, *values) in table.rows.items():
            assert preset in presets and len(values) == len(table.columns), (key, row)


def test_ablation(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs find their table and row by their preset, thin ones too; seeds are averaged; what was not run says so; of
    several temperatures 0.07 counts, of SVMs that of the embedding with all labels; a run of another table is said to
    be one."""
    seen = list[Any]()
    drawn = figures.draw_ablation

    def spy(table: figures.Table, ours: Any, given: Any) -> Figure:
        figure = drawn(table, ours, given)
        seen.append((table.title, ours, texts(figure)))
        return figure

    monkeypatch.setattr(figures, "draw_ablation", spy)
    entries = [dict(num_neighbors=k, temperature=tau, top1=top - 50 * (tau > 0.07))
               for k, top in ((200, 60.0), (1, 50.0), (20, 9.0)) for tau in (0.1, 0.07)]
    lines = [dict(protocol="knn", knn=entries, data="shapes"), dict(protocol="svm", svm_top1=55.0, data="shapes")]
    lines += [dict(lines[1], svm_top1=8.0, draws=[]), dict(lines[1], svm_top1=7.0, layer="conv5")]
    lines += [dict(protocol="knn", knn=[row | dict(top1=9.0) for row in entries], data="places205")]  # elsewhere
    runs = [evaluated(run, tmp_path / f"nce{seed}", [*lines, dict(lines[1], svm_top1=55.0 + 2 * seed)],
                      preset="cifar10-nce10", seed=seed) for seed in (0, 1)]
    runs.append(other(run, tmp_path / "exact", preset="cifar10"))
    draw("ablation", *runs, "--out", tmp_path / "npid.png")
    title, ours, words = seen[0]
    assert title.startswith("NPID, Table 1") and ours["svm"] == {"NCE, m = 10": [55.0, 57.0]}
    last = json.loads((runs[2] / "log.jsonl").read_text().splitlines()[-1])["knn_top1"]
    assert ours["knn"] == {"NCE, m = 10": [60.0, 60.0]}  # not the monitor's figure beside eval_knn.py's
    assert {"56.0 ± 1.4 (2)", "60.0 ± 0.0 (2)", "80.8"} <= set(words) and words.count("not run") == 4 + 4
    assert words.count("not evaluated") == 2  # the exact softmax
    draw("ablation", runs[2], "--out", tmp_path / "monitor.png")
    assert seen.pop()[1]["knn"] == {"exact softmax": [last]}
    thin = evaluated(run, tmp_path / "thin", lines, preset="thin-cifar10-shared", script="cld")
    draw("ablation", thin, "--out", tmp_path / "cld.png")
    assert seen[1][:2] == ("CLD, Table A.2: parts of the method, CIFAR-10", {"knn": {"shared branch": [60.0]}})
    views = evaluated(run, tmp_path / "views", lines, preset="shapes", script="cld")  # "cifar10" of another script too
    draw("ablation", views, "--out", tmp_path / "cld.png")
    assert seen.pop()[1] == {"knn": {"and across views": [60.0]}}
    with pytest.raises(common.Fault, match=r"thin is no row of NPID, Table 1: .*: it is one of CLD, Table A.2: "):
        draw("ablation", *runs, thin)
    draw("ablation", evaluated(run, tmp_path / "suffix", lines, preset="cifar10-thin"), "--out", tmp_path / "thin.png")
    assert seen.pop()[1]["svm"] == {"exact softmax": [55.0]}
    nearest = evaluated(run, tmp_path / "la", lines, preset="table4-nearest", script="local_aggregation")
    draw("ablation", nearest, "--table", "la-5", "--out", tmp_path / "la.png")
    assert seen[2][1] == {"nn": {"(1, 10k)": [50.0]}}
    for name in ("npid", "cld", "la"):
        image(tmp_path / f"{name}.png")


def test_ablation_is_of_the_weights_as_they_are(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of a copy of an earlier epoch, or from before a run was trained on, do not count, those of its
    backbone.pth do."""
    seen = list[Any]()
    monkeypatch.setattr(figures, "draw_ablation", lambda table, ours, given: seen.append(ours["svm"]) or Figure())
    now, line = hashlib.sha256(b"now").hexdigest(), dict(protocol="svm", data="shapes")
    line |= dict(checkpoint="runs/checkpoint.pth")
    lines = [line | dict(svm_top1=3.0, checkpoint_sha256=now),
             line | dict(svm_top1=50.0, checkpoint="runs/backbone.pth", checkpoint_sha256=now),
             line | dict(svm_top1=1.0, checkpoint_sha256="old"),
             line | dict(svm_top1=2.0, checkpoint="runs/epoch10.pth", checkpoint_sha256="copy")]
    folder = evaluated(run, tmp_path / "run", lines, preset="cifar10")
    for content in (b"now", b"trained on"):
        for name in ("checkpoint.pth", "backbone.pth"):
            (folder / name).write_bytes(content)
        draw("ablation", folder)
    assert seen == [{"exact softmax": [50.0]}, {}]


def test_ablation_counts_its_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean says how many of the runs named below it have the figure; a run of no table is said to be one."""
    seen = list[list[str]]()
    drawn = figures.draw_ablation
    monkeypatch.setattr(figures, "draw_ablation", lambda *rest: (figure := drawn(*rest), seen.append(texts(figure)))[0])
    line = dict(protocol="svm", svm_top1=55.0, data="shapes")
    runs = [evaluated(run, tmp_path / f"seed{seed}", [line] * (seed < 2), preset="cifar10", seed=seed)
            for seed in range(3)]
    draw("ablation", *runs, "--out", tmp_path / "some.png")
    assert "55.0 ± 0.0 (2 of 3)" in seen[0]
    draw("ablation", *runs[1:], "--out", tmp_path / "one.png")
    assert "55.0 (1 of 2)" in seen[1]
    knn = dict(protocol="knn", data="shapes", knn=[dict(num_neighbors=200, temperature=0.07, top1=50.0)])
    for name, preset, layer in (("head", "cifar10", "head"), ("backbone", "mine", "backbone")):
        runs.append(evaluated(run, tmp_path / name, [knn | dict(layer=layer)], preset=preset))
    with pytest.raises(common.Fault, match="backbone is no row of any table"):
        draw("ablation", *runs[-2:])


def test_ablation_compares_like_with_like(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kNN of the head's features, tau = 0.07, best on all test images, the newest that all runs have alike; where there
    is none the command to run is named. Lines without these facts are taken."""
    seen = list[Any]()
    monkeypatch.setattr(figures, "draw_ablation", lambda table, ours, given: seen.append(ours["knn"]) or Figure())

    def line(top1: float, tau: float = 0.07, **facts: Any) -> dict[str, Any]:
        usual = dict(protocol="knn", data="shapes", layer="head", test_subset=None, train_features="clean", subset=None)
        return usual | dict(knn=[dict(num_neighbors=200, temperature=tau, top1=top1)]) | facts

    unusual = [line(1.0, layer="backbone"), line(3.0, tau=1.0)]
    whole = [line(60.0), line(61.0, train_features="bank"), *unusual, line(2.0, test_subset=100)]
    old = dict(protocol="knn", data="shapes", subset=None, train_features="clean", knn=line(40.0)["knn"])
    for name, lines in (("whole", whole), ("clean", [line(50.0)]), ("old", [old]), ("unusual", unusual),
                        ("part", [line(30.0, subset=5000.0)])):
        preset = "cifar10" if name == "whole" else "cifar10-nce10"
        evaluated(run, tmp_path / name, lines, preset=preset)
    paths = {path.name: path for path in tmp_path.iterdir()}
    draw("ablation", paths["whole"])
    draw("ablation", paths["whole"], paths["clean"])
    draw("ablation", paths["whole"], paths["old"])
    assert seen == [{"exact softmax": [61.0]}, {"exact softmax": [60.0], "NCE, m = 10": [50.0]},
                    {"exact softmax": [60.0], "NCE, m = 10": [40.0]}]
    for names, command in ((["unusual"], "unusual/checkpoint.pth --k 200$"),
                           (["clean", "unusual"], "unusual/checkpoint.pth --k 200 --train-features clean$"),
                           (["whole", "unusual"], "unusual/checkpoint.pth --k 200 --train-features bank$"),
                           (["part", "clean"], "clean/checkpoint.pth --k 200 --train-features clean --subset 5000$")):
        with pytest.raises(common.Fault, match=rf"the head's features.*: run eval_knn.py .*/{command}"):
            draw("ablation", *(paths[name] for name in names))


def test_precision_over_recall_by_hand() -> None:
    """Two objects count, a difficult one does not, nor does what is found there: of the answers that count the first
    and the third are right. A class with difficult objects alone has no curve."""
    truth = dict(labels=torch.tensor([0, 0, 0, 1]), difficult=torch.tensor([False, False, True, True]))
    found = dict(scores=torch.tensor([0.6, 0.9, 0.8, 0.7, 0.95]), labels=torch.tensor([0, 0, 0, 0, 1]),
                 right=torch.tensor([True, True, False, False, False]),
                 counted=torch.tensor([True, True, False, True, True]))
    curves = figures.class_curves(dict(found=found, truth=truth, classes=["cup", "pan"]))
    expected = torch.cat([torch.full((51,), 100.0), torch.full((50,), 200 / 3)]).double()
    torch.testing.assert_close(curves, expected[None])


def test_boxes_of_detections_by_hand() -> None:
    """An image has its own true boxes, dashed, and its own answers of enough score with class and score: green right,
    orange wrong, grey on a difficult object; lines are means over classes, each of its run."""
    boxes = torch.tensor([[0, 0, 9, 9], [1, 9, 11, 29], [20, 20, 30, 35], [2, 1, 12, 21], [8, 9, 20, 30]]).float()
    truth = dict(counts=torch.tensor([1, 2]), boxes=boxes[:3], labels=torch.tensor([0, 0, 1]),
                 difficult=torch.zeros(3, dtype=torch.bool))
    found = dict(image=torch.tensor([1, 1, 1, 1, 0]), scores=torch.tensor([0.9, 0.8, 0.7, 0.4, 0.6]),
                 labels=torch.tensor([0, 1, 0, 0, 1]), right=torch.tensor([True, False, False, False, True]),
                 counted=torch.tensor([True, True, False, True, True]), boxes=boxes[[3, 4, 1, 2, 0]])
    saved = dict(found=found, truth=truth, classes=["cup", "pan"], result=dict(ap50_voc07=30.0))
    second = saved | dict(found=found | dict(right=found["counted"]), result=dict(ap50_voc07=40.0))
    left, *_, plot = figures.draw_detections(saved, [(1, Image.new("RGB", (40, 40)))] * 2, dict(a=saved), 0.5).axes
    drawn = [(*box.get_bbox().bounds, box.get_linestyle(), matplotlib.colors.to_hex(box.get_edgecolor()))
             for box in left.patches]
    right, wrong = figures.RIGHT.lower(), figures.WRONG.lower()
    assert drawn == [(0.5, 8.5, 10, 20, "--", "#ffffff"), (19.5, 19.5, 10, 15, "--", "#ffffff"),
                     (1.5, 0.5, 10, 20, "-", right), (7.5, 8.5, 12, 21, "-", wrong), (0.5, 8.5, 10, 20, "-", "#999999")]
    assert [(text.get_text(), text.get_va()) for text in left.texts] == [
        ("cup .90", "top"), ("pan .80", "bottom"), ("cup .70", "bottom")]
    assert len(plot.lines) == 2 + 2  # the classes, the mean, and what stands for the classes in the legend
    both = figures.draw_detections(saved, [], dict(a=saved, b=second), 0.5).axes[-1].lines
    assert [line.get_label() for line in both] == ["a: AP 30.0 (11-point)", "b: AP 40.0 (11-point)"]
    for line, source in zip(both, (saved, second), strict=True):
        assert line.get_ydata() == pytest.approx(figures.class_curves(source).mean(0))


def test_runs_of_several_seeds_are_one_source() -> None:
    """It names every seed and commit, and the last epoch that all of them have."""
    one = figures.Source("run", dict(seed=0, epochs=9), dict(images=64), "abc", 3)
    both = figures.pooled([one, one._replace(options=one.options | dict(seed=1), git="def", epochs=2)])
    assert (both.options["seed"], both.git, both.epochs) == ("0/1", "abc/def", 2)


def test_half_a_result_is_left_out(tmp_path: Path) -> None:
    """What a kill has left of the last line of eval.jsonl is no result, and no reason to draw none; a whole line is."""
    for rest, results in (('{"top1": 3', [1, 2]), ('{"top1": 3}', [1, 2, 3]), ("", [1, 2])):
        (tmp_path / "eval.jsonl").write_text('{"top1": 1}\n{"top1": 2}\n' + rest)
        assert [row["top1"] for row in figures.read_eval(str(tmp_path))] == results


def test_results_of_an_older_checkpoint_are_left_out(tmp_path: Path) -> None:
    """A result stands for a run as long as the file that it names is the one that was evaluated, or is not there."""
    lines = [dict(checkpoint=f"elsewhere/{name}.pth", checkpoint_sha256=digest)
             for name, digest in (("checkpoint", "old"), ("checkpoint", hashlib.sha256(b"new").hexdigest()),
                                  ("published", "old"), ("random", ""))]
    (tmp_path / "checkpoint.pth").write_bytes(b"new")
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures.read_eval(str(tmp_path)) == lines[1:]


def test_layers_of_one_line_have_the_same_settings(tmp_path: Path) -> None:
    """Results of eval_linear.py become one line where the settings that both name agree, whichever layers they are of;
    where nothing tells a run's own data the last set's count; of several sets each line says its own, of several runs
    of a preset its folder, as the small print does."""

    def row(layer: str, top1: float, **facts: Any) -> dict[str, Any]:
        usual = dict(protocol="linear", method="npid", checkpoint="x", checkpoint_sha256="abc", data="shapes")
        return usual | dict(normalize="none", layers=[dict(layer=layer, top1=top1)]) | facts

    def lines(*rows: dict[str, Any], folder: str = "one") -> dict[str, dict[str, float]]:
        for name, some in (("one", rows), ("two", [row("conv1", 9, data="cifar10", checkpoint_sha256="def")])):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        return figures.read_layers([str(tmp_path / name) for name in dict.fromkeys(["one", folder])], "linear", None)[0]

    first, second = ({"settings": dict(layers=[layer], cost=1, **more)} for layer, more in
                     (("conv3", {}), ("conv5", {"folds": 5})))
    assert lines(row("conv3", 3, **first), row("conv5", 5, **second)) == {"npid": {"conv3": 3, "conv5": 5}}
    assert lines(row("conv3", 3), row("conv5", 5, schedule="cosine", **first)) == {"npid": {"conv3": 3, "conv5": 5}}
    for other in (dict(normalize="standard"), dict(settings=dict(cost=2))):
        assert lines(row("conv3", 3, **first), row("conv5", 5, **other)) == {"npid": {"conv5": 5}}
    joined = lines(row("conv3", 3), row("conv4", 4, normalize="standard"), row("conv5", 5))
    assert joined == {"npid": {"conv3": 3, "conv5": 5}}
    assert lines(row("conv3", 3), row("conv3", 4, data="cifar10")) == {"npid": {"conv3": 4}}
    assert lines(row("conv3", 3), folder="two") == {"npid one, shapes": {"conv3": 3}, "npid two, cifar10": {"conv1": 9}}
    assert lines(row("conv3", 3), row("conv3", 4, checkpoint_sha256="ghi")) == {
        "npid one abc": {"conv3": 3}, "npid one ghi": {"conv3": 4}}


def test_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run allows is made, with an index that shows it and says what the other pictures lack; images are
    loaded once, and each network sees a set once for all pictures of its features and once for each other kind."""
    monkeypatch.setattr(figures, "ascend", lambda maps, images, peak, steps: (images, images[:, 0, 0, 0]))  # slow
    passes, sets, folder = list[int](), list[str](), tmp_path / "figures"
    extract, load = common.extract, common.load
    monkeypatch.setattr(common, "extract", lambda *rest: (passes.append(len(rest[1])), extract(*rest))[1])
    monkeypatch.setattr(common, "load", lambda *rest: (sets.append(rest[1]), load(*rest))[1])
    draw("all", run, *FEW, "--out", folder)
    features, descriptors, activations = 2 * [256, 40], 2 * [256], [256]  # of the run and the untrained; of the run
    assert sorted(passes) == sorted(features + descriptors + activations) and sets == ["pretrain", "test"]
    index = (folder / "index.md").read_text()
    made = {path.stem for path in folder.glob("*.png")}
    own = {"gallery", "neighbors", "retrieval", "curves", "density", "mds", "filters", "maximize", "edges", "pca"}
    assert own <= made
    assert made.isdisjoint({"queue", "lowshot", "semisup", "ablation"})
    for name in figures.parse_args(["all", str(run)]).commands:
        assert f"![{name}]({name}.png)" in index if name in made else f"* {name}: " in index
    assert not list(folder.glob("*.tmp"))


def test_index_has_the_options(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of the index makes its picture again: it has those of the options typed that its picture knows."""
    named = shutil.copytree(run, tmp_path / "a run")
    words = ["--seed", "3", "--layer=head", *FEW, "--no-amp", "--mean", "0.4", "0.4", "0.3"]
    for name in figures.parse_args(["all", str(run)]).commands:
        monkeypatch.setattr(figures, name, functools.wraps(getattr(figures, name))(lambda args: None))
    draw("all", named, *words, "--out", tmp_path / "figures")
    index = (tmp_path / "figures" / "index.md").read_text()
    commands = {line.split()[2]: shlex.split(line) for line in index.splitlines() if line.startswith("    python")}
    assert commands["curves"] == ["python", "figures.py", "curves", str(named)]
    assert commands["detections"][3:] == [str(named), "--seed", "3"]
    assert sorted(commands["gallery"][3:]) == sorted([str(named), *words])


# what was run


def test_legend_and_small_print(run: Path) -> None:
    """Presets if they differ, else options, else folders; the small print has script, data, epochs and commit."""
    source = figures.read_log(str(run))[0]
    assert list(figures.legend([source])) == ["npid smoke"]
    faster = source._replace(options=source.options | dict(lr=0.1, output="x"))
    untrained = figures.Source("untrained", {}, {}, "", 0)
    assert list(figures.legend([source, faster, untrained])) == ["lr 0.03", "lr 0.1", "untrained"]
    seed = source._replace(options=source.options | dict(seed=1))
    assert list(figures.legend([source, seed])) == ["seed 0", "seed 1"]
    assert list(figures.legend([source, source._replace(name="second")])) == ["first", "second"]
    assert list(figures.legend([source, source])) == ["first (1)", "first (2)"]
    cluster = source._replace(options=source.options | dict(script="deepcluster", amp=False, cluster_pool=True))
    assert list(figures.legend([source, faster, cluster])) == [
        "script npid, amp None, lr 0.03", "script npid, amp None, lr 0.1", "script deepcluster, amp False, lr 0.03"]
    words = str(source)
    for part in ("npid.py", "preset smoke", "256 images of shapes", "epoch 2 of 2", "seed 0", f"commit {source.git}"):
        assert part in words


def test_names_are_no_formulas(run: Path, tmp_path: Path) -> None:
    """Dollar signs in the name of a folder are written as they stand."""
    draw("curves", run, other(run, tmp_path / "$_$"), "--out", tmp_path / "curves.svg")
    assert "<!-- $_$ -->" in (tmp_path / "curves.svg").read_text()


@pytest.mark.filterwarnings("error")  # "constrained_layout not applied"
def test_small_print_takes_nothing_from_the_picture(run: Path, tmp_path: Path) -> None:
    """A figure grows by the height of its small print, however many sources it has."""
    source, heights = figures.read_log(str(run))[0], list[float]()
    for count in (1, 40):
        figure = Figure((5.2, 2.6), layout="constrained")
        axes = figure.subplots()
        figures.save(figure, "title", "", {f"run {i}": source for i in range(count)}, tmp_path / "long.png")
        heights.append(axes.get_window_extent().height / figure.dpi)
    assert heights[1] > heights[0] > 1.5


def test_runs_of_a_row_are_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small print of an ablation names the seeds of an experiment in one line, other options in their own; it says
    where a bar is a mean over these, and that the monitor's kNN is drawn."""
    seen, notes = list[dict[str, figures.Source]](), list[str]()
    monkeypatch.setattr(figures, "save", lambda *drawn: (notes.append(drawn[2]), seen.append(drawn[3])))
    draw("ablation", *(other(run, tmp_path / f"{seed}-{lr}", preset="cifar10", seed=seed, lr=lr)
                       for seed, lr in ((0, 0.03), (1, 0.03), (2, 0.1))))
    assert [(label, source.options["seed"]) for label, source in seen[0].items()] == [
        ("exact softmax", "0/1"), ("exact softmax (2-0.1)", "2")]
    assert [source.also for source in seen[0].values()] == [", lr 0.03", ", lr 0.1"]
    assert notes[0].endswith(" kNN by the monitor in the logs. exact softmax is a mean over different settings.")


# bad input


def spoilt(run: Path, folder: Path) -> None:
    """Folders and files that are no run."""
    header = (run / "log.jsonl").read_text().splitlines()[0]
    logs = dict(empty="", words="epoch loss\n", foreign='{"epoch": 1, "loss": 2}\n', list="[1]\n[2]\n")
    logs["started"] = header + "\n"
    for name, log in logs.items():
        (folder / name).mkdir()
        (folder / name / "log.jsonl").write_text(log)
    (folder / "nothing").mkdir()
    shutil.copytree(folder / "started", folder / "damaged")
    shutil.copy(run / "log.jsonl", folder / "damaged")
    (folder / "damaged" / "eval.jsonl").write_text("{\n")
    (folder / "text.pth").write_text("no checkpoint")
    (folder / "short.pth").write_bytes((run / "checkpoint.pth").read_bytes()[:5000])
    shutil.copy(run / "backbone.pth", folder)
    torch.save({name: 0 * value for name, value in torch.load(run / "backbone.pth").items()}, folder / "dead.pth")


FOREIGN = "backbone.pth --arch resnet18 --width 4 --image-size 32"


BAD = [
    ("curves missing", "cannot read missing/log.jsonl"),
    ("curves nothing", "No such file"),
    ("curves RUN empty", "no log"),
    ("curves words", "no log"),
    ("curves foreign", "no log"),
    ("curves list", "no log"),
    ("curves started", "no epoch yet"),
    ("curves RUN --out picture.txt", "must end in .png"),
    ("curves RUN --out nowhere/picture.png", "no directory nowhere"),
    ("curves", "RUN"),
    ("portrait RUN", "invalid choice"),
    ("gallery nothing", "cannot read nothing/checkpoint.pth"),
    ("gallery text.pth", "no PyTorch checkpoint"),
    ("gallery short.pth", "truncated"),
    ("gallery random", "name a run"),
    ("gallery RUN --rows 50 --test-subset 40", "--rows 50"),
    ("gallery RUN --k 300 --test-subset 40", "300 wanted"),
    ("gallery RUN --data nowhere", "no directory nowhere"),
    ("neighbors RUN --k 300 --test-subset 40", "--k 300"),
    ("retrieval RUN random random --test-subset 40", "two networks"),
    ("retrieval RUN --rows 50 --test-subset 40", "--rows 50"),
    ("mds nothing", "cannot read nothing/checkpoint.pth"),
    ("mds RUN --classes 8", "at most 7"),
    ("filters text.pth", "no PyTorch checkpoint"),
    ("maximize RUN random", "one network"),
    ("maximize RUN --stages conv6", "invalid choice"),
    ("maximize dead.pth --arch resnet18 --width 4 --image-size 32 --images 16 --stages conv1 conv2", "conv1, conv2"),
    ("edges nothing", "neither a checkpoint nor a log with ratio_edge"),
    ("edges RUN --k 300", "300"),
    ("pca short.pth", "truncated"),
    ("queue RUN", "has no queue"),
    ("queue missing", "cannot read missing/log.jsonl"),
    ("lowshot RUN", "--preset lowshot"),
    ("semisup RUN", "--preset finetune"),
    ("semisup damaged", "each line has to be JSON"),
    ("ablation RUN", "is no row of any table"),
    ("ablation RUN --table npid-1", "is no row of NPID, Table 1"),
    ("ablation RUN --table npid-9", "invalid choice"),
    ("all nothing", "allows no picture"),
    ("density RUN missing.pth", "cannot read missing.pth"),
    (f"density {FOREIGN} --features bank", "no memory bank"),
    (f"density {FOREIGN} --subset 5 --test-subset 5", "too few"),
]


@pytest.mark.parametrize(("command", "reason"), BAD)
def test_bad_input_is_one_line(
    run: Path,
    tmp_path: Path,
    command: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, one line that says why, and no picture."""
    spoilt(run, tmp_path)
    monkeypatch.chdir(tmp_path)
    argv = command.replace("RUN", str(run)).split()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        common.launch(figures.main, lambda: figures.parse_args(argv))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and reason in error, error
    assert sorted(tmp_path.rglob("*")) == before


def test_command_line(run: Path, tmp_path: Path) -> None:
    """The script itself: prints where the picture is."""
    out = tmp_path / "picture.png"
    command = [sys.executable, "figures.py", "curves", str(run), "--out", str(out)]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(out)]
    image(out)
