"""Every failure of DeepRec, and who handles it.

Three kinds of trouble exist, and each is handled in one place only.

1. *The caller is wrong* (a missing file, an unknown user, k = 0, a checkpoint of another data
   set). The room that notices raises the one error type of its boundary, below; its text names
   the value and the remedy. The CLI prints it and exits with code 2; library users catch
   `DeepRecError`. Nothing is half-written: files are written beside their place and then moved.
2. *A run goes wrong* (the policy writes nonsense, runs out of tokens or time, the engine drops
   a request). That is data, not an exception: the graph ends with a response that carries the
   reason (`Failure` in graph/state.py). It is counted wherever runs are counted.
3. *The program is wrong.* Nobody catches that; the traceback is the message.
"""

import reprlib

_MOST_SHOWN = 200  # characters of a value in an error's text

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = _MOST_SHOWN
_short.maxlist = _short.maxtuple = _short.maxdict = 20


def shown(value: object) -> str:
    """A caller's value for an error's text, quickly and on one line, however large or nested."""
    try:
        return _short.repr(value)[:_MOST_SHOWN]
    except ValueError:  # Python spells no whole number of more than some thousand digits
        return f"a {type(value).__name__} too long to show"


class DeepRecError(Exception):
    """Base of every error that a caller can mend. `exit_code` is what the CLI exits with."""

    exit_code = 2


class SettingsError(DeepRecError):
    """A setting or a configuration file is missing, malformed or out of bounds."""


class AssetError(DeepRecError):
    """A downloaded model or data set is missing, incomplete or has another checksum."""


class DataError(DeepRecError):
    """A data file or a prepared data set is missing, empty or malformed."""


class EncoderError(DeepRecError):
    """The sentence encoder can't be loaded, or can't encode what it was given."""


class TRMError(DeepRecError):
    """A TRM can't be trained, or a checkpoint is none, damaged or of another data set."""


class CatalogError(DeepRecError):
    """The catalog is missing, damaged, locked or of another data set, or an item is unknown."""


class RequestError(DeepRecError, ValueError):
    """A recommendation request that can't be answered: unknown user, item or filter, bad k.

    A ValueError as well: of other errors LangGraph's server tells its clients no text.
    """


class AmbiguousTitleError(RequestError):
    """A typed title fits several items; `candidates` holds (id, title) of each, best first."""

    def __init__(self, title: str, candidates: list[tuple[str, str]]):
        self.title = title
        self.candidates = candidates
        listed = "; ".join(f"{name} [id {id_}]" for id_, name in candidates)
        example = f"id:{candidates[0][0]}" if candidates else "id:…"
        super().__init__(
            f"{title!r} fits several items: {listed}. Give the whole title, or an id as "
            f"{example!r}, which is never read as a title."
        )


class EngineError(DeepRecError):
    """The LLM engine can't start or is out of reach: no such model, port in use, no memory."""


class TrajectoryError(DeepRecError):
    """A trajectory file or its source is missing, torn, of another schema, or holds no run."""


class EvaluationError(DeepRecError):
    """An evaluation has no test user, its results are damaged, in use or of another data set, or a
    peer's environment is missing or fails.
    """


class HeadError(DeepRecError):
    """A recommendation head is missing, damaged, of another model or catalog, or its item
    embeddings are stale.
    """
