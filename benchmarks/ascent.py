"""How far gradient ascent, as in `figures.py maximize`, raises every channel of a network over noise.

    python benchmarks/ascent.py runs/npid-cifar10-thin-seed0 [--steps 200] [--output results/figures/maximize.jsonl]

Prints one JSON line and adds it to the file. Noise, activation and the four ascents of a channel are those of
`figures.optima`; channels that no noise image fires are left out, for silence has no gradient.
  channels, tenfold   that noise fires; of these, whose image fires them at least ten times as much as the noise does
  ratio_*             activation on the channel's image / mean activation on the noise
  loud_ratio_*        the same over noise of that image's contrast, channels left out that such noise leaves silent
  below               stage, channel and ratio of those that are not raised tenfold
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common
import figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a training script")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, help="file to which the line is added")
    args = parser.parse_args()
    encoder = common.load_encoder(args.run / "checkpoint.pth")
    network: Any = encoder.backbone.requires_grad_(False)
    size, names, ratios, above = encoder.data["size"], list[tuple[str, int]](), list[float](), list[float]()
    for stage, name in enumerate(figures.STAGES):
        source = common.generator(args.seed, "maximize", stage)
        noise = figures.CONTRAST * torch.randn(16, 3, size, size, generator=source)
        maps = network.stages(noise[:1])[stage].shape[1]
        for part in torch.arange(maps).split(32):
            found = figures.optima(network, stage, part, noise, args.steps)
            names += [(name, channel) for channel in found.channels.tolist()]
            ratios += (found.after / found.before).tolist()
            above += (found.after / found.loud)[found.loud > 0].tolist()
        print(f"{name}: {len(names)} channels so far, the least ratio {min(ratios):.1f}", file=sys.stderr, flush=True)
    below = [[*name, round(ratio, 2)] for name, ratio in zip(names, ratios, strict=True) if ratio < 10]
    row = dict(benchmark="ascent", run=args.run.name, checkpoint_sha256=encoder.sha256, torch=torch.__version__,
               steps=args.steps, seed=args.seed, channels=len(names), tenfold=len(names) - len(below),
               ratio_min=round(min(ratios), 2), ratio_median=round(sorted(ratios)[len(ratios) // 2], 1),
               loud_ratio_min=round(min(above), 2), loud_ratio_median=round(sorted(above)[len(above) // 2], 1),
               silent_when_loud=len(names) - len(above), below=below)
    print(json.dumps(row))
    if args.output:
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
