"""Models whose fields are described by the docstrings below them; these are read where a JSON Schema is made."""

import ast
import inspect
from collections.abc import Mapping
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler


class Frozen(BaseModel):
    """
    A value that crosses a process border: unknown fields are a defect, not something to skip.

    It says in its JSON Schema what its fields are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Pydantic's own `use_attribute_docstrings` parses the source at every start, which takes longer than all else.
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
    """Return the docstring below each field of a model, those of its parents among them."""
    found = {}
    for one in reversed(model.__mro__):
        if issubclass(one, Frozen):
            (tree,) = ast.parse(dedent(inspect.getsource(one))).body
            for field, below in pairwise(cast("ast.ClassDef", tree).body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = inspect.cleandoc(text)
    return found


def known_fields(model: type[BaseModel], value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are fields of a model, and of the models in it, without names that lists have no more."""
    found = {}
    for name in model.model_fields.keys() & value.keys():
        kind: Any = model.model_fields[name].annotation
        found[name] = value[name]
        if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(value[name], Mapping):
            found[name] = known_fields(kind, value[name])
        elif (parts := get_args(kind)) and get_origin(parts[0]) is Literal and isinstance(value[name], (list, tuple)):
            found[name] = [one for one in value[name] if one in get_args(parts[0])]
    return found
