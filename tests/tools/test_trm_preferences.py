import numpy as np
import pytest

from deeprec.tools.interactions import InteractionData, Item, leave_one_out
from deeprec.tools.text_encoder import TextEncoder
from deeprec.tools.trm.preferences import (
    HELD_OUT_TEMPLATES,
    PreferencePool,
    embed_preferences,
    pad,
)
from deeprec.tools.trm.vocabulary import Vocabulary, render


def films() -> list[Item]:
    genres = [("Comedy",), ("Comedy", "Drama"), ("Drama",), ("Drama", "Horror"), ("Horror",)]
    return [
        Item(
            f"id{n}",
            f"Film {n}",
            {
                "year": (str(1980 + n),),
                "genres": genres[n % 5],
                "code": (f"X{n}",),  # names one item each
                "kind": ("film",),  # says nothing: every item has it
                "price": (f"{n}.99",),
            },
        )
        for n in range(40)
    ]


def test_vocabulary_keeps_what_describes() -> None:
    vocabulary = Vocabulary.build(films())
    assert vocabulary.primary == "genres"
    names = {name for name, _ in vocabulary.terms}
    assert names == {"genres", "year"}
    assert {v for name, v in vocabulary.terms if name == "year"} == {
        "1980s", "1990s", "2000s", "2010s",
    }  # fmt: skip
    assert vocabulary.phrases(vocabulary.items[1]) == ["Comedy", "Drama"]
    assert vocabulary.phrases(vocabulary.extras[1]) == ["1980s"]


def test_vocabulary_reads_attributes_by_shape_not_by_name() -> None:
    renamed = [
        Item(item.id, item.title, {"zz": item.attributes["genres"], "a": item.attributes["year"]})
        for item in films()
    ]
    assert Vocabulary.build(renamed).primary == "zz"


def test_a_year_is_never_the_first_attribute(tiny_data: InteractionData) -> None:
    assert Vocabulary.build(tiny_data.items).primary == "genres"


@pytest.mark.parametrize("attributes", [{}, {"code": ()}, {"price": ("1.5",)}])
def test_items_without_attributes(
    attributes: dict[str, tuple[str, ...]], tiny_encoder: TextEncoder
) -> None:
    items = [Item(str(n), f"Film {n}", attributes) for n in range(20)]
    vocabulary = Vocabulary.build(items)
    assert vocabulary.primary == ""
    assert vocabulary.history_terms([1, 2, 3], 3) == ()
    sequence = np.arange(10)
    text = tiny_encoder.encode_passages([item.title for item in items])
    pool = PreferencePool(items, text, [sequence], tiny_encoder, size=200)
    rng = np.random.default_rng(0)
    assert (pool.for_targets(sequence, rng) == -1).all()
    windows, lengths = pad([sequence], 20)
    assert (pool.for_histories(windows, lengths, rng) == -1).all()
    assert (pool.for_titles(sequence, rng) >= 0).any()  # a title is always there


def test_history_terms_are_the_most_frequent_first() -> None:
    vocabulary = Vocabulary.build(films())
    terms = vocabulary.history_terms([0, 1, 2, 3, 7], 2)  # Drama 4 times, Comedy 2, Horror 1
    assert vocabulary.phrases(terms) == ["Drama", "Comedy"]


def test_target_texts_name_only_the_targets_attributes(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    pool, targets = make_pool(tiny_data, tiny_encoder), np.arange(40)
    rng = np.random.default_rng(0)
    everything = {phrase for _, phrase in pool.vocabulary.terms}
    for _ in range(20):
        for target, row in zip(targets, pool.for_targets(targets, rng), strict=True):
            text = pool.texts[row].lower()
            item = tiny_data.items[target]
            own = {item.attributes["genres"][0], f"{item.attributes['year'][0][:3]}0s"}
            assert any(phrase.lower() in text for phrase in own)
            assert not any(phrase.lower() in text for phrase in everything - own)


def test_history_texts_name_the_most_frequent_values_so_far(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    pool = make_pool(tiny_data, tiny_encoder)
    window = np.array([0, 1, 11, 12, 13, 14])  # Comedy twice, then Drama four times
    windows, lengths = pad([window], 20)
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows = pool.for_histories(windows, lengths, rng)[0]
        assert (rows[len(window) :] == -1).all()
        assert "comedy" in pool.texts[rows[1]].lower()
        assert "drama" not in pool.texts[rows[1]].lower()
        assert "drama" in pool.texts[rows[5]].lower()


def test_title_texts_name_a_title(tiny_data: InteractionData, tiny_encoder: TextEncoder) -> None:
    pool = make_pool(tiny_data, tiny_encoder)
    rows = pool.for_titles(np.arange(40), np.random.default_rng(0))
    texts = [pool.texts[row] for row in rows]
    assert all("Film" in text for text in texts)
    assert sum(f"Film {n}" in text for n, text in enumerate(texts)) >= 10  # often its own


def test_held_out_wordings_stay_out(tiny_data: InteractionData, tiny_encoder: TextEncoder) -> None:
    pool = make_pool(tiny_data, tiny_encoder, size=4000)
    for template in HELD_OUT_TEMPLATES:
        for piece in (part.strip(" ;,") for part in template.split("{}")):
            if piece:
                assert not any(piece in text for text in pool.texts)


def test_pool_is_made_alike_by_the_same_seed(
    tiny_data: InteractionData, tiny_encoder: TextEncoder
) -> None:
    one, same = (make_pool(tiny_data, tiny_encoder, seed=1) for _ in range(2))
    assert one.texts == same.texts
    assert one.texts != make_pool(tiny_data, tiny_encoder, seed=2).texts
    assert one.vectors.shape == (len(one.texts), tiny_encoder.dim)
    assert len(one.texts) == len(set(one.texts))


def test_render_and_embed(tiny_encoder: TextEncoder) -> None:
    vocabulary = Vocabulary.build(films())
    assert render(vocabulary, vocabulary.items[1], "{name}: {}") == "genres: Comedy; Drama"
    vectors = embed_preferences(tiny_encoder, ["comedy", "drama", "comedy"])
    assert vectors.shape == (3, tiny_encoder.dim)
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])


def test_pad_keeps_the_last_items() -> None:
    rows, lengths = pad([np.array([1, 2, 3]), np.array([4])], 2)
    assert rows.tolist() == [[2, 3], [4, -1]]
    assert lengths.tolist() == [2, 1]


def make_pool(
    data: InteractionData, encoder: TextEncoder, *, size: int = 600, seed: int = 0
) -> PreferencePool:
    text = encoder.encode_passages([item.title for item in data.items])
    split = leave_one_out(data)
    return PreferencePool(data.items, text, split.train, encoder, size=size, seed=seed)
