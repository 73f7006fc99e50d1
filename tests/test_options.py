"""Options: defaults < preset < command line, each documented, none guessed; a copied script works."""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

import cld
import common
import eval_detection
import eval_knn
import eval_linear
import eval_segmentation
import npid


def test_precedence() -> None:
    """Defaults < preset < command line."""
    assert npid.parse_args([]).width == 64 and npid.parse_args([]).weight_decay == 5e-4
    assert npid.parse_args(["--data", "somewhere"]).weight_decay == 1e-4
    assert npid.parse_args(["--preset", "cifar10"]).batch_size == 128
    args = npid.parse_args(["--preset", "cifar10", "--batch-size", "64", "--tau", "0.3"])
    assert (args.batch_size, args.temperature, args.weight_decay, args.data) == (64, 0.3, 5e-4, "cifar10")
    assert args.typed == ["batch_size", "preset", "temperature"]


def test_preset_by_data() -> None:
    """--data takes the preset of its name, any other data that of ImageNet; --preset goes before both."""
    assert npid.parse_args(["--data", "cifar100"]).preset == "cifar100"
    assert npid.parse_args(["--data=stl10"]).temperature == 0.1
    assert npid.parse_args([]).preset == "shapes"
    for folder in ("photographs", "demo", "smoke", "cifar10-thin"):  # whatever its name
        assert npid.parse_args(["--data", folder]).preset == "imagenet"
    args = npid.parse_args(["--data", "cifar100", "--preset", "cifar10-nce512"])
    assert (args.preset, args.data, args.loss, args.num_negatives) == ("cifar10-nce512", "cifar100", "nce", 512)


def test_one_rank_says_what_is_mistyped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that all ranks refuse: the first says so at once, the others leave the launcher time to end them."""
    waits = list[float]()
    monkeypatch.setattr(common.time, "sleep", waits.append)
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            npid.parse_args(["--lr", "fast"])
        assert stop.value.code == 2
    assert waits == [0, 1]


IN_VAIN = {
    "npid --data imagenet --m 512 --z ema": ["--num-negatives has no effect without --loss nce", "--z has no effect"],
    "npid --preset cifar10 --schedule cosine --lr-drops 60 80": ["--lr-drops has no effect without --schedule step"],
    "npid --preset cifar10 --epochs 100": ["training ends at 100, before --lr-drops 120 160"],
    "npid --preset cifar10 --epochs 130": ["training ends at 130, before --lr-drops 160"],
    "deepcluster --preset smoke --schedule step": ["training ends at 2, before --lr-drops 120 160"],
    "npid --preset cifar10-nce10 --m 20": [], "npid --preset cifar10 --lr-drops 60 80 --epochs 90": [],
    "npid --preset smoke": [], "npid --preset cifar10": [], "npid --data shapes --epochs 3": [],
    "cld --queue-size 4096 --key-momentum 0.9": ["--key-momentum has no effect", "--queue-size has no effect"],
    "cld --lambda 0 --clustering spectral --no-cross-view": [
        "--clustering has no effect without --lambda above 0", "--cross-view has no effect"],
    "cld --host moco --queue-size 4096": [],
    "cld --preset cifar10-no-cld --k 64 --T-G 0.1": [
        "--num-groups has no effect without --lambda above 0", "--group-temperature has no effect"],
    "deepcluster --clustering pic --k 77": ["--num-clusters has no effect without --clustering kmeans"],
    "deepcluster --crop central --min-crop 0.2": ["--min-crop has no effect without --crop random-sized"],
    "deepcluster --clustering labels --reassign-every 3": ["--reassign-every has no effect"],
    "deepcluster --sigma 0.1": ["--sigma has no effect without --clustering pic"],
    "deepcluster --arch resnet18 --descriptors after --dropout 0.2": [
        "--descriptors has no effect without --head full or 2fc", "--dropout has no effect without hidden layers"],
    "deepcluster --arch resnet18 --head no-relu --dropout 0.2": [],
    "local_aggregation --close-neighbors 5": ["--close-neighbors has no effect without --close nearest"],
    "local_aggregation --close self --background all --H 3 --k 5 --recluster-every 9": [
        "--recluster-every has no effect without clusters", "--num-clusterings has no effect without --close clusters",
        "--num-neighbors has no effect without --background nearest"],
    "local_aggregation --close self --background clusters --cluster-on bank --kmeans-iterations 9": [],
    "local_aggregation --warmup-epochs 0 --warmup-loss nce": ["--warmup-loss has no effect"],
    "local_aggregation --arch resnet18 --H 10 --m 30000": [],
    "eval_linear random --C 1 10 --draws 5": ["--cost has no effect", "--draws has no effect without --labels"],
    "eval_linear random --preset finetune --epochs 20": ["training ends at 20, before --lr-drops 30 60"],
    "eval_linear random --preset linear --schedule step": ["--schedule step without --lr-drops"],
    "eval_linear random --preset lowshot": [],
    "eval_linear random --preset svm --lr 0.1 --holdout 0.2 --folds 2": [
        "--lr has no effect", "--holdout has no effect"],
    "eval_linear random --preset finetune --layers conv5 --folds 5 --crop-scale 0.5 1": [
        "--layers has no effect without a frozen network", "--folds has no effect"],
    "eval_linear random --preset mlp --hidden 64 --dropout 0.1 --holdout 0.2 --train-crops 1": [],
    "eval_detection random --preset voc07 --iterations 3000": ["training ends at 3000, before --lr-drops 6750 8250"],
    "eval_detection random --preset voc0712": [],
    "eval_detection x.pth --small": ["--small has no effect without a random network"],
    "eval_segmentation random --small": [],
    "eval_knn random --num-clusters 5": ["--num-clusters has no effect without --clustering"],
    "eval_knn pixels --width 4": ["--width has no effect without a network"],
}


@pytest.mark.parametrize("command", IN_VAIN)
def test_what_is_typed_in_vain_is_said(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of a method that was not chosen, and drops of the rate that never come, are noted; nothing else is."""
    script, *words = command.split()
    importlib.import_module(script).parse_args(words)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(IN_VAIN[command])
    assert all(line.startswith("note: ") and said in line for line, said in zip(lines, IN_VAIN[command], strict=True))


def test_drops_that_never_come_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A drop at the end of training changes no step, one before it does; those of a preset are said where it is made
    shorter, not where they lie beyond its own end."""
    for words, drops, usual, lost in ((["lr_drops"], [9, 10, 11], 10, "10 11"), (["lr_drops"], [9], 10, ""),
                                      ([], [9, 10, 15, 25], 20, "10 15"), ([], [25], 20, "")):
        common.note_drops(argparse.Namespace(schedule="step", lr_drops=drops, typed=words), 10, usual)
        said = f"note: training ends at 10, before --lr-drops {lost}\n" if lost else ""
        assert capsys.readouterr().err == said


def test_options_for_gpus_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--cuda-graph, --sync-bn and --groups-over need GPUs, of which only a run knows."""
    words = ["--preset", "smoke", "--device", "cpu", "--no-cuda-graph", "--sync-bn", "--output", str(tmp_path)]
    common.Run(npid.parse_args(words)).lock.close()
    first, second = capsys.readouterr().err.splitlines()
    assert "--cuda-graph has no effect without a single GPU" in first
    assert "--sync-bn has no effect without several GPUs" in second
    cld.main(cld.parse_args(["--preset", "smoke", "--device", "cpu", "--groups-over", "local", "--subset", "32",
                             "--epochs", "1", "--knn-every", "0", "--output", str(tmp_path / "cld")]))
    assert "note: --groups-over has no effect without several ranks" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "reason"), [
    ("cld --instances 50 --imbalance 100", "--instances renders images anew"), ("npid --lr 1e39", "1e+38"),
    ("eval_detection random --rois 3", "--rois"), ("figures mds RUN --images 2", "--images"),
])
def test_values_that_cannot_work_are_refused_at_once(
    command: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded."""
    script, *words = command.split()
    with pytest.raises((SystemExit, common.Fault)) as stop:
        importlib.import_module(script).parse_args(words)
    assert reason in capsys.readouterr().err + str(stop.value)


def test_default_output() -> None:
    """runs/<script>-<preset>-seed<seed>, unless named."""
    args = npid.parse_args(["--data", "cifar10", "--seed", "3"])
    assert args.output == Path("runs") / f"{Path(sys.argv[0]).stem}-cifar10-seed3"
    assert npid.parse_args(["--output", "here"]).output == Path("here")


def test_help_shows_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """--preset X --help prints X's values as the defaults."""
    texts = []
    for argv in (["--preset", "cifar10-nce512", "--help"], ["--data", "imagenet", "--help"]):
        with pytest.raises(SystemExit) as stop:
            npid.parse_args(argv)
        assert not stop.value.code
        texts.append(" ".join(capsys.readouterr().out.split()))
    assert "of eq. (6), noise images drawn for each image (nce, sampled) (default: 512)" in texts[0]
    assert "(default: cifar10-nce512)" in texts[0] and "(default: 0.0005)" in texts[0]
    assert "(default: 4096)" in texts[1] and "(default: 0.0005)" not in texts[1]
    assert "default: the best available" in texts[0] and "(default: None)" not in texts[0]


def test_no_abbreviations(capsys: pytest.CaptureFixture[str]) -> None:
    """--temp is not --temperature."""
    for argv in (["--temp", "0.1"], ["--epoch", "3"], ["--pre", "cifar10"]):
        with pytest.raises(SystemExit):
            npid.parse_args(argv)
    capsys.readouterr()


def parser_of(module: Any, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that a script builds."""
    found: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any) -> Any:
        found.append(self)
        return original(self, *args)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    module.parse_args([] if module is npid else ["random"])
    return found[0]


@pytest.mark.parametrize("module", [npid, eval_knn, eval_linear, eval_detection, eval_segmentation])
def test_every_option_has_help(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option has a help text."""
    for action in parser_of(module, monkeypatch)._actions:
        assert action.help and action.help is not argparse.SUPPRESS, action.option_strings


@pytest.mark.parametrize(("name", "near"), [("cifar10-nce", "; near it: cifar10-nce1, "), ("zzz", " (see --help)")])
def test_unknown_preset(name: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset that does not exist is one short line, with those of a similar name if there are any."""
    with pytest.raises(SystemExit) as end:
        npid.parse_args(["--preset", name])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and len(error) < 200
    assert f"there is no preset {name}{near}" in error


@pytest.mark.parametrize("preset", npid.PRESETS)
def test_presets_parse(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every preset parses, and would have parsed if it had been typed."""
    args = npid.parse_args(["--preset", preset])
    known = {action.dest: action for action in parser_of(npid, monkeypatch)._actions}
    for key, value in (npid.PRESETS["imagenet"] | npid.PRESETS[preset]).items():
        assert getattr(args, key) == value
        convert = known[key].type
        if callable(convert):
            for one in value if isinstance(value, list) else [value]:
                assert convert(str(one)) == one, key


@pytest.mark.parametrize("bad", [{"no_such_option": 1}, {"arch": "resnet19"}, {"epoch": 3}])
def test_bad_preset(bad: dict[str, Any]) -> None:
    """A preset that sets an unknown option or choice raises, for the author of the script to see."""
    options = common.parser("")
    common.add_training_options(options)
    with pytest.raises(ValueError, match="preset mine sets"):
        common.parse(options, {"imagenet": {}, "mine": bad}, ["--preset", "mine"])


def test_copy_without_the_base_preset() -> None:
    """A script may drop the papers' presets, `imagenet` too: then the options' own defaults are the base."""
    for argv, lr in (([], 0.03), (["--preset", "mine"], 0.5)):
        options = common.parser("")
        common.add_training_options(options)
        assert common.parse(options, {"mine": dict(lr=0.5)}, argv).lr == lr


def test_a_share_of_one_is_no_number() -> None:
    """1 is one image; of 1.0, which others write for all of them, nobody is left with a single one."""
    assert common.count_or_share("1") == 1 and common.count_or_share("5e3") == 5000
    with pytest.raises(argparse.ArgumentTypeError, match="neither a number of images nor a share"):
        common.count_or_share("1.0")


def test_statistics_are_of_images_up_to_one(capsys: pytest.CaptureFixture[str]) -> None:
    """--mean and --std in grey levels up to 255 are refused: the network would see images of almost one colour."""
    for words in (["--mean", "123.7", "116.3", "103.5"], ["--std", "58.4", "57.1", "57.4"]):
        with pytest.raises(SystemExit):
            eval_knn.parse_args(["file.pth", *words])
        assert f"argument {words[0]}: {words[1]} is not" in capsys.readouterr().err


def test_numbers() -> None:
    """Number types: bounds, and one line that says them."""
    assert common.number(int, 0, 5)("5") == 5
    assert common.count_or_share("0.1") == 0.1 and repr(common.count_or_share("100")) == "100"
    for convert, text in ((common.number(int, 0, 5), "6"), (common.POSITIVE, "0"), (common.SHARE, "1.01"),
                          (common.count_or_share, "1.5"), (common.POSITIVE, "inf"), (common.NOT_NEGATIVE, "nan")):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            convert(text)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log's commit is that of the scripts as they ran: -dirty where one was changed or copied, not for a page."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    assert common.git_commit(tmp_path) == "unknown"
    script, page = tmp_path / "npid.py", tmp_path / "README.md"
    script.write_text("1\n")
    page.write_text("a\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    clean = common.git_commit(tmp_path)
    assert len(clean) == 12
    page.write_text("b\n")
    assert common.git_commit(tmp_path) == clean
    copy = shutil.copy(script, tmp_path / "mine.py")
    assert common.git_commit(tmp_path) == f"{clean}-dirty"
    Path(copy).unlink()
    script.write_text("2\n")
    assert common.git_commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize("inside", [True, False], ids=["from its folder", "from elsewhere"])
def test_copied_script(inside: bool, tmp_path: Path) -> None:
    """`cp npid.py mine.py && python mine.py --preset smoke` works, and writes under the new name."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(ROOT / "common.py", home)
    shutil.copy(ROOT / "npid.py", home / "mine.py")
    folder = home if inside else tmp_path
    script = "mine.py" if inside else str(home / "mine.py")
    command = [sys.executable, script, "--preset", "smoke", "--subset", "32", "--epochs", "1", "--knn-every", "0"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    output = folder / "runs" / "mine-smoke-seed0"
    assert {path.name for path in output.iterdir()} >= {"checkpoint.pth", "backbone.pth", "log.jsonl"}


@pytest.mark.parametrize(("environment", "workers"), [
    ({}, 12), (dict(LOCAL_WORLD_SIZE="4"), 3), (dict(LOCAL_WORLD_SIZE="8", SLURM_CPUS_PER_TASK="12"), 12),
    (dict(LOCAL_WORLD_SIZE="4", SLURM_CPUS_PER_TASK="2"), 3),
    (dict(LOCAL_WORLD_SIZE="4", SLURM_CPUS_PER_TASK="12", TORCHELASTIC_RUN_ID="a"), 3),
    (dict(LOCAL_WORLD_SIZE="99"), 1),
])
def test_default_workers(environment: dict[str, str], workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks share the cores that they see; one that SLURM has bound to its own takes all of them."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert common.default_workers() == workers
