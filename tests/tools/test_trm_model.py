import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deeprec.errors import TRMError
from deeprec.tools.trm.config import DeepRecConfig, PaperConfig, parse_config
from deeprec.tools.trm.model import TRM

from ..conftest import Disk

TEXT = 32
SMALL = {"dim": 16, "inner": 16, "history_length": 6, "text_dim": TEXT}
CONFIGS = [
    PaperConfig(**SMALL, dataset_fingerprint="data-a", encoder_fingerprint="enc-a"),
    DeepRecConfig(**SMALL, dataset_fingerprint="data-a", encoder_fingerprint="enc-a"),
]


@pytest.fixture(params=CONFIGS, ids=lambda config: config.name)
def model(request: pytest.FixtureRequest) -> TRM:
    torch.manual_seed(0)
    trm = TRM(request.param, tuple(f"i{n}" for n in range(10)))
    with torch.no_grad():  # gates start at zero; a trained model's are not
        for parameter in trm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return trm.eval()


@pytest.fixture
def text() -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(10, TEXT, generator=torch.Generator().manual_seed(1)), dim=1
    )


def users(model: TRM, text: torch.Tensor, rows: list[list[int]], *more: object) -> torch.Tensor:
    length = max(map(len, rows))
    history = torch.tensor([row + [-1] * (length - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        return model.user_vectors(history, text[history.clamp_min(0)], lengths, *more)


def test_vectors_have_the_promised_shapes(model: TRM, text: torch.Tensor) -> None:
    items = model.item_vectors(torch.arange(10), text)
    assert items.shape == (10, model.dim)
    assert users(model, text, [[1, 2, 3], [4]]).shape == (2, model.dim)
    if isinstance(model.config, PaperConfig):
        assert torch.allclose(items.norm(dim=1), torch.ones(10), atol=1e-5)
        length = users(model, text, [[1]]).norm(dim=1) * model.config.temperature
        assert torch.allclose(length, torch.ones(1), atol=1e-5)


def test_padding_and_neighbours_in_the_batch_change_nothing(model: TRM, text: torch.Tensor) -> None:
    alone = users(model, text, [[1, 2, 3]])
    together = users(model, text, [[4, 5, 6, 7, 8, 9], [1, 2, 3]])
    assert torch.allclose(alone[0], together[1], atol=1e-5)
    history = torch.tensor([[1, 2, 3, 7, 7]])  # what lies behind the length is not read
    garbage = text[history] + 5 * torch.tensor([0, 0, 0, 1, 1])[None, :, None]
    with torch.no_grad():
        padded = model.user_vectors(history, garbage, torch.tensor([3]))
    assert torch.allclose(alone, padded, atol=1e-5)


def test_order_and_content_of_the_history_matter(model: TRM, text: torch.Tensor) -> None:
    rows = users(model, text, [[1, 2, 3], [3, 2, 1], [1, 2, 4]])
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    assert (rows[0] - rows[2]).abs().max() > 1e-3


def test_preference_counts_only_where_there_is_one(model: TRM, text: torch.Tensor) -> None:
    rows = [[1, 2], [3, 4]]
    absent = users(model, text, rows)
    wish = text[[7, 8]]
    half = users(model, text, rows, wish, torch.tensor([True, False]))
    assert torch.allclose(half[1], absent[1], atol=1e-6)
    assert (half[0] - absent[0]).abs().max() > 1e-3
    assert torch.allclose(half[0], users(model, text, rows, wish, None)[0], atol=1e-6)


def test_an_unknown_item_is_stood_for_by_its_text(model: TRM, text: torch.Tensor) -> None:
    unknown = torch.tensor([-1, -1])
    vectors = model.item_vectors(unknown, text[[0, 1]])
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3
    assert torch.allclose(vectors[0], model.item_vectors(torch.tensor([-1]), text[[0]])[0])
    assert (vectors[0] - model.item_vectors(torch.tensor([0]), text[[0]])[0]).abs().max() > 1e-3
    history = torch.tensor([[2, -1]])
    with torch.no_grad():
        one = model.user_vectors(history, text[[2, 3]][None], torch.tensor([2]))
        other = model.user_vectors(history, text[[2, 4]][None], torch.tensor([2]))
    assert (one - other).abs().max() > 1e-3


def test_deeprec_states_do_not_see_the_future(text: torch.Tensor) -> None:
    net = TRM(CONFIGS[1], tuple("abcdefghij")).eval().net
    history = torch.tensor([[1, 2, 3, 4]])
    changed = torch.tensor([[1, 2, 9, 8]])
    lengths = torch.tensor([4])
    one = net.states(history, net.text_features(text[history]), lengths)
    other = net.states(changed, net.text_features(text[changed]), lengths)
    assert torch.allclose(one[:, :2], other[:, :2], atol=1e-6)
    assert (one[:, 2] - other[:, 2]).abs().max() > 1e-3


def test_preference_loss_cannot_touch_what_deeprec_says_without_one(text: torch.Tensor) -> None:
    model = TRM(CONFIGS[1], tuple("abcdefghij"))
    net = model.net
    history = torch.tensor([[1, 2, 3]])
    states = net.states(history, net.text_features(text[history]), torch.tensor([3]))[:, -1]
    told, known = net.apart(states, model.item_vectors(torch.arange(10), text))
    (net.fuse(told, text[:1], None) @ known.T).sum().backward()
    untouched = (net.item_embedding, net.source, net.text_in, net.text_history, net.encoder)
    for module in untouched:
        for parameter in module.parameters():
            assert parameter.grad is None or not parameter.grad.any()
    history_block = net.target.weight.grad[:, : -net.config.preference_dim]
    assert not history_block.any()
    assert net.query[0].weight.grad.any()


def test_bad_histories_are_refused(model: TRM, text: torch.Tensor) -> None:
    with pytest.raises(TRMError, match="empty"):
        model.user_vectors(torch.tensor([[-1]]), text[:1][None], torch.tensor([0]))
    with pytest.raises(TRMError, match="last 6"):
        model.user_vectors(torch.zeros(1, 7, dtype=torch.long), text[:7][None], torch.tensor([7]))


def test_checkpoint_gives_the_same_scores(model: TRM, text: torch.Tensor, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    model.save_pretrained(folder, card="# card")
    model.save_pretrained(folder, card="# card")  # replaces
    again = TRM.from_pretrained(folder, dataset_fingerprint="data-a", encoder_fingerprint="enc-a")
    assert again.item_ids == model.item_ids
    assert again.config == model.config
    assert not again.training
    assert torch.equal(users(again, text, [[1, 2]]), users(model, text, [[1, 2]]))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "items.json", "model.safetensors",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("what", ["dataset", "encoder"])
def test_checkpoint_of_something_else_is_refused(model: TRM, tmp_path: Path, what: str) -> None:
    model.save_pretrained(tmp_path / "m")
    stored = "data-a" if what == "dataset" else "enc-a"
    with pytest.raises(TRMError, match=f"{stored}.*other-b"):
        TRM.from_pretrained(tmp_path / "m", **{f"{what}_fingerprint": "other-b"})


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", b"{", "incomplete or damaged"),
        ("config.json", b'{"name": "nobody"}', "nobody"),
        ("config.json", b'{"name": "paper", "text_dim": 32, "dim": 12}', "do not fit"),
        ("model.safetensors", b"\x00" * 40, "incomplete or damaged"),
        ("README.md", b"\xff", "incomplete or damaged"),
        ("items.json", None, "not a TRM checkpoint: it lacks items.json"),
        ("model.safetensors", None, "not a TRM checkpoint: it lacks model.safetensors"),
    ],
)
def test_damaged_checkpoints_are_refused(
    model: TRM, tmp_path: Path, file: str, content: bytes | None, says: str
) -> None:
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(TRMError, match=says):
        TRM.from_pretrained(folder)


def test_no_checkpoint_and_no_such_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TRMError, match="no TRM checkpoint"):
        TRM.from_pretrained(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TRMError, match="not a TRM checkpoint"):
        TRM.from_pretrained(tmp_path / "empty")

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("deeprec.tools.trm.model.snapshot_download", unreachable)
    with pytest.raises(TRMError, match="no connection"):
        TRM.from_pretrained("someone/something")


@pytest.mark.parametrize(
    "what", ["a file beside", "git clone", "model of transformers", "its README", "file"]
)
def test_what_is_no_checkpoint_of_a_trm_is_not_overwritten(
    model: TRM, tmp_path: Path, what: str
) -> None:
    place = tmp_path / "there"
    model.save_pretrained(place)
    if what == "a file beside":
        (place / "tokenizer.json").write_text("{}")
    elif what == "git clone":
        (place / ".git").mkdir()
    elif what == "model of transformers":
        (place / "items.json").unlink()
        (place / "config.json").write_text('{"model_type": "bert"}')
    elif what == "its README":
        for name in ("config.json", "items.json", "model.safetensors"):
            (place / name).unlink()
    else:
        shutil.rmtree(place)
        place.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(TRMError, match=r"something else than a TRM|is a file"):
        model.save_pretrained(place)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_an_older_checkpoint_is_replaced_whatever_its_version(model: TRM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m", card="old")
    (tmp_path / "m" / "config.json").write_text('{"name": "deeprec", "no_longer_known": 1}')
    (tmp_path / "m" / "fit.json").write_text("{}")  # of the old weights
    model.save_pretrained(tmp_path / "m", card="new")
    assert TRM.from_pretrained(tmp_path / "m").card == "new"
    assert not (tmp_path / "m" / "fit.json").exists()
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    model.save_pretrained(tmp_path / "link", card="newest")
    assert (tmp_path / "link").is_symlink()
    assert TRM.from_pretrained(tmp_path / "m").card == "newest"
    assert {path.name for path in tmp_path.iterdir()} == {"m", "empty", "link"}


def test_the_card_stays_with_the_model(
    model: TRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "plain")
    written = (tmp_path / "plain" / "README.md").read_text()
    assert yaml.safe_load(written.split("---")[1])["library_name"] == "deeprec"
    assert f"`{model.config.name}`, over 10 items" in written
    assert "`data-a`" in written
    assert "from the configuration alone" in written
    assert ("found by their text" in written) == (model.config.name == "deeprec")
    model.save_pretrained(tmp_path / "told", card="# Ours, läsbar")
    again = TRM.from_pretrained(tmp_path / "told")
    again.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text("utf-8") == "# Ours, läsbar"
    monkeypatch.setattr(
        "deeprec.tools.trm.model.snapshot_download", lambda *_, allow_patterns: (
            tmp_path / "told" if "README.md" in allow_patterns else None
        )
    )  # fmt: skip
    assert TRM.from_pretrained("someone/told").card == "# Ours, läsbar"
    (tmp_path / "told" / "README.md").unlink()
    assert TRM.from_pretrained(tmp_path / "told").card == ""


def test_a_failed_save_leaves_the_old_checkpoint(
    model: TRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "m", card="old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("deeprec.tools.trm.model.save_file", fail)
    with pytest.raises(TRMError, match="disk full"):
        model.save_pretrained(tmp_path / "m", card="new")
    assert (tmp_path / "m" / "README.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_leaves_the_old_checkpoint(
    model: TRM, small_disk: Callable[[int], Disk]
) -> None:
    disk = small_disk(4)
    model.save_pretrained(disk.folder / "m", card="old")
    disk.fill(leave=12_288)
    with pytest.raises(TRMError, match=r"No space left on device.*Free disk space"):
        model.save_pretrained(disk.folder / "m", card="new")
    assert TRM.from_pretrained(disk.folder / "m").card == "old"
    assert {path.name for path in disk.folder.iterdir()} == {"m", ".filler"}
    disk.free()
    model.save_pretrained(disk.folder / "m", card="new")
    assert TRM.from_pretrained(disk.folder / "m").card == "new"


def test_a_checkpoint_that_could_not_be_replaced_is_put_back(
    model: TRM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "m", card="old")
    replace, moves = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 2:
            raise OSError("no such device")
        replace(source, target)

    monkeypatch.setattr("deeprec.tools.trm.model.os.replace", second_fails)
    with pytest.raises(TRMError, match="no such device"):
        model.save_pretrained(tmp_path / "m", card="new")
    assert TRM.from_pretrained(tmp_path / "m").card == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_push_uploads_the_whole_checkpoint(model: TRM, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, object] = {}

    class Hub:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            sent["private"] = private

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
            sent["files"] = {path.name for path in folder_path.iterdir()}
            sent["card"] = (folder_path / "README.md").read_text()
            sent["weights"] = load_file(folder_path / "model.safetensors").keys()
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("deeprec.tools.trm.model.HfApi", Hub)
    model.card = "# card"
    assert model.push_to_hub("me/trm", private=True) == "https://hub/me/trm"
    assert sent["card"] == "# card"
    assert sent["private"] is True
    assert sent["files"] == {"README.md", "config.json", "items.json", "model.safetensors"}
    assert sent["weights"] == model.state_dict().keys()


@pytest.mark.parametrize(
    "raw", [{"name": "deeprec", "hedas": 2}, {"name": "paper", "dropout": 1.0}, {"dim": "x"}, []]
)
def test_a_configuration_with_a_mistake_is_refused(raw: object) -> None:
    with pytest.raises(TRMError, match="not a TRM configuration"):
        parse_config(raw)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(TRMError, match="multiple of heads"):
        TRM(DeepRecConfig(dim=10, heads=4, text_dim=8), ("a",))
