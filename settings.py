"""One settings object. Every field can be set by an environment variable DEEPREC_…

Nested fields are joined by two underscores: DEEPREC_ENGINE__MAX_MODEL_LEN=8192. What belongs to
one run (k, turns, decoding …) is RunSettings in graph/state.py, and comes with the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from .errors import SettingsError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_SECRETS = frozenset({"api_key", "checkpoints"})


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EngineSettings(_Section):
    """The policy's engine."""

    # vllm: in this process's care. server: a running vLLM server at `url`. transformers: where
    # vLLM is not installed; slower, and for free decoding alone. chat: `chat_model`, text only,
    # never trained on.
    kind: Literal["vllm", "server", "transformers", "chat"] = "vllm"
    url: str = "http://127.0.0.1:8000"
    # A chat model by LangChain's name for it, e.g. openai:gpt-5; its provider's own environment
    # variables hold address and key. The setting `model` then only counts tokens.
    chat_model: str = ""
    # Sent to that server as a bearer token; none: it asks for none.
    api_key: str = Field("", repr=False)
    # Most tokens of one run, prompt included.
    max_model_len: int = Field(8192, ge=512, le=2**20)
    # auto: the model's own type; float32 on a CPU that has no bfloat16 arithmetic.
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    # Memory of the KV cache on a CPU.
    kv_cache_gib: int = Field(2, ge=1)
    # Share of a GPU's memory that vLLM may take.
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    # Sequences decoded at the same time; a step of training has no more runs under way.
    max_num_seqs: int = Field(64, ge=1, le=4096)


class CatalogSettings(_Section):
    """Where the catalog lives and how it is searched."""

    # Host of a Chroma server; none: embedded, in the workspace's folder.
    host: str | None = None
    port: int = Field(8000, ge=1, le=65535)
    # exact: every item is scored. hnsw: Chroma's approximate index.
    search: Literal["exact", "hnsw"] = "exact"


class ServerSettings(_Section):
    """What LangGraph's server takes at its door."""

    # Bytes of one request that starts runs; a longer one is refused with HTTP 413.
    max_body_bytes: int = Field(2**20, ge=1024, le=2**30)
    # Runs that clients may wait for at the same time, and of one batch; HTTP 429 and 422.
    max_open_runs: int = Field(256, ge=1, le=65_536)


class Settings(BaseSettings):
    """Where things are, and what loads them. Build it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="DEEPREC_", env_nested_delimiter="__", extra="forbid"
    )

    # Everything that DeepRec makes or downloads lies under this folder.
    home: Path = Field(default_factory=lambda: user_cache_path("deeprec", appauthor=False))
    # A data set with its TRM and catalog: a folder of this name under home/workspaces.
    workspace: str = Field("ml-100k", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    # Hub name or folder of the LLM; none: the demo's SmolLM2-135M-Instruct.
    model: str | None = None
    # Folder of a LoRA adapter of that LLM; none: the LLM as it is.
    adapter: Path | None = None
    # Folder of a recommendation head (training/run_head.py), for R2ec and for rank: head.
    head: Path | None = None
    # Hub name or folder of the sentence encoder; none: the demo's all-MiniLM-L6-v2.
    encoder: str | None = None
    # Where the server keeps threads: a SQLite file, or postgresql://user@host/database; none:
    # threads.sqlite under home.
    checkpoints: str | None = Field(None, repr=False)
    # Where the server keeps what users told (graph/memory.py): likewise; none: memory.sqlite in the
    # workspace, since what is kept names its items.
    memory: str | None = Field(None, repr=False)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    catalog: CatalogSettings = Field(default_factory=CatalogSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)

    @field_validator("home", "adapter", "head", mode="after")
    @classmethod
    def _expanded(cls, path: Path | None) -> Path | None:
        return path.expanduser() if path else path

    @field_validator("model", "encoder", "checkpoints", "memory", mode="after")
    @classmethod
    def _local(cls, name: str | None) -> str | None:
        return str(Path(name).expanduser()) if name and name.startswith("~") else name

    @property
    def assets_dir(self) -> Path:
        """Folder of the demo's models and data."""
        return self.home / "assets"

    @property
    def model_name(self) -> str:
        """Hub name or folder of the LLM in use."""
        return self.model or str(self.assets_dir / "SmolLM2-135M-Instruct")

    @property
    def merged_dir(self) -> Path:
        """Folder of models with an adapter merged in."""
        return self.home / "merged"

    @property
    def encoder_name(self) -> str:
        """Hub name or folder of the sentence encoder in use."""
        return self.encoder or str(self.assets_dir / "all-MiniLM-L6-v2")

    @property
    def checkpoints_at(self) -> str:
        """SQLite file or Postgres address where the server keeps threads."""
        return self.checkpoints or str(self.home / "threads.sqlite")

    @property
    def memory_at(self) -> str:
        """SQLite file or Postgres address where users' memory is kept."""
        return self.memory or str(self.workspace_dir / "memory.sqlite")

    @property
    def workspace_dir(self) -> Path:
        """Folder of the workspace in use; holds dataset, trm, catalog and embeddings."""
        return self.home / "workspaces" / self.workspace


def load_settings(**overrides: object) -> Settings:
    """Build settings from the environment; keywords win over it. Raises SettingsError."""
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except SourceError as error:
        raise SettingsError(f"invalid settings: {error} ({error.__cause__})") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}{_got(problem)}"
            for problem in error.errors()
        )
        raise SettingsError(f"invalid settings: {problems}") from error


def _got(problem: ErrorDetails) -> str:
    """The value of a field, for an error's text. What is no field may be a misspelt secret."""
    secret = problem["type"] == "extra_forbidden" or problem["loc"][-1] in _SECRETS
    return "" if secret else f" (got {problem['input']!r})"
