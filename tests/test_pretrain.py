"""A backbone from recordings: what is heard of a sound, and a training that may be interrupted."""

import math

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from helpers import SMALL_AST, make_folder, write_sound
from safetensors.torch import load_file

import data
from load_weights import load_ast, save_ast
from support.checkpoints import read_header
from tools import pretrain


@pytest.fixture(scope="module", autouse=True)
def few_made_sounds():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "TAKES", 1)
        patch.setattr(pretrain, "TOKENS", 200)  # of 48 pieces
        yield


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("sounds"), count=2, seconds=1.5)
    return pretrain.read_all(folder, None)


def test_a_recording_is_read_once_and_only_if_something_is_heard(tmp_path, capsys):
    sounds = [
        ("a/one.wav", 0.5, 1),
        ("b/same.wav", 0.5, 1),
        ("two.ogg", 0.5, 2),
        ("short.wav", 0.05, 3),
    ]
    for name, seconds, seed in sounds:
        write_sound(tmp_path / name, seconds=seconds, seed=seed)
    (tmp_path / "text.wav").write_text("this is no sound")
    found = pretrain.read_all(tmp_path, None)
    assert len(found.chances) == 2 and len(found.features) == 2 + 68
    assert found.labels.tolist() == list(range(70))
    wave, _ = soundfile.read(tmp_path / "a/one.wav", dtype="float32")
    expected = data.fbank(torch.from_numpy(wave / np.abs(wave).max())[None])[0]
    assert np.array_equal(found.features[0], expected.half().numpy())
    assert "text.wav cannot be read (Format not recognised" in capsys.readouterr().err
    assert pretrain.main([str(tmp_path / "a"), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "has 1 recordings of at least 0.1 s" in capsys.readouterr().err
    for out in (tmp_path, tmp_path / "x.bin"):  # said before the training, not after it
        assert pretrain.main([str(tmp_path), "--steps", "1", "--out", str(out)]) == 2
        message = f"error: --out {out}: give the name of a file that ends in .safetensors\n"
        assert capsys.readouterr().err == message
    for options in (["--same", "("], ["--same", "a"], ["--weights", "nowhere"]):
        out = str(tmp_path / "x.safetensors")
        assert pretrain.main([str(tmp_path), "--out", out, *options]) == 2
        said = capsys.readouterr().err
        assert options[1] in said and "text.wav" not in said and said.count("\n") == 1


def test_what_is_alike_is_one_class_and_large_folders_count_less(tmp_path):
    names = ["a/voice1/hello.wav", "a/voice2/hello.wav", "a/voice2/bye.wav", "a/x.wav", "b/x.wav"]
    for seed, name in enumerate(names):
        write_sound(tmp_path / name, seconds=0.3, seed=seed)
    found = pretrain.read_all(tmp_path, r"voice\d/(.*)\.")
    assert found.labels[:5].tolist() == [0, 1, 0, 2, 3]  # sorted: bye is behind hello of voice 1
    assert found.members == [[0, 2], [1], [2 + 1], [4]]
    share = np.diff(found.chances, prepend=0)
    assert share[:4] == pytest.approx([share[4] / 2**0.5] * 4)


def test_a_piece_is_a_part_of_the_recording_that_is_not_quiet():
    rng = np.random.default_rng(0)
    ramp = np.repeat(np.arange(3, 303, dtype=np.float16)[:, None], 128, 1)
    pieces = [pretrain.crop(ramp, 48, rng, 1.0) for _ in range(20)]
    assert all(torch.equal(x[:, 5], x[0, 5] + torch.arange(48.0)) for x, _ in pieces)
    assert len({x[0, 0].item() for x, _ in pieces}) > 10
    assert {end for _, end in pieces} == {48}
    half = np.concatenate([np.zeros((300, 128)), np.full((300, 128), 5)])
    # 1 - 2^-3 of them
    assert sum(pretrain.crop(half, 48, rng, 1.0)[0].max() > 0 for _ in range(80)) > 60


def test_a_piece_of_a_short_recording_begins_at_once_or_later():
    rng = np.random.default_rng(0)
    short = np.full((20, 128), 1.0)
    pieces = [pretrain.crop(short, 48, rng, 1.0) for _ in range(200)]
    first = [int((x[:, 0] == 1).nonzero()[0]) for x, _ in pieces]
    assert all((x == 1).all(1).sum() == 20 and (x.min() == pretrain.FLOOR) for x, _ in pieces)
    assert max(first) == 28 and 80 < first.count(0) < 130
    assert all(end == (48 if start else 20) for start, (_, end) in zip(first, pieces, strict=True))


def test_twice_as_fast_is_half_as_long():
    sweep = np.linspace(0, 1, 200)[:, None].repeat(128, 1)
    x, end = pretrain.crop(sweep, 100, np.random.default_rng(0), 2.0)
    assert end == 100 and np.allclose(x[:, 0], np.linspace(0, 1, 100), atol=1e-6)


def test_higher_and_lower():
    x = torch.randn(2, 3, 128)
    up = pretrain.higher(x, torch.ones(2), torch.tensor([2.0, -1.5]))
    assert torch.equal(up[0, :, :126], x[0, :, 2:])
    assert (up[0, :, 126:] == pretrain.FLOOR).all()
    assert torch.allclose(up[1, :, 2:], (x[1, :, :-2] + x[1, :, 1:-1]) / 2)
    wide = pretrain.higher(x, torch.full((2,), 0.5), torch.zeros(2))
    assert torch.allclose(wide[:, :, ::2], x[:, :, :64])


def test_a_filter_is_the_same_on_the_sound_and_on_its_features():
    """Against a filter of the spectrum: neighbouring frequencies of a band get nearly the same."""
    drawn = np.random.default_rng(3).uniform([-12, -6, 0.5, 0], [12, 6, 3, 1], (1, 4))[0]
    noise = np.random.default_rng(0).standard_normal(data.RATE)
    f = np.linspace(0, 1, data.RATE // 2 + 1)
    decibels = drawn[0] * (f - 0.3) + drawn[1] * np.sin(2 * np.pi * (f * drawn[2] + drawn[3]))
    filtered = np.fft.irfft(np.fft.rfft(noise) * 10 ** (decibels / 20))
    before, after = (data.fbank(torch.from_numpy(wave[None]).float()) for wave in (noise, filtered))
    expected = before + pretrain.gains(1, np.random.default_rng(3))
    assert (after - expected)[..., 20:].mean(1).abs().max() < 0.05


def test_a_room_by_hand():
    """A click of power 1: 3 dB below it at once, and 60 dB less after 0.2 s."""
    x = torch.full((1, 60, 128), -40.0)
    x[0, 10] = 0
    after = pretrain.in_a_room(x, torch.tensor([0.2]), torch.tensor([3.0]))[0, :, 7] / math.log(10)
    assert (after[:10] < -15).all() and after[10].item() == pytest.approx(0, abs=1e-6)
    expected = [-0.3 - 6 * frames / 20 for frames in (1, 10, 20)]
    assert after[[11, 20, 30]].tolist() == pytest.approx(expected, abs=0.02)


def test_a_telephone_and_noise_are_heard(recordings):
    """In some pieces the bands above 3.4 to 5.5 kHz are silent; everything is normalised."""
    x = torch.zeros(400, 50, 128)
    order = torch.Generator().manual_seed(0)
    white = pretrain.white_noise()
    y = pretrain.heard(x, [50] * 400, white, np.random.default_rng(0), order)
    floor = (pretrain.FLOOR - data.MEAN) / (2 * data.STD)
    silent = (y <= floor + 1e-4).all(1)  # (pieces, bands)
    assert 80 < silent[:, 112].sum() < 160  # three of ten
    cuts = {row.nonzero()[0].item() for row in silent if row[127]}
    hertz = sorted(pretrain.HZ[cut] for cut in cuts)[:3]  # what is lowered ends above 5.9 kHz
    assert np.allclose(hertz, [3400, 4000, 5500], rtol=0.03)
    assert y.min() >= floor - 1e-4


def test_pairs_of_a_batch_are_of_one_class(recordings):
    white = pretrain.white_noise()
    frames = set()
    for step in range(12):
        x, labels, kept = pretrain.batch(recordings, white, step)
        assert len(x) == len(labels) and torch.equal(labels[::2], labels[1::2])
        assert 36 <= kept <= 12 * ((x.shape[1] - 16) // 10 + 1)
        again, _, _ = pretrain.batch(recordings, white, step)
        assert torch.equal(x, again)
        frames.add(x.shape[1])
    assert len(frames) > 4 and frames <= set(pretrain.LENGTHS)


@pytest.mark.parametrize("frames", [512, 96, 48])
def test_a_piece_of_any_length_is_what_the_backbone_of_that_length_hears(frames, tmp_path):
    model = load_ast(SMALL_AST, 512, 3).eval()
    save_ast(model, tmp_path / "long.safetensors", {})
    x = torch.randn(2, frames, 128)
    vectors = pretrain.vectors_of(model, x, 10_000, None)
    expected = load_ast(tmp_path / "long.safetensors", frames, 3).eval().vector(x)
    assert torch.allclose(vectors, expected, atol=1e-6)
    few = pretrain.vectors_of(model, x, 7, torch.Generator().manual_seed(0))
    assert few.shape == vectors.shape and not torch.allclose(few, vectors)


def test_contrastive_loss_by_hand():
    z = torch.randn(6, 5, dtype=torch.double)
    labels = torch.tensor([0, 0, 1, 1, 0, 0])
    losses = []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        similar = {j: (F.cosine_similarity(z[i], z[j], dim=0) / 0.1).item() for j in others}
        total = math.log(sum(math.exp(value) for value in similar.values()))
        same = [j for j in others if labels[j] == labels[i]]
        losses.append(-sum(similar[j] - total for j in same) / len(same))
    assert pretrain.contrastive(z, labels).item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_an_interrupted_training_ends_with_the_bits_of_an_unbroken_one(
    recordings, tmp_path, monkeypatch
):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"

    def train(steps, out):
        pretrain.pretrain(recordings, str(SMALL_AST), steps, out, "float32", save_every=2)

    train(5, whole)
    assert not whole.with_suffix(".resume.pt").exists()

    def stop(gradients, limit):
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt

    steps = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        clip = torch.nn.utils.clip_grad_norm_
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (stop(*args), clip(*args)))
        train(5, broken)
    with pytest.raises(
        pretrain.UserError, match=r"broken\.resume\.pt is damaged or of another training: delete it"
    ):
        train(6, broken)
    file = broken.with_suffix(".resume.pt")
    state = file.read_bytes()
    for damaged in (b"PK damaged", state[:1000]):
        file.write_bytes(damaged)
        with pytest.raises(pretrain.UserError, match=r"broken\.resume\.pt is damaged"):
            train(5, broken)
    file.write_bytes(state)
    train(5, broken)
    first, second = load_file(whole), load_file(broken)
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_the_file_is_a_backbone_without_a_head(recordings, tmp_path):
    out = tmp_path / "made.safetensors"
    before = load_ast(SMALL_AST, 512, 3)
    pretrain.pretrain(recordings, str(SMALL_AST), 1, out, "bfloat16")
    model = load_ast(out, n_classes=3)
    assert read_header(out)["config"]["n_frames"] == 512 and model.config.dim == before.config.dim
    assert not [name for name in load_file(out) if "classifier" in name or "head" in name]
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}
    assert not torch.equal(model.blocks[0].ffn.fc1.weight, before.blocks[0].ffn.fc1.weight)
