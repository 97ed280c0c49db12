"""The reference, made from the package when the documentation is built: package by package, in the
order of imports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bnnflow"


def packages() -> list[ModuleType]:
    """Return the modules and packages right below bnnflow that have public names, each after those
    it imports.
    """
    names = [
        path.stem
        for path in sorted(PACKAGE.iterdir())
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    names = [name for name in names if not name.startswith("_")]
    imports = {name: imported_by(name) & set(names) - {name} for name in names}
    modules = [
        import_module(f"bnnflow.{name}")
        for name in TopologicalSorter(imports).static_order()
    ]
    return [module for module in modules if hasattr(module, "__all__")]


def imported_by(name: str) -> set[str]:
    """Return the packages that a package imports when it is loaded."""
    single = PACKAGE / f"{name}.py"
    files = [single] if single.exists() else (PACKAGE / name).rglob("*.py")
    text = "\n".join(path.read_text() for path in files)
    return set(re.findall(r"^from bnnflow\.(\w+)", text, re.MULTILINE))


def shown_in_pages() -> set[str]:
    """Return what the programs of the documentation import from below a package: it is public by
    that.
    """
    found = set()
    for path in (ROOT / "docs").rglob("*.md"):
        for module, names in re.findall(
            r"^from (bnnflow(?:\.\w+){2,}) import (.+)$", path.read_text(), re.MULTILINE
        ):
            found |= {f"{module}.{name.strip()}" for name in names.split(",")}
    return found


def blocks(module: ModuleType, level: int) -> Iterator[str]:
    """Yield what the page says of a package: what it is for, its names, and those of the modules
    among them.
    """
    yield block(module.__name__, level, members="false")
    inner = []
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType) and value.__name__.startswith(module.__name__):
            inner.append(value)
        else:
            yield block(f"{module.__name__}.{name}", level + 1)
    for each in inner:
        yield from blocks(each, level + 1)


def block(identifier: str, level: int, **options: str) -> str:
    """Return the directive that documents one name."""
    lines = [f"::: {identifier}", "    options:", f"      heading_level: {level}"]
    lines += [f"      {name}: {value}" for name, value in options.items()]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """Return the page: packages of which `bnnflow` itself has names or which it names, then what
    lies below them.
    """
    import bnnflow

    homes = {
        getattr(getattr(bnnflow, name), "__module__", name) for name in bnnflow.__all__
    }
    named = {home.split(".")[1] for home in homes if home.startswith("bnnflow.")} | set(
        bnnflow.__all__
    )
    everything = packages()
    entered = [package for package in everything if package.__name__.split(".")[1] in named]
    below = [package for package in everything if package not in entered]
    parts = ["## What users enter\n"]
    parts += [text for package in entered for text in blocks(package, 3)]
    parts += ["## What lies below\n"]
    parts += [text for package in below for text in blocks(package, 3)]
    parts += ["## What programs of these pages take from inside\n"]
    parts += [block(name, 3) for name in sorted(shown_in_pages())]
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the reference to its page: mkdocs calls this for every page."""
    return f"{markdown}\n{reference()}" if page.file.src_uri == "api.md" else markdown
