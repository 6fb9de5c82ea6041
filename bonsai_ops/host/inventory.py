"""What a loaded model holds: packed and dense tensors, the backend that multiplies them, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import kernels
from .layout import is_packed, mode_of, unwrap
from .tensors import tensors_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ATTACHMENT = "bonsai"


@dataclass(frozen=True)
class Origin:
    """Where the weights of a model came from. path: of the file or folder, empty for a model patched in memory.

    source: the file's own record of what it was made from. architecture: flux2, or the ComfyUI class of a model of any
    kind that was patched; configuration is that class's (model_class.describe_configuration), empty for flux2.
    """

    path: str
    format: str
    source: Mapping[str, str]
    architecture: str = "flux2"
    configuration: Mapping[str, Any] = field(default_factory=dict)
    release: str = ""
    """Which published file it is, as weights/releases.py tells it; empty for a model patched in memory."""


@dataclass(frozen=True)
class Inventory:
    """A model as it stands: plain values, sizes in bytes, weights as a number of values."""

    schemes: tuple[str, ...]
    codecs: tuple[str, ...]
    packed_layers: int
    packed_weights: int
    packed_bytes: int
    dense_tensors: int
    dense_weights: int
    dense_bytes: int
    device: str
    dtype: str
    backend: str
    mode: str
    """The mode in use, which is exact if the one that was asked for is declined."""
    declined: Mapping[str, str]
    """{backend, mode or dtype that would be faster: why it is not used}."""
    origin: Origin | None = None
    timed: Mapping[str, str] = field(default_factory=dict)
    """{class of products: which of two backends was faster}, of those that were timed here."""

    @property
    def scheme(self) -> str:
        """The scheme of all packed layers, "mixed" if they differ."""
        return self.schemes[0] if len(self.schemes) == 1 else "mixed"

    @property
    def weights(self) -> int:
        return self.packed_weights + self.dense_weights

    @property
    def resident_bytes(self) -> int:
        return self.packed_bytes + self.dense_bytes

    @property
    def not_faster(self) -> str:
        """Why nothing faster is used, for the end of a line; empty if nothing is declined."""
        return "".join(f" (not {name}: {reason})" for name, reason in self.declined.items())


def take_inventory(patcher: ModelPatcher, origin: Origin | None = None) -> Inventory:
    """The inventory of a model as it stands. origin: by default that of the inventory attached to it, if there is one.

    Raises ValueError if no layer of it is packed.
    """
    tensors = tensors_of(patcher.model.diffusion_model).values()
    wrapped, dense = [t for t in tensors if is_packed(t)], [t for t in tensors if not is_packed(t)]
    if not wrapped:
        raise ValueError('this model has no packed layer: connect a model from "Load Bonsai Model"')
    packed = [unwrap(tensor) for tensor in wrapped]
    dtype = patcher.model.get_dtype_inference()
    choice = kernels.resolve(kernels.call_of(patcher.load_device, dtype, packed[0], mode_of(wrapped[0])))
    if origin is None and (attached := attached_inventory(patcher)) is not None:
        origin = attached.origin
    return Inventory(
        schemes=tuple(sorted({w.scheme for w in packed})),
        codecs=tuple(sorted({w.codec for w in packed})),
        packed_layers=len(packed),
        packed_weights=sum(w.shape[0] * w.shape[1] for w in packed),
        packed_bytes=sum(w.nbytes for w in packed),
        dense_tensors=len(dense),
        dense_weights=sum(t.numel() for t in dense),
        dense_bytes=sum(t.nbytes for t in dense),
        device=str(patcher.load_device),
        dtype=str(dtype).removeprefix("torch."),
        backend=choice.backend.NAME,
        mode=choice.mode,
        declined=choice.declined,
        origin=origin,
        timed=kernels.timed_choices(patcher.load_device, dtype, {w.shape for w in packed}),
    )


def attach_inventory(patcher: ModelPatcher, origin: Origin) -> Inventory:
    """Takes the inventory of a new model and keeps it on it, for its clones too. Raises ValueError as above."""
    taken = take_inventory(patcher, origin)
    patcher.set_attachments(ATTACHMENT, taken)
    return taken


def attached_inventory(patcher: ModelPatcher) -> Inventory | None:
    """The inventory that a model of ours carries since it was made, None for any other model."""
    return patcher.get_attachment(ATTACHMENT)
