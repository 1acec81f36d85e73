"""Model files: what was saved is loaded, what is damaged or newer is refused, nothing can run code."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stimage_sd import models
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._files import FORMAT_VERSION, write_model
from stimage_sd.models._nb import NBModel
from stimage_sd.models._specification import TileSpecification


@pytest.fixture
def model() -> NBModel:
    random = np.random.default_rng(0)
    sections = {name: random.normal(size=(30, 6)).astype(np.float32) for name in "ab"}
    return NBModel(
        genes=("ERBB2", "CD4", "ACTB"),
        tiles=TileSpecification(
            extractor="toy",
            weights_hash="abc",
            fields_of_view=(1.0, 2.0),
            context_rings=1,
            input_px=224,
            side_px=110.5,
            size_um=55.0,
            stain={"method": "macenko", "concentrations": "match", "reference": {"white_point": [240.0] * 3}},
        ),
        features=FeatureSpace.fit(sections, n_components=4, standardize="cohort", seed=0),
        head="paper",
        parameters={
            "weight": random.normal(size=(2, 4, 6)).astype(np.float32),
            "bias": random.normal(size=(2, 6)).astype(np.float32),
        },
        floor=random.uniform(1, 2, (2, 3)).astype(np.float32),
        total=1234.5,
        interval_level=0.87,
        training={"sections": ["a", "b"], "seed": 0, "history": {"epoch": [1, 1], "member": [0, 1]}},
    )


def parts(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, **files: bytes) -> Path:
    """The same zip with some of its files replaced."""
    contents = parts(path) | {name.replace("_", ".", 1): data for name, data in files.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("name", ["m.stimage", "m.zip", "folder", "deep/er/m.stimage"])
def test_round_trip(model: NBModel, tmp_path: Path, name: str) -> None:
    path = model.save(tmp_path / name)
    assert path.is_dir() == (name == "folder")
    back = models.load(str(path))
    assert type(back) is NBModel
    for field in ("genes", "tiles", "head", "total", "interval_level", "training"):
        assert getattr(back, field) == getattr(model, field), field
    assert back.features.standardize == "cohort"
    for field in fields(FeatureSpace)[:4]:
        np.testing.assert_array_equal(getattr(back.features, field.name), getattr(model.features, field.name))
    np.testing.assert_array_equal(back.floor, model.floor)
    assert set(back.parameters) == {"weight", "bias"}
    features = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    for ours, theirs in zip(model.r_and_p(features), back.r_and_p(features), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(back.history) == 2


def test_a_file_is_arrays_and_json_alone(model: NBModel, tmp_path: Path) -> None:
    contents = parts(model.save(tmp_path / "m.stimage"))
    assert sorted(contents) == ["config.json", "model.safetensors"]
    config = json.loads(contents["config.json"])
    assert config["format_version"] == FORMAT_VERSION
    assert config["kind"] == "nb"
    assert config["genes"] == ["ERBB2", "CD4", "ACTB"]


def test_loading_never_unpickles(model: NBModel, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    trap = pickle.dumps(Trap())
    path = model.save(tmp_path / "m.stimage")
    for files in ({"config_json": trap}, {"model_safetensors": trap}):
        with pytest.raises(ValueError, match=r"model at .*m\.stimage"):
            models.load(rewritten(model.save(path), **files))
    (tmp_path / "p.stimage").write_bytes(trap)
    with pytest.raises(ValueError, match="truncated or something else"):
        models.load(tmp_path / "p.stimage")
    assert not (tmp_path / "sprung").exists()


def test_every_truncation_is_noticed(model: NBModel, tmp_path: Path) -> None:
    whole = model.save(tmp_path / "m.stimage").read_bytes()
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        (tmp_path / "cut.stimage").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot be read .* truncated or something else; save the model again"):
            models.load(tmp_path / "cut.stimage")


def test_flipped_bytes_are_noticed(model: NBModel, tmp_path: Path) -> None:
    """A byte anywhere: refused with a reason, or (in what a zip does not check) without effect."""
    whole = model.save(tmp_path / "m.stimage").read_bytes()
    reference = models.load(tmp_path / "m.stimage")
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "bad.stimage").write_bytes(damaged)
        try:
            same = models.load(tmp_path / "bad.stimage")
        except ValueError as error:
            assert "bad.stimage" in str(error)  # noqa: PT017
            refused += 1
        else:
            np.testing.assert_array_equal(same.parameters["weight"], reference.parameters["weight"])
            assert same.genes == reference.genes
    assert refused > 120


def test_truncated_arrays_in_a_folder(model: NBModel, tmp_path: Path) -> None:
    path = model.save(tmp_path / "folder")
    arrays = path / "model.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(path)
    arrays.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(path)


def changed_config(model: NBModel, path: Path, **change: object) -> Path:
    config = json.loads(parts(model.save(path))["config.json"])
    config.update(change)
    config = {key: value for key, value in config.items() if value is not ...}
    return rewritten(path, config_json=json.dumps(config).encode())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": FORMAT_VERSION + 1}, rf"version {FORMAT_VERSION + 1}; this package reads up to .*upgrade"),
        ({"format_version": ...}, "config without a format version"),
        ({"format_version": "1"}, "config without a format version"),
        ({"kind": "forest"}, r"kind 'forest'; this version knows \['baseline', .*, 'nb'\]. Update"),
        ({"genes": ["ERBB2", "CD4"]}, "damaged"),
        ({"genes": ...}, "damaged: 'genes'"),
        ({"head": "dispersion"}, "damaged"),
        ({"head": "other"}, "damaged: .*'other'"),
        ({"tiles": {"extractor": "toy"}}, "damaged"),
        ({"tiles": None}, "damaged"),
        ({"standardize": "nobody"}, "damaged"),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else "",
)
def test_tampered_configs_are_refused(model: NBModel, tmp_path: Path, change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        models.load(changed_config(model, tmp_path / "m.stimage", **change))


@pytest.mark.parametrize("content", [b"[1, 2]", b"3", b'"text"', b"\xff\xfe", b"{"])
def test_configs_that_are_none(model: NBModel, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"model at .*m.stimage"):
        models.load(rewritten(model.save(tmp_path / "m.stimage"), config_json=content))


def test_missing_arrays_are_refused(model: NBModel, tmp_path: Path) -> None:
    path = model.save(tmp_path / "folder")
    save_file({"floor": model.floor}, path / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        models.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No model at .*none\.stimage"):
        models.load(tmp_path / "none.stimage")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no model")
    with pytest.raises(ValueError, match=r"cannot be read .*something else"):
        models.load(tmp_path / "other.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(tmp_path / "empty")


def test_saving_replaces_models_and_nothing_else(model: NBModel, tmp_path: Path) -> None:
    for name in ("m.stimage", "folder"):
        model.save(tmp_path / name)
        model.save(tmp_path / name)
        assert models.load(tmp_path / name).genes == model.genes
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "notes.txt").write_text("more of it")
    for name in ("thesis", "notes.txt"):
        with pytest.raises(FileExistsError, match="is no stimage-sd model, so it is not replaced"):
            model.save(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_model(model: NBModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model.save(tmp_path / "m.stimage")
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.stimage"]


def test_saved_twice_is_equal_bit_for_bit(model: NBModel, tmp_path: Path) -> None:
    first, second = (parts(model.save(tmp_path / name)) for name in ("one.stimage", "two.stimage"))
    assert first == second


def test_arrays_of_any_layout_are_written_as_they_are(tmp_path: Path, model: NBModel) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    write_model(tmp_path / "m", kind="nb", config={}, arrays={"x": array})
    from safetensors.numpy import load_file

    np.testing.assert_array_equal(load_file(tmp_path / "m" / "model.safetensors")["x"], array)


@pytest.mark.parametrize("make", [str, Path])
def test_paths_of_either_kind(model: NBModel, tmp_path: Path, make: Callable) -> None:
    assert models.load(make(model.save(make(tmp_path / "m.stimage")))).n_members == 2
