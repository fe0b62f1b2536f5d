"""A YAML reader for configurations: intuitive numbers, no repeated keys, and bounded work."""

from __future__ import annotations

import re
from typing import Any

import yaml

_FLOAT = re.compile(  # unambiguous, so that a long text that is not a number is rejected in linear time
    r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$|[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)$|[-+]?\.(inf|nan)$"
)
_INT = re.compile(r"[-+]?(0|[1-9][\d_]*)$|0x[\da-fA-F]+$")


def _plain_scalars(base: type[Any]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Returns the implicit resolvers of `base`, with intuitive rules for numbers.

    YAML 1.1 reads 3e-3 as text, 010 as eight, 1:30 as ninety and 2024-01-01 as a date. Here the first is a
    number, and the others are text.
    """
    replaced = {f"tag:yaml.org,2002:{kind}" for kind in ("float", "int", "timestamp")}
    rules = {
        first: [rule for rule in known if rule[0] not in replaced]
        for first, known in base.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        rules.setdefault(first, []).extend([("tag:yaml.org,2002:float", _FLOAT), ("tag:yaml.org,2002:int", _INT)])
    return rules


_MAX_NODES = 100_000
"""Most values in a file, where each alias counts as the values that it expands to."""

_MAX_DEPTH = 32
"""Most levels of nesting in a file; DeepSpeed's own configuration has five."""

_MAX_INT_CHARACTERS = 4000
"""Most characters of an integer: Python's own limit is little higher. The schema refuses more than 64 bits."""


class Loader(yaml.SafeLoader):
    """A safe YAML loader of bounded size that refuses repeated keys and keys that are not text.

    A few lines of aliases can expand to billions of values, or refer to themselves. Therefore the size of every node
    (its number of values and levels of nesting) is checked before any object is built.
    """

    yaml_implicit_resolvers = _plain_scalars(yaml.SafeLoader)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._deepest = self._nodes = 0
        self._sizes: dict[int, tuple[int, int]] = {}
        """(nodes, levels) of every completed node, by its id."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(None, None, "an alias refers to a node that contains it", mark)
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
        if levels > _MAX_DEPTH:
            problem = f"more than {_MAX_DEPTH} levels of nesting"
        elif self._nodes > _MAX_NODES:
            problem = f"more than {_MAX_NODES:,} values, counting the values that aliases expand to"
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
        except (ValueError, LookupError, AttributeError):  # raised by explicit tags such as !!int
            problem = f"the value does not suit its tag {node.tag.replace('tag:yaml.org,2002:', '!!')}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > _MAX_INT_CHARACTERS:
            problem = f"a whole number of {len(node.value):,} characters, which is too large for any setting"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            problem = None
            if key.tag not in {"tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"}:
                problem = "a key that is not text"
            elif key.value in seen:
                problem = f"the key {key.value!r} is repeated"
            if problem:
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def load(text: str) -> Any:
    """Parses a YAML text.

    Raises:
        yaml.YAMLError: The text is not valid YAML, or exceeds a size limit.
    """
    try:
        return yaml.load(text, Loader)
    except (ValueError, OverflowError) as error:  # an escaped character or a %YAML version out of range
        raise yaml.YAMLError(str(error)) from None


class Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes text which :class:`Loader` would read as a number, such as a run_dir called 1e-3."""

    yaml_implicit_resolvers = _plain_scalars(yaml.SafeDumper)
