"""Objects cut out of annotated scenes, such as Kitchen-HC (CLD, supplement, section 1): a folder for each class.

    python tools/crop_boxes.py train.csv SCENES data/kitchen-hc/train
    python tools/crop_boxes.py val.csv SCENES data/kitchen-hc/val     # then: python cld.py --preset kitchen-kmeans10

A table of boxes has the header image,x1,y1,x2,y2,class and a line for each box: a path below SCENES, then its corners
in pixels, the second ones outside the box. Crops are written as PNG, as wide as their boxes; training scales them. A
box that is empty after it is cut to its image is left out, and counted.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

COLUMNS = ["image", "x1", "y1", "x2", "y2", "class"]


def crop_boxes(table: Path, scenes: Path, out: Path) -> tuple[int, int]:
    """Writes OUT/<class>/<line>-<image>.png for each line of `table`; returns (written, left out)."""
    written = left_out = 0
    try:
        text = table.read_bytes().decode("utf-8-sig")  # spreadsheets begin it with a mark
    except UnicodeDecodeError:
        raise common.Fault(f"{table} is not UTF-8: save it in that encoding") from None
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        if not set(COLUMNS) <= set(reader.fieldnames or ()):
            raise common.Fault(f"{table} has not the header {','.join(COLUMNS)}")
        for line, row in enumerate(reader):
            try:
                x1, y1, x2, y2 = (round(float(row[key])) for key in COLUMNS[1:5])
            except (TypeError, ValueError, OverflowError):
                raise common.Fault(f"{table}, line {reader.line_num}: the corners of the box are not numbers") from None
            if (row["class"] or ".")[0] == "." or "/" in row["class"]:
                raise common.Fault(f"{table}, line {reader.line_num}: {row['class']!r} is no name of a folder")
            with Image.open(scenes / row["image"]) as scene:
                x1, y1, x2, y2 = max(0, x1), max(0, y1), min(scene.width, x2), min(scene.height, y2)
                if x1 >= x2 or y1 >= y2:
                    left_out += 1
                    continue
                folder = out / row["class"]
                folder.mkdir(parents=True, exist_ok=True)
                scene.convert("RGB").crop((x1, y1, x2, y2)).save(folder / f"{line:06}-{Path(row['image']).stem}.png")
                written += 1
    return written, left_out


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="BOXES.csv")
    parser.add_argument("scenes", type=Path, metavar="SCENES")
    parser.add_argument("out", type=Path, metavar="OUT")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    written, left_out = crop_boxes(args.table, args.scenes, args.out)
    print(f"{written} crops, {left_out} empty boxes left out")


if __name__ == "__main__":
    common.launch(main, parse_args)
