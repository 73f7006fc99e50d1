"""One launcher for every script: nothing wrong waits in a queue, and no step is lost by a time-out or a pre-emption."""

import functools
import importlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import ROOT, TINY, Process, checkpoint, log, same, start

import common

pytest.importorskip("submitit")
submit = importlib.import_module("slurm.submit")
SUBMIT = [sys.executable, str(ROOT / "slurm" / "submit.py")]


# before the queue


AFTER = ["eval_knn.py", "{output}/checkpoint.pth"]  # --then eval_knn.py


def test_options_of_submission_and_script() -> None:
    """The first script named ends the submission's options, whatever stands in --then or after KEY=."""
    args = submit.parse_args(["--nodes", "2", "--then", "eval_knn.py", "--sweep", "lr=1,2", "seed=0", "npid.py", "--lr",
                              "1", "other.py"])
    assert (args.nodes, args.then, args.sweep) == (2, [AFTER], [("lr", "1,2"), ("seed", "0")])
    assert (args.script, args.argv) == (Path("npid.py"), ["--lr", "1", "other.py"])
    args = submit.parse_args(["--then=eval_knn.py", "--then", "eval_linear.py", "npid.py"])
    assert (args.then, args.script) == ([AFTER, ["eval_linear.py", "{output}/checkpoint.pth"]], Path("npid.py"))
    args = submit.parse_args(["--slurm", "setup=python fetch.py", "job-name=npid.py", "--nodes", "2", "./a=1/npid.py"])
    assert (args.slurm[1], args.nodes, args.script) == (("job_name", "npid.py"), 2, Path("a=1/npid.py"))
    assert args.grace == submit.GRACE and submit.parse_args(["--hours", "0.1", "npid.py"]).grace == 90


WRONG = [([], "which script"), (["npid", "--lr", "1"], "script? name one"),
         (["--hours", "0", "npid.py"], "--hours"), (["--slurm", "qos", "npid.py"], "KEY=VALUE"),
         (["--hours", "1", "--grace", "3600", "npid.py"], "--grace"), (["--nodes", "0", "npid.py"], "--nodes"),
         (["--slurm", "qos=high", "time=12:00:00", "npid.py"], "--slurm time: use --hours"),
         (["--slurm", "ntasks-per-node=2", "npid.py"], "--slurm ntasks_per_node: use --tasks"),
         (["--slurm", "num_gpus=8", "npid.py"], "--slurm num_gpus: use --gpus"),
         (["--slurm", "array=0-3", "npid.py"], "--slurm array: use --sweep"),
         (["--slurm", "additional_parameters=x", "npid.py"], "--slurm additional_parameters: use"),
         (["--slurm", "teardown=rm a", "npid.py"], "--slurm teardown: use setup='trap COMMAND EXIT'"),
         (["--slurm", "srun-args=--label 'a", "npid.py"], "--slurm: invalid pair value"),
         (["--then", "eval_knn.py 'a", "npid.py"], "--then: \"eval_knn.py 'a\" is no command")]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=[words for _, words in WRONG])
def test_wrong_submissions(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the submission that make no sense end with code 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        submit.parse_args(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_options_without_effect_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    """What only SLURM heeds, and the limits of a job, where there is none."""
    submit.parse_args(["--cluster", "debug", "--partition", "long", "--hours", "2", "npid.py", "--account", "me"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" has no effect")[0] for line in lines] == ["note: --partition", "note: --hours"]


def test_combinations() -> None:
    """A sweep is the product of its values; without one there is one run."""
    assert submit.combinations([]) == [[]]
    assert submit.combinations([("bank_momentum", "0,0.5"), ("H", "3")]) == [
        ["--bank-momentum", "0", "--H", "3"], ["--bank-momentum", "0.5", "--H", "3"]]


def test_what_follows_is_tried_on_a_folder(tmp_path: Path) -> None:
    """{output} in --then is a folder when the options are looked at, as it will be, and the run's own in the job; what
    a script prints meanwhile changes nothing."""
    script = "import argparse, pathlib\nparse_args = lambda argv: argparse.Namespace({})\nmain = print\n"
    script += "print('imported', end='')\nimport atexit\natexit.register(print, 'ended')\n"
    (tmp_path / "common.py").touch()
    (tmp_path / "mine.py").write_text(script.format("output='runs/x'"))
    (tmp_path / "after.py").write_text(script.format("out=next(pathlib.Path(argv[1]).parent.iterdir())"))
    args = submit.parse_args(["--then", "after.py --out {output}/curves.png", "mine.py"])
    assert submit.runs_of(tmp_path, args, 1)[1] == ("after.py", [submit.Command(["--out", "runs/x/curves.png"], None)])


def test_a_script_without_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                 capfd: pytest.CaptureFixture[str]) -> None:
    """A script that has no common.py beside it is refused before it waits: the job takes `launch` from there."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "mine.py").write_text("parse_args = main = print\n")
    with pytest.raises(SystemExit) as stop:
        submit.runs_of(tmp_path, submit.parse_args(["mine.py"]), 1)
    assert stop.value.code == 2 and "mine.py: No module named 'common'; only modules" in capfd.readouterr().err


@pytest.mark.parametrize(("script", "key", "names"), [
    ("eval_detection.py", "lr", ["runs/detection-random-shapes-seed0-lr=3", "runs/detection-random-shapes-seed0-lr=4"]),
    ("eval_segmentation.py --output=a", "seed", ["a-seed=3", "a-seed=4"]),
    ("eval_linear.py --output a", "lr", [None, None]),
])
def test_outputs_of_swept_evaluations(script: str, key: str, names: list[str | None]) -> None:
    """Runs of a sweep that would write to one folder have one each, of a name that tells the seed, too, where the
    default name does not; eval_linear.py, which names a folder for each setting in its --output and shares features
    there, is left alone."""
    args = submit.parse_args(["--sweep", f"{key}=3,4", *script.split(), "random"])
    ((_, runs),) = submit.runs_of(ROOT, args, 1)
    assert [run.output for run in runs] == names
    for run, name, value in zip(runs, names, ("3", "4"), strict=True):
        words = [*script.split()[1:], "random", f"--{key}", value]
        assert run.argv == [*words, *(["--output", name] if name else [])]


def test_files_that_an_editor_holds_open(tmp_path: Path) -> None:
    """The links to nowhere that Emacs leaves beside files with unsaved changes are no part of the code."""
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "package").mkdir(parents=True)
    for name in ("mine.py", "package/__init__.py"):
        (here / name).write_text("")
        (here / name).with_name(f".#{Path(name).name}").symlink_to("user@host.1234")
    submit.snapshot(here, there)
    assert sorted(str(path.relative_to(there)) for path in there.rglob("*")) == [
        "COMMIT", "mine.py", "package", "package/__init__.py"]


def test_a_link_of_another_name(fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that is a link runs under the link's name, with what lies beside the file that it leads to."""
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
    (there / "common.py").touch()
    (there / "variant.py").write_text("import argparse, common\nparse_args = lambda argv: argparse.Namespace()\n"
                                      "main = print\n")
    (here / "mine.py").symlink_to(there / "variant.py")
    submitted(["mine.py"], monkeypatch, here)
    (folder,) = (here / "runs" / "slurm").iterdir()
    names = {file.name for file in (folder / "code").iterdir()}
    assert names == {"mine.py", "variant.py", "common.py", "COMMIT"}
    assert "#SBATCH --job-name=mine\n" in (fake_slurm / "1.sh").read_text()


def submitted(argv: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """`python slurm/submit.py argv` in `folder`, within this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["slurm/submit.py", *argv])
    submit.main(submit.parse_args(argv))


NPID = str(ROOT / "npid.py")
REFUSED = [
    ([NPID, "--learning-rate", "1"], "npid.py: error: unrecognized arguments: --learning-rate 1"),
    (["--then", "eval_knn.py --tua 1", NPID], "eval_knn.py: error: unrecognized arguments: --tua 1"),
    (["--nodes", "3", "--gpus", "5", NPID], "--batch-size 128 must divide by ranks x accumulate = 15 x 1"),
    (["--sweep", "tau=0.1,0.1", "--cluster", "slurm", NPID], "same output"),
    (["--gpus", "2", str(ROOT / "eval_knn.py"), "random"], "one task, not as 2: use --nodes 1 --tasks 1 --gpus 1"),
    (["--gpus", "0", "--tasks", "2", str(ROOT / "eval_knn.py"), "random"], "use --nodes 1 --tasks 1 --gpus 0"),
    (["--gpus", "8", str(ROOT / "eval_linear.py"), "random"], "eval_linear.py: error: --protocol linear takes one"),
    (["--gpus", "1", "--tasks", "2", NPID], "--tasks 2 on --gpus 1: each task takes a GPU of its own"),
    (["missing.py"], "no script missing.py"),
    (["--cluster", "local", "--nodes", "2", NPID], "--cluster local has one node"),
    (["--then", "eval_nothing.py", NPID], "there is no such script beside npid.py"),
    ([str(ROOT / "deepcluster.py"), "--arch", "alexnet", "--head", "map"], "deepcluster.py: error: --head map is for"),
    (["--sweep", "lr=1,2", NPID, "--output", "."], "--output . has no name that each run of the sweep could add to"),
]


@pytest.mark.parametrize(("argv", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refused_before_submission(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Mistyped options of the script or of what follows it, and numbers that do not fit, leave nothing behind."""
    with pytest.raises((SystemExit, common.Fault)) as stop:
        submitted(argv, monkeypatch, tmp_path)
    said = capfd.readouterr().err + str(stop.value)
    assert words in said and "Traceback" not in said
    assert isinstance(stop.value, common.Fault) or stop.value.code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps what it is given as 1.sh, 2.sh, ...; the folder of those."""
    tools, kept = tmp_path / "tools", tmp_path / "kept"
    tools.mkdir()
    kept.mkdir()
    (tools / "srun").write_text("")
    (tools / "sbatch").write_text(f'#!/bin/sh\nn=$(($(ls {kept} | wc -l) + 1))\ncp "$1" {kept}/$n.sh\n'
                                  'grep -q partition=none "$1" && echo "sbatch: error: no partition" >&2 && exit 1\n'
                                  'echo "Submitted batch job $n"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return kept


def test_what_sbatch_gets(fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                          capsys: pytest.CaptureFixture[str]) -> None:
    """Nodes, GPUs, time, the rest of sbatch's options, a sweep as an array, what follows as one that depends on it."""
    (tmp_path / "he re").mkdir()
    submitted(["--nodes", "2", "--gpus", "8", "--hours", "1.01", "--grace", "120", "--requeues", "7", "--partition",
               "long", "--account", "vision", "--constraint", "a100", "--slurm", "qos=high", "mem=400G",
               "exclusive=true", "setup=module load cuda\n:",
               "array_parallelism=2", "switches=1", "cpus_per_task=12", "job-name=mine", "--sweep", "lr=0.01,0.03",
               "seed=0,1", "--then", "eval_knn.py --k 20", NPID, "--data", "cifar10", "--val-dir", "a\n'b c"],
              monkeypatch, tmp_path / "he re")
    text = (fake_slurm / "1.sh").read_text()
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=61", "partition=long", "account=vision",
                 "constraint=a100", "qos=high", "mem=400G", "exclusive", "switches=1", "requeue", "array=0-3%2",
                 "signal=USR2@120", "job-name=mine", "cpus-per-task=12"):
        assert f"#SBATCH --{line}\n" in text, (line, text)
    assert "\nmodule load cuda\n:\n" in text and "gpus-per-task" not in text
    assert re.search(r"^srun .*--kill-on-bad-exit=1 --cpus-per-task=12 ", text, re.M)
    then = (fake_slurm / "2.sh").read_text()
    for line in ("nodes=1", "gpus-per-node=1", "dependency=aftercorr:1", "kill-on-invalid-dep=yes", "array=0-3%2",
                 "job-name=mine"):
        assert f"#SBATCH --{line}\n" in then, (line, then)
    out = capsys.readouterr().out
    for name in ("seed0-lr=0.01", "seed1-lr=0.01", "seed0-lr=0.03", "seed1-lr=0.03"):
        assert f"output runs/npid-cifar10-{name}\n" in out
    (folder,) = (tmp_path / "he re" / "runs" / "slurm").iterdir()
    load = submit.submitit.core.utils.DelayedSubmission.load
    kept = [load(path) for path in folder.glob("1_*_submitted.pkl")]
    jobs = [job.function for job in kept]
    assert {job._timeout_countdown for job in kept} == {7}
    assert [job.run.argv[:4] for job in jobs] == [["--data", "cifar10", "--val-dir", "a\n'b c"]] * 4
    assert f"folder {folder}\n" in out and f"tail -F '{folder}/" in out
    assert "scancel 1 2" in out and "squeue -j 1,2" in out
    assert {file.name for file in (folder / "code").iterdir()} >= {"npid.py", "common.py", "eval_knn.py", "COMMIT"}
    assert common.git_commit(folder / "code") == common.git_commit(ROOT)
    with pytest.raises(common.Fault, match=r"^sbatch refuses: no partition$"):
        submitted(["--partition", "none", NPID], monkeypatch, tmp_path / "he re")
    assert "#SBATCH --job-name=npid\n" in (fake_slurm / "3.sh").read_text()
    assert [file.name for file in (tmp_path / "he re" / "runs" / "slurm").iterdir()] == [folder.name]


def test_what_continues_does_not_start_over(
    fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that a job names for going on is that of its submission, without --overwrite."""
    submitted(["--gpus", "0", "--tasks", "1", NPID, "--overwrite", "--lr", "0.1"], monkeypatch, tmp_path)
    (path,) = (tmp_path / "runs" / "slurm").glob("*/1_submitted.pkl")
    job = submit.submitit.core.utils.DelayedSubmission.load(path).function
    assert "--overwrite" in job.run.argv
    assert job.again == f"python slurm/submit.py --gpus 0 --tasks 1 {NPID} --lr 0.1"


def test_where_what_follows_is_refused(fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training that is in the queue already is cancelled, before its folder goes."""
    (tmp_path / "here").mkdir()
    for tool, text in (("sbatch", 'grep -q dependency= "$1" && exit 1\necho "Submitted batch job 7"'),
                       ("scancel", f"echo $* $(ls {tmp_path}/here/runs/slurm | wc -l) > {tmp_path}/cancelled")):
        (tmp_path / "tools" / tool).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "tools" / tool).chmod(0o755)
    with pytest.raises(common.Fault, match="sbatch refuses"):
        submitted(["--then", "eval_knn.py", NPID], monkeypatch, tmp_path / "here")
    assert (tmp_path / "cancelled").read_text() == "7 1\n" and not list((tmp_path / "here/runs/slurm").iterdir())


@pytest.mark.parametrize("words", [["--slurm", "comment=a\nb", NPID], [NPID, "--output", "\udcff/c"]])
def test_what_no_file_for_sbatch_can_hold(
    words: list[str], fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line break, which would end a line of sbatch's options, and bytes that are no UTF-8 are refused."""
    here = tmp_path / "here"
    here.mkdir()
    with pytest.raises(common.Fault, match="cannot stand in sbatch's file"):
        submitted(words, monkeypatch, here)
    assert not list(here.rglob("npid*")) and not list(fake_slurm.iterdir())


def test_a_job_has_a_gpu_that_the_login_node_lacks(
    fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM is asked for one GPU by default, whatever the machine has that submits."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    submitted([NPID], monkeypatch, tmp_path)
    assert "#SBATCH --gpus-per-node=1\n" in (fake_slurm / "1.sh").read_text()


def test_a_job_in_the_queue_keeps_its_folder(fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If nobody reads the output, as after `| head -1`, the submitted job still finds its code; within another job its
    memory is not asked for, but the same SLURM; GPUs of one type are asked for by gres alone."""
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    (tmp_path / "here").mkdir()
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CONF"):
        monkeypatch.setenv(name, "300")
    monkeypatch.setattr(submit, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        submitted(["--gpus", "2", "--slurm", "gres=gpu:a100:2", NPID], monkeypatch, tmp_path / "here")
    text = (fake_slurm / "1.sh").read_text()
    assert "#SBATCH --gres=gpu:a100:2\n" in text and "gpus-per-node" not in text and "ntasks-per-node=2" in text
    (folder,) = (tmp_path / "here" / "runs" / "slurm").iterdir()
    assert (folder / "code" / "npid.py").exists() and not {"SLURM_JOB_ID", "SLURM_MEM_PER_CPU"} & set(os.environ)
    assert os.environ["SLURM_CONF"] == "300"


def test_what_follows_has_one_gpu_of_the_type(
    fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation, once the training has succeeded, takes one GPU of the type that it has, however that is written,
    not all of the node; none where that has none."""
    (tmp_path / "here").mkdir()
    submitted(["--gpus", "8", "--slurm", "gres=gpu:a100:8", "mem=9G", "--then", "eval_knn.py", NPID], monkeypatch,
              tmp_path / "here")
    for number, count in ((1, 8), (2, 1)):
        text = (fake_slurm / f"{number}.sh").read_text()
        assert f"#SBATCH --gres=gpu:a100:{count}\n" in text and "--mem=9G\n" in text and "gpus-per-node" not in text
    for gres, one in (("gpu:8,shard:4", "gpu:1,shard:4"), ("gpu:1g.10gb:2", "gpu:1g.10gb:1"), ("gpu:a", "gpu:a")):
        args = submit.parse_args(["--gpus", "8", "--slurm", f"gres={gres}", NPID])
        assert submit.of_one_gpu(args).slurm == [("gres", one)]
    assert "#SBATCH --dependency=afterok:1\n" in (fake_slurm / "2.sh").read_text()
    assert submit.of_one_gpu(submit.parse_args(["--gpus", "0", "--tasks", "2", NPID])).gpus == 0


@pytest.mark.parametrize(("gres", "asked"), [("nvme:100", 4), ("gres/gpu:a100:4", None), ("gpu,nvme:9", None)])
def test_what_else_a_node_has(gres: str, asked: int | None, fake_slurm: Path, tmp_path: Path) -> None:
    """A gres that names no GPU, such as a local disk, is asked for beside those of --gpus."""
    args = submit.parse_args(["--gpus", "4", "--tasks", "4", "--slurm", f"gres={gres}", NPID])
    given = submit.make_executor(args, tmp_path).parameters
    assert (given["gres"], given["gpus_per_node"]) == (gres, asked)


def test_srun_has_its_own_options_besides(fake_slurm: Path, tmp_path: Path) -> None:
    """srun_args are added to those by which a rank that dies ends the job."""
    args = submit.parse_args(["--gpus", "1", "--tasks", "1", "--slurm", "srun_args=--label --mpi=none", NPID])
    given = submit.make_executor(args, tmp_path).parameters["srun_args"]
    assert given == ["--kill-on-bad-exit=1", "--label", "--mpi=none"]


def test_the_checkpoint_is_the_first_word_of_what_follows() -> None:
    """Before options that take any number of words; where {output} is written, nothing is added."""
    assert submit.follower("dir/eval_knn.py --k 20 5") == ["eval_knn.py", "{output}/checkpoint.pth", "--k", "20", "5"]
    assert submit.follower("figures.py curves {output}") == ["figures.py", "curves", "{output}"]


def test_a_full_disk_leaves_no_half_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the code cannot be copied, what has been copied of it goes."""
    def full(source: Path, target: Path) -> None:
        target.mkdir(parents=True)
        (target / "npid.py").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submit, "runs_of", lambda *_: [("npid.py", [submit.Command([], "runs/x")])])
    monkeypatch.setattr(submit.shutil, "copytree", full)
    with pytest.raises(OSError, match="No space left"):
        submitted(["--cluster", "local", NPID], monkeypatch, tmp_path)
    assert list((tmp_path / "runs/slurm").iterdir()) == []


@pytest.mark.parametrize("submitted_before", [0, 1])
def test_ctrl_c_between_submissions(
    submitted_before: int, fake_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before anything is in the queue leaves no folder, after the first job it leaves what that will run."""
    submit_array, count = submit.submitit.SlurmExecutor.submit_array, [0]

    def interrupted(self: Any, jobs: Any) -> Any:
        if count[0] == submitted_before:
            raise KeyboardInterrupt
        count[0] += 1
        return submit_array(self, jobs)

    (tmp_path / "here").mkdir()
    monkeypatch.setattr(submit.submitit.SlurmExecutor, "submit_array", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        submitted(["--then", "eval_knn.py --k 20", NPID], monkeypatch, tmp_path / "here")
    assert len(list((tmp_path / "here" / "runs" / "slurm").iterdir())) == submitted_before
    assert len(list(fake_slurm.iterdir())) == submitted_before


def test_no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without SLURM the submission says what to do."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(common.Fault, match="use --cluster local"):
        submitted(["--gpus", "1", NPID], monkeypatch, tmp_path)


def test_groups_wait_long() -> None:
    """A rank may cluster for two hours while the others wait in a collective, of gloo or of NCCL."""
    done: dict[str, Any] = {}
    original = common.dist.init_process_group
    common.dist.init_process_group = lambda backend, **options: done.update(options, backend=backend)
    try:
        os.environ["WORLD_SIZE"] = "2"
        with pytest.raises((ValueError, RuntimeError)):  # there is no group to ask for ranks
            common.Run(common.argparse.Namespace(device="cpu"))
    finally:
        common.dist.init_process_group = original
        del os.environ["WORLD_SIZE"]
    assert done["timeout"].total_seconds() >= 7200 and done["backend"] == "gloo"


# without SLURM


def undisturbed(folder: Path, script: str, argv: list[str]) -> list[Process]:
    """Two ranks that nobody stops."""
    port = random.Random(str(folder)).randint(12_000, 19_000)
    return [start(script, [*argv, "--output", folder], functools.partial(two_ranks, rank, port)) for rank in (0, 1)]


def two_ranks(rank: int, port: int) -> None:
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def copy_with_pauses(folder: Path, script: str, seconds: float) -> Path:
    """A user's copy beside a common.py of its own: it waits in each step, and tells its port."""
    shutil.copy(ROOT / "common.py", folder)
    text = (ROOT / f"{script}.py").read_text()
    text = text.replace("optimizer.zero_grad()", f"optimizer.zero_grad(); time.sleep({seconds})")
    told = "    import os\n    print('port', os.environ['MASTER_PORT'], flush=True)\n"
    text = text.replace("    run = common.Run(args)\n", f"    run = common.Run(args)\n{told}")
    path = folder / "mine.py"
    path.write_text(text)
    shutil.copy(ROOT / "eval_knn.py", folder)
    return path


def same_results(a: Path, b: Path) -> None:
    """Assert that two runs ended with the same checkpoint and log, whatever their script is called."""
    same(checkpoint(a), checkpoint(b))
    assert log(a)[1:] == log(b)[1:] and len(log(a)) > 1


@pytest.mark.slow
def test_local_time_out(tmp_path: Path) -> None:
    """Two local tasks that run out of time go on at the step where they stopped, with the code that was submitted, on
    another port, without --overwrite; what follows them runs once they have succeeded."""
    reference = undisturbed(tmp_path / "whole", "npid", [*TINY, "--epochs", "10"])
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import npid"], cwd=ROOT, check=True)
    limit = 5 + round(2.5 * (time.monotonic() - began))  # a busy machine takes long to start anything
    script, here = copy_with_pauses(tmp_path, "npid", limit / 40), tmp_path / "here"  # of 40 steps
    here.mkdir()
    command = [*SUBMIT, "--cluster", "local", "--gpus", "0", "--tasks", "2", "--hours", str((limit + 60) / 3600),
               "--grace", "60", "--then", "eval_knn.py --k 20 --subset 64 --test-subset 20", str(script), *TINY,
               "--epochs", "10", "--overwrite"]
    process = subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and "mine.py" in process.stdout.readline()
    line = process.stdout.readline()
    for name in ("mine.py", "common.py", "eval_knn.py"):
        (tmp_path / name).write_text("raise SystemExit(9)\n")
    _, errors = process.communicate(timeout=8 * limit + 120)
    text = Path(line.split("tail -F ")[1].strip()).read_text()
    assert process.returncode == 0, (errors, text)
    assert "attempt 2" in text and "resumed: " in text and "--overwrite" in text.split("attempt 2")[0]
    assert "--overwrite" not in text.split("attempt 2")[1]
    steps = re.findall(r"resumed: .* after (\d+) epochs and (\d+)", text)
    assert steps and sorted(steps) == steps
    ports = re.findall(r"port (\d+)", text)
    assert len(set(ports)) == len(ports) > 1
    for rank in reference:
        assert rank.wait().code == 0, rank.err
    output = here / "runs" / "mine-smoke-seed0"
    same_results(tmp_path / "whole", output)
    result = json.loads((output / "eval.jsonl").read_text())
    assert result["checkpoint"] == "runs/mine-smoke-seed0/checkpoint.pth"


def test_limits_of_local_jobs(tmp_path: Path) -> None:
    """Hours, grace and requeues are those of the options, as on SLURM."""
    words = ["--cluster", "local", "--gpus", "0", "--tasks", "1", "--hours", "2", "--grace", "60", "--requeues", "4"]
    local = submit.make_executor(submit.parse_args([*words, NPID]), tmp_path)
    assert (local.parameters["timeout_min"], local.parameters["signal_delay_s"], local.max_num_timeout) == (120, 60, 4)


def test_local_gpus_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local job gets the first --gpus of $CUDA_VISIBLE_DEVICES, numbers or names; more than it has are refused."""
    given = list[str]()
    monkeypatch.setattr(submit.submitit.local.local, "LocalJob", lambda **_: None)
    monkeypatch.setattr(submit.submitit.local.local, "start_controller",
                        lambda cuda_devices, **_: given.append(cuda_devices) or SimpleNamespace(pid=1))
    for seen in ("2,3", "MIG-a,GPU-b", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        submit.make_executor(submit.parse_args(["--cluster", "local", "--gpus", "1", "--tasks", "1", NPID]),
                             tmp_path)._submit_command("")
    assert given == ["2", "MIG-a", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    submit.make_executor(submit.parse_args(["--cluster", "local", "--gpus", "2", "--tasks", "1", NPID]),
                         tmp_path)._submit_command("")
    assert given[3:] == ["2,3"]  # all of them
    with pytest.raises(common.Fault, match=r"^--gpus 4: \$CUDA_VISIBLE_DEVICES is 2,3$"):
        submit.make_executor(submit.parse_args(["--cluster", "local", "--gpus", "4", "--tasks", "4", NPID]), tmp_path)


def test_signals_between_local_jobs(tmp_path: Path) -> None:
    """Once a local job has ended, Ctrl-C and TERM are what they were before it: none is lost before the next."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    paths = SimpleNamespace(stdout=tmp_path / "out", stderr=tmp_path / "err", result_pickle=tmp_path / "result")
    paths.result_pickle.write_bytes(pickle.dumps(("success", None)))
    started = SimpleNamespace(paths=paths, _process=done, num_tasks=1, task=lambda i: SimpleNamespace(paths=paths))
    executor = SimpleNamespace(submit=lambda job: started)
    job = SimpleNamespace(script="npid.py", run=SimpleNamespace(argv=[]))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    submit.run_here(tmp_path, executor, job)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_local_job_that_fails(tmp_path: Path) -> None:
    """The fault names the script, the last error of its output, and where all of it is; an exception, which submitit
    keeps as the job's result, is no success."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    paths = SimpleNamespace(stdout=tmp_path / "out", stderr=tmp_path / "err", result_pickle=tmp_path / "result")
    started = SimpleNamespace(paths=paths, _process=done, num_tasks=1, task=lambda i: SimpleNamespace(paths=paths))
    job = SimpleNamespace(script="npid.py", run=SimpleNamespace(argv=[]))
    for text, reason in (("npid.py: error: no images\nend\n", r" \(npid.py: error: no images\)"), ("\udcff\n", "")):
        paths.stderr.write_text(text, errors="surrogateescape")
        with pytest.raises(common.Fault, match=f"^npid.py did not finish{reason}: see {paths.stderr}; the same"):
            submit.run_here(tmp_path, SimpleNamespace(submit=lambda job: started), job)
        paths.result_pickle.write_bytes(pickle.dumps(("error", "Traceback ...")))


def test_a_run_of_a_local_sweep_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a job array, the other runs of a local sweep have their turn, and what follows a run that has succeeded,
    but not what follows the one that failed; the code is 2."""
    ran = list[str]()

    def run_here(folder: Path, executor: Any, job: Any) -> None:
        ran.append(f"{job.script} {job.run.argv[-1] if job.script == 'npid.py' else job.run.argv[0]}")
        if ran[-1] in ("npid.py n-lr=2", "eval_knn.py n-lr=1/checkpoint.pth"):
            raise common.Fault(f"{job.script} did not finish")

    monkeypatch.setattr(submit, "run_here", run_here)
    monkeypatch.setattr(submit, "check", lambda code, scripts: [submit.Facts("n", 0, 0)] * 5)  # which takes seconds
    follow = ["--then", "eval_knn.py", "--then", "eval_linear.py"]
    with pytest.raises(SystemExit) as stop:
        submitted(["--cluster", "local", "--sweep", "lr=1,2,3", *follow, NPID, "--output", "n"], monkeypatch, tmp_path)
    assert stop.value.code == 2
    assert ran == [f"{script} n-lr={lr}{rest}" for lr in (1, 2, 3) for script, rest in (
        ("npid.py", ""), ("eval_knn.py", "/checkpoint.pth"), ("eval_linear.py", "/checkpoint.pth"))
        if lr != 2 or script == "npid.py"]
    assert capsys.readouterr().err.count("did not finish\n") == 2


def test_help_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """`submit.py npid.py --help` prints the script's options and submits nothing."""
    with pytest.raises(SystemExit) as stop:
        submitted([NPID, "--help"], monkeypatch, tmp_path)
    assert stop.value.code == 0 and "--bank-momentum" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_term_within_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """TERM ends a local job, though SLURM calls the allocation around it running; a job of SLURM's goes on."""
    asked = list[int]()
    monkeypatch.setattr(submit, "state", lambda: "RUNNING")
    monkeypatch.setattr(submit.signal, "signal", lambda *_: None)
    for cluster in ("local", "slurm"):
        end = submit.ending(cluster, "npid.py", "", 0, lambda number, frame: asked.append(number))
        if cluster == "local":
            with pytest.raises(SystemExit) as stop:
                end(signal.SIGTERM, None)
            assert stop.value.code == 128 + signal.SIGTERM and not asked
        else:
            end(signal.SIGTERM, None)
    assert asked == [signal.SIGUSR2]


def test_other_ranks_leave_the_requeue_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal before training is not theirs; after their checkpoint they end without an error, which would end it."""
    monkeypatch.setattr(submit, "state", lambda: "RUNNING")
    monkeypatch.setattr(submit.signal, "signal", lambda *_: None)
    end = submit.ending("slurm", "npid.py", "", 1, lambda *_: pytest.fail("requeued"))
    for number in (signal.SIGTERM, signal.SIGUSR2):
        end(number, sys._getframe())
        with pytest.raises(SystemExit) as stop:
            end(number, None)
        assert stop.value.code == 0


def test_nothing_disturbs_a_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a job goes back into the queue, further signals of the same pre-emption are ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    found = list[Any]()
    monkeypatch.setattr(submit, "state", lambda: "RUNNING")
    try:
        for number in before:
            end = submit.ending("slurm", "npid.py", "", 0, lambda *_: found.extend(map(signal.getsignal, before)))
            for other in before:
                signal.signal(other, end)
            end(number, None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert found == [signal.SIG_IGN] * 4


def test_workers_leave_signals_to_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM signals the workers of a rank, too, which have inherited its handler: they neither requeue nor end."""
    monkeypatch.setattr(submit.signal, "signal", lambda *_: None)
    end = submit.ending("slurm", "npid.py", "", 0, lambda *_: pytest.fail("requeued"))
    monkeypatch.setattr(submit.os, "getpid", lambda: -1)
    end(signal.SIGUSR2, None)


def test_a_requeue_that_fails_says_what_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the job cannot be requeued it ends with an error that has the command that goes on."""
    def requeue(*_: Any) -> None:
        raise submit.subprocess.CalledProcessError(1, "scontrol")

    monkeypatch.setattr(submit.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        submit.ending("slurm", "npid.py", "python submit.py npid.py", 0, requeue)(signal.SIGUSR2, None)
    assert stop.value.code == 1
    assert re.search("error: not requeued .*this continues: python submit.py npid.py$", capsys.readouterr().err)


@pytest.mark.parametrize("called", ["CANCELLED", "COMPLETING", ""])
def test_term_is_the_end_unless_the_job_is_running(called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TERM requeues nothing where SLURM calls the job anything but running, or cannot be asked."""
    monkeypatch.setattr(submit, "state", lambda: called)
    monkeypatch.setattr(submit.signal, "signal", lambda *_: None)
    end = submit.ending("slurm", "npid.py", "", 0, lambda number, frame: pytest.fail("requeued"))
    with pytest.raises(SystemExit) as stop:
        end(signal.SIGTERM, None)
    assert stop.value.code == 128 + signal.SIGTERM


def test_debug(tmp_path: Path) -> None:
    """--cluster debug runs in the foreground, in one process, and a fault is one line and code 2."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import argparse, pathlib\nimport common\n\n\ndef parse_args(argv=None):\n    options = common.parser(None)\n"
        "    options.add_argument('word')\n    return options.parse_args(argv)\n\n\ndef main(args):\n"
        "    pathlib.Path('out').write_text(args.word)\n    raise common.Fault('that is all')\n"
    )
    shutil.copy(ROOT / "common.py", tmp_path)
    done = subprocess.run([*SUBMIT, "--cluster", "debug", "mine.py", "hello"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "mine.py: error: that is all", done.stderr
    assert (tmp_path / "out").read_text() == "hello"


@pytest.mark.parametrize("saved", [False, True])
def test_overwrite_until_something_is_saved(saved: bool, tmp_path: Path) -> None:
    """An evaluation that is pre-empted before its first checkpoint still starts over what lay there before, wherever
    below --output that is; what it has saved itself stays."""
    (tmp_path / "mine.py").write_text(
        "import common\n\nfolder_of = None\n\n\ndef parse_args(argv=None):\n    options = common.parser(None)\n"
        "    options.add_argument('--overwrite', action='store_true')\n    args = options.parse_args(argv)\n"
        "    args.output = 'out'\n    return args\n\n\ndef main(args):\n    print('overwrite:', args.overwrite)\n"
    )
    shutil.copy(ROOT / "common.py", tmp_path)
    (tmp_path / "out" / "setting").mkdir(parents=True)
    old = tmp_path / "out" / "setting" / "checkpoint.pth"
    old.touch()
    os.utime(old, (moment := time.time() + (1e6 if saved else -1e6), moment))
    done = subprocess.run([*SUBMIT, "--cluster", "debug", "mine.py", "--overwrite"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | dict(SLURM_RESTART_COUNT="1"))
    assert f"overwrite: {not saved}" in done.stdout, done.stderr
