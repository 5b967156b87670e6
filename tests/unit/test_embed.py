"""A Parquet file of embeddings holds, for every picture and in the order of the data, what the model gives for it."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import swinv2_scale
from swinv2_scale import config
from swinv2_scale.cli import main
from swinv2_scale.data.images import EncodedImage
from swinv2_scale.data.manifest import open_manifest
from swinv2_scale.data.pack import pack
from swinv2_scale.data.shards import read_sample
from swinv2_scale.data.transforms import EvaluationTransform
from swinv2_scale.embed import Embed, embed, open_pictures
from swinv2_scale.export import Loaded, export, model_of

SIZE = {"image_size": 32, "window_size": 4, "num_classes": 7, "depths": [2, 1, 1], "num_heads": [1, 2, 4]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = swinv2_scale.create_model("debug", **SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    arguments = config.plain(config.compose_model("debug", **SIZE))
    export(Loaded(model, {"model": arguments, "pretrained_windows": model.pretrained_windows, "classes": []}), file)
    return file


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((60, 40)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number in range(7):
        picture(tmp_path / "tree" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    return tmp_path / "tree"


def expected(checkpoint: Path, data: Path, size: int = 32) -> tuple[list[str], torch.Tensor]:
    """Keys and embeddings, one picture at a time, by forward of the same model without classifier."""
    model = swinv2_scale.create_model("debug", **SIZE | {"num_classes": 0}).eval()
    swinv2_scale.load_checkpoint(model, checkpoint)
    manifest = open_manifest(data)
    transform = EvaluationTransform(image_size=size, crop=None, interpolation="bicubic")
    keys, vectors = [], []
    for index in range(len(manifest)):
        key, members = read_sample(manifest, index)
        image = transform({"image": EncodedImage(members["png"])})["image"]
        keys.append(key)
        with torch.no_grad():
            vectors.append(model(image[None])[0])
    return keys, torch.stack(vectors)


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_every_picture_once_in_the_order_of_the_data(kind: str, checkpoint: Path, tree: Path, tmp_path: Path, capsys):
    data = tree
    if kind == "shards":
        data = pack(tree, tmp_path / "shards", format="imagefolder", shard_size=3, seed=5).root
    file = tmp_path / "embeddings.parquet"
    assert main(["embed", str(checkpoint), str(data), str(file), "--batch", "3", "--workers", "1"]) == 0
    assert "7 embeddings" in capsys.readouterr().out
    table = pq.read_table(file)
    keys, vectors = expected(checkpoint, data)
    assert table["key"].to_pylist() == keys
    assert len(set(keys)) == 7
    assert table["label"].to_pylist() == [("cat", "dog").index(key.split("/")[0]) for key in keys]
    kind_of_vector = table.schema.field("embedding").type
    assert kind_of_vector.list_size == 128 and str(kind_of_vector.value_type) == "float"
    embeddings = torch.tensor(table["embedding"].to_pylist())
    torch.testing.assert_close(embeddings, vectors, rtol=0, atol=1e-5)
    assert torch.cdist(embeddings, embeddings).add(torch.eye(7)).min() > 1e-2  # rows could be mistaken otherwise
    metadata = {name.decode(): json.loads(value) for name, value in pq.read_schema(file).metadata.items()}
    assert metadata["checkpoint"] == str(checkpoint) and metadata["data"] == str(data)
    assert metadata["image_size"] == 32 and metadata["layer"] == "pooled" and metadata["classes"] == ["cat", "dog"]
    assert metadata["model"]["depths"] == [2, 1, 1]


def test_rows_are_written_as_they_come(checkpoint: Path, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.parquet"
    assert embed(model_of(checkpoint), tree, file, checkpoint=checkpoint, batch=2, row_group=3, image_size=48) == 7
    opened = pq.ParquetFile(file)
    assert [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)] == [3, 3, 1]
    _, vectors = expected(checkpoint, tree, size=48)
    torch.testing.assert_close(torch.tensor(opened.read()["embedding"].to_pylist()), vectors, rtol=0, atol=1e-5)


def test_layers(checkpoint: Path) -> None:
    model = model_of(checkpoint).model
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = model.forward_features(images)
        for number, feature_map in enumerate(maps, start=1):
            found = Embed(model, f"stage{number}")(images)
            torch.testing.assert_close(found, feature_map.flatten(1, 2).mean(1))
        torch.testing.assert_close(model.head(Embed(model, "pooled")(images)), model(images))
    with pytest.raises(ValueError, match="'stage4' is not one of pooled, stage1, stage2, stage3"):
        Embed(model, "stage4")


def test_a_flat_folder_has_no_labels(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    for number, name in enumerate(("b.png", "a.v2.png", "c.JPG")):
        picture(folder / name, number)
    (folder / "notes.txt").write_text("no picture")
    file = tmp_path / "embeddings.parquet"
    assert main(["embed", str(checkpoint), str(folder), str(file)]) == 0
    table = pq.read_table(file)
    assert table["key"].to_pylist() == ["a.v2.png", "b.png", "c.JPG"]
    assert table["label"].null_count == 3
    assert json.loads(table.schema.metadata[b"classes"]) == []
    with pytest.raises(ValueError, match="does not exist"):
        open_pictures(tmp_path / "nothing")


def test_a_picture_that_does_not_decode(checkpoint: Path, tree: Path, tmp_path: Path, caplog) -> None:
    whole, _ = expected(checkpoint, tree)
    (tree / "dog/3.png").write_bytes(b"no picture")
    file = tmp_path / "embeddings.parquet"
    with pytest.raises(ValueError, match=r"dog/3: image does not decode.*--skip-corrupt"):
        embed(model_of(checkpoint), tree, file, checkpoint=checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tree"]
    assert embed(model_of(checkpoint), tree, file, checkpoint=checkpoint, skip_corrupt=True, row_group=2) == 6
    assert "dog/3" in caplog.text
    assert pq.read_table(file)["key"].to_pylist() == [key for key in whole if key != "dog/3"]


def test_bf16_stays_near(checkpoint: Path, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "embeddings.parquet"
    embed(model_of(checkpoint), tree, file, checkpoint=checkpoint, precision="bf16")
    _, vectors = expected(checkpoint, tree)
    embeddings = torch.tensor(pq.read_table(file)["embedding"].to_pylist())
    assert 1e-4 < (embeddings - vectors).norm() / vectors.norm() < 0.02


def test_refusals(checkpoint: Path, tree: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    taken = tmp_path / "taken.parquet"
    taken.touch()
    assert main(["embed", str(checkpoint), str(tree), str(taken)]) == 2
    assert "taken.parquet exists" in capsys.readouterr().err
    loaded = model_of(checkpoint, image_size=[32, 48])
    with pytest.raises(ValueError, match=r"\[32, 48\] pixels.*--image-size"):
        embed(loaded, tree, tmp_path / "wide.parquet", checkpoint=checkpoint)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["embed", str(checkpoint), str(tree), str(tmp_path / "new.parquet")]) == 2
    assert "pip install 'swinv2-scale[embed]'" in capsys.readouterr().err
