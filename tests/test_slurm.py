"""On a real SLURM of two nodes: what is pre-empted, killed or cancelled loses no step."""

import json
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cluster
import pytest
from cluster import Cluster, until
from helpers import ROOT, TINY, checkpoint
from test_submit import SUBMIT, copy_with_pauses, same_results

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())]
LONG = 300  # seconds that a step of a run takes until another comes to its end, on a busy machine


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # paths of sockets have to be short
        os.chmod(folder, 0o755)  # noqa: PTH101
        running = Cluster(Path(folder))
        try:
            yield running
        finally:
            running.close()


class Sent:
    """A submission: its numbers, and where its first task writes."""

    def __init__(self, folder: Path, *words: str | Path) -> None:
        folder.mkdir(exist_ok=True)
        done = subprocess.run([*SUBMIT, *map(str, words)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.numbers = re.findall(r"^job (\d+)", done.stdout, re.M)
        self.number = self.numbers[0]
        self.log = Path(re.findall(r"tail -F (.*)", done.stdout)[0])

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def errors(self) -> str:
        return self.log.with_suffix(".err").read_text()

    def reaches(self, words: str, times: int = 1) -> None:
        until(lambda: self.text().count(words) >= times, f"{words} ({times} times)", LONG)


TWO = ["--nodes", "2", "--gpus", "0", "--hours", "1"]


@pytest.mark.parametrize("script", ["npid", "local_aggregation"])
def test_preempted_three_times(script: str, pair: Cluster, tmp_path: Path) -> None:
    """Pre-empted by signal at three random moments, a run over two nodes ends with the bits of an undisturbed one; it
    runs what was submitted, on another port each time, and --overwrite counts once."""
    options = [*TINY, "--epochs", "24"] + ["--m", "8", "--k", "16"] * (script == "local_aggregation")
    copied = copy_with_pauses(tmp_path, script, 0.1)
    whole = Sent(tmp_path / "whole", *TWO, copied, *options)
    sent = Sent(tmp_path / "parts", *TWO, copied, *options, "--overwrite")
    copied.write_text("raise SystemExit(9)\n")
    moments = random.Random(script)
    for attempt in (1, 2, 3):
        sent.reaches("after the start of training" if attempt == 1 else "resumed: ", max(1, attempt - 1))
        time.sleep(moments.uniform(0, 1.5))
        pair.ask("scancel", "--signal=USR2", sent.number)
        until(lambda: pair.state(sent.number) == "PENDING", "requeue", LONG)
        assert checkpoint(tmp_path / "parts" / "runs" / "mine-smoke-seed0")["epoch"] < 24
        pair.wait(sent.number, "RUNNING", seconds=LONG)
    for one in (whole, sent):
        pair.wait(one.number, "COMPLETED", seconds=LONG)
    same_results(*(tmp_path / name / "runs" / "mine-smoke-seed0" for name in ("whole", "parts")))
    text = sent.text()
    assert text.count("resumed: ") == 3  # and not one start over, as --overwrite typed again would be
    assert "attempt 4" in text and "attempt 2" not in whole.text()
    ports = re.findall(r"^port (\d+)$", text, re.M)
    assert len(ports) == 4 == len(set(ports))


def test_array_and_evaluations(pair: Cluster, tmp_path: Path) -> None:
    """An array of four and an evaluation for each, which begins once its own run has succeeded."""
    sent = Sent(tmp_path, *TWO[2:], "--sweep", "lr=0.01,0.02", "seed=0,1", "--then",
                "eval_knn.py --k 20 --subset 64 --test-subset 20",
                ROOT / "npid.py", *TINY, "--epochs", "2")
    training, evaluation = sent.numbers[0], sent.numbers[-1]
    for i in range(4):
        pair.wait(f"{evaluation}_{i}", "COMPLETED", seconds=LONG)
    times = {}
    until(lambda: pair.ask("sacct", "-X", "-n", "-o", "state").split().count("COMPLETED") >= 8, "accounts", 60)
    for line in pair.ask("sacct", "-X", "-n", "-P", "-o", "jobid,start,end,state").splitlines():
        number, start, end, state = line.split("|")
        times[number] = start, end, state
    for i in range(4):
        assert times[f"{training}_{i}"][2] == times[f"{evaluation}_{i}"][2] == "COMPLETED"
        assert times[f"{training}_{i}"][1] <= times[f"{evaluation}_{i}"][0]
    outputs = [path for path in (tmp_path / "runs").iterdir() if path.name != "slurm"]
    names = [f"npid-smoke-seed{seed}-lr={lr}" for seed in (0, 1) for lr in (0.01, 0.02)]
    assert sorted(path.name for path in outputs) == names
    for output in outputs:
        assert json.loads((output / "eval.jsonl").read_text())["checkpoint"] == f"runs/{output.name}/checkpoint.pth"


def test_failed_training_has_no_evaluation(pair: Cluster, tmp_path: Path) -> None:
    """A run that ends with a fault is a failed job with the fault as its message, and what was to follow is dropped."""
    sent = Sent(tmp_path, *TWO, "--then", "eval_knn.py --k 20", ROOT / "npid.py", *TINY, "--data", "missing")
    pair.wait(sent.number, "FAILED", seconds=LONG)
    assert "npid.py: error: no directory missing" in sent.errors()
    pair.wait(sent.numbers[1], "CANCELLED", "DEPENDENCY", seconds=LONG)


def test_cancelled(pair: Cluster, tmp_path: Path) -> None:
    """scancel ends a run with a checkpoint at its last step, and the same command continues it."""
    command = [*TWO, ROOT / "npid.py", *TINY]
    sent = Sent(tmp_path, *command, "--epochs", "100000")
    sent.reaches('"epoch": 2')
    pair.ask("scancel", sent.number)
    pair.wait(sent.number, "CANCELLED", seconds=LONG)
    until(lambda: pair.ask("squeue", "-h", "-j", sent.number) == "", "end of the job", LONG)
    assert "SIGTERM: saving" in sent.errors() and "stopped after" in sent.errors()  # 30 s later it would be killed
    saved = checkpoint(tmp_path / "runs" / "npid-smoke-seed0")
    assert f"stopped after {saved['epoch']} epochs and {saved['step']} steps;" in sent.errors()
    again = Sent(tmp_path, *command, "--epochs", str(saved["epoch"] + 1))
    pair.wait(again.number, "COMPLETED", seconds=LONG)
    assert "resumed: " in again.text()


def test_a_job_that_matters_more(pair: Cluster, tmp_path: Path) -> None:
    """Pre-empted by a partition of higher priority, which sends TERM alone, a run saves, waits, and goes on."""
    sent = Sent(tmp_path, *TWO, "--slurm", "cpus_per_task=4", "partition=main", ROOT / "npid.py", *TINY, "--epochs",
                "100000")
    sent.reaches('"epoch": 2')
    urgent = ["sbatch", "--parsable", "-N2", "-c4", "-p", "urgent", "-o", "/dev/null", "--wrap", "sleep 1"]
    pair.wait(pair.ask(*urgent).strip(), "COMPLETED", seconds=LONG)
    pair.wait(sent.number, "RUNNING", seconds=LONG)
    sent.reaches("resumed: ")
    assert "SIGTERM: saving" in sent.errors()
    pair.ask("scancel", sent.number)
    pair.wait(sent.number, "CANCELLED", seconds=LONG)


def test_a_node_dies(pair: Cluster, tmp_path: Path) -> None:
    """A node that dies ends the job with an error within a minute, and the same command continues once it is back."""
    command = [*TWO, ROOT / "npid.py", *TINY]
    sent = Sent(tmp_path, *command, "--epochs", "100000")
    sent.reaches('"epoch": 2')
    pair.kill_node("n2")
    pair.wait(sent.number, "COMPLETING", seconds=LONG)  # ended, as far as a node that answers no more can tell
    assert "another rank ended" in sent.errors()
    pair.node("n2")
    pair.wait(sent.number, "FAILED", seconds=LONG)
    saved = checkpoint(tmp_path / "runs" / "npid-smoke-seed0")
    again = Sent(tmp_path, *command, "--epochs", str(saved["epoch"] + 1))
    pair.wait(again.number, "COMPLETED", seconds=LONG)
    assert "resumed: " in again.text()


SCRIPT = """
import argparse, json, os, time
from pathlib import Path

import common


def parse_args(argv=None):
    options = common.parser(None)
    options.add_argument("--accumulate", default=1)
    return options.parse_args(argv)


def main(args):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME")
    print(json.dumps({name: os.environ[name] for name in names}), flush=True)
"""


def test_several_gpus(pair: Cluster, tmp_path: Path) -> None:
    """Each GPU of a node has a task, and all tasks of the node see all of its GPUs, as under torchrun."""
    (tmp_path / "tell.py").write_text(SCRIPT)
    (tmp_path / "common.py").write_text((ROOT / "common.py").read_text())
    sent = Sent(tmp_path, "--nodes", "2", "--gpus", "2", "tell.py")
    pair.wait(sent.number, "COMPLETED", seconds=LONG)
    told = []
    for rank in range(4):
        text = sent.log.with_name(sent.log.name.replace("_0_log", f"_{rank}_log")).read_text()
        told.append(json.loads(next(line for line in text.splitlines() if line.startswith("{"))))
    assert [int(row["RANK"]) for row in told] == [0, 1, 2, 3]
    assert [row["LOCAL_RANK"] for row in told] == ["0", "1", "0", "1"]
    assert {row["CUDA_VISIBLE_DEVICES"] for row in told} == {"0,1"}
    assert {(row["WORLD_SIZE"], row["LOCAL_WORLD_SIZE"]) for row in told} == {("4", "2")}
    assert [row["SLURMD_NODENAME"] for row in told] == ["n1", "n1", "n2", "n2"]
