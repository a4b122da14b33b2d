"""The handlers of examples/auth.py, one by one; test_auth_server.py tries them on the server."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from langgraph_sdk import Auth

from deeprec.graph.identity import ANY_USER
from deeprec.graph.memory import namespace

EXAMPLE = Path(__file__).parents[2] / "examples" / "auth.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_auth", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["example_auth"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "keys.json"
    monkeypatch.setenv("AUTH_KEYS", str(path))
    return path


def context(action: str) -> Any:
    return SimpleNamespace(user=SimpleNamespace(identity="ada"), action=action)


def test_a_key_names_its_user_until_it_is_deleted(example: ModuleType, keys: Path) -> None:
    ada = example.add_key(keys, "ada", [])
    shop = example.add_key(keys, "shop", [ANY_USER])
    assert example.authenticate(f"Bearer {ada}") == {"identity": "ada", "permissions": []}
    assert example.authenticate(f"bearer {shop}")["permissions"] == [ANY_USER]
    keys.unlink()
    with pytest.raises(Auth.exceptions.HTTPException) as refused:
        example.authenticate(f"Bearer {ada}")
    assert refused.value.status_code == 401


@pytest.mark.parametrize(
    "said", [None, "", "Bearer", "Bearer ", "Bearer x", "Basic {key}", "{key}", "Bearer {digest}"]
)
def test_what_is_no_key_is_refused(example: ModuleType, keys: Path, said: str | None) -> None:
    key = example.add_key(keys, "ada", [])
    (digest,) = json.loads(keys.read_text())
    told = said and said.format(key=key, digest=digest)
    with pytest.raises(Auth.exceptions.HTTPException) as refused:
        example.authenticate(told)
    assert refused.value.status_code == 401
    assert key not in str(refused.value.detail)


def test_without_a_file_of_keys_nobody_gets_in(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTH_KEYS", raising=False)
    with pytest.raises(Auth.exceptions.HTTPException):
        example.authenticate("Bearer x")


def test_keys_are_kept_as_digests_for_this_account_alone(example: ModuleType, keys: Path) -> None:
    key = example.add_key(keys, "ada", [])
    assert key not in keys.read_text()
    assert keys.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("action", ["create", "update", "create_run"])
@pytest.mark.parametrize("claimed", [None, {}, {"owner": "bob"}])
async def test_what_a_user_makes_is_theirs(
    example: ModuleType, action: str, claimed: dict[str, str] | None
) -> None:
    value: dict[str, Any] = {"metadata": claimed, "kwargs": {}}
    found = await example.own_threads(context(action), value)
    assert found == {"owner": "ada"}
    assert value["metadata"]["owner"] == "ada"
    assert claimed is None or value["metadata"] is claimed  # the server goes on with its own


async def test_a_search_is_left_as_it_is_and_filtered(example: ModuleType) -> None:
    value = {"metadata": {"owner": "bob"}}
    assert await example.own_threads(context("search"), value) == {"owner": "ada"}
    assert value == {"metadata": {"owner": "bob"}}


async def test_a_run_calls_no_address(example: ModuleType) -> None:
    value = {"metadata": {}, "kwargs": {"webhook": "http://169.254.169.254/"}}
    with pytest.raises(Auth.exceptions.HTTPException) as refused:
        await example.own_threads(context("create_run"), value)
    assert refused.value.status_code == 403


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        (namespace("ada"), True),
        ((*namespace("ada"), "more"), True),
        (namespace("bob"), False),
        (namespace("ada.bob"), False),
        (namespace("ad"), False),
        (("deeprec", "memory"), False),
        (("deeprec", "memory", "*"), False),
        (("other",), False),
        ((), False),
        (None, False),
    ],
)
async def test_memory_is_its_users(
    example: ModuleType, where: tuple[str, ...] | None, allowed: bool
) -> None:
    assert await example.own_memory(context("search"), {"namespace": where}) is allowed


async def test_all_else_is_refused(example: ModuleType) -> None:
    assert await example.refuse(context("create"), {}) is False
