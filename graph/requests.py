"""Requests and run settings from loose values, with the project's errors for malformed ones."""

from __future__ import annotations

from pydantic import ValidationError

from ..errors import RequestError
from .state import RecommendationRequest, RunSettings


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


def explain(error: ValidationError) -> str:
    """One line for all problems of a validation: field, complaint, value."""
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'input'}: {problem['msg']} "
        f"(got {problem['input']!r:.200})"
        for problem in error.errors()
    )
