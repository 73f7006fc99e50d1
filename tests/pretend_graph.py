"""A CUDA graph without a GPU: operators are recorded once and then run again on the same memory.

As in a graph nothing of Python runs in a replay: no branch is taken anew, no list grows, and a tensor that was replaced
and not written in place keeps what it held when it was recorded.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import common


class Recorder(TorchDispatchMode):
    """Operators with their arguments and results, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[tuple[Any, Any, dict[str, Any], Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **kwargs or {})
        if not func.is_view:  # a view sees what its base holds
            self.calls.append((func, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                old, new = pytree.tree_leaves(results), pytree.tree_leaves(func(*args, **kwargs))
                for held, made in zip(old, new, strict=True):
                    if isinstance(held, Tensor) and held is not made:
                        held.detach().copy_(made)


def record(self: common.Graph) -> tuple[Any, Callable[[], None]]:
    """In place of Graph.record. Recording computes here, so the first replay is left out."""
    with Recorder() as recorder:
        outputs = self.function(*self.inputs)
    replays = itertools.chain([lambda: None], itertools.repeat(recorder.replay))
    return outputs, lambda: next(replays)()


def rate_in_a_tensor(optimizer: torch.optim.SGD, lr: float) -> None:
    """What common.set_rate does on a GPU."""
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], Tensor):
            group.update(lr=torch.empty(()), fused=True, foreach=False)
        group["lr"].fill_(lr)


def install(wanted: bool, log: Path) -> None:
    """On a CPU, do all that a GPU would: with graphs if `wanted`. `log` receives a line for each that is recorded."""
    def graphed(run: common.Run, function: Callable[..., Any], small: bool) -> Callable[..., Any]:
        return common.Graph(function) if wanted and small else function

    def noted(self: common.Graph) -> tuple[Any, Callable[[], None]]:
        with log.open("a") as file:
            file.write(f"{self.function}\n")
        return record(self)

    common.set_rate, common.Run.graphed, common.Graph.record = rate_in_a_tensor, graphed, noted  # type: ignore
    common._largest = common._largest_by_strips  # the GPU's, which unlike NumPy's has operators to record
