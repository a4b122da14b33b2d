"""The TRM as the rest of the program sees it: vectors in, vectors out, and its checkpoint.

`score(user, item) = <user_vector, item_vector>` for every architecture, so that any exact or
approximate inner-product search serves it.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import TRMError
from .card import plain_card
from .config import NAMES, DeepRecConfig, PaperConfig, parse_config
from .fusion import DeepRecNet
from .paper import PaperNet
from .record import RECORD

_CONFIG, _ITEMS, _WEIGHTS, _CARD = "config.json", "items.json", "model.safetensors", "README.md"
_FILES = {_CONFIG, _ITEMS, _WEIGHTS, _CARD, RECORD}


class TRM(nn.Module):
    """A preference-aware recommender over `item_ids`; row i of its tables is `item_ids[i]`.

    `dim` is the width of user and item vectors. Vectors are float32. `card` is the model card,
    Markdown; blank where it has none yet.
    """

    def __init__(self, config: PaperConfig | DeepRecConfig, item_ids: tuple[str, ...]):
        super().__init__()
        if not config.text_dim:
            raise TRMError("text_dim is 0. Set it to the width of the sentence encoder's vectors.")
        if not item_ids:
            raise TRMError("a TRM needs at least one item.")
        if config.dim % config.heads:
            raise TRMError(f"dim {config.dim} is not a multiple of heads {config.heads}.")
        self.config = config
        self.item_ids = item_ids
        self.card = ""
        self.net: PaperNet | DeepRecNet
        if isinstance(config, PaperConfig):
            self.net = PaperNet(config, len(item_ids))
        else:
            self.net = DeepRecNet(config, len(item_ids))
        self.dim = self.net.dim

    def item_vectors(self, item_index: Tensor, text: Tensor) -> Tensor:
        """`item_index` int64 `[m]`, -1 for an item that was not in training (its text alone
        stands for it); `text` float32 `[m, text_dim]` passage embeddings. Gives `[m, dim]`.
        """
        return self.net.item_vectors(item_index, text)

    def user_vectors(
        self,
        history: Tensor,
        history_text: Tensor,
        lengths: Tensor,
        preference: Tensor | None = None,
        has_preference: Tensor | None = None,
    ) -> Tensor:
        """User vectors `[B, dim]`.

        `history` int64 `[B, L]`, oldest first, right-padded, -1 for items that were not in
        training; `history_text` float32 `[B, L, text_dim]`; `lengths` int64 `[B]`, at least 1.
        L is at most `config.history_length`. `preference` float32 `[B, text_dim]` comes from
        `embed_preferences`; rows where `has_preference` (bool `[B]`) is False count as absent.
        Raises TRMError for a history that is empty or too long.
        """
        if history.shape[1] > self.config.history_length:
            raise TRMError(
                f"history of {history.shape[1]} items; this TRM reads the last "
                f"{self.config.history_length}. Cut it first."
            )
        if bool((lengths < 1).any()):
            raise TRMError("a history is empty. Give at least one item.")
        states = self.net.states(history, self.net.text_features(history_text), lengths)
        last = states[torch.arange(len(history), device=history.device), lengths - 1]
        return self.net.fuse(last, preference, has_preference)

    def save_pretrained(self, folder: str | Path, *, card: str = "") -> None:
        """Write config.json, items.json, model.safetensors and README.md.

        README.md is `card`, else the model's own, else one that says what the configuration does.
        The folder appears whole or not at all; an older checkpoint there is replaced. Raises
        TRMError, also for a folder that holds anything else.
        """
        folder = Path(folder).resolve()  # of a link the folder is replaced, not the link
        try:
            check_replaceable(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
            try:
                self._write(
                    beside, card or self.card or plain_card(self.config, len(self.item_ids))
                )
                _put(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise TRMError(
                f"can't write the TRM checkpoint to {folder}: {error}. "
                "Free disk space or choose a folder that you may write to."
            ) from error

    def _write(self, folder: Path, card: str) -> None:
        (folder / _CONFIG).write_text(self.config.model_dump_json(indent=2) + "\n", "utf-8")
        ids = json.dumps(list(self.item_ids), ensure_ascii=False)
        (folder / _ITEMS).write_text(ids, "utf-8")
        (folder / _CARD).write_text(card, "utf-8")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
        folder.chmod(0o755)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_name: str | Path,
        *,
        dataset_fingerprint: str | None = None,
        encoder_fingerprint: str | None = None,
    ) -> "TRM":
        """Load a checkpoint folder or a hub repository, in evaluation mode.

        With a fingerprint given, a checkpoint of another data set or encoder is refused.
        Raises TRMError.
        """
        folder = _resolve(str(folder_or_name))
        try:
            config = parse_config(json.loads((folder / _CONFIG).read_text("utf-8")))
            item_ids = tuple(json.loads((folder / _ITEMS).read_text("utf-8")))
            weights = load_file(folder / _WEIGHTS)
            card = folder / _CARD
            told = card.read_text("utf-8") if card.is_file() else ""
        except (OSError, ValueError, SafetensorError) as error:
            raise TRMError(
                f"the TRM checkpoint in {folder} is incomplete or damaged ({error}). "
                "Train it again with `deeprec train-trm`."
            ) from error
        for what, stored, wanted in (
            ("data set", config.dataset_fingerprint, dataset_fingerprint),
            ("sentence encoder", config.encoder_fingerprint, encoder_fingerprint),
        ):
            if wanted is not None and stored != wanted:
                raise TRMError(
                    f"the TRM checkpoint in {folder} belongs to another {what}: it was trained "
                    f"with fingerprint {stored}, this one has {wanted}. Train it again with "
                    f"`deeprec train-trm`, or use the {what} it was trained with."
                )
        model = cls(config, item_ids)
        model.card = told
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise TRMError(
                f"the weights in {folder} do not fit its config.json: {error}. "
                "Train it again with `deeprec train-trm`."
            ) from error
        return model.eval()

    def push_to_hub(self, repo_id: str, *, private: bool = False, card: str = "") -> str:
        """Upload the checkpoint to the Hugging Face hub; gives the commit's address. The card is
        that of `save_pretrained`.
        """
        api = HfApi()
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "checkpoint"
            self.save_pretrained(folder, card=card)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


def check_replaceable(folder: Path) -> None:
    """Raise TRMError unless a checkpoint may be written to `folder`: nothing is there, or an older
    checkpoint and nothing else.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise TRMError(f"{folder} is a file. Name a folder to save the TRM in.")
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - _FILES)
    if foreign or (found and not _is_trm(folder)):
        raise TRMError(
            f"{folder} holds something else than a TRM checkpoint "
            f"({(foreign or sorted(found))[0]!r}) and is not overwritten. Name a new folder, or "
            "move its content away."
        )


def _is_trm(folder: Path) -> bool:
    """Whether these are a TRM's files. An older version's configuration may not parse any more,
    and is a TRM's for all that.
    """
    if not all((folder / name).is_file() for name in (_CONFIG, _ITEMS, _WEIGHTS)):
        return False
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("name") in NAMES


def _put(fresh: Path, folder: Path) -> None:
    """Move `fresh` to `folder`, in the place of what is there."""
    old = fresh.with_name(f"{fresh.name}-old")
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _resolve(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        lacks = [name for name in (_CONFIG, _ITEMS, _WEIGHTS) if not (folder / name).is_file()]
        if lacks:
            raise TRMError(
                f"{folder} is not a TRM checkpoint: it lacks {', '.join(lacks)}. "
                "Give the folder that `deeprec train-trm` wrote."
            )
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise TRMError(
            f"no TRM checkpoint at {name!r}. Train one with `deeprec train-trm`, or give a hub "
            "name such as 'user/model'."
        )
    try:
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, _ITEMS, _WEIGHTS, _CARD]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise TRMError(
            f"no folder {name!r}, and the hub does not have it: {error}. Train a TRM with "
            "`deeprec train-trm`."
        ) from error
