"""No line of the program unpickles, evaluates, or extracts an archive to paths of the archive's choosing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for folder in ("trainer", "data_tools", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
METHODS = {
    *("extract", "extractall", "unpack_archive", "unsafe_load", "full_load", "load_all", "read_pickle"),
    *("frombytes_pickle", "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "system", "popen"),
}
SAFE = {"allow_pickle": "False", "shell": "False", "trust_remote_code": "False", "weights_only": "True"}
LOADERS = {"torch", "yaml", "pickle", "joblib", "shelve", "marshal"}  # whose `load` or `loads` may run code


def offences(tree: ast.AST) -> list[str]:
    """What a module does that it must not, with the line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: import {name.name}" for name in node.names if name.name in MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(name.name for name in node.names)}
            found += [f"{node.lineno}: from {node.module}" for name in names if name in MODULES]
        elif isinstance(node, ast.Call) and (why := _bad_call(node)):
            found.append(f"{node.lineno}: {why}")
    return found


def _bad_call(node: ast.Call) -> str:
    function = node.func
    for keyword in node.keywords:
        if keyword.arg in SAFE and ast.unparse(keyword.value) != SAFE[keyword.arg]:
            return keyword.arg
    if isinstance(function, ast.Name):
        return function.id if function.id in BUILTINS else ""
    if not isinstance(function, ast.Attribute):
        return ""
    owner = ast.unparse(function.value)
    if function.attr in METHODS:
        return ast.unparse(function)
    if function.attr in ("load", "loads") and owner in LOADERS:
        return ast.unparse(function)
    given = {keyword.arg for keyword in node.keywords}
    if function.attr == "load" and owner in ("np", "numpy") and "allow_pickle" not in given:
        return "np.load without allow_pickle=False"
    return ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_extracted(path: Path) -> None:
    assert offences(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text, Loader)",
        "yaml.unsafe_load(text)",
        "tar.extractall()",
        "tar.extract(member)",
        "shutil.unpack_archive(path)",
        "dist.broadcast_object_list(values)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_test_finds_what_it_looks_for(code: str) -> None:
    assert offences(ast.parse(code))
