"""Trained models for other programs, and theirs for this one.

    python -m tools.export show FILE                             what a file of trained parts is
    python -m tools.export export FILE --to merged --out FILE    one plain AST, which any AST program reads
    python -m tools.export export FILE --to hf --out FOLDER      for transformers' from_pretrained
    python -m tools.export export FILE --to peft --out FOLDER    a LoRA for peft
    python -m tools.export export FILE --to onnx --out FILE      waveform to probabilities, without this repository
    python -m tools.export import FOLDER --out FILE              a LoRA that was trained with peft

`hf` and `peft` are written with nothing but json and safetensors; the tests open them with the libraries themselves.
"""

import argparse
import json
import math
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import data
import load_weights
import petl
from ast_model import AST, ASTConfig
from support import headers
from support.checkpoints import check_suffix, read_header, read_json, read_names, read_tensors
from support.command import Parser, UserError, exit_code, needed, reason_of
from support.files import whole_file, write_json
from tools.merge import merge
from tools.predict import class_names

# ------------------------------------------------------------------------------------------------------------- show


def show(path: Path) -> None:
    """Print what a file of `save_trained` or `save_ast` is, as far as its header knows. Needs no backbone."""
    header, lines = read_header(path), {"file": f"{path}, {path.stat().st_size:,} bytes"}
    lines["holds"] = "a whole AST, merged" if "config" in header else "trained parts only: needs its backbone"
    if "method" in header:
        method = load_weights.from_dict(header["method"], path)
        parts = " + ".join(map(str, method.parts)) or "final LayerNorm and head alone"
        lines["method"] = f"{method.name}: {parts}, learning rate {method.lr:g}"
    if "parameters" in header:
        own, head, total = (header["parameters"][key] for key in ("petl", "head", "total"))
        what = f"{own + head:,} trained ({own:,} of the method, {head:,} of final LayerNorm and head)"
        lines["parameters"] = f"{what}, {100 * (own + head) / total:.2f} % of {total:,}"
    if "n_classes" in header:
        names = f": {', '.join(header['classes'])}" if "classes" in header else ", without names"
        lines |= {"classes": f"{header['n_classes']}{names}", "pool": header["pool"]}
    if "backbone" in header:
        lines["backbone"] = f"{header['backbone']['name']}, SHA-256 {header['backbone']['sha256']}"
    if "front_end" in header:
        frames = f"{header['n_frames']} frames; " if "n_frames" in header else ""
        lines["front end"] = frames + listed(header["front_end"])
    if "result" in header:
        result, best = header["result"], header["result"]["validation_accuracy"]
        chosen = "the last epoch" if best is None else f"best of validation, {best:.2f} %"
        tested = f"{result['accuracy']:.2f} % of the test clips of fold {result['fold']}"
        lines["accuracy"] = f"{tested} (epoch {result['epoch']}, {chosen})"
    if "calibration" in header:
        facts = header["calibration"]
        lines["confidence"] = f"temperature {facts['temperature']:.3g}, unsure below {facts['min_confidence']:.3g}"
    if "settings" in header:
        lines["trained on"] = listed({name: value for name, value in header["settings"].items() if name != "method"})
    if "versions" in header:
        lines["versions"] = listed(header["versions"])
    for name, value in lines.items():
        print(f"{name:<12}{value}")


def listed(facts: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


# ------------------------------------------------------------------------------------------------- merged, transformers


def export_merged(model: AST, header: dict, out: Path, half: bool = False) -> str:
    """Backbone and trained parts as one AST file, LoRA and Hydra folded in. Like all here, returns how to use it."""
    load_weights.save_ast(merge(model), out, header, torch.float16 if half else torch.float32)
    return "a plain AST; `load_ast` and tools.predict read it"


def export_hf(model: AST, header: dict, out: Path) -> str:
    """A folder for transformers' `AutoModelForAudioClassification.from_pretrained`, with the feature extractor's."""
    write_hf(merge(model), header, out)
    return f'open it with transformers.AutoModelForAudioClassification.from_pretrained("{out}")'


def write_hf(plain: AST, header: dict, out: Path) -> None:
    write_configs(plain.config, header, out)
    load_weights.save_ast(plain, out / "model.safetensors", header)


def write_configs(config: ASTConfig, header: dict, out: Path) -> None:
    """The two JSON files beside the weights: of transformers' model and of its feature extractor."""
    names = header.get("classes") or [f"class {i}" for i in range(config.n_classes)]
    write_json(out / "config.json", {
        "architectures": ["ASTForAudioClassification"], "model_type": "audio-spectrogram-transformer",
        "hidden_size": config.dim, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "intermediate_size": config.hidden or 4 * config.dim, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layer_norm_eps": config.eps, "patch_size": config.patch, "qkv_bias": True,
        "frequency_stride": config.stride, "time_stride": config.stride, "max_length": config.n_frames,
        "num_mel_bins": config.n_mels, "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)}, "dtype": "float32",
    })  # fmt: skip
    write_json(out / "preprocessor_config.json", {
        "feature_extractor_type": "ASTFeatureExtractor", "feature_size": 1, "sampling_rate": data.RATE,
        "num_mel_bins": config.n_mels, "max_length": config.n_frames, "do_normalize": True, "mean": data.MEAN,
        "std": data.STD, "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False,
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- peft


PEFT = {  # what we call the tensors of LoRA and its relatives, and what peft does
    "a.weight": "lora_A.weight", "b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector", "scale": "ia3_l",
    "scale_d": "vera_lambda_d", "scale_b": "vera_lambda_b",
}  # fmt: skip
ALIKE = ("LoRA", "DoRA", "RsLoRA", "IA3", "VeRA")  # parts that peft has too
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # of a LoRA in peft; others change the backbone too


def start_of(model: AST, name: str):
    """What peft's tensor is more than ours: here factors are trained as their distance from where they start."""
    module, _, last = name.rpartition(".")
    if last == "magnitude":
        return model.get_submodule(module).w_square.sqrt()
    return {"scale": 1, "scale_d": 0.1}.get(last, 0)


def peft_config(model: AST) -> dict:
    """What adapter_config.json says of the one part of a model's method."""
    (part,) = model.method.parts
    kind = type(part).__name__
    if kind == "IA3":
        return {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]}
    rank, targets = petl.rank_of(model.config.dim, part.rr), [f"{letter}_proj" for letter in part.targets]
    config = {"r": rank, "target_modules": targets, "bias": "none"}
    if kind == "VeRA":
        return {**config, "peft_type": "VERA", "projection_prng_key": part.seed, "save_projection": True}
    alpha = part.alpha if kind == "RsLoRA" else part.alpha / part.rr * rank  # peft scales by lora_alpha / r
    flags = {"use_dora": kind == "DoRA", "use_rslora": kind == "RsLoRA"}
    return {**config, "peft_type": "LORA", "lora_alpha": alpha, "lora_dropout": 0.0, **flags}


def export_peft(model: AST, header: dict, out: Path) -> str:
    """A folder for `peft.PeftModel.from_pretrained`, to be put on the backbone as transformers loads it.

    The final LayerNorm and the head are trained, so they travel along. So do the embeddings, though they are frozen:
    the library starts the position embeddings anew when the length is not that of the checkpoint. The config.json in
    the folder is that of the model the adapter belongs on. A backbone that transformers has no way to is written beside
    it, into `base`.
    """
    config, origin, ast = model.config, model.backbone.name, "audio_spectrogram_transformer"
    base = load_weights.AUDIOSET if origin == "audioset" else origin.removeprefix("hf:")
    if base == origin and not Path(origin, "config.json").is_file():
        base = str(out / "base")
        write_hf(load_weights.load_ast(origin, config.n_frames, config.n_classes, config.pool), header, out / "base")
    write_configs(config, header, out)
    write_json(out / "adapter_config.json", {
        **peft_config(model), "task_type": None, "base_model_name_or_path": base,
        "modules_to_save": [f"{ast}.layernorm", "classifier", f"{ast}.embeddings"], "inference_mode": True,
    })  # fmt: skip
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    whole = {name: state[name] for name in state if name.startswith(("embed.", "norm.", "head."))}
    tensors = load_weights.to_hugging_face(whole)
    for name, tensor in load_weights.trained_tensors(model).items():
        if name.startswith("blocks."):
            _, n, at, layer, last = name.split(".", 4)
            where = f"attention.{layer}_proj" if at == "attn" else f"mlp.{layer}"  # as transformers 5 calls it
            tensor = tensor + start_of(model, name)
            if last == "scale":
                tensor = tensor[None] if layer == "fc2" else tensor[:, None]
            tensors[f"{ast}.layers.{n}.{where}.{PEFT[last]}"] = tensor.contiguous()
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    if type(model.method.parts[0]).__name__ == "VeRA":
        a, b = vera_pair(model)
        tensors |= {"base_model.vera_A": a, "base_model.vera_B": b}
    with whole_file(out / "adapter_model.safetensors") as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    return f"""open it with transformers and peft:
  config = AutoConfig.from_pretrained("{out}")
  base = AutoModelForAudioClassification.from_pretrained("{base}", config=config, ignore_mismatched_sizes=True)
  model = PeftModel.from_pretrained(base, "{out}")"""


def vera_pair(model: AST) -> list[torch.Tensor]:
    """The frozen A and B that all projections share."""
    module = next(module for module in model.modules() if hasattr(module, "scale_d"))
    return [module.a.weight.detach(), module.b.weight.detach()]


def import_peft(folder: Path, out: Path, weights: str | None = None) -> None:
    """A LoRA that peft trained on transformers' AST, or a DoRA, rsLoRA, (IA)3 or VeRA, becomes a file of train.py.

    Raises UserError for other adapters, places, several ranks, for a LoRA whose start has changed the backbone, and for
    a VeRA whose A and B are not ours of its seed.
    """
    check_suffix(out)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter_config.json: give a folder that peft's save_pretrained wrote")
    config = read_json(folder / "adapter_config.json", headers.Adapter)
    kind = config.peft_type
    unsupported = [name for name in ("rank_pattern", "alpha_pattern", "lora_bias") if getattr(config, name)]
    if kind not in ("LORA", "IA3", "VERA") or config.bias != "none" or unsupported:
        known = "only LoRA with one rank, DoRA, rsLoRA, (IA)3 and VeRA, without biases, can be read"
        raise UserError(f"{folder} holds {', '.join([kind, *unsupported])}: {known}")
    if kind != "IA3":
        config = read_json(folder / "adapter_config.json", headers.LoRA if kind == "LORA" else headers.VeRA)
    if kind == "LORA" and config.init_lora_weights not in STARTS:
        raise UserError(
            f"{folder} started by init_lora_weights {config.init_lora_weights!r}, which changed its backbone too: save "
            "it by save_pretrained with path_initial_model_for_weight_conversion"
        )
    file = next((f for f in sorted(folder.glob("adapter_model.*")) if f.suffix in (".safetensors", ".bin")), None)
    if file is None:
        raise UserError(f"{folder} holds no adapter_model.safetensors: give a folder that peft's save_pretrained wrote")
    tensors = {}
    for name, tensor in read_tensors(file).items():
        name = name.removeprefix("base_model.model.")
        for ours, theirs in PEFT.items():
            name = name.replace(f".{theirs}", f".{ours}")
        tensors |= load_weights.to_our_names({name: tensor})
    base = weights or config.base_model_name_or_path or ""
    if not weights and not Path(base).exists():
        base = f"hf:{base}"
    written = read_names(folder / "config.json")
    n_classes = tensors["head.1.bias"].numel() if "head.1.bias" in tensors else None
    model = load_weights.load_ast(base, getattr(written, "max_length", None), n_classes, "cls_dist")
    for name in [name for name in tensors if name.startswith("embed.")]:
        if not torch.equal(tensors.pop(name), model.state_dict()[name]):
            raise UserError(f"{folder}: {name} is not that of {base}; trained embeddings are no part of a LoRA here")
    for name in tensors:
        if name.endswith(".a.weight") and tensors[name].shape[:1] != (config.r,):
            raise UserError(f"{folder / 'adapter_config.json'}: r: got {config.r}, but {name} has another rank")
    pair = [tensors.pop(f"base_model.vera_{matrix}", torch.empty(0)) for matrix in "AB"]
    petl.apply(model, method_of_peft(config, tensors, model.config.dim))
    if kind == "VERA" and not all(map(torch.equal, vera_pair(model), pair)):
        raise UserError(f"{folder}: its frozen A and B are not those of the same seed here; start it from an export")
    backbone = load_weights.trained_tensors(model)  # what peft did not train stays as it is there
    for name in [name for name in tensors.keys() & backbone.keys() if name.startswith("blocks.")]:
        if name.endswith(".scale") and tensors[name].shape[-1 if "attn" in name else 0] == 1:
            tensors[name] = tensors[name].flatten()
        tensors[name] = tensors[name] - start_of(model, name)
    load_weights.load_tensors(model, {**backbone, **tensors}, file)
    names, metadata = written.classes(), {"parameters": petl.count(model)}
    if names and len(names) != model.config.n_classes:
        expected = f"Expected {model.config.n_classes} names, as many as the head has, got {len(names)}"
        raise UserError(f"{folder / 'config.json'}: id2label: {expected}")
    if names:
        metadata["classes"] = names
    elif n_classes is None:
        metadata["classes"] = class_names(base, model.config.n_classes)
    load_weights.save_trained(model, out, metadata)


def method_of_peft(config: headers.Adapter, tensors: dict[str, torch.Tensor], dim: int) -> petl.Method:
    """The row of METHODS that an adapter_config.json means, with its numbers."""
    name = "dora" if config.use_dora else "rslora" if config.use_rslora else config.peft_type.lower()
    method = petl.METHODS[name]
    (part,) = method.parts
    if name != "ia3":
        rank = config.r
        targets = "".join(letter for letter in "qkvo" if any(f".attn.{letter}." in name for name in tensors))
        part = replace(part, targets=targets, rr=dim // rank if dim % rank == 0 else dim / rank)
    if name == "vera":
        part = replace(part, seed=config.projection_prng_key)
    elif name == "rslora":
        part = replace(part, alpha=config.lora_alpha)
    elif name != "ia3":
        scale = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
        part = replace(part, alpha=scale * part.rr)
    return replace(method, parts=(part,))


# ------------------------------------------------------------------------------------------------------------- ONNX


class Listener(nn.Module):
    """Features and model in one graph: waveforms (batch, samples) at 16 kHz to probabilities (batch, classes).

    Any number of samples: shorter sounds are padded and longer ones cut to n_frames frames, as in training.
    """

    def __init__(self, model: AST):
        super().__init__()
        self.model = model
        # ONNX runtimes have no FFT that is safe to use. All of `fbank` before the power is linear in the 400 samples of
        # a frame: what it makes of 400 unit impulses is its matrix, and a matrix every 160 samples is a convolution.
        matrix = data.spectrum(torch.eye(data.WINDOW, dtype=torch.float64))  # (400, 257), complex
        kernel = torch.cat([matrix.real, matrix.imag], dim=1).T.unsqueeze(1)  # (514, 1, 400)
        self.register_buffer("kernel", kernel.float())
        self.register_buffer("filters", data.mel_filters(torch.device("cpu")))
        ends = torch.arange(model.config.n_frames) * data.HOP + data.WINDOW  # of the frames, in samples
        self.register_buffer("silence", torch.zeros(1, int(ends[-1])))
        ends[0] = 0  # there is always one frame
        self.register_buffer("ends", ends)

    def forward(self, waveform):  # (batch, samples)
        window = self.silence.shape[1]
        padded = torch.cat([waveform, self.silence.expand(waveform.shape[0], -1)], dim=1)[:, :window]
        parts = nn.functional.conv1d(padded.unsqueeze(1), self.kernel, stride=data.HOP)  # (batch, 514, n_frames)
        real, imaginary = parts.chunk(2, dim=1)
        power = (real.square() + imaginary.square()).transpose(1, 2)  # (batch, n_frames, 257)
        mel = (power @ self.filters).clamp_min(2**-23).log()
        mel = mel * (self.ends <= waveform.shape[1]).unsqueeze(1)  # zeros after the sound, as `to_input` pads
        return self.model((mel - data.MEAN) / (2 * data.STD)).softmax(-1)


def export_onnx(model: AST, header: dict, out: Path) -> str:
    """Waveform to probabilities as one ONNX file, batch and length free; class names and front end as its metadata.

    Checked with onnxruntime before it gets its name: RuntimeError if a probability differs.
    """
    with needed("--to onnx needs", "onnx onnxruntime"):
        import onnx
        import onnxruntime
    with whole_file(out) as temporary:
        with warnings.catch_warnings():
            # The older of torch's two exporters: it needs no further package, and takes a tenth of the time. It warns
            # that it is the older one, and that the shape check in Embedding is not part of the graph.
            warnings.simplefilter("ignore", (DeprecationWarning, torch.jit.TracerWarning))
            torch.onnx.export(
                Listener(model).eval(), (torch.zeros(2, data.WINDOW),), temporary, dynamo=False, opset_version=17,
                input_names=["waveform"], output_names=["probabilities"],
                dynamic_axes={"waveform": {0: "batch", 1: "samples"}, "probabilities": {0: "batch"}},
            )  # fmt: skip
        graph = onnx.load(temporary)
        facts = {"classes": header.get("classes"), "n_frames": model.config.n_frames, "front_end": data.FRONT_END}
        onnx.helper.set_model_props(graph, {name: json.dumps(fact) for name, fact in facts.items()})
        onnx.save(graph, temporary)
        difference = compare_onnx(onnxruntime.InferenceSession(temporary), model)
        if difference > 1e-3:
            raise RuntimeError(f"onnxruntime and torch differ by {difference:.2g} in a probability")
    shapes = f"waveforms (batch, samples) at 16 kHz to probabilities (batch, {model.config.n_classes})"
    return f"{shapes}; onnxruntime and torch agree to {difference:.1g}"


@torch.inference_mode()
def compare_onnx(session, model: AST) -> float:
    """Largest difference to the model fed by `data.fbank`, over sounds and batches of several sizes."""
    n_frames, generator = model.config.n_frames, torch.Generator().manual_seed(0)
    worst, window = 0.0, n_frames * data.HOP
    for batch, samples in ((1, 100), (3, window // 2), (2, window + data.WINDOW), (1, 2 * window)):
        waves = 0.1 * torch.randn(batch, samples, generator=generator)
        theirs = torch.from_numpy(session.run(None, {"waveform": waves.numpy()})[0])
        ours = model(data.to_input(data.fbank(waves), n_frames)).softmax(-1)
        worst = max(worst, (theirs - ours).abs().max().item())
    return worst


# ------------------------------------------------------------------------------------------------ the command line


def export(args: argparse.Namespace) -> None:
    """Write a trained model in another format."""
    if args.half and args.to != "merged":
        raise UserError(f"--half goes with --to merged, not with --to {args.to}")
    if args.to in ("hf", "peft") and args.out.is_file():
        raise UserError(f"--out {args.out} is a file; --to {args.to} writes a folder")
    if args.to in ("merged", "onnx") and args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; --to {args.to} writes a file")
    if args.to == "merged":
        check_suffix(args.out)
    if args.to == "onnx" and args.out.suffix != ".onnx":
        raise UserError(f"--out {args.out}: its name must end in .onnx")
    if args.out.exists() and args.out.samefile(args.file):
        raise UserError(f"--out {args.out} is the file that is exported: give another name")
    header, model = read_header(args.file), load_weights.load_trained(args.file, args.weights)
    header.pop("record", None)  # says how it was trained, which belongs to the fold
    method = getattr(model, "method", petl.Method("this model", ()))
    if args.to == "peft" and [type(part).__name__ in ALIKE for part in method.parts] != [True]:
        raise UserError(f"--to peft takes one of {', '.join(ALIKE)} alone, not {method.name!r}; --to onnx takes all")
    if args.to == "hf":
        merge(model)  # what cannot be merged is not helped by another pool
    if args.to in ("hf", "peft") and model.config.pool != "cls_dist":
        pooled = {"mean": "the mean of all tokens", "cls": "[CLS] alone"}[model.config.pool]
        raise UserError(
            f"--to {args.to} needs a model trained with --pool cls_dist: the head of transformers' AST reads LayerNorm("
            f"([CLS] + [distillation]) / 2), this one reads {pooled}, which no weights can express there; "
            "--to merged and --to onnx take any head"
        )
    merged = partial(export_merged, half=args.half)
    write = {"merged": merged, "hf": export_hf, "peft": export_peft, "onnx": export_onnx}[args.to]
    print(f"{args.out}: {write(model, header, args.out)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m tools.export", description="Look at trained parts, and turn them into other formats.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="show|export|import")
    command = commands.add_parser("show", help="print what a file is")
    command.add_argument("file", type=Path, help="a foldK.safetensors that train.py wrote")
    command.set_defaults(run=lambda args: show(args.file))
    command = commands.add_parser("export", help="write a trained model in another format")
    command.add_argument("file", type=Path, help="a foldK.safetensors that train.py wrote")
    command.add_argument("--to", choices=["merged", "hf", "peft", "onnx"], required=True)
    command.add_argument("--out", type=Path, required=True, help="a file (merged, onnx) or folder (hf, peft)")
    command.add_argument("--weights", help="where the backbone is now, if not where the file says")
    command.add_argument("--half", action="store_true", help="merged: store float16, half the size")
    command.set_defaults(run=export)
    command = commands.add_parser("import", help="make a file as train.py writes it from a LoRA that peft trained")
    command.add_argument("folder", type=Path, help="a folder with adapter_config.json")
    command.add_argument("--out", type=Path, required=True, help="the file to write")
    command.add_argument("--weights", help="where the backbone is now, if not where the folder says")
    command.set_defaults(run=lambda args: import_peft(args.folder, args.out, args.weights))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    def run():
        args = parse(argv)
        try:
            args.run(args)
        except OSError as error:
            if isinstance(error, BrokenPipeError) or not hasattr(args, "out"):
                raise
            raise UserError(reason_of(error, args.out, what="cannot write ")) from None

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
