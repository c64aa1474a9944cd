"""The demo: sounds that `synth` makes, so that everything can be tried without downloading anything."""

import io
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from sounds import synth
from sounds.audio import RATE
from sounds.clip import PARTS, Clip, Listing
from support.command import UserError
from support.files import locked, whole_folder
from support.progress import Bar

SEED = 0  # of the sounds; the seed of a run decides how it learns, not what it hears
# Folders in the cache: a recipe in `synth` that changes needs a new name here, else the old sounds are used on.
FOLDERS = {"demo": "demo-fe5a0b5f", "demo_source": "demo_source-146f2f13"}


def rendered(
    name: str, classes: Iterable[str], sizes: tuple[int, int, int], data_dir: Path | None, cache_dir: Path
) -> Listing:
    """Sounds of `synth`, rendered once to 16-bit WAV files; `sizes`: clips per class to train, validate and test."""
    if data_dir is not None:
        raise UserError(f"--data-dir {data_dir}: {name} makes its own sounds; leave it out, or say --dataset folder")
    root = cache_dir / FOLDERS[name]
    parts = [part for part, size in zip(PARTS, sizes, strict=True) for _ in range(size)]  # of the clips of a class
    clips = [Clip(root / kind / f"{i:03d}.wav", kind, part) for kind in sorted(classes) for i, part in enumerate(parts)]
    root.parent.mkdir(parents=True, exist_ok=True)
    with locked(root):  # two runs that start together render once
        if not all(clip.path.is_file() for clip in clips):
            import soundfile  # here: what renders nothing starts without it

            with whole_folder(root) as temporary:
                for clip in Bar(clips, f"rendering {name}"):
                    file = temporary / clip.path.relative_to(root)
                    file.parent.mkdir(exist_ok=True)
                    wave = synth.render(clip.label, int(file.stem), SEED)
                    whole = io.BytesIO()  # libsndfile would call a full disk a "system error"
                    soundfile.write(whole, wave, RATE, subtype="PCM_16", format="WAV")
                    file.write_bytes(whole.getbuffer())
    return Listing(root, clips)


target = partial(rendered, "demo", synth.TARGET, (200, 40, 100))
source = partial(rendered, "demo_source", synth.SOURCE, (200, 10, 10))  # the backbone `--weights demo` began with it
