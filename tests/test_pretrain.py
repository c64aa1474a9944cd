"""A backbone from recordings: what is heard of a sound, and a training that may be interrupted."""

import numpy as np
import pytest
import torch
from helpers import SMALL_AST, make_folder, write_sound
from safetensors.torch import load_file

import data
from load_weights import load_ast
from support.checkpoints import read_header
from tools import pretrain


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    return pretrain.read_all(make_folder(tmp_path_factory.mktemp("sounds"), count=2, seconds=1.5))


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
    found = pretrain.read_all(tmp_path)
    assert [len(wave) for wave in found] == [8000, 8000] and all(
        np.abs(wave).max() == 1 for wave in found
    )
    assert "text.wav cannot be read (Format not recognised" in capsys.readouterr().err
    assert pretrain.main([str(tmp_path / "a"), "--out", str(tmp_path / "x.safetensors")]) == 2
    assert "has 1 recordings of at least 0.1 s" in capsys.readouterr().err
    for out in (tmp_path, tmp_path / "x.bin"):  # said before the training, not after it
        assert pretrain.main([str(tmp_path), "--steps", "1", "--out", str(out)]) == 2
        message = f"error: --out {out}: give the name of a file that ends in .safetensors\n"
        assert capsys.readouterr().err == message


def test_a_crop_is_a_part_of_the_sound_that_is_not_silent():
    rng = np.random.default_rng(0)
    ramp = np.arange(1, 40_001, dtype=np.float32) / 40_000
    starts = {
        int(clip[0] * 40_000)
        for _ in range(20)
        if len(clip := pretrain.crop(ramp, rng)) == pretrain.LENGTH
    }
    assert len(starts) > 10 and max(starts) <= 40_000 - pretrain.LENGTH + 1
    short = pretrain.crop(ramp[:100], rng)
    assert len(short) == pretrain.LENGTH and short[short > 0].tolist() == ramp[:100].tolist()
    half = np.concatenate([np.zeros(60_000, np.float32), np.ones(60_000, np.float32)])
    assert sum(pretrain.crop(half, rng).max() > 0 for _ in range(40)) > 34  # 1 - 2^-4 of them


def test_faster_is_higher():
    class Fixed:
        def uniform(self, low, high):
            return 1.1

    tone = np.sin(2 * np.pi * 1000 * np.arange(pretrain.LENGTH) / data.RATE)
    spectrum = np.abs(np.fft.rfft(pretrain.faster(tone, Fixed())))
    assert np.argmax(spectrum) * data.RATE / pretrain.LENGTH == pytest.approx(1100, abs=2)


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


def test_an_interrupted_training_ends_with_the_bits_of_an_unbroken_one(
    waves, tmp_path, monkeypatch
):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    pretrain.pretrain(waves, str(SMALL_AST), 5, whole, size=3, save_every=2)
    assert not whole.with_suffix(".resume.pt").exists()

    def stop(gradients, limit):
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt

    steps = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        clip = torch.nn.utils.clip_grad_norm_
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: (stop(*args), clip(*args)))
        pretrain.pretrain(waves, str(SMALL_AST), 5, broken, size=3, save_every=2)
    with pytest.raises(
        pretrain.UserError, match=r"broken\.resume\.pt is damaged or of another training: delete it"
    ):
        pretrain.pretrain(waves, str(SMALL_AST), 6, broken, size=3)
    file = broken.with_suffix(".resume.pt")
    state = file.read_bytes()
    for damaged in (b"PK damaged", state[:1000]):
        file.write_bytes(damaged)
        with pytest.raises(pretrain.UserError, match=r"broken\.resume\.pt is damaged"):
            pretrain.pretrain(waves, str(SMALL_AST), 5, broken, size=3)
    file.write_bytes(state)
    pretrain.pretrain(waves, str(SMALL_AST), 5, broken, size=3, save_every=2)
    first, second = load_file(whole), load_file(broken)
    assert first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_the_file_is_a_backbone_without_a_head(waves, tmp_path):
    out = tmp_path / "made.safetensors"
    before = load_ast(SMALL_AST, 98, 3)
    pretrain.pretrain(waves, str(SMALL_AST), 1, out, size=2)
    model = load_ast(out, n_classes=3)
    assert read_header(out)["config"]["n_frames"] == 98 and model.config.dim == before.config.dim
    assert not [name for name in load_file(out) if "classifier" in name or "head" in name]
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}
    assert not torch.equal(model.blocks[0].ffn.fc1.weight, before.blocks[0].ffn.fc1.weight)
