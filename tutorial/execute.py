"""Execute chapters from an empty kernel and write their outputs in place.

    python tutorial/execute.py          # all of them
    python tutorial/execute.py 01 05    # the ones whose names start so

A cell that raises ends the program. Nothing is kept that changes from one execution to the next: no
times, no progress.
"""

import base64
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


def smaller(png: str) -> str:
    """A picture with a palette of 128 colours, a third of the size. Base64 in and out."""
    file = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def execute(path: Path) -> float:
    """Seconds that it took."""
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources=place,
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if png := output.get("data", {}).get("image/png"):
                    output.data["image/png"] = smaller(png)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return time.perf_counter() - start


def main(names: list[str]) -> None:
    chapters = sorted(Path(__file__).parent.glob("*.ipynb"))
    paths = [path for path in chapters if path.name.startswith(tuple(names or [""]))]
    # of each kernel: as many chapters at once as there are cores
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, seconds in zip(paths, pool.map(execute, paths), strict=True):
            print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
