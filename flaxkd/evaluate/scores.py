"""The published protocol: FID, inception score and CLIP score of pictures drawn from many prompts.

BK-SDM (Kim et al. 2023, arXiv:2305.15798) draws 30,000 captions of MS-COCO 2014 validation with PNDM, 25 steps and
guidance 7.5 at 512 pixels, keeps JPEG files of 256, and compares with all 40,504 originals squashed to 256 x 256.

Only this file, subject.py and bench/torch_works.py use torch, within functions. Networks and arithmetic come from the
extra `eval`: torch-fidelity's Inception, torchmetrics' FID and inception score, transformers' CLIP. (BK-SDM took FID
from pytorch-fid, which has the same network and enlarges pictures to its 299 pixels by another bilinear rule.) For
drawing, see drawing/resumable.py and evaluation.py.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxkd.machine import files, progress

SAMPLER, STEPS, GUIDANCE, PIXELS, PROMPTS = "pndm", 25, 7.5, 512, 30_000
SIZE, SUFFIX = 256, ".jpg"  # of the saved pictures
CLIP = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"  # as in BK-SDM, which loads it with open_clip
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SPLITS = 10  # of the pictures; the inception score is a mean over splits

INSTALL = 'pip install "flaxkd[eval]" (from a clone: pip install -e ".[eval]")'


def need() -> None:
    """Raises ModuleNotFoundError with the remedy if the extra `eval` is missing or its versions do not match."""
    try:
        from torch_fidelity import feature_extractor_inceptionv3  # noqa: F401
        from torchmetrics.image import fid, inception  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ModuleNotFoundError(
            f"the published protocol needs packages that cannot be imported ({error}): {INSTALL}"
        ) from error


def load_inception(weights: Path | None):
    """InceptionV3 with FID's weights: a torch module, uint8[b, 3, H, W] -> (features [b, 2048], logits [b, 1008]).

    weights: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity; None for torch's cache, else a download.
    Raises ModuleNotFoundError, FileNotFoundError and ValueError with the remedy."""
    need()
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as network

    url = network.URL_INCEPTION_V3
    if weights is not None:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"there is no file {Path(weights).absolute()}: download {url} and give that file")
        try:  # the library would run any code in a pickle; this reads only tensors, or refuses
            torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{weights} holds no weights alone: download {url} again ({error})") from error
    names = ["2048", "logits_unbiased"]
    try:
        return network.FeatureExtractorInceptionV3("inception-v3-compat", names, weights and str(weights), verbose=True)
    except RuntimeError as error:
        if weights is None:
            raise
        message = str(error).partition("\n")[0]
        raise ValueError(f"{weights} does not fit torch-fidelity's InceptionV3: {message}; download {url}") from None
    except OSError as error:
        raise FileNotFoundError(
            f"the weights of InceptionV3 are missing and could not be downloaded ({error}). Download\n  {url}\n"
            "on a machine with a network, copy the file here, and pass it with --inception FILE"
        ) from error


def load_clip(model: str) -> tuple[Any, Any]:
    """(CLIPModel, CLIPProcessor) of transformers, from a folder or a hub id. Raises like `load_inception`."""
    return pretrained("CLIP", model, "CLIPModel", "CLIPProcessor")


def pretrained(title: str, model: str, network: str, processor: str) -> tuple[Any, Any]:
    """(network, processor) of these classes of transformers. Raises FileNotFoundError with the flag --TITLE."""
    import transformers

    try:
        found = getattr(transformers, network).from_pretrained(model).eval()
        return found, getattr(transformers, processor).from_pretrained(model)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{title} cannot be loaded from {model}: {str(error).strip().partition(chr(10))[0]}\nWithout a network: "
            f"run `hf download {model} --local-dir DIR` on another machine, copy DIR here, and pass "
            f"--{title.lower()} DIR"
        ) from error


def device() -> str:
    """The device of the networks of this file: "cuda" if torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def inception_features(
    paths: Sequence[Path], read: Callable[[Path], np.ndarray], inception, batch_size: int, desc: str
) -> tuple:
    """(features float64[n, 2048], logits float64[n, 1008]) of pictures, as torch tensors on the CPU.

    read: path -> uint8[H, W, 3], all of one size."""
    import torch

    where = device()
    inception = inception.to(where)
    found: tuple[list, list] = ([], [])
    with progress.Bar(len(paths), desc, " pictures") as bar:
        for start in range(0, len(paths), batch_size):
            images = np.stack([read(path) for path in paths[start : start + batch_size]])
            with torch.inference_mode():
                outputs = inception(torch.from_numpy(images).permute(0, 3, 1, 2).to(where))
            for kept, output in zip(found, outputs, strict=True):
                kept.append(output.double().cpu())
            bar.update(len(images))
    return tuple(map(torch.cat, found))


def statistics(features) -> tuple[np.ndarray, np.ndarray]:
    """(mean float64[d], covariance float64[d, d]) of features [n, d], as in pytorch-fid's .npz files."""
    features = np.asarray(features, np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of a .npz with mu and sigma, such as pytorch-fid's and BK-SDM's real_im256.npz.

    Raises FileNotFoundError, or ValueError with what the file holds."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is neither a file nor a folder {Path(path).absolute()}")
    try:
        with np.load(path) as file:  # pickles are not opened
            held = {name: file[name] for name in file.files if name in ("mu", "sigma")}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    shapes = {name: x.shape for name, x in held.items()}
    d = shapes.get("mu", (0,))[-1]
    if shapes != {"mu": (d,), "sigma": (d, d)}:
        raise ValueError(f"{path} must hold mu [d] and sigma [d, d], as pytorch-fid writes them; it has {shapes}")
    return np.float64(held["mu"]), np.float64(held["sigma"])


def pictures_in(folder: Path) -> list[Path]:
    """The picture files in a folder, sorted. Raises ValueError if there are fewer than two."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES)
    if len(paths) < 2:
        raise ValueError(f"{folder} has {len(paths)} pictures ({', '.join(PICTURES)}) directly in it, 2 are needed")
    return paths


def fid(features, real: tuple[np.ndarray, np.ndarray]) -> float:
    """FID between features [n, d] and `real` (mean, covariance), by torchmetrics. ValueError if d differs."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    mean, covariance = (torch.from_numpy(x) for x in real)
    if features.shape[1:] != mean.shape:
        raise ValueError(
            f"the statistics of the real pictures have {len(mean)} features, Inception has {features.shape[1]}"
        )
    taken = torch.nn.Identity()
    taken.num_features = features.shape[1]
    metric = FrechetInceptionDistance(feature=taken)
    # The metric keeps sums. Those of two pictures with exactly this mean and covariance stand for all pictures.
    metric.real_features_num_samples = torch.tensor(2)
    metric.real_features_sum = 2 * mean
    metric.real_features_cov_sum = covariance + 2 * torch.outer(mean, mean)
    metric.update(features, real=False)
    return float(metric.compute())


def inception_score(logits, splits: int = SPLITS) -> tuple[float, float]:
    """(mean, deviation over the splits) of the inception score (Salimans et al. 2016, arXiv:1606.03498).

    logits: [n, classes]; torchmetrics shuffles them with a fixed seed. ValueError for fewer than two per split."""
    import torch
    from torchmetrics.image.inception import InceptionScore

    if len(logits) < 2 * splits:
        raise ValueError(f"{len(logits)} pictures make no {splits} splits: draw at least {2 * splits}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about keeping all logits: 240 MB for 30,000 pictures
        metric = InceptionScore(feature=torch.nn.Identity(), splits=splits)
    metric.update(logits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def clip_score(
    paths: Sequence[Path], prompts: Sequence[str], read: Callable, clip: tuple, batch_size: int, desc: str
) -> float:
    """Mean cosine of pictures and their prompts in CLIP's space (Hessel et al. 2021, arXiv:2104.08718).

    Without a factor of 100 or 2.5, as BK-SDM reports it."""
    import torch

    (model, processor), where = clip, device()
    model = model.to(where)
    cosines = []
    with progress.Bar(len(paths), desc, " pictures") as bar:
        for start in range(0, len(paths), batch_size):
            images = [read(path) for path in paths[start : start + batch_size]]
            inputs = processor(
                text=list(prompts[start : start + batch_size]),
                images=images,
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                out = model(**inputs.to(where))
            cosines.append(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).cpu())
            bar.update(len(images))
    return float(torch.cat(cosines).double().mean())


class Scorer(NamedTuple):
    """Networks and real pictures, opened before anything is drawn."""

    inception: Any  # None: neither FID nor inception score
    clip: tuple[Any, Any]
    real: tuple[np.ndarray, np.ndarray] | list[Path] | None  # statistics, or the pictures for them
    settings: dict[str, str]


def open_scorer(inception: Path | None, clip: str, real: Path | None, clip_alone: bool = False) -> Scorer:
    """Loads the networks and finds the real pictures: a folder of them, or a .npz of their statistics.

    clip_alone: the CLIP score alone is wanted, and Inception is not loaded.

    Raises like `load_inception`, `load_clip`, `pictures_in` and `read_statistics`."""
    found = None
    if real is not None:
        found = pictures_in(real) if Path(real).is_dir() else read_statistics(real)
    settings = {
        "kept pictures": f"{SIZE} x {SIZE}, bicubic, {SUFFIX}",
        "real pictures": "none: no FID" if real is None else str(real),
        "Inception": "not loaded" if clip_alone else str(inception or "torch-fidelity's download"),
        "CLIP": str(clip),
    }
    return Scorer(None if clip_alone else load_inception(inception), load_clip(clip), found, settings)


def departures(sampler: str, steps: int, guidance: float, resolution: int, prompts: int) -> str:
    """The settings that differ from the published ones, in words; empty if none do."""
    published = {"sampler": SAMPLER, "steps": STEPS, "guidance": GUIDANCE, "pixels": PIXELS, "prompts": PROMPTS}
    chosen = (sampler, steps, guidance, resolution, prompts)
    return ", ".join(
        f"{name} {now} instead of {then}"
        for (name, then), now in zip(published.items(), chosen, strict=True)
        if now != then
    )


def too_few(prompts: int) -> str:
    """What `score` leaves out of so few pictures, in words; empty if nothing."""
    left = [what for what, least in (("FID", 2), ("the inception score", 2 * SPLITS)) if prompts < least]
    return f"{' and '.join(left)} cannot be measured on {prompts} picture{'s' * (prompts > 1)}" if left else ""


def real_statistics(scorer: Scorer, read: Callable, batch_size: int, out: Path) -> Scorer:
    """The scorer with statistics in place of real pictures. Also writes them to `out`, a .npz for --real."""
    if not isinstance(scorer.real, list):
        return scorer
    features, _ = inception_features(scorer.real, read, scorer.inception, batch_size, "real pictures")
    mean, covariance = statistics(features)
    with files.whole(out) as scratch, scratch.open("wb") as file:
        np.savez(file, mu=mean, sigma=covariance)
    return scorer._replace(real=(mean, covariance))


def score(
    scorer: Scorer, paths: Sequence[Path], prompts: Sequence[str], read: Callable, batch_size: int, name: str
) -> dict[str, float]:
    """{"fid", "inception_score", "inception_score_std", "clip_score"} of drawn pictures; "fid" only with real ones
    and from 2 pictures on, the inception score from 2 per split on.

    read: path -> uint8[H, W, 3]. Raises FileNotFoundError for pictures drawn by other processes and not found here."""
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} pictures are missing, the first is {missing[0]}: if the processes "
            "do not share a folder, copy their pictures into one and run again"
        )
    row = {}
    if scorer.inception is not None:
        features, logits = inception_features(paths, read, scorer.inception, batch_size, f"Inception, {name}")
        row = {} if scorer.real is None or len(paths) < 2 else {"fid": fid(features, scorer.real)}
        if len(paths) >= 2 * SPLITS:
            row["inception_score"], row["inception_score_std"] = inception_score(logits)
    cosine = clip_score(paths, prompts, read, scorer.clip, batch_size, f"CLIP, {name}")
    return row | {"clip_score": cosine}
