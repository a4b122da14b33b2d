"""Model cards: README.md of a checkpoint, with the hub's metadata at its head.

Each sentence is there only where it is true of the variant at hand.
"""

import json
import re
from pathlib import Path

from ..interactions import InteractionData
from .config import DeepRecConfig, PaperConfig
from .record import FitRecord

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")


def model_card(record: FitRecord, data: InteractionData, encoder: str, results: str = "") -> str:
    """The card of a fit that was recorded.

    `data` is what it was fitted on, `encoder` the sentence encoder's name or folder, `results` a
    Markdown table.
    """
    hub = _is_hub_name(encoder)
    base = f"base_model: {encoder}\n" if hub else ""
    name = encoder if hub else Path(encoder).name
    asked = record.training.preferences
    held = f" {record.cold_share:.0%} of its items were held out." if record.cold_share else ""
    speed = record.examples / record.fit_seconds if record.fit_seconds else 0.0
    took = f"{record.prepare_seconds + record.fit_seconds:.0f} s"
    if asked:
        took += f", {record.prepare_seconds:.0f} of them to embed preference texts"
    measured = (
        f"## Results\n\nOn held-out test items; ± is over seeds.\n\n{results}\n" if results else ""
    )
    return f"""{_head(base)}
# A {"preference-aware " if asked else ""}recommender, `{record.model.name}`, trained on {data.name}

{_what_it_does(asked)}
{_on_unknown_items(record.model)}

{_use(name, asked)}
It reads the last {record.model.history_length} items of a history.

{measured}## Training

- Data: {data.name}, {len(data.user_ids):,} users, {len(data.items):,} items,
  {len(data.users):,} interactions; fingerprint `{record.dataset[:16]}`.{held}
- Each user's last item was kept for testing, the one before for early stopping.
- Sentence encoder: {name} (frozen, {record.model.text_dim} wide), fingerprint
  `{record.encoder[:16]}`.
- Variant `{record.variant}`, seed {record.seed}, fitted {"with" if asked else "without"}
  preferences on {record.examples:,} targets. It took {took}; {speed:,.0f} targets a second in
  the fit alone.

```json
{json.dumps(record.training.model_dump(), indent=2)}
```

## Limits

It knows the tastes of the people in its data and no others, and recommends popular items more
often than their share.
{_LIMITS if asked else ""}"""


def plain_card(config: PaperConfig | DeepRecConfig, n_items: int) -> str:
    """The card of a checkpoint whose fit was not recorded: what its configuration says."""
    return f"""{_head("")}
# A recommender, `{config.name}`, over {n_items:,} items

It retrieves items by the inner product of a user vector and an item vector.
{_on_unknown_items(config)}

{_use("the encoder it was fitted with", True)}
It reads the last {config.history_length} items of a history.

## Training

- Data set: fingerprint `{config.dataset_fingerprint[:16] or "unknown"}`.
- Sentence encoder: {config.text_dim} wide, fingerprint
  `{config.encoder_fingerprint[:16] or "unknown"}`.

This card was written from the configuration alone. How the model was fitted, with or without
preferences, and what it is worth is not recorded here; `training/run_trm.py` records it.
"""


_LIMITS = """Preferences in training were made from item attributes and titles: it follows what
items are called and labelled; moods it knows from the sentence encoder alone, and "not …" it was
never taught. A preference that contradicts the history is followed.
"""


def _head(more: str) -> str:
    return f"""---
library_name: deeprec
tags: [recommendation, sequential-recommendation, retrieval]
{more}---"""


def _what_it_does(asked: bool) -> str:
    if not asked:
        return """Given a history of items, it retrieves items by the inner product of a user
vector and an item vector. It was fitted without preferences: give it none."""
    return """Given a history of items and a preference in words ("a light comedy; from the
1980s"), it retrieves items by the inner product of a user vector and an item vector. Without a
preference the history alone decides."""


def _on_unknown_items(config: PaperConfig | DeepRecConfig) -> str:
    if isinstance(config, DeepRecConfig) and config.item_dropout:
        return "Items that were not in training are found by their text."
    return """The text of an item that was not in training stands in for it, but the model was
never taught to read it so: expect little of it."""


def _use(encoder: str, asked: bool) -> str:
    preferences = "from deeprec.tools.trm.preferences import embed_preferences\n" if asked else ""
    return f"""## Use

```python
from deeprec.tools.interactions import item_text
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.model import TRM
{preferences}
trm = TRM.from_pretrained("this folder or repository")
encoder = TextEncoder("{encoder}")
```

`trm.item_vectors` and `trm.user_vectors` say what they take; `deeprec index` and
`deeprec recommend` do it all."""


def _is_hub_name(encoder: str) -> bool:
    """Whether it is the hub's owner/name, and no folder of this machine."""
    return _HUB_NAME.fullmatch(encoder) is not None and not Path(encoder).exists()
