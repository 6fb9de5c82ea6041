"""ComfyUI's own Train LoRA node in this process, on a packed model and on its dense twin."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from twins import LATENT, Pair, load_stock, read_dense, text


def put_right(model: Any) -> Any:
    """The model behind our node for right gradients."""
    from bonsai_ops.host.gradients import with_right_gradients

    return with_right_gradients(model)


def right_twin(pair: Pair) -> Any:
    """The dense twin behind our node; the newest ComfyUI trains a copy of a model, made by its loader."""
    pair.dense.cached_patcher_init = (lambda disable_dynamic=False: load_stock(read_dense(pair.path)), ())
    return put_right(pair.dense)


@dataclass(frozen=True)
class Trained:
    """What Train LoRA makes: {name in the file: tensor}, the loss of each step, steps with those of an earlier LoRA."""

    lora: dict[str, torch.Tensor]
    losses: Sequence[float]
    steps: int


def point(height: int = LATENT[2], width: int = LATENT[3], seed: int = 1, batch: int = 1) -> dict[str, torch.Tensor]:
    """A LATENT to train on."""
    return {"samples": torch.randn((batch, LATENT[1], height, width), generator=torch.Generator().manual_seed(seed))}


def train_lora(model: Any, latents: Sequence[dict] = (), positive: Sequence[list] = (), **options: Any) -> Trained:
    """A LoRA of rank 2, by one step on one point if the options do not say otherwise, in fp32 with SGD."""
    settings = {
        "model": model,
        "batch_size": 1,
        "steps": 1,
        "grad_accumulation_steps": 1,
        "learning_rate": 0.1,
        "rank": 2,
        "optimizer": "SGD",
        "loss_function": "MSE",
        "seed": 3,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": True,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": True,
        **options,
    }
    train = importlib.import_module("comfy_extras.nodes_train")
    known = inspect.signature(train.TrainLoraNode.execute).parameters
    inputs = {name: [value] for name, value in settings.items() if name in known}
    torch.manual_seed(0)
    with torch.inference_mode():
        points, texts = list(latents) or [point()], list(positive) or [text()]
        lora, losses, steps = train.TrainLoraNode.execute(**inputs, latents=points, positive=texts).result
    return Trained(lora, losses["loss"], steps)


def learned(lora: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The changes from `start`, of all tensors in a row, in the order of `start`."""
    assert lora.keys() == start.keys()
    return torch.cat([(lora[name].double() - tensor.double()).flatten() for name, tensor in start.items()])


class DenseWeights(TorchDispatchMode):
    """How many tensors of floats of these shapes, or turned, any operation makes, in the backward pass too."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.count = shapes | {shape[::-1] for shape in shapes}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if type(tensor) is torch.Tensor and tensor.is_floating_point() and tuple(tensor.shape) in self.shapes:
                self.count += 1
        return made
