"""The calls that make a report again, as a program."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from typing import Any

from bnnflow.draws import Draws
from bnnflow.model import BayesianModel
from bnnflow.report.compare import Entry
from bnnflow.report.names import Names

__all__ = ["program"]

_ROOMS = ("inference", "transport", "priors", "likelihoods")


def program(
    entries: Iterable[Entry],
    model: BayesianModel,
    names: Names,
    versions: dict[str, str],
    *,
    held_out: bool,
) -> str:
    """Return a program that, given the model and the rows, makes the results and the report again.

    Draws whose call is not known stand in it by name, with a comment.
    """
    entries = list(entries)
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    given = {name: list(each) for name, each in vars(names).items() if each}
    calls = _of_estimator if "fitted" in entries[0].info else _of_methods
    lines = calls(entries, model, given, held_out)
    return "\n".join([f"# {made_with}", "import bnnflow as bf", "", *lines])


def _of_estimator(
    entries: list[Entry], model: BayesianModel, names: dict[str, list[str]], held_out: bool
) -> list[str]:
    fitted = entries[0].info["fitted"]
    rows = ["X_test", "y_test"] if held_out else []
    named = [f"{name}={names[name]!r}" for name in ("targets", "units") if name in names]
    about = "# X, y: the rows of training" + (
        "; X_test, y_test: other ones" if rows else ""
    )
    made = _qualified(fitted)
    return [
        about,
        _comment(fitted) if made is None else f"estimator = {made}",
        "estimator.fit(X, y)",
        f"estimator.report({', '.join([repr('report.html'), *rows, *named])})",
    ]


def _of_methods(
    entries: list[Entry], model: BayesianModel, names: dict[str, list[str]], held_out: bool
) -> list[str]:
    rows = ["x_test", "y_test"] if held_out else []
    named = [f"{name}={each!r}" for name, each in names.items()]
    return [
        "# model = bf.BayesianModel(net, prior, likelihood, x, y)",
        f"assert model.fingerprint() == {model.fingerprint()!r}",
        "results = {}",
        *(line for entry in entries for line in _call(entry)),
        f"bf.report({', '.join(['model', 'results', *rows, *named])})",
    ]


def _call(entry: Entry) -> list[str]:
    """Return the lines that make the draws of one method."""
    name, info = repr(entry.name), entry.info
    settings = info.get("settings", "weights")
    if not isinstance(entry.draws, Draws) or "run" not in info:
        return [_comment(f"as given: {settings}"), f"results[{name}] = given[{name}]"]
    method, lines, asked = _qualified(settings), [], dict(info["run"])
    if method is None:
        lines.append(_comment(f"as given: {settings}"))
        method = f"methods[{name}]"
    words = {key: repr(value) for key, value in asked.items()}
    if words.get("init", "'prior'") != "'prior'":
        lines.append(_comment(f"init: {asked['init']}"))
        words["init"] = f"inits[{name}]"
    if isinstance(info["seed"], int):
        words["seed"] = str(info["seed"])
    given = ", ".join(f"{key}={value}" for key, value in words.items())
    return [*lines, f"results[{name}] = bf.sample(model, {method}, {given})"]


def _comment(text: Any) -> str:
    return "# " + " ".join(str(text).split())


def _qualified(settings: str) -> str | None:
    """Return a value's text with the places of its names, None where it is no program of ours."""
    try:
        tree = ast.parse(settings, mode="eval")
    except (SyntaxError, ValueError):
        return None
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    places = {name: _place(name) for name in called}
    if not called or "" in places.values():
        return None
    return re.sub(r"\b(\w+)\(", lambda found: f"{places[found[1]]}.{found[1]}(", settings)


def _place(name: str) -> str:
    """Return the module that a name of the package is reached by; empty if it has none."""
    package = sys.modules[__name__.partition(".")[0]]  # the last that is loaded
    if hasattr(package, name):
        return "bf"
    found = (room for room in _ROOMS if hasattr(getattr(package, room), name))
    return next((f"bf.{room}" for room in found), "")
