"""Two gloo ranks against one, each with one thread: throughput of NPID, and what a step's collectives cost.

    python benchmarks/bench_scaling.py [--rounds 3] [npid.py's options]

Prints one JSON line and adds it to results/bench.jsonl. Both take the same batch for each rank (weak scaling).
  ratio_*            images a second of two ranks / of one; 2 is ideal, on two idle cores
  gradients_ms       all-reduce of the network's gradients, alone
  gather_ms          all-gather of the features and indices for the bank, alone
  agree_ms           all-reduce of the one number by which ranks agree to go on or to save
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402
import npid  # noqa: E402

EACH = 64  # images of a rank's batch
NETWORK = ["--preset", "shapes", "--subset", "1024", "--epochs", "2", "--knn-every", "0", "--save-minutes", "0"]


def train(ranks: int, options: list[str]) -> float:
    """Images a second of the second epoch of npid.py."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(ROOT / "npid.py"),
                   *NETWORK, "--batch-size", str(EACH * ranks), "--output", folder, *options]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return float(json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])["images_per_second"])


def collectives(parameters: int) -> dict[str, float]:
    """Median milliseconds of each on this rank of a group."""
    run = common.Run.__new__(common.Run)
    common.dist.init_process_group("gloo")
    run.rank, run.world = common.dist.get_rank(), common.dist.get_world_size()
    z, index, gradients = torch.randn(EACH, 128), torch.arange(EACH), torch.randn(parameters)

    def median(work: Callable[[], object]) -> float:
        times = []
        for _ in range(30):
            run.barrier()
            began = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - began))
        return round(statistics.median(times), 3)

    return dict(gradients_ms=median(lambda: common.dist.all_reduce(gradients)),
                gather_ms=median(lambda: run.gather(z, index)), agree_ms=median(lambda: run.agree(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--collectives", type=int, help=argparse.SUPPRESS)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    args, options = parser.parse_known_args()
    if args.collectives:
        told = json.dumps(collectives(args.collectives))
        if common.dist.get_rank() == 0:
            print(told, flush=True)
        common.dist.barrier()  # nobody leaves while another still talks
        common.dist.destroy_process_group()
        return
    width = npid.parse_args([*NETWORK, *options]).width
    pairs = [(train(1, options), train(2, options)) for _ in range(args.rounds)]
    network = common.backbone("resnet18", width, small=True)
    parameters = sum(p.numel() for p in network.parameters()) + 128 * (network.dim + 1)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--collectives"]
    command = [sys.executable, *command, str(parameters)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    ratios = [two / one for one, two in pairs]
    record = dict(
        benchmark="scaling", case=f"npid, ResNet-18 width {width}, {EACH} images a rank: 2 gloo ranks / 1",
        ratio_min=round(min(ratios), 3), ratio_median=round(statistics.median(ratios), 3),
        ratio_max=round(max(ratios), 3), one_rank=round(statistics.median(one for one, _ in pairs)),
        rounds=args.rounds, parameters=parameters,
        **json.loads(told.strip().splitlines()[-1]), cpu=common.device_name(common.CPU), threads=1,
        load=round(os.getloadavg()[0], 1), torch=torch.__version__, device="cpu",
    )
    line = json.dumps(record)
    with (ROOT / "results" / "bench.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
