"""The search finds where the memory ends, and a plan is a table."""

import numpy as np
import pytest

from flaxkd.plan import compiling, devices, table
from flaxkd.pretrained import families
from tests.plan.test_compiling import config_of


def needs(fixed: float, each: float):
    """A stand-in for a compiler: of n images on a device it says fixed + n * each GiB."""

    def row(config, target):
        images = config.batch_size // target.count
        saved = {False: 1.0, True: 0.5, "transformer_blocks": 0.25}[config.remat]
        held = {"parameters": fixed * table.GIB / 4, "optimizer": fixed * table.GIB / 2}
        needed = (fixed + images * each * saved) * table.GIB
        return {"per_device": images, "needed": needed, "fits": needed <= table.room(target), "held": held,
                "remat": config.remat, "mesh": table.shape_of(config.mesh, target)}  # fmt: skip

    return row


@pytest.mark.parametrize(("fixed", "each", "found"), [(8.0, 0.8, 8), (8.0, 0.1, 67), (2.0, 12.0, 1), (2.0, 13.0, 0)])
@pytest.mark.parametrize("start", [4, 64, 512])
def test_the_search_ends_at_the_last_batch_that_fits(monkeypatch, fixed, each, found, start):
    monkeypatch.setattr(table, "row", needs(fixed, each))
    rows = table.largest(config_of(batch_size=start), devices.target("v5e:2x2"))
    assert (rows[-1]["per_device"] if rows else 0) == found


def test_what_would_make_twice_as_many_fit(monkeypatch):
    monkeypatch.setattr(table, "row", needs(8.0, 0.8))
    rows = table.next_size(config_of(), devices.target("v5e:2x2"), 8)
    assert [(r["remat"], r["mesh"], r["per_device"], r["fits"]) for r in rows] == [
        (True, "4 x 1", 16, True),
        ("transformer_blocks", "4 x 1", 16, True),
        (False, "1 x 4", 16, False),
        (True, "1 x 4", 16, True),
        ("transformer_blocks", "1 x 4", 16, True),
    ]
    finer = table.next_size(config_of(remat=True), devices.target("v5e:2x2"), 8)
    assert [(r["remat"], r["mesh"]) for r in finer] == [
        ("transformer_blocks", "4 x 1"),
        (True, "1 x 4"),
        ("transformer_blocks", "1 x 4"),
    ]
    assert len(table.next_size(config_of(remat="transformer_blocks"), devices.target("v5e:2x2"), 8)) == 1
    seen = []
    monkeypatch.setattr(table, "row", lambda config, target: seen.append((config.attention, config.remat)))
    table.next_size(config_of(attention="plain"), devices.target("v5e:2x2"), 8)
    plain = [("plain", remat) for remat in (True, "transformer_blocks", False, True, "transformer_blocks")]
    assert seen == [(None, False), *plain]


def test_a_plan_as_a_table(monkeypatch):
    here = devices.target("v5e:2x2")
    result = compiling.Compiled(3 * 2**30, 2**30, 1e12, {"all-reduce": (2, 2**29)}, 1.0)
    unet = families.SD15 | {"sample_size": 8}
    lowered = compiling.Lowered(
        None,
        {"parameters": 1, "optimizer": 2, "average": 0, "teacher": 3, "batch": 4},
        ((unet, 1), (unet, 3)),
        8,
        "plain",
        "libtpu",
    )
    monkeypatch.setattr(compiling, "lower", lambda config, target: lowered)
    monkeypatch.setattr(compiling, "assigned", lambda config, lowered, target: result)
    monkeypatch.setattr(compiling, "kept", lambda make, *of: make(*of))
    row = table.row(config_of(), here)
    rate = 4 * 197e12 * 0.40 / row["image_flops"]
    assert row["images_per_second"] == pytest.approx(rate)
    assert row["device_hours"] == pytest.approx(4 * 300 * 8 / rate / 3600)
    text = table.markdown([row, row | {"fits": False, "temporary": None}])
    assert "| v5e:2x2 | sd_small | 64 | 2 | plain | no | 4 x 1 |" in text and "2 all-reduce 0.50" in text
    assert "estimates" in text and "40% (no figure is published" in text
    assert np.all([line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines()[:4]])
