"""Backbones: torchvision's names and outputs at the standard width, and what training and probes need."""

import pytest
import torch
import torchvision
from torch import nn

import common

PLAIN = ["alexnet", "alexnet_bn", "alexnet_bn_fc", "vgg16", "vgg16_bn", "vgg16_bn_fc"]
RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]
ARCHS = [*PLAIN, *RESNETS]
KINDS = [*PLAIN, "resnet18", "resnet50"]


def fresh(arch: str, width: int = 8, small: bool = False) -> common.PlainNet | common.ResNet:
    """A seeded narrow backbone."""
    torch.manual_seed(0)
    return common.backbone(arch, width, small)


def random_statistics(network: nn.Module) -> None:
    """Normalisations get random running statistics and scales, so that none acts as the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                assert values is not None
                nn.init.uniform_(values, 0.5, 1.5)


def shapes(network: nn.Module, prefix_left_out: tuple[str, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict by name."""
    state = network.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if not name.startswith(prefix_left_out)}


@pytest.mark.parametrize("arch", RESNETS)
def test_resnet_has_torchvisions_layout(arch: str) -> None:
    """Names, their order and shapes are torchvision's without fc."""
    with torch.device("meta"):
        ours, theirs = shapes(common.backbone(arch)), shapes(torchvision.models.get_model(arch), ("fc.",))
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_resnet_has_torchvisions_features(arch: str) -> None:
    """With equal weights, the features are torchvision's before fc."""
    ours = common.backbone(arch).eval()
    random_statistics(ours)
    with torch.device("meta"):
        theirs = torchvision.models.get_model(arch).eval()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["vgg16", "vgg16_bn"])
def test_vgg16_is_torchvisions(arch: str) -> None:
    """Names, order and shapes are torchvision's without the last layer; features are its fc7."""
    with torch.device("meta"):
        whole, theirs = (
            shapes(common.backbone(arch)),
            shapes(torchvision.models.get_model(arch), ("classifier.6",)),
        )
        assert list(whole.items()) == list(theirs.items())
        filters = [4, 4, "M", 8, 8, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M"]
        narrow = torchvision.models.VGG(torchvision.models.vgg.make_layers(filters, arch == "vgg16_bn"))
        fc6, fc7 = nn.Linear(32 * 7 * 7, 256), nn.Linear(256, 256)
        narrow.classifier = nn.Sequential(fc6, nn.ReLU(), nn.Dropout(), fc7, nn.ReLU(), nn.Dropout())
    ours = fresh(arch, 4).eval()
    random_statistics(ours)
    narrow.load_state_dict(ours.state_dict(), assign=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), narrow.eval()(images))


@pytest.mark.parametrize("arch", ["alexnet", "alexnet_bn"])
def test_alexnet_keeps_torchvisions_classifier_names(arch: str) -> None:
    """fc6 and fc7 are classifier.1 and classifier.4, with the sizes of the original network at 224 px."""
    with torch.device("meta"):
        ours, theirs = shapes(common.backbone(arch)), shapes(torchvision.models.alexnet())
    names = [f"classifier.{layer}.{kind}" for layer in (1, 4) for kind in ("weight", "bias")]
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    filters = [shape for name, shape in ours.items() if name.startswith("features") and len(shape) == 4]
    assert filters == [(96, 3, 11, 11), (256, 96, 5, 5), (384, 256, 3, 3), (384, 384, 3, 3), (256, 384, 3, 3)]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("alexnet", [(96, 55), (256, 27), (384, 13), (384, 13), (256, 13)]),
        ("vgg16", [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]),
        ("resnet18", [(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)]),
        ("resnet50", [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]),
    ],
)
def test_stages_at_224(arch: str, expected: list[tuple[int, int]]) -> None:
    """The five maps of a 224 px image have the papers' channels and sides."""
    with torch.device("meta"):
        maps = common.backbone(arch).stages(torch.empty(1, 3, 224, 224))
    assert [tuple(stage.shape) for stage in maps] == [(1, size, side, side) for size, side in expected]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("arch", PLAIN)
def test_where_plain_networks_normalise(arch: str, small: bool) -> None:
    """Nowhere, between each convolution and its ReLU, or also between each fully connected layer and its ReLU."""
    network, (_, _, norm) = fresh(arch, 4, small), arch.partition("_")
    for layers, kind, normalised in ((network.features, nn.Conv2d, norm != ""),
                                     (network.classifier, nn.Linear, norm == "bn_fc")):
        names = [type(layer).__name__ for layer in [*layers, nn.ReLU()]]  # after fc7 forward has it
        after = ["BatchNorm2d" if kind is nn.Conv2d else "BatchNorm1d"] * normalised
        for place in (place for place, layer in enumerate(layers) if isinstance(layer, kind)):
            found = [name for name in names[place + 1 : place + 3 + normalised] if name != "Dropout"]
            assert found[: 1 + normalised] == [*after, "ReLU"]
        assert sum("BatchNorm" in name for name in names) == normalised * sum(isinstance(n, kind) for n in layers)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("arch", KINDS)
def test_stages_lie_on_the_way_to_the_feature(arch: str, small: bool) -> None:
    """Maps are outputs of a ReLU that nothing writes into later, and the last one leads to the feature."""
    network = fresh(arch, 4, small).eval()
    images = torch.randn(2, 3, 32, 32) if small else torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        maps, feature = network.stages(images), network(images)
        assert all(float(stage.min()) == 0 for stage in maps)
        if isinstance(network, common.ResNet):
            again = maps[-1].mean((2, 3))
        else:
            last = network.features[network.stage_ends[-1] + 1 :](maps[-1])
            again = network.classifier(network.avgpool(last).flatten(1)).relu()
    torch.testing.assert_close(again, feature)
    assert feature.shape == (2, network.dim)


@pytest.mark.parametrize("arch", ARCHS)
def test_large_networks_run_at_224_px(arch: str) -> None:
    """A 224 px image gives finite features of the announced size."""
    network = fresh(arch, 4).eval()
    with torch.no_grad():
        feature = network(torch.randn(1, 3, 224, 224))
    assert feature.shape == (1, network.dim) and bool(feature.isfinite().all())


@pytest.mark.parametrize("arch", ARCHS)
def test_small_networks_train_at_32_px(arch: str) -> None:
    """A 32 px batch goes forward and backward; every parameter but the idle biases gets a finite gradient."""
    network = fresh(arch, 4, small=True)
    feature = network(torch.randn(4, 3, 32, 32))
    assert feature.shape == (4, network.dim) and feature.dtype == torch.float32
    (feature * torch.randn_like(feature)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert parameter.grad.abs().max() > 0 or name.endswith("bias"), name


@pytest.mark.parametrize(
    ("arch", "dim"),
    list(zip(ARCHS, [*[4096] * 6, 512, 512, 2048, 2048], strict=True)),
)
def test_width_scales_every_channel(arch: str, dim: int) -> None:
    """A quarter of the width is a quarter of every channel and of the feature, but not of the input."""
    with torch.device("meta"):
        whole, quarter = common.backbone(arch), common.backbone(arch, width=16)
    assert (whole.dim, quarter.dim) == (dim, dim // 4)
    for (name, large), reduced in zip(shapes(whole).items(), shapes(quarter).values(), strict=True):
        if large:
            inputs = 1 if name in ("conv1.weight", "features.0.weight") else 4
            assert large == (4 * reduced[0], *(inputs * size for size in reduced[1:2]), *reduced[2:])


@pytest.mark.parametrize("arch", ARCHS)
def test_input_channels(arch: str) -> None:
    """Two input channels, as DeepCluster's Sobel filter gives, change the first convolution only."""
    with torch.device("meta"):
        three, two = (shapes(common.backbone(arch, input_channels=channels)) for channels in (3, 2))
    assert [name for name in three if three[name] != two[name]] == [next(iter(three))]


@pytest.mark.parametrize("arch", [*PLAIN, "resnet18"])
def test_feature_before_the_last_relu(arch: str) -> None:
    """ReLU of the feature before its last ReLU is the feature; before, fc7 has negative values too."""
    network = fresh(arch, small=True).eval()
    with torch.no_grad():
        images = torch.randn(8, 3, 32, 32)
        before, after = network(images, relu_last=False), network(images)
    assert torch.equal(before.relu(), after)
    assert bool((before < 0).any()) == (arch != "resnet18")


@pytest.mark.parametrize("arch", [arch for arch in KINDS if arch not in common.PLAIN_STAGES])
def test_small_networks_start_as_pytorch_does(arch: str) -> None:
    """Behind the 3x3 stem normalised convolutions are uniform with deviation 1 / sqrt(3 fan in), PyTorch's default."""
    for module in fresh(arch, 16, small=True).modules():
        if isinstance(module, nn.Conv2d):
            deviation = (1 / (3 * module.in_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(deviation, rel=0.15)


@pytest.mark.parametrize(("arch", "small"), [*((arch, False) for arch in KINDS), ("alexnet", True), ("vgg16", True)])
def test_initial_weights(arch: str, small: bool) -> None:
    """Convolutions are Kaiming (fan out), linear layers N(0, 0.01) or, without normalisations, Kaiming (fan in), biases
    0, normalisations 1 and 0."""
    for module in fresh(arch, 16, small).modules():
        if isinstance(module, nn.Conv2d):
            deviation = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(deviation, rel=0.15)
        if isinstance(module, nn.Linear):
            deviation = (2 / module.in_features) ** 0.5 if arch in common.PLAIN_STAGES else 0.01
            assert float(module.weight.detach().std()) == pytest.approx(deviation, rel=0.05)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and not module.bias.any()


@pytest.mark.parametrize("arch", KINDS)
def test_channels_last_changes_nothing(arch: str) -> None:
    """In channels-last memory the features are the same, and maps stay channels-last all the way."""
    network = fresh(arch, small=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = network(images)
        network.to(memory_format=torch.channels_last)
        last = images.contiguous(memory_format=torch.channels_last)
        assert float((network(last) - plain).abs().max()) < 1e-4 * float(plain.abs().max())
        maps = network.stages(last)
    assert all(stage.is_contiguous(memory_format=torch.channels_last) for stage in maps)


def test_images_of_other_sizes() -> None:
    """96 px images go through the small and the large AlexNet and VGG16: the last map is averaged."""
    for arch in PLAIN:
        for small in (False, True):
            network = fresh(arch, 4, small).eval()
            with torch.no_grad():
                assert network(torch.randn(1, 3, 96, 96)).shape == (1, network.dim)


def test_thin_projection_is_the_strided_convolution() -> None:
    """Output and gradients of the projection of thin networks are those of a convolution in float64 at 96 px."""
    torch.manual_seed(0)
    projection = common.backbone("resnet18", 4, True).layer2[0].downsample[0]
    assert isinstance(projection, common.ThinProjection)
    projection.to(memory_format=torch.channels_last)
    reference = torch.nn.Conv2d(4, 8, 1, 2, bias=False, dtype=torch.float64)
    reference.load_state_dict(projection.state_dict())
    images = torch.randn(8, 4, 96, 95).to(memory_format=torch.channels_last)
    found, expected = projection(images), reference(images.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for output in (found, expected):
        output.square().sum().backward()
    torch.testing.assert_close(projection.weight.grad.double(), reference.weight.grad, atol=1e-1, rtol=1e-5)


@pytest.mark.parametrize("last_map", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_gradients_of_one_pixel(arch: str, last_map: bool) -> None:
    """Of a map of one pixel only the middle tap of a strided convolution has a gradient, in bfloat16 too, whether the
    feature or the last map is trained on."""
    torch.manual_seed(0)
    network = common.backbone(arch, 32, True).to(memory_format=torch.channels_last)
    images = torch.rand(144, 3, 4, 4).to(memory_format=torch.channels_last)  # one pixel at the start of layer4
    block = network.layer4[0]
    weight = (block.conv1 if arch == "resnet18" else block.conv2).weight
    for _ in range(4):
        rest = [torch.full((1 << size,), float("nan")) for size in range(4, 20)]  # of memory that is not cleared
        del rest
        with torch.autocast("cpu", torch.bfloat16):
            output = network.stages(images)[-1] if last_map else network(images)
        (gradient,) = torch.autograd.grad(output.float().square().sum(), weight)
        middle = gradient[:, :, 1, 1].clone()
        gradient[:, :, 1, 1] = 0
        assert middle.any() and not gradient.any()
