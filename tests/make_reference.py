"""Write the reference outputs in tests/reference/ with the reference libraries themselves.

    python tests/make_reference.py        # needs requirements-dev.txt

ast_small/          an AST of 2 layers, 64 dimensions and 2 heads with random weights, as
transformers saves it ast_small.npz       its input, final tokens, logits and gradients, and the
extractor's features of the noise clip fbank_torchaudio.npz is not written here: it holds waveforms
and what torchaudio 2.11 returned for each
    (torchaudio.compliance.kaldi.fbank(wav[None], sample_frequency=16000, window_type="hanning",
    num_mel_bins=128))
"""

from pathlib import Path

import numpy as np
import torch
import transformers

REFERENCE = Path(__file__).parent / "reference"


def random_hf_ast(**config) -> transformers.ASTForAudioClassification:
    """A transformers AST in which every parameter is random: the library starts positions and
    tokens at zero.
    """
    torch.manual_seed(0)
    model = transformers.ASTForAudioClassification(transformers.ASTConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (
                0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1
            )
            parameter.copy_(1 + noise if "layernorm" in name and name.endswith("weight") else noise)
    return model.eval()


def outputs_and_gradients(
    model, fbank: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Final tokens, logits, and the gradient of the cross-entropy for every parameter, by
    transformers.
    """
    encoded = []
    encoder = model.audio_spectrogram_transformer
    hook = encoder.register_forward_hook(lambda encoder, inputs, output: encoded.append(output))
    model.zero_grad()
    output = model(input_values=fbank, labels=labels)
    hook.remove()
    output.loss.backward()
    gradients = {f"gradient {name}": parameter.grad for name, parameter in model.named_parameters()}
    tokens = encoded[0].last_hidden_state
    return {"tokens": tokens.detach(), "logits": output.logits.detach(), **gradients}


def main() -> None:
    model = random_hf_ast(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_length=100,
        num_labels=5,
    )
    model.save_pretrained(REFERENCE / "ast_small")
    torch.manual_seed(1)
    fbank, labels = torch.randn(2, 100, 128), torch.tensor([1, 4])
    noise = np.load(REFERENCE / "fbank_torchaudio.npz")["wav_noise_2s"]
    extractor = transformers.ASTFeatureExtractor(max_length=256)
    extracted = extractor(noise, sampling_rate=16_000, return_tensors="np").input_values[0]
    np.savez_compressed(
        REFERENCE / "ast_small.npz",
        transformers=transformers.__version__,
        fbank=fbank,
        labels=labels,
        extracted_noise=extracted,
        **outputs_and_gradients(model, fbank, labels),
    )


if __name__ == "__main__":
    main()
