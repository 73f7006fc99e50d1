"""Claims about the memory bank and the exact softmax over it."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pretend_cuda
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import npid


def make(
    size: int, dim: int, batch: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """z (batch, dim) unit, index (batch,), bank (size, dim)."""
    generator = torch.Generator().manual_seed(size + dim)
    bank = common.MemoryBank(size, dim, generator).features.to(dtype)
    z = F.normalize(torch.randn(batch, dim, generator=generator), dim=1)
    index = torch.randint(size, (batch,), generator=generator)
    return z.to(device), index.to(device), bank.to(device)


def reference(z: Tensor, index: Tensor, bank: Tensor, temperature: float, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (B,) and gradient of (upstream * loss).sum() for z, by cross-entropy on float64 logits."""
    z = z.double().requires_grad_()
    loss = F.cross_entropy(z @ bank.double().T / temperature, index, reduction="none")
    (gradient,) = torch.autograd.grad((loss * upstream.double()).sum(), z)
    return loss.detach(), gradient


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize(("size", "batch"), [(1, 1), (7, 3), (2049, 33), (20011, 64)])
def test_softmax_is_cross_entropy(
    size: int, batch: int, temperature: float, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    """Value and gradient, also times upstream gradients, equal float64 cross-entropy for any N."""
    z, index, bank = make(size, 128, batch, device, dtype)
    upstream = torch.linspace(-2, 2, batch, device=device)
    z.requires_grad_()
    loss = common.bank_softmax(z, index, bank, temperature)
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), z)
    expected, expected_gradient = reference(z.detach(), index, bank, temperature, upstream)
    torch.testing.assert_close(loss.detach().double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=tolerance, rtol=0)


def test_sharp_softmax_stays_finite(device: str) -> None:
    """At tau = 0.01, where exp(100) has no float32, loss and gradient are still right."""
    z, index, bank = make(3001, 128, 9, device)
    z = bank[index].clone().requires_grad_()  # the sharpest case: each query is its own slot
    loss = common.bank_softmax(z, index, bank, 0.01)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    expected, expected_gradient = reference(z.detach(), index, bank, 0.01, torch.ones_like(loss))
    torch.testing.assert_close(loss.detach().double(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-3, rtol=0)


def test_gradient_is_that_of_finite_differences() -> None:
    """The analytic gradient (O - v_i)/tau is the derivative of the loss."""
    z, index, bank = make(301, 16, 5)
    z = z.double().requires_grad_()
    torch.autograd.gradcheck(lambda z: common.bank_softmax(z, index, bank.double(), 0.3), z)


def test_bank_takes_no_gradient() -> None:
    """The gradient goes to z alone, even if the bank asks for one; a temperature that does is refused."""
    z, index, bank = make(50, 8, 4)
    bank.requires_grad_()
    common.bank_softmax(z.requires_grad_(), index, bank, 0.07).sum().backward()
    assert bank.grad is None and z.grad is not None
    learnt: Any = torch.tensor(0.07, requires_grad=True)
    with pytest.raises(ValueError, match="the temperature takes no gradient"):
        common.bank_softmax(z, index, bank, learnt)


def test_autocast_changes_nothing(device: str) -> None:
    """Under bfloat16 autocast the softmax is still computed in float32."""
    z, index, bank = make(3000, 128, 16, device)
    plain = common.bank_softmax(z, index, bank, 0.07)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(common.bank_softmax(z, index, bank, 0.07), plain)


@pytest.mark.parametrize("size", [5, 132, 1000])
def test_heads_merge_to_the_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """O and LSE from heads of the bank equal the whole's, as near as bfloat16 is, for fewer rows than heads too."""
    z, _, bank = make(size, 32, 6)
    monkeypatch.setattr(common, "FLASH", pretend_cuda.flash)
    output, lse = common.bank_attention_in_heads(z, bank, 0.07)
    exact_output, exact_lse = common.bank_attention(z.double(), bank.double(), 0.07)
    assert output.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, atol=2e-2, rtol=0)
    torch.testing.assert_close(output.double(), exact_output, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("noise", "error"), [(0.1, 0.05), (0.3, 0.02), (0.5, 0.02)])
def test_own_row_is_exact(noise: float, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the loss of images that are nearly memorised, 0.02 or less here, is not negative, and its gradient,
    the part along the sphere, is right to some percent; without the own row in float32 it is not right at all."""
    _, index, bank = make(3000, 128, 64)
    source = torch.Generator().manual_seed(0)
    z = F.normalize(bank[index] + noise * F.normalize(torch.randn(64, 128, generator=source), dim=1), dim=1)
    monkeypatch.setattr(common, "FLASH", pretend_cuda.flash)

    def gradient(output: Tensor) -> Tensor:
        whole = (output - bank[index]) / 0.07
        return whole - (whole * z).sum(1, keepdim=True) * z

    exact_output, exact_lse = common.bank_attention(z.double(), bank.double(), 0.07)
    rough = common.bank_attention_in_heads(z, bank, 0.07)
    output, lse = common.with_own_row(*rough, z, bank[index], 0.07)
    exact = gradient(exact_output)
    assert float((lse - (z * bank[index]).sum(1) / 0.07).min()) > 0
    assert float((lse - exact_lse).abs().max()) < 1e-4 < float((rough[1] - exact_lse).abs().max())
    assert float((gradient(output) - exact).norm() / exact.norm()) < error
    assert float((gradient(rough[0]) - exact).norm() / exact.norm()) > 5 * error


@pytest.mark.gpu
@pytest.mark.parametrize("size", [100, 50_000, 200_003])
def test_softmax_in_half_precision(size: int) -> None:
    """On a GPU the softmax in bfloat16 has nearly the loss and the gradient of the exact one, and is what amp takes."""
    z, index, bank = make(size, 128, 128, "cuda")
    losses, gradients = [], []
    for half in (False, True):
        query = z.clone().requires_grad_()
        loss = common.bank_softmax(query, index, bank, 0.07, half)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss.mean(), query)[0])
    assert common.has_flash(z) and not torch.equal(*losses)
    assert float((losses[0] - losses[1]).abs().max()) < 2e-2
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-2


def test_compile_gives_the_same() -> None:
    """torch.compile takes the softmax in one graph."""
    z, index, bank = make(1500, 32, 8)
    compiled = torch.compile(lambda z: common.bank_softmax(z, index, bank, 0.07).mean(), backend="aot_eager")
    one, two = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(one).backward()
    common.bank_softmax(two, index, bank, 0.07).mean().backward()
    torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("private", [False, True])
def test_logits_never_exist(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What forward and backward hold beside the inputs is less than a tenth of the B x N logits, and than the bank."""
    z, index, bank = make(200_000, 16, 128)
    if not private:
        monkeypatch.setattr(common, "LINEAR_FOR_CPU", None)
    z.requires_grad_()
    extra = importlib.import_module("benchmarks.bench").extra_memory(
        lambda: common.bank_softmax(z, index, bank, 0.07).sum().backward())
    assert 0 < extra < 0.1 * 4 * len(z) * len(bank) < bank.nbytes


@pytest.mark.parametrize(
    ("temperature", "dim", "ratio"), [(0.07, 128, 2.209), (0.1, 128, None), (0.07, 64, None)]
)
def test_first_partition_sum(temperature: float, dim: int, ratio: float | None) -> None:
    """Z/N of a random bank is the mean of exp(u/tau) on the sphere, 2.209 at tau 0.07 and D 128."""
    z, _, bank = make(50_000, dim, 64)
    _, lse = common.bank_attention(z, bank, temperature)
    sphere, term = 1.0, 1.0  # E exp(k u) = sum_n (k^2 / 4)^n / (n! (D/2)_n), a Bessel function
    for n in range(1, 60):
        term *= (0.5 / temperature) ** 2 / (n * (dim / 2 + n - 1))
        sphere += term
    assert ratio is None or abs(sphere / ratio - 1) < 1e-3
    assert abs(float(lse.exp().mean()) / len(bank) / sphere - 1) < 0.03


def test_shards_merge_exactly() -> None:
    """Attention over parts of the bank merges to attention over all of it."""
    z, _, bank = make(1003, 32, 6)
    whole = common.bank_attention(z, bank, 0.07)
    parts = [common.bank_attention(z, part, 0.07) for part in bank.split([1, 400, 602])]
    torch.testing.assert_close(npid.merge(*map(torch.stack, zip(*parts, strict=True))), whole)


def test_bank_starts_the_same_everywhere() -> None:
    """The same seed gives the same unit rows, whatever the global random state."""
    one = common.MemoryBank(100, 128, torch.Generator().manual_seed(3)).features
    torch.rand(5)
    two = common.MemoryBank(100, 128, torch.Generator().manual_seed(3)).features
    assert torch.equal(one, two)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(100))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_update_follows_the_formula(momentum: float, device: str) -> None:
    """v_i is normalise(momentum v_i + (1 - momentum) z_i), of length 1; other rows keep every bit."""
    bank = common.MemoryBank(50, 128, torch.Generator().manual_seed(0)).to(device)
    before = bank.features.clone()
    z = F.normalize(torch.randn(8, 128, device=device), dim=1)
    index = torch.randperm(50)[:8].to(device)
    bank.update(z, index, momentum)
    expected = F.normalize(momentum * before[index].double() + (1 - momentum) * z.double(), dim=1)
    torch.testing.assert_close(bank.features[index].double(), expected, atol=1e-6, rtol=0)
    assert (bank.features.double().norm(dim=1) - 1).abs().max() < 1e-6
    others = torch.ones(50, dtype=torch.bool, device=device).index_fill(0, index, False)
    assert torch.equal(bank.features[others], before[others])


def test_momentum_one_keeps_every_bit() -> None:
    """With momentum 1 the bank is constant."""
    bank = common.MemoryBank(20, 16)
    before = bank.features.clone()
    bank.update(F.normalize(torch.randn(5, 16), dim=1), torch.arange(5), 1.0)
    assert torch.equal(bank.features, before)


def test_last_duplicate_wins(device: str) -> None:
    """Of rows with the same index the last one is written, or none if that one is broken."""
    bank = common.MemoryBank(10, 16).to(device)
    z = F.normalize(torch.randn(6, 16, device=device), dim=1)
    bank.update(z, torch.tensor([3, 5, 3, 3, 5, 0], device=device), 0.0)
    torch.testing.assert_close(bank.features[[3, 5, 0]], z[[3, 4, 5]])
    bad = z.flip(1).clone()
    bad[4:] = math.nan
    bank.update(bad, torch.tensor([3, 5, 3, 9, 3, 5], device=device), 0.0)
    torch.testing.assert_close(bank.features[[3, 5, 9]], torch.stack([z[3], z[4], bad[3]]))
    many = F.normalize(torch.randn(5000, 16, device=device), dim=1)  # so many that only a stable sort keeps their order
    index = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(0))
    bank.update(many, index.to(device), 0.0)
    last = [int((index == slot).nonzero()[-1]) for slot in range(10)]
    torch.testing.assert_close(bank.features, many[last])


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_nothing_broken_enters_the_bank(value: float, device: str) -> None:
    """A row of NaN, infinities or zeros leaves its slot as it was, and only its slot."""
    bank = common.MemoryBank(10, 16).to(device)
    before = bank.features.clone()
    z = F.normalize(torch.randn(3, 16, device=device), dim=1)
    z[1] = value
    bank.update(z, torch.tensor([2, 4, 6], device=device), 0.0)
    assert torch.equal(bank.features[4], before[4]) and bank.features.isfinite().all()
    torch.testing.assert_close(bank.features[[2, 6]], z[[0, 2]])


def test_index_outside_is_a_fault() -> None:
    """An index that is no slot is reported in one line."""
    for index in (10, -1):
        with pytest.raises(common.Fault, match="index"):
            common.MemoryBank(10, 4).update(torch.ones(2, 4), torch.tensor([3, index]), 0.5)
