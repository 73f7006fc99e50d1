"""Claims about k-means, by torch and by Faiss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import common

BACKENDS = ["torch", "faiss"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each back end that there is."""
    if request.param == "faiss":
        pytest.importorskip("faiss")
    return str(request.param)


def cloud(rows: int, dim: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Unit rows around a few directions, as features are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dim, generator=generator)
    x = centres[torch.randint(20, (rows,), generator=generator)] + torch.randn(rows, dim, generator=generator)
    return F.normalize(x, dim=1).to(device)


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """(N, k) in float64, without expanding the square."""
    return torch.stack([(x.double() - c).square().sum(1) for c in centroids.double()], 1)


class OnMps(Tensor):
    """A tensor of the CPU that says it is on mps, where there is no float64 and no segment_reduce."""

    device = property(lambda self: torch.device("mps"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.segment_reduce
        made = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            return made.as_subclass(Tensor)
        assert not isinstance(made, Tensor) or made.dtype != torch.float64
        return made


def test_what_mps_lacks_is_not_asked_of_it() -> None:
    """Assignments and sums of clusters do without float64 and segment_reduce on the device, and are the same there."""
    x = cloud(300, 8)
    labels, total = common.assign(x, x[:9])
    there = x.as_subclass(OnMps)
    found, objective = common.assign(there, there[:9])
    assert torch.equal(found.cpu(), labels) and objective == pytest.approx(total)
    for one, other in zip(common.cluster_sums(x, labels, 9), common.cluster_sums(there, found, 9), strict=True):
        assert torch.equal(one, other.cpu())


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize(("rows", "k", "dim"), [(3000, 61, 32), (2500, 256, 128), (5, 5, 3), (40, 6, 1), (1, 1, 1)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_assignment_is_the_nearest(
    rows: int, k: int, dim: int, scale: float, screened: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row gets its nearest centroid by float64 distances, with and without the screen in 8 bits."""
    monkeypatch.setattr(common, "HAS_INT8", screened)
    x = scale * cloud(rows, dim, device=device)
    centroids = x[:k] + 0.1 * scale * torch.randn(k, dim, device=device)
    labels, total = common.assign(x, centroids)
    distances = squared_distances(x, centroids)
    nearest = distances.amin(1)
    chosen = distances.gather(1, labels[:, None])[:, 0]
    assert float((chosen - nearest).max()) < 1e-5 * scale**2
    assert total == pytest.approx(float(nearest.sum()), rel=1e-5)


def test_screen_gives_up_on_ties() -> None:
    """When all centroids are alike the screen rules nothing out; the first one is then the label."""
    x = cloud(300, 16)
    centroids = x[:1].repeat(64, 1)
    low = [common._int8(x)]
    assert common._nearest_screened(x, centroids, -0.5 * centroids.square().sum(1), low) is None
    assert not common.assign(x, centroids)[0].any()


def test_equally_near_centroids_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of centroids that are equally near the first is the label, though in 8 bits their offsets round apart."""
    monkeypatch.setattr(common, "HAS_INT8", hasattr(torch, "_int_mm"))
    row, centroids = torch.tensor([[127.0, 1, 0]]), torch.tensor([[1.0, 1, 1], [1, 0, 0], [-127, -127, 0]])
    assert common.nearest(row, centroids).item() == 0


def few_columns(rows: int, seed: int = 0) -> Tensor:
    """Unit rows of 128 numbers, all but four of them zero, which rounding leaves as they are."""
    return F.normalize(F.pad(cloud(rows, 4, seed), (0, 124)), dim=1)


STRUCTURED = {
    "one-hot": lambda: (torch.eye(64).repeat(9, 1), torch.eye(64)),
    "whole numbers": lambda: (torch.randint(-9, 10, (700, 16)).float(), torch.randint(-9, 10, (90, 16)).float()),
    "norms over six decades": lambda: (cloud(700, 32) * torch.logspace(-3, 3, 700)[:, None], cloud(90, 32, 1)),
    "tiny rows": lambda: (1e-4 * cloud(700, 32), cloud(90, 32, 1) * torch.linspace(1, 3, 90)[:, None]),
    "far centroids": lambda: (cloud(700, 32), torch.cat([1e4 * cloud(40, 32, 1), cloud(50, 32, 2)])),
    "large offset": lambda: (cloud(700, 32) + 100, cloud(90, 32, 1) + 100),
    "one sign": lambda: (cloud(700, 32).abs(), cloud(90, 32, 1).abs()),
    "nearly alike": lambda: (1 + 1e-3 * cloud(700, 32), 1 + 1e-3 * cloud(90, 32, 1)),
    "few columns": lambda: (few_columns(3000), few_columns(300, 1)),
    "pairs": lambda: (cloud(700, 32), cloud(45, 32, 1).repeat_interleave(2, 0)),
}


@pytest.mark.parametrize("case", STRUCTURED)
def test_screen_holds_on_structured_rows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where errors of rounding are not like noise, too, no centroid is nearer than the label's in float64."""
    monkeypatch.setattr(common, "HAS_INT8", True)
    x, centroids = STRUCTURED[case]()
    labels, _ = common.assign(x, centroids)
    scores = x.double() @ centroids.double().T - 0.5 * centroids.double().square().sum(1)
    chosen = scores.gather(1, labels[:, None])[:, 0]
    size = x.double().norm(dim=1) * centroids.double().norm(dim=1).max() + centroids.double().square().sum(1).max()
    assert float(((scores.amax(1) - chosen) / size).max()) < 1e-6


@pytest.mark.skipif(not common.HAS_INT8, reason="no products in 8 bits here")
@pytest.mark.parametrize("k", [2, 15, 16, 17, 255, 256, 257, 1000])
def test_screen_rules_most_out(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows like features the screen leaves few candidates, however many centroids or keys there are: neither k-means
    nor the search for neighbours has to go back to all products."""
    x, centroids = cloud(2000, 64), cloud(k, 64, seed=1)
    labels = common._nearest_screened(x, centroids, -0.5 * centroids.square().sum(1), common.low_chunks(x, k))
    assert labels is not None and float((labels == squared_distances(x, centroids).argmin(1)).float().mean()) > 0.999
    keys = F.normalize(cloud(2048 + k, 64, seed=2), dim=1)
    expected = (x[:50] @ keys.T).topk(5).indices
    monkeypatch.setattr(common, "_neighbors", None)
    assert torch.equal(common._neighbors_screened(x[:50], keys, 5, None)[1], expected)


def test_assignment_commutes_with_permutation(device: str) -> None:
    """Given the centroids, permuting the rows permutes the labels."""
    x = cloud(2000, 64, device=device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(common.assign(x[order], x[:50])[0], common.assign(x, x[:50])[0][order])


def test_objective_never_rises(backend: str, device: str) -> None:
    """Without a split no iteration makes the sum of squared distances larger."""
    found = common.kmeans(cloud(4000, 32, device=device), 40, iterations=12, backend=backend)
    assert found.splits == 0 and 2 < len(found.objective) <= 13
    assert all(
        after <= before * (1 + 1e-6)
        for before, after in zip(found.objective, found.objective[1:], strict=False)
    )


def test_fixed_point_ends_the_iterations(device: str) -> None:
    """Where nothing changes any more, more iterations give the same bits; a split is not the end."""
    x, alike = cloud(3000, 8, device=device), torch.ones(50, 4, device=device)
    short, long = common.kmeans(x, 12, iterations=200), common.kmeans(x, 12, iterations=10_000)
    assert len(short.objective) == len(long.objective) < 200
    assert torch.equal(short.labels, long.labels) and torch.equal(short.centroids, long.centroids)
    for iterations in range(len(short.objective) - 2 - (device in common.TENSOR_CORES)):  # float32 checks float16's end
        assert not torch.equal(common.kmeans(x, 12, iterations=iterations).labels, short.labels)
    assert common.kmeans(alike, 2, iterations=5).splits == 5


def test_result_is_consistent(backend: str, device: str) -> None:
    """Labels are the nearest centroids and the last objective is the sum of their squared distances."""
    x = cloud(3000, 32, device=device)
    found = common.kmeans(x, 37, iterations=5, backend=backend)
    distances = squared_distances(x, found.centroids)
    assert (
        found.labels.dtype == torch.int32
        and found.labels.shape == (3000,)
        and found.centroids.shape == (37, 32)
    )
    assert found.objective[-1] == pytest.approx(float(distances.amin(1).sum()), rel=1e-5)
    chosen = distances.gather(1, found.labels.long()[:, None])[:, 0]
    assert float((chosen - distances.amin(1)).max()) < 1e-5
    assert found.backend.startswith(backend)


def test_blobs_are_recovered(backend: str, device: str) -> None:
    """Well separated blobs are the clusters, from one start in each."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(6).repeat_interleave(50)
    x = (10 * torch.eye(6, 8)[truth] + torch.randn(300, 8, generator=generator)).to(device)
    found = common.kmeans(x, 6, init=x[::50], backend=backend)
    assert torch.equal(found.labels.cpu(), truth.int())


def test_torch_and_faiss_reach_the_same_objective() -> None:
    """From the same start both begin at the same value and end within 0.1 % of each other."""
    pytest.importorskip("faiss")
    x = cloud(6000, 64)
    ours, theirs = (common.kmeans(x, 100, seed=1, backend=name) for name in BACKENDS)
    assert ours.objective[0] == pytest.approx(theirs.objective[0], rel=1e-5)
    assert ours.objective[-1] == pytest.approx(theirs.objective[-1], rel=1e-3)
    two = common.kmeans(x, 2, iterations=1, backend="faiss")
    assert two.objective[0] > two.objective[-1]  # of all rows: Faiss would take 256 a cluster


def test_same_seed_same_result(backend: str) -> None:
    """A seed fixes everything, another seed starts from other rows."""
    x = cloud(1500, 16)
    one, two, other = (common.kmeans(x, 25, seed=seed, backend=backend) for seed in (0, 0, 1))
    assert torch.equal(one.labels, two.labels) and torch.equal(one.centroids, two.centroids)
    assert not torch.equal(one.centroids, other.centroids)


HALF = {
    "features": lambda x: x,
    "nearly alike": lambda x: F.normalize(torch.ones(x.shape[1]), dim=0) + 0.03 * x,
    "huge": lambda x: 1e6 * x,
    "tiny": lambda x: 1e-6 * x,
}


@pytest.mark.parametrize("case", HALF)
def test_half_precision_only_leads_the_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: iterations in float16 end as low as those in float32, with float32's nearest centroids as labels."""
    x, used = HALF[case](cloud(4000, 64)), list[Tensor]()
    exact = common.kmeans(x, 60, seed=1)
    monkeypatch.setattr(common, "TENSOR_CORES", {"cpu"})
    rough = common._Half.nearest
    monkeypatch.setattr(common._Half, "nearest", lambda *args: used.append(rough(*args)) or used[-1])
    found = common.kmeans(x, 60, seed=1)
    assert len(used) > 10 and all(labels.dtype == torch.int64 for labels in used)
    assert found.objective[0] == pytest.approx(exact.objective[0], rel=1e-4)
    assert found.objective[-1] == pytest.approx(exact.objective[-1], rel=3e-3)
    labels, total = common.assign(x, found.centroids)
    assert torch.equal(found.labels.long(), labels) and found.objective[-1] == total


@pytest.mark.parametrize("far", [1e2, 1e5, 1e9, 1e30])
def test_half_precision_bears_far_centroids(far: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start far beyond float16's range is nobody's nearest, and is split off a full cluster like any empty one."""
    monkeypatch.setattr(common, "TENSOR_CORES", {"cpu"})
    x = cloud(1000, 64)
    start = torch.cat([x[:10], torch.full((10, 64), far)])
    half, truth = common._Half(x), squared_distances(x, start).argmin(1)
    assert float((half.nearest(start) == truth).float().mean()) > 0.99
    found = common.kmeans(x, 20, init=start, iterations=15)
    assert found.splits >= 10 and len(found.labels.unique()) == 20


def test_half_precision_ends_at_a_fixed_point_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float16 moves no label any more, float32 goes on until it moves none either."""
    monkeypatch.setattr(common, "TENSOR_CORES", {"cpu"})
    x = cloud(3000, 8)
    found = common.kmeans(x, 12, iterations=500)
    assert len(found.objective) < 400
    sums, counts = common.cluster_sums(x, found.labels.long(), 12)
    torch.testing.assert_close(found.centroids, sums / counts[:, None], rtol=0, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("exact", ["neither", "rows", "keys"])
def test_products_in_8_bits_are_as_near_as_it_is_allowed_for(exact: str, size: float) -> None:
    """Two products of a row in 8 bits are off by no more than `_reach` between them, whichever side is rounded.

    It is no looser than four times the largest error that random rows have.
    """
    x, y = size * cloud(200, 64), cloud(300, 64, seed=1) / size
    whole = (127 * x / x.abs().max()).round() if exact == "rows" else (127 * y / y.abs().max()).round()
    rows, keys = common._int8(whole if exact == "rows" else x), common._int8(whole if exact == "keys" else y)
    x, y = (whole if exact == "rows" else x), (whole if exact == "keys" else y)
    products = rows.values.double() @ keys.values.double().T
    error = (products - x.double() @ y.double().T / (rows.scale * keys.scale)).abs().amax(1)
    reach = common._reach(rows, *common._worst(keys))
    assert (2 * error <= reach).all()
    assert float(reach.float().mean()) < 4 * 2 * float(error.max()) + 6


def test_empty_clusters_are_split(device: str) -> None:
    """Starts that no row is nearest to take halves of full clusters, and all clusters end up used."""
    x = cloud(1000, 8, device=device)
    init = torch.cat([x[:10], torch.full((10, 8), 100.0, device=device)])
    found = common.kmeans(x, 20, init=init, iterations=15)
    assert found.splits >= 10 and found.empty == 0
    assert len(found.labels.unique()) == 20


def test_split_halves_a_donor() -> None:
    """A split copies a donor of two rows or more and moves both by 1/1024 in opposite directions."""
    counts = torch.tensor([0, 1, 9, 0])
    centroids = torch.ones(4, 6)
    assert common.split_empty(centroids, counts, np.random.default_rng(0)) == 2
    assert torch.equal(centroids[1], torch.ones(6))  # one row: never a donor
    assert float((centroids - 1).abs().max()) < 2.1 / 1024
    for cluster in (0, 2, 3):
        assert not torch.equal(centroids[cluster], torch.ones(6))
    second = set[bool]()
    for seed in range(9):  # of eight rows each half has four, and either may be halved again
        two = torch.ones(3, 2)
        common.split_empty(two, torch.tensor([0, 0, 8]), np.random.default_rng(seed))
        second.add(bool((two[0] - 1).abs().max() < 1e-4))
    assert second == {False, True}
    for seed in range(9):  # whatever is drawn
        single = torch.arange(6.0)[:, None]
        common.split_empty(single, torch.tensor([0, 1, 1, 1, 1, 4]), np.random.default_rng(seed))
        assert torch.equal(single[1:5], torch.arange(1.0, 5)[:, None])
    sizes, one = torch.tensor([0, 4]), torch.ones(2, 2)
    common.split_empty(one, sizes, np.random.default_rng(0))
    torch.testing.assert_close(one[0] + one[1], torch.full((2,), 2.0))


DEGENERATE = {
    "one cluster": (torch.randn(40, 3), 1),
    "a cluster for each row": (torch.randn(40, 3), 40),
    "all rows zero": (torch.zeros(40, 3), 7),
    "all rows equal": (torch.ones(40, 3), 40),
    "fewer distinct rows than clusters": (torch.randn(5, 3).repeat(8, 1), 12),
    "one row": (torch.randn(1, 3), 1),
    "one dimension": (torch.randn(30, 1), 4),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input(case: str, backend: str, device: str) -> None:
    """Odd input ends, without NaN, with labels in range; k = N leaves no distance."""
    x, k = DEGENERATE[case]
    found = common.kmeans(x.to(device), k, backend=backend)
    assert found.centroids.isfinite().all() and np.isfinite(found.objective).all()
    assert found.labels.min() >= 0 and found.labels.max() < k
    if len(x.unique(dim=0)) <= k:
        assert found.objective[-1] < 1e-2


def test_bad_input_is_a_fault(backend: str) -> None:
    """k < 1, k > N and non-finite rows are refused in one line."""
    x = torch.randn(10, 3)
    for k in (0, 11):
        with pytest.raises(common.Fault, match="number of clusters"):
            common.kmeans(x, k, backend=backend)
    for value in (float("nan"), float("inf")):
        x[3, 1] = value
        with pytest.raises(common.Fault, match="NaN or infinite"):
            common.kmeans(x, 2, backend=backend)


def test_cluster_sums_add_up(device: str) -> None:
    """Sums and counts of each cluster equal a loop, and the sorted way of CUDA equals index_add_."""
    x, labels = torch.randn(500, 4, device=device), torch.randint(9, (500,), device=device)
    labels[labels == 4] = 5  # one cluster stays empty
    sums, counts = common.cluster_sums(x, labels, 10)
    for cluster in range(10):
        torch.testing.assert_close(sums[cluster], x[labels == cluster].sum(0))
        assert counts[cluster] == (labels == cluster).sum()
    order = torch.argsort(labels, stable=True)
    torch.testing.assert_close(torch.segment_reduce(x[order], "sum", lengths=counts, axis=0), sums)


def test_faiss_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on a CPU are clustered there, whatever GPUs Faiss sees."""
    faiss = pytest.importorskip("faiss")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    assert common.kmeans(cloud(300, 8), 5, iterations=2, backend="faiss").backend == f"faiss {faiss.__version__} cpu"
