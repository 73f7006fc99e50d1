"""Segmentation: mean IoU by hand, the network against torchvision's, exact resumption, faults."""

import argparse
import functools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Rank, checkpoint, log, one_line, run, same, start
from PIL import Image
from test_detection import killed_after, rank_of, signalled, slow_with_few_files
from test_distributed import free_port
from torch import Tensor, nn
from torchvision.models import resnet50

import common
import eval_segmentation
import npid
from eval_segmentation import Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered set of 7 images to train on and 3 to test on."""
    root = tmp_path_factory.mktemp("voc") / "set"
    common.render_voc(root, 7, 3)
    return root


def load(folder: Path, split: str = "train") -> common.VocSet:
    return common.load_voc(argparse.Namespace(data=str(folder), subset=None, test_subset=None), split, "Segmentation")


def tiny(folder: Path, output: Path, *more: object, network: str = "random") -> list[str]:
    """The command of a run of seconds."""
    words = [network, "--preset", "shapes", "--data", folder, "--output", output, "--batch-size", 4, "--iterations", 4,
             "--test-size", 32, "--crop", 32, "--log-every", 2, "--workers", 0, "--device", "cpu", "--no-amp"]
    return [str(word) for word in [*words, *["--arch", "resnet18", "--width", 4] * (network == "random"), *more]]


def options(**more: object) -> argparse.Namespace:
    args = eval_segmentation.parse_args(["random", "--preset", "shapes"])
    return argparse.Namespace(**vars(args) | more)


# figures


def test_by_hand() -> None:
    """Ground 2 of 4, class 1 1 of 3, class 3 in neither: mean (2/4 + 1/3 + 0/1) / 3; void pixels count nowhere."""
    truth = torch.tensor([[0, 0, 0, 1], [1, 2, 255, 255]], dtype=torch.uint8)
    found = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 3]])
    table = eval_segmentation.confusion(found, truth, 4)
    assert table.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    figures = eval_segmentation.figures(table, ["ground", "a", "b", "c"])
    assert figures["miou"] == round(100 * (2 / 5 + 1 / 3 + 0) / 3, 2)
    assert figures["pixel_accuracy"] == 50 and figures["iou_by_class"] == {"ground": 40, "a": 33.33, "b": 0}
    perfect = eval_segmentation.figures(eval_segmentation.confusion(truth, truth, 4), ["ground", "a", "b", "c"])
    assert perfect["miou"] == perfect["pixel_accuracy"] == 100


def test_table_equals_loops() -> None:
    """The table counts pixels one by one."""
    source = torch.Generator().manual_seed(0)
    truth = torch.randint(5, (9, 11), generator=source).to(torch.uint8)
    truth[torch.rand(9, 11, generator=source) < 0.2] = common.VOID
    found = torch.randint(5, (9, 11), generator=source)
    table = torch.zeros(5, 5, dtype=torch.int64)
    for t, f in zip(truth.flatten().tolist(), found.flatten().tolist(), strict=True):
        if t != common.VOID:
            table[t, f] += 1
    assert torch.equal(eval_segmentation.confusion(found, truth, 5), table)


def test_loss() -> None:
    """Mean cross-entropy of the pixels that are not void, of scores interpolated to them; 0 where all are void."""
    scores = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    truth = torch.randint(3, (2, 8, 8))
    truth[0, :3] = common.VOID
    logs = F.interpolate(scores, (8, 8), mode="bilinear").log_softmax(1)
    terms = [-logs[b, truth[b, y, x], y, x] for b in range(2) for y in range(8) for x in range(8)
             if truth[b, y, x] != common.VOID]
    count = (truth != common.VOID).sum()
    torch.testing.assert_close(eval_segmentation.pixel_loss(scores, truth, count), torch.stack(terms).mean())
    assert eval_segmentation.pixel_loss(scores, torch.full((2, 8, 8), common.VOID), torch.ones(())) == 0


# network and data


def test_dilation_equals_torchvisions() -> None:
    """ResNet-50 at a stride of 8 is torchvision's with replace_stride_with_dilation."""
    theirs = resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    ours = common.backbone("resnet50", 64, False)
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    model = eval_segmentation.Segmenter(ours, 20, options(output_stride=8)).eval()
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            expected = layer(expected)
        torch.testing.assert_close(model.trunk(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch, small, stride", [
    ("resnet18", True, 2), ("resnet18", False, 32), ("resnet34", False, 8), ("alexnet", False, 32),
    ("vgg16_bn", True, 32),
])
def test_strides(arch: str, small: bool, stride: int) -> None:
    """The scores have the stride asked for, AlexNet's and VGG16's that of their last pooling; --dropout is theirs, and
    so is a last layer of zeros."""
    args = options(output_stride=stride, dropout=0.2)
    model = eval_segmentation.Segmenter(common.backbone(arch, 4, small), 6, args).eval()
    rates = {layer.p for layer in model.head.modules() if isinstance(layer, nn.Dropout)}
    assert rates == ({0.1} if arch.startswith("resnet") else {0.2})  # of torchvision's FCN head, or --dropout
    scores = model(torch.rand(1, 3, 256, 256))
    assert scores.shape[1] == 7 and abs(scores.shape[2] - 256 / stride) <= 1
    assert bool(scores.any()) == arch.startswith("resnet")


def test_network_of_another_kind() -> None:
    """A network whose stages are not known is a Fault that says which are."""
    with pytest.raises(common.Fault, match="takes ResNets, AlexNet and VGG16, not Sequential"):
        eval_segmentation.Segmenter(nn.Sequential(), 3, options())


@pytest.mark.parametrize("arch", ["vgg16", "alexnet"])
def test_head_without_fc7(arch: str) -> None:
    """Of a plain network that ends with fc6, as DeepCluster's head of two layers, fc6 alone precedes the scores."""
    network = common.backbone(arch, 4, True)
    del network.classifier[-3:]
    model = eval_segmentation.Segmenter(network, 6, options()).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape[1] == 7
    convolutions = [layer for layer in model.head.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [network.dim, 7]


def test_fc_as_convolution() -> None:
    """fc6 as a convolution gives at the middle of a map what the linear layer gives of it."""
    layer, maps = nn.Linear(5 * 7 * 7, 11), torch.randn(2, 5, 7, 7)
    conv = eval_segmentation.convolution(layer, 5)
    torch.testing.assert_close(conv(maps)[:, :, 3, 3], layer(maps.flatten(1)))


def test_image_and_mask_stay_together(folder: Path, tmp_path: Path) -> None:
    """However an image is scaled, mirrored and cut, its mask frames the same pixels, with no other class at the frame;
    what is beyond an image, at the right and below, is void."""
    data = load(folder)
    image = data.images[0]
    picture, mask = np.full((96, 96, 3), 20, np.uint8), np.zeros((96, 96), np.uint8)
    picture[20:60, 10:70], mask[20:60, 10:70] = 220, 3
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    data.images[0] = image._replace(path=tmp_path / "a.png", mask=tmp_path / "m.png")
    data.mean = (0.5, 0.5, 0.5)
    decoder = eval_segmentation.Decoder(data)
    for sample in (Sample(0, 64, False, 48, 0.3, 0.8), Sample(0, 200, True, 96, 1.0, 0.0),
                   Sample(0, 40, True, 64, 0.5, 0.9)):
        item = decoder[sample]
        assert not isinstance(item, str)
        pixels, classes = item
        assert pixels.shape[1:] == classes.shape == (sample.crop, sample.crop)
        bright = pixels[0] > 170
        assert ((classes == 3) != bright).float().mean() < 0.04 and (classes == 3).any()
        assert set(classes.unique().tolist()) <= {0, 3, common.VOID}
        beyond = torch.ones_like(classes, dtype=torch.bool)
        beyond[: sample.side, : sample.side] = False
        assert (classes[beyond] == common.VOID).all() and (pixels[:, beyond] == 128).all()
    wide = np.zeros((96, 192), np.uint8)  # of a wide image the crop is placed along its own sides
    wide[:, 96:] = 3
    for name, pixels in (("w.png", np.stack([wide * 80] * 3, 2)), ("v.png", wide)):
        Image.fromarray(pixels).save(tmp_path / name)
    data.images[1] = image._replace(path=tmp_path / "w.png", mask=tmp_path / "v.png", size=(192, 96))
    for x, classes in ((0.0, {0}), (1.0, {3})):
        item = decoder[Sample(1, 96, False, 64, x, 0.5)]
        assert not isinstance(item, str) and set(item[1].unique().tolist()) == classes
    whole = decoder[Sample(0, 32)]
    assert not isinstance(whole, str) and whole[0].shape == (3, 32, 32)
    assert torch.equal(whole[1], torch.from_numpy(mask))


def test_what_is_drawn_for_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round takes all images, in an order of its own; scale and place of the crop are uniform, half are mirrored;
    two ranks have the halves of what one has."""
    seen, data, args = list[list[Sample]](), load(folder), options(scales=[0.5, 2.0], test_size=100, crop=70)

    def undecoded(data: Any, args: Any, batches: Any) -> Any:
        for samples in batches:
            seen.append(samples)
            yield torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(eval_segmentation, "decoded", undecoded)
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        list(eval_segmentation.training_batches(Rank(rank, world), data, args, range(70)))  # type: ignore[arg-type]
    whole, left, right = seen[:70], seen[70:140], seen[140:]
    assert whole == [one + two for one, two in zip(left, right, strict=True)]
    samples = [sample for step in whole for sample in step]
    rounds = [tuple(sample.row for sample in samples[start : start + 7]) for start in range(0, len(samples), 7)]
    assert {tuple(sorted(one)) for one in rounds} == {tuple(range(7))} and len(set(rounds)) > 60
    sides, x, y = (torch.tensor([getattr(sample, key) for sample in samples]).double() for key in ("side", "x", "y"))
    for values, low, high in ((sides, 50, 200), (x, 0, 1), (y, 0, 1)):
        spread = high - low
        assert low <= values.min() < low + 0.02 * spread and high - 0.02 * spread < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.05 * spread
    assert {sample.crop for sample in samples} == {70}
    assert abs(np.mean([sample.flip for sample in samples]) - 0.5) < 0.07
    assert torch.corrcoef(torch.stack([sides, x, y])).triu(1).abs().max() < 0.15


# runs


def test_training_is_that_of_plain_pytorch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD on the recorded crops, normalised by --mean and --std, at a rate of (1 - t / T)^0.9, has the same weights."""
    batches, original = list[tuple[Tensor, Tensor]](), eval_segmentation.training_batches

    def watched(*arguments: Any) -> Any:
        for step, images, classes in original(*arguments):
            batches.append((images, classes))
            yield step, images, classes

    monkeypatch.setattr(eval_segmentation, "training_batches", watched)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    more = ["--mean", *mean, "--std", *std, "--lr", 0.02, "--momentum", 0.5, "--weight-decay", 0.01, "--seed", 3]
    args = eval_segmentation.parse_args(tiny(folder, tmp_path / "out", *more))
    eval_segmentation.main(args)
    torch.manual_seed(3)
    backbone = common.untrained_encoder("resnet18", 4, True, common.CPU).backbone
    model: Any = eval_segmentation.Segmenter(backbone, 10, args).train()
    model.to(memory_format=torch.channels_last)  # in whose order its dropout draws
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5, weight_decay=0.01)
    for step, (images, classes) in enumerate(batches):
        torch.manual_seed(common.generator(3, "step", 0, step, 0).initial_seed())  # of the head's dropout
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 4) ** 0.9
        images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        scores = model(images.contiguous(memory_format=torch.channels_last))
        optimizer.zero_grad()
        scores = F.interpolate(scores, classes.shape[1:], mode="bilinear")
        F.cross_entropy(scores, classes, ignore_index=common.VOID).backward()
        optimizer.step()
    assert len(batches) == 4
    torch.testing.assert_close(dict(checkpoint(tmp_path / "out")["state"]["model"]), model.state_dict(), atol=1e-4,
                               rtol=1e-3)


def test_run(folder: Path, tmp_path: Path) -> None:
    """A run leaves log, checkpoint and backbone, and one JSON line, also in eval.jsonl; it is not done again. An
    untrained network is a ResNet-18 unless --arch says another. The same network on other images is another result,
    which says so."""
    words = tiny(folder, tmp_path / "out", "--freeze", 2, "--accumulate", 2)
    words = [word for word in words if word not in ("--arch", "resnet18")]
    process = run("eval_segmentation", words)
    assert process.code == 0 and process.err == "", process.err
    result = json.loads(process.out.splitlines()[-1])
    assert result["protocol"] == "segmentation" and result["arch"] == "resnet18"
    assert (result["train_images"], result["test_images"]) == (7, 3)
    assert 0 < result["miou"] < 100 and (tmp_path / "out/eval.jsonl").read_text() == json.dumps(result) + "\n"
    assert [row["iteration"] for row in log(tmp_path / "out")[1:]] == [2, 4]
    again = run("eval_segmentation", words)
    assert json.loads(again.out.splitlines()[-1]) == result and "already finished" in again.out
    header, *rows = log(tmp_path / "out")
    assert len(rows) == 2 and header["test"]["images"] == 3 and "7 images at 32 px" in process.out
    other = json.loads(run("eval_segmentation", [*words, "--test-subset", "2"]).out.splitlines()[-1])
    assert (result["test_subset"], other["test_subset"], other["test_images"]) == (None, 2, 2)
    torch.manual_seed(0)
    before = common.backbone("resnet18", 4, True).state_dict()
    after = torch.load(tmp_path / "out/backbone.pth")
    same({name: value for name, value in after.items() if name.startswith(("conv1", "bn1", "layer1"))},
         {name: value for name, value in before.items() if name.startswith(("conv1", "bn1", "layer1"))})
    assert not torch.equal(after["layer2.0.conv1.weight"], before["layer2.0.conv1.weight"])


def test_networks_of_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]) -> None:
    """A run's network sees images by the run's mean and std; the result stands beside it, too; once its file has other
    weights, what was trained from it is refused."""
    small = ["--preset", "smoke", "--subset", "32", "--epochs", "1", "--knn-every", "0", "--output", str(tmp_path)]
    npid.main(npid.parse_args([*small, "--device", "cpu"]))
    saved = common.load_checkpoint(tmp_path / "checkpoint.pth")
    saved["data"] |= dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    torch.save(saved, tmp_path / "checkpoint.pth")
    asked, original = list[Any](), common.normalize
    monkeypatch.setattr(common, "normalize", lambda *x: (asked.append(x[1:]), original(*x))[1])
    words = tiny(folder, tmp_path / "out", "--test-list", "trainval", network=str(tmp_path / "checkpoint.pth"))
    eval_segmentation.main(eval_segmentation.parse_args(words))
    assert {tuple(map(tuple, statistics)) for statistics in asked} == {((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}
    assert (tmp_path / "eval.jsonl").read_text() == (tmp_path / "out/eval.jsonl").read_text()
    assert "note: 7 of the 7 test images are trained on" in capsys.readouterr().err
    saved["state"]["encoder"]["backbone.conv1.weight"] += 1
    torch.save(saved, tmp_path / "checkpoint.pth")
    with pytest.raises(common.Fault, match="was trained from other weights than"):
        eval_segmentation.main(eval_segmentation.parse_args(words))


def test_images_that_wait_keep_few_files_open(folder: Path, tmp_path: Path) -> None:
    """While a worker is slow the others' batches wait for it: images and masks of each are a tensor, that is a file."""
    words = tiny(folder, tmp_path / "out", "--batch-size", 32, "--workers", 2)
    process = run("eval_segmentation", words, functools.partial(slow_with_few_files, "eval_segmentation"))
    assert process.code == 0, process.err


def test_parts_weigh_by_their_pixels(folder: Path, tmp_path: Path) -> None:
    """The loss, and what is learnt, is the mean over the pixels of the batch however it is cut into parts, or shared
    out over ranks, with more void in one than in the other."""
    more = ["--arch", "alexnet", "--bn", "frozen", "--dropout", 0, "--scales", 0.5, 2, "--lr", 0.5, "--log-every", 1]
    port = free_port()
    runs = [start("eval_segmentation", tiny(folder, tmp_path / "whole", *more)),
            start("eval_segmentation", tiny(folder, tmp_path / "parts", *more, "--accumulate", 4))]
    runs += [start("eval_segmentation", tiny(folder, tmp_path / "ranks", *more),
                   functools.partial(rank_of, 2, rank, port)) for rank in range(2)]
    assert [process.wait().code for process in runs] == [0] * 4, [process.err for process in runs]
    whole, parts, ranks = ([row["loss"] for row in log(tmp_path / name)[1:]] for name in ("whole", "parts", "ranks"))
    assert len(whole) == 4 and whole[0] != whole[-1]
    assert parts == pytest.approx(whole, abs=1e-3) and ranks == pytest.approx(whole, abs=1e-3)


def test_a_batch_of_void(folder: Path, tmp_path: Path) -> None:
    """A batch without a pixel that counts has the loss 0, and the run goes on."""
    root = Path(shutil.copytree(folder, tmp_path / "set"))
    Image.new("L", (96, 96), common.VOID).save(root / "SegmentationClass/trainval_00003.png")
    more = ["--batch-size", 1, "--iterations", 7, "--log-every", 1]
    eval_segmentation.main(eval_segmentation.parse_args(tiny(root, tmp_path / "out", *more)))
    assert [row["loss"] for row in log(tmp_path / "out")[1:]].count(0) == 1


def test_signal_in_the_final_test(folder: Path, tmp_path: Path) -> None:
    """SIGTERM after the last step ends the run before the test does, its checkpoint kept; the same command goes on to
    the result of an undisturbed run."""
    assert run("eval_segmentation", tiny(folder, tmp_path / "whole")).code == 0
    words = tiny(folder, tmp_path / "parts")
    stopped = run("eval_segmentation", words, functools.partial(signalled, "eval_segmentation", "confusion_table"))
    assert stopped.code == 128 + signal.SIGTERM and '"miou"' not in stopped.out
    assert stopped.err.splitlines()[-1] == "stopped after 1 epochs and 0 steps; the same command continues"
    assert checkpoint(tmp_path / "parts")["epoch"] == 1
    assert run("eval_segmentation", words).code == 0
    same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert (tmp_path / "whole/eval.jsonl").read_text() == (tmp_path / "parts/eval.jsonl").read_text()


def test_frozen_normalisations_stay_on_several_gpus() -> None:
    """Synchronised ones, too, keep their statistics with --bn frozen."""
    network = common.backbone("resnet18", 4, True)
    model: Any = eval_segmentation.Segmenter(network, 6, options(bn="frozen"))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    norms = [module for module in model.trunk.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert model.training and norms and not any(module.training for module in norms)


@pytest.mark.parametrize("arch", ["alexnet_bn", "vgg16_bn"])
def test_plain_networks(arch: str, folder: Path, tmp_path: Path) -> None:
    """FCN-32s of AlexNet and VGG16 runs with --dropout, normalisations frozen with scale and shift; its backbone has
    torchvision's names, with what fc6 and fc7 have learnt as convolutions."""
    words = tiny(folder, tmp_path / "out", "--bn", "frozen", "--dropout", 0.2)
    words[words.index("--arch") + 1] = arch
    process = run("eval_segmentation", [*words, "--small"])
    assert process.code == 0 and process.err == "", process.err
    saved = torch.load(tmp_path / "out/backbone.pth")
    assert saved.keys() == common.backbone(arch, 4, True).state_dict().keys()
    for key, value in dict(running_mean=0, running_var=1, weight=1, bias=0).items():
        assert (saved[f"features.1.{key}"] == value).all()
    torch.manual_seed(0)
    before = common.backbone(arch, 4, True).state_dict()
    head = {name: value for name, value in checkpoint(tmp_path / "out")["state"]["model"].items() if "head" in name}
    learnt = list(head.values())[:4]  # weights and biases of the two, before the scores'
    names = [name for name in saved if name.startswith("classifier")]
    for name, value in zip(names, learnt, strict=True):
        assert torch.equal(saved[name], value.reshape_as(saved[name])) and not torch.equal(saved[name], before[name])


def test_resume_is_exact(folder: Path, tmp_path: Path) -> None:
    """A run killed after 7 of 8 steps, its last checkpoint two steps old, ends with the bits of one that was not;
    its last line is of its last step."""
    more = ["--iterations", 8, "--log-every", 3]
    assert run("eval_segmentation", tiny(folder, tmp_path / "whole", *more)).code == 0
    words = tiny(folder, tmp_path / "parts", *more)
    assert run("eval_segmentation", words, functools.partial(killed_after, 7)).code == -9
    assert run("eval_segmentation", words).code == 0
    same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    assert [row["iteration"] for row in log(tmp_path / "whole")[1:]] == [3, 6, 8]
    results = [json.loads((tmp_path / name / "eval.jsonl").read_text()) for name in ("whole", "parts")]
    assert results[0] == results[1]


def equal_tables(rank: int, port: int) -> None:
    """One of two ranks, which end with an error where their networks differ in the test."""
    rank_of(2, rank, port)
    test = eval_segmentation.confusion_table

    def watched(model: Any, *rest: Any) -> Tensor:
        assert rest[-1].alike([value.tolist() for value in model.state_dict().values()])
        return test(model, *rest)

    eval_segmentation.confusion_table = watched


@pytest.mark.parametrize("count", [3, 1])
def test_two_ranks(count: int, folder: Path, tmp_path: Path) -> None:
    """Two ranks share the test images unevenly, of a single one the second has none, and test the same network, batch
    statistics included; the one result has the pixels of all."""
    words, port = tiny(folder, tmp_path / "out", "--test-subset", count), free_port()
    ranks = [start("eval_segmentation", words, functools.partial(equal_tables, rank, port)) for rank in range(2)]
    for process in ranks:
        assert process.wait().code == 0, process.err
    assert json.loads(ranks[0].out.splitlines()[-1])["test_images"] == count and "protocol" not in ranks[1].out


def test_what_the_network_sees_in_the_test(folder: Path) -> None:
    """Whole normalised images, scaled to --test-size, with zeros at the right and below up to multiples of 32."""
    data, seen = load(folder, "test"), list[Tensor]()

    class Network(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return torch.zeros(1, 11, 3, 3)

    mean, std = data.mean, data.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    eval_segmentation.confusion_table(Network(), data, options(workers=0, test_size=70), Rank(0, 1))  # type: ignore[arg-type]
    for image, (found,) in zip(data.images, seen, strict=True):
        assert found.shape == (3, 96, 96) and not found[:, 70:].any() and not found[:, :, 70:].any()
        with Image.open(image.path) as file:
            pixels = np.asarray(file.convert("RGB").resize((70, 70), Image.Resampling.BILINEAR)) / 255
        expected = torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()
        torch.testing.assert_close(found[:, :70, :70], expected, atol=2 / 255 / 0.5, rtol=0)


def test_scores_lie_on_their_pixels(folder: Path, tmp_path: Path) -> None:
    """Also of an image wider than high scores are interpolated to what the network sees, judged at the mask's size."""
    data, (width, height) = load(folder, "test"), (150, 90)
    data.mean, data.std = (0.5,) * 3, (0.5,) * 3
    mask = np.zeros((height, width), np.uint8)
    mask[10:50, 90:140] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(np.stack([255 * mask] * 3, 2)).save(tmp_path / "a.png")
    data.images = [data.images[0]._replace(path=tmp_path / "a.png", mask=tmp_path / "m.png", size=(width, height))]

    def table(network: Any) -> Tensor:
        args, run = options(workers=0, test_size=63), Rank(0, 1)  # 105 x 63 px, filled up
        return eval_segmentation.confusion_table(network, data, args, run)  # type: ignore[arg-type]

    class Fine(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape == (1, 3, 64, 128)
            scores = torch.full((1, 11, *images.shape[2:]), -9.0)
            scores[:, 0], scores[:, 1] = -images[:, 0], images[:, 0]
            return scores

    class Coarse(nn.Module):
        scores = torch.randn(1, 11, 2, 4, generator=torch.Generator().manual_seed(0))

        def forward(self, images: Tensor) -> Tensor:
            return self.scores

    found = table(Fine())
    assert found.sum() == height * width and found[1].sum() == 2000
    assert found[0, 0] + found[1, 1] > 0.985 * height * width and found[1, 1] > 1800
    seen = F.interpolate(Coarse.scores, (64, 128), mode="bilinear")[..., :63, :105]
    answers = F.interpolate(seen, (height, width), mode="bilinear").argmax(1)[0]
    assert torch.equal(table(Coarse()), eval_segmentation.confusion(answers, torch.from_numpy(mask), 11))


def test_tables_do_not_depend_on_ranks(folder: Path) -> None:
    """The tables of two ranks add up to that of one."""
    args, data = options(workers=0), load(folder, "test")
    model = eval_segmentation.Segmenter(common.backbone("resnet18", 4, True), 10, args)

    data.mean, data.std = common.DATASETS["shapes"][1:]

    def table(rank: int, world: int) -> Tensor:
        return eval_segmentation.confusion_table(model, data, args, Rank(rank, world))  # type: ignore[arg-type]

    assert torch.equal(table(0, 1), table(0, 2) + table(1, 2)) and table(0, 1).sum() > 0.9 * 3 * 96 * 96 * 0.9


# faults


def test_faults(folder: Path, tmp_path: Path) -> None:
    """Masks that are missing, in colour, of another size or with unknown classes are named; so are bad options, and
    masks without a pixel of a class, by which nothing is learnt."""

    def broken(name: str, change: Any) -> list[str]:
        root = Path(shutil.copytree(folder, tmp_path / name))
        change(root / "SegmentationClass/trainval_00002.png")
        return tiny(root, tmp_path / "out")

    def fails(words: list[str], *expected: str) -> None:
        one_line(run("eval_segmentation", words), *expected)

    fails(broken("missing", Path.unlink), "cannot read the mask", "trainval_00002.png", "No such file")
    fails(broken("colour", lambda path: Image.new("RGB", (96, 96)).save(path)), "trainval_00002.png is no mask")
    fails(broken("size", lambda path: Image.new("L", (90, 96)).save(path)), "has 90 x 96 px", "96 x 96")
    fails(broken("class", lambda path: Image.new("L", (96, 96), 11).save(path)), "value 11", "10 classes")
    fails(broken("empty", lambda path: path.write_bytes(b"")), "damaged or empty")
    fails(tiny(folder, tmp_path / "out", "--output-stride", 16), "--output-stride 16: this network has 8")
    fails(tiny(folder, tmp_path / "out", "--test-list", "val"), "val.txt")
    fails(tiny(folder, tmp_path / "out", "--lr", 1e12), "the loss is not finite")
    for split, names, count in (("training", "trainval*", 7), ("test", "test*", 3)):
        words = broken(split, lambda _: None)
        for path in (tmp_path / split / "SegmentationClass").glob(names):
            Image.new("L", (96, 96), common.VOID).save(path)
        fails(words, f"no pixel of the {count} {split} masks of {split} has a class")


def test_folder_without_class_names(folder: Path, tmp_path: Path) -> None:
    """A folder of pictures and masks alone has its training masks' classes; a test mask with another is refused."""
    root = Path(shutil.copytree(folder, tmp_path / "bare"))
    shutil.rmtree(root / "Annotations")
    shutil.rmtree(root / "ImageSets/Main")
    process = run("eval_segmentation", tiny(root, tmp_path / "out"))
    result = json.loads(process.out.splitlines()[-1])
    assert {"ground", "class 1"} <= result["iou_by_class"].keys()
    whole = json.loads(run("eval_segmentation", tiny(folder, tmp_path / "named")).out.splitlines()[-1])
    assert "class0" in whole["iou_by_class"]
    Image.new("L", (96, 96), 200).save(root / "SegmentationClass/test_00001.png")
    one_line(run("eval_segmentation", tiny(root, tmp_path / "late")), "test_00001.png has the value 200")
    assert not (tmp_path / "late/log.jsonl").exists()


def test_objects_as_255(folder: Path, tmp_path: Path) -> None:
    """Masks of 0 and 255, as other tools write them for one class, have no class: no mean IoU of 100 comes of them."""
    root = Path(shutil.copytree(folder, tmp_path / "binary"))
    shutil.rmtree(root / "Annotations")
    shutil.rmtree(root / "ImageSets/Main")
    for path in (root / "SegmentationClass").iterdir():
        with Image.open(path) as mask:
            pixels = np.array(mask)
        Image.fromarray(np.where(pixels == 0, 0, 255).astype(np.uint8), "L").save(path)
    one_line(run("eval_segmentation", tiny(root, tmp_path / "out")), "no pixel of the 7 training masks")


@pytest.mark.parametrize("preset", eval_segmentation.PRESETS)
def test_presets_parse(preset: str) -> None:
    """Every preset sets options that exist."""
    args = eval_segmentation.parse_args(["random", "--preset", preset])
    for key, value in (eval_segmentation.PRESETS["voc12"] | eval_segmentation.PRESETS[preset]).items():
        assert getattr(args, key) == value


@pytest.mark.slow
def test_overfits(tmp_path: Path) -> None:
    """A thin random network learns an image with three objects by heart: mean IoU above 90."""
    root = tmp_path / "set"
    common.render_voc(root, 6, 1, size=96)
    (root / "ImageSets/Segmentation/one.txt").write_text("trainval_00005\n")
    words = ["random", "--arch", "resnet18", "--width", "16", "--preset", "shapes", "--data", root, "--workers", "0",
             "--train-list", "one", "--test-list", "one", "--test-size", "96", "--crop", "96", "--scales", "1", "1",
             "--batch-size", "2", "--lr", "0.03", "--iterations", "150", "--output", tmp_path / "out"]
    process = start("eval_segmentation", [str(word) for word in words]).wait(1800)
    result = json.loads(process.out.splitlines()[-1])
    assert len(result["iou_by_class"]) == 4 and result["miou"] > 90


@pytest.mark.gpu
def test_gpu(folder: Path, tmp_path: Path) -> None:
    """The same run in bfloat16 on a GPU."""
    words = tiny(folder, tmp_path / "out", "--amp")
    words[words.index("cpu")] = "cuda"
    process = run("eval_segmentation", words)
    assert process.code == 0, process.err
    assert 0 < json.loads(process.out.splitlines()[-1])["miou"] < 100
