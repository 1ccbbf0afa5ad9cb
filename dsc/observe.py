"""Watches the sparse layers of any model, ours or timm's, with hooks, and leaves its forward as it is.

A sparse layer is a `SparseCoding` (its final code is seen) or an activation of `dsc.prox` outside one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsc.layers import DeepSparseCoding, SparseCoding
from dsc.prox import Prox


@dataclass(frozen=True)
class SparseLayer:
    """One sparse layer: the module whose output is its code, the activation, and the coder if it has one."""

    output: nn.Module
    prox: Prox
    coder: SparseCoding | None = None


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Sparse layers of `model` by the name of their module, in the model's order."""
    found: dict[str, SparseLayer] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, SparseCoding):
            found[name] = SparseLayer(module.code, module.prox, module)
            inside.update(module.modules())
        elif isinstance(module, Prox) and module not in inside:
            found[name] = SparseLayer(module, module)
    return {name or type(model).__name__: layer for name, layer in found.items()}


class Observer:
    """Keeps each sparse layer's codes of the latest forward; a context manager, or until `remove`.

    `features[name]` has one tensor a call of that layer (a module shared between places is called more than once).

    Raises:
        RuntimeError: the model is compiled; hooks added afterwards would never fire. Observe, then compile.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(_is_compiled(module) for module in model.modules()):
            raise RuntimeError("the model is compiled already, so hooks would never fire: observe before torch.compile")
        self.layers = sparse_layers(model)
        self.features: dict[str, list[Tensor]] = {}
        self._handles = [self._watch(name, layer.output) for name, layer in self.layers.items()]
        self._handles.append(model.register_forward_pre_hook(lambda *_: self.features.clear()))

    def _watch(self, name: str, module: nn.Module) -> RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self.features.setdefault(name, []).append(output)

        return module.register_forward_hook(keep)

    def remove(self) -> None:
        """Take the hooks away again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "Observer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def coder_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Input of every `SparseCoding` layer of `model` for the images `x`, by layer name.

    In a `DeepSparseCoding` a layer's input is the image or the code below, in the joint mode too, where the layers
    themselves are not called.
    """
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    inputs: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def keep_input_for(coder: nn.Module) -> Callable[..., None]:
        return lambda module, args: inputs.update({names[coder]: args[0]})

    def keep_output_for(coder: nn.Module) -> Callable[..., None]:
        return lambda module, args, output: inputs.update({names[coder]: output})

    for module in model.modules():
        if isinstance(module, SparseCoding):
            handles.append(module.register_forward_pre_hook(keep_input_for(module)))
        if isinstance(module, DeepSparseCoding):
            layers = list(module)
            handles.append(module.register_forward_pre_hook(keep_input_for(layers[0])))
            handles += [below.code.register_forward_hook(keep_output_for(above)) for below, above in pairwise(layers)]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return inputs
