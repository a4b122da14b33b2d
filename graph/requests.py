"""Requests and run settings from loose values, and what a request means to a catalog.

What can't be answered is refused here, in words, before any model works for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, create_model

from ..errors import RequestError, shown
from .state import RecommendationRequest, RunSettings

if TYPE_CHECKING:
    from ..tools.catalog import Catalog
    from .wishes import Wishes


def parse_request(**fields: object) -> RecommendationRequest:
    """Build a request. Raises RequestError that names each malformed field and its value."""
    try:
        return RecommendationRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestError(f"malformed request: {explain(error)}") from error


def parse_settings(**fields: object) -> RunSettings:
    """Build run settings. Raises RequestError that names each malformed field and its value."""
    try:
        return RunSettings.model_validate(fields)
    except ValidationError as error:
        raise RequestError(f"malformed settings of a run: {explain(error)}") from error


M = TypeVar("M", bound=BaseModel)


def defaulting_to(defaults: M) -> type[M]:
    """Return the model of `defaults` with their values as its own: what a form shows, and what
    the fields that a caller leaves out become.
    """
    model = type(defaults)
    fields: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        value = getattr(defaults, name)
        kind = defaulting_to(value) if isinstance(value, BaseModel) else info.annotation
        said = Field(description=info.description)
        fields[name] = (Annotated[(kind, said, *info.metadata)], value)
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **fields)


def explain(error: ValidationError) -> str:
    """One line for all problems of a validation: field, complaint, value."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'input'}: {problem['msg']} "
        f"(got {shown(problem['input'])})"
        for problem in error.errors()
    )


def resolve_request(
    request: RecommendationRequest,
    defaults: RunSettings,
    catalog: Catalog,
    histories: Mapping[str, Sequence[str]],
    rejected: Collection[str] = (),
) -> tuple[RunSettings, tuple[str, ...], Wishes]:
    """Settings of the run, item ids of the history (oldest first), and what is wished for, the
    filters of the run and of the request among it. `rejected` are ids of items that the user
    doesn't want.

    Raises RequestError: an unknown user, item, title or attribute, an empty history, or more
    items asked for than are eligible; AmbiguousTitleError where a title fits several items.
    """
    from .wishes import read_wishes

    changes: dict[str, object] = {} if request.k is None else {"k": request.k}
    if request.limits is not None:
        given = request.limits.model_dump(exclude_unset=True)
        changes["limits"] = defaults.limits.model_copy(update=given)
    settings = defaults.model_copy(update=changes)
    history = _history(request, catalog, histories)
    wishes = read_wishes(request.wishes, catalog, filters=(settings.filters, request.filters))
    check_eligible(settings.k, catalog, {*history, *rejected, *wishes.named}, wishes)
    return settings, history, wishes


def check_eligible(k: int, catalog: Catalog, exclude: Collection[str], wishes: Wishes) -> None:
    """Raise RequestError where fewer than `k` items are left to recommend."""
    from ..tools.filters import Filters

    eligible = catalog.snapshot.allowed(exclude, Filters.all_of(wishes.where)).count
    if k > eligible:
        asked = "; ".join(f"{wish.wish!r} as {wish.means}" for wish in wishes.understood)
        raise RequestError(
            f"k = {k} recommendations are asked for and {eligible} items of the catalog are "
            "eligible (neither in the history nor rejected, passing the filters): lower k or relax "
            f"the filters{f' and wishes, understood were {asked}' if asked else ''}"
        )


def _history(
    request: RecommendationRequest, catalog: Catalog, histories: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    if (request.history is None) == (request.user_id is None):
        raise RequestError("give either a history (ids or titles) or a user id, and not both")
    if request.user_id is not None:
        known = histories.get(request.user_id)
        if known is None:
            raise RequestError(
                f"user {request.user_id!r} is unknown: {len(histories)} users are "
                "known; give a history of titles instead"
            )
        index = catalog.snapshot.index
        ids = tuple(item for item in known if item in index)  # an item may have been removed since
        if known and not ids:
            raise RequestError(
                f"the catalog holds no item of user {request.user_id!r}'s history any more"
            )
    else:
        ids = tuple(catalog.resolve(text) for text in request.history or ())
    if not ids:
        raise RequestError("the history is empty: give at least one item that the user liked")
    return ids
