"""NPID's equations against slow float64 references, and its training against plain PyTorch."""

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, Step, record_steps
from torch import Tensor

import cld
import common
import local_aggregation
import npid


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=-1).to(dtype)


def test_nce_equals_a_loop_over_equations_4_to_7() -> None:
    """J_NCE is -log h(positive) - sum of log(1 - h(noise)) with h = p / (p + m / N) and p = exp(score) / Z."""
    n, m, tau, z_constant = 50, 7, 0.07, 123.0
    z, bank = unit(4, 16), unit(n, 16, seed=1)
    index, noise = torch.tensor([3, 9, 0, 49]), torch.randint(n, (4, m), generator=torch.Generator().manual_seed(2))
    positive = npid.positive_scores(z, index, bank, tau)
    loss = npid.nce(positive, npid.noise_scores(z, noise, bank, tau), torch.tensor(math.log(z_constant)), n)
    for b in range(4):

        def h(j: int, b: int = b) -> float:
            p = math.exp(float(bank[j].double() @ z[b].double()) / tau) / z_constant
            return p / (p + m / n)

        expected = -math.log(h(int(index[b]))) - sum(math.log(1 - h(int(j))) for j in noise[b])
        assert loss[b].item() == pytest.approx(expected, rel=1e-5)


def test_nce_survives_scores_that_overflow_an_exponential() -> None:
    """In the log domain a temperature of 0.005, where exp(score) overflows float32, gives finite loss and gradient."""
    z, bank = unit(4, 16).requires_grad_(), unit(50, 16, seed=1)
    index, noise = torch.arange(4), torch.randint(50, (4, 9))
    positive, negative = npid.positive_scores(z, index, bank, 0.005), npid.noise_scores(z, noise, bank, 0.005)
    loss = npid.nce(positive, negative, npid.estimate_log_z(negative, 50), 50).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


def gradients(m: int, n: int = 2000, d: int = 32, tau: float = 0.1) -> tuple[Tensor, Tensor]:
    """Mean NCE gradient over draws and the exact softmax gradient for one image, (D,) each."""
    bank, index = unit(n, d, seed=3), torch.tensor([11])
    z = F.normalize(bank[index] + unit(1, d, seed=4))  # near its slot, as after some training
    log_z = common.bank_attention(z, bank, tau)[1]
    rows = 4000 if m <= 64 else 400
    many = z.repeat(rows, 1).requires_grad_()
    noise = torch.randint(n, (rows, m), generator=torch.Generator().manual_seed(5))
    positive = npid.positive_scores(many, index.repeat(rows), bank, tau)
    negative = npid.noise_scores(many, noise, bank, tau)
    npid.nce(positive, negative, log_z, n).sum().backward()
    one = z.clone().requires_grad_()
    common.bank_softmax(one, index, bank, tau).sum().backward()
    assert many.grad is not None and one.grad is not None
    return many.grad.mean(0), one.grad[0]


def test_nce_gradient_tends_to_the_softmax_gradient() -> None:
    """With the exact Z, the NCE gradient tends to the softmax's as m grows: norm ratio rising, 0.97 to 1.03 at 4096."""
    ratios = []
    for m in (1, 16, 512, 4096):
        approximate, exact = gradients(m)
        ratios.append(float(approximate.norm() / exact.norm()))
    assert ratios == sorted(ratios) and ratios[0] < 0.3 and 0.97 < ratios[-1] < 1.03
    assert F.cosine_similarity(approximate, exact, dim=0) > 0.999


def test_nce_is_stationary_where_the_model_is_the_data() -> None:
    """If positives follow P(.|f), the expected NCE gradient for f and log Z is zero; with a biased Z it is not."""
    n, m, tau = 40, 5, 0.1
    bank = unit(n, 8, seed=6, dtype=torch.float64)
    f = unit(1, 8, seed=7, dtype=torch.float64).requires_grad_()
    for bias, still in ((0.0, True), (1.0, False)):
        scores = (f @ bank.T)[0] / tau
        log_z = (scores.detach().logsumexp(0) + bias).requires_grad_()
        probability = scores.detach().softmax(0)
        offset = math.log(m / n)
        data, other = F.softplus(offset - (scores - log_z)), F.softplus(scores - log_z - offset)
        # The function under test must give these two terms for one positive and one noise image each.
        given = npid.nce(scores[:1], scores[None, 1:2].expand(1, m), log_z, n)
        assert given.item() == pytest.approx((data[0] + m * other[1]).item())
        expected = (probability * data).sum() + m * other.mean()
        grad_f, grad_z = torch.autograd.grad(expected, (f, log_z))
        assert (grad_f.norm() < 1e-9 and grad_z.abs() < 1e-9) == still


@pytest.mark.parametrize(("dim", "tau", "expected"), [
    (128, 0.07, 2.209), (128, 0.1, 1.476), (64, 0.2, 1.215), (256, 0.07, 1.489),
])
def test_first_estimate_of_z_is_that_of_a_random_bank(dim: int, tau: float, expected: float) -> None:
    """Z / N of eq. (8) estimated on a fresh bank is 0F1(D/2; 1 / (4 tau^2)) within 3 percent."""
    bank = common.MemoryBank(4000, dim, torch.Generator().manual_seed(0)).features
    noise = torch.randint(4000, (128, 1024), generator=torch.Generator().manual_seed(1))
    log_z = npid.estimate_log_z(npid.noise_scores(unit(128, dim, seed=8), noise, bank, tau), 4000)
    assert math.exp(log_z.item()) / 4000 == pytest.approx(expected, rel=0.03)


def test_normalizer_keeps_the_first_estimate_or_a_running_mean() -> None:
    """`first` (momentum 1) never changes after the first estimate; 0.99 mixes Z itself, not its logarithm."""
    first, running = npid.Normalizer(), npid.Normalizer()
    for estimate in (2.0, 8.0):
        first.update(torch.tensor(estimate).log(), 1.0)
        running.update(torch.tensor(estimate).log(), 0.99)
    assert first.log_z.exp().item() == pytest.approx(2.0)
    assert running.log_z.exp().item() == pytest.approx(0.99 * 2 + 0.01 * 8)


def test_noise_scores_are_the_same_gathered_or_multiplied_out() -> None:
    """Both ways of computing the scores of the noise, chosen by m against N, agree."""
    z, bank = unit(3, 16), unit(400, 16, seed=1)
    noise = torch.randint(400, (3, 100), generator=torch.Generator().manual_seed(2))
    few = torch.cat([npid.noise_scores(z, part, bank, 0.1) for part in noise.split(10, dim=1)], 1)
    assert torch.allclose(npid.noise_scores(z, noise, bank, 0.1), few, atol=1e-5)


def test_sampled_softmax_over_all_others_is_the_exact_softmax() -> None:
    """Drawing each other image exactly once as a negative gives eq. (2)."""
    n, tau = 30, 0.1
    z, bank, index = unit(2, 8), unit(n, 8, seed=1), torch.tensor([4, 17])
    others = torch.stack([torch.tensor([j for j in range(n) if j != i]) for i in index.tolist()])
    sampled = npid.sampled_softmax(npid.positive_scores(z, index, bank, tau), npid.noise_scores(z, others, bank, tau))
    assert torch.allclose(sampled, common.bank_softmax(z, index, bank, tau), atol=1e-5)


@pytest.mark.parametrize("m", [1, 7])
def test_chance_loss_is_that_of_equal_probabilities(m: int) -> None:
    """The chance loss is each loss where all scores are alike, with the Z that makes every probability 1 / N."""
    n, zero = 50, torch.zeros(1)
    for loss, expected in (
        ("softmax", common.bank_softmax(torch.zeros(1, 4), torch.zeros(1).long(), torch.zeros(n, 4), 1.0)),
        ("sampled", npid.sampled_softmax(zero, torch.zeros(1, m))),
        ("nce", npid.nce(zero, torch.zeros(1, m), torch.tensor(math.log(n)), n)),
    ):
        assert npid.chance_loss(loss, m, n) == pytest.approx(expected.item())


def test_parametric_softmax_is_equation_1() -> None:
    """-log of exp(w_i.v) / sum_j exp(w_j.v), with a gradient for the weights."""
    v, w = torch.randn(3, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([0, 5, 19])
    loss = npid.parametric_softmax(v, index, w)
    for b in range(3):
        terms = [math.exp(float(row @ v[b])) for row in w.detach()]
        assert loss[b].item() == pytest.approx(-math.log(terms[int(index[b])] / sum(terms)))
    loss.sum().backward()
    assert w.grad is not None and w.grad.abs().sum() > 0


def test_proximal_term_pulls_towards_the_bank() -> None:
    """|f - v|^2 of eq. (9) has the gradient 2 (f - v), and is 2 - 2 f.v for unit vectors."""
    z, bank, index = unit(5, 8).requires_grad_(), unit(9, 8, seed=1), torch.tensor([0, 2, 4, 6, 8])
    value = npid.proximal(z, index, bank)
    value.sum().backward()
    assert torch.allclose(value, 2 - 2 * (z * bank[index]).sum(1), atol=1e-6)
    assert z.grad is not None and torch.allclose(z.grad, 2 * (z - bank[index]).detach(), atol=1e-6)


@pytest.mark.parametrize("preset", sorted(npid.PRESETS))
def test_every_preset_parses(preset: str) -> None:
    """Each preset sets only options that exist, to values they may have."""
    assert npid.parse_args(["--preset", preset]).preset == preset


@pytest.mark.parametrize("options", [
    ["--loss", "nce", "--m", "8"], ["--loss", "nce", "--m", "8", "--z", "ema"],
    ["--loss", "nce", "--m", "8", "--z", "exact"],
    ["--loss", "sampled", "--m", "8"], ["--loss", "parametric"], ["--lambda", "5", "--bank-momentum", "0"],
    ["--accumulate", "4"], ["--knn-features", "clean"], ["--feature-dim", "32"],
])
def test_every_variant_trains(options: list[str], tmp_path: pytest.TempPathFactory) -> None:
    """Every loss and option of the paper runs through an epoch, writes finite figures and its three files."""
    output = Path(str(tmp_path)) / "run"
    smoke = ["--preset", "smoke", "--epochs", "1", "--subset", "64", "--output", str(output)]
    npid.main(npid.parse_args([*smoke, *options]))
    row = json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(row["loss"]) and row["epoch"] == 1 and "knn_top1" in row
    assert (output / "checkpoint.pth").exists() and (output / "backbone.pth").exists()


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [npid, local_aggregation])
def test_features_that_are_alike_are_warned_of(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """feature_std is the deviation of the features that go into the bank, in units of 1 / sqrt(D), mean over an epoch's
    steps; one warning a run where it is near 0."""
    steps, update, forward = list[float](), common.MemoryBank.update, script.Encoder.forward

    def spy(bank: common.MemoryBank, z: Tensor, *rest: Any) -> None:
        steps.append(float(z.std(0).mean()) * 128**0.5)
        update(bank, z, *rest)

    monkeypatch.setattr(common.MemoryBank, "update", spy)
    for collapsed in (False, True):
        if collapsed:
            monkeypatch.setattr(script.Encoder, "forward", lambda net, images: 1e-4 * forward(net, images) + 1)
        steps.clear()
        options = ["--preset", "smoke", "--epochs", "2", "--knn-every", "0", "--output", str(tmp_path / str(collapsed))]
        script.main(script.parse_args(options))
        rows = [json.loads(line) for line in (tmp_path / str(collapsed) / "log.jsonl").read_text().splitlines()[1:]]
        for epoch, row in enumerate(rows):
            assert row["feature_std"] == pytest.approx(sum(steps[8 * epoch : 8 * epoch + 8]) / 8, rel=1e-4)
        assert (rows[0]["feature_std"] < 0.01) == collapsed
        assert capsys.readouterr().err.count("features are nearly alike") == collapsed


@pytest.mark.parametrize("script", [npid, local_aggregation])
def test_batches_of_one_image_log_no_nan(script: ModuleType, tmp_path: Path) -> None:
    """--batch-size 1: a loss, and no deviation of a single feature."""
    options = ["--preset", "smoke", "--subset", "8", "--batch-size", "1", "--epochs", "1", "--knn-every", "0"]
    script.main(script.parse_args([*options, "--output", str(tmp_path)]))
    row = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    assert "NaN" not in row and "feature_std" not in row and json.loads(row)["loss"] > 0


@pytest.mark.parametrize("loss", ["nce", "sampled"])
def test_no_more_noise_than_images(loss: str, tmp_path: Path) -> None:
    """The default of --m is lowered to the number of images, a typed one above it is refused."""
    options = ["--preset", "smoke", "--subset", "32", "--epochs", "1", "--knn-every", "0", "--loss", loss]
    options += ["--output", str(tmp_path)]
    npid.main(npid.parse_args(options))
    header = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert header["options"]["num_negatives"] == 32
    with pytest.raises(common.Fault, match="--m 33 is more than the 32 images"):
        npid.main(npid.parse_args([*options, "--m", "33"]))


def test_a_figure_too_large_is_null(tmp_path: Path) -> None:
    """A Z that float32 cannot hold is null in the log, which stays JSON; training itself takes its logarithm."""
    options = ["--preset", "smoke", "--subset", "32", "--epochs", "1", "--knn-every", "0"]
    options += ["--loss", "nce", "--tau", "0.001"]
    npid.main(npid.parse_args([*options, "--output", str(tmp_path)]))
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert row["z_over_n"] is None and row["loss"] > 0


@pytest.mark.parametrize(("script", "options"), [
    (npid, ""), (npid, "--knn-features clean"), (local_aggregation, ""), (local_aggregation, "--knn-features clean"),
    (cld, ""),
])
def test_the_monitor_evaluates(
    script: ModuleType, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each --knn-every epochs and after the last the network, in evaluation mode, is compared at tau with the bank or
    itself, and then trains on in training mode."""
    modes, asked = list[bool](), list[tuple[Tensor, common.ImageSet, Tensor, common.ImageSet, float]]()
    forward, monitor = common.ResNet.forward, common.knn_monitor
    monkeypatch.setattr(common.ResNet, "forward", lambda net, *x: (modes.append(net.training), forward(net, *x))[1])
    monkeypatch.setattr(common, "knn_monitor", lambda *x: (asked.append((x[0].clone(), *x[1:])), monitor(*x))[1])
    words = [*TINY, "--test-subset", "20", "--no-amp", "--epochs", "3", "--knn-every", "2"]
    words += ["--tau" if script is not cld else "--T-I", "0.3"]
    script.main(script.parse_args([*words, "--output", str(tmp_path), *options.split()]))
    by_bank, views = not options and script is not cld, 1 + (script is cld)
    steps, looks = [True] * 4 * views, [False] * (1 if by_bank else 2)
    assert modes == steps * 2 + looks + steps + looks
    encoder = common.load_encoder(tmp_path / "checkpoint.pth")
    for features, images in ((asked[-1][2], asked[-1][3]), *([] if by_bank else [(asked[-1][0], asked[-1][1])])):
        (pixels,) = images.centers(torch.arange(len(images)), 64, common.CPU)
        torch.testing.assert_close(features, encoder.embed(images.normalize(pixels)))
    assert not by_bank or torch.equal(asked[-1][0], encoder.bank)
    assert [temperature for *_, temperature in asked] == [0.3, 0.3]


def rate_of(args: Any, step: int, steps: int) -> float:
    """The rate of one of `steps` steps in two epochs: on a cosine, or divided by ten after the first epoch."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return float(args.lr * (cosine if args.schedule == "cosine" else 0.1 ** (step >= steps / 2)))


def by_plain_pytorch(
    args: Any, steps: list[Step], images: int
) -> tuple[dict[str, Tensor], Tensor, list[float], list[float]]:
    """Weights and bank after NPID's training on the images of each step, as the paper writes it; losses, and Z/N."""
    torch.manual_seed(args.seed)
    backbone = common.backbone(args.arch, args.width, True)
    network = torch.nn.ModuleDict(dict(backbone=backbone, head=torch.nn.Linear(backbone.dim, args.feature_dim)))
    network.double()
    if args.loss == "parametric":
        network.classes = torch.nn.Parameter(torch.randn(images, args.feature_dim) / args.feature_dim**0.5)
    optimizer = torch.optim.SGD(network.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    bank = F.normalize(torch.randn(images, args.feature_dim, generator=common.generator(args.seed, "bank")), dim=1)
    m, z = args.num_negatives, torch.tensor(0.0)
    all_losses, all_z = list[float](), list[float]()
    for number, (index, (pixels,), _) in enumerate(steps):
        epoch, step = divmod(number, len(steps) // args.epochs)
        optimizer.param_groups[0]["lr"] = rate_of(args, number, len(steps))
        source = common.generator(args.seed, "noise", epoch, step)
        noise = torch.randint(images, (len(index), m), generator=source)
        optimizer.zero_grad()
        features, total, constants = [], 0.0, list[Tensor]()
        for part in torch.arange(len(index)).chunk(args.accumulate):
            output = network["head"](network["backbone"]((pixels[part].double() - 0.5) / 0.25)).float()
            f, i = F.normalize(output), index[part]
            every = (f @ bank.T / args.temperature).exp()
            own, other = every.gather(1, i[:, None])[:, 0], every.gather(1, noise[part])
            if args.loss == "parametric":
                loss = F.cross_entropy(output @ network.classes.T, i, reduction="none")
            elif args.loss == "sampled":
                loss = -(own / (own + other.sum(1))).log()
            elif args.loss == "nce":
                estimate = images * other.detach().mean()
                if args.z == "exact":
                    z = every.detach().sum(1, keepdim=True)
                elif z == 0:
                    z = estimate
                elif args.z == "ema":
                    share = 0.99 ** (1 / args.accumulate)  # 0.99 a step
                    z = share * z + (1 - share) * estimate
                constants.append(z.mean())
                p, q = (own[:, None] / z)[:, 0], other / z
                loss = -(p / (p + m / images)).log() - (1 - q / (q + m / images)).log().sum(1)
            else:
                loss = -(own / every.sum(1)).log()
            loss = loss + args.proximal_weight * (f - bank[i]).square().sum(1)
            (loss.mean() / args.accumulate).backward()
            total += loss.mean().item() / args.accumulate
            features.append(f.detach())
        optimizer.step()
        all_losses.append(total)
        all_z.append(sum(constants, torch.tensor(0.0)).item() / args.accumulate / images)
        for slot, f in zip(index.tolist(), torch.cat(features), strict=True):
            bank[slot] = F.normalize(args.bank_momentum * bank[slot] + (1 - args.bank_momentum) * f, dim=0)
    return network.state_dict(), bank, all_losses, all_z


@pytest.mark.parametrize("options", [
    "", "--bank-momentum 0 --lambda 3", "--accumulate 2", "--loss parametric", "--loss sampled --m 9",
    "--loss nce --m 9", "--loss nce --m 9 --z ema --accumulate 2", "--loss nce --m 9 --z exact",
    "--tau 0.2 --weight-decay 0.02", "--schedule cosine --lr 0.01 --momentum 0.5 --seed 3",
])
def test_training_is_that_of_plain_pytorch(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs on the recorded images end with the weights and the bank of a loop that is written as the paper reads:
    loss, step, then the bank with the features of before the step, each slot once; the rate drops in between."""
    steps = record_steps(npid, monkeypatch)
    words = [*TINY, "--subset", "32", "--no-amp", "--tau", "0.5", "--epochs", "2", "--schedule", "step",
             "--lr-drops", "1", "--output", f"{tmp_path}/run"]
    args = npid.parse_args([*words, *options.split()])
    npid.main(args)
    assert len(steps) == 4
    weights, bank, losses, z = by_plain_pytorch(args, steps, 32)
    torch.testing.assert_close(dict(steps[-1].state["encoder"]), dict(weights), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(steps[-1].state["bank"]["features"], bank, atol=1e-5, rtol=1e-4)
    header, *rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    m = args.num_negatives
    equal = dict(nce=-math.log(1 / (1 + m)) - m * math.log(m / (1 + m)), sampled=math.log(1 + m))
    assert header["chance_loss"] == pytest.approx(equal.get(args.loss, math.log(32)), abs=1e-4)
    for epoch, row in enumerate(rows):
        own = slice(2 * epoch, 2 * epoch + 2)
        assert (row["epoch"], row["step"]) == (epoch + 1, 2 * epoch + 2)
        assert row["lr"] == pytest.approx(rate_of(args, 2 * epoch + 1, 4))
        assert row["loss"] == pytest.approx(sum(losses[own]) / 2)
        assert ("z_over_n" in row) == (args.loss == "nce")
        assert row.get("z_over_n", 0) == pytest.approx(sum(z[own]) / 2, rel=1e-5)
