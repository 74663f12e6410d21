"""Scores against independent arithmetic, with stand-ins for the large networks; and what a missing one says."""

import pickle
import sys
import types
import urllib.error

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from flaxkd.drawing import resumable
from flaxkd.evaluate import fidelity, scores, subject
from tests.tiny import CAPTIONS

torch = pytest.importorskip("torch")


def features(seed, n=60, d=6):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def test_fid_is_the_equation_with_scipys_root():
    drawn, real = features(0), features(1, n=80)
    (mean_a, cov_a), (mean_b, cov_b) = map(scores.statistics, (drawn, real))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root)
    found = scores.fid(torch.from_numpy(drawn), scores.statistics(real))
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == pytest.approx(fidelity.frechet(drawn, real), rel=1e-6)  # ours and torchmetrics'
    assert scores.fid(torch.from_numpy(real), scores.statistics(real)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="real pictures have 5 features, Inception has 6"):
        scores.fid(torch.from_numpy(drawn), scores.statistics(real[:, :5]))


def test_inception_score_is_the_equation():
    logits = np.random.default_rng(0).standard_normal((40, 7)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)))
    mean, _ = scores.inception_score(torch.from_numpy(logits), splits=1)
    assert mean == pytest.approx(expected)
    state = torch.get_rng_state()
    twice = [scores.inception_score(torch.from_numpy(logits)) for _ in range(2)]
    assert twice[0] == twice[1] and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="8 pictures make no 10 splits: draw at least 20"):
        scores.inception_score(torch.from_numpy(logits[:8]))


@pytest.fixture
def drawn(tmp_path):
    paths = [tmp_path / f"{i:06d}.png" for i in range(24)]
    for i, path in enumerate(paths):
        resumable.save(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8), path)
    return paths


def test_scores_of_a_folder(clip_folder, inception, drawn, tmp_path):
    captions = [CAPTIONS[i % 5] for i in range(24)]
    model, processor = clip = scores.load_clip(str(clip_folder))
    real = [tmp_path / f"real{i}.png" for i in range(20)]
    for i, path in enumerate(real):
        Image.fromarray(np.random.default_rng(100 + i).integers(0, 256, (24, 40, 3), np.uint8)).save(path)
    read = lambda path: resumable.read(path, 32)
    scorer = scores.Scorer(inception, clip, real, {})
    scorer = scores.real_statistics(scorer, read, 7, tmp_path / "real.npz")
    row = scores.score(scorer, drawn, captions, read, 7, "tiny")

    cells = lambda paths: np.stack([read(p) for p in paths]).astype(float).reshape(-1, 2, 16, 2, 16, 3)
    of = lambda paths: cells(paths).mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(paths), 12)
    assert row["fid"] == pytest.approx(fidelity.frechet(of(drawn), of(real)), rel=1e-3)
    assert row["inception_score"] >= 1 and row["inception_score_std"] >= 0

    pixels = processor.image_processor([read(p) for p in drawn], return_tensors="pt")["pixel_values"]
    cosines = []
    for caption, image in zip(captions, pixels, strict=True):  # one at a time: padding must not matter
        ids = processor.tokenizer(caption, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            text = model.text_projection(model.text_model(ids).pooler_output)[0]
            picture = model.visual_projection(model.vision_model(image[None]).pooler_output)[0]
        cosines.append(float(text @ picture / text.norm() / picture.norm()))
    assert row["clip_score"] == pytest.approx(np.mean(cosines), abs=1e-5)

    again = scores.read_statistics(tmp_path / "real.npz")  # what was measured can be given instead of pictures
    assert scores.score(scorer._replace(real=again), drawn, captions, read, 24, "tiny")["fid"] == pytest.approx(
        row["fid"], rel=1e-6
    )
    assert "fid" not in scores.score(scorer._replace(real=None), drawn, captions, read, 24, "tiny")
    drawn[3].unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 24 pictures are missing, the first is .*000003.png"):
        scores.score(scorer, drawn, captions, read, 24, "tiny")


def test_likeness_is_the_mean_cosine_of_all_pairs(clip_folder, drawn, tmp_path):
    """With a small ViT and a small CLIP of transformers, picture by picture. No Inception is asked for."""
    import transformers

    torch.manual_seed(1)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    (tmp_path / "subject").mkdir()
    for i in range(3):
        picture = np.random.default_rng(50 + i).integers(0, 256, (40, 24, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / "subject" / f"{i}.png")
    scorer = scores.open_scorer(None, str(clip_folder), None, clip_alone=True)
    likeness = subject.open_subject(tmp_path / "subject", str(tmp_path / "vit"), scorer.clip)
    read = lambda path: resumable.read(path, 32)
    row = subject.score(subject.prepared(likeness, read, 7), drawn, read, 7, "tiny")

    def unit(network, processor, path):
        with torch.inference_mode():
            x = network(processor(images=read(path), return_tensors="pt")["pixel_values"])[0].double()
        return (x / x.norm()).numpy()

    (vit, images), (clip, processor) = subject.load_dino(str(tmp_path / "vit")), scorer.clip
    networks = {
        "dino": (lambda x: vit(x).last_hidden_state[:, 0], images),
        "clip_i": (lambda x: clip.get_image_features(x).pooler_output, processor.image_processor),
    }
    for key, network in networks.items():
        pairs = [unit(*network, a) @ unit(*network, b) for a in drawn for b in likeness.pictures]
        assert row[key] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert -1 < row["dino"] < 1 and row["dino"] != row["clip_i"]
    only = scores.score(scorer, drawn, [CAPTIONS[0]] * 24, read, 7, "tiny")
    assert only.keys() == {"clip_score"}
    with pytest.raises(FileNotFoundError, match=r"DINO cannot be loaded from .*absent"):
        subject.load_dino(str(tmp_path / "absent"))


@pytest.fixture
def fake_fidelity(monkeypatch):
    """torch-fidelity without its size: `network.weights` is what was loaded."""

    class FeatureExtractorInceptionV3:
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
            assert features_list == ["2048", "logits_unbiased"]
            if feature_extractor_weights_path is None:
                raise urllib.error.URLError("no network")
            if torch.load(feature_extractor_weights_path).keys() != {"fc.weight"}:
                raise RuntimeError("Missing key(s) in state_dict\nand so on")

    network = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    network.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    network.URL_INCEPTION_V3 = "https://example.org/weights.pth"
    package = types.ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = network
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, network.__name__, network)


def test_inception_comes_from_a_file_or_says_how_to_get_it(fake_fidelity, tmp_path):
    path = tmp_path / "inception.pth"
    with pytest.raises(FileNotFoundError, match=r"(?s)no network.*example.org/weights.pth.*--inception FILE"):
        scores.load_inception(None)
    with pytest.raises(FileNotFoundError, match=r"no file .*inception.pth: download https://example.org"):
        scores.load_inception(path)
    torch.save({"fc.weight": torch.zeros(2)}, path)
    assert scores.load_inception(path) is not None
    torch.save({"conv": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"does not fit torch-fidelity's InceptionV3: Missing key"):
        scores.load_inception(path)
    path.write_bytes(pickle.dumps({"fc.weight": print}))  # a pickle that runs code is not opened
    with pytest.raises(ValueError, match="holds no weights alone"):
        scores.load_inception(path)


def test_missing_packages_and_networks_have_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=r"torch_fidelity.*pip install .*eval"):
        scores.load_inception(None)
    with pytest.raises(FileNotFoundError, match=r"(?s)CLIP cannot be loaded from owner/absent.*--clip DIR"):
        scores.load_clip("owner/absent")
    with pytest.raises(FileNotFoundError, match=r"CLIP cannot be loaded"):
        scores.load_clip(str(tmp_path))
