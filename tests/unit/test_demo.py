"""The graph of the demo: one workflow for several prompts, joined to one picture."""

from __future__ import annotations

import pytest

from bonsai_ops.demo import PROMPTS, several
from bonsai_ops.tools.workflow import find_nodes

GRAPH = {
    "1": {"class_type": "LoadBonsaiPack", "inputs": {"pack_name": "seedling"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "as saved", "clip": ["1", 1]}},
    "3": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}},
    "4": {
        "class_type": "BonsaiSampler",
        "inputs": {"seed": 7, "model": ["1", 0], "positive": ["2", 0], "latent": ["3", 0]},
    },
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["5", 0]}},
}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_prompt_has_its_own_nodes(count: int) -> None:
    graph = several(GRAPH, PROMPTS[:count], seed=3)
    texts = [graph[number]["inputs"]["text"] for number in find_nodes(graph, "CLIPTextEncode")]
    assert sorted(texts) == sorted(PROMPTS[:count])
    assert len(find_nodes(graph, "LoadBonsaiPack")) == len(find_nodes(graph, "SaveImage")) == 1
    assert len(find_nodes(graph, "ImageStitch")) == count - 1
    for number in find_nodes(graph, "BonsaiSampler"):
        assert graph[number]["inputs"]["seed"] == 3 and graph[number]["inputs"]["latent"] == ["3", 0]
    assert GRAPH["2"]["inputs"]["text"] == "as saved" and GRAPH["6"]["inputs"]["images"] == ["5", 0]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_picture_is_saved_once(count: int) -> None:
    graph = several(GRAPH, PROMPTS[:count])
    seen: list[str] = []
    waiting = [graph["6"]["inputs"]["images"][0]]
    while waiting:
        number = waiting.pop()
        if graph[number]["class_type"] == "VAEDecode":
            seen.append(number)
        else:
            waiting += [graph[number]["inputs"][name][0] for name in ("image1", "image2")]
    assert sorted(seen) == sorted(find_nodes(graph, "VAEDecode")) and len(seen) == count
