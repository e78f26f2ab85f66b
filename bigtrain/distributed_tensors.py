"""torch's distributed tensors and sharded modules, recognised without loading them for whoever has none.

Where one is, its module has been loaded: 40 MB of resident memory, which a process that trains alone does without.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Any) -> TypeGuard[DTensor]:
    """Tell whether this is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `fully_shard` has taken this module."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(model, module.FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a distributed tensor, and any other tensor as it is."""
    if not is_distributed(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part
