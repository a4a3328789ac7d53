"""A pretended GPU: tensors with values, on the CPU, that say that they are on cuda:0.

Within pretend() what is made on cuda:0 or moved there is a CudaTensor. What a GPU refuses, such as
operands on two devices, is an error, and so is an index on the CPU, for which a GPU would wait.
Backward passes, modules and optimizers work, too.
"""

import collections
import contextlib
import re
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parent.parent
# What tells the host a value, or a size that follows from values.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2",
           "unique_consecutive", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class CudaTensor(torch.Tensor):
    """A tensor that says that it is on cuda:0. values: the same on the CPU."""

    device, is_cuda, is_cpu = torch.device("cuda:0"), True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device="cpu")  # of which torch's own code believes it to be

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, *_):
        raise RuntimeError(f"{function} of a CudaTensor outside of pretend()")

    def to(self, *args, **options):
        device, dtype = torch._C._nn._parse_to(*args, **options)[:2]
        if device is None or device.type == "cuda":
            return self if dtype in (None, self.dtype) else super().to(dtype)
        return torch.ops.aten._to_copy(self, dtype=dtype, device=device)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("numpy() of a tensor on cuda:0")


class Pretend(TorchDispatchMode):
    """Carries out on the CPU what is for cuda:0. waits: {line: number of waits there}."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device, moves = kwargs.get("device"), name in ("copy_", "_to_copy")
        from_cuda = any(isinstance(x, CudaTensor) for x in tensors[name == "copy_":])
        if name == "copy_":
            to_cuda = isinstance(args[0], CudaTensor)
        elif device is None or from_cuda and not moves:
            to_cuda = from_cuda
        else:  # the backward of unbind makes zeros with no tensor beside them
            to_cuda = torch.device(device).type == "cuda" or (
                not tensors and torch._C._current_autograd_node() is not None)
        if not (from_cuda or to_cuda):
            return function(*args, **kwargs)
        on_cpu = [x for x in tensors if not isinstance(x, CudaTensor) and x.dim()]
        if kwargs.get("generator") or from_cuda and not moves and on_cpu:
            raise RuntimeError(f"{function} takes something on cuda:0 and something on the CPU")
        if (name in WAITING or from_cuda != to_cuda and moves and not kwargs.get("non_blocking")
                or name in INDEXING and any(x is not None and x.dtype == torch.bool
                                            for x in args[1])):
            self.waits[line_of_source()] += 1
        options = {**kwargs, "device": "cpu"} if device is not None else kwargs
        made = function(*values_of(args), **values_of(options))
        returns = function._schema.returns
        if returns and returns[0].alias_info and returns[0].alias_info.is_write:
            return kwargs.get("out", args[0])
        return tree_map(lambda x: CudaTensor(x) if isinstance(x, torch.Tensor) else x,
                        made) if to_cuda else made

    def functions(self):
        """What made the host wait, a set of "file.py function"; without the tests' own."""
        return {re.sub(r":\d+", "", line) for line in self.waits if not line.startswith("test_")}


def values_of(tree):
    """The same nest of tensors and others, with the values of each CudaTensor in its place."""
    return tree_map(lambda x: x.values if isinstance(x, CudaTensor) else x, tree)


def line_of_source():
    """The innermost line of the project, but for this file: "file.py:12 function"."""
    frame = sys._getframe()
    while frame.f_code.co_filename == __file__ or (
            Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "tests")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


@contextlib.contextmanager
def pretend():
    """Within it torch takes cuda:0 for a device -> Pretend, with the waits so far."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to needs it here
    try:
        with mock.patch("torch.cuda._lazy_init"), Pretend() as mode:
            yield mode
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
