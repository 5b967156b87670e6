"""Read a torch file that pickles objects of its author's, without importing or running any of it.

Resumable checkpoints of the released code hold a configuration object beside the weights. Only what rebuilds tensors is
looked up; every other class or function that the file names is replaced by an inert one, whose instances keep nothing.
"""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# What torch.save writes for a state dict: how a tensor is put together, from which storage, in which dictionary.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    *(("torch", f"{kind}Storage") for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Bool", "Byte")),
}


class Inert(dict[Any, Any]):
    """Stands for an object that was not rebuilt: takes whatever a pickle does to an object, and keeps nothing."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__()

    def __call__(self, *arguments: Any, **keywords: Any) -> "Inert":
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class InertUnpickler(pickle.Unpickler):
    """Looks up what ALLOWED lists; everything else is Inert."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in ALLOWED else Inert


def load(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU. Raises what torch.load raises for a damaged file."""
    # torch.load wants a module: these are the three names that it uses of one.
    inert = SimpleNamespace(
        __name__="inert",
        Unpickler=InertUnpickler,
        load=lambda file, **options: InertUnpickler(file, **options).load(),
    )
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert)
