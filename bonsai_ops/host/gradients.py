"""Right gradients for models whose blocks write into what they were given.

ComfyUI's FLUX and LTX blocks add in place (`img += ..`). Without gradients that is only thrift. With them it changes
what a norm kept of its input for the backward pass, and what a checkpointed block is computed again from: PyTorch
raises for the first without checkpointing and sees neither with it. Two things together make it right:

- a block works on copies of its inputs, made inside its forward, so that a checkpoint around it keeps the originals;
- a layer or function that keeps what it reads is given a copy of what its block may write into. For a layer it is made
  outside its forward, so that a checkpoint around it keeps the copy.

A third: the checkpoints that Train LoRA puts on single layers where it offloads pass no gradient to what the layer
trains unless its input needs one, and texts and times need none. So there the inputs of the whole model are made to
need one. Where no layer is checkpointed they are not: what lies before the blocks would keep its weights for nothing.

Blocks are the members of ModuleLists, in any architecture. Where no gradient is wanted they do what they did before,
and nothing hangs on their layers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.ops
import comfy.patcher_extension
import torch
from torch.overrides import TorchFunctionMode

from .attention import attend_in_parts

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch.utils.hooks import RemovableHandle

    Block = torch.nn.Module
else:
    Block = object

CALLBACK_KEY = "bonsai gradients"
CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict)
KEEPING = frozenset(
    (
        "layer_norm",
        "rms_norm",
        "group_norm",
        "linear",
        "bilinear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "scaled_dot_product_attention",
        "conv1d",
        "conv2d",
        "conv3d",
        "mul",
        "multiply",
        "div",
        "divide",
        "true_divide",
        "addcmul",
        "addcdiv",
        "square",
        "pow",
        "sqrt",
        "rsqrt",
        "exp",
        "log",
        "norm",
        "var",
        "std",
        "sigmoid",
        "tanh",
        "relu",
        "gelu",
        "silu",
        "mish",
        "softplus",
        "softmax",
        "__matmul__",
        "__rmatmul__",
        "__mul__",
        "__rmul__",
        "__truediv__",
        "__rtruediv__",
        "__pow__",
    )
)
"""Names of functions that keep an argument, or a view of one, for their backward pass."""


def right_gradients(patcher: ModelPatcher) -> None:
    """Makes the transformer or UNet of a ModelPatcher, and of every clone of it, give right gradients.

    Once is enough; a second time does nothing. Raises ValueError for what is no diffusion model.
    """
    transformer = getattr(patcher.model, "diffusion_model", None)
    if not isinstance(transformer, torch.nn.Module):
        raise ValueError(
            "this MODEL is no diffusion model of ComfyUI: it has no transformer or UNet whose gradients could be set "
            "right. Connect the output of a node that loads a diffusion model."
        )
    for mixin, modules in ((_OnCopies, _blocks(transformer)), (_WithGradients, [transformer])):
        for module in modules:
            if not getattr(module, mixin.__name__, False):
                _forget_forward(module)
                module.__class__ = _mixed(mixin, type(module))
    on_clone = comfy.patcher_extension.CallbacksMP.ON_CLONE
    if not patcher.get_callbacks(on_clone, CALLBACK_KEY):
        patcher.add_callback_with_key(on_clone, CALLBACK_KEY, _clone_too)


def _forget_forward(module: torch.nn.Module) -> None:
    """Takes away what Train LoRA's `unpatch` leaves on a module: its class's forward, which would hide ours."""
    if "forward" in vars(module) and not _has_other_forward(module):
        del module.forward


def _has_other_forward(module: torch.nn.Module) -> bool:
    """Whether the module has a forward of its own that is not its class's."""
    own = vars(module).get("forward")
    return own is not None and not (getattr(own, "__self__", None) is module and own.__func__ is type(module).forward)


def _checkpoints_layers(transformer: torch.nn.Module) -> bool:
    """Whether single layers are checkpointed, as Train LoRA does it, and offloads some where it is asked to."""
    leaves = (module for module in transformer.modules() if next(module.children(), None) is None)
    return any(map(_has_other_forward, leaves))


def with_right_gradients(patcher: ModelPatcher) -> ModelPatcher:
    """A clone that gives right gradients; it shares its layers with the original. Raises as `right_gradients` does.

    On a CPU its attention takes little memory, as that of our own models does.
    """
    clone = patcher.clone()
    right_gradients(clone)
    attend_in_parts(clone)
    return clone


def _clone_too(patcher: ModelPatcher, clone: ModelPatcher) -> None:
    right_gradients(clone)


def _blocks(transformer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The members of ModuleLists that are made of layers."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.ModuleList):
            members = (getattr(m, "_orig_mod", m) for m in module if m is not None)  # what torch.compile wraps
            yield from (m for m in members if not isinstance(m, CONTAINERS) and next(m.children(), None) is not None)


def outer_blocks(transformer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The blocks that lie within no other block, in any architecture."""
    inner: set[torch.nn.Module] = set()
    for block in _blocks(transformer):
        if block not in inner:
            inner.update(block.modules())
            yield block


def _layers(block: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """What a block itself calls: its children, and those of children that only hold some."""
    for child in block.children():
        if isinstance(child, CONTAINERS) or type(child).forward is torch.nn.Module.forward:
            yield from _layers(child)
        else:
            yield child


class _WithGradients(Block):
    """Mixed into the class of a transformer or UNet."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _checkpoints_layers(self) and _is_wanted(self, args, kwargs):
            plain = {name: value for name, value in kwargs.items() if "mask" in name}  # products want these without
            args, kwargs = _each(args, _needing), {n: _each(value, _needing) for n, value in kwargs.items()} | plain
        return super().forward(*args, **kwargs)


def _needing(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one of the same values that needs a gradient, into which may be written."""
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_().clone()


class _OnCopies(Block):
    """Mixed into the class of a block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _is_wanted(self, args, kwargs):
            return super().forward(*args, **kwargs)
        made: dict[int, torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = tensor.clone()
            return made[id(tensor)]

        args, kwargs = _each(args, copy), {name: _each(value, copy) for name, value in kwargs.items()}
        if torch.compiler.is_compiling():  # the compiler's graphs write into nothing that is kept
            return super().forward(*args, **kwargs)
        with _Reading(self, made.values()):
            return super().forward(*args, **kwargs)


def _reduced(module: torch.nn.Module, protocol: int) -> tuple:
    """Copied and pickled by way of the module's own class, which has a name."""
    _, mixin, base, *_ = type(module).__mro__
    return _made_again, (mixin, base), module.__dict__


@functools.cache
def _mixed(mixin: type, base: type) -> type:
    """`base` with `mixin` in front, under the same name; the same class for the same two.

    Its forward is code of its own: torch.compile counts and limits what it made of each code, whatever the class.
    """
    shared = mixin.forward
    code = shared.__code__.replace(co_name=f"forward_of_{base.__name__}")
    members = {
        "forward": types.FunctionType(code, shared.__globals__, "forward", None, shared.__closure__),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__reduce_ex__": _reduced,
        mixin.__name__: True,  # known by its name, for a second import of the plugin has classes of its own
    }
    return type(base.__name__, (mixin, base), members)


def _made_again(mixin: type, base: type) -> torch.nn.Module:
    cls = _mixed(mixin, base)
    return cls.__new__(cls)


class _Reading(TorchFunctionMode):
    """While a block runs: what keeps what it reads is given copies of the tensors that the block may write into.

    written: those tensors; views of them count too.
    """

    def __init__(self, block: torch.nn.Module, written: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.layers = list(_layers(block))
        self.memory = {_memory(tensor) for tensor in written} - {None}
        self.hooks: list[RemovableHandle] = []

    def __enter__(self) -> _Reading:
        self.hooks = [layer.register_forward_pre_hook(self.before_layer, with_kwargs=True) for layer in self.layers]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in KEEPING:
            args, kwargs = self.apart(args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def before_layer(self, layer: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook of what a block calls, outside of a checkpoint around its forward."""
        return self.apart(args, kwargs)

    def apart(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments, with copies of those that the block may write into."""

        def apart(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if _memory(tensor) in self.memory else tensor

        return _each(args, apart), {name: _each(value, apart) for name, value in kwargs.items()}


def _is_wanted(block: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
    """True if something is to get a gradient through this block: an input, a parameter, or a patch of a weight."""
    if not torch.is_grad_enabled():
        return False
    found: list[bool] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.requires_grad)
        return tensor

    _each((args, tuple(kwargs.values())), look)
    if block.training or any(found):
        return True
    layers = (module for module in block.modules() if isinstance(module, comfy.ops.CastWeightBiasOp))
    adapters = (f for layer in layers for f in layer.weight_function if isinstance(f, torch.nn.Module))
    return any(p.requires_grad for module in (block, *adapters) for p in module.parameters())


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A value with every floating-point tensor in it changed, in tuples and lists too."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)([_each(item, change) for item in value])
    return value


def _memory(tensor: torch.Tensor) -> int | None:
    """Where the values of a tensor lie; None for one that has no memory of its own, as a packed weight."""
    return None if type(tensor) not in (torch.Tensor, torch.nn.Parameter) else tensor.untyped_storage().data_ptr()
