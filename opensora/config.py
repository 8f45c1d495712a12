"""Typed configs: YAML with inheritance and dotted overrides -> frozen pydantic models.

A config is data: nothing in it is executed. Every component keeps its own model beside itself and
alternatives are chosen by a `kind:` field. Unknown keys, wrong types and impossible values are
errors that name the key, the file and the nearest thing that exists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from opensora.errors import UsageError, closest, did_you_mean


class Config(pydantic.BaseModel):
    """Base of every component's config: immutable, and strict about unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _over_defaults(cls, data: Any) -> Any:
        """Lay what is given over a part's default, so that naming one key keeps the others."""
        if not isinstance(data, dict):
            return data
        parts = {
            name: merge(field.default.model_dump(), data[name])
            for name, field in cls.model_fields.items()
            if isinstance(field.default, Config) and isinstance(data.get(name), dict)
        }
        return {**data, **parts}


AnyConfig = TypeVar("AnyConfig", bound=Config)
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 core scalars, and a key given twice is an error.

    PyYAML speaks YAML 1.1, where `no` is False, `1e-4` a string, `010` eight, `16:9` the number
    969 and `2026-01-02` a date; all of them surprise in configs.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key}' is given twice", key_node.start_mark
                    )
                seen.append(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node)).lower()
        return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0].endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$
            |^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$""",
        re.X,
    ),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text with the safe loader.

    Raises:
        UsageError: naming `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise UsageError(f"{where} is not valid YAML: {detail}") from None


def merge(base: Tree, change: Tree) -> Tree:
    """`change` laid over `base`, mapping by mapping; lists and scalars replace.

    Where a mapping changes its `kind`, it replaces the base's mapping whole, because the keys of
    one kind mean nothing to another.
    """
    if "kind" in change and "kind" in base and change["kind"] != base["kind"]:
        return dict(change)
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value)
        merged[key] = value
    return merged


def read(path: str | Path, _seen: tuple[Path, ...] = ()) -> Tree:
    """A YAML file and everything it inherits through `base:` as one plain tree.

    `base` is a path, or a list of paths, relative to the file that names it; later ones win.

    Raises:
        UsageError: for a missing file, a circle of bases, or a file that is not a mapping.
    """
    path = Path(path)
    if path.resolve() in _seen:
        chain = " -> ".join(str(p) for p in (*_seen, path.resolve()))
        raise UsageError(f"{path}: its `base:` files form a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"config {path} is not UTF-8 text: {error}") from None
    except OSError as error:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        reason = f"config {path} cannot be read ({error.strerror})."
        raise UsageError(reason + did_you_mean(path.name, siblings)) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: a config is a mapping of keys, found {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UsageError(f"{path}: `base:` is a path or a list of paths, found {bases!r}")
    merged: Tree = {}
    for base in bases:
        merged = merge(merged, read(path.parent / base, (*_seen, path.resolve())))
    return merge(merged, tree)


def override(tree: Tree, assignments: Sequence[str]) -> Tree:
    """`tree` with `key.sub=value` assignments applied in order; values are parsed as YAML.

    A number addresses an entry of a list or a key that is a number: `buckets.256px.17=1.0`.

    Raises:
        UsageError: for an assignment without '=', or a path through something that has no keys.
    """
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise UsageError(
                f"'{assignment}' is not an override: write key.sub=value, for example optim.lr=1e-4"
            )
        value = parse_yaml(text, f"the value of '{name}'") if text.strip() else ""
        tree = _assign(tree, name.strip().lstrip("-").split("."), value, assignment)
    return tree


def _assign(node: Any, keys: list[str], value: Any, assignment: str) -> Any:
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise UsageError(f"'{assignment}': '{head}' is not one of the {len(node)} list entries")
        position = int(head)
        entry = _assign(node[position], rest, value, assignment)
        return [*node[:position], entry, *node[position + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise UsageError(f"'{assignment}': '{head}' is below a value ({node!r}), not a mapping")
    node = node or {}
    key = next((k for k in node if str(k) == head), head)
    changed = _assign(node.get(key), rest, value, assignment)
    if key == "kind":
        return merge(node, {"kind": changed})
    return {**node, key: changed}


def validate(schema: type[AnyConfig], tree: Tree, *, where: str) -> AnyConfig:
    """`tree` as a frozen `schema`, or one error that lists every offence with its mend.

    Args:
        where: the file or command that the tree came from, for the message.

    Raises:
        UsageError: unknown keys (with the nearest name), missing keys, wrong types or values.
    """
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        nodes = list(_keys_and_nodes(schema))
        lines = [_explain(item, nodes, tree) for item in error.errors()]
    raise UsageError(f"{where}: " + "; ".join(dict.fromkeys(lines)))


def load(schema: type[AnyConfig], path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read, inherit, override and validate a config file: the one call that commands make."""
    return validate(schema, override(read(path), overrides), where=str(path))


def to_json(config: Config) -> str:
    """The resolved config as JSON, every default written out."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def from_json(schema: type[AnyConfig], path: str | Path) -> AnyConfig:
    """A config as `to_json` wrote it.

    Raises:
        UsageError: the file is missing, not JSON, or does not fit the schema.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"config {path} cannot be read: {error}") from None
    return validate(schema, tree, where=str(path))


def dotted_keys(schema: type[Config]) -> Iterator[str]:
    """Every key that the schema knows, as dotted paths through its JSON schema."""
    return (path for path, _ in _keys_and_nodes(schema))


def _keys_and_nodes(schema: type[Config]) -> Iterator[tuple[str, Tree]]:
    document = schema.model_json_schema()
    definitions = document.get("$defs", {})

    def walk(node: Tree, prefix: str, depth: int) -> Iterator[tuple[str, Tree]]:
        if depth > 12:
            return
        if "$ref" in node:
            yield from walk(definitions[node["$ref"].rsplit("/", 1)[1]], prefix, depth + 1)
        for choice in (*node.get("anyOf", ()), *node.get("oneOf", ())):
            yield from walk(choice, prefix, depth + 1)
        if "items" in node and isinstance(node["items"], dict):
            yield from walk(node["items"], f"{prefix}0.", depth + 1)
        for name, child in node.get("properties", {}).items():
            yield prefix + name, child
            yield from walk(child, f"{prefix}{name}.", depth + 1)

    return walk(document, "", 0)


def _explain(item: Any, nodes: list[tuple[str, Tree]], tree: Tree) -> str:
    """One pydantic offence as a sentence: the key, what is wrong, and the mend."""
    paths = sorted({path for path, _ in nodes})
    keys = _written_keys(item["loc"], tree, missing=item["type"] == "missing")
    name = ".".join(keys)
    context = item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key '{name}'." + _suggest(keys, paths)
        case "missing":
            return f"key '{name}' is missing"
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in str(context.get("expected_tags", "")).split(",")]
            found = str(context.get("tag"))
            return f"'{f'{name}.kind'.lstrip('.')}' is '{found}'." + did_you_mean(found, tags)
        case "union_tag_not_found":
            kinds = {node.get("const") for path, node in nodes if path == _numbered(keys, "kind")}
            choice = " or ".join(sorted(str(kind) for kind in kinds if kind is not None))
            return f"'{f'{name}.kind'.lstrip('.')}' is missing: {choice}"
    message = item["msg"].removeprefix("Value error, ")
    found = item.get("input")
    value = f" (found {found!r})" if isinstance(found, str | int | float | bool | None) else ""
    return f"'{name}': {message}{value}" if name else message


def _written_keys(location: Sequence[str | int], tree: Any, *, missing: bool) -> list[str]:
    """The part of a pydantic location that the user wrote.

    Pydantic also puts the tags and types of unions into it; those are no keys of the tree.
    """
    keys: list[str] = []
    node: Any = tree
    tagged = False
    for position, key in enumerate(location):
        # A kind may be spelt like one of its own keys; the tag comes first.
        if not tagged and isinstance(node, dict) and node.get("kind") == key:
            tagged = True
            continue
        if _holds(node, key):
            node, tagged = node[key], False
        elif not (missing and position == len(location) - 1):
            continue
        keys.append(str(key))
    return keys


def _holds(node: Any, key: str | int) -> bool:
    if isinstance(node, dict):
        return key in node
    return isinstance(node, list) and isinstance(key, int) and key < len(node)


def _numbered(keys: list[str], last: str) -> str:
    """The dotted path as `dotted_keys` writes it, where every list index is 0."""
    return ".".join([*("0" if key.isdigit() else key for key in keys), last])


def _suggest(keys: list[str], paths: list[str]) -> str:
    """A mend for an unknown key: a sibling spelt like it, or the same name elsewhere."""
    prefix = _numbered(keys[:-1], "")
    siblings = [path[len(prefix) :] for path in paths if path.startswith(prefix)]
    siblings = [sibling for sibling in siblings if "." not in sibling]
    if closest(keys[-1], siblings) is None:
        elsewhere = [path for path in paths if path.rsplit(".", 1)[-1] == keys[-1]]
        if elsewhere:
            return f" Did you mean '{elsewhere[0]}'?"
    return did_you_mean(keys[-1], siblings)
