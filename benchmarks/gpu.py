"""Speed on one GPU, as a share of its own measured ceilings and against the plain PyTorch way of doing the same.

    python benchmarks/gpu.py ceilings softmax kmeans knn la-search step      # into results/gpu.jsonl, nine minutes
    python benchmarks/gpu.py scripts resnet50 decode                         # at most, and nine more
    python benchmarks/gpu.py --device cpu --tiny       # the same code in miniature, on any machine
    python benchmarks/gpu.py --paper                   # the profile of benchmarks/README.md: work, bytes, least times

The limits of each list sum to more than its --minutes (to 12 and 10): if they are needed, what is named last is cut
first, and said. The ceilings come first: products of large matrices, a copy, a kernel that does nothing, a copy from
the host; a later call on the same device finds them in the same output file. Every benchmark then runs in a process of
its own with a time limit, so that one that fails or hangs costs no other; within it each candidate that fails is a
record with its error, and after one that loses the device a new process goes on with the next. A record has the median
seconds of a call, its operations and bytes where they are known, their shares of the ceilings, the aim, and how many
times faster than "plain" it is. Records are JSON lines, each written at once; a short table is printed.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import local_aggregation
import npid

TAU = 0.07


class Sizes(NamedTuple):
    """How large everything is: as on ImageNet, or in miniature."""

    square: int = 8192  # of the matrices of the ceilings
    copy: int = 1 << 30  # float32 numbers
    images: int = 1_281_167
    many: int = 10_000_000
    batch: int = 256
    clusters: tuple[int, ...] = (10_000, 30_000)
    queries: int = 50_000
    neighbors: int = 200
    background: int = 4096
    small: int = 50_000  # images of 32 px
    small_batch: int = 128
    large: int = 4096  # images of 256 px on the device
    width: int = 64
    files: int = 2000  # JPEGs
    rounds: int = 7
    seconds: float = 0.05  # of a round, at least


TINY = Sizes(square=64, copy=1 << 12, images=600, many=1200, batch=8, clusters=(12, 20), queries=50, neighbors=10,
             background=32, small=128, small_batch=16, large=8, width=4, files=8, rounds=2, seconds=0.0)

# ---- measuring -------------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[str]:
    """The lines of a file, which need not be there yet."""
    return path.read_text().splitlines() if path.exists() else []


class Bench:
    """The device, its ceilings, and where records go."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.name, self.device = args, name, common.pick_device(args.device)
        self.sizes = TINY if args.tiny else Sizes()
        self.facts = dict(device=common.device_name(self.device), torch=torch.__version__)
        self.ceilings: dict[str, float] = {}
        self.plain: dict[str, float] = {}
        self.flop: dict[str, float] = {}  # of the cases whose operations have been counted
        self.done = set[tuple[str, str]]()  # what a process before this one has recorded in the same call
        for number, line in enumerate(lines_of(args.output)):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, left by a kill, is no record
                record = json.loads(line)
                if record["device"] == self.facts["device"] and "rate" in record:
                    self.ceilings[record["case"]] = record["rate"]
                if number >= args.since and record["benchmark"] == name:
                    self.done.add((record["case"], record["way"]))
                    if record["way"] == "plain" and "seconds" in record:
                        self.plain[record["case"]] = record["seconds"]
                    if record["way"] == "counted" and "flop" in record:
                        self.flop[record["case"]] = record["flop"]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Median time of a call: rounds of as many calls as fill them, with one wait at each end."""

        def timed(calls: int) -> float:
            began = time.perf_counter()
            for _ in range(calls):
                work()
            self.wait()
            return (time.perf_counter() - began) / calls

        timed(1)  # loads and builds what it needs
        once = timed(1)
        if once > 1:  # too long for any more
            return once
        once = min(once, timed(1))
        calls = max(1, min(1000, round(self.sizes.seconds / max(once, 1e-6))))
        return statistics.median(timed(calls) for _ in range(self.sizes.rounds))

    def write(self, **record: Any) -> None:
        line = dict(benchmark=self.name, **record, **self.facts)
        with self.args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(*(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in line.items()
                if key not in self.facts), flush=True)

    def attempt(self, case: str, way: str, work: Callable[[], None]) -> None:
        """Do `work`, unless an earlier process has; if it fails, that is a result, too."""
        if (case, way) in self.done:
            return
        try:
            work()
        except Exception as error:
            self.write(case=case, way=way, error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
            self.wait()  # fails once more if the device is lost, and nothing works any more in this process
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def case(
        self, case: str, way: str, work: Callable[[], Any], *, flop: float = 0, read: float = 0, kind: str = "bfloat16",
        per: float = 0, aim: float = 0, times: float = 1, **facts: Any,
    ) -> None:
        """Record one way of doing a case. flop, read: operations, bytes of a call; kind: of the products; per: images
        of a call; aim: seconds, or images/s if `per`; times: what the time is multiplied with; way "plain" comes first.
        Facts that are functions are asked after the timing.
        """

        def measure() -> None:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = self.seconds(work) * times
            record: dict[str, Any] = dict(case=case, way=way, seconds=took)
            if per:
                record |= dict(images_per_second=per / took)
            if aim:
                record |= dict(aim=aim, met=per / took >= aim if per else took <= aim)
            for key, amount, ceiling in (("flop", flop, f"matmul {kind}"), ("bytes", read, "copy")):
                if amount:
                    record |= {key: amount, f"{key}_per_second": amount / took}
                    if ceiling in self.ceilings:
                        record[f"{key}_share"] = amount / took / self.ceilings[ceiling]
            if way == "plain":
                self.plain[case] = took
            elif case in self.plain:
                record["times_plain"] = self.plain[case] / took
            if self.device.type == "cuda":
                record["memory_gb"] = common.memory_gb(self.device)
            self.write(**record, **{key: value() if callable(value) else value for key, value in facts.items()})

        self.attempt(case, way, measure)

    def unit(self, rows: int, dim: int = 128, seed: int = 0) -> Tensor:
        source = torch.Generator(self.device).manual_seed(seed)
        return F.normalize(torch.randn(rows, dim, device=self.device, generator=source), dim=1)


def in_tf32(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work, its products of float32 in TF32."""

    def call(*args: Any) -> Any:
        torch.set_float32_matmul_precision("high")
        try:
            return work(*args)
        finally:
            torch.set_float32_matmul_precision("highest")

    return call


# ---- ceilings --------------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """FLOP/s of products, bytes/s of a copy (read and written) and from pinned host memory, seconds of a launch."""

    def measure(case: str, work: Callable[[], Any], amount: float) -> None:
        def record() -> None:
            took = bench.seconds(work)
            bench.write(case=case, seconds=took / amount if case == "launch" else took, rate=amount / took)

        bench.attempt(case, "", record)

    size = bench.sizes.square
    for kind, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32), ("float32", torch.float32)):
        a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        measure(f"matmul {kind}", in_tf32(product) if kind == "tf32" else product, 2 * size**3)
    source = torch.randn(bench.sizes.copy, device=bench.device)
    target = torch.empty_like(source)
    measure("copy", lambda: target.copy_(source), 2 * source.nbytes)
    one = torch.zeros(1, device=bench.device)
    measure("launch", lambda: [one.add_(1) for _ in range(100)], 100)
    if bench.device.type == "cuda":
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=bench.device)
        measure("copy from the host", lambda: there.copy_(host, non_blocking=True), host.nbytes)


# ---- the exact softmax over the bank ---------------------------------------------------------------------------------

Attention = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chunked_half(z: Tensor, bank: Tensor, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """common's loop with products of bfloat16 and the rest in float32. bank: bfloat16."""
    query = (z / TAU).to(bank.dtype)
    peak = z.new_full((len(z), 1), -math.inf)
    total, output = torch.zeros_like(peak), torch.zeros_like(z)
    for keys in torch.split(bank, chunk):
        logits = (query @ keys.T).float()
        new_peak = torch.maximum(peak, logits.amax(1, keepdim=True))
        weights = logits.sub_(new_peak).exp_()
        decay = (peak - new_peak).exp_()
        total = total * decay + weights.sum(1, keepdim=True)
        output = output * decay + (weights.to(bank.dtype) @ keys).float()
        peak = new_peak
    return output / total, (peak + total.log())[:, 0]


def in_heads(operator: Attention, heads: int) -> Attention:
    """Attention with the bank cut into pseudo-heads, so that all multiprocessors have work, merged by LSE.

    operator: q, k = v (1, heads, rows, D) -> O (1, heads, B, D) and LSE (1, heads, B or more).
    """

    def attention(z: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        query, dim, rows = z.to(bank.dtype), z.shape[1], len(bank) // heads
        outputs, lses = list[Tensor](), list[Tensor]()
        for keys in (bank[: heads * rows].view(1, heads, rows, dim), bank[heads * rows :].view(1, 1, -1, dim)):
            if keys.shape[2]:
                output, lse = operator(query.expand(1, keys.shape[1], *query.shape), keys)
                outputs.append(output[0].float())
                lses.append(lse.reshape(keys.shape[1], -1)[:, : len(z)].float())
        # As npid.merge does, but without a list of hundreds of heads, which would take longer than the kernels.
        output, each = torch.cat(outputs), torch.cat(lses)
        lse = each.logsumexp(0)
        return ((each - lse).exp()[..., None] * output).sum(0), lse

    return attention


def flash(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, keys, 0.0, False, False, scale=1 / TAU)
    return found[0], found[1]


def efficient(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_efficient_attention(query, keys, keys, None, True, scale=1 / TAU)
    return found[0], found[1]


def cudnn(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    query = query.contiguous()  # its plans know no stride of zero
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(query, keys, keys, None, True, scale=1 / TAU)
    return found[0], found[1]


def flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, keys: compiled(query, keys, keys, scale=1 / TAU, return_lse=True)


def softmax(bench: Bench) -> None:
    """O and LSE at N = 1.28M and 10M, B = 256, D = 128: candidates side by side, with their errors against float64."""
    for count, aim in ((bench.sizes.images, 1e-3), (bench.sizes.many, 8e-3)):
        softmax_of(bench, count, aim)


def softmax_of(bench: Bench, count: int, aim: float) -> None:
    z, bank = bench.unit(bench.sizes.batch, seed=1), bench.unit(count)
    index = torch.randint(count, (len(z),), device=bench.device)
    half, case = bank.bfloat16(), f"N={count}"
    work = dict(flop=4.0 * len(z) * count * 128, aim=aim)
    logits = [(z[:16].double() / TAU) @ part.double().T for part in torch.split(bank, 1 << 17)]
    lse = torch.stack([part.logsumexp(1) for part in logits]).logsumexp(0)
    output = sum((part - lse[:, None]).exp() @ rows.double()
                 for part, rows in zip(logits, torch.split(bank, 1 << 17), strict=True))
    del logits

    def plain(z: Tensor, bank: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy((z @ bank.T).float() / TAU, index), z)[0]

    def ours(half: bool) -> Tensor:
        query = z.clone().requires_grad_()
        return torch.autograd.grad(common.bank_softmax(query, index, bank, TAU, half).mean(), query)[0]

    bench.case(case, "plain", lambda: plain(z, bank), kind="float32", read=4.0 * bank.numel(), **work)
    bench.case(case, "plain, bfloat16 logits", lambda: plain(z.bfloat16(), half), **work)
    bench.case(case, "bank_softmax in float32, forward and backward", lambda: ours(False), kind="float32",
               read=4.0 * bank.numel(), **work)
    bench.case(case, "bank_softmax, forward and backward", lambda: ours(True), read=4.0 * bank.numel(), **work)
    attend: Attention = functools.partial(common.bank_attention, temperature=TAU)
    ways: dict[str, tuple[Attention, Tensor]] = {
        "chunked float32": (attend, bank),
        "chunked tf32": (in_tf32(attend), bank),
        **{f"chunked bfloat16, {rows} rows": (functools.partial(chunked_half, chunk=rows), half)
           for rows in (8192, 32768, 131072)},
        **{f"flash bfloat16, {heads} heads": (in_heads(flash, heads), half) for heads in (66, 132, 264, 528)},
        "flash bfloat16 from a float32 bank": (lambda z, v: in_heads(flash, 132)(z, v.bfloat16()), bank),
        "efficient bfloat16, 132 heads": (in_heads(efficient, 132), half),
        "efficient float32, 132 heads": (in_heads(efficient, 132), bank),
        **{f"cudnn bfloat16, {heads} heads": (in_heads(cudnn, heads), half) for heads in (66, 132)},
    }
    if bench.device.type == "cuda" and count == bench.sizes.images:  # it compiles anew for every shape
        ways["flex bfloat16, 132 heads"] = (in_heads(flex(), 132), half)

    def one(name: str, attention: Attention, v: Tensor) -> None:
        o, s = attention(z, v)
        kind = next(kind for kind in ("bfloat16", "tf32", "float32") if kind in name)
        bench.case(case, name, lambda: attention(z, v), kind=kind, read=float(v.nbytes), **work,
                   lse_error=float((s[:16].double() - lse).abs().max()),
                   output_error=float((o[:16].double() - output).norm() / output.norm()))

    for name, (attention, v) in ways.items():
        bench.attempt(case, name, functools.partial(one, name, attention, v))


# ---- clustering and search -------------------------------------------------------------------------------------------


def kmeans(bench: Bench) -> None:
    """20 iterations over N = 1.28M rows, D = 128: one assignment in several ways, then the whole."""
    x = bench.unit(bench.sizes.images)
    for k, aim in zip(bench.sizes.clusters, (1.0, 3.0), strict=True):
        kmeans_of(bench, x, k, aim)


def kmeans_of(bench: Bench, x: Tensor, k: int, aim: float) -> None:
    centroids = x[torch.randperm(len(x), device=bench.device)[:k]]
    labels = common.assign(x, centroids)[0]
    case, flop = f"assignment, k={k}", 2.0 * x.numel() * k

    def plain() -> Tensor:
        return torch.cat([torch.cdist(part, centroids).argmin(1) for part in torch.split(x, 16384)])

    def by_products(dtype: torch.dtype, chunk: int) -> Tensor:
        keys, offset = centroids.to(dtype), (-0.5 * centroids.square().sum(1)).to(dtype)
        return torch.cat([torch.addmm(offset, part.to(dtype), keys.T).max(1).indices for part in torch.split(x, chunk)])

    def equal(find: Callable[[], Tensor]) -> Callable[[], float]:
        return lambda: float((find() == labels).float().mean())

    bench.case(case, "plain", plain, flop=flop, kind="float32")
    bench.case(case, "assign", lambda: common.assign(x, centroids), flop=flop, kind="float32")
    half = common._Half(x)
    bench.case(case, "assign, float16", lambda: common.assign(x, centroids, half=half), flop=flop,
               labels_equal=equal(lambda: half.nearest(centroids)))
    for name, dtype in (("tf32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        for chunk in (512, 1024, 4096, 16384):
            call = functools.partial(by_products, dtype, chunk)
            call = in_tf32(call) if name == "tf32" else call
            bench.case(case, f"{name}, chunks of {chunk}", call, flop=flop,
                       kind="tf32" if name == "tf32" else "bfloat16", labels_equal=equal(call))
    bench.case(f"sums, k={k}", "cluster_sums", lambda: common.cluster_sums(x, labels, k), read=float(x.nbytes))
    found: list[common.KMeans] = []
    for name, where, wrap in (("float16, then float32", {bench.device.type}, lambda f: f),
                              ("float32", set(), lambda f: f), ("tf32", set(), in_tf32)):
        call = wrap(lambda: found.append(common.kmeans(x, k)))
        with unittest.mock.patch.object(common, "TENSOR_CORES", where):
            bench.case(f"20 iterations, k={k}", f"kmeans, {name}", call, flop=21 * flop, aim=aim,
                       kind="bfloat16" if where else name, objective=lambda: found[-1].objective[-1] / len(x))


def knn(bench: Bench) -> None:
    """The 200 nearest of 1.28M for 50,000 queries, D = 128."""
    q, keys, k = bench.unit(bench.sizes.queries, seed=1), bench.unit(bench.sizes.images), bench.sizes.neighbors
    case, flop = f"{len(q)} x {len(keys)}, K={k}", 2.0 * len(q) * keys.numel()
    few = q[: max(1, len(q) // 16)]

    def plain() -> list[Any]:
        return [(part @ keys.T).topk(k) for part in torch.split(few, 512)]

    bench.case(case, "plain", plain, flop=flop, kind="float32", aim=1.0, times=len(q) / len(few))
    bench.case(case, "neighbors", lambda: common.neighbors(q, keys, k), flop=flop, kind="float32", aim=1.0)
    bench.case(case, "neighbors, tf32", in_tf32(lambda: common.neighbors(q, keys, k)), flop=flop, kind="tf32", aim=1.0)


def la_search(bench: Bench) -> None:
    """Local Aggregation's background neighbours: k = 4096 of 1.28M for a batch of 128."""
    z, bank, k = bench.unit(bench.sizes.small_batch, seed=1), bench.unit(bench.sizes.images), bench.sizes.background
    index = torch.randint(len(bank), (len(z),), device=bench.device)
    half, work = bank.bfloat16(), dict(flop=2.0 * len(z) * bank.numel(), aim=5e-3)
    case = f"{len(z)} x {len(bank)}, k={k}"
    bench.case(case, "plain", lambda: (z @ bank.T).topk(k), kind="float32", read=float(bank.nbytes), **work)
    bench.case(case, "nearest", lambda: local_aggregation.nearest(z, index, bank, k), kind="float32",
               read=float(bank.nbytes), **work)
    bench.case(case, "nearest, tf32", in_tf32(lambda: local_aggregation.nearest(z, index, bank, k)), kind="tf32",
               read=float(bank.nbytes), **work)
    bench.case(case, "bfloat16 products, topk", lambda: (z.bfloat16() @ half.T).topk(k), read=float(half.nbytes),
               **work)

    # The weighted sum of B_i's features is most of what the loss costs: which operator is quick where?
    slots, similarity, _ = local_aggregation.nearest(z, index, bank, k)
    weights, close = similarity.softmax(1), similarity > similarity.mean(1, keepdim=True)
    case, read = f"sum of {k} features for each of {len(z)}", float(slots.numel() * bank[0].nbytes)
    bench.case(case, "plain", lambda: torch.bmm(weights[:, None], bank[slots]), read=3 * read)
    bench.case(case, "embedding_bag", lambda: F.embedding_bag(slots, bank, mode="sum", per_sample_weights=weights),
               read=read)
    bench.case(case, "rows of all weights", lambda: torch.zeros(len(z), len(bank), device=bench.device).scatter_(
        1, slots, weights) @ bank, read=float(bank.nbytes + 8 * len(z) * len(bank)))
    bench.case(case, "the whole loss",
               lambda: local_aggregation.local_aggregation(z, slots, similarity, close, bank, TAU), read=read)


# ---- training steps --------------------------------------------------------------------------------------------------


class Columns:
    """A `Draw` that hands out the columns of one tensor (B, n) in turn: what a captured graph reads."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.used = numbers, 0

    def __call__(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        found = self.numbers[:, self.used : self.used + count]
        self.used += count
        return found.reshape(len(found), *shape)


DRAWN = common.CROP_NUMBERS + 9 + 1 + 1  # numbers that NPID's augmentation takes for an image


class Step:
    """NPID's training step on images of the device, in parts that can be compiled or captured."""

    def __init__(self, bench: Bench, arch: str, count: int, side: int, batch: int, rows: int, amp: bool = True,
                 plain: bool = False, fused: bool = False) -> None:
        device, size = bench.device, 32 if side == 32 else 224
        self.device, self.batch, self.plain, self.size = device, batch, plain, size
        self.photographs, self.amp = side > 32, amp and not plain
        self.pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, device=device)
        with device:  # drawn on the CPU, a bank of 1.28M would take seconds for every way
            self.encoder = npid.Encoder(arch, bench.sizes.width, side == 32, 128).train()
            self.bank = common.MemoryBank(rows, 128)
        if not plain:
            self.encoder.to(memory_format=torch.channels_last)
        self.augment: Callable[..., Tensor] = npid.augment
        self.sgd = torch.optim.SGD(self.encoder.parameters(), 0.03, momentum=0.9, weight_decay=5e-4,
                                   fused=fused or None)
        self.data = common.ImageSet("bench", size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), torch.zeros(count), [],
                                    torch.arange(count), self.pixels)
        self.index = torch.zeros(batch, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(batch, DRAWN, device=device)
        self.order, self.turn = torch.randperm(min(count, rows), device=device), 0
        self.source = torch.Generator().manual_seed(0)
        self.graph: torch.cuda.CUDAGraph | None = None

    def body(self) -> Tensor:
        """All that the device does, from `index` and `numbers` to the bank."""
        draw = Columns(self.numbers)
        pixels = self.pixels[self.index]
        height, width = pixels.shape[2:]
        boxes = common.crop_boxes(draw(common.CROP_NUMBERS), height, width, npid.SCALE, (3 / 4, 4 / 3))
        images = common.resized_crop(pixels, boxes, self.size)
        images = self.data.normalize(self.augment(images, draw, self.photographs, True))
        self.sgd.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            feature = self.encoder(images)
        z = F.normalize(feature)
        if self.plain:
            loss = F.cross_entropy(z @ self.bank.features.T / TAU, self.index)
        else:
            loss = common.bank_softmax(z, self.index, self.bank.features, TAU, self.amp).mean()
        loss.backward()
        self.sgd.step()
        self.bank.update(z.detach(), self.index, 0.5)
        return loss.detach()

    def capture(self) -> None:
        """The whole step as one CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.body()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.body()

    def __call__(self) -> None:
        """One step as the script makes it: numbers drawn on the CPU, images by the epoch's order."""
        self.turn = (self.turn + self.batch) % (len(self.order) - self.batch + 1)
        pinned = self.device.type == "cuda"
        self.index.copy_(self.order[self.turn : self.turn + self.batch])
        drawn = torch.rand(self.batch, DRAWN, generator=self.source, pin_memory=pinned)
        self.numbers.copy_(drawn, non_blocking=True)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.body()


def work_of(step: Step) -> tuple[float, int, float]:
    """Operations, operators and bytes (all that operators read and write) of a step's body, counted on this device."""
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        step.body()
    return float(counter.get_total_flops()), traffic.calls, traffic.bytes


class Traffic(TorchDispatchMode):
    """Operators that compute something, and the bytes that they read and write if none are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if not func.is_view and not func._schema.name.startswith(("aten::detach", "prim::", "aten::empty")):
            seen = {id(x): x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
            self.calls, self.bytes = self.calls + 1, self.bytes + sum(float(x.nbytes) for x in seen.values())
        return out


def training(bench: Bench, cases: dict[str, int], aim: float, arch: str, count: int, side: int, rows: int) -> None:
    """One step in several ways, the plain one first, each for the batch sizes of `cases`; then two are profiled."""

    def build(batch: int, search: bool = True, **options: Any) -> Step:
        torch.backends.cudnn.benchmark = search
        gc.collect()  # a compiled network refers to itself, and its graph holds tens of GB
        return Step(bench, arch, count, side, batch, rows, **options)

    def compiled(step: Step, mode: str | None = None, augment: bool = True) -> Step:
        torch.compiler.reset()  # graphs of the way before; nor is a second batch size taken for a variable one
        step.encoder.compile(mode=mode)
        if augment:
            step.augment = torch.compile(npid.augment)
        return step

    def captured(step: Step) -> Step:
        step.capture()
        return step

    ways: dict[str, Callable[[int], Step]] = {  # those that compile, which takes most of the time, by what they promise
        "plain": lambda batch: build(batch, plain=True),
        "eager": lambda batch: build(batch, search=False),  # the script as it stands
        "eager, cudnn search": lambda batch: build(batch),
        "eager, fused SGD": lambda batch: build(batch, fused=True),
        "CUDA graph": lambda batch: captured(build(batch, fused=True)),
        "CUDA graph, compiled": lambda batch: captured(compiled(build(batch, fused=True))),
        "compiled network": lambda batch: compiled(build(batch, fused=True), augment=False),
        "CUDA graph, compiled, float32": lambda batch: captured(compiled(build(batch, fused=True, amp=False))),
        "compiled network and augmentation": lambda batch: compiled(build(batch, fused=True)),
        "reduce-overhead": lambda batch: compiled(build(batch, fused=True), "reduce-overhead"),
    }
    if bench.device.type != "cuda":
        ways = {name: way for name, way in ways.items() if name.split(",")[0] in ("plain", "eager")}

    def count_work(case: str, batch: int) -> None:
        flop, calls, traffic = work_of(build(batch))
        bench.flop[case] = flop
        bench.write(case=case, way="counted", operators=calls, flop=flop, unfused_bytes=traffic, images=batch)

    def one(name: str, case: str, batch: int) -> None:
        began = time.perf_counter()
        step = ways[name](batch)
        step()
        bench.wait()
        # In float32 the convolutions, nearly all of the work, take TF32: PyTorch's default for them. Its products of
        # matrices (F.linear and the bank's) do not, at the default precision "highest".
        bench.case(case, name, step, flop=bench.flop.get(case, 0.0), per=batch, aim=aim,
                   kind="bfloat16" if step.amp else "tf32", first_seconds=round(time.perf_counter() - began, 1))

    def profiled(name: str, case: str, batch: int) -> None:
        bench.write(case=case, way=f"profile of {name}", **profile(bench, ways[name](batch)))

    for case, batch in cases.items():
        bench.attempt(case, "counted", functools.partial(count_work, case, batch))
    for name in ways:
        for case, batch in cases.items():
            bench.attempt(case, name, functools.partial(one, name, case, batch))
    # Last, since a profiler may leave the launches after it slower.
    for name in {"eager", "CUDA graph, compiled"} & ways.keys():
        for case, batch in cases.items():
            bench.attempt(case, f"profile of {name}", functools.partial(profiled, name, case, batch))


def profile(bench: Bench, step: Step, count: int = 10) -> dict[str, Any]:
    """Kernels and their time in a step, with the longest of them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(count):
            step()
        bench.wait()
    on_device = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA
                 and not getattr(event, "is_user_annotation", False)]  # these span kernels
    spent, calls = Counter[str](), Counter[str]()
    for event in on_device:
        spent[event.name] += event.device_time_total
        calls[event.name] += 1
    top = [f"{name[:70]} x{calls[name] / count:g} {took / count:.0f} us" for name, took in spent.most_common(15)]
    return dict(kernels=len(on_device) / count, busy_seconds=sum(spent.values()) / count / 1e6, top=top)


def step(bench: Bench) -> None:
    """NPID on CIFAR-10's sizes: ResNet-18, N = 50,000 images of 32 px."""
    s = bench.sizes
    cases = {f"ResNet-18, 32 px, B={batch}": min(batch, s.small) for batch in (s.small_batch, 4 * s.small_batch)}
    training(bench, cases, 40_000, "resnet18", s.small, 32, s.small)


def resnet50(bench: Bench) -> None:
    """NPID on ImageNet's sizes from device-resident images: ResNet-50 at 224 px, bank of 1.28M."""
    s = bench.sizes
    side = 64 if bench.args.tiny else 256
    cases = {f"ResNet-50, 224 px, B={s.batch}": s.batch}
    training(bench, cases, 2500, "resnet50", max(s.large, s.batch), side, s.images)


def scripts(bench: Bench) -> None:
    """The scripts themselves on rendered images at CIFAR's settings: images/s of the last of some epochs."""
    root = Path(__file__).resolve().parent.parent
    small = ["--data", "shapes", "--epochs", "3", "--knn-every", "0", "--device", bench.device.type, "--subset"]
    small += ["200", "--width", "4"] if bench.args.tiny else ["20000"]
    runs = {"npid.py": [], "npid.py --no-cuda-graph": [], "npid.py --no-amp": [], "npid.py --compile": [],
            "npid.py --preset cifar10-nce4096": [],
            "local_aggregation.py": ["--warmup-epochs", "0"], "deepcluster.py": [], "cld.py": [],
            "cld.py --preset cifar10-moco-cld": []}
    for name, words in list(runs.items())[: 1 if bench.args.tiny else None]:
        script, *options = name.split()
        preset = [] if "--preset" in options else ["--preset", "cifar10"]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(root / script), *preset, *options, *small, *words, "--output", folder]
            try:
                subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                bench.write(case=name, error=f"{type(error).__name__}: {str(error.stderr)[-250:]}")
                continue
            last = json.loads(lines_of(Path(folder) / "log.jsonl")[-1])
            size = (Path(folder) / "checkpoint.pth").stat().st_size
        keys = ("images_per_second", "seconds", "memory_gb", "loss", "cluster_seconds")
        bench.write(case=name, aim=40_000 if script == "npid.py" else None, checkpoint_mb=size / 1e6,
                    **{key: last[key] for key in keys if key in last})


# ---- decoding --------------------------------------------------------------------------------------------------------


def draw_jpegs(folder: Path, count: int, width: int = 500, height: int = 375) -> None:
    """JPEGs of ImageNet's usual size and about its bytes: noise of all scales, quality 90."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    source = torch.Generator().manual_seed(0)
    for number in range(min(count, 32)):
        pixels = torch.zeros(3, height, width)
        for scale in range(2, 9):
            noise = torch.randn(1, 3, 2**scale, 2**scale, generator=source)
            pixels += F.interpolate(noise, (height, width), mode="bicubic")[0] * 0.75**scale
        pixels = (128 + 45 * pixels / pixels.std()).clamp(0, 255).to(torch.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
        for copy in range(number, count, 32):
            (folder / f"{copy:05d}.jpg").write_bytes(buffer.getvalue())


def decode(bench: Bench) -> None:
    """Images/s that workers decode from JPEG folders: on one core with and without draft mode, then on all."""
    from PIL.JpegImagePlugin import JpegImageFile

    with tempfile.TemporaryDirectory() as place:
        folder = bench.args.jpegs or Path(place) / "jpegs"
        if not bench.args.jpegs:
            draw_jpegs(folder, bench.sizes.files)
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        paths = paths[: bench.sizes.files]
        if not paths:
            raise common.Fault(f"no JPEGs in {folder}")
        size = statistics.mean(path.stat().st_size for path in paths)
        facts = dict(files=len(paths), mean_bytes=size, drawn=not bench.args.jpegs)
        crop, draw = common.Crop(224, (0.2, 1.0)), torch.rand(len(paths), 1, common.CROP_NUMBERS)

        few = paths[:300]

        def one_core() -> None:
            for path, numbers in zip(few, draw, strict=False):
                common.random_crops(path, numbers, crop)

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        per = dict(per=len(few), **facts)
        with unittest.mock.patch.object(JpegImageFile, "draft", lambda *_: None):
            bench.case("training crop, one core", "plain", one_core, **per)
        bench.case("training crop, one core", "draft mode", one_core, **per)
        torch.set_num_threads(threads)

        words = ["--data", str(folder), "--batch-size", str(min(64, len(paths))), "--device", bench.device.type,
                 "--output", str(Path(place) / "run"), "--cache", "none", "--image-size", "224"]
        args = npid.parse_args(words)
        run = common.Run(args)
        data = common.load(args, "pretrain", run.device)

        order = torch.arange(len(data)).repeat(10)  # else starting the workers would be most of the time

        def epoch() -> None:
            for _ in data.batches(run, order, crop, 0):
                pass

        bench.case(f"training crop, {args.workers} workers", "draft mode", epoch,
                   per=len(order) // args.batch_size * args.batch_size, aim=2500, **facts)
        run.lock.close()


# ---- the profile on paper --------------------------------------------------------------------------------------------

SHEETS = {"H100 SXM": (989e12, 67e12, 3.35e12), "H200": (989e12, 67e12, 4.8e12)}  # bf16, fp32 FLOP/s; bytes/s


def paper() -> str:
    """Operations, bytes and the least times on paper of every figure, as tables for benchmarks/README.md."""
    s = Sizes()
    bank, many = 4.0 * s.images * 128, 4.0 * s.many * 128
    rows: list[tuple[str, float, float, str, str]] = [
        ("exact softmax, N = 1.28M, B = 256, bank in bfloat16", 4.0 * 256 * s.images * 128, bank / 2, "bf16", "1 ms"),
        ("the same, bank in float32", 4.0 * 256 * s.images * 128, bank, "fp32", "1 ms"),
        ("exact softmax, N = 10M, bank in bfloat16", 4.0 * 256 * s.many * 128, many / 2, "bf16", "8 ms"),
        ("k-means, N = 1.28M, m = 10,000, 20 iterations", 21 * 2.0 * s.images * 128 * 10_000, 41 * bank, "bf16", "1 s"),
        ("all of it in float32", 21 * 2.0 * s.images * 128 * 10_000, 41 * bank, "fp32", "1 s"),
        ("k-means, m = 30,000", 21 * 2.0 * s.images * 128 * 30_000, 41 * bank, "bf16", "3 s"),
        ("all of it in float32", 21 * 2.0 * s.images * 128 * 30_000, 41 * bank, "fp32", "3 s"),
        ("as it is here: float16, last float32, all scores written and read",
         21 * 2.0 * s.images * 128 * 30_000, (20 * 4 + 8.0) * s.images * 30_000, "bf16", "3 s"),
        ("kNN, 50,000 x 1.28M, K = 200, float32", 2.0 * s.queries * s.images * 128,
         bank + 4 * 50_000 * 128 + 12 * 50_000 * 200, "fp32", "1 s"),
        ("kNN with all similarities written and read", 2.0 * s.queries * s.images * 128, 8.0 * s.queries * s.images,
         "fp32", "1 s"),
        ("LA's search, B = 128, k = 4096, float32", 2.0 * 128 * s.images * 128, bank, "fp32", "5 ms"),
        ("LA's search with all similarities written and read", 2.0 * 128 * s.images * 128,
         bank + 8.0 * 128 * s.images, "fp32", "5 ms"),
    ]
    names = " | ".join(SHEETS)
    text = f"| figure | FLOP | bytes | {names} | aim |\n| --- | --- | --- | --- | --- | --- |\n"
    for name, flop, moved, kind, aim in rows:
        least = [max(flop / sheet[0 if kind == "bf16" else 1], moved / sheet[2]) for sheet in SHEETS.values()]
        text += f"| {name} | {flop:.3g} | {moved:.3g} | {' | '.join(map(duration, least))} | {aim} |\n"
    text += f"\n| step of NPID | operators | FLOP | bytes | {names} | images/s | aim |\n"
    text += "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    for name, arch, side, batch, count, aim in (
        ("ResNet-18, 32 px, B = 128, N = 50,000", "resnet18", 32, 128, s.small, "40,000"),
        ("ResNet-50, 224 px, B = 256, N = 1.28M", "resnet50", 256, 256, s.images, "2,500"),
    ):
        flop, calls, moved = on_meta(arch, side, batch, count)
        least = [max(flop / sheet[0], moved / sheet[2]) for sheet in SHEETS.values()]
        images = " to ".join(f"{batch / took:,.0f}" for took in least)
        text += (f"| {name} | {calls} | {flop:.3g} | {moved:.3g} | {' | '.join(map(duration, least))} | {images} | "
                 f"{aim} |\n")
    text += "\n| clustering of LA as a share of an epoch, m = 30,000, H = 10, one GPU |"
    text += f" {' | '.join(f'{name}: epoch | float32 | as it is' for name in SHEETS)} | aim |\n| --- |"
    text += " --- | --- | --- |" * len(SHEETS) + " --- |\n"
    flop, scores = 2.0 * s.images * 128 * 30_000, 2.0 * s.images * 30_000  # of an assignment; written and read once
    for name, arch in (("ResNet-18", "resnet18"), ("ResNet-50", "resnet50")):
        step, _, moved = on_meta(arch, 256, 128, s.images)
        text += f"| {name}, 224 px, B = 128, N = 1.28M |"
        for bf16, fp32, bandwidth in SHEETS.values():
            epoch = s.images // 128 * max(step / bf16, moved / bandwidth)
            whole, half = max(flop / fp32, 4 * scores / bandwidth), max(flop / bf16, 2 * scores / bandwidth)
            shares = [100 * 10 * seconds / epoch for seconds in (21 * whole, 20 * half + whole)]
            text += f" {epoch:.0f} s | {shares[0]:.2g} % | {shares[1]:.2g} % |"
        text += " 10 % |\n"
    return text


def duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"


def on_meta(arch: str, side: int, batch: int, count: int) -> tuple[float, int, float]:
    """Operations, operators and bytes of a step whose tensors have shapes and no memory; the network in bfloat16."""
    args = argparse.Namespace(device="cpu", tiny=False, output=Path(os.devnull))
    bench = Bench(args, "paper")
    bench.device = torch.device("meta")
    without = unittest.mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"), without:  # which has no autocast
        made = Step(bench, arch, batch, side, batch, count, amp=False)
        made.encoder.to(torch.bfloat16)
        augment = made.augment
        made.augment = lambda *rest: augment(*rest).bfloat16()
        made.data = dataclasses.replace(made.data, mean=(0.0,), std=(1.0,))
        made.sgd = torch.optim.SGD(made.encoder.parameters(), 0.03, momentum=0.9, weight_decay=5e-4, foreach=True)
        made.body()  # momentum buffers
        return work_of(made)


# ---- all of it -------------------------------------------------------------------------------------------------------

BENCHMARKS: dict[str, tuple[Callable[[Bench], None], float]] = {  # and seconds that it may take
    "ceilings": (ceilings, 60), "softmax": (softmax, 150), "step": (step, 240), "la-search": (la_search, 60),
    "knn": (knn, 60), "kmeans": (kmeans, 150), "scripts": (scripts, 240), "resnet50": (resnet50, 180),
    "decode": (decode, 180),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="what is measured")
    parser.add_argument("--tiny", action="store_true", help="in miniature: for tests")
    parser.add_argument("--minutes", type=common.POSITIVE, default=9.0,
                        help="for the whole call; what does not fit is left out, and said")
    parser.add_argument("--jpegs", type=Path, metavar="DIR", help="for decode; default: drawn ones of 500 x 375")
    parser.add_argument("--output", type=Path, help="JSON lines, appended; default: results/gpu.jsonl, of --tiny none")
    parser.add_argument("--paper", action="store_true", help="print the profile on paper and end")
    parser.add_argument("--child", action="store_true", help="run one benchmark in this process")
    parser.add_argument("--since", type=common.COUNT_OR_ZERO, default=0, metavar="LINE", help="of a child: what stands "
                        "in the output from this line on is done")
    args = parser.parse_args(argv)
    args.output = args.output or Path(os.devnull if args.tiny else "results/gpu.jsonl")
    if unknown := set(args.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(unknown)}: {', '.join(BENCHMARKS)}")
    return args


def call(command: Sequence[str], limit: float) -> int:
    """The exit code of a command. After `limit` seconds it ends with all that it has started, which would go on."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(limit)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def main(args: argparse.Namespace) -> None:
    if args.paper:
        print(paper(), end="")
        return
    if args.child:
        (name,) = args.names
        BENCHMARKS[name][0](Bench(args, name))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # which ends the child as well
    args.output.parent.mkdir(parents=True, exist_ok=True)
    end, unfinished = time.monotonic() + 60 * args.minutes, list[str]()
    for name in args.names or BENCHMARKS:
        began, since = time.monotonic(), len(lines_of(args.output))
        last = min(end, began + BENCHMARKS[name][1])
        command = [sys.executable, __file__, name, "--child", "--device", args.device, "--output", str(args.output)]
        command += ["--tiny"] * args.tiny + (["--jpegs", str(args.jpegs)] if args.jpegs else [])
        known, problem = -1, "no time was left"
        while last - time.monotonic() > 5 and known < len(lines_of(args.output)):  # as long as it comes further
            known = len(lines_of(args.output))
            try:
                code = call([*command, "--since", str(since)], last - time.monotonic())
                problem = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                problem = f"stopped after {time.monotonic() - began:.0f} s"
            if not problem:
                break
        print(f"-- {name}: {problem or 'done'}, {time.monotonic() - began:.0f} s", flush=True)
        if problem:
            unfinished.append(name)
            with args.output.open("a") as file:
                file.write(json.dumps(dict(benchmark=name, case="", error=problem, device=args.device)) + "\n")
    if unfinished:
        raise common.Fault(f"not finished: {', '.join(unfinished)}; name them to try again")


if __name__ == "__main__":
    common.launch(main, parse_args)
