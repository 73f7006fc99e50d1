"""On a CUDA device: every method trains and resumes, bfloat16 and compilation change little, no step waits for it.

What can be claimed of a GPU without one is tested on the CPU: no tensor is on the wrong device, no step waits.
"""

import argparse
import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretend_cuda
import pretend_graph
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, checkpoint, log, run, same, start
from torch._subclasses.fake_tensor import FakeTensorMode

import cld
import common
import local_aggregation
import npid

METHODS = ["npid", "local_aggregation", "deepcluster", "cld"]
ON_GPU = ["--device", "cuda"]


def steps(device: str, output: Path, count: int) -> Iterator[Callable[[], None]]:
    """The parts of NPID's, Local Aggregation's and CLD's steps around the network, ready to be called."""
    args = npid.parse_args([*TINY, "--device", device, "--output", str(output)])
    work = common.Run(args)
    data = common.load(args, "pretrain", work.device)
    bank = common.MemoryBank(len(data), 16, work.generator("bank")).to(work.device)
    clusters = local_aggregation.Clusters(3, len(data)).to(work.device)
    normalizer, totals = npid.Normalizer().to(work.device), common.Totals(work)
    batches = data.batches(work, work.permutation(0, len(data)), common.Crop(data.size, npid.SCALE), 0)

    def step() -> None:
        number, index, (images,) = next(batches)
        images = data.normalize(npid.augment(images, work.draw(0, number), False, True))
        images = data.normalize(cld.augment(images, work.draw(0, number), "mocov2", 1, False))
        z = F.normalize(images.flatten(1)[:, :16]).requires_grad_()
        losses = common.bank_softmax(z, index, bank.features, 0.1)
        losses.mean().backward()
        slots, similarity, forced = local_aggregation.nearest(z.detach(), index, bank.features, 20)
        close = clusters.same(index, slots) | local_aggregation.most_similar(similarity, 5)
        local_aggregation.local_aggregation(z, slots, similarity, close, bank.features, 0.1).mean().backward()
        _, size = local_aggregation.local_aggregation_dense(z, index, clusters, clusters, bank.features, 0.1)
        totals.add(forced=forced.float().mean(), alone=(size == 1).float().mean())
        normalizer.update(npid.estimate_log_z(losses[:, None], len(data)), 0.99)
        groups = cld.group(torch.stack([z, z]), 4, 3)
        totals.add(loss=cld.group_loss(torch.stack([z, z]), groups, 0.1)[0].mean())
        if device == "cuda":
            bank.update(z.detach(), index, 0.5)  # which on a CPU looks at the range of the indices

    for _ in range(count):
        yield step
    work.lock.close()


LOOPS = [
    ["npid"], ["npid", "--loss", "nce", "--m", "20", "--z", "ema", "--accumulate", "2"],
    ["npid", "--loss", "sampled", "--m", "20"], ["npid", "--loss", "parametric"], ["npid", "--shard-bank"], ["cld"],
    *(pytest.param(["cld", *words], marks=pytest.mark.slow) for words in (
        ["--host", "mocov2"], ["--host", "byol"], ["--host", "infomin"], ["--clustering", "spectral"])),
    ["deepcluster"], ["deepcluster", "--clustering", "pic"], ["deepcluster", "--targets-per-step", "6"],
    *(["local_aggregation", "--H", "2", "--m", "8", "--k", "16", "--warmup-epochs", "1", *words]
      for words in ([], ["--background", "clusters", "--background-clusters", "2", "4"], ["--warmup-loss", "nce"],
                    ["--close", "nearest", "--close-neighbors", "5"])),
]
# Of clustering, how often follows from the data.
CLUSTERING = {"assign", "_kmeans_torch", "cluster_sums", "split_empty", "pca_whiten", "fill_empty", "kmeans_half"}
KNOWN = {"infomin": "<lambda>",  # rotations and shears, whose matrices torchvision copies there
         "spectral": "spectral_embedding"}  # its eigenvectors


@pytest.mark.parametrize("words", [*LOOPS, ["npid", "--cache", "host"]], ids=" ".join)
def test_training_on_a_pretended_gpu(words: list[str], tmp_path: Path) -> None:
    """With all tensors on a CUDA device that is not there a run goes to its end, so that none is on the wrong one; and
    twice the steps make the host wait for it no more often."""
    script, *options = words
    unsteady = CLUSTERING | {name for word, name in KNOWN.items() if word in words}
    found = []
    for count in ("64", "128"):
        done = run(script, [*TINY, *ON_GPU, "--amp", "--subset", count, "--epochs", "2", *options, "--output",
                            tmp_path / count], functools.partial(pretend_cuda.install, tmp_path / "waits"))
        assert done.code == 0, done.err
        lines = [line.split() for line in (tmp_path / "waits").read_text().splitlines()]
        found.append(Counter(tuple(line) for line in lines if line[2] not in unsteady))
        assert log(tmp_path / count)[-1]["epoch"] == 2
    assert found[1] == found[0] and any(line[2] == "check_finite" for line in found[0])


@pytest.mark.parametrize("words", LOOPS, ids=" ".join)
def test_replayed_steps_are_those_of_the_loop(words: list[str], tmp_path: Path) -> None:
    """With steps and crops replayed on the same memory, as by a CUDA graph, a run ends with the same log and checkpoint
    to the bit as without: nothing that a step depends on is left to Python, nothing that lasts is replaced."""
    script, *options = words
    unsteady = {"infomin", "spectral", "--targets-per-step"} & set(words)
    for name in ("plain", "graph"):
        done = run(script, [*TINY, "--subset", "128", "--epochs", "4", "--schedule", "cosine", *options, "--output",
                            tmp_path / name],
                   functools.partial(pretend_graph.install, name == "graph", tmp_path / f"{name}.graphs"))
        assert done.code == 0, done.err
    recorded = (tmp_path / "graph.graphs").read_text()
    assert not (tmp_path / "plain.graphs").exists()
    assert "cut at" in recorded and ("train_step" in recorded) == (not unsteady)
    logs = [[{key: value for key, value in row.items() if not key.endswith("seconds")} for row in log(tmp_path / name)]
            for name in ("graph", "plain")]
    assert logs[0] == logs[1]
    same(checkpoint(tmp_path / "graph"), checkpoint(tmp_path / "plain"))


def graphs_that_are_left(log: Path) -> None:
    """Say at the end which functions still have a graph."""
    pretend_graph.install(True, log)
    init, finish, made = common.Graph.__init__, common.Run.finish, list[weakref.ref[common.Graph]]()

    def noted(self: common.Graph, function: Callable[..., Any]) -> None:
        init(self, function)
        made.append(weakref.ref(self))

    def said(self: common.Run, backbone: torch.nn.Module) -> None:
        finish(self, backbone)
        left = [graph.function for graph in (ref() for ref in made) if graph is not None and graph.calls]
        print("left:", *(getattr(function, "args", "cut") for function in left), flush=True)

    common.Graph.__init__, common.Run.finish = noted, said  # type: ignore[method-assign]


def test_the_warm_up_leaves_no_graph(tmp_path: Path) -> None:
    """A graph keeps the memory of its step: Local Aggregation's first one goes before the second is recorded, so that
    what fits in the warm-up fits after it."""
    words = ["--epochs", "2", "--H", "2", "--m", "8", "--k", "16", "--warmup-epochs", "1", "--output", tmp_path / "out"]
    done = run("local_aggregation", [*TINY, *words], functools.partial(graphs_that_are_left, tmp_path / "graphs"))
    assert done.code == 0 and "left: (False,) cut\n" in done.out, (done.out, done.err)
    assert (tmp_path / "graphs").read_text().count("train_step") == 2


def test_a_graph_refuses_what_it_would_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable around the step that has another value than when it was recorded, and a number or a tensor of another
    device as an input, are faults, not stale values; a variable that is set to the same again is none."""
    monkeypatch.setattr(common.Graph, "record", pretend_graph.record)
    weight, queue = 1.0, torch.ones(2)

    def step(x: torch.Tensor) -> torch.Tensor:
        return weight * x + queue

    graph = common.Graph(functools.partial(step))
    for _ in range(6):
        found = graph(torch.ones(2))
        weight = 2.0 / 2
        queue += 1
    assert found.tolist() == [7.0, 7.0]
    weight = 2.0
    with pytest.raises(common.Fault, match="weight has changed since a CUDA graph recorded it"):
        graph(torch.ones(2))
    weight, queue = 1.0, torch.cat([queue[1:], queue[:1]])
    with pytest.raises(common.Fault, match="queue has changed"):
        graph(torch.ones(2))
    late = common.Graph(lambda x: x if len(x) else unset)
    for _ in range(common.Graph.FIRST + 2):
        assert late(torch.ones(2)).tolist() == [1, 1]
    unset = 3  # a name that had no value until now
    assert late(torch.ones(2)).tolist() == [1, 1]
    other = common.Graph(lambda x, y: x)
    for _ in range(common.Graph.FIRST):
        other(torch.ones(2), 1.0)
    with pytest.raises(common.Fault, match="pass each input as a tensor"):
        other(torch.ones(2), 1.0)


def test_a_graph_returns_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that the step has not detached is: else the parameters would still accumulate on the stream of the first
    calls when the next one is recorded, which CUDA refuses."""
    monkeypatch.setattr(common.Graph, "record", pretend_graph.record)
    weight = torch.ones(2, requires_grad=True)
    graph = common.Graph(lambda x: [dict(loss=(weight * x).sum())])
    for _ in range(common.Graph.FIRST + 3):
        (found,) = graph(torch.ones(2))
        assert found["loss"].item() == 2 and not found["loss"].requires_grad


def test_a_graph_of_a_step_that_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is given random numbers need not take any, such as one whose augmentation is switched off."""
    monkeypatch.setattr(common.Graph, "record", pretend_graph.record)
    graph = common.Graph(lambda x, draw: 2 * x)
    for _ in range(common.Graph.FIRST + 2):
        draw = common.Draw(torch.Generator(), 2, slice(None), common.CPU)
        assert graph(torch.ones(2), draw).tolist() == [2, 2]


def half_a_second_behind() -> None:
    """Sums that the host waits for this long, as it does where a GPU has steps to do."""
    means = common.Totals.means

    def waited(self: common.Totals) -> dict[str, float]:
        time.sleep(0.5)
        return means(self)

    common.Totals.means = waited  # type: ignore[method-assign]


@pytest.mark.parametrize("script", METHODS)
def test_speed_counts_what_the_device_has_still_to_do(script: str, tmp_path: Path) -> None:
    """images_per_second has the time of all steps, also of those that the device has not done when the host has."""
    done = run(script, [*TINY, "--epochs", "1", "--output", tmp_path], half_a_second_behind)
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert done.code == 0 and row["images_per_second"] < 64 / 0.5


def evaluations(folder: Path) -> dict[str, list[str]]:
    """Command lines of what takes a checkpoint."""
    voc = ["--preset", "shapes", "--data", folder / "voc", "--batch-size", 4, "--iterations", 2, "--workers", 0]
    made = dict(
        eval_knn=["--k", 20, "--subset", 256, "--test-subset", 100, "--retrieval", "--clustering"],
        linear=["--preset", "smoke"], svm=["--preset", "smoke", "--protocol", "svm"],
        mlp=["--preset", "smoke", "--protocol", "mlp", "--layers", "conv5", "--lr", 0.01],
        finetune=["--preset", "smoke", "--protocol", "finetune", "--lr", 0.01, 0.03, "--weight-decay", 1e-4],
        voc07=["--protocol", "voc07", "--data", folder / "voc", "--epochs", 2, "--batch-size", 8, "--workers", 0],
        eval_detection=[*voc, "--test-size", 32, "--precise-bn", 2], eval_segmentation=[*voc, "--test-size", 32],
    )
    return {name: [str(word) for word in words] for name, words in made.items()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a VOC-style set."""
    folder = tmp_path_factory.mktemp("rendered")
    assert run("npid", ["--preset", "smoke", "--device", "cpu", "--knn-every", "0", "--output", folder]).code == 0
    common.render_voc(folder / "voc", 16, 8)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", evaluations(Path()))
def test_evaluation_on_a_pretended_gpu(name: str, rendered: Path, tmp_path: Path) -> None:
    """Every evaluation goes to its end with all tensors on a CUDA device that is not there."""
    script = name if name.startswith("eval_") else "eval_linear"
    words = [rendered / "checkpoint.pth", *evaluations(rendered)[name], *ON_GPU]
    words += ["--output", tmp_path / "out"] if script != "eval_knn" else []
    done = start(script, words, functools.partial(pretend_cuda.install, tmp_path / "waits")).wait(300)
    assert done.code == 0, done.err
    assert isinstance(json.loads(done.out.splitlines()[-1]), dict)


@pytest.mark.slow
@pytest.mark.parametrize("picture", ["gallery", "density", "mds", "edges", "pca", "filters"])
def test_picture_on_a_pretended_gpu(picture: str, rendered: Path, tmp_path: Path) -> None:
    """Pictures that take a network are drawn with all tensors on a CUDA device that is not there."""
    words = [picture, rendered, *ON_GPU, "--subset", "128", "--test-subset", "50", "--out", tmp_path / "a.png"]
    done = start("figures", words, functools.partial(pretend_cuda.install, tmp_path / "waits")).wait(300)
    assert done.code == 0 and (tmp_path / "a.png").exists(), done.err


def pretended_faults() -> None:
    """What the tests above would notice."""
    log = Path(tempfile.mkdtemp()) / "waits"
    pretend_cuda.install(log)
    here, there = torch.zeros(4, device=pretend_cuda.DEVICE), torch.zeros(4)
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device: add"):
        here + there
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    assert log.read_text() == ""
    torch.zeros(4, pin_memory=True)[1:].to(pretend_cuda.DEVICE, non_blocking=True)
    assert log.read_text() == "" and here.device.type == "cuda" and (here + 1).is_cuda
    for wait in (here.sum().item, here.tolist, here.cpu, here.nonzero, lambda: there.to(pretend_cuda.DEVICE),
                 lambda: there.to(pretend_cuda.DEVICE, non_blocking=True),
                 lambda: here.copy_(there), lambda: here[torch.arange(2)]):
        before = log.read_text()
        wait()
        assert log.read_text() > before, wait
    print("all noticed")
    sys.exit(0)


def test_pretended_faults_are_seen(tmp_path: Path) -> None:
    """Mixed devices and NumPy on the device are errors there, reading values and copying from ordinary memory noted."""
    done = run("npid", [*TINY, "--output", tmp_path], pretended_faults)
    assert done.code == 0 and "all noticed" in done.out, done.err


def rate_on_a_gpu() -> None:
    """Set the rate where a checkpoint brought one of the CPU. In a process of its own, as below."""
    with FakeTensorMode():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, device="cuda"))], torch.tensor(0.5))
        common.set_rate(optimizer, 0.03)
    print("the rate is on", optimizer.param_groups[0]["lr"].device)
    sys.exit(0)


def test_the_rate_of_a_checkpoint_moves_to_the_gpu(tmp_path: Path) -> None:
    """Checkpoints are read to the CPU: a rate that stayed there would be a constant of the step's CUDA graph."""
    done = run("npid", [*TINY, "--output", tmp_path], rate_on_a_gpu)
    assert "the rate is on cuda:0" in done.out, done.err


def finish_on_a_gpu() -> None:
    """The end of a run whose network is there. In a process of its own: fake CUDA tensors start threads of autograd,
    and a process with those cannot be forked."""
    saved: dict[str, torch.Tensor] = {}
    common.write_checkpoint = lambda path, content: saved.update(content)
    work = common.Run(npid.parse_args(sys.argv[1:]))
    work.previous = {}
    with FakeTensorMode():
        work.finish(torch.nn.Linear(2, 3, device="cuda"))
    print({weight.device.type for weight in saved.values()})
    sys.exit(0)


def test_weights_are_saved_for_any_machine(tmp_path: Path) -> None:
    """backbone.pth of a run on a GPU holds tensors of the CPU: torch.load reads it where there is no GPU."""
    done = run("npid", [*TINY, "--output", tmp_path], finish_on_a_gpu)
    assert done.code == 0 and done.out == "{'cpu'}\n", done.err


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(tmp_path: Path) -> None:
    """From the second step on nothing around the network waits, by PyTorch's own watch over synchronising calls."""
    first, second, third = steps("cuda", tmp_path, 3)
    first()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second()
        third()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_tf32() -> None:
    """Convolutions of float32 as they are on a CPU; PyTorch's default rounds to TF32."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_trains_on_a_gpu(method: str, tmp_path: Path) -> None:
    """Each method's losses on a GPU in float32 are the CPU's, nearly; the checkpoint of one resumes on the other."""
    losses, words = {}, [*TINY, "--no-amp", "--schedule", "constant"]
    for device in ("cpu", "cuda"):
        command = [*words, "--device", device, "--epochs", "1", "--output", tmp_path / device]
        done = start(method, command, without_tf32).wait(300)  # libraries come from a cold disk at first
        assert done.code == 0, done.err
        losses[device] = log(tmp_path / device)[1]["loss"]
    # Roundings move a few of DeepCluster's labels.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-2 if method == "deepcluster" else 2e-2)
    words += ["--device", "cuda", "--epochs", "2", "--output", tmp_path / "cpu"]
    done = start(method, words).wait(300)
    assert done.code == 0 and "resumed" in done.out, done.err


def the_same_each_time() -> None:
    """Kernels that add in a fixed order, and no TF32; of the four steps of an epoch three are replayed.

    A few steps of these small networks make percents of a difference in the last bits: changes of 1e-6 move the loss
    of eight steps by 1 to 10 %, that of four by 3e-6.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    without_tf32()
    common.Graph.FIRST = 1


@pytest.mark.gpu
@pytest.mark.parametrize("words", [*LOOPS, ["npid", "--compile"], ["local_aggregation", "--H", "2", "--m", "8", "--k",
                                                                   "16", "--warmup-epochs", "0"]], ids=" ".join)
def test_graphs_on_a_gpu(words: list[str], tmp_path: Path) -> None:
    """A run whose steps are replayed by a CUDA graph has the loss of one without, and goes on to its end."""
    script, *options = words
    losses = []
    for graph in ("--cuda-graph", "--no-cuda-graph"):
        command = [*TINY, *ON_GPU, "--no-amp", "--epochs", "2", "--lr", "0.003", graph, *options]
        done = start(script, [*command, "--output", tmp_path / graph], the_same_each_time).wait(300)
        assert done.code == 0, done.err
        losses.append(log(tmp_path / graph)[1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("options", [["--amp"], ["--compile", "--no-amp"], ["--amp", "--accumulate", "2"]])
def test_options_of_a_gpu(options: list[str], tmp_path: Path) -> None:
    """bfloat16, compilation and split batches end with nearly the loss of plain float32."""
    losses, gentle = [], ["--lr", "0.003", "--epochs", "2"]  # at the usual rate these few steps are chaotic
    for name, words in (("plain", ["--no-amp"]), ("other", options)):
        done = start("npid", [*TINY, *ON_GPU, *words, *gentle, "--output", tmp_path / name]).wait(300)
        assert done.code == 0, done.err
        losses.append(log(tmp_path / name)[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.fixture(scope="module")
def gpu() -> Any:
    """benchmarks/gpu.py as a module."""
    return importlib.import_module("benchmarks.gpu")


def test_a_folder_without_jpegs(gpu: Any, tmp_path: Path) -> None:
    """A --jpegs that holds none is named."""
    args = gpu.parse_args(["decode", "--device", "cpu", "--tiny", "--jpegs", str(tmp_path)])
    with pytest.raises(common.Fault, match=f"^no JPEGs in {tmp_path}$"):
        gpu.decode(gpu.Bench(args, "decode"))


def test_benchmarks_in_miniature(gpu: Any, tmp_path: Path) -> None:
    """Each record has its time, work and shares; a candidate that cannot run here is a record with its error."""
    output = tmp_path / "gpu.jsonl"
    args = gpu.parse_args(["--device", "cpu", "--tiny", "--output", str(output)])
    for name in ("ceilings", "softmax", "la-search"):
        gpu.BENCHMARKS[name][0](gpu.Bench(args, name))
    records = [json.loads(line) for line in output.read_text().splitlines()]
    softmax = {record["way"]: record for record in records if record["case"] == "N=600" and "way" in record}
    ours = softmax["bank_softmax, forward and backward"]
    assert {"flop_share", "bytes_share", "times_plain", "met"} <= ours.keys()
    assert softmax["chunked float32"]["lse_error"] < 1e-5 and softmax["chunked bfloat16, 8192 rows"]["lse_error"] < 2e-2
    assert "NotImplementedError" in softmax["flash bfloat16, 132 heads"]["error"]
    assert records[0]["case"] == "matmul bfloat16" and records[-1]["way"] == "the whole loss"


def test_figures_of_a_case(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, operations and bytes a second, their shares of what the device can, times the plain way is slower, and
    whether an aim, a rate of images or else a time, is met."""
    output, took = tmp_path / "gpu.jsonl", iter([6.0, 2.0, 2.0])
    bench = gpu.Bench(gpu.parse_args(["step", "--device", "cpu", "--tiny", "--output", str(output)]), "step")
    bench.ceilings = {"matmul tf32": 10.0, "copy": 5.0}
    monkeypatch.setattr(bench, "seconds", lambda work: next(took))
    bench.case("a", "plain", print, aim=7.0)
    bench.case("a", "fast", print, flop=8, read=4, kind="tf32", per=12, aim=1, more=lambda: 1)
    bench.case("a", "twice", print, times=2, aim=3.0)
    plain, fast, twice = ({key: value for key, value in json.loads(line).items()
                           if key not in ("benchmark", "case", "way", *bench.facts)} for line in gpu.lines_of(output))
    assert plain == dict(seconds=6, aim=7, met=True) and twice == dict(seconds=4, aim=3, met=False, times_plain=1.5)
    assert fast == pytest.approx(dict(seconds=2, images_per_second=6, aim=1, met=True, flop=8, flop_per_second=4,
                                      flop_share=0.4, bytes=4, bytes_per_second=2, bytes_share=0.4, times_plain=3,
                                      more=1))


def test_candidates_that_fail(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails is a record, and the next has its turn; one that loses the device ends the process."""
    bench = gpu.Bench(gpu.parse_args(["--device", "cpu", "--tiny", "--output", str(tmp_path / "gpu.jsonl")]), "mine")

    def fails() -> None:
        raise RuntimeError("no\nkernel")

    bench.case("a", "plain", lambda: None)
    bench.case("a", "one", fails)
    bench.case("a", "two", lambda: None, loss=lambda: 1.5)
    monkeypatch.setattr(bench, "wait", fails)
    with pytest.raises(RuntimeError):
        bench.case("a", "three", fails)
    _plain, one, two, three = (json.loads(line) for line in gpu.lines_of(tmp_path / "gpu.jsonl"))
    assert one["error"] == three["error"] == "RuntimeError: no kernel"
    assert two["loss"] == 1.5 and {"seconds", "times_plain"} <= two.keys()


def test_a_benchmark_goes_on_after_a_lost_device(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it comes further it is started again, without what is recorded; one that does not finish is named."""
    output, starts = tmp_path / "gpu.jsonl", list[list[str]]()
    words = ["softmax", "--device", "cpu", "--tiny", "--output", str(output)]
    output.write_text('{"benchmark": "softmax", "case": "N=600", "way": "old", "device": "cpu"}\n{"half')
    output.write_text(output.read_text() + "\n")

    def call(command: list[str], limit: float) -> int:
        starts.append(command)
        bench = gpu.Bench(gpu.parse_args(command[2:]), "softmax")
        for way in ("plain", "one"):
            if ("N=600", way) not in bench.done:
                bench.write(case="N=600", way=way, seconds=2.0)
                return 1
        assert bench.plain == {"N=600": 2.0} and ("N=600", "old") not in bench.done
        return 0 if len(starts) == 3 else 1

    monkeypatch.setattr(gpu, "call", call)
    gpu.main(gpu.parse_args(words))
    assert len(starts) == 3 and all(command[-2:] == ["--since", "2"] for command in starts)
    assert "error" not in json.loads(gpu.lines_of(output)[-1])
    with pytest.raises(common.Fault, match="not finished: softmax"):
        gpu.main(gpu.parse_args(words))
    assert len(starts) == 6 and json.loads(gpu.lines_of(output)[-1])["error"] == "exit code 1"


class Still:
    """A training step that does nothing."""

    def __init__(self, *_: Any, plain: bool = False, **options: bool) -> None:
        self.amp = not plain

    def __call__(self) -> None:
        pass


def test_a_new_process_knows_the_work(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that the process before has counted are read back: the steps that are left have their shares; those
    in float32 are shares of the ceiling of TF32, in which PyTorch convolves."""
    output, case = tmp_path / "gpu.jsonl", "a step"
    facts = gpu.Bench(gpu.parse_args(["ceilings", "--device", "cpu", "--output", str(output)]), "ceilings").facts
    rates = [dict(benchmark="ceilings", case=f"matmul {kind}", way="", rate=rate) for kind, rate in
             (("bfloat16", 4e9), ("tf32", 2e9), ("float32", 1e9))]
    counted = dict(benchmark="step", case=case, way="counted", flop=8e9)
    output.write_text("".join(json.dumps(record | facts) + "\n" for record in [*rates, counted]))
    bench = gpu.Bench(gpu.parse_args(["step", "--device", "cpu", "--tiny", "--output", str(output)]), "step")
    monkeypatch.setattr(gpu, "Step", Still)
    monkeypatch.setattr(gpu, "profile", lambda *_: {})
    gpu.training(bench, {case: 8}, 1.0, "resnet18", 16, 32, 16)
    _, _, _, first, *records = map(json.loads, gpu.lines_of(output))
    assert first["way"] == "counted" and [record["way"] for record in records[:2]] == ["plain", "eager"]
    for record, rate in zip(records[:2], (2e9, 4e9), strict=True):
        assert record["flop_share"] == pytest.approx(8e9 / record["seconds"] / rate)


def test_term_ends_the_child(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TERM ends the benchmark that is running as well."""
    child, said = tmp_path / "python", tmp_path / "pid"
    child.write_text(f"#!/bin/sh\necho $$ > {said}.tmp\nmv {said}.tmp {said}\nexec sleep 60\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))

    def end() -> None:
        while not said.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread, before = threading.Thread(target=end), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)
        thread.start()
        with pytest.raises(SystemExit) as stop:
            gpu.main(gpu.parse_args(["step", "--tiny", "--minutes", "0.1", "--output", str(tmp_path / "gpu.jsonl")]))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)


def test_benchmark_heads_merge_exactly(gpu: Any) -> None:
    """Attention over pseudo-heads with a rest that no head takes equals the loop over the whole bank."""
    z, bank = (F.normalize(torch.randn(rows, 16), dim=1) for rows in (5, 103))

    def operator(query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = query @ keys.mT / gpu.TAU
        return scores.softmax(3) @ keys, scores.logsumexp(3)

    torch.testing.assert_close(gpu.in_heads(operator, 7)(z, bank), common.bank_attention(z, bank, gpu.TAU), atol=1e-5,
                               rtol=1e-5)


def test_ratios_of_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ratio is theirs over ours of one round, and the first round does not count."""
    bench = importlib.import_module("benchmarks.bench")
    monkeypatch.setattr(bench, "seconds", lambda way, device: way())
    theirs, ours = iter([90.0, 2.0, 6.0, 3.0]), iter([1.0, 1.0, 2.0, 3.0])
    args = argparse.Namespace(device="cpu", repeats=3)
    assert bench.race("case", lambda: next(theirs), lambda: next(ours), args) == dict(
        case="case", ratio_min=1, ratio_median=2, ratio_max=3, theirs_seconds=3, ours_seconds=2, rounds=3)


def test_ratios_without_faiss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without Faiss bench.py says what it leaves out, and goes on with what does not need it."""
    monkeypatch.syspath_prepend(str(common.ROOT / "benchmarks"))
    bench = importlib.import_module("bench")
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(common, "keep_freed_memory", lambda: None)
    against = ["kmeans", "knn", "cld"]
    monkeypatch.setattr(bench, "BENCHMARKS", {name: bench.BENCHMARKS[name] for name in against}
                        | {"last": lambda args: [dict(case="one", ratio_min=2)]})
    bench.main(bench.parse_args(["--repeats", "1", "--output", str(tmp_path / "bench.jsonl")]))
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.err.splitlines()] == against and said.err.count("Faiss is missing") == 3
    assert said.out == "last, one: ratio_min 2\n" and len((tmp_path / "bench.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_profile_on_paper_is_the_page(gpu: Any) -> None:
    """The tables of benchmarks/README.md are those that the benchmark prints."""
    page = (common.ROOT / "benchmarks/README.md").read_text()
    assert all(part.strip() in page for part in gpu.paper().split("\n\n"))
