"""What the plugin ships besides code: workflows, thumbnails, help pages and translations, against running servers."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_files
from PIL import Image
from released import RELEASED

from bonsai_ops.tools.environment import NEWEST, PLUGIN_NAME
from bonsai_ops.tools.server import ComfyServer
from bonsai_ops.tools.workflow import find_nodes, to_api
from bonsai_ops.weights.formats import open_pack
from bonsai_ops.weights.formats.entries import PackedTensor

pytestmark = pytest.mark.host

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPOSITORY / "workflows").glob("*.json"))
HELP, LOCALES = REPOSITORY / "web" / "docs", REPOSITORY / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())
OURS = tuple(RELEASED)
WARNED_OF = ("ConditioningSetArea", "LoraLoaderBypass", "LoraLoaderBypassModelOnly")
"""Nodes of ComfyUI that do not work with FLUX.2, as the help pages say."""
PAGE_ONLY = ("MarkdownNote", "Note", "Reroute", "PrimitiveNode")
"""Node types that live in the page and are unknown to the server."""
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MANY = 16
"""More nodes than these are not seen at once on a small screen."""
ANY = ("*", "COMFY_MATCHTYPE_V3", "COMFY_AUTOGROW_V3")
"""Types of what takes, or gives, whatever it is connected to; the inputs of the last are called name.input0 .."""
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
MACHINE_PATH = re.compile(
    r"[A-Za-z]:\\|(?<![\w.:/-])/(?:home|Users|root|tmp|mnt|media|opt|var|work|workspace|content)/"
)
TITLE_HEIGHT = 30
PACK_FILES = {
    "text_encoders": "mlx-community/Qwen3-4B-4bit/resolve/main/model.safetensors",
    "vae": "black-forest-labs/FLUX.2-klein-4B/resolve/main/vae/diffusion_pytorch_model.safetensors",
}
"""{ComfyUI's folder: what a workflow has downloaded into it, behind the address of Hugging Face}."""

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def download(server: ComfyServer, path: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + path, timeout=30) as answer:
        return answer.read()


def inputs_of(schema: Mapping[str, Any]) -> dict[str, list]:
    """{input: [type, options]} in the order of the node's widgets."""
    order = schema.get("input_order") or {kind: list(found) for kind, found in schema["input"].items()}
    kinds = [kind for kind in ("required", "optional") if kind in schema["input"]]
    return {name: schema["input"][kind][name] for kind in kinds for name in order[kind]}


@functools.cache
def nodes_of(server: ComfyServer) -> dict[str, Any]:
    """What the server says about all nodes, asked once: it takes long, and only lists of files ever change."""
    return server.object_info()


def options_of(spec: list) -> Mapping[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def base_name(slot: Mapping[str, Any]) -> str:
    """The input in the schema that a saved slot belongs to."""
    return slot["name"].partition(".")[0]


def is_widget(spec: list) -> bool:
    return (isinstance(spec[0], list) or spec[0] in WIDGETS) and not options_of(spec).get("forceInput")


def widget_values(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """{widget: value} of a node of a saved workflow; what the page adds is checked and left out."""
    left = list(node.get("widgets_values") or ())
    values = {}
    for name, spec in inputs_of(schema).items():
        if is_widget(spec):
            values[name] = left.pop(0)
            if options_of(spec).get("control_after_generate") or name in ("seed", "noise_seed"):
                assert left.pop(0) in AFTER_GENERATE
            if options_of(spec).get("image_upload"):
                assert left.pop(0) == "image"
    assert left == [], f"{node['type']} has values without a widget: {left}"
    return values


def refusal(value: Any, spec: list) -> str | None:
    """Why a widget does not take `value`, None if it does."""
    options = options_of(spec)
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    if choices is not None:
        return None if value in choices else f"{value!r} is none of {choices}"
    if spec[0] in ("INT", "FLOAT"):
        number = isinstance(value, int if spec[0] == "INT" else (int, float)) and not isinstance(value, bool)
        if not number or not options.get("min", value) <= value <= options.get("max", value):
            return f"{value!r} is outside {options.get('min')} .. {options.get('max')}"
        return None
    expected = {"STRING": str, "BOOLEAN": bool}[spec[0]]
    return None if isinstance(value, expected) else f"{value!r} is no {expected.__name__}"


@pytest.fixture(scope="module")
def newest(comfy_server: Callable[..., ComfyServer]) -> ComfyServer:
    """A running server of the version that the workflows were saved with."""
    return comfy_server(NEWEST)


@pytest.fixture
def with_files(newest: ComfyServer) -> Iterator[ComfyServer]:
    """That server with empty files at the places that the notes in the workflows name."""
    models, made = newest.base_directory / "models", []
    pack = models / "bonsai" / "bonsai-image-ternary-4B-mlx-2bit" / "transformer-packed-mflux"
    wanted = [pack / "diffusion_pytorch_model.safetensors", newest.base_directory / "input" / "example.png"]
    for path in WORKFLOWS:
        for node in read(path)["nodes"]:
            wanted += [models / m["directory"] / m["name"] for m in node["properties"].get("models", ())]
            if node["type"] == "LoraLoaderModelOnly":
                wanted.append(models / "loras" / node["widgets_values"][0])
            if node["type"] == "LoadImageTextDataSetFromFolder":
                pictures = newest.base_directory / "input" / node["widgets_values"][0]
                wanted.append(pictures / "1.png")
    for file in dict.fromkeys(wanted):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            made.append(file)
    yield newest
    for file in made:
        file.unlink()
    for folder in (pictures, pack, pack.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# Workflows


def test_there_are_workflows() -> None:
    """Their names are the titles in the template browser, numbered by how one learns, and good on any file system."""
    assert WORKFLOWS
    for number, path in enumerate(WORKFLOWS, 1):
        assert re.fullmatch(rf"Bonsai {number:02} - [A-Z][A-Za-z ,]+", path.stem), path.stem
        assert path.with_suffix(".jpg").exists()
    assert len({read(path)["id"] for path in WORKFLOWS}) == len(WORKFLOWS)


@each_workflow
def test_no_node_that_the_help_warns_of(path: Path) -> None:
    assert [node["type"] for node in read(path)["nodes"] if node["type"] in WARNED_OF] == []


def test_every_node_has_an_example() -> None:
    """A template or a blueprint that uses it."""
    files = [*WORKFLOWS, *(REPOSITORY / "subgraphs").glob("*.json")]
    assert {*OURS} - {node["type"] for path in files for node in all_nodes(read(path))} == set()


def all_nodes(workflow: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those of a saved workflow, and of the subgraphs in it."""
    for graph in (workflow, *workflow.get("definitions", {}).get("subgraphs", ())):
        yield from graph["nodes"]


def test_one_opens_as_an_app() -> None:
    """With inputs and outputs that are there; the form holds for pages that keep widgets by node and name."""
    (path,) = (path for path in WORKFLOWS if read(path)["extra"].get("linearMode"))
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    shown = [(number, name) for number, name, *_ in graph["extra"]["linearData"]["inputs"]]
    for number, name in shown:
        assert name in [slot["name"] for slot in nodes[number]["inputs"] if "widget" in slot]
    assert {"text", "width", "height", "seed"} == {name for _, name in shown}
    (output,) = graph["extra"]["linearData"]["outputs"]
    assert nodes[output]["type"] == "SaveImage"


@each_workflow
def test_node_types_exist_in_every_version(path: Path, every_comfy_server: ComfyServer) -> None:
    """And none of them is one that ComfyUI asks users to replace."""
    known = nodes_of(every_comfy_server)
    types = [node["type"] for node in read(path)["nodes"] if node["type"] not in PAGE_ONLY]
    assert [name for name in types if name not in known or known[name].get("deprecated")] == []


def test_our_nodes_exist_in_every_version(every_comfy_server: ComfyServer) -> None:
    known = nodes_of(every_comfy_server)
    found = sorted(name for name, node in known.items() if node["python_module"] == f"custom_nodes.{PLUGIN_NAME}")
    assert found == sorted(OURS), every_comfy_server.log_tail()


@each_workflow
def test_widget_values_are_allowed(path: Path, with_files: ComfyServer) -> None:
    known = with_files.object_info()
    wrong = []
    for node in read(path)["nodes"]:
        if node["type"] in PAGE_ONLY:
            continue
        schema = known[node["type"]]
        specs = inputs_of(schema)
        for name, value in widget_values(node, schema).items():
            reason = refusal(value, specs[name])
            if reason:
                wrong.append(f"{node['type']}.{name}: {reason}")
    assert wrong == []


@each_workflow
def test_our_widget_values_are_allowed_in_every_version(path: Path, every_comfy_server: ComfyServer) -> None:
    known = nodes_of(every_comfy_server)
    for node in read(path)["nodes"]:
        if node["type"] in OURS:
            specs = inputs_of(known[node["type"]])
            values = widget_values(node, known[node["type"]])
            files = ("model_name", "pack_name", "text_encoder_name")
            assert [refusal(v, specs[n]) for n, v in values.items() if n not in files and refusal(v, specs[n])] == []


@each_workflow
def test_links_are_consistent(path: Path, newest: ComfyServer) -> None:
    graph, known = read(path), nodes_of(newest)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link[0]: link for link in graph["links"]}
    assert len(nodes) == len(graph["nodes"]) and len(links) == len(graph["links"])
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == max(links)
    for number, source, out, target, slot, kind in graph["links"]:
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert known[nodes[source]["type"]]["output"][out] in (kind, *ANY)
        wanted = inputs_of(known[nodes[target]["type"]])[base_name(nodes[target]["inputs"][slot])][0]
        assert wanted in (kind, *ANY)
    for node in graph["nodes"]:
        for entry in node["inputs"]:
            assert entry["link"] is None or entry["link"] in links
        for entry in node["outputs"]:
            assert all(number in links for number in entry["links"] or ())
        if node["type"] not in PAGE_ONLY:
            linked = {base_name(entry) for entry in node["inputs"] if entry["link"] is not None}
            required = known[node["type"]]["input"].get("required", {})
            assert {name for name, spec in required.items() if not is_widget(spec)} <= linked, node["type"]


@each_workflow
def test_no_path_of_a_machine(path: Path) -> None:
    assert [text for text in strings(read(path)) if MACHINE_PATH.search(text)] == []


def boxes_of(path: Path) -> list[tuple[float, float, float, float, str]]:
    """(left, top, right, bottom, type) of each node with its title."""
    return [
        (n["pos"][0], n["pos"][1] - TITLE_HEIGHT, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1], n["type"])
        for n in read(path)["nodes"]
    ]


def cover(a: tuple, b: tuple) -> bool:
    return a[2] > b[0] and b[2] > a[0] and a[3] > b[1] and b[3] > a[1]


@each_workflow
def test_nodes_do_not_overlap(path: Path) -> None:
    """Each but the note lies in one group; groups do not overlap."""
    boxes = boxes_of(path)
    groups = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in read(path)["groups"])]
    for found in (boxes, groups):
        assert not any(cover(a, b) for a, b in itertools.combinations(found, 2))
    for box in boxes:
        over = [group for group in groups if cover(box, group)]
        assert len(over) == (box[4] != "MarkdownNote"), box
        assert all(g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3] for g in over), box


@each_workflow
def test_text_can_be_read_on_a_small_screen(path: Path) -> None:
    """The page opens a template so that the nodes, with 10 around them, take three quarters of the window.

    On the canvas it leaves out text of less than 8 pixels, and that of a node has 14. A graph of more than MANY nodes
    is read group by group there, as a whole where a browser fills a screen of 1080 lines.
    """
    boxes = boxes_of(path)
    whole = [max(box[i + 2] for box in boxes) - min(box[i] for box in boxes) for i in (0, 1)]
    groups = [group["bounding"][2:] for group in read(path)["groups"]]
    small, large = (groups, [whole]) if len(boxes) > MANY else ([whole], [])
    for sizes, screen in ((small, (1366, 768)), (large, (1800, 930))):
        for size in sizes:
            assert 0.75 * min(screen[i] / (size[i] + 20) for i in (0, 1)) >= 8 / 14


@each_workflow
def test_model_links(path: Path, newest: ComfyServer) -> None:
    """The page offers a download only if name and widget agree and the address is one that it trusts."""
    known = nodes_of(newest)
    loaders = ("LoadBonsaiModel", "LoadBonsaiTextEncoder", "UNETLoader", "VAELoader")
    for node in read(path)["nodes"]:
        models = node["properties"].get("models", [])
        assert bool(models) == (node["type"] in loaders), node["type"]
        for model in models:
            assert model["name"] in widget_values(node, known[node["type"]]).values()
            assert model["name"].endswith(".safetensors") and model["url"].endswith(".safetensors")
            assert model["url"].startswith("https://huggingface.co/")
            assert model["directory"] in newest.get("/models")


@each_workflow
def test_the_links_lead_to_what_the_packs_have(path: Path) -> None:
    """The text encoder in 4 bits and FLUX.2 Klein's own VAE, not the larger ones that serve as well; the note too."""
    models = [m for node in read(path)["nodes"] for m in node["properties"].get("models", ())]
    for model in models:
        place = PACK_FILES.get(model["directory"])
        assert place is None or model["url"] == f"https://huggingface.co/{place}"
    (note,) = (node for node in read(path)["nodes"] if node["type"] == "MarkdownNote")
    assert all(
        model["url"] in note["widgets_values"][0] and model["name"] in note["widgets_values"][0] for model in models
    )


@pytest.fixture(scope="module")
def give_tiny_files() -> Iterator[Callable[[ComfyServer], ComfyServer]]:
    """Gives a server the tiny files once; they are removed at the end."""
    with contextlib.ExitStack() as stack:
        done: set[Path] = set()

        def give(server: ComfyServer) -> ComfyServer:
            if server.base_directory not in done:
                done.add(server.base_directory)
                stack.enter_context(tiny_files.written(server.base_directory))
            return server

        yield give


def test_patch_workflow_saves_and_reports(
    every_comfy_server: ComfyServer, give_tiny_files: Callable[[ComfyServer], ComfyServer]
) -> None:
    """The reports reach the page as text; the saved model is a native file with the branch of every packed layer."""
    server = give_tiny_files(every_comfy_server)
    (path,) = (path for path in WORKFLOWS if "Patch" in path.stem)
    graph = to_api(tiny_files.instead_of_published(read(path)), server.object_info())
    for node in graph.values():
        if node["class_type"] == "EmptyFlux2LatentImage":
            node["inputs"] |= {"width": 128, "height": 128}
    (patch,), (preview,) = find_nodes(graph, "PatchToBitLinear"), find_nodes(graph, "PreviewAny")
    graph["patched"] = {"class_type": "PreviewAny", "inputs": {"source": [patch, 1]}}
    outputs = server.wait(server.queue(graph))["outputs"]
    patched, measured = (outputs[number]["text"][0] for number in ("patched", preview))
    layers = 2 * 4 + 2 * 2
    for kind in ("PatchToBitLinear", "MeasureBitLinear"):  # neither is an output node
        (shown,) = outputs[find_nodes(graph, kind)[0]]["images"]
        with Image.open(server.base_directory / shown["type"] / shown["subfolder"] / shown["filename"]) as picture:
            assert picture.width == 640 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    (said,) = outputs[find_nodes(graph, "CalibrateBitLinear")[0]]["text"]
    assert re.fullmatch(r"calibrated: (\d+) of \1 layers", said)
    assert f"{layers} linear layers packed" in patched and f"calibrated: {layers} of {layers} layers" in patched
    assert f"measured: {layers} of {layers} layers" in measured and "inputs of this sampling" in measured
    pack = open_pack(Path(outputs[find_nodes(graph, "SaveBonsaiModel")[0]]["text"][0]))
    weights = [entry.load() for entry in pack.entries.values() if isinstance(entry, PackedTensor)]
    assert [weight.rank for weight in weights] == [32] * layers and {weight.scheme for weight in weights} == {"ternary"}
    again = server.wait(server.queue(graph))["outputs"]  # all of it from the cache, as on a page that was opened anew
    shown = [find_nodes(graph, kind)[0] for kind in ("CalibrateBitLinear", "PatchToBitLinear", "MeasureBitLinear")]
    told_again = "has_intermediate_output" in server.object_info("KSampler")["KSampler"]
    assert {n: again.get(n) for n in shown} == {n: outputs[n] if told_again else None for n in shown}


# What a search finds

SEARCHED = {
    "LoadBonsaiModel": ("1 bit", "gguf", "flux2", "klein", "load diffusion model", "low vram"),
    "LoadBonsaiPack": ("flux2", "klein", "load checkpoint", "low vram"),
    "LoadBonsaiTextEncoder": ("qwen3", "load clip", "klein", "low vram"),
    "BonsaiSampler": ("ksampler", "flux2", "klein"),
    "SaveBonsaiModel": ("save model", "quantize"),
    "BonsaiModelInfo": ("vram", "model info"),
    "PatchToBitLinear": ("quantize", "bitlinear", "bitnet", "low vram"),
    "CalibrateBitLinear": ("calibration", "quantize", "bitlinear"),
    "MeasureBitLinear": ("quality", "quantize", "bitlinear"),
    "RecoverBitLinear": ("quality", "quantize", "bitlinear", "training"),
    "BonsaiRightGradients": ("train lora", "training", "flux"),
}
"""{node: what people type who look for such a node}."""
FOR_ALL = ("bonsai", "prism", "1-bit", "1 bit", "ternary")
FIRST_NEEDED = ("LoadBonsaiModel", "LoadBonsaiPack", "LoadBonsaiTextEncoder", "BonsaiSampler")


@pytest.mark.parametrize("name", OURS)
def test_a_search_finds_each_node(name: str, every_comfy_server: ComfyServer) -> None:
    node = nodes_of(every_comfy_server)[name]
    assert {*FOR_ALL, *SEARCHED[name]} <= {*node["search_aliases"]}
    assert len({*node["search_aliases"]}) == len(node["search_aliases"])
    assert node.get("essentials_category") == ("Image Generation" if name in FIRST_NEEDED else None)


def test_what_a_newcomer_need_not_choose_is_folded_away(every_comfy_server: ComfyServer) -> None:
    loading = ["compute_dtype", "memory", "mode", "layout"]
    expected = {
        "LoadBonsaiModel": loading,
        "LoadBonsaiPack": [*loading, "text_compute_dtype"],
        "LoadBonsaiTextEncoder": ["compute_dtype"],
    }
    for name, inputs in expected.items():
        specs = inputs_of(nodes_of(every_comfy_server)[name])
        assert [key for key, spec in specs.items() if options_of(spec).get("advanced")] == inputs
        assert list(specs)[-len(inputs) :] == inputs


# What the template browser shows


def test_template_browser_lists_every_workflow(newest: ComfyServer) -> None:
    assert sorted(newest.get("/api/workflow_templates")[PLUGIN_NAME]) == [path.stem for path in WORKFLOWS]


@each_workflow
def test_template_and_thumbnail_are_served(path: Path, newest: ComfyServer) -> None:
    place = f"/api/workflow_templates/{PLUGIN_NAME}/{urllib.parse.quote(path.stem)}"
    assert newest.get(f"{place}.json") == read(path)
    thumbnail = path.with_suffix(".jpg")
    assert download(newest, f"{place}.jpg") == thumbnail.read_bytes()
    with Image.open(thumbnail) as picture:
        assert picture.format == "JPEG" and picture.width == picture.height == 512


# Help and translations


def described(nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of our nodes as the schemas have them, in the form of nodeDefs.json."""
    texts = {}
    for name in OURS:
        node = nodes[name]
        entry = {"display_name": node["display_name"], "description": node["description"], "inputs": {}}
        for key, spec in inputs_of(node).items():
            options = options_of(spec)
            entry["inputs"][key] = {"name": options.get("display_name") or key, "tooltip": options.get("tooltip")}
            if options.get("control_after_generate"):
                entry["inputs"]["control_after_generate"] = {"name": "control after generate"}
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True) if node["output"] else ()
        for i, (output, tooltip) in enumerate(outputs):
            entry.setdefault("outputs", {})[str(i)] = {"name": output, "tooltip": tooltip}
        texts[name] = entry
    return texts


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """{path: text} of nested dicts."""
    if not isinstance(value, dict):
        return {place: value}
    return {p: text for key, inner in value.items() for p, text in leaves(inner, f"{place}/{key}").items()}


def test_every_input_and_output_has_a_tooltip(newest: ComfyServer) -> None:
    assert [place for place, text in leaves(described(nodes_of(newest))).items() if not text] == []


def test_english_equals_the_schemas(newest: ComfyServer) -> None:
    wanted, found = leaves(described(nodes_of(newest))), leaves(read(LOCALES / "en" / "nodeDefs.json"))
    differing = {p for p in wanted.keys() | found.keys() if wanted.get(p) != found.get(p)}
    assert {p: wanted.get(p) for p in sorted(differing)} == {}, "these belong into locales/en/nodeDefs.json"


def test_categories_are_in_the_translations(newest: ComfyServer) -> None:
    known, main = nodes_of(newest), read(LOCALES / "en" / "main.json")
    assert {part for name in OURS for part in known[name]["category"].split("/")} == set(main["nodeCategories"])
    assert PLUGIN_NAME in main["templateWorkflows"]["category"]


def test_translations_are_served(newest: ComfyServer) -> None:
    served = newest.get("/i18n")
    for language in LANGUAGES:
        assert {n: served[language]["nodeDefs"][n] for n in OURS} == read(LOCALES / language / "nodeDefs.json")


def test_help_pages_belong_to_nodes() -> None:
    assert sorted(path.stem for path in HELP.glob("*.md")) == sorted(OURS)


@pytest.mark.parametrize("name", OURS)
def test_help_page_tells_every_input_and_output(name: str, newest: ComfyServer) -> None:
    text = download(newest, f"/extensions/{PLUGIN_NAME}/docs/{name}.md").decode()
    assert text == (HELP / f"{name}.md").read_text(encoding="utf-8")
    node = nodes_of(newest)[name]
    assert text.startswith(f"# {node['display_name']}\n")
    for row in (*inputs_of(node), *(node["output_name"] or ())):
        assert f"\n| {row} | " in text, f"{name}.md has no row for {row}"
    for heading in ("Inputs", "Typical wiring", "Errors and cures"):
        assert f"\n## {heading}\n" in text


@pytest.mark.parametrize("name", OURS)
def test_translated_help_and_its_picture_are_served(name: str, newest: ComfyServer) -> None:
    docs = f"/extensions/{PLUGIN_NAME}/docs"
    for page in (HELP / name).iterdir():
        assert download(newest, f"{docs}/{name}/{page.name}").decode() == page.read_text(encoding="utf-8")
    picture = HELP / "graphs" / f"{name}.webp"
    assert download(newest, f"{docs}/graphs/{name}.webp") == picture.read_bytes()
    assert f"](graphs/{name}.webp)" in (HELP / f"{name}.md").read_text(encoding="utf-8")
    with Image.open(picture) as opened:
        assert opened.format == "WEBP" and opened.width >= 400
    assert picture.stat().st_size < 60_000
