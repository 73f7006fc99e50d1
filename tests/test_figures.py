"""Figures: what is drawn is what was measured, and input that is not a run ends with one line."""

import json
import math
import shutil
import subprocess
import sys
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
    figure = figures.draw_gallery(grey[:, 0], ["cat"] * 4, [strip])
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

    def spy(queries: torch.Tensor, names: list[str], strips: list[figures.Strip]) -> Figure:
        seen.extend(strips)
        expected = [f"class {(int(name[-1]) + shift) % 10}" for name in names]
        assert all(row == [name] * 10 for strip in strips for row, name in zip(strip.names, expected, strict=True))
        return drawn(queries, names, strips)

    monkeypatch.setattr(figures, "extract", extract)
    monkeypatch.setattr(figures, "draw_gallery", spy)
    draw("gallery", run, *FEW, "--rows", 2, "--out", tmp_path / "picture.png")
    assert all((strip.right == (shift == 0)).all() for strip in seen)
    assert seen[0].title == f"npid smoke: {100 - 100 * shift:.1f} % right over all 40 test images"


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
    """The final mean and deviation over seeds at a line's end, the chance line, a legend; loss falls to the right."""
    runs = [[dict(epoch=e, loss=9 - e + seed, knn_top1=10.0 * e) for e in (1, 2, 3)] for seed in (0, 1)]
    figure = figures.draw_curves({"two": runs, "one": runs[:1]}, {"chance, ln N = 8.52": 8.52}, compare=True)
    loss, accuracy, both = figure.axes
    assert sorted(text.get_text().strip() for text in loss.texts) == ["6.00", "6.50 ± 0.71", "chance, ln N = 8.52"]
    assert sorted(text.get_text().strip() for text in accuracy.texts) == ["30.0", "30.0 ± 0.0"]
    heights = sorted(text.get_position()[1] for text in accuracy.texts)
    assert heights[1] - heights[0] > 0.05 * np.ptp(accuracy.get_ylim())  # they do not overlap
    assert both.xaxis_inverted() and len(figures.draw_curves({"one": runs[:1]}, {}, compare=False).axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["two (mean of 2 seeds)", "one"]
    without = [[dict(epoch=1, loss=2.0)]]
    assert len(figures.draw_curves({"one": without}, {}, compare=True).axes) == 1


def test_curves_of_runs_and_seeds(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that differ in the seed alone become one line, others are named by what differs, ln N is that of the log."""
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
    nce = other(run, tmp_path / "nce", loss="nce", preset="other")
    draw("curves", run, nce, "--out", tmp_path / "picture.png")
    assert list(seen[2][0]) == ["npid smoke", "npid other"] and len(seen[2][1]) == 1


# density


def test_density_is_the_naive_one() -> None:
    """Both densities equal a float64 loop over sorted dot products without the image itself, duplicates included."""
    features = F.normalize(torch.randn(300, 16, generator=common.generator("density")), dim=1)
    features[7] = features[8]
    rows = torch.tensor([3, 7, 8, 299])
    near, far = figures.densities(features, rows, 5, 20, 60)
    for place, row in enumerate(rows.tolist()):
        products = (features.double() @ features[row].double()).tolist()
        del products[row]
        products.sort(reverse=True)
        assert abs(near[place].item() - sum(products[:5]) / 5) < 1e-6
        assert abs(far[place].item() - sum(products[19:60]) / 41) < 1e-6


def test_density_ranks() -> None:
    """The paper's ranks wherever they fit, their shares of 4,096 below, never one image in both."""
    assert figures.density_ranks(1_281_167) == figures.density_ranks(4097) == (30, 1000, 4096)
    assert figures.density_ranks(257) == (30, 62, 256)
    for images in range(10, 5000):
        local, first, last = figures.density_ranks(images)
        assert 1 <= local < first < last < images
    with pytest.raises(common.Fault, match="too few"):
        figures.density_ranks(5)


def test_density_of_bank_and_of_features(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bank where every network has one, else features of all; labels say the mean and the ranks."""
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
    expected = figures.densities(bank, rows, 30, 62, 255)
    for values, lines in zip(expected, seen[0].values(), strict=True):
        assert torch.equal(lines["npid smoke"], values)
    assert [len(lines["untrained"]) for lines in seen[1].values()] == [256, 256]
    legend = drawn(seen[0]).axes[0].get_legend()
    assert legend is not None and legend.get_texts()[0].get_text() == f"npid smoke: mean {expected[0].mean():.3f}"


# what was run


def test_legend_and_small_print(run: Path) -> None:
    """Presets if they differ, else options, else folders; the small print has script, data, epochs and commit."""
    source = figures.read_log(str(run))[0]
    assert figures.legend([source]) == ["npid smoke"]
    faster = source._replace(options=source.options | dict(lr=0.1, output="x"))
    untrained = figures.Source("untrained", {}, {}, "", 0)
    assert figures.legend([source, faster, untrained]) == ["lr 0.03", "lr 0.1", "untrained"]
    seed = source._replace(options=source.options | dict(seed=1))
    assert figures.legend([source, seed]) == ["seed 0", "seed 1"]
    assert figures.legend([source, source._replace(name="second")]) == ["first", "second"]
    assert figures.legend([source, source]) == ["first (1)", "first (2)"]
    words = str(source)
    for part in ("npid.py", "preset smoke", "256 images of shapes", "epoch 2 of 2", "seed 0", f"commit {source.git}"):
        assert part in words


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
    (folder / "text.pth").write_text("no checkpoint")
    (folder / "short.pth").write_bytes((run / "checkpoint.pth").read_bytes()[:5000])
    shutil.copy(run / "backbone.pth", folder)


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
