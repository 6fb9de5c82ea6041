"""The guards against known traps: each an attribute of a module, and how it is taken away. Read by guards.py."""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Guard:
    """What keeps a trap shut: `place`, such as "Class.method", in `module`, a file of this repository or a name.

    instead(what is there) is put in its place; without `instead` it is deleted.
    again: the guard matters only where the file is imported under a second name, and only while this function of the
    module runs; it has run when the guard is removed, and is called once more.
    test: file::function below guards.MODEL_TESTS.
    """

    trap: str
    name: str
    module: str
    place: str
    test: str
    instead: Callable[[Any], Any] | None = None
    again: str | None = None

    @property
    def file(self) -> PurePosixPath | None:
        """The file of the module if it is one of this repository."""
        return PurePosixPath(self.module) if self.module.endswith(".py") else None

    @property
    def module_name(self) -> str:
        return ".".join(self.file.with_suffix("").parts) if self.file else self.module

    def find(self, module: ModuleType) -> tuple[Any, str, Any]:
        """(owner, attribute, what comes instead, None to delete it). Raises LookupError if `module` lacks the place."""
        *owners, attribute = self.place.split(".")
        try:
            owner = functools.reduce(getattr, owners, module)
            present = vars(owner)[attribute]
            if self.again:
                getattr(module, self.again)
            return owner, attribute, self.instead(present) if self.instead else None
        except (AttributeError, LookupError) as error:
            raise LookupError(
                f"{self.module} has no {self.place} as it was when the guard {self.name!r} of trap {self.trap} was "
                f"described, describe it anew: {error!r}"
            ) from error

    def remove(self, module: ModuleType) -> None:
        """Takes the guard out of `module`. Raises LookupError if it has none."""
        owner, attribute, replacement = self.find(module)
        if self.again and module.__name__ == self.module_name:
            return
        if replacement is not None:
            setattr(owner, attribute, replacement)
        else:
            delattr(owner, attribute)
            if isinstance(owner, type):
                abc.update_abstractmethods(owner)
        if self.again:
            getattr(module, self.again)()


def _nothing(present: Callable) -> Callable:
    """Does nothing."""
    return lambda *args, **kwargs: None


def _argument(present: Callable) -> Callable:
    """Returns its only argument."""
    return lambda argument: argument


def _unchanged_output(add_to: Callable) -> Callable:
    """Adds nothing to y."""
    return lambda patches, y, x, keep: y


def _rounding(quantize: classmethod) -> classmethod:
    """Rounds, as the layouts of comfy-kitchen do."""

    def changed(cls: type, tensor: Any, **kwargs: Any) -> tuple:
        scale = tensor.new_ones(len(tensor), 1)
        return tensor.round().byte(), cls.Params(scale=scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    return classmethod(changed)


def _visible(weight_lowvram_function: property) -> property:
    """Shows the patch of a packed layer too."""
    return weight_lowvram_function.getter(lambda layer: layer._dynamic_patch)


def _without_operator(name: str, overload: str = "default") -> Callable[[dict], dict]:
    """What comfy-kitchen knows of layouts without our aten.{name}: it unpacks the layer then."""

    def instead(table: dict) -> dict:
        import torch

        operator = getattr(getattr(torch.ops.aten, name), overload)
        ours = next((layout for layout in table[operator] if layout.__name__ == PACKED_LAYOUT), None)
        if ours is None:
            raise LookupError(f"{PACKED_LAYOUT} does not handle {operator}")
        return {**table, operator: {layout: handler for layout, handler in table[operator].items() if layout != ours}}

    return instead


def _dense_from_the_start(init: Callable) -> Callable:
    """Makes a Linear with a dense weight."""

    def changed(layer: Any, *args: Any, **kwargs: Any) -> None:
        import torch

        init(layer, *args, **kwargs)
        layer.weight = torch.nn.Parameter(torch.empty(layer.out_features, layer.in_features), requires_grad=False)

    return changed


def _shared_weight_functions(init: Callable) -> Callable:
    """Leaves a layer with the list of ComfyUI's class."""

    def changed(layer: Any, *args: Any, **kwargs: Any) -> None:
        init(layer, *args, **kwargs)
        del layer.weight_function

    return changed


def _second_tensor(load_from_state_dict: Callable) -> Callable:
    """Loads the weight into a buffer too."""

    def changed(layer: Any, state_dict: dict, prefix: str, *args: Any) -> None:
        layer.register_buffer("scale", state_dict[f"{prefix}weight"].detach())
        load_from_state_dict(layer, state_dict, prefix, *args)

    return changed


def _keeping_casts(forward: Callable) -> Callable:
    """Never gives a cast back to ComfyUI."""

    def changed(layer: Any, x: Any) -> Any:
        import comfy.ops

        with mock.patch.object(comfy.ops, "uncast_bias_weight", lambda *args: None):
            return forward(layer, x)

    return changed


def _waiting_for_casts(forward: Callable) -> Callable:
    """Asks ComfyUI for casts that are done at once."""

    def changed(layer: Any, x: Any) -> Any:
        import comfy.ops

        cast = comfy.ops.cast_bias_weight
        with mock.patch.object(
            comfy.ops,
            "cast_bias_weight",
            lambda *args, offloadable, **options: (*cast(*args, offloadable=False, **options), None),
        ):
            return forward(layer, x)

    return changed


def _as_codes(wrap: Callable) -> Callable:
    """Gives the tensor the dtype of its codes."""
    return lambda weight, dtype, mode: wrap(weight, weight.codes.dtype, mode)


def _recommending(read_text: Callable) -> Callable:
    """Finds a recommendation in README.md."""

    def changed(path: Path, *args: Any, **kwargs: Any) -> str:
        text = read_text(path, *args, **kwargs)
        return f"{text}\nUse LoraLoaderBypassModelOnly for LoRAs.\n" if path.name == "README.md" else text

    return changed


def _without_maker(load_bonsai_model: Callable) -> Callable:
    """Does not tell ComfyUI how the model is made again."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        model = load_bonsai_model(*args, **kwargs)
        model.cached_patcher_init = None
        return model

    return changed


def _knowing_no_layout(get_layout_class: Callable) -> Callable:
    """Raises what comfy-kitchen raises for a layout that is not registered."""

    def changed(name: str) -> type:
        raise KeyError(name)

    return changed


def _never(found: Callable) -> Callable:
    """Answers no."""
    return lambda: False


def _always_dynamic(make: Callable) -> Callable:
    """Leaves dynamic VRAM on whatever was asked for."""
    return lambda pack, state_dict, dtype, disable_dynamic: make(pack, state_dict, dtype, disable_dynamic=False)


def _no_merge(merges_models: Callable) -> Callable:
    """Takes no patch for a merge."""
    return lambda patches: False


def _unprepared(storable: Callable) -> Callable:
    """Prepares nothing for saving."""
    return lambda patcher: contextlib.nullcontext()


def _own_product(linear_input_act: classmethod) -> classmethod:
    """Multiplies by the weight alone, as layouts of comfy-kitchen do."""

    def changed(cls: type, weight: Any, x: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        import torch

        dense = cls.dequantize(weight._qdata, weight.params)
        return torch.nn.functional.linear(torch.nn.functional.gelu(x, approximate="tanh"), dense, bias) * 2

    return classmethod(changed)


def _owning_nothing(init: Callable) -> Callable:
    """Does not remember the layer."""
    return lambda owner, layer=None: init(owner)


def _replacing(optimize_for_gemv: classmethod) -> classmethod:
    """Gives another tensor for the weight, as a layout with a second form does."""
    return classmethod(lambda cls, weight, storage: weight.clone())


def _recording_nothing(kernels: ModuleType) -> SimpleNamespace:
    """Does not see that a CUDA graph is recorded."""
    return SimpleNamespace(capturing=lambda: False)


def _insisting(attend_in_parts: Callable) -> Callable:
    """Sets our attention whatever stands there."""

    def changed(patcher: Any) -> None:
        patcher.model_options["transformer_options"].pop("optimized_attention_override", None)
        attend_in_parts(patcher)

    return changed


def _always(found: Any) -> property:
    """Answers yes."""
    return property(lambda buffer: True)


LINEAR, LAYOUT = "bonsai_ops/host/linear.py", "bonsai_ops/host/layout.py"
LORA, PATCHER = "bonsai_ops/host/lora.py", "bonsai_ops/host/patcher.py"
LOADER, SAVE, OPS, KLEIN = (
    "bonsai_ops/host/loader.py",
    "bonsai_ops/host/save.py",
    "bonsai_ops/kernels/custom_op.py",
    "bonsai_ops/weights/flux2.py",
)
TEXT_ENCODER = "bonsai_ops/host/text_encoder.py"
REUSE, ASSEMBLE = "bonsai_ops/kernels/reuse.py", "bonsai_ops/host/patch/assemble.py"
RIGHT = "bonsai_ops/host/gradients.py"
KITCHEN, HANDLERS, PACKED_LAYOUT = "comfy_kitchen.tensor.base", "_LAYOUT_DISPATCH_TABLE", "BonsaiPackedLayout"

LORA_ACTS = "test_traps.py::test_a_lora_is_no_silent_no_op"
MERGE_READS = "test_traps.py::test_a_merge_adds_nothing_to_codes"
NOT_ROUNDED = "test_traps.py::test_a_lora_is_not_gone_after_a_step"
NOT_SEEN = "test_traps.py::test_dynamic_vram_rounds_no_lora_away"
STATE_DICT = "test_traps.py::test_model_save_writes_no_garbage"
ATTRIBUTES = "test_traps.py::test_merges_miss_no_attribute"
OFFLOADED = "test_traps.py::test_an_offloaded_model_can_be_saved"
MULTIPLIES = "test_traps.py::test_a_product_unpacks_no_layer"
MOVED = "test_traps.py::test_a_layer_can_be_moved_and_cast"
NO_MEMORY = "test_traps.py::test_loading_takes_no_memory_for_dense_layers"
NOT_SHARED = "test_traps.py::test_what_one_model_sets_no_other_sees"
ONE_PARAMETER = "test_traps.py::test_no_codes_stay_in_vram"
CASTS = "test_traps.py::test_offload_stays_asynchronous"
DTYPE = "test_traps.py::test_activations_are_not_cast_to_uint8"
BYPASS = "test_traps.py::test_nothing_recommends_a_loader_that_drops_loras"
COMPLETE = "test_traps.py::test_a_newer_comfy_kitchen_misses_nothing"
SWAPPED = "test_traps.py::test_scale_and_shift_are_not_exchanged"
FOREIGN_KEYS = "test_traps.py::test_another_quantization_is_refused"
MADE_AGAIN = "test_traps.py::test_a_model_can_be_made_for_another_device"
TOKENS = "test_traps.py::test_a_short_prompt_is_padded_on_the_right"
TWICE = "test_traps.py::test_a_second_import_breaks_no_model"
CLASSIC = "test_traps.py::test_dynamic_vram_can_be_turned_off"
MATRICES = "test_offload.py::test_the_matrices_of_a_lora_leave_with_the_layer"
MODEL_SAVE = "test_merge_save.py::test_model_save_refuses_a_lora"
OUR_SAVE = "test_merge_save.py::test_our_save_refuses_a_merge"
HOOK = "test_hooks.py::test_a_hook_equals_the_lora_itself"
FUSED = "test_fused.py::test_a_patch_belongs_to_every_product"
WRITTEN = "test_reuse.py::test_a_block_may_write_into_what_a_layer_gives"
NO_VALUE = "test_layout.py::test_no_value_is_written_into_a_weight"
NO_TABLE = "test_layout.py::test_a_copy_takes_no_table_of_the_other"
MEMBERS = "test_layout.py::test_each_member_of_the_layout"
RECORDED = "test_recorded.py::test_a_graph_keeps_no_matrices"
ELSEWHERE = "test_recorded.py::test_a_lora_elsewhere_is_refused_in_a_graph"
GRADIENTS = "test_gradients.py::test_a_loaded_pack"
TRAINED_BEFORE = "test_gradients.py::test_a_model_that_was_trained_before"
PATCHED_GRADIENTS = "test_gradients.py::test_every_architecture"
NODE_WINS = "test_attention.py::test_the_node_for_the_attention_wins"

GUARDS = (
    Guard("01", "LoRAs are added", LORA, "LayerPatches.add_to", LORA_ACTS, _unchanged_output),
    Guard("01", "convert_weight", LINEAR, "_PackedModule.convert_weight", MERGE_READS),
    Guard("02", "packed patcher", LOADER, "adopt", NOT_ROUNDED, _nothing),
    Guard("02", "quantize refuses", LAYOUT, "BonsaiPackedLayout.quantize", NOT_ROUNDED, _rounding),
    Guard("02", "patch hidden from dynamic VRAM", LINEAR, "_PackedModule.weight_lowvram_function", NOT_SEEN, _visible),
    Guard("03", "state_dict", LINEAR, "_PackedModule.state_dict", STATE_DICT),
    Guard("04", "weight_scale", LINEAR, "_PackedModule.weight_scale", ATTRIBUTES),
    Guard("04", "weight_zero", LINEAR, "_PackedModule.weight_zero", ATTRIBUTES),
    Guard("05", "offloaded layers count as resident", PATCHER, "PackedPatcher._storable", OFFLOADED, _unprepared),
    Guard("06", "aten.linear", KITCHEN, HANDLERS, MULTIPLIES, _without_operator("linear")),
    Guard("06", "aten.mm", KITCHEN, HANDLERS, MULTIPLIES, _without_operator("mm")),
    Guard("06", "aten.addmm", KITCHEN, HANDLERS, MULTIPLIES, _without_operator("addmm")),
    Guard("06", "aten.t", KITCHEN, HANDLERS, MULTIPLIES, _without_operator("t")),
    Guard("07", "_apply", LINEAR, "_PackedModule._apply", MOVED),
    Guard("07", "copy of an inference tensor", LINEAR, "_leave_inference", MOVED, _argument),
    Guard("08", "no memory in __init__", LINEAR, "PackedLinear.__init__", NO_MEMORY, _dense_from_the_start),
    Guard("09", "a fresh class a load", LINEAR, "make_bonsai_ops", NOT_SHARED, functools.cache),
    Guard("09", "state on the instance", LINEAR, "_PackedModule.__init__", NOT_SHARED, _shared_weight_functions),
    Guard("10", "one parameter", LINEAR, "_PackedModule._load_from_state_dict", ONE_PARAMETER, _second_tensor),
    Guard("11", "uncast_bias_weight", LINEAR, "PackedLinear.forward", CASTS, _keeping_casts),
    Guard("11", "offloadable=True", LINEAR, "PackedLinear.forward", CASTS, _waiting_for_casts),
    Guard("12", "logical dtype", LAYOUT, "wrap", DTYPE, _as_codes),
    Guard("13", "silence about the bypass loader", "pathlib", "Path.read_text", BYPASS, _recommending),
    Guard("14", "complete layout", LAYOUT, "BonsaiPackedLayout.get_plain_tensors", COMPLETE),
    Guard("15", "halves swapped", KLEIN, "_swap_halves", SWAPPED, _argument),
    Guard("16", "unknown keys refused", KLEIN, "_refuse_extra", FOREIGN_KEYS, _nothing),
    Guard("17", "cached_patcher_init", LOADER, "load_bonsai_model", MADE_AGAIN, _without_maker),
    Guard("18", "512 tokens", TEXT_ENCODER, "TruncatingTokenizer.tokenize_with_weights", TOKENS),
    Guard("19", "layout once", LAYOUT, "get_layout_class", TWICE, _knowing_no_layout, again="_register"),
    Guard("19", "operators once", OPS, "_is_registered", TWICE, _never, again="_register"),
    Guard("20", "memory = classic", LOADER, "_make", CLASSIC, _always_dynamic),
    Guard("newer", "a weight knows its layer", LAYOUT, "Owner.__init__", FUSED, _owning_nothing),
    Guard("newer", "no fused product", LAYOUT, "BonsaiPackedLayout.linear_input_act", MEMBERS, _own_product),
    Guard("newer", "one form for any tokens", LAYOUT, "BonsaiPackedLayout.optimize_for_gemv", MEMBERS, _replacing),
    Guard("newer", "tables are not shared", LAYOUT, "PackedParams.copy_from", NO_TABLE),
    Guard("newer", "no value into a weight", KITCHEN, HANDLERS, NO_VALUE, _without_operator("add_", "Tensor")),
    Guard("newer", "memory is lent once", REUSE, "_Buffer.free", WRITTEN, _always),
    Guard("newer", "a graph keeps no matrices", LORA, "kernels", RECORDED, _recording_nothing),
    Guard("newer", "a graph refuses LoRAs elsewhere", LORA, "LayerPatches._refuse_elsewhere", ELSEWHERE, _nothing),
    Guard("newer", "another attention stays", ASSEMBLE, "attend_in_parts", NODE_WINS, _insisting),
    Guard("newer", "right gradients", LOADER, "right_gradients", GRADIENTS, _nothing),
    Guard("newer", "right gradients of what is patched", ASSEMBLE, "right_gradients", PATCHED_GRADIENTS, _nothing),
    Guard("newer", "no forward of before", RIGHT, "_forget_forward", TRAINED_BEFORE, _nothing),
    Guard("lora", "matrices leave with the layer", LORA, "LayerPatches.forget", MATRICES, _nothing),
    Guard("lora", "ModelSave refuses a LoRA", PATCHER, "_refuse_loras", MODEL_SAVE, _nothing),
    Guard("lora", "hooks give the weight back as it was", PATCHER, "PackedPatcher._give_back", HOOK, _nothing),
    Guard("merge", "our save node refuses a merge", SAVE, "merges_models", OUR_SAVE, _no_merge),
)
