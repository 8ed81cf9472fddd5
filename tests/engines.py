"""Sources of vLLM and SGLang, where they are installed: parts of them run here without what a GPU would need.

The packages are not imported, which would import gigabytes. A class is taken from the text of its module and defined among
the names that a test gives it; a name that the test does not give, and the code comes to, is an AttributeError.
"""

import ast
import inspect
import math
import sys
from contextlib import nullcontext
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn


def module_of(package, path):
    """The syntax tree of a module; skips the test where the package is not installed."""
    spec = PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return ast.parse((Path(spec.submodule_search_locations[0]) / path).read_text(encoding="utf-8"))


def node_of(tree, *names):
    """A class, a function, or a method of a class."""
    for name in names:
        (tree,) = [node for node in tree.body if getattr(node, "name", None) == name]
    return tree


def define(tree, *names, **known):
    """Define classes and functions of a module, among names that are `known`; returns the last one."""
    scope = {"torch": _Torch(), "nn": nn, "math": math, "nullcontext": nullcontext, **known}
    future = ast.parse("from __future__ import annotations").body
    body = [*future, *(node_of(tree, name) for name in names)]
    exec(compile(ast.Module(body, []), "upstream", "exec"), scope)
    return scope[names[-1]]


def parameters_of(node):
    """Names of a function's parameters, in order, and of those that are keywords only: without self."""
    names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
    return [name for name in names if name != "self"], [argument.arg for argument in node.args.kwonlyargs]


def parameters(function):
    """The same of a function that is at hand."""
    kinds = inspect.signature(function).parameters.values()
    by = {kind: [p.name for p in kinds if p.kind == kind and p.name != "self"] for kind in inspect._ParameterKind}
    return by[inspect.Parameter.POSITIONAL_OR_KEYWORD], by[inspect.Parameter.KEYWORD_ONLY]


def attributes_of(tree, name):
    """What is read of something that is called `name`, as `x.name` or `name` itself."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if getattr(node.value, "attr", getattr(node.value, "id", None)) == name}


def install_modules(monkeypatch, modules):
    """Modules of these names, with these attributes, as if they were imported."""
    made = {}
    for name, attributes in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            full = ".".join(parts[:end])
            if full not in made:
                made[full] = ModuleType(full)
                monkeypatch.setitem(sys.modules, full, made[full])
                if end > 1:
                    setattr(made[full.rpartition(".")[0]], parts[end - 1], made[full])
        vars(made[name]).update(attributes)
    return made


class Ids(torch.Tensor):
    """Row numbers on the CPU that may be told of a stream."""

    def record_stream(self, stream):
        """Nothing to keep."""


class Stream:
    """A stream of torch.cuda, or an event, whose work is done at once."""

    def __init__(self, device=None):
        """On any device."""

    def wait_stream(self, stream):
        """There is nothing to wait for."""

    wait_event = record = wait_stream


class _Torch:
    """torch, and a torch.cuda whose streams do everything at once."""

    cuda = SimpleNamespace(Stream=Stream, Event=Stream, current_stream=Stream, stream=lambda _: nullcontext())

    def __getattr__(self, name):
        return getattr(torch, name)
