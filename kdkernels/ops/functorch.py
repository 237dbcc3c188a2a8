"""How ops whose derivative is registered in C++ behave under torch.func."""

import torch


def takes_the_reference() -> bool:
    """Whether the innermost transform is one that sees no derivative registered in C++ (torch.func.grad and the like); vmap has rules."""
    if not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    return functorch.peek_interpreter_stack().key() != functorch.TransformType.Vmap
