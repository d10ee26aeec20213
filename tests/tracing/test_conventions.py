"""The names are those of the installed OpenTelemetry conventions, and docs/tracing.md has all of
ours."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import opentelemetry.semconv._incubating.attributes as incubating
import opentelemetry.semconv.attributes as stable
from opentelemetry.semconv._incubating.attributes.rpc_attributes import RpcSystemNameValues
from opentelemetry.semconv.attributes.http_attributes import HttpRequestMethodValues
from opentelemetry.semconv.schemas import Schemas

from tests.kit.documents import table
from tracing import export
from tracing.attributes import METHODS, Name
from tracing.pod import FILES, VARIABLES
from tracing.workload import owner


def known(package: ModuleType) -> dict[str, bool]:
    """Attribute -> whether it is deprecated, as far as its module tells."""
    found: dict[str, bool] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found |= {
            value: True
            for name, value in vars(module).items()
            if name.isupper() and isinstance(value, str)
        }
    return found


CONVENTIONS = {**known(stable), **known(incubating)}


def test_names_that_are_not_ours_are_the_conventions() -> None:
    assert len(CONVENTIONS) > 500
    assert not [
        name for name in Name if not name.startswith("isthmus.") and name not in CONVENTIONS
    ]


def test_the_resources_names_are_the_conventions() -> None:
    names = [*VARIABLES.values(), *(prefix.rstrip(".") for prefix in FILES.values())]
    names += [
        *owner("web-7d4b9c6f5d-x2x9k", {}),
        *owner("db-0", {}),
        *owner("a-x2x9k", {"controller-revision-hash": "1"}),
    ]
    names += owner("r-28371960-x2x9k", {"job-name": "r-28371960"})
    # The service account is not in the conventions yet:
    # https://opentelemetry.io/docs/specs/semconv/registry/attributes/k8s/
    assert {name for name in names if name not in CONVENTIONS} <= {"k8s.service_account.name"}


def test_the_known_methods_and_the_rpc_system_are_the_conventions() -> None:
    assert {*METHODS, "_OTHER"} == {method.value for method in HttpRequestMethodValues} - {"QUERY"}
    assert RpcSystemNameValues.GRPC.value == "grpc"


def test_the_schema_that_is_named_is_the_installed_one() -> None:
    assert list(Schemas)[-1].value == export._SCHEMA


def test_the_document_has_every_attribute_and_no_other() -> None:
    documented = {row[0] for row in table("tracing.md", "attributes")}
    assert documented == set(Name)
    assert all(len(row) == 3 and all(row) for row in table("tracing.md", "attributes"))
