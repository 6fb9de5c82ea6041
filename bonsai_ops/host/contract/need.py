"""What a row of the contract says, and the longer names of ComfyUI in several rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """One file (or folder) of ours and one module, class or function of ComfyUI that it needs.

    Lists have spaces in between. members: what it uses of a module or class, or overrides of a class. words: attributes
    of instances, keys and keyword arguments that the source of `name` spells; only the tests look them up. takes:
    parameters that are given by name, to each member if there are some. costs: what is lost without it, "" if nothing
    is; None: it is required. since: the ComfyUI that brought it.
    """

    user: str
    name: str
    why: str
    members: str = ""
    words: str = ""
    takes: str = ""
    costs: str | None = None
    since: str = ""

    @property
    def names(self) -> list[str]:
        """The dotted names that must exist."""
        return [f"{self.name}.{member}" for member in self.members.split()] or [self.name]


IO, PATCHER = "comfy_api.latest.io", "comfy.model_patcher.ModelPatcher"
BASE_MODEL, CONFIGURATION = "comfy.model_base.BaseModel", "comfy.supported_models_base.BASE"
TENSOR, PARAMS = "comfy_kitchen.tensor.QuantizedTensor", "comfy_kitchen.tensor.base.BaseLayoutParams"
KLEIN = "comfy.text_encoders.flux"
BYPASS, BYPASS_WORDS = "comfy.weight_adapter.BypassInjectionManager", "hooks module adapter multiplier"
MISFIT = "to tell what belongs to another model"
KEPT_STATES = "to encode a prompt once"
SAVED = "to say what a saved text encoder is"
NO_ENCODER = "no pack's text encoder is loaded; CLIPLoader with qwen_3_4b.safetensors and type flux2 serves as well"
SLOW_LORAS = "LoRAs on packed layers are exact but slow: each call unpacks the layer"
SLOW_TRAINING = (
    "Train LoRA unpacks packed layers in weight mode: right, but slower and with more memory than bypass_mode"
)
