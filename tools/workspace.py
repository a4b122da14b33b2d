"""A workspace: one data set with its embeddings, its TRM and its catalog, in one folder.

    dataset/     interactions and items (tools/interactions.py)
    embeddings/  cached item embeddings, keyed by content
    trm/         the TRM's checkpoint
    catalog/     Chroma, unless a server holds it

Each step below makes one of them from those before it; loading is lazy and happens once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CatalogError, DataError, TRMError
from ..settings import Settings
from .assets import ensure_assets
from .interactions import InteractionData, Split, leave_one_out
from .loaders import load
from .loading import uncollected

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .catalog import Catalog, CatalogSettings, Fingerprint
    from .retriever import Retriever
    from .text_encoder import TextEncoder
    from .trm.config import DeepRecConfig, FitConfig, PaperConfig
    from .trm.fit import FitProgress
    from .trm.model import TRM


class Workspace:
    """Paths and parts of the workspace that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.workspace_dir
        self.dataset_dir = self.folder / "dataset"
        self.embeddings_dir = self.folder / "embeddings"
        self.trm_dir = self.folder / "trm"
        self.catalog_dir = self.folder / "catalog"

    def ensure_assets(self, notify: Callable[[str], None] = lambda _: None) -> None:
        """Fetch the demo's models where the settings name no others. Raises AssetError."""
        chosen = self.settings
        pairs = ((chosen.model, chosen.model_name), (chosen.encoder, chosen.encoder_name))
        names = [Path(name).name for own, name in pairs if own is None]
        ensure_assets(chosen.assets_dir, names=names, notify=notify)

    # Making

    def prepare(
        self,
        source: Path,
        *,
        format: str = "auto",
        k_core: int = 5,
        options: Mapping[str, object] | None = None,
    ) -> InteractionData:
        """Read a data set, filter it and keep it. Raises DataError.

        Every user and item is left with `k_core` interactions at least; `options` are those of
        the format's loader in tools/loaders.py.
        """
        data = load(source, format, name=self.settings.workspace, options=options).k_core(k_core)
        data.save(self.dataset_dir)
        self._forget("data", "split", "item_embeddings", "trm")
        return data

    def embed_items(
        self, *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Embed the items' texts unless that was done before, and keep them as `item_embeddings`.

        `progress` is called with (done, total) while the encoder works.
        """
        if "item_embeddings" not in self.__dict__:
            self.item_embeddings = self._embed(progress)
        return self.item_embeddings

    def _embed(self, progress: Callable[[int, int], None] | None) -> NDArray[np.float32]:
        from .text_encoder import item_embeddings

        return item_embeddings(
            self.encoder, self.data.items, self.embeddings_dir, progress=progress
        )

    def train_trm(
        self,
        config: PaperConfig | DeepRecConfig,
        training: FitConfig,
        *,
        seed: int = 0,
        progress: Callable[[FitProgress], None] | None = None,
    ) -> TRM:
        """Fit the TRM on the training part and keep its checkpoint. Raises TRMError."""
        from .trm.fit import fit

        model = fit(
            self.data,
            self.split,
            self.item_embeddings,
            self.encoder,
            config,
            training,
            seed=seed,
            progress=progress,
        )
        model.save_pretrained(self.trm_dir)
        self._forget("trm")
        return model

    def index(self, *, progress: Callable[[int, int], None] | None = None) -> Catalog:
        """Fill the catalog with the data set's items and the TRM's vectors, and keep it open as
        `catalog`. Raises CatalogError.

        `progress` is called with (done, total) as items are written.
        """
        from .catalog import Catalog
        from .trm.scoring import catalog_vectors

        vectors = catalog_vectors(self.trm, self.item_embeddings).numpy()
        self._forget()
        self.catalog = Catalog.build(
            self._catalog_settings,
            self.data.items,
            self.item_embeddings,
            vectors,
            fingerprint=self._fingerprint,
            progress=progress or (lambda done, total: None),
        )
        return self.catalog

    def _forget(self, *names: str) -> None:
        """Drop what was loaded of something older: these parts, and what serves them, closed."""
        for name in ("retriever", "catalog"):
            service = self.__dict__.pop(name, None)
            if service is not None:
                service.close()
        for name in names:
            self.__dict__.pop(name, None)

    # Loading

    @cached_property
    def data(self) -> InteractionData:
        """Return the prepared data set. Raises DataError where there is none."""
        if not self.dataset_dir.exists():
            raise DataError(
                f"workspace {self.settings.workspace!r} has no data set at {self.dataset_dir}: "
                "run `deeprec prepare` first"
            )
        return InteractionData.load(self.dataset_dir)

    @cached_property
    def split(self) -> Split:
        """Leave-one-out split of the data set."""
        return leave_one_out(self.data)

    @cached_property
    def encoder(self) -> TextEncoder:
        """The frozen sentence encoder."""
        from .text_encoder import TextEncoder

        return TextEncoder(self.settings.encoder_name)

    @cached_property
    def item_embeddings(self) -> NDArray[np.float32]:
        """Passage embeddings of the data set's items, float32 [items, encoder.dim]."""
        return self._embed(None)

    @cached_property
    def trm(self) -> TRM:
        """The trained TRM. Raises TRMError where there is none, or it is of another data set."""
        from .trm.model import TRM

        dataset = self.data.fingerprint
        if not self.trm_dir.exists():
            raise TRMError(
                f"workspace {self.settings.workspace!r} has no TRM at {self.trm_dir}: "
                "run `deeprec train-trm` first"
            )
        return TRM.from_pretrained(
            self.trm_dir,
            dataset_fingerprint=dataset,
            encoder_fingerprint=self.encoder.fingerprint,
        )

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog, probed. Raises CatalogError: missing, damaged, or made of another TRM."""
        from .catalog import Catalog

        return Catalog.open(self._catalog_settings, fingerprint=self._fingerprint)

    @cached_property
    @uncollected()
    def retriever(self) -> Retriever:
        """TRM, encoder and catalog as one service; close it when done."""
        from .retriever import Retriever

        return Retriever(self.trm, self.encoder, self.catalog)

    def is_complete(self) -> bool:
        """Whether every part is there: models, data set, TRM and catalog. Opens none of them."""
        parts = (self.dataset_dir, self.trm_dir, self.catalog_dir, Path(self.settings.model_name))
        return all(part.exists() for part in parts)

    def has_catalog(self) -> bool:
        """Whether the catalog is there and was made of this TRM."""
        try:
            return len(self.catalog) > 0
        except CatalogError:
            return False

    def histories(self, *, hold_out: bool) -> dict[str, list[str]]:
        """Item ids of each user, oldest first; with `hold_out` without the test item."""
        ids = [item.id for item in self.data.items]
        return {
            name: [
                ids[index]
                for index in (
                    self.split.test_history(user) if hold_out else self.data.sequence(user)
                )
            ]
            for user, name in enumerate(self.data.user_ids)
        }

    @property
    def _catalog_settings(self) -> CatalogSettings:
        from .catalog import CatalogSettings

        chosen = self.settings.catalog
        if chosen.host is not None:
            return CatalogSettings(
                host=chosen.host,
                port=chosen.port,
                collection=f"deeprec-{self.settings.workspace}",
                search=chosen.search,
            )
        return CatalogSettings(folder=self.catalog_dir, search=chosen.search)

    @property
    def _fingerprint(self) -> Fingerprint:
        from .catalog import Fingerprint

        _ = self.trm  # raises in words where there is none
        with (self.trm_dir / "model.safetensors").open("rb") as weights:
            trm = hashlib.file_digest(weights, "sha256").hexdigest()
        return Fingerprint(
            dataset=self.data.fingerprint,
            trm=trm,
            encoder=self.encoder.fingerprint,
        )
