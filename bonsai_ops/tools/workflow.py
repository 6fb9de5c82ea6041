"""A saved workflow (the frontend's JSON) -> the API form that ComfyUI's /prompt takes. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDGET_TYPES = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")
NOTES = ("MarkdownNote", "Note")
SEEDS = ("seed", "noise_seed")
"""Widgets behind which the page puts a control value whatever the schema says."""
MUTED, BYPASSED = 2, 4


def to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict]:
    """{node id: {"class_type", "inputs"}} of a workflow without subgraphs.

    object_info: the server's answer of that name; it tells which inputs are widgets and in which order their values
    are saved. Raises ValueError for a node the server does not have, a muted or bypassed node, or values that do not
    match the widgets.
    """
    origins = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    graph: dict[str, dict] = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NOTES:
            continue
        if kind not in object_info:
            raise ValueError(f"node {node['id']} is a {kind}, which the server does not have")
        if node.get("mode", 0) in (MUTED, BYPASSED):
            raise ValueError(f"node {node['id']} ({kind}) is muted or bypassed")
        inputs = _widget_values(node, object_info[kind]["input"])
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = list(origins[slot["link"]])
        graph[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return graph


def find_nodes(graph: Mapping[str, Mapping], kind: str) -> list[str]:
    """Ids of the nodes of class `kind` in an API graph."""
    return [number for number, node in graph.items() if node["class_type"] == kind]


def _widget_values(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """{input: saved value} in the order of the schema; a seed's control value stands behind it and is dropped."""
    saved = list(node.get("widgets_values") or [])
    values: dict[str, Any] = {}
    for name, (kind, *options) in {**schema.get("required", {}), **schema.get("optional", {})}.items():
        settings = options[0] if options else {}
        if not (isinstance(kind, list) or kind in WIDGET_TYPES) or settings.get("forceInput"):
            continue
        if not saved and name in schema.get("optional", {}) and "default" in settings:
            continue  # saved before the node had this input
        if not saved:
            raise ValueError(f"node {node['id']} ({node['type']}) has no value for {name}")
        values[name] = saved.pop(0)
        controlled = settings.get("control_after_generate") or (kind == "INT" and name in SEEDS)
        if controlled or settings.get("image_upload"):
            del saved[:1]
    if saved:
        raise ValueError(f"node {node['id']} ({node['type']}) has values for no widget: {saved}")
    return values
