"""LangGraph's server with keys: each user reads and writes their own threads and memory alone.

    python examples/auth.py 196 --keys keys.json     # a new key of user 196, shown once
    AUTH_KEYS=$PWD/keys.json make studio CONFIG=examples/langgraph.auth.json

Clients send `Authorization: Bearer KEY`. A key is 256 random bits, so the file holds its SHA-256,
not itself; deleting a line there, or the whole file, takes effect with the next request. With
`--any-user` a key may ask in the name of every user: that of an application which knows its users.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

from langgraph_sdk import Auth

from deeprec.graph.identity import ANY_USER
from deeprec.graph.memory import namespace

auth = Auth()


def read_keys(path: Path) -> dict[str, dict[str, Any]]:
    """Users and permissions by the SHA-256 of their keys; none where there is no file."""
    try:
        keys: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return keys


def add_key(path: Path, user: str, permissions: list[str]) -> str:
    """Make a key of a user, and keep its digest. Only this account may read the file."""
    key = secrets.token_urlsafe(32)
    keys = read_keys(path)
    keys[_digest(key)] = {"user": user, "permissions": permissions}
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # of mode 0600
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(keys, file, indent=1)
    Path(beside).replace(path)
    return key


def find_user(path: Path, key: str) -> dict[str, Any] | None:
    """Whose key this is. Takes as long for a wrong key as for a right one."""
    digest, found = _digest(key), None
    for known, user in read_keys(path).items():
        if hmac.compare_digest(known.encode(), digest.encode()):
            found = user
    return found


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@auth.authenticate
def authenticate(authorization: str | None) -> Auth.types.MinimalUserDict:
    """Let in who has a key; a plain function, since it reads a file: the server runs it apart."""
    scheme, _, key = (authorization or "").partition(" ")
    path = os.environ.get("AUTH_KEYS")
    user = find_user(Path(path), key) if path and scheme.lower() == "bearer" else None
    if user is None:
        raise Auth.exceptions.HTTPException(
            status_code=401, detail="give a key: Authorization: Bearer KEY"
        )
    return {"identity": user["user"], "permissions": user["permissions"]}


@auth.on
async def refuse(ctx: Auth.types.AuthContext, value: dict[str, Any]) -> bool:
    """Refuse what nothing below allows: changing assistants, crons, whatever comes later."""
    return False


@auth.on.assistants.read
@auth.on.assistants.search
async def show_assistants(ctx: Auth.types.AuthContext, value: dict[str, Any]) -> bool:
    """Show everybody what the server serves."""
    return True


@auth.on.threads
async def own_threads(ctx: Auth.types.AuthContext, value: dict[str, Any]) -> dict[str, str]:
    """Mark what a user makes as theirs, whatever its metadata claims, and find nothing else.

    Runs are a thread's: reading, joining and cancelling them comes here as well.
    """
    owner = {"owner": ctx.user.identity}
    if ctx.action in {"create", "update", "create_run"}:
        if value.get("metadata") is None:
            value["metadata"] = {}
        value["metadata"].update(owner)  # in place: the server goes on with this very dict
    if ctx.action == "create_run" and value["kwargs"].get("webhook"):
        raise Auth.exceptions.HTTPException(
            status_code=403, detail="no webhooks: the server would send the run to any address"
        )
    return owner


@auth.on.store
async def own_memory(ctx: Auth.types.AuthContext, value: dict[str, Any]) -> bool:
    """Let a user read and write the notes that the agent keeps of them."""
    own = namespace(ctx.user.identity)
    return tuple(value["namespace"] or ())[: len(own)] == own


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("user", help="user id of the data set, or any name")
    parser.add_argument("--keys", type=Path, default=Path("keys.json"))
    parser.add_argument("--any-user", action="store_true")
    given = parser.parse_args()
    print(add_key(given.keys, given.user, [ANY_USER] if given.any_user else []))
