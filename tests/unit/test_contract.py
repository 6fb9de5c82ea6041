"""The table of ComfyUI's names (bonsai_ops/host/contract/) says what the code says, no more and no less."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import types
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import contract_walk
import pytest
import torch
from contract_walk import Said
from PIL import ImageDraw, ImageFont

from bonsai_ops.host.contract import NEEDS, Need

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "bonsai_ops"


def users() -> Iterator[tuple[str, Path]]:
    """(user as the table calls it, file) of everything that may name ComfyUI."""
    for file in sorted((REPOSITORY / "nodes").glob("*.py")):
        yield "nodes", file
    for file in sorted((PACKAGE / "host").rglob("*.py")):
        if file.parent.name != "contract":
            yield file.relative_to(PACKAGE).as_posix(), file
    for file in sorted((PACKAGE / "tools" / "bench" / "inside").glob("*.py")):
        yield "tools/bench/inside", file


@pytest.fixture(scope="module")
def said() -> Mapping[str, Said]:
    """{user: what it says of ComfyUI}."""
    found: dict[str, Said] = {}
    for user, file in users():
        found.setdefault(user, Said()).add(contract_walk.read(file))
    return found


def rows(user: str) -> list[Need]:
    return [need for need in NEEDS if need.user == user]


def test_every_name_in_the_code_stands_in_the_table(said: Mapping[str, Said]) -> None:
    absent = []
    for user, file in said.items():
        known = {name for need in rows(user) for name in (need.name, *need.names)}
        known |= {f"{need.name}.{word}" for need in rows(user) for word in need.words.split()}
        absent += [f"{user} names {name}" for name in sorted(file.dotted - known)]
        for name, keywords in file.keywords.items():
            taken = {k for need in rows(user) if name in need.names for k in need.takes.split()}
            absent += [f"{user} calls {name}({k}=)" for k in sorted(keywords - taken) if name]
    assert not absent, "\n".join(absent) + "\nadd a row to bonsai_ops/host/contract/, or the user to a row"


def test_every_row_of_the_table_is_used(said: Mapping[str, Said]) -> None:
    unused = []
    for need in NEEDS:
        file = said.get(need.user, Said())
        wanted = [name for name in need.names if name not in file.dotted]
        if need.members or need.takes:  # of a class whose name the file need not say
            wanted = [name for name in wanted if name.rpartition(".")[2] not in file.words]
        elif need.words:
            wanted = []
        wanted += [word for word in need.words.split() if word not in file.words]
        wanted += [f"{k}=" for k in need.takes.split() if k not in file.words]
        unused += [f"{need.user} does not use {what} of {need.name}" for what in wanted]
    assert not unused, "\n".join(unused) + "\ntake it out of host/contract/, or name the file that uses it now"


def test_every_attribute_of_a_typed_parameter_stands_in_the_table(said: Mapping[str, Said]) -> None:
    absent, torchs = [], {"bonsai_patches", *dir(torch.nn.Module)}  # the first is ours, on a LowVramPatch
    for user, file in said.items():
        known = {(need.name, part) for need in rows(user) for part in (*need.members.split(), *need.words.split())}
        absent += [
            f"{user} uses {name}: {attribute}"
            for name, attribute in sorted(file.typed - known)
            if attribute not in torchs
        ]
    assert not absent, "\n".join(absent) + "\nadd it to bonsai_ops/host/contract/"


STATES = {
    "comfy_patched_weights": "a layer that was never loaded has none",
    "diffusion_model": "a MODEL need not be a diffusion model",
    "model_config": "a MODEL need not be a diffusion model",
    "weight": "not every layer has one",
}
"""Words of the table that one may ask an object for: they differ from object to object, not from version to version."""


def test_versions_are_asked_for_in_one_file(said: Mapping[str, Said]) -> None:
    words = {part for need in NEEDS for part in (*need.members.split(), *need.words.split())} - STATES.keys()
    found = []
    for user, file in said.items():
        if user not in ("host/comfyui.py", "tools/bench/inside"):
            found += [f"{user} asks for {name}" for name in sorted(file.asked & words)]
            found += [f"{user} catches {e}" for e in sorted(file.caught & {"ImportError", "ModuleNotFoundError"})]
    assert not found, "\n".join(found) + "\nask in bonsai_ops/host/comfyui.py"


PYTHON = (str, bytes, float, slice, dict, list, set, tuple, property, Exception, type, Path, PurePosixPath, io.StringIO)
PYTHON += (OSError, os.stat_result, types.FrameType, types.CodeType)
PYTHON += (types.FunctionType, types.MethodType, types.CellType, contextlib.ExitStack, inspect.ClosureVars)
OTHERS = (torch.Tensor, torch.nn.Module(), torch.device, torch.dtype, logging.Logger, ImageDraw.ImageDraw, ImageFont)
OTHERS += (torch.nn.Conv2d(1, 1, 1),)
NAMES = ("bonsai_patches",)  # ours, on a LowVramPatch
NAMES += ("Draw", "default", "overloads", "writerow")  # PIL's, those of a torch operation and of a CSV writer


def test_every_attribute_is_ours_or_pythons_or_in_the_table(said: Mapping[str, Said]) -> None:
    """Attributes of ComfyUI's objects, whatever the variable that holds them is called."""
    wings = [file for file in PACKAGE.rglob("*.py") if "tools" not in file.parts]
    ours = set().union(*(contract_walk.read(file).defined for file in wings))
    public = set(NAMES).union(*(dir(kind) for kind in (*PYTHON, *OTHERS)))
    strange = []
    for user, file in said.items():
        if user == "tools/bench/inside":  # it uses too much else
            continue
        known = {part for need in rows(user) for name in need.names for part in name.split(".")}
        known |= {word for need in rows(user) for word in need.words.split()}
        strange += [f"{user} uses .{name}" for name in sorted(file.attributes - ours - file.defined - public - known)]
    assert not strange, "\n".join(strange) + "\nwhose is it? If it is ComfyUI's, add it to bonsai_ops/host/contract/"
