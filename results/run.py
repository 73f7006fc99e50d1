"""The rows of the README's table: made one after the other, in pieces of some minutes, then written into the table.

    python results/run.py --list                       # every row: its state and its commands
    python results/run.py                              # all that can be made here, in the order of the list
    python results/run.py cifar10-npid --minutes 9     # stops cleanly after 9 minutes; the same command goes on
    python results/run.py cifar10-npid -- --compile    # what follows -- is added to the training command
    python results/run.py --table                      # writes the README's table from results/*/

A row is a training command, then evaluations of what it left in WORK/<row>/, which has to outlive a call for the row
to go on. After each step results/<row>/ receives what the README cites, without the paths of this machine: log.jsonl
and eval.jsonl as the scripts wrote them, pictures, and row.json: commands, encoding of the images, device, minutes.

Exit code 0: all rows asked for are finished; 1: some could not be made; 3: time is up, the same command goes on.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common

ROOT = common.ROOT

# ---- rows ------------------------------------------------------------------------------------------------------------

KNN = "eval_knn.py {run}/checkpoint.pth --k 200 20"
LINEAR = "eval_linear.py {run}/checkpoint.pth --layers backbone"
SVM = "eval_linear.py {run}/checkpoint.pth --preset svm-head"
SVM_BACKBONE = "eval_linear.py {run}/checkpoint.pth --preset svm-head --layers backbone"  # DeepCluster has no head
CURVES = "figures.py curves {run} --out {run}/curves.png"
GALLERY = "figures.py gallery {run} --out {run}/gallery.png"
MADE = (KNN, LINEAR, SVM)
DRAWN = (*MADE, CURVES, GALLERY)


class Row(NamedTuple):
    """A line of the table. knn, svm: the paper's figures, if it has any. steps: what is run after the training; none
    where the whole row is too large for one machine."""

    title: str
    data: str
    train: str
    knn: str = ""
    svm: str = ""
    steps: tuple[str, ...] = MADE


CIFAR, TINY = "CIFAR-10, ResNet-18", "Tiny ImageNet at 32 px, ResNet-18"
TINY32 = "--preset cifar10 --data data/tiny32"
# In the order in which they are made, which is that of their importance; those without steps are too large for it.
# The Tiny ImageNet rows cost the same: so many forward and backward passes as 200 epochs of NPID. CLD sees two views of
# an image, and DeepCluster passes all images forward once more for its clustering.
ROWS = {
    "cifar10-npid": Row("NPID, Table 1: exact softmax", CIFAR, "npid.py --preset cifar10", "80.8", "75.4", DRAWN),
    "cifar10-npid-cld": Row("CLD, Table A.2: NPID+CLD", CIFAR, "cld.py --preset cifar10", "86.5", steps=DRAWN),
    "cifar10-la": Row("Local Aggregation", CIFAR, "local_aggregation.py --preset cifar10", steps=DRAWN),
    "cifar10-npid-nce4096": Row("NPID, Table 1: NCE, m = 4096", CIFAR, "npid.py --preset cifar10-nce4096", "80.4",
                                "70.2"),
    "cifar10-deepcluster": Row("DeepCluster, k-means", CIFAR, "deepcluster.py --preset cifar10",
                               steps=(KNN, LINEAR, SVM_BACKBONE)),
    "cifar10-moco": Row("CLD: MoCo", CIFAR, "cld.py --preset cifar10-moco", "82.1"),
    "cifar10-moco-cld": Row("CLD: MoCo+CLD", CIFAR, "cld.py --preset cifar10-moco-cld-linear", "87.5"),
    "cifar10-npid-float32": Row("NPID, exact softmax, without bfloat16", CIFAR, "npid.py --preset cifar10 --no-amp",
                                "80.8", "75.4"),
    "cifar10-npid-nce512": Row("NPID, Table 1: NCE, m = 512", CIFAR, "npid.py --preset cifar10-nce512", "78.4", "64.3"),
    "cifar10-npid-nce10": Row("NPID, Table 1: NCE, m = 10", CIFAR, "npid.py --preset cifar10-nce10", "63.4", "60.2"),
    "cifar10-npid-nce1": Row("NPID, Table 1: NCE, m = 1", CIFAR, "npid.py --preset cifar10-nce1", "42.5", "44.3"),
    "cifar10-npid-parametric": Row("NPID, Table 1: parametric softmax", CIFAR, "npid.py --preset cifar10-parametric",
                                   "63.0", "60.3"),
    "cifar10-cld-none": Row("CLD, Table A.2: NPID alone", CIFAR, "cld.py --preset cifar10-no-cld", "80.8"),
    "cifar10-cld-shared": Row("CLD, Table A.2: one head, own view", CIFAR, "cld.py --preset cifar10-shared", "82.7"),
    "cifar10-cld-separate": Row("CLD, Table A.2: two heads, own view", CIFAR, "cld.py --preset cifar10-separate",
                                "84.2"),
    "cifar10-deepcluster-pic": Row("DeepCluster, PIC", CIFAR,
                                   "deepcluster.py --preset cifar10 --clustering pic --sigma median",
                                   steps=(KNN, LINEAR, SVM_BACKBONE)),
    "tiny32-npid": Row("NPID, exact softmax", TINY, f"npid.py {TINY32}"),
    "tiny32-npid-cld": Row("NPID+CLD, half the epochs", TINY, f"cld.py {TINY32} --epochs 100"),
    "tiny32-la": Row("Local Aggregation", TINY, f"local_aggregation.py {TINY32}"),
    "tiny32-deepcluster": Row("DeepCluster, 3/4 of the epochs", TINY, f"deepcluster.py {TINY32} --k 2000 --epochs 150",
                              steps=(KNN, LINEAR, SVM_BACKBONE)),
    "cifar100-npid": Row("CLD, Table A.2: NPID alone", "CIFAR-100, ResNet-18", "cld.py --preset cifar100-no-cld",
                         "51.6"),
    "cifar100-npid-cld": Row("CLD, Table A.2: NPID+CLD", "CIFAR-100, ResNet-18", "cld.py --preset cifar100", "57.5"),
    "cifar100-moco-cld": Row("CLD: MoCo+CLD", "CIFAR-100, ResNet-18", "cld.py --preset cifar100-moco-cld-linear",
                             "58.1"),
    "imagenet-npid-resnet18": Row("NPID, Table 2", "ImageNet, ResNet-18", "npid.py --preset imagenet-resnet18", "40.5",
                                  steps=()),
    "imagenet-npid-resnet50": Row("NPID, Table 2", "ImageNet, ResNet-50", "npid.py --preset imagenet-resnet50", "42.5",
                                  steps=()),
    "imagenet-la-resnet18": Row("Local Aggregation, Table 1", "ImageNet, ResNet-18",
                                "local_aggregation.py --preset imagenet", "45.0", steps=()),
    "imagenet-la-resnet50": Row("Local Aggregation, Table 1", "ImageNet, ResNet-50",
                                "local_aggregation.py --preset imagenet-resnet50", "49.4", steps=()),
}


def shown(row: Row) -> str:
    """The training command as a reader would type it."""
    return f"{'python' if row.steps else 'torchrun --nproc-per-node 8'} {row.train}"


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = common.parser(__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to make; default: all with steps, in order")
    parser.add_argument("--minutes", type=common.POSITIVE, metavar="MIN", help="stop cleanly after so long")
    parser.add_argument("--images", metavar="TEXT", help="how the images are encoded, where they are not the official "
                        'files, such as "JPEG quality 75": it stands beside the figures')
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR", "data")), metavar="DIR",
                        help="where CIFAR and tiny32/{train,val}/<class>/ lie ($DATA_DIR)")
    parser.add_argument("--work", type=Path, default=Path("runs/rows"), metavar="DIR", help="where checkpoints are "
                        "kept between calls")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="where logs go")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--table", action="store_true", help="write the README's table and end")
    args = parser.parse_args(words[:cut])
    args.added = words[cut + 1 :]
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}: {', '.join(ROWS)}")
    if large := [name for name in args.rows if not ROWS[name].steps]:
        parser.error(f"{', '.join(large)} is too large to be made here: {shown(ROWS[large[0]])}")
    return args


# ---- making a row ----------------------------------------------------------------------------------------------------


def encoding(row: Row, args: argparse.Namespace) -> str:
    """How the images of a row are encoded: "original" for the official files, else what --images says."""
    if "--preset smoke" in row.train:
        return "rendered"
    sets = {"CIFAR-10": torchvision.datasets.CIFAR10, "CIFAR-100": torchvision.datasets.CIFAR100}
    if official := sets.get(row.data.split(",")[0]):
        files = {args.data_dir / official.base_folder / name: md5
                 for name, md5 in [*official.train_list, *official.test_list]}
        if all(hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == md5
               for path, md5 in files.items() if path.is_file()):
            return "original"  # what is missing is downloaded
    elif row.data == TINY:
        first = next((args.data_dir / "tiny32/train").glob("*/*"), None)
        if first is None or first.suffix == ".png":
            return "original"  # as tools/tiny_imagenet.py writes them; of what is missing the script says so
    if not args.images:
        raise common.Fault(f"the images in {args.data_dir} are not the official files: say how they are encoded, such "
                           'as --images "JPEG quality 75"')
    return str(args.images)


def portable(text: str, args: argparse.Namespace) -> str:
    """A log without the paths of this machine."""
    names = {args.data_dir: "data", args.work: "runs/rows", args.results: "results", ROOT: ".", Path.home(): "~"}
    places = {json.dumps(str(way))[1:-1]: name for path, name in names.items() for way in (path, path.resolve())
              if way.is_absolute() and way.name}  # as JSON writes them; a home may be /
    for place in sorted(places, key=len, reverse=True):  # a folder before the one it lies in
        text = text.replace(place, places[place])
    return text


def write(path: Path, text: str) -> None:
    """The file whole, or as it was: a call may be killed at any moment."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read(path: Path, way: str, lines: bool = False) -> Any:
    """What a JSON file holds, or each of its lines. way: what to do where that is damaged."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except ValueError:
        raise common.Fault(f"{path} is damaged: restore it, or {way}") from None


def published(name: str, results: Path) -> dict[str, Any]:
    """results/<row>/row.json, or that the row was not run."""
    path = results / name / "row.json"
    facts = read(path, f"delete {path.parent} and make the row again") if path.exists() else {}
    return dict(finished=False, added=[]) | facts


def publish(name: str, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """results/<row>/ as far as the row has come."""
    source, target = args.work / name, args.results / name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("log.jsonl", "eval.jsonl"):
        if (source / file).exists():
            write(target / file, portable((source / file).read_text(), args))
    for picture in source.glob("*.png"):
        shutil.copy(picture, target)
    write(target / "row.json", portable(json.dumps(facts, indent=1), args) + "\n")


def make(name: str, args: argparse.Namespace, deadline: float) -> bool:
    """Go on with a row; returns whether it is finished. A step that fails is a Fault, after the step's own line."""
    row, folder = ROWS[name], args.work / name
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "row.json"
    facts: dict[str, Any] = dict(row=name, added=args.added, images=encoding(row, args), device="", finished=False,
                                 minutes=0.0, steps=[])
    train = [word.replace("data/", f"{args.data_dir}/") for word in row.train.split()]
    train += ["--data-dir", str(args.data_dir), "--output", str(folder), *args.added]
    steps = [train, *([word.format(run=folder) for word in step.split()] for step in row.steps)]
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{name}: without pictures, which need matplotlib", flush=True)
        steps = [step for step in steps if step[0] != "figures.py"]
    if state.exists():
        facts = read(state, f"delete it, and the row goes on from its {folder}/checkpoint.pth")
        facts["finished"] = len(facts["steps"]) >= len(steps)
        publish(name, facts, args)  # the last call may have been killed before it did, or its results be gone
    if not facts["steps"]:
        facts["added"] = args.added  # --epochs, for one, may change until the training ends
    elif args.added not in ([], facts["added"]):
        print(f"{name}: its training has ended, without {shlex.join(args.added)}", flush=True)
    for step in steps[len(facts["steps"]) :]:
        print(f"{name}: {shlex.join(step)}", flush=True)
        began, code = time.monotonic(), -1
        try:
            code = run_step(step, deadline)
        finally:  # the minutes of a call that is ended count, too
            facts["minutes"] = round(facts["minutes"] + (time.monotonic() - began) / 60, 2)
            if code == 0:
                facts["steps"].append(shlex.join(["python", *step]))
            facts["finished"] = len(facts["steps"]) == len(steps)
            with contextlib.suppress(OSError, ValueError):  # a script that was killed early has left no whole line
                facts["device"] = json.loads((folder / "log.jsonl").read_text().partition("\n")[0])["device"]
            write(state, json.dumps(facts))
            publish(name, facts, args)
        if code and time.monotonic() >= deadline:
            return False
        if code:
            raise common.Fault(f"exit code {code} of {shlex.join(step)}")
    return True


def run_step(step: list[str], deadline: float) -> int:
    """Run a script, and return its exit code; at the deadline, or when this program is ended, it is told to save and
    stop, and after two more minutes killed."""
    if time.monotonic() >= deadline:
        return 128 + signal.SIGTERM
    process = subprocess.Popen([sys.executable, str(ROOT / step[0]), *step[1:]])
    try:
        return process.wait(None if deadline == math.inf else deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        return 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# ---- the table -------------------------------------------------------------------------------------------------------

HEAD = ("paper", "data, network", "kNN, paper", "kNN, ours", "SVM, paper", "SVM, ours", "linear, ours", "command",
        "log")


def accuracies(name: str, results: Path) -> dict[str, str]:
    """knn, svm and linear accuracy of a finished row in percent, from the last line of each in its eval.jsonl."""
    found: dict[str, str] = {}
    path = results / name / "eval.jsonl"
    for result in read(path, f"delete {path.parent} and make the row again", True) if path.exists() else ():
        for key in ("knn", "svm", "linear"):
            if f"{key}_top1" in result:
                found[key] = f"{result[f'{key}_top1']:.1f}"
    return found


def table(results: Path) -> str:
    """The README's table. A row that is not finished says so."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for name, row in ROWS.items():
        facts, ours, log = published(name, results), dict[str, str](), ""
        if facts["finished"]:
            ours = accuracies(name, results)
            images = "" if facts["images"] == "original" else f", {facts['images']}"
            log = f"[{facts['device']}, {facts['minutes']:.0f} min{images}](results/{name}/log.jsonl)"
        missing = "none" if facts["finished"] else "not run"
        knn, svm, linear = (ours.get(key, missing) for key in ("knn", "svm", "linear"))
        command = " ".join([shown(row), *facts["added"]])
        lines.append((row.title, row.data, row.knn, knn, row.svm, svm, linear, f"`{command}`", log))
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def write_table(readme: Path, results: Path) -> None:
    """Put the table in the place of the old one, which begins with the same first column."""
    text = readme.read_text()
    start = text.index(f"| {HEAD[0]} | ")
    end = text.index("\n\n", start) + 1
    write(readme, text[:start] + table(results) + text[end:])


def main(args: argparse.Namespace) -> None:
    for name in ("data_dir", "work", "results"):  # from the root, where the scripts run: their logs hold what they see
        path = getattr(args, name).resolve()
        setattr(args, name, path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    os.chdir(ROOT)
    if args.table:
        write_table(Path("README.md"), args.results)
        return
    facts = {name: published(name, args.results) for name in ROWS}
    if args.list:
        for name, row in ROWS.items():
            said = "finished" if facts[name]["finished"] else "begun" if (args.work / name).exists() else "not run"
            steps = (f"python {step}" for step in row.steps)
            print(f"{name}: {said}", shown(row), *steps, sep="\n    ")
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not before the script has saved
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    failed = False
    for name in args.rows or [name for name in ROWS if ROWS[name].steps]:
        if facts[name]["finished"]:
            other = json.loads(portable(json.dumps(args.added), args)) not in ([], facts[name]["added"])
            print(f"{name}: finished" + f", without {shlex.join(args.added)}" * other, flush=True)
            continue
        try:
            done = make(name, args, deadline)
        except common.Fault as fault:
            if args.rows:
                raise
            print(f"{name}: left out: {fault}", file=sys.stderr, flush=True)
            failed = True
            continue
        if not done:
            print(f"{name}: time is up; the same command goes on", flush=True)
            raise SystemExit(3)
        print(f"{name}: finished", flush=True)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    common.launch(main, parse_args)
