"""Tiny ImageNet (100,000 + 10,000 images of 64 px, 200 classes) as OUT/{train,val}/<class>/, 32 px by default.

    python tools/tiny_imagenet.py tiny-imagenet-200 data/tiny32
    python npid.py --preset cifar10 --data data/tiny32

The first argument is the folder that tiny-imagenet-200.zip unpacks to. Its training images lie in
train/<class>/images/, its validation images in one folder with a list of their classes. Each pixel of the smaller
image is the mean of those it covers. Images are written as PNG, so that nothing is lost a second time.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common


def jobs(source: Path, out: Path) -> list[tuple[Path, Path]]:
    """(image to read, image to write) of both splits."""
    found = [(path, out / "train" / path.parent.parent.name / f"{path.stem}.png")
             for path in sorted(source.glob("train/*/images/*"))]
    listed = source / "val/val_annotations.txt"
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        name, label = [*line.split("\t"), ""][:2]
        if not (name and label):
            raise common.Fault(f"{listed}, line {number}: not the name of an image, a tab and its class")
        found.append((source / "val/images" / name, out / "val" / label / f"{Path(name).stem}.png"))
    return found


def shrink(read: Path, write: Path, size: int) -> None:
    """The image as size x size RGB."""
    with Image.open(read) as image:
        image.convert("RGB").resize((size, size), Image.Resampling.BOX).save(write)


def convert(source: Path, out: Path, size: int) -> int:
    """Writes OUT/{train,val}/<class>/<name>.png; returns how many images."""
    work = jobs(source, out)
    for folder in {write.parent for _, write in work}:
        folder.mkdir(parents=True, exist_ok=True)
    reads, writes = zip(*work, strict=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(shrink, reads, writes, [size] * len(work), chunksize=256))
    return len(work)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="tiny-imagenet-200")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--size", type=common.SIZE, default=32, metavar="PX", help="side of the images written")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    if not (args.source / "val/val_annotations.txt").is_file():
        raise common.Fault(f"{args.source} has no val/val_annotations.txt: it is not the folder of "
                           "tiny-imagenet-200.zip")
    print(f"{convert(args.source, args.out, args.size):,} images in {args.out}")


if __name__ == "__main__":
    common.launch(main, parse_args)
