"""YAML as configurations use it: numbers as everyone means them, every key once, and bounded work."""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = re.compile(  # in one way only, so that a long text that is no number takes no longer than its length
    r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$|[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)$|[-+]?\.(inf|nan)$"
)
_INT = re.compile(r"[-+]?(0|[1-9][\d_]*)$|0x[\da-fA-F]+$")


def _plain_scalars(base: type[Any]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """`base`'s rules for unquoted values, with numbers as everyone means them.

    YAML 1.1 reads 3e-3 as text, 010 as eight, 1:30 as ninety and 2024-01-01 as a date. Here the first is a
    number and the others are text.
    """
    replaced = {f"tag:yaml.org,2002:{kind}" for kind in ("float", "int", "timestamp")}
    rules = {
        first: [rule for rule in known if rule[0] not in replaced]
        for first, known in base.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        rules.setdefault(first, []).extend([("tag:yaml.org,2002:float", _FLOAT), ("tag:yaml.org,2002:int", _INT)])
    return rules


_MOST_NODES = 100_000
"""Values in a file, each alias counted as all that it stands for."""

_DEEPEST = 32
"""Levels of nesting in a file; DeepSpeed's own configuration has five."""

_LONGEST_INT = 4000
"""Characters of a whole number: Python reads little more. The schema refuses what is above 64 bits."""


class Loader(yaml.SafeLoader):
    """Safe YAML of bounded size, in which repeated keys, and keys that are not text, are errors.

    A few lines of aliases can stand for billions of values, or for themselves. So every node's size (values in it,
    and levels of nesting) is known before anything is built.
    """

    yaml_implicit_resolvers = _plain_scalars(yaml.SafeLoader)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._deepest = self._nodes = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        """(nodes, levels) of every complete node, by its id."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "an alias stands for something that it is in", mark)
            nodes, levels = self._sizes[id(node)]
            self._nodes += nodes
            self._check_size(self._depth + levels, mark)
            self._deepest = max(self._deepest, self._depth + levels)
            return node
        outside, before = self._deepest, self._nodes
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        self._deepest = self._depth
        self._check_size(self._depth, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._nodes - before, self._deepest - self._depth
        self._deepest = max(self._deepest, outside)
        return node

    def _check_size(self, levels: int, mark: yaml.Mark) -> None:
        problem = None
        if levels > _DEEPEST:
            problem = f"more than {_DEEPEST} levels of nesting"
        elif self._nodes > _MOST_NODES:
            problem = f"more than {_MOST_NODES:,} values, each alias counted as all that it stands for"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, mark)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        try:
            value.encode()
        except UnicodeEncodeError:
            problem = "half of a surrogate pair"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # what an explicit tag such as !!int runs into
            problem = f"the value does not suit its tag {node.tag.replace('tag:yaml.org,2002:', '!!')}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _LONGEST_INT:
            problem = f"a whole number of {len(node.value):,} characters, which no setting takes"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if key.tag not in {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"}:
                problem = "a key that is not text"
            elif key.value in seen:
                problem = f"the key {key.value!r} is there twice"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def load(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: It is none, or not one of bounded size.
    """
    try:
        return yaml.load(text, Loader)
    except (ValueError, OverflowError) as error:  # of an escaped character or a %YAML line that is out of range
        raise yaml.YAMLError(str(error)) from None


class Dumper(yaml.SafeDumper):
    """Quotes what :class:`Loader` would not read back as text, such as a run_dir called 1e-3."""

    yaml_implicit_resolvers = _plain_scalars(yaml.SafeDumper)
