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
