"""Writes the OpenAPI documents of the services that answer HTTP: their RPCs, compatibility routes and probes.

    python -m tools.openapi

A document lies beside the routes that it describes, and the service serves it. `make protos` calls this. Schemas of
messages come from their descriptors, descriptions from the comments of the protos, which the stubs (.pyi) keep.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from perigee.json_codec import BASE64_SUFFIX, INT_RANGES, SPECIAL_FLOATS, Field, enum_names, fields_of
from perigee.reward.v1.reward_pb2_grpc import RewardServiceServicer
from perigee.rollout.v1.rollout_pb2_grpc import RolloutServiceServicer
from perigee.sandbox.v1.sandbox_pb2_grpc import SandboxServiceServicer
from perigee.trainer.v1.trainer_pb2_grpc import TrainerServiceServicer
from services.kit.http import CompatRouter, HttpRoute, build_gateway
from services.kit.http.errors import ERROR_SCHEMA, STATUS_BY_CODE
from services.kit.http.middleware import NDJSON
from services.reward import http_routes as reward
from services.rollout import http_routes as rollout
from services.rollout import openai_api
from services.sandbox import service as sandbox
from services.trainer import http_routes as trainer

Schema = dict[str, Any]

_REFERENCE = "#/components/schemas/"
_ERROR = "Error"


def describe_routes(routes: Sequence[HttpRoute], servicer: type) -> tuple[Schema, Schema]:
    """Returns the paths and the schemas of all routes, described by the comments of the generated class `servicer`.

    Schemas go by the messages' names. Raises ValueError where two packages have messages of one name.
    """
    requests = set(reachable(descriptor_of(route.request) for route in routes))
    responses = set(reachable(descriptor_of(route.response) for route in routes))
    described = {
        message.full_name: (_name(message), message_schema(message, is_request=message in requests))
        for message in requests | responses
    }
    for message in requests | responses:
        for enum in filter(None, (field.value.enum_type for field in fields_of(message))):
            described[enum.full_name] = (_name(enum), enum_schema(enum))
    for route in routes:
        if route.takes_body and route.path_fields:
            body = message_schema(descriptor_of(route.request), is_request=True, without=route.path_fields)
            described[f"{route.rpc}Body"] = (f"{route.rpc}Body", body)
    described[_ERROR] = (_ERROR, ERROR_SCHEMA)
    schemas = dict(described[full_name] for full_name in sorted(described))
    if len(schemas) < len(described):
        raise ValueError(f"two of these go by one name: {', '.join(sorted(described))}")
    paths: Schema = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, servicer)
    return paths, schemas


def descriptor_of(message_class: type[Message]) -> Descriptor:
    """Returns the descriptor of a message's class."""
    return cast(Descriptor, message_class.DESCRIPTOR)


def reachable(descriptors: Iterable[Descriptor]) -> Iterator[Descriptor]:
    """Yields the messages and all that they hold, each once."""
    seen: set[Descriptor] = set()
    waiting = list(descriptors)
    while waiting:
        descriptor = waiting.pop()
        if descriptor in seen:
            continue
        seen.add(descriptor)
        yield descriptor
        waiting += [field.value.message_type for field in fields_of(descriptor) if field.value.message_type is not None]


def message_schema(descriptor: Descriptor, *, is_request: bool, without: Sequence[str] = ()) -> Schema:
    """Returns the schema of one message; in a response, the fields that are always written are required."""
    comments = comments_of(_module(descriptor))
    properties: Schema = {}
    required: list[str] = []
    groups: dict[str, list[str]] = {}
    for field in fields_of(descriptor):
        if field.name in without:
            continue
        if field.oneof is not None:
            groups.setdefault(field.oneof, []).append(field.name)
        comment = comments.get(f"{_name(descriptor)}.{field.name}", "")
        if field.is_bytes:
            properties[field.name] = _shaped(field, {"type": "string"}, _sentences(comment, "Bytes, as UTF-8."))
            properties[field.name + BASE64_SUFFIX] = _shaped(
                field, {"type": "string", "contentEncoding": "base64"}, f"{field.name} where it is not UTF-8."
            )
            continue
        properties[field.name] = _shaped(field, _value_schema(field.value), comment)
        if not field.has_presence:
            required.append(field.name)
    only_one = [f"At most one of {', '.join(names)} is set." for names in groups.values()]
    schema: Schema = {"type": "object", "properties": properties}
    if description := _sentences(comments.get(_name(descriptor), ""), *only_one):
        schema["description"] = description
    if is_request:
        schema["additionalProperties"] = False
    elif required:
        schema["required"] = required
    return schema


def enum_schema(enum: EnumDescriptor) -> Schema:
    """Returns the schema of an enum; its description tells what the values mean."""
    comments = comments_of(_module(enum))
    schema: Schema = {"type": "string", "enum": list(enum_names(enum).values())}
    meanings = [
        f"{enum_names(enum)[value.number]}: {comments[value.name]}" for value in enum.values if value.name in comments
    ]
    if description := "\n".join([*filter(None, [comments.get(_name(enum))]), *meanings]):
        schema["description"] = description
    return schema


def _value_schema(value: FieldDescriptor) -> Schema:
    if value.message_type is not None:
        return {"$ref": _REFERENCE + _name(value.message_type)}
    if value.enum_type is not None:
        return {"$ref": _REFERENCE + _name(value.enum_type)}
    if value.cpp_type in INT_RANGES:
        low, high = INT_RANGES[value.cpp_type]
        return {"type": "integer", "minimum": low, "maximum": high}
    if value.type == FieldDescriptor.TYPE_BOOL:
        return {"type": "boolean"}
    if value.type == FieldDescriptor.TYPE_STRING:
        return {"type": "string"}
    return {"anyOf": [{"type": "number"}, {"enum": list(SPECIAL_FLOATS)}]}


def _shaped(field: Field, schema: Schema, description: str) -> Schema:
    if field.shape == "list":
        schema = {"type": "array", "items": schema}
    elif field.shape == "map":
        schema = {"type": "object", "additionalProperties": schema}
    return {**schema, "description": description} if description else schema


def _operation(route: HttpRoute, servicer: type) -> Schema:
    parameters: list[Schema] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.path_fields
    ]
    parameters.append(
        {
            "name": "X-Timeout-Seconds",
            "in": "header",
            "description": "When the caller gives up: the call is cancelled then, and answers 504.",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        }
    )
    body = f"{route.rpc}Body" if route.path_fields else _name(descriptor_of(route.request))
    operation: Schema = {
        "operationId": route.rpc,
        "parameters": parameters,
        "responses": {"200": _response(route), **_error_responses()},
    }
    if comment := comments_of(f"{_module(descriptor_of(route.request))}_grpc").get(f"{servicer.__name__}.{route.rpc}"):
        operation["summary"] = comment
    if route.takes_body:
        content = {"application/json": {"schema": {"$ref": _REFERENCE + body}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _response(route: HttpRoute) -> Schema:
    schema: Schema = {"$ref": _REFERENCE + _name(descriptor_of(route.response))}
    if not route.streaming:
        return {"description": "The call's result.", "content": {"application/json": {"schema": schema}}}
    return {
        "description": "One JSON object a line, as they become known; a call that fails on the way ends with an error.",
        "content": {NDJSON: {"schema": {"anyOf": [schema, {"$ref": _REFERENCE + _ERROR}]}}},
    }


def _error_responses() -> Schema:
    names: dict[int, list[str]] = {}
    for code, status in STATUS_BY_CODE.items():
        names.setdefault(status, []).append(code.name)
    content = {"application/json": {"schema": {"$ref": _REFERENCE + _ERROR}}}
    return {str(status): {"description": " or ".join(codes), "content": content} for status, codes in names.items()}


def _name(descriptor: Descriptor | EnumDescriptor) -> str:
    return descriptor.full_name.removeprefix(f"{descriptor.file.package}.")


def _module(descriptor: Descriptor | EnumDescriptor) -> str:
    return f"{descriptor.file.name.removesuffix('.proto').replace('/', '.')}_pb2"


def _sentences(*texts: str) -> str:
    return " ".join(filter(None, texts))


@cache
def comments_of(module_name: str) -> dict[str, str]:
    """Returns the comments of an imported module's stub; none without a stub.

    Keys are `Message`, `Message.field`, `ENUM_VALUE` and `Servicer.Method`.
    """
    file = getattr(sys.modules.get(module_name), "__file__", None)
    stub = Path(file).with_suffix(".pyi") if file else None
    if stub is None or not stub.exists():
        return {}
    return dict(_read_comments(ast.parse(stub.read_text(encoding="utf-8")).body, ""))


def _read_comments(nodes: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node, following in zip(nodes, [*nodes[1:], None], strict=True):
        if isinstance(node, ast.ClassDef):
            if text := ast.get_docstring(node):
                yield f"{prefix}{node.name}", text
            yield from _read_comments(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            if text := ast.get_docstring(node):
                yield f"{prefix}{node.name}", text
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match following:
                case ast.Expr(ast.Constant(str(text))):
                    yield f"{prefix}{node.target.id}", inspect.cleandoc(text)


def documents() -> dict[Path, Schema]:
    """Returns every document by the file that holds it."""
    services: tuple[tuple[str, Any, type, Any], ...] = (
        ("sandbox", sandbox, SandboxServiceServicer, sandbox.compat_routers),
        ("reward", reward, RewardServiceServicer, reward.compat_routers),
        ("rollout", rollout, RolloutServiceServicer, openai_api.compat_routers),
        ("trainer", trainer, TrainerServiceServicer, lambda servicer: ()),
    )
    return {
        module.OPENAPI_FILE: build_document(name, module.ROUTES, servicer, compat_routers(servicer()))
        for name, module, servicer, compat_routers in services
    }


def build_document(name: str, routes: Sequence[HttpRoute], servicer: type, compat: Sequence[CompatRouter]) -> Schema:
    """Returns the OpenAPI document of service `name`; `servicer` is the generated class of its RPCs."""
    document = FastAPI.openapi(build_gateway(name, routes, servicer(), compat, dict))
    paths, schemas = describe_routes(routes, servicer)
    document["paths"] = paths | document["paths"]
    known = document.setdefault("components", {}).setdefault("schemas", {})
    if common := known.keys() & schemas.keys():
        raise ValueError(f"a message and a model go by one name: {', '.join(common)}")
    known |= schemas
    return document


def dump(document: Schema) -> str:
    """Returns the text of a document's file."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path, document in documents().items():
        path.write_text(dump(document), encoding="utf-8")
