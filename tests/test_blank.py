"""The command that writes a pipeline with random weights."""

import jax
import numpy as np
import pytest

from flaxkd import blank
from flaxkd.pretrained import ARCHITECTURES, FAMILIES, Folder
from tests import tiny


@pytest.mark.parametrize(("name", "configs"), [("sd15", tiny.SD), ("sd21", tiny.SD), ("sdxl", tiny.XL)])
def test_a_pipeline_of_an_architecture_with_random_weights(name, configs, tmp_path, monkeypatch, capsys):
    row = ARCHITECTURES[name]
    small = {part: row.configs[part] | configs[part] for part in row.configs if part != "scheduler"}
    small["unet"] |= {key: row.unet[key] for key in ("use_linear_projection",) if key in row.unet}
    architecture = row._replace(configs=small | {"scheduler": row.configs["scheduler"]})
    monkeypatch.setitem(ARCHITECTURES, name, architecture)
    blank.main(["--architecture", name, "--out", str(tmp_path / "new")])
    assert f"{row.title} with random weights" in capsys.readouterr().out
    folder = Folder.open(tmp_path / "new")
    assert folder.family is FAMILIES[row.family] and folder.config("scheduler") == row.configs["scheduler"]
    for part in folder.parts:
        assert {x.dtype for x in folder.tensors(part).values()} == {np.dtype("float16")}
        as_asked = jax.tree.map(lambda x: x.shape, folder.shapes(part))
        assert jax.tree.map(np.shape, folder.params(part)) == as_asked
        if part in folder.family.encoders:
            assert folder.config(part)["vocab_size"] == blank.VOCABULARY
    assert folder.tokenize(["red apple"])["input_ids"].shape == (1, 16)

    with pytest.raises(SystemExit, match="is a pipeline folder already: choose a new one"):
        blank.main(["--architecture", name, "--out", str(tmp_path / "new")])
