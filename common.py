"""What at least three scripts need word for word, under names that say all that a caller has to know, with tests of its
own. No paper's design choices are made here; formulas that scripts share name their equation. Nothing happens at
import. In order of use:

     1  errors        Fault, launch, note
     2  options       parser, parse
     3  randomness    generator, Draw
     4  the run       Run: ranks, device, log, progress, checkpoint, resume, signals;  learning_rate
     5  data          load, ImageSet, Crop;  batches for training, extract for features
     6  shapes        the built-in data set
     7  augmentation  batched, on the device, drawn per image
     8  backbones     AlexNet, VGG16, ResNet
     9  bank          MemoryBank, bank_softmax
    10  clustering    kmeans, neighbors, knn_accuracy
    11  evaluation    load_encoder, load_train, publish
    12  VOC           load_voc: boxes, classes and masks;  average_precision
"""

from __future__ import annotations

import argparse
import atexit
import codecs
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import http.client
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.utils import _pytree as pytree
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.functional import pil_to_tensor, ten_crop

ROOT = Path(__file__).resolve().parent
Module = TypeVar("Module", bound=nn.Module)


# ---- 1. errors -------------------------------------------------------------------------------------------------------


class Fault(Exception):
    """Something the user can fix: `launch` prints it as one line and exits with code 2."""


def launch(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> None:
    """Run a script: bad input, a full disk or too little memory end with one line and exit code 2, not a traceback."""
    code, wait = 2, float(not first_rank())
    args = argparse.Namespace()
    for stream in (sys.stdout, sys.stderr):  # file names may hold characters that the terminal cannot encode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.platform == "linux":  # as up to Python 3.13; a server of workers, 3.14's default, dies of a job's signals
        multiprocessing.set_start_method("fork", force=True)
    try:
        args = parse_args()
        return main(args)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not meet what follows
        problem, code = "interrupted", 130
    except Fault as fault:
        problem = str(fault)
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        problem = f"batch normalisation meets a single value in a channel: raise --batch-size or {sizes(args)}"
    except (OSError, MemoryError, RuntimeError) as error:
        reason = str(error)
        # Since PyTorch 2.15 NCCL fails with plain RuntimeErrors, and before the group of ranks is there.
        if isinstance(error, RuntimeError) and ("NCCL" in reason or (dist.is_initialized() and (
                isinstance(error, dist.DistError) or "gloo" in reason or "Socket" in reason))):
            problem, wait = "another rank ended: see its message", 3.0
            if "NCCL" in reason:  # which can also fail on all ranks
                last = re.split("last error:", reason, flags=re.IGNORECASE)[-1].strip() or reason
                problem += f"; if there is none, NCCL failed: {last.splitlines()[0]}"
        elif out_of_memory(error):
            problem = f"out of memory: {less_memory(args)}"
        elif "no kernel image" in reason:
            problem = "this PyTorch has no kernels for this GPU: install a build that has, or use --device cpu"
        elif "Output size is too small" in reason or "greater than actual input size" in reason:
            network = getattr(args, "arch", None) or "this network"
            problem = f"the images are too small for {network}: raise {sizes(args)}"
        elif "memory(shm)" in reason or "out of shared memory" in reason:  # not that of a GPU's kernel
            problem = "/dev/shm, for the workers' images, is full: enlarge it (Docker: --shm-size) or lower --workers"
        elif reason.startswith("DataLoader worker"):
            problem = f"{reason.splitlines()[0]}: lower --workers"
        elif isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes there
            problem = "nobody reads the output any more: the same command, with its output to a file, continues"
        elif isinstance(error, OSError):
            problem = f"{error.strerror or error}: {error.filename or 'input or output failed'}"
        else:
            raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises when a worker is killed
        for worker in multiprocessing.active_children():  # an error's frames keep them alive; see `ignore_signals`
            worker.kill()
    # Most faults meet all ranks. One speaks first, then the launcher ends the others.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(wait)
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # the progress bar's line
    say(f"{clear}{Path(sys.argv[0]).name}: error: {problem}")
    sys.exit(code)


def first_rank() -> bool:
    """Whether this is rank 0, which speaks and acts for all ranks; works before there is a Run, too."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print on stderr; where nobody reads that, as after Ctrl-C in `2>&1 | tee log`, nothing happens."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is left in the buffer goes there


def note(text: str) -> None:
    """Say on stderr what all ranks have found, once."""
    if first_rank():
        say(text)


def out_of_memory(error: BaseException) -> bool:
    """Whether host, GPU or a library ran out of memory ("overflowed": a size too large to count in bytes)."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "calculation overflowed")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def less_memory(args: argparse.Namespace) -> str:
    """Which of the script's options take less memory."""
    ways = dict(batch_size="lower --batch-size", image_batch="lower --image-batch",
                accumulate="split each batch with --accumulate", cache="for small images use --cache host")
    known = [way for key, way in ways.items() if hasattr(args, key)] or ["end other programs"]
    return ", ".join(known[:-1]) + ", or " * (len(known) > 1) + known[-1]


def sizes(args: argparse.Namespace) -> str:
    """Which of the script's options say how large the images are that the network sees."""
    names = ["image_size"] if "image_size" in args else ["train_sizes", "crop", "test_size"]
    return " or ".join(f"--{name.replace('_', '-')}" for name in names if name in args)


def way_out(error: OSError) -> str:
    """What helps where a file could not be written."""
    return "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: a temporary one in the same directory, on the disk before it is renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # not every file system knows how to flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def append_line(path: Path, line: str) -> None:
    """Add a JSON line to a file, or nothing of it. Half a line, left by a kill, goes; a whole one is ended first."""
    with path.open("ab+") as file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.lockf(file, fcntl.LOCK_EX)  # two evaluations of a network may end together
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 20)))
        last = file.read().rpartition(b"\n")[2]
        try:
            if last:
                json.loads(last)
                line = f"\n{line}"
        except ValueError:
            size -= len(last)
            file.truncate(size)
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), size)
            raise


def append_result(folder: Path, line: str) -> None:
    """Add a result to eval.jsonl; a folder that cannot be written to is no reason to lose what is printed next."""
    try:
        append_line(folder / "eval.jsonl", line)
    except OSError as error:
        note(f"note: cannot write {folder / 'eval.jsonl'} ({error.strerror})")


# ---- 2. options ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        time.sleep(float(not first_rank()))  # all ranks meet it: one speaks, and the launcher ends the others
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)  # "None" says nothing


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], Any]:
    """An argparse type: a finite number in [low, high], or (low, high] if `open_low`."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or (open_low and value == low) or value == math.inf:
            bounds = f"above {low:g}" if open_low else f"at least {low:g}"
            bounds += f" and at most {high:g}" if high < math.inf else " and finite"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in "invalid int value"
    return convert


COUNT = number(int, 1, 2**53)
COUNT_OR_ZERO = number(int, 0, 2**53)
SIZE = number(int, 1, 2**16)  # of a layer or an image: more cannot be meant
POSITIVE = number(float, 0, 1e38, open_low=True)  # what float32 holds
NOT_NEGATIVE = number(float, 0, 1e38)
SHARE = number(float, 0, 1)


def count_or_share(text: str) -> float:
    """An argparse type: a number of images (1, 2, ...) or a share of them (0.1: 10 %); 1.0 might be meant as either."""
    value = POSITIVE(text)
    if value >= 1 and (value != int(value) or value > 2**53 or (value == 1 and "." in text)):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of images nor a share below 1")
    return int(value) if value >= 1 else float(value)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that prints `doc` as it stands, every default, and errors as one line."""
    return _Parser(description=doc, formatter_class=_Help, allow_abbrev=False)


def default_workers() -> int:
    """This rank's share of the processor's cores, 16 at most. SLURM may have bound it to its own cores already.

    Elsewhere than on Linux each worker imports everything anew: two at most.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bound = "TORCHELASTIC_RUN_ID" not in os.environ and cores <= int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
    share = max(1, cores // (1 if bound else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return min(16 if sys.platform == "linux" else 2, share)


def add_set_options(data: argparse._ArgumentGroup) -> None:
    """Where a set lies, how much of it is used, and by how many processes: of `load` and `load_voc`."""
    data.add_argument("--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR", "data")), metavar="DIR",
                      help="where named sets lie or are downloaded or rendered to ($DATA_DIR)")
    data.add_argument("--subset", type=count_or_share, metavar="N", help="train on N images (or a share below 1), "
                      "drawn by the seed (shapes: the first N); class-balanced, where images have classes")
    data.add_argument("--test-subset", type=count_or_share, metavar="N", help="the same for the test images")
    data.add_argument("--workers", type=number(int, 0, 1024), default=default_workers(), metavar="N",
                      help="processes of each rank that decode images")


def add_data_options(options: argparse.ArgumentParser) -> None:
    """The options of `load`, the same in training and evaluation."""
    data = options.add_argument_group("data")
    data.add_argument("--data", default="shapes", metavar="NAME|DIR",
                      help=f"{', '.join(DATASETS)}, or any directory of images: train/ and val/ below it are its "
                           "splits; nested or flat; class = first folder level, used by evaluation only; "
                           "evaluations of a run use its own set, unless this is given")
    add_set_options(data)
    data.add_argument("--val-dir", type=Path, metavar="DIR", help="validation images of a directory without val/")
    data.add_argument("--file-list", type=Path, metavar="FILE", help="of a folder of images, train on those that this "
                      "names; lines: an image or a class folder, and the class if folders do not tell it; evaluations "
                      "of a run use its own, and --val-list and --imbalance, unless --data is given")
    data.add_argument("--val-list", type=Path, metavar="FILE", help="the same for the validation images; default: "
                      "those of the classes that --file-list leaves")
    data.add_argument("--imbalance", type=number(float, 1), metavar="R", help="train on a long tail, the same for each "
                      "seed: class sizes fall exponentially, to 1/R of the first class's in the last; training itself "
                      "sees no label")
    data.add_argument("--image-size", type=SIZE, metavar="PX", help="side of the square the network sees; default: "
                      "the data set's own (32 shapes and CIFAR, 96 STL-10, 224 photographs)")
    data.add_argument("--cache", choices=["device", "host", "none"], help="where decoded images live; default: device "
                      "if they take under a quarter of its free memory, none for folders of large images")
    data.add_argument("--max-bad-images", type=COUNT_OR_ZERO, default=0, metavar="N", help="unreadable images to "
                      "tolerate, each named in the output and replaced by plain grey")


def add_network_options(
    options: argparse.ArgumentParser, more: str = "", nargs: str | None = None
) -> argparse._ArgumentGroup:
    """What is evaluated; the group is returned, for more options. more: what else the first argument may be."""
    options.add_argument("checkpoint", nargs=nargs, help="checkpoint.pth or backbone.pth of these scripts, a file with "
                         f'torchvision\'s or timm\'s names, or "random" for an untrained network{more}')
    model = options.add_argument_group("model")
    model.add_argument("--arch", choices=ARCHITECTURES, help="of random networks, and of files that are not "
                       "from these scripts")
    model.add_argument("--width", type=SIZE, help="channels of the first stage (64)")
    add_statistics_options(model, "default: its run's, else the data set's")
    return model


def add_statistics_options(options: argparse._ActionsContainer, more: str) -> None:
    """--mean and --std. more: whose they are by default."""
    for name in ("mean", "std"):
        options.add_argument(f"--{name}", type=number(float, 0, 1, open_low=name == "std"), nargs=3, metavar="RGB",
                             help=f"{name} of the channels, in [0, 1], by which the network's images were normalised; "
                             f"{more}")


def add_run_options(options: argparse.ArgumentParser, output: str) -> argparse._ArgumentGroup:
    """Output and checkpoints of whatever trains; `output`: the default place. The group is returned."""
    run = options.add_argument_group("run")
    run.add_argument("--output", type=Path, metavar="DIR", help="log, checkpoint and weights; a checkpoint found there "
                     f"is resumed; default: {output}")
    run.add_argument("--overwrite", action="store_true", help="start anew in an --output that holds a run")
    run.add_argument("--save-minutes", type=NOT_NEGATIVE, default=10, metavar="MIN", help="a checkpoint every "
                     "MIN minutes, besides those after each epoch (0: only those)")
    return run


def add_device_options(options: argparse.ArgumentParser) -> None:
    """Where and in which precision to compute, the same in training and evaluation."""
    machine = options.add_argument_group("machine")
    machine.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: the best available")
    machine.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast of the network; the "
                         "similarities stay in float32; default: on for GPUs and CPUs that have its instructions; "
                         "without it convolutions on GPUs run in TF32, PyTorch's default")


def add_training_options(options: argparse.ArgumentParser) -> None:
    """Model, optimisation and run, the same in the four methods. Defaults come from the presets."""
    add_data_options(options)
    model = options.add_argument_group("model")
    model.add_argument("--arch", choices=ARCHITECTURES, default="resnet18", help="backbone; 3x3 stem below "
                       "64 px; _bn: batch normalisation after convolutions, _bn_fc: after fc6 and fc7 too")
    model.add_argument("--width", type=SIZE, default=64, help="channels of the first stage; 64 is standard, less is "
                       "for small machines")
    model.add_argument("--feature-dim", type=SIZE, default=128, metavar="D", help="D, size of the embedding")
    optim = options.add_argument_group("optimization")
    optim.add_argument("--epochs", type=COUNT, default=200, help="passes over the training images")
    optim.add_argument("--batch-size", type=COUNT, default=256, metavar="B", help="B, the sum over all ranks")
    optim.add_argument("--accumulate", type=COUNT, default=1, metavar="N", help="forward and backward in N parts, for "
                       "small devices; batch statistics are then those of a part")
    optim.add_argument("--lr", type=POSITIVE, default=0.03, help="learning rate, never rescaled by B")
    optim.add_argument("--schedule", choices=["step", "cosine", "constant"], default="step",
                       help="step: x0.1 at each of --lr-drops; cosine: to zero at --epochs")
    optim.add_argument("--lr-drops", type=COUNT, nargs="*", default=[120, 160], metavar="EPOCH",
                       help="epochs at which --schedule step drops lr")
    optim.add_argument("--momentum", type=SHARE, default=0.9, help="of SGD")
    optim.add_argument("--weight-decay", type=NOT_NEGATIVE, default=1e-4, help="of SGD")
    optim.add_argument("--seed", type=COUNT_OR_ZERO, default=0, help="of weights, bank, order, draws")
    add_device_options(options)
    run = add_run_options(options, "runs/<script>-<preset>-seed<seed>")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    run.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=None, help="on a single GPU, "
                     "record a step and replay it with one launch; default: where images are smaller than 64 px")
    run.add_argument("--sync-bn", action="store_true", help="batch statistics over all GPUs")
    run.add_argument("--knn-every", type=COUNT_OR_ZERO, default=10, metavar="N", help="weighted kNN accuracy each N "
                     "epochs and after the last (0: never), by the labels")


def parse(
    options: argparse.ArgumentParser, presets: dict[str, dict[str, Any]], argv: Sequence[str] | None,
    base: str = "imagenet",
) -> argparse.Namespace:
    """Defaults < preset `base` < preset (by --preset, else by --data) < command line. Bad presets are errors."""
    options.add_argument("--preset", choices=list(presets), metavar="NAME", help="a row of a paper's table (README.md, "
                         f"PAPERS.md), one of {', '.join(presets)}; default: the one named like --data, else {base}")
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--data", default=options.get_default("data"))
    early = first.parse_known_args(argv)[0]
    if early.preset is not None and early.preset not in presets:
        near = ", ".join(difflib.get_close_matches(early.preset, presets, cutoff=0.4))
        options.error(f"there is no preset {early.preset}" + f"; near it: {near}" * bool(near))
    name = early.preset or (early.data if presets.get(early.data, {}).get("data") == early.data else base)
    known = {action.dest: action for action in options._actions}
    for key, value in (presets.get(base, {}) | presets.get(name, {})).items():
        values = value if isinstance(value, list) else [value]
        if key not in known or any(one not in (known[key].choices or values) for one in values):
            raise ValueError(f"preset {name} sets {key}={value!r}, or its base {base} does: no such option or choice")
        options.set_defaults(**{key: value})
    options.set_defaults(preset=name)
    args = options.parse_args(argv)
    args.typed = typed(options, argv)
    args.script = Path(options.prog).stem
    args.output = args.output or Path("runs") / f"{args.script}-{name}-seed{args.seed}"
    if "schedule" in known:
        note_idle(args, dict(lr_drops=(args.schedule == "step", "--schedule step")))
        note_drops(args, args.epochs, options.get_default("epochs"))
    return args


def note_idle(args: argparse.Namespace, needs: dict[str, tuple[bool, str]]) -> None:
    """Say which options on the command line have no effect. needs: whether one is used, and what it needs for that."""
    for name, (used, need) in needs.items():
        if name in args.typed and not used:
            note(f"note: --{name.replace('_', '-')} has no effect without {need}")


def note_drops(args: argparse.Namespace, end: int, usual: int) -> None:
    """Say which rate drops lie beyond the end of training: typed ones, or those of a preset that ends at `usual`."""
    if getattr(args, "schedule", "step") == "step":
        meant = {"lr_drops", "schedule"} & set(args.typed)
        lost = [drop for drop in args.lr_drops if drop >= end and (drop < usual or meant)]
        if lost:
            note(f"note: training ends at {end}, before --lr-drops {' '.join(map(str, lost))}")
        if not args.lr_drops and "schedule" in args.typed and "lr_drops" not in args.typed:
            note("note: --schedule step without --lr-drops: the rate stays as it is")


def typed(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> list[str]:
    """Names of the options that stand on the command line."""
    words = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    return sorted(action.dest for action in options._actions if words & set(action.option_strings))


# ---- 3. randomness ---------------------------------------------------------------------------------------------------


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream follows from `key` alone, such as (seed, "order", epoch)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, by pinned memory: from other memory the host may wait for all a GPU has to do.

    Elsewhere the copy is waited for: on Apple's GPUs an unawaited one may read what comes after.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Draw:
    """Uniform numbers for each image of this rank's batch: rows of the global batch's, whatever the number of ranks."""

    def __init__(self, source: torch.Generator, batch_size: int, rows: slice, device: torch.device) -> None:
        self.source, self.batch_size, self.rows, self.device = source, batch_size, rows, device
        self.shapes = list[tuple[int, ...]]()  # of all that has been asked for

    def __call__(self, *shape: int) -> Tensor:
        """The next numbers in [0, 1): (rows, *shape). Drawn on the CPU, so that all devices see the same."""
        self.shapes.append(shape)
        return sent(torch.rand(self.batch_size, *shape, generator=self.source)[self.rows], self.device)


class Redraw:
    """A `Draw` for a CUDA graph: its numbers, of known shapes, lie in a tensor that is filled anew for each replay."""

    def __init__(self, draw: Draw, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes, rows = shapes, len(range(draw.batch_size)[draw.rows])
        self.numbers = torch.empty(rows, sum(map(math.prod, shapes)), device=draw.device)
        self.parts = iter(torch.split(self.numbers, [math.prod(shape) for shape in shapes], 1))

    def copy_(self, draw: Draw, non_blocking: bool) -> None:
        """Fill it with the numbers that `draw` would have given."""
        if self.shapes:
            each = [torch.rand(draw.batch_size, *shape, generator=draw.source) for shape in self.shapes]
            numbers = torch.cat([part.view(draw.batch_size, -1) for part in each], 1)[draw.rows]
            numbers = numbers.pin_memory() if draw.device.type == "cuda" else numbers
            self.numbers.copy_(numbers, non_blocking=non_blocking)

    def __call__(self, *shape: int) -> Tensor:
        part = next(self.parts)
        return part.reshape(len(part), *shape)


def free_variables(function: Any) -> dict[str, Any]:
    """What a nested function reads from around it, by name; what has no value yet is left out."""
    while isinstance(function, functools.partial):
        function = function.func
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}


class Graph:
    """A function of tensors and `Draw`s as one CUDA graph: one launch in place of hundreds, which take longer than
    their kernels where images are small.

    The first calls run the function as it is, the next one records its kernels, and from then on these are replayed. So
    whatever the function does in Python, such as to choose a branch or to append to a list, it does in the first calls
    alone; tensors that outlive a call have to be written in place; inputs keep their shapes; and what a call returns is
    overwritten by the next one.
    """

    FIRST = 3  # calls without a graph, which make what lasts, such as the optimiser's momentum

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0
        self.shapes = list[list[tuple[int, ...]]]()  # of the numbers that each Draw was asked for

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.FIRST:
            outputs = self.function(*inputs)
            self.shapes = [x.shapes for x in inputs if isinstance(x, Draw)]
            # What autograd keeps behind a metric belongs to the default stream, and could not be recorded on another.
            return pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        new = self.calls == self.FIRST + 1
        if new:
            if len({getattr(x, "device", None) for x in inputs}) > 1:
                raise Fault("a CUDA graph records numbers and tensors of the CPU as constants: pass each input as a "
                            "tensor of the GPU, such as torch.full((), number, device=run.device)")
            shapes = iter(self.shapes)
            self.inputs = [Redraw(x, next(shapes)) if isinstance(x, Draw) else torch.empty_like(x) for x in inputs]
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given, non_blocking=True)
        if new:
            outputs, self.replay = self.record()
            self.outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
            self.seen = free_variables(self.function)
        for name, value in free_variables(self.function).items():
            old = self.seen.get(name, value)  # what had no value then was not read
            if value is not old and not (isinstance(value, (int, float, str)) and value == old):
                raise Fault(f"{name} has changed since a CUDA graph recorded it: pass it to the function as a tensor, "
                            "write it in place, or use --no-cuda-graph")
        self.replay()
        return self.outputs

    def record(self) -> tuple[Any, Callable[[], None]]:
        """What the function returns for `inputs`, and what has to be called to compute it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
            outputs = self.function(*self.inputs)
        return outputs, graph.replay


# ---- 4. the run ------------------------------------------------------------------------------------------------------

# A resumed run may change these: they do not change what is learnt; of the data `ImageSet.identity` is compared.
FREE_OPTIONS = {
    "output", "overwrite", "preset", "typed", "data", "data_dir", "val_dir", "cache", "workers", "max_bad_images",
    "device", "compile", "cuda_graph", "save_minutes", "knn_every", "knn_features", "test_subset", "val_list", "epochs",
    "checkpoint", "log_every", "test_list", "shard_bank", "memory", "features", "image_batch",
}
NEVER = 2**62  # a step that no run reaches


class Run:
    """One training run: its ranks, device, output folder, log and checkpoint. The same on a laptop and a cluster.

    Without a launcher there is one rank and every collective is the identity. Under torchrun or SLURM tensors on GPUs
    go through nccl and those on the CPU through gloo, by which ranks agree without touching the GPU.
    """

    writing: Future[None] | None = None  # the checkpoint on its way to the disk
    in_background = False  # checkpoints are written while training goes on
    warned = False  # of a collapse

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.writer = ThreadPoolExecutor(1)
        self.device = pick_device(args.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.rank, self.world = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Clustering keeps the other ranks waiting: the limit is far above what it takes.
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(hours=2))
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self.barrier()  # a rank that ends now would leave others in the midst of finding each other
        if args.batch_size % (self.world * args.accumulate):
            raise Fault(f"--batch-size {args.batch_size} must divide by ranks x accumulate = "
                        f"{self.world} x {args.accumulate}")
        gpus = self.world if self.device.type == "cuda" else 0
        note_idle(args, dict(cuda_graph=(gpus == 1, "a single GPU"), sync_bn=(gpus > 1, "several GPUs")))
        self.amp = amp_default(self.device) if args.amp is None else args.amp
        self.output: Path = args.output
        self.cuts = dict[Any, Callable[..., Any]]()  # how batches are cut from pixels
        self.signal = 0  # the last one received
        self.bar: Any = None  # tqdm's, on a terminal
        self.first_bad = torch.tensor(NEVER, device=self.device)  # the first step whose loss was not finite
        self.saved_at = time.monotonic()
        if self.rank == 0:
            self._open_output()
        self.barrier()

    def _open_output(self) -> None:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            self.lock = (self.output / "lock").open("w")
        except OSError as error:
            raise Fault(f"cannot write to {self.output} ({error.strerror}): choose another --output") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by workers
        except (BlockingIOError, PermissionError):
            raise Fault(f"{self.output} is in use by another run: choose another --output; if there is none, as after "
                        f"the death of a node, remove {self.output / 'lock'}") from None
        except OSError as error:
            say(f"note: {self.output} cannot be locked ({error.strerror}): start nothing else there")
        for leftover in self.output.glob("*.pth.tmp"):  # ours: other files may lie there too
            leftover.unlink()

    # ranks

    def barrier(self) -> None:
        """Wait for all ranks, by gloo: it notices that one has failed, whereas NCCL would wait for it."""
        self.agree(0)

    def rows(self, count: int) -> slice:
        """This rank's part of `count` things; parts may differ by one. To gather them, use `share`."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def share(self, count: int) -> Tensor:
        """Positions of this rank's share of `count` things; shares are equally long, padded with the last thing."""
        size = -(-count // self.world)
        return torch.arange(self.rank * size, (self.rank + 1) * size).clamp_(max=count - 1)

    def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each tensor of every rank, joined along dim 0 in the order of ranks: of equal shapes; no gradient."""
        if self.world == 1:
            return tuple(tensor.detach() for tensor in tensors)
        joined = []
        for tensor in tensors:
            parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world)]
            dist.all_gather(parts, tensor.contiguous())
            joined.append(torch.cat(parts))
        return tuple(joined)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def broadcast(self, module: nn.Module) -> None:
        """Give all ranks rank 0's buffers, so that evaluation uses the batch statistics the checkpoint has."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def agree(self, wish: int) -> int:
        """The largest `wish` of all ranks; -agree(-wish) is the smallest."""
        if self.world > 1:
            tensor = torch.tensor(wish)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            return int(tensor.item())
        return wish

    def alike(self, *content: Any) -> bool:
        """Whether all ranks have the same content, by a checksum of what it prints as."""
        # Seven bytes, which an int64 holds with either sign
        key = int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=7).digest(), "big")
        return self.agree(key) == -self.agree(-key)  # the greatest of all ranks is the least

    # the model on its device

    def place(self, model: Module) -> Module:
        """Move a model to the device, channels last (convolutions are faster so), and compile it in place if asked."""
        model.to(self.device).to(memory_format=torch.channels_last)
        if self.args.sync_bn and self.world > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        if self.args.compile:
            model.compile()
        return model

    def parallel(self, model: nn.Module) -> nn.Module:
        """Gradients averaged over ranks, as the mean over the global batch."""
        if self.world == 1:
            return model
        with warnings.catch_warnings(action="ignore"):  # newer versions have another name for broadcast_buffers
            parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.device.type == "cpu" and self.world > 2:  # two terms have the same sum in either order
            parallel.register_comm_hook(None, lambda _, bucket: mean_in_order(bucket))
        return parallel

    def graphed(self, function: Callable[..., Any], small: bool) -> Callable[..., Any]:
        """The function as a `Graph` where --cuda-graph says so: by default for `small` images, on a single GPU."""
        choice = getattr(self.args, "cuda_graph", False)  # an option of the methods alone
        wanted = small if choice is None else choice
        return Graph(function) if wanted and self.device.type == "cuda" and self.world == 1 else function

    def autocast(self) -> torch.autocast:
        """bfloat16 for the network, where --amp says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    # randomness: an optimisation step follows from (seed, epoch, step) and the position in the global batch

    def generator(self, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator whose stream follows from --seed and `key` alone."""
        return generator(self.args.seed, *key, device=device)

    def permutation(self, epoch: int, count: int) -> Tensor:
        """The epoch's order of the images: (count,) int64 on the CPU."""
        return torch.randperm(count, generator=self.generator("order", epoch))

    def steps_per_epoch(self, count: int) -> int:
        """Whole batches in `count` images; the rest of an epoch's order is dropped."""
        if count < self.args.batch_size:
            raise Fault(f"--batch-size {self.args.batch_size} is more than the {count} images: lower it")
        return count // int(self.args.batch_size)

    def seed_step(self, epoch: int, step: int) -> None:
        """Seed whatever draws without a generator of its own, such as dropout, by the step."""
        torch.manual_seed(self.generator("step", epoch, step, self.rank).initial_seed())

    def draw(self, epoch: int, step: int) -> Draw:
        """The random numbers of a step's augmentation, for all its views: a second call repeats them."""
        size = self.args.batch_size
        return Draw(self.generator("augment", epoch, step), size, self.rows(size), self.device)

    # log, progress, checkpoint

    def describe(self, data: ImageSet | VocSet, more: ImageSet | VocSet | None = None, **facts: Any) -> None:
        """Say what runs, and keep it for the first line of the log and the checkpoint.

        more: images that the ranks share out too, as those of the monitor.
        """
        self.data = data.identity()
        if not self.alike(self.data, more and more.identity()):
            raise Fault(f"ranks see different images of {data.name}: its files have to be the same on every node")
        if not self.alike(facts):
            raise Fault(f"ranks differ in {', '.join(facts)}: files and packages have to be the same on every node")
        # Not where workers decode: it gains nothing there, and to fork while another thread writes is unsafe.
        self.in_background = all(isinstance(x, ImageSet) and x.pixels is not None for x in (data, more or data))
        self.header = dict(
            command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), options=plain_options(self.args), data=self.data,
            git=git_commit(), python=sys.version.split()[0], torch=torch.__version__,
            torchvision=torchvision.__version__, device=device_name(self.device), ranks=self.world,
            threads=torch.get_num_threads(), amp=self.amp, **facts,
        )
        if self.rank == 0:
            default = data.name == "shapes" and not {"data", "preset"} & set(self.args.typed)
            hint = " (only the default: rendered, not photographs)" if default else ""
            device = self.header["device"] + "".join(f", k-means by {facts[key]}" for key in facts if "backend" in key)
            print(f"data {data.name}{hint}: {len(data):,} images at {data.size} px; preset {self.args.preset}; "
                  f"{device}, {self.world} rank(s); output {self.output}", flush=True)

    def settings(self) -> dict[str, Any]:
        """The options that say what is learnt, without paths and the like, and the precision that was taken."""
        options = {key: value for key, value in self.header["options"].items() if key not in FREE_OPTIONS}
        return options | dict(amp=self.amp)

    def log(self, **row: Any) -> None:
        """Print one JSON line and append it to log.jsonl; what is not finite is null, as JSON has no word for it."""
        if self.rank == 0:
            line = json.dumps({key: None if isinstance(value, float) and not math.isfinite(value) else value
                               for key, value in row.items()})
            if self.bar is not None:
                self.bar.clear()
            try:
                print(line, flush=True)
            except BrokenPipeError:
                if not self.signal:
                    raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Ctrl-C also ended `| tee log`: first save, then stop
            path = self.output / "log.jsonl"
            try:
                append_line(path, line)
            except OSError as error:
                raise Fault(f"cannot write {path} ({error.strerror}): {way_out(error)}, then run the same "
                            "command") from None
            if row.get("feature_std", 1) < 0.01 and not self.warned:
                self.warned = True
                note(f"warning: all features are nearly alike (feature_std {row['feature_std']:.2g}): see README.md, "
                     "When it does not work")

    def resume(self, state: dict[str, Any], steps: int) -> tuple[int, int]:
        """Load the checkpoint of `output` into `state` if there is one; returns (epoch, step) to go on with.

        Everything logged after that checkpoint is dropped, so that a killed run ends with the log of an uninterrupted
        one. From here on SIGINT, SIGTERM and SIGUSR2 stop the run at the next step boundary.
        """
        path, log = self.output / "checkpoint.pth", self.output / "log.jsonl"
        epoch = step = 0
        if self.rank == 0 and self.args.overwrite:
            for name in ("checkpoint.pth", "backbone.pth", "detections.pth", "log.jsonl", "eval.jsonl"):
                (self.output / name).unlink(missing_ok=True)
        self.barrier()
        if self.agree(path.exists()) and not path.exists():
            raise Fault(f"some ranks do not see {path}: --output must lie on a disk that all share")
        if path.exists():
            saved = load_checkpoint(path)
            self._check_resumable(saved, path)
            epoch, step = saved["epoch"], saved["step"]
            if not self.alike(epoch, step, saved["log_size"]):
                raise Fault(f"ranks see different files {path}: --output must lie on a disk that all share")
            if saved["git"] != self.header["git"] and epoch < self.args.epochs:
                note(f"note: {path} was written by the code of {saved['git']}; it goes on with that of "
                     f"{self.header['git']}")
            try:
                for name, part in state.items():
                    part.load_state_dict(saved["state"][name])
            except (KeyError, RuntimeError, ValueError) as error:
                if out_of_memory(error):
                    raise
                raise Fault(f"{path} does not fit this code ({str(error).splitlines()[-1].strip()}): choose another "
                            "--output or --overwrite") from None
            if self.rank == 0:
                if log.exists():
                    with log.open("rb+") as file:  # a log that something else has cut ends with a whole line
                        file.truncate(file.read(saved["log_size"]).rfind(b"\n") + 1)
                what = "already finished" if epoch == self.args.epochs else "resumed"
                print(f"{what}: {path} after {epoch} epochs and {step} of {steps} steps", flush=True)
        elif self.rank == 0:
            log.unlink(missing_ok=True)
        self.barrier()
        self.steps, self.start, self.printed_at = steps, time.monotonic(), -math.inf
        if self.rank == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            done = epoch * steps + step
            self.bar = tqdm(total=self.args.epochs * steps, initial=done, unit="step", dynamic_ncols=True)
        if self.rank == 0 and not (log.exists() and log.stat().st_size):
            self.log(**self.header)
        self.previous = {number: signal.signal(number, self._on_signal)
                         for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
        return epoch, step

    def _check_resumable(self, saved: dict[str, Any], path: Path) -> None:
        old, new = saved["options"], self.header["options"]
        if old.get("script") != new["script"]:
            raise Fault(f"{path} was written by {old.get('script')}, not {new['script']}: choose another --output")
        if what := differences(saved["data"], self.data):
            what += ["--cache"] * (old.get("cache") != new.get("cache"))  # it may leave central squares
            raise Fault(f"{path} was trained on other data ({saved['data']['name']}, {saved['data']['images']:,} "
                        f"images, not {self.data['name']}, {self.data['images']:,}; {', '.join(what)} differ): choose "
                        "another --output or --overwrite")
        if old.get("checkpoint_sha256") != new.get("checkpoint_sha256"):  # of what an evaluation fine-tunes
            raise Fault(f"{path} was trained from other weights than {new['checkpoint']} has now: choose another "
                        "--output or --overwrite")
        to_the_end = new["schedule"] == "cosine" or new.get("host") == "byol"  # whose key momentum grows until then
        free = FREE_OPTIONS - {"epochs"} if to_the_end else FREE_OPTIONS
        bound = sorted((old.keys() | new.keys()) - free)
        changed = [f"--{key.replace('_', '-')} {old.get(key)} -> {new.get(key)}"
                   for key in bound if old.get(key) != new.get(key)]
        if changed:
            raise Fault(f"{path} was trained with other options ({'; '.join(changed)}): use those, another --output or "
                        "--overwrite")
        if (saved["epoch"], saved["step"]) > (self.args.epochs, 0):
            raise Fault(f"{path} is past --epochs {self.args.epochs}, after {saved['epoch']}: choose more epochs, "
                        "or another --output")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        self.signal = number
        if self.rank == 0:
            with contextlib.suppress(OSError):  # not by print, which this signal may have interrupted
                os.write(2, f"\n{signal.Signals(number).name}: saving at the next step boundary\n".encode())

    def after_step(self, state: dict[str, Any], epoch: int, step: int, loss: Tensor) -> None:
        """Between steps: check that the loss is finite, save every --save-minutes and on a signal, show progress."""
        now = time.monotonic()
        bad = torch.where(torch.isfinite(loss.detach()), NEVER, epoch * self.steps + step)
        self.first_bad = torch.minimum(self.first_bad, bad)
        due = self.rank == 0 and now - self.saved_at > 60 * self.args.save_minutes > 0
        wish = self.agree(self.signal or (0 if due else -1))  # signal > 0: save and stop; 0: save; -1: go on
        if self.device.type == "cpu" or step % 50 == 0:  # a look waits for the device, which waits for all ranks
            self.check_finite()
        if wish >= 0:
            self.save(state, epoch, step + 1)
        if wish > 0:
            self.stop(wish, epoch, step + 1)
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}", refresh=False)
            self.bar.update()
        elif self.rank == 0 and now - self.printed_at > 60:
            print(f"epoch {epoch + 1}/{self.args.epochs}, step {step + 1}/{self.steps}, "
                  f"{now - self.start:.1f} s after the start of training", flush=True)
            self.printed_at = now

    def check_finite(self) -> None:
        """A loss that was not finite on any rank is a Fault on all."""
        first = -self.agree(-int(self.first_bad.item()))
        if first < NEVER:
            raise Fault(f"the loss is not finite (epoch {first // self.steps + 1}, step {first % self.steps + 1}): "
                        f"lower --lr, with --overwrite or another --output; the last checkpoint in {self.output}, if "
                        "any, is good")

    def stop(self, number: int, epoch: int, step: int) -> None:
        """End after a checkpoint, because of a signal: resources are released, and a launcher is told."""
        previous = self.previous[signal.Signals(number)]
        self.close()
        if self.rank == 0:
            command = "the same command, without --overwrite," if self.args.overwrite else "the same command"
            say(f"stopped after {epoch} epochs and {step} steps; {command} continues")
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, None)  # a launcher's own handler, such as submitit's: it requeues the job
        sys.exit(128 + number)

    def pause(self, epoch: int, step: int) -> None:
        """Stop here if a signal has come; for places between steps, with the checkpoint of (epoch, step) just saved."""
        if number := self.agree(self.signal):
            self.stop(number, epoch, step)

    def save(self, state: dict[str, Any], epoch: int, step: int) -> None:
        """Write checkpoint.pth: all of `state`, and where to go on. Atomic: a kill leaves the old or the new one.

        In the background where possible, from a copy, so that training does not wait for the disk: see `written`.
        """
        self.check_finite()
        weights = [w for part in state.values() if isinstance(part, nn.Module) for w in part.parameters()]
        if weights and not torch.stack([w.detach().isfinite().all() for w in weights]).all():
            raise Fault(f"weights are not finite after {epoch} epochs and {step} steps: lower --lr, with "
                        f"--overwrite or another --output; the last checkpoint in {self.output}, if any, is good")
        for part in state.values():  # what the ranks have in parts
            if hasattr(part, "collect"):
                part.collect()
        if self.rank == 0:
            self.written()
            content = dict(
                options=self.header["options"], data=self.data, git=self.header["git"], epoch=epoch, step=step,
                log_size=(self.output / "log.jsonl").stat().st_size,
                state={name: part.state_dict() for name, part in state.items()},
            )
            if self.in_background:
                self.writing = self.writer.submit(write_checkpoint, self.output / "checkpoint.pth", copied(content))
            else:
                write_checkpoint(self.output / "checkpoint.pth", content)
            self.saved_at = time.monotonic()

    def written(self) -> None:
        """Wait until the last checkpoint is on the disk; what went wrong there is raised here."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def finish(self, backbone: nn.Module) -> None:
        """Write backbone.pth, the plain weights under torchvision's names, and restore the signal handlers."""
        self.written()
        if self.rank == 0:
            weights = {name: weight.cpu() for name, weight in backbone.state_dict().items()}  # for any machine
            write_checkpoint(self.output / "backbone.pth", weights)
        self.close()

    def close(self) -> None:
        """Restore the signal handlers, leave the process group, unlock the output folder."""
        self.written()
        if self.bar is not None:
            self.bar.close()
        if self.world > 1:
            self.barrier()
            atexit.register(release_group, [dist.group.WORLD])
            dist.destroy_process_group()
        for number, handler in self.previous.items():  # last: a launcher's handler may end a rank others still need
            signal.signal(number, handler)
        if self.rank == 0:
            self.lock.close()


def mean_in_order(bucket: Any) -> Any:
    """The mean over ranks of a DDP bucket of gradients, summed in the order of ranks. Gloo's order depends on the place
    in the bucket, which is another after the first step of a process: a resumed run would get other roundings.
    """
    own = bucket.buffer()
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]

    def mean(gathered: Any) -> Any:
        gathered.value()  # raises what went wrong
        return own.copy_(sum(every) / len(every))

    return dist.all_gather(every, own, async_op=True).get_future().then(mean)


def parts(models: Sequence[nn.Module], *chunks: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """The parts of a batch (--accumulate): the first of each of `chunks`, the second of each, ..., as tuples.

    Ranks average the gradients of `models`, which Run.parallel returned, with the last part alone.
    """
    for number, part in enumerate(zip(*chunks, strict=True)):
        for model in models:
            if isinstance(model, nn.parallel.DistributedDataParallel):
                model.require_backward_grad_sync = number + 1 == len(chunks[0])
        yield part


def release_group(held: list[Any]) -> None:
    """Drop the last reference to the group of ranks at exit, after the model and before Python itself.

    Were it freed with the model, PyTorch 2.11 could deadlock: it holds the GIL while it waits for a thread of gloo that
    may be waiting for the GIL. Were it freed with Python itself, such a thread would abort the process.
    """
    gc.collect()  # the model, which holds the group too
    held.clear()


class Totals:
    """Sums of metrics on the device, read once per epoch; part of the checkpoint, with those of every rank."""

    def __init__(self, run: Run) -> None:
        self.run, self.zero = run, torch.zeros((), device=run.device)
        self.counts, self.sums, self.collected = dict[str, int](), dict[str, Tensor](), dict[str, Tensor]()

    def add(self, **figures: Tensor) -> None:
        """Add a value () to the sum of each figure, without waiting for the device."""
        for name, value in figures.items():
            self.counts[name] = self.counts.get(name, 0) + 1
            self.sums[name] = self.sums.get(name, self.zero) + value.detach().float()

    def means(self) -> dict[str, float]:
        """The mean of each figure over its additions and the ranks; then all are reset."""
        means = {name: self.run.mean(total).item() / self.counts[name] for name, total in self.sums.items()}
        self.counts, self.sums = {}, {}
        return means

    def collect(self) -> None:
        """Before state_dict, on all ranks: one sum per rank, (ranks,), so that each resumes with its own."""
        self.collected = {name: self.run.gather(total[None])[0] for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(counts=dict(self.counts), sums=self.collected)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, run = dict(state["counts"]), self.run
        # On another number of ranks each takes the mean, which `means` averages to the same.
        self.sums = {name: (totals[run.rank] if len(totals) == run.world else totals.mean()).to(run.device)
                     for name, totals in state["sums"].items()}


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all groups this learning rate: on a GPU in a tensor, which a CUDA graph reads anew in each replay.

    A checkpoint brings the options of the device that it was written on.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device
        if device.type != "cuda":
            group.update(lr=lr, fused=None, foreach=None)
            continue
        if not isinstance(group["lr"], Tensor) or group["lr"].device != device:
            group.update(lr=torch.empty((), device=device), fused=True, foreach=False)  # the kernel that takes a tensor
        group["lr"].fill_(lr)


def rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that was set last."""
    lr = optimizer.param_groups[0]["lr"]
    return float(f"{lr.item():.6g}") if isinstance(lr, Tensor) else lr  # float32 has seven digits


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    """The rate after `progress` epochs: args.lr, divided by ten at each of --lr-drops, or on a cosine to zero."""
    if args.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress / args.epochs))
    elif args.schedule == "step":
        factor = 0.1 ** sum(progress >= drop for drop in args.lr_drops)
    else:
        factor = 1.0
    return float(args.lr * factor)


def pick_device(name: str | None) -> torch.device:
    """The device asked for, else cuda, mps or cpu, in this order. Under a launcher: this rank's GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        expected = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("SLURM_GPUS_ON_NODE")
        if name == "cpu" and expected not in (None, "-1", "NoDevFiles"):  # which hide all of them
            note("warning: there should be GPUs, but this PyTorch sees none (a build for CPUs, or for a newer driver): "
                 "running on the CPU")
    if name == "cuda" and not torch.cuda.is_available():
        raise Fault("--device cuda: this PyTorch sees no CUDA device; use --device cpu or install a CUDA build")
    if name == "mps" and not torch.backends.mps.is_available():
        raise Fault("--device mps: this PyTorch sees no Apple GPU; use --device cpu")
    if name == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.device_count() == 1 and os.environ.get("SLURM_LOCALID") == str(local):
            local = 0  # a site's SLURM may bind each task to a GPU of its own, the only one it sees
        if local >= torch.cuda.device_count():
            raise Fault(f"rank {local} of this node has no GPU: only {torch.cuda.device_count()} are visible")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)
    return torch.device(name)


def amp_default(device: torch.device) -> bool:
    """bfloat16 only where it is faster: GPUs that have it, and CPUs with its instructions (twice as fast there)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: by default large tensors go back to the system, and each new one is paged in anew.

    This saves a sixth of a training step on a CPU; without glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD, of which older ones take 32 MB at most
            mallopt(-3, 1 << 25)
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def device_name(device: torch.device) -> str:
    """The name that is logged: of the GPU, or of the processor and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return device.type


def memory_gb(device: torch.device) -> float:
    """The most memory held so far, in GB: of the GPU, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def git_commit(folder: Path = ROOT) -> str:
    """The commit of the code in a folder, with -dirty if scripts are changed or new; "unknown" outside a repository."""
    with contextlib.suppress(OSError):
        return (folder / "COMMIT").read_text()  # of a submission's snapshot

    def git(*words: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(folder), *words]  # another user's installation too
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--", "*.py"))
    return "unknown"


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options as plain strings and numbers: a Namespace or a Path in a checkpoint would not load safely."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in sorted(vars(args).items())}


def copied(content: Any) -> Any:
    """Dictionaries, lists and tuples with copies of their tensors, on the CPU."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)


def write_checkpoint(path: Path, content: Any) -> None:
    """Write plain tensors, numbers and strings; a Fault if the disk is full, or if there is anything else."""
    buffer = io.BytesIO()  # torch.save straight to a full disk dies in C++ without a reason
    torch.save(content, buffer)
    buffer.seek(0)
    if strange := torch.serialization.get_unsafe_globals_in_checkpoint(buffer):  # which no resume would read
        raise Fault(f"{path} would hold {', '.join(sorted(strange))}: options, and what each state_dict returns, have "
                    "to be tensors, plain numbers and strings")
    try:
        write_whole(path, buffer.getbuffer())
    except OSError as error:
        raise Fault(f"cannot write {path} ({error.strerror}): {way_out(error)}, then run the same command; the last "
                    "checkpoint, if any, is whole") from None


def check_archive(file: BinaryIO) -> None:
    """Compare what torch.save wrote with its checksums, which torch.load does not look at; ValueError if they differ.

    A bit that has flipped in a weight would show as nothing but a worse result.
    """
    if not zipfile.is_zipfile(file):
        file.seek(0)
        if file.read(2) == b"PK":  # of a short one PyTorch says "Invalid argument"
            raise ValueError("truncated")
    else:
        with zipfile.ZipFile(file) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f"{name} is damaged")


def load_plain(path: Path) -> Any:
    """A file of plain tensors, numbers and strings, on the CPU. Garbage raises almost anything; nothing in it runs."""
    with path.open("rb") as file:
        check_archive(file)
    with warnings.catch_warnings(action="ignore"):  # of a pickle protocol that is not ours
        return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of ours: plain tensors, numbers and strings, nothing that could run code."""
    try:
        saved = load_plain(path)
        return {key: saved[key] for key in ("options", "data", "git", "epoch", "step", "log_size", "state")}
    except OSError as error:
        raise Fault(f"cannot read {path} ({error.strerror})") from None
    except Exception as error:  # garbage makes the unpickler raise almost anything
        if out_of_memory(error):
            raise
        raise Fault(f"{path} is damaged, truncated or no checkpoint of these scripts: remove it, or choose another "
                    "--output") from None


# ---- 5. data ---------------------------------------------------------------------------------------------------------


class DataSet(NamedTuple):
    """Facts of a named data set; its images are an ImageSet."""

    size: int  # px: what the network sees
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = DataSet(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATASETS = {
    "shapes": DataSet(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": DataSet(32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": DataSet(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": DataSet(96, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": IMAGENET,
    "imagenet100": IMAGENET,
    "places205": IMAGENET,
}
DATASETS["kitchen-hc"] = DATASETS["cifar10"]  # 32 px: CLD's supplement; mean and std: its code
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SMALL = 64  # px; networks for images below it take a 3x3 stem
CROP_NUMBERS = 22  # uniform numbers that crop_boxes takes for an image: ten areas, ten ratios, a corner
CPU = torch.device("cpu")


class Crop(NamedTuple):
    """RandomResizedCrop: side in px, range of the share of the area, range of the aspect ratio."""

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    of_square: bool = False  # shares are of the square of the shorter side, not of the whole image


@dataclasses.dataclass
class ImageSet:
    """Images in a fixed order: either decoded in `pixels`, or files that workers decode. Index = position here."""

    name: str
    size: int  # px: what the network sees
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    labels: Tensor  # (N,) int64, -1 where unknown; pretraining never sees them
    classes: list[str]
    ids: Tensor  # (N,) int64: position in the full, sorted set, before --subset
    pixels: Tensor | None = None  # (N, 3, H, W) uint8
    root: Path = Path()
    files: np.ndarray[Any, np.dtype[np.bytes_]] | None = None  # (N,) below root; no list, which each worker would copy
    workers: int = 0
    bad: BadImages = dataclasses.field(default_factory=lambda: BadImages(0))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def small(self) -> bool:
        """Whether the network takes its 3x3 stem."""
        return self.size < SMALL

    @property
    def shorter_side(self) -> int:
        """What it is scaled to before the central crop, px: 8/7 of `size` (256 for 224), `size` if images are small."""
        fits = self.pixels is not None and min(self.pixels.shape[2:]) <= self.size
        return self.size if self.small or fits else round(self.size * 8 / 7)

    def identity(self) -> dict[str, Any]:
        """What `differences` compares: plain values, with a checksum of some pixels or all names."""
        content, sample = hashlib.blake2b(digest_size=8), range(0, len(self), max(1, len(self) // 64))
        if self.pixels is not None:
            content.update(self.pixels[:: sample.step].cpu().numpy().tobytes())
        elif self.files is not None:
            content.update(self.files.tobytes())
            content.update(repr([file_size(self.path(row)) for row in sample]).encode())
        return dict(name=self.name, images=len(self), size=self.size, mean=list(self.mean), std=list(self.std),
                    small=self.small, classes=len(self.classes), checksum=content.hexdigest())

    def path(self, row: int) -> Path:
        """The file of the image at `row`."""
        assert self.files is not None
        return self.root / os.fsdecode(self.files[row])

    def select(self, rows: Tensor) -> ImageSet:
        """The images at `rows`, in that order."""
        pixels = None if self.pixels is None else self.pixels[rows.to(self.pixels.device)]
        files = None if self.files is None else self.files[rows.numpy()]
        return dataclasses.replace(self, labels=self.labels[rows], ids=self.ids[rows], pixels=pixels, files=files)

    def labels_among(self, classes: Sequence[str]) -> Tensor:
        """Labels (N,) that number `classes`, -1 for images of others or of none."""
        number = {name: label for label, name in enumerate(classes)}
        return torch.tensor([*(number.get(name, -1) for name in self.classes), -1])[self.labels]

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> zero mean and unit variance a channel, by the data set's figures."""
        return normalize(images, self.mean, self.std)

    def batches(
        self, run: Run, order: Tensor, crop: Crop, epoch: int, start: int = 0, views: int = 1
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Steps of an epoch from `start` on: (step, index (B,), images (views, B, 3, S, S) in [0, 1]) of this rank.

        Step s takes the positions s*B to (s+1)*B of `order`, the rest is dropped. The crop is drawn here, since workers
        decode only what it needs; all other augmentation belongs to the script.
        """
        rows, batch = run.rows(run.args.batch_size), run.args.batch_size
        if self.pixels is not None:
            order = order.to(self.pixels.device)  # once: a copy in each step would wait for the device

        def slots(step: int) -> Tensor:
            return order[step * batch : (step + 1) * batch][rows]

        def numbers(step: int) -> Tensor:
            draw = Draw(run.generator("crop", epoch, step), batch, rows, CPU)
            return torch.stack([draw(CROP_NUMBERS) for _ in range(views)])

        def cut(pixels: Tensor, boxes: Tensor) -> Tensor:
            return torch.stack([resized_crop(pixels, box, crop.size) for box in boxes])

        steps = range(start, len(order) // batch)
        if self.pixels is not None:
            key = (self.name, self.pixels.shape[1:], crop, views)
            graphed_cut = run.cuts.setdefault(key, run.graphed(cut, self.small))  # kept for all epochs
            height, width = self.pixels.shape[2:]
            for step in steps:
                # On the CPU, where so small operators take less than their launches on a GPU
                boxes = crop_boxes(numbers(step).flatten(0, 1), height, width, *crop[1:])
                index = slots(step)
                pixels = sent(self.pixels[index], run.device)
                images = graphed_cut(pixels, sent(boxes, run.device).view(views, -1, 4))
                run.seed_step(epoch, step)
                yield step, sent(index, run.device), images
        else:
            items = (list(zip(slots(step).tolist(), numbers(step).transpose(0, 1), strict=True)) for step in steps)
            decoder = _Decoder(self, functools.partial(random_crops, crop=crop), (views, 3, crop.size, crop.size))
            for step, (index, images) in zip(steps, self._decoded(decoder, items, run.device), strict=True):
                run.seed_step(epoch, step)
                yield step, index, images.transpose(0, 1)

    def centers(self, rows: Tensor, batch_size: int, device: torch.device, ten: bool = False) -> Iterator[Tensor]:
        """The central squares of the images at `rows`, by `shorter_side`, in batches (b, 3, S, S) in [0, 1].

        With `ten` the corners and the centre of each and of its mirror image, as torchvision's ten_crop,
        (b, 10, 3, S, S), the shorter side at 8/7 of S of small images too.
        """
        side = round(self.size * 8 / 7) if ten else self.shorter_side
        if self.pixels is not None:
            for part in torch.split(rows, batch_size):
                pixels = sent(self.pixels[part.to(self.pixels.device)], device)
                if ten:
                    yield torch.stack(ten_crop(resize_center_crop(pixels, side, side), self.size), 1)
                else:
                    yield resize_center_crop(pixels, side, self.size)
        else:
            read, shape = (ten_squares, (10, 3)) if ten else (central_square, (3,))
            decoder = _Decoder(self, functools.partial(read, size=self.size, side=side), (*shape, self.size, self.size))
            items = ([(i,) for i in part.tolist()] for part in torch.split(rows, batch_size))
            for _, images in self._decoded(decoder, items, device):
                yield images

    def _decoded(self, decoder: _Decoder, items: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(index, images in [0, 1]) on the device for each batch: `items` yields lists of _Decoder's items."""
        pinned = device.type == "cuda"
        loader = torch.utils.data.DataLoader(
            decoder, batch_sampler=items, num_workers=self.workers, pin_memory=pinned, worker_init_fn=ignore_signals,
        )
        for index, images, bad in loader:
            for row in index[bad].tolist():
                self.bad.add(self.path(row))
            yield index.to(device, non_blocking=pinned), images.to(device, non_blocking=pinned).float() / 255


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), copied to the device once: each copy waits for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def file_size(path: Path) -> int:
    """Bytes; -1 for a link that leads nowhere, which counts as an unreadable image."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


class BadImages:
    """Counts unreadable images, names each once, and gives up above the limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.paths = limit, set[Path]()

    def add(self, path: Path, all_ranks: bool = False) -> None:
        """all_ranks: each of them reads this image, and one names it."""
        if path not in self.paths:
            self.paths.add(path)
            if len(self.paths) > self.limit:
                raise Fault(f"cannot read the image {path}: remove it, or tolerate some with --max-bad-images "
                            f"(now {self.limit})")
            if first_rank() or not all_ranks:
                say(f"unreadable image, replaced by grey: {path}")


def ignore_signals(worker: int) -> None:
    """A launcher or Ctrl-C signals workers too: they go on, so that their parent can finish its step.

    At exit Python sends SIGTERM to those that are left and waits for them: `launch` has to kill them before.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


# What Pillow raises for damaged images.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, struct.error, zlib.error,
              Image.DecompressionBombError)


class _Decoder(torch.utils.data.Dataset[tuple[int, Tensor, bool]]):
    """(row, *more) -> (row, image, bad): read(path of row, *more), uint8 of `shape`; grey and bad if unreadable."""

    def __init__(self, data: ImageSet, read: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        self.data, self.read, self.shape = data, read, shape

    def __getitem__(self, item: Any) -> tuple[int, Tensor, bool]:
        row, *more = item
        try:
            return row, self.read(self.data.path(row), *more).contiguous(), False
        except UNREADABLE:
            return row, torch.full(self.shape, 128, dtype=torch.uint8), True


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode; 16-bit grey, which Pillow would clip, is scaled."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def shortened(path: Path, side: int) -> Tensor:
    """The whole image, its shorter side scaled to `side` px: (3, H, W). Of one over 16 times as long, the middle."""
    with Image.open(path) as image:
        least = min(image.size)
        width, height = (side * min(length, 16 * least) // least for length in image.size)
        image.draft("RGB", (side, side))
        pixels = rgb(image)
    most = 16 * min(pixels.size)
    if max(pixels.size) > most:  # whole, it could take all memory
        left, top = ((length - min(length, most)) // 2 for length in pixels.size)
        pixels = pixels.crop((left, top, left + min(pixels.width, most), top + min(pixels.height, most)))
    whole: Tensor = pil_to_tensor(pixels.resize((width, height), Image.Resampling.BILINEAR))
    return whole


def ten_squares(path: Path, size: int, side: int) -> Tensor:
    """The shorter side scaled to `side`, then torchvision's ten_crop: (10, 3, size, size)."""
    return torch.stack(ten_crop(shortened(path, side), size))


def central_square(path: Path, size: int, side: int) -> Tensor:
    """The shorter side scaled to `side`, then the central square: (3, size, size)."""
    pixels = shortened(path, side)
    top, left = (round((length - size) / 2) for length in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def random_crops(path: Path, uniform: Tensor, crop: Crop) -> Tensor:
    """Crops (views, 3, S, S) of an image by uniform numbers (views, 22). JPEGs are decoded no larger than they need.

    Each is scaled out of the whole image: at its border the filter sees pixels beyond it; torchvision's crop has none.
    """
    with Image.open(path) as image:
        width, height = image.size
        boxes = crop_boxes(uniform, height, width, *crop[1:])
        *_, low, narrow = boxes.amin(0).tolist()  # least height and width: no crop may get under crop.size pixels
        image.draft("RGB", (math.ceil(width * crop.size / narrow), math.ceil(height * crop.size / low)))
        pixels = rgb(image)
    x, y = pixels.width / width, pixels.height / height
    areas = [(left * x, top * y, (left + w) * x, (top + h) * y) for top, left, h, w in boxes.tolist()]
    crops = [pixels.resize((crop.size, crop.size), Image.Resampling.BILINEAR, area) for area in areas]
    return torch.stack([pil_to_tensor(view) for view in crops])


def extract(
    run_or_device: Run | torch.device, data: ImageSet, encode: Callable[[Tensor], Tensor], batch_size: int = 256
) -> Tensor:
    """Features (N, D) float32 of all images without augmentation, in their order; shared out over the ranks.

    encode: normalised images (b, 3, S, S) -> (b, D).
    """
    run = None if isinstance(run_or_device, torch.device) else run_or_device
    device = run_or_device if isinstance(run_or_device, torch.device) else run_or_device.device
    rows = torch.arange(len(data)) if run is None else run.share(len(data))
    features, end = torch.empty(0), 0
    with torch.no_grad():
        for images in data.centers(rows, batch_size, device):
            part, start, end = encode(data.normalize(images)), end, end + len(images)
            if start == 0:  # to keep the parts and join them in the end would take twice the memory
                features = part.new_empty(len(rows), *part.shape[1:], dtype=torch.float32)
            features[start:end] = part
    if run is None:
        return features
    run.barrier()
    return run.gather(features)[0][: len(data)]


def differences(known: dict[str, Any], images: dict[str, Any]) -> list[str]:
    """In what the images of an `identity` are not those known, whose checkpoint then does not fit. Not in their name:
    a folder on a node's own disk may have another in each job."""
    return [key for key in images if key != "name" and known.get(key) != images[key]]


def load(args: argparse.Namespace, split: str, device: torch.device, classes: Sequence[str] = ()) -> ImageSet:
    """The images that --data names. `split`: "pretrain" (STL-10: with the unlabelled), "train" or "test".

    classes: those of the training images, if there are any, for their test images.
    """
    if args.data in _NAMED:
        spec = DATASETS[args.data]
        pixels, labels, names = _NAMED[args.data](args, split)
        # Of a loader of one's own: other numbers than these would be scaled wrongly, and train without a word.
        scaled = pixels.dtype == torch.uint8 or (pixels.is_floating_point() and 0 <= pixels.min() <= pixels.max() <= 1)
        shaped = pixels.ndim == 4 and pixels.shape[:2] == (len(labels), 3)
        numbers = labels.dtype == torch.int64 and labels.ndim == 1 and -1 <= labels.min() <= labels.max() < len(names)
        if not (scaled and shaped and numbers):
            images, truth = (f"{x.dtype} {tuple(x.shape)} from {x.min():g} to {x.max():g}" for x in (pixels, labels))
            raise Fault(f"the loader of {args.data} returns images {images}, labels {truth}, {len(names)} class names: "
                        "images have to be (N, 3, H, W), uint8 or floats in [0, 1], labels (N,) int64, -1 or a name's "
                        "position")
        ids = torch.arange(len(labels))
        data = ImageSet(args.data, args.image_size or spec.size, spec.mean, spec.std, labels, names, ids, pixels)
    else:
        data = _folder(args, split)
    file_list, wanted = (args.val_list, args.test_subset) if split == "test" else (args.file_list, args.subset)
    if file_list is not None:
        data = listed(data, file_list)
    if args.data not in _NAMED:  # only now: a list may leave out what cannot be read
        side = _largest_side(data)
        small = 0 < side <= 96  # STL-10's; the 3x3 stem (ImageSet.small) is for still smaller ones
        data.size = args.image_size or (side if small else IMAGENET.size)
    # A list may leave other classes to the training images than the test images have
    if classes and (args.file_list or args.val_list) and data.classes not in ([], classes):
        data = _of_classes(args, data, classes)
    if wanted is not None and args.data != "shapes":  # which renders just what is wanted
        count = round(wanted * len(data)) if wanted < 1 else int(wanted)
        if not 1 <= count <= len(data):
            option = "test_subset" if split == "test" else "subset"
            source = "" if option in args.typed else f", from preset {args.preset}"
            raise Fault(f"--{option.replace('_', '-')} {wanted:g}{source}: {data.name} has {len(data)} images here; "
                        "lower it")
        data = data.select(balanced(data.labels, count, args.seed, "subset"))
    if args.imbalance and split != "test":
        data = long_tailed(data, args.imbalance)
        note(f"images of each class: {' '.join(map(str, torch.bincount(data.labels).tolist()))}")
    if args.data not in _NAMED:
        _decode_small(data, small, args.cache)
    elif args.cache == "none":
        raise Fault(f"--cache none is for folders of large images: {data.name} is held decoded")
    if data.pixels is not None:
        fits = device.type != "cuda" or data.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4
        if args.cache == "device" or (args.cache is None and fits):
            data.pixels = data.pixels.to(device)
    return data


def load_monitor(args: argparse.Namespace, data: ImageSet, device: torch.device) -> ImageSet | None:
    """The test images of the kNN monitor, at the size of `data`; None if it is off, or images have no classes."""
    folder, reason = args.data not in _NAMED, ""
    if folder and "knn_every" not in args.typed and validation_folder(args) is None:
        reason = "validation images, val/ or --val-dir"
    elif not (data.labels >= 0).any():
        reason = "folders that could be classes"
    on = bool(args.knn_every) and not reason
    if args.knn_every and reason:
        note(f"{data.name} has no {reason}: no kNN monitor")
    apart = folder and not (image_root(args) / "train").is_dir()  # then training leaves out what is in --val-dir
    idle = {name: (on, "a kNN monitor") for name in ("knn_features", "test_subset", "val_list")}
    note_idle(args, idle | dict(val_dir=((folder and on) or apart, "a folder of images and a kNN monitor")))
    if not on:
        return None
    test = load_test(args, data, device)
    if unknown := int((test.labels < 0).sum()):
        note(f"{unknown:,} of the {len(test):,} test images of {data.name} are in no class folder: no kNN monitor")
        return None
    return test


def load_test(args: argparse.Namespace, train: ImageSet, device: torch.device) -> ImageSet:
    """Test images of the set of the training images, at their size, with their mean and std, and of their classes."""
    test = load(argparse.Namespace(**vars(args) | dict(image_size=train.size)), "test", device, train.classes)
    test.mean, test.std = train.mean, train.std
    return test


def balanced(labels: Tensor, count: int, *key: int | str, share: bool = False) -> Tensor:
    """`count` positions of labels (N,), sorted, drawn by `key`: equally many of each class or, with `share`, the same
    share of each, plus or minus one; images without a label, -1, are one class."""
    order, labels = torch.randperm(len(labels), generator=generator(*key)), labels + 1  # -1 becomes class 0
    by_class = order[labels[order].argsort(stable=True)]
    sizes = torch.bincount(labels)
    starts = sizes.cumsum(0) - sizes
    turn = torch.empty_like(labels)  # how many of its class come before an image
    turn[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    turn = (turn.double() + 0.5) / sizes[labels] if share else turn  # the share of its class that comes before
    return order[turn[order].argsort(stable=True)[:count]].sort().values


def listed(data: ImageSet, path: Path) -> ImageSet:
    """The images of a folder that a list names, such as ImageNet-100's or ImageNet-LT's; lines: path [class].

    A path is the end of an image's path (up to four parts), or its folder's name, or that of its top folder. The top
    folder is the class, unless every image has one in the list and a folder has several (iNaturalist's kingdoms).
    Classes that have no image then are dropped.
    """
    # As names of files are read; some editors begin a file with a mark
    text = os.fsdecode(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    lines = [re.fullmatch(r"(.+?)(?:\s+(\d+))?", line.strip()) for line in text.splitlines()]
    if data.files is None:
        raise Fault(f"{path} names files, and {data.name} has none: lists are for folders of images")
    there = {name for file in data.files for name in os.fsdecode(file).split("/")[:-1]}
    # The number that a folder's own name ends with is no class
    wanted = dict((line[0], -1) if line[0] in there else (line[1], int(line[2] or -1)) for line in lines if line)
    rows, given, found = list[int](), list[int](), dict[str, Path]()
    for row in range(len(data)):
        file = data.path(row)
        above = os.fsdecode(data.files[row]).split("/")[:-1]  # folders below the root
        folders = [*above[:1], file.parent.name]  # the top one, if any, and the image's own
        names = [name for name in [*folders, *("/".join(file.parts[-n:]) for n in range(1, 5))] if name in wanted]
        for name in names:
            if name not in folders and found.get(name, file) != file:
                raise Fault(f"{path}: {name} is {found[name]} and {file}: put the name of its folder before it")
            found[name] = file
        if names:
            rows.append(row)
            given.append(wanted[names[0]])
    for name in wanted.keys() - found.keys():
        raise Fault(f"{path}: {name} is not among the {len(data.files):,} images of {data.name}")
    if not rows:
        raise Fault(f"{path} names no image: a line each is needed")
    part = data.select(torch.tensor(rows))
    numbers = torch.tensor(given)
    pairs = torch.unique(part.labels * (max(given) + 1) + numbers)  # more than folders, if the list divides one
    told = bool((part.labels >= 0).all() and (numbers >= 0).all())
    apart = told and len(torch.unique(part.labels)) < len(pairs)
    if apart:
        note(f"note: {path} has several classes in one folder of {data.name}: the list's are taken")
    if apart or not (data.labels >= 0).any():  # a flat folder, beside which others may hold no image
        part.labels, part.classes = numbers, [str(c) for c in range(max(given) + 1)]
    kept = [part.classes[c] for c in torch.unique(part.labels[part.labels >= 0])]
    part.labels, part.classes = part.labels_among(kept), kept
    return part


def _of_classes(args: argparse.Namespace, test: ImageSet, classes: Sequence[str]) -> ImageSet:
    """Test images of the training images' classes, and those without a class."""
    labels = test.labels_among(classes)
    strange = (test.labels >= 0) & (labels < 0)
    if strange.any() and (args.val_list is not None or strange.all()):
        name = test.classes[int(test.labels[strange][0])]
        raise Fault(f"{args.val_list or args.file_list}: no training image is of the class {name}, as test images are"
                    + ": name theirs by a --val-list" * (args.val_list is None))
    if strange.any():
        note(f"note: {int(strange.sum()):,} of the {len(test):,} test images are left out: {args.file_list} has no "
             "training image of their classes")
    return dataclasses.replace(test, labels=labels, classes=[*classes]).select((~strange).nonzero()[:, 0])


def long_tailed(data: ImageSet, ratio: float) -> ImageSet:
    """CIFAR-LT: of class c of C the share ratio^(-c/(C-1)) of the smallest class's size, the same in every run."""
    classes = torch.unique(data.labels)  # an empty folder is a class, too
    if (data.labels < 0).any() or len(classes) < 2:
        raise Fault(f"--imbalance needs the classes of all images, which {data.name} does not have")
    order = torch.randperm(len(data), generator=generator("imbalance"))
    members = [order[data.labels[order] == c] for c in classes]
    most, last = min(len(rows) for rows in members), len(members) - 1
    kept = [rows[: max(1, round(most * ratio ** (-c / last)))] for c, rows in enumerate(members)]
    return data.select(torch.cat(kept).sort().values)


def _shapes(args: argparse.Namespace, split: str) -> tuple[Tensor, Tensor, list[str]]:
    count, wanted = (10_000, args.test_subset) if split == "test" else (50_000, args.subset)
    if wanted is not None:
        count = max(1, round(wanted * count)) if wanted < 1 else int(wanted)
    pixels, labels = shapes(count, seed=int(split == "test"))
    return pixels, labels, [f"class {i}" for i in range(NUM_CLASSES)]


def _cifar(args: argparse.Namespace, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """The pickled batches of CIFAR-10 and -100, read without running anything they might contain."""
    ten = args.data == "cifar10"
    official = torchvision.datasets.CIFAR10 if ten else torchvision.datasets.CIFAR100  # knows files, md5 sums and keys
    folder = args.data_dir / official.base_folder
    _download(args, official.__name__, folder)
    path = folder  # what is read at present, for the message
    try:
        files = official.test_list if split == "test" else official.train_list
        batches = [_read_pickle(path := folder / name, md5) for name, md5 in files]
        meta = _read_pickle(path := folder / official.meta["filename"])
        classes = [os.fsdecode(name) for name in meta[official.meta["key"]]]
        path = folder
        pixels = torch.from_numpy(np.concatenate([np.asarray(batch["data"], np.uint8) for batch in batches]))
        truth = torch.tensor([label for batch in batches for label in batch["labels" if ten else "fine_labels"]])
        return pixels.view(len(truth), 3, 32, 32), truth, classes
    except OSError as error:
        reason = error.strerror
    except Exception:  # garbage makes the unpickler raise almost anything
        reason = "damaged, or no CIFAR batch"
    raise Fault(f"cannot read {path} ({reason}): remove {folder} to download the data again")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles lists, dictionaries, strings and numpy arrays; anything else in the file is refused, not run."""

    ALLOWED = frozenset({
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
        ("numpy", "dtype"), ("_codecs", "encode"), ("numpy._core.numeric", "_frombuffer"),
    })

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


@functools.cache
def _note_unofficial(folder: Path) -> None:
    """Said once of a folder."""
    note(f"note: {folder} does not hold the official files (md5 differs)")


def _read_pickle(path: Path, md5: str | None = None) -> dict[str, Any]:
    content = path.read_bytes()
    if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        _note_unofficial(path.parent)
    batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    return {os.fsdecode(key): value for key, value in batch.items()}


def _stl10(args: argparse.Namespace, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """The binary files of STL-10: 3 x 96 x 96 bytes an image, column by column; labels from 1."""
    folder = args.data_dir / "stl10_binary"
    _download(args, "STL10", folder)
    path = folder
    try:
        classes = (path := folder / "class_names.txt").read_text().split()
        pixels, labels = [], []
        for part in ("train", "unlabeled") if split == "pretrain" else (split,):
            images = np.fromfile(path := folder / f"{part}_X.bin", np.uint8).reshape(-1, 3, 96, 96)
            pixels.append(torch.from_numpy(images).transpose(2, 3))
            labels.append(torch.full((len(images),), -1))
            if part != "unlabeled":
                labels[-1] += torch.from_numpy(np.fromfile(path := folder / f"{part}_y.bin", np.uint8))
        return torch.cat(pixels), torch.cat(labels), classes
    except OSError as error:
        reason = error.strerror
    except (ValueError, RuntimeError):
        reason = "truncated"
    raise Fault(f"cannot read {path} ({reason}): remove {folder} to download the data again")


def _missing(there: Path) -> Iterator[None]:
    """A turn for the rank that has to make `there`: rank 0, then the first rank of each node that does not see it."""
    for rank in ("RANK", "LOCAL_RANK"):
        if os.environ.get(rank, "0") == "0" and not there.exists():
            yield
        if dist.is_initialized():
            dist.all_reduce(torch.zeros(()))  # by gloo, as Run.barrier; dist.barrier may take NCCL


def _download(args: argparse.Namespace, name: str, there: Path, **what: str) -> None:
    """Fetch and unpack a data set by torchvision, where it is missing.

    there: the set's own folder, or a file of it where `what` says which part is wanted: parts share their folders.
    """
    for _ in _missing(there):
        say(f"downloading {name} to {args.data_dir}")
        try:
            args.data_dir.mkdir(parents=True, exist_ok=True)
            # Whole sets are renamed once they are whole: other runs may look, or have been first.
            with tempfile.TemporaryDirectory(dir=args.data_dir) as place:
                root = str(args.data_dir) if what else place
                getattr(torchvision.datasets, name)(root, download=True, **what)
                if not there.exists() and not what:
                    (Path(place) / there.name).rename(there)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise Fault(f"{name} is not in {args.data_dir} and could not be downloaded ({error}): name its "
                        "parent folder with --data-dir, or use --data shapes") from None


_NAMED: dict[str, Callable[[argparse.Namespace, str], tuple[Tensor, Tensor, list[str]]]] = {
    "shapes": _shapes, "cifar10": _cifar, "cifar100": _cifar, "stl10": _stl10,
}


def image_root(args: argparse.Namespace) -> Path:
    """The folder that --data names."""
    return args.data_dir / args.data if args.data in DATASETS else Path(args.data)


def folder_name(root: Path) -> str:
    """The name of a folder; "." and ".." are none."""
    return (root if root.name.strip(".") else root.resolve()).name


def validation_folder(args: argparse.Namespace) -> Path | None:
    """--val-dir, else val/ or test/ below --data, if there is one."""
    root = image_root(args)
    return args.val_dir or next((root / name for name in ("val", "test") if (root / name).is_dir()), None)


def _folder(args: argparse.Namespace, split: str) -> ImageSet:
    """Any directory of images, its files sorted, none looked at yet."""
    named, root, val = args.data in DATASETS, image_root(args), validation_folder(args)
    if not root.is_dir():
        way = "put it there, or name its parent folder with --data-dir" if named else "--data takes a folder or a name"
        raise Fault(f"no directory {root}: {way}" + f" ({', '.join(DATASETS)})" * (not named))
    train = root / "train" if (root / "train").is_dir() else root
    if split == "test" and (val is None or not val.is_dir()):
        raise Fault(f"no directory {val or root / 'val'} with validation images: name another with --val-dir "
                    "(in training --knn-every 0 does without)")
    place = val if split == "test" and val else train
    # Without train/, all of root is trained on, except val/, test/ and --val-dir.
    others = {f.resolve() for f in (args.val_dir, root / "val", root / "test") if f is not None and train == root}
    with os.scandir(train) as entries:  # a flat folder of a million files takes no look at each
        classes = sorted(f.name for f in entries if f.name[0] != "." and f.is_dir()
                         and not (others and Path(f).resolve() in others))
    files = _image_files(place, others if place == train else set())
    first = [file.split("/")[0] if "/" in file else "" for file in files]  # "": in no folder
    if strange := sorted(set(first) - {"", *classes}):
        raise Fault(f"{place} has folders that {train} has not: {', '.join(strange[:3])}")
    number = {name: i for i, name in enumerate(classes)} | {"": -1}
    labels = torch.tensor([number[name] for name in first])
    name = args.data if named else folder_name(root)
    return ImageSet(name, 0, *DATASETS.get(args.data, IMAGENET)[1:], labels, classes,
                    torch.arange(len(files)), root=place, files=np.array([os.fsencode(file) for file in files]),
                    workers=args.workers, bad=BadImages(args.max_bad_images))


def _image_files(place: Path, without: set[Path]) -> list[str]:
    """Sorted names of the image files below `place`, hidden ones and those in the folders `without` left out."""
    files = []

    def fail(error: OSError) -> None:
        raise error

    def leads_back(path: Path) -> bool:
        return path.is_symlink() and any(above.resolve().is_relative_to(path.resolve()) for above in path.parents)

    for folder, folders, names in os.walk(place, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if name[0] != "." and not leads_back(Path(folder, name))
                      and not (without and Path(folder, name).resolve() in without)]
        inner = f"{folder}/"[len(f"{place}/") :]
        files += [inner + name for name in names if name[0] != "." and name.lower().endswith(SUFFIXES)]
    if not files:
        raise Fault(f"no images in {place} ({' '.join(sorted(SUFFIXES))})")
    return sorted(files)


def _largest_side(data: ImageSet) -> int:
    """The longest side among some 64 images, in px; 0 if none can be read."""
    side, low, high, floats = 0, math.inf, -math.inf, False
    for row in range(0, len(data), max(1, len(data) // 64)):
        try:
            with Image.open(data.path(row)) as image:
                side = max(side, *image.size)
                if image.mode[0] in "IF":
                    values = np.asarray(image)
                    low, high, floats = min(low, values.min()), max(high, values.max()), image.mode == "F"
        except UNREADABLE:
            data.bad.add(data.path(row), all_ranks=True)
    if high > -math.inf and not (low >= 0 and (1 < high < 256 if floats else 2**15 <= high < 2**16)):
        note(f"warning: {data.name} has grey values from {low:g} to {high:g}: integers are divided by 257, floats cut "
             f"off above 255. Convert the images to 8 bits, or to 0 to {'255' if floats else '65,535'}")
    return side


def _decode_small(data: ImageSet, small: bool, cache: str | None) -> None:
    """Decode a folder at once if its images are small or --cache asks for it: pixels (N, 3, side, side)."""
    if cache == "none" or (cache is None and not small):
        return
    side = data.size if small else round(data.size * 8 / 7)
    if not small:
        note(f"--cache {cache}: large images are kept as their central square at {side} px; crops come from it")

    data.pixels = torch.full((len(data), 3, side, side), 128, dtype=torch.uint8)
    pixels = data.pixels.numpy()  # written through torch, each thread of the pool would start more

    def unreadable(rows: range) -> list[int]:
        bad = []
        for row in rows:
            try:
                pixels[row] = central_square(data.path(row), side, side)
            except UNREADABLE:
                bad.append(row)
        return bad

    parts = (range(first, min(first + 256, len(data))) for first in range(0, len(data), 256))
    with ThreadPoolExecutor(max(1, data.workers)) as pool:
        try:
            for row in itertools.chain.from_iterable(pool.map(unreadable, parts)):
                data.bad.add(data.path(row), all_ranks=True)
        finally:
            pool.shutdown(cancel_futures=True)  # once one is too many, the rest is not waited for


# ---- 6. shapes -------------------------------------------------------------------------------------------------------

# shapes: the built-in data set. Ten classes of textured objects on a textured background, drawn from a seed.
#
# Every image is a point in a space of continuous factors, and a class is a blurred cloud in that space. Each
# factor ranks the ten classes in another order (one digit a class), so that none alone tells the class, and
# neighbours in the space look alike. What the usual augmentation removes (position, size, mirror image,
# brightness, hue) is drawn independently of the class.

FACTORS = {  # name: (value at level 0, value at level 1, typical level of classes 0..9 in tenths)
    "slope": (0.0, math.pi / 2, "0369258147"),  # direction of the ground's waves
    "spread": (0.05, 1.2, "7091852436"),  # how far the single waves deviate from it: stripes to blotches
    "frequency": (0.7, 1.7, "4820617953"),  # log of their cycles per half image
    "irregularity": (0.15, 0.7, "1574093862"),  # differences in log frequency between the waves
    "crispness": (-0.4, 1.6, "9246071385"),  # log gain: soft waves to hard-edged patches
    "depth": (-2.6, -1.4, "5281740396"),  # log amplitude of the ground's pattern
    "tilt": (0.0, math.pi / 2, "5107964283"),  # direction of the object's long axis
    "length": (1.0, 2.2, "8413705629"),  # ratio of the object's axes
    "corners3": (0.0, 0.32, "6935140872"),  # amplitudes of the outline's harmonics
    "corners4": (0.0, 0.25, "3782496510"),
    "corners5": (0.0, 0.25, "0594837216"),
    "hole": (-0.2, 0.55, "7326580491"),  # radius of the hole, relative to the outline
    "bands": (-0.5, 1.0, "1860742935"),  # log of the cycles of the object's pattern per radius
    "roundness": (0.0, 1.0, "9471253608"),  # pattern of parallel bands to concentric rings
    "contrast": (0.10, 0.30, "4085926317"),  # amplitude of the object's pattern
    "hue_gap": (0.3, math.pi, "2739608154"),  # between object and ground
    "count": (1.0, 4.0, "6150387942"),  # number of objects, rounded down
}
BLUR = 0.18  # standard deviation of a factor's level within a class
NUM_CLASSES, MAX_OBJECTS, NUM_WAVES = 10, 3, 5
# Columns of the nuisances: mirror image, lightness, hue, then (phase, direction, detuning) of each wave and
# (x, y, radius) of each object.


# Sums of uniform numbers instead of normal ones, float64 for everything per image, and only + - * / sqrt and
# comparisons in float32 per pixel: so every machine renders the same bytes.
def draw_factors(labels: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Factors of objects of these classes, each (n,) float64, and the nuisances: (n, 27) uniform numbers."""
    uniform = torch.rand(len(labels), 4 * len(FACTORS) + 27, generator=generator, dtype=torch.float64)
    bell = (uniform[:, : 4 * len(FACTORS)].view(len(labels), -1, 4).sum(2) - 2) * math.sqrt(3)
    typical = torch.tensor([[int(digit) for digit in digits] for _, _, digits in FACTORS.values()])
    level = ((typical.T[labels] + 0.5).double() / 10 + BLUR * bell).clamp(0, 1).unbind(1)
    factors = {name: low + (high - low) * column
               for (name, (low, high, _)), column in zip(FACTORS.items(), level, strict=True)}
    return factors, uniform[:, 4 * len(FACTORS) :]


def palette(lightness: Tensor, amplitude: Tensor, hue: Tensor) -> Tensor:
    """Middle colour and half difference of a two-colour pattern. (n,) each; (2, n, 3, 1, 1) float32."""
    angle = hue[:, None] - torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    tint = torch.stack([0.12 * torch.cos(angle), 0.06 * torch.sin(angle)])
    luma = 0.299 * tint[..., 0] + 0.587 * tint[..., 1] + 0.114 * tint[..., 2]
    tint = tint - luma[..., None]  # so that hue does not change the brightness
    return (torch.stack([lightness, amplitude])[..., None] + tint).float()[..., None, None]


def draw_ground(factors: dict[str, Tensor], nuisance: Tensor, size: int, extent: float) -> Tensor:
    """Backgrounds (n, 3, size, size) float32 on a canvas of [-extent, extent] squared."""
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 * extent / size) - extent
    side = torch.where(nuisance[:, 0] < 0.5, -1.0, 1.0)
    field = torch.zeros(len(nuisance), size, size)
    for wave in range(NUM_WAVES):
        phase, turn, detune = nuisance[:, 3 + 3 * wave : 6 + 3 * wave].unbind(1)
        angle = factors["slope"] + factors["spread"] * (2 * turn - 1)
        number = math.pi * torch.exp(factors["frequency"] + factors["irregularity"] * (2 * detune - 1))
        x = (number * torch.cos(angle) * side)[:, None] * axis + 2 * math.pi * phase[:, None]
        y = (number * torch.sin(angle))[:, None] * axis
        field += torch.sin(x).float()[:, None, :] * torch.cos(y).float()[:, :, None]
        field += torch.cos(x).float()[:, None, :] * torch.sin(y).float()[:, :, None]
    gain = torch.exp(factors["crispness"]) / math.sqrt(NUM_WAVES / 2)
    field = field * gain.float()[:, None, None]
    lightness, hue = 0.36 + 0.18 * nuisance[:, 1], 2 * math.pi * nuisance[:, 2]
    middle, half = palette(lightness, torch.exp(factors["depth"]), hue)
    pixels: Tensor = middle + half * field.clamp(-1, 1)[:, None]
    return pixels


def draw_object(
    canvas: Tensor, factors: dict[str, Tensor], nuisance: Tensor, place: Tensor, extent: float
) -> tuple[Tensor, Tensor]:
    """Paint one object on each canvas (n, 3, s, s); place (n, 3): x, y, radius.
    Returns the canvas and the share of each pixel that the object covers, (n, s, s)."""
    size = canvas.shape[-1]
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 * extent / size) - extent
    side = torch.where(nuisance[:, 0] < 0.5, -1.0, 1.0)
    centre_x, centre_y, radius = place.unbind(1)
    across = (side[:, None] * (axis - centre_x[:, None]) / radius[:, None]).float()[:, None, :]
    down = ((axis - centre_y[:, None]) / radius[:, None]).float()[:, :, None]

    def wide(values: Tensor) -> Tensor:
        """(n,) -> (n, 1, 1) float32."""
        return values.float()[:, None, None]

    cos, sin, stretch = torch.cos(factors["tilt"]), torch.sin(factors["tilt"]), torch.sqrt(factors["length"])
    x = across * wide(cos / stretch) + down * wide(sin / stretch)
    y = down * wide(cos * stretch) - across * wide(sin * stretch)
    r = torch.sqrt(x * x + y * y) + 1e-6
    cos1 = x / r
    cos2 = 2 * cos1 * cos1 - 1
    cos3 = cos1 * (2 * cos2 - 1)
    cos5 = 2 * cos2 * cos3 - cos1
    outline = 1 + wide(factors["corners3"]) * cos3 + wide(factors["corners5"]) * cos5
    outline = outline + wide(factors["corners4"]) * (2 * cos2 * cos2 - 1)
    pixels = wide(radius * size / (2 * extent))
    inner = outline * wide(factors["hole"])
    cover = ((outline - r) * pixels + 0.5).clamp(0, 1) * ((r - inner) * pixels + 0.5).clamp(0, 1)
    roundness = wide(factors["roundness"])
    phase = (r * roundness + y * (1 - roundness)) * wide(torch.exp(factors["bands"]))
    pattern = (((phase - torch.floor(phase)) - 0.5).abs() * 8 - 2).clamp(-1, 1)
    lightness = 0.46 + 0.18 * nuisance[:, 1]
    hue = 2 * math.pi * nuisance[:, 2] + factors["hue_gap"]
    middle, half = palette(lightness, factors["contrast"], hue)
    return canvas + (middle + half * pattern[:, None] - canvas) * cover[:, None], cover


def to_bytes(canvas: Tensor) -> Tensor:
    """Float images to uint8, rounded."""
    return (canvas.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def shapes(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images (n, 3, size, size) uint8 and labels (n,) int64; each ten in a row hold every class once."""
    images, labels = torch.empty(n, 3, size, size, dtype=torch.uint8), torch.empty(n, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads wait for each other in operations as small as these
    try:
        for start in range(0, n, 500):  # whole chunks are drawn, so image i does not depend on n
            label = torch.rand(50, NUM_CLASSES, generator=generator, dtype=torch.float64).argsort(1).flatten()
            factors, nuisance = draw_factors(label, generator)
            canvas = draw_ground(factors, nuisance, size, extent=1.0)
            for slot in range(MAX_OBJECTS):
                chosen = (factors["count"] >= slot + 1).nonzero().squeeze(1)
                spot = nuisance[chosen, 18 + 3 * slot : 21 + 3 * slot]
                crowd = torch.sqrt(factors["count"][chosen].clamp(max=MAX_OBJECTS).floor())[:, None]
                place = torch.cat([1.2 * spot[:, :2] - 0.6, (0.45 + 0.25 * spot[:, 2:]) / crowd], 1)
                some = {name: values[chosen] for name, values in factors.items()}
                canvas[chosen], _ = draw_object(canvas[chosen], some, nuisance[chosen], place, extent=1.0)
            end = min(start + 500, n)
            images[start:end], labels[start:end] = to_bytes(canvas)[: end - start], label[: end - start]
    finally:
        torch.set_num_threads(threads)
    return images, labels


@dataclasses.dataclass
class Scene:
    """An image (3, S, S) uint8; its K objects: boxes (K, 4) x1 y1 x2 y2 in px, labels (K,), masks (K, S, S) bool."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor


def render_scene(labels: Tensor, seed: int, size: int = 96, extent: float = 1.75) -> Scene:
    """One object for each label, (K > 0,), on a canvas of size pixels, extent times as wide as in `shapes`.

    Later objects hide earlier ones; one of which nothing is seen is left out. Boxes end after the last pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    factors, nuisance = draw_factors(labels, generator)
    canvas = draw_ground({name: values[:1] for name, values in factors.items()}, nuisance[:1], size, extent)
    uniform = torch.rand(len(labels), 16, 2, generator=generator, dtype=torch.float64)
    spots = (2 * uniform - 1) * (extent - 0.4)
    centres, masks = spots[0, :1], torch.zeros(0, size, size, dtype=torch.bool)
    for k in range(len(labels)):
        if k:  # of 16 random spots, the one farthest from the objects that are already there
            distance = (spots[k, :, None] - centres).square().sum(2).amin(1)
            centres = torch.cat([centres, spots[k, distance.argmax()][None]])
        place = torch.cat([centres[k], 0.35 + 0.25 * nuisance[k, 20:21]])[None]
        own = {name: values[k : k + 1] for name, values in factors.items()}
        canvas, cover = draw_object(canvas, own, nuisance[k : k + 1], place, extent)
        masks = torch.cat([masks & (cover < 0.5), cover >= 0.5])
    seen = masks.any(2).any(1)
    masks = masks[seen]
    boxes = torch.zeros(len(masks), 4, dtype=torch.int64)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        box.copy_(torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]))
    return Scene(to_bytes(canvas)[0], boxes, labels[seen], masks)


# ---- 7. augmentation -------------------------------------------------------------------------------------------------
# Each pure operation (resized_crop, color_jitter, ...) has a random_* version, which makes its parameters of
# `draw(*shape)`: uniform numbers in [0, 1) of shape (B, *shape), one row an image. Nothing here depends on
# another image of the batch, and all shapes are static: torch.compile can fuse, no kernel waits for the host.

Uniform = Callable[..., Tensor]  # Draw, or a test's own


def per_image(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), which broadcasts against images."""
    return values.view(-1, 1, 1, 1)


def choose(where: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    """`changed` for the images marked in `where` (B,) bool, else `images`; both bit for bit."""
    return torch.lerp(images, changed, per_image(where).to(images.dtype))  # torch.where is slow on CPUs


def crop_boxes(
    uniform: Tensor, height: int | Tensor, width: int | Tensor, scale: Sequence[float],
    ratio: Sequence[float] = (3 / 4, 4 / 3), of_square: bool = False,
) -> Tensor:
    """Boxes of RandomResizedCrop, (B, 4) int64: top, left, height, width. uniform: (B, 22) in [0, 1); scale: range of
    the share of the area, or of_square: of the square of the shorter side; ratio: that of width / height."""
    full_height, full_width = (torch.ones_like(uniform[:, 0]).mul(side)[:, None] for side in (height, width))
    share = scale[0] + (scale[1] - scale[0]) * uniform[:, 0:10]
    log_ratio = math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * uniform[:, 10:20]
    area = torch.minimum(full_height, full_width).square() if of_square else full_height * full_width
    side, stretch = (area * share).sqrt(), (0.5 * log_ratio).exp()
    # The first of ten tries that fits wins; the eleventh always does: the largest box of an allowed ratio.
    heights = torch.cat([side / stretch, torch.minimum(full_height, full_width / ratio[0])], 1).round()
    widths = torch.cat([side * stretch, torch.minimum(full_width, full_height * ratio[1])], 1).round()
    fits = (heights > 0) & (heights <= full_height) & (widths > 0) & (widths <= full_width)
    winner = F.pad(fits[:, :10].byte(), (0, 1), value=1).argmax(1, keepdim=True)
    size = torch.cat([heights.gather(1, winner), widths.gather(1, winner)], 1)
    free = torch.cat([full_height, full_width], 1) - size
    corner = torch.where(winner < 10, uniform[:, 20:22] * (free + 1), free / 2).floor()
    return torch.cat([corner, size], 1).long()


def interpolation(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Antialiased linear interpolation of `length` (B,) pixels from `start` (B,): matrices (B, target, source). The
    filter is a triangle two pixels of the coarser grid wide."""
    start, length = start.view(-1, 1, 1).float(), length.view(-1, 1, 1).float()
    center = torch.arange(0.5, target, device=start.device).view(-1, 1)
    pixel = torch.arange(0.5, source, device=start.device) - start
    distance = (pixel - center * (length / target)).abs_().div_((length / target).clamp(min=1))
    weights = distance.neg_().add_(1).clamp_(min=0).mul_((pixel > 0) & (pixel < length))
    return weights.div_(weights.sum(2, keepdim=True))


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in their own precision: autocast to bf16 would cost pixels."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns^T. images: (B, 3, H, W); rows: (B or 1, h, H); columns: (B or 1, w, W)."""
    return exact_matmul(rows[:, None], exact_matmul(images, columns.mT[:, None]))


def resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops as (B, 3, size, size) floats in [0, 1], bilinear with antialiasing. images: uint8 or float in
    [0, 1]; boxes: (B, 4) top, left, height, width."""
    top, left, height, width = boxes.unbind(1)
    rows = interpolation(top, height, images.shape[2], size)
    columns = interpolation(left, width, images.shape[3], size)
    crops = separable(images.float(), rows, columns)
    return crops if images.is_floating_point() else crops.div_(255)


def resize_center_crop(images: Tensor, resize: int, crop: int) -> Tensor:
    """Shorter side to `resize` px, then the central crop, (B, 3, crop, crop) in [0, 1]. images: as resized_crop's."""
    shorter = min(images.shape[2:])
    matrices = []
    for source in images.shape[2:]:
        target = resize * source // shorter
        whole = torch.full((1,), source, device=images.device)
        matrix = interpolation(torch.zeros_like(whole), whole, source, target)
        matrices.append(matrix.narrow(1, round((target - crop) / 2), crop))
    crops = separable(images.float(), *matrices)
    return crops if images.is_floating_point() else crops.div_(255)


def luma(images: Tensor) -> Tensor:
    """Grey value of ITU-R 601, (B, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Hue turned by `shift` (B,) in [-0.5, 0.5] turns; images with shift 0 stay as they are to the bit.

    A channel falls from high to low as the hue turns from 1/6 to 2/6 away from the channel's own. Angles are
    kept in sixths of a turn times chroma, so that the way to HSV and back has no division and no branch."""
    red, green, blue = images.unbind(1)
    low = torch.minimum(torch.minimum(red, green), blue)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = (high - low).unsqueeze(1)
    total = high.sub(low, alpha=2).add_(red).add_(green).add_(blue).unsqueeze(1)
    unsigned = total.sub(images, alpha=2)  # angle of the hue from each channel, 0 to 3
    side = torch.stack([green - blue, blue - red, red - green], 1)
    angle = unsigned.copysign_(side).addcmul_(chroma, per_image(6 * shift))
    opposite = angle.abs_().sub_(chroma, alpha=3).abs_()  # 3 chroma less that angle taken the shorter way
    turned = opposite.sub_(chroma).add_(low[:, None]).clamp_(low[:, None], high[:, None])
    return choose(shift != 0, turned, images)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """ColorJitter. factors: (B, 4) of brightness, contrast, saturation (1: unchanged) and hue (turns, 0:
    unchanged); order: (B, 4) int64, a permutation a row: which of the four comes first, second, ...

    Hue costs most and is done once: three blends for what an image has before its hue, three for what it has
    after; a blend that an image does not have gets the ratio 1, which changes nothing, to the bit."""
    ratio = torch.where(order == 3, 1, factors.gather(1, order))
    before = (order == 3).cumsum(1) == 0
    ratios = torch.cat([torch.where(before, ratio, 1)[:, :3], torch.where(before, 1, ratio)[:, 1:]], 1)
    blends = torch.cat([order[:, :3], order[:, 1:]], 1)
    to_mean, to_grey = (blends == 1).to(images.dtype), (blends == 2).to(images.dtype)  # else to black
    images = images.clone()
    for slot in range(6):
        if slot == 3:
            images = shift_hue(images, factors[:, 3])
        grey = luma(images)
        mean = grey.mean((1, 2, 3), keepdim=True)
        target = grey.mul_(per_image(to_grey[:, slot])).add_(mean.mul_(per_image(to_mean[:, slot])))
        images.lerp_(target, per_image(1 - ratios[:, slot])).clamp_(0, 1)
    return images


def blur_matrices(sigma: Tensor, kernel_size: int, side: int) -> Tensor:
    """Gaussian filter with reflected borders, (B, side, side). sigma: (B,) pixels; kernel_size: odd."""
    offsets = torch.arange(kernel_size, device=sigma.device) - kernel_size // 2
    weights = torch.softmax(-0.5 * (offsets / sigma[:, None]).square(), 1)
    pixel = torch.arange(side, device=sigma.device)
    there_and_back = max(1, 2 * (side - 1))
    place = (pixel + offsets[:, None]).remainder(there_and_back)
    reflected = torch.minimum(place, there_and_back - place)
    taps = (reflected[:, :, None] == pixel).to(weights.dtype)
    return exact_matmul(weights, taps.view(kernel_size, -1)).view(-1, side, side)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur with reflected borders. sigma: (B,) pixels; kernel_size: odd."""
    rows, columns = (blur_matrices(sigma, kernel_size, side) for side in images.shape[2:])
    return separable(images, rows, columns)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std, by channel."""
    center, spread = (_channels(tuple(values), images.device) for values in (mean, std))
    return (images - center) / spread


@torch.no_grad()
def random_flip(images: Tensor, draw: Uniform) -> Tensor:
    """Horizontal flip of each image with probability 1/2."""
    return choose(draw() < 0.5, images.flip(3), images)


@torch.no_grad()
def random_color_jitter(
    images: Tensor, draw: Uniform, brightness: float, contrast: float, saturation: float, hue: float,
    probability: float = 1.0,
) -> Tensor:
    """ColorJitter with this probability: factors in [max(0, 1 - b), 1 + b], hue in [-h, h] turns, in random order."""
    uniform = draw(9)
    spans = [(max(0.0, 1 - b), 1 + b, 1.0) for b in (brightness, contrast, saturation)]
    factors = []
    for column, (low, high, neutral) in enumerate([*spans, (-hue, hue, 0.0)]):
        factor = low + (high - low) * uniform[:, column]
        factors.append(torch.where(uniform[:, 8] < probability, factor, neutral))
    return color_jitter(images, torch.stack(factors, 1), uniform[:, 4:8].argsort(1))


@torch.no_grad()
def random_grayscale(images: Tensor, draw: Uniform, probability: float) -> Tensor:
    """Each image grey with this probability."""
    return choose(draw() < probability, luma(images), images)


@torch.no_grad()
def random_blur(
    images: Tensor, draw: Uniform, sigma: Sequence[float], kernel_size: int, probability: float = 1.0
) -> Tensor:
    """Gaussian blur of each image with this probability, its sigma uniform in the range `sigma`, pixels."""
    uniform = draw(2)
    blurred = gaussian_blur(images, sigma[0] + (sigma[1] - sigma[0]) * uniform[:, 0], kernel_size)
    return choose(uniform[:, 1] < probability, blurred, images)


# ---- 8. backbones ----------------------------------------------------------------------------------------------------
# Parameters carry torchvision's names. Every backbone has
#   dim                         size of its feature
#   forward(images, relu_last)  (B, channels, H, W) -> (B, dim); relu_last=False: before the last ReLU, what
#                               DeepCluster clusters (no difference for a ResNet: it ends with a mean)
#   stages(images)              five maps for linear probes, each after BN and ReLU and before max-pooling
#   front                       Sobel where input_channels is 2, else nothing: images come as RGB in any case
# One of your own is a name in ARCHITECTURES and a branch of `backbone` that returns it before weights are drawn; of the
# images' size it is told `small` alone. kNN, SVMs and probes of its output need `forward` and `dim`; detection and
# segmentation take only these.

# Stages of AlexNet and VGG16: filters, convolutions, kernel size, whether max-pooling follows. Batch normalisation
# stands nowhere (NPID), after convolutions (_bn: DeepCluster; torchvision's vgg16_bn), or after fully connected layers
# too (_bn_fc: Local Aggregation, which names NPID's networks so "IR with BN"). AlexNet is the
# original's and DeepCluster's, without response normalisation. LA's code has 64 and 192 filters where this
# has 96 and 256; its paper does not say. No option for them: edit the two numbers here to compare.
PLAIN_STAGES = {
    "alexnet": ((96, 1, 11, True), (256, 1, 5, True), *2 * [(384, 1, 3, False)], (256, 1, 3, True)),
    "vgg16": ((64, 2, 3, True), (128, 2, 3, True), (256, 3, 3, True), *2 * [(512, 3, 3, True)]),
}
RESNET_BLOCKS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
ARCHITECTURES = [*(f"{name}{norm}" for name in PLAIN_STAGES for norm in ("", "_bn", "_bn_fc")), *RESNET_BLOCKS]


class Sobel(nn.Module):
    """(B, 3, H, W) -> x and y gradients (B, 2, H, W) of the mean of the channels, zeros beyond the border. Fixed."""

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernels", torch.stack([x, x.T])[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images.mean(1, keepdim=True), self.kernels, padding=1)


class PlainNet(nn.Module):
    """AlexNet or VGG16, with batch normalisation or without; the feature is fc7, (B, dim)."""

    def __init__(self, arch: str, width: int, small: bool, input_channels: int) -> None:
        super().__init__()
        arch, _, norm = arch.partition("_")
        alexnet, layers, channels = arch == "alexnet", list[nn.Module](), input_channels
        self.front = Sobel() if input_channels == 2 else nn.Identity()
        self.stage_ends, self.dim = list[int](), 4096 * width // 64
        for filters, convolutions, kernel, pooled in PLAIN_STAGES[arch]:
            stride, padding = (4, 2) if kernel == 11 else (1, kernel // 2)
            if small and kernel == 11:
                kernel, stride, padding = 3, 1, 1
            for _ in range(convolutions):
                # The bias is idle before a normalisation; released weights have it.
                layers.append(nn.Conv2d(channels, filters * width // 64, kernel, stride, padding))
                channels = filters * width // 64
                layers += [*[nn.BatchNorm2d(channels)] * bool(norm), nn.ReLU(inplace=True)]
            self.stage_ends.append(len(layers) - 1)
            if pooled:
                layers.append(nn.MaxPool2d(3 if alexnet else 2, 2))
        self.features = nn.Sequential(*layers)
        # The side of the last map at 224 px, or at 32 px if small; maps of other images are averaged to it.
        side = (3 if small else 6) if alexnet else (1 if small else 7)
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        fc6, fc7 = nn.Linear(channels * side**2, self.dim), nn.Linear(self.dim, self.dim)
        first = [nn.Dropout(0.0)] if alexnet else []  # idle, for torchvision's indices; DeepCluster sets the rate
        norm6, norm7 = ([nn.BatchNorm1d(self.dim)] if norm == "bn_fc" else [] for _ in range(2))
        self.classifier = nn.Sequential(*first, fc6, *norm6, nn.ReLU(inplace=True), nn.Dropout(0.0), fc7, *norm7)

    def forward(self, images: Tensor, relu_last: bool = True) -> Tensor:
        """fc7, (B, dim), with or without its ReLU."""
        feature: Tensor = self.classifier(self.avgpool(self.features(self.front(images))).flatten(1))
        return F.relu(feature) if relu_last else feature

    def stages(self, images: Tensor) -> list[Tensor]:
        """conv1 to conv5 of AlexNet; the last convolution of each of VGG16's five blocks."""
        images, maps = self.front(images), []
        for position, layer in enumerate(self.features):
            images = layer(images)
            if position in self.stage_ends:
                maps.append(images)
        return maps


class ThinProjection(nn.Conv2d):
    """A 1x1 convolution with a stride, by slicing: oneDNN's backward pass with a stride writes past the end of
    its memory where fewer than 16 channels of 64 px or more come in."""

    def forward(self, images: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(images[:, :, ::down, ::across], self.weight)


class Group(nn.Sequential):
    """Blocks of a ResNet. A map of one pixel passes in float32: oneDNN's strided bfloat16 gradient of it is garbage."""

    def forward(self, images: Tensor) -> Tensor:
        pixel = images.shape[2:] == (1, 1)
        with torch.autocast(images.device.type, enabled=False) if pixel else contextlib.nullcontext():
            for block in self:
                images = block(images.float() if pixel else images)
        return images


class ResNet(nn.Module):
    """ResNet, the stride of a bottleneck in its 3x3; the feature is the mean over the last map, (B, dim)."""

    def __init__(self, arch: str, width: int, small: bool, input_channels: int) -> None:
        super().__init__()
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.front = Sobel() if input_channels == 2 else nn.Identity()
        self.conv1 = nn.Conv2d(input_channels, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        block, depths = RESNET_BLOCKS[arch]
        channels, groups = width, list[nn.Module]()
        for group, depth in enumerate(depths):
            planes, stride, blocks = width * 2**group, 2 if group else 1, list[nn.Module]()
            for _ in range(depth):
                shortcut = None
                if stride == 2 or channels != planes * block.expansion:
                    convolution = ThinProjection if stride == 2 and channels < 16 else nn.Conv2d
                    projection = convolution(channels, planes * block.expansion, 1, stride, bias=False)
                    shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes * block.expansion))
                blocks.append(block(channels, planes, stride, shortcut))
                channels, stride = planes * block.expansion, 1
            groups.append(Group(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.dim = channels

    def forward(self, images: Tensor, relu_last: bool = True) -> Tensor:
        """Mean over the last map, (B, dim)."""
        images = self.maxpool(F.relu(self.bn1(self.conv1(self.front(images)))))
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            images = group(images)
        return images.mean((2, 3))

    def stages(self, images: Tensor) -> list[Tensor]:
        """The stem, and the ends of layer1 to layer4."""
        stem = F.relu(self.bn1(self.conv1(self.front(images))))
        maps = [stem, self.layer1(self.maxpool(stem))]
        for group in (self.layer2, self.layer3, self.layer4):
            maps.append(group(maps[-1]))
        return maps


def backbone(arch: str, width: int = 64, small: bool = False, input_channels: int = 3) -> PlainNet | ResNet:
    """Network (B, 3, H, W) -> (B, dim), fresh weights. width: 64 is standard, others scale every channel; small:
    3x3 stem of stride 1, for images under 64 px; input_channels: 3, or 2 for the images' Sobel gradients."""
    shape = (arch, width, small, input_channels)
    network: PlainNet | ResNet = ResNet(*shape) if arch in RESNET_BLOCKS else PlainNet(*shape)
    # PyTorch's own initialisation, usual for CIFAR: weights 2.4 times smaller than below, which under batch
    # normalisation makes the same learning rate worth six times as much; without it they would let nothing through.
    if small and arch not in PLAIN_STAGES:
        return network
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Linear) and arch in PLAIN_STAGES:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return network


# ---- 9. memory bank and the exact softmax over it --------------------------------------------------------------------


class MemoryBank(nn.Module):
    """One unit row for every image. features: (size, dim), drawn from a seeded Gaussian and normalised."""

    features: Tensor

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.register_buffer("features", torch.empty(size, dim))
        for rows in torch.split(self.features, 16_384):  # on the CPU: the same on every device and rank
            rows.copy_(F.normalize(torch.randn(rows.shape, generator=generator), dim=1))

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor, momentum: float) -> None:
        """v_i <- normalise(momentum v_i + (1 - momentum) z_i). z: (B, dim); index: (B,), the whole batch.

        Of rows with the same index the last counts; one that cannot be normalised leaves its slot as it was.
        """
        if momentum == 1 or len(index) == 0:
            return
        size = len(self.features)
        if index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise Fault(f"memory bank: an index lies outside 0 ... {size - 1}")
        old = self.features[index]
        new = momentum * old + (1 - momentum) * z.float()
        norm = new.norm(dim=1, keepdim=True)
        valid = norm.isfinite() & (norm > 1e-12)
        rows = torch.where(valid, new / norm, old)
        # Sorted by (index, position), the winner of a slot is the last of its run. Every duplicate then
        # writes the same value, so their order does not matter, and nothing here waits for the device.
        order = torch.argsort(index, stable=True)
        winner = order[torch.searchsorted(index[order], index, right=True) - 1]
        self.features.index_copy_(0, index, rows[winner])


# oneDNN's product, private: two to three times as fast as the one behind @, where that leaves out AVX-512 (MKL on AMD).
LINEAR_FOR_CPU: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def products(rows: Tensor, keys: Tensor, offset: Tensor | None = None) -> Tensor:
    """rows (R, D) @ keys (K, D)^T + offset (K,), in their own precision, under autocast too; without gradient."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and LINEAR_FOR_CPU is not None:
        found: Tensor = LINEAR_FOR_CPU(rows, keys, offset, "none", [], "")
        return found
    with torch.autocast(rows.device.type, enabled=False):
        return F.linear(rows, keys, offset)


def bank_attention(z: Tensor, bank: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """O = softmax(z V^T/tau) V and LSE = log sum_j exp(z.v_j/tau), without (B, N). z: (B, D); V: (N, D).

    By a running maximum and sum over chunks of the bank, accumulated in the precision of z.
    """
    query = z / temperature
    peak = query.new_full((len(z), 1), -math.inf)
    total, output = torch.zeros_like(peak), torch.zeros_like(query)
    # On a CPU products that stay in the cache; on a GPU few launches, and for up to 1,024 queries logits of 134 MB.
    for keys in torch.split(bank, 4096 if z.device.type == "cpu" else max(32768, (1 << 25) // len(z))):
        keys = keys.to(query.dtype)
        logits = products(query, keys)
        new_peak = torch.maximum(peak, logits.amax(1, keepdim=True))
        weights = logits.sub_(new_peak).exp_()
        decay = (peak - new_peak).exp_()
        total = total * decay + weights.sum(1, keepdim=True)
        output = output * decay + products(weights, keys.T)
        peak = new_peak
    return output / total, (peak + total.log())[:, 0]


def bank_attention_in_heads(z: Tensor, bank: Tensor, temperature: float, heads: int = 132) -> tuple[Tensor, Tensor]:
    """bank_attention in bfloat16 on a GPU, by PyTorch's own kernel: no scores in memory, ten times as fast.

    The kernel gives each multiprocessor some queries of a head, and a batch has few queries. So the bank is cut into as
    many heads as an H100 has multiprocessors, whose outputs are merged by their LSE.
    """
    query, keys, dim = z.bfloat16()[None, None], bank.bfloat16(), z.shape[1]
    rows, outputs, lses = len(bank) // heads, list[Tensor](), list[Tensor]()
    for part in (keys[: heads * rows].view(1, heads, rows, dim), keys[heads * rows :].view(1, 1, -1, dim)):
        if part.shape[2]:
            found = FLASH(query.expand(1, part.shape[1], -1, -1), part, part, scale=1 / temperature)
            outputs.append(found[0][0].float())  # (heads, B, D)
            lses.append(found[1][0])  # (heads, B)
    output, lse = torch.cat(outputs), torch.cat(lses)
    whole = lse.logsumexp(0)
    return ((lse - whole).exp()[..., None] * output).sum(0), whole


FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention  # private: the public one does not return the LSE


def has_flash(z: Tensor) -> bool:
    """Whether the kernel takes features z (B, D) where they are: NVIDIA's GPUs from 2020 on, D of up to 256."""
    dim = z.shape[1]
    return (z.device.type == "cuda" and z.dtype == torch.float32 and dim % 8 == 0 and dim <= 256
            and torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(z.device)[0] > 7)


def with_own_row(output: Tensor, lse: Tensor, z: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """O and LSE from bfloat16 with the term of one row of the bank in float32. own: (B, D), the row of each query.

    Once an image is nearly memorised its own row is nearly all of both.
    """
    rounded = own.bfloat16().float()
    score = (z.bfloat16().float() * rounded).sum(1) / temperature  # as the kernel has it
    share, ratio = (score - lse).exp()[:, None], ((z * own).sum(1) / temperature - score).exp()[:, None]
    total = 1 + share * (ratio - 1)
    return (output + share * (ratio * own - rounded)) / total, lse + total.log()[:, 0]


class _BankSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor, bank: Tensor, temperature: float, half: bool) -> Tensor:
        if ctx.needs_input_grad[3]:
            raise ValueError("bank_softmax: the temperature takes no gradient")
        positive = bank[index]
        if half and has_flash(z):
            output, lse = with_own_row(*bank_attention_in_heads(z, bank, temperature), z, positive, temperature)
        else:
            output, lse = bank_attention(z, bank, temperature)
        ctx.save_for_backward((output - positive) / temperature)
        return lse - (z * positive).sum(1) / temperature

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0].unsqueeze(1) * gradient, None, None, None, None


def bank_softmax(z: Tensor, index: Tensor, bank: Tensor, temperature: float, half: bool = False) -> Tensor:
    """-log P(i|z), NPID's eq. (2), over all N slots. z: (B, D); index: (B,); bank: (N, D); returns (B,).

    The bank takes no gradient. With attention's O, LSE: loss = LSE - z.v_i/tau, dloss/dz = (O - v_i)/tau. `half`, where
    the network is in bfloat16: a GPU makes its products of O and LSE in it too.
    """
    loss: Tensor = _BankSoftmax.apply(z if z.dtype == torch.float64 else z.float(), index, bank, temperature, half)
    return loss


# ---- 10. clustering, neighbours, weighted kNN ------------------------------------------------------------------------


Part = TypeVar("Part")
Result = TypeVar("Result")


def in_parts(work: Callable[[Part], Result], parts: Sequence[Part], device: torch.device) -> list[Result]:
    """work(part) of each part; on a CPU by as many single-threaded workers as torch has threads.

    Threads that meet after every operator lose a time slice whenever the machine is busy: on two shared
    cores an assignment (50,000 x 128, k = 1,000) took 4.6 s that way and 0.16 s this way. Workers do not
    inherit no_grad.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # the number is the process's own, whoever sets it


@dataclasses.dataclass
class KMeans:
    """labels: (N,) int32, nearest of centroids (k, D); objective: after 0, 1, ... iterations up to a fixed point."""

    labels: Tensor
    centroids: Tensor
    objective: list[float]  # sum of squared distances; the last one belongs to labels and centroids
    empty: int  # clusters without a point in the last iteration, before they were split off others
    splits: int  # in all iterations
    backend: str


@torch.no_grad()
def kmeans(
    x: Tensor, k: int, *, iterations: int = 20, seed: int = 0, init: Tensor | None = None, backend: str = "torch"
) -> KMeans:
    """Lloyd's k-means from init (k, D) or k random rows. x: (N, D). A Fault if k is not 1 to N, or x is not finite."""
    if not 1 <= k <= len(x):
        raise Fault(f"k-means: the number of clusters must lie between 1 and the {len(x)} rows, not {k}")
    x = x.detach().float()
    low, high = torch.aminmax(x)
    if not (low.isfinite() and high.isfinite()):
        raise Fault("k-means: the features hold NaN or infinite values")
    if init is None:
        init = x[torch.from_numpy(np.random.default_rng(seed).permutation(len(x))[:k]).to(x.device)]
    solve = {"torch": _kmeans_torch, "faiss": _kmeans_faiss}[backend]
    return solve(x, init.to(x).clone(), iterations, seed)


CHUNK = {"cuda": 16384}  # rows at once; elsewhere 1,024, of 256 to 4,096 the fastest on a CPU


def nearest(x: Tensor, centroids: Tensor, low: list[_Int8] | None = None, half: _Half | None = None) -> Tensor:
    """The nearest centroid of each row, (N,) int64, by float32 scores, or faster by half's in float16.

    low: low_chunks(x, len(centroids)), from whoever needs them more than once; half: half_rows(x).
    """
    if half is not None:
        return half.nearest(centroids)
    offset = -0.5 * centroids.square().sum(1)  # x.c - |c|^2 / 2 is largest where |x - c| is least
    low = low_chunks(x, len(centroids)) if low is None else low
    if low and (labels := _nearest_screened(x, centroids, offset, low)) is not None:
        return labels
    parts = torch.split(x, CHUNK.get(x.device.type, 1024))
    return torch.cat(in_parts(lambda rows: products(rows, centroids, offset).max(1).indices, parts, x.device))


TENSOR_CORES = {"cuda"}  # devices that multiply float16 some fifteen times as fast as float32


class _Half:
    """Rows x (N, D) in float16, less their mean and scaled to norms of at most 1, for a faster `nearest`.

    Off by some 1e-4 of the largest distance to the mean: a label in a thousand is another centroid, about as near.
    """

    def __init__(self, x: Tensor) -> None:
        self.mean = x.mean(0)
        shifted = x - self.mean
        self.scale = 1 / shifted.norm(dim=1).amax().clamp(min=1e-30)
        self.rows = (shifted * self.scale).half()

    def nearest(self, centroids: Tensor) -> Tensor:
        """Labels (N,) int64."""
        keys = ((centroids - self.mean) * self.scale).clamp_(-100, 100)  # one that is far away stays finite, and far
        keys, offset = keys.half(), (-0.5 * keys.square().sum(1)).half()
        parts = torch.split(self.rows, CHUNK.get(self.rows.device.type, 1024))
        return torch.cat([F.linear(rows, keys, offset).max(1).indices for rows in parts])


def half_rows(x: Tensor) -> _Half | None:
    """Rows x (N, D) for all iterations of k-means but the last; none without tensor cores."""
    return _Half(x) if x.device.type in TENSOR_CORES else None


def assign(
    x: Tensor, centroids: Tensor, low: list[_Int8] | None = None, half: _Half | None = None
) -> tuple[Tensor, float]:
    """nearest(...), and the sum of squared distances, k-means' objective, in float32."""
    labels = nearest(x, centroids, low, half)
    chunk = 4 * CHUNK.get(x.device.type, 1024)  # of a lighter operator
    parts = zip(torch.split(x, chunk), torch.split(labels, chunk), strict=True)
    totals = [F.mse_loss(rows, centroids.index_select(0, found), reduction="sum") for rows, found in parts]
    return labels, float(torch.stack(totals).cpu().double().sum())  # mps has no float64


HAS_INT8: bool = getattr(torch.cpu, "_is_vnni_supported", lambda: False)() and hasattr(torch, "_int_mm")


def _screens(x: Tensor) -> bool:
    """Whether products of rows x (N, D) are made in 8 bits first; of one column PyTorch 2.11's are silently garbage.

    Longer rows than features are images' pixels: in flat areas rounding errors are alike, not the noise that `_reach`
    takes them for, and from D = 2^16 on a product overflows.
    """
    return x.device.type == "cpu" and HAS_INT8 and 1 < x.shape[1] <= 2048


class _Int8(NamedTuple):
    """Rows (N, D), nearly: scale * values, off by error (N,) in norm; norm (N,) is that of the row itself."""

    values: Tensor
    scale: float
    error: Tensor
    norm: Tensor


def _int8(x: Tensor) -> _Int8:
    """x (N, D) in 8 bits, whose products a CPU makes eight times faster than those of float32."""
    low, high = torch.aminmax(x)
    scale = max(-float(low), float(high)) / 127 or 1.0
    rounded = (x / scale).round_()
    return _Int8(rounded.to(torch.int8), scale, torch.sub(x, rounded, alpha=scale).norm(dim=1), x.norm(dim=1))


def _worst(keys: _Int8) -> tuple[float, float, float]:
    """The keys' scale, largest error, and largest norm."""
    return keys.scale, float(keys.error.max()), float((keys.norm + keys.error).max())


def _reach(rows: _Int8, scale: float, error: float, norm: float) -> Tensor:
    """How far below a score, in units of the product of both scales, an equal one can lie in 8 bits, (N,) int32.

    At most: twice the error of a product, |x| |c - c~| + |x - x~| |c~|. Likely: rounding deviates by scale / sqrt(12),
    the difference of two products by sqrt(2) times as much, and six such deviations are taken for certain.
    """
    most = (rows.norm * error).add_(rows.error, alpha=norm).mul_(2)
    likely = torch.hypot(rows.norm * scale, torch.tensor(rows.scale * norm)).mul_(6 / math.sqrt(6))
    # 3: each of the two offsets is off by up to 1.5 units, from whole ones and from float32's at 2^24.
    return torch.minimum(most, likely).mul_(1 / (rows.scale * scale)).add_(3).ceil_().int()


def _where(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of what is true in (N, M), M a multiple of 8; quick where few are."""
    words = mask.view(torch.int64)
    row, word = words.nonzero().unbind(1)
    entry, place = words[row, word].view(torch.bool).view(-1, 8).nonzero().unbind(1)
    return row.index_select(0, entry), 8 * word.index_select(0, entry) + place


def low_chunks(x: Tensor, k: int) -> list[_Int8]:
    """Chunks of x (N, D) in 8 bits whose products with k centroids stay in the cache; none without instructions."""
    if not _screens(x):
        return []
    return [_int8(rows) for rows in torch.split(x, min(4096, max(256, (1 << 21) // k)))]


def _nearest_screened(x: Tensor, centroids: Tensor, offset: Tensor, low: list[_Int8]) -> Tensor | None:
    """Labels by float32 scores of the few centroids that a product in 8 bits leaves over; None if they are many."""
    k, keys, start = len(centroids), _int8(centroids), 0
    worst = _worst(keys)
    strips = -(-k // 256) * 16  # strip j holds the columns j, j + strips, ...: 16 of them
    columns = F.pad(keys.values, (0, 0, 0, 16 * strips - k)).T
    room = torch.empty(len(low[0].values), 16 * strips, dtype=torch.int32)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    lowest, highest, largest = float(offset.min()), float(offset.max()), 127**2 * x.shape[1]  # product
    for rows in low:
        unit = rows.scale * keys.scale
        # Offsets below -2^24, up to where float32 holds them exactly, are raised to it: only of centroids that are too
        # far to be nearest, whatever their product.
        if not math.isfinite(unit) or (lowest < -(2**24) * unit and highest < (2 * largest - 2**24) * unit):
            return None
        addend = (offset / unit).clamp_(min=-(2**24)).round_().int()
        scores = torch._int_mm(rows.values, columns, out=room[: len(rows.values)])
        # Columns that only fill up the last strips get -2^30, below every score.
        scores = scores.add_(F.pad(addend, (0, 16 * strips - k), value=-(2**30))).view(-1, 16, strips)
        peaks = scores.amax(1)
        least = peaks.amax(1) - _reach(rows, *worst)
        row, strip = _where(peaks >= least[:, None])
        if len(row) > 4 * len(rows.values):
            return None
        found.append((row + start, strip, scores[row, :, strip] >= least.index_select(0, row)[:, None]))
        start += len(rows.values)
    row, strip, near = map(torch.cat, zip(*found, strict=True))
    entry, place = _where(near)
    row, column = row.index_select(0, entry), place * strips + strip.index_select(0, entry)
    labels = torch.empty(len(x), dtype=torch.int64).index_put_((row,), column)
    # That is the label of a row with one centroid left; between several, float32 decides.
    several = (row.bincount(minlength=len(x)) > 1).index_select(0, row).nonzero()[:, 0]
    row, column = row.index_select(0, several), column.index_select(0, several)
    exact = offset[column] + torch.cat([
        (x.index_select(0, some) * centroids.index_select(0, their)).sum(1)  # large temporaries cost page faults
        for some, their in zip(torch.split(row, 2048), torch.split(column, 2048), strict=True)
    ])
    top = torch.full((len(x),), -math.inf).scatter_reduce_(0, row, exact, "amax")
    labels[row] = k
    tied = torch.where(exact == top[row], column, k)  # of equally near centroids the first, as max does
    return labels.scatter_reduce_(0, row, tied, "amin")


def _kmeans_torch(x: Tensor, centroids: Tensor, iterations: int, seed: int) -> KMeans:
    random = np.random.default_rng([seed, 1])  # not the stream that the first centroids are drawn from
    k, empty, splits = len(centroids), 0, 0
    objective: list[float] = []
    low, half = low_chunks(x, k), half_rows(x)
    labels = torch.full((len(x),), -1, device=x.device)
    for iteration in range(iterations + 1):
        before = labels
        labels, total = assign(x, centroids, low, half if iteration < iterations else None)
        settled = empty == 0 and torch.equal(labels, before)
        objective.append(total)
        if iteration == iterations or (settled and half is None):
            break
        half = None if settled else half  # float32 decides whether this is a fixed point
        sums, counts = cluster_sums(x, labels, k)
        centroids = sums / counts.clamp(min=1).unsqueeze(1)
        empty = split_empty(centroids, counts, random)
        splits += empty
    return KMeans(labels.int(), centroids, objective, empty, splits, f"torch {x.device.type}")


def cluster_sums(x: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum (k, D) and number (k,) of the rows of each cluster, on CPU and CUDA the same in every run."""
    counts = torch.bincount(labels, minlength=k)
    if x.device.type != "cuda":  # mps has no segment_reduce
        return x.new_zeros(k, x.shape[1]).index_add_(0, labels, x), counts
    order = torch.argsort(labels, stable=True)  # index_add_ on CUDA adds in whatever order the threads come
    return torch.segment_reduce(x[order], "sum", lengths=counts, axis=0), counts


def split_empty(centroids: Tensor, counts: Tensor, random: np.random.Generator) -> int:
    """Gives each empty cluster half of a cluster drawn by size, as Faiss does; in place; returns how many."""
    sizes = counts.cpu().numpy().copy()
    empty = np.flatnonzero(sizes == 0)
    sign = 1.0 - 2.0 * (torch.arange(centroids.shape[1], device=centroids.device) % 2)
    for cluster in empty.tolist():
        weights = np.maximum(sizes - 1, 0)  # never all zero: N >= k points lie in fewer than k clusters
        donor = int(random.choice(len(sizes), p=weights / weights.sum()))
        centroids[cluster] = centroids[donor] * (1 + sign / 1024)
        centroids[donor] *= 1 - sign / 1024
        sizes[cluster] = sizes[donor] // 2
        sizes[donor] -= sizes[cluster]
    return len(empty)


def import_faiss() -> Any:
    """The faiss module, or a line that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise Fault("Faiss is missing: pip install faiss-gpu (Linux x86_64) or faiss-cpu, or use torch") from error
    return faiss


def _kmeans_faiss(x: Tensor, centroids: Tensor, iterations: int, seed: int) -> KMeans:
    faiss = import_faiss()
    rows = np.ascontiguousarray(x.cpu().numpy())
    clustering = faiss.Clustering(rows.shape[1], len(centroids))
    clustering.niter, clustering.seed = iterations, seed
    clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(rows) + 1  # never a sub-sample
    faiss.copy_array_to_vector(centroids.cpu().numpy().ravel(), clustering.centroids)
    index, device = faiss.IndexFlatL2(rows.shape[1]), "cpu"
    if x.device.type == "cuda" and faiss.get_num_gpus() > 0:  # this rank's own GPU
        index, device = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), x.device.index or 0, index), "gpu"
    clustering.train(rows, index)
    stats = [clustering.iteration_stats.at(i) for i in range(clustering.iteration_stats.size())]
    found = faiss.vector_to_array(clustering.centroids).reshape(-1, rows.shape[1])
    distance, labels = index.search(rows, 1)
    objective = [stat.obj for stat in stats] + [float(distance.sum(dtype=np.float64))]
    splits = [int(stat.nsplit) for stat in stats] or [0]
    return KMeans(torch.from_numpy(labels[:, 0].astype(np.int32)).to(x.device),
                  torch.from_numpy(found.copy()).to(x.device), objective, splits[-1], sum(splits),
                  f"faiss {faiss.__version__} {device}")


@torch.no_grad()
def neighbors(
    queries: Tensor, keys: Tensor, k: int, *, exclude: Tensor | None = None, best_first: bool = True
) -> tuple[Tensor, Tensor]:
    """The k rows of keys (N, D) of largest inner product, best first: similarity (Q, k) and index (Q, k).

    exclude: (Q,) row of keys that each query leaves out, itself for instance. Not best_first: in any order, which
    spares a sort that costs as much as the search when k is in the thousands.
    """
    if not 1 <= k <= len(keys) - (exclude is not None):
        raise Fault(f"neighbours: {k} wanted, but there are {len(keys) - (exclude is not None)} candidates")
    queries, keys = queries.detach().float(), keys.detach().float()
    screened = _screens(queries) and len(keys) >= 128 * k
    work = _neighbors_screened if screened else functools.partial(_neighbors, best_first=best_first)
    every = torch.arange(len(queries), device=queries.device)
    workers = torch.get_num_threads() if queries.device.type == "cpu" else 1
    found = in_parts(lambda part: work(queries[part], keys, k, None if exclude is None else exclude[part]),
                     every.tensor_split(min(workers, len(queries)) or 1), queries.device)
    return torch.cat([similarity for similarity, _ in found]), torch.cat([index for _, index in found])


def _largest(scores: Tensor, k: int) -> Tensor:
    """Where the k largest of each row are, (R, k), in any order."""
    if scores.device.type == "cpu":  # by NumPy with AVX-512, five times as fast as topk for thousands
        return torch.from_numpy(np.argpartition(scores.numpy(), -k, axis=1)[:, -k:])
    return _largest_by_strips(scores, k)


def _largest_by_strips(scores: Tensor, k: int) -> Tensor:
    """The same by two shorter selections: the k largest lie in the k strips of columns with the largest maxima."""
    width = math.isqrt(scores.shape[1] // k)  # columns a strip
    strips = scores[:, : scores.shape[1] // width * width].view(len(scores), width, -1)
    rest = scores[:, strips.shape[2] * width :]
    chosen = strips.amax(1).topk(k, sorted=False).indices
    candidates = strips.gather(2, chosen[:, None].expand(-1, width, -1)).flatten(1)
    place = torch.cat([candidates, rest], 1).topk(k, sorted=False).indices
    # A candidate's place in (width, k) says which row of which chosen strip it is; behind them come those of `rest`.
    column = place // k * strips.shape[2] + chosen.gather(1, place % k)
    return torch.where(place < width * k, column, place - width * k + strips.shape[2] * width)


def _neighbors(
    queries: Tensor, keys: Tensor, k: int, exclude: Tensor | None, best_first: bool = True
) -> tuple[Tensor, Tensor]:
    """The k best keys from all products."""
    # 67 MB of products at once on a CPU, 2.1 GB on a GPU
    chunk = max(1, (1 << 24 if queries.device.type == "cpu" else 1 << 29) // len(keys))
    similarity = queries.new_empty(len(queries), k)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for start in range(0, len(queries), chunk):
        out = slice(start, start + chunk)
        scores = products(queries[out], keys)
        if exclude is not None:
            scores.scatter_(1, exclude[out, None], -math.inf)
        index[out] = _largest(scores, k)
        similarity[out] = scores.gather(1, index[out])
        if best_first:
            similarity[out], order = similarity[out].sort(1, descending=True)
            index[out] = index[out].gather(1, order)
    return similarity, index


def _neighbors_screened(queries: Tensor, keys: Tensor, k: int, exclude: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k best keys by float32 products of those that a product in 8 bits leaves over, about 1.5 k of them."""
    low_keys, block = _int8(keys), 2048  # keys whose products with a chunk of queries stay in the cache
    strips, blocks = block // 16, -(-len(keys) // block)  # a strip: 16 neighbouring keys
    last = len(keys) - (blocks - 1) * block
    columns = F.pad(low_keys.values, (0, 0, 0, block - last)).view(blocks, block, -1).transpose(1, 2)
    wanted, worst = k + (exclude is not None), _worst(low_keys)
    chunk = min(512, max(16, (1 << 25) // len(keys)))
    scores = torch.empty(blocks, chunk, block, dtype=torch.int32)
    peaks = torch.empty(chunk, blocks, strips, dtype=torch.int32)
    found = []
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        itself = None if exclude is None else exclude[start : start + chunk]
        n, largest = len(rows), rows.abs().amax(1, keepdim=True)
        low = _int8(rows / largest.clamp_(min=1e-30))  # a query's own scale does not change its order of keys
        if not math.isfinite(low.scale * low_keys.scale):
            return _neighbors(queries, keys, k, exclude)
        for j, table in enumerate(scores[:, :n]):
            torch._int_mm(low.values, columns[j], out=table)
            if j == blocks - 1:
                table[:, last:] = -(2**30)
            torch.amax(table.view(n, strips, 16), 2, out=peaks[:n, j])
        # Maxima of four strips each, for a shorter topk
        tops = peaks[:n].view(n, 4, -1).amax(1).topk(wanted, sorted=False).values
        least = tops.amin(1) - _reach(low, *worst)  # of wanted strips' maxima, so that as many keys reach it
        row, strip = _where(peaks[:n].view(n, -1) >= least[:, None])
        line = (strip // strips * chunk + row) * strips + strip % strips
        entry, place = _where(scores.view(-1, 16).index_select(0, line) >= least.index_select(0, row)[:, None])
        row, key = row.index_select(0, entry), 16 * strip.index_select(0, entry) + place
        counts = row.bincount(minlength=n)
        longest = int(counts.max())
        if longest > 8 * wanted + 64:  # many alike
            found.append(_neighbors(rows, keys, k, itself))
            continue
        each = torch.split(key, counts.tolist())
        exact = [keys.index_select(0, some).mv(q) for some, q in zip(each, rows, strict=True)]
        position = torch.arange(len(row)) - (counts.cumsum(0) - counts).index_select(0, row)
        similarity = torch.full((n, longest), -math.inf).index_put_((row, position), torch.cat(exact))
        candidates = torch.full((n, longest), -1).index_put_((row, position), key)
        if itself is not None:
            similarity.masked_fill_(candidates == itself[:, None], -math.inf)
        similarity, position = similarity.topk(k)
        found.append((similarity, candidates.gather(1, position)))
    return torch.cat([similarity for similarity, _ in found]), torch.cat([index for _, index in found])


def knn_scores(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Score (Q, C) of each class, the sum of exp(s/tau) over its neighbours, (Q, K) and best first.

    Weights are relative to the best neighbour's and rounded to units of 2^-48 (larger from 16,384 neighbours on, lest
    the sum overflow): integers have the same sum in any order, so ties stay ties.
    """
    weights = ((similarity - similarity[:, :1]) / temperature).exp() * 2.0 ** min(48, 62 - labels.shape[1].bit_length())
    scores = torch.zeros(len(labels), num_classes, dtype=torch.int64, device=labels.device)
    return scores.scatter_add_(1, labels, weights.long())


def knn_accuracy(
    queries: Tensor, query_labels: Tensor, train: Tensor, train_labels: Tensor, num_classes: int, *,
    num_neighbors: Sequence[int] = (200,), temperatures: Sequence[float] = (0.07,)
) -> dict[tuple[int, float], tuple[float, float]]:
    """Top-1 and top-5 in percent for each (K, tau) of the weighted kNN, from one search. Rows are unit."""
    hits = {(k, tau): torch.zeros(2, dtype=torch.int64) for k in num_neighbors for tau in temperatures}
    for part in torch.split(torch.arange(len(queries), device=queries.device), 4096):
        similarity, index = neighbors(queries[part], train, max(num_neighbors))
        found, truth = train_labels[index].long(), query_labels[part].long()[:, None]
        for (k, tau), hit in hits.items():
            scores = knn_scores(similarity[:, :k], found[:, :k], num_classes, tau)
            own = scores.gather(1, truth)
            lower = torch.arange(num_classes, device=scores.device) < truth
            rank = ((scores > own) | ((scores == own) & lower)).sum(1)  # ties: lower class first
            hit += torch.stack([(rank < 1).sum(), (rank < 5).sum()]).cpu()
    return {key: (100 * int(hit[0]) / len(queries), 100 * int(hit[1]) / len(queries)) for key, hit in hits.items()}


# ---- 11. encoders from files, evaluation -----------------------------------------------------------------------------


def knn_monitor(
    features: Tensor, data: ImageSet, queries: Tensor, test: ImageSet, temperature: float
) -> dict[str, float]:
    """Weighted kNN accuracy in percent, K = 200 or as many as there are. features: (N, D), queries: (Q, D), unit."""
    known = data.labels >= 0
    device = queries.device
    train, k = features if known.all() else features[known.to(device)], min(200, int(known.sum()))
    accuracy = knn_accuracy(queries, test.labels.to(device), train, data.labels[known].to(device), len(data.classes),
                            num_neighbors=[k], temperatures=[temperature])
    return dict(knn_top1=round(accuracy[k, temperature][0], 2))


def ratio_edge_intra_class(nearest: Tensor, labels: Tensor) -> Tensor:
    """For each class, the share of the edges (i, j) from its images that end in it (DeepCluster, section 4.1).

    nearest: (N, k); labels: (N,); returns (C,), NaN for classes without an image.
    """
    inside = (labels[nearest] == labels[:, None]).sum(1).double()
    sums = torch.zeros(int(labels.max()) + 1, dtype=torch.float64, device=labels.device).index_add_(0, labels, inside)
    return sums / (nearest.shape[1] * torch.bincount(labels))


@dataclasses.dataclass
class Encoder:
    """A backbone with the weights of a file, and its head if the file has one of ours."""

    backbone: nn.Module
    head: nn.Module | None
    arch: str
    width: int
    options: dict[str, Any]  # of the run that wrote it; empty for foreign files
    data: dict[str, Any]
    bank: Tensor | None
    sha256: str
    report: dict[str, Any]  # matched, missing and unexpected names; prefixes: the one taken, and other networks'

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> unit rows (B, D): of the head if there is one, else of the backbone."""
        features = self.backbone(images)
        return F.normalize((features if self.head is None else self.head(features)).float(), dim=1)

    def staged(self) -> Any:
        """The backbone, which must have `stages`; one that a changed script brings need not."""
        if not hasattr(self.backbone, "stages"):
            raise Fault(f"{self.arch} has no `stages` (common.py, section 8): give it this method; without it, of "
                        "eval_linear.py take --layers backbone or head")
        return self.backbone

    def describe(self) -> str:
        """How the file's names matched the network's."""
        found, missing, unexpected = self.report["matched"], self.report["missing"], self.report["unexpected"]
        names = [f"{len(part)} {what}" + (f" ({', '.join(part[:3])}{', ...' * (len(part) > 3)})" if part else "")
                 for what, part in (("missing", missing), ("unexpected", unexpected))]
        taken, *others = self.report["prefixes"]
        choice = f"; taken: {taken}*, also there: {', '.join(f'{other}*' for other in others)}" if others else ""
        sobel = "; it sees Sobel gradients" * isinstance(getattr(self.backbone, "front", None), Sobel)
        return f"{found} tensors matched, {', '.join(names)}; {'with' if self.head else 'without'} head{sobel}{choice}"


def images_of_run(args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Take from the run what --data and the options beside it leave open."""
    if "data" not in args.typed and options:
        args.data = options["data"]
        if "data_dir" not in args.typed and Path(options["data_dir"]).is_dir():
            args.data_dir = Path(options["data_dir"])
        for name, kind in dict(val_dir=Path, file_list=Path, val_list=Path, imbalance=float).items():
            if getattr(args, name) is None and options.get(name):
                setattr(args, name, kind(options[name]))


def load_train(args: argparse.Namespace, encoder: Encoder | None, split: str, device: torch.device) -> ImageSet:
    """Training images of the set that the encoder was trained on, unless --data names another; its size, mean, std.

    `args` has the run's set from then on, for `load_test`.
    """
    options, data = (encoder.options, encoder.data) if encoder else ({}, {})
    images_of_run(args, options)
    args.image_size = args.image_size or data.get("size")
    chosen = argparse.Namespace(**vars(args))
    if split == "pretrain":  # just the images of the run
        chosen.subset, chosen.seed = options.get("subset"), options.get("seed", 0)
        chosen.cache = args.cache or options.get("cache")
    train = load(chosen, split, device)
    train.mean, train.std = statistics(args, data, train)
    return train


def statistics(
    args: argparse.Namespace, data: dict[str, Any], usual: ImageSet | DataSet
) -> list[tuple[float, float, float]]:
    """Mean and std by which a network sees images: --mean and --std, else those of its run's `data`, else `usual`."""
    return [tuple(getattr(args, key, None) or data.get(key) or getattr(usual, key)) for key in ("mean", "std")]


# Which of two networks in a file its authors evaluate: MoCo's, in two spellings, MoCo v3's, BYOL's, DINO's.
EVALUATED = ("encoder_q", "query", "base_encoder", "online", "teacher")
# Parts of an encoder that the path to its features leaves out: npid's class vectors, cld's other heads.
BESIDE = ("classes", "group_head.", "predictor.", "jigsaw.")


def load_encoder(
    path: Path | str, arch: str | None = None, width: int | None = None, device: torch.device = CPU, layer: str = "auto"
) -> Encoder:
    """The encoder in a checkpoint of ours, a backbone.pth, or any file with torchvision's or timm's names.

    Checkpoints of ours say arch and width themselves; of the two stems that is taken which fits the weights. `layer`:
    "head", "backbone", or "auto": the head of checkpoints of ours, the backbone of foreign files, whose last layer may
    be a classifier. An AlexNet or VGG16 that has fc6 and no fc7 ends there. Under 95 % of the backbone's weights found,
    or any of another shape, is a Fault: numbers of a half-loaded network look like results.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Fault(f"cannot read {path} ({error.strerror})") from None
    saved = _load_inert(content, path)
    ours = isinstance(saved, dict) and {"options", "data", "state"} <= saved.keys()
    options, data = (saved["options"], saved["data"]) if ours else ({}, {})
    if ours and "encoder" not in saved["state"]:
        raise Fault(f"{path} was written by {options.get('script')}: take the backbone.pth beside it, if there is one")
    everything = saved["state"]["encoder"] if ours else _state_dict(saved, path)
    if not all(isinstance(weight, Tensor) for weight in everything.values()):
        raise Fault(f"{path} is damaged: among its weights is something else")
    arch, width = arch or options.get("arch"), width or options.get("width", 64)
    filters = (w for name, w in everything.items() if w.ndim == 4 and "sobel" not in name)
    channels = next((w.shape[1] for w in filters), 3)  # 2: behind DeepCluster's Sobel
    channels = 2 if channels == 2 else 3
    if arch not in ARCHITECTURES:
        fit = _fitting(everything, width, channels)
        raise Fault(f"{path} has {f'the unknown architecture {arch}' if arch else 'no word of its architecture'}: name "
                    f"one with --arch ({f'{fit} fits' if fit else ', '.join(ARCHITECTURES)})")
    # Ours has the stem of its images' size, unless its script was changed.
    usual = data.get("small", False)
    for stem in (usual, not usual):
        network = backbone(arch, width, stem, channels)
        weights, prefixes = _strip(everything, network.state_dict())
        if isinstance(network, PlainNet):
            fc6 = network.classifier[: [type(layer) for layer in network.classifier].index(nn.ReLU)]
            given = {name for name in weights if name.startswith("classifier.")}
            if given and given <= {f"classifier.{name}" for name in fc6.state_dict()}:
                network.classifier = fc6
        target = network.state_dict()
        if all(weights[name].shape == value.shape for name, value in target.items() if name in weights):
            break
    matched = {name: weights[name] for name in target if name in weights and weights[name].shape == target[name].shape}
    wanted = {name for name in target if not name.endswith("num_batches_tracked")}
    missing = sorted(wanted - matched.keys())
    share = min(1 - len(missing) / len(wanted),
                1 - sum(target[n].numel() for n in missing) / sum(target[n].numel() for n in wanted))
    names = dict(head=["head", "fc", "linear"], auto=["head"] if ours else [], backbone=[])[layer]
    head, used = _head(weights, network.dim, names)
    unexpected = sorted(weights.keys() - matched.keys() - used)
    if layer == "auto" and maybe_before_head(unexpected):
        head = None
    other = [name for name in missing if name in weights] + [name for name in unexpected if name.startswith("layer")]
    other += [name for name in missing if target[name].ndim == 4 or name.endswith("running_mean")]
    if share < 0.95 or other:  # of another shape, of a deeper ResNet, or a whole convolution or normalisation
        left = [name for name in dict.fromkeys(other + unexpected) if name in weights]
        which = " (AlexNet is the original's, of 96 filters, not torchvision's)" * arch.startswith("alexnet")
        fit = _fitting(everything, width, channels)
        advice = f"take --arch {fit}" if fit else (f"wrong --arch or --width{which}? Names other than torchvision's "
                                                   "have to be changed first (README.md, Evaluate)")
        if not fit and (arch, width) == (options.get("arch"), options.get("width")):
            advice = "a changed script's network has to be one of `common.backbone` (common.py, section 8)"
        raise Fault(f"{path} has {100 * share:.0f} % of the weights of {arch}, width {width}: {advice}. Missing "
                    f"{', '.join(missing[:3]) or 'none'} ...; left over {', '.join(left[:3]) or 'none'} ...")
    if not all(weight.isfinite().all() for weight in matched.values()):
        raise Fault(f"{path} has weights that are not finite: take an earlier checkpoint")
    if head is None and layer == "head":
        raise Fault(f"{path} has no linear layer on the {network.dim} features of {arch}: take backbone, not head")
    network.load_state_dict(matched, strict=False)
    _settle(network, head, device)
    bank = saved["state"]["bank"]["features"] if ours and "bank" in saved["state"] else None
    report = dict(matched=len(matched), missing=missing, unexpected=unexpected, prefixes=prefixes)
    return Encoder(network, head, arch, width, options, data, bank, hashlib.sha256(content).hexdigest(), report)


def maybe_before_head(unexpected: Sequence[str]) -> list[str]:
    """Of the names left over those of layers that a changed script may have before its head."""
    return [name for name in unexpected if not name.startswith(BESIDE) and "backbone" not in name]


def _fitting(everything: dict[str, Tensor], width: int, channels: int) -> str | None:
    """The architecture of which a file has every weight, and no layer more, if there is one."""
    for arch, small in itertools.product(ARCHITECTURES, (False, True)):
        with torch.device("meta"):
            target = backbone(arch, width, small, channels).state_dict()
        weights, _ = _strip(everything, target)
        more = any(name.startswith("layer") for name in weights.keys() - target.keys())
        if not more and all(name in weights and weights[name].shape == value.shape for name, value in target.items()
                            if not name.endswith("num_batches_tracked")):
            return arch
    return None


def _head(weights: dict[str, Tensor], dim: int, names: Sequence[str]) -> tuple[nn.Module | None, set[str]]:
    """The first of `names` that is a linear layer on `dim` features or, in an MLP head of ours, on its hidden layer:
    neck.0, and neck.1, its batch normalisation if any. With it the names of its weights."""
    hidden = {name.removeprefix("neck."): value for name, value in weights.items() if name.startswith("neck.")}
    inputs = hidden.get("0.bias", torch.empty(0)).numel() if hidden else dim
    for name in names:
        found = {key: weights[f"{name}.{key}"] for key in ("weight", "bias") if f"{name}.{key}" in weights}
        if f"{name}.direction" in weights:  # cld.NormLinear; the input's length that it divides by cancels in embed
            found = dict(weight=F.normalize(weights[f"{name}.direction"]))
        elif found.keys() == {"weight"} and found["weight"].shape[:1] == (inputs,) != found["weight"].shape[1:]:
            found = dict(weight=F.normalize(found["weight"].T))  # the same of its authors, transposed
        if "weight" in found and found["weight"].shape[1:] == (inputs,):
            linear = nn.Linear(inputs, len(found["weight"]), bias="bias" in found)
            linear.load_state_dict(found)
            used = {key for key in weights if key.startswith((f"{name}.", "neck."))}
            if not hidden:
                return linear, used
            norm = [nn.BatchNorm1d(inputs)] if "1.running_mean" in hidden else []
            neck = nn.Sequential(nn.Linear(dim, inputs), *norm, nn.ReLU())
            if {k: v.shape for k, v in hidden.items()} != {k: v.shape for k, v in neck.state_dict().items()}:
                break  # what lies behind an unknown layer is no use alone
            neck.load_state_dict(hidden)
            return nn.Sequential(neck, linear), used
    return None, set()


class _InertPickle:
    """As pickle, for torch.load: tensors and plain values; other classes become empty stand-ins and are never run."""

    class Unpickler(pickle.Unpickler):
        ALLOWED = frozenset({
            ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor"),
            ("torch._utils", "_rebuild_parameter"), ("torch", "Size"), ("torch", "device"),
            ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype"),
            ("_codecs", "encode"),
        })

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in self.ALLOWED or (module == "torch" and name.endswith("Storage")):
                return super().find_class(module.replace("numpy.core", "numpy._core"), name)
            return type(name, (_StandIn,), {})

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return _InertPickle.Unpickler(file, **options).load()


class _StandIn:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    append = extend = add = __setstate__

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _load_inert(content: bytes, path: Path) -> Any:
    """What a file holds; objects of its authors' own classes, as old checkpoints have them, are skipped, not made."""
    if b"/constants.pkl" in content:  # by this name torch.load knows TorchScript, and runs what it brings
        raise Fault(f"{path} is TorchScript: if you trust it, convert it by torch.save(torch.jit.load({str(path)!r}, "
                    "'cpu').state_dict(), 'weights.pth')")
    for options in (dict(weights_only=True), dict(weights_only=False, pickle_module=_InertPickle)):
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):  # garbage raises almost anything
            check_archive(io.BytesIO(content))
            return torch.load(io.BytesIO(content), map_location="cpu", **options)
    if path.suffix == ".safetensors":
        raise Fault(f"{path}: convert it by torch.save(safetensors.torch.load_file({str(path)!r}), 'weights.pth') "
                    "(pip install safetensors)")
    raise Fault(f"{path} is damaged, truncated or no PyTorch checkpoint")


def _state_dict(saved: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of weights in a file: under its usual names, VISSL's model before its loss, which may hold another
    network, and DINO's teacher, which its authors evaluate, before the student; else where most tensors are."""

    def count(part: Any) -> int:
        return sum(map(count, part.values())) if isinstance(part, dict) else isinstance(part, Tensor)

    for key in ("state_dict", "classy_state_dict", "base_model", "model", "model_state_dict", "teacher", "student",
                "encoder", "net"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    while isinstance(saved, dict) and not any(isinstance(value, Tensor) for value in saved.values()):
        saved = max((part for name, part in saved.items() if "optim" not in str(name)), key=count, default=None)
    items = saved.items() if isinstance(saved, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise Fault(f"{path} holds no weights: save model.state_dict()")
    return tensors


def _strip(weights: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under `target`'s names, without the prefix that most of them share; that prefix, and those of other
    networks in the file, which are as complete. Weights of `target`'s shapes count twice: a teacher of another
    architecture may have all the names of its student.

    DataParallel inserts "module.", torch.compile "_orig_mod."; the CIFAR networks of NPID's authors call the shortcut
    "shortcut", and timm's VGG has fc6 and fc7 as convolutions.
    """
    renames = {".shortcut.": ".downsample.", "pre_logits.fc1.": "classifier.0.", "pre_logits.fc2.": "classifier.3."}
    plain = {}
    for name, value in weights.items():
        name = f".{name}".replace(".module.", ".").replace("._orig_mod.", ".")[1:]
        value = value.flatten(1) if "pre_logits." in name and value.ndim == 4 else value
        for old, new in renames.items():
            name = name.replace(old, new)
        plain[name] = value
    votes = collections.Counter[str]()
    for name, value in plain.items():
        for i, character in enumerate(f".{name}"):
            if character == "." and name[i:] in target:
                votes[name[:i]] += 1 + (value.shape == target[name[i:]].shape)
                break
    whole = [p for p in sorted(votes) if votes[p] >= 0.95 * max(votes.values())]
    prefix = max(whole, key=lambda p: (p == "backbone.", any(word in p for word in EVALUATED), votes[p]), default="")
    outer = prefix.removesuffix("backbone.")  # the head lies beside the backbone
    kept = {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}
    beside = {name.removeprefix(outer): value for name, value in plain.items()
              if name.startswith(outer) and not name.startswith(prefix)}
    return kept | beside, [prefix, *(p for p in whole if p != prefix)]


def chosen_encoder(args: argparse.Namespace, device: torch.device, layer: str = "auto", small: bool = False) -> Encoder:
    """The encoder of the file that an evaluation's first argument names, and a line that says how its names matched, or
    a random one; `small`: whether that has the 3x3 stem."""
    if args.checkpoint == "random":
        return untrained_encoder(args.arch or "resnet18", args.width or 64, small, device)
    encoder = load_encoder(args.checkpoint, args.arch, args.width, device, layer)
    if first_rank():
        print(f"{Path(args.checkpoint)}: {encoder.describe()}", flush=True)
    return encoder


def untrained_encoder(
    arch: str, width: int, small: bool, device: torch.device, feature_dim: int = 128, input_channels: int = 3
) -> Encoder:
    """An encoder with random weights, the baseline of every table."""
    network = backbone(arch, width, small, input_channels)
    head = nn.Linear(network.dim, feature_dim)
    _settle(network, head, device)
    return Encoder(network, head, arch, width, {}, {}, None, "", dict(matched=0, missing=[], unexpected=[]))


def _settle(network: PlainNet | ResNet, head: nn.Module | None, device: torch.device) -> None:
    """On the device, for evaluation. The batch normalisations of fc6 and fc7 become part of them: all evaluations see
    two linear layers."""
    for part in (network, head):
        if part is not None:
            part.eval().requires_grad_(False).to(device)
    layers = network.classifier if isinstance(network, PlainNet) else nn.Sequential()
    for place, norm in reversed(list(enumerate(layers))):
        linear = layers[place - 1]
        if isinstance(norm, nn.BatchNorm1d) and isinstance(linear, nn.Linear):
            layers[place - 1] = fuse_linear_bn_eval(linear, norm)
            del layers[place]


def publish(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the result of an evaluation as JSON, and add it to eval.jsonl in --output, if there is that option, and
    beside the checkpoint, if that is a file."""
    line = json.dumps(result)
    folders = [args.output] if "output" in args else []
    folders += [Path(args.checkpoint).parent] if result["checkpoint_sha256"] else []
    for folder in dict.fromkeys(folders):
        append_result(folder, line)
    print(line, flush=True)


# ---- 12. PASCAL VOC --------------------------------------------------------------------------------------------------

# A folder in VOC's layout: JPEGImages/ID.jpg, Annotations/ID.xml, ImageSets/Main/LIST.txt with an ID a line; for
# segmentation SegmentationClass/ID.png and ImageSets/Segmentation/LIST.txt. Boxes in XML count pixels from 1 and
# include the last one; here they are half-open from 0, so that width = x2 - x1 and the overlaps are VOC's own.

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
# Lists of (year, name) that training and testing use. The labels of VOC2012's test images are not public.
VOC_LISTS = {
    "voc07": ([("2007", "trainval")], [("2007", "test")]),
    "voc12": ([("2012", "train")], [("2012", "val")]),
    "voc0712": ([("2007", "trainval"), ("2012", "trainval")], [("2007", "test")]),
}
VOID = 255  # the value of mask pixels that are ignored


class VocImage(NamedTuple):
    """An image file and its K objects; of a segmentation list also its mask file."""

    path: Path
    size: tuple[int, int]  # width, height in px
    boxes: Tensor  # (K, 4) float32: x1 y1 x2 y2 in px, half-open
    labels: Tensor  # (K,) int64
    difficult: Tensor  # (K,) bool: neither a hit nor a miss in VOC's metrics
    mask: Path  # 8-bit palette: 0 background, class + 1, VOID; Path() for other tasks


@dataclasses.dataclass
class VocSet:
    """Images of a list in its order, with the names of the classes."""

    name: str
    classes: list[str]
    images: list[VocImage]
    # How the network sees them, which the script decides.
    size: int = 0  # px: the shorter side
    mean: tuple[float, float, float] = IMAGENET.mean
    std: tuple[float, float, float] = IMAGENET.std

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, Any]:
        """What `differences` compares: plain values, with a checksum of names, objects and mask files."""
        content = hashlib.blake2b(digest_size=8)
        for image in self.images:
            objects = [column.tolist() for column in (image.boxes, image.labels, image.difficult)]
            content.update(repr((image.path.name, objects)).encode())
            if image.mask != Path():
                content.update(image.mask.read_bytes())
        return dict(name=self.name, images=len(self), classes=len(self.classes), checksum=content.hexdigest())


def load_voc(args: argparse.Namespace, split: str, task: str = "Main", classes: list[str] | None = None) -> VocSet:
    """The VOC images that --data names. `split`: "train" or "test"; `task`: "Main" or "Segmentation".

    --data: a key of VOC_LISTS, "shapes" (rendered into --data-dir), or any folder in VOC's layout, whose lists are
    trainval.txt or train.txt, and test.txt; without that train.txt and val.txt. `args.train_list` and
    `args.test_list`, where a script has them, name others. `classes`: those of the training images, which a test must
    not exceed.
    """
    test = split == "test"
    wanted = getattr(args, f"{split}_list", None)
    if args.data in VOC_LISTS:
        classes, places = VOC_CLASSES, []
        for year, name in VOC_LISTS[args.data][test]:
            root = args.data_dir / "VOCdevkit" / f"VOC{year}"
            lists = [root / "ImageSets" / task / f"{one}.txt" for one in (wanted or name, name)]
            # Either list shows that the set is there; only without both is it downloaded.
            there = next((path for path in lists if path.exists()), lists[1])
            _download(args, "VOCDetection", there, year=year, image_set=name)
            places.append((root, lists[0]))
    else:
        root = _voc_root(args)
        names = [wanted] if wanted else ["test", "val"] if test else ["trainval", "train"]
        folder = root / "ImageSets" / task
        tested = getattr(args, "test_list", None) or ("test" if (folder / "test.txt").is_file() else "val")
        if not test and tested == "val":  # which is a part of trainval
            names.reverse()
        lists = [folder / f"{name}.txt" for name in names]
        places = [(root, next((path for path in lists if path.is_file()), lists[0]))]
    images: list[tuple[Path, str]] = []
    for root, path in places:
        listed, _ = _voc_list(path)
        if not listed:
            raise Fault(f"{path} lists no images")
        images += [(root, identity) for identity in listed]
    share = args.test_subset if test else args.subset
    rows = list(range(len(images)))
    if share is not None and args.data != "shapes":  # which renders just what is wanted
        count = round(share * len(images)) if share < 1 else int(share)
        if not 1 <= count <= len(images):
            raise Fault(f"--{'test-' * test}subset {share:g}: {args.data} has {len(images)} images here")
        rows = torch.randperm(len(images), generator=generator(args.seed, "subset"))[:count].sort().values.tolist()
    if classes is None:
        classes = _voc_class_lists(places[0][0]) or None
    read = rows if classes is not None else range(len(images))  # classes are those of all images, however few are taken
    seen = {row: _voc_image(*images[row], task) for row in read}
    every = sorted({name for _, names in seen.values() for name in names})
    classes = every if classes is None else classes
    found = [seen[row] for row in rows]
    if strange := [name for name in every if name not in classes]:
        example = next(image.path for image, names in found if strange[0] in names)
        raise Fault(f"{example} has an object of the class {strange[0]}, which is none of {', '.join(classes[:20])}: "
                    f"mend its XML file{', or train on images of that class, too' * test}")
    number = {name: label for label, name in enumerate(classes)}
    done = [image._replace(labels=torch.tensor([number[name] for name in names], dtype=torch.int64))
            for image, names in found]
    return VocSet(folder_name(Path(args.data)), classes, _clip_boxes(done))


def note_shared(train: Sequence[Path], test: Sequence[Path]) -> None:
    """One line on stderr if images of the test are trained on, too."""
    known = set(train)
    if shared := sum(path in known for path in test):
        note(f"note: {shared} of the {len(test)} test images are trained on: the figures are no test")


def _voc_root(args: argparse.Namespace) -> Path:
    """The folder that holds JPEGImages/: --data itself, or the one VOC* in it or in its VOCdevkit/."""
    if args.data == "shapes":
        counts = [1000, 500]
        for i, wanted in enumerate((args.subset, args.test_subset)):
            if wanted is not None:
                counts[i] = max(1, round(wanted * counts[i])) if wanted < 1 else int(wanted)
        root: Path = args.data_dir / f"shapes-voc-{counts[0]}-{counts[1]}"
        for _ in _missing(root):
            render_voc(root, *counts)
        return root
    root = Path(args.data)
    if not root.is_dir():
        raise Fault(f"no directory {root}: --data takes shapes, {', '.join(VOC_LISTS)}, or a folder in VOC's layout")
    places = [root, *sorted(root.glob("VOC[0-9]*")), *sorted(root.glob("VOCdevkit/VOC*"))]
    places = [place for place in places if (place / "JPEGImages").is_dir()]
    if len(places) != 1:
        reason = f"more than one: {', '.join(map(str, places))}" if places else "none there, nor in VOCdevkit/VOC*"
        raise Fault(f"{root} is no folder in VOC's layout: it needs one JPEGImages/ ({reason})")
    return places[0]


def _voc_list(path: Path) -> tuple[list[str], bool]:
    """The image of each line, spaces in names included; whether it is a list of one class: a flag ends each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin it with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise Fault(f"cannot read {path} ({reason}): it lists an image a line") from None
    names = [line.strip() for line in lines if line.strip()]
    images = [found[1] for name in names if (found := re.fullmatch(r"(.*\S)\s+(?:-1|0|1)", name))]
    return (images, True) if len(images) == len(names) else (names, False)


def _voc_class_lists(root: Path) -> list[str]:
    """Classes by the lists of one class, CLASS_trainval.txt or CLASS_train.txt; none if there are no such lists."""
    for end in ("_trainval.txt", "_train.txt"):
        names = sorted(path.name[: -len(end)] for path in (root / "ImageSets" / "Main").glob(f"[!.]*{end}")
                       if _voc_list(path)[1])  # a user's own list, as small_train.txt, is none
        if names:
            return names
    return []


def _voc_image(root: Path, identity: str, task: str) -> tuple[VocImage, list[str]]:
    """An image with its objects as they stand in its XML file, and the names of their classes."""
    endings = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
    files = [root / "JPEGImages" / f"{identity}{ending}" for ending in endings]
    path = next((file for file in files if file.is_file()), files[0])
    mask = root / "SegmentationClass" / f"{identity}.png" if task == "Segmentation" else Path()
    annotation = root / "Annotations" / f"{identity}.xml"
    try:
        with Image.open(path) as image:  # the XML's own size is often wrong
            size = image.size
    except UNREADABLE as error:
        raise Fault(f"cannot read the image {path} ({getattr(error, 'strerror', None) or 'damaged or empty'}): mend "
                    "it, or take it off its list") from None
    boxes, names, difficult = list[tuple[float, ...]](), list[str](), list[bool]()
    if task == "Main" or annotation.is_file():
        boxes, names, difficult, stated = read_voc_xml(annotation)
        if task == "Main" and size[0] != size[1] and stated == (str(size[1]), str(size[0])) and _is_turned(path):
            raise Fault(f"{path} is turned by its EXIF orientation, and its boxes with it, but not its pixels: store "
                        "them as they are shown (ImageMagick: mogrify -auto-orient)")
    return VocImage(path, size, torch.tensor(boxes).view(-1, 4), torch.zeros(len(names), dtype=torch.int64),
                    torch.tensor(difficult, dtype=torch.bool), mask), names


def _is_turned(path: Path) -> bool:
    """Whether viewers show an image turned by a quarter."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except UNREADABLE:
        return False


def read_voc_xml(path: Path) -> tuple[list[tuple[float, ...]], list[str], list[bool], tuple[str | None, ...]]:
    """Boxes, class names and difficult flags of the objects in an annotation, and width and height of the image as they
    stand there; parts of objects are not objects.

    Broken XML, an entity declaration, and an object without class or box are Faults that name the file.
    """
    from xml.etree import ElementTree

    boxes, names, difficult = list[tuple[float, ...]](), list[str](), list[bool]()
    try:
        content = path.read_bytes()
        if b"<!ENTITY" in content:
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(content)
        for item in root.iter("object"):
            name = (item.findtext("name") or "").strip()
            sides = [float(item.findtext(f"bndbox/{side}") or "nan") for side in ("xmin", "ymin", "xmax", "ymax")]
            if not name or not all(map(math.isfinite, sides)):
                raise ValueError("an object without class or box")
            boxes.append((sides[0] - 1, sides[1] - 1, sides[2], sides[3]))
            names.append(name)
            difficult.append((item.findtext("difficult") or "0").strip() == "1")
    except OSError as error:
        raise Fault(f"cannot read {path} ({error.strerror}): every listed image needs its annotation") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise Fault(f"{path} is no annotation of VOC's ({error}): mend it, or take its image off the list") from None
    return boxes, names, difficult, tuple(root.findtext(f"size/{side}") for side in ("width", "height"))


def _clip_boxes(images: list[VocImage]) -> list[VocImage]:
    """Boxes cut off at the border of their image; those of which nothing is left go. One line on stderr says so."""
    cut, gone, first = 0, 0, ""
    for row, image in enumerate(images):
        limit = torch.tensor([*image.size, *image.size], dtype=torch.float32)
        inside = image.boxes.clamp(min=0).minimum(limit)
        kept = (inside[:, 2:] - inside[:, :2]).amin(1) > 0
        outside = (inside - image.boxes).abs().amax(1) > 1  # some tools count from 0
        if outside.any() or not kept.all():
            first = first or image.path.name
        cut, gone = cut + int((outside & kept).sum()), gone + int((~kept).sum())
        images[row] = image._replace(boxes=inside[kept], labels=image.labels[kept], difficult=image.difficult[kept])
    if cut or gone:
        note(f"note: {cut} boxes reach outside their image and are cut off there, {gone} have no pixel in it and are "
             f"left out; the first in {first}")
    return images


def voc_palette() -> list[int]:
    """The 256 colours of VOC's masks: the bits of the index, three at a time, from the highest bit of R, G, B on."""
    return [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for index in range(256)
            for channel in range(3)]


def render_voc(root: Path, train: int, test: int, size: int = 96) -> None:
    """Write a set in VOC's layout: scenes of one to three objects of `shapes`, lists trainval, test and those of each
    class. Objects of which under 3 % of the image is seen are difficult; masks have a void outline of 1 px.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    # Seen only when it is complete. Each process has a place of its own; only one that is killed leaves it behind.
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.", suffix=".tmp", dir=root.parent) as place:
        whole = Path(place) / root.name
        _render_voc(whole, train, test, size)
        try:
            whole.replace(root)
        except OSError:
            if not root.is_dir():  # else another process was faster, with the same images
                raise


def _render_voc(root: Path, train: int, test: int, size: int) -> None:
    for name in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    classes = [f"class{i}" for i in range(NUM_CLASSES)]
    for split, count in dict(trainval=train, test=test).items():
        listed, flags = "", dict.fromkeys(classes, "")
        for i in range(count):
            source = generator(i, "scene", split)
            labels = torch.randint(NUM_CLASSES, (1 + i % 3,), generator=source)
            scene = render_scene(labels, int(torch.randint(2**31, (), generator=source)), size)
            identity = f"{split}_{i:05d}"
            difficult = scene.masks.sum((1, 2)) < 0.03 * size**2
            present = dict.fromkeys(classes, -1)
            text = f"<annotation>\n  <filename>{identity}.jpg</filename>\n"
            text += f"  <size><width>{size}</width><height>{size}</height><depth>3</depth></size>\n"
            for (x1, y1, x2, y2), label, flag in zip(scene.boxes.tolist(), scene.labels, difficult, strict=True):
                name = classes[label]
                present[name] = max(present[name], int(not flag))
                text += f"  <object><name>{name}</name><difficult>{int(flag)}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                text += f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>\n"
            (root / "Annotations" / f"{identity}.xml").write_text(text + "</annotation>\n")
            pixels = Image.fromarray(scene.image.permute(1, 2, 0).numpy())
            pixels.save(root / "JPEGImages" / f"{identity}.jpg", quality=95)
            masks = scene.masks.float()
            outline = (F.max_pool2d(masks, 3, 1, 1) + F.max_pool2d(-masks, 3, 1, 1) > 0).any(0)
            mask = (scene.masks * (scene.labels + 1)[:, None, None]).sum(0).masked_fill(outline, VOID)
            image = Image.fromarray(mask.to(torch.uint8).numpy(), "L")
            image.putpalette(voc_palette())
            image.save(root / "SegmentationClass" / f"{identity}.png")
            listed += f"{identity}\n"
            for name, value in present.items():
                flags[name] += f"{identity} {value:>2}\n"
        for task in ("Main", "Segmentation"):
            (root / "ImageSets" / task / f"{split}.txt").write_text(listed)
        for name, lines in flags.items():
            (root / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text(lines)


def recall_precision(scores: Tensor, right: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Recall and precision (M,) float64 after each of M answers, highest score first; equal scores in their order.

    right (M,) bool: whether an answer is; total: how many right ones there are to be found.
    """
    hits = right[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    return hits / total, hits / torch.arange(1, len(hits) + 1, device=hits.device)


def average_precision(scores: Tensor, right: Tensor, total: int, eleven_points: bool) -> float:
    """VOC's average precision in percent, of images for classification, of boxes for detection; nan if total is 0.

    scores (M,), right (M,) bool, total: see `recall_precision`. The precision at a recall is the best at that recall
    or above. eleven_points: its mean at recalls 0, 0.1, ... 1 (VOC2007); else the area below it (VOC2010 and later).
    """
    if not total:
        return math.nan
    _, precision = recall_precision(scores, right, total)
    best = precision.flip(0).cummax(0).values.flip(0)
    hits = right[scores.argsort(descending=True, stable=True)]
    if not eleven_points:
        return 100 * best[hits].sum().item() / total
    tenths = torch.arange(11, device=hits.device)
    first = torch.searchsorted(10 * hits.cumsum(0), total * tenths)  # in whole numbers: 3 of 10 are 0.3
    return 100 * F.pad(best, (0, 1))[first].sum().item() / 11
