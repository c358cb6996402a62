import pytest

import tiny
from dreambooth_lab import lab
from dreambooth_lab.config import ConfigError, check, enums
from dreambooth_lab.data.module import DreamBoothData
from dreambooth_lab.data.preparation.caption import captions
from dreambooth_lab.data.sources.open import open_source
from dreambooth_lab.data.sources.scan import ScanCache, scan
from dreambooth_lab.data.spec import Captions, Where
from dreambooth_lab.factory import build_family


def scan_table(where, tmp_path):
    return scan(open_source(where, str(tmp_path / "spool")), ScanCache(tmp_path / "memory"))


@pytest.fixture
def folder(tmp_path):
    return tiny.save_photos(tmp_path / "photos", [(40, 30), (50, 20)])


def test_csv_table_is_read(folder, tmp_path):
    (folder / "t.csv").write_text(f'file,text\n00.png,"one, two"\n{folder}/01.png,ü\nfile://{folder}/00.png,again\n')
    done = scan_table(Where(enums.DatasetType.table, str(folder / "t.csv"), "file", ("text",)), tmp_path)
    assert [p.captions for p in done.pictures] == [("one, two",), ("ü",), ("again",)] and not done.rejected
    assert done.pictures[0].digest == done.pictures[2].digest
    rule = Captions(enums.CaptionKind.column, ("sks",), prepend=True)
    assert captions(done.pictures[0], rule) == ("sks one, two",)


def test_parquet_table_with_lists_of_captions_is_read(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"name": ["00.png", "01.png"], "a": [["one", "two"], []], "b": ["three", None]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    done = scan_table(Where(enums.DatasetType.table, str(tmp_path / "t.parquet"), "name", ("a", "b"), str(folder)), tmp_path)
    assert [p.captions for p in done.pictures] == [("one", "two", "three"), ()]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="can't be read as parquet"):
        scan_table(Where(enums.DatasetType.table, str(tmp_path / "bad.parquet"), "name"), tmp_path)


def test_names_without_extension_and_fallback_captions_are_read(folder, tmp_path):
    (folder / "t.csv").write_text("file,text,more\n00,one,x\n01.png,,two\n")
    done = scan_table(Where(enums.DatasetType.table, str(folder / "t.csv"), "file", ("text",), fallback_column="more"), tmp_path)
    assert [(p.name, p.captions) for p in done.pictures] == [("00.png", ("one",)), ("01.png", ("two",))]


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_dataset_is_read(folder, tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(folder / "00.png"), str(folder / "01.png")], "text": ["one", "two"]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    where = Where(enums.DatasetType.huggingface, str(tmp_path / "saved"), "image", ("text",), streaming=streaming)
    done = scan_table(where, tmp_path)
    assert [(p.size, p.captions) for p in done.pictures] == [((30, 40), ("one",)), ((20, 50), ("two",))]
    assert done.pictures[0].source.read(done.pictures[0].name) == (folder / "00.png").read_bytes()
    with pytest.raises(ConfigError, match=r"has no column 'img'; did you mean 'image'\?"):
        scan_table(where._replace(image_column="img"), tmp_path)
    with pytest.raises(ConfigError, match="can't be loaded as a dataset"):
        scan_table(where._replace(path=str(tmp_path / "nowhere")), tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_local_hugging_face_folder_is_read(small, folder, tmp_path, streaming):
    """The layout of a hub repository (images and metadata.csv) up to batches; a second start encodes nothing."""
    pytest.importorskip("datasets")
    (folder / "metadata.csv").write_text("file_name,text\n00.png,one\n01.png,two\n")
    words = [w for w in small if not w.startswith(("dataset", "prior", "cache"))] + [f"cache={tmp_path / 'cache'}"]
    own = [
        "dataset.type=huggingface",
        "dataset.caption=column",
        "dataset.caption_column=text",
        f"dataset.streaming={streaming}",
        "dataset.batch_size=1",
        "validation.prompts=[a dog]",
    ]
    for turn in range(2):
        cfg = lab.compose(*words, f"dataset.path={folder}", *own)
        check(cfg)
        data = DreamBoothData(cfg, build_family(cfg))
        data.prepare()
        (summary,) = data.summaries()
        assert (summary.found, summary.cached, summary.built) == (2, 2 * turn, 2 - 2 * turn)
        assert {data.build(data.schedule.batch(n)).captions for n in range(8)} == {("one",), ("two",)}
