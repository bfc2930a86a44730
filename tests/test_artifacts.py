"""Files of the run folder: atomic, versioned, and wrong ones are errors that name the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orca_rank.artifacts import files, provenance

OPTIONS = {"align": {"lr": 0.1, "epochs": 3}, "data": {"root": "/here"}}


def test_json_comes_back_with_schema_config_and_input_hashes(tmp_path: Path) -> None:
    source = tmp_path / "align" / "embedder.bin"
    source.parent.mkdir()
    source.write_bytes(b"abc")
    path = tmp_path / "measure" / "layers.json"
    files.write_json(path, {"value": torch.tensor(2.5), "list": torch.arange(2)}, config=OPTIONS, inputs=[source])
    content = files.read_json(path, "stage=measure")
    assert (content["value"], content["list"], content["config"]) == (2.5, [0, 1], OPTIONS)
    # SHA-256 of "abc", from FIPS 180-2
    assert content["inputs"] == {
        "align/embedder.bin": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }
    provenance.check_inputs(path, content, "stage=measure")
    source.write_bytes(b"abd")
    with pytest.raises(ValueError, match=r"changed after.*stage=measure"):
        provenance.check_inputs(path, content, "stage=measure")
    source.unlink()
    with pytest.raises(FileNotFoundError, match="gone"):
        provenance.check_inputs(path, content, "stage=measure")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "file.json"
    files.write_json(path, {"value": 1})
    with pytest.raises(TypeError, match="cannot write"):
        files.write_json(path, {"value": object()})
    with pytest.raises(RuntimeError, match="half way"), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert files.read_json(path, "stage=x")["value"] == 1
    assert [item.name for item in path.parent.iterdir()] == ["file.json"]


def test_missing_damaged_and_foreign_files_name_the_command(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "file.json"
    with pytest.raises(FileNotFoundError, match="python -m orca_rank stage=measure"):
        files.read_json(path, "stage=measure")
    path.parent.mkdir()
    path.write_text('{"schema": 1, "val')
    with pytest.raises(ValueError, match=r"damaged.*force=true"):
        files.read_json(path, "stage=measure")
    path.write_text(json.dumps({"schema": 999}))
    with pytest.raises(ValueError, match="schema 999"):
        files.read_json(path, "stage=measure")
    tensors = tmp_path / "stage" / "file.safetensors"
    with pytest.raises(FileNotFoundError, match="stage=align"):
        files.read_tensors(tensors, "stage=align")
    tensors.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="damaged"):
        files.read_tensors(tensors, "stage=align")


def test_finished_compares_the_options_that_matter(tmp_path: Path) -> None:
    path = tmp_path / "align" / "metrics.json"

    def done(options: dict, force: bool = False) -> bool:
        return provenance.finished(path, options, force=force, made_by="stage=align")

    assert not done(OPTIONS)
    files.write_json(path, {}, config=OPTIONS)
    assert done(OPTIONS)
    assert done({**OPTIONS, "data": {"root": "/elsewhere"}})
    assert not done(OPTIONS, force=True)
    with pytest.raises(ValueError, match=r"align\.lr: 0\.1 -> 0\.2.*run=<another name>.*force=true"):
        done({**OPTIONS, "align": {"lr": 0.2, "epochs": 3}})


def test_tensors_and_tables_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(3)}
    files.write_tensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    back = files.read_tensors(tmp_path / "t.safetensors", "stage=x")
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    notes = {f"note {i}": "é" for i in range(8)}
    for name in ("one", "two"):
        files.write_tensors(tmp_path / name, tensors, notes if name == "one" else dict(reversed(notes.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert files.read_tensors(tmp_path / "two", "stage=x").keys() == tensors.keys()
    files.write_csv(tmp_path / "t.csv", [{"a": 1}, {"a": 2, "b": 3}])
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,\n2,3\n"


def test_keys_depend_on_options_not_on_places() -> None:
    assert provenance.key(OPTIONS) == provenance.key({**OPTIONS, "data": {"root": "/elsewhere"}})
    assert provenance.key(OPTIONS) != provenance.key({**OPTIONS, "align": {"lr": 0.2}})


def test_a_result_is_not_of_other_options_for_an_option_that_is_younger() -> None:
    old, new = {"finetune": {"epochs": 3}}, {"finetune": {"epochs": 3, "reduction": "mean"}}
    assert not provenance.differences(old, new) and not provenance.differences(new, old)
    assert provenance.key(old) == provenance.key(new)
    summed = {"finetune": {"epochs": 3, "reduction": "sum"}}
    assert provenance.differences(old, summed) == ["finetune.reduction: mean -> sum"]
    assert provenance.key(old) != provenance.key(summed)
