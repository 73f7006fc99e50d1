"""Scripts run in processes of their own, forked from a server that has imported everything."""

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import common
import npid  # noqa: F401  the server imports it, so that its children need not

ROOT = Path(common.__file__).resolve().parent
TINY = [
    "--preset", "smoke", "--subset", "64", "--batch-size", "16", "--image-size", "16",
    "--feature-dim", "16", "--device", "cpu", "--knn-every", "0",
]

started: list[ForkServerProcess] = []
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "helpers", "local_aggregation", "deepcluster", "cld", "eval_knn", "eval_linear", "eval_detection",
    "eval_segmentation", "figures",
])


@dataclasses.dataclass
class Process:
    """A script at work or at its end."""

    process: ForkServerProcess
    folder: tempfile.TemporaryDirectory[str]

    def wait(self, seconds: float = 180) -> "Process":
        self.process.join(seconds)
        assert self.process.exitcode is not None, "the script hangs"
        return self

    def kill(self, number: int) -> None:
        """Signal the script, unless it has ended in the meantime."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    @property
    def code(self) -> int:
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def out(self) -> str:
        return (Path(self.folder.name) / "out").read_text()

    @property
    def err(self) -> str:
        return (Path(self.folder.name) / "err").read_text()

    def wait_for(self, text: str, seconds: float = 180) -> None:
        """Until `text` stands in the output."""
        end = time.monotonic() + seconds
        while text not in self.out:
            assert self.process.is_alive() and time.monotonic() < end, f"no {text} in time"
            time.sleep(0.005)


def start(script: str, argv: Sequence[str | Path], before: Callable[[], None] | None = None) -> Process:
    """Start `python <script>.py argv`; `before` runs in the new process first."""
    folder = tempfile.TemporaryDirectory()
    for name in ("out", "err"):
        (Path(folder.name) / name).touch()
    process = _context.Process(target=_child, args=(script, [str(word) for word in argv], folder.name, before))
    process.start()
    started.append(process)
    return Process(process, folder)


def run(script: str, argv: Sequence[str | Path], before: Callable[[], None] | None = None) -> Process:
    """The same, to its end."""
    return start(script, argv, before).wait()


def _child(script: str, argv: list[str], folder: str, before: Callable[[], None] | None) -> None:
    gc.freeze()  # a collection would copy every page
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    sys.argv = [f"{script}.py", *argv]
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    if before:
        before()
    common.launch(module.main, module.parse_args)


def checkpoint(output: Path) -> dict[str, Any]:
    """What a run left behind, without the options, which differ in `output`."""
    saved = common.load_checkpoint(output / "checkpoint.pth")
    return {key: value for key, value in saved.items() if key not in ("options", "git", "log_size")}


def log(output: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl without times, memory and the command."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("command", "git", "images_per_second", "seconds", "cluster_seconds", "memory_gb"):
            row.pop(key, None)
        row.get("options", {}).pop("output", None)
    return rows


def same(a: Any, b: Any, path: str = "") -> None:
    """Assert that two nests of dictionaries, lists, numbers and tensors are equal bit by bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=-7e7), b.nan_to_num(nan=-7e7)), path
    else:
        assert a == b, path


def same_runs(a: Path, b: Path) -> None:
    """Assert that two runs ended with the same checkpoint, weights and log."""
    same(checkpoint(a), checkpoint(b))
    same(torch.load(a / "backbone.pth"), torch.load(b / "backbone.pth"))
    assert log(a) == log(b)


class Step(NamedTuple):
    """What a step is given, and the parts of the checkpoint after it."""

    index: torch.Tensor
    views: torch.Tensor  # (V, B, 3, S, S), augmented, in [0, 1]
    state: dict[str, Any]


def record_steps(script: ModuleType, patch: Any) -> list[Step]:
    """From now on the steps that `script` takes in this process.

    Its network computes in float64: in float32 other roundings turn a unit on or off now and then, and what comes after
    cannot be compared any more.
    """
    steps, given = list[Step](), list[torch.Tensor]()
    batches, augment, encoder = common.ImageSet.batches, script.augment, script.Encoder
    normalize, after_step = common.ImageSet.normalize, common.Run.after_step

    def watched(*args: Any) -> Iterator[Any]:
        for step, index, images in batches(*args):
            given[:] = [index]
            yield step, index, images

    def kept(*args: Any) -> torch.Tensor:
        given.append(augment(*args))
        return given[-1].clone()

    def exact(*args: Any) -> torch.nn.Module:
        made: torch.nn.Module = encoder(*args).double()
        if getattr(made, "classes", None) is not None:
            made.classes.data = made.classes.data.float()
        return made

    def done(run: common.Run, state: dict[str, Any], *rest: Any) -> None:
        parts = copy.deepcopy({name: part.state_dict() for name, part in state.items()})
        steps.append(Step(given[0], torch.stack(given[1:]), parts))
        after_step(run, state, *rest)

    patch.setattr(common.ImageSet, "batches", watched)
    patch.setattr(common.ImageSet, "normalize", lambda *args: normalize(*args).double())
    patch.setattr(common.Run, "after_step", done)
    patch.setattr(script, "augment", kept)
    patch.setattr(script, "Encoder", exact)
    return steps


def one_line(process: Process, *words: str) -> None:
    """Assert exit code 2 and just one line on stderr that holds all `words`."""
    lines = [line for line in process.err.splitlines() if line.strip()]
    assert process.code == 2, (process.code, process.err)
    assert len(lines) == 1 and ": error: " in lines[0], process.err
    assert "Traceback" not in process.out
    for word in words:
        assert word in lines[0], (word, lines[0])


class Rank:
    """A run, or one of its ranks that hears nothing of the others."""

    steps, args = 0, argparse.Namespace(seed=0)
    rows, share = common.Run.rows, common.Run.share
    generator, permutation = common.Run.generator, common.Run.permutation

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world, self.device = rank, world, torch.device("cpu")

    def barrier(self, *where: int) -> None:
        pass

    pause = seed_step = barrier

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=False)

    def gather(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def images_of(labels: list[int], **more: Any) -> common.ImageSet:
    """A set of black images with these labels."""
    grey, classes = (0.5, 0.5, 0.5), [str(c) for c in range(max(labels) + 1)]
    return common.ImageSet("set", 32, grey, grey, torch.tensor(labels), classes, torch.arange(len(labels)), **more)
