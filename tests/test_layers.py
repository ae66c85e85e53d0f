"""The direction of imports, and other properties of the source tree as a whole."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The longest prefix of a module's name gives its floor. A module imports from its own floor or from below, and no
# circle of imports is allowed anywhere.
FLOORS = {
    "prismatic": 0,  # the package's own __init__: the version
    "prismatic.vla": 0,
    "prismatic.significance": 0,
    "prismatic.clustered_trials": 0,
    "prismatic.command_line": 0,
    "prismatic.command_status": 0,
    "prismatic.atomic_files": 0,
    "prismatic.machine": 0,
    "prismatic.flag_help": 0,
    "prismatic.lazy_tensors": 0,
    "prismatic.stored_files": 0,
    "prismatic.deferred_imports": 0,
    "prismatic.libraries": 0,
    "prismatic.vla.datasets": 1,
    "prismatic.models": 1,
    "prismatic.extern": 2,
    "prismatic.checkpoints": 3,
    "prismatic.inference": 3,
    "prismatic.policy": 4,
    "prismatic.pictures": 4,
    "prismatic.report": 4,
    "prismatic.benchmark": 5,
    "prismatic.recordings": 5,
    "prismatic.serving": 5,
    "prismatic.training": 5,
    "experiments": 6,
    "experiments.robot.libero.results": 6,
    "experiments.robot.libero.comparison": 7,
    "experiments.robot.libero.reports": 8,
    "experiments.robot.libero.simulator": 7,
    "experiments.robot.libero.policies": 8,
    "experiments.robot.libero.demonstrations": 8,
    "experiments.robot.libero.driving": 8,
    "experiments.robot.libero.rollouts": 9,
    "experiments.robot.libero.evaluation": 10,
    "experiments.robot.libero.play": 10,
    "experiments.robot.libero.looks": 11,
    "experiments.robot.libero.run_libero_eval": 13,
    "experiments.robot.libero.regenerate_libero_dataset": 13,
    "lightvla": 12,
    "scripts": 14,
    "vla-scripts": 13,
}
FOLDERS = ("prismatic", "experiments", "lightvla", "scripts", "vla-scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def prefix_of(module: str) -> str:
    """The longest entry of FLOORS that `module` lies under."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in FLOORS and (prefix != "prismatic" or length == len(parts)):
            return prefix
    raise AssertionError(f"{module} has no floor: give it one in FLOORS and in CONTRIBUTING.md, or move it")


def statements(tree: ast.Module, for_types: bool) -> Iterator[ast.AST]:
    """All nodes of a file; without `for_types`, those under `if TYPE_CHECKING:`, which never run, are left out."""
    unread = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types
        for statement in node.body
        for child in ast.walk(statement)
    }
    yield from (node for node in ast.walk(tree) if node not in unread)


def imported_modules(path: Path, for_types: bool = True) -> Iterator[str]:
    """Modules of this repository that a file imports, wherever in the file the statement stands."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in statements(ast.parse(path.read_text()), for_types):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from package import module` imports the module, `from module import name` the module itself.
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in FOLDERS)


def violations(module: str, imports: Iterator[str]) -> list[str]:
    own = FLOORS[prefix_of(module)]
    return [
        f"{module} (F{own}) imports {name} (F{FLOORS[prefix_of(name)]})"
        for name in imports
        if FLOORS[prefix_of(name)] > own
    ]


def test_imports_go_downward_only() -> None:
    found = [line for name, path in MODULES.items() for line in violations(name, imported_modules(path))]
    assert not found, "\n".join(found)


def test_an_upward_import_is_found() -> None:
    assert violations("prismatic.vla.images", iter(["prismatic.models.film"]))
    assert not violations("prismatic.models.film", iter(["prismatic.vla.images"]))
    assert violations("prismatic.models.film", iter(["prismatic.policy"]))


def test_every_imported_module_of_ours_exists() -> None:
    missing = [
        f"{name} imports {target}"
        for name, path in MODULES.items()
        for target in imported_modules(path)
        if target not in MODULES and not (ROOT / target.replace(".", "/")).is_dir()
    ]
    assert not missing, "\n".join(missing)


def find_circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports as a list of modules, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if circle := visit(target, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(edges) if (circle := visit(module, []))), [])


def test_no_circles() -> None:
    circle = find_circle(
        {name: set(imported_modules(path, for_types=False)) - {name} for name, path in MODULES.items()}
    )
    assert not circle, " -> ".join(circle)


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name == "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_init_files_are_empty(path: Path) -> None:
    statements = ast.parse(path.read_text()).body
    if module_name(path) == "prismatic":
        assert [ast.unparse(statement).partition(" = ")[0] for statement in statements] == ["__version__"]
    else:
        assert not statements, f"{path} must be empty: importing a package does nothing"


def test_every_package_folder_has_an_init_file() -> None:
    """setuptools finds packages by their `__init__.py`; a folder without one is missing from an installation."""
    folders = {
        path.parent for path in SOURCES if path.relative_to(ROOT).parts[0] in ("prismatic", "experiments", "lightvla")
    }
    missing = [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert not missing, missing


def test_no_print_in_the_library() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        if name.split(".")[0] == "prismatic"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found, f"use logging instead of print: {found}"


def test_tensorflow_stays_out_of_the_library() -> None:
    found = [
        name
        for name, path in MODULES.items()
        if name.split(".")[0] == "prismatic"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for imported in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if imported.split(".")[0] in {"tensorflow", "tensorflow_datasets", "robosuite", "libero", "mujoco"}
    ]
    assert not found, f"neither TensorFlow nor the simulator is imported by the library: {found}"


MOST_LINES = 400
MOST_MODULES = 12
FULLER = {"prismatic/models": 17, "prismatic/training": 17, "scripts": 16, "scripts/dev": 17}
"""Folders that hold more modules than `MOST_MODULES`; the numbers may only fall.

`training`'s rose by three: `loading` out of `build`, which was near its most lines, `health` when a run learnt to look
after itself, and `parts`, since a policy is put together twice, for the plan without weights and to train. `scripts`
got measurements of saving, of memory, of asynchronous chunks and of the policy server in `dev`, and itself holds one
file per user's command, of which `study` and `looks` are the last.
"""


def test_no_file_has_grown_too_long() -> None:
    files = [path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert "tests/test_layers.py" in lengths
    too_long = {name: lines for name, lines in lengths.items() if lines > MOST_LINES}
    assert not too_long, f"split what has over {MOST_LINES} lines: {too_long}"


def test_no_folder_holds_too_many_modules() -> None:
    held = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py")
    too_full = {folder: count for folder, count in held.items() if count > FULLER.get(folder, MOST_MODULES)}
    assert not too_full, f"cut what holds over {MOST_MODULES} modules: {too_full}"
    assert {folder: held[folder] for folder in FULLER} == FULLER, "lower the number, or take the folder out of the list"
