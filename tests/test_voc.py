"""VOC: the rendered set, the reader of folders in its layout, and average precision."""

import argparse
import http.client
import math
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.metrics import precision_recall_curve
from torchvision.datasets import VOCDetection, VOCSegmentation

import common
import eval_linear

SIDES = ("xmin", "ymin", "xmax", "ymax")
PACKS = common.ROOT.parent / "shared" / "data" / "voc"
packed = pytest.mark.skipif(not PACKS.is_dir(), reason="the packs with real boxes are not here")


def options(data: str | Path, **more: object) -> argparse.Namespace:
    values = dict(data=str(data), data_dir=Path("nowhere"), subset=None, test_subset=None, seed=0)
    return argparse.Namespace(**values | more)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered set of 12 images to train on and 6 to test on, as VOCdevkit/VOC2007."""
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit" / "VOC2007"
    root.parent.mkdir()
    common.render_voc(root, 12, 6)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 40 x 30 px without annotations, and the list of them."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (40, 30), "red").save(tmp_path / "JPEGImages" / f"{name}.jpg")
        annotate(tmp_path, name, "")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb\nc\n")
    return tmp_path


def annotate(folder: Path, name: str, *objects: str) -> None:
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")


def box(name: str, *sides: float, more: str = "") -> str:
    places = "".join(f"<{key}>{side}</{key}>" for key, side in zip(SIDES, sides, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{places}</bndbox></object>"


def test_torchvision_reads_the_rendered_set(rendered: Path) -> None:
    """torchvision's VOCDetection and VOCSegmentation read it, and see what our reader sees."""
    devkit = rendered.parent.parent
    ours = common.load_voc(options(devkit), "train")
    theirs = VOCDetection(str(devkit), "2007", "trainval")
    assert len(ours) == len(theirs) == 12 and ours.classes == [f"class{i}" for i in range(10)]
    for image, (pixels, target) in zip(ours.images, theirs, strict=True):
        assert image.size == pixels.size == (96, 96)
        objects = target["annotation"].get("object", [])
        assert [item["name"] for item in objects] == [ours.classes[label] for label in image.labels]
        sides = [[int(item["bndbox"][key]) for key in SIDES] for item in objects]
        assert image.boxes.tolist() == [[x1 - 1, y1 - 1, x2, y2] for x1, y1, x2, y2 in sides]
        assert [item["difficult"] == "1" for item in objects] == image.difficult.tolist()
    assert len(VOCSegmentation(str(devkit), "2007", "test")) == 6


def test_folders_that_hold_a_set(rendered: Path, tmp_path: Path) -> None:
    """VOCdevkit, and the folder that it lies in, stand for the set there; of two, one has to be named."""
    places = [common.load_voc(options(place), "train") for place in (rendered, rendered.parent, rendered.parent.parent)]
    assert len({place.identity()["checksum"] for place in places}) == 1
    shutil.copytree(rendered, tmp_path / "VOC2007")
    shutil.copytree(rendered, tmp_path / "VOC2012")
    with pytest.raises(common.Fault, match=r"more than one: .*VOC2007, .*VOC2012"):
        common.load_voc(options(tmp_path), "train")


def test_masks_and_boxes_of_the_rendered_set_agree(rendered: Path) -> None:
    """A class's pixels lie in its boxes, the outline is void, and a box holds pixels of its class."""
    for image in common.load_voc(options(rendered), "train", "Segmentation").images:
        with Image.open(image.mask) as file:
            assert file.mode == "P" and file.getpalette()[3:6] == [128, 0, 0]  # type: ignore[index]
            mask = torch.from_numpy(np.array(file))
        assert set(mask.unique().tolist()) == {0, common.VOID, *(image.labels + 1).tolist()}
        inside = torch.zeros_like(mask, dtype=torch.bool)
        for (x1, y1, x2, y2), label in zip(image.boxes.long().tolist(), image.labels, strict=True):
            assert (mask[y1:y2, x1:x2] == label + 1).any()
            inside[y1:y2, x1:x2] = True
        assert (mask[~inside] % common.VOID == 0).all()


def test_class_lists_agree_with_the_annotations(rendered: Path) -> None:
    """The lists of each class have 1, 0 (difficult objects alone) and -1 as `presence` has them; all three occur."""
    devkit = common.load_voc(options(rendered), "train")
    assert set(eval_linear.presence(devkit).flatten().tolist()) == {-1, 0, 1}
    for name, column in zip(devkit.classes, eval_linear.presence(devkit).T, strict=True):
        lines = (rendered / "ImageSets/Main" / f"{name}_trainval.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == [image.path.stem for image in devkit.images]
        assert [int(line.split()[1]) for line in lines] == column.tolist()
    image = common.VocImage(Path(), (9, 9), torch.zeros(3, 4), torch.tensor([2, 2, 1]),
                            torch.tensor([True, False, True]), Path())
    assert eval_linear.presence(common.VocSet("", list("abcd"), [image])).tolist() == [[-1, 0, 1, -1]]


@pytest.mark.parametrize("end", ["train", "trainval"])
def test_hidden_files_are_no_class_lists(end: str, folder: Path) -> None:
    """Lists of one class name the classes, but for those that a Mac leaves beside each file on foreign disks."""
    for name in ("cat", "dog", "._cat"):
        (folder / f"ImageSets/Main/{name}_{end}.txt").write_text("a 1\n")
    assert common.load_voc(options(folder), "train").classes == ["cat", "dog"]


def test_own_lists_are_no_class_lists(folder: Path) -> None:
    """A list that --train-list names, without flags, makes no class of its name, whatever it ends with."""
    annotate(folder, "a", box("cat", 1, 1, 9, 9))
    (folder / "ImageSets/Main/small_train.txt").write_text("a\nb\n")
    data = common.load_voc(options(folder, train_list="small_train"), "train")
    assert data.classes == ["cat"] and len(data) == 2


def test_spaces_in_names(folder: Path) -> None:
    """Lists take names with spaces, as of copied files, for the names they are, with and without flags: a name that
    ends as if by a flag is one, where others have none."""
    for old, new in (("b", "a (1)"), ("c", "a 1")):
        for kind in ("JPEGImages/{}.jpg", "Annotations/{}.xml"):
            (folder / kind.format(old)).rename(folder / kind.format(new))
    for text in ("a\na (1)\na 1\n", "a  1\r\na (1) -1\r\na 1 0\r\n"):
        (folder / "ImageSets/Main/train.txt").write_text(text)
        data = common.load_voc(options(folder), "train")
        assert [image.path.name for image in data.images] == ["a.jpg", "a (1).jpg", "a 1.jpg"]


def test_what_is_tested_is_not_trained_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the test is val, by default or by name, training takes train, not trainval; shared images are told."""
    for name, text in (("trainval", "a\nb\nc\n"), ("train", "a\nb\n"), ("val", "c\n")):
        (folder / "ImageSets/Main" / f"{name}.txt").write_text(text)

    def paths(split: str, **more: object) -> list[Path]:
        return [image.path for image in common.load_voc(options(folder, **more), split).images]

    assert len(paths("train")) == 2 and len(paths("test")) == 1
    assert len(paths("train", train_list="trainval")) == 3
    (folder / "ImageSets/Main/test.txt").write_text("c\n")
    assert len(paths("train")) == 3 and len(paths("train", test_list="val")) == 2
    common.note_shared(paths("train", test_list="val"), paths("test", test_list="val"))
    assert not capsys.readouterr().err
    common.note_shared(paths("train", train_list="trainval"), paths("test", test_list="val"))
    assert capsys.readouterr().err == "note: 1 of the 1 test images are trained on: the figures are no test\n"


def test_classes_of_a_subset(folder: Path) -> None:
    """With --subset the classes are those of the whole list, so that the test has none that training lacks."""
    for name, label in zip("abc", ("cat", "dog", "fox"), strict=True):
        annotate(folder, name, box(label, 1, 1, 9, 9))
    data = common.load_voc(options(folder, subset=2.0), "train")
    assert data.classes == ["cat", "dog", "fox"] and len(data) == 2
    assert [data.classes[int(image.labels)] for image in data.images] == [
        {"a": "cat", "b": "dog", "c": "fox"}[image.path.stem] for image in data.images]


def test_subsets_are_drawn(folder: Path) -> None:
    """--subset and --test-subset draw a number or a share of the images by --seed, in the order of the list."""
    for split in ("train", "test"):
        key, drawn = "subset" if split == "train" else "test_subset", set[str]()
        for seed in range(20):
            wanted = options(folder, seed=seed, test_list="train", **{key: 0.5 if seed % 2 else 2.0})
            names = [image.path.stem for image in common.load_voc(wanted, split).images]
            assert len(names) == 2 and names == sorted(names)  # of three: 1.5 is rounded to an even number
            drawn.add("".join(names))
        assert drawn == {"ab", "ac", "bc"}


def test_boxes_on_a_turned_photograph(folder: Path) -> None:
    """An image whose boxes count its pixels as EXIF turns them, by a quarter, mirrored or not, is refused where boxes
    are needed; a wrong size in the XML alone is not."""
    (folder / "Annotations/a.xml").write_text("<annotation><size><width>30</width><height>40</height></size>"
                                              + box("cat", 1, 1, 9, 30) + "</annotation>")
    assert len(common.load_voc(options(folder), "train")) == 3
    shutil.copytree(folder / "ImageSets/Main", folder / "ImageSets/Segmentation")
    for orientation in (5, 6, 7, 8):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (40, 30), "red").save(folder / "JPEGImages/a.jpg", exif=exif)
        with pytest.raises(common.Fault, match=r"a\.jpg is turned by its EXIF orientation"):
            common.load_voc(options(folder), "train")
        assert len(common.load_voc(options(folder), "train", "Segmentation")) == 3


def test_rendered_by_need(tmp_path: Path) -> None:
    """--data shapes renders once, just what --subset and --test-subset ask for, and the images do not depend on how
    many there are."""
    wanted = options("shapes", data_dir=tmp_path, subset=4.0, test_subset=2.0)
    first = common.load_voc(wanted, "train")
    again = common.load_voc(wanted, "train")
    more = common.load_voc(options("shapes", data_dir=tmp_path, subset=0.006, test_subset=2.0), "train")
    assert (len(first), len(more)) == (4, 6) and first.identity() == again.identity() != more.identity()
    assert not list(tmp_path.glob("*.tmp"))
    for a, b in zip(first.images, more.images[:4], strict=True):
        assert a.path != b.path and a.path.read_bytes() == b.path.read_bytes() and torch.equal(a.boxes, b.boxes)
    train = {image.path.read_bytes() for image in more.images}
    test = [image.path.read_bytes() for image in common.load_voc(wanted, "test", classes=None).images]
    assert len(test) == 2 and not train & set(test)


def test_rendered_on_each_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that does not see the files of the first one renders its own, by one of its ranks."""
    wanted = options("shapes", data_dir=tmp_path, subset=3.0, test_subset=2.0)
    monkeypatch.setenv("RANK", "3")
    for local_rank, there in (("1", False), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert common._voc_root(wanted).is_dir() == there


def test_two_processes_render_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another process renders the same set meanwhile, both end well; it is whole, and nothing else is left."""
    root, render = tmp_path / "new" / "set", common.render_scene

    def other_first(*args: Any) -> Any:
        monkeypatch.setattr(common, "render_scene", render)
        common.render_voc(root, 2, 1)
        return render(*args)

    monkeypatch.setattr(common, "render_scene", other_first)
    common.render_voc(root, 2, 1)
    assert len(common.load_voc(options(root), "train")) == 2 and list(root.parent.iterdir()) == [root]
    assert {path.name for path in (root / "JPEGImages").iterdir()} == {
        "trainval_00000.jpg", "trainval_00001.jpg", "test_00000.jpg"}


def test_handled_as_voc_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images without boxes stay; parts are no objects; boxes beyond the border are cut off or left out, and the others
    keep their classes, blanks around whose names are no part of them."""
    annotate(folder, "a", box("cat", 1, 1, 40, 30), box("dog", 5, 6, 80, 20), box("dog", 60, 1, 70, 9),
             box(" cat\n", 0, 3.5, 9, 9, more="<difficult> 1 </difficult><part><name>head</name></part>"))
    data = common.load_voc(options(folder), "train")
    assert data.classes == ["cat", "dog"] and [len(image.boxes) for image in data.images] == [3, 0, 0]
    assert data.images[0].boxes.tolist() == [[0, 0, 40, 30], [4, 5, 40, 20], [0, 2.5, 9, 9]]
    assert data.images[0].labels.tolist() == [0, 1, 0]
    assert data.images[0].difficult.tolist() == [False, False, True] and data.images[1].boxes.shape == (0, 4)
    note = capsys.readouterr().err.splitlines()
    assert note == ["note: 1 boxes reach outside their image and are cut off there, 1 have no pixel in it and are "
                    "left out; the first in a.jpg"]
    half = common.load_voc(options(folder, subset=2.0), "train")
    assert len(half) == 2


@pytest.mark.parametrize("first", [(1, 1, 90, 9), (20, 1, 10, 9)])
def test_the_first_image_with_a_box_outside_is_named(
    first: tuple[int, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The note on boxes names the first image in the list whose box is cut off at the border, or has no pixel."""
    annotate(folder, "b", box("cat", *first))
    annotate(folder, "c", box("cat", 1, 1, 90, 9), box("cat", 60, 1, 70, 9))
    common.load_voc(options(folder), "train")
    assert capsys.readouterr().err.endswith("; the first in b.jpg\n")


def test_identity(folder: Path) -> None:
    """Sets that differ in a box, a class, in a name or in what is difficult are told apart; the same set is not."""
    seen = []
    for text in (box("cat", 1, 1, 9, 9), box("cat", 1, 1, 9, 8), box("dog", 1, 1, 9, 9),
                 box("cat", 1, 1, 9, 9, more="<difficult>1</difficult>")):
        annotate(folder, "a", text)
        data = [common.load_voc(options(folder), "train", classes=["cat", "dog"]).identity() for _ in range(2)]
        assert data[0] == data[1]
        seen.append(data[0]["checksum"])
    for kind in ("JPEGImages/{}.jpg", "Annotations/{}.xml"):
        (folder / kind.format("c")).rename(folder / kind.format("d"))
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\nd\n")
    seen.append(common.load_voc(options(folder), "train", classes=["cat", "dog"]).identity()["checksum"])
    assert len(set(seen)) == 5


def test_identity_of_masks(folder: Path) -> None:
    """For segmentation, sets whose masks differ in a pixel are told apart, too; for other tasks masks do not matter."""
    seen = []
    (folder / "SegmentationClass").mkdir()
    shutil.copytree(folder / "ImageSets/Main", folder / "ImageSets/Segmentation")
    for value in (1, 2, 2):
        for name in "abc":
            mask = Image.new("L", (40, 30))
            mask.putpixel((0, 0), value)
            mask.save(folder / "SegmentationClass" / f"{name}.png")
        seen.append([common.load_voc(options(folder), "train", task).identity() for task in ("Segmentation", "Main")])
    assert seen[0][0] != seen[1][0] == seen[2][0] and seen[0][1] == seen[1][1]


def test_folders_of_other_tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other endings, as cameras' in upper case, and the mark that some editors begin a list with; --data . is the
    folder's name."""
    expected = common.load_voc(options(folder), "train").identity()
    (folder / "ImageSets/Main/train.txt").write_text("a\nb\nc\n", encoding="utf-8-sig")
    monkeypatch.chdir(folder)
    assert common.load_voc(options("."), "train").identity() == expected
    path = folder / "JPEGImages/b.jpg"
    for ending in (".JPG", ".jpeg", ".png", ".PNG"):
        path = path.rename(path.with_suffix(ending))
        assert common.load_voc(options("."), "train").images[1].path.name == path.name


def test_faults(folder: Path, tmp_path: Path) -> None:
    """What cannot be read is named: folder, list, image, annotation, class."""

    def fails(words: str, split: str = "train", data: str | Path = folder, **more: object) -> None:
        with pytest.raises(common.Fault, match=words):
            common.load_voc(options(data, **more), split, classes=more.get("classes"))  # type: ignore[arg-type]

    fails("no directory", data=folder / "nowhere")
    fails("no folder in VOC's layout", data=folder / "Annotations")
    fails("test.txt .No such file", split="test")
    fails("other.txt", train_list="other")
    fails("has 3 images here", subset=4.0)
    annotate(folder, "b", box("fox", 1, 2, 3, 4))
    fails("b.jpg has an object of the class fox, which is none of cat: mend its XML file$", classes=["cat"])
    fails("or train on images of that class, too$", split="test", test_list="train", classes=["cat"])
    annotate(folder, "b", box("", 1, 2, 3, 4))
    fails("b.xml is no annotation of VOC's .an object without class or box")
    annotate(folder, "b", box("fox", 1, 2, 3, math.nan))
    fails("b.xml .*an object without class or box")
    for text in ("<annotation><object>", "", "<annotation><object><name>a</name><bndbox><xmin>x</xmin></bndbox>"
                 "</object></annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation/>'):
        (folder / "Annotations/b.xml").write_text(text)
        fails("b.xml is no annotation of VOC's")
    (folder / "Annotations/b.xml").unlink()
    fails("b.xml .No such file")
    (folder / "JPEGImages/b.jpg").write_bytes(b"")
    fails("b.jpg .damaged or empty")
    (folder / "ImageSets/Main/train.txt").write_text("\n")
    fails("train.txt lists no images")


def test_download(rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is fetched by torchvision, once; without a network one line says what to do."""
    wanted, asked = options("voc0712", data_dir=tmp_path), list[tuple[str, str]]()

    def fetch(root: str, download: bool, year: str, image_set: str) -> None:
        asked.append((year, image_set))
        if len(asked) == 4:
            raise http.client.BadStatusLine("no network")  # as of a proxy
        place = Path(root) / "VOCdevkit" / f"VOC{year}"
        shutil.copytree(rendered, place, dirs_exist_ok=True)
        for annotation in (place / "Annotations").iterdir():
            annotation.write_text(re.sub("<name>class.", "<name>dog", annotation.read_text()))

    monkeypatch.setattr("torchvision.datasets.VOCDetection", fetch)
    data = common.load_voc(wanted, "train")
    assert asked == [("2007", "trainval"), ("2012", "trainval")] and len(data) == 24
    assert data.classes == common.VOC_CLASSES and {image.labels[0].item() for image in data.images} == {11}
    assert {image.path.parts[-3] for image in data.images} == {"VOC2007", "VOC2012"}
    common.load_voc(wanted, "train")
    assert len(common.load_voc(wanted, "test")) == 6 and len(asked) == 2
    with pytest.raises(common.Fault, match=r"could not be downloaded .no network.: name its parent"):
        asked.append(("", ""))
        common.load_voc(options("voc12", data_dir=tmp_path / "other"), "train")


def test_a_list_that_does_not_exist_is_not_downloaded(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a set that is there, a mistyped list is a Fault that names it; one that is there needs no other."""
    monkeypatch.setattr("torchvision.datasets.VOCDetection", None)
    for task in ("Main", "Segmentation"):
        with pytest.raises(common.Fault, match=r"trianval.txt .No such file"):
            wanted = options("voc07", data_dir=rendered.parent.parent, train_list="trianval")
            common.load_voc(wanted, "train", task)
    root = tmp_path / "VOCdevkit" / "VOC2007"
    shutil.copytree(rendered, root)
    (root / "ImageSets/Main/trainval.txt").unlink()
    with pytest.raises(common.Fault, match="object of the class class"):
        common.load_voc(options("voc07", data_dir=tmp_path, train_list="test"), "train")


def slow_precision(scores: list[float], right: list[bool], total: int, eleven_points: bool) -> float:
    """VOC's development kit in loops and whole numbers; the order of equal scores is that of the list."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    points, hits = [], 0
    for seen, i in enumerate(order, 1):
        hits += right[i]
        points.append((hits, hits / seen))
    if eleven_points:
        tops = [max([p for h, p in points if 10 * h >= tenth * total], default=0.0) for tenth in range(11)]
        return 100 * sum(tops) / 11
    return 100 * sum(max(p for h, p in points if h >= k) for k in range(1, hits + 1)) / total


def test_average_precision_by_hand() -> None:
    """Three answers right, wrong, right of two: area (1 + 2/3) / 2; eleven points (6 x 1 + 5 x 2/3) / 11."""
    scores, right = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([True, True, False])
    assert common.average_precision(scores, right, 2, False) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert common.average_precision(scores, right, 2, True) == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    none = torch.zeros(0)
    for eleven_points in (True, False):
        assert common.average_precision(none, none.bool(), 3, eleven_points) == 0
        assert math.isnan(common.average_precision(none, none.bool(), 0, eleven_points))
    tenth = torch.ones(3, dtype=torch.bool)  # recall 0.3 reaches the point 0.3
    assert common.average_precision(torch.arange(3.0), tenth, 10, True) == pytest.approx(400 / 11)


@pytest.mark.parametrize("eleven_points", [True, False])
def test_average_precision_equals_loops(eleven_points: bool) -> None:
    """On random answers with ties, found and missed, both figures are those of the development kit's rules."""
    for seed in range(200):
        source = torch.Generator().manual_seed(seed)
        count = 1 + seed % 23
        scores = torch.randint(6, (count,), generator=source) / 5
        right = torch.rand(count, generator=source) < 0.4
        total = int(right.sum()) + seed % 4
        if total:
            expected = slow_precision(scores.tolist(), right.tolist(), total, eleven_points)
            assert common.average_precision(scores, right, total, eleven_points) == pytest.approx(expected)


def test_curve_equals_sklearns() -> None:
    """Without ties, precision and recall are scikit-learn's at its thresholds."""
    source = torch.Generator().manual_seed(0)
    scores, right = torch.rand(50, generator=source), torch.rand(50, generator=source) < 0.4
    recall, precision = common.recall_precision(scores, right, int(right.sum()))
    theirs = precision_recall_curve(right.numpy(), scores.numpy())
    assert precision.flip(0).numpy() == pytest.approx(theirs[0][:-1])
    assert recall.flip(0).numpy() == pytest.approx(theirs[1][:-1])


@packed
def test_real_images(tmp_path: Path) -> None:
    """Seven images of VOC2007: boxes, classes and flags are those of the list."""
    with tarfile.open(PACKS / "voc2007_test7_real.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    data = common.load_voc(options("voc07", data_dir=tmp_path / "voc07_7"), "test")
    same = common.load_voc(options("voc07", data_dir=tmp_path / "voc07_7", train_list="test"), "train")
    assert same.identity() == data.identity()
    truth, flags = ({line.split()[0]: line.split()[1:] for line in (PACKS / name).read_text().splitlines()}
                    for name in ("voc07_test.txt", "voc07_test_difficult.txt"))
    assert len(data) == 7 and data.classes == common.VOC_CLASSES
    for image in data.images:
        rows = torch.tensor([int(word) for word in truth[image.path.name]]).view(-1, 5)
        assert torch.equal(image.boxes.long() + torch.tensor([1, 1, 0, 0]), rows[:, :4])
        assert image.labels.tolist() == rows[:, 4].tolist()
        assert image.difficult.tolist() == [flag == "1" for flag in flags[image.path.name]]
