"""What scores are computed from is checked, and told where it is not as published."""

import numpy as np
import pytest

from flaxkd.evaluate import scores


def test_statistics_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        scores.read_statistics(tmp_path / "none.npz")
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"it has \{'mu': \(3,\), 'sigma': \(2, 2\)\}"):
        scores.read_statistics(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(ValueError, match=r"text.npz cannot be read as .npz"):
        scores.read_statistics(tmp_path / "text.npz")
    with pytest.raises(ValueError, match="has 0 pictures"):
        scores.pictures_in(tmp_path)


def test_what_is_not_as_published_is_said():
    assert scores.departures("pndm", 25, 7.5, 512, 30_000) == ""
    assert scores.departures("ddim", 25, 4.0, 512, 30_000) == (
        "sampler ddim instead of pndm, guidance 4.0 instead of 7.5"
    )


def test_what_few_pictures_cannot_tell_is_said():
    assert scores.too_few(20) == ""
    assert scores.too_few(19) == "the inception score cannot be measured on 19 pictures"
    assert scores.too_few(1) == "FID and the inception score cannot be measured on 1 picture"


def test_one_picture_has_a_clip_score(monkeypatch, tmp_path):
    monkeypatch.setattr(scores, "inception_features", lambda paths, *_: (np.zeros((len(paths), 4)),) * 2)
    monkeypatch.setattr(scores, "clip_score", lambda *_: 0.3)
    (tmp_path / "0.jpg").touch()
    scorer = scores.Scorer(None, None, (np.zeros(4), np.eye(4)), {})
    assert scores.score(scorer, [tmp_path / "0.jpg"], ["red apple"], None, 16, "student") == {"clip_score": 0.3}
