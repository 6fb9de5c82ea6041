"""Saved workflows in API form: widgets in order, and files that were saved before a node had all its inputs."""

from __future__ import annotations

import pytest

from bonsai_ops.tools.workflow import to_api

INFO = {
    "Load": {
        "input": {
            "required": {"name": [["a", "b"]], "seed": ["INT", {"default": 0, "control_after_generate": True}]},
            "optional": {"mode": ["COMBO", {"options": ["exact", "a8"], "default": "exact"}], "mask": ["MASK", {}]},
        }
    }
}


def graph(*values: object) -> dict:
    return {"nodes": [{"id": 3, "type": "Load", "widgets_values": list(values), "inputs": []}], "links": []}


@pytest.mark.parametrize(
    ("values", "inputs"),
    [
        (("b", 7, "fixed", "a8"), {"name": "b", "seed": 7, "mode": "a8"}),
        (("b", 7, "fixed"), {"name": "b", "seed": 7}),
    ],
    ids=["all", "before the optional input"],
)
def test_values_belong_to_widgets_in_order(values: tuple, inputs: dict) -> None:
    """What is missing at the end keeps its default if it is optional."""
    assert to_api(graph(*values), INFO) == {"3": {"class_type": "Load", "inputs": inputs}}


def test_a_seed_has_a_control_value_behind_it_whatever_its_schema_says() -> None:
    """As ComfyUI's Train LoRA, whose seed asks for none."""
    info = {"Load": {"input": {"required": {"seed": ["INT", {"default": 0}], "noise_seed": ["INT"], "last": ["INT"]}}}}
    found = to_api(graph(7, "fixed", 8, "randomize", 9), info)
    assert found["3"]["inputs"] == {"seed": 7, "noise_seed": 8, "last": 9}


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"node 3 \(Load\) has no value for seed"):
        to_api(graph("b"), INFO)
    with pytest.raises(ValueError, match=r"node 3 \(Load\) has values for no widget: \['more'\]"):
        to_api(graph("b", 7, "fixed", "a8", "more"), INFO)
