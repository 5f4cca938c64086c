"""Apply the change of docs/upstream.md to a checkout of EasyEdit: methods of installed packages, found by entry points.

    python examples/upstream.py ~/EasyEdit && git -C ~/EasyEdit diff

Places are found by the names of what is there, in the syntax tree. Where one of them is missing nothing is written; a second run
changes nothing.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PLUGINS = '''"""Editing methods of installed packages, and what editors have to know of a method.

A package declares a method as an entry point of the group "easyeditor.methods": its name, and the function that applies it. The
function may have attributes: `hparams`, its class of hyperparameters, which `easyeditor` then has too; `batchable`, whether several
requests can share an edit (False); `padding_side` of the tokenizer that it is called with ("left").
"""

import logging
from importlib.metadata import entry_points

GROUP = "easyeditor.methods"
RIGHT_PADDED = frozenset(RIGHT)  # of the methods here


def add_installed(table):
    """Add to a table of methods those that it lacks; returns their classes of hyperparameters by name."""
    classes = {}
    for point in entry_points(group=GROUP):
        if point.name in table:
            continue
        try:
            table[point.name] = point.load()
        except Exception:  # one broken package must not take every method away
            logging.getLogger(__name__).exception("the method %s (%s) cannot be loaded", point.name, point.value)
            continue
        kind = getattr(table[point.name], "hparams", None)
        if kind is not None:
            classes[kind.__name__] = kind
    return classes


def takes_batches(name):
    """Whether an installed package's method says so."""
    return getattr(_method(name), "batchable", False)


def pads_right(name):
    """Whether a method wants its tokenizer to pad on the right."""
    return name in RIGHT_PADDED or getattr(_method(name), "padding_side", "left") == "right"


def _method(name):
    from .alg_dict import ALG_DICT

    return ALG_DICT.get(name)
'''


class Refused(Exception):
    """A place was not found."""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of https://github.com/zjunlp/EasyEdit")
    home = parser.parse_args(argv).checkout / "easyeditor"
    try:
        written = changed(home)
    except (OSError, SyntaxError, Refused) as problem:
        print(f"{home.parent} is not the EasyEdit that this change is for: {problem}; nothing was changed", file=sys.stderr)
        return 1
    for path, content in written.items():
        path.write_bytes(content)
        print(f"{path}: {'new' if path.name == 'plugins.py' else 'changed'}")
    print(f"{len(written)} files of {home.parent} were changed" if written else f"{home.parent} has the change already")
    return 0


def changed(home: Path) -> dict[Path, bytes]:
    """Every file that is to be written, with what is to be in it; none when the change is there already."""
    plugins, methods = home / "util" / "plugins.py", home / "util" / "alg_dict.py"
    batches, editor = home / "editors" / "batch_editor.py", home / "editors" / "editor.py"
    sources = {path: path.read_bytes() for path in (methods, batches, editor)}
    if plugins.is_file():
        if missing := [path.name for path, source in sources.items() if b"plugins import" not in source]:
            raise Refused(f"it has a util/plugins.py that {' and '.join(missing)} know nothing of")
        return {}
    names, conditions = padded(editor, sources[editor])
    return {
        plugins: PLUGINS.replace("RIGHT)", f"{sorted(names)!r})").encode(),
        methods: with_import(table(methods, sources[methods]), "from .plugins import add_installed"),
        batches: with_import(batchable(batches, sources[batches]), "from ..util.plugins import takes_batches"),
        editor: with_import(conditions, "from ..util.plugins import pads_right"),
    }


def table(path: Path, source: bytes) -> bytes:
    """The table of methods, and behind it those of installed packages."""
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    found = [node for node in assigned if getattr(node.targets[0], "id", "") == "ALG_DICT"]
    node = only(found, "a table ALG_DICT", path)
    return replaced(source, [(node, segment(source, node) + b"\n\nglobals().update(add_installed(ALG_DICT))")])


def batchable(path: Path, source: bytes) -> bytes:
    """`is_batchable_method` of the enum's members, and of whatever an installed method says of itself."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == "BatchEditor"]
    kind = only(found, "a class BatchEditor", path)
    found = [node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name == "is_batchable_method"]
    function = only(found, "a method is_batchable_method", path)
    members = {node.targets[0].id for node in kind.body if isinstance(node, ast.Assign)}
    told = {node.value.attr for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == "value"}
    if told != members:
        raise Refused(f"is_batchable_method in {path.name} does not name every member of BatchEditor")
    name = function.args.args[-1].arg
    body = f"return takes_batches({name}) or {name} in {{member.value for member in BatchEditor}}"
    node = only(function.body, "a single statement in is_batchable_method", path)
    return replaced(source, [(node, body.encode())])


def padded(path: Path, source: bytes) -> tuple[set[str], bytes]:
    """The methods whose tokenizer pads on the right, and the editor asking for that instead of naming them."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == "BaseEditor"]
    lists = list(name_lists(only(found, "a class BaseEditor", path)))
    names = {tuple(sorted({item.value for item in getattr(node.comparators[0], "elts", ())})) for node in lists}
    if {type(node.ops[0]) for node in lists} != {ast.In, ast.NotIn} or len(names) != 1:
        raise Refused(f"{path.name} has no two conditions of BaseEditor that list the same methods by name")
    asked = {ast.In: b"pads_right(%s)", ast.NotIn: b"not pads_right(%s)"}
    new = [(node, asked[type(node.ops[0])] % segment(source, node.left)) for node in lists]
    return set(names.pop()), replaced(source, new)


def name_lists(tree: ast.AST) -> Iterator[ast.Compare]:
    """The `....alg_name in [...]`, or not in, on which a padding side is set."""
    set_there = (node for node in ast.walk(tree) if isinstance(node, ast.If) and sets(node.body, "padding_side"))
    for part in (part for node in set_there for part in ast.walk(node.test)):
        if isinstance(part, ast.Compare) and attribute(part.left, "alg_name") and isinstance(part.ops[0], ast.In | ast.NotIn):
            yield part


# ---- sources


def with_import(source: bytes, line: str) -> bytes:
    """The source with one more import behind its last one."""
    node = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)][-1]
    return replaced(source, [(node, segment(source, node) + f"\n{line}".encode())])


def only(found: list, what: str, path: Path):
    if len(found) != 1:
        raise Refused(f"{path.name} has {len(found) or 'no'} of what there should be once, {what}")
    return found[0]


def sets(body: list[ast.stmt], name: str) -> bool:
    """Whether a statement of the block assigns to an attribute of that name."""
    return any(attribute(target, name) for node in body if isinstance(node, ast.Assign) for target in node.targets)


def attribute(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == name


def span(source: bytes, node: ast.AST) -> tuple[int, int]:
    """Where a node's text begins and ends, in bytes, as the syntax tree counts columns."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset


def segment(source: bytes, node: ast.AST) -> bytes:
    start, end = span(source, node)
    return source[start:end]


def replaced(source: bytes, new: list[tuple[ast.AST, bytes]]) -> bytes:
    """The source with other texts in the place of nodes that do not overlap."""
    for node, text in sorted(new, key=lambda pair: -span(source, pair[0])[0]):
        start, end = span(source, node)
        source = source[:start] + text + source[end:]
    return source


if __name__ == "__main__":
    sys.exit(main())
