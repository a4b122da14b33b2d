"""Preferences to train on: texts an LLM could have written, made from item attributes alone.

A pool of texts is embedded once, before training; a step then only draws rows of it.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from ..interactions import Item
from ..text_encoder import TextEncoder
from .vocabulary import Vocabulary, render

# Wordings of training: an opening, the phrases, a close, and sometimes a phrase that says nothing.
_PLAIN = ("{}", "{}", "{name}: {}", "{name}: {}")
_OPENINGS = (
    "",
    "",
    "I am looking for ",
    "something with ",
    "more ",
    "interested in ",
    "prefers ",
    "find me ",
    "show ",
    "likes ",
    "mostly ",
    "ideally ",
    "a title that is ",
    "elements of ",
    "focus on ",
    "has watched or bought a lot of ",
    "now: ",
    "the person asks for ",
    "this evening: ",
    "what about ",
    "the one after that should be ",
    "could be ",
    "give me the best ",
    "leaning towards ",
    "tends to choose ",
    "tired of the usual, wants ",
    "it should have ",
)
_CLOSES = (
    "",
    "",
    " titles",
    " and the like",
    " like before",
    " items",
    " of any kind",
    " above all",
    " with a twist",
    " for the weekend",
    " themes",
    " classics",
    ", suggestions welcome",
    ", if possible",
    " as before, or close to it",
    " to try",
    " worth the time",
    " favourites",
    " that people talk about",
    " at its best",
)
_FILLERS = (
    "well made",
    "popular",
    "engaging and memorable",
    "highly rated",
    "good story",
    "lesser known",
    "from an acclaimed maker",
    "easy to enjoy",
    "emotional depth",
    "fast paced",
    "for the whole family",
    "something new",
    "praised by critics",
    "in keeping with past choices",
    "a change of pace",
    "light and short",
    "dark and slow",
    "thoughtful",
    "not too long",
    "a hidden gem",
)
# Wordings that are kept out of training: only evaluation uses them.
HELD_OUT_TEMPLATES = (
    "in the mood for {} tonight",
    "the user would probably enjoy {} next",
    "{} recommendations, please",
    "wants to explore {} for a change; strong reviews",
    "a good pick could be {}; similar in spirit to recent favourites",
)
TITLE_TEMPLATES = ("similar to {}", "{}", "like {}", "{}; something similar", "fans of {}")
HELD_OUT_TITLE_TEMPLATES = ("in the vein of {}", "reminds me of {}")

_MAX_GROUPS = 4000  # distinct attribute signatures with texts of their own
_CUTS = (1, 2, 3)  # a history preference names this many values


def embed_preferences(encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
    """The vectors that `TRM.user_vectors` expects as `preference`: float32 `[n, text_dim]`."""
    unique = list(dict.fromkeys(texts))
    row = {text: n for n, text in enumerate(unique)}
    return encoder.encode_queries(unique)[[row[text] for text in texts]]


class PreferencePool:
    """Embedded preference texts and, for each item and each history, which of them fit.

    `vectors` is float32 `[texts, text_dim]`. Rows are drawn with `for_targets`, `for_titles` and
    `for_histories`; -1 says that there is none (an item without attributes).
    """

    def __init__(
        self,
        items: Sequence[Item],
        item_text_embeddings: np.ndarray,
        sequences: Sequence[np.ndarray],
        encoder: TextEncoder,
        *,
        size: int = 12_000,
        history_length: int = 20,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.vocabulary = Vocabulary.build(items)
        self._history_length = history_length
        self._rng = np.random.default_rng(seed)
        self._row: dict[str, int] = {}
        count = sum(name == self.vocabulary.primary for name, _ in self.vocabulary.terms)
        # Row i says which primary values item i has; the last row is for padding.
        self._hot = np.zeros((len(items) + 1, max(count, *_CUTS)), dtype=np.int8)
        for item, terms in enumerate(self.vocabulary.items):
            self._hot[item, list(terms)] = 1
        self._make_targets(size // 2)
        self._make_titles(items, item_text_embeddings, sequences, size // 4)
        self._make_histories(sequences, size // 4)
        texts = list(self._row)
        parts = []
        for start in range(0, len(texts), 1024):
            parts.append(embed_preferences(encoder, texts[start : start + 1024]))
            if progress is not None:
                progress(min(start + 1024, len(texts)), len(texts))
        self.texts = tuple(texts)
        self.vectors = np.concatenate(parts) if parts else np.zeros((0, encoder.dim), np.float32)

    def for_targets(self, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A row for each target item `[n]` that names some or all of its attributes."""
        return _draw(self._target_rows, self._target_group[targets], rng)

    def for_titles(self, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A row for each target item `[n]` that names its title or a similar item's."""
        return _draw(self._title_rows, self._title_group[targets], rng)

    def for_histories(
        self, windows: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Rows `[B, L]` for right-padded histories `[B, L]`: position t names the most frequent
        primary values of items 0..t.
        """
        codes = self._codes(windows, lengths)  # [B, L, cuts]
        pick = rng.integers(len(_CUTS), size=codes.shape[:2])
        chosen = np.take_along_axis(codes, pick[..., None], axis=2)[..., 0]
        found = np.searchsorted(self._history_codes, chosen.ravel())
        found = np.minimum(found, max(len(self._history_codes) - 1, 0))
        if not len(self._history_codes):
            return np.full(chosen.shape, -1, dtype=np.int64)
        group = np.where(self._history_codes[found] == chosen.ravel(), found, -1)
        return _draw(self._history_rows, group, rng).reshape(chosen.shape)

    def _add(self, text: str) -> int:
        return self._row.setdefault(text, len(self._row))

    def _word(self, terms: Sequence[int]) -> str:
        rng = self._rng
        names = list(terms)
        if rng.random() < 0.3:
            rng.shuffle(names)
        joint = ("; ", "; ", ", ", " and ")[rng.integers(4)]
        text = render(self.vocabulary, names, self._template(), joint=joint)
        return text.lower() if rng.random() < 0.5 else text

    def _template(self) -> str:
        rng = self._rng

        def one(choices: Sequence[str]) -> str:
            return choices[int(rng.integers(len(choices)))]

        if rng.random() < 0.3:
            return one(_PLAIN)
        template = f"{one(_OPENINGS)}{{}}{one(_CLOSES)}"
        if rng.random() < 0.35:
            filler = one(_FILLERS)
            template = f"{filler}; {template}" if rng.random() < 0.3 else f"{template}; {filler}"
        return template

    def _some(self, primary: Sequence[int], extras: Sequence[int]) -> list[int]:
        rng = self._rng
        chosen = list(primary)
        if len(chosen) > 1 and rng.random() < 0.5:
            keep = rng.integers(1, len(chosen))
            chosen = [chosen[n] for n in sorted(rng.permutation(len(chosen))[:keep])]
        if extras and (not chosen or rng.random() < 0.2):
            extra = extras[int(rng.integers(len(extras)))]
            chosen = [extra] if rng.random() < 0.15 else [*chosen, extra]
        return chosen

    def _make_targets(self, size: int) -> None:
        vocabulary = self.vocabulary
        signatures = [
            (tuple(sorted(p)), tuple(sorted(e)))
            for p, e in zip(vocabulary.items, vocabulary.extras, strict=True)
        ]
        common = Counter(s for s in signatures if s != ((), ())).most_common(_MAX_GROUPS)
        index = {signature: n for n, (signature, _) in enumerate(common)}
        # A rare signature beyond the limit borrows the texts of its primary values.
        backup: dict[tuple[int, ...], int] = {}
        for signature, n in index.items():
            backup.setdefault(signature[0], n)
        self._target_group = np.array(
            [index.get(s, backup.get(s[0], -1) if s[0] else -1) for s in signatures], dtype=np.int64
        )
        variants = int(np.clip(size // max(len(index), 1), 2, 24))
        self._target_rows = np.array(
            [
                [self._add(self._word(self._some(*signature))) for _ in range(variants)]
                for signature in index
            ],
            dtype=np.int64,
        ).reshape(len(index), variants)

    def _make_titles(
        self,
        items: Sequence[Item],
        embeddings: np.ndarray,
        sequences: Sequence[np.ndarray],
        size: int,
    ) -> None:
        rng = self._rng
        counts = np.zeros(len(items), dtype=np.int64)
        for sequence in sequences:
            np.add.at(counts, sequence, 1)
        chosen = np.argsort(-counts, kind="stable")[: max(size // 2, 1)]
        chosen = np.array([i for i in chosen if items[i].title.strip()], dtype=np.int64)
        self._title_group = np.full(len(items), -1, dtype=np.int64)
        self._title_group[chosen] = np.arange(len(chosen))
        rows = []
        for item in chosen:
            # "similar to X": X is among the nearest by text, or the item itself.
            near = int(item)
            if len(chosen) > 8:
                likeness = embeddings[chosen] @ embeddings[item]
                near = int(chosen[rng.choice(np.argpartition(-likeness, 5)[:5])])
            row = []
            for subject in (int(item), near):
                template = TITLE_TEMPLATES[rng.integers(len(TITLE_TEMPLATES))]
                row.append(self._add(template.format(items[subject].title)))
            rows.append(row)
        self._title_rows = np.array(rows, dtype=np.int64).reshape(len(rows), 2)

    def _codes(self, windows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The set of most frequent terms at each position as one integer for each cut."""
        batch, length = windows.shape
        valid = np.arange(length)[None] < lengths[:, None]
        seen = self._hot[np.where(valid, windows, len(self._hot) - 1)].cumsum(
            axis=1, dtype=np.int32
        )
        # Ties go to the term that is more frequent in the catalog (the lower index).
        top = np.argsort(-seen, axis=2, kind="stable")[:, :, : max(_CUTS)]
        has = np.take_along_axis(seen, top, axis=2) > 0
        base = seen.shape[2] + 1
        codes = np.zeros((batch, length, len(_CUTS)), dtype=np.int64)
        for n, cut in enumerate(_CUTS):
            terms = np.where(has[:, :, :cut], top[:, :, :cut] + 1, 0)
            for place in np.moveaxis(np.sort(terms, axis=2), 2, 0):
                codes[:, :, n] = codes[:, :, n] * base + place
        return np.where(valid[..., None], codes, 0)

    def _make_histories(self, sequences: Sequence[np.ndarray], size: int) -> None:
        length = self._history_length
        picked = [s for s in sequences if len(s)]
        if len(picked) > 20_000:
            picked = [picked[n] for n in self._rng.permutation(len(picked))[:20_000]]
        seen: Counter[int] = Counter()
        for start in range(0, len(picked), 256):
            rows: list[np.ndarray] = []
            for sequence in picked[start : start + 256]:
                rows.extend(sequence[at : at + length] for at in range(0, len(sequence), length))
            windows, lengths = pad(rows, length)
            seen.update(self._codes(windows, lengths).ravel().tolist())
        seen.pop(0, None)
        variants = 3
        codes = sorted(code for code, _ in seen.most_common(max(size // variants, 1)))
        base = self._hot.shape[1] + 1
        rows_of_codes = []
        for code in codes:
            terms = []
            left = code
            while left:
                terms.append(left % base - 1)
                left //= base
            terms = [t for t in terms if t >= 0]
            rows_of_codes.append([self._add(self._word(terms)) for _ in range(variants)])
        self._history_codes = np.array(codes, dtype=np.int64)
        self._history_rows = np.array(rows_of_codes, dtype=np.int64).reshape(-1, variants)


def pad(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int64 `[n, length]` (padding -1) of the last `length` entries, and lengths."""
    padded = np.full((len(rows), length), -1, dtype=np.int64)
    lengths = np.zeros(len(rows), dtype=np.int64)
    for n, row in enumerate(rows):
        cut = row[-length:]
        padded[n, : len(cut)] = cut
        lengths[n] = len(cut)
    return padded, lengths


def _draw(rows: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if not rows.size:
        return np.full(group.shape, -1, dtype=np.int64)
    drawn = rows[np.maximum(group, 0), rng.integers(rows.shape[1], size=group.shape)]
    return np.where(group < 0, -1, drawn)
