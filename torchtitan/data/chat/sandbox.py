"""Chat templates run in a sandbox that does what transformers' does, with a bound on its work.

The bound counts loop steps and characters, not seconds: a template that stops in one loader worker
stops in all of them, so the order of the data doesn't depend on the machine's speed.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Bounds for one conversation: steps of all loops, characters of one text, bits of a power.
LOOP_STEPS = 2_000_000
LONGEST_TEXT = 20_000_000
LONGEST_POWER = 4_096


class EndlessTemplate(Exception):
    """A template went past a bound."""


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template. Raises `jinja2.TemplateSyntaxError`."""
    return _compiled(source)


def run_template(source: str, variables: dict[str, Any]) -> str:
    """Text of a template. Raises `EndlessTemplate`, and whatever the template raises."""
    template = _compiled(source)
    cast(_Environment, template.environment).steps = 0
    written, length = [], 0
    for part in template.generate(variables):
        written.append(part)
        length += len(part)
        _bounded(length, LONGEST_TEXT)
    return "".join(written)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return _Environment().from_string(source)


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`: spans for other tools; writes its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "+"))
    steps: int

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        # Jinja's own tojson escapes HTML.
        self.filters |= {"tojson": _tojson, "_steps": _steps, "_joined": _joined}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}
        del self.globals["lipsum"]  # random text, of any length

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _bounded(_bits(left) * abs(right), LONGEST_POWER)
        elif operator == "*":
            _bounded(_size(left) * _size(right), LONGEST_TEXT)
        elif hasattr(left, "__len__") and hasattr(right, "__len__"):
            _bounded(len(left) + len(right), LONGEST_TEXT)
        return super().call_binop(context, operator, left, right)


class _Bounds(NodeTransformer):
    """Pass what loops run over, and what `~` joins, through counting filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# With the context, so that the compiler doesn't fold them into constants.
@jinja2.pass_context
def _steps(context: jinja2.runtime.Context, values: Iterable) -> Iterator:
    environment = cast(_Environment, context.environment)
    for value in values:
        environment.steps += 1
        _bounded(environment.steps, LOOP_STEPS)
        yield value


@jinja2.pass_context
def _joined(context: jinja2.runtime.Context, values: list) -> str:
    texts = [str(value) for value in values]
    _bounded(sum(map(len, texts)), LONGEST_TEXT)
    return "".join(texts)


def _bounded(amount: float, bound: int) -> None:
    if amount > bound:
        raise EndlessTemplate


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _size(value: Any) -> int:
    """Length of a sequence, how often a number repeats one; 1 for anything else."""
    if hasattr(value, "__len__"):
        return len(value)
    return max(value, 1) if isinstance(value, int) else 1


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
