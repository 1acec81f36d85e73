"""Model files: what was saved is loaded, what is damaged or newer is refused, nothing can run code."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from stimage_sd import models
from stimage_sd.models._features import FeatureSpace
from stimage_sd.models._files import FORMAT_VERSION, write_model
from stimage_sd.models._nb import NBModel
from stimage_sd.models._specification import TileSpecification

STORED = Path(__file__).parent / "stored"


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
        training={
            "sections": ["a", "b"],
            "seed": 0,
            "options": {"size_factors": "total"},
            "history": {"epoch": [1, 1], "member": [0, 1]},
        },
    )


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_model_folder_is_never_gone_while_it_is_replaced(
    model: NBModel, exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr("stimage_sd._files._system_exchange", lambda: None)
    model.save(tmp_path / "model")
    replace(model, total=2.0).save(tmp_path / "model")
    assert models.load(tmp_path / "model").total == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # killed between the two renames of a file system that cannot exchange
    (tmp_path / "model").rename(tmp_path / ".model.replaced")
    assert models.load(tmp_path / "model").total == 2.0


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
    with pytest.raises(ValueError, match="truncated or not a model"):
        models.load(tmp_path / "p.stimage")
    assert not (tmp_path / "sprung").exists()


def test_every_truncation_is_noticed(model: NBModel, tmp_path: Path) -> None:
    whole = model.save(tmp_path / "m.stimage").read_bytes()
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        (tmp_path / "cut.stimage").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cannot be read .* truncated or not a model. Save the model again"):
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
    """As a file of version 1, which has no checksum that would refuse any change."""
    config = json.loads(parts(model.save(path))["config.json"])
    config |= {"format_version": 1, "checksum": ..., **change}
    config = {key: value for key, value in config.items() if value is not ...}
    return rewritten(path, config_json=json.dumps(config).encode())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": FORMAT_VERSION + 1}, rf"version {FORMAT_VERSION + 1}; this package reads up to .*upgrade"),
        ({"format_version": ...}, "config without a format version"),
        ({"format_version": "1"}, "config without a format version"),
        ({"kind": "forest"}, r"kind 'forest'; this version knows \['adapted', .*, 'wrapped'\]. Update"),
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


@pytest.mark.parametrize(
    "change", [{"genes": ["ERBB2", "CD4", "ACTG1"]}, {"total": 1234.4}, {"training": {}}, {"x": 1}]
)
@pytest.mark.parametrize("checksum", ["kept", "dropped"])
def test_any_change_of_a_config_is_noticed(model: NBModel, tmp_path: Path, change: dict, checksum: str) -> None:
    path = model.save(tmp_path / "m.stimage")
    config = json.loads(parts(path)["config.json"]) | change
    if checksum == "dropped":
        del config["checksum"]
    with pytest.raises(ValueError, match=r"m\.stimage is damaged: .*does not match its checksum"):
        models.load(rewritten(path, config_json=json.dumps(config).encode()))


def test_any_change_of_an_array_is_noticed(model: NBModel, tmp_path: Path) -> None:
    path = model.save(tmp_path / "folder")
    arrays = path / "model.safetensors"
    whole = arrays.read_bytes()
    for place in range(len(whole) - 1, 8, -37):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        arrays.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|cannot be read"):
            models.load(path)
    arrays.write_bytes(whole)
    # the layout of the JSON is no content
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()), sort_keys=True))
    assert models.load(path).genes == model.genes


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arrays_that_are_not_finite_are_neither_saved_nor_loaded(model: NBModel, tmp_path: Path, value: float) -> None:
    weight = model.parameters["weight"].copy()
    weight[0, 0, 0] = value
    broken = replace(model, parameters={**model.parameters, "weight": weight})
    match = "1 of 48 values of its array 'head.weight' are not finite"
    with pytest.raises(ValueError, match=f"cannot be saved: {match}"):
        broken.save(tmp_path / "broken.stimage")
    assert list(tmp_path.iterdir()) == []
    # a file of version 1 may hold them
    path = changed_config(model, tmp_path / "m.stimage")
    arrays = {**model.to_parts()[1], "head.weight": weight}
    with pytest.raises(ValueError, match=rf"m\.stimage is damaged: {match}"):
        models.load(rewritten(path, model_safetensors=save(arrays)))


def test_models_of_the_first_version_load(tmp_path: Path) -> None:
    """Files that version 0.1.0 wrote, without a checksum; and what they become when they are saved again."""
    for name, kind in (("nb", NBModel), ("combined", models.CombinedModel), ("genes", models.GeneClassifier)):
        old = models.load(STORED / f"{name}-0.1.0.stimage")
        assert type(old) is kind
        assert old.genes == ("ERBB2", "CD4")
        again = old.save(tmp_path / f"{name}.stimage")
        assert json.loads(parts(again)["config.json"])["format_version"] == FORMAT_VERSION
        assert models.load(again).genes == old.genes
    assert np.isneginf(old.intercepts[1])  # that of a gene that was never high
    with pytest.warns(UserWarning, match="multiplied r by depth.*Fit it again"):
        assert models.load(STORED / "nb-depth-0.1.0.stimage").total == 500.0


@pytest.mark.parametrize("content", [b"[1, 2]", b"3", b'"text"', b"\xff\xfe", b"{"])
def test_configs_that_are_none(model: NBModel, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"model at .*m.stimage"):
        models.load(rewritten(model.save(tmp_path / "m.stimage"), config_json=content))


def test_missing_arrays_are_refused(model: NBModel, tmp_path: Path) -> None:
    path = model.save(tmp_path / "folder")
    save_file({"floor": model.floor}, path / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        models.load(path)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_a_small_file_does_not_unpack_to_a_large_one(tmp_path: Path, part: str) -> None:
    path = tmp_path / "bomb.stimage"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}" if part != "config.json" else b" " * (65 << 20))
        archive.writestr("model.safetensors", b"" if part == "config.json" else bytes(65 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"bomb.stimage, .*its {part} unpacks from [\d,]+ to 68,157,440 bytes"):
            models.load(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No model at .*none\.stimage"):
        models.load(tmp_path / "none.stimage")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "no model")
    with pytest.raises(ValueError, match=r"cannot be read .*not a model"):
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
        with pytest.raises(FileExistsError, match="is not a stimage-sd model, so it is not replaced"):
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
