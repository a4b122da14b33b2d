"""Whom a run is for, where LangGraph's server knows who asks.

A request names its user, and so may a state that a client edits. Memory and histories are personal,
so the graph itself compares that name with the one that the server's authentication gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RequestError, shown

if TYPE_CHECKING:
    from langgraph.runtime import ServerInfo

ANY_USER = "deeprec:any_user"
"""Permission to ask in the name of any user, for an application that serves many."""


def check_user(server: ServerInfo | None, user_id: str | None) -> None:
    """Raise RequestError where who asks may not read and write what is kept of `user_id`.

    `server` is the runtime's server_info. Without a server, or where it authenticates nobody,
    everybody may.
    """
    asks = server.user if server is not None else None
    if asks is None or not asks.identity or user_id is None or user_id == asks.identity:
        return
    if ANY_USER not in asks.permissions:
        raise RequestError(
            f"user {shown(user_id)} is asked about, and the key of the request is that of user "
            f"{shown(asks.identity)}: leave user_id out, give your own, or have the key get the "
            f"permission {ANY_USER}"
        )
