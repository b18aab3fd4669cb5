"""Pydantic models whose JSON Schema takes the fields' descriptions from the docstrings below them."""

import ast
import inspect
from collections.abc import Mapping
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler


class Frozen(BaseModel):
    """
    A frozen model for values between processes; unknown fields are errors.

    Its JSON Schema describes the fields.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Pydantic's `use_attribute_docstrings` parses the source at every start, which is slow.
    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the model's schema with a description of each field."""
        made = handler(core_schema)
        fields = handler.resolve_ref_schema(made).get("properties", {})
        for name, text in field_docs(cls).items():
            if name in fields:
                fields[name]["description"] = text
        return made


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field of a model, including its parents' fields."""
    docs = {}
    for parent in reversed(model.__mro__):
        if issubclass(parent, Frozen):
            (tree,) = ast.parse(dedent(inspect.getsource(parent))).body
            for field, below in pairwise(cast("ast.ClassDef", tree).body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        docs[name] = inspect.cleandoc(text)
    return docs


def known_fields(model: type[BaseModel], value: Mapping[str, Any]) -> dict[str, Any]:
    """Return `value` without unknown fields, in nested models too, and without unknown names in lists of literals."""
    known = {}
    for name in model.model_fields.keys() & value.keys():
        kind: Any = model.model_fields[name].annotation
        known[name] = value[name]
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value[name], Mapping):
            known[name] = known_fields(kind, value[name])
        elif (parts := get_args(kind)) and get_origin(parts[0]) is Literal and isinstance(value[name], (list, tuple)):
            known[name] = [item for item in value[name] if item in get_args(parts[0])]
    return known
