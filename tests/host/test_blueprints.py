"""The subgraph blueprints: one node each in the page's list of nodes, listed by every ComfyUI, and run as its content.

tests/browser inserts them as a user does; here their content is queued, for only two of them do with the seedling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_files
from PIL import Image

from bonsai_ops.tools.environment import NEWEST, PLUGIN_NAME
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import to_api

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[2]
BLUEPRINTS = sorted((REPOSITORY / "subgraphs").glob("*.json"))
INWARDS, OUTWARDS = -10, -20
"""Ids that stand for the inputs and the outputs of a subgraph among the ends of its links."""
SMALL = {"width": 128, "height": 128, "megapixels": 0.02}
PROMOTED = {"text", "seed"}
"""What every one of them asks for, beside its files."""

each_blueprint = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the node that the page inserts, the subgraph that it stands for)."""
    workflow = read(path)
    (node,), (subgraph,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    return node, subgraph


def unfolded(path: Path) -> dict[str, Any]:
    """A blueprint as a workflow without subgraphs, between Load Image, where it takes one, and Save Image."""
    _, subgraph = parts(path)
    graph = {"nodes": list(subgraph["nodes"]), "links": [], "last_node_id": subgraph["state"]["lastNodeId"]}
    nodes = {node["id"]: node for node in graph["nodes"]}
    load, save = graph["last_node_id"] + 1, graph["last_node_id"] + 2
    graph["last_node_id"] = save
    for link in subgraph["links"]:
        source, target = (link["origin_id"], link["origin_slot"]), (link["target_id"], link["target_slot"])
        if source[0] == INWARDS:
            if subgraph["inputs"][source[1]]["name"] != "image":
                nodes[target[0]]["inputs"][target[1]]["link"] = None  # a widget, whose value the node has as well
                continue
            source = (load, 0)
        if target[0] == OUTWARDS:
            target = (save, 0)
        graph["links"].append([link["id"], *source, *target, link["type"]])
    (shown,) = (link[0] for link in graph["links"] if link[3] == save)
    images = {"name": "images", "type": "IMAGE", "link": shown}
    ends = [(save, "SaveImage", [images], ["blueprint"])]
    if any(link[1] == load for link in graph["links"]):
        ends.append((load, "LoadImage", [], [tiny_files.PICTURE, "image"]))
    for number, kind, inputs, values in ends:
        graph["nodes"].append(
            {"id": number, "type": kind, "inputs": inputs, "outputs": [], "properties": {}, "widgets_values": values}
        )
    return graph


@pytest.fixture(scope="module")
def server(comfy_server: Callable[..., ComfyServer]) -> Iterator[ComfyServer]:
    started = comfy_server(NEWEST)
    with tiny_files.written(started.base_directory):
        yield started


def test_text_edit_and_lora_are_there() -> None:
    """Each under a name of its own, for the page keeps one of a name, ComfyUI's included."""
    names = {path.stem for path in BLUEPRINTS}
    assert {"Text to Image (Bonsai)", "Image Edit (Bonsai)", "Text to Image with LoRA (Bonsai)"} <= names
    assert all("Bonsai" in name for name in names)
    used = {node["type"] for path in BLUEPRINTS for node in parts(path)[1]["nodes"]}
    assert {"LoadBonsaiPack", "LoadBonsaiModel", "LoadBonsaiTextEncoder", "BonsaiSampler"} <= used
    ids = [found["id"] for path in BLUEPRINTS for found in (read(path), parts(path)[1])]
    assert len(set(ids)) == len(ids)


def test_every_comfyui_lists_and_serves_them(every_comfy_server: ComfyServer) -> None:
    listed, known = every_comfy_server.get("/global_subgraphs"), every_comfy_server.object_info()
    for path in BLUEPRINTS:
        (key,) = (key for key, entry in listed.items() if entry["name"] == path.stem)
        assert listed[key]["source"] == "custom_node"
        assert listed[key]["info"] == {"node_pack": f"custom_nodes.{PLUGIN_NAME}"}
        assert json.loads(every_comfy_server.get(f"/global_subgraphs/{key}")["data"]) == read(path)
        assert [node["type"] for node in parts(path)[1]["nodes"] if node["type"] not in known] == []


@each_blueprint
def test_the_node_shows_what_its_content_takes(path: Path) -> None:
    """Its inputs are those of the subgraph, in order; its values are what the nodes within have."""
    node, subgraph = parts(path)
    assert node["type"] == subgraph["id"]
    assert node["title"] == subgraph["name"] == path.stem
    assert subgraph["category"] == "Bonsai" and subgraph["description"]
    taken = [(entry["name"], entry["type"]) for entry in subgraph["inputs"]]
    assert [(entry["name"], entry["type"]) for entry in node["inputs"]] == taken
    assert [(e["name"], e["type"]) for e in node["outputs"]] == [("IMAGE", "IMAGE")]
    widgets = [entry["name"] for entry in node["inputs"] if "widget" in entry]
    assert set(widgets) >= PROMOTED
    assert {name for name, _ in taken} - set(widgets) <= {"image"}
    inner = {found["id"]: found for found in subgraph["nodes"]}
    ends = {link["id"]: link for link in subgraph["links"]}
    for name, value in zip(widgets, node["widgets_values"], strict=True):
        (number,) = next(entry["linkIds"] for entry in subgraph["inputs"] if entry["name"] == name)
        link = ends[number]
        assert inner[link["target_id"]]["inputs"][link["target_slot"]]["name"] == name
        assert value in inner[link["target_id"]]["widgets_values"]


@each_blueprint
def test_links_are_consistent(path: Path) -> None:
    _, subgraph = parts(path)
    inner = {found["id"]: found for found in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    assert len(links) == len(subgraph["links"]) and max(links) == subgraph["state"]["lastLinkId"]
    assert max(inner) == subgraph["state"]["lastNodeId"]
    for number, link in links.items():
        source, target = link["origin_id"], link["target_id"]
        start = subgraph["inputs"] if source == INWARDS else inner[source]["outputs"]
        end = subgraph["outputs"] if target == OUTWARDS else inner[target]["inputs"]
        given, wanted = start[link["origin_slot"]], end[link["target_slot"]]
        assert given["type"] == wanted["type"] == link["type"]
        assert number in (given["linkIds"] if source == INWARDS else given["links"])
        assert number in wanted["linkIds"] if target == OUTWARDS else number == wanted["link"]
    for found in subgraph["nodes"]:
        assert all(entry.get("link") in (None, *links) for entry in found["inputs"])
        assert all(set(entry.get("links") or ()) <= set(links) for entry in found["outputs"])


def test_their_content_draws(server: ComfyServer) -> None:
    """All queued at once, in small."""
    known, queued = server.object_info(), {}
    for path in BLUEPRINTS:
        graph = to_api(tiny_files.instead_of_published(unfolded(path)), known)
        for node in graph.values():
            inputs = node["inputs"]  # a list is a link
            inputs |= {name: SMALL[name] for name in SMALL.keys() & inputs.keys() if not isinstance(inputs[name], list)}
        queued[path.stem] = server.queue(graph)
    for name, prompt in queued.items():
        (picture,) = server.images(server.wait(prompt))
        with Image.open(picture) as drawn:
            assert len(drawn.convert("RGB").getcolors(1 << 24)) > 1000, f"the picture of {name} is flat"
