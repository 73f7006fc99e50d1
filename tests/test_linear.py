"""Classification protocols: probes, SVMs and metrics against references; drawn labels, cached features, resuming."""

import argparse
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
import socket
import sys
import tarfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import one_line, run, start
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC
from torch import Tensor, nn

import common
import eval_linear
import figures
import npid

CPU = torch.device("cpu")
SMALL = ["--preset", "smoke", "--device", "cpu", "--data-dir"]
PACKS = common.ROOT.parent / "shared" / "data" / "voc"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small NPID run's checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["npid.py"])
        npid.main(npid.parse_args(["--preset", "smoke", "--device", "cpu", "--knn-every", "0", "--epochs", "1",
                                   "--output", str(folder)]))
    return folder / "checkpoint.pth"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of it in a folder of its own."""
    return Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory in which the VOC-style set of `shapes` is rendered once."""
    return tmp_path_factory.mktemp("voc")


def evaluate(checkpoint: Path | str, *words: Any, data_dir: Path = Path("nowhere")) -> dict[str, Any]:
    """Run the script and return the line that it appends."""
    args = eval_linear.parse_args([str(word) for word in (checkpoint, *SMALL, data_dir, *words)])
    eval_linear.main(args)
    place = args.output if checkpoint == "random" else Path(checkpoint).parent
    found: dict[str, Any] = json.loads((place / "eval.jsonl").read_text().splitlines()[-1])
    return found


def blobs(count: int, size: int, classes: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Points (N, d) around a centre for each class, and their classes (N,)."""
    source = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, size, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centers[labels] + spread * torch.randn(count, size, generator=source), labels


# features


def test_sizes_of_alexnet() -> None:
    """At 224 px the five stages have the thesis's 9600, 9216, 9600, 9600, 9216 numbers, means with counted padding."""
    network = common.backbone("alexnet").eval()
    with torch.no_grad():
        maps = network.stages(torch.randn(1, 3, 224, 224))
    pools = [(6, 3), (4, 0), (3, 1), (3, 1), (2, 0)]
    for stage, (size, side, (kernel, padding)) in enumerate(zip((9600, 9216, 9600, 9600, 9216), (10, 6, 5, 5, 6), pools,
                                                                strict=True)):
        found = eval_linear.pool(maps, stage, 10_000)
        assert found.shape == (1, size) and size == maps[stage].shape[1] * side**2
        padded = F.pad(maps[stage], (padding,) * 4)
        corner = padded[:, :, :kernel, :kernel].mean((2, 3))
        torch.testing.assert_close(found.view(1, -1, side, side)[:, :, 0, 0], corner)


@pytest.mark.parametrize("arch", ["vgg16", "resnet18", "resnet50"])
def test_sizes_of_others(arch: str) -> None:
    """The other networks' stages at 224 px have 8,000 to 10,000 numbers."""
    with torch.device("meta"):
        maps = common.backbone(arch).stages(torch.empty(1, 3, 224, 224))
    assert all(8000 <= eval_linear.pool(maps, stage, 10_000).shape[1] <= 10_000 for stage in range(5))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_pooling_of_local_aggregations_code(arch: str) -> None:
    """The two --layer-size of the docstring average a ResNet's stages as that code does: 2 x 2 above 200,000 numbers,
    4 x 4 where that leaves too many."""
    width = 8  # an eighth of the channels: of the numbers, too
    with torch.no_grad():
        maps = common.backbone(arch, width).eval().stages(torch.randn(1, 3, 224, 224))
    for stage, size in enumerate((50_176, 50_176, 100_352, 50_176, 100_352)):
        numbers = maps[stage].numel() * 64 // width
        kernel = 1 if numbers <= 200_000 else 2 if numbers <= 800_000 else 4
        expected = F.avg_pool2d(maps[stage], kernel).flatten(1)
        torch.testing.assert_close(eval_linear.pool(maps, stage, size * width // 64), expected)


def test_pool5_is_what_fc6_sees() -> None:
    """Of AlexNet and VGG16: with fc6 and fc7 on top of it, the network's own output."""
    for arch in ("alexnet", "vgg16_bn", "alexnet_bn_fc"):
        torch.manual_seed(0)
        encoder = common.untrained_encoder(arch, 4, True, CPU)
        images = torch.randn(2, 3, 32, 32)
        (found,) = eval_linear.layer_features(encoder, images, ["pool5"], 10_000)
        network: Any = encoder.backbone
        torch.testing.assert_close(F.relu(network.classifier(found)), network(images))


def test_a_network_of_ones_own_needs_no_stages() -> None:
    """Its output can be probed as it is; to ask for a stage that it does not have is a fault that says so."""
    own = dataclasses.replace(encoder_and_data()[0], backbone=nn.Flatten(), arch="mine")
    images = torch.randn(2, 3, 32, 32)
    (found,) = eval_linear.layer_features(own, images, ["backbone"], 10_000)
    assert torch.equal(found, images.flatten(1))
    with pytest.raises(common.Fault, match="mine has no `stages`"):
        eval_linear.layer_features(own, images, ["conv5", "backbone"], 10_000)


def options(tmp_path: Path, *words: str) -> argparse.Namespace:
    return eval_linear.parse_args(["random", "--preset", "smoke", "--output", str(tmp_path), *words])


def features(args: argparse.Namespace, encoder: common.Encoder, data: common.ImageSet, crops: int = 1) -> list[Tensor]:
    return list(eval_linear.cached_features(args, encoder, [(data, "train", crops)], CPU)[0].values())


def encoder_and_data(seed: int = 0, count: int = 24) -> tuple[common.Encoder, common.ImageSet]:
    torch.manual_seed(seed)
    data = common.load(npid.parse_args(["--subset", str(count)]), "train", CPU)
    return common.untrained_encoder("resnet18", 4, True, CPU, 8), data


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_cached_features_are_the_networks(kind: str, tmp_path: Path) -> None:
    """What is cached for each layer and crop is what the network says of it, to the rounding of the type."""
    encoder, data = encoder_and_data()
    args = options(tmp_path, "--feature-type", kind, "--no-amp", "--layers", "conv1", "pool5", "backbone", "head",
                   "--image-batch", "10")
    found = features(args, encoder, data, 2)
    images = data.normalize(torch.cat(list(data.centers(torch.arange(24), 24, CPU))))
    for view, crop in enumerate((images, images.flip(-1))):
        maps = encoder.backbone.stages(crop)  # type: ignore[operator]
        expected = [eval_linear.pool(maps, 0, 64), eval_linear.pool(maps, 4, 64), maps[4].mean((2, 3)),
                    encoder.embed(crop)]
        for ours, theirs in zip(found, expected, strict=True):
            tolerance = 1e-2 if kind == "bfloat16" else 1e-4
            torch.testing.assert_close(ours[:, view].float(), theirs, rtol=tolerance, atol=1e-5)


def test_features_of_another_checkpoint_are_never_used(tmp_path: Path) -> None:
    """Other weights, images, crops, layer sizes, types or precisions make files of their own; one with a wrong key
    inside is made anew."""
    args = options(tmp_path, "--layers", "conv5", "--no-amp")
    encoder, data = encoder_and_data()
    (first,) = features(args, encoder, data)
    before = first.clone()
    other, _ = encoder_and_data(1)
    (second,) = features(args, other, data)
    assert not torch.equal(second, before) and torch.equal(first, before)
    with torch.no_grad():
        fresh = eval_linear.pool(other.backbone.stages(data.normalize(  # type: ignore[operator]
            torch.cat(list(data.centers(torch.arange(24), 24, CPU))))), 4, 64)
    torch.testing.assert_close(second[:, 0], fresh, rtol=1e-4, atol=1e-5)
    moved = data.select(torch.arange(23, -1, -1))
    assert torch.equal(features(args, encoder, moved)[0].flip(0)[:, 0, 0] != 0, before[:, 0, 0] != 0)
    features(args, encoder, data, 2)
    for more in ("--layer-size 32", "--feature-type bfloat16", "--amp --feature-type float32"):
        features(options(tmp_path, "--layers", "conv5", "--no-amp", *more.split()), encoder, data)
    files = sorted((tmp_path / "features").glob("train-conv5-*.bin"))
    assert len(files) == 7
    keys = {path: path.with_suffix(".json").read_text() for path in files}
    for path in files:  # as if a checksum were met twice: the name agrees, what stands inside does not
        path.with_suffix(".json").write_text(keys[files[0] if path != files[0] else files[1]])
    first.zero_()
    assert torch.equal(features(args, encoder, data)[0], before)


def test_features_by_other_statistics_are_never_used(tmp_path: Path) -> None:
    """The same pixels by another mean or deviation are other images to the network, and have files of their own."""
    args, (encoder, data) = options(tmp_path, "--layers", "conv5", "--no-amp"), encoder_and_data()
    features(args, encoder, data)
    for changed in (dict(mean=(0.1, 0.2, 0.3)), dict(std=(0.5, 0.6, 0.7))):
        other = dataclasses.replace(data, **changed)  # type: ignore[arg-type]
        (found,) = features(args, encoder, other)
        images = other.normalize(torch.cat(list(data.centers(torch.arange(24), 24, CPU))))
        fresh = eval_linear.pool(encoder.backbone.stages(images), 4, 64)  # type: ignore[operator]
        torch.testing.assert_close(found[:, 0], fresh, rtol=1e-4, atol=1e-5)


def test_layers_that_got_less_far_are_completed(tmp_path: Path) -> None:
    """Of two layers of which 5 and 15 rows were written, the pass goes on behind the fifth row."""
    args, (encoder, data) = options(tmp_path, "--layers", "conv1", "conv5", "--no-amp"), encoder_and_data()
    found = features(args, encoder, data)
    whole = [values.clone() for values in found]
    for layer, values, rows in zip(args.layers, found, (5, 15), strict=True):
        (path,) = (tmp_path / "features").glob(f"train-{layer}-*.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(rows=rows)))
        values[rows:] = 0
    for values, before in zip(features(args, encoder, data), whole, strict=True):
        torch.testing.assert_close(values, before)


def test_killed_pass_goes_on(tmp_path: Path) -> None:
    """A pass that stopped goes on behind the last row that it wrote, and ends with the same features."""
    args, (encoder, data) = options(tmp_path, "--layers", "conv5", "--image-batch", "5"), encoder_and_data()
    (whole,) = [values.clone() for values in features(args, encoder, data)]
    shutil.rmtree(tmp_path / "features")
    original, seen = common.ImageSet.centers, list[int]()

    def centers(self: common.ImageSet, rows: Tensor, *rest: Any, **more: Any) -> Any:
        for number, images in enumerate(original(self, rows, *rest, **more)):
            if not seen and number == 2:
                raise KeyboardInterrupt
            yield images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.ImageSet, "centers", centers)
        with pytest.raises(KeyboardInterrupt):
            features(args, encoder, data)
    marked = json.loads(next((tmp_path / "features").glob("*.json")).read_text())
    assert marked["rows"] == 10

    def rest(self: common.ImageSet, rows: Tensor, *rest: Any, **more: Any) -> Any:
        seen.extend(rows.tolist())
        return original(self, rows, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.ImageSet, "centers", rest)
        assert torch.equal(features(args, encoder, data)[0], whole)
        assert seen == list(range(10, 24))
        assert torch.equal(features(args, encoder, data)[0], whole) and len(seen) == 14


def test_interrupted_between_two_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C when one of two layers has the features of a batch and the other has not yet damages neither."""
    args, (encoder, data) = options(tmp_path, "--image-batch", "5"), encoder_and_data()
    whole = [values.clone() for values in features(args, encoder, data)]
    shutil.rmtree(tmp_path / "features")
    original, calls = eval_linear.layer_features, list[int]()

    class Interrupted:
        def view(self, *shape: int) -> Tensor:
            raise KeyboardInterrupt

    def interrupted(encoder: common.Encoder, images: Tensor, *rest: Any) -> list[Any]:
        first, second = original(encoder, images, *rest)
        calls.append(len(images))
        return [first, Interrupted() if len(calls) == 1 + 3 else second]  # one image for the sizes, then the batches

    monkeypatch.setattr(eval_linear, "layer_features", interrupted)
    with pytest.raises(KeyboardInterrupt):
        features(args, encoder, data)
    assert calls == [1, 5, 5, 5]
    capsys.readouterr()
    for ours, theirs in zip(features(args, encoder, data), whole, strict=True):
        assert torch.equal(ours, theirs)
    assert "going on at image 10" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["cut", "no file"])
def test_damaged_features_are_made_anew(how: str, tmp_path: Path) -> None:
    """A feature file of another length is not taken for what it was."""
    args, (encoder, data) = options(tmp_path, "--layers", "conv5", "--image-batch", "5"), encoder_and_data()
    (whole,) = [values.clone() for values in features(args, encoder, data)]
    path = next((tmp_path / "features").glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-4])
    if how == "no file":
        path.unlink()
    assert torch.equal(features(args, encoder, data)[0], whole)


@pytest.mark.parametrize("what", ["space", "quota"])
def test_features_that_do_not_fit_take_no_room(
    what: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room is taken for all layers of both splits together: if it is not there, or ends at a quota, no file is left."""
    free, allocate, calls = 60 * 96 * 2 + 1000, os.posix_fallocate, list[int]()  # both layers of the training images

    def up_to_a_quota(*args: int) -> None:
        calls.append(args[2])
        if len(calls) == 3:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        allocate(*args)

    if what == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    monkeypatch.setattr(os, "posix_fallocate", up_to_a_quota)
    with pytest.raises(common.Fault if what == "space" else OSError):
        evaluate(checkpoint)
    assert not list(checkpoint.parent.glob("**/features/*.bin")) and len(calls) == (0 if what == "space" else 3)
    assert ("features take 0.00 GB of the " in capsys.readouterr().out) == (what == "quota")
    monkeypatch.undo()
    assert evaluate(checkpoint)["layer"] in ("conv1", "conv5")


@pytest.mark.parametrize("protocol", ["linear", "svm"])
def test_one_layer_at_a_time(protocol: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's features, and what was made of them, are gone from memory before the next layer's come."""
    alive, original = weakref.WeakSet[Any](), eval_linear.Layer.__init__

    def init(self: eval_linear.Layer, values: Tensor, args: Any, device: Any, like: Any = None) -> None:
        assert list(alive) == [like] * (like is not None)
        original(self, values, args, device, like)
        alive.add(self)

    def with_intercept(layer: eval_linear.Layer, rows: Tensor) -> Tensor:
        assert not any(matrix() is not None for matrix in matrices)
        x = join(layer, rows)
        matrices[:] = [weakref.ref(x)]
        return x

    join, matrices = eval_linear.with_intercept, list[Any]()
    monkeypatch.setattr(eval_linear.Layer, "__init__", init)
    monkeypatch.setattr(eval_linear, "with_intercept", with_intercept)
    assert len(evaluate(checkpoint, "--protocol", protocol, "--layers", "conv1", "conv3", "conv5")["layers"]) == 3


def test_folders_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """Where a file system has no locks a note says so and the features are made; only for another run is waited."""
    encoder, data = encoder_and_data()
    for error, said in ((errno.ENOLCK, "cannot be locked (No locks available)"), (errno.EAGAIN, "waiting for another")):
        asked = list[int]()

        def lock(file: Any, how: int, error: int = error, asked: list[int] = asked) -> None:
            asked.append(how)
            if len(asked) == 1:
                raise OSError(error, os.strerror(error))

        monkeypatch.setattr(eval_linear.fcntl, "lockf", lock)
        assert len(features(options(tmp_path / str(error), "--layers", "conv5"), encoder, data)) == 1
        words = capsys.readouterr()
        assert said in words.out + words.err and len(asked) == (1 if error == errno.ENOLCK else 2)


def test_blocks_that_pytorch_keeps_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU is free what the driver says and what PyTorch holds without using it."""
    for name, value in (("mem_get_info", (10, 99)), ("memory_reserved", 7), ("memory_allocated", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert eval_linear.free_memory(torch.device("cuda")) == 13


# linear probes


def test_probes_are_sgd() -> None:
    """Six probes trained side by side have the weights that torch's SGD gives each alone, with momentum and decay."""
    x, y = blobs(64, 7, 3)
    rates, decays = torch.tensor([0.01, 0.1, 1.0] * 2), torch.tensor([0.0] * 3 + [0.1] * 3)
    probes = eval_linear.Probes()
    probes.reset(6, 3, 7, CPU)
    linears = [torch.nn.Linear(7, 3) for _ in range(6)]
    for linear in linears:
        torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    optimizers = [torch.optim.SGD([dict(params=[linear.weight], weight_decay=decay.item()), dict(params=[linear.bias])],
                                  lr.item(), momentum=0.9)
                  for linear, lr, decay in zip(linears, rates, decays, strict=True)]
    for part in torch.arange(64).repeat(3).split(16):
        probes.step(x[part], y[part], rates, decays, 0.9)
        for linear, optimizer in zip(linears, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(linear(x[part]), y[part]).backward()
            optimizer.step()
    for number, linear in enumerate(linears):
        torch.testing.assert_close(probes.weight.view(6, 3, 7)[number], linear.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probes.bias.view(6, 3)[number], linear.bias, rtol=1e-4, atol=1e-5)


def test_probes_end_where_logistic_regression_does() -> None:
    """At the same regularisation the probe gives scikit-learn's probabilities, and its accuracy within noise."""
    x, y = blobs(400, 12, 4, spread=2.5)
    test, truth = blobs(400, 12, 4, seed=1, spread=2.5)
    for cost in (0.001, 1.0):
        theirs = LogisticRegression(C=cost, tol=1e-6, max_iter=1000).fit(x.numpy(), y.numpy())
        probes = eval_linear.Probes()
        probes.reset(1, 4, 12, CPU)
        for _ in range(1500):
            probes.step(x, y, torch.tensor([0.02]), torch.tensor([1 / (cost * len(x))]), 0.9)
        ours = probes.logits(test, 1)[:, 0].softmax(1)
        expected = torch.from_numpy(theirs.predict_proba(test.numpy())).float()
        assert (ours - expected).abs().max() < 0.02
        accuracy = (ours.argmax(1) == truth).float().mean()
        assert abs(accuracy - float((expected.argmax(1) == truth).float().mean())) < 0.01


def test_choice_is_by_held_out_images() -> None:
    """The best cell of the table (epochs, settings), the earliest of equal ones."""
    grid = [(0.1, 0.0), (0.2, 0.0), (0.4, 0.0), (0.8, 0.0)]
    history = torch.tensor([[1.0, 60, 20, 0], [2, 50, 60, 0], [3, 40, 55, 0]])
    found = eval_linear.choose(history, grid, 10, 200, "conv1")
    assert found["best"] == [0.2, 0.0, 1, 60.0] and found["last"] == [0.4, 0.0, 3, 55.0]


def test_probes_near_chance_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    """The best of 24 guessing probes on 200 images of ten classes is noted as near chance, a real one is not."""
    grid = [(0.1, 0.0)] * 24
    guesses = torch.rand(24, 200, generator=torch.Generator().manual_seed(0)) < 0.1
    for history, noted in ((100 * guesses.float().mean(1)[None], True), (torch.full((1, 24), 30.0), False)):
        eval_linear.choose(history, grid, 10, 200, "conv1")
        assert ("near chance" in capsys.readouterr().err) == noted


def test_diverged_probes_have_nothing_right(tmp_path: Path) -> None:
    """A probe whose weights are no numbers any more does not pass for one that always says the first class."""
    x, y = torch.randn(40, 1, 5), torch.zeros(40, dtype=torch.long)
    probes, layer = eval_linear.Probes(), eval_linear.Layer(x, options(tmp_path), CPU)
    probes.reset(3, 2, 5, CPU)
    probes.bias[0], probes.weight[2:4], probes.weight[4:] = 1, float("nan"), float("inf")
    assert eval_linear.probe_accuracy(probes, 3, layer, torch.arange(40), y) == [100, 0, 0]


def test_nearly_constant_dimensions_are_not_blown_up(tmp_path: Path) -> None:
    """Standardised, a dimension that varies a millionth as much as the others, or not at all, stays below a hundredth
    of them, of bfloat16 as of float32; where none varies all are zero."""
    args = options(tmp_path, "--normalize", "standard")
    values = torch.randn(200, 1, 8, generator=torch.Generator().manual_seed(0))
    values[..., 3] *= 1e-6
    values[..., 4] = 0.1
    for stored in (values, values.bfloat16()):
        layer = eval_linear.Layer(stored, args, CPU)
        deviation = layer.crops(torch.arange(200)).flatten(0, 1).std(0, correction=0)
        assert float(deviation[3:5].max()) < 0.01
        torch.testing.assert_close(deviation[[0, 1, 2, 5, 6, 7]], torch.ones(6))
    assert not eval_linear.Layer(torch.zeros(9, 1, 8), args, CPU).crops(torch.arange(9)).any()


def test_figures_of_several_crops(tmp_path: Path) -> None:
    """top1 is by the mean probability over all crops, center_top1, and what settings are chosen by, by the central one,
    of standardised features whose mean and deviation are those of the training images."""
    values, labels = torch.randn(2, 90, 10, 5, generator=torch.Generator().manual_seed(0)), torch.arange(90) % 3
    train, test = 2 * values[0] + 1, 3 * values[1]
    args = options(tmp_path, "--normalize", "standard")
    layer = eval_linear.Layer(test, args, CPU, eval_linear.Layer(train, args, CPU))
    probes = eval_linear.Probes()
    probes.reset(2, 3, 5, CPU)
    probes.weight, probes.bias = 4 * torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.arange(6.0)
    x = (test - train.mean((0, 1))) / train.flatten(0, 1).std(0, correction=0)
    for which in (0, 1):
        logits = x @ probes.weight.view(2, 3, 5)[which].T + probes.bias.view(2, 3)[which]
        found = eval_linear.probe_figures(probes, which, layer, labels)
        means, center = logits.softmax(2).mean(1), logits[:, 4]
        for key, scores in (("top1", means), ("center_top1", center)):
            assert found[key] == pytest.approx(100 * float((scores.argmax(1) == labels).double().mean()), abs=0.01)
        held_out = eval_linear.probe_accuracy(probes, 2, layer, torch.arange(90), labels)
        assert found["center_top1"] == pytest.approx(held_out[which], abs=0.01)
        for other in (logits.mean(1), logits[:, 0], center):
            assert not torch.equal(means.argmax(1), other.argmax(1))


def test_probes_see_what_they_should(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes choose by the held-out images alone, then train on all with the chosen settings: in an order and by crops
    that each epoch draws, at rates that fall from step to step; the figures are those after the chosen epoch, and after
    the last."""
    asked, steps, judged = list[tuple[list[int], list[int]]](), list[Any](), list[tuple[int, int]]()
    crop, step, figures_of = eval_linear.Layer.crop, eval_linear.Probes.step, eval_linear.probe_figures
    chosen_by, accuracy = list[set[int]](), eval_linear.probe_accuracy

    def cropped(self: eval_linear.Layer, rows: Tensor, views: Tensor) -> Tensor:
        asked.append((rows.tolist(), views.tolist()))
        return crop(self, rows, views)

    def stepped(self: eval_linear.Probes, x: Tensor, y: Tensor, lr: Tensor, decay: Tensor, *rest: Any) -> None:
        steps.append((*asked[-1], y.tolist(), lr.tolist(), decay.tolist()))
        step(self, x, y, lr, decay, *rest)

    def counted(probes: eval_linear.Probes, which: int, *rest: Any) -> dict[str, float]:
        judged.append((which, len(steps)))
        return figures_of(probes, which, *rest) | dict(top1=float(len(steps)))

    monkeypatch.setattr(eval_linear.Layer, "crop", cropped)
    monkeypatch.setattr(eval_linear.Probes, "step", stepped)
    monkeypatch.setattr(eval_linear, "probe_figures", counted)
    monkeypatch.setattr(eval_linear, "probe_accuracy", lambda *given: (chosen_by.append(set(given[3].tolist())),
                                                                       accuracy(*given))[1])
    monkeypatch.setattr(eval_linear, "choose", lambda *_: dict(best=[0.1, 0.02, 1, 60.0], last=[0.3, 0.04, 2, 50.0]))
    words = ["--layers", "conv5", "--train-crops", 2, "--seed", 3, "--lr", 0.1, 0.3, "--weight-decay", 0.5]
    found = evaluate(checkpoint, *words, "--data", "shapes")
    open_keys = ("image_size", "cache", "file_list", "imbalance")
    args = argparse.Namespace(data="shapes", subset=60, seed=3, **dict.fromkeys(open_keys), typed=[])
    labels = common.load(args, "train", CPU).labels
    held = set(eval_linear.hold_out(labels, 0.1, 3).tolist())
    assert len(held) == 6 and len(steps) == 12 and chosen_by == [held] * 2
    for epoch in range(4):
        rows = torch.tensor([row for row in range(60) if epoch > 1 or row not in held])
        order = rows[torch.randperm(len(rows), generator=common.generator(3, "order", epoch))]
        views = torch.randint(2, (len(rows),), generator=common.generator(3, "views", epoch))
        settings = [(0.1, 0.5), (0.3, 0.5)] if epoch < 2 else [(0.1, 0.02), (0.3, 0.04)]
        for number in range(3):
            part, at = slice(16 * number, 16 * number + 16), 3 * (epoch % 2) + number
            index, crops, truth, rates, decays = steps[3 * epoch + number]
            assert (index, crops) == (order[part].tolist(), views[part].tolist()) and truth == labels[index].tolist()
            assert rates == pytest.approx([lr / (1 + lr * decay * at) ** 0.5 for lr, decay in settings])
            assert decays == pytest.approx([decay for _, decay in settings])
    assert judged == [(0, 9), (1, 12)]
    assert (found["layers"][0]["top1"], found["layers"][0]["last_top1"], found["linear_top1"]) == (9, 12, 9)
    chosen = ("lr", "weight_decay", "epoch", "holdout_top1", "last_lr", "last_weight_decay")
    assert [found["layers"][0][key] for key in chosen] == [0.1, 0.02, 1, 60, 0.3, 0.04]


def test_batches_of_probes_are_no_larger_than_what_chooses(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch takes all images, it is lowered to those that are left when some are held out."""
    sizes, step = list[int](), eval_linear.Probes.step
    monkeypatch.setattr(eval_linear.Probes, "step", lambda *given: (sizes.append(len(given[1])), step(*given))[1])
    evaluate(checkpoint, "--layers", "conv5", "--batch-size", 60, "--epochs", 1)
    assert sizes == [54, 54]


def test_test_images_decide_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other labels of the test images the same rates, decays and epochs are chosen."""
    first = evaluate(checkpoint)
    original = eval_linear.open_task

    def scrambled(*args: Any) -> eval_linear.Task:
        task = original(*args)
        return task._replace(test_targets=(task.test_targets + 1) % 10)

    monkeypatch.setattr(eval_linear, "open_task", scrambled)
    second = evaluate(checkpoint, "--overwrite")
    keys = ("lr", "weight_decay", "epoch", "holdout_top1", "last_lr", "last_weight_decay")
    for a, b in zip(first["layers"], second["layers"], strict=True):
        assert [a[key] for key in keys] == [b[key] for key in keys]
    found = [[(row["top1"], row["top5"]) for row in result["layers"]] for result in (first, second)]
    assert found[0] != found[1]


def test_features_on_the_disk_give_the_same(checkpoint: Path) -> None:
    """With a memory that holds no layer the features stay on the disk and the figures are the same."""
    args = ["--normalize", "standard", "--train-crops", "10", "--test-crops", "10"]
    first = evaluate(checkpoint, *args)
    second = evaluate(checkpoint, *args, "--memory", "1e-9", "--overwrite")
    assert first == second and first["layers"][0]["center_top1"] >= 0


@pytest.mark.parametrize(("schedule", "expected"), [
    ("inverse-sqrt", 0.5 / (1 + 0.5 * 0.1 * 40) ** 0.5), ("step", 0.5 * 0.2**2), ("cosine", 0.25), ("constant", 0.5),
])
def test_rates(schedule: str, expected: float, tmp_path: Path) -> None:
    """lr / sqrt(1 + lr wd t); lr times the factor at each drop; a cosine to zero; lr."""
    args = options(tmp_path, "--schedule", schedule, "--epochs", "10", "--lr-drops", "3", "5", "6",
                   "--lr-drop-factor", "0.2")
    assert eval_linear.rate(args, 0.5, 0.1, 5.0, 40) == pytest.approx(expected)


# SVM


@pytest.mark.parametrize(("count", "size"), [(300, 20), (40, 90)])
def test_svm_is_liblinears(count: int, size: int) -> None:
    """The weights of every class and cost are those of LinearSVC, with fewer images than numbers too."""
    x, labels = blobs(count, size, 3, spread=2.0)
    padded = F.pad(x, (0, 1), value=1.0).double()
    targets = 2 * F.one_hot(labels, 3) - 1
    costs = torch.tensor([0.01, 1.0, 10.0])
    ours = eval_linear.fit_svms(padded, targets, costs[:, None].expand(-1, 3), 1.0)
    single = eval_linear.fit_svms(padded.float(), targets, costs[:, None].expand(-1, 3), 1.0)
    for number, cost in enumerate(costs.tolist()):
        theirs = LinearSVC(C=cost, tol=1e-8, max_iter=200_000).fit(x.numpy(), labels.numpy())
        expected = torch.from_numpy(np.concatenate([theirs.coef_, theirs.intercept_[:, None]], 1))
        torch.testing.assert_close(ours[number], expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
        same = (padded @ ours[number].T).argmax(1) == torch.from_numpy(theirs.predict(x.numpy()))
        assert same.float().mean() > 0.995
        torch.testing.assert_close(single[number].double(), expected, rtol=0, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(("count", "size", "cost"), [(100, 300, 300.0), (2000, 10, 3000.0)])
def test_svm_of_classes_that_are_far_apart(count: int, size: int, cost: float) -> None:
    """Where a plane parts the classes, too, the objective is LinearSVC's least, though hardly an image is active."""
    torch.manual_seed(0)
    labels = torch.randint(2, (count,))
    x = torch.randn(count, size) + torch.where(labels == 1, 5.0, 0.0)[:, None] * (torch.arange(size) < 5)
    y = (2 * labels - 1).double()
    padded = F.pad(x, (0, 1), value=1.0)
    ours = eval_linear.fit_svms(padded, y[:, None], torch.tensor([[cost]]), 1.0)[0, 0].double()
    theirs = LinearSVC(C=cost, tol=1e-8, dual=count < size, max_iter=100_000).fit(x.numpy(), labels.numpy())
    expected = torch.from_numpy(np.append(theirs.coef_[0], theirs.intercept_))

    def objective(w: Tensor) -> float:
        return float(0.5 * w.square().sum() + cost * (1 - y * (padded.double() @ w)).clamp(min=0).square().sum())

    assert objective(ours) < 1.01 * objective(expected)


def test_weights_and_left_out_images() -> None:
    """The weight of images with the class is LinearSVC's class weight; images with target 0 change nothing."""
    x, labels = blobs(200, 6, 2, spread=3.0)
    padded = F.pad(x, (0, 1), value=1.0).double()
    target = torch.where(labels == 0, 1, -1)
    target[150:] = 0
    ours = eval_linear.fit_svms(padded, target[:, None], torch.tensor([[0.5]]), 2.0)[0, 0]
    theirs = LinearSVC(C=0.5, tol=1e-8, max_iter=200_000, class_weight={1: 2, -1: 1})
    theirs.fit(x[:150].numpy(), target[:150].numpy())
    expected = torch.from_numpy(np.append(theirs.coef_[0], theirs.intercept_))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)


def test_cost_by_cross_validation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overlapping classes with few images want a small cost; if a fold would lack a class that has images, the middle
    one is taken, and a note says so once."""
    eval_linear.note_once.cache_clear()
    x, labels = blobs(60, 40, 2, spread=6.0)
    targets = 2 * F.one_hot(labels, 2) - 1
    args = options(tmp_path, "--C", "1e-5", "1e-4", "100")
    padded = F.pad(x, (0, 1), value=1.0)
    chosen = eval_linear.cross_validate(padded, targets, args, False, (0,))
    assert chosen[0] == chosen[1] and chosen[0] < 1
    mixed = options(tmp_path, "--C", "100", "1e-5", "1e-4")  # in any order
    assert torch.equal(eval_linear.cross_validate(padded, targets, mixed, False, (0,)), chosen)
    assert eval_linear.cross_validate(padded[:4], targets[:4], mixed, False, (0,))[0] == pytest.approx(1e-4)
    assert eval_linear.cross_validate(padded[:4], targets[:4], args, False, (0,)).tolist() == pytest.approx([1e-4] * 2)
    assert capsys.readouterr().err.count("C is not chosen, but 0.0001 for all") == 1
    empty = F.pad(targets, (0, 1), value=-1)
    large = options(tmp_path, "--C", "1e-5", "100", "1000")
    assert eval_linear.cross_validate(padded, empty, large, False, (0,)).tolist() == pytest.approx([1e-5] * 3)
    several = torch.stack([targets[:, 0], torch.where(x[:, 0] > 0, 1, -1)], 1)
    chosen = eval_linear.cross_validate(padded, several, args, True, (0,))
    assert chosen[1] > 1e-5  # what can be learnt wants more
    empty = F.pad(several, (0, 1), value=-1)
    assert torch.equal(eval_linear.cross_validate(padded, empty, args, True, (0,))[:2], chosen)


@pytest.mark.parametrize(("best", "count", "noted"), [(0, 3, True), (1, 3, False), (2, 3, True), (1, 2, False)])
def test_the_end_of_a_grid_is_noted(
    best: int, count: int, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A chosen rate or cost that is the least or the greatest of more than two is noted, for there may be better ones;
    classes without images choose none."""
    values = [10.0**i for i in range(count)]
    accuracies = 100 * F.one_hot(torch.tensor([best]), count).float()
    eval_linear.choose(accuracies, [(lr, 0.0) for lr in values], 10, 200, "conv1")
    assert ("widen --lr" in capsys.readouterr().err) == noted
    targets = torch.full((12, 4), -1)
    targets[:6, 0] = 1  # no image is of the other classes
    weights = torch.full((count, 4, 1), -1.0)
    weights[best] = 1
    monkeypatch.setattr(eval_linear, "fit_svms", lambda *_: weights)
    x = torch.linspace(1, -1, 12)[:, None]
    eval_linear.cross_validate(x, targets, options(tmp_path, "--C", *map(str, values)), True, (0,))
    assert ("widen --C" in capsys.readouterr().err) == noted


def test_svms_copy_no_features(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds are left out by targets of 0, int8, of one and the same features; both crops of an image lie in one fold,
    and the classes are spread over the folds."""
    fits, original = list[tuple[int, Tensor]](), eval_linear.fit_svms

    def fit(x: Tensor, targets: Tensor, *rest: Any) -> Tensor:
        fits.append((x.data_ptr(), targets))
        assert (x[:, -1] == 1).all()
        return original(x, targets, *rest)

    monkeypatch.setattr(eval_linear, "fit_svms", fit)
    evaluate(checkpoint, "--protocol", "svm", "--layers", "conv5", "--train-crops", 2, "--C", 0.1, 1)
    assert len({pointer for pointer, _ in fits}) == 1 and {targets.dtype for _, targets in fits} == {torch.int8}
    *folds, whole = (targets.view(60, 2, 10) for _, targets in fits)
    assert (whole.sum(2) == -8).all() and len(folds) == 3
    left_out = torch.stack([(targets == 0).all(2) for targets in folds])
    assert torch.equal(left_out[..., 0], left_out[..., 1]) and (left_out[..., 0].sum(0) == 1).all()
    for targets, out in zip(folds, left_out, strict=True):
        assert torch.equal(targets[~out], whole[~out]) and ((whole[out] > 0).sum(0) == 4).all()


def test_costs_are_those_of_folds_by_rows(tmp_path: Path) -> None:
    """The chosen costs are those of SVMs, of that weight of images with the class, that are given the rows of the other
    folds alone."""
    args = options(tmp_path, "--C", "1e-4", "1e-3", "1e-2", "1", "--positive-weight", "9")
    costs = torch.tensor(args.cost)
    for count, size in ((300, 20), (40, 90), (60, 50)):
        x, labels = blobs(count, size, 3, spread=4.0)
        x = F.pad(x, (0, 1), value=1.0).double()
        order = torch.randperm(count, generator=common.generator(0, "folds"))
        fold = torch.empty(count, dtype=torch.long)
        fold[order[labels[order].argsort(stable=True)]] = torch.arange(count) % 3
        right = torch.zeros(4)
        for number in range(3):
            fitted = x[fold != number], eval_linear.one_vs_rest(labels[fold != number], 3)
            for at, weight in enumerate(eval_linear.fit_svms(*fitted, costs[:, None].expand(-1, 3), 9.0)):
                right[at] += ((x @ weight.T).argmax(1) == labels)[fold == number].double().mean()
        chosen = eval_linear.cross_validate(x, eval_linear.one_vs_rest(labels, 3), args, False, (0,))
        assert chosen.tolist() == pytest.approx([args.cost[int(right.argmax())]] * 3)


def test_costs_of_several_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images may have several classes each takes the cost of the largest area, by the folds that have it."""
    found, asked = iter([[float("nan")] * 2] * 2 + [[10.0, 30.0], [20.0, 20.0]] * 2), list[bool]()
    monkeypatch.setattr(eval_linear, "precisions", lambda x, y, eleven: (asked.append(eleven), next(found))[1])
    targets = torch.where(torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) < 0.5, 1, -1)
    args = options(tmp_path, "--C", "0.1", "1")
    assert eval_linear.cross_validate(torch.randn(60, 5), targets, args, True, (0,)).tolist() == pytest.approx([1, 0.1])
    assert asked == [False] * 6


def sigterm_in_the_first_fit() -> None:
    original, calls = eval_linear.fit_svm, list[int]()

    def fit(x: Tensor, *rest: Any) -> Tensor:
        calls.append(len(x))
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(x, *rest)

    eval_linear.fit_svm = fit


def test_signal_within_a_layer(checkpoint: Path, tmp_path: Path) -> None:
    """SVMs do not make a signal wait for the end of a layer; the same command begins the layer anew. Of their progress
    speak the lines of the layers alone: they take no steps."""
    words = [checkpoint, *SMALL, tmp_path, "--protocol", "svm", "--C", "0.1", "1"]
    stopped = run("eval_linear", words, sigterm_in_the_first_fit)
    assert stopped.code == 128 + signal.SIGTERM and '{"layer"' not in stopped.out
    assert stopped.err.splitlines()[-1] == "stopped after 0 epochs and 0 steps; the same command continues"
    again = run("eval_linear", words)
    assert again.code == 0 and again.out.count('{"layer"') == 2 + 2  # and in the result
    assert "epoch 1/2" not in stopped.out + again.out


def test_newton_steps_that_end_early() -> None:
    """A class of which no image is active is solved in one step, and stays solved while others go on."""
    x, _ = blobs(30, 12, 3)
    target, active = torch.randn(2, 12), torch.ones(30, 2)
    active[:, 0] = 0
    found = eval_linear.newton_step(x, active, target, 0.1)
    assert torch.equal(found[0], target[0])
    assert (found[1] + x.T @ (x @ found[1]) - target[1]).norm() < 0.11 * target[1].norm()


# metrics


def test_difficult_objects_hide_no_other() -> None:
    """A class is there if any of its objects counts, left out if all are difficult, absent if there is none."""
    objects = torch.zeros(3, 4), torch.tensor([0, 0, 1]), torch.tensor([False, True, True])
    image = common.VocImage(Path(), (1, 1), *objects, Path())
    assert eval_linear.presence(common.VocSet("set", ["a", "b", "c"], [image])).tolist() == [[1, 0, -1]]


def test_mean_ap_by_hand() -> None:
    """Two classes, three images each; an image with target 0 is neither right nor wrong for its class."""
    targets = torch.tensor([[1, -1], [-1, 0], [1, 1], [0, 1]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.9], [0.7, 0.8], [0.95, 0.7]])
    found = eval_linear.mean_ap(scores, targets)
    area = (1 + 2 / 3) / 2
    assert found["map_area"] == pytest.approx(50 * (area + 1), abs=0.01)
    assert found["map_11_points"] == pytest.approx(50 * ((6 + 5 * 2 / 3) / 11 + 1), abs=0.01)
    assert found["ap_11_points"] == [pytest.approx(100 * (6 + 5 * 2 / 3) / 11, abs=0.01), 100.0]


def test_mean_ap_is_sklearns() -> None:
    """map_sklearn is the mean of average_precision_score over known images; a class without images counts for none."""
    source = torch.Generator().manual_seed(0)
    targets = torch.randint(-1, 2, (50, 4), generator=source)
    targets[:, 3] = -1
    scores = torch.rand(50, 4, generator=source).mul(12).round()  # some are equal
    expected = [average_precision_score((targets[:, c][targets[:, c] != 0] > 0).numpy(),
                                        scores[:, c][targets[:, c] != 0].numpy()) for c in range(3)]
    found = eval_linear.mean_ap(scores, targets)
    assert found["map_sklearn"] == pytest.approx(100 * np.mean(expected), abs=0.01)
    assert found["ap_11_points"][3] is None


def test_difficult_objects_have_no_loss() -> None:
    """The loss sums over classes, averages over images, and has no term, and no gradient, where the target is 0."""
    logits = torch.tensor([[0.5, 3.0], [-1.0, 2.0]], requires_grad=True)
    loss = eval_linear.masked_bce(logits, torch.tensor([[1, 0], [-1, 1]]))
    loss.backward()
    expected = sum(torch.tensor(v).exp().log1p() for v in (-0.5, -1.0, -2.0)) / 2
    torch.testing.assert_close(loss.detach(), expected)
    assert logits.grad is not None and logits.grad[0, 1] == 0 and (logits.grad != 0).sum() == 3


def test_last_layer_is_float32() -> None:
    """Under autocast the logits are those of float32, which tell apart what bfloat16 would round to the same; of them
    and of the loss the gradients reach the body."""
    torch.manual_seed(0)
    model = eval_linear.Classifier(torch.nn.Linear(8, 16), 16, 5)
    x = torch.randn(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        body, logits = model.body(x), model(x)
    assert body.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert torch.equal(logits, F.linear(body.float(), model.last.weight, model.last.bias))
    assert not torch.equal(logits, logits.bfloat16().float())
    F.cross_entropy(logits, torch.arange(64) % 5).backward()
    assert model.body.weight.grad is not None and model.body.weight.grad.abs().sum() > 0


# drawn labels


def test_draws_are_balanced_and_seeded(tmp_path: Path) -> None:
    """As many of each class, give or take one; the key, of which the seed is a part, decides which; without balance any
    are drawn."""
    labels = torch.arange(1000) % 7
    for count in (7, 50, 700):
        rows = common.balanced(labels, count, 0, "a")
        counts = torch.bincount(labels[rows], minlength=7)
        assert len(rows) == count == len(rows.unique()) and counts.max() - counts.min() <= 1
        assert torch.equal(rows, common.balanced(labels, count, 0, "a"))
        assert count == 700 or not torch.equal(rows, common.balanced(labels, count, 0, "b"))
    args, data = options(tmp_path, "--protocol", "finetune", "--labels", "100", "--no-balanced"), argparse.Namespace()
    data.classes, data.name = list("abcdefg"), "letters"
    ((_, rows),) = eval_linear.draws(args, eval_linear.Task(data, data, labels, labels))  # type: ignore[arg-type]
    loose = torch.bincount(labels[rows])
    assert loose.sum() == 100 and loose.max() - loose.min() > 1
    args.seed = 1
    ((_, other),) = eval_linear.draws(args, eval_linear.Task(data, data, labels, labels))  # type: ignore[arg-type]
    assert not torch.equal(other, rows)


def test_each_class_holds_out_its_share() -> None:
    """Of classes of any sizes the held-out images are a share of each, to one image, and one of two or more is left; of
    classes of one size they are the balanced draw."""
    for sizes in ([500, 100, 20, 5, 2, 1], [40, 3, 2, 2], [2] * 7, [3, 3, 2, 1, 1], [1000] + [4] * 50):
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
        labels, counts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[order], torch.tensor(sizes)
        for share in (0.1, 0.25, 0.5):
            held = eval_linear.hold_out(labels, share, 0)
            found = torch.bincount(labels[held], minlength=len(sizes))
            assert len(held) == len(held.unique()) == round(share * len(labels))
            assert (found - share * counts).abs().max() <= 1 or len(sizes) > 50
            assert ((found < counts) | (counts == 1)).all()
    for labels in (torch.arange(700) % 7, torch.arange(70) % 7, torch.zeros(31, dtype=torch.long)):
        expected = common.balanced(labels, round(0.1 * len(labels)), 3, "holdout")
        assert torch.equal(eval_linear.hold_out(labels, 0.1, 3), expected)


def test_draws_are_printed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many labels of how many, the fewest and the most of a class, a checksum and the seed stand in the output and
    in the result, with the mean and the standard deviation over draws."""
    found = evaluate(checkpoint, "--protocol", "svm", "--per-class", 2, 3, "--draws", 2, "--layers", "conv5")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("labels, ")]
    assert len(lines) == 4 and "labels, 2 a class: of 60 images labels 20, draw 0, least of a class 2, most of a " \
        "class 2, checksum " in lines[0] and lines[0].endswith("seed 0")
    assert [row["labels"] for row in found["layers"]] == [20, 20, 30, 30]
    assert len({row["checksum"] for row in found["layers"]}) == 4
    for entry, rows in zip(found["draws"], (found["layers"][:2], found["layers"][2:]), strict=True):
        figures_ = [row["top1"] for row in rows]
        assert entry["top1"] == pytest.approx(np.mean(figures_), abs=0.01)
        assert entry["top1_std"] == pytest.approx(np.std(figures_, ddof=1), abs=0.01)
    assert found["svm_top1"] == found["draws"][-1]["top1"] != found["layers"][-1]["top1"]


@pytest.mark.parametrize("protocol", ["finetune", "svm"])
def test_labels_outside_the_draw_are_never_touched(
    protocol: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the labels of all other images scrambled, the same draw gives the same figures and the same weights."""
    rows = torch.arange(0, 60, 3)
    original = eval_linear.open_task
    monkeypatch.setattr(eval_linear, "draws", lambda args, task: [(dict(labels=len(rows), draw=0), rows)])
    words = ["--protocol", protocol, "--layers", "conv5", "--lr", "0.01", "0.1", "--weight-decay", "0.001"]

    def checkpoint_of() -> Any:
        (path,) = (checkpoint.parent / "eval_linear").glob("smoke-*/checkpoint.pth")
        return common.load_checkpoint(path)["state"]

    first, weights = evaluate(checkpoint, *words), checkpoint_of()

    def scrambled(*args: Any) -> eval_linear.Task:
        task = original(*args)
        others = torch.ones(60, dtype=torch.bool)
        others[rows] = False
        targets = torch.where(others, (task.train_targets + 3) % 10, task.train_targets)
        task.train.labels = targets
        return task._replace(train_targets=targets)

    monkeypatch.setattr(eval_linear, "open_task", scrambled)
    second = evaluate(checkpoint, *words, "--overwrite")
    assert first == second
    if protocol == "finetune":
        for name, weight in checkpoint_of()["model"].items():
            assert torch.equal(weight, weights["model"][name])


def test_every_class_has_to_have_images(tmp_path: Path) -> None:
    """--per-class is refused where a class has no labelled image at all, the last one too."""
    args = options(tmp_path, "--protocol", "finetune", "--per-class", "1")
    data = common.load(npid.parse_args(["--subset", "30"]), "train", CPU)
    for missing in (4, 9):
        few = data.select((data.labels != missing).nonzero()[:, 0])
        with pytest.raises(common.Fault, match="a class of shapes has 0 images"):
            eval_linear.draws(args, eval_linear.Task(few, few, few.labels, few.labels))


def test_typed_labels_replace_the_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of --labels, --per-class and --label-list a typed one is the only one, whatever the preset says; no two."""
    found = list[Any]()
    for preset, *words in (("finetune", "--per-class", "4"), ("lowshot", "--labels", "0.5"), ("lowshot",),
                           ("finetune", "--label-list", "a.txt"), ("finetune-cld", "--labels=9")):
        args = options(tmp_path, "--preset", preset, *words)
        found.append((args.labels, args.per_class, args.label_list))
    assert found == [(None, [4], None), ([0.5], None, None), (None, [4, 16, 64], None), (None, None, Path("a.txt")),
                     ([9], None, None)]
    with pytest.raises(SystemExit):
        options(tmp_path, "--preset", "finetune", "--labels", "0.5", "--per-class", "4")
    assert "give one of them" in capsys.readouterr().err


def test_listed_labels(trained: Path, tmp_path: Path) -> None:
    """--label-list takes the images that a file names, by their file names."""
    folder = tmp_path / "photographs"
    for split, name in [("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")]:
        (folder / split / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (120, 130, 3), np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{name}_{number}.jpg")
    args = eval_linear.parse_args(["random", "--data", str(folder), "--protocol", "finetune", "--workers", "0"])
    data = common.load(args, "train", CPU)
    (tmp_path / "list.txt").write_text("a_1.jpg\nb_0.jpg\nb_3.jpg\n")
    assert eval_linear.listed(tmp_path / "list.txt", data).tolist() == [1, 4, 7]
    (tmp_path / "list.txt").write_text("a_1.jpg\nc_0.jpg\n")
    with pytest.raises(common.Fault, match="names 2 images, of which photographs has 1"):
        eval_linear.listed(tmp_path / "list.txt", data)
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(common.Fault, match="names no image"):
        eval_linear.listed(tmp_path / "list.txt", data)
    for line in ("b_2.jpg", "anywhere/b_2.jpg"):  # with the mark that some editors begin a file with
        (tmp_path / "list.txt").write_text(f"{line}\na_0.jpg\n", encoding="utf-8-sig")
        assert eval_linear.listed(tmp_path / "list.txt", data).tolist() == [0, 6]
    (tmp_path / "list.txt").write_text("a_1.jpg\nb_0.jpg\n")
    words = ["--protocol", "finetune", "--data", folder, "--label-list", tmp_path / "list.txt", "--workers", 0,
             "--image-size", 64, "--width", 4, "--lr", 0.01, "--weight-decay", 0, "--subset", 8, "--test-subset", 8,
             "--output", tmp_path / "out"]
    found = evaluate("random", *words)
    assert found["runs"][0]["labels"] == 2 and found["method"] == "untrained"
    (tmp_path / "list.txt").write_text("a_1.jpg\nb_0.jpg\nb_3.jpg\n")  # of the same name, and another list
    assert evaluate("random", *words)["runs"][0]["labels"] == 3
    assert "draws" in evaluate("random", *words, "--protocol", "svm")  # unlike a result of all labels


def test_listed_labels_of_one_name(tmp_path: Path) -> None:
    """Where classes share the names of images, as in a/1.jpg and b/1.jpg, the folder before a name tells which."""
    files = np.array([b"a/1.jpg", b"a/2.jpg", b"b/1.jpg", b"b/3.jpg", b"b/part/2.jpg"])
    data = common.ImageSet("set", 224, (0, 0, 0), (1, 1, 1), torch.tensor([0, 0, 1, 1, 1]), ["a", "b"], torch.arange(5),
                           files=files)
    for lines, expected in {"b/1.jpg": [2], "a/1.jpg\nb/1.jpg": [0, 2], "/else/train/a/2.jpg\n3.jpg": [1, 3]}.items():
        (tmp_path / "list.txt").write_text(lines)
        assert eval_linear.listed(tmp_path / "list.txt", data).tolist() == expected
    (tmp_path / "list.txt").write_text("1.jpg")
    with pytest.raises(common.Fault, match="names 1 images, of which set has 2; some share a name"):
        eval_linear.listed(tmp_path / "list.txt", data)


# protocols from end to end


def test_linear(checkpoint: Path, tmp_path: Path) -> None:
    """Probes on two layers: the result names its setting, and the best layer by held-out images is the headline."""
    found = evaluate(checkpoint, "--epochs", 4)
    assert [row["layer"] for row in found["layers"]] == ["conv1", "conv5"]
    assert found["protocol"] == "linear" and found["checkpoint_sha256"] and found["method"] == "npid smoke"
    assert (found["arch"], found["width"]) == ("resnet18", 4)
    best = max(found["layers"], key=lambda row: row["holdout_top1"])
    assert found["linear_top1"] == best["top1"] and found["layer"] == best["layer"]
    assert all(row["lr"] in found["lr_grid"] and 1 <= row["epoch"] <= 4 for row in found["layers"])
    log = [json.loads(line) for line in next(tmp_path.glob("eval_linear/*/log.jsonl")).read_text().splitlines()]
    assert len(log) == 3 and log[0]["checkpoint_sha256"] == found["checkpoint_sha256"]


def test_linear_learns(tmp_path: Path) -> None:
    """On shapes, probes of an untrained network are far above chance."""
    found = evaluate("random", "--width", 8, "--subset", 600, "--test-subset", 300, "--epochs", 8, "--layer-size", 1000,
                     "--layers", "conv1", "conv3", "--normalize", "standard", "--output", tmp_path)
    assert found["linear_top1"] > 20


@pytest.mark.parametrize("protocol", ["svm", "mlp", "finetune"])
def test_other_protocols(protocol: str, checkpoint: Path) -> None:
    """SVM on layers and the embedding, an MLP on frozen features, fine-tuning with a share of the labels."""
    words = {"svm": ["--layers", "conv5", "head", "--C", "0.1", "1"], "mlp": ["--layers", "conv5", "--hidden", "16"],
             "finetune": ["--labels", "0.5", "--draws", "2", "--head-factor", "1", "10", "--test-crops",
                          "10"]}[protocol]
    found = evaluate(checkpoint, "--protocol", protocol, "--lr", 0.01, "--weight-decay", 0.0001, *words)
    assert found["protocol"] == protocol and 0 <= found[f"{protocol}_top1"] <= 100
    if protocol == "finetune":
        assert found["runs"][0]["labels"] == 30 and found["runs"][0]["head_factor"] in (1, 10)
        assert found["classes"] == 10
        assert found["finetune_top1"] == pytest.approx(np.mean([row["top1"] for row in found["runs"]]), abs=0.01)
    if protocol == "svm":
        assert [row["size"] for row in found["layers"]] == [32, 128]


def test_fine_tuning_is_that_of_plain_pytorch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draw's training begins with the weights of the file and a last layer of its own, and without the momentum of
    the one before: SGD on mirrored, normalised crops, in parts that weigh by their images. Of a test image the mean
    probability over ten crops counts, in evaluation mode."""
    steps, tasks, judged = list[tuple[Tensor, Tensor]](), list[eval_linear.Task](), list[Tensor]()
    batches, open_task, merit = common.ImageSet.batches, eval_linear.open_task, eval_linear.merit

    def watched(*given: Any) -> Any:
        for number, index, images in batches(*given):
            steps.append((index, images[0]))
            yield number, index, images

    def judge(scores: Tensor, targets: Tensor) -> dict[str, Any]:
        judged.append(scores)
        return merit(scores, targets)

    monkeypatch.setattr(common.ImageSet, "batches", watched)
    monkeypatch.setattr(eval_linear, "open_task", lambda *given: (tasks.append(open_task(*given)), tasks[0])[1])
    monkeypatch.setattr(eval_linear, "merit", judge)
    evaluate(checkpoint, "--protocol", "finetune", "--labels", 10, "--draws", 2, "--lr", 0.01, "--weight-decay", 0.1,
             "--momentum", 0.5, "--schedule", "cosine", "--head-factor", 3, "--accumulate", 4, "--epochs", 3,
             "--test-crops", 10, "--no-amp", "--seed", 3)
    backbone: Any = common.load_encoder(checkpoint).backbone.requires_grad_(True)
    model, task = eval_linear.Classifier(backbone, backbone.dim, 10).train(), tasks[0]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the same roundings
    torch.manual_seed(common.generator(3, "last layer", 1).initial_seed())
    torch.nn.init.normal_(model.last.weight, std=0.01)
    torch.nn.init.zeros_(model.last.bias)
    groups = [dict(params=model.body.parameters()), dict(params=model.last.parameters())]
    optimizer = torch.optim.SGD(groups, 1.0, momentum=0.5, weight_decay=0.1)
    assert len(steps) == 6
    for at, (index, images) in enumerate(steps[3:]):
        rate = 0.01 * (1 + np.cos(np.pi * at / 3)) / 2
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 3 * rate
        mirrored = torch.rand(10, generator=common.generator(3, "augment", 3 + at, 0)) < 0.5
        x = (torch.where(mirrored[:, None, None, None], images.flip(3), images) - 0.5) / 0.25
        optimizer.zero_grad()
        for part in (slice(0, 4), slice(4, 7), slice(7, 10)):
            (F.cross_entropy(model(x[part]), task.train_targets[index[part]], reduction="sum") / 10).backward()
        optimizer.step()
    (path,) = (checkpoint.parent / "eval_linear").glob("smoke-*/checkpoint.pth")
    torch.testing.assert_close(dict(common.load_checkpoint(path)["state"]["model"]), model.state_dict(), atol=1e-4,
                               rtol=1e-3)
    (crops,) = task.test.centers(torch.arange(40), 40, CPU, ten=True)
    with torch.no_grad():
        expected = model.eval()((crops.flatten(0, 1) - 0.5) / 0.25).softmax(1).view(40, 10, -1).mean(1)
    torch.testing.assert_close(judged[-1], expected, atol=1e-3, rtol=1e-2)


def test_svm_sees_what_it_should(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SVM has the chosen cost, all crops of the labelled images and an intercept; a test image has the mean of its
    crops' outputs. Features of both are standardised by those of all training images."""
    kept, judged, tasks = list[Any](), list[Tensor](), list[eval_linear.Task]()
    both, merit, rows = eval_linear.both_features, eval_linear.merit, torch.arange(0, 60, 2)
    monkeypatch.setattr(eval_linear, "both_features", lambda *given: (kept.append(both(*given)), kept[0])[1])
    monkeypatch.setattr(eval_linear, "merit", lambda *given: (judged.append(given[0]), merit(*given))[1])
    monkeypatch.setattr(eval_linear, "draws", lambda args, task: (tasks.append(task), [(dict(labels=30), rows)])[1])
    monkeypatch.setattr(eval_linear, "cross_validate", lambda *_: torch.full((10,), 0.5, dtype=torch.float64))
    evaluate(checkpoint, "--protocol", "svm", "--layers", "conv5", "--normalize", "standard", "--C", 0.1, 0.5,
             "--positive-weight", 2, "--train-crops", 2, "--test-crops", 10, "--no-amp")
    train, test = (part["conv5"].float() for part in kept[0])
    mean, deviation = train.mean((0, 1)), train.flatten(0, 1).std(0, correction=0)
    train, test = (F.pad((x - mean) / deviation.clamp(min=1e-3 * deviation.mean()), (0, 1), value=1.0)
                   for x in (train, test))
    labels = tasks[0].train_targets[rows].repeat_interleave(2)
    targets = 2 * F.one_hot(labels, 10) - 1
    (weights,) = eval_linear.fit_svms(train[rows].flatten(0, 1), targets, torch.full((1, 10), 0.5), 2.0)
    torch.testing.assert_close(judged[0], (test @ weights.T).mean(1), atol=1e-3, rtol=1e-3)


def test_fine_tuning_chooses_by_images_that_it_has_not_seen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting trains without the held-out images and is judged by them; the best one trains again on all."""
    trained, rates, judged, drawn = list[list[int]](), list[float](), list[int](), list[Tensor]()
    batches, step, draws, merit = (common.ImageSet.batches, torch.optim.SGD.step, eval_linear.draws, eval_linear.merit)

    def watched(*given: Any) -> Any:
        for number, index, images in batches(*given):
            trained.append(index.tolist())
            yield number, index, images

    def stepped(self: torch.optim.SGD, *rest: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    def judge(scores: Tensor, targets: Tensor) -> dict[str, Any]:
        judged.append(len(targets))
        return merit(scores, targets) | dict(top1=[10, 30, 20, 50][len(judged) - 1])

    def seen(args: argparse.Namespace, task: eval_linear.Task) -> Any:
        ((facts, rows),) = draws(args, task)
        drawn.extend((rows, task.train_targets))
        return [(facts, rows)]

    monkeypatch.setattr(common.ImageSet, "batches", watched)
    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    monkeypatch.setattr(eval_linear, "merit", judge)
    monkeypatch.setattr(eval_linear, "draws", seen)
    found = evaluate(checkpoint, "--protocol", "finetune", "--labels", 30, "--lr", 0.01, 0.02, 0.04, "--weight-decay",
                     0, "--epochs", 1, "--batch-size", 8, "--schedule", "constant", "--seed", 3)
    rows, targets = drawn
    held = rows[eval_linear.hold_out(targets[rows], 0.1, 3)]
    for epoch in range(4):
        used = rows if epoch == 3 else rows[~torch.isin(rows, held)]
        order = used[torch.randperm(len(used), generator=common.generator(3, "order", epoch))].tolist()
        assert trained[3 * epoch : 3 * epoch + 3] == [order[start : start + 8] for start in (0, 8, 16)]
    assert len(held) == 3 and judged == [3, 3, 3, 40]
    assert rates == pytest.approx([0.01] * 3 + [0.02] * 3 + [0.04] * 3 + [0.02] * 3)
    assert [found["runs"][0][key] for key in ("best_lr", "holdout", "top1")] == [0.02, 30, 50]


def test_of_equally_good_settings_the_first_is_taken(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where held-out images tell no difference: the first rate of the grid after its first epoch; of fine-tuning, whose
    epochs are not chosen, after the last."""
    monkeypatch.setattr(eval_linear, "merit", lambda *_: dict(top1=50.0, top5=90.0))
    for epoch, protocol in ((1, ["mlp", "--layers", "conv5", "--hidden", 8]), (2, ["finetune", "--weight-decay", 0])):
        (row,) = evaluate(checkpoint, "--epochs", 2, "--lr", 0.02, 0.01, "--protocol", *protocol)["runs"]
        assert (row["best_lr"], row["best_epoch"], row["holdout"]) == (0.02, epoch, 50.0)


def test_each_layer_and_draw_chooses_for_itself(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer, and the second draw of labels, take the best of their own rates; the headline of probes is that
    of the layer that is best on held-out images."""
    words = ["--epochs", 1, "--lr", 0.02, 0.01, "--weight-decay", 0]
    held_out, tested = iter([[60.0, 70.0], [50.0, 40.0]]), iter([1.0, 0.0, 9.0, 0.0])
    monkeypatch.setattr(eval_linear, "probe_accuracy", lambda *_: next(held_out))
    monkeypatch.setattr(eval_linear, "probe_figures", lambda *_: dict(top1=next(tested), top5=90.0))
    found = evaluate(checkpoint, *words)
    assert [(row["lr"], row["holdout_top1"]) for row in found["layers"]] == [(0.01, 70), (0.02, 50)]
    assert (found["layer"], found["linear_top1"]) == ("conv1", 1)
    merits = iter([60.0, 70, 1, 50, 40, 2])  # two rates on held-out images, and the test, of each draw
    monkeypatch.setattr(eval_linear, "merit", lambda *_: dict(top1=next(merits), top5=90.0))
    rows = evaluate(checkpoint, *words, "--protocol", "finetune", "--labels", 20, "--draws", 2)["runs"]
    assert [(row["best_lr"], row["holdout"], row["top1"]) for row in rows] == [(0.01, 70, 1), (0.02, 50, 2)]


def test_mlp_is_that_of_plain_pytorch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the search it is trained on all images: SGD on the crops that each epoch draws, with dropout before both
    hidden layers. The figures are those of the epoch that held-out images chose, and of the last: by the mean
    probability over ten crops of a test image."""
    kept, judged = list[Any](), list[Tensor]()
    both, merit = eval_linear.both_features, eval_linear.merit

    def judge(scores: Tensor, targets: Tensor) -> dict[str, Any]:
        judged.append(scores)
        return merit(scores, targets) | dict(top1=100 - len(judged))  # the first epoch seems to be the best

    monkeypatch.setattr(eval_linear, "both_features", lambda *given: (kept.append(both(*given)), kept[0])[1])
    monkeypatch.setattr(eval_linear, "merit", judge)
    found = evaluate(checkpoint, "--protocol", "mlp", "--layers", "conv5", "--train-crops", 2, "--test-crops", 10,
                     "--lr", 0.1, "--weight-decay", 0.01, "--momentum", 0.5, "--head-factor", 3, "--schedule", "cosine",
                     "--no-amp", "--seed", 3)
    (row,) = found["runs"]
    assert [len(scores) for scores in judged] == [6, 6, 40, 40] and found["hidden"] == 256
    assert [row[key] for key in ("best_epoch", "holdout", "top1", "last_top1")] == [1, 99, 97, 96]
    train, test = (part["conv5"].float() for part in kept[0])
    open_keys = ("image_size", "cache", "file_list", "imbalance")
    args = argparse.Namespace(data="shapes", subset=60, seed=3, **dict.fromkeys(open_keys), typed=[])
    labels = common.load(args, "train", CPU).labels
    layers = [torch.nn.Dropout(0.5), torch.nn.Linear(train.shape[2], 256), torch.nn.ReLU(),
              torch.nn.Dropout(0.5), torch.nn.Linear(256, 256), torch.nn.ReLU()]
    model = eval_linear.Classifier(torch.nn.Sequential(*layers), 256, 10)
    torch.manual_seed(common.generator(3, "mlp").initial_seed())
    for layer in (layers[1], layers[4], model.last):
        layer.reset_parameters()  # type: ignore[operator]
    groups = [dict(params=model.body.parameters()), dict(params=model.last.parameters())]
    optimizer = torch.optim.SGD(groups, 1.0, momentum=0.5, weight_decay=0.01)
    for at in range(6):
        epoch, step = 2 + at // 3, at % 3
        rate, part = 0.1 * (1 + np.cos(np.pi * at / 6)) / 2, slice(16 * step, 16 * step + 16)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 3 * rate
        index = torch.randperm(60, generator=common.generator(3, "order", epoch))[part]
        views = torch.randint(2, (60,), generator=common.generator(3, "views", epoch))[part]
        torch.manual_seed(common.generator(3, "step", epoch, step, 0).initial_seed())
        optimizer.zero_grad()
        F.cross_entropy(model(train[index, views]), labels[index]).backward()
        optimizer.step()
    (path,) = (checkpoint.parent / "eval_linear").glob("smoke-*/checkpoint.pth")
    torch.testing.assert_close(dict(common.load_checkpoint(path)["state"]["model"]), model.state_dict())
    with torch.no_grad():
        expected = model.eval()(test.flatten(0, 1)).softmax(1).view(40, 10, -1).mean(1)
    torch.testing.assert_close(judged[-1], expected)


def test_small_batches_have_parts_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that few labels shrink goes through the network in parts that are no larger than those of a whole one."""
    sizes, forward = list[int](), eval_linear.Classifier.forward

    def watched(self: eval_linear.Classifier, x: Tensor) -> Tensor:
        sizes.extend([len(x)] * self.training)
        return forward(self, x)

    monkeypatch.setattr(eval_linear.Classifier, "forward", watched)
    evaluate(checkpoint, "--protocol", "finetune", "--lr", 0.01, "--weight-decay", 0, "--labels", 10, "--accumulate", 4,
             "--epochs", 1)
    assert sizes == [4, 3, 3]


def test_checkpoints_of_fine_tuning(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after each training, since its epochs may be shorter than a checkpoint takes; each epoch if none is timed."""
    saved, save = list[int](), common.Run.save

    def watched(self: common.Run, state: dict[str, Any], epoch: int, step: int) -> None:
        saved.append(epoch)
        save(self, state, epoch, step)

    monkeypatch.setattr(common.Run, "save", watched)
    words = ["--protocol", "finetune", "--lr", 0.01, 0.02, "--weight-decay", 0, "--labels", 20, "--epochs", 2]
    for minutes, epochs in ((10, [2, 4, 6]), (0, [1, 2, 3, 4, 5, 6])):  # two rates, and the better one again
        saved.clear()
        evaluate(checkpoint, *words, "--save-minutes", minutes, "--output", checkpoint.parent / f"{minutes}")
        assert saved == epochs


def test_features_serve_all_protocols(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The SVM after the probes finds their features, and makes none."""
    evaluate(checkpoint)
    assert capsys.readouterr().out.count("features of ") == 2
    evaluate(checkpoint, "--protocol", "svm")
    assert "features of " not in capsys.readouterr().out
    evaluate(checkpoint, "--protocol", "svm", "--layers", "conv1", "head")
    assert "crops, head: " in capsys.readouterr().out


def test_foreign_weights(tmp_path: Path) -> None:
    """A file with torchvision's names is welcome; one with half of the weights is refused."""
    torch.manual_seed(0)
    weights = common.backbone("resnet18", 4, True).state_dict()
    torch.save(weights, tmp_path / "foreign.pth")
    words = ["--arch", "resnet18", "--width", 4, "--data", "shapes", "--protocol", "svm", "--layers", "conv5"]
    assert evaluate(tmp_path / "foreign.pth", *words)["method"] == "foreign"
    torch.save({name: weight for name, weight in weights.items() if "layer4" not in name}, tmp_path / "half.pth")
    with pytest.raises(common.Fault, match="% of the weights of resnet18"):
        evaluate(tmp_path / "half.pth", *words)


@pytest.mark.parametrize("trainable", ["fc", "all"])
def test_voc07(trainable: str, trained: Path, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several classes an image: mAP in percent, by logits; fc trains no convolution, neither touches their
    statistics."""
    logits, judged, forward, merit = list[Tensor](), list[Tensor](), eval_linear.Classifier.forward, eval_linear.merit

    def watched(self: eval_linear.Classifier, x: Tensor) -> Tensor:
        found = forward(self, x)
        logits.extend([found] * (not self.training))
        return found

    monkeypatch.setattr(eval_linear.Classifier, "forward", watched)
    monkeypatch.setattr(eval_linear, "merit", lambda *given: (judged.append(given[0]), merit(*given))[1])
    path = Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))
    found = evaluate(path, "--protocol", "voc07", "--data", "shapes", "--trainable", trainable, "--lr", 0.003,
                     "--weight-decay", 1e-6, "--workers", 0, data_dir=voc)
    (row,) = found["runs"]
    assert row["map_11_points"] == found["map_voc07_classification"] and len(row["ap_11_points"]) == 10
    torch.testing.assert_close(judged, [torch.cat(logits)])
    before = common.load_encoder(path).backbone.state_dict()
    (after,) = tmp_path.glob("eval_linear/smoke-*/checkpoint.pth")
    for name, weight in common.load_checkpoint(after)["state"]["model"].items():
        name = name.removeprefix("body.")
        if name in before and "num_batches" not in name:
            frozen = trainable == "fc" or "running" in name
            assert torch.equal(weight, before[name]) == frozen, name


def test_voc07_chooses_by_area(trained: Path, voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rates the one of the larger area under the curves is taken, whatever their figures at 11 points."""
    found = (dict(map_11_points=eleven, map_area=area) for eleven, area in ((50.0, 60.0), (60.0, 50.0), (1.0, 1.0)))
    monkeypatch.setattr(eval_linear, "merit", lambda *_: next(found))
    path = Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))
    (row,) = evaluate(path, "--protocol", "voc07", "--data", "shapes", "--epochs", 1, "--lr", 0.002, 0.001,
                      "--weight-decay", 0, "--workers", 0, data_dir=voc)["runs"]
    assert (row["best_lr"], row["holdout"]) == (0.002, 60)


def test_voc07_of_alexnet(voc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fc6-8 of AlexNet start anew with bias 0.1 and train, the rest does not; --dropout before both hidden ones."""
    rates, forward = set[tuple[float, ...]](), eval_linear.Classifier.forward

    def watched(self: eval_linear.Classifier, x: Tensor) -> Tensor:
        rates.add(tuple(layer.p for layer in self.modules() if isinstance(layer, torch.nn.Dropout)))
        return forward(self, x)

    monkeypatch.setattr(eval_linear.Classifier, "forward", watched)
    words = ["--protocol", "voc07", "--data", "shapes", "--arch", "alexnet", "--width", 4, "--image-size", 64,
             "--trainable", "fc", "--lr", 1e-9, "--weight-decay", 0, "--workers", 0, "--dropout", 0.3,
             "--output", tmp_path]
    evaluate("random", *words, data_dir=voc)
    assert rates == {(0.3, 0.3)}
    (path,) = tmp_path.glob("smoke-*/checkpoint.pth")
    weights = common.load_checkpoint(path)["state"]["model"]
    for name in ("body.classifier.1", "body.classifier.4", "last"):
        torch.testing.assert_close(weights[f"{name}.bias"], torch.full_like(weights[f"{name}.bias"], 0.1))
        assert 0.005 < weights[f"{name}.weight"].std() < 0.015


def test_batch_normalisation_may_train(trained: Path, voc: Path, tmp_path: Path) -> None:
    """--train-batchnorm: of the convolutions scale and shift train too, and nothing else."""
    path = Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))
    evaluate(path, "--protocol", "voc07", "--data", "shapes", "--trainable", "fc", "--train-batchnorm", "--lr", 0.01,
             "--weight-decay", 0, "--workers", 0, data_dir=voc)
    before = common.load_encoder(path).backbone.state_dict()
    (after,) = tmp_path.glob("eval_linear/smoke-*/checkpoint.pth")
    weights = common.load_checkpoint(after)["state"]["model"]
    assert not torch.equal(weights["body.layer1.0.bn1.weight"], before["layer1.0.bn1.weight"])
    for name in ("conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.running_mean"):
        assert torch.equal(weights[f"body.{name}"], before[name])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a training does: the rates of each step's groups, the length of its gradient, and the crops."""
    found = argparse.Namespace(rates=[], lengths=[], crops=[])
    step, batches = torch.optim.SGD.step, common.ImageSet.batches

    def stepped(self: torch.optim.SGD, *args: Any) -> Any:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        found.rates.append([group["lr"] for group in self.param_groups])
        found.lengths.append(torch.cat([weight.grad.flatten() for weight in weights]).norm().item())
        return step(self, *args)

    def cropped(self: common.ImageSet, run: common.Run, order: Tensor, crop: common.Crop, *rest: Any) -> Any:
        found.crops.append((crop.scale, crop.ratio))
        return batches(self, run, order, crop, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", stepped)
    monkeypatch.setattr(common.ImageSet, "batches", cropped)
    return found


def test_the_new_layer_learns_faster(checkpoint: Path, seen: argparse.Namespace) -> None:
    """The last layer's rate is --head-factor times that of the others, also after drops; crops are pretraining's."""
    evaluate(checkpoint, "--preset", "finetune-cld", "--data", "shapes", "--subset", 60, "--test-subset", 40,
             "--labels", 30, "--epochs", 3, "--lr-drops", 1, 2)
    assert seen.rates == [pytest.approx([rate, 100 * rate]) for rate in (0.01, 0.002, 0.0004)]
    assert seen.crops == [((0.2, 1.0), (3 / 4, 4 / 3))] * 3


def test_voc07_clips_gradients_and_crops_squares(
    trained: Path, voc: Path, tmp_path: Path, seen: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on VOC07 sees squares of 10 to 50 % of an image, and a gradient longer than 10 becomes as long."""
    loss = eval_linear.masked_bce
    monkeypatch.setattr(eval_linear, "masked_bce", lambda *args: 1000 * loss(*args))
    path = Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))
    evaluate(path, "--preset", "voc07-all", "--data", "shapes", "--subset", 60, "--test-subset", 40, "--epochs", 1,
             "--test-crops", 1, "--workers", 0, data_dir=voc)
    assert seen.lengths == [pytest.approx(10, rel=1e-3)] * 3
    assert seen.crops == [((0.1, 0.5), (1, 1))]


@pytest.mark.parametrize("shots", [[], ["--per-class", "1", "2", "--draws", "2"],
                                   ["--labels", "40", "50", "--draws", "2"]])
def test_voc07_svm(shots: list[str], trained: Path, voc: Path, tmp_path: Path) -> None:
    """SVM on VOC's classes, and with few images of each; 0-targets are left out."""
    path = Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))
    found = evaluate(path, "--protocol", "voc07-svm", "--data", "shapes", "--layers", "conv5", "--C", 0.1, 1,
                     "--normalize", "l2", "--workers", 0, *shots, data_dir=voc)
    end = found["layers"][-1] if not shots else found["draws"][-1]
    assert found["map_voc07_svm"] == end["map_11_points"] > 5
    if shots:
        key, counts = shots[0].strip("-").replace("-", "_"), [int(shots[1]), int(shots[2])]
        assert [row[key] for row in found["layers"]] == [counts[0]] * 2 + [counts[1]] * 2
        assert [(entry[key], entry["draws"]) for entry in found["draws"]] == [(count, 2) for count in counts]


def test_voc07_without_objects_is_refused(tmp_path: Path) -> None:
    """Test images in which all objects are difficult would give a mean over no class."""
    common.render_voc(tmp_path / "voc", 3, 2)
    for name in (tmp_path / "voc/ImageSets/Main/test.txt").read_text().split():
        path = tmp_path / f"voc/Annotations/{name}.xml"
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    args = eval_linear.parse_args(["random", "--preset", "voc07-svm", "--data", str(tmp_path / "voc")])
    with pytest.raises(common.Fault, match="the 2 test images of voc have no objects that count"):
        eval_linear.open_task(args, None, CPU)


def test_voc07_has_something_to_choose_by(tmp_path: Path) -> None:
    """A grid is refused where the held-out images have no object of any class; one setting needs none."""
    common.render_voc(tmp_path / "voc", 6, 2)
    words = ["random", "--width", 4, "--preset", "voc07-all", "--data", tmp_path / "voc", "--image-size", 32,
             "--epochs", 1, "--workers", 0, "--device", "cpu", "--output", tmp_path / "out"]
    held = eval_linear.hold_out(torch.zeros(6, 10), 0.1, 0)
    path = tmp_path / f"voc/Annotations/trainval_{int(held):05d}.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    process = run("eval_linear", [*map(str, words), "--lr", "0.1", "0.01"])
    assert process.code == 2 and "the held-out images have no objects that count" in process.err
    process = run("eval_linear", [*map(str, words), "--lr", "0.1"])
    assert process.code == 0 and "NaN" not in process.out, process.err


def test_voc07_sees_images_as_the_network_did(trained: Path, voc: Path) -> None:
    """At the size of the network's run; normalised by --mean and --std, else its run's figures, else ImageNet's."""
    words = [str(trained), "--protocol", "voc07-svm", "--data", "shapes", "--data-dir", str(voc), "--subset", "20",
             "--test-subset", "10"]
    encoder, imagenet = common.load_encoder(trained), common.IMAGENET
    for typed, network, expected in (([], encoder, (32, (0.5,) * 3, (0.25,) * 3)), ([], None, tuple(imagenet)),
                                     (["--mean", "0", "0", "0", "--std", "1", "1", "1"], None,
                                      (imagenet.size, (0, 0, 0), (1, 1, 1)))):
        task = eval_linear.open_task(eval_linear.parse_args([*words, *typed]), network, CPU)
        assert (task.train.size, task.train.mean, task.train.std) == expected
        assert (task.test.size, task.test.mean, task.test.std) == expected


@pytest.mark.parametrize("split", ["trainval", "test"])
def test_corrected_annotations_are_another_task(split: str, checkpoint: Path, tmp_path: Path) -> None:
    """Once a class in an annotation is corrected, the old result is not given as that of the new classes."""
    root = tmp_path / "set"
    common.render_voc(root, 20, 10)
    words = ["--protocol", "voc07-svm", "--data", root, "--layers", "conv5", "--workers", 0, "--subset", 20,
             "--test-subset", 10]
    assert evaluate(checkpoint, *words) == evaluate(checkpoint, *words)
    path = root / f"Annotations/{split}_00000.xml"  # of one object
    path.write_text(re.sub("<name>class.", "<name>class0" if "class0" not in path.read_text() else "<name>class1",
                           path.read_text()))
    with pytest.raises(common.Fault, match="images have other classes: use --overwrite"):
        evaluate(checkpoint, *words)
    evaluate(checkpoint, *words, "--overwrite")


def test_few_images_of_each_class(trained: Path, voc: Path, tmp_path: Path) -> None:
    """Of every class N images with it and 19 N without it, or all there are, are shown; another draw, or seed, shows
    others."""
    args = eval_linear.parse_args([str(trained), "--protocol", "voc07-svm", "--data", "shapes", "--data-dir", str(voc),
                                   "--subset", "60", "--test-subset", "40", "--per-class", "2", "--draws", "2"])
    task = eval_linear.open_task(args, None, CPU)
    first, second = eval_linear.svm_draws(args, task)
    for _, rows, targets in (first, second):
        without = (task.train_targets < 0).sum(0).clamp(max=38)
        assert ((targets > 0).sum(0) == 2).all() and torch.equal((targets < 0).sum(0), without)
        known = targets != 0
        assert torch.equal(targets[known], task.train_targets[rows][known])
    args.seed = 1
    assert len({facts["checksum"] for facts, *_ in (first, second, *eval_linear.svm_draws(args, task))}) == 4
    args.per_class = [1000]
    with pytest.raises(common.Fault, match="--per-class 1000: shapes has"):
        eval_linear.svm_draws(args, task)


@pytest.mark.skipif(not PACKS.is_dir(), reason="the packs with real images are not here")
def test_real_voc_images(trained: Path, tmp_path: Path) -> None:
    """Seven images of VOC2007 go through both VOC protocols."""
    with tarfile.open(PACKS / "voc2007_test7_real.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    (lists,) = tmp_path.glob("**/ImageSets/Main")
    shutil.copy(lists / "test.txt", lists / "trainval.txt")
    path = Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))
    for protocol in ("voc07", "voc07-svm"):
        words = ["--protocol", protocol, "--data", "voc07", "--layers", "conv5", "--subset", 7, "--test-subset", 7,
                 "--lr", 0.003, "--weight-decay", 1e-6, "--workers", 0]
        found = evaluate(path, *words, data_dir=lists.parents[3])
        assert found["data"] == "voc07" and len([*found.get("runs", []), *found.get("layers", [])]) == 1


def watch_rank(rank: int, port: int, folder: Path) -> None:
    """What a launcher tells one of two ranks; which images it classifies, and what it finds, to a file."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    crops_of, merit = eval_linear.crops_of, eval_linear.merit

    def note(*facts: Any) -> None:
        common.append_line(folder / f"{rank}.jsonl", json.dumps(facts))

    def crops(data: common.ImageSet, rows: Tensor, *rest: Any) -> Any:
        note("rows", len(data), rows.tolist())
        return crops_of(data, rows, *rest)

    def judged(scores: Tensor, targets: Tensor) -> dict[str, Any]:
        found = merit(scores, targets)
        note("merit", len(targets), found, scores.double().sum().item())
        return found

    eval_linear.crops_of, eval_linear.merit = crops, judged  # type: ignore[assignment]


def test_two_ranks_share_the_images_and_agree(checkpoint: Path, tmp_path: Path) -> None:
    """Fine-tuning on two ranks: each classifies half of the images, and both know all scores, and choose the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [checkpoint, *SMALL, tmp_path, "--protocol", "finetune", "--lr", "0.01", "0.1", "--weight-decay", "0.0001",
             "--test-subset", "41", "--holdout", "0.12", "--epochs", "1"]
    ranks = [start("eval_linear", words, functools.partial(watch_rank, rank, port, tmp_path)) for rank in range(2)]
    assert [process.wait().code for process in ranks] == [0, 0], [process.err for process in ranks]
    first, second = ([json.loads(line) for line in (tmp_path / f"{rank}.jsonl").read_text().splitlines()]
                     for rank in range(2))
    assert [fact[0] for fact in first] == ["rows", "merit"] * 3
    assert first[1::2] == second[1::2] and [fact[1] for fact in first[1::2]] == [7, 7, 41]
    for (_, count, mine), (_, _, others) in zip(first[::2], second[::2], strict=True):
        assert len(mine) == len(others) == (4 if count == 60 else 21)
        assert len({*mine, *others}) == (7 if count == 60 else 41)


# resuming, faults


RESUMED = [
    ["--epochs", "6", "--lr", "0.01", "0.1", "1", "--weight-decay", "0", "0.01"],
    ["--protocol", "finetune", "--labels", "0.5", "--lr", "0.01", "0.02", "--weight-decay", "0.0001", "--epochs", "6"],
]


def die_once_it_says(text: str) -> None:
    """A kill as soon as `text` has been printed."""

    def deadly(*words: Any, **options: Any) -> None:
        print(*words, **options)
        if any(text in str(word) for word in words):
            os.kill(os.getpid(), signal.SIGKILL)

    for module in (common, eval_linear):
        module.print = deadly  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", RESUMED, ids=["linear", "finetune"])
def test_killed_run_resumes(words: list[str], trained: Path, tmp_path: Path) -> None:
    """Killed in the middle, and started again, a run ends with the line of an undisturbed one."""
    lines = list[dict[str, Any]]()
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        path = shutil.copy(trained, tmp_path / name / "checkpoint.pth")
        command = [path, *SMALL, tmp_path, *words, "--save-minutes", "0.003"]
        if name == "killed":
            said = '{"layer": "conv5"' if "--protocol" not in words else '"training": 2'
            assert run("eval_linear", command, functools.partial(die_once_it_says, said)).code == -9
        done = run("eval_linear", command)
        assert done.code == 0, done.err
        assert ("resumed: " in done.out) == (name == "killed")
        lines.append(json.loads(done.out.splitlines()[-1]) | dict(checkpoint=""))
    assert lines[0] == lines[1]


def test_settings_have_folders_of_their_own(checkpoint: Path) -> None:
    """Another rate, seed, precision or data set starts anew beside the first; the same command finds its result."""
    words = ["--protocol", "svm", "--layers", "conv5"]
    first = evaluate(checkpoint, *words)
    assert evaluate(checkpoint, *words) == first
    evaluate(checkpoint, *words, "--C", 10)
    evaluate(checkpoint, *words, "--seed", 1)
    assert [evaluate(checkpoint, *words, word)["amp"] for word in ("--amp", "--no-amp")] == [True, False]
    assert len(list(checkpoint.parent.glob("eval_linear/smoke-*"))) == 5
    assert len((checkpoint.parent / "eval.jsonl").read_text().splitlines()) == 6
    sets = [eval_linear.parse_args([str(checkpoint), "--data", name]) for name in ("shapes", "cifar10", "cifar10")]
    assert len({eval_linear.folder_of(args, None) for args in sets}) == 2


def test_other_test_images_are_another_evaluation(tmp_path: Path) -> None:
    """With another --val-dir the result is that of its images, not the one that the same training images had before."""
    for split in ("train", "first", "second"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(6):
                level = 200 if (name == "a") == (split != "second") else 40  # in the second set the classes are swapped
                noise = np.random.default_rng(number).integers(0, 50, (40, 40, 3), np.uint8)
                Image.fromarray(noise + np.uint8(level)).save(tmp_path / split / name / f"{number}.png")
    words = ["--data", tmp_path / "train", "--subset", 12, "--test-subset", 1 - 1e-9, "--protocol", "svm", "--layers",
             "conv1", "--width", 4, "--workers", 0, "--output", tmp_path / "out"]
    found = [evaluate("random", *words, "--val-dir", tmp_path / split)["svm_top1"] for split in ("first", "second")]
    assert found == [100, 0]
    (tmp_path / "second/a/5.png").unlink()
    with pytest.raises(common.Fault, match="images are not those"):
        evaluate("random", *words, "--val-dir", tmp_path / "second")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_replaced_photograph_is_another_evaluation(split: str, tmp_path: Path) -> None:
    """Features and results of a photograph are not those of another that has taken its name, whichever it is."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(65):
            Image.new("RGB", (100, 2), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    words = ["--data", tmp_path, "--subset", 1 - 1e-9, "--test-subset", 1 - 1e-9, "--protocol", "svm", "--layers",
             "backbone", "--image-size", 16, "--width", 4, "--workers", 0, "--output", tmp_path / "out"]
    evaluate("random", *words)
    Image.effect_noise((100, 2), 99).save(tmp_path / split / "a/60.png")
    with pytest.raises(common.Fault, match="images are not those"):
        evaluate("random", *words)
    before = len(list((tmp_path / "out/features").glob("*.bin")))
    evaluate("random", *words, "--overwrite")
    assert (before, len(list((tmp_path / "out/features").glob("*.bin")))) == (3, 3)


def test_images_of_one_size_made_anew_are_others(tmp_path: Path) -> None:
    """Uncompressed files made anew have the sizes of the old ones: their content tells them apart."""
    data = encoder_and_data(count=3)[1]
    files = dataclasses.replace(data, pixels=None, root=tmp_path, files=np.array([b"0.bmp", b"1.bmp", b"2.bmp"]))
    found = set()
    for colour in ("red", "blue"):
        for number in range(3):
            Image.new("RGB", (100, 100), colour).save(tmp_path / f"{number}.bmp")
        found.add(eval_linear.images_checksum(files))
    assert len(found) == 2


def test_head_behind_an_unknown_layer(checkpoint: Path, tmp_path: Path) -> None:
    """The preset svm-head does not take a head as if it stood on the backbone where another layer may come before it.
    """
    saved = torch.load(checkpoint)
    saved["state"]["encoder"]["hidden.0.weight"] = torch.rand(32, 32)
    torch.save(saved, tmp_path / "changed.pth")
    one_line(run("eval_linear", [tmp_path / "changed.pth", "--device", "cpu", "--preset", "svm-head", "--subset", "60",
                                 "--test-subset", "20"]), "hidden.0.weight", "--layers backbone")


def test_faults(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be done is said in one line."""
    small = [checkpoint, *SMALL, tmp_path]
    one_line(run("eval_linear", [tmp_path / "none.pth", "--device", "cpu"]), "cannot read", "none.pth")
    one_line(run("eval_linear", [*small, "--protocol", "svm", "--per-class", "7"]), "a class of shapes has 6 images")
    backbone = common.load_encoder(checkpoint).backbone.state_dict()
    torch.save(backbone, tmp_path / "backbone.pth")
    one_line(run("eval_linear", [tmp_path / "backbone.pth", *SMALL, tmp_path, "--arch", "resnet18", "--width", "4",
                                 "--layers", "head"]), "no linear layer", "take backbone, not head")
    for words in ([], ["a", "--weights", "b"], ["a", "--labels", "0.1"], ["a", "--protocol", "mlp", "--layers", "conv1",
                                                                          "conv2"]):
        with pytest.raises(SystemExit) as stop:
            eval_linear.parse_args(words)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    one_line(run("eval_linear", [*small, "--subset", "1"]), "too few to choose by")
    done = run("eval_linear", [*small, "--layer-size", "99"], before=full_disk)
    one_line(done, "the features take", "GB free", "--features")


def test_too_few_to_choose_by(tmp_path: Path) -> None:
    """What is left when some images are held out has to be enough for all ranks: of three images one is not for two."""
    args, data = options(tmp_path, "--holdout", "0.5", "--lr", "0.1", "1"), encoder_and_data(count=10)[1]
    task, ranks = eval_linear.Task(data, data, data.labels, data.labels), argparse.Namespace(world=2)
    nothing: Any = None
    with pytest.raises(common.Fault, match="3 labelled images are too few to choose by"):
        eval_linear.train_networks(args, ranks, task, nothing, [({}, torch.arange(3))],  # type: ignore[arg-type]
                                   nothing, nothing, nothing, every_epoch=True)


def test_one_image_of_each_class_chooses_nothing(tmp_path: Path) -> None:
    """Of one image a class none can be held out to choose a rate, which the grid would decide; one rate trains."""
    words = ["--protocol", "finetune", "--per-class", 1, "--weight-decay", 0, "--image-size", 16, "--width", 4,
             "--epochs", 1, "--output", tmp_path]
    with pytest.raises(common.Fault, match="the only ones of their classes, nothing to choose by"):
        evaluate("random", *words, "--lr", 0.01, 0.1)
    assert evaluate("random", *words, "--lr", 0.1)["runs"][0]["labels"] == 10


def full_disk() -> None:
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined,assignment]


def test_weights_may_be_an_option(checkpoint: Path) -> None:
    """--weights FILE is the first argument; a protocol's own preset is the default."""
    args = eval_linear.parse_args(["--weights", str(checkpoint), "--protocol", "mlp"])
    assert args.checkpoint == str(checkpoint) and args.preset == "mlp" and args.epochs == 90
    assert eval_linear.parse_args(["random"]).preset == "linear"


@pytest.mark.parametrize("preset", eval_linear.PRESETS)
def test_presets_parse(preset: str) -> None:
    """Every preset's values arrive."""
    args = eval_linear.parse_args(["random", "--preset", preset])
    for key, value in (eval_linear.PRESETS["linear"] | eval_linear.PRESETS[preset]).items():
        assert getattr(args, key) == value


def test_picture(trained: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """figures.py linear draws the accuracy of each layer, several checkpoints side by side, from their eval.jsonl: on
    the run's own data unless others are asked for; the small print has the images and epochs of what is drawn."""
    found = evaluate(checkpoint)
    other = tmp_path / "other"
    other.mkdir()
    changed = found | dict(method="untrained", layers=[row | dict(top1=5.0) for row in found["layers"]])
    (other / "eval.jsonl").write_text(json.dumps(changed) + "\n")
    figures.main(figures.parse_args(["linear", str(checkpoint.parent), str(other), "--out", str(tmp_path / "a.png")]))
    assert np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).std() > 2
    lines = figures.read_layers([str(checkpoint.parent), str(other)], "linear", None)[0]
    assert lines == {"npid smoke": {row["layer"]: row["top1"] for row in found["layers"]},
                     "untrained": {"conv1": 5.0, "conv5": 5.0}}
    shutil.copy(trained.parent / "log.jsonl", checkpoint.parent)
    moved = found | dict(data="places205", layers=[row | dict(top1=7.0) for row in found["layers"]])
    common.append_line(checkpoint.parent / "eval.jsonl", json.dumps(moved))
    assert figures.read_layers([str(checkpoint.parent), str(other)], "linear", None)[0] == lines
    notes = list[str]()
    monkeypatch.setattr(figures, "save", lambda figure, title, note, runs, path: notes.append(note))
    figures.main(figures.parse_args(["linear", str(checkpoint.parent)]))
    assert notes == ["eval_linear.py: {train_images:,} training and {test_images:,} test images of shapes, {epochs} "
                     "epochs.".format_map(found)]
    assert figures.read_layers([str(checkpoint.parent)], "linear", "places205")[0] == {
        "npid smoke": {"conv1": 7.0, "conv5": 7.0}}
    with pytest.raises(common.Fault, match="--data places205"):
        figures.read_layers([str(other)], "linear", "places205")
    for text, reason in (("nonsense\n", "each line has to be JSON"), ("[1]\n{}\n", "no result of eval_linear")):
        (other / "eval.jsonl").write_text(text)
        with pytest.raises(common.Fault, match=reason):
            figures.read_layers([str(other)], "linear", None)


def test_lines_of_networks(tmp_path: Path) -> None:
    """Untrained networks of another kind, width or seed are lines of their own, in files without widths too; of each a
    layer's last figure counts, none of few labels, of another protocol or of other settings than the last's; layers
    stand in the order of the network."""

    def row(layers: dict[str, float], **more: Any) -> dict[str, Any]:
        return dict(protocol="svm", method="untrained", checkpoint="random", checkpoint_sha256="", arch="resnet18",
                    seed=0, data="shapes", layers=[dict(layer=name, top1=top1) for name, top1 in layers.items()]) | more

    rows = [row({"head": 1, "conv5": 2}, width=4), row({"conv1": 3, "head": 4}, width=4), row({"conv1": 5}, width=8),
            row({"conv1": 6}, width=4, seed=1), row({"head": 9}, width=4, protocol="linear"), row({"conv1": 7}),
            row({"head": 8}, width=4, draws=[]),
            row({"conv5": 8}, method="npid", checkpoint="x.pth", checkpoint_sha256="abc", subset=500),
            row({"conv1": 9}, method="npid", checkpoint="x.pth", checkpoint_sha256="abc")]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = figures.read_layers([str(tmp_path)], "svm", None)[0]
    start = "untrained resnet18, width"
    assert lines == {f"{start} 4, seed 0": {"head": 4, "conv5": 2, "conv1": 3}, f"{start} 8, seed 0": {"conv1": 5},
                     f"{start} 4, seed 1": {"conv1": 6}, f"{start} ?, seed 0": {"conv1": 7}, "npid": {"conv1": 9}}
    (axes,) = figures.draw_layers(lines, "svm").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["conv1", "conv5", "head"]
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2] and list(axes.lines[0].get_ydata()) == [3, 2, 4]
    assert axes.get_title() == "linear SVM" and {text.xy: text.get_text() for text in axes.texts}[2, 4] == "4.0"


@pytest.mark.gpu
@pytest.mark.parametrize("protocol", ["linear", "svm", "mlp", "finetune"])
def test_on_a_gpu(protocol: str, trained: Path, tmp_path: Path) -> None:
    """Every protocol runs on a GPU."""
    path = Path(shutil.copy(trained, tmp_path / "checkpoint.pth"))
    args = eval_linear.parse_args([str(path), "--preset", "smoke", "--device", "cuda", "--protocol", protocol,
                                   "--layers", "conv5"])
    try:
        eval_linear.main(args)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert json.loads((tmp_path / "eval.jsonl").read_text())["protocol"] == protocol
