"""Data sets and directories are read right, whatever they hold, and however many workers read them."""

import argparse
import codecs
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as transforms
from helpers import TINY, checkpoint, images_of, one_line, run, same
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

import common
import eval_knn
import npid

CPU = torch.device("cpu")


def options(*words: str | Path) -> argparse.Namespace:
    return npid.parse_args(["--preset", "smoke", "--batch-size", "4", "--workers", "0", *map(str, words)])


def load(split: str, *words: str | Path) -> common.ImageSet:
    args = options(*words)
    args.subset = None if "--subset" not in words else args.subset
    args.test_subset = None if "--test-subset" not in words else args.test_subset
    return common.load(args, split, CPU)


def noise(seed: int, height: int = 16, width: int = 16, channels: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def photograph(seed: int, height: int = 300, width: int = 400) -> Image.Image:
    """Smooth gradients, edges and a little texture."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8))
    coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(coarse)
    for _ in range(12):
        x, y, side = (int(v) for v in random.integers(0, min(width, height), 3))
        pen.ellipse((x, y, x + side // 2, y + side // 3), fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    texture = random.normal(0, 4, (height, width, 1))
    return Image.fromarray((np.asarray(coarse) + texture).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


# named sets


def write_cifar(root: Path, ten: bool, count: int = 20) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Batches as the official ones: protocol 2, keys of bytes; returns the training images and labels."""
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    images, labels = [], []
    for seed, name in enumerate(names):
        data = np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)
        truth = [i % 10 for i in range(count)]
        batch: dict[bytes, Any] = {b"batch_label": b"a batch", b"data": data}
        batch |= {b"labels": truth} if ten else {b"fine_labels": truth, b"coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        if not name.startswith("test"):
            images.append(data)
            labels += truth
    classes = [b"class %d" % i for i in range(10 if ten else 100)]
    meta = {b"label_names": classes} if ten else {b"fine_label_names": classes, b"coarse_label_names": []}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return np.concatenate(images), labels


@pytest.mark.parametrize("ten", [True, False], ids=["cifar10", "cifar100"])
def test_cifar(ten: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CIFAR batches come in order, channels first; files that are not the official ones are noted once, not refused."""
    images, labels = write_cifar(tmp_path, ten)
    data = load("pretrain", "--data", "cifar10" if ten else "cifar100", "--data-dir", tmp_path)
    assert data.pixels is not None and data.pixels.shape == (len(labels), 3, 32, 32)
    assert np.array_equal(data.pixels.numpy().reshape(len(labels), -1), images)
    assert data.labels.tolist() == labels and data.classes[3] == "class 3" and data.size == 32 and data.small
    assert capsys.readouterr().err.count("not hold the official files") == 1


def test_cifar_from_training_to_evaluation(tmp_path: Path) -> None:
    """NPID trains on CIFAR-10 by its name, and kNN finds the data again by the checkpoint alone."""
    write_cifar(tmp_path, ten=True)
    command = [*TINY, "--test-subset", "20", "--knn-every", "1", "--epochs", "1", "--data", "cifar10"]
    trained = run("npid", [*command, "--data-dir", tmp_path, "--output", tmp_path / "out"])
    assert trained.code == 0 and "knn_top1" in trained.out, trained.err
    tested = run("eval_knn", [tmp_path / "out" / "checkpoint.pth", "--k", "10", "--device", "cpu"])
    assert tested.code == 0, tested.err
    result = json.loads(tested.out.splitlines()[-1])
    assert result["data"] == "cifar10" and result["train_images"] == 100 and result["test_images"] == 20


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_hostile_cifar(tmp_path: Path) -> None:
    """A batch that would run code is refused with its path, and runs nothing; so are damaged ones."""
    write_cifar(tmp_path, ten=True)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    good = path.read_bytes()
    contents = {
        "hostile": pickle.dumps({b"data": Hostile(tmp_path / "executed"), b"labels": []}, protocol=2),
        "truncated": good[:1000],
        "garbage": b"\x80garbage",
        "no labels": pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}, protocol=2),
        "other shape": pickle.dumps({b"data": np.zeros((2, 30), np.uint8), b"labels": [0, 0]}, protocol=2),
    }
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(common.Fault, match="cifar-10-batches-py"):
            load("pretrain", "--data", "cifar10", "--data-dir", tmp_path)
    assert not (tmp_path / "executed").exists()
    path.unlink()
    with pytest.raises(common.Fault, match=r"data_batch_2 \(No such file"):
        load("pretrain", "--data", "cifar10", "--data-dir", tmp_path)


def test_real_cifar10() -> None:
    """The real CIFAR-10, where $DATA_DIR has it: 50,000 and 10,000 images, balanced."""
    root = Path(os.environ.get("DATA_DIR", "data"))
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip("$DATA_DIR has no cifar-10-batches-py")
    for split, count in (("pretrain", 50_000), ("test", 10_000)):
        data = load(split, "--data", "cifar10", "--data-dir", root)
        assert len(data) == count and data.labels.bincount().tolist() == [count // 10] * 10
        assert data.classes[0] == "airplane" and data.pixels is not None
        mean = data.pixels.float().mean((0, 2, 3)) / 255
        torch.testing.assert_close(mean, torch.tensor(data.mean), atol=0.02, rtol=0)


def test_stl10(tmp_path: Path) -> None:
    """STL-10's columns become rows, labels start at 0, and pretraining sees the unlabelled images too."""
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n")
    counts = {"train": 3, "unlabeled": 4, "test": 2}
    images = {part: np.stack([noise(i, 96, 96) for i in range(n)]) for part, n in counts.items()}
    for part, pixels in images.items():
        pixels.transpose(0, 3, 2, 1).tofile(folder / f"{part}_X.bin")  # (N, channel, column, row)
        if part != "unlabeled":
            np.arange(1, len(pixels) + 1, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    data = load("pretrain", "--data", "stl10", "--data-dir", tmp_path)
    assert data.labels.tolist() == [0, 1, 2, -1, -1, -1, -1] and len(data.classes) == 10 and data.size == 96
    assert data.pixels is not None
    expected = np.concatenate([images["train"], images["unlabeled"]]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.pixels.numpy(), expected)
    assert load("train", "--data", "stl10", "--data-dir", tmp_path).labels.tolist() == [0, 1, 2]
    assert load("test", "--data", "stl10", "--data-dir", tmp_path).labels.tolist() == [0, 1]
    (folder / "test_X.bin").write_bytes(b"short")
    with pytest.raises(common.Fault, match=r"test_X.bin \(truncated\)"):
        load("test", "--data", "stl10", "--data-dir", tmp_path)


# directories


@pytest.mark.parametrize(("pixels", "fault"), [
    (torch.rand(8, 3, 16, 16), ""), (torch.zeros(8, 3, 16, 16, dtype=torch.uint8), ""),
    (255 * torch.rand(8, 3, 16, 16), "to 2"), (torch.randint(4096, (8, 3, 16, 16)), "torch.int64 (8, 3, 16, 16) from"),
    (torch.full((8, 3, 16, 16), torch.nan), "nan"), (torch.rand(8, 1, 16, 16), "(8, 1, 16, 16)"),
    (torch.rand(8, 16, 16), "(8, 16, 16)"), (torch.rand(8, 5, 16, 16), "(8, 5, 16, 16)"),
    (torch.rand(7, 3, 16, 16), "(7, 3, 16, 16)"), (torch.rand(8, 3, 16), "(8, 3, 16)"),
])
def test_a_loader_of_ones_own(pixels: Tensor, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would train on wrongly scaled images, or end in a traceback, is a fault that names the loader."""
    monkeypatch.setitem(common.DATASETS, "mine", common.DATASETS["shapes"])
    monkeypatch.setitem(common._NAMED, "mine", lambda args, split: (pixels, torch.arange(8), list("abcdefgh")))
    if not fault:
        assert load("train", "--data", "mine").pixels is pixels
        return
    with pytest.raises(common.Fault, match=f"loader of mine .*{re.escape(fault)}"):
        load("train", "--data", "mine")


@pytest.mark.parametrize(("labels", "fault"), [
    (torch.arange(8), ""), (torch.full((8,), -1), ""), (torch.arange(8)[:, None], "(8, 1)"),
    (torch.arange(8).int(), "int32"), (torch.arange(8).byte(), "uint8"), (torch.arange(8) + 1, "from 1 to 8, 8"),
    (np.arange(8), "int64 (8,)"),
], ids=["right", "unknown", "column", "int32", "uint8", "from 1", "numpy"])
def test_labels_of_a_loader_of_ones_own(labels: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that would end in a traceback after the first epochs are a fault at once."""
    pixels = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setitem(common.DATASETS, "mine", common.DATASETS["shapes"])
    monkeypatch.setitem(common._NAMED, "mine", lambda args, split: (pixels, labels, list("abcdefgh")))
    if not fault:
        assert load("train", "--data", "mine").labels is labels
        return
    with pytest.raises(common.Fault, match=f"loader of mine .* labels .*{re.escape(fault)}"):
        load("train", "--data", "mine")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """train/{b,a}/..., val/{b}/..., and things that are not images."""
    for i, name in enumerate(["train/b/1.png", "train/b/deep/2.PNG", "train/a/1.png", "train/a/0.jpeg", "val/b/1.png"]):
        save(Image.fromarray(noise(i)), tmp_path / "set" / name)
    for name in ["notes.txt", "a/.hidden.png", ".cache/1.png", "a/1.png.part", "empty/x.csv"]:
        path = tmp_path / "set" / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no image")
    return tmp_path / "set"


def test_splits(tree: Path) -> None:
    """train/ and val/ are the splits; classes are the folders of train/, also for a val/ that lacks some of them."""
    data = load("pretrain", "--data", tree)
    assert [str(data.path(i).relative_to(tree)) for i in range(4)] == [
        "train/a/0.jpeg", "train/a/1.png", "train/b/1.png", "train/b/deep/2.PNG",
    ]
    assert data.classes == ["a", "b", "empty"] and data.labels.tolist() == [0, 0, 1, 1]
    test = load("test", "--data", tree)
    assert test.classes == data.classes and test.labels.tolist() == [1]
    assert data.size == 16 and data.pixels is not None and data.pixels.shape == (4, 3, 16, 16)
    assert np.array_equal(data.pixels[1].numpy(), noise(2).transpose(2, 0, 1))
    save(Image.fromarray(noise(9)), tree / "val" / "c" / "1.png")
    with pytest.raises(common.Fault, match=r"folders that .* has not: c"):
        load("test", "--data", tree)


def test_validation_is_no_training(tmp_path: Path) -> None:
    """Without train/ all but the validation images train, wherever those lie; --val-dir goes before val/."""
    for name in ("a/1.png", "b/1.png", "val/a/1.png", "b/held/2.png"):
        save(Image.fromarray(noise(1)), tmp_path / name)
    data = load("pretrain", "--data", tmp_path)
    assert len(data) == 3 and data.classes == ["a", "b"]
    assert load("test", "--data", tmp_path).root == tmp_path / "val"
    held = tmp_path / "elsewhere"
    save(Image.fromarray(noise(1)), held / "b" / "1.png")
    test = load("test", "--data", tmp_path, "--val-dir", held)
    assert test.root == held
    with pytest.raises(common.Fault, match="--val-dir"):
        load("test", "--data", tmp_path / "a")


def test_other_splits_are_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without train/ neither val/ nor test/ nor --val-dir trains, however the last is spelled and whichever is used."""
    for name in ("a/1.png", "b/1.png", "val/a/1.png", "test/a/1.png", "held/b/2.png"):
        save(Image.fromarray(noise(1)), tmp_path / "set" / name)
    (tmp_path / "link").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    for place in ("set", tmp_path / "set", "link"):
        for held in ("set/held", tmp_path / "set" / "held", "link/held"):
            data = load("pretrain", "--data", place, "--val-dir", held)
            assert data.classes == ["a", "b"] and len(data) == 2, (place, held)
            assert len(load("test", "--data", place, "--val-dir", held)) == 1


def test_a_folder_without_validation_images_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where there is no val/ there is no kNN monitor, and a line says so; one that was asked for is an error."""
    for i in range(8):
        save(Image.fromarray(noise(i)), tmp_path / "set" / f"c{i % 2}" / f"{i}.png")
    args = options("--data", tmp_path / "set", "--subset", "8")
    data = common.load(args, "pretrain", CPU)
    assert len(data) == 8 and common.load_monitor(args, data, CPU) is None
    assert "set has no validation images" in capsys.readouterr().err
    with pytest.raises(common.Fault, match="--val-dir"):
        common.load_monitor(options("--data", tmp_path / "set", "--knn-every", "1"), data, CPU)


def test_images_without_a_class_and_the_monitor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test image outside the class folders, and training images all outside, end the kNN monitor with a line; an
    evaluation, too. Of some training images outside only the others vote."""
    for i in range(8):
        save(Image.fromarray(noise(i)), tmp_path / "set" / "train" / f"c{i % 2}" / f"{i}.png")
        save(Image.fromarray(noise(i)), tmp_path / "set" / "val" / f"c{i % 2}" / f"{i}.png")
        save(Image.fromarray(noise(i)), tmp_path / "flat" / f"{i}.png")
    save(Image.fromarray(noise(8)), tmp_path / "set" / "val" / "8.png")
    (tmp_path / "flat" / "notes").mkdir()
    for name, line in (("set", "1 of the 9 test images of set are in no class folder: no kNN monitor\n"),
                       ("flat", "flat has no folders that could be classes: no kNN monitor\n")):
        args = npid.parse_args(["--data", str(tmp_path / name), "--val-dir", str(tmp_path / "set" / "val")])
        assert common.load_monitor(args, common.load(args, "pretrain", CPU), CPU) is None
        assert capsys.readouterr().err == line
    for script in ("eval_knn", "eval_linear"):
        words = ["random", "--arch", "resnet18", "--width", "4", "--data", tmp_path / "set", "--device", "cpu"]
        one_line(run(script, words), "1 of the 9 test images of set are in no class folder")
    (tmp_path / "set" / "val" / "8.png").rename(tmp_path / "set" / "train" / "8.png")
    found = run("eval_knn", [*words, "--k", "1"])
    assert found.code == 0 and json.loads(found.out.splitlines()[-1])["train_images"] == 8, found.err


def test_what_no_monitor_needs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the kNN monitor are noted where there is none, and --val-dir where it keeps no image from training."""
    words = ["--subset", "8", "--test-subset", "8", "--knn-features", "clean", "--val-dir", str(tmp_path / "held")]
    for i in range(8):
        save(Image.fromarray(noise(i)), tmp_path / "flat" / f"c{i % 2}" / f"{i}.png")
        save(Image.fromarray(noise(i)), tmp_path / "set" / "train" / f"c{i % 2}" / f"{i}.png")
        save(Image.fromarray(noise(i)), tmp_path / "held" / f"c{i % 2}" / f"{i}.png")
    for data, every, idle in (
        (tmp_path / "set", "0", ["knn-features", "test-subset", "val-dir"]), (tmp_path / "set", "1", []),
        (tmp_path / "flat", "0", ["knn-features", "test-subset"]), ("shapes", "1", ["val-dir"]),
    ):
        args = options("--data", data, "--knn-every", every, *words)
        common.load_monitor(args, common.load(args, "pretrain", CPU), CPU)
        said = capsys.readouterr().err.splitlines()
        assert [line.split(" has no effect")[0] for line in said] == [f"note: --{name}" for name in idle], said


def test_thin_images_take_no_more_memory_than_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image of 1 x 3000 px the middle is scaled up, not all of it; one of 1 x 16 px is whole."""
    largest, resize = list[int](), Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *rest: (largest.append(max(size)),
                                                                          resize(self, size, *rest))[1])
    for width, height in ((1, 3000), (3000, 1), (1, 16)):
        pixels = np.arange(width * height * 3, dtype=np.uint32).reshape(height, width, 3) // 3 * 255 // (width * height)
        save(Image.fromarray(pixels.astype(np.uint8)), tmp_path / "thin.png")
        square = common.central_square(tmp_path / "thin.png", 28, 32)
        assert square.shape == (3, 28, 28) and abs(float(square.float().mean()) - 127) < 10
    assert max(largest) == 16 * 32


def test_features_stand_in_memory_once() -> None:
    """While features are made no more is kept of them than the whole and the last part, and no graph for gradients;
    they are each image's own."""
    alive, data = weakref.WeakSet[Tensor](), common.load(options("--subset", "50"), "pretrain", CPU)

    def encode(images: Tensor) -> Tensor:
        assert len(alive) < 2
        alive.add(features := images.flatten(1)[:, ::100])
        return features

    found = common.extract(CPU, data, encode, 8)
    assert data.pixels is not None
    assert torch.equal(found, encode(data.normalize(data.pixels.float() / 255)))
    one = torch.ones(1, requires_grad=True)
    halves = common.extract(CPU, data, lambda images: (one * images.flatten(1)[:, ::100]).bfloat16(), 8)
    assert torch.equal(halves, found.bfloat16().float()) and not halves.requires_grad


def test_the_monitor_sees_images_as_training_does(tmp_path: Path) -> None:
    """A mean and deviation that a script sets itself are those of its test images, too; so is the size."""
    args = options("--knn-every", "1")
    data = common.load(args, "pretrain", CPU)
    before = data.identity()
    data.mean, data.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    assert common.differences(before, data.identity()) == ["mean", "std"]  # no run goes on with others
    test = common.load_monitor(args, data, CPU)
    assert test is not None and (test.mean, test.std) == (data.mean, data.std)
    for split, side in (("train", 24), ("val", 32)):
        save(Image.fromarray(noise(0, side, side)), tmp_path / split / "a" / "0.png")
    args = options("--knn-every", "1", "--data", tmp_path)
    args.subset = args.test_subset = None
    test = common.load_monitor(args, common.load(args, "pretrain", CPU), CPU)
    assert test is not None and test.size == 24


@pytest.mark.parametrize(("low", "high", "kind", "warns"), [
    (0, 65_535, np.uint16, False), (0, 40_000, np.uint16, False), (0, 4095, np.uint16, True), (0, 4095, ">u2", True),
    (0, 1, np.float32, True), (0, 255, np.float32, False), (0, 60_000, np.float32, True),
    (-1024, 40_000, np.int32, True),
])
def test_deep_images_of_a_small_range(
    low: int, high: int, kind: Any, warns: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 bits in 16, floats in [0, 1] and negative values would become nearly black: one warning says so."""
    values = np.linspace(low, high, 256).reshape(16, 16).astype(kind)
    for number in range(4):
        big = Image.frombytes("I;16B", (16, 16), values.tobytes()) if kind == ">u2" else Image.fromarray(values)
        big.save(tmp_path / f"{number}.tif")
    load("pretrain", "--data", tmp_path)
    said = capsys.readouterr().err
    assert said.count("warning: ") == warns and (f"values from {low} to {high}: " in said) == warns


def test_modes_decode(tmp_path: Path) -> None:
    """RGBA, palette, grey, 16-bit and CMYK images become RGB of the same look."""
    grey = np.tile(np.arange(0, 256, 8, np.uint8), (32, 1))
    colour = np.stack([grey, grey.T, 255 - grey], 2)
    rgb = Image.fromarray(colour)
    alpha = Image.fromarray(np.dstack([colour, np.full_like(grey, 200)]))
    save(rgb, tmp_path / "rgb.png")
    save(alpha, tmp_path / "rgba.png")
    save(rgb.quantize(256), tmp_path / "palette.gif")
    save(rgb.convert("CMYK"), tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    save(Image.fromarray(grey), tmp_path / "grey.png")
    save(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "deep.png")
    save(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "deep.tif")
    save(Image.fromarray(grey > 127), tmp_path / "bits.png")
    data = load("pretrain", "--data", tmp_path)
    assert data.pixels is not None and len(data) == 8
    pixels = {data.path(i).name: data.pixels[i].int() for i in range(8)}
    for name, tolerance in {"rgb.png": 0, "rgba.png": 0, "palette.gif": 40, "cmyk.jpg": 12}.items():
        assert (pixels[name] - torch.from_numpy(colour).permute(2, 0, 1)).abs().max() <= tolerance, name
    for name in ("grey.png", "deep.png", "deep.tif"):
        assert (pixels[name] == torch.from_numpy(grey)).all(), name
    assert set(pixels["bits.png"].unique().tolist()) == {0, 255}


def test_subset(tmp_path: Path) -> None:
    """A subset is balanced, follows from the seed, keeps the positions in the full set, and may be a share."""
    write_cifar(tmp_path, ten=True)
    words = ["--data", "cifar10", "--data-dir", tmp_path, "--subset"]
    whole = load("pretrain", *words[:-1])
    part = load("pretrain", *words, "37")
    assert len(part) == 37 and set(part.labels.bincount().tolist()) == {3, 4}
    assert part.ids.tolist() == sorted(part.ids.tolist())
    assert part.pixels is not None and whole.pixels is not None
    assert torch.equal(part.pixels, whole.pixels[part.ids]) and torch.equal(part.labels, whole.labels[part.ids])
    assert torch.equal(part.ids, load("pretrain", *words, "37").ids)
    assert not torch.equal(part.ids, load("pretrain", *words, "37", "--seed", "1").ids)
    assert (len(load("pretrain", *words, "0.25")), len(load("pretrain", *words, "1"))) == (25, 1)
    assert part.identity() != load("pretrain", *words, "37", "--seed", "1").identity()
    for bad in ("101", "0.001"):
        with pytest.raises(common.Fault, match="--subset"):
            load("pretrain", *words, bad)
    with pytest.raises(common.Fault, match="--test-subset 101: cifar10 has"):
        load("test", *words[:-1], "--test-subset", "101")


def test_shapes_subset() -> None:
    """Of the rendered shapes as many are made as are wanted, more than the default too, or a share of it; test images
    are others."""
    assert len(load("pretrain", "--subset", "120")) == 120
    train = load("pretrain", "--subset", "0.001")
    args = options("--test-subset", "0.005")
    test = common.load(args, "test", CPU)
    assert train.pixels is not None and test.pixels is not None and len(train) == len(test) == 50
    assert len(torch.cat([train.pixels, test.pixels]).unique(dim=0)) == 100


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for i in range(8):
        save(photograph(i, 240 + 10 * i, 400 - 20 * i), root / "train" / "ab"[i % 2] / f"{i}.jpg", quality=95)
        save(photograph(i), root / "val" / "ab"[i % 2] / f"{i}.png")
    return root


def batches(root: Path, workers: int, start: int = 0) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    args = options("--data", root, "--workers", workers)
    args.subset, args.image_size, args.output = None, 64, root / f"out{workers}"
    job = common.Run(args)
    data = common.load(args, "pretrain", CPU)
    assert data.pixels is None
    steps = data.batches(job, job.permutation(0, len(data)), common.Crop(64, (0.2, 1.0)), 0, start, views=2)
    return [(*step, torch.rand(1)) for step in steps]


def test_every_crop_is_drawn_anew(tmp_path: Path) -> None:
    """Of one and the same image each epoch, step, view and place in a batch has a crop of its own; so has each seed.
    Numbers of the augmentation and the order of the images are drawn anew as well, dropout's on each rank."""
    found, numbers, orders, dropped = list[Tensor](), list[Tensor](), list[Tensor](), set[float]()
    for seed in ("0", "1"):
        job = common.Run(options("--subset", "8", "--seed", seed, "--output", tmp_path / seed))
        data = common.load(job.args, "pretrain", CPU)
        for epoch in (0, 1):
            steps = data.batches(job, torch.zeros(8, dtype=torch.long), common.Crop(16, (0.2, 1.0)), epoch, views=2)
            found += [images.flatten(0, 1) for _, _, images in steps]
            numbers += [job.draw(epoch, step)(3) for step in (0, 1)]
            orders.append(job.permutation(epoch, 8))
            for step, job.rank in itertools.product((0, 1), (1, 0)):
                job.seed_step(epoch, step)
                dropped.add(torch.rand(1).item())
    assert len(dropped) == 2 * 2 * 2 * 2
    assert len(torch.cat(found)) == len(torch.cat(found).unique(dim=0)) == 2 * 2 * 2 * 2 * 4
    assert len(torch.cat(numbers).unique(dim=0)) == 2 * 2 * 2 * 4 and len(torch.stack(orders).unique(dim=0)) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(photographs: Path) -> None:
    """Crops of any number of workers, or from the middle of an epoch on, are those made in the process itself, and what
    draws without a generator of its own, such as dropout, draws the same."""
    expected = batches(photographs, 0)
    assert [step for step, *_ in expected] == [0, 1] and expected[0][2].shape == (2, 4, 3, 64, 64)
    assert not torch.equal(expected[0][2][0], expected[0][2][1])
    for found in (batches(photographs, 1), batches(photographs, 3)):
        for a, b in zip(expected, found, strict=True):
            assert a[0] == b[0] and all(map(torch.equal, a[1:], b[1:]))
    (later,) = batches(photographs, 2, start=1)
    assert all(map(torch.equal, later[1:], expected[1][1:]))


@pytest.mark.parametrize(("name", "least", "error"), [
    ("train/a/0.jpg", 0.5, 1), ("train/a/0.jpg", 0.02, 1), ("val/a/0.png", 0.5, 0),
])
def test_crops_from_a_draft(name: str, least: float, error: float, photographs: Path) -> None:
    """JPEGs decoded at reduced size, which the smallest crop decides, give the crops of a full decode, but for what
    smoothing differs; other files have nothing to differ in."""
    path = photographs / name
    uniform = torch.rand(6, common.CROP_NUMBERS, generator=torch.Generator().manual_seed(0))
    crop = common.Crop(32, (least, 1.0))
    with Image.open(path) as image:
        boxes = common.crop_boxes(uniform, image.height, image.width, crop.scale, crop.ratio)
        full = image.convert("RGB")
    for view, (top, left, height, width) in zip(common.random_crops(path, uniform, crop), boxes.tolist(), strict=True):
        area = (left, top, left + width, top + height)
        expected = np.asarray(full.resize((32, 32), Image.Resampling.BILINEAR, area)).transpose(2, 0, 1)
        assert np.abs(view.numpy().astype(int) - expected).mean() <= error


def test_centre_from_a_draft(tmp_path: Path) -> None:
    """The central square of a large JPEG, decoded at reduced size, is close to torchvision's of the whole."""
    save(photograph(3, 900, 1301), tmp_path / "large.jpg", quality=95)
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    with Image.open(tmp_path / "large.jpg") as image:
        expected = pil_to_tensor(reference(image.convert("RGB"))).int()
    difference = (common.central_square(tmp_path / "large.jpg", 224, 256).int() - expected).abs().float()
    assert difference.mean() < 1 and difference.quantile(0.99) < 8


@pytest.mark.parametrize("name", ["train/a/0.jpg", "val/b/1.png"])
def test_centre_crop(name: str, photographs: Path) -> None:
    """Central squares are torchvision's Resize(256) and CenterCrop(224) within 2/255."""
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    with Image.open(photographs / name) as image:
        expected = pil_to_tensor(reference(image.convert("RGB"))).int()
    found = common.central_square(photographs / name, 224, 256).int()
    assert (found - expected).abs().max() <= 2


def test_small_photographs_are_framed_alike(tmp_path: Path) -> None:
    """A photograph smaller than the network's images is scaled to 256 and cropped, too."""
    save(photograph(4, 50, 67), tmp_path / "small.png")  # an odd border to cut off
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    with Image.open(tmp_path / "small.png") as image:
        expected = pil_to_tensor(reference(image.convert("RGB"))).int()
    assert (common.central_square(tmp_path / "small.png", 224, 256).int() - expected).abs().max() <= 2


@pytest.mark.parametrize(("side", "seen"), [(96, 96), (97, 224)])
def test_a_folder_of_small_images(side: int, seen: int, tmp_path: Path) -> None:
    """Images of up to 96 px, STL-10's, are held decoded and seen at their own size; larger ones are photographs."""
    save(photograph(0, side, side), tmp_path / "a.png")
    data = load("pretrain", "--data", tmp_path, "--subset", "1")
    assert data.size == seen and (data.pixels is not None) == (side == seen)
    if data.pixels is not None:  # whole
        torch.testing.assert_close(next(data.centers(torch.arange(1), 1, CPU)) * 255, data.pixels.float())


def test_cached_photographs(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--cache host keeps central squares, says so, and gives evaluation the pixels that files give within 2/255."""
    files = load("test", "--data", photographs, "--image-size", "112")
    held = load("test", "--data", photographs, "--image-size", "112", "--cache", "host")
    assert "--cache host" in capsys.readouterr().err
    assert held.pixels is not None and held.pixels.shape == (8, 3, 128, 128)
    rows = torch.arange(8)
    for a, b in zip(files.centers(rows, 3, CPU), held.centers(rows, 3, CPU), strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 2.01 / 255
    assert files.identity() != held.identity()


def test_images_of_a_bank_are_held_as_in_training(tmp_path: Path) -> None:
    """Photographs of a run with --cache host are decoded for its bank, too: files would be other images."""
    for number in range(4):
        save(photograph(number, 110, 120), tmp_path / f"train/{'ab'[number % 2]}/{number}.jpg")
    args = options("--data", tmp_path, "--cache", "host", "--image-size", "32")
    args.subset = None
    data = common.load(args, "pretrain", CPU)
    encoder = argparse.Namespace(options=common.plain_options(args), data=data.identity())
    asked = eval_knn.parse_args(["checkpoint.pth", "--train-features", "bank", "--workers", "0"])
    found = common.load_train(asked, encoder, "pretrain", CPU)  # type: ignore[arg-type]
    assert found.pixels is not None and found.identity() == data.identity()


def test_a_subset_of_a_folder_is_treated_as_the_folder(tmp_path: Path) -> None:
    """One large image makes a folder one of large images, also where --subset leaves it out: none is held decoded."""
    for i in range(7):
        save(Image.fromarray(noise(i)), tmp_path / f"{i}.png")
    save(photograph(0), tmp_path / "large.png")
    parts = [load("pretrain", "--data", tmp_path, "--subset", "3", "--seed", str(seed)) for seed in range(4)]
    assert not all(7 in part.ids.tolist() for part in parts)
    assert all(part.pixels is None and part.size == 224 for part in parts)


def test_ten_crops(photographs: Path) -> None:
    """The ten crops are torchvision's TenCrop after Resize: of files within 2/255, JPEGs but for what a decode at
    reduced size smoothes, and of decoded images to the bit."""
    files = load("test", "--data", photographs, "--image-size", "56", "--workers", "0")
    found = torch.cat(list(files.centers(torch.arange(8), 1, CPU, ten=True)))
    reference = transforms.Compose([transforms.Resize(64), transforms.TenCrop(56)])
    for row, crops in enumerate(found):
        with Image.open(files.path(row)) as image:
            expected = torch.stack([pil_to_tensor(crop) for crop in reference(image.convert("RGB"))])
        difference = (crops * 255 - expected).abs()
        assert difference.mean() < 4 if files.path(row).suffix == ".jpg" else difference.max() <= 2
    shapes = load("train", "--subset", "3", "--image-size", "32")
    whole = common.resize_center_crop(shapes.pixels, 37, 37)  # type: ignore[arg-type]
    (found,) = shapes.centers(torch.arange(3), 8, CPU, ten=True)
    assert torch.equal(found, torch.stack(transforms.TenCrop(32)(whole), 1))


def test_photographs_train_with_workers(photographs: Path, tmp_path: Path) -> None:
    """A folder of large images trains through workers, with a monitor, and the same without workers."""
    command = [*TINY, "--data", photographs, "--subset", "8", "--batch-size", "4", "--knn-every", "2"]
    command += ["--image-size", "48"]
    for workers in ("0", "2"):
        done = run("npid", [*command, "--test-subset", "8", "--workers", workers, "--output", tmp_path / workers])
        assert done.code == 0 and "knn_top1" in done.out, done.err
    same(checkpoint(tmp_path / "0"), checkpoint(tmp_path / "2"))


def signal_the_whole_job() -> None:
    os.setsid()
    original = common.Run.after_step

    def after_step(self: common.Run, state: dict[str, Any], epoch: int, step: int, loss: Tensor) -> None:
        if (epoch, step) == (1, 0):
            os.killpg(0, signal.SIGUSR2)
        original(self, state, epoch, step, loss)

    common.Run.after_step = after_step  # type: ignore[method-assign]


def test_a_signal_to_the_whole_job_leaves_its_workers_alone(photographs: Path, tmp_path: Path) -> None:
    """SLURM signals all processes of a step: the script saves and says so, and nothing else speaks."""
    command = [*TINY, "--data", photographs, "--subset", "8", "--batch-size", "4", "--image-size", "48"]
    stopped = run("npid", [*command, "--workers", "2", "--output", tmp_path], before=signal_the_whole_job)
    assert stopped.code == 128 + signal.SIGUSR2
    saving, stop = stopped.err.strip().splitlines()
    assert saving == "SIGUSR2: saving at the next step boundary" and stop.startswith("stopped after 1 epochs and 1 ")


def test_identity(tree: Path, tmp_path: Path) -> None:
    """A moved folder is the same data; one with a file renamed, or another image, is not, nor are other pixels."""
    words = ["--cache", "none", "--data"]
    before = load("pretrain", *words, tree).identity()
    moved = tmp_path / "other place" / "set"
    moved.parent.mkdir()
    tree.rename(moved)
    assert load("pretrain", *words, moved).identity() == before
    (moved / "train/a/1.png").rename(moved / "train/a/2.png")
    assert load("pretrain", *words, moved).identity() != before
    (moved / "train/a/2.png").rename(moved / "train/a/1.png")
    save(Image.fromarray(0 * noise(2)), moved / "train/a/1.png")
    assert load("pretrain", *words, moved).identity() != before
    held = images_of([0] * 70, pixels=torch.zeros(70, 3, 8, 8, dtype=torch.uint8))
    before = held.identity()
    held.pixels[60] = 1
    assert held.identity() != before


def test_a_folder_has_its_name_from_inside(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--data . or .. is the same data as the folder by its name."""
    expected = load("pretrain", "--data", tree).identity()
    for place, words in ((tree, "."), (tree / "train", "..")):
        monkeypatch.chdir(place)
        assert load("pretrain", "--data", words).identity() == expected


def test_what_all_ranks_find_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 alone says what all ranks find in the data; an image that only one rank reads is named by that rank."""
    small, large, tolerant = tmp_path / "small", tmp_path / "large", ["--max-bad-images", "1"]
    for folder, side in ((small, 16), (large, 120)):
        for i in range(8):
            save(Image.fromarray(noise(i, side, side)), folder / f"{i}.png")
        (folder / "bad.png").write_bytes(b"no image")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        write_cifar(tmp_path / rank, ten=True)
        load("pretrain", "--data", "cifar10", "--data-dir", tmp_path / rank)
        data = load("pretrain", "--data", small, *tolerant)
        for words in ([], ["--val-dir", large]):
            assert common.load_monitor(options("--data", small, *words), data, CPU) is None
        load("pretrain", "--data", large, "--cache", "host", *tolerant)
        said = capsys.readouterr().err
        notes = ["official", f"{small}/bad.png", "no validation", "no folders", "--cache host", f"{large}/bad.png"]
        assert [said.count(words) for words in notes] == [int(rank == "0")] * 6
        files = load("pretrain", "--data", large, *tolerant)
        files.bad = common.BadImages(1)
        list(files.centers(torch.arange(9), 4, CPU))
        assert capsys.readouterr().err.endswith(f"replaced by grey: {large}/bad.png\n")


def test_unlabelled_folder(tmp_path: Path) -> None:
    """A flat folder trains, is told to have no kNN monitor, and kNN asks for other images by --data."""
    for i in range(40):
        save(Image.fromarray(noise(i)), tmp_path / "flat" / f"{i}.png")
    command = [*TINY, "--data", tmp_path / "flat", "--subset", "40", "--knn-every", "1", "--output", tmp_path / "out"]
    done = run("npid", command)
    assert done.code == 0 and done.err == "flat has no folders that could be classes: no kNN monitor\n"
    assert "knn_top1" not in done.out
    one_line(run("eval_knn", [tmp_path / "out" / "checkpoint.pth"]), "--val-dir")
    flat = ["--val-dir", tmp_path / "flat"]
    one_line(run("eval_knn", [tmp_path / "out" / "checkpoint.pth", *flat]), "no classes", "--data")


# parts of sets


def test_long_tail_is_exponential_and_always_the_same() -> None:
    """Ratio 100 over three classes of 200: 200, 20 and 2 images, drawn from all of a class, the same in every run."""
    data = images_of([i % 3 for i in range(600)], pixels=torch.zeros(600, 3, 1, 1, dtype=torch.uint8))
    one, same = (common.long_tailed(data, 100) for _ in range(2))
    assert torch.bincount(one.labels).tolist() == [200, 20, 2] and torch.equal(one.ids, same.ids)
    assert one.ids[one.labels == 1].max() > 300  # the first 20 end at 58
    assert torch.bincount(common.long_tailed(data, 1).labels).tolist() == [200, 200, 200]
    data.labels = torch.tensor([1, 3, 5])[data.labels]  # no image of the others
    assert torch.bincount(common.long_tailed(data, 100).labels).tolist() == [0, 200, 0, 20, 0, 2]
    data.labels = torch.ones_like(data.labels)
    with pytest.raises(common.Fault, match="--imbalance needs the classes"):
        common.long_tailed(data, 100)


def test_long_tail_starts_from_the_smallest_class() -> None:
    """Of classes of 30, 12 and 60 images ratio 4 leaves 12, 6 and 3: no class is larger than the one before it."""
    data = images_of([0] * 30 + [1] * 12 + [2] * 60, pixels=torch.zeros(102, 3, 1, 1, dtype=torch.uint8))
    assert torch.bincount(common.long_tailed(data, 4).labels).tolist() == [12, 6, 3]


def test_class_counts_of_a_long_tail_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """640 shapes at ratio 8: 64 images of the first class, 8 of the last; all of the test images."""
    assert len(load("pretrain", "--subset", "640", "--imbalance", "8", "--seed", "5")) == 279
    assert "images of each class: 64 51 40 32 25 20 16 13 10 8" in capsys.readouterr().err
    assert len(load("test", "--test-subset", "640", "--imbalance", "8")) == 640


def test_file_list_chooses_files_and_folders(tmp_path: Path) -> None:
    """Lines name an image, with or without the split's folder, or a class; what is not there is an error."""
    files = np.array([f"n{c}/n{c}_{i}.jpg".encode() for c in (1, 2, 3) for i in range(3)])
    data = images_of([0, 0, 0, 1, 1, 1, 2, 2, 2], files=files, root=Path("/set/train"))
    path = tmp_path / "list.txt"
    path.write_text("train/n1/n1_0.jpg 0\nn1/n1_2.jpg 0\nn3\n")
    chosen = common.listed(data, path)
    assert [chosen.path(row).name for row in range(5)] == ["n1_0.jpg", "n1_2.jpg", "n3_0.jpg", "n3_1.jpg", "n3_2.jpg"]
    assert chosen.labels.tolist() == [0, 0, 1, 1, 1] and chosen.classes == [data.classes[0], data.classes[2]]
    flat_set = images_of([0] * 2, files=np.array([b"a b.jpg", b"c.jpg"]), root=Path("/set"))
    flat_set.classes, flat_set.labels = [], torch.tensor([-1, -1])
    path.write_text("a b.jpg 4\n")
    flat_part = common.listed(flat_set, path)
    assert flat_part.labels.tolist() == [0] and flat_part.classes == ["4"]
    path.write_text("n9\n")
    with pytest.raises(common.Fault, match="n9"):
        common.listed(data, path)
    path.write_text("\n")
    with pytest.raises(common.Fault, match="names no image"):
        common.listed(data, path)
    with pytest.raises(common.Fault, match=r"list.txt names files, and set has none"):
        common.listed(images_of([0], pixels=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), path)
    odd = b"caf\xe9.jpg"  # a name that is no UTF-8
    for mark in (b"", codecs.BOM_UTF8):  # with which some editors begin a file
        path.write_bytes(mark + odd + b" 0\r\n")
        assert len(common.listed(images_of([0], files=np.array([odd]), root=Path("/set")), path)) == 1


def test_classes_of_a_list_that_folders_do_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a folder's images have several classes in a list, the list's are taken, with a note; not where a line has
    none, or the numbers only name the folders or are the same for all."""
    files = np.array([b"Aves/0/a.png", b"Aves/1/b.png", b"Fungi/2/c.png"])
    data, path = images_of([0, 0, 1], files=files, root=Path("/set/train")), tmp_path / "list.txt"
    named = [0, 0, 1], data.classes
    for numbers, expected in (((" 5", " 1", " 7"), ([1, 0, 2], ["1", "5", "7"])), (("", " 1", " 7"), named),
                              ((" 5", " 5", " 1"), named), ((" 0", " 0", " 0"), named)):
        path.write_text("".join(f"train/{file.decode()}{n}\n" for file, n in zip(files, numbers, strict=True)))
        part = common.listed(data, path)
        assert (part.labels.tolist(), part.classes) == expected
        assert ("the list's are taken" in capsys.readouterr().err) == (expected is not named)


def test_a_list_leaves_out_unreadable_images(tmp_path: Path) -> None:
    """An image that cannot be read is no error where a list of the others is given."""
    words = listed_tree(tmp_path)
    for place in ("train", "val"):
        (tmp_path / place / "broken.png").touch()
    for split in ("pretrain", "test"):
        assert len(load(split, *words)) == 16
        with pytest.raises(common.Fault, match=r"cannot read the image .*broken.png"):
            load(split, "--data", tmp_path)


def test_classes_of_a_list_beside_a_folder_without_images(tmp_path: Path) -> None:
    """A folder without an image, such as runs/, does not take the place of the classes in the lists of a flat set."""
    words = listed_tree(tmp_path)
    (tmp_path / "train" / "notes").mkdir()
    for split in ("pretrain", "test"):
        data = load(split, *words)
        assert data.labels.bincount().tolist() == [8, 8] and data.classes == ["0", "1"]


def test_lines_of_a_file_list_that_meet(tmp_path: Path) -> None:
    """A folder and an image in it are both found; the first folder tells a class, as it does without a list; a name
    that several images have is an error, as long as no folder stands before it."""
    files = np.array([b"bird/sub/1.png", b"bird/sub/2.png", b"cat/1.png", b"dog/1.png", b"dog/3.png"])
    data, path = images_of([0, 0, 1, 2, 2], files=files, root=Path("/set/train")), tmp_path / "list.txt"
    for lines, ids in (("dog\ndog/1.png\n", [3, 4]), ("bird\n", [0, 1]), ("sub\ndog/3.png\n3.png\n", [0, 1, 4]),
                       ("cat/1.png\nbird/sub/1.png\n", [0, 2])):
        path.write_text(lines)
        assert common.listed(data, path).ids.tolist() == ids
    path.write_text("cat 0\ndog 1\ndog/1.png 0\n")  # of two numbers the folder's counts: dogs stay one class
    assert common.listed(data, path).labels.tolist() == [0, 1, 1]
    path.write_text("2.png\n1.png\n")
    with pytest.raises(common.Fault, match=r"1.png is /set/train/bird/sub/1.png and /set/train/cat/1.png"):
        common.listed(data, path)
    above = images_of([0, 0], files=np.array([b"1.png", b"dog/1.png"]), root=Path("/set/train"))
    with pytest.raises(common.Fault, match=r"1.png is /set/train/1.png and"):
        common.listed(above, path)
    path.write_text("train/1.png\n")
    assert common.listed(above, path).ids.tolist() == [0]


def test_paths_of_a_file_list_may_have_four_parts(tmp_path: Path) -> None:
    """The last four parts of an image's path name it, those above the split's folder among them; five do not."""
    files = np.array([b"bird/1.png", b"cat/1.png"])
    data, path = images_of([0, 1], files=files, root=Path("/sets/set/train")), tmp_path / "list.txt"
    path.write_text("set/train/cat/1.png\n")
    assert common.listed(data, path).ids.tolist() == [1]
    path.write_text("sets/set/train/cat/1.png\n")
    with pytest.raises(common.Fault, match="not among the 2 images"):
        common.listed(data, path)


def test_a_list_of_training_images_leaves_the_test_images_alone(tmp_path: Path) -> None:
    """--file-list without --val-list: all validation images, though the list names some of theirs."""
    for number in range(6):
        save(Image.fromarray(noise(number)), tmp_path / f"train/{'ab'[number % 2]}/{number}.png")
        save(Image.fromarray(noise(number)), tmp_path / f"val/{'ab'[number % 2]}/{number}.png")
    (tmp_path / "train.txt").write_text("a/0.png\nb/1.png\n")
    words = ["--data", tmp_path, "--file-list", tmp_path / "train.txt"]
    assert (len(load("pretrain", *words)), len(load("train", *words)), len(load("test", *words))) == (2, 2, 6)


def test_a_folder_of_a_list_may_end_with_a_number(tmp_path: Path) -> None:
    """`cup 1` is the folder of that name where there is one, else the folder `cup` with class 1."""
    files = np.array([b"cup 1/a.png", b"cup 2/a.png", b"cup/a.png"])
    data, path = images_of([0, 1, 2], files=files, root=Path("/set/train")), tmp_path / "list.txt"
    for lines, ids in (("cup 1\n", [0]), ("cup 2/a.png 5\ncup 1 4\n", [0, 1]), ("cup 3\n", [2])):
        path.write_text(lines)
        assert common.listed(data, path).ids.tolist() == ids


def listed_tree(root: Path, count: int = 16) -> list[str]:
    """Flat train/ and val/ of numbered images and lists of them, of classes 0 and 1; the options that name all."""
    for place in ("train", "val"):
        (root / place).mkdir()
        (root / f"{place}.txt").write_text("".join(f"{i}.png {i % 2}\n" for i in range(count)))
        for number in range(count):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(root / place / f"{number}.png")
    return ["--data", str(root), "--file-list", str(root / "train.txt"), "--val-list", str(root / "val.txt")]


def test_classes_of_the_monitor_are_those_of_training(tmp_path: Path) -> None:
    """A class of --val-list above those of --file-list ends in one line, not within the kNN monitor."""
    args = npid.parse_args(["--device", "cpu", *listed_tree(tmp_path)])
    data = common.load(args, "pretrain", CPU)
    test = common.load_monitor(args, data, CPU)
    assert test is not None and data.classes == ["0", "1"] and int(test.labels.max()) == 1
    (tmp_path / "val.txt").write_text("0.png 0\n1.png 2\n")
    with pytest.raises(common.Fault, match=r"val.txt: no training image is of the class 2, as test"):
        common.load_monitor(args, data, CPU)


def test_test_images_of_classes_that_a_list_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a list of some classes the set has these alone, and test images of others are left out, with a note, as if
    --val-list had named the same; images without a class stay."""
    for place in ("train", "val"):
        for number in range(9):
            save(Image.fromarray(noise(number)), tmp_path / place / "abc"[number % 3] / f"{number}.png")
    (tmp_path / "few.txt").write_text("c\nb\n")
    for more in ([], ["--val-list", tmp_path / "few.txt"]):
        words = ["--data", tmp_path, "--file-list", tmp_path / "few.txt", *more]
        args = npid.parse_args(["--device", "cpu", *map(str, words)])
        data = common.load(args, "pretrain", CPU)
        test = common.load_monitor(args, data, CPU)
        assert test is not None and data.classes == test.classes == ["b", "c"]
        assert data.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert [test.path(row).parent.name for row in range(6)] == ["b"] * 3 + ["c"] * 3
        said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
        assert len(said) == (not more) and (more or "note: 3 of the 9 test images are left out" in said[0])
        part = common.load_monitor(argparse.Namespace(**vars(args) | dict(test_subset=4)), data, CPU)
        assert part is not None and part.labels.tolist() == [0, 0, 1, 1]  # a part of these, not of all
        capsys.readouterr()
    (tmp_path / "val.txt").write_text("a\n")
    args.val_list = tmp_path / "val.txt"
    with pytest.raises(common.Fault, match=r"val.txt: no training image is of the class a, as test images are"):
        common.load_monitor(args, data, CPU)
    shutil.rmtree(tmp_path / "val/b")
    shutil.rmtree(tmp_path / "val/c")
    args.val_list = None
    with pytest.raises(common.Fault, match=r"few.txt: no training .* as test images are: name theirs by a --val-list"):
        common.load_monitor(args, data, CPU)
    (tmp_path / "flat").mkdir()
    save(Image.fromarray(noise(0)), tmp_path / "flat" / "1.png")
    args.val_dir = tmp_path / "flat"
    test = common.load(args, "test", CPU, data.classes)
    assert test.labels.tolist() == [-1] and "left out" not in capsys.readouterr().err


def test_a_subset_of_a_list(tmp_path: Path) -> None:
    """--subset is drawn from the listed images, and a list's classes are balanced in it."""
    words = listed_tree(tmp_path)
    (tmp_path / "train.txt").write_text("".join(f"{i}.png {i % 2}\n" for i in (*range(4), 5, 7, 9)))
    data = load("pretrain", *words, "--subset", "4")
    names = {int(data.path(row).stem) for row in range(4)}
    assert names <= {0, 1, 2, 3, 5, 7, 9} and {0, 2} <= names and data.labels.sum() == 2
    with pytest.raises(common.Fault, match="has 7 images here"):
        load("pretrain", *words, "--subset", "8")


def test_shares_are_rounded(tmp_path: Path) -> None:
    """29 % of 100 images are 29, although 0.29 * 100 is a little less; half of 5 are 2, as Python rounds."""
    words = listed_tree(tmp_path, 100)
    assert len(load("pretrain", *words, "--subset", "0.29")) == len(load("test", *words, "--test-subset", "0.29")) == 29
    (tmp_path / "train.txt").write_text("".join(f"{i}.png 0\n" for i in range(5)))
    assert len(load("pretrain", *words, "--subset", "0.5")) == 2
