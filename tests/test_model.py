"""model.py against transformers, and its checkpoints."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM
from transformers import LlamaConfig as HFLlamaConfig
from transformers import Qwen2Config as HFQwen2Config

import model as m

SHAPES = {
    "plain": dict(num_attention_heads=4, num_key_value_heads=4),
    "grouped": dict(num_attention_heads=4, num_key_value_heads=2),
    "one kv head": dict(num_attention_heads=3, num_key_value_heads=1),
    "wide heads": dict(num_attention_heads=2, num_key_value_heads=1, head_dim=24),
    "tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
}
FAMILIES = {"llama": (HFLlamaConfig, LlamaForCausalLM), "qwen2": (HFQwen2Config, Qwen2ForCausalLM)}


def reference_model(family, shape, seed=0):
    config_class, model_class = FAMILIES[family]
    extra = {"rope_theta": 5e4, "tie_word_embeddings": False, **SHAPES[shape]}
    if "head_dim" not in extra:
        extra["head_dim"] = 48 // extra["num_attention_heads"]
    config = config_class(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, rms_norm_eps=1e-6, **extra
    )
    torch.manual_seed(seed)
    reference = model_class(config)
    with torch.no_grad():
        for p in reference.parameters():  # biases and gains too: at their initial 0 and 1 they would hide errors
            p.add_(0.1 * torch.randn_like(p))
    return reference


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family, shape, tmp_path):
    reference = reference_model(family, shape)
    reference.save_pretrained(tmp_path)
    ours = m.load(tmp_path)
    tokens = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(1))
    logits = ours(tokens[:, :-1])
    expected = reference(tokens[:, :-1]).logits
    assert close(logits, expected)

    ours(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        grad = theirs[name if name.startswith("lm_head") else f"model.{name}"].grad
        assert close(p.grad, grad), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_loads_in_transformers_with_the_same_logits(family, tied, tmp_path):
    config = m.LlamaConfig(61, 32, 40, 2, 4, 2, 8, 5e5, 1e-6, qkv_bias=family == "qwen2", tied_embeddings=tied)
    ours = m.Llama(config)
    ours.init_weights(3)
    ours.save(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs) is FAMILIES[family][1]
    tokens = torch.arange(24).view(2, 12)
    assert close(ours(tokens), theirs(tokens).logits)
    again = m.load(tmp_path)
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_the_loss_is_per_token():
    config = m.LlamaConfig(61, 32, 40, 2, 4, 2, 8)
    ours = m.Llama(config)
    ours.init_weights(3)
    tokens = torch.arange(26).view(2, 13)
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    log_p = ours(tokens[:, :-1]).log_softmax(-1)
    assert loss.shape == (2, 12)
    assert torch.allclose(loss, -log_p.gather(-1, tokens[:, 1:, None])[..., 0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling"),
        ({"attention_bias": True}, "biases in the output"),
        ({"hidden_size": 40}, "config.json makes it"),
        ({"num_hidden_layers": 3}, "tensors are missing"),
        ({"num_hidden_layers": 1}, "unexpected tensor"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "must be even"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": 32.0}, "hidden_size = 32.0: must be a whole number"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0: must be positive"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": [1]}, "expected an object"),
    ],
)
def test_a_checkpoint_that_cannot_run_is_refused_by_name(change, message, tmp_path):
    ours = m.Llama(m.LlamaConfig(61, 32, 40, 2, 4, 2, 8))
    ours.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(m.CheckpointError, match=message):
        m.load(tmp_path)


def test_a_broken_safetensors_file_is_refused(tmp_path):
    m.Llama(m.LlamaConfig(61, 32, 40, 1, 4, 2, 8)).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(m.CheckpointError, match="not a readable safetensors file"):
        m.load(tmp_path)
