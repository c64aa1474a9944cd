"""Features against torchaudio and transformers, masking, decoding, the cache, ESC-50's folds, downloads."""

import http.server
import importlib
import math
import multiprocessing
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from helpers import REFERENCE, make_esc50

from data import build_features, fbank, few_shot, load_dataset, spec_augment, to_input
from sounds import paper
from sounds.audio import read_audio
from sounds.fetch import unpack
from support.command import UserError

esc10, esc50 = (partial(load_dataset, name) for name in ("esc10", "esc50"))
STORED = np.load(REFERENCE / "fbank_torchaudio.npz")
WAVES = [name.removeprefix("wav_") for name in STORED if name.startswith("wav_")]

# ---------------------------------------------------------------------------------------------------------- features


def exact_fbank(wave: np.ndarray) -> np.ndarray:
    """The definition, frame by frame in float64, with a plain DFT: (samples,) to (frames, 128)."""
    mel = lambda hz: 1127 * np.log(1 + hz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 130)
    bins = mel(np.arange(256) * 31.25)
    filters = np.array([
        np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))
        for left, centre, right in zip(edges[:-2], edges[1:-1], edges[2:], strict=True)
    ])  # fmt: skip
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    dft = np.exp(-2j * np.pi * np.outer(np.arange(256), np.arange(400)) / 512)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        frame = wave[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        rows.append(np.log(np.maximum(filters @ np.abs(dft @ (frame * window)) ** 2, 2.0**-23)))
    return np.array(rows)


def torchaudio_fbanks():
    """(name, what torchaudio returned): the stored answers, and live ones where torchaudio can be imported."""
    answers = [(name, STORED[f"fbank_{name}"]) for name in WAVES]
    try:
        kaldi = importlib.import_module("torchaudio").compliance.kaldi
    except (ImportError, OSError, RuntimeError):  # it is built for one version of torch only
        return answers
    settings = {"sample_frequency": 16_000, "window_type": "hanning", "num_mel_bins": 128}
    for name in WAVES:
        answers.append((name, kaldi.fbank(torch.from_numpy(STORED[f"wav_{name}"])[None], **settings).numpy()))
    return answers


def test_fbank_equals_torchaudio():
    """1e-3 within 80 dB of a frame's loudest filter, 1e-5 of that filter's amplitude everywhere.

    Further down there is only the rounding of a float32 FFT, which differs from processor to processor: torchaudio
    itself, on another machine than the one that stored these numbers, is 0.034 away from them on the chirp.
    """
    for name, reference in torchaudio_fbanks():
        ours = fbank(torch.from_numpy(STORED[f"wav_{name}"])[None])[0].numpy()
        assert ours.shape == reference.shape
        loudest = reference.max(axis=1, keepdims=True)
        audible = reference > loudest - 80 / 10 * math.log(10)
        assert np.abs(ours - reference)[audible].max() <= 1e-3, name
        amplitude = np.abs(np.exp(ours / 2) - np.exp(reference / 2)) / np.exp(loudest / 2)
        assert amplitude.max() <= 1e-5, name
        if name == "noise_2s":
            assert np.abs(ours - reference).max() <= 3e-4


@pytest.mark.parametrize("name", WAVES)
def test_fbank_is_as_exact_as_torchaudio(name):
    """Against the definition in float64, neither is better than the other by more than rounding."""
    wave, reference = STORED[f"wav_{name}"], STORED[f"fbank_{name}"]
    exact = exact_fbank(wave)
    our_error = np.abs(fbank(torch.from_numpy(wave)[None])[0].numpy() - exact).max()
    assert our_error <= 3 * np.abs(reference - exact).max() + 1e-6
    assert our_error <= (0.05 if name == "chirp_1s" else 1e-3)


def test_fbank_is_the_same_in_a_batch():
    waves = torch.randn(3, 5000)
    torch.testing.assert_close(fbank(waves)[1], fbank(waves[1:2])[0])


def test_less_than_a_frame_is_padded():
    assert fbank(torch.randn(1, 37)).shape == (1, 1, 128)
    assert fbank(torch.randn(1, 400)).shape == (1, 1, 128)
    assert fbank(torch.randn(1, 560)).shape == (1, 2, 128)


def test_input_equals_stored_extractor():
    reference = np.load(REFERENCE / "ast_small.npz")["extracted_noise"]
    ours = to_input(fbank(torch.from_numpy(STORED["wav_noise_2s"])[None]), 256)[0].numpy()
    assert np.abs(ours - reference).max() <= 1e-4


@pytest.mark.parametrize("name", WAVES)
@pytest.mark.parametrize("n_frames", [60, 256])
def test_input_equals_live_extractor(name, n_frames):
    from transformers import ASTFeatureExtractor

    wave = STORED[f"wav_{name}"]
    extractor = ASTFeatureExtractor(max_length=n_frames)
    reference = extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values[0]
    ours = to_input(fbank(torch.from_numpy(wave)[None]), n_frames)[0]
    assert ours.shape == reference.shape == (n_frames, 128)
    # The normalisation divides by 9.14, so 0.04 in a filter 80 dB below the loudest is 0.004 here.
    assert (ours - reference).abs().max() <= (5e-3 if name == "chirp_1s" else 1e-4)


def test_padding_comes_before_normalisation():
    padded = to_input(torch.zeros(1, 3, 128), 5)
    assert torch.equal(padded, torch.full((1, 5, 128), 4.2677393 / (2 * 4.5689974)))


# ----------------------------------------------------------------------------------------------------------- masking


def test_masking_sets_one_band_and_one_stretch_to_zero():
    x = torch.ones(1, 500, 128)
    # band: width floor(0.5 * 24) = 12 at floor(0.5 * (128 - 12)) = 58; time: width 40 at floor(0.25 * (500 - 40)) = 115
    masked = spec_augment(x, torch.tensor([[0.5, 0.5, 0.5, 0.25]]))[0]
    expected = torch.ones(500, 128)
    expected[:, 58:70] = 0
    expected[115:155] = 0
    assert torch.equal(masked, expected)
    assert torch.equal(spec_augment(x, torch.zeros(1, 4)), x)


def test_masking_is_uniform_and_bounded_and_differs_between_clips():
    torch.manual_seed(0)
    masked = spec_augment(torch.ones(2000, 500, 128), torch.rand(2000, 4))
    band_widths = (masked[:, :, :].amax(1) == 0).sum(1)
    frame_widths = (masked.amax(2) == 0).sum(1)
    assert (band_widths.min(), band_widths.max(), frame_widths.min(), frame_widths.max()) == (0, 23, 0, 79)
    assert abs(band_widths.float().mean() - 11.5) < 0.5 and abs(frame_widths.float().mean() - 39.5) < 1.5


def test_masking_short_clips_leaves_something():
    masked = spec_augment(torch.ones(50, 60, 128), torch.rand(50, 4))
    assert (masked.sum((1, 2)) > 0).all()


# ---------------------------------------------------------------------------------------------------------- decoding


def test_read_audio_mixes_down_and_resamples(tmp_path):
    time = np.arange(44_100) / 44_100
    stereo = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(44_100)], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, 44_100)
    wave = read_audio(tmp_path / "a.flac")
    assert wave.dtype == np.float32 and len(wave) == 16_000
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(wave - expected)[200:-200].max() < 1e-3
    assert len(read_audio(tmp_path / "a.flac", seconds=0.25)) == 4000


def bad_files(folder) -> dict[str, str]:
    """Names of unusable files, made in `folder`, and a word of the reason expected."""
    soundfile.write(folder / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "nan.wav", np.array([0.0, np.nan, 0.1]), 16_000, subtype="FLOAT")
    (folder / "nothing.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is no sound")
    return {"empty.wav": "no samples", "nan.wav": "not finite", "nothing.wav": "is empty", "text.wav": "ormat"}


def test_unusable_audio_has_a_reason(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=reason):
            read_audio(tmp_path / name)


# --------------------------------------------------------------------------------------------------------- the cache


def test_features_are_those_of_the_files_and_built_once(esc50_dir, tmp_path, capsys):
    dataset = esc10(esc50_dir, tmp_path)
    features, bad = build_features(dataset, 500, tmp_path)
    assert features.shape == (50, 500, 128) and features.dtype == np.float16 and not bad
    expected = to_input(fbank(torch.from_numpy(read_audio(dataset.paths[7]))[None]), 500)[0]
    assert np.abs(features[7] - expected.numpy()).max() < 1e-3
    assert "built 50 of 50" in capsys.readouterr().out
    again, _ = build_features(dataset, 500, tmp_path)
    assert np.array_equal(again, features)
    assert capsys.readouterr().out == ""


def test_changed_and_damaged_clips_are_built_again(tmp_path, capsys):
    dataset = esc10(make_esc50(tmp_path / "data"), tmp_path)
    features, _ = build_features(dataset, 100, tmp_path)
    original = np.array(features)
    soundfile.write(dataset.paths[3], np.random.default_rng(1).uniform(-1, 1, 44_100), 44_100)
    capsys.readouterr()
    changed = np.array(build_features(dataset, 100, tmp_path)[0])
    assert "built 1 of 50" in capsys.readouterr().out
    assert [i for i in range(50) if not np.array_equal(changed[i], original[i])] == [3]

    (file,) = (tmp_path / "features").glob("*.npy")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    file.write_bytes(content)
    repaired, _ = build_features(dataset, 100, tmp_path)
    output = capsys.readouterr()
    assert "1 damaged" in output.err and "built 1 of 50" in output.out
    assert np.array_equal(repaired, changed)

    file.write_bytes(content[: len(content) // 2])
    rebuilt, _ = build_features(dataset, 100, tmp_path)
    assert "not a whole feature file" in capsys.readouterr().err
    assert np.array_equal(rebuilt, changed)


def build_in_process(root, cache, results):
    features, _ = build_features(esc10(root, cache), 100, cache)
    results.put(float(np.abs(np.array(features, dtype=np.float64)).sum()))


def test_two_processes_build_one_cache(esc50_dir, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=build_in_process, args=(esc50_dir, tmp_path, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    sums = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums[0] == sums[1] and [worker.exitcode for worker in workers] == [0, 0]
    assert len(list((tmp_path / "features").glob("*.npy"))) == 1


def test_bad_clips_are_all_listed_or_left_out(tmp_path, capsys):
    dataset = esc10(make_esc50(tmp_path / "data"), tmp_path)
    for path, name in zip(dataset.paths, bad_files(tmp_path), strict=False):
        (tmp_path / name).replace(path)
    with pytest.raises(UserError, match="4 of 50 sound files cannot be used"):
        build_features(dataset, 100, tmp_path)
    listing = capsys.readouterr().err
    assert all(str(path) in listing for path in dataset.paths[:4]) and "not finite" in listing
    _, bad = build_features(dataset, 100, tmp_path, skip_bad=True)
    assert bad.keys() == {0, 1, 2, 3} and "not finite" in bad[1]


# ------------------------------------------------------------------------------------------------------------ ESC-50


@pytest.mark.parametrize(("load", "n_classes"), [(esc50, 12), (esc10, 10)])
def test_folds_follow_the_protocol(esc50_dir, tmp_path, load, n_classes):
    dataset = load(esc50_dir, tmp_path)
    assert len(dataset.classes) == n_classes and len(dataset.paths) == 5 * n_classes
    assert list(dataset.folds) == [1, 2, 3, 4, 5]
    fold_of = [int(path.name[0]) for path in dataset.paths]
    for k, split in dataset.folds.items():
        assert {fold_of[i] for i in split.test} == {k}
        assert {fold_of[i] for i in split.val} == {(k - 2) % 5 + 1}
        assert sorted(split.train + split.val + split.test) == list(range(5 * n_classes))  # each clip once
        recordings = [{dataset.paths[i].name[:8] for i in part} for part in (split.train, split.val, split.test)]
        assert not (recordings[0] & recordings[1] or recordings[0] & recordings[2] or recordings[1] & recordings[2])
    for i, path in enumerate(dataset.paths):
        assert dataset.classes[dataset.labels[i]] == f"sound {path.stem.split('-')[-1]}"


def test_few_shot_draws(tmp_path):
    dataset = esc10(make_esc50(tmp_path / "data", takes=2), tmp_path)
    train = dataset.folds[1].train
    drawn = few_shot(dataset, train, 3, seed=0)
    assert set(drawn) <= set(train) and set(Counter(dataset.labels[i] for i in drawn).values()) == {3}
    assert drawn == few_shot(dataset, train, 3, seed=0) != few_shot(dataset, train, 3, seed=1)
    with pytest.raises(UserError, match="class 'sound 0' has only 6 training clips"):
        few_shot(dataset, train, 7, seed=0)


def test_incomplete_and_wrong_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        esc50(tmp_path / "absent", tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"does not hold meta/esc50.csv"):
        esc50(tmp_path / "other", tmp_path)
    root = make_esc50(tmp_path / "data")
    for path in sorted((root / "audio").iterdir())[:7]:
        path.unlink()
    with pytest.raises(UserError, match=r"7 of 60 files are missing \(.*1-100000-A-0.wav.* and 2 more\)"):
        esc50(root, tmp_path)
    (root / "meta" / "esc50.csv").write_text("filename,fold\na.wav,1\n")
    with pytest.raises(UserError, match="no column 'target'"):
        esc50(root, tmp_path)


# --------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def web(tmp_path):
    """A web server on this machine that serves tmp_path / "web"; yields its address."""
    (tmp_path / "web").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "web"))

        def log_message(self, *args):
            """Keeps the tests' output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def zip_folder(folder, archive):
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted(folder.rglob("*")):
            zipped.write(path, f"ESC-50-master/{path.relative_to(folder)}")


def test_download_unpack_and_read(esc50_dir, tmp_path, web, monkeypatch):
    zip_folder(esc50_dir, tmp_path / "web" / "master.zip")
    monkeypatch.setattr(paper, "ESC50", replace(paper.ESC50, url=f"{web}/master.zip"))
    downloaded = esc50(None, tmp_path / "cache")
    assert len(downloaded.paths) == 60
    (tmp_path / "web" / "master.zip").unlink()
    assert esc50(None, tmp_path / "cache") == downloaded  # no second download
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == ["ESC-50"]


def test_archive_downloaded_by_hand(esc50_dir, tmp_path):
    zip_folder(esc50_dir, tmp_path / "by_hand.zip")
    assert len(esc50(tmp_path / "by_hand.zip", tmp_path / "cache").paths) == 60


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "ESC50", replace(paper.ESC50, url="http://127.0.0.1:9/master.zip"))
    with pytest.raises(UserError, match=r"cannot download .* by hand .* --data-dir"):
        esc50(None, tmp_path)
    assert not list(tmp_path.glob("*.archive")) and not (tmp_path / "ESC-50").exists()


def test_archives_that_leave_the_folder_or_are_damaged(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as zipped:
        zipped.writestr("fine.txt", "fine")
        zipped.writestr("../outside.txt", "not fine")
    with pytest.raises(UserError, match=r"outside\.txt"):
        unpack(tmp_path / "evil.zip", tmp_path / "target")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as zipped:
        zipped.writestr(link, "/etc/hostname")
    with pytest.raises(UserError, match="'link'"):
        unpack(tmp_path / "link.zip", tmp_path / "target")
    content = (tmp_path / "evil.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a whole zip or tar archive"):
        unpack(tmp_path / "cut.zip", tmp_path / "target")
    assert not (tmp_path / "target").exists() and not (tmp_path / "outside.txt").exists()
    assert not list(tmp_path.glob(".*"))
