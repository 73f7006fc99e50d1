"""Bad input ends with exit code 2 and one line on stderr, never a traceback, and leaves nothing half-written."""

import argparse
import errno
import fcntl
import functools
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import TINY, checkpoint, one_line, run, same, start
from PIL import Image
from torch import Tensor, nn

import common
import eval_knn
import eval_linear
import npid


def images(folder: Path, count: int, side: int = 16) -> Path:
    """A class of `count` small images."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def train(tmp_path: Path) -> list[str]:
    return [*TINY, "--output", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert run("npid", [*TINY, "--output", output]).code == 0
    return output


def nothing_written(output: Path) -> None:
    assert not output.exists() or {path.name for path in output.iterdir()} <= {"lock", "log.jsonl"}


# data


def test_missing_and_empty_data(train: list[str], tmp_path: Path) -> None:
    """A missing directory, one without images, and a named set that is not there are named."""
    one_line(run("npid", [*train, "--data", str(tmp_path / "nowhere")]), f"no directory {tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    one_line(run("npid", [*train, "--data", str(tmp_path / "empty")]), "no images in", "empty")
    one_line(run("npid", [*train, "--data", "imagenet", "--data-dir", str(tmp_path)]), str(tmp_path / "imagenet"))
    nothing_written(tmp_path / "out")


def no_network() -> None:
    import torchvision

    def fail(self: Any, root: str, download: bool) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    torchvision.datasets.CIFAR10.__init__ = fail
    torchvision.datasets.STL10.__init__ = fail


def test_download_fails(train: list[str], tmp_path: Path) -> None:
    """Without the network a named set ends with one line that says what else to do."""
    for name in ("cifar10", "stl10"):
        process = run("npid", [*train, "--data", name, "--data-dir", str(tmp_path)], before=no_network)
        lines = process.err.splitlines()
        assert process.code == 2 and lines[-1].startswith("npid.py: error: ") and "--data-dir" in lines[-1]
        assert lines[:-1] == [f"downloading {name.upper()} to {tmp_path}"]
    nothing_written(tmp_path / "out")


def test_downloads_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that is being unpacked is not seen by other runs; one that another run has completed meanwhile stays."""
    import torchvision

    args, folder = npid.parse_args(["--data", "stl10", "--data-dir", str(tmp_path / "data")]), Path("stl10_binary")

    def fetch(root: str, download: bool) -> None:
        assert not (args.data_dir / folder).exists()
        (Path(root) / folder).mkdir()
        (Path(root) / folder / "ours").touch()

    def fetch_beside_another(root: str, download: bool) -> None:
        (args.data_dir / folder).mkdir()
        (Path(root) / folder).mkdir()

    for fetched, files in ((fetch, ["ours"]), (fetch_beside_another, [])):
        monkeypatch.setattr(torchvision.datasets, "STL10", fetched)
        common._download(args, "STL10", args.data_dir / folder)
        assert [file.name for file in (args.data_dir / folder).iterdir()] == files
        assert [file.name for file in args.data_dir.iterdir()] == [folder.name]
        shutil.rmtree(args.data_dir / folder)


def test_gpu_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank takes the GPU of its number, or the only one it sees where SLURM has bound it to that; else a fault."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for seen, slurm, device in ((2, "1", 1), (1, "1", 0), (1, "0", None), (2, "0", 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda seen=seen: seen)
        monkeypatch.setenv("SLURM_LOCALID", slurm)  # 0 of a launcher that is itself SLURM's one task
        if device is None:
            with pytest.raises(common.Fault, match="rank 1 of this node has no GPU"):
                common.pick_device("cuda")
        else:
            assert common.pick_device("cuda") == torch.device("cuda", device)


def test_gpus_that_are_not_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A job with GPUs whose PyTorch sees none says so before it takes the CPU, unless they were hidden from it."""
    for name, value in (("is_available", False), ("device_count", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert common.pick_device(None).type == "cpu" and capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    assert common.pick_device(None).type == "cpu" and "this PyTorch sees none" in capsys.readouterr().err
    for nothing in ("-1", "NoDevFiles"):  # by hand, by SLURM
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert common.pick_device(None).type == "cpu" and capsys.readouterr().err == ""


@pytest.mark.parametrize("cache", ["host", "none"])
def test_unreadable_images(cache: str, train: list[str], tmp_path: Path) -> None:
    """An unreadable image is named; --max-bad-images tolerates some, each named once, and no more than that."""
    folder = images(tmp_path / "data" / "a", 40)
    whole = (folder / "0.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "7.jpg").write_bytes(os.urandom(500))
    command = [*train, "--data", str(tmp_path / "data"), "--subset", "41", "--cache", cache, "--workers", "1"]
    first = run("npid", command)
    one_line(first, "cannot read the image", "--max-bad-images")
    assert "3.png" in first.err or "7.jpg" in first.err
    second = run("npid", [*command, "--max-bad-images", "1"])
    assert second.code == 2 and second.err.count("error: cannot read the image") == 1
    third = run("npid", [*command, "--max-bad-images", "2"])
    assert third.code == 0, third.err
    assert sorted(Path(line.split(": ")[1]).name for line in third.err.splitlines()) == ["3.png", "7.jpg"]


def test_too_few_images(train: list[str]) -> None:
    """Fewer images than the batch, and a subset larger than the set, are refused."""
    one_line(run("npid", [*train, "--batch-size", "65"]), "--batch-size 65 is more than the 64 images")
    one_line(run("npid", [*train, "--batch-size", "15", "--accumulate", "2"]), "--batch-size 15", "accumulate")


def test_more_neighbours_than_images(trained: Path) -> None:
    """K larger than the number of training images is refused, and no result is written."""
    command = [trained / "checkpoint.pth", "--subset", "64", "--test-subset", "20"]
    one_line(run("eval_knn", [*command, "--k", "65"]), "--k 65 is more than the 64")
    assert not (trained / "eval.jsonl").exists()


# options


def refused(module: Any, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Assert that parsing ends with code 2 and one line; returns it."""
    with pytest.raises(SystemExit) as stop:
        module.parse_args(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "error: " in lines[0], lines
    return lines[0]


def test_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown architectures, presets, options and abbreviations are refused with what there is."""
    assert "alexnet" in refused(npid, ["--arch", "resnet19"], capsys)
    assert "near it: cifar10, " in refused(npid, ["--preset", "cifar11"], capsys)
    assert "--temp" in refused(npid, ["--temp", "0.1"], capsys)
    assert "--nonsense" in refused(npid, ["--nonsense"], capsys)
    assert "checkpoint" in refused(eval_knn, [], capsys)


class Captured(Exception):
    pass


def actions(module: Any) -> list[argparse.Action]:
    """The options of a script that take a number."""

    def capture(self: argparse.ArgumentParser, *args: object, **options: object) -> None:
        raise Captured(self)

    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = capture  # type: ignore[assignment,method-assign]
    try:
        module.parse_args([])
    except Captured as captured:
        found = captured.args[0]._actions
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    return [action for action in found if action.type not in (None, Path, str)]


NUMBERS = [(module, action) for module in (npid, eval_knn, eval_linear) for action in actions(module)]
ZERO = {"max_bad_images", "workers", "seed", "save_minutes", "knn_every", "weight_decay", "momentum", "bank_momentum",
        "proximal_weight", "dropout"}
COUNTS = {"epochs", "seed", "knn_every", "max_bad_images", "num_neighbors", "num_negatives", "accumulate", "batch_size",
          "lr_drops", "num_clusters", "layer_size", "per_class", "draws", "folds", "image_batch"}
SHARES = {"momentum", "bank_momentum"}


@pytest.mark.parametrize(
    ("module", "action"), NUMBERS, ids=[f"{module.__name__}-{action.dest}" for module, action in NUMBERS]
)
def test_bad_numbers(module: Any, action: argparse.Action, capsys: pytest.CaptureFixture[str]) -> None:
    """Every numeric option refuses what is not a number, nan, infinities, negative, and 0 or huge where senseless."""
    option, base = action.option_strings[-1], ["checkpoint.pth"] * (module is not npid)
    bad = ["x", "", "nan", "inf", "-inf", "-1", "1e400", "9" * 5000]
    bad += ["0"] * (action.dest not in ZERO)
    bad += ["9" * 400] * (action.dest in COUNTS) + ["1.5"] * (action.dest in SHARES | COUNTS)
    for text in bad:
        assert option in refused(module, [*base, f"{option}={text}"], capsys), text
    if action.dest in ZERO:
        module.parse_args([*base, f"{option}=0"])


def test_huge_sizes(train: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes that no machine holds are refused by name, and those that only this one does not by what to lower."""
    for option in ("--width", "--feature-dim", "--image-size"):
        assert option in refused(npid, [option, "100000"], capsys)
    one_line(run("npid", [*train, "--width", "60000", "--arch", "resnet101"]), "out of memory")


def test_no_cuda(train: list[str], tmp_path: Path) -> None:
    """--device cuda without CUDA is refused."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    one_line(run("npid", [*train, "--device", "cuda"]), "--device cuda", "--device cpu")
    assert not (tmp_path / "out").exists()


# checkpoints


def damaged(trained: Path, output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    output.mkdir()
    saved = torch.load(trained / "checkpoint.pth", weights_only=True)
    change(saved)
    torch.save(saved, output / "checkpoint.pth")


CHANGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda saved: saved["options"].update(script="cld"), "was written by cld, not npid"),
    (lambda saved: saved["data"].update(name="cifar10", checksum="0"), "other data (cifar10"),
    (lambda saved: saved["data"].update(images=63), "63 images, not shapes, 64; images differ"),
    (lambda saved: saved["data"].update(checksum="0"), "checksum differ"),
    (lambda saved: saved["state"].pop("bank"), "does not fit this code"),
    (lambda saved: saved["state"]["encoder"].pop("head.weight"), "does not fit this code"),
    (lambda saved: saved.pop("state"), "truncated or no checkpoint"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words for _, words in CHANGES])
def test_checkpoint_of_another_run(
    change: Callable[[dict[str, Any]], None], words: str, trained: Path, tmp_path: Path
) -> None:
    """A checkpoint of another method, data set or number of images is refused and left as it is."""
    damaged(trained, tmp_path / "out", change)
    before = (tmp_path / "out" / "checkpoint.pth").read_bytes()
    one_line(run("npid", [*TINY, "--output", tmp_path / "out"]), words, "--output")
    assert (tmp_path / "out" / "checkpoint.pth").read_bytes() == before


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class ScriptBomb(nn.Module):
    """TorchScript that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = str(path)

    def forward(self, images: Tensor) -> Tensor:
        return images

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.zeros(1), self.path)


def garbage(kind: str, trained: Path, folder: Path) -> bytes:
    """The content of a checkpoint that is none."""
    whole = (trained / "checkpoint.pth").read_bytes()
    if kind == "hostile":
        torch.save({"state": Bomb(folder / "executed")}, folder / "made")
    elif kind == "hostile legacy":
        torch.save({"state": Bomb(folder / "executed")}, folder / "made", _use_new_zipfile_serialization=False)
    elif kind == "hostile pickle":
        (folder / "made").write_bytes(pickle.dumps(Bomb(folder / "executed")))
    elif kind == "hostile TorchScript":
        torch.jit.script(ScriptBomb(folder / "executed")).save(folder / "made")
    elif kind == "truncated":
        (folder / "made").write_bytes(whole[: len(whole) // 2])
    elif kind == "cut short":
        (folder / "made").write_bytes(whole[:9000])
    elif kind == "empty":
        (folder / "made").write_bytes(b"")
    elif kind == "text":
        (folder / "made").write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        (folder / "made").write_bytes(np.random.default_rng(int(kind[-1])).bytes(5000))
    return (folder / "made").read_bytes()


GARBAGE = ["hostile", "hostile legacy", "hostile pickle", "hostile TorchScript", "truncated", "cut short", "empty",
           "text", "random 0", "random 1"]


@pytest.mark.parametrize("kind", GARBAGE)
def test_damaged_checkpoint(kind: str, trained: Path, tmp_path: Path) -> None:
    """Truncated, random or hostile files are no checkpoints, in training and evaluation; nothing in them runs."""
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "checkpoint.pth"
    path.write_bytes(content := garbage(kind, trained, tmp_path))
    (tmp_path / "made").unlink()
    one_line(run("npid", [*TINY, "--output", tmp_path / "out"]), str(path), "truncated or no checkpoint")
    one_line(run("eval_knn", [path, "--arch", "resnet18"]), str(path))
    assert path.read_bytes() == content and not (tmp_path / "executed").exists()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"checkpoint.pth", "lock"}


def test_flipped_bit_is_found(trained: Path, tmp_path: Path) -> None:
    """A bit that has flipped in a weight, of which PyTorch takes no notice, is: the checkpoint is refused."""
    content = bytearray((trained / "checkpoint.pth").read_bytes())
    weight = torch.load(trained / "checkpoint.pth")["state"]["bank"]["features"].numpy().tobytes()
    content[content.index(weight) + 100] ^= 16
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    torch.load(path)
    for load in (common.load_checkpoint, common.load_encoder):
        with pytest.raises(common.Fault, match="is damaged"):
            load(path)


def test_lines_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is added whole or, where the disk is full, not at all; half a line before it goes, a whole one ends."""
    path = tmp_path / "lines"
    path.write_text('{"half": ')
    common.append_line(path, "1")
    path.write_text(path.read_text() + '{"whole": 2}')
    common.append_line(path, "3")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", full)
        common.append_line(path, "4")
    common.append_line(path, "5")
    path.write_text(path.read_text() + '{"half')
    common.append_line(path, "6")
    assert path.read_text() == '1\n{"whole": 2}\n3\n5\n6\n'


def test_lines_of_two_writers(tmp_path: Path) -> None:
    """While one process adds a line to a file, another waits."""
    path = tmp_path / "lines"
    script = "import pathlib, common; print(flush=True); common.append_line(pathlib.{!r}, '2')"
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        writer = subprocess.Popen([sys.executable, "-c", script.format(path)], cwd=common.ROOT, stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(1)
        assert writer.poll() is None and not path.read_text()
        file.write("1\n")
    assert writer.wait(60) == 0 and path.read_text() == "1\n2\n"


def test_result_that_cannot_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result goes to eval.jsonl; where that cannot be written, a note says so, and the script goes on."""
    common.append_result(tmp_path, "1")
    assert (tmp_path / "eval.jsonl").read_text() == "1\n" and not capsys.readouterr().err
    common.append_result(tmp_path / "nowhere", "2")
    assert capsys.readouterr().err == f"note: cannot write {tmp_path / 'nowhere' / 'eval.jsonl'} ({os.strerror(2)})\n"


def test_links_that_lead_back(tmp_path: Path) -> None:
    """A link to a folder above is no folder of images: each is found once; other links are followed, in no circle."""
    images(tmp_path / "data" / "a", 3)
    images(tmp_path / "elsewhere", 2)
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert common._image_files(tmp_path / "data", None) == ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/1.png"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data" / "a", target_is_directory=True)
    (tmp_path / "data" / "a" / "forth").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(common._image_files(tmp_path / "data", None)) == 3 + 2 + 2 + 3  # in a, a/forth, b and b/back


def test_what_takes_less_memory() -> None:
    """Only options that the script has are named."""
    every = common.less_memory(npid.parse_args([]))
    assert every == "lower --batch-size, split each batch with --accumulate, or for small images use --cache host"
    assert "--accumulate" not in common.less_memory(eval_knn.parse_args(["random"]))
    assert "--" not in common.less_memory(argparse.Namespace())


# in the middle of a run


def at_step(step: int, value: float) -> Callable[..., torch.Tensor]:
    calls: list[None] = []
    original = common.bank_softmax

    def loss(z: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(None)
        losses = original(z, *args)
        return losses * value if len(calls) == step + 1 else losses

    return loss


def nan_at_step_six() -> None:
    common.bank_softmax = at_step(6, float("nan"))


def infinite_gradient_at_step_three() -> None:
    """The last step of an epoch, so that what follows is a save: the loss is finite, its gradient is not."""
    original, calls = common.bank_softmax, []

    def loss(z: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(None)
        losses = original(z, *args)
        return losses + ((z - z.detach()) * 1e-30).abs().sqrt().sum() if len(calls) == 4 else losses

    common.bank_softmax = loss


def test_images_too_small_for_the_network(train: list[str], tmp_path: Path) -> None:
    """Images that a network's pooling cannot take are named as such, with an option that the script has."""
    one_line(run("npid", [*train, "--arch", "alexnet", "--image-size", "8"]), "too small for alexnet", "--image-size")
    common.render_voc(tmp_path / "voc", 4, 2)
    small = run("eval_segmentation", ["random", "--arch", "alexnet", "--width", "4", "--crop", "32", "--data",
                                      tmp_path / "voc", "--output", tmp_path / "small", "--iterations", "1",
                                      "--workers", "0", "--device", "cpu"])
    one_line(small, "too small for alexnet: raise --crop or --test-size")


def test_loss_not_finite(train: list[str], tmp_path: Path) -> None:
    """A loss that is not finite ends the run with its step named; the checkpoint before it stays and goes on."""
    one_line(run("npid", train, before=nan_at_step_six), "the loss is not finite (epoch 2, step 3)", "--lr")
    saved = checkpoint(tmp_path / "out")
    assert (saved["epoch"], saved["step"]) == (1, 0) and not (tmp_path / "out" / "backbone.pth").exists()
    assert saved["state"]["bank"]["features"].isfinite().all()
    assert run("npid", train).code == 0
    assert run("npid", [*train, "--output", str(tmp_path / "whole")]).code == 0
    same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "out"))


def test_weights_not_finite(train: list[str], tmp_path: Path) -> None:
    """Weights that are not finite are never saved, even where the loss was finite."""
    one_line(run("npid", train, before=infinite_gradient_at_step_three), "not finite")
    nothing_written(tmp_path / "out")


def disk_full() -> None:
    """As a disk that fills up with the second checkpoint."""
    original, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        if calls.count("checkpoint.pth.tmp") == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    os.fsync = full


def test_full_disk(train: list[str], tmp_path: Path) -> None:
    """A full disk ends the run with one line; the checkpoint before is whole, and with room the run goes on."""
    one_line(run("npid", train, before=disk_full), "checkpoint.pth", "No space left on device")
    assert not (tmp_path / "out" / "backbone.pth").exists()
    assert checkpoint(tmp_path / "out")["epoch"] == 1 and not list((tmp_path / "out").glob("*.tmp"))
    assert run("npid", train).code == 0


def test_really_full_disk(tmp_path: Path) -> None:
    """The same on a file system that has room for the log alone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a file system")
    try:
        one_line(run("npid", [*TINY, "--output", disk / "out"]), "No space left on device", "make room")
        nothing_written(disk / "out")
        with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1024))
        one_line(run("npid", [*TINY, "--output", disk / "out"]), "No space left on device", "make room")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_read_only_output(train: list[str], tmp_path: Path) -> None:
    """An output where nothing can be written, or that is a file, is refused at the start."""
    (tmp_path / "file").write_text("")
    one_line(run("npid", [*train, "--output", str(tmp_path / "file")]), "cannot write to", "--output")
    one_line(run("npid", [*train, "--output", "/proc/nothing"]), "cannot write to /proc/nothing", "--output")
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() != 0:
        one_line(run("npid", [*train, "--output", str(tmp_path / "closed")]), "cannot write to", "--output")


def test_output_in_use(train: list[str]) -> None:
    """A second run in the folder of one at work is refused, whichever its options."""
    first = start("npid", [*train, "--epochs", "100000"])
    first.wait_for('"epoch"')
    one_line(run("npid", [*train, "--overwrite"]), "in use by another run")
    first.kill(9)
    first.wait()


def out_of_memory(error: Exception) -> None:
    def fail(*args: object) -> None:
        raise error

    common.bank_softmax = fail  # type: ignore[assignment]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...\nmore lines"),
    RuntimeError("CUDA error: out of memory\nmore lines"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
])
def test_out_of_memory(error: Exception, train: list[str]) -> None:
    """Too little memory, whoever asked for it, ends with one line that names what to lower."""
    one_line(run("npid", train, before=functools.partial(out_of_memory, error)), "--batch-size", "--accumulate")


def nccl_fails(group: bool, error: Exception) -> None:
    """NCCL fails on every rank, as in a container whose /dev/shm is too small. group: whether there is one by then."""
    dist.is_initialized = lambda: group
    out_of_memory(error)


SHM = "Error while creating shared memory segment /dev/shm/nccl-LeXlEJ (size 9637888)"


@pytest.mark.parametrize(("group", "error", "said"), [
    (True, dist.DistBackendError(
        "NCCL error in: NCCLUtils.hpp:268, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version "
        "2.21.5\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. \n"
        f"Last error:\n{SHM}"), SHM),
    # Since PyTorch 2.15, where the group and in it NCCL start at once
    (True, RuntimeError(f"NCCL AllReduce failed: unhandled system error \nNCCL Last Error: {SHM}"), SHM),
    (False, RuntimeError("Failed to initialize NCCL communicator: unhandled system error"), "unhandled system error"),
])
def test_nccl_itself_fails(group: bool, error: Exception, said: str, train: list[str]) -> None:
    """Where NCCL fails on all ranks, the reason that it gives is said: no other rank has a message of its own."""
    one_line(run("npid", train, before=functools.partial(nccl_fails, group, error)), "another rank ended", said)


def out_of_memory_in_resume() -> None:
    torch.optim.SGD.load_state_dict = lambda *args: out_of_memory_now()  # type: ignore[assignment,method-assign]


def out_of_memory_now() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")


def test_out_of_memory_in_resume(trained: Path, tmp_path: Path) -> None:
    """A checkpoint that finds no room on the GPU is not called unfit: no one is told to overwrite it."""
    shutil.copytree(trained, tmp_path / "out")
    process = run("npid", [*TINY, "--output", tmp_path / "out"], before=out_of_memory_in_resume)
    one_line(process, "out of memory: lower --batch-size")
    assert "--overwrite" not in process.err


OPTIONAL = ["faiss", "pycocotools", "submitit", "matplotlib"]


def test_optional_libraries_are_optional() -> None:
    """Every method and evaluation starts without what only some of their options need."""
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); import npid, local_aggregation, deepcluster"
    code += ", cld, eval_knn, eval_linear, eval_detection, eval_segmentation"
    subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, check=True)


def test_files_of_others_stay(tmp_path: Path) -> None:
    """A run removes what a killed one left half-written in --output, and nothing that it cannot have written."""
    for name in ("checkpoint.pth.tmp", "backbone.pth.tmp", "thesis.tmp"):
        (tmp_path / name).touch()
    common.Run(npid.parse_args([*TINY, "--output", str(tmp_path)])).lock.close()
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["thesis.tmp"]


def test_submission_without_submitit() -> None:
    """One line says what to install."""
    code = "import sys, runpy; sys.modules['submitit'] = None; runpy.run_path('slurm/submit.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "submit.py: error: submitit is missing: pip install submitit\n"


def killed_worker() -> None:
    original = common._Decoder.__getitem__

    def deadly(self: common._Decoder, item: object) -> object:
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), 9)
        return original(self, item)

    common._Decoder.__getitem__ = deadly  # type: ignore[assignment,method-assign]


def test_killed_worker(train: list[str], tmp_path: Path) -> None:
    """A worker that the system kills ends the run with one line."""
    images(tmp_path / "data", 20)
    command = [*train, "--data", str(tmp_path / "data"), "--cache", "none", "--workers", "1", "--subset", "20"]
    one_line(run("npid", command, before=killed_worker), "DataLoader worker", "--workers")


def test_an_unreadable_image_ends_the_decoding_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small images are decoded at once; after the first that is one too many the others are not waited for."""
    read, args = list[Path](), npid.parse_args(["--data", str(images(tmp_path / "data", 20)), "--cache", "none"])
    data = common.load(args, "pretrain", torch.device("cpu")).select(torch.arange(20).repeat(500))

    def fail(path: Path, *sizes: int) -> None:
        read.append(path)
        raise OSError

    monkeypatch.setattr(common, "central_square", fail)
    with pytest.raises(common.Fault, match="cannot read the image"):
        common._decode_small(data, True, None)
    assert len(read) < 5000


def mistake() -> None:
    common.crop_boxes = None  # type: ignore[assignment]


def test_mistake_in_a_worker(train: list[str], tmp_path: Path) -> None:
    """An exception in a worker that no one expects ends the run with its traceback: no worker is waited for."""
    images(tmp_path / "data", 20)
    command = [*train, "--data", str(tmp_path / "data"), "--cache", "none", "--workers", "2", "--subset", "20"]
    done = run("npid", command, before=mistake)
    assert done.code == 1 and "TypeError: 'NoneType' object is not callable" in done.err


def unsupported_gpu() -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    common.crop_boxes = fail  # type: ignore[assignment]


def test_unsupported_gpu(train: list[str]) -> None:
    """A GPU too old or too new for the build of PyTorch is one line."""
    one_line(run("npid", train, before=unsupported_gpu), "no kernels for this GPU", "--device cpu")


def full_shared_memory() -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    common.crop_boxes = fail  # type: ignore[assignment]


def test_full_shared_memory(train: list[str], tmp_path: Path) -> None:
    """A container's small /dev/shm is named, with what enlarges it."""
    images(tmp_path / "data", 20)
    command = [*train, "--data", str(tmp_path / "data"), "--cache", "none", "--workers", "1", "--subset", "20"]
    one_line(run("npid", command, before=full_shared_memory), "/dev/shm", "--shm-size", "--workers")
