"""Where a model is: here, in the package, or on the hub."""

import time

import pytest

from flaxkd.pretrained import hub


def test_resolve_folders(tiny_pipeline, tmp_path, monkeypatch):
    assert hub.resolve(str(tiny_pipeline)) == tiny_pipeline
    monkeypatch.setattr(hub, "EMBEDDED", tiny_pipeline)
    assert hub.resolve(None) == tiny_pipeline
    monkeypatch.setenv("HOME", str(tiny_pipeline.parent))
    assert hub.resolve("~/pipeline") == tiny_pipeline
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        hub.resolve(tiny_pipeline / "unet")
    for absent in ("./models/mine", "/models/mine", "~/models", "a/b/c", "mine", str(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            hub.resolve(absent)


def test_hub_id_without_network_fails_quickly_with_the_remedy():
    started = time.monotonic()
    with pytest.raises(FileNotFoundError) as error:
        hub.resolve("someone/no-such-model")
    assert time.monotonic() - started < 5
    assert "hf download someone/no-such-model --local-dir DIR" in str(error.value)


def test_hub_id_asks_only_for_what_is_used(tiny_pipeline, monkeypatch):
    import fnmatch

    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda hub_id, **kwargs: asked.update(kwargs) or str(tiny_pipeline),
    )
    assert hub.resolve("owner/name") == tiny_pipeline
    any_of = lambda name, patterns: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    wanted = lambda n: any_of(n, asked["allow_patterns"]) and not any_of(n, asked["ignore_patterns"])
    used = [str(path.relative_to(tiny_pipeline)) for path in tiny_pipeline.rglob("*.*") if path.is_file()]
    used += [
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert [name for name in used if not wanted(name)] == []
    stem = "unet/diffusion_pytorch_model"
    skipped = [f"{stem}.bin", f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors", "v1-5.safetensors"]
    skipped += ["safety_checker/model.safetensors", "v1-5-pruned.ckpt"]
    assert [name for name in skipped if wanted(name)] == []


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A working folder with runs/small and runs/tiny in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("small", "tiny"):
        (tmp_path / "runs" / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("model", "near"),
    [
        ("runs/smal", "runs/small"),
        ("runs/Small", "runs/small"),
        ("./runs/tinny", "runs/tiny"),
        ("runs\\small", "runs/small"),
        ("run/small", None),
        ("./x/y", None),
        ("~nobody-here/model", None),
        ("C:\\models\\mine", None),
    ],
)
def test_a_mistyped_folder_is_no_hub_id_and_gets_its_neighbours(runs, monkeypatch, model, near):
    if model == "run/small":  # without a folder run/, this is a hub id
        monkeypatch.setattr(hub, "_download", lambda hub_id: (_ for _ in ()).throw(FileNotFoundError(hub_id)))
        with pytest.raises(FileNotFoundError, match=r"^run/small$"):
            hub.resolve(model)
        return
    with pytest.raises(FileNotFoundError, match="there is no folder") as error:
        hub.resolve(model)
    assert (f"Did you mean {near}?" in str(error.value)) if near else "Did you mean" not in str(error.value)
    assert "\n" not in str(error.value)


def test_published_models_and_addresses_are_ids_whatever_lies_here(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for owner in ("runwayml", "owner"):
        (tmp_path / owner).mkdir()
    asked = []
    monkeypatch.setattr(hub, "_download", lambda hub_id: asked.append(hub_id) or tiny_pipeline)
    for model in ("runwayml/stable-diffusion-v1-5", "https://huggingface.co/owner/name", "hf.co/owner/name/tree/main"):
        assert hub.resolve(model) == tiny_pipeline
    assert asked == ["runwayml/stable-diffusion-v1-5", "owner/name", "owner/name"]
    with pytest.raises(FileNotFoundError, match=r"https://huggingface\.co/owner/name"):
        hub.resolve("owner/name")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A stand-in for a repository of the hub: a list of its files, which are downloaded empty."""
    import fnmatch

    import huggingface_hub

    names, here = ["model_index.json"], tmp_path / "snapshot"

    def download(hub_id, allow_patterns, ignore_patterns=(), **_):
        any_of = lambda name, patterns: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        for name in names:
            if any_of(name, allow_patterns) and not any_of(name, ignore_patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                (here / name).write_text("{}")
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, hub_id: list(names))
    return names, here


@pytest.mark.parametrize(
    ("weights", "downloaded"),
    [
        ("X.safetensors X.fp16.safetensors X.bin", "X.safetensors"),
        ("X.fp16.safetensors X.non_ema.safetensors X.bin", "X.fp16.safetensors"),
        ("X.fp16-00001-of-00002.safetensors X.fp16-00002-of-00002.safetensors X.safetensors.index.fp16.json", None),
        ("X-00001-of-00002.fp16.safetensors X-00002-of-00002.fp16.safetensors X.safetensors.fp16.index.json", None),
        ("X.bf16.safetensors", None),
        ("X.non_ema.safetensors X.non_ema.bin", "X.non_ema.safetensors"),
        ("X.fp16.bin X.fp16.safetensors", "X.fp16.safetensors"),
    ],
)
def test_of_each_part_the_best_variant_is_downloaded(repository, weights, downloaded):
    names, here = repository
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    expand = lambda some, part: [f"{part}/{name.replace('X', stems[part])}" for name in some.split()]
    names += [f"{part}/config.json" for part in stems]
    names += (
        expand(weights, "unet") + expand("X.safetensors X.fp16.safetensors", "vae") + expand(weights, "text_encoder")
    )
    hub.resolve("owner/name")
    wanted = expand(downloaded or weights, "unet") + expand("X.safetensors", "vae")
    wanted += expand(downloaded or weights, "text_encoder")
    found = [str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()]
    assert sorted(name for name in found if not name.endswith(("config.json", "model_index.json"))) == sorted(wanted)


def test_a_part_only_as_a_pickle_is_named(repository):
    names, _ = repository
    names += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    names += ["text_encoder/config.json", "text_encoder/pytorch_model.bin"]
    with pytest.raises(
        ValueError, match=r"owner/name has its text_encoder only as a pickle \(text_encoder/pytorch_model"
    ):
        hub.resolve("owner/name")


def test_an_autoencoder_of_the_hub_only_as_a_variant(repository):
    names, here = repository
    names += [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.bin",
        "sd.safetensors",
    ]
    assert hub.resolve_vae("owner/vae") == here
    assert {path.name for path in here.iterdir()} == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    names.remove("diffusion_pytorch_model.fp16.safetensors")
    (here / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(ValueError, match=r"its weights only as a pickle \(diffusion_pytorch_model\.bin\)"):
        hub.resolve_vae("owner/vae")
