"""A CUDA device that is not there, for whole scripts: its tensors live in the host's memory and say that they do not.

An operator that meets tensors of both devices fails as on a GPU, and all that makes the host wait for the device is
noted. Speed, memory, streams and the device's own kernels are beyond it. It leans on what PyTorch has for its own
fake tensors.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import common

DEVICE = torch.device("cuda", 0)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount",  # a size is a value, too
         "_linalg_eigh"}  # whether it converged
MAY_MIX = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}  # CPU indices are copied, and noted


class Pretended(Tensor):
    """A tensor of the pretended device; `held` is what it stands for."""

    held: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        with torch._C._DisableTorchDispatch():
            # To autograd it is of the meta device, which needs no threads, to autocast of CUDA.
            meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
            return Tensor._make_subclass(cls, meta, False, device_for_backend_keys=DEVICE)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a cuda:0 tensor to numpy")

    __array__ = numpy

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **dict(dtype=self.dtype, device=DEVICE) | options)

    def tolist(self) -> Any:
        note("tolist")
        return self.detach().held.tolist()


class Mode(TorchDispatchMode):
    """Sees the operators that make tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on what its tensors stand for."""
    name = func.overloadpacket.__name__
    tensors = [part for part in pytree.tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    here = any(isinstance(part, Pretended) for part in tensors)
    elsewhere = any(not isinstance(part, Pretended) and part.ndim for part in tensors)
    if here and elsewhere and name not in MAY_MIX:
        raise RuntimeError(f"expected all tensors to be on the same device: {name} at {place()}")
    asked = kwargs.get("device")
    there = here if asked is None else torch.device(asked).type in ("cuda", "meta")
    masks = any(part.dtype == torch.bool for part in tensors[1:])  # where they are true is counted by the host
    if here and (name in READS or ((elsewhere or masks) and name.startswith(("index", "_index")))):
        note(name)
    if name in ("_to_copy", "copy_"):
        source, target = (args[0], there) if name == "_to_copy" else (args[1], isinstance(args[0], Pretended))
        at_once = kwargs.get("non_blocking") or args[2:] == (True,)
        if isinstance(source, Pretended) != target and not (at_once and (not target or address(source) in pinned)):
            note(name)
    pin = kwargs.get("pin_memory")
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    kwargs |= {} if asked is None else dict(device=torch.device("cpu") if there else asked)
    held_args, held_kwargs = pytree.tree_map_only(Pretended, lambda part: part.held, (args, kwargs))
    made = func(*held_args, **held_kwargs)
    if pin:
        pinned.add(address(made))
    if name == "copy_":
        return args[0]
    if not there:
        return made
    made = pytree.tree_map_only(Tensor, lambda part: part if isinstance(part, Pretended) else Pretended(part), made)
    return return_and_correct_aliasing(func, args, kwargs, made) if here and name != "_to_copy" else made


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def place() -> str:
    """The line of this repository, or of a library above it, that is at work."""
    frame = sys._getframe(1)
    while Path(frame.f_code.co_filename).parent != common.ROOT and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name} {frame.f_lineno}"


def note(what: str) -> None:
    """Add a wait to the file that `install` was given."""
    os.write(waits, f"{what} {place()}\n".encode())


waits = -1
pinned = set[int]()  # addresses: a copy from other memory waits


def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """What the kernel of common.FLASH computes: O and LSE."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    scores = q.float() @ k.float().mT * scale
    return (scores.softmax(3) @ v.float()).bfloat16(), scores.logsumexp(3)


def install(log: Path) -> None:
    """Let this process have the device from now on; what makes it wait goes to `log`, a line each."""
    global waits
    waits = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    answers = dict(
        _lazy_init=None, is_available=True, device_count=1, set_device=None, is_bf16_supported=True,
        max_memory_allocated=0, memory_reserved=0, memory_allocated=0, mem_get_info=(1 << 36, 1 << 36),
        get_device_name="pretended", get_device_capability=(9, 0), manual_seed_all=None, synchronize=None,
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    write = common.write_checkpoint
    common.write_checkpoint = lambda path, content: write(path, common.copied(content))
    torch.backends.cuda.is_flash_attention_available = lambda: True
    common.FLASH, common.Run.graphed = flash, lambda run, function, small: function  # type: ignore
    generator = torch.Generator

    class Generator(generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, device="cpu")

    torch.Generator = Generator
    Tensor.pin_memory = lambda self, *_: (pinned.add(address(self)), self)[1]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False)
    Mode().__enter__()
