"""Imports run one way, and the host side of the engine and the task need no JAX (docs/architecture.md)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    "config",
    "parallel",
    "model",
    "kernels",
    "checkpoints",
    "engine",
    "reasoning",
    "evaluation",
    "reproduce",
    "train",
    "library",
    "bench",
    "aot",
    "launch",
]
# Leaves: what they may import of apr_jax themselves.
LEAVES = {
    "tasks": {"tasks", "config", "config_fields", "files", "paths"},
    "data": {"data", "tasks", "config", "files", "paths", "lock", "progress", "gguf_file"},
    "policies": {"paths"},
    "progress": set(),
    "paths": {"config", "store"},
    "store": {"config", "paths"},
    "files": {"config", "paths"},
    "lock": {"config", "files", "paths"},
    "gguf_file": {"config", "files"},
    "stopping": set(),
    "caches": set(),
    "interrupts": set(),
    "config": {"config_fields", "config_checks"},
    "config_fields": set(),
    "config_checks": {"config", "config_fields"},  # config for its types alone
    # The door asks the registries TASKS, METHODS, FAMILIES.
    "config_dict": {"config", "config_fields", "config_checks", "tasks", "reasoning", "model"},
    "entry": {"interrupts", "config", "config_fields", "config_dict", "files", "paths", "stopping", "caches"},
}
MAY_USE_LEAVES = {"reasoning", "evaluation", "reproduce", "checkpoints", "train", "library", "bench", "aot", "launch"}
NO_JAX = ["apr_jax/tasks", "apr_jax/data", "apr_jax/engine/pages.py", "apr_jax/engine/threads.py"]
NO_JAX += ["apr_jax/engine/scheduler.py", "apr_jax/engine/constraints.py", "apr_jax/bench/peers.py"]
NO_JAX += ["apr_jax/engine/driver.py", "apr_jax/engine/rollout_tree.py", "apr_jax/engine/groups.py"]
NO_JAX += [f"apr_jax/engine/{name}.py" for name in ("cancellation", "limits", "recorder", "thread_cache")]
NO_JAX += ["apr_jax/config.py", "apr_jax/config_fields.py", "apr_jax/config_checks.py"]


def _files() -> list[pathlib.Path]:
    return sorted([*ROOT.glob("apr_jax/**/*.py"), *ROOT.glob("launch/**/*.py")])


def imports(path: pathlib.Path) -> set[str]:
    """Absolute names of every module that a file imports, wherever in the file the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def _room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "launch":
        return "launch"
    return parts[1] if parts[0] == "apr_jax" and len(parts) > 1 else None


def _own_room(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "launch" else parts[1]


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: pathlib.Path):
    own = _own_room(path)
    if own == "__init__":  # the package's front door may offer anything
        return
    for module in imports(path):
        other = _room(module)
        if other is None or other == own:
            continue
        if own in LEAVES:
            assert other in LEAVES[own], f"{own} is a leaf and must not import {module}"
        elif other in ("tasks", "data", "config_dict"):
            assert own in MAY_USE_LEAVES, f"{own} must know no task, but imports {module}"
        elif other not in LEAVES:
            assert LAYERS.index(other) < LAYERS.index(own), f"{own} must not import {module}"


def test_every_room_is_placed():
    rooms = {_own_room(path) for path in _files()} - {"__init__"}
    assert rooms <= set(LAYERS) | set(LEAVES)


@pytest.mark.parametrize("place", NO_JAX)
def test_host_side_needs_no_jax(place: str):
    files = [ROOT / place] if place.endswith(".py") else list((ROOT / place).glob("**/*.py"))
    assert files
    for path in files:
        found = {name for name in imports(path) if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax")}
        assert not found, f"{path} imports {found}"


INSTRUMENTS = sorted(path for room in ("bench", "aot") for path in (ROOT / "apr_jax" / room).glob("*.py"))


@pytest.mark.parametrize("path", INSTRUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_instruments_use_public_doors(path: pathlib.Path):
    private = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if ast.unparse(node.value) not in ("self", "cls")
    ]
    assert not private


EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "code", "xmlrpc"}
OWN_CHILDREN = "apr_jax/tasks/workers.py"  # sends its own child processes functions, and reads their results
CONFIG_FILES = "apr_jax/entry.py"  # runs the file of Python that the command line names with --config


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_executes_what_a_file_or_a_peer_sends(path: pathlib.Path):
    """No pickle, eval or exec, no array of objects, and no pipes of multiprocessing but to a process's own children."""
    roots = {module.split(".")[0] for module in imports(path)}
    assert not roots & EXECUTES
    if str(path.relative_to(ROOT)) != OWN_CHILDREN:
        assert "multiprocessing" not in roots
        assert "ProcessPoolExecutor" not in path.read_text()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            allowed = {"exec", "compile"} if str(path.relative_to(ROOT)) == CONFIG_FILES else set()
            assert name not in {"eval", "exec", "compile", "__import__"} - allowed, f"line {node.lineno}"
            assert "allow_pickle" not in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}"
