"""A real catalog and retriever over a few films, and an engine that says what a test scripts."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from deeprec.errors import EngineError
from deeprec.graph.build import build_graph
from deeprec.graph.engine.base import Engine, Generation, GenerationRequest
from deeprec.graph.engine.tokenizer import load_tokenizer
from deeprec.graph.state import RunSettings, State
from deeprec.settings import load_settings
from deeprec.tools.catalog import Catalog, CatalogSettings, Fingerprint
from deeprec.tools.interactions import InteractionData, leave_one_out
from deeprec.tools.retriever import Retriever
from deeprec.tools.text_encoder import TextEncoder, item_embeddings
from deeprec.tools.trm.config import DeepRecConfig, FitConfig
from deeprec.tools.trm.fit import fit
from deeprec.tools.trm.scoring import catalog_vectors


@pytest.fixture(scope="session")
def retriever(
    tiny_data: InteractionData, tiny_encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Retriever]:
    folder: Path = tmp_path_factory.mktemp("catalog")
    text = item_embeddings(tiny_encoder, tiny_data.items, folder / "embeddings")
    trm = fit(
        tiny_data,
        leave_one_out(tiny_data),
        text,
        tiny_encoder,
        DeepRecConfig(),
        FitConfig(epochs=2, pool=100),
    )
    catalog = Catalog.build(
        CatalogSettings(folder=folder / "chroma"),
        tiny_data.items,
        text,
        catalog_vectors(trm, text).numpy(),
        fingerprint=Fingerprint("data", "trm", "encoder"),
    )
    service = Retriever(trm, tiny_encoder, catalog)
    yield service
    service.close()
    catalog.close()


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)


Said = str | Exception | Future[Any] | None


class ScriptedEngine(Engine):
    """Says the next text of a script, cut at the first stop string, token by token.

    A script's entry may also be an error to raise, or None (or a future of the test's) for a
    result that never comes. Requests and results are kept, so that a test can compare a transcript
    with them.
    """

    name = "scripted"

    def __init__(self, script: Sequence[Said], max_model_len: int) -> None:
        self.tokenizer = _tokenizer(load_settings().model_name)
        self.max_model_len = max_model_len
        self.script = list(script)
        self.calls: list[tuple[GenerationRequest, Generation]] = []

    def submit(self, request: GenerationRequest) -> Future[Generation]:
        said = self.script.pop(0) if self.script else EngineError("the script is over")
        future: Future[Generation] = Future()
        if said is None or isinstance(said, Future):
            return said or Future()
        if isinstance(said, Exception):
            future.set_exception(said)
            return future
        future.set_result(self._generate(said, request))
        self.calls.append((request, future.result()))
        return future

    def _generate(self, said: str, request: GenerationRequest) -> Generation:
        ends = {said.find(stop) + len(stop): stop for stop in request.stop if stop in said}
        end = min(ends, default=None)
        ids = self.tokenizer.encode(said[:end], add_special_tokens=False)
        logprobs = tuple(-0.5 for _ in ids)
        if len(ids) > request.max_tokens:
            cut = request.max_tokens
            return Generation(tuple(ids[:cut]), logprobs[:cut], "length")
        if end is not None:
            return Generation(tuple(ids), logprobs, "stop", ends[end])
        return Generation((*ids, self.tokenizer.eos_token_id), (*logprobs, -0.5), "eos")

    def close(self) -> None:
        pass


@dataclass
class Run:
    """A finished run: its whole last state, and the engine that made it."""

    state: dict[str, Any]
    engine: ScriptedEngine
    titles: list[str] = field(default_factory=list)


RunGraph = Callable[..., Run]


@pytest.fixture
def run_graph(retriever: Retriever) -> RunGraph:
    """Run the graph over a script. Keywords: settings of the run; `request`, `max_model_len`."""

    def run(
        *script: Said,
        request: dict[str, Any] | None = None,
        max_model_len: int = 8192,
        **settings: Any,
    ) -> Run:
        engine = ScriptedEngine(script, max_model_len)
        chosen = RunSettings.model_validate(
            {"decoding": "free", "k": 2, "retrieve_n": 4, **settings}
        )
        graph = build_graph(engine, retriever, histories={"u": ["0", "1", "2"]}, settings=chosen)
        *_, state = graph.stream(
            request or {"user_id": "u"},
            stream_mode="values",
            output_keys=list(State.__annotations__),
        )
        return Run(state, engine)

    return run


def logprob_gap(model: PreTrainedModel, prompt: list[int], said: Generation) -> float:
    """Largest difference between an engine's logprobs and those of one forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *said.ids]])).logits[0, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor(said.ids)[:, None])[:, 0]
    return float((own - torch.tensor(said.logprobs)).abs().max())
