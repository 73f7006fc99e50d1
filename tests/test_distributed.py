"""Two ranks do what one does with the whole batch, and neither outlives the other."""

import argparse
import functools
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from helpers import ROOT, TINY, Process, checkpoint, log, one_line, run, same, start
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.elastic.multiprocessing.api import SignalException

import common
import npid
import tools.torchrun


def evaluation_mode(script: str, folder: Path) -> None:
    """Batch statistics, which are a rank's own, out of the way; every augmented batch to a file."""
    module = importlib.import_module(script)
    original, steps, rank = module.augment, [], os.environ.get("RANK", "0")
    module.Encoder.train = lambda self, mode=True: torch.nn.Module.train(self, False)

    def augment(*args: Any) -> torch.Tensor:
        images = original(*args)
        folder.mkdir(exist_ok=True, parents=True)
        torch.save(images, folder / f"{len(steps)}-{rank}")
        steps.append(None)
        return images

    module.augment = augment


def rank_of(world: int, rank: int, port: int, folder: Path, script: str = "npid") -> None:
    """What a launcher tells a rank."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    evaluation_mode(script, folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(world: int, argv: list[str], images: Path, patch: Any = rank_of, script: str = "npid") -> list[Process]:
    """All ranks, started as a launcher would."""
    port = free_port()
    patches = [functools.partial(patch, world, rank, port, images) for rank in range(world)]
    if script != "npid":
        patches = [functools.partial(patch, script=script) for patch in patches]
    return [start(script, argv, patch) for patch in patches]


def close(a: Any, b: Any) -> None:
    """Assert that two nests are equal, tensors to 1e-5."""
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key])
    else:
        assert a == b


LOCAL = ["--m", "8", "--k", "20", "--warmup-epochs", "1", "--knn-every", "2", "--epochs", "2"]
METHODS = {
    "softmax": ("npid", ["--loss", "softmax", "--accumulate", "2", "--knn-every", "1", "--epochs", "1"]),
    "nce": ("npid", ["--loss", "nce", "--m", "8", "--z", "ema", "--knn-every", "1", "--epochs", "1"]),
    "shards": ("npid", ["--loss", "softmax", "--shard-bank", "--accumulate", "2", "--knn-every", "1", "--epochs", "1"]),
    # Three clusterings for two ranks: one of them makes two, the other one.
    "local aggregation": ("local_aggregation", LOCAL),
    "local aggregation, often": (
        "local_aggregation",
        [*LOCAL, "--recluster-every", "2", "--cluster-seeds", "redrawn"],
    ),
    # Gentle steps keep features so far apart that roundings move no image to another cluster.
    "local aggregation, clusters": (
        "local_aggregation",
        [*LOCAL, "--lr", "0.003", "--background", "clusters", "--background-clusters", "3", "5",
         "--cluster-on", "center-crop"],
    ),
    "local aggregation, nce": ("local_aggregation", [*LOCAL, "--warmup-loss", "nce"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_one(method: str, tmp_path: Path) -> None:
    """Weights, bank, momenta, clusterings, log and augmented images on two ranks are those on one."""
    script, options = METHODS[method]
    for world in (1, 2):
        command = [*TINY, "--no-amp", *options, "--output", str(tmp_path / f"{world}")]
        for process in launch(world, command, tmp_path / f"images{world}", script=script):
            assert process.wait().code == 0, process.err
            assert "error" not in process.err.lower()
    assert len(list((tmp_path / "images1").iterdir())) == (4 if script == "npid" else 8)
    for file in sorted((tmp_path / "images1").iterdir()):
        step = file.name.split("-")[0]
        halves = [torch.load(tmp_path / "images2" / f"{step}-{rank}") for rank in (0, 1)]
        assert torch.equal(torch.load(file), torch.cat(halves))
    one, two = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2")
    counts = [saved["state"]["totals"].pop("counts") for saved in (one, two)]
    assert counts[0] == counts[1]
    close(one, two)
    assert len(log(tmp_path / "1")) == len(log(tmp_path / "2")) > 1
    for a, b in zip(log(tmp_path / "1")[1:], log(tmp_path / "2")[1:], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def watch_statistics(world: int, rank: int, port: int, folder: Path, script: str = "npid") -> None:
    """Ranks whose networks differ in batch statistics as they look at all images end with an error."""
    module = importlib.import_module(script)
    train, place, extract = module.Encoder.train, common.Run.place, common.extract
    rank_of(world, rank, port, folder, script)
    module.Encoder.train, placed = train, list[torch.nn.Module]()

    def watched(run: common.Run, *rest: Any) -> torch.Tensor:
        assert run.alike([buffer.tolist() for buffer in placed[0].buffers()])
        return extract(run, *rest)

    common.Run.place = lambda run, model: (placed.append(model), place(run, model))[1]  # type: ignore[method-assign]
    common.extract = watched


@pytest.mark.parametrize(("script", "options"), [
    ("npid", ["--epochs", "1"]), ("cld", ["--epochs", "1"]), ("deepcluster", ["--epochs", "2"]),
    ("local_aggregation", [*LOCAL, "--cluster-on", "center-crop"]),
])
def test_ranks_look_with_the_same_statistics(script: str, options: list[str], tmp_path: Path) -> None:
    """Features of all images, of which each rank makes a part, are made with one rank's batch statistics."""
    command = [*TINY, "--knn-every", "1", *options, "--output", str(tmp_path / "run")]
    for process in launch(2, command, tmp_path / "images", watch_statistics, script):
        assert process.wait().code == 0, process.err


def count_exchanges(world: int, rank: int, port: int, folder: Path, script: str = "npid") -> None:
    """A line of the file for each exchange of gradients: the step's."""
    rank_of(world, rank, port, folder, script)
    original = common.Run.parallel

    def hook(file: Path, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        with file.open("a") as lines:
            lines.write("exchange\n")
        return allreduce_hook(None, bucket)

    def parallel(self: common.Run, model: torch.nn.Module) -> Any:
        wrapped: Any = original(self, model)
        wrapped.register_comm_hook(self.output / f"exchanges{rank}", hook)
        return wrapped

    common.Run.parallel = parallel  # type: ignore[method-assign]


@pytest.mark.parametrize("script", ["npid", "local_aggregation", "deepcluster", "cld"])
def test_parts_of_a_batch_share_one_exchange(script: str, tmp_path: Path) -> None:
    """Gradients travel as often with --accumulate 2 as without: once a step."""
    counts = set()
    for accumulate in (1, 2):
        output = tmp_path / f"{accumulate}"
        command = [*TINY, "--epochs", "1", "--no-amp", "--accumulate", str(accumulate), "--output", str(output)]
        for process in launch(2, command, tmp_path / "images", count_exchanges, script):
            assert process.wait().code == 0, process.err
        counts |= {len((output / f"exchanges{rank}").read_text().splitlines()) for rank in (0, 1)}
    assert len(counts) == 1 and min(counts) >= log(tmp_path / "1")[-1]["step"]


def test_gradients_of_three_ranks_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than two ranks on CPUs, whose gradients are summed in their order, it is the mean, as of two."""

    def all_gather(every: list[torch.Tensor], own: torch.Tensor, async_op: bool) -> argparse.Namespace:
        for rank, part in enumerate(every):
            part.copy_(own + rank)
        future = torch.futures.Future[Any]()
        future.set_result(every)
        return argparse.Namespace(get_future=lambda: future)

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    bucket = argparse.Namespace(buffer=lambda: torch.tensor([1.0, 5.0]))
    assert common.mean_in_order(bucket).wait().tolist() == [2.0, 6.0]


def fail_on_one(world: int, rank: int, port: int, folder: Path) -> None:
    """A fault that rank 1 alone meets."""
    rank_of(world, rank, port, folder)
    original = common.Run.after_step

    def after_step(self: common.Run, *args: Any) -> None:
        if self.rank == 1 and args[2] == 2:
            raise common.Fault("only here")
        original(self, *args)

    common.Run.after_step = after_step  # type: ignore[method-assign]


def die_on_one(world: int, rank: int, port: int, folder: Path) -> None:
    """Rank 1 vanishes."""
    rank_of(world, rank, port, folder)
    original = common.Run.after_step

    def after_step(self: common.Run, *args: Any) -> None:
        if self.rank == 1 and args[2] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *args)

    common.Run.after_step = after_step  # type: ignore[method-assign]


def nan_on_one(world: int, rank: int, port: int, folder: Path) -> None:
    """A loss that is not a number on rank 1 alone, in the last step of an epoch."""
    rank_of(world, rank, port, folder)
    original = common.bank_softmax
    calls: list[None] = []

    def loss(*args: Any) -> torch.Tensor:
        calls.append(None)
        return original(*args) * (float("nan") if rank == 1 and len(calls) == 8 else 1)

    common.bank_softmax = loss


def test_a_rank_that_ends_ends_all(tmp_path: Path) -> None:
    """When a rank fails or dies the other ends within seconds, with one line, and the last checkpoint is whole."""
    failed = launch(2, [*TINY, "--output", str(tmp_path / "a")], tmp_path / "images", fail_on_one)
    killed = launch(2, [*TINY, "--output", str(tmp_path / "b")], tmp_path / "images", die_on_one)
    one_line(failed[1].wait(30), "only here")
    one_line(failed[0].wait(30), "another rank ended")
    assert killed[1].wait(30).code == -signal.SIGKILL
    one_line(killed[0].wait(30), "another rank ended")


LONG_WORK = {  # script: what fails on rank 0, and what rank 1 does at that time
    "npid": ("extract", "extract"),
    "local_aggregation": ("cluster", "cluster"),
    "deepcluster": ("kmeans_half", "rank0"),
}


def fail_while_the_other_waits(world: int, rank: int, port: int, folder: Path, script: str = "npid") -> None:
    """Rank 0 fails in its work; from then on what rank 1 gathers, as by NCCL, waits for it and never ends."""
    rank_of(world, rank, port, folder, script)
    name = LONG_WORK[script][rank]
    module = common if name == "extract" else importlib.import_module(script)
    original = getattr(module, name)

    def work(*args: Any) -> Any:
        if rank == 0:
            raise common.Fault("only here")
        if name != "rank0" or args[1].dtype == torch.int64:  # the labels
            torch.distributed.all_gather = lambda *args: time.sleep(1000)
        return original(*args)

    setattr(module, name, work)


@pytest.mark.parametrize("script", LONG_WORK)
def test_nccl_does_not_wait_for_a_rank_that_has_failed(script: str, tmp_path: Path) -> None:
    """When a rank fails in what takes long the other ends, though what it would gather by NCCL then never came."""
    options = [*(LOCAL if script == "local_aggregation" else []), "--knn-every", "1", "--output", str(tmp_path / "a")]
    ranks = launch(2, [*TINY, *options], tmp_path / "images", fail_while_the_other_waits, script)
    one_line(ranks[0].wait(), "only here")
    one_line(ranks[1].wait(30), "another rank ended")


def test_a_download_is_waited_for_by_gloo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ranks wait on the CPU for one that makes a set: barrier() may take NCCL, which waits for one that has failed."""
    devices = list[str]()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: devices.append(tensor.device.type))
    assert list(common._missing(tmp_path)) == [] and devices == ["cpu", "cpu"]


def test_all_ranks_know_of_a_bad_loss(tmp_path: Path) -> None:
    """A loss that is not finite on one rank alone stops all before anything of it is saved."""
    ranks = launch(2, [*TINY, "--output", str(tmp_path / "a")], tmp_path / "images", nan_on_one)
    for process in ranks:
        one_line(process.wait(), "the loss is not finite (epoch 2, step 4)")
    assert checkpoint(tmp_path / "a")["epoch"] == 1


def test_faults_at_the_start(tmp_path: Path) -> None:
    """A batch that does not divide by the ranks, and an output that only rank 0 finds bad, end all ranks."""
    for process in launch(2, [*TINY, "--batch-size", "15", "--output", str(tmp_path / "a")], tmp_path / "images"):
        one_line(process.wait(), "--batch-size 15")
    ranks = launch(2, [*TINY, "--output", "/proc/nothing"], tmp_path / "images")
    one_line(ranks[0].wait(), "cannot write to")
    one_line(ranks[1].wait(), "another rank ended")


def other_images_on_one(world: int, rank: int, port: int, folder: Path) -> None:
    """Rank 1 sees its images in another order, as where a file has another name there."""
    rank_of(world, rank, port, folder)
    load = common.load
    common.load = lambda *args: load(*args).select(torch.arange(20).flip(0) if rank == 1 else torch.arange(20))


def more_to_test_on_one(world: int, rank: int, port: int, folder: Path) -> None:
    """Rank 1 has more images for the monitor."""
    rank_of(world, rank, port, folder)
    load = common.load_monitor

    def load_monitor(args: argparse.Namespace, *rest: Any) -> common.ImageSet | None:
        return load(argparse.Namespace(**vars(args) | dict(test_subset=20 + rank)), *rest)

    common.load_monitor = load_monitor


@pytest.mark.parametrize("patch", [other_images_on_one, more_to_test_on_one])
def test_ranks_have_to_see_the_same_images(patch: Any, tmp_path: Path) -> None:
    """Nodes whose copies of a data set differ end before training: an index would be another image on each, and of test
    images that are not equally many the shares would not fit together."""
    command = [*TINY, "--knn-every", "1", "--output", str(tmp_path / "a")]
    for process in launch(2, command, tmp_path / "images", patch):
        one_line(process.wait(), "ranks see different images of shapes")


def other_facts_on_one(world: int, rank: int, port: int, folder: Path) -> None:
    """Rank 1 finds another figure for the log's first line, as of another file of weights."""
    rank_of(world, rank, port, folder)
    npid.chance_loss = lambda *args: float(rank)


def test_ranks_have_to_agree_on_facts(tmp_path: Path) -> None:
    """What a script says of itself at the start, such as the weights it evaluates, has to be the same on all ranks."""
    for process in launch(2, [*TINY, "--output", str(tmp_path / "a")], tmp_path / "images", other_facts_on_one):
        one_line(process.wait(), "ranks differ in chance_loss")


def older_checkpoint_on_one(world: int, rank: int, port: int, folder: Path) -> None:
    """Rank 1 finds another file under the checkpoint's name, as on a disk of its node's own."""
    rank_of(world, rank, port, folder)
    load = common.load_checkpoint
    common.load_checkpoint = lambda path: load(path) | (dict(epoch=1) if rank == 1 else {})


def test_ranks_have_to_see_the_same_checkpoint(tmp_path: Path) -> None:
    """Where a node has an older checkpoint than the others a resume ends before ranks wait for each other's steps."""
    command = [*TINY, "--output", str(tmp_path / "a"), "--epochs"]
    assert run("npid", [*command, "2"]).code == 0
    for process in launch(2, [*command, "3"], tmp_path / "images", older_checkpoint_on_one):
        one_line(process.wait(), "ranks see different files", "--output")


DRIVER = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
import torch, common, npid, test_distributed
torch.set_num_threads(1)
test_distributed.evaluation_mode("npid", Path(sys.argv.pop(1)))
sys.argv[0] = "npid.py"
common.launch(npid.main, npid.parse_args)
"""


def torchrun(folder: Path, argv: list[str]) -> subprocess.Popen[str]:
    (folder / "driver.py").write_text(DRIVER)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    return subprocess.Popen([sys.executable, *command, str(folder / "driver.py"), str(folder / "images"), *argv],
                            stdout=(folder / "out").open("w"), stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, text: str, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while text not in path.read_text():
        assert process.poll() is None and time.monotonic() < end, path.read_text()
        time.sleep(0.05)


def test_torchrun_terminated_then_one_rank(tmp_path: Path) -> None:
    """SIGTERM to torchrun leaves a checkpoint, which one rank continues to where two or one would have come."""
    command = [*TINY, "--no-amp", "--output", str(tmp_path / "a")]
    process = torchrun(tmp_path, [*command, "--epochs", "100000"])
    try:
        wait_for(tmp_path / "out", '"epoch": 2', process)
        process.terminate()
        assert process.wait(60) != 0
    finally:
        process.kill()
    saved = checkpoint(tmp_path / "a")
    assert "the same command continues" in (tmp_path / "out").read_text()
    epochs = str(saved["epoch"] + 1)
    for output in ("a", "b"):
        done = run("npid", [*TINY, "--no-amp", "--output", tmp_path / output, "--epochs", epochs],
                   functools.partial(evaluation_mode, "npid", tmp_path / "images"))
        assert done.code == 0, done.err
    close(checkpoint(tmp_path / "a")["state"]["bank"], checkpoint(tmp_path / "b")["state"]["bank"])


def test_torchrun_leaves_a_scripts_options_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """--m and the like after the script's name are the script's, whatever torchrun's own options start with."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(torch.distributed.run, "run", seen.append)
    options = ["--arch", "resnet18", "--H", "10", "--m", "30000", "--m=3", "--ma"]
    tools.torchrun.main(["--nproc-per-node", "2", "local_aggregation.py", *options])
    assert seen[0].training_script == "local_aggregation.py" and seen[0].training_script_args == options
    assert seen[0].nproc_per_node == "2"


def test_torchrun_ends_by_a_signal_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C under torchrun ends with exit code 130, as it does without, and not with an exception of torchrun's."""

    def run(_: argparse.Namespace) -> None:
        raise SignalException("got signal: 2", signal.SIGINT)

    monkeypatch.setattr(torch.distributed.run, "run", run)
    with pytest.raises(SystemExit) as caught:
        tools.torchrun.main(["--nproc-per-node", "2", "npid.py"])
    assert caught.value.code == 130


@pytest.mark.slow
def test_torchrun_ends_with_its_rank(tmp_path: Path) -> None:
    """When a rank is killed torchrun ends too, with an exit code that is not zero."""
    process = torchrun(tmp_path, [*TINY, "--output", str(tmp_path / "a"), "--epochs", "100000"])
    try:
        wait_for(tmp_path / "out", '"epoch": 2', process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(60) != 0
    finally:
        process.kill()
    same(checkpoint(tmp_path / "a")["data"]["images"], 64)


def interrupted(world: int, rank: int, port: int, folder: Path) -> None:
    """A stop in the middle of the second epoch, by a signal to the last rank alone."""
    rank_of(world, rank, port, folder)
    original = common.Run.after_step

    def after_step(self: common.Run, *args: Any) -> None:
        if self.rank == world - 1 and args[1:3] == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args)

    common.Run.after_step = after_step  # type: ignore[method-assign]


def test_a_signal_to_another_rank_stops_this_one() -> None:
    """Also between steps, as in a test, where only one of the ranks has had it."""
    other, stopped = signal.SIGUSR2, list[tuple[int, ...]]()
    run: Any = argparse.Namespace(signal=0, agree=lambda wish: max(wish, other), stop=lambda *x: stopped.append(x))
    common.Run.pause(run, 3, 4)
    assert stopped == [(other, 3, 4)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_resume(world: int, tmp_path: Path) -> None:
    """Ranks, stopped within an epoch by a signal to one of them, end with the bits and log of undisturbed ones."""
    command = [*TINY, "--batch-size", "12", "--loss", "nce", "--m", "8", "--z", "ema", "--epochs", "3", "--output"]
    for output, patches in (("whole", [rank_of]), ("parts", [interrupted, rank_of])):
        for patch in patches:
            for process in launch(world, [*command, str(tmp_path / output)], tmp_path / "images", patch):
                assert process.wait().code == (143 if patch is interrupted else 0), process.err
    same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts") and len(log(tmp_path / "whole")) == 4


def shards(rank: int, world: int, store: str, folder: Path) -> None:
    """A rank's losses, gradients and rows of a bank in parts, to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    fake = common.Run.__new__(common.Run)
    fake.rank, fake.world = rank, world
    bank = npid.ShardedBank(fake, SLOTS, 16, common.generator("bank"))
    share = fake.rows(len(QUERIES))
    z = QUERIES[share].clone().requires_grad_()
    losses = npid.sharded_softmax(z, INDEX[share], bank, 0.07)
    losses.sum().backward()
    before = bank.features.clone()
    bank.update(QUERIES, INDEX, 0.5)
    everywhere = bank.gathered(torch.empty(SLOTS, 16))
    bank.collect()
    saved = bank.state_dict()["features"]
    assert torch.equal(everywhere, saved) if rank == 0 else len(saved) == 0
    torch.save([losses.detach(), z.grad, before, everywhere], folder / str(rank))
    torch.distributed.destroy_process_group()


SLOTS = 70_003  # divides by neither 2 nor 4, and takes more than one exchange
QUERIES = torch.nn.functional.normalize(torch.randn(16, 16, generator=common.generator("queries")), dim=1)
ENDS = torch.tensor([rank * SLOTS // 4 - last for rank in range(1, 5) for last in (0, 1)]) % SLOTS  # of parts
INDEX = torch.cat([ENDS, torch.randint(SLOTS, (8,), generator=common.generator("index"))])


@pytest.mark.parametrize("world", [2, 4])
def test_bank_in_parts(world: int, tmp_path: Path) -> None:
    """Rows, losses, gradients and updates of a bank in parts are those of the whole bank, to 1e-6; none has it all."""
    context = torch.multiprocessing.get_context("forkserver")
    store = str(tmp_path / "store")
    ranks = [context.Process(target=shards, args=(rank, world, store, tmp_path)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / str(rank)) for rank in range(world)]
    bank = common.MemoryBank(SLOTS, 16, common.generator("bank"))
    assert torch.equal(torch.cat([rows for _, _, rows, _ in found]), bank.features)
    assert max(len(rows) for _, _, rows, _ in found) == -(-SLOTS // world)
    z = QUERIES.clone().requires_grad_()
    losses = common.bank_softmax(z, INDEX, bank.features, 0.07)
    losses.sum().backward()
    torch.testing.assert_close(torch.cat([loss for loss, _, _, _ in found]), losses.detach(), atol=1e-6, rtol=1e-6)
    assert z.grad is not None
    gradients = torch.cat([gradient for _, gradient, _, _ in found])
    torch.testing.assert_close(0.07 * gradients, 0.07 * z.grad, atol=1e-6, rtol=1e-6)
    bank.update(QUERIES, INDEX, 0.5)
    for _, _, _, whole in found:
        assert torch.equal(whole, bank.features)
