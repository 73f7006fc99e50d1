"""Ratios of our kernels to what they replace, measured in turn in one process, and times and memory of our own.

    python benchmarks/bench.py [NAME ...]      # into results/bench.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cld
import common
import deepcluster
import eval_linear
import local_aggregation
import npid

Record = dict[str, Any]


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def race(
    case: str, theirs: Callable[[], Any], ours: Callable[[], Any], args: argparse.Namespace, most: int = 1000,
    after: Callable[[], Any] = lambda: None,
) -> Record:
    """Time of theirs over time of ours, round by round in alternating order, after one untimed round; most: rounds of
    a long benchmark; after: what is left to do after each, untimed."""
    device, pairs = torch.device(args.device), []
    for turn in range(min(args.repeats, most) + 1):
        took = dict[Callable[[], Any], float]()
        for way in (theirs, ours) if turn % 2 else (ours, theirs):
            took[way] = seconds(way, device)
            after()
        pairs.append((took[theirs], took[ours]))
    pairs = pairs[1:]
    ratios = [a / b for a, b in pairs]
    return {
        "case": case,
        "ratio_min": round(min(ratios), 3),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "theirs_seconds": round(statistics.median(a for a, _ in pairs), 6),
        "ours_seconds": round(statistics.median(b for _, b in pairs), 6),
        "rounds": len(pairs),
    }


def extra_memory(function: Callable[[], Any]) -> int:
    """The most bytes that a call's tensors take at a time, beside what was there before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is talkative
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(profile_memory=True) as profile:
            function()
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in changes))


def unit_rows(rows: int, dim: int, device: str, seed: int) -> Tensor:
    """Random directions, (rows, dim)."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(device)


# ---- exact softmax over the bank ---------------------------------------------------------------------------

TEMPERATURE = 0.07


def softmax_ours(z: Tensor, index: Tensor, bank: Tensor) -> Tensor:
    """Gradient for z of the mean exact loss by streaming attention."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(common.bank_softmax(z, index, bank, TEMPERATURE).mean(), z)[0]


def softmax_logits(z: Tensor, index: Tensor, bank: Tensor) -> Tensor:
    """The same by cross-entropy on materialised logits."""
    z = z.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(z @ bank.T / TEMPERATURE, index), z)[0]


def nce(z: Tensor, index: Tensor, bank: Tensor, num_negatives: int = 4096) -> Tensor:
    """Gradient for z of eq. (7) as the authors compute it: rows of the bank gathered for each image; Z = 2.2 N."""
    z = z.clone().requires_grad_()
    noise = torch.randint(len(bank), (len(z), num_negatives), device=z.device)
    rows = bank[torch.cat([index[:, None], noise], 1)]  # (B, m + 1, D)
    scores = torch.bmm(rows, z.unsqueeze(2))[..., 0] / TEMPERATURE - torch.tensor(2.2 * len(bank)).log()
    log_noise = torch.tensor(num_negatives / len(bank)).log()
    log_sum = torch.logaddexp(scores, log_noise.to(scores))
    loss = (log_sum[:, 0] - scores[:, 0]) + (log_sum[:, 1:] - log_noise).sum(1)
    return torch.autograd.grad(loss.mean(), z)[0]


def batch(size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """z (128, 128), index (128,) and bank (size, 128)."""
    index = torch.randint(size, (128,), generator=torch.Generator().manual_seed(2))
    return unit_rows(128, 128, device, 1), index.to(device), unit_rows(size, 128, device, 0)


def bench_softmax(args: argparse.Namespace) -> list[Record]:
    """Exact softmax against cross-entropy on logits, B = 128, D = 128: time, and memory as a share of B x N floats;
    bound: a tenth."""
    records = []
    for size in (50_000, 400_000):
        inputs = batch(size, args.device)
        expected = softmax_logits(*inputs)
        difference = (softmax_ours(*inputs) - expected).norm() / expected.norm()
        record = race(f"N={size}", partial(softmax_logits, *inputs), partial(softmax_ours, *inputs), args)
        records.append(record | {"gradient_difference": float(difference)})
    for name, way, limit in (("ours", softmax_ours, 0.1), ("logits", softmax_logits, None)):
        share = extra_memory(partial(way, *inputs)) / (4 * 128 * size)
        records.append({"case": f"extra memory, {name}, N={size}", "share_of_logits": round(share, 4), "limit": limit})
    return records


def bench_nce(args: argparse.Namespace) -> list[Record]:
    """Exact softmax against NCE with 4,096 noise samples for each image, B = 128, D = 128."""
    records = []
    for size in (50_000, 400_000):
        inputs = batch(size, args.device)
        records.append(race(f"N={size}", partial(nce, *inputs), partial(softmax_ours, *inputs), args))
    return records


# ---- k-means and neighbours --------------------------------------------------------------------------------


def bench_kmeans(args: argparse.Namespace) -> list[Record]:
    """Assignment of 50,000 rows, D = 128, and a whole clustering of Local Aggregation, torch against Faiss."""
    faiss = common.import_faiss()
    x, records = unit_rows(50_000, 128, args.device, 0), []
    rows = x.cpu().numpy()
    for k in (1_000, 2_000):
        centroids = common.kmeans(x, k, iterations=2).centroids
        index: Any = faiss.IndexFlatL2(128)
        if faiss.get_num_gpus() > 0:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(centroids.cpu().numpy())
        record = race(f"assignment, k={k}", partial(index.search, rows, 1), partial(common.assign, x, centroids), args)
        same = torch.from_numpy(index.search(rows, 1)[1][:, 0]) == common.assign(x, centroids)[0].cpu()
        records.append(record | {"labels_equal": float(same.float().mean())})
    runs: dict[str, common.KMeans] = {}
    record = race(
        "20 iterations, k=1000",
        lambda: runs.update(theirs=common.kmeans(x, 1_000, backend="faiss")),
        lambda: runs.update(ours=common.kmeans(x, 1_000)),
        args, most=5,
    )
    objective = runs["ours"].objective[-1] / runs["theirs"].objective[-1]
    record |= {"objective_ratio": objective, "backends": [runs["theirs"].backend, runs["ours"].backend]}
    return [*records, record]


def bench_knn(args: argparse.Namespace) -> list[Record]:
    """The 200 best of 50,000 rows for 10,000 queries, D = 128, torch against Faiss."""
    faiss = common.import_faiss()
    queries, keys = unit_rows(10_000, 128, args.device, 1), unit_rows(50_000, 128, args.device, 0)
    rows = queries.cpu().numpy(), keys.cpu().numpy()
    return [race("10k x 50k, top 200", lambda: faiss.knn(*rows, 200, metric=faiss.METRIC_INNER_PRODUCT),
                 lambda: common.neighbors(queries, keys, 200), args, most=5)]


# ---- DeepCluster's clustering ------------------------------------------------------------------------------


def descriptors(n: int, d: int, groups: int) -> Tensor:
    """Rows (n, d) in overlapping groups of unequal size, with a spectrum that falls as that of a network does."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, d, generator=generator)
    group = (groups * torch.rand(n, generator=generator).square()).long()
    scale = 1 / torch.arange(1, d + 1).sqrt()
    return (centres[group] + torch.randn(n, d, generator=generator)) * scale + 1


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
    return F.normalize(torch.from_numpy(pca.apply(rows))).to(h.device)


def objective(x: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the clusters' means."""
    return float((x - deepcluster.cluster_means(x, labels)[labels.long()]).square().sum())


def clustering(args: argparse.Namespace, n: int, k: int, groups: int) -> list[Record]:
    """PCA, whitening and 20 iterations of k-means, and the k-means alone; each round has a seed of its own."""
    h, found = descriptors(n, 512, groups).to(args.device), dict[str, tuple[Tensor, Tensor]]()
    ready, calls = whitened(h), itertools.count()

    def theirs(x: Tensor | None = None) -> None:
        x = faiss_whitened(h) if x is None else x
        found["theirs"] = x, common.kmeans(x, k, seed=next(calls) // 2, backend="faiss").labels

    def ours(x: Tensor | None = None) -> None:
        x = whitened(h) if x is None else x
        found["ours"] = x, deepcluster.kmeans_half(x, k, next(calls) // 2)[0]

    whole = race(f"deepcluster clustering N={n} d=512 k={k}, {groups} groups", theirs, ours, args, most=7)
    quality = objective(*found["ours"]) / objective(*found["theirs"])
    alone = race(f"deepcluster k-means N={n} d=256 k={k}, {groups} groups", partial(theirs, ready),
                 partial(ours, ready), args, most=7)
    return [whole | {"objective_ratio": round(quality, 4)}, alone]


def bench_deepcluster(args: argparse.Namespace) -> list[Record]:
    """The clustering of a DeepCluster epoch against Faiss. With 500 groups k-means is at a fixed point after about 13
    iterations, where ours ends and Faiss does not; with as many groups as rows it never is."""
    return [record for groups in (500, 50_000) for record in clustering(args, 50_000, 1000, groups)]


def bench_pic(args: argparse.Namespace) -> list[Record]:
    """Seconds of PIC's parts, N = 50,000, d = 256: graph of 5 neighbours, affinity, 200 iterations, basins."""
    x, took = whitened(descriptors(50_000, 512, 500).to(args.device)), dict[str, list[float]]()

    def timed(name: str, part: Callable[..., Any], *inputs: Any) -> Any:
        made = list[Any]()
        took.setdefault(f"{name}_seconds", []).append(seconds(lambda: made.append(part(*inputs)), x.device))
        return made[0]

    for _ in range(min(args.repeats, 5) + 1):
        nearest = timed("graph", deepcluster.own_neighbors, x, 5)
        graph = timed("affinity", deepcluster.affinity, x, nearest, "median")
        v = timed("iterations", deepcluster.power_iteration, graph)
        labels = timed("basins", deepcluster.basins, graph, v)
    medians = {name: round(statistics.median(each[1:]), 3) for name, each in took.items()}  # the first warms up
    return [{"case": "PIC N=50000 d=256", **medians, "edges": len(graph.rows), "clusters": int(labels.max()) + 1}]


# ---- a whole training step ---------------------------------------------------------------------------------


def training_step(script: ModuleType, options: list[str], args: argparse.Namespace) -> list[Record]:
    """A step as the script's loop does it (crop, augmentation, loss, bank) against the bare network's, N = 50,000.

    The bare step is forward, backward and SGD of the same network in the same precision and memory layout on ready
    images; the plain one is the same in PyTorch's own layout and float32.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_args = script.parse_args(["--preset", "shapes", "--output", folder, "--device", args.device, *options])
        run = common.Run(run_args)
        data = common.load(run_args, "pretrain", run.device)
        encoder = run.place(script.Encoder(run_args.arch, run_args.width, data.small, run_args.feature_dim)).train()
        plain = script.Encoder(run_args.arch, run_args.width, data.small, run_args.feature_dim).to(run.device).train()
        bank = common.MemoryBank(len(data), run_args.feature_dim, run.generator("bank")).to(run.device)
        batches = data.batches(run, run.permutation(0, len(data)), common.Crop(data.size, script.SCALE), 0)
        ready = torch.randn(run_args.batch_size, 3, data.size, data.size, device=run.device)
        optimizers = {model: torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9) for model in (encoder, plain)}
        if script is local_aggregation:
            clusters = local_aggregation.Clusters(run_args.num_clusterings, len(data)).to(run.device)
            clusters.labels = torch.randint(run_args.num_clusters, clusters.labels.shape, dtype=torch.int32,
                                            device=run.device)

        def bare(model: Any, amp: bool) -> None:
            optimizers[model].zero_grad()
            with torch.autocast(run.device.type, torch.bfloat16, enabled=amp):
                feature = model(ready)
            F.normalize(feature).sum().backward()
            optimizers[model].step()

        def whole() -> None:
            step, index, (images,) = next(batches)
            images = data.normalize(script.augment(images, run.draw(0, step), False, True))
            optimizers[encoder].zero_grad()
            with run.autocast():
                z = F.normalize(encoder(images))
            if script is npid:
                losses = common.bank_softmax(z, index, bank.features, run_args.temperature)
            else:
                slots, similarity, _ = local_aggregation.nearest(z.detach(), index, bank.features,
                                                                 run_args.num_neighbors)
                close = clusters.same(index, slots)
                losses = local_aggregation.local_aggregation(z, slots, similarity, close, bank.features,
                                                             run_args.temperature)
            losses.mean().backward()
            optimizers[encoder].step()
            bank.update(z.detach(), index, run_args.bank_momentum)

        name = f"{script.__name__}, ResNet-18 width {run_args.width}, B = {run_args.batch_size}"
        records = [race(f"{name}: bare step / whole step", lambda: bare(encoder, run.amp), whole, args, most=7),
                   race(f"{name}: plain bare step / whole step", lambda: bare(plain, False), whole, args, most=7)]
        for record in records:
            record["amp"] = run.amp
        return records


def bench_step(args: argparse.Namespace) -> list[Record]:
    """NPID's step, bound: 1 / 1.05 = 0.952 of the bare one."""
    return training_step(npid, [], args)


def bench_la_step(args: argparse.Namespace) -> list[Record]:
    """Local Aggregation's step with k = 4096 and H = 10, bound: 1 / 1.10 = 0.909 of the bare one."""
    return training_step(local_aggregation, ["--k", "4096", "--H", "10", "--m", "1000"], args)


def bench_checkpoint(args: argparse.Namespace) -> list[Record]:
    """What training waits for when a checkpoint of ResNet-18, its momentum and a bank of 50,000 is due: all of the
    writing, or the copy that goes to the disk in the background."""
    with tempfile.TemporaryDirectory() as folder:
        run_args = npid.parse_args(["--preset", "shapes", "--output", folder, "--device", args.device])
        run = common.Run(run_args)
        data = common.load(run_args, "pretrain", run.device)
        run.describe(data)
        encoder = run.place(npid.Encoder("resnet18", 64, True, 128))
        optimizer = torch.optim.SGD(encoder.parameters(), 0.01, momentum=0.9)
        for parameter in encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        bank = common.MemoryBank(len(data), 128, run.generator("bank")).to(run.device)
        state = dict(encoder=encoder, optimizer=optimizer, bank=bank)
        run.resume(state, 1)

        def save(background: bool) -> None:
            run.in_background = background
            run.save(state, 0, 1)

        record = race("ResNet-18: on the disk / in the background", partial(save, False), partial(save, True), args,
                      after=run.written)
        run.close()
    return [record]


def faiss_labels(z: Tensor, k: int, iterations: int) -> Tensor:
    """Labels (V, B) of spherical k-means of each view by Faiss, from the first k rows."""
    faiss = common.import_faiss()
    found = []
    for rows in z.cpu().numpy():
        clustering = faiss.Clustering(rows.shape[1], k)
        clustering.niter, clustering.spherical = iterations - 1, True
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(rows) + 1
        faiss.copy_array_to_vector(np.ascontiguousarray(rows[:k]).ravel(), clustering.centroids)
        index = faiss.IndexFlatIP(rows.shape[1])
        clustering.train(np.ascontiguousarray(rows), index)
        found.append(index.search(np.ascontiguousarray(rows), 1)[1][:, 0])
    return torch.from_numpy(np.stack(found)).to(z.device)


def bench_cld(args: argparse.Namespace) -> list[Record]:
    """CLD's k-means of two views against Faiss, features to the host and labels back included; NPID+CLD's step (two
    passes, bank softmax, k-means, both losses, SGD, bank write), then with crops and augmentation as well, against two
    bare passes forward and backward, N = 50,000; bound: 1 / 1.10 = 0.909 of these."""
    device, size, k = torch.device(args.device), 64, 32
    z = F.normalize(torch.randn(2, size, 128, device=device), dim=2)
    records = [race(f"k-means of two views of {size}, k={k}", partial(faiss_labels, z, k, 5),
                    partial(cld.em_labels, z, k, 5), args)]
    encoder = cld.Encoder("resnet18", 64, True, 128, "linear", groups=True).to(device)
    host = cld.Npid(common.MemoryBank(50_000, 128).to(device), 0.1, 0.5)
    sgd = torch.optim.SGD(encoder.parameters(), 0.03, momentum=0.9)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=common.amp_default(device))
    crops = torch.randint(256, (size, 3, 32, 32), dtype=torch.uint8, device=device)
    ready = torch.rand(2, size, 3, 32, 32, device=device)
    index = torch.randperm(50_000, device=device)[:size]
    draw = common.Draw(torch.Generator().manual_seed(0), size, slice(None), device)

    def bare() -> None:
        encoder.zero_grad()
        with autocast:
            features = [encoder.backbone(images) for images in ready]
        sum(feature.float().sum() for feature in features).backward()

    def step(views: Tensor = ready) -> None:
        sgd.zero_grad()
        with autocast:
            z, g, _ = encoder(views)
        losses, _ = host.instance_loss(z, None, host.targets(views), index)
        groups = cld.group(g, k, 5)
        cross, _ = cld.group_loss(g, groups, 0.2)
        cld.group_figures(g, groups)
        (losses.mean() + cross.mean()).backward()
        sgd.step()
        host.after_step(encoder, lambda *tensors: tensors, 0.5)

    def augmented() -> None:
        boxes = [common.crop_boxes(draw(common.CROP_NUMBERS), 32, 32, (0.2, 1.0)) for _ in range(2)]
        cut = [common.resized_crop(crops, box, 32) for box in boxes]
        step(torch.stack([cld.augment(images, draw, "plain", view, False) for view, images in enumerate(cut)]))

    name = f"NPID+CLD, ResNet-18 width 64, B = {size}: two bare passes"
    return [*records, race(f"{name} / step", bare, step, args, most=7),
            race(f"{name} / augmented step", bare, augmented, args, most=7)]


# ---- linear evaluation -------------------------------------------------------------------------------------


def thin_features(args: argparse.Namespace) -> tuple[dict[str, eval_linear.Layer], Tensor, str]:
    """The five stages of a quarter-width ResNet-18 (weights do not matter here) for 5,000 images of CIFAR-10, or of
    shapes where $DATA_DIR has no CIFAR-10."""
    device = torch.device(args.device)
    cifar = Path(os.environ.get("DATA_DIR", "data"), "cifar-10-batches-py").is_dir()
    with tempfile.TemporaryDirectory() as folder:
        options = eval_linear.parse_args(["random", "--width", "16", "--subset", "5000", "--output", folder, "--data",
                                          "cifar10" if cifar else "shapes"])
        data = common.load(options, "train", device)
        torch.manual_seed(0)
        encoder = common.untrained_encoder("resnet18", 16, True, device)
        (found,) = eval_linear.cached_features(options, encoder, [(data, "train", 1)], device)
        layers = {name: eval_linear.Layer(values, options, device) for name, values in found.items()}
    return layers, data.labels, data.name


def bench_linear(args: argparse.Namespace) -> list[Record]:
    """120 linear probes (5 stages, 8 rates, 3 decays) for an epoch, PyTorch's own loop for one after the other against
    all those of a stage at once, from the same cached features; bound: 0.4 of the time."""
    layers, labels, name = thin_features(args)
    grid = [(lr, decay) for lr in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3) for decay in (1e-6, 1e-4, 1e-2)]
    labels = labels.to(args.device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    weights: dict[str, Tensor] = {}

    def in_turn() -> None:
        for layer, features in layers.items():
            for lr, decay in grid:
                linear = torch.nn.Linear(features.size, 10).to(args.device)
                for parameter in linear.parameters():
                    torch.nn.init.zeros_(parameter)
                optimizer = torch.optim.SGD([dict(params=[linear.weight], weight_decay=decay),
                                             dict(params=[linear.bias])], lr, momentum=0.9)
                for rows in torch.split(order, 256)[:-1]:
                    optimizer.zero_grad()
                    x = features.crop(rows, torch.zeros_like(rows))
                    F.cross_entropy(linear(x), labels[rows]).backward()
                    optimizer.step()
            weights[f"{layer} in turn"] = linear.weight.detach()

    def at_once() -> None:
        rates, decays = (torch.tensor(column, device=args.device) for column in zip(*grid, strict=True))
        probes = eval_linear.Probes()
        for layer, features in layers.items():
            probes.reset(len(grid), 10, features.size, torch.device(args.device))
            for rows in torch.split(order, 256)[:-1]:
                x = features.crop(rows, torch.zeros_like(rows))
                probes.step(x, labels[rows], rates, decays, 0.9)
            weights[f"{layer} at once"] = probes.weight[-10:].clone()

    record = race(f"5 stages x 24 probes, {name}, 5,000 images: in turn / at once", in_turn, at_once, args, most=3)
    distances = [((weights[f"{layer} at once"] - weights[f"{layer} in turn"]).norm()
                  / weights[f"{layer} in turn"].norm()).item() for layer in layers]
    return [record | {"sizes": [layer.size for layer in layers.values()], "weights_difference": max(distances)}]


def bench_svm(args: argparse.Namespace) -> list[Record]:
    """Ten one-vs-rest SVMs of conv5, scikit-learn's LinearSVC (LIBLINEAR) against ours, two costs at once."""
    from sklearn.svm import LinearSVC

    layers, labels, name = thin_features(args)
    layer = layers["conv5"]
    x = layer.crops(torch.arange(len(layer)))[:, 0]
    padded, targets = F.pad(x, (0, 1), value=1.0), (2 * F.one_hot(labels, 10) - 1).to(x.device)
    rows, truth = x.cpu().numpy(), labels.numpy()
    costs, found = [0.001, 0.01], dict[str, Any]()
    record = race(
        f"{layer.size} numbers, 5,000 images of {name}, C = {costs}: LinearSVC / ours",
        lambda: found.update(theirs=[LinearSVC(C=cost).fit(rows, truth) for cost in costs]),
        lambda: found.update(ours=eval_linear.fit_svms(padded, targets, torch.tensor(costs)[:, None].expand(-1, 10),
                                                       1.0)),
        args, most=2,
    )
    agree = [float((torch.from_numpy(svm.predict(rows)) == (padded @ w.T).argmax(1).cpu()).float().mean())
             for svm, w in zip(found["theirs"], found["ours"], strict=True)]
    return [record | {"same_answers": agree}]


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Record]]] = {
    "softmax": bench_softmax,
    "nce": bench_nce,
    "kmeans": bench_kmeans,
    "knn": bench_knn,
    "deepcluster": bench_deepcluster,
    "pic": bench_pic,
    "step": bench_step,
    "la-step": bench_la_step,
    "cld": bench_cld,
    "checkpoint": bench_checkpoint,
    "linear": bench_linear,
    "svm": bench_svm,
}


def machine(device: str) -> Record:
    """Hardware and versions that the figures depend on."""
    facts = {
        "cpu": common.device_name(common.CPU),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "device": common.device_name(torch.device(device)),
    }
    try:
        import faiss

        facts |= {"faiss": faiss.__version__, "faiss_gpus": faiss.get_num_gpus()}
    except ImportError:
        pass
    return facts


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], help="all if none is named")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=common.COUNT, default=15, help="rounds; the long benchmarks take fewer")
    parser.add_argument("--output", type=Path, default=Path("results/bench.jsonl"), help="JSON lines, appended")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Runs the benchmarks named, all by default; one line of each on stdout, one JSON line in --output. Without Faiss
    those against it are left out."""
    common.keep_freed_memory()  # as every run does
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.names or BENCHMARKS:
        try:
            records = BENCHMARKS[name](args)
        except common.Fault as fault:
            if importlib.util.find_spec("faiss") is not None:
                raise
            print(f"{name}: left out: {fault}", file=sys.stderr, flush=True)
            continue
        for record in records:
            line = {"benchmark": name, **record, **machine(args.device)}
            with args.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            figures = {key: value for key, value in record.items() if key != "case"}
            print(f"{name}, {record['case']}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)


if __name__ == "__main__":
    common.launch(main, parse_args)
