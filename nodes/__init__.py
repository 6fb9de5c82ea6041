"""The nodes, one a file: schema and a call into bonsai_ops, nothing that computes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..bonsai_ops.host import folders
from .calibrate import CalibrateBitLinear
from .load_model import LoadBonsaiModel
from .load_pack import LoadBonsaiPack
from .load_text_encoder import LoadBonsaiTextEncoder
from .measure import MeasureBitLinear
from .model_info import BonsaiModelInfo
from .patch_linear import PatchToBitLinear
from .recover import RecoverBitLinear
from .right_gradients import BonsaiRightGradients
from .sampler import BonsaiSampler
from .save_model import SaveBonsaiModel

NODES = [
    LoadBonsaiPack,
    LoadBonsaiModel,
    LoadBonsaiTextEncoder,
    BonsaiSampler,
    SaveBonsaiModel,
    BonsaiModelInfo,
    PatchToBitLinear,
    CalibrateBitLinear,
    MeasureBitLinear,
    RecoverBitLinear,
    BonsaiRightGradients,
]


class BonsaiExtension(ComfyExtension):
    """Hands the node classes to ComfyUI."""

    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
