"""What every test shares: the CPU, a compilation cache, and the reference's data where it exists."""

import os
import sys
import types
from pathlib import Path

import pytest
from devices import COMPILE_FAST

ROOT = Path(__file__).parents[1]

# Before the first import of jax. Tests are written for the CPU; JAX_PLATFORMS=cuda,cpu runs them on
# a GPU. Programs that took a while to compile are kept for the next run, whatever its Python.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("XLA_FLAGS", COMPILE_FAST)


def _shared(name: str) -> Path:
    folder = ROOT.parent / "shared" / name
    if not folder.exists():
        pytest.skip(f"{folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of numbers that the PyTorch reference produced."""
    return _shared("fixtures")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """A small dataset of real pictures in COCO's own layout."""
    return _shared("data/coco_mini")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Folders of tiny models, by task."""
    import tiny_runs

    folder = tmp_path_factory.mktemp("tiny_models")
    return {task: tiny_runs.write(folder / task, task) for task in tiny_runs.OF_TASKS}


@pytest.fixture(scope="session")
def segmenters(tiny_models) -> dict:
    """Segmenters of the tiny models, by task. A picture of 64 x 96 shares one program a task."""
    from knet_jax.app.segmenter import Segmenter
    from knet_jax.saved.models import open_model

    return {task: Segmenter(open_model(path)) for task, path in tiny_models.items()}


@pytest.fixture
def predict_files(monkeypatch, segmenters):
    """`predict_files` of the library, which takes the name of a task for a model."""
    from knet_jax.app import predict

    monkeypatch.setattr(predict, "load", lambda task, *_, **__: segmenters[task])
    return predict.predict_files


@pytest.fixture
def torch_names(monkeypatch):
    """Makes something that pickles as `module.name`: torch_names("torch", "FloatStorage")."""
    modules = {}

    def fake(module, name):
        parts = module.split(".")
        for path in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if path not in modules:
                modules[path] = types.ModuleType(path)
                monkeypatch.setitem(sys.modules, path, modules[path])
        if not hasattr(modules[module], name):
            made = type(name, (), {"__module__": module, "__qualname__": name})
            setattr(modules[module], name, made)
        return getattr(modules[module], name)

    return fake
