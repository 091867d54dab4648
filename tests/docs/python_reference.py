"""The page of the Python interface: signatures, docstrings, fields of what packages export."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from typing import Any

PACKAGES = ("training", "export", "verification", "dverge_serve")
WIDTH = 88
ARGUMENTS = re.compile(r"^Args:\n((?: {4}.*\n?)+)", re.MULTILINE)
# A run's other methods write it, which is the trainer's work.
OF_A_RUN = ["open_finished", "ensemble", "members", "config", "labels", "checkpoint", "probe"]
HEAD = """# Python

The commands are thin: each calls one of these functions. Importing a package does not import
torch; the first use of a name does. Functions print nothing and never exit the process: a mistake
of the caller is a `dverge_serve.errors.UserError`, whose text is one line.

```python
from dverge_serve import Engine
from export import export
from training import load_recipe, train
from verification import verify

run = train(load_recipe("digits"), "runs/demo", device="auto")
export(run, "model.onnx")
report = verify("model.onnx", run=run, eps=(0.1, 0.15))
print(report.verdict, report.robust_accuracy[0.1].transfer.value)
# A picture of a digit, such as dverge_serve/serving/templates/examples/3.png.
print(Engine("model.onnx").predict(["3.png"])[0].label)
```

`run.ensemble()` is a `torch.nn.Module` from images in `[0,1]` to logits, so attack libraries take
it as it is. What is on this page is public in the sense of [Versions](../versioning.md).
"""


def page() -> str:
    """Return the page, read from the packages' `__all__`."""
    parts, shown = [HEAD], set[int]()
    for package in PACKAGES:
        module = importlib.import_module(package)
        found = {name: getattr(module, name) for name in sorted(module.__all__)}
        kinds = {name: each for name, each in found.items() if callable(each)}
        parts.append(f"## {package}\n")
        shown.update(id(each) for each in kinds.values())
        for name, each in kinds.items():
            parts += _entry(f"{package}.{name}", each)
        for kind in _returned(list(kinds.values())):
            if id(kind) not in shown:
                shown.add(id(kind))
                parts += _entry(f"{kind.__module__}.{kind.__qualname__}", kind)
    return "\n".join(parts)


def _entry(title: str, each: Any) -> Iterator[str]:
    yield f"### {title}\n"
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
    name = title.rpartition(".")[2]
    if isinstance(node, ast.FunctionDef):
        yield f"```python\n{_signature(node, name)}\n```\n"
    text = inspect.getdoc(each) or ""
    fields = dataclasses.is_dataclass(each) and title != "training.Config"
    yield docstring(ARGUMENTS.sub("", text).rstrip() if fields else text)
    if not isinstance(node, ast.ClassDef):
        return
    if title == "training.Config":
        yield "Its fields are the keys of a [recipe](recipes.md).\n"
    elif fields:
        yield from _fields(each, text)
    methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
    shown = OF_A_RUN if title == "training.Run" else [x for x in methods if not x.startswith("_")]
    if "__init__" in methods and title != "training.Run":
        yield f"```python\n{_signature(methods['__init__'], name)}\n```\n"
    for method in shown:
        yield f"```python\n{_method(methods[method])}\n```\n"
        yield docstring(inspect.getdoc(getattr(each, method)) or "")


def _fields(kind: Any, text: str) -> Iterator[str]:
    words = comments_of(kind)
    for lines in ARGUMENTS.findall(text):
        for names, meaning in re.findall(r"^ {4}([\w, ]+): ((?:.|\n {5,})*)", lines, re.MULTILINE):
            words |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    yield "| field | type | |\n|---|---|---|"
    for field in dataclasses.fields(kind):
        if field.name.startswith("_"):
            continue
        yield f"| `{field.name}` | {_type(field)} | {escape(words.get(field.name, ''))} |"
    yield ""


def _type(field: dataclasses.Field[Any]) -> str:
    text = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    return f"`{text}`".replace("|", "\\|")


def _method(node: ast.FunctionDef) -> str:
    decorators = {ast.unparse(each) for each in node.decorator_list}
    if "property" in decorators or "functools.cached_property" in decorators:
        assert node.returns is not None
        return f"{node.name}: {ast.unparse(node.returns)}"
    return _signature(node, node.name)


def _signature(node: ast.FunctionDef, name: str) -> str:
    """Return `name(parameters) -> result`, one parameter a line if one line is too short."""
    given = node.args
    ordered = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(ordered) - len(given.defaults)) + [*given.defaults]
    words = [_parameter(*each) for each in zip(ordered, defaults, strict=True)]
    if given.vararg:
        words.append("*" + _parameter(given.vararg, None))
    elif given.kwonlyargs:
        words.append("*")
    pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    words += [_parameter(*each) for each in pairs]
    if given.kwarg:
        words.append("**" + _parameter(given.kwarg, None))
    words = words[1:] if ordered and ordered[0].arg in ("self", "cls") else words
    returns = node.returns and node.name != "__init__"
    result = f" -> {ast.unparse(node.returns)}" if returns and node.returns else ""
    line = f"{name}({', '.join(words)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in words) + f"){result}"


def _parameter(node: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(node.annotation)}" if node.annotation else ""
    if default is None:
        return node.arg + kind
    equals = " = " if kind else "="
    return node.arg + kind + equals + ast.unparse(default).replace("'", '"')


def docstring(text: str) -> str:
    """Return a docstring as Markdown: its sections (Args, Returns, Raises) become lists."""
    lines: list[str] = []
    inside = False
    for line in escape(text).splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Yields|Example):", line):
            lines += [f"**{line.rstrip(':')}**", ""]
            inside = True
        elif inside and re.match(r" {4}\S", line):
            head, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{head}`: {rest}" if colon else f"- {line.strip()}")
        elif inside and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _returned(found: list[Any]) -> list[Any]:
    """Return our dataclasses that these functions and classes give back, and theirs in turn."""
    kinds: list[Any] = []
    queue = list(found)
    while queue:
        for hint in _hints(queue.pop(0)):
            for kind in _parts(hint):
                ours = getattr(kind, "__module__", "").partition(".")[0] in PACKAGES
                if ours and dataclasses.is_dataclass(kind) and kind not in [*kinds, *found]:
                    kinds.append(kind)
                    queue.append(kind)
    return kinds


def _hints(each: Any) -> Iterator[Any]:
    if not isinstance(each, type):
        yield _returns(each)
    elif dataclasses.is_dataclass(each):
        if each.__name__ != "Config":
            hints = typing.get_type_hints(each)
            yield from (hints[field.name] for field in dataclasses.fields(each))
    else:
        for name, method in vars(each).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                yield _returns(method)


def _returns(function: Any) -> Any:
    """Return what a function is annotated to return; its parameters may be known to mypy alone."""
    hint = inspect.get_annotations(function).get("return")
    if not isinstance(hint, str):
        return hint
    scope = dict(inspect.unwrap(function).__globals__)
    if "__getattr__" in scope:  # a package that loads its names when they are used
        room = sys.modules[scope["__name__"]]
        scope |= {name: getattr(room, name) for name in scope["__all__"]}
    return eval(hint, scope)


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in typing.get_args(hint):
        yield from _parts(part)


def escape(words: str) -> str:
    """Return text that neither a table nor HTML takes for its own."""
    return words.replace("<", "&lt;").replace("|", "&#124;")


def comments_of(cls: Any) -> dict[str, str]:
    """Return the comment of each field: the lines above it, then the rest of its own line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        source = inspect.getsource(base)
        notes = {
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (node,) = ast.parse(source).body
        assert isinstance(node, ast.ClassDef)
        for line in node.body:
            if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
                continue
            above = line.lineno - 1
            while notes.get(above, ("", False))[1]:
                above -= 1
            own = range(above + 1, (line.end_lineno or line.lineno) + 1)
            words = " ".join(notes[number][0] for number in own if number in notes)
            if words:
                found[line.target.id] = words
    return found
