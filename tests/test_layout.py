"""Imports point one way: a folder or module of the package uses only those before it in this list."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "knet_jax"
ORDER = (
    *("system", "structs", "config", "segmentation", "nn"),
    *("matching", "losses", "objectives", "kernels", "knet", "model"),
    *("inference", "metrics", "tasks", "saved", "data"),
    *("analysis", "training", "app", "export", "cli"),
)
DOORS = {"__init__", "convert", "demo", "logs"}
"""What a user calls: these hand on to the rooms behind them."""


def imported(path):
    """Names of modules below the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in getattr(node, "names", ()) if isinstance(node, ast.Import)]
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("knet_jax."))


def test_imports_point_down():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__pycache__", "configs"} == {*ORDER, *DOORS}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        is_door = room in DOORS or path.name == "__main__.py"
        for used in imported(path):
            if not is_door and used != room and ORDER.index(used) > ORDER.index(room):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {used}")
    assert not wrong
