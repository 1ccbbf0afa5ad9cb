"""Watches the sparse layers of any model, ours or timm's, with hooks, and leaves its forward as it is.

A sparse layer is a `SparseCoding` (its final code is seen) or an activation of `dsc.prox` outside one.
"""

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


def activation_name(model: nn.Module) -> str:
    """Names of the model's activations, as `GroupReLU`."""
    kinds = {getattr(layer.prox, "function", layer.prox) for layer in sparse_layers(model).values()}
    return ", ".join(sorted({type(kind).__name__ for kind in kinds})) or "none"


class Observer:
    """Keeps each sparse layer's codes of the latest forward; a context manager, or until `remove`.

    `features[name]` has one tensor a call of that layer (a module shared between places is called more than once);
    for a `SparseCoding` layer `inputs[name]` has the signal that it coded in that call. In a `DeepSparseCoding` this
    is the image or the code below, in the joint mode too, where the layers themselves are not called.

    Raises:
        RuntimeError: the model is compiled; hooks added afterwards would never fire. Observe, then compile.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(_is_compiled(module) for module in model.modules()):
            raise RuntimeError("the model is compiled already, so hooks would never fire: observe before torch.compile")
        self.layers = sparse_layers(model)
        self.features: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        # First of all: the model may itself be a layer whose input is to be kept.
        self._handles = [model.register_forward_pre_hook(lambda *_: self._forget())]
        self._handles += [self._keep_output(layer.output, self.features, name) for name, layer in self.layers.items()]
        names = {layer.coder: name for name, layer in self.layers.items() if layer.coder is not None}
        self._handles += [self._keep_input(coder, name) for coder, name in names.items()]
        for module in model.modules():
            if isinstance(module, DeepSparseCoding) and module.joint:
                layers = list(module)
                self._handles.append(self._keep_input(module, names[layers[0]]))
                for below, above in pairwise(layers):
                    self._handles.append(self._keep_output(below.code, self.inputs, names[above]))

    def _keep_output(self, module: nn.Module, kept: dict[str, list[Tensor]], name: str) -> RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept.setdefault(name, []).append(output)

        return module.register_forward_hook(keep)

    def _keep_input(self, module: nn.Module, name: str) -> RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(name, []).append(args[0])

        return module.register_forward_pre_hook(keep)

    def _forget(self) -> None:
        self.features.clear()
        self.inputs.clear()

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
    """Input of every `SparseCoding` layer of `model` for the images `x`, by layer name; of its last call.

    Raises RuntimeError for a model that is compiled.
    """
    with Observer(model) as observer:
        model(x)
    return {name: inputs[-1] for name, inputs in observer.inputs.items()}
