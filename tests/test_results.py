"""The rows of the README's table: made in pieces, published without the machine's paths, written into the table."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import common
import npid
from tools import tiny_imagenet

FAKE = '''
import json, signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output") + 1] if "--output" in sys.argv else Path(sys.argv[1]).parent)
def stop(*_):
    (out / "ended").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if "--output" in sys.argv:
    log = out / "log.jsonl"
    if not log.exists():
        log.write_text(json.dumps(dict(device="a device", command=" ".join(sys.argv[1:]))) + "\\n")
    while len(log.read_text().splitlines()) < 4 and "fail" not in sys.argv:
        with log.open("a") as file:
            file.write(json.dumps(dict(epoch=1)) + "\\n")
        time.sleep(0.05)
        if "slow" in sys.argv:
            time.sleep(60)
    sys.exit(7 if "fail" in sys.argv else 0)
with (out / "eval.jsonl").open("a") as file:
    file.write(json.dumps(dict(checkpoint=sys.argv[1], knn_top1=81.26) | {sys.argv[2]: 70.04}) + "\\n")
'''


@pytest.fixture(scope="module")
def run() -> ModuleType:
    """results/run.py as a module."""
    spec = importlib.util.spec_from_file_location("results_run", common.ROOT / "results/run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["results_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two rows whose scripts only write logs; the words that name their folders."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    steps = (f"{script} {{run}}/checkpoint.pth svm_top1", f"{script} {{run}}/checkpoint.pth linear_top1")
    row = run.Row("A method", "Images", f"{script} --preset smoke", "80.0", "75.4", steps)
    monkeypatch.setattr(run, "ROWS", {"one": row, "two": row, "large": row._replace(steps=())})
    return ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--data-dir", str(tmp_path)]


def call(run: ModuleType, words: list[str]) -> int:
    """The exit code of `python results/run.py words`."""
    with pytest.raises(SystemExit) as stop:
        run.main(run.parse_args(words))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def facts(tmp_path: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "results" / name / "row.json").read_text()))


def test_rows_are_made_in_order_and_once(run: ModuleType, fake: list[str], tmp_path: Path,
                                         capfd: pytest.CaptureFixture[str]) -> None:
    """All rows with steps are trained, evaluated and published without the machine's paths; a second call does
    nothing; rows that are too large are left alone."""
    assert call(run, fake) == 0
    capfd.readouterr()
    for name in ("one", "two"):
        made = facts(tmp_path, name)
        assert made["finished"] and made["device"] == "a device" and made["images"] == "rendered"
        assert len(made["steps"]) == 3 and all(step.startswith("python ") for step in made["steps"])
        for path in (tmp_path / "results" / name).iterdir():
            assert str(tmp_path) not in path.read_text(), path
        lines = (tmp_path / "results" / name / "eval.jsonl").read_text().splitlines()
        assert [json.loads(line)["checkpoint"] for line in lines] == 2 * [f"runs/rows/{name}/checkpoint.pth"]
    assert not (tmp_path / "results/large").exists()
    assert call(run, fake) == 0
    assert capfd.readouterr().out.split("\n")[:2] == ["one: finished", "two: finished"]


def test_paths_may_have_blanks(run: ModuleType, fake: list[str], tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is trained and evaluated where --work and --data-dir say, whatever characters their names have."""
    row = run.ROWS["one"]
    monkeypatch.setitem(run.ROWS, "one", row._replace(train=f"{row.train} --data data/tiny32"))
    work, data = tmp_path / "my {runs}", tmp_path / "my data"
    assert call(run, [*fake, "one", "--work", str(work), "--data-dir", str(data)]) == 0
    assert len((work / "one/eval.jsonl").read_text().splitlines()) == 2
    (trained, *_) = json.loads((work / "one/row.json").read_text())["steps"]
    assert f" --data '{data}/tiny32' --data-dir '{data}' " in trained


def test_a_finished_row_is_published_again(run: ModuleType, fake: list[str], tmp_path: Path) -> None:
    """A call that was killed after its last step, or results that are gone, cost nothing: the next call publishes."""
    assert call(run, [*fake, "one"]) == 0
    (tmp_path / "work/one/curves.png").write_bytes(b"a picture")
    before = {path.name: path.read_bytes() for path in (tmp_path / "results/one").iterdir()}
    shutil.rmtree(tmp_path / "results/one")
    assert call(run, [*fake, "one"]) == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "results/one").iterdir()}
    assert after == before | {"curves.png": b"a picture"}


def test_a_row_is_made_in_pieces(run: ModuleType, fake: list[str], tmp_path: Path) -> None:
    """When its minutes are over a row stops cleanly with exit code 3; the same command goes on where it was."""
    assert call(run, [*fake, "one", "--minutes", "0.05", "--", "slow"]) == 3
    log = tmp_path / "results/one/log.jsonl"
    first = log.read_text() if log.exists() else ""  # a busy machine may not even have started the script
    assert not facts(tmp_path, "one")["finished"] and len(first.splitlines()) < 4
    assert call(run, [*fake, "one"]) == 0
    assert facts(tmp_path, "one")["finished"] and log.read_text().startswith(first)


@pytest.mark.parametrize(("words", "end"), [(["--minutes", "2"], 220.0), ([], math.inf)])
def test_minutes_are_those_of_a_call(words: list[str], end: float, run: ModuleType, fake: list[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a call share its minutes; without them there is no end."""
    ends = list[float]()
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(run, "make", lambda name, args, deadline: not ends.append(deadline))
    assert call(run, [*fake, *words]) == 0 and ends == [end, end]


def test_options_that_were_added_stand_in_the_table(run: ModuleType, fake: list[str], tmp_path: Path) -> None:
    """A row made with more options is not shown as one of the plain command, be they added in a later call."""
    assert call(run, [*fake, "one", "--minutes", "0.05", "--", "slow"]) == 3
    assert call(run, [*fake, "one", "--", "--epochs", "250"]) == 0
    assert f"| `{run.shown(run.ROWS['one'])} --epochs 250` |" in run.table(tmp_path / "results")
    assert call(run, [*fake, "one", "--", "--compile"]) == 0  # nothing is left to add this to
    assert "--compile" not in run.table(tmp_path / "results")


def test_options_that_come_too_late_are_named(run: ModuleType, fake: list[str], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Where a row's training has ended, a call with other options for it says that the row is without them, one
    without options nothing."""
    def said(seed: str) -> str:
        assert call(run, [*fake, "one", "--", "--seed", seed, "--file-list", str(tmp_path / "list")]) == 0
        return capsys.readouterr().out

    assert "without" not in said("1") + said("1")
    assert "one: finished, without --seed 2 " in said("2")
    shutil.rmtree(tmp_path / "results/one")
    assert "one: its training has ended, without --seed 2 " in said("2")
    shutil.rmtree(tmp_path / "results/one")
    assert call(run, [*fake, "one"]) == 0 and "without" not in capsys.readouterr().out


def test_a_row_in_pieces_has_the_minutes_and_options_of_all(
    run: ModuleType, fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 90 s in two calls make 6 minutes, a failed one included, though it has left an empty log; a later call's
    options are not the row's."""
    (tmp_path / "work/one").mkdir(parents=True)
    (tmp_path / "work/one/log.jsonl").touch()
    clock, codes = [0.0], iter([0, 1, 0, 0])

    def run_step(step: list[str], deadline: float) -> int:
        clock[0] += 90
        return next(codes)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run, "run_step", run_step)
    with pytest.raises(common.Fault, match="exit code 1"):
        run.make("one", run.parse_args([*fake, "--", "--epochs", "250"]), 1e9)
    assert facts(tmp_path, "one")["minutes"] == 3
    assert run.make("one", run.parse_args([*fake, "--", "--compile"]), 1e9)
    found = facts(tmp_path, "one")
    assert (found["minutes"], found["added"], found["finished"]) == (6, ["--epochs", "250"], True)


def test_a_call_that_is_ended_ends_its_script(run: ModuleType, fake: list[str], tmp_path: Path) -> None:
    """SIGTERM reaches the script, which would otherwise keep the row's folder; the minutes of such a call count."""
    row = run.ROWS["one"]
    code = (f"import sys; sys.path.insert(0, {str(common.ROOT)!r}); from results import run; import common; "
            f"run.ROWS = dict(one=run.Row(*{tuple(row)!r})); common.launch(run.main, run.parse_args)")
    process = subprocess.Popen([sys.executable, "-c", code, *fake, "one", "--", "slow"], stdout=subprocess.DEVNULL)
    log = tmp_path / "work/one/log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 1):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 143 and (tmp_path / "work/one/ended").exists()
    assert "minutes" in facts(tmp_path, "one") and not facts(tmp_path, "one")["finished"]


def test_results_are_written_whole(run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is killed while it writes leaves the file as it was; a home at / is no part of every path."""
    (tmp_path / "row.json").write_text("before")
    monkeypatch.setattr(Path, "replace", lambda *_: sys.exit(137))
    with pytest.raises(SystemExit):
        run.write(tmp_path / "row.json", "after")
    assert (tmp_path / "row.json").read_text() == "before"
    monkeypatch.setenv("HOME", "/")
    assert run.portable("/a/b", run.parse_args([])) == "/a/b"


def test_paths_of_other_letters(run: ModuleType) -> None:
    """A folder is made portable also where its name is written otherwise in JSON."""
    args = run.parse_args(["--work", "/ren\u00e9/work"])
    assert run.portable(json.dumps("/ren\u00e9/work/one"), args) == '"runs/rows/one"'


@pytest.mark.parametrize("file", ["results/one/row.json", "results/one/eval.jsonl", "work/one/row.json"])
def test_damaged_files_are_named(run: ModuleType, fake: list[str], tmp_path: Path, file: str) -> None:
    """A file of a row that was cut off is an error of one line that names it."""
    assert call(run, [*fake, "one"]) == 0
    (tmp_path / file).write_text((tmp_path / file).read_text()[:-9])
    if file == "work/one/row.json":
        shutil.rmtree(tmp_path / "results/one")
    with pytest.raises(common.Fault, match=f"{file} is damaged: restore it, or delete"):
        run.table(tmp_path / "results")
        run.main(run.parse_args([*fake, "one"]))


def test_a_row_that_fails_is_named(run: ModuleType, fake: list[str], tmp_path: Path,
                                   capfd: pytest.CaptureFixture[str]) -> None:
    """A step that fails ends its row, not the others; with the row named it is an error of one line."""
    assert call(run, [*fake, "--", "fail"]) == 1
    assert "one: left out: exit code 7" in capfd.readouterr().err
    with pytest.raises(common.Fault, match="exit code 7"):
        run.main(run.parse_args([*fake, "one", "--", "fail"]))
    assert not facts(tmp_path, "two")["finished"]


def test_a_row_without_pictures(run: ModuleType, fake: list[str], monkeypatch: pytest.MonkeyPatch,
                                tmp_path: Path) -> None:
    """Where matplotlib is missing a row is finished without its pictures."""
    row = run.ROWS["one"]
    monkeypatch.setitem(run.ROWS, "one", row._replace(steps=(*row.steps, "figures.py curves {run} --out x.png")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call(run, [*fake, "one"]) == 0
    assert facts(tmp_path, "one")["finished"] and len(facts(tmp_path, "one")["steps"]) == 3


def test_pictures_that_cannot_be_made_any_more(run: ModuleType, fake: list[str], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that has one of its pictures when matplotlib goes is finished without the others."""
    row = run.ROWS["one"]
    monkeypatch.setitem(run.ROWS, "one", row._replace(steps=("figures.py curves", "figures.py gallery")))
    monkeypatch.setattr(run, "run_step", lambda step, deadline: int("gallery" in step))
    with pytest.raises(common.Fault):
        call(run, [*fake, "one"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call(run, [*fake, "one"]) == 0 and facts(tmp_path, "one")["finished"]


def test_unknown_encodings_have_to_be_said(run: ModuleType, tmp_path: Path) -> None:
    """Figures of images that are not the official files are not made without saying what they are."""
    row = run.ROWS["cifar10-npid"]
    args = run.parse_args(["--data-dir", str(tmp_path)])
    assert run.encoding(row, args) == "original"  # to be downloaded
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"others")
    with pytest.raises(common.Fault, match="JPEG quality 75"):
        run.encoding(row, args)
    args.images = "JPEG quality 75"
    assert run.encoding(row, args) == args.images


def test_the_encoding_of_one_set_is_not_that_of_another(run: ModuleType, tmp_path: Path) -> None:
    """Images of Tiny ImageNet as the tool writes them need no name and get none; others have that of --images."""
    tiny, folder = run.ROWS["tiny32-npid"], tmp_path / "tiny32/train/n01443537"
    args = run.parse_args(["--data-dir", str(tmp_path), "--images", "JPEG quality 75"])
    assert run.encoding(tiny, args) == "original"  # to be made by the tool, as the script will say
    folder.mkdir(parents=True)
    (folder / "0.png").touch()
    assert run.encoding(tiny, args) == "original"
    (folder / "0.png").rename(folder / "0.jpg")
    assert run.encoding(tiny, args) == args.images


def test_table_holds_figures_of_finished_rows(run: ModuleType, fake: list[str], tmp_path: Path) -> None:
    """The table takes a finished row's last figures from its eval.jsonl and says "not run" of the others; writing it
    changes nothing else of the page."""
    call(run, [*fake, "one"])
    readme, results = tmp_path / "README.md", tmp_path / "results"
    evaluated = results / "one/eval.jsonl"
    evaluated.write_text('{"knn_top1": 1.0, "svm_top1": 2.0}\n' + evaluated.read_text())  # evaluated twice
    readme.write_text("Before.\n\n| paper | data |\n| --- | --- |\n| old | old |\n\nAfter.\n")
    run.write_table(readme, results)
    one, two = readme.read_text().splitlines()[4:6]
    assert "| 80.0 | 81.3 | 75.4 | 70.0 | 70.0 |" in one and "(results/one/log.jsonl)" in one and "rendered" in one
    assert "| 80.0 | not run | 75.4 | not run | not run |" in two and two.endswith("| |")
    page = readme.read_text()
    assert page.startswith("Before.\n\n| paper |") and page.endswith(" |\n\nAfter.\n")
    run.write_table(readme, results)
    assert readme.read_text() == page


def test_what_stands_beside_figures(run: ModuleType, fake: list[str], tmp_path: Path) -> None:
    """The table says how images are encoded unless they are the official files, and "none" of a figure that a finished
    row has not."""
    for images, said in (("original", ""), ("JPEG quality 75", ", JPEG quality 75")):
        made = dict(added=[], images=images, device="a GPU", finished=True, minutes=7.4)
        run.publish("one", made, run.parse_args(fake))
        table = run.table(tmp_path / "results").splitlines()[2]
        assert table.endswith(f"| [a GPU, 7 min{said}](results/one/log.jsonl) |")
        assert "| 80.0 | none | 75.4 | none | none |" in table


def test_list_says_how_far_rows_have_come(run: ModuleType, fake: list[str], tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    """--list names each row with its state and its commands."""
    run.publish("one", dict(finished=True), run.parse_args(fake))
    (tmp_path / "work/two").mkdir(parents=True)
    run.main(run.parse_args([*fake, "--list"]))
    row, lines = run.ROWS["one"], capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] != " "] == ["one: finished", "two: begun", "large: not run"]
    assert lines[1:4] == [f"    python {command}" for command in (row.train, *row.steps)]


def test_bad_words(run: ModuleType, fake: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A row that does not exist, and one that is too large, are errors of one line."""
    for words, said in ((["three"], "no row three"), (["large"], "torchrun --nproc-per-node 8")):
        with pytest.raises(SystemExit) as stop:
            run.parse_args([*fake, *words])
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_readme_has_this_table(run: ModuleType) -> None:
    """The README's table is the one that `python results/run.py --table` writes."""
    assert run.table(common.ROOT / "results") in (common.ROOT / "README.md").read_text()


def test_tiny_imagenet_becomes_folders(tmp_path: Path) -> None:
    """The set as it is published becomes train/ and val/ with a folder for each class, each pixel a mean of four."""
    source, pixels = tmp_path / "tiny-imagenet-200", np.zeros((64, 64, 3), np.uint8)
    pixels[::2, :, 0], pixels[:, ::2, 1] = 100, 200
    for path in ("train/n1/images/n1_0.JPEG", "train/n2/images/n2_0.JPEG", "val/images/val_0.JPEG"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(source / path, "PNG")
    (source / "val/val_annotations.txt").write_text("val_0.JPEG\tn2\t0\t0\t9\t9\n")
    assert tiny_imagenet.convert(source, tmp_path / "out", 32) == 3
    args = npid.parse_args(["--data", str(tmp_path / "out"), "--device", "cpu"])
    train, test = (common.load(args, split, torch.device("cpu")) for split in ("pretrain", "test"))
    assert (train.size, train.small, train.classes, test.labels.tolist()) == (32, True, ["n1", "n2"], [1])
    assert train.pixels is not None and train.pixels.shape == (2, 3, 32, 32)
    assert [part.unique().tolist() for part in train.pixels.unbind(1)] == [[50], [100], [0]]


@pytest.mark.parametrize("last", ["", "val_1.JPEG", "val_1.JPEG\t"])
def test_a_list_of_tiny_imagenet_that_is_cut(tmp_path: Path, last: str) -> None:
    """A line of the list of validation images that names no image and class is named, and nothing is written."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val/val_annotations.txt").write_text(f"val_0.JPEG\tn2\t0\t0\t9\t9\n{last}\n")
    with pytest.raises(common.Fault, match=r"val_annotations.txt, line 2: not the name"):
        tiny_imagenet.convert(tmp_path, tmp_path / "out", 32)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_row(run: ModuleType, fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NPID in miniature, stopped on its way, goes on, is evaluated by kNN, linear probe and SVM, and drawn."""
    few = "--subset 64 --test-subset 40"
    steps = (f"{run.KNN} {few} --k 20", f"{run.LINEAR} {few} --epochs 2", f"{run.SVM} {few}", run.CURVES)
    row = run.Row("NPID", "shapes", f"npid.py --preset smoke {few} --epochs 40 --knn-every 0", "80.8", "75.4", steps)
    monkeypatch.setattr(run, "ROWS", {"mini": row})
    for minutes in ("0.25", "9"):
        code = call(run, [*fake, "mini", "--minutes", minutes])
    assert code == 0 and facts(tmp_path, "mini")["finished"]
    log = (tmp_path / "results/mini/log.jsonl").read_text()
    assert [json.loads(line)["epoch"] for line in log.splitlines()[1:]] == list(range(1, 41))
    assert run.accuracies("mini", tmp_path / "results").keys() == {"knn", "linear", "svm"}
    assert (tmp_path / "results/mini/curves.png").exists()
    assert str(tmp_path) not in log + (tmp_path / "results/mini/eval.jsonl").read_text()
