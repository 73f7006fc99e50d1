"""A run that was stopped in any way ends, continued, as one that never was."""

import argparse
import contextlib
import dataclasses
import errno
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, Process, checkpoint, log, one_line, run, same, same_runs, start
from PIL import Image

import common
import npid

# Two monitors of three epochs, and a checkpoint after almost every step.
OFTEN = [*TINY, "--epochs", "3", "--knn-every", "2", "--save-minutes", "0.0001"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert run("npid", [*OFTEN, "--output", output]).code == 0
    assert len(log(output)) == 4
    return output


def die_in_replace_before() -> None:
    die_at("replace", 4, after=False)


def die_in_replace_after() -> None:
    die_at("replace", 4, after=True)


def die_in_first_replace() -> None:
    die_at("replace", 1, after=False)


def die_at(name: str, count: int, after: bool) -> None:
    """Make the `count`-th call of Path.<name> the last thing that happens."""
    original, calls = getattr(Path, name), []

    def deadly(self: Path, *args: object) -> None:
        calls.append(None)
        if len(calls) < count or after:
            original(self, *args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(Path, name, deadly)


def die_half_written() -> None:
    """The second checkpoint is half on the disk."""
    original, calls = os.fsync, []

    def deadly(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        if calls.count("checkpoint.pth.tmp") == 2:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        original(descriptor)

    os.fsync = deadly


def die_before_the_second_save() -> None:
    """A log line without its checkpoint."""
    original = common.Run.log

    def deadly(self: common.Run, **row: object) -> None:
        original(self, **row)
        if row.get("epoch") == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    common.Run.log = deadly  # type: ignore[method-assign]


DEATHS = [
    die_in_first_replace, die_in_replace_before, die_in_replace_after, die_half_written, die_before_the_second_save,
]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.__name__)
def test_killed_while_it_writes(death: Callable[[], None], undisturbed: Path, tmp_path: Path) -> None:
    """A kill before, within or after a write leaves a whole checkpoint or none, and the run continues from there."""
    command = [*OFTEN, "--output", tmp_path]
    assert run("npid", command, before=death).code == -signal.SIGKILL
    last = run("npid", command)
    assert last.code == 0 and not list(tmp_path.glob("*.tmp"))
    assert ("resumed" in last.out) == (death is not die_in_first_replace)
    same_runs(undisturbed, tmp_path)


def kill_often(kills: int, undisturbed: Path, folder: Path, method: list[str]) -> int:
    """Kill runs at random moments until `kills` have hit; returns how many resumed within an epoch."""
    moments, within, output, done, began = random.Random(kills), 0, folder / "0", 0, time.monotonic()
    assert run("npid", [*OFTEN, *method, "--output", folder / "timed"]).code == 0
    whole = time.monotonic() - began  # on a busy machine it takes longer
    while done < kills:
        process = start("npid", [*OFTEN, *method, "--output", output])
        process.process.join(moments.uniform(0.05, 0.8) * whole)
        process.kill(signal.SIGKILL)
        if process.wait().code == -signal.SIGKILL:
            done += 1
        else:
            assert process.code == 0, process.err
            same_runs(undisturbed, output)
            output = folder / str(done)
        within += ", step " in process.out.split("resumed")[-1] and ", step 0" not in process.out.split("resumed")[-1]
    assert run("npid", [*OFTEN, *method, "--output", output]).code == 0
    same_runs(undisturbed, output)
    return within


def test_killed_at_random_moments(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, also within epochs: same weights, bank, optimiser, totals and log in the end."""
    kill_often(5, undisturbed, tmp_path, [])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "nce", "parametric"])
def test_killed_thirty_times(loss: str, tmp_path: Path) -> None:
    """The same, thirty times, for three losses."""
    method = ["--loss", loss, "--m", "8"]
    assert run("npid", [*OFTEN, *method, "--output", tmp_path / "undisturbed"]).code == 0
    assert kill_often(30, tmp_path / "undisturbed", tmp_path, method) > 5


@pytest.mark.parametrize("options", [
    [], ["--recluster-every", "2", "--cluster-on", "center-crop"],
    ["--background", "clusters", "--background-clusters", "2", "5"], ["--warmup-loss", "nce", "--warmup-epochs", "3"],
], ids=" ".join)
def test_clusterings_survive(options: list[str], tmp_path: Path) -> None:
    """Local Aggregation killed within its second epoch of clusters: same labels, bank, weights and log in the end."""
    command = [*OFTEN, "--warmup-epochs", "1", "--m", "8", "--k", "20", "--epochs", "3", *options, "--output"]
    assert run("local_aggregation", [*command, tmp_path / "undisturbed"]).code == 0
    assert run("local_aggregation", [*command, tmp_path / "killed"], before=die_within).code == -signal.SIGKILL
    saved = common.load_checkpoint(tmp_path / "killed" / "checkpoint.pth")
    assert saved["epoch"] == 2 and saved["step"] > 0
    labels = saved["state"]["clusters"]["labels"]
    assert labels.dtype == torch.int32 and len(labels.unique()) > 1
    last = run("local_aggregation", [*command, tmp_path / "killed"])
    assert last.code == 0 and "resumed" in last.out
    same_runs(tmp_path / "undisturbed", tmp_path / "killed")


def die_within() -> None:
    """A kill after the second step of the third epoch, before its clusters are renewed."""
    original = common.Run.after_step

    def after_step(self: common.Run, state: dict[str, object], at: int, now: int, loss: torch.Tensor) -> None:
        original(self, state, at, now, loss)
        if (at, now) == (2, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    common.Run.after_step = after_step  # type: ignore[method-assign]


def stop_at(epoch: int, step: int, number: int) -> Callable[[], None]:
    """Have the process signal itself just before the boundary of a step."""
    original = common.Run.after_step

    def after_step(self: common.Run, state: dict[str, object], at: int, now: int, loss: torch.Tensor) -> None:
        if (at, now) == (epoch, step):
            os.kill(os.getpid(), number)
        original(self, state, at, now, loss)

    common.Run.after_step = after_step  # type: ignore[method-assign]
    return lambda: None


def interrupt() -> None:
    stop_at(1, 1, signal.SIGINT)


def terminate_at_the_last_step() -> None:
    stop_at(1, 3, signal.SIGTERM)


def requeue() -> None:
    stop_at(0, 0, signal.SIGUSR2)


STOPS = [(interrupt, signal.SIGINT), (terminate_at_the_last_step, signal.SIGTERM), (requeue, signal.SIGUSR2)]


@pytest.mark.parametrize(("when", "number"), STOPS, ids=lambda value: getattr(value, "__name__", ""))
def test_stops_at_a_step_boundary(
    when: Callable[[], None], number: signal.Signals, undisturbed: Path, tmp_path: Path
) -> None:
    """SIGINT, SIGTERM and SIGUSR2 save at the next boundary, also after an epoch's last step; exit code 128 + n."""
    command = [*OFTEN, "--output", tmp_path, "--save-minutes", "0"]
    stopped = run("npid", command, before=when)
    assert stopped.code == 128 + number and "the same command continues" in stopped.err, stopped.err
    assert "Traceback" not in stopped.err
    assert checkpoint(tmp_path)["step"] > 0
    assert run("npid", command).code == 0
    same_runs_but_options(undisturbed, tmp_path)


def output_into_a_pipe() -> int:
    """As in `2>&1 | tee log`; the end that tee reads is returned."""
    read, write = os.pipe()
    for stream in (1, 2):
        os.dup2(write, stream)
    os.close(write)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1, closefd=False) for stream in (1, 2))
    return read


def interrupt_with_the_reader() -> None:
    """A terminal's Ctrl-C in `2>&1 | tee log`: tee ends at once."""
    read = output_into_a_pipe()
    stop_at(1, 1, signal.SIGINT)
    original = common.Run.after_step

    def after_step(self: common.Run, state: dict[str, object], at: int, now: int, loss: torch.Tensor) -> None:
        if (at, now) == (1, 1):
            os.close(read)
            self.printed_at = -100.0  # a line of progress is due, too
        original(self, state, at, now, loss)

    common.Run.after_step = after_step  # type: ignore[method-assign]


def interrupt_with_the_reader_in_the_monitor() -> None:
    """The same during the kNN monitor, before the line of the epoch is printed."""
    read, original = output_into_a_pipe(), common.knn_monitor

    def monitor(*args: Any) -> dict[str, float]:
        os.close(read)
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    common.knn_monitor = monitor


@pytest.mark.parametrize(("when", "end"), [
    (interrupt_with_the_reader, (1, 2)), (interrupt_with_the_reader_in_the_monitor, (2, 1)),
])
def test_interrupted_with_the_reader_of_the_output(
    when: Callable[[], None], end: tuple[int, int], undisturbed: Path, tmp_path: Path
) -> None:
    """Ctrl-C saves also where it ends whoever reads the output first; the log has each epoch of the checkpoint."""
    command = [*OFTEN, "--output", tmp_path, "--save-minutes", "0"]
    assert run("npid", command, before=when).code == 130
    assert (checkpoint(tmp_path)["epoch"], checkpoint(tmp_path)["step"]) == end
    assert log(tmp_path)[1:] == log(undisturbed)[1 : 1 + end[0]]


def test_output_that_nobody_reads_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `| head`: without a signal it is an error, which ends the run, and not only its output."""
    work = started(tmp_path)

    def broken(*args: Any, **options: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(common, "print", broken, raising=False)
    with pytest.raises(BrokenPipeError):
        work.log(epoch=1)
    work.close()


def same_runs_but_options(a: Path, b: Path) -> None:
    same(checkpoint(a), checkpoint(b))
    assert log(a)[1:] == log(b)[1:]


def interrupt_twice() -> None:
    def after_step(self: common.Run, *args: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    common.Run.after_step = after_step  # type: ignore[assignment,method-assign]


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """A second Ctrl-C does not wait for the step: exit code 130, one line, no traceback."""
    stopped = run("npid", [*TINY, "--output", tmp_path], before=interrupt_twice)
    assert stopped.code == 130 and "Traceback" not in stopped.err
    assert stopped.err.splitlines()[-1] == "npid.py: error: interrupted"


def test_finished_run_says_so(undisturbed: Path) -> None:
    """Started again, a finished run changes nothing, says so, and exits with 0."""
    before = (undisturbed / "checkpoint.pth").read_bytes(), (undisturbed / "log.jsonl").read_text()
    again = run("npid", [*OFTEN, "--output", undisturbed])
    assert again.code == 0 and "already finished" in again.out and again.err == ""
    assert before == ((undisturbed / "checkpoint.pth").read_bytes(), (undisturbed / "log.jsonl").read_text())


def test_other_code_is_said(undisturbed: Path, tmp_path: Path) -> None:
    """A run that goes on with the code of another commit says so; with its own, or finished, it says nothing of it."""
    copy = shutil.copytree(undisturbed, tmp_path / "run")
    command = [*TINY, "--knn-every", "2", "--output", copy]
    assert run("npid", [*command, "--epochs", "4"]).err == ""
    saved = common.load_checkpoint(copy / "checkpoint.pth")
    torch.save(saved | dict(git="0123456789ab"), copy / "checkpoint.pth")
    assert run("npid", [*command, "--epochs", "4"]).err == ""
    expected = f"was written by the code of 0123456789ab; it goes on with that of {saved['git']}"
    assert expected in run("npid", [*command, "--epochs", "5"]).err


def test_more_epochs(undisturbed: Path, tmp_path: Path) -> None:
    """A step schedule goes on to more epochs as if they had been asked for at first; fewer than done are refused."""
    command = [*TINY, "--output", tmp_path, "--knn-every", "2"]
    assert run("npid", [*command, "--epochs", "1"]).code == 0
    assert run("npid", [*command, "--epochs", "3"]).code == 0
    same(checkpoint(undisturbed), checkpoint(tmp_path))
    assert [row["epoch"] for row in log(tmp_path)[1:]] == [1, 2, 3]
    one_line(run("npid", [*command, "--epochs", "2"]), "past --epochs 2")


@pytest.mark.parametrize("words", ["npid --schedule cosine", "cld --host byol --schedule constant"])
def test_epochs_of_what_ends_with_them_are_fixed(words: str, tmp_path: Path) -> None:
    """With other epochs a cosine, or the momentum of BYOL's keys, would be another: refused with the option named."""
    script, *options = words.split()
    command = [*TINY, "--output", tmp_path, *options]
    assert run(script, [*command, "--epochs", "1"]).code == 0
    one_line(run(script, [*command, "--epochs", "2"]), "--epochs 1 -> 2")


REFUSED = [
    (["--tau", "0.2"], "--temperature 0.1 -> 0.2"),
    (["--seed", "1"], "--seed 0 -> 1"),
    (["--subset", "63"], "images, checksum differ"),
    (["--image-size", "20"], "other data"),
    (["--loss", "nce"], "--loss softmax -> nce"),
    (["--no-amp"], "--amp None -> False"),
    (["--batch-size", "32"], "--batch-size 16 -> 32"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_other_options_are_refused(change: list[str], words: str, undisturbed: Path) -> None:
    """A checkpoint of another temperature, seed, loss, batch or data is refused, the option named, and kept."""
    before = (undisturbed / "checkpoint.pth").read_bytes(), (undisturbed / "log.jsonl").read_text()
    one_line(run("npid", [*OFTEN, "--output", undisturbed, *change]), words, "--output")
    assert before == ((undisturbed / "checkpoint.pth").read_bytes(), (undisturbed / "log.jsonl").read_text())


def test_free_options_may_change(undisturbed: Path, tmp_path: Path) -> None:
    """Workers, device, cache, monitor and the time between checkpoints may change in the middle of a run."""
    run("npid", [*OFTEN, "--output", tmp_path], before=interrupt)
    command = ["--workers", "0", "--cache", "host", "--knn-every", "0", "--save-minutes", "9", "--output", tmp_path]
    assert run("npid", [*OFTEN, *command]).code == 0
    same(checkpoint(undisturbed), checkpoint(tmp_path))


def test_which_options_may_change(tmp_path: Path) -> None:
    """Those that README.md names, with what names the same images, and no others, nor one that is no more; not --epochs
    on a cosine, nor to fewer than have been begun."""
    work = started(tmp_path)
    work.save({}, 0, 1)
    work.close()
    saved, old = common.load_checkpoint(tmp_path / "checkpoint.pth"), work.header["options"]
    free = {"device", "shard_bank", "workers", "compile", "cuda_graph", "save_minutes", "knn_every", "knn_features",
            "test_subset", "val_dir", "val_list", "max_bad_images", "cache", "epochs", "data", "data_dir", "output",
            "overwrite", "preset", "typed"}
    for schedule, expected in (("step", free), ("cosine", free - {"epochs"})):
        saved["options"], found = old | dict(schedule=schedule), set()
        for name in old:
            work.header["options"] = saved["options"] | {name: "another"}
            with contextlib.suppress(common.Fault):
                work._check_resumable(saved, tmp_path / "checkpoint.pth")
                found.add(name)
        assert found == expected
    work.header["options"] = old
    for change, words in ((dict(options=old | dict(gone=3)), "--gone 3 -> None"),
                          (dict(options=old, epoch=2, step=1), "past --epochs 2")):
        with pytest.raises(common.Fault, match=words):
            work._check_resumable(saved | change, tmp_path / "checkpoint.pth")


def test_settings_of_a_result(tmp_path: Path) -> None:
    """They are the options that say what is learnt, wherever that is, and the precision that was taken."""
    work = started(tmp_path)
    work.amp = True
    found = work.settings()
    work.close()
    assert (found["amp"], found["lr"]) == (True, work.args.lr) and not {"output", "workers", "data_dir"} & found.keys()


def test_photographs_may_move(tmp_path: Path) -> None:
    """The same images under another name go on, in the name that they have now."""
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (100, 120, 3), np.uint8)
        (tmp_path / "job1").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "job1" / f"{number}.png")
    command = [*TINY, "--batch-size", "4", "--workers", "0", "--output", tmp_path / "out", "--subset", "8"]
    assert run("npid", [*command, "--data", tmp_path / "job1", "--epochs", "1"]).code == 0
    (tmp_path / "job1").rename(tmp_path / "job2")
    last = run("npid", [*command, "--data", tmp_path / "job2", "--epochs", "2"])
    assert last.code == 0, last.err
    saved = checkpoint(tmp_path / "out")
    assert saved["epoch"] == 2 and saved["data"]["name"] == "job2"


def test_another_cache_of_photographs_is_named(tmp_path: Path) -> None:
    """A folder's photographs held as central squares are other images than the files: refused, with --cache named."""
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (100, 120, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    command = [*TINY, "--data", tmp_path, "--subset", "8", "--batch-size", "4", "--epochs", "1", "--workers", "0",
               "--output", tmp_path / "out"]
    assert run("npid", command).code == 0
    last = run("npid", [*command, "--cache", "host"])
    assert last.code == 2 and "checksum, --cache differ" in last.err, last.err


def test_overwrite_starts_anew(undisturbed: Path, tmp_path: Path) -> None:
    """--overwrite forgets the run that was there, but only once its data are known to be good."""
    command = [*OFTEN, "--output", tmp_path]
    assert run("npid", [*command, "--tau", "0.5", "--epochs", "1"]).code == 0
    old = (tmp_path / "checkpoint.pth").read_bytes()
    one_line(run("npid", [*command, "--overwrite", "--data", tmp_path / "missing"]), "no directory")
    assert (tmp_path / "checkpoint.pth").read_bytes() == old
    assert run("npid", [*command, "--overwrite"]).code == 0
    same(checkpoint(undisturbed), checkpoint(tmp_path))


def forbid_estimates() -> None:
    """Let a later estimate of Z be far off, so that it would show."""
    import npid

    npid.estimate_log_z = lambda noise, num_images: torch.tensor(1234.0)


def test_z_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    """NCE's Z is estimated in the first step alone: after a resume it is bit-equal, not estimated anew."""
    command = [*TINY, "--loss", "nce", "--m", "8", "--save-minutes", "0.0001"]
    assert run("npid", [*command, "--output", tmp_path / "whole"]).code == 0
    assert run("npid", [*command, "--output", tmp_path / "parts"], before=interrupt).code == 130
    assert run("npid", [*command, "--output", tmp_path / "parts"], before=forbid_estimates).code == 0
    same_runs(tmp_path / "whole", tmp_path / "parts")
    assert torch.isfinite(checkpoint(tmp_path / "whole")["state"]["normalizer"]["log_z"])


def dropout() -> None:
    """A backbone whose forward draws from PyTorch's own generator."""
    import npid

    original = npid.Encoder.forward
    npid.Encoder.forward = lambda self, images: torch.dropout(original(self, images), 0.5, self.training)


def dropout_interrupted() -> None:
    dropout()
    interrupt()


def test_dropout_resumes(tmp_path: Path) -> None:
    """What draws from PyTorch's own generator, such as dropout, follows from the step as well."""
    assert run("npid", [*OFTEN, "--output", tmp_path / "whole"], before=dropout).code == 0
    assert run("npid", [*OFTEN, "--output", tmp_path / "parts"], before=dropout_interrupted).code == 130
    assert run("npid", [*OFTEN, "--output", tmp_path / "parts"], before=dropout).code == 0
    same_runs(tmp_path / "whole", tmp_path / "parts")


def test_second_writer_is_refused(tmp_path: Path) -> None:
    """A lock refuses a second run in the same folder, and is free once its owner is killed."""
    first: Process = start("npid", [*TINY, "--epochs", "100000", "--output", tmp_path])
    first.wait_for('"epoch"')
    one_line(run("npid", [*TINY, "--epochs", "100000", "--output", tmp_path]), "in use by another run")
    first.kill(signal.SIGKILL)
    first.wait()
    assert run("npid", [*TINY, "--epochs", "100000", "--output", tmp_path], before=interrupt_soon).code == 130


def interrupt_soon() -> None:
    def after_step(self: common.Run, *args: object) -> None:
        raise KeyboardInterrupt

    common.Run.after_step = after_step  # type: ignore[assignment,method-assign]


def test_checkpoint_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save does not wait for the disk and holds what was there when it began; the next waits, and finds faults."""
    work = common.Run(npid.parse_args([*TINY, "--output", str(tmp_path)]))
    work.describe(common.load(work.args, "pretrain", work.device))
    network = torch.nn.Linear(3, 2)
    state = dict(network=network)
    work.resume(state, 4)
    before, go = network.weight.detach().clone(), threading.Event()
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda *args: (go.wait(20), write(*args)))
    work.save(state, 0, 1)
    with torch.no_grad():
        network.weight.zero_()
    assert not (tmp_path / "checkpoint.pth").exists()
    go.set()
    work.written()
    assert torch.equal(checkpoint(tmp_path)["state"]["network"]["weight"], before)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    work.save(state, 0, 2)
    with pytest.raises(common.Fault, match="No space left"):
        work.save(state, 0, 3)
    assert checkpoint(tmp_path)["step"] == 1
    work.close()


def started(output: Path, *options: str) -> common.Run:
    """A run that trains nothing."""
    work = common.Run(npid.parse_args([*TINY, "--output", str(output), *options]))
    work.describe(common.load(work.args, "pretrain", work.device))
    work.resume({}, 100)
    return work


def test_a_log_that_was_cut_goes_on_with_a_whole_line(tmp_path: Path) -> None:
    """If something else has cut the log within a line, that line goes at the next start, and those before it stay."""
    work, path = started(tmp_path), tmp_path / "log.jsonl"
    for epoch in (1, 2):
        work.log(epoch=epoch, loss=1.5)
    work.save({}, 2, 0)
    work.close()
    whole = path.read_text()
    os.truncate(path, len(whole) - 5)
    started(tmp_path).close()
    assert path.read_text().splitlines() == whole.splitlines()[:-1]


def test_overwrite_leaves_none_of_the_old_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is started over and ends early has neither weights nor figures of the one before it; other files stay.
    What continues it is said, not --overwrite. Without that, too, a log without its checkpoint is begun anew."""
    for name in ("checkpoint.pth", "backbone.pth", "detections.pth", "log.jsonl", "eval.jsonl", "notes.txt"):
        (tmp_path / name).write_text("old\n")
    for option, words in (("--overwrite", ", without --overwrite, continues"), ("--no-amp", "command continues")):
        work = started(tmp_path, option)
        assert {path.name for path in tmp_path.iterdir()} == {"lock", "log.jsonl", "notes.txt"}
        assert [row.keys() >= {"options"} for row in log(tmp_path)] == [True]
        work.log(epoch=1)
        with pytest.raises(SystemExit):
            work.stop(signal.SIGINT, 0, 1)
        assert words in capsys.readouterr().err


def test_a_launchers_own_handler_has_its_turn(tmp_path: Path) -> None:
    """A signal that comes twice, but for Ctrl-C, stops a run no sooner; then the handler that was there before the
    run's own is called, such as one that queues the job again."""
    calls = list[int]()
    before = signal.signal(signal.SIGUSR2, lambda number, _: calls.append(number))
    try:
        work = started(tmp_path)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR2)
        assert work.signal == signal.SIGUSR2 and not calls
        with pytest.raises(SystemExit):
            work.stop(signal.SIGUSR2, 0, 1)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert calls == [signal.SIGUSR2]


def test_a_loss_that_was_not_finite_once_is_found_later(tmp_path: Path) -> None:
    """On a GPU losses are looked at every 50 steps and before a checkpoint: the first bad one is named, though later
    ones were finite, and nothing is saved."""
    work = started(tmp_path)
    work.device = argparse.Namespace(type="cuda")  # type: ignore[assignment]
    for step in range(1, 9):
        work.after_step({}, 0, step, torch.tensor(math.nan if step in (3, 5) else 1.0))
    with pytest.raises(common.Fault, match=r"the loss is not finite \(epoch 1, step 4\)"):
        work.save({}, 1, 0)
    assert not (tmp_path / "checkpoint.pth").exists()
    work.close()


@pytest.mark.parametrize(("minutes", "steps"), [("2", [3, 6, 9]), ("0", [])])
def test_checkpoints_are_minutes_apart(
    minutes: str, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps of 50 s --save-minutes 2 saves each third one; 0 saves none, however long ago the last one was."""
    clock, saved = [0.0], list[int]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(common, "write_checkpoint", lambda path, content: saved.append(content["step"]))
    work = started(tmp_path)
    work.args.save_minutes = float(minutes)
    for step in range(10):
        clock[0] += 50
        work.after_step({}, 0, step, torch.zeros(()))
    work.close()
    assert saved == steps


@pytest.mark.parametrize(("rank", "world", "loss"), [(1, 2, 3.0), (0, 1, 2.0)])
def test_sums_of_all_ranks_go_on(rank: int, world: int, loss: float) -> None:
    """Within an epoch as many ranks go on with their own sums of the log's figures, fewer or more with the mean; those
    of the next epoch begin at zero."""
    fake: Any = argparse.Namespace(device=common.CPU, rank=rank, world=world, mean=lambda total: total,
                                   gather=lambda part: (torch.cat([part, part + 4]), None))
    killed, totals = common.Totals(fake), common.Totals(fake)
    for value in (0.5, 1.5):
        killed.add(loss=torch.tensor(value))
    killed.collect()
    state = killed.state_dict()
    killed.add(loss=torch.tensor(8.0))  # while the checkpoint is written
    totals.load_state_dict(state)
    assert totals.means() == dict(loss=loss)
    totals.add(loss=torch.tensor(5.0))
    assert totals.means() == dict(loss=5.0)


def test_no_thread_writes_beside_workers(tmp_path: Path) -> None:
    """Checkpoints wait where any images, those of the monitor too, are decoded by workers: they are forked."""
    work = common.Run(npid.parse_args([*TINY, "--output", str(tmp_path)]))
    data = common.load(work.args, "pretrain", work.device)
    for more, expected in ((None, True), (data, True), (dataclasses.replace(data, pixels=None), False)):
        work.describe(data, more)
        assert work.in_background == expected


def test_rate_of_a_checkpoint_from_a_gpu() -> None:
    """On a CPU the learning rate is a plain number again, to the last digit, and SGD its usual one."""
    weight = torch.nn.Parameter(torch.ones(2))
    saved = torch.optim.SGD([weight], torch.tensor(0.5), fused=True).state_dict()
    optimizer = torch.optim.SGD([weight], 1.0)
    optimizer.load_state_dict(saved)
    common.set_rate(optimizer, 0.03)
    assert common.rate(optimizer) == optimizer.param_groups[0]["lr"] == 0.03
    assert not optimizer.param_groups[0]["fused"]
    weight.sum().backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.97))


def test_rate_of_a_gpu_is_read_to_six_digits() -> None:
    """There it is a float32, whose further digits are rounding."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], torch.tensor(0.012345))
    assert common.rate(optimizer) == 0.012345


def test_a_tuple_stays_one_in_the_background(tmp_path: Path) -> None:
    """An option that is a tuple is the same one for a resumed run."""
    for _ in range(2):
        work = common.Run(npid.parse_args([*TINY, "--output", str(tmp_path)]))
        work.args.scale = (0.2, 1.0)
        work.describe(common.load(work.args, "pretrain", work.device))
        assert work.in_background
        work.resume({}, 4)
        work.save({}, 0, 1)
        work.close()


@pytest.mark.parametrize(("value", "name"), [(np.zeros(3), "numpy"), (np.float64(0.5), "numpy"), (deque([1]), "deque")],
                         ids=["array", "number", "deque"])
def test_what_no_resume_would_read_is_not_written(value: Any, name: str, tmp_path: Path) -> None:
    """A state with other things than tensors and plain values is a fault at the first save, not at the first resume."""
    common.write_checkpoint(path := tmp_path / "checkpoint.pth", dict(state=dict(mean=torch.zeros(3), scale=(0.2, 1))))
    before = path.read_bytes()
    with pytest.raises(common.Fault, match=f"checkpoint.pth would hold .*{name}"):
        common.write_checkpoint(path, dict(state=dict(mean=value)))
    assert path.read_bytes() == before
