"""Ratios of our kernels to what they replace, measured in turn in one process: python bench.py [NAME ...]."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_cld
import bench_deepcluster
from bench_deepcluster import seconds

import common
import eval_linear
import local_aggregation
import npid

Record = dict[str, Any]


def race(
    case: str, theirs: Callable[[], Any], ours: Callable[[], Any], args: argparse.Namespace,
    after: Callable[[], Any] = lambda: None,
) -> Record:
    """Time of theirs over time of ours, round by round in alternating order, after one untimed round; after: what is
    left to do after each, untimed."""
    device, pairs = torch.device(args.device), []
    for turn in range(args.repeats + 1):
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
        "theirs_seconds": round(statistics.median(a for a, _ in pairs), 5),
        "ours_seconds": round(statistics.median(b for _, b in pairs), 5),
        "rounds": len(pairs),
    }


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


def peak_bytes() -> int:
    """The most memory this process ever held, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def softmax_extra_bytes(name: str, size: int, device: str) -> int:
    """Growth of the memory peak by one forward and backward, inputs and library buffers left out."""
    function = {"ours": softmax_ours, "logits": softmax_logits}[name]
    function(*batch(2000, device))
    inputs = batch(size, device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*inputs)
        return torch.cuda.max_memory_allocated() - before
    # The peak may still be that of making the inputs: fill the room below it first, so that any growth shows.
    room = peak_bytes() - int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    filler = torch.ones(max(room, 0) // 4 + (1 << 20))
    before = peak_bytes()
    function(*inputs)
    return peak_bytes() - before + 0 * len(filler)


def bench_softmax(args: argparse.Namespace) -> list[Record]:
    """Exact softmax against cross-entropy on logits, B = 128, D = 128."""
    records = []
    for size, target in ((50_000, None), (400_000, 2.5)):
        inputs = batch(size, args.device)
        expected = softmax_logits(*inputs)
        difference = (softmax_ours(*inputs) - expected).norm() / expected.norm()
        record = race(f"N={size}", partial(softmax_logits, *inputs), partial(softmax_ours, *inputs), args)
        records.append(record | {"target": target, "gradient_difference": float(difference)})
    logits = 128 * 400_000 * 4
    for name, limit in (("ours", 0.1), ("logits", None)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process
            extra = pool.apply(softmax_extra_bytes, (name, 400_000, args.device))
        records.append(
            {"case": f"extra memory, {name}, N=400000", "share_of_logits": extra / logits, "limit": limit}
        )
    return records


def bench_nce(args: argparse.Namespace) -> list[Record]:
    """Exact softmax against NCE with 4,096 noise samples for each image, B = 128, D = 128."""
    records = []
    for size, target in ((50_000, 1.0), (400_000, None)):
        inputs = batch(size, args.device)
        record = race(f"N={size}", partial(nce, *inputs), partial(softmax_ours, *inputs), args)
        records.append(record | {"target": target})
    return records


# ---- k-means and neighbours --------------------------------------------------------------------------------


def bench_kmeans(args: argparse.Namespace) -> list[Record]:
    """Assignment of 50,000 rows, D = 128, and a whole clustering, torch against Faiss."""
    faiss = common.import_faiss()
    x, records = unit_rows(50_000, 128, args.device, 0), []
    rows = x.cpu().numpy()
    for k in (1_000, 2_000):
        centroids = common.kmeans(x, k, iterations=2).centroids
        index: Any = faiss.IndexFlatL2(128)
        if faiss.get_num_gpus() > 0:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(centroids.cpu().numpy())
        record = race(
            f"assignment, k={k}",
            partial(index.search, rows, 1),
            partial(common.assign, x, centroids),
            args,
        )
        same = torch.from_numpy(index.search(rows, 1)[1][:, 0]) == common.assign(x, centroids)[0].cpu()
        records.append(record | {"target": 2.5, "labels_equal": float(same.float().mean())})
    runs: dict[str, common.KMeans] = {}
    short = argparse.Namespace(**vars(args) | {"repeats": min(args.repeats, 3)})
    record = race(
        "20 iterations, k=1000",
        lambda: runs.update(theirs=common.kmeans(x, 1_000, backend="faiss")),
        lambda: runs.update(ours=common.kmeans(x, 1_000)),
        short,
    )
    objective = runs["ours"].objective[-1] / runs["theirs"].objective[-1]
    record |= {"objective_ratio": objective, "backends": [runs["theirs"].backend, runs["ours"].backend]}
    return [*records, record]


def bench_knn(args: argparse.Namespace) -> list[Record]:
    """The 200 best of 50,000 rows for 10,000 queries, D = 128, torch against Faiss."""
    faiss = common.import_faiss()
    queries, keys = unit_rows(10_000, 128, args.device, 1), unit_rows(50_000, 128, args.device, 0)
    rows = queries.cpu().numpy(), keys.cpu().numpy()
    record = race(
        "10k x 50k, top 200",
        lambda: faiss.knn(*rows, 200, metric=faiss.METRIC_INNER_PRODUCT),
        lambda: common.neighbors(queries, keys, 200),
        argparse.Namespace(**vars(args) | {"repeats": min(args.repeats, 5)}),
    )
    return [record | {"target": 1.3}]


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
            clusters = local_aggregation.Clusters(run_args.H, len(data)).to(run.device)
            clusters.labels = torch.randint(run_args.m, clusters.labels.shape, dtype=torch.int32, device=run.device)

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
                slots, similarity, _ = local_aggregation.nearest(z.detach(), index, bank.features, run_args.k)
                close = clusters.same(index, slots)
                losses = local_aggregation.local_aggregation(z, slots, similarity, close, bank.features,
                                                             run_args.temperature)
            losses.mean().backward()
            optimizers[encoder].step()
            bank.update(z.detach(), index, run_args.bank_momentum)

        rounds = argparse.Namespace(**{**vars(args), "repeats": min(args.repeats, 7)})
        name = f"{script.__name__}, ResNet-18 width {run_args.width}, B = {run_args.batch_size}"
        records = [race(f"{name}: bare step / whole step", lambda: bare(encoder, run.amp), whole, rounds),
                   race(f"{name}: plain bare step / whole step", lambda: bare(plain, False), whole, rounds)]
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
                      run.written)
        run.close()
    return [record | {"target": None}]


def bench_la_clustering(args: argparse.Namespace) -> list[Record]:
    """One clustering of Local Aggregation's H = 10, N = 50,000, m = 1,000, 20 iterations, Faiss over torch."""
    x = unit_rows(50_000, 128, args.device, 0)
    rounds = argparse.Namespace(**{**vars(args), "repeats": min(args.repeats, 5)})
    return [race("Faiss / torch", lambda: common.kmeans(x, 1000, backend="faiss"), lambda: common.kmeans(x, 1000),
                 rounds)]


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

    record = race(f"5 stages x 24 probes, {name}, 5,000 images: in turn / at once", in_turn, at_once,
                  argparse.Namespace(**{**vars(args), "repeats": min(args.repeats, 3)}))
    distances = [((weights[f"{layer} at once"] - weights[f"{layer} in turn"]).norm()
                  / weights[f"{layer} in turn"].norm()).item() for layer in layers]
    return [record | {"target": 2.5, "sizes": [layer.size for layer in layers.values()],
                      "weights_difference": max(distances)}]


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
        argparse.Namespace(**{**vars(args), "repeats": min(args.repeats, 2)}),
    )
    agree = [float((torch.from_numpy(svm.predict(rows)) == (padded @ w.T).argmax(1).cpu()).float().mean())
             for svm, w in zip(found["theirs"], found["ours"], strict=True)]
    return [record | {"target": None, "same_answers": agree}]


def bench_of_deepcluster(args: argparse.Namespace) -> list[Record]:
    """The clustering part of DeepCluster's epoch against Faiss, and PIC's parts: bench_deepcluster.py."""
    device = torch.device(args.device)
    grouped, ungrouped = (bench_deepcluster.clustering(50_000, 512, 1000, device, min(args.repeats, 7), groups)
                          for groups in (500, 50_000))
    return [grouped | {"target": 2.5}, ungrouped, bench_deepcluster.pic(50_000, 512, device)]


def bench_of_cld(args: argparse.Namespace) -> list[Record]:
    """CLD's step against two bare passes, and its k-means against Faiss: bench_cld.py."""
    options = ["--device", args.device, "--repeats", str(args.repeats)]
    return list(bench_cld.records(bench_cld.parse_args(options)))


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Record]]] = {
    "softmax": bench_softmax,
    "nce": bench_nce,
    "kmeans": bench_kmeans,
    "knn": bench_knn,
    "step": bench_step,
    "la-step": bench_la_step,
    "checkpoint": bench_checkpoint,
    "la-clustering": bench_la_clustering,
    "linear": bench_linear,
    "svm": bench_svm,
    "deepcluster": bench_of_deepcluster,
    "cld": bench_of_cld,
}


def machine(device: str) -> Record:
    """Hardware and versions that the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    facts = {
        "cpu": name[1] if name else platform.processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
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
    parser.add_argument(
        "--output", type=Path, default=Path("results/bench.jsonl"), help="JSON lines, appended"
    )
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
            print(
                f"{name}, {record['case']}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True
            )


if __name__ == "__main__":
    common.launch(main, parse_args)
