"""Weights are found under the names of many authors, half-loaded networks are refused, and kNN reports what it did."""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import re
import sys
import textwrap
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import TINY, one_line, run
from torch import Tensor, nn

import common
import eval_knn

CPU = torch.device("cpu")
SMALL_SET = ["--data", "shapes", "--subset", "60", "--test-subset", "20", "--image-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    assert run("npid", [*TINY, "--output", output]).code == 0
    return output


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


def encoder(path: Path, arch: str = "resnet18", layer: str = "auto") -> common.Encoder:
    return common.load_encoder(path, arch, layer=layer)


def wrap(weights: dict[str, Tensor], kind: str) -> Any:
    """A torchvision state dict as others save it."""
    if kind == "plain":
        return weights
    if kind == "moco":
        other = {name: torch.zeros_like(value) for name, value in weights.items()}
        both = {f"module.encoder_k.{name}": value for name, value in other.items()}
        return {"epoch": 3, "state_dict": both | {f"module.encoder_q.{name}": value for name, value in weights.items()}}
    if kind == "compiled":
        return {"model": {f"_orig_mod.{name}": value for name, value in weights.items()}}
    if kind == "data parallel":
        return {"state_dict": OrderedDict((f"module.{name}", value) for name, value in weights.items())}
    if kind == "timm":  # the same names, with another classifier
        return {"state_dict": weights | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}}
    return {"student": {f"backbone.{name}": value for name, value in weights.items() if not name.startswith("fc.")}}


@pytest.mark.parametrize("kind", ["plain", "moco", "compiled", "data parallel", "timm", "dino"])
def test_prefixes(kind: str, resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """torchvision's names are found under the prefixes of MoCo (its query), torch.compile, DataParallel and DINO."""
    torch.save(wrap(resnet, kind), tmp_path / "file.pth")
    found = encoder(tmp_path / "file.pth")
    assert found.head is None and found.report["missing"] == []
    for name, value in found.backbone.state_dict().items():
        assert torch.equal(value, resnet[name]), name
    reference = torchvision.models.resnet18()
    reference.load_state_dict(resnet)
    reference.fc = nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = nn.functional.normalize(reference.eval()(images), dim=1)
        torch.testing.assert_close(found.embed(images), expected, atol=1e-6, rtol=1e-5)


TWINS = [  # where the network is that its authors evaluate, and where the other one is
    ("module.encoder_q.", "module.encoder_k."), ("module.base_encoder.", "module.momentum_encoder."),
    ("online_encoder.net.", "target_encoder.net."), ("teacher_backbone.", "student_backbone."),
    ("query_encoder.", "key_encoder."),
]


@pytest.mark.parametrize(("wanted", "other"), TWINS)
def test_two_networks_in_a_file(wanted: str, other: str, resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """Of MoCo's, MoCo v3's, BYOL's and DINO's two networks that is taken which is evaluated, and both are named."""
    for names in ((wanted, other), (other, wanted)):
        both = {f"{prefix}{name}": value * (prefix == wanted) for prefix in names for name, value in resnet.items()}
        torch.save(dict(state_dict=both), tmp_path / "file.pth")
        found = encoder(tmp_path / "file.pth")
        assert torch.equal(found.backbone.state_dict()["conv1.weight"], resnet["conv1.weight"])
        wanted_, other_ = (prefix.removeprefix("module.") for prefix in (wanted, other))
        assert found.describe().endswith(f"; taken: {wanted_}*, also there: {other_}*")


def test_teacher_of_another_architecture(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """Of a teacher and a student that of the --arch is taken, though a ResNet-50 has all the names of a ResNet-18."""
    both = {f"module.student.{name}": value for name, value in resnet.items()}
    both |= {f"module.teacher.{name}": value for name, value in torchvision.models.resnet50().state_dict().items()}
    torch.save(dict(state_dict=both), tmp_path / "file.pth")
    assert torch.equal(encoder(tmp_path / "file.pth").backbone.state_dict()["conv1.weight"], resnet["conv1.weight"])
    found = encoder(tmp_path / "file.pth", "resnet50")
    assert torch.equal(found.backbone.state_dict()["conv1.weight"], both["module.teacher.conv1.weight"])


def test_nested_weights(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """Weights are found wherever most tensors are, but for an optimiser's; DINO's teacher before its student, VISSL's
    model before the momentum encoder and queue of its loss."""
    trunk = {f"_feature_blocks.{name}": value for name, value in resnet.items() if not name.startswith("fc.")}
    heads, adam = {"0.clf.weight": torch.rand(9, 512)}, {"state": {i: dict(a=torch.rand(1)) for i in range(999)}}
    other = {name: torch.zeros_like(value) for name, value in resnet.items()}
    loss = {f"moco_encoder.trunk._feature_blocks.{name}": value for name, value in other.items()}
    for saved in (dict(config=dict(lr=0.1), optimizer=adam, classy_state_dict=dict(
                      base_model=dict(model=dict(heads=heads, trunk=trunk)), loss=loss | dict(queue=torch.rand(9)))),
                  dict(online_network_state_dict=resnet, target_network_state_dict=other),
                  dict(student=other, teacher=resnet, epoch=3)):
        torch.save(saved, tmp_path / "file.pth")
        found = encoder(tmp_path / "file.pth")
        assert torch.equal(found.backbone.state_dict()["conv1.weight"], resnet["conv1.weight"])


def test_sobel_before_the_network(tmp_path: Path) -> None:
    """A file whose Sobel filters come first, of three channels, is one of DeepCluster's networks all the same."""
    weights = common.backbone("alexnet_bn", 4, True, input_channels=2).state_dict()
    torch.save({"sobel.0.weight": torch.rand(1, 3, 1, 1)} | weights, tmp_path / "file.pth")
    found = common.load_encoder(tmp_path / "file.pth", "alexnet_bn", 4)
    assert isinstance(found.backbone.front, common.Sobel)


def test_mean_and_std_of_foreign_files(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """A network sees images by --mean and --std, else by its run's figures, else by the data set's."""
    torch.save(resnet, tmp_path / "file.pth")
    command = [str(tmp_path / "file.pth"), "--arch", "resnet18", *SMALL_SET]
    typed = ["--mean", "0", "0", "0", "--std", "1", "1", "1"]
    for words, run_data, expected in (([], {}, ((0.5,) * 3, (0.25,) * 3)), (typed, {}, ((0.0,) * 3, (1.0,) * 3)),
                                      ([], dict(mean=[0.1] * 3, std=[0.2] * 3), ((0.1,) * 3, (0.2,) * 3)),
                                      (typed, dict(mean=[0.1] * 3, std=[0.2] * 3), ((0.0,) * 3, (1.0,) * 3))):
        args, found = eval_knn.parse_args([*command, *words]), encoder(tmp_path / "file.pth")
        found.data.update(run_data)
        train = common.load_train(args, found, "train", CPU)
        test = common.load_test(args, train, CPU)
        assert (train.mean, train.std) == (test.mean, test.std) == expected


def test_alexnet_of_data_parallel(tmp_path: Path) -> None:
    """AlexNet whose convolutions alone were in DataParallel: features.module.0.weight."""
    weights = common.backbone("alexnet", 4).state_dict()
    renamed = {name.replace("features.", "features.module."): value for name, value in weights.items()}
    torch.save({"state_dict": renamed | {"top_layer.weight": torch.zeros(10, 256)}}, tmp_path / "file.pth")
    found = common.load_encoder(tmp_path / "file.pth", "alexnet", 4)
    assert found.report["missing"] == [] and found.report["unexpected"] == ["top_layer.weight"]
    for name, value in found.backbone.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("arch", ["alexnet_bn", "vgg16_bn"])
def test_deepclusters_own_files(arch: str, tmp_path: Path) -> None:
    """They call themselves alexnet and vgg16: whoever takes that name is told the right one, under which Sobel's
    filters, which come last in the file, are applied and named."""
    network = common.backbone(arch, 4, input_channels=2).eval()
    weights = {name.replace("features.", "features.module."): value for name, value in network.state_dict().items()
               if not name.endswith("num_batches_tracked")}
    sobel = {"sobel.0.weight": torch.rand(1, 3, 1, 1), "sobel.1.weight": torch.rand(2, 1, 3, 3)}
    torch.save(dict(arch=arch[:-3], state_dict=weights | {"top_layer.bias": torch.rand(9)} | sobel),
               tmp_path / "file.pth")
    with pytest.raises(common.Fault, match=f"take --arch {arch}"):
        common.load_encoder(tmp_path / "file.pth", arch[:-3], 4)
    found, images = common.load_encoder(tmp_path / "file.pth", arch, 4), torch.rand(1, 3, 224, 224)
    assert found.describe().endswith("it sees Sobel gradients")
    with torch.no_grad():
        torch.testing.assert_close(found.backbone(images), network(images))


@pytest.mark.parametrize("arch", ["alexnet_bn_fc", "vgg16_bn_fc"])
def test_norms_of_fully_connected_layers_are_folded(arch: str, tmp_path: Path) -> None:
    """A loaded network has them in fc6 and fc7: the same features, and just the layers that evaluations know."""
    torch.manual_seed(0)
    network = common.backbone(arch, 4, True).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                assert values is not None
                nn.init.uniform_(values, 0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "file.pth")
    found = common.load_encoder(tmp_path / "file.pth", arch, 4)
    assert found.report["missing"] == found.report["unexpected"] == []
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.backbone(images), network(images), atol=1e-6, rtol=1e-4)
    names = [type(layer) for layer in common.backbone(arch.removesuffix("_fc"), 4, True).modules()]
    for encoder in (found, common.untrained_encoder(arch, 4, True, CPU)):
        layers = list(encoder.backbone.modules())
        assert [type(layer) for layer in layers[1:]] == names[1:]
        assert not any(layer.training or weight.requires_grad for layer in layers for weight in layer.parameters())


def test_plain_network_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Of an AlexNet or VGG16 file with batch normalisation, the name without it takes nothing, nor the reverse."""
    for saved, asked in itertools.permutations(("vgg16", "vgg16_bn", "vgg16_bn_fc"), 2):
        torch.save(common.backbone(saved, 4, True).state_dict(), tmp_path / "file.pth")
        with pytest.raises(common.Fault, match=f"of the weights of {asked}"):
            common.load_encoder(tmp_path / "file.pth", asked, 4)


def test_timms_vgg(tmp_path: Path) -> None:
    """timm's VGG16 has fc6 and fc7 as convolutions, pre_logits.fc1 and .fc2."""
    weights = common.backbone("vgg16", 4).state_dict()
    names = {"classifier.0.": "pre_logits.fc1.", "classifier.3.": "pre_logits.fc2."}
    theirs = {next((new + name.removeprefix(old) for old, new in names.items() if name.startswith(old)), name): value
              for name, value in weights.items()}
    theirs["pre_logits.fc1.weight"] = theirs["pre_logits.fc1.weight"].view(256, 32, 7, 7)
    theirs["pre_logits.fc2.weight"] = theirs["pre_logits.fc2.weight"].view(256, 256, 1, 1)
    torch.save(theirs, tmp_path / "file.pth")
    found = common.load_encoder(tmp_path / "file.pth", "vgg16", 4)
    assert found.report["missing"] == found.report["unexpected"] == []
    assert all(torch.equal(value, weights[name]) for name, value in found.backbone.state_dict().items())


def test_foreign_necks_and_heads_are_left_over(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """A foreign file's head may be a classifier and its neck another thing than ours: the backbone is taken."""
    first, bias = dict([("neck.0.weight", torch.rand(64, 512))]), dict([("neck.0.bias", torch.rand(64))])
    for neck in (first, {"neck.0.weight": torch.rand(64, 512, 1, 1)},
                 first | bias | {"neck.1.weight": torch.rand(9, 64)}):
        more = neck | {"head.weight": torch.rand(10, 512), "head.bias": torch.rand(10)}
        torch.save({f"backbone.{name}": value for name, value in resnet.items()} | more, tmp_path / "file.pth")
        for layer in ("auto", "backbone"):
            found = encoder(tmp_path / "file.pth", layer=layer)
            assert found.head is None and found.report["missing"] == []


def test_other_heads_and_stems_of_ours(trained: Path, tmp_path: Path) -> None:
    """A neck of two hidden layers is refused whole, head included; behind a layer of an unknown name the head is taken
    only if asked for; of two backbones the one without a prefix counts; a stem that the images' size does not imply is
    found by the weights."""
    saved = torch.load(trained / "checkpoint.pth")
    weights = saved["state"]["encoder"]
    dim = weights["head.weight"].shape[1]
    more = {f"neck.{place}.{kind}": torch.rand(dim, *[dim] * (kind == "weight")) for place in (0, 2)
            for kind in ("weight", "bias")}
    torch.save(saved | dict(state=dict(encoder=weights | more)), tmp_path / "file.pth")
    found = common.load_encoder(tmp_path / "file.pth")
    assert found.head is None and set(more) < set(found.report["unexpected"])
    for name, kept in (("mlp.0.weight", False), ("group_head.weight", True), ("classes", True)):
        torch.save(saved | dict(state=dict(encoder=weights | {name: torch.rand(dim, dim)})), tmp_path / "file.pth")
        found = common.load_encoder(tmp_path / "file.pth")
        assert (found.head is not None) == kept and found.report["unexpected"] == [name]
        assert common.load_encoder(str(tmp_path / "file.pth"), layer="head").head is not None
    copy = {f"teacher_{name}": torch.zeros_like(value) for name, value in weights.items() if "backbone" in name}
    torch.save(saved | dict(state=dict(encoder=weights | copy)), tmp_path / "file.pth")
    found = common.load_encoder(tmp_path / "file.pth")
    assert found.head is not None and len(found.report["unexpected"]) == len(copy)
    assert torch.equal(found.backbone.state_dict()["conv1.weight"], weights["backbone.conv1.weight"])
    torch.save(saved | dict(data=saved["data"] | dict(small=False)), tmp_path / "file.pth")
    found = common.load_encoder(tmp_path / "file.pth")
    assert found.report["missing"] == [] and found.head is not None


def test_a_network_outside_common_is_refused(trained: Path, tmp_path: Path) -> None:
    """Of a changed script's checkpoint that has another network than its options name, not --arch is called wrong."""
    saved = torch.load(trained / "checkpoint.pth")
    weights = {"backbone.conv.weight": torch.rand(8, 3, 3, 3)}
    torch.save(saved | dict(state=dict(encoder=weights)), tmp_path / "file.pth")
    with pytest.raises(common.Fault, match=r"has to be one of `common.backbone` \(common.py, section 8\)"):
        common.load_encoder(tmp_path / "file.pth")
    with pytest.raises(common.Fault, match="wrong --arch"):
        common.load_encoder(tmp_path / "file.pth", "resnet50")


def test_torchscript_is_converted_first(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """A TorchScript file, which torch.load would run, is refused with the command that converts it; that works."""
    network = torchvision.models.resnet18()
    network.load_state_dict(resnet)
    torch.jit.script(network).save(tmp_path / "script.pt")
    with pytest.raises(common.Fault, match="is TorchScript") as refused:
        encoder(tmp_path / "script.pt")
    command = re.findall(r"torch\.save\(.*\)", str(refused.value))[0]
    with contextlib.chdir(tmp_path):
        exec(command)
    found = encoder(tmp_path / "weights.pth")
    assert all(torch.equal(value, resnet[name]) for name, value in found.backbone.state_dict().items())


@pytest.mark.parametrize("missing", [("conv1", "bn1"), ("conv1",), ("layer2.0.bn1.running_mean",)])
def test_a_missing_convolution_is_no_trifle(
    missing: tuple[str, ...], resnet: dict[str, Tensor], tmp_path: Path
) -> None:
    """95 of 100 tensors are not enough where the stem is among the five, nor 99 where statistics are missing."""
    torch.save({name: value for name, value in resnet.items() if not name.startswith(missing)}, tmp_path / "file.pth")
    with pytest.raises(common.Fault, match="Missing"):
        encoder(tmp_path / "file.pth")


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_legacy_file_with_objects(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """An old file that holds an object of its author's class: the tensors are read, the object is not made."""
    module = types.ModuleType("lib_of_the_author")

    class LinearAverage(nn.Module):
        def __setstate__(self, state: dict[str, Any]) -> None:
            raise AssertionError("made")

    LinearAverage.__module__, LinearAverage.__qualname__ = module.__name__, "LinearAverage"
    module.LinearAverage = LinearAverage  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    bank = LinearAverage()
    bank.register_buffer("memory", torch.rand(10, 128))
    head = {"module.fc.weight": torch.rand(128, 512), "module.fc.bias": torch.rand(128)}
    weights: dict[str, Any] = {f"module.{name}": value for name, value in resnet.items() if not name.startswith("fc.")}
    for old in (True, False):
        path = tmp_path / f"{old}.pth.tar"
        torch.save({"epoch": 200, "arch": "resnet18", "state_dict": weights | head, "lemniscate": bank, "best": {1, 2}},
                   path, _use_new_zipfile_serialization=not old)
        found = encoder(path, layer="head")
        assert found.report["missing"] == found.report["unexpected"] == [] and found.head is not None
        assert torch.equal(found.head.weight, head["module.fc.weight"])
        assert found.embed(torch.rand(2, 3, 32, 32)).shape == (2, 128)
        assert encoder(path).head is None
    sys.modules.pop(module.__name__)
    assert encoder(tmp_path / "True.pth.tar").report["missing"] == []


def test_head_of_clds_authors(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """Their MoCo+CLD on CIFAR ends in `linear`, cosines with the columns of a matrix without bias: --layer head. A
    square one is a plain layer."""
    directions = torch.randn(512, 128)
    weights = {f"module.{name}".replace("downsample", "shortcut"): value for name, value in resnet.items()
               if not name.startswith("fc.")}
    weights |= {"module.linear.weight": directions, "module.groupDis.0.weight": torch.randn(512, 128)}
    torch.save(dict(model=weights, model_ema=resnet, opt=argparse.Namespace(lr=0.03)), tmp_path / "file.pth")
    found, images = encoder(tmp_path / "file.pth", layer="head"), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        cosines = nn.functional.normalize(found.backbone(images)) @ nn.functional.normalize(directions, dim=0)
        torch.testing.assert_close(found.embed(images), nn.functional.normalize(cosines))
        square = torch.randn(512, 512)
        torch.save(weights | {"module.linear.weight": square}, tmp_path / "file.pth")
        found = encoder(tmp_path / "file.pth", layer="head")
        expected = nn.functional.normalize(nn.functional.linear(found.backbone(images), square))
        torch.testing.assert_close(found.embed(images), expected)


def test_layers_of_an_nn_sequential_are_renamed_first(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """Names like lightly's (children by their number) are refused with a word of README's command, which works."""
    network = torchvision.models.resnet18()
    network.load_state_dict(resnet)
    children = nn.Sequential(*list(network.children())[:-1]).state_dict()
    torch.save(dict(state_dict={f"backbone.{name}": value for name, value in children.items()}), tmp_path / "file.pth")
    with pytest.raises(common.Fault, match=r"have to be changed first \(README.md, Evaluate\)"):
        encoder(tmp_path / "file.pth")
    (commands,) = re.findall(r"    weights = .*\n    torch.save.*\n", (common.ROOT / "README.md").read_text())
    with contextlib.chdir(tmp_path):
        exec(textwrap.dedent(commands).replace("resnet50", "resnet18"))
    found = encoder(tmp_path / "weights.pth")
    assert all(torch.equal(value, resnet[name]) for name, value in found.backbone.state_dict().items())


def test_names_left_over_are_told(resnet: dict[str, Tensor], tmp_path: Path) -> None:
    """Of what does not fit those of another shape are named first, then those that the network has not at all."""
    odd = dict(resnet) | {"aaa.weight": torch.zeros(3), "conv1.weight": torch.zeros(64, 3, 5, 5)}
    del odd["bn1.weight"], odd["fc.weight"], odd["fc.bias"]
    torch.save(odd, tmp_path / "odd.pth")
    with pytest.raises(common.Fault, match=r"Missing bn1.weight, conv1.weight ...; left over conv1.weight, aaa"):
        encoder(tmp_path / "odd.pth")


def test_half_loaded_is_refused(resnet: dict[str, Tensor], trained: Path, tmp_path: Path) -> None:
    """Under 95 % of the weights, another architecture, width or stem: refused with names from both sides."""
    part = {name: value for name, value in resnet.items() if not name.startswith("layer4.1")}
    torch.save(part, tmp_path / "part.pth")
    command = ["--arch", "resnet18", *SMALL_SET, "--image-size", "64"]
    one_line(run("eval_knn", [tmp_path / "part.pth", *command]), "% of the weights of resnet18", "layer4.1")
    torch.save(resnet, tmp_path / "whole.pth")
    one_line(run("eval_knn", [tmp_path / "whole.pth", "--arch", "resnet50", *SMALL_SET]), "of the weights of resnet50")
    one_line(run("eval_knn", [tmp_path / "whole.pth", *SMALL_SET]), "name one with --arch (resnet18 fits)")
    one_line(run("eval_knn", [trained / "checkpoint.pth", "--width", "8"]), "width 8", "bn1.bias")
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "deeper.pth")
    one_line(run("eval_knn", [tmp_path / "deeper.pth", *command]), "take --arch resnet34", "left over layer1.2.bn1")
    one_line(run("eval_knn", [tmp_path / "nowhere.pth", "--arch", "resnet18"]), "cannot read", "nowhere.pth")
    one_line(run("eval_knn", [tmp_path / "whole.pth", "--arch", "resnet34", *SMALL_SET]), "of the weights of resnet34")
    torch.save(resnet | {"conv1.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "stem.pth")
    one_line(run("eval_knn", [tmp_path / "stem.pth", "--arch", "resnet18", *SMALL_SET]), "Missing conv1.weight")
    torch.save(resnet | {"bn1.bias": torch.full((64,), math.nan)}, tmp_path / "nan.pth")
    one_line(run("eval_knn", [tmp_path / "nan.pth", "--arch", "resnet18", *SMALL_SET]), "weights that are not finite")
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "alexnet.pth")
    one_line(run("eval_knn", [tmp_path / "alexnet.pth", "--arch", "alexnet", *SMALL_SET]), "not torchvision's")
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    one_line(run("eval_knn", [tmp_path / "x.safetensors", "--arch", "resnet18", *SMALL_SET]), "convert it by",
             f"load_file('{tmp_path / 'x.safetensors'}')", "pip install safetensors")
    torch.save({"weights": 3}, tmp_path / "none.pth")
    one_line(run("eval_knn", [tmp_path / "none.pth", "--arch", "resnet18"]), "holds no weights")
    no_head = {name: value for name, value in resnet.items() if not name.startswith("fc.")}
    torch.save(no_head, tmp_path / "headless.pth")
    one_line(run("eval_knn", [tmp_path / "headless.pth", "--arch", "resnet18", "--layer", "head"]),
             "no linear layer", "take backbone, not head")


def evaluate(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> dict[str, Any]:
    """The last line of eval_knn as JSON."""
    eval_knn.main(eval_knn.parse_args([str(word) for word in argv]))
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_our_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint of ours says architecture, size and data; the result is the last line and goes to eval.jsonl."""
    command = [trained / "checkpoint.pth", "--subset", "60", "--test-subset", "20", "--device", "cpu"]
    first = evaluate(capsys, *command, "--k", "5", "20", "--tau", "0.07", "0.5")
    assert first["feature_dim"] == 16 and first["data"] == "shapes" and first["protocol"] == "knn"
    assert first["checkpoint_sha256"] == hashlib.sha256((trained / "checkpoint.pth").read_bytes()).hexdigest()
    pairs = [(row["num_neighbors"], row["temperature"]) for row in first["knn"]]
    assert pairs == [(5, 0.07), (5, 0.5), (20, 0.07), (20, 0.5)]
    second = evaluate(capsys, *command, "--k", "20", "--tau", "0.5", "--retrieval", "--clustering")
    assert second["knn"] == first["knn"][3:] and second["knn_top1"] == first["knn"][3]["top1"]
    assert {"precision_at_1", "precision_at_10", "nmi", "ami"} <= second.keys()
    lines = [json.loads(line) for line in (trained / "eval.jsonl").read_text().splitlines()]
    assert lines == [first, second]


def test_backbone_file(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """backbone.pth gives the features of the checkpoint's backbone."""
    options = ["--arch", "resnet18", "--width", "4", "--k", "5", *SMALL_SET]  # nothing says that its stem is 3x3
    alone = evaluate(capsys, trained / "backbone.pth", *options)
    inside = evaluate(capsys, trained / "checkpoint.pth", *options, "--layer", "backbone")
    assert alone["knn"] == inside["knn"] and alone["feature_dim"] == inside["feature_dim"] == 32


def test_the_bank_leaves_the_test_images_alone(trained: Path) -> None:
    """With the bank as training features the run's own seed chooses its images, --seed still the test images."""
    args = eval_knn.parse_args([str(trained / "checkpoint.pth"), "--test-subset", "7", "--seed", "5"])
    found = encoder(trained / "checkpoint.pth")
    tests = list[common.ImageSet]()
    for split in ("train", "pretrain"):
        own = argparse.Namespace(**vars(args))
        tests.append(common.load_test(own, common.load_train(own, found, split, CPU), CPU))
    assert torch.equal(tests[0].ids, tests[1].ids) and args.seed == 5


def test_bank_as_training_features(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """--train-features bank is the bank that training left, for the same images only."""
    path, seen, accuracy = trained / "checkpoint.pth", list[Tensor](), common.knn_accuracy
    monkeypatch.setattr(common, "knn_accuracy", lambda *x, **more: (seen.append(x[2]), accuracy(*x, **more))[1])
    result = evaluate(capsys, path, "--train-features", "bank", "--test-subset", "20", "--k", "5", "--device", "cpu")
    assert result["train_images"] == result["subset"] == 64 and result["train_features"] == "bank"
    saved = torch.load(path)
    found = encoder(path).bank
    assert found is not None and torch.equal(found, saved["state"]["bank"]["features"])
    assert torch.equal(seen[0], found)
    command = ["--train-features", "bank", "--test-subset", "20", "--arch", "resnet18", "--width", "4"]
    one_line(run("eval_knn", [path, *command, "--image-size", "20"]), "other images")
    for network in (trained / "backbone.pth", "random"):
        one_line(run("eval_knn", [network, *command]), "no memory bank")


def test_an_untrained_encoder_is_in_evaluation_mode() -> None:
    """Its feature of an image does not depend on the others of a batch."""
    encoder, images = common.untrained_encoder("resnet18", 4, True, common.CPU), torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(encoder.embed(images)[:1], encoder.embed(images[:1]))


@pytest.mark.parametrize("name", ["random", "pixels"])
def test_without_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """An untrained network and plain pixels need no file, repeat themselves, and leave none."""
    monkeypatch.chdir(tmp_path)
    results = [evaluate(capsys, name, "--width", "4", "--k", "5", *SMALL_SET) for _ in range(2)]
    assert results[0] == results[1] and results[0]["checkpoint"] == name
    assert results[0]["feature_dim"] == (3 * 16 * 16 if name == "pixels" else 128)
    assert math.isfinite(results[0]["knn_top1"]) and not list(tmp_path.iterdir())


def test_a_result_is_published_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It goes to --output and beside a checkpoint, once where these are one folder; untrained networks have none."""
    (tmp_path / "out").mkdir()
    out, beside = tmp_path / "out/eval.jsonl", tmp_path / "eval.jsonl"
    for number, (folder, checksum) in enumerate([("out", ""), ("out", "1f"), (".", "1f"), (None, "1f"), (None, "")]):
        args = argparse.Namespace(checkpoint=tmp_path / "a.pth")
        if folder:
            args.output = tmp_path / folder
        common.publish(args, dict(number=number, checkpoint_sha256=checksum))
        assert json.loads(capsys.readouterr().out)["number"] == number
    found = [[json.loads(line)["number"] for line in file.read_text().splitlines()] for file in (out, beside)]
    assert found == [[0, 1], [1, 2, 3]]


def test_result_without_a_place(trained: Path, tmp_path: Path) -> None:
    """Where eval.jsonl cannot be written the result is still the last line."""
    (tmp_path / "checkpoint.pth").write_bytes((trained / "checkpoint.pth").read_bytes())
    (tmp_path / "eval.jsonl").mkdir()
    done = run("eval_knn", [tmp_path / "checkpoint.pth", "--subset", "60", "--test-subset", "20", "--k", "5"])
    assert done.code == 0 and "cannot write" in done.err
    assert "knn_top1" in json.loads(done.out.splitlines()[-1])
