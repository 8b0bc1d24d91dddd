"""The rooms of the sources: which may import which, from the bottom up, and no circle between files."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

SOURCES = Path(__file__).parents[2] / "src"
# A file imports from its own room and from lower ones; ops and policies do not know each other.
HEIGHT = {
    "errors": 0,
    "checks": 1,
    "kernels": 2,
    "gauges": 3,
    "ops": 4,
    "policies": 4,
    "bindings": 5,
    "lib": 6,
}
GROUP = re.compile(r"([\w:]+::)\{([^{}]*)\}")


def file_of(*names):
    """Where a path of modules leads to. A file and the folder of its name are one."""
    folder = SOURCES
    for name in names:
        if (folder / f"{name}.rs").is_file():
            return folder / f"{name}.rs"
        if not (folder / name).is_dir():
            break
        folder /= name
    return folder / ("lib.rs" if folder == SOURCES else "mod.rs")


def imports(source):
    """What the paths of a source lead to, and what a mod.rs declares. The mod.rs of its own folders is no
    import: that gathers what is in them."""
    here = source.relative_to(SOURCES).with_suffix("").parts
    here = here[:-1] if here[-1] in ("mod", "lib") else here
    text = re.sub(r"//.*", "", source.read_text())
    while group := GROUP.search(text):
        each = (group[1] + name.strip() for name in group[2].split(","))
        text = text.replace(group[0], ", ".join(each))
    found = {file_of(*here, child) for child in re.findall(r"\bmod (\w+);", text)}
    for path in re.findall(r"\b(?:crate|super)(?:::\w+)+", text):
        first, *rest = names = path.split("::")
        up = names.count("super")
        found.add(file_of(*(rest if first == "crate" else (*here[:-up], *names[up:]))))
    return file_of(*here), {file for file in found if file != file_of(*here) and not gathers(file, source)}


def gathers(file, source):
    return file.name in ("mod.rs", "lib.rs") and file.parent in source.parents


def graph():
    found = {}
    for source in SOURCES.rglob("*.rs"):
        file, imported = imports(source)
        found.setdefault(file, set()).update(imported)
    return found


def room(file):
    return file.relative_to(SOURCES).with_suffix("").parts[0]


def test_a_rust_file_imports_from_its_own_room_and_from_lower_ones():
    upward = [
        f"{file.relative_to(SOURCES)} imports {imported.relative_to(SOURCES)}"
        for file, imports in graph().items()
        for imported in imports
        if room(imported) != room(file) and HEIGHT[room(imported)] >= HEIGHT[room(file)]
    ]
    assert not upward


def test_no_rust_files_import_each_other_in_a_circle():
    TopologicalSorter(graph()).prepare()


PACKAGE = Path(__file__).parents[2] / "python" / "increlora_rs"
# From the bottom up; rooms of one line do not know each other.
ORDER = (
    ("_core", "_torch_check"),
    ("support",),
    ("resizing",),
    ("gauges",),
    ("ops",),
    ("contract",),
    ("layers",),
    ("training", "saved"),
    ("methods",),
    ("reports",),
    ("tuner",),
    ("compare", "demo"),
    ("cli", "report"),
    ("__init__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules_of(source):
    """The modules of the package that a source imports, also for types alone, as paths of names."""
    here = source.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            base = tuple(filter(None, base))
            for name in node.names:
                inside = PACKAGE.joinpath(*base, name.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").exists() or name.name == "_core"
                yield (*base, name.name) if is_module or not base else base


def python_file(names):
    path = PACKAGE.joinpath(*names)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_a_python_file_imports_from_its_own_room_and_from_lower_ones():
    upward = []
    for source in PACKAGE.rglob("*.py"):
        own = source.relative_to(PACKAGE).with_suffix("").parts[0]
        for names in modules_of(source):
            if names[0] != own and LEVEL[names[0]] >= LEVEL[own]:
                upward.append(f"{source.relative_to(PACKAGE)} imports {'.'.join(names)}")
    assert not upward


def test_no_python_files_import_each_other_in_a_circle():
    files = {source: set() for source in PACKAGE.rglob("*.py")}
    for source, imported in files.items():
        imported.update(file for names in modules_of(source) if (file := python_file(names)) in files)
        # What gathers a room is no import of the files that are gathered.
        imported.discard(source)
    TopologicalSorter(files).prepare()


def test_rooms_below_the_methods_name_none_of_them():
    named = [
        f"{source.relative_to(PACKAGE)} imports {'.'.join(names)}"
        for room in ("training", "saved", "layers", "ops", "gauges", "contract")
        for source in (PACKAGE / room).rglob("*.py")
        for names in modules_of(source)
        if names[0] == "methods"
    ]
    assert not named
