"""CLD: groups and the cross-level loss against slow float64 references, hosts, resume, and data sets made for it."""

import copy
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, Step, images_of, one_line, record_steps, run
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import RandAugment

import cld
import common
from tools import crop_boxes

SMALL = ["--preset", "smoke", "--device", "cpu", "--subset", "64", "--batch-size", "16", "--knn-every", "0", "--no-amp"]


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random unit rows."""
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1).to(dtype)


def blobs(groups: int, rows: int, spread: float = 0.1, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Unit rows (1, groups * rows, dim) around so many random directions, mixed, and their groups."""
    truth = torch.arange(groups).repeat(rows)
    return F.normalize(unit(groups, dim)[truth] + spread * unit(groups * rows, dim, seed=1), dim=1)[None], truth


def half_sphere(rows: int, seed: int = 0) -> Tensor:
    """Random unit rows (2, rows, 8) on one side."""
    return F.normalize(unit(2, rows, 8, seed=seed) + torch.eye(8, dtype=torch.float64)[0], dim=2)


def agreement(labels: Tensor, truth: Tensor) -> float:
    """Share of rows in the majority class of their group."""
    right = [torch.bincount(truth[labels == group]).max() for group in labels.unique()]
    return float(sum(right)) / len(truth)


def slow_kmeans(z: Tensor, k: int, iterations: int, spherical: bool) -> tuple[list[int], list[Tensor | None]]:
    """Row by row as eq. (1) reads: assign, then average, so many times, from the first k rows of z (B, D)."""
    centroids: list[Tensor] = list(z[:k])
    members: list[list[int]] = []
    labels: list[int] = []
    for _ in range(iterations):
        labels = []
        for row in z:
            if spherical:
                costs = [float(1 - row @ u / (row.norm() * u.norm())) for u in centroids]
            else:
                costs = [float((row - u).square().sum()) for u in centroids]
            labels.append(costs.index(min(costs)))
        members = [[i for i, label in enumerate(labels) if label == j] for j in range(k)]
        centroids = [z[rows].mean(0) if rows else centroids[j] for j, rows in enumerate(members)]
    return labels, [centroids[j] if rows else None for j, rows in enumerate(members)]


def slow_loss(z: Tensor, groups: cld.Groups, temperature: float, cross_view: bool) -> tuple[float, float]:
    """The definition, one image at a time: classes are the groups that have a row. Loss, share of right groups."""
    total, right = 0.0, 0
    for view in (0, 1):
        other = 1 - view if cross_view else view
        for i, row in enumerate(z[view]):
            scores = [float(row @ u) / temperature for u in groups.centroids[other]]
            some = [s for s, alive in zip(scores, groups.alive[other], strict=True) if alive]
            own = scores[int(groups.labels[other, i])]
            total += math.log(sum(math.exp(s) for s in some)) - own
            right += own == max(some)
    return total / (2 * z.shape[1]), right / (2 * z.shape[1])


# ---- the eight properties --------------------------------------------------------------------------------------------


def test_as_many_groups_as_rows_is_contrast_across_views() -> None:
    """k = B: every row is its own group, and the loss InfoNCE between the views without negatives of the same view."""
    z = unit(2, 24, 16)
    for clustering in ("spherical", "euclidean"):
        groups = cld.group(z, 24, 5, clustering)
        assert torch.equal(groups.labels, torch.arange(24).expand(2, 24))
        loss, accuracy = cld.group_loss(z, groups, 0.2)
        logits, own = z[0] @ z[1].T / 0.2, torch.arange(24)
        expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        assert float(loss.mean()) == pytest.approx(float(expected), rel=1e-12)
        assert 0 <= float(accuracy) <= 1


def test_more_groups_than_rows_are_as_many_as_rows() -> None:
    """k = 120 of 64 rows, as in the authors' ImageNet runs, leaves no empty class."""
    groups = cld.group(unit(2, 64, 16), 120, 5)
    assert groups.alive.shape == (2, 64) and bool(groups.alive.all())


def test_one_group_costs_nothing() -> None:
    """k = 1: a single class, so the loss is 0."""
    z = unit(2, 24, 16)
    loss, accuracy = cld.group_loss(z, cld.group(z, 1, 5), 0.2)
    assert loss.abs().max() == 0 and float(accuracy) == 1


@pytest.mark.parametrize("cross_view", [True, False])
def test_views_are_alike(cross_view: bool) -> None:
    """Swapping the views leaves the loss unchanged."""
    z = unit(2, 32, 16)
    one = cld.group_loss(z, cld.group(z, 6, 5), 0.2, cross_view)[0]
    other = cld.group_loss(z.flip(0), cld.group(z.flip(0), 6, 5), 0.2, cross_view)[0]
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_each_of_three_views_meets_another() -> None:
    """A changed script's third view leaves none with its own groups."""
    z = unit(3, 32, 16)
    found = cld.group(z, 6, 5)
    pairs = [cld.group_loss(z[i : i + 1], cld.Groups(*(part[j : j + 1] for part in found)), 0.2, False)[0]
             for i, j in ((0, 2), (1, 0), (2, 1))]
    torch.testing.assert_close(cld.group_loss(z, found, 0.2)[0], torch.stack(pairs).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("clustering", ["spherical", "euclidean"])
def test_order_of_the_batch_is_indifferent(clustering: str) -> None:
    """With given first centroids, permuting the batch in both views alike permutes the losses."""
    z, start = unit(2, 32, 16), unit(2, 6, 16, seed=1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    one = cld.group_loss(z, cld.group(z, 6, 5, clustering, start), 0.2)[0]
    other = cld.group_loss(z[:, order], cld.group(z[:, order], 6, 5, clustering, start), 0.2)[0]
    torch.testing.assert_close(one[order], other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clustering", ["spherical", "euclidean", "spectral"])
def test_empty_groups_are_neither_targets_nor_classes(clustering: str) -> None:
    """Eight copies of four rows, k = 8: labels name groups with rows only, and the others add nothing to the loss."""
    z = unit(2, 4, 16).repeat(1, 8, 1)
    groups = cld.group(z, 8, 5, clustering)
    assert bool(groups.alive.gather(1, groups.labels).all())
    assert bool((groups.alive.sum(1) <= 4).all()) or clustering == "spectral"
    loss, _ = cld.group_loss(z, groups, 0.2)
    assert bool(loss.isfinite().all())
    assert float(loss.mean()) == pytest.approx(slow_loss(z, groups, 0.2, True)[0], rel=1e-12)


def test_normalised_head_is_a_cosine() -> None:
    """NormLinear: outputs lie in [-1, 1] and do not change when the input or the weights are scaled."""
    layer, h = cld.NormLinear(32, 8), 5 * torch.randn(16, 32)
    with torch.no_grad():
        out, scaled = layer(h), layer(7 * h)
        layer.direction *= 3
        assert float(out.abs().max()) <= 1 + 1e-6
        torch.testing.assert_close(out, scaled)
        torch.testing.assert_close(out, layer(h))


def test_normalised_heads_of_the_patches() -> None:
    """With a normalised head InfoMin's patches pass through cosines, too, and in the code's order: patch, then nine."""
    heads = {head: cld.Encoder("resnet18", 4, True, 8, head, False, "infomin").jigsaw for head in ("mlp", "norm-mlp")}
    h = torch.randn(18, 32)
    jigsaw = heads["norm-mlp"]
    assert jigsaw is not None and heads["mlp"] is not None and isinstance(heads["mlp"].join, torch.nn.Linear)
    patches = torch.stack([F.cosine_similarity(row, jigsaw.patch[2].direction) for row in jigsaw.patch[:2](h)])
    nine = patches.view(2, 72)
    expected = torch.stack([F.cosine_similarity(row, jigsaw.join.direction) for row in nine])
    torch.testing.assert_close(jigsaw(h), expected)


@pytest.mark.parametrize("head", ["linear", "norm-linear", "mlp", "norm-mlp", "bn-mlp"])
def test_where_the_cross_level_gradient_goes(head: str) -> None:
    """It reaches f_G of both views, the group head and the trunk, and not the instance head."""
    encoder = cld.Encoder("resnet18", 4, True, 16, head, groups=True)
    _, g, _ = encoder(torch.rand(2, 8, 3, 16, 16))
    g.retain_grad()
    cld.group_loss(g, cld.group(g, 3, 5), 0.2)[0].mean().backward()
    assert g.grad is not None and bool((g.grad.abs().sum((1, 2)) > 0).all())
    assert encoder.group_head is not None
    assert all(p.grad is not None and bool(p.grad.any()) for p in encoder.group_head.parameters() if p.ndim > 1)
    assert encoder.backbone.conv1.weight.grad is not None and bool(encoder.backbone.conv1.weight.grad.any())
    assert all(p.grad is None for p in encoder.head.parameters())


# ---- clustering and loss against references --------------------------------------------------------------------------


@pytest.mark.parametrize("k, iterations", [(1, 5), (6, 1), (6, 5), (20, 10)])
@pytest.mark.parametrize("spherical", [True, False])
def test_kmeans_equals_a_slow_one(k: int, iterations: int, spherical: bool) -> None:
    """Labels and centroids of both views, grouped at once, are those of k-means row by row; a group without rows keeps
    its centroid, and may get rows later."""
    z = F.normalize(unit(2, 40, 8) + 0.5 * unit(2, 1, 8, seed=1), dim=2)
    z[:, 1] = z[:, 0]  # two groups begin with the same row, and the second gets none
    groups = cld.group(z, k, iterations, "spherical" if spherical else "euclidean")
    for view in (0, 1):
        labels, centroids = slow_kmeans(z[view], k, iterations, spherical)
        assert groups.labels[view].tolist() == labels
        for j, centroid in enumerate(centroids):
            assert bool(groups.alive[view, j]) == (centroid is not None)
            if centroid is not None:
                expected = F.normalize(centroid, dim=0) if spherical else centroid
                torch.testing.assert_close(groups.centroids[view, j], expected, rtol=1e-12, atol=1e-12)


def test_kmeans_lowers_its_objective() -> None:
    """The sum of 1 - cosine, eq. (1), falls with every iteration."""
    z, costs = unit(1, 100, 8), []
    for iterations in range(1, 8):
        groups = cld.group(z, 10, iterations)
        own = groups.centroids.gather(1, groups.labels[..., None].expand_as(z))
        costs.append(float((1 - (z * own).sum(2)).sum()))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(costs))
    assert costs[-1] < costs[0]


def test_an_emptied_group_keeps_its_centroid() -> None:
    """A group that loses all its rows does not turn into the zero vector, which would attract rows later."""
    z = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
    start = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    assert cld.em_labels(z, 3, 5, start=start).tolist() == [[0, 0, 1]]
    assert cld.group(z, 3, 5, start=start).alive.tolist() == [[True, True, False]]
    angle = torch.tensor([0.0, 0.0, 0.0, 120.0, 60.0, 270.0]).deg2rad()  # the last two are the first centroids
    points = torch.stack([angle.cos(), angle.sin()], 1)[None]
    for spherical in (True, False):  # the row at 120 degrees ends at more than 90 from the mean of its group
        assert cld.em_labels(points[:, :4], 2, 5, spherical, points[:, 4:]).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("groups", [2, 5])
def test_spectral_clustering_finds_blobs(groups: int) -> None:
    """Blobs on the sphere are told apart, also by spectral clustering; the k largest eigenvectors do not."""
    z, truth = blobs(groups, 30)
    assert agreement(cld.group(z, groups, 10, "spectral").labels[0], truth) == 1
    affinity = (z[0] @ z[0].T).abs().fill_diagonal_(0)
    scale = affinity.sum(1).rsqrt()
    largest = F.normalize(torch.linalg.eigh(torch.eye(len(truth)) - scale[:, None] * affinity * scale)[1][:, -groups:])
    assert agreement(cld.em_labels(largest[None], groups, 10)[0], truth) < 0.9


def test_spectral_embedding_equals_its_definition() -> None:
    """L = D^-1/2 (D - W) D^-1/2 with W = |cosine| and no diagonal, entry by entry; unit rows of its k smallest
    eigenvectors, up to a rotation that they share."""
    z, k = blobs(3, 4, 0.8, 6)[0], 3
    w = np.array([[0.0 if i == j else abs(float(a @ b)) for j, b in enumerate(z[0])] for i, a in enumerate(z[0])])
    d = w.sum(1)
    values, vectors = torch.linalg.eigh(torch.from_numpy((np.diag(d) - w) / np.sqrt(np.outer(d, d))))
    assert float(values[k] - values[k - 1]) > 0.01
    rows = vectors[:, :k] / vectors[:, :k].square().sum(1, keepdim=True).sqrt()
    found = cld.spectral_embedding(z, k)[0]
    torch.testing.assert_close(found @ found.T, rows @ rows.T)


def test_spectral_clustering_is_spherical_in_its_embedding() -> None:
    """Labels after each number of iterations are those of cosines with the unit means of the embedding's rows."""
    z = F.normalize(torch.randn(2, 80, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    for view, rows in enumerate(cld.spectral_embedding(z, 12)):
        centroids, labels = rows[:12], torch.zeros(0)
        for iterations in range(1, 6):
            labels = (rows @ centroids.T).argmax(1)
            assert torch.equal(cld.group(z, 12, iterations, "spectral").labels[view], labels)
            centroids = torch.stack([F.normalize(rows[labels == g].sum(0), dim=0) if (labels == g).any() else old
                                     for g, old in enumerate(centroids)])


def test_spectral_clustering_finds_rings_at_two_latitudes() -> None:
    """Two rings around an axis of the sphere, one near the pole and one near the equator."""
    angle = torch.arange(60, dtype=torch.float64) * 2.4
    truth = torch.arange(60) % 2
    height = torch.where(truth == 0, 0.9, 0.05)
    ring = (1 - height.square()).sqrt()
    z = torch.stack([ring * angle.cos(), ring * angle.sin(), height], 1)[None]
    assert agreement(cld.group(z, 2, 20, "spectral").labels[0], truth) == 1


def test_spectral_clustering_survives_random_and_equal_rows() -> None:
    """No row is NaN, for random features, equal ones and orthogonal ones."""
    for z in (unit(1, 64, 128), unit(1, 1, 8).expand(1, 16, 8), torch.eye(8, dtype=torch.float64)[None]):
        assert bool(cld.spectral_embedding(z, 4).isfinite().all())


@pytest.mark.parametrize("clustering", ["spherical", "euclidean", "spectral"])
def test_features_that_are_not_finite_make_such_a_loss(clustering: str) -> None:
    """No clustering breaks down before the loss has shown that the network diverges."""
    z = unit(2, 16, 8)
    z[0, 3] = math.nan
    assert not bool(cld.group_loss(z, cld.group(z, 4, 5, clustering), 0.2)[0].mean().isfinite())


@pytest.mark.parametrize("clustering", ["spherical", "euclidean"])
@pytest.mark.parametrize("cross_view", [True, False])
def test_loss_equals_its_definition(clustering: str, cross_view: bool) -> None:
    """group_loss and its accuracy equal a loop over images in float64, also with an empty group."""
    z, start = half_sphere(30), half_sphere(7, seed=1)
    start[:, 3] *= -1
    groups = cld.group(z, 7, 4, clustering, start)
    assert not bool(groups.alive[:, 3].any())
    loss, accuracy = cld.group_loss(z, groups, 0.2, cross_view)
    assert loss.shape == (30,)
    expected, right = slow_loss(z, groups, 0.2, cross_view)
    assert float(loss.mean()) == pytest.approx(expected, rel=1e-12)
    assert float(accuracy) == pytest.approx(right) and 0.1 < right < (1 if cross_view else 1.01)


@pytest.mark.parametrize("clustering", ["spherical", "euclidean"])
def test_gradient_is_that_of_the_loss(clustering: str) -> None:
    """Finite differences, through the rows and through the centroids, whose groups stay."""

    def loss(z: Tensor) -> Tensor:
        return cld.group_loss(z, cld.group(z, 3, 5, clustering), 0.5)[0]

    assert torch.autograd.gradcheck(loss, blobs(3, 4, 0.3, 6)[0].repeat(2, 1, 1).requires_grad_())
    z = unit(2, 12, 6).requires_grad_()
    groups = cld.group(z, 3, 5, clustering)
    cld.group_loss(z.detach(), groups, 0.5)[0].sum().backward()
    assert z.grad is not None and bool(z.grad.any()), "centroids pass gradients on"


def test_group_figures() -> None:
    """Similarities in the log are means over rows and over pairs of groups that have rows."""
    z, start = half_sphere(30), half_sphere(7, seed=1)
    start[:, 3] *= -1
    groups = cld.group(z, 7, 4, start=start)
    figures = cld.group_figures(z, groups)
    intra, inter = [], []
    for view in (0, 1):
        u = groups.centroids[view][groups.alive[view]]
        intra += [float(z[view, i] @ groups.centroids[view, j]) for i, j in enumerate(groups.labels[view])]
        pairs = [float(u[i] @ u[j]) for i in range(len(u)) for j in range(len(u)) if i != j]
        inter.append(sum(pairs) / len(pairs))
    assert float(figures["groups_alive"]) == float(groups.alive.sum()) / 2
    assert float(figures["intra"]) == pytest.approx(sum(intra) / len(intra))
    assert float(figures["inter"]) == pytest.approx(sum(inter) / 2)


# ---- hosts -----------------------------------------------------------------------------------------------------------


def test_info_nce_equals_its_definition() -> None:
    """One positive against the queue, both views with the same key."""
    z, keys, queue = unit(2, 6, 8), unit(6, 8, seed=1), unit(10, 8, seed=2)
    losses, accuracy = cld.info_nce(z, keys, queue, 0.1)
    right = 0
    for view in (0, 1):
        for i in range(6):
            scores = torch.cat([(z[view, i] @ keys[i])[None], queue @ z[view, i]]) / 0.1
            assert float(losses[view, i]) == pytest.approx(float(-scores.log_softmax(0)[0]), rel=1e-12)
            right += int(scores.argmax() == 0)
    assert float(accuracy) == pytest.approx(right / 12)


def test_queue_forgets_the_oldest_first() -> None:
    """Pushes wrap around; rows and pointer are buffers, so that a checkpoint has both."""
    queue, keys = cld.Queue(10, 4, torch.Generator().manual_seed(0)), unit(16, 4, dtype=torch.float32)
    first = queue.features.clone()
    for part in keys.split(4):
        queue.push(part)
    assert int(queue.pointer) == 6 and set(queue.state_dict()) == {"features", "pointer"}
    assert not bool((queue.features == first).all(1).any())
    torch.testing.assert_close(queue.features[[6, 7, 8, 9, 0, 1, 2, 3, 4, 5]], keys[6:])


def test_bank_is_written_once_with_the_mean_of_the_views() -> None:
    """v <- normalize(0.5 v + 0.5 normalize(f + f')), after the step; the loss is that of the bank before it."""
    bank = common.MemoryBank(8, 4, torch.Generator().manual_seed(0))
    before, host = bank.features.clone(), cld.Npid(bank, 0.1, 0.5)
    z, index = unit(2, 3, 4, dtype=torch.float32), torch.tensor([5, 0, 3])
    losses, _, written = host.instance_loss(z, None, host.targets(z), index)
    assert torch.equal(bank.features, before)
    scores = z @ before.T / 0.1
    torch.testing.assert_close(losses, (scores.logsumexp(2) - scores[:, range(3), index]).mean(0))
    host.after_step(cld.Encoder("resnet18", 4, True, 4, "linear", False), written, 0.5)
    expected = before.clone()
    expected[index] = F.normalize(0.5 * before[index] + 0.5 * F.normalize(z.sum(0)))
    torch.testing.assert_close(bank.features, expected)


@pytest.mark.parametrize("host_name", ["moco", "byol"])
def test_key_encoder_follows_by_parameters_alone(host_name: str) -> None:
    """theta_k <- m theta_k + (1 - m) theta; batch statistics are the keys' own; no gradient, only f_I."""
    encoder = cld.Encoder("resnet18", 4, True, 16, "bn-mlp", groups=True, host=host_name)
    keys = cld.key_copy(encoder)
    assert keys.predictor is None and keys.group_head is None
    assert not any(p.requires_grad for p in keys.parameters())
    old = {name: p.clone() for name, p in keys.state_dict().items()}
    with torch.no_grad():
        for p in encoder.parameters():
            p += 1
    encoder(torch.rand(2, 4, 3, 16, 16))
    cld.follow(keys, encoder, 0.9)
    names = {name for name, _ in keys.named_parameters()}
    for name, value in keys.state_dict().items():
        torch.testing.assert_close(value, old[name] + 0.1 if name in names else old[name])


def test_byol_momentum_and_loss() -> None:
    """The target's momentum goes to 1 on a cosine; equal prediction and target cost nothing, opposite ones 8."""
    encoder = cld.Encoder("resnet18", 4, True, 16, "linear", False, "byol")
    host = cld.Byol(cld.key_copy(encoder), 0.9)
    with torch.no_grad():
        encoder.head.bias += 1  # type: ignore[operator]
    for progress, share in ((0.0, 0.1), (1 / 3, 0.075), (0.5, 0.05), (1.0, 0.0)):
        old = host.keys.head.bias.clone()  # type: ignore[operator]
        host.after_step(encoder, (), progress)
        torch.testing.assert_close(host.keys.head.bias, old + share * (encoder.head.bias - old))
    z = unit(2, 5, 8)
    for sign, cost in ((1, 0.0), (-1, 8.0)):
        losses, _, _ = host.instance_loss(z, None, sign * z, torch.arange(5))
        torch.testing.assert_close(losses, torch.full((5,), cost, dtype=torch.float64))


def test_byol_predicts_the_other_view() -> None:
    """f_I is the prediction; its target is the other view's feature by the encoder that follows. Right: nearest."""
    encoder = cld.Encoder("resnet18", 4, True, 16, "bn-mlp", False, "byol")
    host, views = cld.Byol(cld.key_copy(encoder), 0.9), torch.rand(2, 4, 3, 16, 16)
    features = [host.keys.embed(view)[0] for view in views]
    targets = host.targets(views)
    torch.testing.assert_close(targets, F.normalize(torch.stack([features[1], features[0]]), dim=2))
    assert encoder.predictor is not None
    torch.testing.assert_close(encoder(views)[0][1], F.normalize(encoder.predictor(encoder.embed(views[1])[0]), dim=1))
    z = unit(2, 4, 8)
    assert [float(host.instance_loss(z, None, t, torch.arange(4))[1]) for t in (z, z.roll(1, 1))] == [1, 0]


def test_keys_are_of_a_third_view_and_patches_have_to_find_them() -> None:
    """MoCo's queries are two views, its key a third; InfoMin's loss is the mean of theirs and of the patches'."""
    encoder = cld.Encoder("resnet18", 4, True, 8, "mlp", False, "infomin")
    queue, views = cld.Queue(10, 8, torch.Generator().manual_seed(0)), torch.rand(3, 4, 3, 16, 16)
    host = cld.Moco(cld.key_copy(encoder), queue, 0.1, 0.9)
    keys = host.targets(views)
    torch.testing.assert_close(keys, F.normalize(host.keys.embed(views[2])[0], dim=1))
    z, jigsaw = unit(2, 4, 8, dtype=torch.float32), unit(4, 8, seed=1, dtype=torch.float32)
    plain, patched = (cld.info_nce(rows, keys, queue.features, 0.1)[0] for rows in (z, jigsaw[None]))
    losses, _, _ = host.instance_loss(z, jigsaw, keys, torch.arange(4))
    torch.testing.assert_close(losses, plain.mean(0) / 2 + patched[0] / 2)
    torch.testing.assert_close(host.instance_loss(z, None, keys, torch.arange(4))[0], plain.mean(0))
    cut = torch.rand(4, 9, 3, 16, 16)
    assert encoder.jigsaw is not None
    torch.testing.assert_close(encoder(views[:2], cut)[2],
                               F.normalize(encoder.jigsaw(encoder.backbone(cut.flatten(0, 1))), dim=1))


def test_instance_accuracy_of_the_bank() -> None:
    """Share of rows of the first view whose own slot is nearest: here two of three."""
    bank = common.MemoryBank(8, 4, torch.Generator().manual_seed(0))
    z = torch.stack([bank.features[[5, 0, 1]], unit(3, 4, dtype=torch.float32)])
    _, accuracy, _ = cld.Npid(bank, 0.1, 0.5).instance_loss(z, None, torch.empty(0), torch.tensor([5, 0, 3]))
    assert float(accuracy) == pytest.approx(2 / 3)


def test_host_starts_alike_with_and_without_groups() -> None:
    """The group head draws from a stream of its own: weights of the rest and the global stream do not depend on it."""
    states = []
    for groups in (False, True):
        torch.manual_seed(0)
        weights = cld.Encoder("resnet18", 4, True, 16, "mlp", groups, "infomin").state_dict()
        states.append(({k: v for k, v in weights.items() if "group" not in k}, torch.get_rng_state()))
    assert states[0][0].keys() == states[1][0].keys()
    assert all(torch.equal(states[0][0][name], states[1][0][name]) for name in states[0][0])
    assert torch.equal(states[0][1], states[1][1])


# ---- whole runs ------------------------------------------------------------------------------------------------------


def train(output: Path, *options: str) -> dict[str, Any]:
    """A small run in this process: what its checkpoint holds."""
    cld.main(cld.parse_args([*SMALL, "--output", str(output), *options]))
    return common.load_checkpoint(output / "checkpoint.pth")["state"]


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one, by path."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {path: leaf for key, value in items for path, leaf in flat(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def assert_same(one: Any, other: Any, ignore: str = "-") -> None:
    """Equal to the bit, but for paths with `ignore` in them."""
    one, other = flat(one), flat(other)
    one, other = ({k: v for k, v in x.items() if ignore not in k} for x in (one, other))
    assert one.keys() == other.keys()
    for path, value in one.items():
        same = torch.equal(value, other[path]) if isinstance(value, Tensor) else value == other[path]
        assert same, path


def rows_of_log(output: Path) -> list[dict[str, Any]]:
    """log.jsonl from its second line, without times."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()[1:]]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds", "memory_gb")} for row in rows]


def host_alone(args: Any) -> dict[str, Any]:
    """NPID with two views, written out: no word of groups."""
    run = common.Run(args)
    data = common.load(args, "pretrain", run.device)
    steps = run.steps_per_epoch(len(data))
    torch.manual_seed(args.seed)
    backbone = common.backbone(args.arch, args.width, data.small)
    model = run.place(nn.Sequential(backbone, nn.Linear(backbone.dim, args.feature_dim)))
    bank = common.MemoryBank(len(data), args.feature_dim, run.generator("bank"))
    sgd = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay)
    for epoch in range(args.epochs):
        order = run.permutation(epoch, len(data))
        for step, index, crops in data.batches(run, order, common.Crop(32, (0.2, 1.0)), epoch, 0, 2):
            progress = epoch + step / steps
            sgd.param_groups[0]["lr"] = common.learning_rate(args, progress) * cld.warm_up(progress, args.warmup_epochs)
            draw = run.draw(epoch, step)
            views = [data.normalize(cld.augment(crop, draw, "plain", 0, False)) for crop in crops]
            z = F.normalize(torch.stack([model(view) for view in views]), dim=2)
            losses = [common.bank_softmax(f, index, bank.features, args.temperature) for f in z]
            loss = torch.stack(losses).mean(0).mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            bank.update(F.normalize(z.detach().mean(0), dim=1), index, args.bank_momentum)
    named = {name.replace("1.", "head.", 1) if name.startswith("1.") else name.replace("0.", "backbone.", 1): value
             for name, value in model.state_dict().items()}
    return dict(encoder=named, bank=bank.state_dict(), rng=torch.get_rng_state())


def test_lambda_zero_is_the_host(tmp_path: Path) -> None:
    """lambda = 0: weights, bank and random stream are those of a loop that knows no groups, to the bit."""
    options = ["--lambda", "0", "--seed", "3", "--momentum", "0.5"]
    state = train(tmp_path / "cld", *options)
    rng = torch.get_rng_state()
    alone = host_alone(cld.parse_args([*SMALL, "--output", str(tmp_path / "host"), *options]))
    assert_same(dict(encoder=state["encoder"], bank=state["bank"], rng=rng), alone)


def plain_groups(g: Tensor, k: int, iterations: int) -> tuple[list[int], list[Tensor | None]]:
    """Labels of the rows g (B, D) by k-means as eq. (1) reads, and the groups' unit centroids, None if empty."""
    labels, _ = slow_kmeans(g.detach().double(), k, iterations, spherical=True)
    members = [[i for i, label in enumerate(labels) if label == group] for group in range(k)]
    return labels, [F.normalize(g[rows].mean(0), dim=0) if rows else None for rows in members]


def by_plain_pytorch(args: Any, steps: list[Step], images: int) -> Iterator[dict[str, Any]]:
    """Weights, and bank, or queue and key encoder, after each step of NPID+CLD or MoCo+CLD, begun where the one before
    it ended. Groups are lists of rows, and gradients are autograd's."""
    torch.manual_seed(args.seed)
    backbone = common.backbone(args.arch, args.width, True)
    network = nn.ModuleDict(dict(backbone=backbone, head=nn.Linear(backbone.dim, args.feature_dim)))
    with torch.random.fork_rng([]):
        network["group_head"] = nn.Linear(backbone.dim, args.feature_dim)
    keys = nn.ModuleDict(copy.deepcopy(dict(backbone=network["backbone"], head=network["head"]))).double()
    optimizer = torch.optim.SGD(network.double().parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    name, rows = ("bank", images) if args.host == "npid" else ("queue", args.queue_size)
    slots = F.normalize(torch.randn(rows, args.feature_dim, generator=common.generator(args.seed, name)), dim=1)
    for number, (index, views, _) in enumerate(steps):
        if number:  # which group is nearest can hang on the last digit: none of ours is carried on
            before = steps[number - 1].state
            network.load_state_dict(before["encoder"])
            optimizer.load_state_dict(before["optimizer"])
            slots = before[name]["features"].clone()
            if name == "queue":
                keys.load_state_dict(before["key_encoder"])
        optimizer.zero_grad()
        total, deviation, written = 0.0, 0.0, list[tuple[Tensor, ...]]()
        for part in torch.arange(len(index)).chunk(args.accumulate):
            found = list[list[Tensor]]()
            for view in views[:2, part]:
                h = network["backbone"]((view.double() - 0.5) / 0.25)
                found.append([F.normalize(network[head](h).float()) for head in ("head", "group_head")])
            (z, g), (other_z, other_g) = found
            deviation += z.detach().std(0).mean().item() * z.shape[1] ** 0.5 / args.accumulate
            if name == "bank":
                instance = [F.cross_entropy(f @ slots.T / args.temperature, index[part]) for f in (z, other_z)]
                written.append((z.detach(), other_z.detach()))
            else:
                with torch.no_grad():
                    h = keys["backbone"]((views[2, part].double() - 0.5) / 0.25)
                    key = F.normalize(keys["head"](h).float())
                written.append((key,))
                scores = [torch.cat([(f * key).sum(1, keepdim=True), f @ slots.T], 1) for f in (z, other_z)]
                instance = [F.cross_entropy(one / args.temperature, torch.zeros_like(part)) for one in scores]
            crossed = list[Tensor]()
            for own, theirs in ((g, other_g), (other_g, g)):
                labels, centroids = plain_groups(theirs, args.num_groups, args.kmeans_iterations)
                alive = [group for group, centroid in enumerate(centroids) if centroid is not None]
                table = torch.stack([centroid for centroid in centroids if centroid is not None])
                truth = torch.tensor([alive.index(label) for label in labels])
                crossed.append(F.cross_entropy(own @ table.T / args.group_temperature, truth))
            loss = sum(instance) / 2 + args.group_weight * sum(crossed) / 2
            (loss / args.accumulate).backward()
            total += loss.item() / args.accumulate
        z, *others = map(torch.cat, zip(*written, strict=True))
        optimizer.step()
        if name == "bank":
            for slot, one, two in zip(index.tolist(), z, others[0], strict=True):
                mixed = args.bank_momentum * slots[slot] + (1 - args.bank_momentum) * F.normalize(one + two, dim=0)
                slots[slot] = F.normalize(mixed, dim=0)
        else:
            slots[torch.arange(number * len(z), (number + 1) * len(z)) % rows] = z
            for old, new in zip(keys.parameters(), [*network["backbone"].parameters(), *network["head"].parameters()],
                                strict=True):
                old.data = args.key_momentum * old.data + (1 - args.key_momentum) * new.data
        yield dict(encoder=network.state_dict(), key_encoder=keys.state_dict(), loss=total,
                   feature_std=deviation) | {name: slots}


@pytest.mark.parametrize("options", [
    "", "--lambda 0.25 --T-G 0.4", "--k 3 --kmeans-iterations 1", "--host moco --queue-size 24",
    "--host moco --queue-size 32 --key-momentum 0.9 --lambda 2 --accumulate 2",
])
def test_training_is_that_of_plain_pytorch(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of two epochs leaves weights, bank, queue and keys as a loop that is written from the papers does."""
    steps = record_steps(cld, monkeypatch)
    words = [*TINY, "--subset", "32", "--no-amp", "--epochs", "2", "--schedule", "constant", "--warmup-epochs", "0",
             "--lr", "0.05", "--T-I", "0.5", "--lambda", "1", "--k", "6", "--output", str(tmp_path / "run")]
    args = cld.parse_args([*words, *options.split()])
    cld.main(args)
    assert len(steps) == 4
    figures = dict[str, list[float]](loss=[], feature_std=[])
    for step, found in zip(steps, by_plain_pytorch(args, steps, 32), strict=True):
        for part in ("encoder", "key_encoder") if args.host == "moco" else ("encoder",):
            torch.testing.assert_close(dict(step.state[part]), dict(found[part]), atol=1e-6, rtol=1e-5)
        name = "queue" if args.host == "moco" else "bank"
        torch.testing.assert_close(step.state[name]["features"], found[name], atol=1e-5, rtol=1e-4)
        for key, values in figures.items():
            values.append(found[key])
    for epoch, row in enumerate(rows_of_log(tmp_path / "run")):
        for key, values in figures.items():
            assert row[key] == pytest.approx(sum(values[2 * epoch : 2 * epoch + 2]) / 2, rel=1e-5)


@pytest.mark.parametrize(("options", "recipe", "crops", "scale"), [
    ("--host byol", "byol", 2, 0.08), ("--host infomin", "infomin", 4, 0.2),
    ("--host moco --augment mocov2 --erase 0.3", "mocov2", 3, 0.2), ("--host npid --image-size 64", "plain", 2, 0.2),
])
def test_what_becomes_of_the_crops(
    options: str, recipe: str, crops: int, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two views, the keys' crop as view 3, by the host's recipe or --augment; patches come from a fourth crop. Erased
    are normalised ones, with the probability of --erase. BYOL's momentum knows how many steps are done."""
    boxes, given, made = list[float](), list[Tensor](), list[tuple[Any, ...]]()
    cut, erased, progress = list[Tensor](), list[tuple[Tensor, float]](), list[float]()
    batches, augment, erase, patches, after = (common.ImageSet.batches, cld.augment, cld.random_erase, cld.patches,
                                               cld.Byol.after_step)

    def watched(self: common.ImageSet, run: common.Run, order: Tensor, crop: common.Crop, *rest: Any) -> Iterator[Any]:
        boxes.append(crop.scale[0])
        for step, index, images in batches(self, run, order, crop, *rest):
            given.append(images)
            yield step, index, images

    monkeypatch.setattr(common.ImageSet, "batches", watched)
    monkeypatch.setattr(cld, "augment", lambda images, draw, *rest: (made.append((images, *rest)),
                                                                     augment(images, draw, *rest))[1])
    monkeypatch.setattr(cld, "random_erase", lambda images, draw, p: (erased.append((images, p)),
                                                                      erase(images, draw, p))[1])
    monkeypatch.setattr(cld, "patches", lambda images, draw: (cut.append(images), patches(images, draw))[1])
    monkeypatch.setattr(cld.Byol, "after_step", lambda host, encoder, written, at: (progress.append(at),
                                                                                    after(host, encoder, written, at)))
    train(tmp_path / "run", *options.split(), "--lambda", "0")
    views = min(crops, 3)
    assert boxes == [scale] * 2 and len(given) == 8 and {len(images) for images in given} == {crops}
    for step, images in enumerate(given):
        for view, (image, *how) in enumerate(made[views * step : views * step + views]):
            assert torch.equal(image, images[view]) and how == [recipe, view, "64" in options]
        assert crops < 4 or torch.equal(cut[step], images[3])
    assert len(made) == 8 * views and len(cut) == 8 * (crops == 4) and len(erased) == 8 * views * ("erase" in options)
    assert all(p == 0.3 and float(images.min()) < -1 for images, p in erased)
    assert progress == pytest.approx([(step + 1) / 8 for step in range(8)] if recipe == "byol" else [])


WAYS = [("shared", False, "euclidean"), ("separate", True, "spectral")]


@pytest.mark.parametrize(("branches", "cross_view", "clustering"), WAYS)
def test_options_reach_the_loss(
    branches: str, cross_view: bool, clustering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table A.2's parts and every constant arrive where they count; loss = instance + lambda * group loss, and
    feature_std is that of f_I over the batch, 1 on the whole sphere."""
    instance, group, group_loss = cld.Npid.instance_loss, cld.group, cld.group_loss
    seen, features, stds = list[Any](), list[Tensor](), list[float]()

    def spy_instance(self: cld.Npid, z: Tensor, *rest: Any) -> cld.InstanceLoss:
        seen.append((self.temperature, self.bank_momentum))
        features.append(z)
        stds.append(float(np.std(z[0].detach().numpy(), axis=0, ddof=1).mean() * np.sqrt(z.shape[2])))
        return instance(self, z, *rest)

    def spy_group(z: Tensor, *rest: Any) -> cld.Groups:
        seen.append(rest)
        assert torch.equal(z, features[-1]) == (branches == "shared")
        return group(z, *rest)

    def spy_loss(z: Tensor, groups: cld.Groups, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(rest)
        return group_loss(z, groups, *rest)

    monkeypatch.setattr(cld.Npid, "instance_loss", spy_instance)
    monkeypatch.setattr(cld, "group", spy_group)
    monkeypatch.setattr(cld, "group_loss", spy_loss)
    state = train(tmp_path / "run", "--epochs", "1", "--lambda", "0.3", "--T-I", "0.4", "--T-G", "0.7", "--k", "5",
                  "--kmeans-iterations", "3", "--bank-momentum", "0.6", "--branches", branches, "--clustering",
                  clustering, "--cross-view" if cross_view else "--no-cross-view")
    assert seen == 4 * [(0.4, 0.6), (5, 3, clustering), (0.7, cross_view)]
    assert any("group_head" in name for name in state["encoder"]) == (branches == "separate")
    row = rows_of_log(tmp_path / "run")[-1]
    assert row["loss"] == pytest.approx(row["instance_loss"] + 0.3 * row["group_loss"], rel=1e-5)
    assert row["feature_std"] == pytest.approx(sum(stds) / 4, rel=1e-5)


@pytest.mark.parametrize("host", list(cld.HOSTS))
def test_constant_group_loss_changes_nothing(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cross-level loss that is constant, every host ends as with lambda = 0, to the bit."""
    alone = train(tmp_path / "alone", "--host", host, "--lambda", "0", "--epochs", "1")
    real = cld.group_loss
    monkeypatch.setattr(cld, "group_loss", lambda *args: (0 * real(*args)[0], real(*args)[1]))
    state = train(tmp_path / "cld", "--host", host, "--lambda", "1", "--epochs", "1", "--weight-decay", "7e-4")
    for part in ("encoder", "bank", "queue", "key_encoder"):
        if part in alone:
            assert_same(alone[part], state[part], ignore="group_head")


@pytest.mark.parametrize("host", list(cld.HOSTS))
def test_resume_is_exact(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal within an epoch and started again: same weights, bank, queue, pointer, keys and log."""
    options = ["--host", host, "--accumulate", "2"]
    whole = train(tmp_path / "whole", *options)
    real = common.Run.after_step

    def stop(self: common.Run, state: dict[str, Any], epoch: int, step: int, loss: Tensor) -> None:
        if (epoch, step) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, state, epoch, step, loss)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run calls the one before its own
        patch.setattr(common.Run, "after_step", stop)
        try:
            train(tmp_path / "parts", *options)
        finally:
            signal.signal(signal.SIGTERM, handler)
            for number in (signal.SIGINT, signal.SIGUSR2):
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    saved = common.load_checkpoint(tmp_path / "parts" / "checkpoint.pth")
    assert (saved["epoch"], saved["step"]) == (1, 2)
    parts = train(tmp_path / "parts", *options)
    wanted = {"npid": {"bank"}, "byol": {"key_encoder"}}.get(host, {"queue", "key_encoder"})
    assert wanted <= parts.keys()
    assert_same(whole, parts)
    assert rows_of_log(tmp_path / "whole") == rows_of_log(tmp_path / "parts")


@pytest.mark.parametrize("head", ["linear", "norm-linear", "mlp", "norm-mlp", "bn-mlp"])
def test_checkpoint_is_read_by_the_evaluations(head: str, tmp_path: Path) -> None:
    """common.load_encoder embeds as the encoder that wrote the file: f_I, whatever the head."""
    encoder = cld.Encoder("resnet18", 4, True, 16, head, groups=True)
    encoder(torch.rand(2, 4, 3, 16, 16))
    if isinstance(encoder.head, cld.NormLinear):  # training changes their lengths
        encoder.head.direction.data *= torch.rand(16, 1) + 0.5
    content = dict(options=dict(arch="resnet18", width=4), data=dict(small=True), git="", epoch=0, step=0, log_size=0,
                   state=dict(encoder=encoder.state_dict()))
    torch.save(content, tmp_path / "checkpoint.pth")
    loaded = common.load_encoder(tmp_path / "checkpoint.pth")
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        expected = F.normalize(encoder.eval().embed(images)[0], dim=1)
    torch.testing.assert_close(loaded.embed(images), expected)
    assert loaded.head is not None


WORKER = """
import sys, torch
torch.set_num_threads(1)
import cld
copy = cld.key_copy
cld.key_copy = lambda encoder: copy(encoder).eval()  # batch statistics are a rank's own: do without them
cld.Encoder.train = lambda self, mode=True: torch.nn.Module.train(self, False)
cld.main(cld.parse_args(sys.argv[1:]))
"""


@pytest.mark.parametrize(("host", "over"), [
    ("moco", "all"), ("npid", "local"), pytest.param("npid", "all", marks=pytest.mark.slow),
])
def test_two_ranks_equal_one(host: str, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, bank and queue of two ranks are those of one: with groups of the whole batch, and with groups of each
    rank's own part, where the one does the parts one after the other."""
    worker = tmp_path / "worker.py"
    options = ["--host", host, "--epochs", "1", "--num-groups", "6", "--groups-over", over]
    worker.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(common.ROOT)}
    ranks = subprocess.Popen([*launcher, *SMALL, *options, "--output", str(tmp_path / "2")], env=os.environ | paths,
                             stderr=subprocess.PIPE, text=True)
    copy = cld.key_copy
    monkeypatch.setattr(cld, "key_copy", lambda encoder: copy(encoder).eval())
    monkeypatch.setattr(cld.Encoder, "train", lambda self, mode=True: nn.Module.train(self, False))
    train(tmp_path / "1", *options, *(["--accumulate", "2"] if over == "local" else []))
    _, errors = ranks.communicate(timeout=240)
    assert ranks.returncode == 0 and "Warning: torch.distributed" not in errors, errors[-2000:]
    one, two = (common.load_checkpoint(tmp_path / str(ranks) / "checkpoint.pth")["state"] for ranks in (1, 2))
    for part in ("encoder", "bank", "queue", "key_encoder"):
        for path, value in flat(one.get(part, {})).items():
            torch.testing.assert_close(flat(two[part])[path], value, rtol=1e-3, atol=1e-5)
    row_one, row_two = rows_of_log(tmp_path / "1")[-1], rows_of_log(tmp_path / "2")[-1]
    for name in ("loss", "group_loss", "group_accuracy", "groups_alive", "intra", "inter"):
        assert row_one[name] == pytest.approx(row_two[name], rel=1e-3), name


def test_labels_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise in place of all labels, training ends the same."""
    told = train(tmp_path / "told", "--epochs", "1")
    real = common.load

    def blind(*args: Any) -> common.ImageSet:
        data = real(*args)
        data.labels = torch.randint(10, (len(data),), generator=torch.Generator().manual_seed(0))
        return data

    monkeypatch.setattr(common, "load", blind)
    assert_same(told, train(tmp_path / "blind", "--epochs", "1"))


def test_too_many_groups_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """120 groups of the 8 rows of a part of the batch: clamped, said, and logged."""
    train(tmp_path / "run", "--num-groups", "120", "--epochs", "1", "--accumulate", "2")
    assert "8 groups of one row" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["num_groups"] == 8


def other_value_error() -> None:
    """A ValueError that no option mends."""

    def fail(*args: Any) -> None:
        raise ValueError("Expected something else")

    common.load = fail  # type: ignore[assignment]


def test_batch_normalisation_needs_two_values(tmp_path: Path) -> None:
    """One image of one pixel in the last map ends in one line; any other ValueError is still a traceback."""
    command = [*SMALL, "--lambda", "0", "--batch-size", "1", "--image-size", "8", "--output", tmp_path]
    one_line(run("cld", command), "--batch-size", "--image-size")
    other = run("cld", command, before=other_value_error)
    assert other.code == 1 and "Traceback" in other.err


@pytest.mark.parametrize("options", [["--queue-size", "8"], ["--queue-size", "65"]])
def test_queue_must_fit(options: list[str], tmp_path: Path) -> None:
    """A queue below the batch, or one that was asked for and is longer than the data, is an error."""
    with pytest.raises(common.Fault, match="--queue-size"):
        train(tmp_path / "run", "--host", "moco", *options)


def test_a_part_of_one_image_logs_no_nan(tmp_path: Path) -> None:
    """--accumulate down to single images: figures that there are, all finite, and no deviation of a single feature."""
    train(tmp_path / "run", "--accumulate", "16", "--lambda", "0", "--epochs", "1")
    row = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert row["loss"] > 0 and "feature_std" not in row and "NaN" not in json.dumps(row)


def test_presets() -> None:
    """Every preset parses, and the released scripts' rates are those for their batch."""
    for name in cld.PRESETS:
        args = cld.parse_args(["--preset", name])
        assert args.head and args.augment and args.key_momentum is not None
    ten = cld.parse_args(["--data", "cifar10"])
    assert (ten.lr, ten.group_weight, ten.num_groups) == (0.06, 1.0, 128)
    assert (ten.temperature, ten.group_temperature) == (0.1, 0.2)
    text = cld.parse_args(["--preset", "cifar10-supplement"])
    assert (text.lr, text.weight_decay, text.group_weight, text.group_temperature) == (0.03, 1e-4, 0.25, 0.2)
    assert cld.parse_args(["--preset", "imagenet-mocov2-cld"]).head == "norm-mlp"


def test_the_rate_rises_from_a_hundredth() -> None:
    """In the first epochs the rate rises in proportion to the progress, from lr / 100 to lr, and stays there."""
    assert [cld.warm_up(progress, 5) for progress in (0.0, 2.5, 5.0, 80.0)] == pytest.approx([0.01, 0.505, 1.0, 1.0])
    assert cld.warm_up(0.0, 0) == 1


def test_rates_drop_before_the_end() -> None:
    """No preset has a step schedule whose drops lie beyond its epochs: "initial" rates of the supplement fall."""
    for name in cld.PRESETS:
        args = cld.parse_args(["--preset", name])
        assert args.schedule != "step" or 0 < max(args.lr_drops) < args.epochs, name


# ---- data sets and augmentation --------------------------------------------------------------------------------------


def draws(count: int, seed: int = 0) -> common.Draw:
    """Uniform numbers of `count` images."""
    return common.Draw(torch.Generator().manual_seed(seed), count, slice(None), common.CPU)


def test_instances_are_the_same_in_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the --seed, instances are the same, and others for test images."""
    words = [*SMALL, "--knn-every", "1", "--seed", "3", "--instances", "5", "--output", str(tmp_path / "run")]
    args, seen = cld.parse_args(words), list[common.ImageSet]()
    monkeypatch.setattr(common.Run, "describe", lambda run, *images, **facts: seen.extend(images) or sys.exit())
    with pytest.raises(SystemExit):
        cld.main(args)
    data, test = seen
    plain, more = (common.load(args, split, common.CPU) for split in ("pretrain", "test"))
    for part, base, seed in ((data, plain, 0), (test, more, 1)):
        made = cld.views_of_instances(base, 5, seed)
        assert made.pixels is not None and part.pixels is not None
        assert torch.equal(part.pixels, made.pixels) and torch.equal(part.labels, made.labels)


def test_instances_give_many_correlated_views() -> None:
    """Views of one instance are nearer to each other than to those of others, and share its class; all differ."""
    data = images_of([0] * 60, pixels=torch.zeros(60, 3, 32, 32, dtype=torch.uint8))
    data.name = "shapes"
    views = cld.views_of_instances(data, 6, seed=0)
    assert views.pixels is not None and views.pixels.shape == (60, 3, 32, 32) and len(views.pixels.unique(dim=0)) == 60
    assert torch.equal(views.labels[:6], views.labels[6:12])
    colours = views.pixels.float().mean((2, 3))
    own = torch.arange(60) % 6
    distance = torch.cdist(colours, colours)
    same = own[:, None] == own
    assert distance[same].mean() < 0.7 * distance[~same].mean()
    many = dataclasses.replace(data, labels=torch.zeros(2000, dtype=torch.long))  # cut in two parts
    assert len(cld.views_of_instances(many, 1, seed=0).pixels.unique(dim=0)) == 2000
    with pytest.raises(common.Fault, match="instances"):
        cld.views_of_instances(images_of([0]), 1, 0)


@pytest.mark.parametrize("name", list(cld.RECIPES))
def test_augmentation_depends_on_its_draws_alone(name: str) -> None:
    """Same draws, same pixels, in [0, 1]; each image its own; the global random stream is untouched."""
    images, before = torch.rand(1, 3, 24, 24).expand(8, -1, -1, -1), torch.get_rng_state()
    one, same = (cld.augment(images, draws(8), name, 0, False) for _ in range(2))
    assert torch.equal(one, same) and float(one.min()) >= 0 and float(one.max()) <= 1
    assert len(one.unique(dim=0)) >= 7
    assert torch.equal(before, torch.get_rng_state())


def test_byol_blurs_and_solarizes_its_views_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first view all images are blurred and none solarised, of the second a tenth and a fifth; a third crop, for
    the keys of another host, is as the second."""
    for name in ("random_color_jitter", "random_grayscale", "random_flip"):
        monkeypatch.setattr(common, name, lambda images, *_, **__: images)
    blurred = list[float]()
    monkeypatch.setattr(common, "random_blur",
                        lambda images, *_, probability, **__: (blurred.append(probability), images)[1])
    images = torch.full((1000, 3, 4, 4), 0.9)
    shares = [float((cld.augment(images, draws(1000), "byol", view, False) < 0.5).all(3).all(2).all(1).float().mean())
              for view in range(3)]
    assert blurred == [1.0, 0.1, 0.1] and shares[0] == 0
    assert shares[1] == pytest.approx(0.2, abs=0.05) and shares[2] == pytest.approx(0.2, abs=0.05)


def test_rand_augment_is_torchvisions() -> None:
    """Its operations are those that torchvision's RandAugment has at full strength, and each is drawn."""
    image, theirs = torch.rand(3, 33, 33), list[Tensor]()
    operation = RandAugment(num_ops=1, magnitude=30, fill=0.5)
    for seed in range(400):
        torch.manual_seed(seed)
        theirs.append(operation(image))
    ours = [operation(image[None].expand(2, -1, -1, -1))[1] for operation in cld.strong_operations(33)]
    drawn = cld.rand_augment(image.expand(2000, -1, -1, -1), draws(2000)).unique(dim=0)

    def within(some: Sequence[Tensor] | Tensor, others: Sequence[Tensor] | Tensor) -> bool:
        """Whether each of `some` is one of the others, but for rounding."""
        return all(any(torch.allclose(one, other, atol=1e-6) for other in others) for one in some)

    assert within(ours, theirs) and within(theirs, ours) and within(ours, drawn)


def test_rand_augment_gives_an_image_what_it_gives_it_alone() -> None:
    """Whatever else is in the batch, each image takes two operations with probability 1/2 each, of its own draws."""
    images = torch.rand(600, 3, 16, 16)
    changed = cld.rand_augment(images, draws(600))
    alone = images.clone()
    alone[1:] = 0.5
    assert torch.equal(cld.rand_augment(alone, draws(600))[0], changed[0])
    same = float((changed == images).flatten(1).all(1).float().mean())
    assert same == pytest.approx((1 / 2 + 1 / 28) ** 2, abs=0.06)  # the 14th operation changes nothing


def test_rand_augment_reads_nothing_from_the_device() -> None:
    """Which operations an image gets is known on the CPU, from the draws of any device."""
    images, source = torch.rand(8, 3, 24, 24), torch.Generator().manual_seed(0)
    elsewhere = common.Draw(source, 8, slice(None), torch.device("meta"))  # whose numbers cannot be read
    assert torch.equal(cld.rand_augment(images, elsewhere), cld.rand_augment(images, draws(8)))


def test_erased_boxes() -> None:
    """An image loses one box of 2 to 33 % of its area, 0.3 to 3.3 times as wide as high, with the given probability."""
    images = torch.ones(512, 3, 32, 32)
    erased = cld.random_erase(images, draws(512), 1.0)[:, 0] == 0
    area = erased.float().mean((1, 2))
    assert 0.015 < float(area.min()) < 0.03 and 0.3 < float(area.max()) < 0.35 and float(area.std()) > 0.05
    assert torch.equal(cld.random_erase(images, draws(512), 0.0), images)
    some = (cld.random_erase(images, draws(512), 0.3) == 0).flatten(1).any(1)
    assert float(some.float().mean()) == pytest.approx(0.3, abs=0.05)
    ratio = erased.any(1).sum(1) / erased.any(2).sum(1)  # width over height of a box, of whole pixels
    assert 0.2 < float(ratio.min()) < 0.4 and 2.5 < float(ratio.max()) < 5


def test_patches_are_those_of_the_nine_cells() -> None:
    """Nine unscaled patches, one of each cell, in an order of the image's own."""
    cell = torch.arange(9.0).view(1, 1, 3, 3).repeat_interleave(10, 2).repeat_interleave(10, 3) / 10
    found = cld.patches(cell.expand(6, 3, -1, -1).contiguous(), draws(6))
    assert found.shape == (6, 9, 3, 7, 7)
    torch.testing.assert_close(found.amin((2, 3, 4)), found.amax((2, 3, 4)))
    orders = (found[:, :, 0, 0, 0] * 10).round()
    assert torch.equal(orders.sort(1).values, torch.arange(9.0).expand(6, 9)) and len(orders.unique(dim=0)) > 1


def test_patches_lie_anywhere_in_their_cells_in_any_order() -> None:
    """Of 360 patches of 7 px in cells of 10 px each offset, 0 to 3, is taken by about a quarter, down and across; each
    of the nine cells comes first in about a ninth of the images."""
    place = torch.arange(30.0)
    images = torch.stack([place[:, None].expand(30, 30), place.expand(30, 30), place[:, None].expand(30, 30)])
    found = cld.patches(images.expand(360, -1, -1, -1).contiguous(), draws(360)).amin((3, 4)).round().long()
    for axis in (0, 1):
        counts = (found[:, :, axis] % 10).flatten().bincount(minlength=10)
        assert counts[4:].sum() == 0 and counts[:4].min() > 0.2 * counts.sum() and counts[:4].max() < 0.3 * counts.sum()
    first = (found[:, 0, 0] // 10 * 3 + found[:, 0, 1] // 10).bincount(minlength=9)
    assert first.min() > 20 and first.max() < 60


def test_patches_are_of_an_image_or_its_mirror_image() -> None:
    """As in InfoMin's jigsaw the image is mirrored as a whole, with probability 1/2, before it is cut."""
    ramp = torch.arange(30.0).expand(40, 3, 30, 30).contiguous()
    found = cld.patches(ramp, draws(40))
    mirrored = found[..., 0] > found[..., -1]
    assert torch.equal(mirrored.all((1, 2, 3)), mirrored.any((1, 2, 3))), "all patches of an image alike"
    assert 10 < int(mirrored.all((1, 2, 3)).sum()) < 30


def test_crops_from_boxes(tmp_path: Path) -> None:
    """A crop for each box that meets its image, in its class's folder, with the pixels of the box; a line without a box
    or with a class that is no folder's name is named."""
    scene = Image.new("RGB", (20, 10))
    scene.paste((255, 0, 0), (5, 2, 9, 8))
    scene.save(tmp_path / "scene.png")
    table = tmp_path / "boxes.csv"
    boxes = ["image,x1,y1,x2,y2,class", "scene.png,5,2,9,8,cup", "scene.png,15,5,40,30,bowl", "scene.png,30,0,40,9,cup"]
    table.write_text("\n".join(boxes))
    assert crop_boxes.crop_boxes(table, tmp_path, tmp_path / "out") == (2, 1)
    table.write_text("\n".join(boxes), encoding="utf-8-sig")  # as spreadsheets save it
    assert crop_boxes.crop_boxes(table, tmp_path, tmp_path / "again") == (2, 1)
    for row in ("5,2", "5,2,x,8,cup", "5,2,nan,8,cup", "5,2,9,8", "5,2,9,8,", "5,2,9,8,..", "5,2,9,8,a/b"):
        table.write_text(f"{boxes[0]}\nscene.png,{row}\n")
        with pytest.raises(common.Fault, match=r"boxes.csv, line 2: .*(are not numbers|is no name of a folder)"):
            crop_boxes.crop_boxes(table, tmp_path, tmp_path / "out")
    (tmp_path / "other.csv").write_text("file,left\n")
    for name, words in (("other.csv", "has not the header image,x1,"), ("none.csv", "No such file")):
        tool = [common.ROOT / "tools/crop_boxes.py", tmp_path / name, tmp_path, tmp_path / "none"]
        process = subprocess.run([sys.executable, *tool], capture_output=True, text=True, check=False)
        assert process.returncode == 2 and words in process.stderr and process.stderr.count("\n") == 1
    (cup,) = (tmp_path / "out" / "cup").iterdir()
    with Image.open(cup) as image:
        assert image.size == (4, 6) and image.getextrema() == ((255, 255), (0, 0), (0, 0))
    (bowl,) = (tmp_path / "out" / "bowl").iterdir()
    with Image.open(bowl) as image:
        assert image.size == (5, 5)


def test_a_table_of_boxes_in_another_encoding(tmp_path: Path) -> None:
    """A table with letters that are no UTF-8, as spreadsheets of Windows save it, is refused by name."""
    (tmp_path / "boxes.csv").write_text("image,x1,y1,x2,y2,class\na.png,0,0,9,9,Sch\u00fcssel\n", encoding="cp1252")
    with pytest.raises(common.Fault, match=r"boxes.csv is not UTF-8"):
        crop_boxes.crop_boxes(tmp_path / "boxes.csv", tmp_path, tmp_path / "out")


def test_boxes_of_one_scene(tmp_path: Path) -> None:
    """Corners are rounded to whole pixels; each box of a scene has a file of its own; one without width is left out."""
    Image.new("RGB", (20, 10)).save(tmp_path / "scene.png")
    boxes = ["4.6,2.4,9.4,7.6", "0,0,3,2", "5,2,5,8"]
    lines = ["image,x1,y1,x2,y2,class", *(f"scene.png,{box},cup" for box in boxes)]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    assert crop_boxes.crop_boxes(tmp_path / "boxes.csv", tmp_path, tmp_path / "out") == (2, 1)
    sizes = [Image.open(path).size for path in sorted((tmp_path / "out/cup").iterdir())]
    assert sizes == [(4, 6), (3, 2)]


def test_kitchen_is_a_folder_with_the_statistics_of_cifar(tmp_path: Path) -> None:
    """--preset kitchen-* finds the crops of both splits below --data-dir, at 32 px, normalised as CIFAR-10."""
    for place in ("train/cup", "train/bowl", "val/cup"):
        (tmp_path / "kitchen-hc" / place).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "kitchen-hc" / place / "0.png")
    args = cld.parse_args(["--preset", "kitchen-kmeans10", "--data-dir", str(tmp_path)])
    data, test = (common.load(args, split, common.CPU) for split in ("pretrain", "test"))
    assert (len(data), len(test), data.size, test.size, data.small) == (2, 1, 32, 32, True)
    assert (data.mean, data.std) == common.DATASETS["cifar10"][1:]
