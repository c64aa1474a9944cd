"""Trained models for other programs, and what peft trained for this one.

    python -m tools.export show FILE                           what a file of trained parts is
    python -m tools.export export FILE --to merged --out FILE  one plain AST, for `load_ast`
    python -m tools.export export FILE --to hf --out FOLDER    for transformers' from_pretrained
    python -m tools.export export FILE --to peft --out FOLDER  a LoRA for peft
    python -m tools.export export FILE --to onnx --out FILE    waveform to probabilities
    python -m tools.export import FOLDER --out FILE            a LoRA that was trained with peft

transformers and peft need not be installed. The tests open the folders with these libraries.
"""

import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import load_weights
import petl
from ast_model import AST, ASTConfig, UserError
from petl_more import DoRA, RsLoRA
from support import headers
from support.checkpoints import (
    check_suffix,
    read_header,
    read_hf_config,
    read_json,
    read_mean_and_std,
    read_tensors,
    write_tensors,
)
from support.command import Parser, exit_code, needed, printable
from support.files import whole_file, whole_folder, write_json
from support.processes import say, say_lines
from support.records import check_not_of_run
from tools.merge import merge
from tools.predict import class_names

# -------------------------------------------------------------------------------------------- show


def show(path: Path) -> None:
    """Print what the header of a file says, as JSON. The backbone is not needed."""
    header = read_header(path)
    say(f"file        {path}")
    for name, value in header.items():
        if name not in ("record", "calibration"):  # long lists of numbers
            say(f"{name:<12}{json.dumps(value, ensure_ascii=False)}")
    if "calibration" in header:
        temperature = header["calibration"]["temperature"]
        limit = header["calibration"]["min_confidence"]
        print(f"confidence  temperature {temperature:.3g}, unsure below {limit:.3g}")


# ---------------------------------------------------------------------------- merged, transformers


def export_merged(model: AST, header: dict, out: Path, half: bool) -> str:
    """Write backbone and trained parts as one AST file.

    The text that is returned says how to use the file. All functions that export return one.
    """
    dtype = torch.float16 if half else torch.float32
    load_weights.save_ast(merged(model), out, header, dtype)
    return "a plain AST; `load_ast` and tools.predict read it"


def export_hf(model: AST, header: dict, out: Path) -> str:
    """Write a folder for transformers' AutoModelForAudioClassification and AutoFeatureExtractor."""
    plain = merged(model)
    check_pool(model, "hf")
    with whole_folder(out.resolve()) as folder:
        write_hf(plain, header, folder)
    return f'open it with transformers.AutoModelForAudioClassification.from_pretrained("{out}")'


def merged(model: AST) -> AST:
    """The plain AST of `merge`. Its UserError says what to do."""
    try:
        return merge(model)
    except UserError as error:
        raise UserError(f"{error}; --to onnx takes all") from None


def check_pool(model: AST, to: str) -> None:
    """Raise a UserError unless the head reads LayerNorm(([CLS] + [distillation]) / 2)."""
    if model.config.pool != "cls_dist":
        raise UserError(
            f"--to {to} needs a model trained with --pool cls_dist, the only head that "
            f"transformers' AST has: no weights can express the pool {model.config.pool!r} there; "
            "--to merged and --to onnx take any head"
        )


def write_hf(plain: AST, header: dict, folder: Path) -> None:
    """Write weights and configs of a plain AST."""
    write_configs(plain.config, header, folder)
    load_weights.save_ast(plain, folder / "model.safetensors", header)


def write_configs(config: ASTConfig, header: dict, folder: Path) -> None:
    """Write what transformers reads beside the weights: of the model, and of its features.

    What is not written has the library's default: the exact GELU, biases and no dropout.
    """
    names = header.get("classes") or [f"class {i}" for i in range(config.n_classes)]
    model = {
        "architectures": ["ASTForAudioClassification"],
        "model_type": "audio-spectrogram-transformer",
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden or 4 * config.dim,
        "layer_norm_eps": config.eps,
        "patch_size": config.patch,
        "frequency_stride": config.stride,
        "time_stride": config.stride,
        "max_length": config.n_frames,
        "num_mel_bins": config.n_mels,
        "problem_type": "single_label_classification",
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    extractor = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "sampling_rate": data.RATE,
        "num_mel_bins": config.n_mels,
        "max_length": config.n_frames,
        "mean": data.MEAN,
        "std": data.STD,
    }
    write_json(folder / "config.json", model)
    write_json(folder / "preprocessor_config.json", extractor)


# -------------------------------------------------------------------------------------------- peft

INSIDE = "audio_spectrogram_transformer"  # what transformers calls the AST without its head
ALIKE = (petl.LoRA, DoRA, RsLoRA)  # parts that peft has too
PEFT = {  # our names of their tensors, and those of peft
    "a.weight": "lora_A.weight",
    "b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


def export_peft(model: AST, header: dict, out: Path) -> str:
    """Write a folder for peft's PeftModel, which goes on the backbone as transformers loads it.

    The folder's config.json describes the model that the adapter belongs on. A backbone that
    transformers cannot open where it is goes into the folder, too, as `base`.
    """
    method = getattr(model, "method", petl.Method("this model", ()))
    if len(method.parts) != 1 or type(method.parts[0]) not in ALIKE:
        raise UserError(
            f"--to peft takes one of LoRA, DoRA, RsLoRA alone, not {method.name!r}; "
            "--to onnx takes all"
        )
    check_pool(model, "peft")
    config = model.config
    origin = model.backbone.name
    base = load_weights.AUDIOSET if origin == "audioset" else origin.removeprefix("hf:")
    with whole_folder(out.resolve()) as folder:
        if base == origin and not Path(origin, "config.json").is_file():
            base = str(out / "base")
            backbone = load_weights.load_ast(origin, config.n_frames, config.n_classes, config.pool)
            write_hf(backbone, header, folder / "base")
        adapter = peft_config(method.parts[0], config.dim)
        adapter["base_model_name_or_path"] = base
        write_json(folder / "adapter_config.json", adapter)
        write_configs(config, header, folder)
        write_tensors(folder / "adapter_model.safetensors", peft_tensors(model), {}, format="pt")
    return f"""open it with transformers and peft:
  config = AutoConfig.from_pretrained("{out}")
  base = AutoModelForAudioClassification.from_pretrained(
      "{base}", config=config, ignore_mismatched_sizes=True
  )
  model = PeftModel.from_pretrained(base, "{out}")"""


def peft_config(part: petl.LoRA, dim: int) -> dict:
    """What adapter_config.json says of a part.

    Final LayerNorm and head are trained, so they are saved. So are the embeddings, although they
    are frozen, because transformers draws new position embeddings for another length.
    """
    rank = petl.rank_of(dim, part.rr)
    is_rs = isinstance(part, RsLoRA)
    divisor = rank**0.5 if is_rs else rank
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": part.scale * divisor,  # peft divides by r, or by sqrt(r)
        "target_modules": [f"{letter}_proj" for letter in part.targets],
        "use_dora": isinstance(part, DoRA),
        "use_rslora": is_rs,
        "modules_to_save": [f"{INSIDE}.layernorm", "classifier", f"{INSIDE}.embeddings"],
    }


def peft_tensors(model: AST) -> dict:
    """The trained parts, and the embeddings, as peft names them inside of transformers' AST."""
    whole = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(("embed.", "norm.", "head.")):
            whole[name] = tensor
    tensors = load_weights.to_hugging_face(whole)
    for name, tensor in load_weights.trained_tensors(model).items():
        if name.startswith("blocks."):
            _, n, _, letter, last = name.split(".", 4)
            theirs = f"{INSIDE}.layers.{n}.attention.{letter}_proj.{PEFT[last]}"
            tensors[theirs] = tensor + start_of(model, name)
    return {f"base_model.model.{name}": tensors[name].contiguous() for name in tensors}


def start_of(model: AST, name: str):
    """What to add to our tensor. DoRA's m starts at |W|, and ours is m - |W|; 0 for all others."""
    if not name.endswith(".magnitude"):
        return 0
    return model.get_submodule(name.removesuffix(".magnitude")).w_square.sqrt()


def import_peft(folder: Path, out: Path, weights: str | None = None) -> None:
    """Write what peft trained on transformers' AST as a file of train.py.

    A UserError names what METHODS does not have: other adapters and places, several ranks, trained
    embeddings.
    """
    check_suffix(out)
    config = read_adapter(folder)
    file = folder / "adapter_model.safetensors"
    tensors = to_our_names(read_tensors(file))
    base = weights or config.base_model_name_or_path or ""
    if not weights and not Path(base).exists():
        base = f"hf:{base}"
    described = read_hf_config(folder / "config.json")
    model = load_base(base, described.max_length, tensors)
    check_out(out, folder, Path(model.backbone.name))
    check_features(file, base, tensors)
    petl.apply(model, method_of(config, tensors, model.config.dim))

    state = load_weights.trained_tensors(model)  # what peft did not train stays as it is there
    before = model.state_dict()
    for name, tensor in tensors.items():
        if name in state and tensor.shape == state[name].shape:
            tensor = tensor - start_of(model, name)
        if name not in before or not torch.equal(tensor, before[name]):
            state[name] = tensor
    load_weights.load_tensors(model, state, file)

    metadata = {"parameters": petl.count(model)}
    names = described.classes()
    if not names and "head.1.bias" not in tensors:
        names = class_names(base, model.config.n_classes)
    if len(names) not in (0, model.config.n_classes):
        raise UserError(
            f"{folder / 'config.json'}: id2label: Expected {model.config.n_classes} names, "
            f"as many as the head has, got {len(names)}"
        )
    if names:
        metadata["classes"] = names
    load_weights.save_trained(model, out, metadata)


def check_features(file: Path, base: str, tensors: dict) -> None:
    """Raise a UserError if an adapter was trained on features with another mean and std.

    The embedding of `load_ast` fits the features of the base alone. An adapter that brings its own
    embedding is compared with it tensor by tensor, later.
    """
    extractor = file.with_name("preprocessor_config.json")
    if "embed.patches.weight" in tensors or not extractor.is_file():
        return
    ours = read_mean_and_std(file)
    theirs = read_mean_and_std(load_weights.find_checkpoint(base)[0])
    if ours != theirs:
        raise UserError(
            f"{extractor}: mean and std are {ours}, those of its backbone {base} are {theirs}: "
            "give the backbone with the right file beside it as --weights"
        )


def read_adapter(folder: Path) -> headers.LoRA:
    """What adapter_config.json says. A UserError unless METHODS has such an adapter."""
    file = folder / "adapter_config.json"
    remedy = "give a folder that peft's save_pretrained wrote"
    config = read_json(file, headers.LoRA, remedy)
    if config.peft_type != "LORA" or config.alpha_pattern:
        raise UserError(
            f"{folder} holds {config.peft_type}: only LoRA, DoRA and rsLoRA can be read, "
            "without alpha_pattern"
        )
    if config.init_lora_weights not in (True, False, None, "gaussian", "eva", "orthogonal"):
        raise UserError(
            f"{folder} started by init_lora_weights {config.init_lora_weights!r}, which changed "
            "its backbone too: save it by save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    return config


def to_our_names(tensors: dict) -> dict:
    """The tensors of a file of peft under our names."""
    translated = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("base_model.model.")
        for ours, theirs in PEFT.items():
            name = name.replace(f".{theirs}", f".{ours}")
        translated[name] = tensor
    return load_weights.to_our_names(translated)


def load_base(base: str, n_frames: int | None, tensors: dict) -> AST:
    """The AST that the adapter belongs on.

    An adapter may bring a head, or one of its two layers. A layer that it does not bring is that of
    the checkpoint.
    """
    if "head.1.bias" not in tensors:
        return load_weights.load_ast(base, n_frames, pool="cls_dist")
    model = load_weights.load_ast(base, n_frames, tensors["head.1.bias"].numel(), "cls_dist")
    if "head.0.bias" not in tensors:
        checkpoint, _ = load_weights.read_checkpoint(base)
        norm = {name: checkpoint[name] for name in checkpoint if name.startswith("head.0.")}
        model.load_state_dict(norm, strict=False)
    return model


def method_of(config: headers.LoRA, tensors: dict, dim: int) -> petl.Method:
    """The row of METHODS that an adapter_config.json means, with its numbers."""
    rr = dim / config.r
    divisor = math.sqrt(config.r) if config.use_rslora else config.r
    numbers = {"rr": rr, "alpha": config.lora_alpha / divisor * rr}  # our scale is alpha / RR
    name = "lora"
    if config.use_dora:
        name = "dora"
    elif config.use_rslora:
        name = "rslora"
        numbers["lora_rr"] = rr
    method = petl.METHODS[name]
    targets = [letter for letter in "qkvo" if any(f".attn.{letter}." in key for key in tensors)]
    part = replace(method.parts[0], targets="".join(targets), **numbers)
    return replace(method, parts=(part,))


# -------------------------------------------------------------------------------------------- ONNX


class Listener(nn.Module):
    """Features and model in one graph: (batch, samples) at 16 kHz to (batch, classes).

    The graph takes any number of samples. Shorter sounds are padded and longer ones are cut to
    n_frames frames, as in training. The temperature divides the logits, as in tools.predict.

    ONNX runtimes have no FFT that is safe to use. But `fbank` is linear until the power is taken,
    so what it makes of 400 unit impulses is a matrix. A matrix every 160 samples is a convolution.
    """

    def __init__(self, model: AST, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.temperature = temperature
        matrix = data.spectrum(torch.eye(data.WINDOW, dtype=torch.float64))  # (400, 257), complex
        kernel = torch.cat([matrix.real, matrix.imag], dim=1).T.unsqueeze(1)  # (514, 1, 400)
        self.kernel = kernel.float()
        self.filters = data.mel_filters(torch.device("cpu"))
        self.ends = torch.arange(model.config.n_frames) * data.HOP + data.WINDOW  # of the frames
        self.window = int(self.ends[-1])
        self.ends[0] = 0  # there is always one frame

    def forward(self, waveform):  # (batch, samples)
        padded = F.pad(waveform, (0, self.window))[:, : self.window].unsqueeze(1)
        parts = F.conv1d(padded, self.kernel, stride=data.HOP)  # (batch, 514, n_frames)
        real, imaginary = parts.chunk(2, dim=1)
        power = real.square() + imaginary.square()  # (batch, 257, n_frames)
        mel = (power.transpose(1, 2) @ self.filters).clamp_min(2**-23).log()
        mel = mel * (self.ends <= waveform.shape[1]).unsqueeze(1)  # `to_input` pads with zeros
        logits = self.model((mel - data.MEAN) / (2 * data.STD))
        return (logits / self.temperature).softmax(-1)


def export_onnx(model: AST, header: dict, out: Path) -> str:
    """Write features and model as one ONNX file. Its metadata has class names and front end.

    The file gets its name after onnxruntime has given the same probabilities as PyTorch, for
    another batch and length than the graph was made with. A RuntimeError says that they differ.
    """
    with needed("--to onnx needs", "onnx onnxruntime"):
        import onnx
        import onnxruntime
    n_frames = model.config.n_frames
    facts = {"classes": header.get("classes"), "n_frames": n_frames, "front_end": data.FRONT_END}
    temperature = header.get("calibration", {}).get("temperature", 1.0)
    waves = 0.1 * torch.randn(3, data.RATE, generator=torch.Generator().manual_seed(0))
    with whole_file(out) as temporary, warnings.catch_warnings():
        # The older of torch's two exporters needs no further package and a tenth of the time.
        # It warns that it is old, and that the check of shapes in Embedding is not in the graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Listener(model, temperature).eval(),
            (waves[:2, : data.WINDOW],),
            temporary,
            dynamo=False,
            opset_version=17,
            input_names=["waveform"],
            output_names=["probabilities"],
            dynamic_axes={"waveform": {0: "batch", 1: "samples"}, "probabilities": {0: "batch"}},
        )
        graph = onnx.load(temporary)
        onnx.helper.set_model_props(graph, {name: json.dumps(facts[name]) for name in facts})
        onnx.save(graph, temporary)

        session = onnxruntime.InferenceSession(temporary)
        (theirs,) = session.run(None, {"waveform": waves.numpy()})
        with torch.inference_mode():
            logits = model(data.to_input(data.fbank(waves), n_frames))
        ours = (logits / temperature).softmax(-1).numpy()
        difference = abs(theirs - ours).max()
        if difference > 1e-3:
            raise RuntimeError(f"onnxruntime and torch differ by {difference:.2g} in a probability")
    n_classes = model.config.n_classes
    seconds = n_frames * data.HOP / data.RATE
    return (
        f"waveforms (batch, samples) at 16 kHz to probabilities (batch, {n_classes})\n"
        f"Of a longer sound it reads the first {seconds:g} s."
    )


# -------------------------------------------------------------------------------- the command line


def export(args) -> None:
    """Write a trained model in another format."""
    if args.half and args.to != "merged":
        raise UserError(f"--half goes with --to merged, not with --to {args.to}")
    if args.to == "merged":
        check_suffix(args.out)
    if args.to == "onnx" and args.out.suffix != ".onnx":
        raise UserError(f"--out {args.out}: its name must end in .onnx")
    if args.to in ("hf", "peft"):
        check_folder(args.out)
    header = read_header(args.file)
    header.pop("record", None)  # how it was trained belongs to the fold
    model = load_weights.load_trained(args.file, args.weights)
    check_out(args.out, args.file, Path(model.backbone.name))
    if args.to == "merged":
        message = export_merged(model, header, args.out, args.half)
    elif args.to == "hf":
        message = export_hf(model, header, args.out)
    elif args.to == "peft":
        message = export_peft(model, header, args.out)
    else:
        message = export_onnx(model, header, args.out)
    say_lines(f"{printable(args.out)}: {message}")


def check_out(out: Path, *sources: Path) -> None:
    """Raise a UserError if `out` is a file of a run, or if it is or holds a file of `sources`.

    `sources` are files and folders that the command reads.
    """
    for source in (load_weights.DEMO, *sources):
        for file in (source, *source.glob("*")):
            if file.exists() and file.resolve().is_relative_to(out.resolve()):
                raise UserError(f"--out {out} is, or holds, what is read here: give another name")
    check_not_of_run(out)


def check_folder(out: Path) -> None:
    """Raise a UserError for a folder that holds more than an earlier export.

    The reason is that an export replaces a folder as a whole.
    """
    names = {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base",
    }
    if out.exists() and not {file.name for file in out.iterdir()} <= names:
        raise UserError(f"--out {out} is a folder with other files: give the name of a new folder")


def parse(argv: list[str] | None):
    parser = Parser(
        "python -m tools.export",
        description="Show what a trained model is, or convert it from or to other formats.",
    )
    commands = parser.add_subparsers(required=True, dest="command")
    show = commands.add_parser(
        "show", help="print method, classes, backbone and accuracy of a file"
    )
    export = commands.add_parser("export", help="write a trained model in another format")
    for command in (show, export):
        command.add_argument("file", type=Path, help="a foldK.safetensors that train.py wrote")
    export.add_argument(
        "--to",
        choices=["merged", "hf", "peft", "onnx"],
        required=True,
        help="merged: one plain AST for load_ast; hf: a folder for transformers; peft: a folder "
        "for peft; onnx: waveform to probabilities",
    )
    export.add_argument(
        "--half", action="store_true", help="with merged: store float16, half the size"
    )
    peft = commands.add_parser(
        "import", help="make a foldK.safetensors of a LoRA that peft trained"
    )
    peft.add_argument("folder", type=Path, help="a folder of peft, with adapter_config.json")
    for command in (export, peft):
        command.add_argument(
            "--out", type=Path, required=True, help="file to write; for hf and peft a new folder"
        )
        command.add_argument("--weights", help="weights of the backbone, if they have moved")
    return parser.parse_args(argv)


def run(args) -> None:
    if args.command == "show":
        show(args.file)
    elif args.command == "export":
        export(args)
    else:
        import_peft(args.folder, args.out, args.weights)


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
