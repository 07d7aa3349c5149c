"""model.py against transformers, for every family: logits, loss, gradients, and greedy text with a cache."""

from dataclasses import replace

import pytest
import torch
import transformers

import hf
import model as m
from configurator import UserError

torch.set_num_threads(1)
SHAPES = {
    "plain": dict(num_attention_heads=4, num_key_value_heads=4),
    "grouped": dict(num_attention_heads=4, num_key_value_heads=2),
    "one kv head": dict(num_attention_heads=3, num_key_value_heads=1),
    "wide heads": dict(num_attention_heads=2, num_key_value_heads=1, head_dim=24),
    "tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 64}  # all three ranges of frequency are there at head_dim 12
LINEAR = {"rope_type": "linear", "factor": 4.0}
FAMILIES = {  # transformers' name of the family, and settings of its own
    "llama": ("Llama", {}),
    "llama3 scaling": ("Llama", {"rope_scaling": LLAMA_3}),
    "linear scaling": ("Llama", {"rope_scaling": LINEAR}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "seed_oss": ("SeedOss", {}),
}
ADDED = "seed_oss", m.Family("SeedOssForCausalLM", qkv_bias=True)  # one row is all that a family needs
V, D, L = 98, 48, 3


@pytest.fixture(autouse=True)
def a_family_added_from_outside(monkeypatch):
    monkeypatch.setitem(m.FAMILIES, *ADDED)


def reference_model(family, shape="grouped", seed=0):
    name, own = FAMILIES[family]
    sizes = {"tie_word_embeddings": False, **SHAPES[shape]}
    sizes.setdefault("head_dim", D // sizes["num_attention_heads"])
    own = dict(own)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=80,
        num_hidden_layers=L,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1e3, "rope_type": "default", **own.pop("rope_scaling", {})},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
        **own,
    )
    torch.manual_seed(seed)
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in reference.parameters():  # biases and gains too: at their initial 0 and 1 they would hide errors
            p.add_(0.1 * torch.randn_like(p))
    return reference


def random_model(*sizes, **changes):
    ours = m.Llama(m.LlamaConfig(*(sizes or (V, D, 80, L, 4, 2, 12)), **changes))
    ours.init_weights(0)
    return ours


def tokens(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def greedy(ours, prompt, n):
    """n tokens after the prompt (1, T), with a cache; never the end of the text, token 2."""
    cache, found = m.Cache(ours.config.n_layers), []
    with torch.no_grad():
        for _ in range(n):
            logits = ours(prompt, cache=cache)
            assert logits.shape == (1, 1, V)
            logits[..., 2] = -torch.inf
            prompt = logits.argmax(-1)
            found.append(prompt.item())
    return found


def greedy_in_transformers(theirs, prompt, n):
    return theirs.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_gradients_and_greedy_text_are_those_of_transformers(family, shape, tmp_path):
    reference = reference_model(family, shape)
    reference.save_pretrained(tmp_path)
    ours = hf.load(tmp_path)
    x = tokens(2, 33)
    logits, expected = ours(x[:, :-1]), reference(x[:, :-1]).logits
    assert close(logits, expected)

    loss = ours(x[:, :-1], x[:, 1:]).objective
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), x[:, 1:].flatten())
    assert close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    theirs = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p.grad, theirs[name if name.startswith("lm_head") else f"model.{name}"].grad), name

    assert greedy(ours, x[:1, :9], 24) == greedy_in_transformers(reference, x[:1, :9], 24)


def test_a_context_beyond_the_original_agrees_with_transformers(tmp_path):
    reference = reference_model("llama3 scaling")
    reference.save_pretrained(tmp_path)
    x = tokens(1, 300)
    assert close(hf.load(tmp_path)(x), reference(x).logits)


def test_rope_scaling_of_llama_3_keeps_high_frequencies_and_divides_low_ones():
    config = m.LlamaConfig(V, D, 80, L, 4, 4, 12, rope_theta=1e3)
    plain, scaled = (m.rope_tables(c, 1, 1) for c in (config, replace(config, rope_scaling=LLAMA_3)))
    expected, turn = (torch.atan2(sin, cos)[0] for cos, sin in (plain, scaled))
    assert torch.allclose(turn[0], expected[0])
    assert torch.allclose(turn[-1], expected[-1] / 8)
    assert expected[2] / 8 * 1.01 < turn[2] < expected[2] * 0.99  # on the ramp


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast_runs_every_family(family, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    ours, x = hf.load(tmp_path), tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x[:, :-1], x[:, 1:])
    loss.objective.backward()
    exact = ours(x[:, :-1], x[:, 1:]).cross_entropy
    assert (loss.cross_entropy - exact).abs().mean() < 0.03 * exact.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_teacher_of_another_width_gives_the_gradient_of_the_divergence_to_it(dtype):
    student, teacher, x = random_model(), random_model(V, 24, 40, 1, 2, 2, 12), tokens(2, 13)
    for p in teacher.to(dtype).parameters():
        p.data.mul_(4)  # so that it is sure of something
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        lesson = teacher.teach(x[:, :-1], 0.75)
    known = torch.nn.functional.linear(lesson.hidden.float(), lesson.weight.float())
    loss = student(x[:, :-1], x[:, 1:], teacher=lesson)
    loss.objective.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    q, log_p = known.softmax(-1).detach(), student(x[:, :-1]).log_softmax(-1)
    kl, ce = (q * (q.log() - log_p)).sum(-1), -log_p.gather(-1, x[:, 1:, None])[..., 0]
    (0.25 * ce + 0.75 * kl).mean().backward()
    assert kl.mean() > 0.01
    assert close(loss.kl, kl)
    assert close(loss.cross_entropy, ce)
    assert all(close(ours, p.grad) for ours, p in zip(found, student.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn():
    ours, x = random_model(), tokens(2, 13)
    loss = ours(x[:, :-1], x[:, 1:], teacher=ours.teach(x[:, :-1], 1.0))
    loss.objective.backward()
    assert loss.kl.abs().max() < 1e-6
    assert max(p.grad.abs().max() for p in ours.parameters()) < 1e-7


def test_a_cache_takes_tokens_in_pieces_of_any_length():
    ours, x, cache = random_model(), tokens(2, 20), m.Cache(L)
    with torch.no_grad():
        expected = ours(x)
        for start, end in ((0, 7), (7, 8), (8, 17), (17, 20)):
            logits = ours(x[:, start:end], cache=cache)
            assert torch.allclose(logits[:, 0], expected[:, end - 1], atol=1e-6)
    assert cache.length == 20


def test_sequences_beyond_a_sliding_window_are_refused(tmp_path):
    reference = reference_model("mistral")
    reference.save_pretrained(tmp_path)
    ours, x = hf.load(tmp_path), tokens(1, 64)
    assert close(ours(x), reference(x).logits)
    with pytest.raises(UserError, match="sequences of 65 tokens"):
        ours(tokens(1, 65))
    cache = m.Cache(L)
    ours(x, cache=cache)
    with pytest.raises(UserError, match="sequences of 65 tokens"):
        ours(x[:, :1], cache=cache)
