"""Large image sets in every format, a cache made of one, and what has to be in it."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from flaxkd.data import large, loader, openmoji, readers, records, sources
from flaxkd.data.filters import Recipe

N = 24  # pictures of a source, of which 4 are held out
CAPTIONS = [f"picture {i}" for i in range(N)]
RECIPE = Recipe(resolution=8, validation=0.2)


def encode(images):
    """Stands for the VAE: float32[b, 2, 2, 6], different left and right."""
    small = images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4)) / 255
    return np.concatenate([small, -small], -1).astype(np.float32)


def tokenize(captions):
    return {"input_ids": np.array([[len(c), *c.encode()[-3:].ljust(3)] for c in captions], np.int32)}


def picture(i, size=(8, 8)):
    """A PNG of the brightness i, with a darker right half."""
    image = Image.new("RGB", size, (i, i, i))
    image.paste((i // 2,) * 3, (size[0] // 2, 0, *size))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def write_tar(file, samples):
    """samples: (key, {ending: bytes or what JSON can hold})."""
    with tarfile.open(file, "w") as tar:
        for key, files in samples:
            for ending, content in files.items():
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def tars(folder, size=8, about=lambda i: {}):
    folder.mkdir(exist_ok=True)
    for start in range(0, N, size):
        samples = [
            (
                f"{i:09}",
                {"png": picture(i), "txt": CAPTIONS[i].encode(), "json": {"key": f"{i:09}", **about(i)}},
            )
            for i in range(start, start + size)
        ]
        write_tar(folder / f"{start // size:05}.tar", samples)
        pq.write_table(pa.table({"url": ["http"]}), folder / f"{start // size:05}.parquet")  # as img2dataset does
    return folder


def img2dataset_parquet(folder):
    folder.mkdir()
    table = pa.table({"jpg": [picture(i) for i in range(N)], "caption": CAPTIONS})
    pq.write_table(table, folder / "00000.parquet", row_group_size=12)
    return folder


def saved_to_disk(folder):
    """As `DatasetDict.save_to_disk` of Hugging Face's datasets."""
    (folder / "train").mkdir(parents=True)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    names = [f"data-0000{k}-of-00002.arrow" for k in range(2)]
    for k, name in enumerate(names):
        rows = range(k * N // 2, (k + 1) * N // 2)
        images = [{"bytes": picture(i), "path": f"{i}.png"} for i in rows]
        table = pa.table({"image": images, "text": [CAPTIONS[i] for i in rows]})
        with (
            pa.OSFile(str(folder / "train" / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table, max_chunksize=5)
    (folder / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    return folder


def listed(folder, name="metadata.jsonl"):
    folder.mkdir()
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]
    for i in range(N):
        (folder / f"{i}.png").write_bytes(picture(i))
    with (folder / name).open("w") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def make(source, out, recipe=RECIPE, rows=10, encode=encode, **changes):
    moments = lambda images: {"moments": encode(images)}
    options = {"encode": moments, "tokenize": tokenize, "batch_size": 4, "fingerprint": "vae", "threads": 2}
    parts = readers.open_chunks(str(source), rows=rows)
    return large.build(parts, out, recipe, **{**options, "progress": False, **changes})


def contents(out, split="train", kind="moments"):
    """{caption: (moments, ids)} of a finished cache, which a training can open."""
    about = records.read_about(sources.open_source(str(out), split).cache)
    layout, found = about["layout"], loader.open_records(out / split, about, kind)
    views = {layout.caption(record): layout.view(record) for record in found}
    return {caption: (view["moments"].astype(np.float32), view["input_ids"]) for caption, view in views.items()}


def check_complete(out, brightness=lambda caption: int(caption.split()[1])):
    train, validation = (contents(out, split) for split in large.SPLITS)
    held = {c for c in CAPTIONS if openmoji.caption_hash(c) < 0.2}
    assert set(validation) == held and set(train) == set(CAPTIONS) - held and len(held) == 4
    for caption, (moments, ids) in (train | validation).items():
        want = encode(np.asarray(Image.open(io.BytesIO(picture(brightness(caption)))))[None])[0]
        np.testing.assert_allclose(moments, want, atol=1e-4)
        np.testing.assert_array_equal(ids, tokenize([caption])["input_ids"][0])


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
