"""The clustering part of a DeepCluster epoch against Faiss, and PIC's parts: python benchmarks/bench_deepcluster.py

prints one JSON line for each; every function returns such a record. N = 50,000 descriptors of 512 numbers, k = 1,000.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import deepcluster


def descriptors(n: int, d: int, groups: int = 500) -> Tensor:
    """Rows (n, d) in overlapping groups of unequal size, with a spectrum that falls as that of a network does."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, d, generator=generator)
    group = (groups * torch.rand(n, generator=generator).square()).long()
    scale = 1 / torch.arange(1, d + 1).sqrt()
    return (centres[group] + torch.randn(n, d, generator=generator)) * scale + 1


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def whitened(h: Tensor, dim: int = 256) -> Tensor:
    """x (N, dim), as describe() makes it of descriptors that fit into memory."""
    projection, offset, _, span = deepcluster.pca_of(h, dim)
    if span < deepcluster.MILD:
        projection, offset = projection.float(), offset.float()
    return torch.cat([deepcluster.whiten(rows, projection, offset) for rows in torch.split(h, 4096)])


def faiss_whitened(h: Tensor, dim: int = 256) -> Tensor:
    """The same by Faiss's PCAMatrix."""
    faiss = common.import_faiss()
    rows = np.ascontiguousarray(h.cpu().numpy())
    pca = faiss.PCAMatrix(h.shape[1], dim, -0.5)
    pca.train(rows)
    return torch.nn.functional.normalize(torch.from_numpy(pca.apply(rows))).to(h.device)


def objective(x: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the clusters' means."""
    return float((x - deepcluster.cluster_means(x, labels)[labels.long()]).square().sum())


def clustering(n: int, d: int, k: int, device: torch.device, repeats: int, groups: int = 500) -> dict[str, Any]:
    """PCA, whitening and k-means (20 iterations) of an epoch: time through Faiss over ours, and both objectives.

    kmeans_ratio is that of the k-means alone, on the same whitened rows. With 500 groups it is at a fixed point after
    about 13 iterations, where ours ends and Faiss does not; with as many groups as rows it never is.
    """
    h, pairs, quality, alone = descriptors(n, d, groups).to(device), [], [], []
    for turn in range(repeats + 1):
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def ours(found: dict[str, Any] = found, seed: int = turn) -> None:
            x = whitened(h)
            found["ours"] = x, deepcluster.kmeans_half(x, k, seed)[0]

        def theirs(found: dict[str, Any] = found, seed: int = turn) -> None:
            x = faiss_whitened(h)
            found["theirs"] = x, common.kmeans(x, k, seed=seed, backend="faiss").labels

        pairs.append((seconds(theirs, device), seconds(ours, device)))
        quality.append(objective(*found["ours"]) / objective(*found["theirs"]))
        x = found["ours"][0]

        def our_kmeans(x: Tensor = x, seed: int = turn) -> None:
            deepcluster.kmeans_half(x, k, seed)

        def their_kmeans(x: Tensor = x, seed: int = turn) -> None:
            common.kmeans(x, k, seed=seed, backend="faiss")

        alone.append(seconds(their_kmeans, device) / seconds(our_kmeans, device))
    pairs, quality, alone = pairs[1:], quality[1:], alone[1:]  # the first round warms up
    ratios = [a / b for a, b in pairs]
    return dict(case=f"deepcluster clustering N={n} d={d} k={k}, {groups} groups", ratio_min=round(min(ratios), 3),
                ratio_median=round(statistics.median(ratios), 3), ratio_max=round(max(ratios), 3),
                theirs_seconds=round(statistics.median(a for a, _ in pairs), 3),
                ours_seconds=round(statistics.median(b for _, b in pairs), 3), rounds=len(pairs),
                kmeans_ratio_min=round(min(alone), 3), kmeans_ratio_median=round(statistics.median(alone), 3),
                kmeans_ratio_max=round(max(alone), 3),
                objective_ratio=round(statistics.median(quality), 4))


def pic(n: int, d: int, device: torch.device) -> dict[str, Any]:
    """Seconds of PIC's parts: graph of 5 neighbours, affinity, 200 iterations, basins."""
    x = whitened(descriptors(n, d).to(device))
    itself, result = torch.arange(n, device=device), dict[str, Any](case=f"deepcluster PIC N={n} d={x.shape[1]}")

    def timed(name: str, function: Callable[[], Any]) -> Any:
        kept = []
        result[f"{name}_seconds"] = round(seconds(lambda: kept.append(function()), device), 3)
        return kept[0]

    nearest = timed("graph", lambda: common.neighbors(x, x, 5, exclude=itself)[1])
    graph = timed("affinity", lambda: deepcluster.affinity(x, nearest, "median"))
    v = timed("iterations", lambda: deepcluster.power_iteration(graph))
    labels = timed("basins", lambda: deepcluster.basins(graph, v))
    sizes = torch.bincount(labels)
    return result | dict(edges=len(graph.rows), clusters=len(sizes), largest_share=round(int(sizes.max()) / n, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    common.keep_freed_memory()  # as every run does
    device = torch.device(args.device)
    for record in (clustering(args.images, 512, min(1000, args.images // 50), device, args.repeats),
                   pic(args.images, 512, device)):
        print(json.dumps(record | dict(device=common.device_name(device), threads=torch.get_num_threads())), flush=True)


if __name__ == "__main__":
    main()
