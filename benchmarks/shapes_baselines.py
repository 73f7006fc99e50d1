"""What `shapes` gives without self-supervision: colour histograms, oriented gradients, a network trained with labels.

    python benchmarks/shapes_baselines.py --output results/shapes-demo/baselines.jsonl

prints one JSON line for each and appends it to the file; pixels and the untrained network are `eval_knn.py`'s.
`knn20_top1` and `knn200_top1` are weighted kNN accuracies in percent (cosine similarity s, weight exp(s / 0.07));
`supervised_top1` is that of the classifier itself.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import npid
from common import shapes

NEIGHBORS, TEMPERATURE = (20, 200), 0.07


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=5000, help="training images, of seed 0")
    parser.add_argument("--test", type=int, default=2000, help="test images, of seed 1")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the supervised network; 0 leaves it out")
    parser.add_argument("--width", type=int, default=16, help="channels of the first ResNet-18 stage (64 is standard)")
    parser.add_argument("--seed", type=int, default=0, help="of the network's weights and the training")
    parser.add_argument("--output", type=Path, help="file to which the lines are appended")
    return parser.parse_args(argv)


def colour_histogram(images: Tensor) -> Tensor:
    """Square roots of joint colour counts, eight levels a channel. (n, 3, h, w) uint8 -> (n, 512)."""
    red, green, blue = (images // 32).long().flatten(2).unbind(1)
    counts = torch.zeros(len(images), 512)
    return counts.scatter_add_(1, 64 * red + 8 * green + blue, torch.ones(red.shape)).sqrt()


def oriented_gradients(images: Tensor, bins: int = 9, cell: int = 4) -> Tensor:
    """HOG: unsigned directions in cells, normalised over 2x2 cells. (n, 3, h, w) uint8 -> (n, features)."""
    grey = F.pad(common.luma(images.float() / 255), (1, 1, 1, 1), mode="replicate")
    right = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    position = torch.atan2(down, right).remainder(math.pi) * (bins / math.pi)
    offset = (position - torch.arange(bins)[:, None, None]).remainder(bins)
    share = (1 - torch.minimum(offset, bins - offset)).clamp(min=0)  # linear between neighbouring directions
    cells = F.avg_pool2d(share * torch.sqrt(right.square() + down.square()), cell)
    height, width = cells.shape[2:]
    blocks = torch.cat([cells[:, :, i : height - 1 + i, j : width - 1 + j] for i in (0, 1) for j in (0, 1)], 1)
    return (blocks / (torch.linalg.vector_norm(blocks, dim=1, keepdim=True) + 1e-3)).flatten(1)


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The function's rows for all images, 500 at a time."""
    return torch.cat([function(part) for part in torch.split(images, 500)])


def train(model: npid.Encoder, images: Tensor, labels: Tensor, scaled: Callable[[Tensor], Tensor], epochs: int,
          seed: int) -> None:
    """Cross-entropy with NPID's augmentation of small images; SGD, batches of 128, cosine to zero."""
    batch, steps = 128, epochs * (len(images) // 128)
    source = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=source)[: len(images) // batch * batch]
        for index in torch.split(order, batch):
            draw = common.Draw(source, batch, slice(None), common.CPU)
            boxes = common.crop_boxes(draw(common.CROP_NUMBERS), *images.shape[2:], (0.2, 1.0))
            view = npid.augment(common.resized_crop(images[index], boxes, images.shape[-1]), draw, False, True)
            optimizer.zero_grad()
            F.cross_entropy(model(scaled(view)), labels[index]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def main(args: argparse.Namespace) -> None:
    """Print and append one line for each kind of feature."""
    images, labels = shapes(args.train, seed=0)
    test_images, test_labels = shapes(args.test, seed=1)
    pixels = images.float() / 255
    mean, std = pixels.mean((0, 2, 3))[:, None, None], pixels.std((0, 2, 3))[:, None, None]
    torch.manual_seed(args.seed)
    model = npid.Encoder("resnet18", args.width, True, 10).eval()

    def scaled(view: Tensor) -> Tensor:
        """Floats in [0, 1], standardised per channel."""
        return (view - mean) / std

    def report(name: str, features: Callable[[Tensor], Tensor], **more: float) -> None:
        """Weighted kNN on these features, as a line of JSON."""
        train_rows, test_rows = (F.normalize(in_parts(features, part)) for part in (images, test_images))
        found = common.knn_accuracy(test_rows, test_labels, train_rows, labels, 10, num_neighbors=NEIGHBORS,
                                    temperatures=[TEMPERATURE])
        accuracy = {f"knn{k}_top1": round(found[k, TEMPERATURE][0], 2) for k in NEIGHBORS}
        line = json.dumps(dict(features=name, train=args.train, test=args.test, **accuracy, **more))
        print(line, flush=True)
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("a") as file:
                file.write(line + "\n")

    report("colour histograms", colour_histogram)
    report("HOG", oriented_gradients)
    if args.epochs:
        start = time.perf_counter()
        train(model, images, labels, scaled, args.epochs, args.seed)
        seconds = round(time.perf_counter() - start, 1)
        found = in_parts(lambda part: model(scaled(part.float() / 255)).argmax(1), test_images)
        top1 = round(100 * (found == test_labels).float().mean().item(), 2)
        report("supervised network", lambda part: model.backbone(scaled(part.float() / 255)), supervised_top1=top1,
               epochs=args.epochs, width=args.width, seed=args.seed, seconds=seconds)


if __name__ == "__main__":
    main(parse_args())
