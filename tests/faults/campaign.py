"""The fault campaign: every script, attacked in every way that FAULTS lists, each with what it promises.

    make faults                                                    # random trials for 20 minutes, added to the counts
    export PYTHONPATH=.:tests
    python tests/faults/campaign.py --only "kill -9" --script npid --minutes 1
    python tests/faults/campaign.py --replay "kill -9 at a random moment" npid 1234      # one trial again, by its seed

A trial is a pure function of (fault, script, seed), up to the moments at which the system runs what. It raises
AssertionError where the promise does not hold. Every wait has a deadline: what hangs has not held.
"""

import argparse
import codecs
import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from helpers import ROOT, TINY, Process, run, same, start
from PIL import Image

import common

HERE = Path(__file__).resolve().parent
COUNTS, TABLE = HERE / "counts.json", HERE.parent / "README.md"
DEADLINE = 90  # s for anything to end; a hundred times what it takes on an idle machine
TRAIN = [*TINY, "--test-subset", "20", "--epochs", "3", "--knn-every", "2", "--save-minutes", "0.0001",
         "--output", "{out}"]
VOC = ["--preset", "shapes", "--data", "{voc}", "--output", "{out}", "--batch-size", "4", "--iterations", "4",
       "--test-size", "32", "--log-every", "2", "--workers", "0", "--device", "cpu", "--no-amp",
       "--save-minutes", "0.0001"]
FEW = ["--subset", "64", "--test-subset", "20", "--device", "cpu"]
COMMANDS = {
    "npid": TRAIN,
    "local_aggregation": [*TRAIN, "--warmup-epochs", "1"],
    "deepcluster": [*TRAIN, "--k", "8"],
    "cld": [*TRAIN, "--k", "8"],
    "eval_knn": ["{out}/network.pth", *FEW, "--k", "5"],
    "eval_linear": ["{out}/network.pth", "--preset", "smoke", *FEW, "--epochs", "1", "--save-minutes", "0.0001",
                    "--output", "{out}/probes", "--layers", "conv5"],
    "eval_detection": ["{out}/network.pth", *VOC, "--train-sizes", "24", "32", "--rois", "8", "--precise-bn", "2"],
    "eval_segmentation": ["{out}/network.pth", *VOC, "--crop", "32"],
    "figures curves": ["curves", "{out}"],
    "figures gallery": ["gallery", "{out}", "--rows", "1", "--k", "2", *FEW],
}
METHODS = ["npid", "local_aggregation", "deepcluster", "cld"]
RUNS = [*METHODS, "eval_linear", "eval_detection", "eval_segmentation"]  # which keep a checkpoint and go on from it
EVERY = list(COMMANDS)
NETWORK = [name for name in EVERY if name not in (*METHODS, "figures curves")]  # which are given a network


# ---- the world of a trial --------------------------------------------------------------------------------------------


class World:
    """A folder with what the trials need, and the undisturbed end of each script."""

    def __init__(self, root: Path) -> None:
        self.root, self.count, self.seconds = root, 0, dict[str, float]()
        root.chmod(0o755)
        self.ends = dict[str, dict[str, Any]]()
        common.render_voc(root / "voc", 8, 4)

    def argv(self, name: str, out: Path) -> list[str]:
        return [word.format(out=out, voc=self.root / "voc") for word in COMMANDS[name]]

    def start(self, name: str, out: Path, *more: str | Path, before: Callable[[], None] | None = None) -> Process:
        words = [str(word) for word in more]
        return start(name.split()[0], [*self.argv(name, out), *words], functools.partial(begin, before))

    def run(self, name: str, out: Path, *more: str | Path, before: Callable[[], None] | None = None) -> Process:
        return self.start(name, out, *more, before=before).wait(DEADLINE)

    def fresh(self, name: str, out: Path | None = None) -> Path:
        """A folder in which `name` can start."""
        self.count += 1
        out = out or self.root / f"trial{self.count}"
        out.mkdir()
        if name not in METHODS:
            trained = self.trained()
            if name.startswith("figures"):
                shutil.copy(trained / "checkpoint.pth", out)
                shutil.copy(trained / "log.jsonl", out)
            else:
                shutil.copy(trained / "checkpoint.pth", out / "network.pth")
        return out

    def trained(self) -> Path:
        """A small run of NPID."""
        self.end("npid")
        return self.root / "end-npid"

    def end(self, name: str) -> dict[str, Any]:
        """What an undisturbed run leaves behind."""
        if name not in self.ends:
            out = self.fresh(name, self.root / f"end-{name.replace(' ', '-')}") if name not in METHODS else (
                self.root / f"end-{name}")
            out.mkdir(exist_ok=True)
            began = time.monotonic()
            process = self.run(name, out)
            assert process.code == 0, process.err
            self.seconds[name] = time.monotonic() - began
            self.ends[name] = found(name, out)
        return self.ends[name]

    def ends_well(self, name: str, out: Path, *more: str | Path, before: Callable[[], None] | None = None,
                  log: bool = True) -> Process:
        """Assert that the plain command now ends as an undisturbed run does, and leaves no stray file."""
        process = self.run(name, out, *more, before=before)
        assert process.code == 0, (process.code, process.err)
        clean(process)
        assert not list(out.rglob("*.tmp")), list(out.rglob("*.tmp"))
        expected, observed = self.end(name), found(name, out)
        if not log:
            expected, observed = expected | dict(log=None), observed | dict(log=None)
        same(expected, observed)
        return process


def begin(before: Callable[[], None] | None) -> None:
    """The script's first word, by which its parent knows that it is there; then `before`."""
    print("begun", flush=True)
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as Python's own is
    if before:
        before()


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A line of a log without times, memory and the command."""
    away = ("command", "git", "options", "memory_gb", "checkpoint", "assigned")
    return {key: value for key, value in row.items() if key not in away and "second" not in key}


def found(name: str, out: Path) -> dict[str, Any]:
    """What a script left behind, as far as it is the same each time."""
    ends = dict[str, Any]()
    if name.startswith("figures"):
        path = out / f"{name.split()[1]}.png"
        Image.open(path).load()
        return dict(sha=hashlib.sha256(path.read_bytes()).hexdigest())
    if name in RUNS and name != "eval_linear":
        saved = common.load_checkpoint(out / "checkpoint.pth")
        away = ("options", "git", "log_size", "data")
        ends["checkpoint"] = {key: value for key, value in saved.items() if key not in away}
        ends["backbone"] = torch.load(out / "backbone.pth", weights_only=True)
        ends["log"] = [plain(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()[1:]]
    if name not in METHODS:
        lines = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
        ends["result"] = plain(lines[-1])
        for line in lines:
            same(plain(line), ends["result"])
    return ends


def clean(process: Process) -> None:
    assert "Traceback" not in process.err + process.out, process.err
    assert "Exception ignored" not in process.err, process.err


def one_fault(process: Process, *words: str) -> None:
    """Assert exit code 2 and, after notes if any, one line of the error that holds `words`."""
    clean(process)
    lines = [line for line in process.err.splitlines() if line.strip()]
    assert process.code == 2, (process.code, process.err)
    assert sum(": error: " in line for line in lines) == 1 and ": error: " in lines[-1], process.err
    for word in words:
        assert word in lines[-1], (word, lines[-1])


# ---- faults ----------------------------------------------------------------------------------------------------------
# Each: (world, script, random numbers) -> how often the fault struck. Its docstring is the promise.


def killed(world: World, name: str, draw: random.Random) -> int:
    """The same command goes on and ends bit-identical to an undisturbed run, its log too; no temporary file stays."""
    world.end(name)
    out, hits = world.fresh(name), 0
    for _ in range(draw.randint(1, 4)):
        process = world.start(name, out)
        process.wait_for("begun")
        process.process.join(draw.uniform(0, world.seconds[name] * 0.9))
        hits += process.process.is_alive()
        process.kill(signal.SIGKILL) if process.process.is_alive() else None
        process.wait()
        clean(process)
    world.ends_well(name, out)
    return hits


def die_in_write(seed: int) -> None:
    """Kill the process in one of its first writes: the file cut anywhere, or around its rename."""
    draw = random.Random(seed)
    where, when = draw.choice(["cut", "before", "after"]), draw.randint(1, 6)
    calls, fsync, replace, write = list[None](), os.fsync, Path.replace, Path.write_bytes

    def struck() -> bool:
        calls.append(None)
        return len(calls) == when

    def cut(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_file() and struck():
            content = path.read_bytes()
            least = content[:-1].rfind(b"\n") + 1 if path.suffix == ".jsonl" else 0  # only the last line is new
            os.ftruncate(descriptor, draw.randint(least, len(content)))
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    def cut_bytes(self: Path, content: bytes) -> int:
        if struck():
            write(self, content[: draw.randint(0, len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, content)

    def rename(self: Path, target: Path) -> Path:
        last = struck()
        done = replace(self, target) if where == "after" or not last else target
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    if where == "cut":
        os.fsync, Path.write_bytes = cut, cut_bytes  # type: ignore[assignment,method-assign]
    else:
        Path.replace = rename  # type: ignore[assignment,method-assign]


def killed_in_write(world: World, name: str, draw: random.Random) -> int:
    """As above: a file is the old one or the new one, never half of it."""
    world.end(name)
    out, hits = world.fresh(name), 0
    for _ in range(draw.randint(1, 3)):
        process = world.run(name, out, before=functools.partial(die_in_write, draw.randrange(2**32)))
        assert process.code in (0, -signal.SIGKILL), process.err
        hits += process.code != 0
    world.ends_well(name, out)
    return hits


def signalled(world: World, name: str, draw: random.Random) -> int:
    """Ends in time without a traceback: code 143, 130 or the signal's own before training; the same command goes on."""
    world.end(name)
    out, how = world.fresh(name), draw.choice(["term", "int", "int twice"])
    process = world.start(name, out)
    process.wait_for("begun")
    process.process.join(draw.uniform(0.001, world.seconds[name] * 0.7))
    if not process.process.is_alive():
        return 0
    process.kill(signal.SIGTERM if how == "term" else signal.SIGINT)
    if how == "int twice":
        process.process.join(draw.choice([0.0, 0.001, 0.05]))
        process.kill(signal.SIGINT) if process.process.is_alive() else None
    process.wait(30)
    clean(process)
    assert process.code in ((0, 143, -signal.SIGTERM) if how == "term" else (0, 130)), (how, process.code, process.err)
    if process.code == 130:
        last = process.err.strip().splitlines()[-1]
        assert "interrupted" in last or "continues" in last, process.err
    world.ends_well(name, out)
    return 1


@contextlib.contextmanager
def small_disk(place: Path, kib: int) -> Iterator[None]:
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k,mode=755", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise Unable("only root may mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def full_disk(world: World, name: str, draw: random.Random) -> int:
    """Code 2 and one line that says to make room (an evaluation: its result and a note); with room, as undisturbed."""
    world.end(name)
    end = world.root / f"end-{name.replace(' ', '-')}"
    disk = world.root / f"disk{world.count}"
    given = 0 if name in METHODS else 8 + sum(
        -(-(world.trained() / file).stat().st_size // 4096) * 4 for file in ("checkpoint.pth", "log.jsonl"))
    needed = sum(-(-file.stat().st_size // 4096) * 4 for file in end.rglob("*") if file.is_file()) + 16
    with small_disk(disk, given + draw.randint(8, max(16, needed - given))):
        out = world.fresh(name, disk / "out")
        process = world.run(name, out)
        if process.code:
            one_fault(process, "No space left on device")
        else:
            clean(process)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        world.ends_well(name, out)
    return process.code != 0 or "No space" in process.err


def nobody() -> None:
    """Root may write anywhere: go on as somebody else."""
    codecs.lookup("utf-8-sig")  # read while Python's own folder, which may lie below root's, can still be read
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def not_writable(world: World, name: str, draw: random.Random) -> int:
    """Code 2 and one line (an evaluation: its result and a note); given the right again, as undisturbed."""
    if os.geteuid():
        raise Unable("only root can become somebody else")
    world.end(name)
    out = world.fresh(name)
    for path in [out, *out.iterdir()]:
        os.chown(path, 65534, 65534)
    out.chmod(0o555) if (early := name not in METHODS or draw.random() < 0.5) else None
    process = world.start(name, out, before=nobody)
    if not early:
        end = time.monotonic() + DEADLINE
        while process.process.is_alive() and not (out / "checkpoint.pth").exists():
            assert time.monotonic() < end, "no checkpoint"
            time.sleep(0.005)
        out.chmod(0o555)
    process.wait(DEADLINE)
    if process.code or name in RUNS:
        one_fault(process, *([f"cannot write to {out}"] if early and name in METHODS else ["Permission denied"]))
    else:
        clean(process)
        assert "Permission denied" in process.err and json.loads(process.out.splitlines()[-1]), process.err
    out.chmod(0o755)
    world.ends_well(name, out, before=nobody)
    return 1


def damage(path: Path, draw: random.Random) -> str:
    """Truncate the file, flip bits in it, or overwrite a stretch; cached features have no checksum, and are cut."""
    content = bytearray(path.read_bytes())
    cached = path.parent.name == "features"
    how = draw.choice(["truncated"] if cached else ["truncated", "flipped", "flipped", "zeros"])
    spot = draw.randrange(len(content))
    if how == "truncated":
        content = content[:spot]
    elif how == "flipped":
        content[spot] ^= 1 << draw.randrange(8)
    else:
        end = min(len(content), spot + 512)
        content[spot:end] = bytes(end - spot)
    path.write_bytes(content)
    return f"{how} at {spot} of {path}"


def damaged(world: World, name: str, draw: random.Random) -> int:
    """Refused in one line that names the file, which stays; or harmless: the end is the undisturbed one. Cached
    features are only cut: nothing notices a bit of them."""
    world.end(name)
    out = world.fresh(name)
    if name in RUNS:  # stopped somewhere, so that there is something to go on from
        process = world.start(name, out)
        process.wait_for("begun")
        process.process.join(draw.uniform(world.seconds[name] * 0.3, world.seconds[name]))
        process.kill(signal.SIGKILL) if process.process.is_alive() else None
        process.wait()
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.stat().st_size
                   and path.suffix in (".pth", ".jsonl", ".json", ".bin", ".npz", ".txt"))
    if not files:
        return 0
    path = draw.choice(files)
    what, content = damage(path, draw), path.read_bytes()
    process = world.run(name, out)
    clean(process)
    if process.code:
        one_fault(process, path.name)
        assert path.read_bytes() == content, f"{what}: the file has changed"
        if path.name == "checkpoint.pth" and name in RUNS:
            path.unlink()
            world.ends_well(name, out)
    elif path.name not in ("log.jsonl", "eval.jsonl", "images.txt") and path.suffix != ".npz":
        try:
            same(world.end(name), found(name, out))
        except AssertionError as error:
            raise AssertionError(f"{what} went unnoticed: {error}") from None
    return 1


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def hostile(world: World, name: str, draw: random.Random) -> int:
    """Refused in one line that names the file; nothing in it runs; the file stays as it is."""
    out = world.fresh(name)
    words, path = list[str | Path](), out / "network.pth"
    if name in METHODS or name.startswith("figures"):
        path = out / "checkpoint.pth"
    if name == "deepcluster" and draw.random() < 0.5:
        words = ["--assign", "shapes"]
    elif name in ("eval_detection", "eval_segmentation") and draw.random() < 0.5:
        path = out / "checkpoint.pth"
    form, bomb = draw.choice(["zip", "legacy", "pickle", "nested"]), Bomb(out / "executed")
    buffer = io.BytesIO()
    if form == "pickle":
        pickle.dump(bomb, buffer)
    elif form == "nested":
        saved = torch.load(world.trained() / "checkpoint.pth", weights_only=True)
        saved["state"]["encoder"]["backbone.conv1.weight"] = bomb
        torch.save(saved, buffer)
    else:
        torch.save(dict(state=bomb), buffer, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(buffer.getvalue())
    one_fault(world.run(name, out, *words), path.name)
    assert path.read_bytes() == buffer.getvalue() and not (out / "executed").exists()
    return 1


def photographs(folder: Path, count: int, draw: random.Random, side: int = 24) -> None:
    """`count` images of noise."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def strange_image(kind: str, folder: Path) -> tuple[Path, bool]:
    """An image of this kind in `folder`: its path, and whether it can be read."""
    path = folder / f"{kind}.jpg"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), np.uint8))
    if kind == "truncated":
        picture.save(path)
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "empty":
        path.touch()
    elif kind == "garbage":
        path.write_bytes(random.Random(0).randbytes(3000))
    elif kind == "no image":
        path.write_text("<html>404</html>")
    elif kind == "broken link":
        path.symlink_to(folder / "gone")
    elif kind == "not permitted":
        picture.save(path)
        path.chmod(0)
    elif kind == "cmyk":
        picture.convert("CMYK").save(path)
    elif kind == "16 bits":
        path = path.with_suffix(".png")
        Image.fromarray(np.arange(24 * 30, dtype=np.uint16).reshape(24, 30) * 90).save(path)
    elif kind == "palette":
        path = path.with_suffix(".png")
        picture.quantize(9).save(path, transparency=1)
    elif kind == "animated":
        path = path.with_suffix(".gif")
        picture.save(path, save_all=True, append_images=[picture.rotate(90)] * 3)
    elif kind == "1x1":
        picture.resize((1, 1)).save(path)
    elif kind == "wide":
        picture.resize((20_000, 24)).save(path)
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.save(path, exif=exif)
    elif kind == "wrong suffix":
        picture.save(path, "PNG")
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(folder.parent, target_is_directory=True)
    readable = kind not in ("truncated", "empty", "garbage", "no image", "broken link", "not permitted")
    return path, readable


KINDS = ["truncated", "empty", "garbage", "no image", "broken link", "not permitted", "cmyk", "16 bits", "palette",
         "animated", "1x1", "wide", "exif", "wrong suffix", "directory", "loop"]


def bad_images(world: World, name: str, draw: random.Random) -> int:
    """What can be read is used; what cannot is named in one line, or once each where --max-bad-images allows it."""
    out = world.fresh(name)
    os.chown(out, 65534, 65534) if not os.geteuid() else None
    for part in ("train", "val"):
        for label in "ab":
            photographs(out / "data" / part / label, 10, draw)
    kinds = draw.sample(KINDS, draw.randint(1, 4))
    made = [strange_image(kind, out / "data/train/a") for kind in kinds]
    bad = sorted(path.name for path, readable in made if not readable)
    plain_files = sum(path.is_symlink() or path.is_file() for path, _ in made if path.name != "loop.jpg")
    words: list[str | Path] = ["--data", out / "data", "--image-size", "16", "--subset", str(20 + plain_files),
                               "--cache", draw.choice(["host", "none"]), "--workers", "0"]
    before = None if os.geteuid() else nobody
    first = world.run(name, out, *words, before=before)
    clean(first)
    if bad:
        one_fault(first, "cannot read the image", "--max-bad-images")
        assert any(path in first.err for path in bad), first.err
        first = world.run(name, out, *words, "--max-bad-images", str(len(bad)), before=before)
        clean(first)
        named = [Path(line.split(": ", 1)[1]).name for line in first.err.splitlines() if line.startswith("unreadable")]
        assert sorted(set(named)) == bad == sorted(named), (first.err, kinds)
    assert first.code == 0, (first.err, kinds)
    return len(kinds)


def changed_data(world: World, name: str, draw: random.Random) -> int:
    """Refused in one line, the checkpoint stays as it is; with the data as they were the run goes on."""
    out = world.fresh(name)
    for part in ("train", "val"):
        for label in "ab":
            photographs(out / "data" / part / label, 10, draw)
    words: list[str | Path] = ["--data", out / "data", "--image-size", "16", "--subset", "20",
                               "--schedule", "constant", "--epochs"]
    assert world.run(name, out, *words, "1").code == 0
    before = (out / "checkpoint.pth").read_bytes()
    victim = draw.choice(sorted((out / "data/train").rglob("*.png")))
    content, how = victim.read_bytes(), draw.choice(["replaced", "renamed", "removed and subset"])
    if how == "replaced":
        Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(victim)
    elif how == "renamed":
        victim.rename(victim.parents[1] / "a" / "zzz.png")
    else:
        victim.unlink()
        words[words.index("20")] = "19"
    process = world.run(name, out, *words, "3")
    assert (out / "checkpoint.pth").read_bytes() == before or how == "renamed"
    if process.code or how != "renamed":  # renamed within the order of the images it may be the same set
        one_fault(process, "other data")
        (victim.parents[1] / "a" / "zzz.png").unlink(missing_ok=True)
        victim.write_bytes(content)
        words[words.index("19") if "19" in words else words.index("20")] = "20"
        assert world.run(name, out, *words, "3").code == 0
    return 1


STRANGE = [b"with space", b"caf\xe9", b"\xff\xfe", b"new\nline", b"quo'te\"s", b"--output", b"*", b"{x}%s",
           b"\xe2\x98\x83"]


def strange_names(world: World, name: str, draw: random.Random) -> int:
    """Spaces, line breaks, quotes and bytes that are no UTF-8, of folders and images, change nothing."""
    parts = [os.fsdecode(part) for part in draw.sample(STRANGE, 2)]
    folder = world.root / f"trial{world.count}-{parts[0]}"
    folder.mkdir()
    out = world.fresh(name, folder / f"x{parts[1]}")
    if name in METHODS:
        for part in ("train", "val"):
            photographs(out / "data" / part / parts[0], 10, draw)
            photographs(out / "data" / part / parts[1], 10, draw)
        for i, other in enumerate((out / "data/train" / parts[0]).iterdir()):
            other.rename(other.with_name(f"{i}{parts[1]}.png"))
        more = ["--data", out / "data", "--image-size", "16", "--subset", "20", "--cache"]
        more.append(draw.choice(["host", "none"]))
        process = start(name, [*world.argv(name, out), *map(str, more)], functools.partial(begin, None)).wait(DEADLINE)
        clean(process)
        assert process.code == 0, process.err
    else:
        process = world.run(name, out)
        assert process.code == 0, process.err
        same(world.end(name), found(name, out))
    return 1


def bare(world: World, name: str, draw: random.Random) -> int:
    """No HOME, the C locale, an installation and a working folder that cannot be written: the end is the same."""
    world.end(name)
    out = world.fresh(name)
    chosen = dict(OMP_NUM_THREADS="1", PATH="/usr/bin:/bin") | draw.choice([
        dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"), dict(LC_ALL="C"), dict(HOME="/nonexistent"),
        dict(LC_ALL="xx_YY.UTF-99", LANG="nonsense", HOME=""),
    ])
    disk = world.root / f"disk{world.count}"
    with small_disk(disk, 4096):
        for path in ROOT.glob("*.py"):
            shutil.copy(path, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = subprocess.run([sys.executable, str(disk / f"{name.split()[0]}.py"), *world.argv(name, out)], cwd=disk,
                              env=chosen, capture_output=True, text=True, timeout=4 * DEADLINE)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    same(world.end(name), found(name, out))
    return 1


def clock(seed: int) -> None:
    """A wall clock that jumps to and fro."""
    draw = random.Random(seed)
    time.time = lambda: draw.choice([0.0, -1e6, 1e9, 4e9, draw.uniform(0, 4e9)])


def odd_clock(world: World, name: str, draw: random.Random) -> int:
    """A wall clock that jumps, and files from 1970 or 2100: the end is the same."""
    out = world.fresh(name)
    process = world.start(name, out, before=functools.partial(clock, draw.randrange(2**32)))
    process.wait_for("begun")
    process.process.join(draw.uniform(0, world.seconds.get(name, 2)))
    process.kill(signal.SIGKILL) if process.process.is_alive() else None
    process.wait()
    for path in out.rglob("*"):
        os.utime(path, (stamp := draw.choice([0, 4_102_444_800]), stamp))
    world.ends_well(name, out, before=functools.partial(clock, draw.randrange(2**32)))
    return 1


def two_at_once(world: World, name: str, draw: random.Random) -> int:
    """One of them ends as if alone; the other is refused in one line, finds it finished, or shares the work."""
    world.end(name)
    out = world.fresh(name)
    processes = [world.start(name, out)]
    processes[0].process.join(draw.choice([0.0, draw.uniform(0, world.seconds[name])]))
    processes.append(world.start(name, out))
    for process in processes:
        process.wait(DEADLINE)
        clean(process)
        if process.code:
            one_fault(process, "in use by another run")
    assert any(process.code == 0 for process in processes), [process.err for process in processes]
    world.ends_well(name, out)
    return 1


def rank_of(rank: int, port: int) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def two_ranks(world: World, name: str, out: Path) -> list[Process]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    more = ["--batch-size", "16"] if name in METHODS else []
    return [world.start(name, out, *more, before=functools.partial(rank_of, rank, port)) for rank in (0, 1)]


def dead_rank(world: World, name: str, draw: random.Random) -> int:
    """The other rank ends in time with code 2 and one line; the same command on two ranks goes on to the end."""
    out = world.fresh(name)
    processes = two_ranks(world, name, out)
    processes[0].wait_for("step 1/", DEADLINE)
    processes[0].process.join(draw.uniform(0, world.seconds.get(name, 2) * 0.8))
    victim = draw.randrange(2)
    hit = all(process.process.is_alive() for process in processes)
    processes[victim].kill(signal.SIGKILL) if hit else None
    for process in processes:
        process.wait(DEADLINE)
        clean(process)
    if hit and processes[1 - victim].code:
        one_fault(processes[1 - victim], "another rank ended")
    for process in two_ranks(world, name, out):
        assert process.wait(DEADLINE).code == 0, process.err
    assert not list(out.rglob("*.tmp"))
    return hit


def at_call(count: int, what: Callable[[Any], Any]) -> None:
    """From the `count`-th normalised batch of training images on, `what` happens to one."""
    calls = list[None]()

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def normalize(*args: Any, **options: Any) -> Any:
            images = original(*args, **options)
            if torch.is_grad_enabled():
                calls.append(None)
                if len(calls) == count:
                    return what(images)
            return images

        return normalize

    common.ImageSet.normalize = wrap(common.ImageSet.normalize)  # type: ignore[method-assign]
    common.normalize = wrap(common.normalize)


def poison(count: int, value: float) -> None:
    at_call(count, lambda images: images * value)


def not_finite(world: World, name: str, draw: random.Random) -> int:
    """Code 2 and one line that names the step and --lr; the checkpoint before is whole, and the run ends from there."""
    world.end(name)
    out, count = world.fresh(name), draw.randint(1, 12 if name in METHODS else 4)
    process = world.run(name, out, before=functools.partial(poison, count, draw.choice([float("nan"), float("inf")])))
    one_fault(process, "not finite", "--lr")
    assert not (out / "backbone.pth").exists()
    world.ends_well(name, out)
    return 1


def out_of_memory(count: int, kind: int) -> None:
    error = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), MemoryError(),
             RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")][kind]

    def fail(images: Any) -> Any:
        raise error

    at_call(count, fail)
    if "eval_linear" in sys.argv[0] or "eval_knn" in sys.argv[0] or "figures" in sys.argv[0]:
        common.Encoder.embed = lambda *args: fail(None)  # type: ignore[method-assign]
        import eval_linear

        eval_linear.layer_features = lambda *args: fail(None)


def no_memory(world: World, name: str, draw: random.Random) -> int:
    """Code 2 and one line that names options to lower, all of which the script has; then as undisturbed."""
    world.end(name)
    out = world.fresh(name)
    before = functools.partial(out_of_memory, draw.randint(1, 4), draw.randrange(3))
    process = world.run(name, out, before=before)
    one_fault(process, "out of memory", "lower --")
    options = subprocess_help(name)
    for option in re.findall(r"--[a-z][a-z-]+", process.err):
        assert option in options, f"{option} is no option of {name}"
    world.ends_well(name, out)
    return 1


@functools.cache
def subprocess_help(name: str) -> str:
    words = [*name.split()[1:], "--help"]
    return run(name.split()[0], words).out


def limits() -> None:
    """So that a huge value meets the limit of this process, not that of the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


EXTREMES = ["0", "1", "2", "3", "7", "-1", "nan", "inf", "1e-30", "1e30", "0.999", "1e-8", "1000", "65536",
            "9007199254740992", "99999999999999999999", "-0.0", "1_0", "٣"]


def odd_option(world: World, name: str, draw: random.Random) -> int:
    """It ends with 0, or with 2 and one line, or works on until Ctrl-C, once or twice: never a traceback."""
    out = world.fresh(name)
    action = draw.choice(numeric_options(name))
    count = action[1] if isinstance(action[1], int) else 1
    values = [draw.choice(EXTREMES) for _ in range(count)]
    words = [action[0], *values] if count != 1 else [f"{action[0]}={values[0]}"]
    process = world.start(name, out, *words, before=limits)
    process.process.join(15)
    for seconds in (5, 20):
        if process.process.is_alive():
            process.kill(signal.SIGINT)
            process.process.join(seconds)
    assert not process.process.is_alive(), f"{words} hangs"
    try:
        clean(process)
        assert process.code in (0, 2, 130), (process.code, process.err)
        if process.code == 2:
            one_fault(process)
    except AssertionError as error:
        raise AssertionError(f"{' '.join(words)}: {error}") from None
    return 1


@functools.cache
def numeric_options(name: str) -> list[tuple[str, Any]]:
    """The options of a script that take a number, with how many."""
    import importlib

    module, found = importlib.import_module(name.split()[0]), list[argparse.ArgumentParser]()
    original = argparse.ArgumentParser.parse_args
    try:
        def capture(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
            found.append(self)
            raise KeyboardInterrupt

        argparse.ArgumentParser.parse_args = capture  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            module.parse_args([])
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    actions = found[0]._actions
    if name.startswith("figures"):
        actions = next(a for a in actions if isinstance(a.choices, dict)).choices[name.split()[1]]._actions
    return [(action.option_strings[-1], action.nargs) for action in actions
            if action.option_strings and action.type not in (None, Path, str)]


def closed_output(world: World, name: str, draw: random.Random) -> int:
    """Whoever reads the output may leave, as head does: no traceback, and the same command goes on."""
    world.end(name)
    out = world.fresh(name)
    process = world.run(name, out, before=functools.partial(close_stdout, draw.randint(0, 3)))
    clean(process)
    assert process.code in (0, 2), process.err
    world.ends_well(name, out)
    return 1


def close_stdout(lines: int) -> None:
    """A pipe whose reader leaves after some lines."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", 1, closefd=False)
    write, count = sys.stdout.write, [0]

    def counted(text: str) -> int:
        count[0] += text.count("\n")
        if count[0] > lines:
            with contextlib.suppress(OSError):
                os.close(reader)
        return write(text)

    sys.stdout.write = counted  # type: ignore[method-assign]


def tasks(folder: Path) -> list[int]:
    """The processes that run a local job of this folder."""
    found = list[int]()
    for place in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (place / "cmdline").read_bytes().decode(errors="replace")
            if "submitit.core._submit" in words and str(folder) in words:
                found.append(int(place.name))
    return found


def submission(world: World, name: str, draw: random.Random) -> int:
    """The job killed, the submission stopped by TERM or Ctrl-C or killed (then its job goes on alone), a full disk:
    an exit code and one line, no folder half-made; the same command ends as the undisturbed script does."""
    world.end("npid")
    how = draw.choice(["job killed", "term", "int", "killed", "full disk"])
    disk = world.root / f"disk{world.count}"
    with small_disk(disk, draw.randint(8, 1200)) if how == "full disk" else contextlib.nullcontext():
        out = world.fresh("npid", disk / "out" if how == "full disk" else None)
        command = [sys.executable, ROOT / "slurm" / "submit.py", "--cluster", "local", "--gpus", "0", "--hours", "0.1",
                   ROOT / "npid.py", *world.argv("npid", out / "run")]
        start = functools.partial(subprocess.Popen[str], list(map(str, command)), cwd=out, text=True,
                                  env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE)
        process, end = start(), time.monotonic() + DEADLINE
        if how != "full disk":
            while not tasks(out):
                assert process.poll() is None and time.monotonic() < end, "no job"
                time.sleep(0.05)
            time.sleep(draw.uniform(0, 3 + world.seconds["npid"]))
        for victim in tasks(out) if how == "job killed" else [process.pid] * (how != "full disk"):
            numbers = dict(term=signal.SIGTERM, int=signal.SIGINT)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, numbers.get(how, signal.SIGKILL))
        _, error = process.communicate(timeout=DEADLINE)
        assert "Traceback" not in error and process.returncode in (0, 2, 130, 143, -signal.SIGKILL), (how, error)
        if process.returncode not in (0, -signal.SIGKILL):
            lines = [line for line in error.splitlines() if ": error: " in line]
            assert len(lines) == 1 and lines == error.splitlines()[-1:], (how, error)
        if how == "full disk":
            assert "No space left on device" in error or process.returncode == 0, error
            assert all((folder / "code" / "COMMIT").exists() for folder in out.glob("slurm/*")), "half a folder"
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        while tasks(out):
            assert time.monotonic() < end, "the job does not end"
            time.sleep(0.05)
        again = start()
        assert again.wait(DEADLINE) == 0, again.communicate()
        again.communicate()
        assert not list(out.rglob("*.tmp"))
        same(world.end("npid"), found("npid", out / "run"))
    return 1


class Unable(Exception):
    """This machine cannot make this fault."""


class Fault(NamedTuple):
    name: str
    scripts: list[str]
    trial: Callable[[World, str, random.Random], int]
    share: int = 1  # of the trials

    @property
    def promise(self) -> str:
        return " ".join((self.trial.__doc__ or "").split())


FAULTS = [
    Fault("kill -9 at a random moment", EVERY, killed, 6),
    Fault("kill -9 inside a write", EVERY, killed_in_write, 3),
    Fault("SIGTERM, SIGINT, SIGINT twice", EVERY, signalled, 2),
    Fault("full disk", EVERY, full_disk, 2),
    Fault("no right to write", EVERY[:-2], not_writable),
    Fault("truncated, flipped bits, zeros in any file", EVERY, damaged, 3),
    Fault("hostile checkpoint", [*METHODS, *NETWORK], hostile),
    Fault("strange and bad images", [*METHODS, "eval_knn"], bad_images, 2),
    Fault("data that change between runs", METHODS, changed_data),
    Fault("strange names", EVERY, strange_names),
    Fault("no HOME, locale, read-only installation", ["npid", "eval_knn", "figures curves"], bare),
    Fault("odd clock", EVERY, odd_clock),
    Fault("two runs on one folder", EVERY, two_at_once),
    Fault("a rank killed", [*METHODS, "eval_detection", "eval_segmentation"], dead_rank),
    Fault("loss not finite", [*METHODS, "eval_detection", "eval_segmentation"], not_finite),
    Fault("out of memory", [*METHODS, *NETWORK], no_memory),
    Fault("any number for any numeric option", [n for n in EVERY if n != "figures curves"], odd_option, 3),
    Fault("output closed", EVERY, closed_output),
    Fault("a submission attacked", ["submit"], submission, 3),
]


# ---- the campaign ----------------------------------------------------------------------------------------------------


def attempt(world: World, fault: Fault, script: str, seed: int) -> int:
    return int(fault.trial(world, script, random.Random(f"{fault.name} {script} {seed}")))


@contextlib.contextmanager
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield World(Path(folder))


def write_table(counts: dict[str, dict[str, Any]]) -> None:
    """The counts, into the table of tests/README.md."""
    lines = ["| fault | scripts | promise | trials | struck | held |", "| --- | --- | --- | --: | --: | --: |"]
    for fault in FAULTS:
        row = counts.get(fault.name, dict(trials=0, struck=0, held=0))
        which = "all" if len(fault.scripts) == len(EVERY) else f"{len({name.split()[0] for name in fault.scripts})}"
        cells = fault.name, which, fault.promise, *(str(row[key]) for key in ("trials", "struck", "held"))
        lines.append(f"| {' | '.join(cells)} |")
    begin, end = "<!-- counts -->\n", "<!-- end -->"
    text = TABLE.read_text()
    head, _, rest = text.partition(begin)
    TABLE.write_text(head + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--seed", type=int, default=0, help="of the first trial; the others count on from it")
    options.add_argument("--only", default="", help="faults whose name holds this")
    options.add_argument("--script", default="", help="this script alone")
    options.add_argument("--replay", nargs=3, metavar=("FAULT", "SCRIPT", "SEED"))
    options.add_argument("--add", action="store_true", help="to the counts that are there, and write the table")
    args = options.parse_args()
    if args.replay:
        fault = next(fault for fault in FAULTS if fault.name == args.replay[0])
        with world() as place:
            print("struck", attempt(place, fault, args.replay[1], int(args.replay[2])))
        return
    pairs = [(fault, name) for fault in FAULTS for name in fault.scripts
             if args.only in fault.name and args.script in name]
    todo = [pair for pair in pairs for _ in range(pair[0].share)]
    counts: dict[str, dict[str, Any]] = json.loads(COUNTS.read_text()) if args.add and COUNTS.exists() else {}
    end, seed, draw, failures = time.monotonic() + 60 * args.minutes, args.seed, random.Random(args.seed), 0
    with world() as place:
        while time.monotonic() < end:
            draw.shuffle(todo)
            for fault, name in todo:
                if time.monotonic() > end:
                    break
                row = counts.setdefault(fault.name, dict(trials=0, struck=0, held=0))
                seed, began = seed + 1, time.monotonic()
                try:
                    struck, problem = attempt(place, fault, name, seed), ""
                except Unable as error:
                    print(f"{fault.name}: {error}", flush=True)
                    continue
                except Exception as error:
                    failures, struck = failures + 1, 1
                    problem = f"{type(error).__name__}: {error}"
                    traceback.print_exc()
                row["trials"], row["struck"], row["held"] = (
                    row["trials"] + 1, row["struck"] + struck, row["held"] + (not problem))
                took = round(time.monotonic() - began, 1)
                print(json.dumps(dict(fault=fault.name, script=name, seed=seed, struck=struck, seconds=took,
                                      problem=problem)), flush=True)
                for left in place.root.glob("trial*"):
                    shutil.rmtree(left, ignore_errors=True)
                if args.add:
                    COUNTS.write_text(json.dumps(counts, indent=1) + "\n")
    if args.add:
        write_table(counts)
    print(json.dumps(dict(trials=sum(row["trials"] for row in counts.values()), failures=failures)))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
