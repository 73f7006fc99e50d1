"""Detection: figures by VOC's rules, protocols, exact resumption, faults."""

import argparse
import functools
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Rank, checkpoint, log, one_line, run, same, start
from PIL import Image
from scipy.io import savemat
from test_distributed import free_port
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

import common
import eval_detection
import figures
from eval_detection import Detections, Sample

PACKS = common.ROOT.parent / "shared" / "data" / "voc"
packed = pytest.mark.skipif(not PACKS.is_dir(), reason="the packs with real boxes are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered set of 12 images to train on and 5 to test on."""
    root = tmp_path_factory.mktemp("voc") / "set"
    common.render_voc(root, 12, 5)
    return root


def tiny(folder: Path, output: Path, *more: object, network: str = "random") -> list[str]:
    """The command of a run of seconds."""
    words = [network, "--preset", "shapes", "--data", folder, "--output", output, "--batch-size", 4, "--iterations", 4,
             "--lr-drops", "--train-sizes", 24, 32, "--test-size", 32, "--rois", 8, "--precise-bn", 2, "--log-every", 2,
             "--workers", 0, "--device", "cpu", "--no-amp"]
    return [str(word) for word in [*words, *["--arch", "resnet18", "--width", 4] * (network == "random"), *more]]


# figures


def truth_of(images: list[tuple[list[list[float]], list[int], list[int]]], classes: int) -> common.VocSet:
    """A set of images of 100 x 100 px with these boxes, labels, difficult flags."""
    rows = [common.VocImage(Path(f"{i}.jpg"), (100, 100), torch.tensor(boxes).view(-1, 4), torch.tensor(labels).long(),
                            torch.tensor(flags).bool(), Path()) for i, (boxes, labels, flags) in enumerate(images)]
    return common.VocSet("made", [f"c{i}" for i in range(classes)], rows)


def fed_back(data: common.VocSet, scores: Tensor | None = None) -> Detections:
    """The true boxes as detections."""
    image = torch.repeat_interleave(torch.arange(len(data)), torch.tensor([len(one.boxes) for one in data.images]))
    boxes, labels = (torch.cat([getattr(one, key) for one in data.images]) for key in ("boxes", "labels"))
    return Detections(image, boxes, labels,
                      torch.linspace(1, 0.1, len(image)) if scores is None else scores)


def pick(found: Detections, rows: Tensor) -> Detections:
    return Detections(*(column[rows] for column in found))


def made(seed: int, images: int = 12, classes: int = 3) -> tuple[common.VocSet, Detections]:
    """Random objects, a third of them difficult, and detections around and away from them, with equal scores."""
    source = np.random.default_rng(seed)

    def boxes(count: int) -> Any:
        corner = source.integers(0, 60, (count, 2))
        return np.concatenate([corner, corner + source.integers(10, 40, (count, 2))], 1).astype(np.float32)

    counts = source.integers(0, 5, images)
    data = truth_of([(boxes(n).tolist(), source.integers(0, classes, n).tolist(), (source.random(n) < 0.33).tolist())
                     for n in counts], classes)
    columns: list[list[Any]] = [[], [], [], []]
    for i, image in enumerate(data.images):
        near = np.concatenate([image.boxes.numpy()] * 3) + source.normal(0, 4, (3 * len(image.boxes), 4))
        every = np.concatenate([near, boxes(3)])
        labels = np.concatenate([np.tile(image.labels.numpy(), 3), source.integers(0, classes, 3)])
        for box, label in zip(every, labels, strict=True):
            for column, value in zip(columns, (i, box, label, source.integers(1, 20) / 20), strict=True):
                column.append(value)
    return data, Detections(torch.tensor(columns[0]), torch.tensor(np.array(columns[1]), dtype=torch.float32),
                            torch.tensor(np.array(columns[2])), torch.tensor(columns[3], dtype=torch.float32))


def slow_voc(found: Detections, data: common.VocSet, label: int, least: float, eleven_points: bool) -> float:
    """The development kit's loop over the detections of a class."""
    order = [i for i in np.argsort(-found.scores.numpy(), kind="stable") if found.labels[i] == label]
    taken, right = set[tuple[int, int]](), list[int]()
    for i in order:
        image = data.images[int(found.image[i])]
        best, which = 0.0, -1
        for j in range(len(image.boxes)):
            if image.labels[j] == label:
                overlap = float(box_iou(found.boxes[i][None].double(), image.boxes[j][None].double()).float())
                if overlap > best:
                    best, which = overlap, j
        if best >= least:
            if image.difficult[which]:
                continue
            right.append((int(found.image[i]), which) not in taken)
            taken.add((int(found.image[i]), which))
        else:
            right.append(False)
    total = sum(int(((image.labels == label) & ~image.difficult).sum()) for image in data.images)
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    best_above = [max(precision[k:], default=0.0) for k in range(len(right))]
    if eleven_points:
        return 100 * sum(max((p for p, h in zip(precision, hits, strict=True) if 10 * h >= t * total), default=0.0)
                         for t in range(11)) / 11
    return 100 * sum(p for p, one in zip(best_above, right, strict=True) if one) / total


@pytest.mark.parametrize("eleven_points", [True, False])
def test_voc_precision_equals_loops(eleven_points: bool) -> None:
    """On random objects, difficult ones and equal scores among them, every class has the development kit's figure."""
    seen = []
    for seed in range(12):
        data, found = made(seed)
        ours = eval_detection.voc_precision(found, data, [0.5, 0.75], eleven_points)
        for row, least in zip(ours, [0.5, 0.75], strict=True):
            for label, value in enumerate(row.tolist()):
                seen.append(slow_voc(found, data, label, least, eleven_points))
                assert value == pytest.approx(seen[-1])
    assert 20 < np.mean(seen) < 80


def test_by_hand() -> None:
    """Twice the same object: the second box is wrong. Boxes on difficult objects count neither way, however many."""
    data = truth_of([([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0], [0, 1])], 2)
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60], [51, 50, 60, 60], [20.0, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.9, 0.99, 0.98, 0.1])
    found = Detections(torch.zeros(5).long(), boxes, torch.zeros(5).long(), scores)
    overlap, partner = eval_detection.match(found, data)
    assert partner.tolist() == [0, 0, 1, 1, -1] and overlap[1] == pytest.approx(100 / 110)
    right, counted = eval_detection.judge(scores, overlap, partner, torch.tensor([False, True]), 0.5)
    assert right.tolist() == [False, True, False, False, False] and counted.tolist() == [True, True, False, False, True]
    for eleven_points in (True, False):
        values = eval_detection.voc_precision(found, data, [0.5, 0.95], eleven_points)
        assert values[:, 0].tolist() == pytest.approx([100, 100 / 3]) and values[:, 1].isnan().all()
    other = found._replace(labels=torch.ones(5).long())  # boxes of another class
    assert eval_detection.figures(other, data)["ap50_voc07"] == 0
    figures = eval_detection.figures(pick(found, torch.zeros(0).long()), data)
    assert figures.pop("ap50_voc07_by_class") == {"c0": 0} and set(figures.values()) == {0}


def test_every_figure_has_its_overlaps() -> None:
    """One box that overlaps its object by 0.78 is right for AP50 and AP75, and for six of the ten overlaps of AP; the
    class without an object counts for nothing."""
    data = truth_of([([[0.0, 0, 100, 100]], [0], [0])], 2)
    found = fed_back(data)._replace(boxes=torch.tensor([[0.0, 0, 78, 100]]))
    figures = eval_detection.figures(found, data)
    wanted = dict(ap50_voc07=100, ap50_voc10=100, ap75_voc07=100, ap_voc07=60, ap50=100, ap75=100, ap=60)
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted)
    assert figures["ap50_voc07_by_class"] == {"c0": 100}
    two = truth_of([([[0.0, 0, 10, 10], [50, 50, 60, 60]], [0, 0], [0, 0])], 1)  # one of which is found
    figures = eval_detection.figures(pick(fed_back(two), torch.tensor([0])), two)
    assert (figures["ap50_voc07"], figures["ap50_voc10"]) == (pytest.approx(600 / 11, abs=0.01), 50)


def real_truth() -> common.VocSet:
    """All boxes of VOC2007 test with their difficult flags."""
    flags = dict(line.split(maxsplit=1) for line in (PACKS / "voc07_test_difficult.txt").read_text().splitlines())
    images = []
    for line in (PACKS / "voc07_test.txt").read_text().splitlines():
        name, *words = line.split()
        rows = torch.tensor([int(word) for word in words]).view(-1, 5)
        boxes = rows[:, :4].float() - torch.tensor([1.0, 1, 0, 0])
        difficult = torch.tensor([word == "1" for word in flags[name].split()])
        images.append(common.VocImage(Path(name), (500, 500), boxes, rows[:, 4], difficult, Path()))
    return common.VocSet("voc07", common.VOC_CLASSES, images)


@packed
def test_real_boxes_fed_back() -> None:
    """VOC2007's own test boxes give 100 in every figure, the difficult ones told apart or not."""
    data = real_truth()
    assert len(data) == 4952 and sum(int((~image.difficult).sum()) for image in data.images) == 12032
    figures = eval_detection.figures(fed_back(data), data)
    classes = figures.pop("ap50_voc07_by_class")
    assert set(figures.values()) == {100} and len(classes) == 20 and set(classes.values()) == {100}
    found = fed_back(data)
    easy = ~torch.cat([image.difficult for image in data.images])
    some = pick(found, easy.nonzero()[:, 0])
    assert eval_detection.voc_precision(some, data, [0.5], True).mean() == pytest.approx(100)
    moved = found._replace(boxes=found.boxes + 2000)
    assert eval_detection.voc_precision(moved, data, [0.5], True).mean() == 0


@packed
def test_real_boxes_dropped_and_shifted() -> None:
    """With a share dropped or moved away, area AP is the share that is left, and 11-point AP its tenths."""
    data = real_truth()
    found, easy = fed_back(data), ~torch.cat([image.difficult for image in data.images])
    for label in (0, 14):  # aeroplanes, people
        rows = ((found.labels == label) & easy).nonzero()[:, 0]
        kept = rows[: round(0.63 * len(rows))]
        share = len(kept) / len(rows)
        for some in (kept, rows):
            boxes = found.boxes.clone()
            boxes[rows[len(kept) :]] += 2000
            part = pick(found._replace(boxes=boxes, scores=torch.linspace(1, 0.1, len(boxes))), some)
            area = eval_detection.voc_precision(part, data, [0.5], False)[0, label]
            assert area == pytest.approx(100 * share)
            assert eval_detection.voc_precision(part, data, [0.5], True)[0, label] == pytest.approx(700 / 11)
    wide = found._replace(boxes=found.boxes + torch.stack([0.3 * (found.boxes[:, 2] - found.boxes[:, 0])] * 4, 1)
                          * torch.tensor([1.0, 0, 1, 0]))  # overlap 0.7 / 1.3 = 0.538
    values = eval_detection.voc_precision(wide, data, [0.5, 0.55], False)
    assert values[0].mean() > 95 and values[1].mean() < 3  # not quite: they overlap their neighbours as well


def test_agrees_with_coco() -> None:
    """Where objects lie apart, COCO's AP at 0.5 is the mean of VOC's precision over 101 recalls."""
    for seed in range(6):
        source = np.random.default_rng(seed)
        images, columns = [], list[tuple[int, list[float], int, float]]()
        for i in range(10):
            corners = [(x, y) for x in (0, 33, 66) for y in (0, 33, 66) if source.random() < 0.6]
            boxes = [[x, y, x + 20, y + 20] for x, y in corners]
            labels = source.integers(0, 2, len(boxes)).tolist()
            images.append((boxes, labels, (source.random(len(boxes)) < 0.2).tolist()))
            for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
                for _ in range(source.integers(0, 3)):
                    shift = source.integers(0, 12)
                    columns.append((i, [x1 + shift, y1, x2 + shift, y2], int(source.integers(0, 2) or label),
                                    float(source.random())))
        data = truth_of(images, 2)
        found = Detections(torch.tensor([c[0] for c in columns]), torch.tensor([c[1] for c in columns]).float(),
                           torch.tensor([c[2] for c in columns]), torch.tensor([c[3] for c in columns]))
        overlap, partner = eval_detection.match(found, data)
        difficult = torch.cat([image.difficult for image in data.images])
        labels = torch.cat([image.labels for image in data.images])
        right, counted = eval_detection.judge(found.scores, overlap, partner, difficult, 0.5)
        # COCO ignores one box on a difficult object, VOC all of them: further ones would be wrong there.
        hits = (~counted).nonzero()[:, 0]
        order = hits[found.scores[hits].argsort(descending=True)]
        keep = torch.ones_like(counted)
        for place, row in enumerate(order):
            keep[row] = not (partner[order[:place]] == partner[row]).any()
        found, right, counted = pick(found, keep.nonzero()[:, 0]), right[keep], counted[keep]
        means = []
        for label in range(2):
            some = counted & (found.labels == label)
            total = int(((labels == label) & ~difficult).sum())
            recall, precision = common.recall_precision(found.scores[some], right[some], total)
            best = precision.flip(0).cummax(0).values.flip(0)
            means.append(np.mean([float(best[recall >= t].max()) if (recall >= t).any() else 0.0
                                  for t in np.linspace(0, 1, 101)]))
        assert eval_detection.coco_precision(found, data)["ap50"] == pytest.approx(100 * np.mean(means), abs=0.006)


# model


def options(**more: object) -> argparse.Namespace:
    args = eval_detection.parse_args(["random", "--preset", "shapes"])
    return argparse.Namespace(**vars(args) | more)


def test_a_batch_has_boxes_where_the_objects_are() -> None:
    """Boxes follow their image's size and flip, classes count from 1, difficult objects are trained on if so asked,
    images are normalised and filled up with zeros."""
    data = truth_of([([[10, 20, 30, 60], [0, 0, 100, 100]], [2, 0], [0, 1]), ([[10, 20, 30, 60]], [1], [0])], 3)
    data.mean, data.std = (0.1,) * 3, (0.5,) * 3
    part = [(Sample(0, 50, False), torch.full((3, 50, 50), 51, dtype=torch.uint8)),
            (Sample(1, 40, True), torch.full((3, 40, 40), 204, dtype=torch.uint8))]
    for kept in (False, True):
        regions = [image.boxes for image in data.images]  # given ones, which move likewise
        batch = eval_detection.collate(part, data, regions, options(train_difficult=kept), common.CPU)
        one, two = batch.targets
        assert batch.proposals is not None
        assert [found.tolist() for found in batch.proposals] == [[[5, 10, 15, 30], [0, 0, 50, 50]], [[28, 8, 36, 24]]]
        assert one["boxes"].tolist() == [[5, 10, 15, 30], *[[0, 0, 50, 50]] * kept]
        assert one["labels"].tolist() == [3, *[1] * kept] and two["labels"].tolist() == [2]
        assert two["boxes"].tolist() == [[28, 8, 36, 24]]
        assert batch.images.shape == (2, 3, 64, 64) and batch.sizes == [(50, 50), (40, 40)]
        for image, side, value in zip(batch.images, (50, 40), (0.2, 1.4), strict=True):
            torch.testing.assert_close(image[:, :side, :side], torch.full((3, side, side), value))
            assert not image[:, side:].any() and not image[:, :, side:].any()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vgg16_bn", "alexnet_bn", "alexnet"])
@pytest.mark.parametrize("small", [True, False])
def test_trunk_and_head(arch: str, small: bool) -> None:
    """The trunk ends with layer3, or the last convolution; its stride is so; the head takes RoIAlign's map to dim."""
    network = common.backbone(arch, 4, small)
    stages, head, stride, side, dim, _ = eval_detection.split(network, options(extra_bn=False, dropout=0.2))
    rates = {layer.p for layer in head.modules() if isinstance(layer, nn.Dropout)}
    assert rates == (set() if arch.startswith("resnet") else {0.2})
    trunk = nn.Sequential(*stages).eval()
    images = torch.rand(2, 3, 192, 192)
    network.eval()
    with torch.no_grad():
        maps = trunk(images)
        torch.testing.assert_close(maps, network.stages(images)[3 if arch.startswith("resnet") else 4])
        assert abs(maps.shape[-1] - 192 / stride) <= 1
        feature = head.eval()(torch.rand(3, maps.shape[1], side, side))
        assert feature.shape == (3, dim)
        if arch.startswith("resnet"):  # of the whole image, head after trunk is the network
            torch.testing.assert_close(head(maps), network(images))


@pytest.mark.parametrize("arch", ["vgg16_bn", "alexnet_bn", "alexnet"])
@pytest.mark.parametrize("small", [True, False])
def test_regions_are_where_the_cells_see(arch: str, small: bool) -> None:
    """RoIAlign takes each cell of a plain network's map for the middle of the columns of pixels that it sees."""
    model = eval_detection.Detector(common.backbone(arch, 1, small), 3, options())
    for name, parameter in model.trunk.named_parameters():
        parameter.data.copy_(0 if name.endswith("bias") else parameter.abs())
    columns = torch.eye(224)[:, None, None].expand(-1, 3, 32, -1)  # in each image another one is bright
    with torch.no_grad():
        maps = model.trunk.eval()(columns)[:, 0]
        seen = maps[:, maps.shape[1] // 2] > 0  # (column, cell)
        cell = seen.shape[1] // 2
        first, *_, last = seen[:, cell].nonzero()[:, 0].tolist()
        middle = (first + last + 1) / 2
        ramp = torch.arange(float(seen.shape[1])).expand(1, 1, len(maps[0]), -1)
        found = model.regions.box_roi_pool({"0": ramp}, [torch.tensor([[middle - 2, 12, middle + 2, 16]])], [(32, 224)])
    assert found.mean().item() == pytest.approx(cell, abs=1e-4)


def test_network_of_another_kind() -> None:
    """A network whose stages are not known is a Fault that says which are."""
    with pytest.raises(common.Fault, match="takes ResNets, AlexNet and VGG16, not Sequential"):
        eval_detection.Detector(nn.Sequential(), 3, options())


@pytest.mark.parametrize("arch", ["vgg16", "alexnet"])
def test_head_without_fc7(arch: str) -> None:
    """Of a plain network that ends with fc6, as DeepCluster's head of two layers, fc6 alone is the head."""
    network = common.backbone(arch, 4, True)
    whole = eval_detection.split(network, options())[1]
    del network.classifier[-3:]
    _, head, _, side, dim, _ = eval_detection.split(network, options())
    with torch.no_grad():
        feature = head.eval()(maps := torch.rand(3, 32 if arch == "vgg16" else 16, side, side))
        torch.testing.assert_close(feature, whole.eval()[:4](maps))  # type: ignore[index]
    assert feature.shape == (3, dim)


def test_anchors() -> None:
    """Anchors stand a stride apart in float32, even of a bfloat16 map that does not divide its image."""
    anchors = eval_detection.Anchors([16, 32], 4)
    (boxes,) = anchors(ImageList(torch.zeros(1, 3, 50, 70), [(50, 70)]), [torch.zeros(1, 8, 11, 17).bfloat16()])
    assert boxes.dtype == torch.float32 and boxes.shape == (11 * 17 * 6, 4)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres.view(11, 17, 6, 2)[3, 5].eq(torch.tensor([20.0, 12.0])).all()


def test_boundary_anchors() -> None:
    """keep is torchvision's assignment; drop leaves out anchors across the border, an object's best is then inside."""
    args = options()
    anchors = torch.tensor([[-5.0, 0, 15, 20], [0, 0, 12, 12], [5, 5, 25, 25], [30, 30, 44, 44]])
    target = dict(boxes=torch.tensor([[0.0, 0, 14, 20]]))
    model = eval_detection.Detector(common.backbone("resnet18", 4, True), 3, args)
    network = model.proposals
    assert network is not None
    network.image_sizes = [(40, 40)]
    labels, matched = network.assign_targets_to_anchors([anchors], [target])
    plain = super(eval_detection.Proposals, network).assign_targets_to_anchors([anchors], [target])
    assert torch.equal(labels[0], plain[0][0]) and torch.equal(matched[0], plain[1][0])
    assert labels[0].tolist() == [1, -1, 0, 0]
    network.drop = True
    labels, _ = network.assign_targets_to_anchors([anchors], [target])
    assert labels[0].tolist() == [-1, 1, 0, -1]
    network.image_sizes = [(4, 4)]  # no anchor is inside: all count
    assert torch.equal(network.assign_targets_to_anchors([anchors], [target])[0][0], plain[0][0])


@pytest.mark.parametrize("preset, training, testing", [
    ("voc07", (12_000, 2000), (6000, 1000)), ("voc07-la-alexnet", (12_000, 2000), (6000, 300)),
    ("shapes", (1200, 200), (300, 50)),
])
def test_candidates(preset: str, training: tuple[int, int], testing: tuple[int, int]) -> None:
    """How many anchors of an image are left for suppression, and how many regions after it."""
    args = eval_detection.parse_args(["random", "--preset", preset])
    network = eval_detection.Detector(common.backbone("resnet18", 4, True), 3, args).proposals
    assert network is not None
    assert (network.pre_nms_top_n(), network.post_nms_top_n()) == training
    network.eval()
    assert (network.pre_nms_top_n(), network.post_nms_top_n()) == testing


def test_thresholds_and_first_weights() -> None:
    """Overlaps that make anchors and regions positive or negative, their shares, and the first weights of the layers
    that judge regions are Faster R-CNN's; the rest is what the options say."""
    args = options(nms=0.35, min_score=0.15, rois=96)
    model = eval_detection.Detector(common.backbone("resnet18", 64, True), 20, args)
    network, regions = model.proposals, model.regions
    assert network is not None
    found = [(part.proposal_matcher.high_threshold, part.proposal_matcher.low_threshold,
              part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction, part.nms_thresh)
             for part in (network, regions)]
    assert found == [(0.7, 0.3, 256, 0.5, 0.7), (0.5, 0.5, 96, 0.25, 0.35)]
    assert (regions.score_thresh, regions.detections_per_img, regions.box_coder.weights) == (0.15, 100, (10, 10, 5, 5))
    for layer, deviation in ((regions.box_predictor.scores, 0.01), (regions.box_predictor.offsets, 0.001)):
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05) and not layer.bias.any()


def test_what_is_drawn_for_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round takes all images, in an order of its own; each of --train-sizes is as frequent, half are mirrored; two
    ranks have the halves of what one has."""
    seen, args = list[list[Sample]](), options(train_sizes=[24, 32, 48], batch_size=4)
    data = common.load_voc(argparse.Namespace(data=str(folder), subset=None, test_subset=None), "train")
    monkeypatch.setattr(eval_detection, "decoded", lambda data, args, batches: (seen.append(one) for one in batches))
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        list(eval_detection.training_batches(Rank(rank, world), data, args, range(150)))  # type: ignore[arg-type]
    whole, left, right = seen[:150], seen[150:300], seen[300:]
    assert whole == [one + two for one, two in zip(left, right, strict=True)]
    samples = [sample for step in whole for sample in step]
    rounds = [tuple(sample.row for sample in samples[start : start + 12]) for start in range(0, len(samples), 12)]
    assert {tuple(sorted(one)) for one in rounds} == {tuple(range(12))} and len(set(rounds)) == len(rounds)
    for side in (24, 32, 48):
        flips = [sample.flip for sample in samples if sample.side == side]
        assert 160 < len(flips) < 240 and 0.4 < np.mean(flips) < 0.6


def test_training_is_that_of_plain_pytorch(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD on the sum of the losses of the recorded images, normalised by --mean and --std, with the rate and the decay
    of their own tests, ends with the same weights."""
    batches, original = list[list[tuple[Sample, Tensor]]](), eval_detection.training_batches

    def watched(*arguments: Any) -> Any:
        for step, images in original(*arguments):
            batches.append(images)
            yield step, images

    monkeypatch.setattr(eval_detection, "training_batches", watched)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    args = eval_detection.parse_args(tiny(folder, tmp_path / "out", "--mean", *mean, "--std", *std, "--seed", 3, "--lr",
                                          0.01, "--momentum", 0.5, "--weight-decay", 0.01, "--warmup", 2, "--lr-drops",
                                          3, "--precise-bn", 0))
    eval_detection.main(args)
    torch.manual_seed(3)
    network = common.untrained_encoder("resnet18", 4, True, common.CPU).backbone
    model: Any = eval_detection.Detector(network, 10, args).train()
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(eval_detection.parameter_groups(model, 0.01), 1.0, momentum=0.5)
    data, _ = eval_detection.load(args)
    data.mean, data.std = mean, std
    for step, images in enumerate(batches):
        torch.manual_seed(common.generator(3, "step", 0, step, 0).initial_seed())  # which anchors are trained on
        for group in optimizer.param_groups:
            group["lr"] = [0.00001, 0.005005, 0.01, 0.001][step]
        _, losses = model(eval_detection.collate(images, data, None, args, common.CPU))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert len(batches) == 4
    torch.testing.assert_close(dict(checkpoint(tmp_path / "out")["state"]["model"]), model.state_dict(), atol=1e-5,
                               rtol=1e-4)


def test_frozen_stays(folder: Path, tmp_path: Path) -> None:
    """After training, frozen stages, and with --bn frozen all normalisations, have their old bits; the rest moved.
    Without --precise-bn the running statistics of training stay."""
    torch.manual_seed(0)
    network = common.backbone("resnet18", 4, True)
    for name, value in network.state_dict().items():
        if "running" in name:
            value += torch.rand_like(value)
    file = tmp_path / "net.pth"
    torch.save(network.state_dict(), file)
    for bn, precise in (("frozen", 2), ("tuned", 2), ("tuned", 0)):
        output = tmp_path / f"{bn}{precise}"
        words = tiny(folder, output, "--freeze", 3, "--bn", bn, "--no-extra-bn", "--arch", "resnet18", "--width", 4,
                     "--lr", 0.05, "--warmup", 0, "--precise-bn", precise, network=str(file))
        assert run("eval_detection", words).code == 0
        after = torch.load(output / "backbone.pth")
        assert not any((value == 1).all() for name, value in after.items() if name.endswith("running_var"))
        for name, value in network.state_dict().items():
            still = name.startswith(("conv1", "bn1", "layer1", "layer2"))
            norm = "bn" in name or "downsample.1" in name
            moved = not torch.equal(after[name], value)
            if still or (norm and bn == "frozen"):
                assert not moved, name
            elif not norm or "running" in name:
                assert moved, name


def test_frozen_normalisations_stay_on_several_gpus() -> None:
    """Synchronised ones, too, keep their statistics with --bn frozen."""
    model: Any = eval_detection.Detector(common.backbone("resnet18", 4, True), 3, options(bn="frozen"))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model).train()
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert model.training and norms and not any(module.training for module in norms)


def test_coco_figures_are_left_out_without_their_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that has ended does not lose VOC's figures."""
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    none = Detections(torch.zeros(0), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0))
    assert eval_detection.coco_precision(none, common.VocSet("x", [], [])) == {}


def test_boxes_follow_the_image() -> None:
    """Scaled and mirrored boxes frame the same pixels."""
    picture = np.zeros((30, 50, 3), np.uint8)
    picture[5:15, 20:40] = 255
    image = common.VocImage(Path("x"), (50, 30), torch.tensor([[20.0, 5, 40, 15]]), torch.tensor([1]),
                            torch.tensor([False]), Path())
    for flip in (False, True):
        sample = Sample(0, 60, flip)
        size = eval_detection.scaled(image.size, sample.side, 1000)
        assert size == (100, 60) and eval_detection.scaled(image.size, 60, 80) == (80, 48)
        pixels = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
        pixels = pixels[:, ::-1] if flip else pixels
        ((x1, y1, x2, y2),) = eval_detection.move_boxes(image.boxes, image.size, size, sample.flip).long().tolist()
        inner = pixels[y1:y2, x1:x2]
        assert inner.mean() > 245 and float(pixels.sum()) == pytest.approx(float(inner.sum()), rel=0.1)


@pytest.mark.parametrize("preset", eval_detection.PRESETS)
def test_presets_parse(preset: str) -> None:
    """Every preset sets options that exist, and drops its rate within its iterations."""
    regions = ["--proposals", "boxes.txt"] if "fast" in preset else []
    args = eval_detection.parse_args(["random", "--preset", preset, *regions])
    for key, value in (eval_detection.PRESETS["voc07"] | eval_detection.PRESETS[preset]).items():
        assert getattr(args, key) == value
    assert all(drop < args.iterations for drop in args.lr_drops) and args.output.name.endswith(f"{preset}-seed0")
    assert args.max_size >= args.test_size and (args.extra_bn <= (args.bn == "tuned"))


def test_learning_rate() -> None:
    """From a thousandth up in --warmup steps, then a tenth after each drop."""
    args = options(lr=1.0, warmup=100, lr_drops=[500, 800])
    rates = [eval_detection.learning_rate(args, step) for step in (0, 50, 100, 499, 500, 800)]
    assert rates == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01])


def test_half_the_batch() -> None:
    """Half the batch: half the rate, twice the iterations, drops and warm-up; each that is typed stays."""
    args = eval_detection.parse_args(["random", "--preset", "voc0712", "--batch-size", "8"])
    assert (args.lr, args.iterations, args.lr_drops, args.warmup) == (0.01, 48_000, [36_000, 44_000], 200)
    args = eval_detection.parse_args(["random", "--preset", "voc0712", "--batch-size", "8", "--iterations", "99"])
    assert (args.lr, args.iterations, args.lr_drops) == (0.01, 99, [18_000, 22_000])
    for name, value in (("lr", 0.5), ("lr_drops", 9), ("warmup", 7)):
        typed = ["--" + name.replace("_", "-"), str(value)]
        args = eval_detection.parse_args(["random", "--preset", "voc0712", "--batch-size", "8", *typed])
        usual = dict(lr=0.01, iterations=48_000, lr_drops=[36_000, 44_000], warmup=200)
        assert {key: getattr(args, key) for key in usual} == usual | {name: [value] if "drops" in name else value}
    args = eval_detection.parse_args(["random", "--preset", "voc0712"])
    assert (args.lr, args.iterations, args.lr_drops) == (0.02, 24_000, [18_000, 22_000])


def test_decay() -> None:
    """Everything that trains is in one group; normalisations do not decay."""
    model = eval_detection.Detector(common.backbone("resnet18", 4, True), 3, options(freeze=2))
    decayed, plain = eval_detection.parameter_groups(model, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and plain["weight_decay"] == 0
    assert all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 2 * (5 + 5 + 5 + 1)
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(plain["params"]) == trained < len(list(model.parameters()))


def test_precise_statistics() -> None:
    """Running statistics become the plain mean of those of the batches, whatever they were, and of the ranks."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, batch: Tensor) -> Tensor:
            return self.norm(batch)

    net, batches = Net(), [torch.randn(4, 3, 5, 5) * (i + 1) for i in range(3)]
    net(torch.ones(2, 3, 4, 4) * 100)
    run: Any = Rank()
    run.mean = lambda statistic: 3 * statistic  # as if those of other ranks were larger
    eval_detection.precise_statistics(net, iter(batches), run)
    means = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(net.norm.running_mean, 3 * means)
    variances = torch.stack([batch.var((0, 2, 3)) for batch in batches]).mean(0)
    torch.testing.assert_close(net.norm.running_var, 3 * variances)
    assert net.norm.momentum == 0.1


def two_at_most() -> None:
    """From now on a network in training that is given more than two images at once fails, as for want of memory."""
    forward = eval_detection.Detector.forward

    def patched(self: eval_detection.Detector, batch: eval_detection.Batch) -> Any:
        assert not self.training or len(batch.images) <= 2
        return forward(self, batch)

    eval_detection.Detector.forward = patched  # type: ignore[method-assign]


def test_parts_bound_the_memory(folder: Path, tmp_path: Path) -> None:
    """With --accumulate 2 no more than half the batch is on the device at once, in training and for --precise-bn; the
    loss is the mean over the parts."""
    process = run("eval_detection", tiny(folder, tmp_path / "out", "--accumulate", 2), two_at_most)
    assert process.code == 0, process.err
    for row in log(tmp_path / "out")[1:]:
        parts = [value for name, value in row.items() if name.startswith("loss_")]
        assert row["loss"] == pytest.approx(sum(parts), abs=1e-4)


# proposals


def test_proposals_files(folder: Path, tmp_path: Path) -> None:
    """Text and MATLAB files say the same; the first boxes are taken, cut off at the border, none that is beyond it."""
    data = common.load_voc(argparse.Namespace(data=str(folder), subset=None, test_subset=None), "test")
    boxes = np.array([[1, 2, 30, 40], [90, 90, 120, 130], [5, 6, 7, 8]])
    names = [image.path.stem for image in data.images]
    text, mat = tmp_path / "boxes.txt", tmp_path / "boxes.mat"
    text.write_text("\n".join(f"{name} {' '.join(map(str, boxes.flatten()))}" for name in names) + "\n\n")
    cells = np.empty((1, len(names)), object)
    ids = np.empty((len(names), 1), object)
    for i, name in enumerate(names):
        cells[0, i], ids[i, 0] = boxes[:, [1, 0, 3, 2]].astype(float), name
    savemat(mat, dict(images=ids, boxes=cells))
    for file in (text, mat):
        found = eval_detection.read_proposals([str(file)], data, 2)
        assert len(found) == 5
        for one in found:
            assert one.tolist() == [[0, 1, 30, 40], [89, 89, 96, 96]]
    text.write_text(text.read_text().replace(" 1 2 30 40 ", " 98 1 99 9 "))  # beyond the border
    assert [one.tolist() for one in eval_detection.read_proposals([str(text)], data, 2)] == [[[89, 89, 96, 96]]] * 5


def test_damaged_proposals(tmp_path: Path) -> None:
    """A MATLAB file that is missing, cut off or has a flipped bit is named, whatever its reader makes of it."""
    path, none = tmp_path / "boxes.mat", common.VocSet("x", [], [])
    cells = np.empty((1, 2), object)
    cells[0, 0] = cells[0, 1] = np.ones((9, 4))
    savemat(path, dict(images=np.array(["a", "b"], object), boxes=cells), do_compression=True)
    whole = path.read_bytes()
    eval_detection.read_proposals([str(path)], none, 1)
    flipped = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    for content in (None, *(whole[:end] for end in (0, 1, 100, 150, len(whole) - 1)), flipped):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(common.Fault, match=r"boxes.mat is no file of proposals \((?!None)."):
            eval_detection.read_proposals([str(path)], none, 1)


def write_proposals(folder: Path, path: Path) -> None:
    """The true boxes and a grid, for both lists."""
    lines = []
    for split in ("train", "test"):
        for image in common.load_voc(argparse.Namespace(data=str(folder), subset=None, test_subset=None), split).images:
            grid = torch.tensor([[x, y, x + 31, y + 31] for x in (1, 33, 65) for y in (1, 33, 65)])
            boxes = torch.cat([image.boxes + torch.tensor([1, 1, 0, 0]), grid])
            lines.append(f"{image.path.stem} {' '.join(f'{side:g}' for side in boxes.flatten().tolist())}")
    path.write_text("\n".join(lines))


def test_a_preset_for_a_network_takes_no_other(folder: Path, tmp_path: Path) -> None:
    """A row of VGG16 does not become one of the ResNet that is the default, or is in the file."""
    words = tiny(folder, tmp_path / "out", "--preset", "voc07-la-vgg16")
    one_line(run("eval_detection", words), "--preset voc07-la-vgg16 is for vgg16, not resnet18: name --arch")


@pytest.mark.parametrize("arch", ["resnet18", "vgg16_bn_fc", "alexnet"])
def test_fast_rcnn(arch: str, folder: Path, tmp_path: Path) -> None:
    """With --proposals there is no proposal network, and the run ends with figures."""
    write_proposals(folder, tmp_path / "boxes.txt")
    words = tiny(folder, tmp_path / "out", "--proposals", tmp_path / "boxes.txt")
    words[words.index("--arch") + 1] = arch
    process = run("eval_detection", [*words, "--small", "--accumulate", "2"])
    assert process.code == 0, process.err
    assert 0 <= json.loads(process.out.splitlines()[-1])["ap50_voc07"] <= 100
    names = torch.load(tmp_path / "out" / "checkpoint.pth")["state"]["model"]
    assert not any(name.startswith("proposals") for name in names)
    assert "loss_objectness" not in log(tmp_path / "out")[-1]


# runs


def test_run(folder: Path, tmp_path: Path) -> None:
    """A run leaves log, checkpoint, backbone, detections and one JSON line, also in eval.jsonl; it is not redone. The
    loss is the sum of its parts. An untrained network is a ResNet-18 unless --arch says another. The same network on
    other images is another result, which says so."""
    words = [word for word in tiny(folder, tmp_path / "out") if word not in ("--arch", "resnet18")]
    process = run("eval_detection", words)
    assert process.code == 0 and process.err == ""
    result = json.loads(process.out.splitlines()[-1])
    assert result["protocol"] == "detection" and result["arch"] == "resnet18"
    assert (result["train_images"], result["test_images"]) == (12, 5)
    assert {"ap50_voc07", "ap50_voc10", "ap_voc07", "ap75_voc07", "ap", "ap50", "ap75"} <= result.keys()
    assert (tmp_path / "out/eval.jsonl").read_text() == json.dumps(result) + "\n"
    header, *rows = log(tmp_path / "out")
    assert [row["iteration"] for row in rows] == [2, 4]
    for row in rows:
        parts = [value for name, value in row.items() if name.startswith("loss_")]
        assert len(parts) == 4 and row["loss"] == pytest.approx(sum(parts), abs=1e-4)
    assert header["options"]["checkpoint_sha256"] == ""
    saved = torch.load(tmp_path / "out/detections.pth")
    assert len(saved["images"]) == 5 and saved["found"]["boxes"].shape[1] == 4 and saved["result"] == result
    again = run("eval_detection", words)
    assert json.loads(again.out.splitlines()[-1]) == result and "already finished" in again.out
    other = json.loads(run("eval_detection", [*words, "--test-list", "trainval"]).out.splitlines()[-1])
    assert (result["test_list"], other["test_list"], other["test_images"]) == (None, "trainval", 12)
    # What it wrote can be fine-tuned further; its checkpoint, whose names are others, says where the network is.
    more = tiny(folder, tmp_path / "more", "--arch", "resnet18", "--width", 4,
                network=str(tmp_path / "out/backbone.pth"))
    assert run("eval_detection", more).code == 0 and len((tmp_path / "out/eval.jsonl").read_text().splitlines()) == 4
    more[0] = str(tmp_path / "out/checkpoint.pth")
    one_line(run("eval_detection", more), "was written by eval_detection: take the backbone.pth beside it")


def killed_after(steps: int) -> None:
    """Kill the process, as by kill -9, after so many steps, the last two not saved."""
    after_step, count = common.Run.after_step, [0]

    def patched(self: common.Run, state: Any, epoch: int, step: int, loss: Tensor) -> None:
        after_step(self, state, epoch, step, loss)
        count[0] += 1
        if count[0] == steps - 2:
            self.save(state, epoch, step + 1)
        if count[0] == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    common.Run.after_step = patched  # type: ignore[method-assign]


def test_other_weights_are_no_option() -> None:
    """What was fine-tuned from other weights is refused as that: a checksum is nothing that a user could set."""
    saved = dict(options=dict(script="eval_detection", checkpoint_sha256="a"), data={})
    run: Any = Rank(0, 1)
    new = dict(script="eval_detection", checkpoint_sha256="b", checkpoint="net.pth", schedule="iterations")
    run.data, run.header = {}, dict(options=new)
    with pytest.raises(common.Fault, match=r"^done\.pth was trained from other weights than net\.pth has now: choose "):
        common.Run._check_resumable(run, saved, Path("done.pth"))


def test_overwrite_removes_the_old_detections(folder: Path, tmp_path: Path) -> None:
    """A run started anew that ends early leaves no boxes of the old one to be drawn."""
    words = tiny(folder, tmp_path / "out")
    assert run("eval_detection", words).code == 0 and (tmp_path / "out/detections.pth").exists()
    assert run("eval_detection", [*words, "--overwrite"], functools.partial(killed_after, 3)).code == -9
    assert not (tmp_path / "out/detections.pth").exists()


def plain_log(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds_per_iteration"} for row in log(output)]


def test_resume_is_exact(folder: Path, tmp_path: Path) -> None:
    """A run killed after 7 of 8 steps, its last checkpoint two steps old, ends with the bits of one that was not."""
    more = ["--iterations", 8, "--lr", 0.02, "--log-every", 3]
    assert run("eval_detection", tiny(folder, tmp_path / "whole", *more)).code == 0
    words = tiny(folder, tmp_path / "parts", *more)
    assert run("eval_detection", words, functools.partial(killed_after, 7)).code == -9
    assert run("eval_detection", words).code == 0
    same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    same(torch.load(tmp_path / "whole/backbone.pth"), torch.load(tmp_path / "parts/backbone.pth"))
    whole, parts = plain_log(tmp_path / "whole"), plain_log(tmp_path / "parts")
    assert whole == parts
    results = [json.loads((tmp_path / name / "eval.jsonl").read_text()) for name in ("whole", "parts")]
    assert results[0] == results[1]
    one_line(run("eval_detection", [*words, "--rois", "9"]), "--rois 8 -> 9")


def signalled(script: str, name: str) -> None:
    """SIGTERM as soon as the function `name` of a script is called."""
    module = importlib.import_module(script)
    original = getattr(module, name)

    def patched(*args: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **more)

    setattr(module, name, patched)


@pytest.mark.parametrize("where, done", [("precise_statistics", (0, 4)), ("detect", (1, 0))])
def test_signal_after_the_last_step(where: str, done: tuple[int, int], folder: Path, tmp_path: Path) -> None:
    """SIGTERM while batch statistics are taken anew, or in the final test, ends the run there, its checkpoint kept; the
    same command goes on to the result of an undisturbed run, and statistics that it has are not taken again."""
    assert run("eval_detection", tiny(folder, tmp_path / "whole")).code == 0
    words = tiny(folder, tmp_path / "parts")
    stopped = run("eval_detection", words, functools.partial(signalled, "eval_detection", where))
    assert stopped.code == 128 + signal.SIGTERM and '"ap50' not in stopped.out
    words_of_stop = f"stopped after {done[0]} epochs and {done[1]} steps; the same command continues"
    assert stopped.err.splitlines()[-1] == words_of_stop
    saved = checkpoint(tmp_path / "parts")
    assert (saved["epoch"], saved["step"]) == done
    again = run("eval_detection", words)
    assert again.code == 0 and ("already finished" if done == (1, 0) else "resumed") in again.out
    same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert (tmp_path / "whole/eval.jsonl").read_text() == (tmp_path / "parts/eval.jsonl").read_text()


def slow_with_few_files(script: str) -> None:
    """The first worker takes its time at first, and this process may open 40 files more."""
    module, begun = importlib.import_module(script), list[None]()
    original = module.Decoder.__getitem__

    def slow(self: Any, sample: Any) -> Any:
        worker = torch.utils.data.get_worker_info()
        if worker and worker.id == 0 and not begun:
            begun.append(None)
            time.sleep(3)
        return original(self, sample)

    module.Decoder.__getitem__ = slow
    most = len(list(Path("/proc/self/fd").iterdir())) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def test_images_that_wait_keep_few_files_open(folder: Path, tmp_path: Path) -> None:
    """While a worker is slow the others' batches wait for it: each is a tensor, that is a file, not one an image."""
    words = tiny(folder, tmp_path / "out", "--batch-size", 32, "--lr", 0.001, "--workers", 2)
    process = run("eval_detection", words, functools.partial(slow_with_few_files, "eval_detection"))
    assert process.code == 0, process.err


def rank_of(world: int, rank: int, port: int) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def test_two_ranks(folder: Path, tmp_path: Path) -> None:
    """Two ranks train on the batch together and share the test images; one result, of all of them."""
    port = free_port()
    ranks = [start("eval_detection", tiny(folder, tmp_path / "out"), functools.partial(rank_of, 2, rank, port))
             for rank in range(2)]
    for process in ranks:
        assert process.wait().code == 0, process.err
    assert "protocol" not in ranks[1].out
    result = json.loads(ranks[0].out.splitlines()[-1])
    assert result["test_images"] == 5 and len((tmp_path / "out/eval.jsonl").read_text().splitlines()) == 1
    assert len(torch.load(tmp_path / "out/detections.pth")["images"]) == 5


def test_detections_do_not_depend_on_ranks(folder: Path) -> None:
    """Shares of 5 images over 2 ranks, the last padded, are put together in the order of the set."""
    args = options(workers=0, min_score=0.0)
    data = common.load_voc(argparse.Namespace(data=str(folder), subset=None, test_subset=None), "test")
    torch.manual_seed(0)
    model = eval_detection.Detector(common.backbone("resnet18", 4, True), 10, args)
    parts: list[Tensor] = []

    class Share(Rank):
        def gather(self, tensor: Tensor) -> tuple[Tensor]:
            parts.append(tensor)  # rank 0's turn comes first
            return (torch.cat(parts),)

    data.mean, data.std = common.DATASETS["shapes"][1:]
    alone = eval_detection.detect(model, data, None, args, Share(0, 1))  # type: ignore[arg-type]
    parts.clear()
    eval_detection.detect(model, data, None, args, Share(0, 2))  # type: ignore[arg-type]
    both = eval_detection.detect(model, data, None, args, Share(1, 2))  # type: ignore[arg-type]
    assert len(alone.scores) > 50 and all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def test_boxes_are_those_of_the_image(folder: Path, tmp_path: Path) -> None:
    """A box in the scaled image, wider than high, comes back in px of the image on the disk, its label from 0."""
    data = common.load_voc(argparse.Namespace(data=str(folder), subset=None, test_subset=None), "test")
    Image.new("RGB", (150, 91)).save(tmp_path / "a.png")
    data.images = [data.images[1], data.images[0]._replace(path=tmp_path / "a.png", size=(150, 91))]
    seen = list[tuple[int, int]]()

    class Network(nn.Module):
        def forward(self, batch: eval_detection.Batch) -> Any:
            seen.extend(batch.sizes)
            ((height, width),) = batch.sizes
            boxes = torch.tensor([[0, 0, width, height], [width / 2, height / 3, width, height]])
            return [dict(boxes=boxes, labels=torch.tensor([1, 7]), scores=torch.tensor([0.9, 0.0]))], {}

    run: Any = Rank(0, 1)
    run.share = torch.arange
    model: Any = Network()
    found = eval_detection.detect(model, data, None, options(workers=0, test_size=60), run)
    assert seen == [(60, 60), (60, 99)]
    assert found.image.tolist() == [0, 0, 1, 1] and found.labels.tolist() == [0, 6] * 2
    torch.testing.assert_close(found.boxes, torch.tensor([[0, 0, 96, 96], [48, 32, 96, 96.0],
                                                          [0, 0, 150, 91], [75, 91 / 3, 150, 91]]))
    assert found.scores.tolist() == pytest.approx([0.9, 0] * 2)


# the picture


def test_picture_of_a_network_that_has_changed(tmp_path: Path) -> None:
    """By the folder of a network there is no picture of what was found before the network was trained on."""
    place = tmp_path / "detection-shapes-seed0" / "detections.pth"
    place.parent.mkdir()
    (tmp_path / "checkpoint.pth").write_bytes(b"first")
    result = dict(checkpoint="runs/n/checkpoint.pth", checkpoint_sha256=hashlib.sha256(b"first").hexdigest())
    torch.save(dict(found={}, truth={}, classes=[], images=[], git="", result=result), place)
    assert figures.read_detections(str(tmp_path))["result"] == result
    (tmp_path / "checkpoint.pth").write_bytes(b"later")
    with pytest.raises(common.Fault, match=r"has changed since .*: run eval_detection.py again, with --overwrite"):
        figures.read_detections(str(tmp_path))
    assert figures.read_detections(str(place.parent))["result"] == result


def test_picture(folder: Path, tmp_path: Path) -> None:
    """`figures.py detections` draws boxes and curves of one run, of two or of the same one twice, also from the folder
    of the network; the mean of a curve at 11 recalls is the AP of the result."""
    output = tmp_path / "net" / "detection-shapes-seed0"
    assert run("eval_detection", tiny(folder, output, "--min-score", 0, "--iterations", 12)).code == 0
    saved = figures.read_detections(str(output))
    curves = figures.class_curves(saved)
    expected = list(saved["result"]["ap50_voc07_by_class"].values())
    assert curves[:, ::10].mean(1).tolist() == pytest.approx(expected, abs=0.006) and max(expected) > 0
    assert figures.read_detections(str(output.parent))["result"] == saved["result"]
    out = tmp_path / "a.png"
    for runs in ([output.parent], [output, output / "detections.pth"], [output, output]):
        process = run("figures", ["detections", *runs, "--images", "5", "--out", out])
        assert process.code == 0 and process.out == f"{out}\n", process.err
        with Image.open(out) as image:
            assert image.width > 500 and len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
        assert out.stat().st_size < 200_000
        out.unlink()
    one_line(run("figures", ["detections", tmp_path, "--out", out]), "cannot read", "eval_detection.py")
    (tmp_path / "detections.pth").write_bytes(b"no")
    one_line(run("figures", ["detections", tmp_path, "--out", out]), "holds no detections")
    content = torch.load(output / "detections.pth") | dict(images=["nowhere.jpg"] * 5)
    torch.save(content, tmp_path / "detections.pth")
    one_line(run("figures", ["detections", tmp_path, "--out", out]), "cannot read the image", "nowhere.jpg")
    assert not out.exists()


# faults


def test_faults(folder: Path, tmp_path: Path) -> None:
    """Bad input is one line that names it."""

    def fails(*words: str, more: list[object], network: str = "random") -> None:
        one_line(run("eval_detection", tiny(folder, tmp_path / "out", *more, network=network)), *words)

    fails("has 12 images here", more=["--subset", 100])
    fails("cannot read", "none.pth", more=[], network=str(tmp_path / "none.pth"))
    fails("--freeze 5", "4 stages", more=["--freeze", 5])
    fails("must divide", more=["--accumulate", 3])
    fails("voc07-fast-vgg16 is Fast R-CNN", "--proposals", more=["--preset", "voc07-fast-vgg16"])
    (tmp_path / "boxes.txt").write_text("test_00000 1 2 3 4\n")
    fails("no proposals for trainval_00000", "boxes.txt", more=["--proposals", tmp_path / "boxes.txt"])
    (tmp_path / "boxes.txt").write_text("test_00000 1 2 3\n")
    fails("boxes.txt is no file of proposals", more=["--proposals", tmp_path / "boxes.txt"])
    fails("the loss is not finite", "lower --lr", more=["--lr", 1e12, "--warmup", 0])


def test_data_faults(folder: Path, tmp_path: Path) -> None:
    """A truncated image, a class that training does not have, and sets without boxes are named."""
    def changed(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    root = changed("truncated")
    image = root / "JPEGImages/trainval_00003.jpg"
    image.write_bytes(image.read_bytes()[:700])
    one_line(run("eval_detection", tiny(root, tmp_path / "a")), "cannot read the image", "trainval_00003.jpg")
    root = changed("class")
    annotation = root / "Annotations/test_00001.xml"
    text = annotation.read_text()
    annotation.write_text(text.replace("<name>class", "<name>dog"))
    one_line(run("eval_detection", tiny(root, tmp_path / "b")), "test_00001.jpg has an object of the class dog")
    root = changed("empty")
    for annotation in (root / "Annotations").glob("trainval*"):
        annotation.write_text("<annotation></annotation>")
    one_line(run("eval_detection", tiny(root, tmp_path / "c")), "12 training images", "have no boxes")
    for name in "abc":
        assert not (tmp_path / name / "checkpoint.pth").exists()


@pytest.mark.gpu
def test_gpu(folder: Path, tmp_path: Path) -> None:
    """The same run in bfloat16 on a GPU."""
    words = tiny(folder, tmp_path / "out", "--amp")
    words[words.index("cpu")] = "cuda"
    process = run("eval_detection", words)
    assert process.code == 0, process.err
    assert 0 <= json.loads(process.out.splitlines()[-1])["ap50_voc07"] <= 100


@pytest.mark.slow
def test_bfloat16(folder: Path, tmp_path: Path) -> None:
    """Autocast leaves boxes and scores in float32, and the losses of the first two steps to a few percent."""
    losses = []
    for amp in ("--amp", "--no-amp"):
        words = [word for word in tiny(folder, tmp_path / amp, "--log-every", 1) if word != "--no-amp"]
        words[words.index("--width") + 1] = "16"
        assert run("eval_detection", [*words, amp]).code == 0
        losses.append([row["loss"] for row in log(tmp_path / amp)[1:]])
        assert torch.load(tmp_path / amp / "detections.pth")["found"]["boxes"].dtype == torch.float32
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=0.05) and losses[0] != losses[1]


def test_scores_and_boxes_keep_their_bits() -> None:
    """Under autocast the layers that score and place boxes compute in float32: their output has more than 8 bits."""
    predictor = eval_detection.Predictor(16, 20)
    with torch.autocast("cpu", torch.bfloat16):
        (scores,), (offsets,) = eval_detection.ProposalHead(16, 9)([torch.randn(1, 16, 8, 8)])
        outputs = [scores, offsets, *predictor(torch.randn(50, 16).bfloat16())]
    for output in outputs:
        assert output.dtype == torch.float32
        assert float((output == output.bfloat16().float()).float().mean()) < 0.1
