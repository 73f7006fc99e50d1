"""Labels never reach pretraining."""

from pathlib import Path

import pytest
import torch
from helpers import TINY, checkpoint, run, same

import common


def noise_labels() -> None:
    """Every label of the training images replaced by noise, and the classes renamed."""
    original = common.load

    def load(*args: object) -> common.ImageSet:
        data = original(*args)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        data.labels = torch.randint(len(data.classes), data.labels.shape, generator=generator)
        data.classes = [f"nothing {i}" for i in range(len(data.classes))]
        return data

    common.load = load


@pytest.mark.parametrize(("script", "options"), [
    *(("npid", ["--loss", loss, "--m", "8"]) for loss in ("softmax", "nce", "sampled", "parametric")),
    ("local_aggregation", ["--warmup-epochs", "1", "--m", "8", "--k", "16"]),
])
def test_labels_never_reach_pretraining(script: str, options: list[str], tmp_path: Path) -> None:
    """With all labels replaced by noise, the monitor on, training ends with the same checkpoint bit by bit."""
    command = [*TINY, "--knn-every", "1", *options, "--output"]
    true, noise = run(script, [*command, tmp_path / "true"]), run(script, [*command, tmp_path / "noise"], noise_labels)
    assert true.code == noise.code == 0, true.err + noise.err
    accuracies = [process.out.split("knn_top1")[-1] for process in (true, noise)]
    assert accuracies[0] != accuracies[1]  # the monitor did see them
    same(checkpoint(tmp_path / "true"), checkpoint(tmp_path / "noise"))
