"""Draw docs/block.svg: a Transformer block of the AST, and where each method of petl.py goes.

    python docs/draw_block.py

The picture follows the colours of the reader's screen, light or dark.
"""

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH = 860
HEIGHT = 700
SPINE = 250  # x of the arrow that runs through all sub-layers
LABELS = 470  # x where the labels begin

STYLE = """
text { font: 14px sans-serif; fill: #1f2328; }
.class { font: bold 14px monospace; fill: #0550ae; }
.small { font-size: 12px; fill: #59636e; }
.box { fill: #f6f8fa; stroke: #59636e; stroke-width: 1.2; }
.frame { fill: none; stroke: #59636e; stroke-dasharray: 5 4; }
.new { fill: #ddf4ff; stroke: #0550ae; stroke-width: 1.5; }
.line { fill: none; stroke: #59636e; stroke-width: 1.5; }
.path { fill: none; stroke: #0550ae; stroke-width: 1.8; }
.pointer { fill: none; stroke: #0550ae; stroke-width: 1; stroke-dasharray: 2 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .class { fill: #79c0ff; }
  .small { fill: #9198a1; }
  .box { fill: #21262d; stroke: #9198a1; }
  .frame, .line { stroke: #9198a1; }
  .new { fill: #0c2d6b; stroke: #79c0ff; }
  .path, .pointer { stroke: #79c0ff; }
}
"""

# For those who cannot see the picture.
ALTERNATIVE = (
    "A pre-norm Transformer block, from bottom to top. Tokens pass norm1 and self-attention with "
    "the projections q, k, v and o, and are added to the residual stream. Then they pass norm2 and "
    "the feed-forward network fc1, GELU, fc2, and are added again. PromptedEmbedding puts prompts "
    "behind [CLS]. PromptedBlock puts new ones before every block. LoRALinear wraps q and v, "
    "PrefixLinear wraps k and v. Adapted wraps a sub-layer with a Bottleneck or a Convpass: "
    "parallel to it, or in sequence behind it. HydraFFN wraps the feed-forward network with both. "
    "Biases lets every bias learn."
)


def box(x, y, width, height, text, kind="box"):
    """A box around (x, y), with a text."""
    left = x - width / 2
    top = y - height / 2
    return (
        f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{height}" rx="5"/>'
        f'<text x="{x}" y="{y + 5}" text-anchor="middle">{escape(text)}</text>'
    )


def line(*points, kind="line", arrow=True):
    """A line through points (x, y), with an arrow at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<polyline class="{kind}" points="{path}"{end}/>'


def plus(y):
    """Where the stream and what a sub-layer computes are added."""
    return (
        f'<circle class="box" cx="{SPINE}" cy="{y}" r="11"/>'
        f'<text x="{SPINE}" y="{y + 5}" text-anchor="middle">+</text>'
    )


def label(y, name, text, *places):
    """The name of a class and what it does, and dotted lines to its places (x, y)."""
    parts = [line((LABELS - 6, y), place, kind="pointer", arrow=False) for place in places]
    parts.append(f'<text class="class" x="{LABELS}" y="{y + 5}">{escape(name)}</text>')
    for i, row in enumerate(text.split("\n")):
        parts.append(f'<text class="small" x="{LABELS}" y="{y + 22 + 15 * i}">{escape(row)}</text>')
    return "".join(parts)


def adapter(bottom, top, after):
    """Two adapters at a sub-layer: parallel, from `bottom` to `top`, or in sequence, at `after`."""
    middle = (bottom + top) / 2
    x = SPINE + 130
    return "".join(
        [
            line((SPINE, bottom), (x, bottom), (x, top), (SPINE + 12, top), kind="path"),
            box(x, middle, 74, 26, "adapter", "new"),
            box(SPINE, after, 74, 24, "adapter", "new"),
        ]
    )


def draw() -> str:
    """The picture as SVG."""
    x = SPINE
    parts = [
        # From below: the embedding, and the block's frame.
        line((x, 690), (x, 668)),
        box(x, 655, 190, 26, "Embedding"),
        '<rect class="frame" x="40" y="58" width="390" height="536" rx="8"/>',
        '<text class="small" x="50" y="76">Block, one of 12</text>',
        # Self-attention.
        line((x, 642), (x, 566)),
        line((x, 588), (90, 588), (90, 330), (x - 12, 330)),
        box(x, 553, 110, 26, "norm1"),
        line((x, 540), (x, 508)),
        *[box(x + dx, 495, 44, 26, name) for dx, name in ((-56, "q"), (0, "k"), (56, "v"))],
        line((x, 482), (x, 464)),
        box(x, 451, 150, 26, "attention"),
        line((x, 438), (x, 420)),
        box(x, 407, 44, 26, "o"),
        line((x, 394), (x, 342)),
        adapter(526, 330, 368),
        plus(330),
        # The feed-forward network.
        line((x, 319), (x, 292)),
        line((x, 306), (90, 306), (90, 98), (x - 12, 98)),
        box(x, 279, 110, 26, "norm2"),
        line((x, 266), (x, 234)),
        box(x, 221, 110, 26, "fc1"),
        line((x, 208), (x, 190)),
        box(x, 177, 110, 26, "GELU, fc2"),
        line((x, 164), (x, 110)),
        adapter(252, 98, 136),
        plus(98),
        line((x, 87), (x, 44)),
        box(x, 31, 230, 26, "norm, mean, head"),
        # The methods.
        label(31, "make_head", "every method trains it; the row linear nothing else",
              (x + 115, 31)),
        label(98, "Adapted",
              "wraps a sub-layer. In it a Bottleneck or a\nConvpass: parallel (par_before) ...",
              (x + 167, 175)),
        label(158, "Adapted", "... or in sequence (seq_after)", (x + 37, 136)),
        label(208, "HydraFFN", "two linear bottlenecks: one parallel, one behind", (x + 55, 219)),
        label(266, "Biases", "BitFit: every bias learns", (x + 55, 279)),
        label(352, "Adapted", "the same at self-attention. Houlsby has both,\nPfeiffer one of them",
              (x + 167, 428), (x + 37, 368)),
        label(440, "PrefixLinear", "wraps k and v: learned keys and values",
              (x + 18, 482), (x + 78, 486)),
        label(500, "LoRALinear", "wraps q and v: W + s B A", (x - 48, 509), (x + 78, 500)),
        label(600, "PromptedBlock", "deep prompts: new ones before every block", (x, 600)),
        label(655, "PromptedEmbedding", "prompts behind [CLS]", (x + 95, 655)),
    ]  # fmt: skip
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">
<title>A Transformer block, and where each method goes</title>
<desc>{escape(ALTERNATIVE)}</desc>
<style>{STYLE}</style>
<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"
orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#8b949e"/></marker></defs>
{body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("block.svg").write_text(draw(), encoding="utf-8")
