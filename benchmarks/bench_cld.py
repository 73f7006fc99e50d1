"""CLD's cost: the step against bare passes of its network, and the k-means in it against Faiss; one JSON line each.

    python benchmarks/bench_cld.py                              # ResNet-18, 32 px, batch 64, bank of 50,000
    python benchmarks/bench_cld.py --batch-size 256 --k 128     # as `cld.py --data cifar10`

Both sides of a ratio are measured in turn, so that a busy machine slows them alike; medians.
  step_ratio        what NPID+CLD does with two views (two passes, bank softmax, k-means, both losses, SGD, bank write)
                    / two bare passes forward and backward; at most 1.10 is the aim, on a CPU
  augmented_ratio   the same with the crops and the augmentation of two views
  speedup_of_kmeans Faiss on both views of a batch, features to the host and labels back included / ours; 5 is the aim
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cld
import common


def in_turn(repeats: int, device: torch.device, *works: Callable[[], object]) -> list[float]:
    """Median seconds of each, all run once in each of `repeats` rounds after a warm-up round."""
    seconds: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, mine in zip(works, seconds, strict=True):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                mine.append(time.perf_counter() - began)
    return [statistics.median(mine) for mine in seconds]


def faiss_kmeans(z: Tensor, k: int, iterations: int) -> Tensor:
    """Labels (V, B) of spherical k-means of each view by Faiss, from the first k rows."""
    faiss = common.import_faiss()
    found = []
    for rows in z.detach().cpu().numpy():
        clustering = faiss.Clustering(rows.shape[1], k)
        clustering.niter, clustering.spherical = iterations - 1, True
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(rows) + 1
        faiss.copy_array_to_vector(np.ascontiguousarray(rows[:k]).ravel(), clustering.centroids)
        index = faiss.IndexFlatIP(rows.shape[1])
        clustering.train(np.ascontiguousarray(rows), index)
        found.append(index.search(np.ascontiguousarray(rows), 1)[1][:, 0])
    return torch.from_numpy(np.stack(found)).to(z.device)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--batch-size", type=common.COUNT, default=64)
    parser.add_argument("--k", type=common.COUNT, default=32, help="groups")
    parser.add_argument("--width", type=common.COUNT, default=64)
    parser.add_argument("--images", type=common.COUNT, default=50_000, help="rows of the bank")
    parser.add_argument("--repeats", type=common.COUNT, default=5)
    common.add_device_options(parser)
    return parser.parse_args(argv)


def records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """k-means, then the step."""
    device = common.pick_device(args.device)
    if device.type == "cpu":
        common.keep_freed_memory()  # as a run does
    facts = dict(device=common.device_name(device), threads=torch.get_num_threads(), torch=torch.__version__,
                 batch_size=args.batch_size, k=args.k)

    z = F.normalize(torch.randn(2, args.batch_size, 128, device=device), dim=2)
    ours, theirs = in_turn(50, device, lambda: cld.em_labels(z, args.k, 5), lambda: faiss_kmeans(z, args.k, 5))
    yield dict(facts, case=f"k-means of two views of {args.batch_size}, k={args.k}", kmeans_ms=round(1e3 * ours, 3),
               faiss_ms=round(1e3 * theirs, 3), speedup_of_kmeans=round(theirs / ours, 2))

    encoder = cld.Encoder("resnet18", args.width, True, 128, "linear", groups=True).to(device)
    host = cld.Npid(common.MemoryBank(args.images, 128).to(device), 0.1, 0.5)
    sgd = torch.optim.SGD(encoder.parameters(), 0.03, momentum=0.9)
    amp = common.amp_default(device) if args.amp is None else args.amp
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    crops = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    views = torch.rand(2, args.batch_size, 3, 32, 32, device=device)
    index = torch.randperm(args.images, device=device)[: args.batch_size]
    draw = common.Draw(torch.Generator().manual_seed(0), args.batch_size, slice(None), device)

    def bare() -> None:
        encoder.zero_grad()
        with autocast:
            features = [encoder.backbone(images) for images in views]
        sum(feature.float().sum() for feature in features).backward()

    def step(views: Tensor = views) -> None:
        sgd.zero_grad()
        with autocast:
            z, g, _ = encoder(views)
        losses, _ = host.instance_loss(z, None, host.targets(views), index)
        groups = cld.group(g, args.k, 5)
        cross, _ = cld.group_loss(g, groups, 0.2)
        cld.group_figures(g, groups)
        (losses.mean() + cross.mean()).backward()
        sgd.step()
        host.after_step(encoder, lambda *tensors: tensors, 0.5)

    def augmented() -> None:
        boxes = [common.crop_boxes(draw(common.CROP_NUMBERS), *crops.shape[2:], (0.2, 1.0)) for _ in range(2)]
        cut = [common.resized_crop(crops, box, 32) for box in boxes]
        step(torch.stack([cld.augment(images, draw, "plain", view, False) for view, images in enumerate(cut)]))

    passes, steps, whole = in_turn(args.repeats, device, bare, step, augmented)
    yield dict(facts, case=f"NPID+CLD, ResNet-18 width {args.width}, B = {args.batch_size}: step / two bare passes",
               bare_s=round(passes, 4), step_s=round(steps, 4), step_ratio=round(steps / passes, 3),
               augmented_ratio=round(whole / passes, 3))


if __name__ == "__main__":
    for record in records(parse_args()):
        print(json.dumps(record), flush=True)
