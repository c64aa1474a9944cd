"""The demo: sounds that `synth` makes. Everything can be tried without a download."""

import io
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from sounds import synth
from sounds.audio import RATE
from sounds.clip import PARTS, Clip, Listing
from sounds.fetch import make_once
from support.command import UserError
from support.files import whole_folder
from support.progress import Bar

SEED = 0  # of the sounds; the seed of a run decides how it learns, not what it hears
# Folders in the cache. A changed recipe in `synth` needs a new name, or the old sounds are used.
FOLDERS = {"demo": "demo-fe5a0b5f", "demo_source": "demo_source-146f2f13"}


def listing(
    name: str,
    classes: Iterable[str],
    sizes: tuple[int, int, int],
    data_dir: Path | None,
    cache_dir: Path,
) -> Listing:
    """Sounds of `synth`, rendered once to 16-bit WAV files.

    `sizes`: clips of each class to train, validate and test.
    """
    if data_dir is not None:
        raise UserError(
            f"--data-dir {data_dir}: {name} makes its own sounds; leave it out, "
            "or say --dataset folder"
        )
    root = cache_dir / FOLDERS[name]
    clips = []
    for kind in sorted(classes):
        parts = [part for part, size in zip(PARTS, sizes, strict=True) for _ in range(size)]
        clips += [Clip(root / kind / f"{i:03d}.wav", kind, part) for i, part in enumerate(parts)]
    make_once(root, lambda: write(clips, root, name))
    return Listing(root, clips)


def write(clips: list[Clip], root: Path, name: str) -> None:
    """Render the clips into the new folder `root`. It is whole, or it is not there."""
    import soundfile  # a run that renders nothing starts without it

    with whole_folder(root) as temporary:
        for clip in Bar(clips, f"rendering {name}"):
            file = temporary / clip.path.relative_to(root)
            file.parent.mkdir(exist_ok=True)
            wave = synth.render(clip.label, int(file.stem), SEED)
            content = io.BytesIO()  # libsndfile would call a full disk a "system error"
            soundfile.write(content, wave, RATE, subtype="PCM_16", format="WAV")
            file.write_bytes(content.getbuffer())


target = partial(listing, "demo", synth.TARGET, (200, 40, 100))
# The training of the backbone `--weights demo` began with these.
source = partial(listing, "demo_source", synth.SOURCE, (200, 10, 10))
