"""Where training runs retrieve: a workspace of the training part, with a TRM of its own.

The served TRM was fitted on the very items that training runs look for, and would find them too
easily. This one has not seen each user's last two items of the training part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..configuration import keep_origin
from ..errors import CatalogError, TRMError
from ..tools.progress import trm_progress
from ..tools.trm.config import DeepRecConfig, FitConfig
from ..tools.trm.fit import FitProgress
from ..tools.workspace import Workspace
from .selection import Selection, SelectionConfig, select, training_part, trm_fingerprint

if TYPE_CHECKING:
    from rich.console import Console

TARGETS_PER_USER = 2
"""Items of each user that the TRM of the training ground has not seen."""


def training_ground(
    base: Workspace, *, progress: Callable[[FitProgress], None] | None = None
) -> Workspace:
    """Open the training ground of a workspace; what is missing or out of date is made first.

    `progress` is told how the TRM's fit goes. Raises DataError where the workspace is not
    prepared, TRMError where its training part is too small.
    """
    settings = base.settings
    ground = Workspace(settings.model_copy(update={"workspace": f"{settings.workspace}.training"}))
    part = training_part(base.data)
    if not ground.dataset_dir.exists() or ground.data.fingerprint != part.fingerprint:
        part.save(ground.dataset_dir)
        ground.__dict__.pop("data", None)
    try:
        _ = ground.trm
    except TRMError:
        # Fewer epochs than the served one's: what is told of training was played over such a TRM.
        ground.train_trm(DeepRecConfig(), FitConfig(epochs=10), progress=progress)
    try:
        _ = ground.catalog
    except CatalogError:
        ground.index()
    return ground


def open_ground(base: Workspace, folder: Path, console: Console) -> Workspace:
    """Open the training ground for a run, and keep in its folder which TRM and encoder it has.

    Raises SettingsError where the run in the folder was made of others, and what `training_ground`
    raises.
    """
    with trm_progress(console) as progress:
        ground = training_ground(base, progress=progress)
    parts = {"TRM": trm_fingerprint(ground.trm), "sentence encoder": ground.encoder.fingerprint}
    keep_origin(parts, folder)
    return ground


def select_users(base: Workspace, ground: Workspace, config: SelectionConfig) -> Selection:
    """Deal the users out to the stages, by the ranks of the training ground's TRM."""
    return select(base.data, ground.trm, base.item_embeddings, config)
