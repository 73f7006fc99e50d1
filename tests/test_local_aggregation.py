"""Local Aggregation's equations against slow float64 references, and when it clusters."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, Rank, Step, record_steps
from torch import Tensor

import common
import figures
import local_aggregation as la
import npid

N, B, D, TAU = 60, 5, 8, 0.1


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def clusters_of(labels: list[list[int]] | Tensor) -> la.Clusters:
    made = la.Clusters(len(labels), len(labels[0]))
    made.labels = torch.as_tensor(labels, dtype=torch.int32)
    return made


def random_clusters(num_clusterings: int, num_clusters: int, seed: int = 1) -> la.Clusters:
    return clusters_of(torch.randint(num_clusters, (num_clusterings, N), generator=torch.Generator().manual_seed(seed)))


def loss_of(z: Tensor, index: Tensor, bank: Tensor, clusters: la.Clusters, k: int) -> Tensor:
    """L_i as the training loop computes it."""
    slots, similarity, _ = la.nearest(z.detach(), index, bank, k)
    return la.local_aggregation(z, slots, similarity, clusters.same(index, slots), bank, TAU)


def naive(z: Tensor, index: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[list[float], list[Tensor]]:
    """L_i and its gradient by loops over the sets, in float64."""
    losses, gradients = [], []
    for f, i in zip(z.double(), index.tolist(), strict=True):
        score = {j: float(bank[j].double() @ f) / TAU for j in range(N)}
        background = sorted(score, key=lambda j: -score[j])[:k]
        if i not in background:
            background[-1] = i
        close = {j for j in range(N) if any(row[j] == row[i] for row in labels)}
        both = [j for j in background if j in close]
        sums = [sum(math.exp(score[j]) for j in members) for members in (background, both)]
        means = [sum(math.exp(score[j]) * bank[j].double() for j in members) / total
                 for members, total in zip((background, both), sums, strict=True)]
        losses.append(math.log(sums[0] / sums[1]))
        gradients.append((means[0] - means[1]) / TAU)
    return losses, gradients


@pytest.mark.parametrize("k", [1, 7, 20, N])
def test_loss_and_gradient_equal_a_loop_over_the_sets(k: int) -> None:
    """L_i and (mean over B_i - mean over C_i and B_i) / tau, with i forced into B_i, equal float64 loops."""
    z, bank, index = unit(B, D).requires_grad_(), unit(N, D, seed=2), torch.tensor([0, 7, 30, 31, 59])
    clusters = random_clusters(3, 6)
    loss = loss_of(z, index, bank, clusters, k)
    loss.sum().backward()
    losses, gradients = naive(z.detach(), index, bank, clusters.labels, k)
    assert loss.tolist() == pytest.approx(losses, abs=1e-5)
    assert z.grad is not None and torch.allclose(z.grad.double(), torch.stack(gradients), atol=1e-4)
    assert (loss >= -1e-6).all()


@pytest.mark.parametrize("chunk", [7, 60, 100])
def test_the_dense_form_equals_the_listed_one(chunk: int) -> None:
    """With B_i = all images, streaming over the bank gives the same loss, gradient and size as listing all of them."""
    z, bank, index = unit(B, D).requires_grad_(), unit(N, D, seed=2), torch.tensor([0, 7, 30, 31, 59])
    clusters, everything = random_clusters(2, 9), clusters_of([[0] * N])
    loss, size = la.local_aggregation_dense(z, index, everything, clusters, bank, TAU, chunk)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    listed = loss_of(z, index, bank, clusters, N)
    (expected,) = torch.autograd.grad(listed.sum(), z)
    assert torch.allclose(loss, listed, atol=1e-5) and torch.allclose(gradient, expected, atol=1e-4)
    assert size.tolist() == clusters.same(index, torch.arange(N)).sum(1).tolist()


def test_cluster_based_background_is_what_shares_a_cluster() -> None:
    """B_i by clusters (Table 4): the loss equals loops over the members of i's background clusters."""
    z, bank, index = unit(B, D), unit(N, D, seed=2), torch.tensor([0, 7, 30, 31, 59])
    close, background = random_clusters(1, 12), random_clusters(3, 4, seed=5)
    loss, _ = la.local_aggregation_dense(z, index, background, close, bank, TAU, 16)
    for b, i in enumerate(index.tolist()):
        score = (bank.double() @ z[b].double()) / TAU
        inside = (background.labels == background.labels[:, i : i + 1]).any(0)
        both = inside & (close.labels == close.labels[:, i : i + 1]).any(0)
        assert loss[b].item() == pytest.approx((score[inside].logsumexp(0) - score[both].logsumexp(0)).item(), abs=1e-5)


def test_only_itself_against_all_is_the_npid_softmax() -> None:
    """Property 1: C_i = {i} and B_i = all gives -log P(i|f) of NPID, value and gradient; C_i = B_i gives 0."""
    z, bank, index = unit(B, D).requires_grad_(), unit(N, D, seed=2), torch.tensor([0, 7, 30, 31, 59])
    alone, everything = la.Clusters(4, N), clusters_of([[0] * N])
    loss, exact = loss_of(z, index, bank, alone, N), common.bank_softmax(z, index, bank, TAU)
    assert torch.allclose(loss, exact, atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(x.sum(), z)[0] for x in (loss, exact)), atol=1e-4)
    assert loss_of(z, index, bank, everything, 20).abs().max() < 1e-6


def test_loss_ignores_a_common_shift_of_the_scores() -> None:
    """Property 2: adding a constant to all similarities changes nothing."""
    z, bank, index = unit(B, D), unit(N, D, seed=2), torch.arange(B)
    slots, similarity, _ = la.nearest(z, index, bank, 20)
    close = random_clusters(2, 6).same(index, slots) | (slots == index[:, None])
    first, second = (la.local_aggregation(z, slots, similarity + shift, close, bank, TAU) for shift in (0.0, 0.7))
    assert torch.allclose(first, second, atol=1e-4)


def test_wider_close_sets_never_raise_and_wider_backgrounds_never_lower_the_loss() -> None:
    """Property 3: enlarging C_i with B_i fixed, or B_i by images that are not in C_i, moves the loss one way only."""
    z, bank, index = unit(B, D), unit(N, D, seed=2), torch.arange(B)
    labels = random_clusters(4, 8).labels
    losses = [loss_of(z, index, bank, clusters_of(labels[:h]), 30) for h in (1, 2, 4)]
    assert (losses[0] >= losses[1] - 1e-6).all() and (losses[1] >= losses[2] - 1e-6).all()
    alone = la.Clusters(1, N)
    losses = [loss_of(z, index, bank, alone, k) for k in (5, 20, N)]
    assert (losses[0] <= losses[1] + 1e-6).all() and (losses[1] <= losses[2] + 1e-6).all()


def test_clusters_of_one_are_the_image_itself() -> None:
    """Property 4: H = 1 with every image in a cluster of its own is C_i = {i}, whatever the labels are called."""
    index, shuffled = torch.arange(B), clusters_of(torch.randperm(N)[None])
    assert torch.equal(shuffled.same(index, torch.arange(N)), F.one_hot(index, N).bool())


def test_identical_clusterings_count_once() -> None:
    """Property 6: the union over copies of a clustering is that clustering."""
    one = random_clusters(1, 6)
    copies = clusters_of(one.labels.repeat(3, 1))
    index = torch.arange(B)
    assert torch.equal(one.same(index, torch.arange(N)), copies.same(index, torch.arange(N)))


def test_itself_is_always_among_the_nearest_and_listed_once() -> None:
    """nearest() lists i exactly once, in the place of the farthest if it is not among the k nearest, and says so."""
    z, bank, index = unit(B, D), unit(N, D, seed=2), torch.arange(B)
    bank[0] = z[0]  # one image that is its own nearest
    slots, similarity, missing = la.nearest(z, index, bank, 3)
    assert ((slots == index[:, None]).sum(1) == 1).all() and not missing[0] and missing.any()
    assert torch.allclose(similarity, torch.einsum("bd,bkd->bk", z, bank[slots]), atol=1e-6)
    for listed, true in zip(slots.tolist(), (z @ bank.T).topk(3).indices.tolist(), strict=True):
        assert set(true[:2]) <= set(listed)


def run_rows(output: Path, *options: str) -> list[dict[str, Any]]:
    la.main(la.parse_args(["--preset", "smoke", "--knn-every", "0", "--output", str(output), *options]))
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize("flip", ["--flip", "--no-flip"])
def test_the_warm_start_is_npid(flip: str, tmp_path: Path) -> None:
    """Local Aggregation that is all warm start and npid.py with the same options end with the same bits."""
    words = ["--preset", "smoke", "--epochs", "2", "--knn-every", "0", flip, "--output"]
    run_rows(tmp_path / "la", "--epochs", "2", "--warmup-epochs", "2", flip)
    npid.main(npid.parse_args([*words, str(tmp_path / "npid")]))
    one, two = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["state"] for name in ("la", "npid"))
    assert torch.equal(one["bank"]["features"], two["bank"]["features"])
    assert all(torch.equal(value, two["encoder"][name]) for name, value in one["encoder"].items())


@pytest.mark.parametrize("count", [256, 250])
@pytest.mark.parametrize("every", [0, 3])
def test_clusters_are_there_at_the_first_step_and_renewed_on_time(
    count: int, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Property 7: one clustering at step 0 of each epoch after warm start, B dividing N or not, or each R steps too."""
    events: list[str] = []
    cluster, loss = la.cluster, la.local_aggregation
    monkeypatch.setattr(la, "cluster", lambda *a, **k: (events.append("cluster"), cluster(*a, **k))[1])
    monkeypatch.setattr(la, "local_aggregation", lambda *a: (events.append("step"), loss(*a))[1])
    run_rows(tmp_path / "run", "--subset", str(count), "--recluster-every", str(every))
    steps = count // 32
    due = [s == 0 or (every and s % every == 0) for s in range(steps)]
    epoch = [e for clustered in due for e in (["cluster", "step"] if clustered else ["step"])]
    assert events == epoch * 2


@pytest.mark.parametrize("options", [
    ["--background", "all"], ["--background", "clusters", "--background-clusters", "2", "5"], ["--close", "self"],
    ["--close", "nearest", "--close-neighbors", "5"], ["--cluster-on", "center-crop"], ["--cluster-seeds", "redrawn"],
    ["--kmeans", "faiss"], ["--clustering", "dbscan"], ["--warmup-loss", "nce"], ["--accumulate", "2"],
])
def test_every_ablation_trains(options: list[str], tmp_path: Path) -> None:
    """Each row of the paper's tables runs through warm start and Local Aggregation with finite figures."""
    if "faiss" in options:
        pytest.importorskip("faiss")
    rows = run_rows(tmp_path / "run", "--subset", "96", "--m", "8", "--k", "24", "--epochs", "2", *options)
    assert math.isfinite(rows[0]["npid_loss"]) and math.isfinite(rows[1]["la_loss"]) and rows[1]["la_loss"] > 0


@pytest.mark.parametrize("name", ["torch", "faiss"])
def test_the_back_end_of_k_means_is_printed_and_logged(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first line says what clusters, and on what; so does what a clustering returns."""
    pytest.importorskip(name)
    run_rows(tmp_path / "run", "--subset", "64", "--epochs", "1", "--kmeans", name, "--device", "cpu")
    first = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["kmeans_backend"] == common.kmeans(torch.rand(9, 2), 2, backend=name).backend
    assert json.loads(first)["kmeans_backend"].startswith(f"{name} ") and first in capsys.readouterr().out


@pytest.mark.parametrize(("options", "used"), [
    ("--clustering dbscan --H 1", False), ("--close self", False), ("--close self --background clusters", True)])
def test_only_k_means_is_named(options: str, used: bool, tmp_path: Path) -> None:
    """A run names k-means' back end if it has k-means, and logs no objective without k-means for C_i."""
    rows = run_rows(tmp_path / "run", "--subset", "64", "--k", "16", "--epochs", "2", *options.split())
    header = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert ("kmeans_backend" in header) == used and "objective" not in rows[1]


def test_nearest_close_set_is_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--close nearest: C_i is i and the k' most similar of B_i, in whatever order the search lists them."""
    seen, loss = [], la.local_aggregation

    def watched(z: Tensor, slots: Tensor, similarity: Tensor, close: Tensor, *rest: Any) -> Tensor:
        seen.append((similarity, close))
        return loss(z, slots, similarity, close, *rest)

    monkeypatch.setattr(la, "local_aggregation", watched)
    run_rows(tmp_path / "run", "--close", "nearest", "--close-neighbors", "5", "--k", "40", "--epochs", "2")
    assert len(seen) == 8
    for similarity, close in seen:
        for row, members in zip(similarity.tolist(), close.tolist(), strict=True):
            order = sorted(range(40), key=lambda j: -row[j])
            assert all(members[j] for j in order[:5]) and sum(members) in (5, 6)
    assert la.most_similar(torch.tensor([[0.1, 0.9, 0.5]]), 2).tolist() == [[False, True, True]]
    assert la.most_similar(torch.rand(2, 3), 9).all()


def test_background_clusters_without_close_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--close self --background clusters: B_i shares a cluster with i, and is not all images for want of clusters."""
    seen, loss = [], la.local_aggregation_dense

    def watched(z: Tensor, index: Tensor, background: la.Clusters, *rest: Any) -> tuple[Tensor, Tensor]:
        seen.append(len(background.labels.unique()))
        return loss(z, index, background, *rest)

    monkeypatch.setattr(la, "local_aggregation_dense", watched)
    found = watch_kmeans(monkeypatch)
    options = ["--close", "self", "--background", "clusters", "--background-clusters", "2", "5", "--epochs", "2",
               "--kmeans", "faiss", "--kmeans-iterations", "7"]
    rows = run_rows(tmp_path / "run", *options)
    assert seen and set(seen) == {5} and rows[1]["intersection"] == 1
    assert [(how["backend"], how["iterations"]) for how in found] == [("faiss", 7)] * 2


def test_figures_do_not_need_labels(tmp_path: Path) -> None:
    """Without a kNN monitor the last epoch has densities; the first clustering has no NMI, the second one has."""
    rows = run_rows(tmp_path / "run")
    assert ["local_density" in row for row in rows] == [False, False, True] and "knn_top1" not in rows[2]
    assert ["nmi" in row for row in rows] == [False, False, True] and 0 < rows[2]["nmi"] <= 1


@pytest.mark.parametrize("m", [3, 40])
def test_warm_start_by_nce_is_that_of_npid(m: int) -> None:
    """Scores of few noise images are gathered, of many taken from all products: both, and the loss, equal npid.py's."""
    z, bank = unit(B, D), unit(N, D, seed=2)
    noise = torch.randint(N, (B, m), generator=torch.Generator().manual_seed(3))
    scores = la.noise_scores(z, noise, bank, TAU)
    assert torch.allclose(scores, torch.einsum("bd,bmd->bm", z, bank[noise]) / TAU, atol=1e-5)
    positive, log_z = (z * bank[:B]).sum(1) / TAU, torch.tensor(4.7)
    expected = npid.nce(positive, scores, log_z, N)
    torch.testing.assert_close(la.nce(positive, scores, log_z, N), expected)


@pytest.mark.parametrize("options", [
    ["--m", "300"], ["--k", "300"], ["--H", "0"], ["--close", "nearest", "--background", "all"],
    ["--background", "clusters", "--background-clusters", "3", "300"],
])
def test_sizes_that_do_not_fit_are_refused(options: list[str], tmp_path: Path) -> None:
    """m or k larger than N, or no clustering at all: a fault that names the option, before anything is trained."""
    with pytest.raises((common.Fault, SystemExit)) as caught:
        run_rows(tmp_path / "run", *options)
    assert not (tmp_path / "run" / "checkpoint.pth").exists()
    assert isinstance(caught.value, common.Fault) or caught.value.code == 2


def test_defaults_shrink_to_the_data_and_typed_values_do_not() -> None:
    """ImageNet's k and m are scaled to small sets; what was typed stays."""
    args = la.parse_args(["--preset", "imagenet", "--data", "somewhere"])
    la.fit_to(10_000, args)
    assert (args.num_clusters, args.num_neighbors) == (234, 1000)
    args = la.parse_args(["--preset", "imagenet", "--data", "somewhere", "--m", "6000"])
    la.fit_to(10_000, args)
    assert (args.num_clusters, args.num_neighbors) == (6000, 1000)


@pytest.mark.parametrize("options", [
    "--close self --m 9999", "--clustering dbscan --H 1 --m 9999", "--background all --k 9999"])
def test_sizes_without_effect_are_no_fault(options: str) -> None:
    """Of m and k that nothing uses, which a note says, any will do, and nothing warns of them."""
    args = la.parse_args(f"--preset smoke --m 32 --k 16 {options}".split())
    assert la.fit_to(64, args) == [] and 9999 in (args.num_clusters, args.num_neighbors)


def test_defaults_without_effect_are_not_scaled() -> None:
    """Nothing is said of a default m or k that nothing uses."""
    for options, name in (("--clustering dbscan --H 1", "--m"), ("--close self", "--m"), ("--background all", "--k")):
        notes = la.fit_to(10_000, la.parse_args(["--preset", "imagenet", *options.split()]))
        assert len(notes) == 1 and not notes[0].startswith(name), notes


def test_sizes_of_the_ablations_fit_too() -> None:
    """B_i's clusters and k' shrink with the data where they are defaults; C_i = B_i, of zero loss, is refused."""
    args = la.parse_args(["--preset", "table4-clusters"])
    assert len(la.fit_to(1_281_167, args)) == 0 and args.background_clusters == [3, 1000]
    assert any(note.startswith("--background-clusters 3 10, ") for note in la.fit_to(12_812, args))
    assert args.background_clusters == [3, 10]
    with pytest.raises(common.Fault, match="there are only 50 images"):
        la.fit_to(50, la.parse_args(["--preset", "table4-clusters", "--background-clusters", "3", "60"]))
    for preset, images, clusters in (("smoke", 64, 2), ("cifar10", 50_000, 39)):  # 1,000 for ImageNet's
        args = la.parse_args(["--preset", preset, "--background", "clusters"])
        la.fit_to(images, args)
        assert args.background_clusters == [3, clusters]
    args = la.parse_args(["--preset", "table5-nearest"])
    la.fit_to(400, args)
    assert (args.num_neighbors, args.close_neighbors) == (40, 1)
    with pytest.raises(common.Fault, match="would be all of B_i"):
        la.fit_to(400, la.parse_args(["--preset", "table5-nearest", "--close-neighbors", "40"]))


def test_a_preset_for_another_set_is_meant_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The m of a preset whose set is unknown here stays."""
    monkeypatch.setitem(la.PRESETS, "mine", dict(data="mine", num_clusters=500, num_neighbors=64))
    args = la.parse_args(["--preset", "mine"])
    assert la.fit_to(5000, args) == [] and args.num_clusters == 500


@pytest.mark.parametrize(("preset", "images", "m"), [
    ("cifar10", 50_000, 10_000), ("cifar10", 20_000, 4000), ("cifar10-thin", 5000, 1000), ("cifar10-thin", 1000, 200),
    ("imagenet", 126_689, 2967), ("imagenet", 119_999, 2810), ("imagenet", 700_000, 30_000),
    ("stl10", 105_000, 21_000), ("stl10", 10_500, 2100), ("imagenet", 1_281_167, 30_000), ("table5-3-10k", 12_811, 100),
])
def test_clusters_keep_their_size(preset: str, images: int, m: int) -> None:
    """Of less than half of the images that a preset is meant for there are fewer clusters, as large as those of all."""
    args = la.parse_args(["--preset", preset])
    la.fit_to(images, args)
    assert args.num_clusters == m
    with pytest.raises(common.Fault, match=f"; {m if images != 700_000 else 16_391} would fit"):
        la.fit_to(images, la.parse_args(["--preset", preset, "--m", str(images + 1)]))


@pytest.mark.parametrize(("options", "warm", "word"), [
    (["--epochs", "68"], 67, ""), (["--epochs", "67"], 22, "a third"), (["--epochs", "2"], 1, "a third"),
    (["--epochs", "1"], 67, "warning"), (["--epochs", "30", "--warmup-epochs", "30"], 30, "warning"),
])
def test_a_run_shorter_than_its_warm_start(options: list[str], warm: int, word: str) -> None:
    """A default warm start that leaves no epoch takes a third, one that was typed is warned of."""
    args = la.parse_args(["--data", "cifar10", *options])
    notes = la.fit_to(50_000, args)
    assert args.warmup_epochs == warm and len(notes) == bool(word) and all(word in note for note in notes)


def test_health_figures_equal_their_definitions() -> None:
    """|C_i|, the distance of v_i to the centre of C_i, and the two densities equal loops over the sets."""
    bank, rows = unit(N, D, seed=2), torch.tensor([1, 2, 40])
    clusters = random_clusters(2, 9)
    figures = la.health(clusters, clusters.labels, bank, rows)
    members = [(clusters.labels == clusters.labels[:, i : i + 1]).any(0) for i in rows.tolist()]
    assert figures["close_size"] == pytest.approx(sum(int(m.sum()) for m in members) / 3, abs=0.01)
    skewness = [(bank[m].mean(0) - bank[i]).norm().item() for m, i in zip(members, rows.tolist(), strict=True)]
    assert figures["skewness"] == pytest.approx(sum(skewness) / 3, abs=1e-3) and figures["nmi"] == pytest.approx(1)
    # An eighth of 4,096 and itself: the 30 nearest, and ranks 125 to 512; of more than 4,096 the paper's own ranks.
    for count, first, last in ((513, 125, 512), (4700, 1000, 4096)):
        big = unit(count, D, seed=3)
        local, around = la.density(big, rows)
        similarity = (big[rows] @ big.T).scatter(1, rows[:, None], -2).sort(1, descending=True).values
        assert torch.allclose(local, similarity[:, :30].mean(1), atol=1e-5)
        assert torch.allclose(around, similarity[:, first - 1 : last].mean(1), atol=1e-5)


def test_density_ranks() -> None:
    """The paper's ranks wherever they fit, their shares of 4,096 below, never one image in both."""
    assert la.density_ranks(1_281_167) == la.density_ranks(4097) == (30, 1000, 4096)
    assert la.density_ranks(257) == (30, 62, 256)
    for images in range(3, 5000):
        local, first, last = la.density_ranks(images)
        assert 1 <= local < first < images and first <= last < images


def watch_kmeans(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How each k-means with a seed is called, from now on; all are done by torch."""
    seen, kmeans = list[dict[str, Any]](), common.kmeans

    def watched(x: Tensor, k: int, **how: Any) -> common.KMeans:
        seen.extend([how] * ("seed" in how))
        return kmeans(x, k, **how | dict(backend="torch"))

    monkeypatch.setattr(common, "kmeans", watched)
    return seen


@pytest.mark.parametrize("option", ["fixed", "redrawn"])
def test_seeds_of_clusterings(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The H clusterings start from H seeds: the same at each clustering, or with --cluster-seeds redrawn new ones; by
    --kmeans, in --kmeans-iterations."""
    seen = watch_kmeans(monkeypatch)
    run_rows(tmp_path / "run", "--subset", "64", "--k", "20", "--cluster-seeds", option, "--kmeans", "faiss",
             "--kmeans-iterations", "7")
    seeds = [how["seed"] for how in seen]
    first, second = seeds[:3], seeds[3:]
    assert len(seeds) == 6 and len(set(first)) == len(set(second)) == 3
    assert first == second if option == "fixed" else not set(first) & set(second)
    assert all((how["backend"], how["iterations"]) == ("faiss", 7) for how in seen)


def test_figures_of_clusterings_are_those_of_one_rank() -> None:
    """Labels and figures of four clusterings on three ranks are those of one: the room that a rank leaves empty, so
    that all send equal shapes, counts for nothing."""

    class Share(Rank):
        own, sent = tuple[Tensor, ...](), list[tuple[Tensor, ...]]()

        def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            self.own = tensors
            return tuple(map(torch.cat, zip(*self.sent or [tensors], strict=True)))

    def cluster(rank: Rank) -> tuple[Tensor, dict[str, float]]:
        return la.cluster(rank, unit(N, D), 4, 5, ())  # type: ignore[arg-type]

    ranks = [Share(number, 3) for number in range(3)]
    for rank in ranks:
        cluster(rank)
    labels, figures = cluster(Rank())
    ranks[0].sent = [rank.own for rank in ranks]
    together, same = cluster(ranks[0])
    assert torch.equal(together, labels) and same == figures and figures["objective"] > 0


def test_clusterings_are_shared_out_over_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four clusterings three ranks make two, two and none: those of one rank, each of them once."""
    made, kmeans = list[int](), common.kmeans
    monkeypatch.setattr(common, "kmeans", lambda *a, seed, **k: (made.append(seed), kmeans(*a, seed=seed, **k))[1])

    def seeds(rank: int, world: int) -> list[int]:
        made.clear()
        la.cluster(Rank(rank, world), unit(N, D), 4, 5, ())  # type: ignore[arg-type]
        return list(made)

    alone, shares = seeds(0, 1), [seeds(rank, 3) for rank in range(3)]
    assert shares == [alone[:2], alone[2:], []]
    x = torch.cat([unit(20, D), unit(20, D)])  # twins: of k-means with as many clusters some stay empty
    labels, figures = la.cluster(Rank(), x, 4, 30, (), iterations=1)  # type: ignore[arg-type]
    found = [kmeans(x, 30, seed=seed, iterations=1) for seed in made[-4:]]
    assert torch.equal(labels, torch.stack([one.labels for one in found])) and sum(one.splits for one in found) > 0
    expected = [sum(one.objective[-1] for one in found) / 40 / 4, sum(one.empty for one in found) / 4,
                sum(one.splits for one in found) / 4]
    assert [figures[key] for key in ("objective", "empty", "splits")] == pytest.approx(expected, abs=1e-5)


def test_clusters_of_center_crops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--cluster-on center-crop clusters features extracted for it, unit rows of the network in evaluation mode, instead
    of the bank; training goes on in training mode."""
    extracted, clustered, extract, cluster = list[Tensor](), list[Tensor](), common.extract, la.cluster
    modes, forward = list[bool](), la.Encoder.forward
    monkeypatch.setattr(la.Encoder, "forward", lambda net, x: (modes.append(net.training), forward(net, x))[1])
    monkeypatch.setattr(common, "extract", lambda *a, **k: (extracted.append(extract(*a, **k)), extracted[-1])[1])
    monkeypatch.setattr(la, "cluster", lambda run, features, *a, **k: (clustered.append(features),
                                                                       cluster(run, features, *a, **k))[1])
    run_rows(tmp_path / "run", "--subset", "64", "--k", "20", "--cluster-on", "center-crop")
    assert len(clustered) == 2 and all(a is b for a, b in zip(clustered, extracted, strict=True))
    assert torch.allclose(extracted[0].norm(dim=1), torch.ones(64), atol=1e-5)
    assert modes == [True] * 2 + [False, True, True] * 2


def test_logged_sizes_are_those_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """intersection, alone and forced in the log are means over all images of the epoch's steps."""
    close, forced, loss, nearest = list[Tensor](), list[Tensor](), la.local_aggregation, la.nearest

    def watched(z: Tensor, slots: Tensor, similarity: Tensor, inside: Tensor, *rest: Any) -> Tensor:
        close.append(inside.sum(1).float())
        return loss(z, slots, similarity, inside, *rest)

    def searched(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = nearest(*arguments)
        forced.append(found[2].float())
        return found

    monkeypatch.setattr(la, "local_aggregation", watched)
    monkeypatch.setattr(la, "nearest", searched)
    row = run_rows(tmp_path / "run", "--epochs", "2")[1]
    sizes = torch.cat(close)
    assert len(sizes) == 256 and 0 < row["alone"] < 1 and 0 < row["forced"] < 1
    assert row["intersection"] == pytest.approx(sizes.mean().item(), rel=1e-5)
    assert row["alone"] == pytest.approx((sizes == 1).float().mean().item(), rel=1e-5)
    assert row["forced"] == pytest.approx(torch.cat(forced).mean().item(), rel=1e-5)


def test_nce_keeps_its_first_z(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--warmup-loss nce: every step of the warm start has the one Z estimated from the first step's noise."""
    seen, nce = list[tuple[Tensor, float]](), la.nce

    def watched(positive: Tensor, noise: Tensor, log_z: Tensor, num_images: int) -> Tensor:
        seen.append((noise.detach(), float(log_z)))
        return nce(positive, noise, log_z, num_images)

    monkeypatch.setattr(la, "nce", watched)
    run_rows(tmp_path / "run", "--warmup-loss", "nce", "--epochs", "2")
    estimate = 256 * seen[0][0].double().exp().mean()
    assert len(seen) == 8 and {log_z for _, log_z in seen} == {seen[0][1]}
    assert seen[0][1] == pytest.approx(estimate.log().item(), abs=1e-4)


def test_dbscan_joins_what_is_dense_and_leaves_noise_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--clustering dbscan: two dense groups are two clusters, and each image of neither is in one of its own; within
    --dbscan-radius. Five images make a group, four do not."""
    groups = F.normalize(torch.eye(4)[[0] * 6 + [1] * 6] + 0.01 * unit(12, 4), dim=1)
    labels = la.dbscan(torch.cat([groups, torch.eye(4)[2:]]), 0.5)
    assert labels.dtype == torch.int32 and len(labels.unique()) == 4
    assert len(labels[:6].unique()) == len(labels[6:12].unique()) == 1
    assert la.dbscan(torch.eye(4)[[0] * 5 + [1] * 4], 0.5).bincount().tolist() == [5, 1, 1, 1, 1]
    radii, dbscan = list[float](), la.dbscan
    monkeypatch.setattr(la, "dbscan", lambda x, radius: (radii.append(radius), dbscan(x, radius))[1])
    run_rows(tmp_path / "run", "--subset", "64", "--k", "20", "--epochs", "2", "--clustering", "dbscan", "--H", "1",
             "--dbscan-radius", "0.3")
    assert radii == [0.3]


@pytest.mark.parametrize(("options", "words"), [
    (["--m", "30000"], "m = 30000 clusters of 50,000 images hold 1.7 each"), (["--m", "25000"], ""),
    (["--k", "20000"], "k = 20000 is 40 % of the images"), (["--k", "20000", "--background", "all"], ""),
])
def test_sizes_that_make_no_sense_are_warned_of(options: list[str], words: str) -> None:
    """Clusters of fewer than two images, or k a large share of all: one warning, none where neither is so."""
    notes = la.fit_to(50_000, la.parse_args(["--data", "cifar10", *options]))
    assert len(notes) == bool(words) and all(note.startswith(f"warning: {words}") for note in notes)


ARCHS = {"A": "alexnet_bn_fc", "V": "vgg16_bn_fc", "R18": "resnet18", "R50": "resnet50"}


@pytest.mark.parametrize("row", figures.TABLES["la-supplement-1"].rows)
def test_presets_of_the_supplements_first_table(row: str) -> None:
    """A preset has the network, H and m that its row of the supplement's Table 1 names, and 4,096 nearest as B_i."""
    args = la.parse_args(["--preset", figures.TABLES["la-supplement-1"].rows[row][0]])
    arch, pair = row.split(" ", 1)
    assert f"({args.num_clusterings}, {args.num_clusters // 1000}k)" == pair and args.num_clusters % 1000 == 0
    assert (args.arch, args.num_neighbors, args.background, args.close, args.cluster_on, args.warmup_epochs) == (
        ARCHS[arch], 4096, "nearest", "clusters", "bank", 10)


@pytest.mark.parametrize(("preset", "changed"), [
    ("table4-all", dict(background="all")), ("table4-clusters", dict(background="clusters")),
    ("table5-self", dict(close="self")), ("table5-nearest", dict(close="nearest")),
    ("table5-3-10k", dict(num_clusterings=3)), ("table5-10-10k", dict(num_clusterings=10)),
    ("supplement3-k2048", dict(num_neighbors=2048)), ("supplement3-k8192", dict(num_neighbors=8192)),
    ("supplement3-center-crop", dict(cluster_on="center-crop")), ("supplement3-more-freq", dict(recluster_every=1000)),
    ("dbscan", dict(clustering="dbscan")),
])
def test_a_row_of_an_ablation_changes_one_thing(preset: str, changed: dict[str, Any]) -> None:
    """Rows of Tables 4, 5 and the supplement's Table 3 are the baseline (H = 1, m = 10,000) but for one option."""
    row, base = (vars(la.parse_args(["--preset", name])) for name in (preset, "table4-nearest"))
    assert {key: row[key] for key in row if row[key] != base[key] and key not in ("preset", "output")} == changed
    assert row["background_clusters"] == [3, 1000]


@pytest.mark.parametrize("preset", sorted(la.PRESETS))
def test_every_preset_parses(preset: str) -> None:
    """Each preset sets only options that exist, to values they may have."""
    assert la.parse_args(["--preset", preset]).preset == preset


# ---- training --------------------------------------------------------------------------------------------------------


def by_plain_pytorch(args: Any, steps: list[Step], images: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Weights and bank after each step of Local Aggregation, begun where the one before it ended, with sets as the
    paper has them: boolean tables of all images."""
    torch.manual_seed(args.seed)
    backbone = common.backbone(args.arch, args.width, True)
    network = torch.nn.ModuleDict(dict(backbone=backbone, head=torch.nn.Linear(backbone.dim, args.feature_dim)))
    network.double()
    optimizer = torch.optim.SGD(network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    bank = F.normalize(torch.randn(images, args.feature_dim, generator=common.generator(args.seed, "bank")), dim=1)
    z, close = torch.tensor(0.0), torch.eye(images, dtype=torch.bool)
    background = torch.ones_like(close)

    def share_a_cluster(name: str, count: int, clusters: int, *key: int) -> Tensor:
        """Whether images i and j share one of `count` clusterings of the bank as it is now, (N, N)."""
        found = torch.zeros_like(close)
        for number in range(count):
            source = common.generator(args.seed, "cluster", name, *key, number)
            labels = common.kmeans(bank, clusters, seed=int(torch.randint(2**31, (), generator=source))).labels
            found |= labels[:, None] == labels
        return found

    for number, (index, (pixels,), _) in enumerate(steps):
        epoch, step = divmod(number, len(steps) // args.epochs)
        if number:  # who is among the nearest can hang on the last digit: none of ours is carried on
            before = steps[number - 1].state
            network.load_state_dict(before["encoder"])
            optimizer.load_state_dict(before["optimizer"])
            bank = before["bank"]["features"].clone()
        rate = args.lr * (1 + math.cos(math.pi * number / len(steps))) / 2
        optimizer.param_groups[0].update(lr=rate, momentum=args.momentum)  # not what the state brought
        key = (epoch, step) if args.cluster_seeds == "redrawn" else ()
        if epoch >= args.warmup_epochs and (step == 0 or (args.recluster_every and step % args.recluster_every == 0)):
            if args.background == "clusters":
                background = share_a_cluster("background", *args.background_clusters, *key)
            if args.close == "clusters":
                close = share_a_cluster("close", args.num_clusterings, args.num_clusters, *key)
        noise = torch.randint(images, (len(index), 4096), generator=common.generator(args.seed, "noise", epoch, step))
        optimizer.zero_grad()
        features = []
        for part in torch.arange(len(index)).chunk(args.accumulate):
            output = network["head"](network["backbone"]((pixels[part].double() - 0.5) / 0.25)).float()
            f, i = F.normalize(output), index[part]
            every = (f @ bank.T / args.temperature).exp()
            inside, near = background[i], close[i]
            if epoch < args.warmup_epochs and args.warmup_loss == "nce":
                own, other = every.gather(1, i[:, None]), every.gather(1, noise[part])
                z = images * other.detach().mean() if number == 0 else z
                p, q = own / z, other / z
                losses = -((p / (p + 4096 / images)).log() + (1 - q / (q + 4096 / images)).log().sum(1, keepdim=True))
            elif epoch < args.warmup_epochs:
                losses = -(every.gather(1, i[:, None])[:, 0] / every.sum(1)).log()
            else:
                if args.background == "nearest":
                    nearest = every.topk(args.num_neighbors).indices
                    farthest, itself = nearest[:, -1:], i[:, None]
                    inside = torch.zeros_like(inside).scatter(1, nearest, True)
                    there = inside.gather(1, itself)
                    inside = inside.scatter(1, farthest, inside.gather(1, farthest) & there).scatter(1, itself, True)
                if args.close == "nearest":
                    near = near | torch.zeros_like(near).scatter(
                        1, every.masked_fill(~inside, -1).topk(args.close_neighbors).indices, True)
                losses = -((every * (inside & near)).sum(1) / (every * inside).sum(1)).log()
            (losses.mean() / args.accumulate).backward()
            features.append(f.detach())
        optimizer.step()
        for slot, f in zip(index.tolist(), torch.cat(features), strict=True):
            bank[slot] = F.normalize(args.bank_momentum * bank[slot] + (1 - args.bank_momentum) * f, dim=0)
        yield network.state_dict(), bank


@pytest.mark.parametrize("options", [
    "", "--close self", "--close nearest --close-neighbors 3", "--background all", "--recluster-every 1",
    "--background clusters --background-clusters 2 4", "--cluster-seeds redrawn", "--warmup-loss nce", "--k 2",
    "--accumulate 2", "--warmup-epochs 0", "--bank-momentum 0.2 --H 1 --seed 3 --momentum 0.5",
])
def test_training_is_that_of_plain_pytorch(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of three epochs, the first of them NPID's, leaves the weights and the bank of a loop over tables of who
    is close to whom, with gradients by autograd."""
    steps = record_steps(la, monkeypatch)
    words = [*TINY, "--subset", "32", "--no-amp", "--tau", "0.5", "--epochs", "3", "--schedule", "cosine", "--H", "2",
             "--m", "6", "--k", "10", "--output", f"{tmp_path}/run"]
    args = la.parse_args([*words, *options.split()])
    la.main(args)
    assert len(steps) == 6
    for step, (weights, bank) in zip(steps, by_plain_pytorch(args, steps, 32), strict=True):
        torch.testing.assert_close(dict(step.state["encoder"]), dict(weights), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(step.state["bank"]["features"], bank, atol=1e-5, rtol=1e-4)
