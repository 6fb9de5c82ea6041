"""A state dict whose packed weights are dense for whoever reads them, without all of them being unpacked at once."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import Any

import torch


class DenseOnRead(dict):
    """{name: tensor}. makers: {name: function that makes the tensor}, called whenever that name is read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], makers: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        super().__init__(tensors)
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> torch.Tensor:
        kept = super().__getitem__(name)
        return self._makers[name]() if name in self._makers else kept

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._makers.pop(name, None)
        super().__setitem__(name, tensor)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # a class with its own is copied by dict() item by item

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> ItemsView[str, torch.Tensor]:
        return ItemsView(self)

    def values(self) -> ValuesView[torch.Tensor]:
        return ValuesView(self)
