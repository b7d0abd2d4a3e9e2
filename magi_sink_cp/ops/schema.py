"""Operator schemas, derived from the NamedTuples that list a call's fields."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

_TYPES = {
    "bool": "bool",
    "bool | None": "bool?",
    "float": "float",
    "float | None": "float?",
    "int": "int",
    "int | None": "int?",
    "str": "str",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
    "tuple[int, int]": "int[2]",
    "tuple[bool, ...]": "bool[]",
}

Fields = TypeVar("Fields", bound=NamedTuple)


def schema_of(*kinds: type[Any]) -> str:
    """The schema of the NamedTuples' fields, in their order.

    The NamedTuples stand in files with ``from __future__ import annotations``: annotations are
    text.
    """
    fields = (field for kind in kinds for field in kind.__annotations__.items())
    return ", ".join(f"{_TYPES[_text(annotation)]} {name}" for name, annotation in fields)


def _text(annotation: Any) -> str:
    return getattr(annotation, "__forward_arg__", annotation)  # NamedTuple wraps it in a ForwardRef


def split_fields(kind: type[Fields], arguments: tuple[Any, ...]) -> tuple[Fields, tuple[Any, ...]]:
    """A NamedTuple made of the first operator arguments, and the arguments behind them.

    The dispatcher hands over lists where the schema says so; the fields are tuples.
    """
    size = len(kind._fields)
    values = (tuple(x) if isinstance(x, list) else x for x in arguments[:size])
    fields: Any = kind
    return fields(*values), arguments[size:]
