"""Claims about exact neighbours and the weighted kNN."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, one_line, run
from PIL import Image
from torch import Tensor

import common
import deepcluster
import eval_knn


def unit(rows: int, dim: int, seed: int, device: str = "cpu") -> Tensor:
    """Random directions."""
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1).to(
        device
    )


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (17, 17), (1000, 5), (4999, 200), (513, 512)])
def test_neighbors_are_the_largest_products(rows: int, k: int, device: str) -> None:
    """The k best of a full sort in float64, best first, for N that no strip divides."""
    queries, keys = unit(23, 32, 0, device), unit(rows, 32, 1, device)
    similarity, index = common.neighbors(queries, keys, k)
    exact = queries.double() @ keys.double().T
    expected = exact.sort(1, descending=True).values[:, :k]
    assert index.dtype == torch.int64 and index.shape == similarity.shape == (23, k)
    torch.testing.assert_close(similarity.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(exact.gather(1, index), expected, atol=1e-6, rtol=0)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(4096, 32), (4097, 5), (12_345, 60), (30_000, 200)])
def test_screened_neighbors_equal_all_products(rows: int, k: int, excluded: bool, monkeypatch: Any) -> None:
    """With and without the screen in 8 bits the same neighbours are found, best first."""
    keys = unit(rows, 32, 1)
    queries, exclude = (keys[:140], torch.arange(140)) if excluded else (unit(140, 32, 0), None)
    found = {}
    for screened in (False, True):
        monkeypatch.setattr(common, "HAS_INT8", screened)
        found[screened] = common.neighbors(queries, keys, k, exclude=exclude)
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-6, rtol=0)
    assert float((found[True][1] == found[False][1]).float().mean()) > 0.999
    assert torch.equal(found[True][1].sort(1).values, found[False][1].sort(1).values)


def test_screened_neighbors_of_many_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where thousands of keys are equal the screen rules out too few and all products decide."""
    monkeypatch.setattr(common, "HAS_INT8", hasattr(torch, "_int_mm"))
    keys = unit(2, 16, 0).repeat(3000, 1)
    similarity, index = common.neighbors(keys[:5], keys, 40)
    torch.testing.assert_close(similarity, torch.ones(5, 40))
    assert all(len(set(row)) == 40 for row in index.tolist())
    assert torch.equal(index % 2, (torch.arange(5) % 2)[:, None].expand(5, 40))
    keys[:5] *= 1.001  # each is then among its own nearest
    itself = torch.arange(5)
    assert not (common.neighbors(keys[:5], keys, 40, exclude=itself)[1] == itself[:, None]).any()


@pytest.mark.parametrize(("count", "side", "ink"), [(300, 32, -0.6), (140, 224, -1.0)])
def test_neighbors_by_pixels(count: int, side: int, ink: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of raw pixels, too, none is nearer than those found: of pages, in whose flat areas errors of rounding add up, and
    of images so large that products in 8 bits overflow."""
    monkeypatch.setattr(common, "HAS_INT8", True)
    source, pages = torch.Generator().manual_seed(0), torch.ones(count, 3, side, side)
    for page in pages:
        top, left, height, width = torch.randint(side // 2, (4,), generator=source).tolist()
        page[:, top : top + height + 1, left : left + width + 1] = ink
    keys = F.normalize(pages.flatten(1), dim=1)
    itself = torch.arange(20)
    similarity, index = common.neighbors(keys[:20], keys, 1, exclude=itself)
    exact = (keys[:20] @ keys.T).scatter(1, itself[:, None], -1)
    torch.testing.assert_close(similarity[:, 0], exact.amax(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(exact.gather(1, index), similarity, atol=1e-4, rtol=0)


def test_neighbors_of_one_column() -> None:
    """Features of one number have neighbours too, where a screen in 8 bits of one column is garbage (PyTorch 2.11)."""
    keys = torch.randn(4096, 1, generator=torch.Generator().manual_seed(0))
    similarity, index = common.neighbors(torch.ones(3, 1), keys, 8)
    expected = keys[:, 0].topk(8)
    assert torch.equal(similarity, expected.values.expand(3, -1)) and torch.equal(index, expected.indices.expand(3, -1))


def test_neighbors_in_any_order(device: str) -> None:
    """Without an order the same neighbours are found, each with its own similarity."""
    queries, keys = unit(23, 32, 0, device), unit(4999, 32, 1, device)
    expected, best = common.neighbors(queries, keys, 200)
    similarity, index = common.neighbors(queries, keys, 200, best_first=False)
    torch.testing.assert_close(similarity.sort(1, descending=True).values, expected)
    assert torch.equal(index.sort(1).values, best.sort(1).values)
    torch.testing.assert_close((queries @ keys.T).gather(1, index), similarity, atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [1, 5, 200, 501, 600, 1002, 1003])
def test_selection_by_strips_equals_a_whole_one(k: int) -> None:
    """The selection of GPUs finds the k largest too, of 1,003 columns that no strip divides, each once."""
    scores = torch.randn(7, 1003, generator=torch.Generator().manual_seed(0))
    for select in (common._largest_by_strips, common._largest):
        places = select(scores, k).sort(1).values
        assert torch.equal(places, scores.topk(k).indices.sort(1).values)


@pytest.mark.parametrize("private", [False, True])
def test_products_are_in_float32(private: bool, monkeypatch: Any) -> None:
    """By oneDNN's operator or without it, under autocast too: rows @ keys^T + offset, as float64 has it."""
    if private and common.LINEAR_FOR_CPU is None:
        pytest.skip("this PyTorch has no such operator")
    if not private:
        monkeypatch.setattr(common, "LINEAR_FOR_CPU", None)
    rows, keys, offset = unit(33, 40, 0), unit(101, 40, 1), unit(1, 101, 2)[0]
    with torch.autocast("cpu", torch.bfloat16):
        plain, shifted = common.products(rows, keys), common.products(rows, keys, offset)
    exact = rows.double() @ keys.double().T
    torch.testing.assert_close(plain.double(), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(shifted.double(), exact + offset, atol=1e-6, rtol=0)


def test_neighbors_do_not_depend_on_the_chunk() -> None:
    """Queries searched one by one find what they find together."""
    queries, keys = unit(40, 16, 0), unit(3000, 16, 1)
    together = common.neighbors(queries, keys, 50)
    single = [common.neighbors(query[None], keys, 50) for query in queries]
    torch.testing.assert_close(
        together[0], torch.cat([similarity for similarity, _ in single]), atol=1e-6, rtol=0
    )
    assert (together[1] == torch.cat([index for _, index in single])).float().mean() > 0.999


def test_exclude_leaves_out_the_row_itself(device: str) -> None:
    """Exclusion is by row number, so that a duplicate of the query is still found."""
    keys = unit(300, 8, 0, device)
    keys[1::2] = keys[::2]  # every row twice
    own = torch.arange(300, device=device)
    similarity, index = common.neighbors(keys, keys, 299, exclude=own)
    assert not (index == own[:, None]).any()
    assert torch.equal(index[:, 0], own ^ 1) and float(similarity[:, 0].min()) > 1 - 1e-5
    assert all(len(set(row)) == 299 for row in index.tolist())


def test_too_many_neighbors_is_a_fault() -> None:
    """More neighbours than candidates are refused in one line."""
    x = unit(10, 4, 0)
    for k, exclude in ((11, None), (10, torch.arange(10)), (0, None)):
        with pytest.raises(common.Fault, match="candidates"):
            common.neighbors(x, x, k, exclude=exclude)


def naive(
    queries: Tensor, truth: Tensor, train: Tensor, labels: Tensor, k: int, temperature: float
) -> tuple[float, float]:
    """Weighted kNN by loops over queries and neighbours in float64, section 3.4 word by word."""
    hits = [0, 0]
    for query, own in zip(queries.double(), truth.tolist(), strict=True):
        similarity = (train.double() @ query).tolist()
        score: dict[int, float] = defaultdict(float)
        for i in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            score[int(labels[i])] += math.exp(similarity[i] / temperature)
        ranked = sorted(score, key=lambda name: -score[name])
        hits[0] += own in ranked[:1]
        hits[1] += own in ranked[:5]
    return 100 * hits[0] / len(queries), 100 * hits[1] / len(queries)


def test_knn_equals_naive_loop(device: str) -> None:
    """Top-1 and top-5 for every K and tau equal a naive loop, all from one search."""
    centres = unit(12, 16, 0)
    truth, labels = torch.arange(12).repeat(5), torch.arange(12).repeat(40)
    queries = F.normalize(
        centres[truth] + 0.4 * torch.randn(60, 16, generator=torch.Generator().manual_seed(1)), dim=1
    )
    train = F.normalize(
        centres[labels] + 0.4 * torch.randn(480, 16, generator=torch.Generator().manual_seed(2)), dim=1
    )
    ks, temperatures = (1, 20, 200), (0.07, 0.5)
    data = [tensor.to(device) for tensor in (queries, truth, train, labels)]
    found = common.knn_accuracy(*data, 12, num_neighbors=ks, temperatures=temperatures)
    assert set(found) == {(k, temperature) for k in ks for temperature in temperatures}
    for (k, temperature), (top1, top5) in found.items():
        expected = naive(queries, truth, train, labels, k, temperature)
        # The loop ranks only the classes among the neighbours; for K >= 20 those fill the top five.
        assert top1 == pytest.approx(expected[0])
        if k >= 20:
            assert top5 == pytest.approx(expected[1])


@pytest.mark.parametrize("labelled", [30, 250])
def test_the_monitor_has_200_neighbours(labelled: int) -> None:
    """The monitor's K is 200, or all images with a class if they are fewer; images without one do not vote."""
    labels = torch.arange(300) % 7
    labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))[labelled:]] = -1
    truth, (features, queries), known = torch.arange(100) % 7, (unit(300, 4, 0), unit(100, 4, 1)), labels >= 0
    train, test = (SimpleNamespace(labels=part, classes=["a"] * 7) for part in (labels, truth))
    expected = naive(queries, truth, features[known], labels[known], min(200, labelled), 0.5)
    assert common.knn_monitor(features, train, queries, test, 0.5) == dict(knn_top1=pytest.approx(expected[0]))


def test_every_row_retrieves_itself(device: str) -> None:
    """With the training set as queries and K = 1 the accuracy is 100 %."""
    x, labels = unit(500, 32, 0, device), torch.randint(10, (500,), device=device)
    assert common.knn_accuracy(x, labels, x, labels, 10, num_neighbors=(1,))[1, 0.07][0] == 100


def test_ties_go_to_the_lower_class(device: str) -> None:
    """Equal class scores are ranked by class number, whatever the order of the neighbours."""
    train = torch.ones(4, 2, device=device) / math.sqrt(2)
    query = train[:1]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        labels = torch.tensor(order, device=device)
        hits = [
            common.knn_accuracy(
                query, torch.tensor([c], device=device), train, labels, 4, num_neighbors=(4,)
            )[4, 0.07]
            for c in range(4)
        ]
        assert [top1 for top1, _ in hits] == [100, 0, 0, 0]


def test_sharp_weights_do_not_overflow() -> None:
    """exp(1/0.001) has no float; relative to the best neighbour every weight is finite."""
    similarity = torch.tensor([[1.0, 0.9, -1.0]])
    scores = common.knn_scores(similarity, torch.tensor([[2, 0, 1]]), 3, 0.001)
    assert scores.argmax() == 2 and (scores >= 0).all()


def test_low_temperatures() -> None:
    """At tau = 0.01 and below weights of 40 neighbours span more than float32 holds; accuracies are of float64."""
    source = torch.Generator().manual_seed(0)
    train, queries = (F.normalize(torch.randn(count, 4, generator=source), dim=1) for count in (200, 60))
    labels, truth = (torch.randint(3, (count,), generator=source) for count in (200, 60))
    for tau in (0.0005, 0.002, 0.01):
        found = common.knn_accuracy(queries, truth, train, labels, 3, num_neighbors=[40], temperatures=[tau])
        similarity, index = (queries.double() @ train.double().T).topk(40)
        weights = (similarity / tau).softmax(1)[..., None] * F.one_hot(labels[index])
        right = (weights.sum(1).argmax(1) == truth).double().mean()
        assert found[40, tau][0] == pytest.approx(100 * float(right))


def test_scores_of_many_neighbours_do_not_overflow() -> None:
    """Of 40,000 neighbours at the same similarity the class with most of them wins."""
    labels = (torch.arange(40_000) < 5).long()[None]
    scores = common.knn_scores(torch.ones(1, 40_000), labels, 2, 0.07)
    assert scores.argmax() == 0 and float(scores[0, 0] / scores[0, 1]) == pytest.approx(39_995 / 5)


def test_class_scores_are_sums_of_weights() -> None:
    """The score of a class over that of another is the ratio of the sums of exp(s/tau)."""
    similarity, labels = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.tensor([[0, 1, 1, 2]])
    scores = common.knn_scores(similarity, labels, 4, 0.1).double()[0]
    weights = (similarity.double() / 0.1).exp()[0]
    expected = torch.stack([weights[0], weights[1:3].sum(), weights[3], weights[0] * 0])
    torch.testing.assert_close(scores / scores.sum(), expected / expected.sum(), atol=1e-6, rtol=0)


def test_ratio_edge_intra_class() -> None:
    """Of the edges that leave a class's images, the share that ends in the class, against a loop over edges."""
    source = torch.Generator().manual_seed(0)
    nearest, labels = torch.randint(60, (60, 10), generator=source), torch.randint(5, (60,), generator=source)
    labels[labels == 3] = 2
    found = common.ratio_edge_intra_class(nearest, labels)
    for label in range(5):
        edges = [(i, int(j)) for i in range(60) for j in nearest[i] if labels[i] == label]
        inside = sum(int(labels[j]) == label for _, j in edges)
        assert math.isnan(found[label]) if label == 3 else float(found[label]) == pytest.approx(inside / len(edges))


def test_ratio_edge_is_that_of_deepcluster(device: str) -> None:
    """The ratio edge intra-class that --retrieval adds is the one in DeepCluster's log, on classes of any size."""
    features = unit(90, 6, 0, device)
    labels = torch.cat([torch.full((60,), 0), torch.full((20,), 3), torch.full((10,), 4)]).to(device)
    found = eval_knn.ratio_edge(features, labels)["ratio_edge"]
    expected = deepcluster.label_figures(features, labels.cpu(), labels.cpu())["ratio_edge"]
    assert found == pytest.approx(expected, abs=0.011) and 20 < found < 50


def test_retrieval_is_counted_one_by_one(device: str) -> None:
    """Of every query the share of its nearest one and ten images that have its class; of few of all there are."""
    queries, features = unit(40, 4, 0, device), unit(90, 4, 1, device)
    query_labels, labels = (torch.arange(len(rows), device=device) % 3 for rows in (queries, features))
    for known in (90, 7):
        found = eval_knn.retrieval(queries, query_labels, features[:known], labels[:known])
        shares = [list[float](), list[float]()]
        for query, label in zip(queries, query_labels, strict=True):
            order = (features[:known] @ query).argsort(descending=True).tolist()
            for share, count in zip(shares, (1, 10), strict=True):
                near = order[:count]
                share.append(100 * sum(int(labels[i]) == int(label) for i in near) / len(near))
        expected = [sum(share) / len(share) for share in shares]
        assert [found["precision_at_1"], found["precision_at_10"]] == pytest.approx(expected, abs=0.006)


def test_nmi_and_ami(monkeypatch: pytest.MonkeyPatch) -> None:
    """NMI is mutual information over the mean entropy; AMI takes from both what shuffled clusters have."""
    source = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (60,), generator=source)
    clusters = 4 * labels + torch.randint(4, (60,), generator=source)  # so the entropies differ
    monkeypatch.setattr(common, "kmeans", lambda *rest, **more: argparse.Namespace(labels=clusters))

    def entropy(values: Tensor) -> float:
        share = values.unique(return_counts=True)[1].double() / len(values)
        return float(-(share * share.log()).sum())

    def information(shown: Tensor) -> float:
        return entropy(labels) + entropy(shown) - entropy(10 * labels + shown)

    mean = (entropy(labels) + entropy(clusters)) / 2
    chance = sum(information(clusters[torch.randperm(60, generator=source)]) for _ in range(2000)) / 2000
    found = eval_knn.clustering(torch.zeros(60, 1), labels, 8, 0)
    assert found["nmi"] == pytest.approx(100 * information(clusters) / mean, abs=0.006)
    assert found["ami"] == pytest.approx(100 * (information(clusters) - chance) / (mean - chance), abs=0.3)


@pytest.mark.parametrize(("words", "expected"), [
    (["--num-clusters", "7", "--seed", "3"], (20, 7, 3)), ([], (20, 10, 0)),
])
def test_clusters_that_are_asked_for(
    words: list[str], expected: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """k-means of --clustering sees the test features and makes --num-clusters by --seed: ten for ten classes."""
    seen, kmeans = list[tuple[int, int, int]](), common.kmeans

    def record(x: Tensor, k: int, seed: int) -> common.KMeans:
        seen.append((len(x), k, seed))
        torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))
        return kmeans(x, k, seed=seed)

    monkeypatch.setattr(common, "kmeans", record)
    few = ["--subset", "30", "--test-subset", "20", "--k", "3", "--device", "cpu"]
    eval_knn.main(eval_knn.parse_args(["pixels", "--clustering", *few, *words]))
    assert seen == [expected]


@pytest.mark.parametrize("k", [2, 4, 6])
def test_cluster_accuracy(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most images that any one-to-one assignment of clusters to classes has right; fewer clusters, and more."""
    source = torch.Generator().manual_seed(k)
    labels, clusters = torch.randint(4, (50,), generator=source), torch.randint(k, (50,), generator=source)
    monkeypatch.setattr(common, "kmeans", lambda *rest, **more: argparse.Namespace(labels=clusters))
    found = eval_knn.clustering(torch.zeros(50, 1), labels, k, 0)["cluster_accuracy"]
    names = itertools.permutations([0, 1, 2, 3, -1, -1], k)  # -1: a cluster without a class
    best = max((torch.tensor(name)[clusters] == labels).double().mean().item() for name in names)
    assert found == pytest.approx(100 * best)


def test_features_are_those_that_are_asked_for(tmp_path: Path) -> None:
    """--layer backbone takes the backbone's output of an untrained network too, and no bank, which has the head's; a
    bank of images of another size is refused with what differs."""
    few = ["--subset", "20", "--test-subset", "10", "--k", "3", "--device", "cpu"]
    for layer, dim in (("auto", 128), ("head", 128), ("backbone", 32)):
        found = run("eval_knn", ["random", "--width", "4", "--layer", layer, *few])
        result = json.loads(found.out.splitlines()[-1])
        assert result["feature_dim"] == dim and result["layer"] == ("head" if dim == 128 else "backbone"), found.err
        assert (result["arch"], result["image_size"]) == ("resnet18", 32)
    pixels = json.loads(run("eval_knn", ["pixels", *few]).out.splitlines()[-1])
    assert (pixels["layer"], pixels["arch"], pixels["image_size"]) == (None, None, 32)
    assert run("npid", [*TINY, "--epochs", "1", "--output", tmp_path]).code == 0
    bank = [tmp_path / "checkpoint.pth", "--train-features", "bank", "--k", "3", "--device", "cpu"]
    assert json.loads(run("eval_knn", bank).out.splitlines()[-1])["subset"] == 64  # the run's own
    found = run("eval_knn", [tmp_path / "checkpoint.pth", "--subset", "30", "--k", "3"])
    assert json.loads(found.out.splitlines()[-1])["train_images"] == 30  # not those of the run
    one_line(run("eval_knn", [*bank, "--layer", "backbone"]), "the memory bank has the head's output")
    one_line(run("eval_knn", [*bank, "--image-size", "32"]), "belongs to other images", "; size differ")
    saved = torch.load(tmp_path / "checkpoint.pth")
    encoder = saved["state"]["encoder"]
    saved["state"]["encoder"] = {name.replace("head.", "projector."): value for name, value in encoder.items()}
    torch.save(saved, tmp_path / "checkpoint.pth")
    one_line(run("eval_knn", bank), "has the output of a head that cannot be read", "--train-features clean")


def test_parts_of_a_run(tmp_path: Path) -> None:
    """What --file-list, --val-list and --imbalance left in a run is what evaluations see; with --data they see all."""
    for split, count in (("train", 20), ("val", 4)):
        names = [f"{split}/{c}/{split}{c}{i}.png" for c in "abc" for i in range(count)]
        for number, name in enumerate(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (4 * number, 0, 0)).save(tmp_path / name)
        (tmp_path / f"{split}.txt").write_text("".join(f"{name} 0\n" for name in names if name[-5] in "0123"))
    lists = ["--file-list", tmp_path / "train.txt", "--val-list", tmp_path / "val.txt", "--imbalance", "4"]
    words = ["--data", tmp_path, "--epochs", "1", "--width", "4", "--batch-size", "8", "--device", "cpu"]
    found = run("npid", [*words, *lists, "--workers", "0", "--output", tmp_path / "run"])
    assert "images of each class: 8 4 2" in found.err
    few = [tmp_path / "run/checkpoint.pth", "--k", "3", "--device", "cpu", "--workers", "0"]
    for options, images in (([], 14), (["--train-features", "bank"], 14), (["--data", tmp_path], 60)):
        found = run("eval_knn", [*few, *options])
        assert json.loads(found.out.splitlines()[-1])["train_images"] == images, found.err
    probe = [tmp_path / "run/checkpoint.pth", "--epochs", "1", "--batch-size", "2", "--device", "cpu", "--workers", "0"]
    for options, images in (([], (14, 12)), (["--data", tmp_path], (60, 12)), (["--imbalance", "1"], (24, 12))):
        found = run("eval_linear", [*probe, *options])
        assert found.code == 0, found.err
        row = json.loads(found.out.splitlines()[-1])
        assert (row["train_images"], row["test_images"]) == images
    (tmp_path / "val.txt").write_text("val/a/vala0.png 0\n")
    assert json.loads(run("eval_knn", few).out.splitlines()[-1])["test_images"] == 1


def test_clusters_of_a_list_of_some_classes(tmp_path: Path) -> None:
    """--clustering makes as many clusters as the list has classes, not as the folder, of which more would part one."""
    for number in range(45):
        path = tmp_path / f"{'train' if number % 3 else 'val'}/{'abcde'[number % 5]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (50 * (number % 5) + number // 9, 0, 200 - 40 * (number % 5))).save(path)
    (tmp_path / "list.txt").write_text("a\nd\n")
    words = ["pixels", "--data", tmp_path, "--file-list", tmp_path / "list.txt", "--clustering", "--k", "1"]
    found = run("eval_knn", [*words, "--workers", "0", "--device", "cpu"])
    row = json.loads(found.out.splitlines()[-1])
    assert (row["cluster_accuracy"], row["knn_top1"], row["train_images"], row["test_images"]) == (100, 100, 12, 6)
    found = run("eval_knn", [*words, "--workers", "0", "--device", "cpu", "--num-clusters", "5"])
    assert json.loads(found.out.splitlines()[-1])["cluster_accuracy"] < 100


def test_all_training_images_may_vote(capsys: pytest.CaptureFixture[str]) -> None:
    """K may be as large as the training set, whose votes then differ in their weights alone; one more is a fault."""
    few = ["pixels", "--subset", "20", "--test-subset", "10", "--device", "cpu", "--k"]
    eval_knn.main(eval_knn.parse_args([*few, "20"]))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_neighbors"] == 20
    with pytest.raises(common.Fault, match="--k 21 is more than the 20 training images"):
        eval_knn.main(eval_knn.parse_args([*few, "21"]))


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a launcher each rank would compute all and write a line: that is refused."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(common.Fault, match="one process"):
        eval_knn.main(eval_knn.parse_args(["random", "--device", "cpu", "--subset", "20", "--test-subset", "10"]))


def test_the_bank_of_photographs_that_moved(tmp_path: Path) -> None:
    """The bank stands for the same images under another name."""
    for number in range(8):
        for split in ("train", "val"):
            (tmp_path / f"here/{split}/{number % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (120, 100), (30 * number, 0, 0)).save(tmp_path / f"here/{split}/{number % 2}/{number}.png")
    few = ["--data", tmp_path / "here", "--subset", "8", "--batch-size", "4", "--workers", "0"]
    assert run("npid", [*TINY, *few, "--epochs", "1", "--output", tmp_path / "out"]).code == 0
    (tmp_path / "here").rename(tmp_path / "there")
    words = ["--data", tmp_path / "there", "--train-features", "bank", "--k", "3", "--workers", "0", "--device", "cpu"]
    found = run("eval_knn", [tmp_path / "out/checkpoint.pth", *words])
    assert found.code == 0 and json.loads(found.out.splitlines()[-1])["data"] == "there", found.err
