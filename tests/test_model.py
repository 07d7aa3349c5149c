"""model.py and weights.py against transformers: numbers, checkpoints in and out, generation, and every refusal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf
import model as m

SHAPES = {
    "plain": dict(num_attention_heads=4, num_key_value_heads=4),
    "grouped": dict(num_attention_heads=4, num_key_value_heads=2),
    "one kv head": dict(num_attention_heads=3, num_key_value_heads=1),
    "wide heads": dict(num_attention_heads=2, num_key_value_heads=1, head_dim=24),
    "tied": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
}
LLAMA_3 = {  # all three ranges of frequency are there at head_dim 12 and this context
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
FAMILIES = {  # family: transformers' name, settings of its own
    "llama": ("Llama", {}),
    "llama3 scaling": ("Llama", {"rope_scaling": LLAMA_3}),
    "linear scaling": ("Llama", {"rope_scaling": LINEAR}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
}
V, D, L = 98, 48, 3


def reference_model(family, shape="grouped", seed=0, **changes):
    name, own = FAMILIES[family]
    extra = {"tie_word_embeddings": False, **SHAPES[shape]}
    extra.setdefault("head_dim", D // extra["num_attention_heads"])
    rope = {"rope_theta": 1e3, "rope_type": "default", **own.get("rope_scaling", {})}
    own = {k: v for k, v in own.items() if k != "rope_scaling"}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=80,
        num_hidden_layers=L,
        rms_norm_eps=1e-6,
        rope_parameters=rope,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **extra,
        **own,
        **changes,
    )
    torch.manual_seed(seed)
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in reference.parameters():  # biases and gains too: at their initial 0 and 1 they would hide errors
            p.add_(0.1 * torch.randn_like(p))
    return reference


def tokens(*shape, seed=1):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs):
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def hugging_face_name(name):
    return name if name.startswith("lm_head") else f"model.{name}"


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- the same numbers as transformers


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(family, shape, tmp_path):
    reference = reference_model(family, shape)
    reference.save_pretrained(tmp_path)
    ours = m.load(tmp_path)
    x = tokens(2, 33)
    logits, expected = ours(x[:, :-1]), reference(x[:, :-1]).logits
    assert close(logits, expected)

    loss = ours(x[:, :-1], x[:, 1:]).mean()
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), x[:, 1:].flatten())
    assert close(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    theirs = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        assert close(p.grad, theirs[hugging_face_name(name)].grad), name


def test_rope_scaling_of_llama_3_keeps_high_frequencies_and_divides_low_ones():
    config = m.LlamaConfig(V, D, 80, L, 4, 4, 12, rope_theta=1e3, rope_scaling=LLAMA_3)
    plain = m.rope_tables(m.LlamaConfig(V, D, 80, L, 4, 4, 12, rope_theta=1e3), 1, 1)
    scaled = m.rope_tables(config, 1, 1)
    turn, expected = (torch.atan2(sin, cos)[0] for cos, sin in (scaled, plain))
    assert torch.allclose(turn[0], expected[0])
    assert torch.allclose(turn[-1], expected[-1] / 8)
    assert expected[2] / 8 * 1.01 < turn[2] < expected[2] * 0.99  # on the ramp


def test_a_long_context_agrees_with_transformers(tmp_path):
    reference = reference_model("llama3 scaling")
    reference.save_pretrained(tmp_path)
    x = tokens(1, 300)
    assert close(m.load(tmp_path)(x), reference(x).logits)


def test_bfloat16_autocast_runs_every_family(tmp_path):
    for family in FAMILIES:
        reference_model(family).save_pretrained(tmp_path / family)
        ours = m.load(tmp_path / family)
        x = tokens(2, 20)
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours(x[:, :-1], x[:, 1:])
        loss.mean().backward()
        exact = ours(x[:, :-1], x[:, 1:])
        assert (loss - exact).abs().mean() < 0.03 * exact.mean(), family


def test_the_loss_is_per_token():
    ours = m.Llama(m.LlamaConfig(61, 32, 40, 2, 4, 2, 8))
    ours.init_weights(3)
    x = torch.arange(26).view(2, 13)
    loss = ours(x[:, :-1], x[:, 1:])
    log_p = ours(x[:, :-1]).log_softmax(-1)
    assert loss.shape == (2, 12)
    assert torch.allclose(loss, -log_p.gather(-1, x[:, 1:, None])[..., 0], atol=1e-6)


# ---- generation


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_with_a_cache_is_that_of_transformers(family, shape, tmp_path):
    reference = reference_model(family, shape)
    reference.save_pretrained(tmp_path)
    prompt, n = tokens(1, 9), 24
    expected = reference.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)[0, 9:]

    ours, cache, x, found = m.load(tmp_path), m.Cache(L), prompt, []
    with torch.no_grad():
        for _ in range(n):
            logits = ours(x, cache=cache)
            assert logits.shape == (1, 1, V)
            logits[..., 2] = -torch.inf  # the end of text, which min_new_tokens forbids
            x = logits.argmax(-1)
            found.append(x.item())
    assert found == expected.tolist()
    assert cache.length == 9 + n - 1


def test_a_cache_takes_tokens_in_pieces_of_any_length():
    ours = m.Llama(m.LlamaConfig(V, D, 80, L, 4, 2, 12))
    ours.init_weights(0)
    x, cache = tokens(2, 20), m.Cache(L)
    with torch.no_grad():
        expected = ours(x)
        for start, end in ((0, 7), (7, 8), (8, 17), (17, 20)):
            logits = ours(x[:, start:end], cache=cache)
            assert torch.allclose(logits[:, 0], expected[:, end - 1], atol=1e-6)


# ---- out and in again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_comes_back_bit_by_bit_in_the_dtype_it_had(family, tied, dtype, tmp_path):
    reference = reference_model(family, "tied" if tied else "grouped").to(dtype)
    reference.save_pretrained(tmp_path / "theirs")
    ours = m.load(tmp_path / "theirs")
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    ours.save(tmp_path / "ours", dtype)
    assert m.read_config(tmp_path / "ours") == ours.config
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs) is type(reference)
    assert theirs.dtype == dtype
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    carried = (*ids, "rope_parameters", "max_position_embeddings", "tie_word_embeddings", "head_dim", "rms_norm_eps")
    carried += ("sliding_window",) if "mistral" in family else ()
    for name in carried:
        assert getattr(theirs.config, name) == getattr(reference.config, name), name
    x, again = tokens(2, 12), AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(theirs(x).logits, again(x).logits)


def old_style(folder):
    """config.json in the words of transformers 4: rope_theta and rope_scaling apart."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_transformers_4_and_5_mean_the_same(family, tmp_path):
    reference_model(family).save_pretrained(tmp_path)
    new = m.read_config(tmp_path)
    old_style(tmp_path)
    assert m.read_config(tmp_path) == new
    assert new.rope_theta == 1e3


def test_the_oldest_word_for_the_type_of_scaling_is_understood(tmp_path):
    reference_model("linear scaling").save_pretrained(tmp_path)
    old_style(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert m.read_config(tmp_path).rope_scaling == LINEAR


def test_a_written_model_can_be_read_by_whoever_can_read_its_config(tmp_path):
    m.Llama(m.LlamaConfig(61, 32, 40, 1, 4, 2, 8)).save(tmp_path)
    modes = {name: (tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert modes["config.json"] == modes["model.safetensors"]


def test_large_models_are_written_in_shards_that_transformers_and_we_read(tmp_path):
    reference = reference_model("qwen3")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    ours = m.load(tmp_path / "theirs")
    limit = 60_000
    hf.write(tmp_path / "ours", m.to_hugging_face(ours.config), ours.named_parameters(), shard_bytes=limit)
    index = json.loads((tmp_path / "ours" / hf.INDEX).read_text())
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * ours.n_parameters()
    for file in files:
        held = load_file(file)
        assert sum(t.nbytes for t in held.values()) <= limit
        assert all(index["weight_map"][key] == file.name for key in held)
    assert same_parameters(m.load(tmp_path / "ours"), ours)
    x = tokens(1, 12)
    assert close(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(x).logits, ours(x))


def test_only_the_files_of_the_index_are_read(tmp_path):
    reference_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    expected = m.load(tmp_path)
    save_file({"something.else": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert same_parameters(m.load(tmp_path), expected)


def test_saving_again_leaves_no_file_of_the_save_before(tmp_path):
    ours = m.Llama(m.LlamaConfig(V, D, 80, L, 4, 2, 12))
    config, several = m.to_hugging_face(ours.config), 60_000
    for seed, limit in ((0, several), (1, 10**9), (2, several)):
        ours.init_weights(seed)
        hf.write(tmp_path, config, ours.named_parameters(), shard_bytes=limit)
        assert (tmp_path / "model.safetensors").exists() == (limit != several)
        assert (tmp_path / hf.INDEX).exists() == (limit == several)
        assert not list(tmp_path.glob("*.tmp"))
        assert same_parameters(m.load(tmp_path), ours)
        assert close(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens(1, 5)).logits, ours(tokens(1, 5)))


def test_tensors_come_in_the_order_of_the_model_whatever_that_of_the_files(tmp_path):
    reference_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    config = m.read_config(tmp_path)
    names = [name for name, _ in m.tensors_of(tmp_path, config)]
    assert names == [name for name, _ in m.Llama(config).named_parameters()]


PEAK = """
import re, sys
from pathlib import Path
import model

def bytes_of(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

model.load(sys.argv[1])  # torch imports parts of itself on first use
before = bytes_of("VmRSS")
ours = model.load(sys.argv[2])
print(bytes_of("VmHWM") - before, 4 * ours.n_parameters())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize("form", ["Hugging Face", "Meta"])
def test_loading_holds_the_model_once(form, tmp_path):
    for name, config in (
        ("small", m.LlamaConfig(V, D, 80, L, 4, 2, 12)),
        ("large", m.LlamaConfig(2000, 512, 2048, 4, 8, 8, 64)),
    ):
        ours = m.Llama(config)
        ours.init_weights(0)
        (tmp_path / name).mkdir()
        if form == "Meta":
            write_meta(tmp_path / name, ours, dtype=torch.float32)
        else:
            ours.save(tmp_path / name)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    out = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    peak, size = map(int, out.split())
    files = size if form == "Meta" else 0  # mapped and clean: the system takes those pages back when it needs them
    assert 0.9 * size < peak < 1.3 * size + files


# ---- Meta's format


def write_meta(folder, ours, parts=1, vocabulary_axis=0, dtype=torch.bfloat16, **params):
    """ours as Meta would write it: rows of q and k in pairs, matrices cut among `parts` as its parallel layers are."""
    c = ours.config
    by_rows = ("wq", "wk", "wv", "w1", "w3", "output")
    names = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    cut = [{} for _ in range(parts)]
    for name, p in ours.named_parameters():
        w, key = p.detach().to(dtype), name
        for our, meta in names.items():
            key = key.replace(our, meta)
        if "q_proj" in name or "k_proj" in name:  # row c of a head, paired with c + K/2, becomes row 2c
            order = torch.arange(c.head_dim).view(2, -1).T.flatten()
            w = w.view(-1, c.head_dim, c.hidden_size)[:, order].reshape(w.shape)
        axis = vocabulary_axis if "tok_embeddings" in key else 0 if key.split(".")[-2] in by_rows else 1
        pieces = [w] * parts if w.dim() == 1 else w.chunk(parts, dim=axis)
        for held, piece in zip(cut, pieces, strict=True):
            held[key] = piece.clone()
    cut[0]["rope.freqs"] = torch.zeros(3)
    for i, held in enumerate(cut):
        torch.save(held, folder / f"consolidated.{i:02d}.pth")
    sizes = {"dim": c.hidden_size, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads}
    sizes |= {"vocab_size": -1, "multiple_of": 256, "norm_eps": c.norm_eps, "rope_theta": c.rope_theta}
    (folder / "params.json").write_text(json.dumps(sizes | params))


@pytest.mark.parametrize(
    ("parts", "vocabulary_axis", "tied"),  # Llama 2 cuts its embedding by columns, Llama 3 by rows
    [(1, 0, False), (2, 1, False), (2, 0, False), (1, 0, True), (2, 0, True)],
)
def test_a_model_in_meta_s_format_is_the_model_in_hugging_face_s(parts, vocabulary_axis, tied, tmp_path):
    reference = reference_model("llama", "tied" if tied else "grouped").bfloat16()
    reference.save_pretrained(tmp_path)
    expected = m.load(tmp_path)
    (tmp_path / "meta").mkdir()
    write_meta(tmp_path / "meta", expected, parts, vocabulary_axis)
    ours = m.load(tmp_path / "meta")
    assert ours.config.tied_embeddings == tied
    assert same_parameters(ours, expected)
    x = tokens(1, 12)
    assert torch.equal(ours(x), expected(x))
    assert close(ours(x), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(x).logits)


@pytest.mark.parametrize(("tied", "factor"), [(False, 8.0), (True, 32.0)])
def test_rope_scaling_in_meta_s_format_is_that_of_its_family(tied, factor, tmp_path):
    ours = m.Llama(m.LlamaConfig(V, D, 80, L, 4, 2, 12, 5e5, tied_embeddings=tied))
    ours.init_weights(0)
    write_meta(tmp_path, ours, use_scaled_rope=True)
    config = m.read_config(tmp_path)
    assert config.rope_scaling == LLAMA_3 | {"factor": factor, "original_max_position_embeddings": 8192}
    assert (config.bos_token_id, config.eos_token_id, config.max_position_embeddings) == (128_000, 128_001, 131_072)


def test_an_output_matrix_that_repeats_the_embedding_is_tied(tmp_path):
    ours = m.Llama(m.LlamaConfig(V, D, 80, L, 4, 2, 12))
    ours.init_weights(0)
    ours.lm_head.weight.data.copy_(ours.embed_tokens.weight)
    write_meta(tmp_path, ours)
    assert m.load(tmp_path).config.tied_embeddings


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling llama3: high_freq_factor = None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "type 'yarn' is not supported; linear and llama3 are"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": LINEAR | {"factor": 0}}, "linear: factor = 0: must be a positive number"),
        ({"rope_scaling": LINEAR | {"mscale": 2.0}}, "mscale = 2.0 is not supported"),
        ({"rope_scaling": LLAMA_3 | {"low_freq_factor": 4.0}}, "low_freq_factor must be below"),
        ({"partial_rotary_factor": 0.5}, "RoPE on a part of a head"),
        ({"attention_bias": True}, "biases in the output"),
        ({"mlp_bias": True}, "biases in the FFN"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"use_sliding_window": True}, "see only the last tokens"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
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
    with pytest.raises(m.UserError, match=message):
        m.load(tmp_path)


def test_sequences_beyond_a_sliding_window_are_refused_with_the_reason(tmp_path):
    reference = reference_model("mistral")
    reference.save_pretrained(tmp_path)
    ours = m.load(tmp_path)
    x = tokens(1, 64)
    assert close(ours(x), reference(x).logits)
    ours.config.check_length(64)
    reason = "65 tokens: in this model a token sees the last 64 only"
    with pytest.raises(m.UserError, match=reason):
        ours.config.check_length(65)
    with pytest.raises(m.UserError, match=reason):
        ours(tokens(1, 65))
    cache = m.Cache(L)
    ours(x, cache=cache)
    with pytest.raises(m.UserError, match=reason):
        ours(x[:, :1], cache=cache)


def test_a_mistral_whose_config_is_silent_has_the_window_that_transformers_gives_it(tmp_path):
    reference_model("mistral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert m.read_config(tmp_path).sliding_window == theirs.sliding_window == 4096


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def without(name):
    def change(file):
        held = load_file(file)
        del held[name]
        save_file(held, file)

    return change


def with_tensor(name, tensor):
    return lambda file: save_file(load_file(file) | {name: tensor}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(b"\xff" * 100), "not a readable safetensors file"),
        (cut_short, "not a readable safetensors file"),
        (lambda file: file.unlink(), "no .*safetensors file"),
        (without("model.norm.weight"), "1 tensors are missing, norm.weight among them"),
        (with_tensor("model.extra", torch.zeros(2)), "model.safetensors: unexpected tensor model.extra"),
        (with_tensor("model.norm.weight", torch.zeros(31)), r"norm.weight has shape \(31,\), .* makes it \(32,\)"),
        (with_tensor("model.norm.weight", torch.zeros(32, dtype=torch.int8)), "norm.weight is I8: expected float32"),
        (lambda file: save_file(load_file(file), file.with_name("b.safetensors")), "model.* is in .*b.saf"),
        (lambda file: file.with_name("config.json").write_text("[]"), "expected a JSON object"),
        (lambda file: file.with_name("config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda file: file.with_name("config.json").write_text("{}"), "not a model's config"),
        (lambda file: file.with_name("config.json").unlink(), "not found: a model is a folder in Hugging Face format"),
        (lambda file: file.with_name(hf.INDEX).write_text("{}"), "has no weight_map"),
        (
            lambda file: file.with_name(hf.INDEX).write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "names b.safetensors, which is not a file in this folder",
        ),
        (
            lambda file: file.with_name(hf.INDEX).write_text('{"weight_map": {"a": "../m/model.safetensors"}}'),
            "names ../m/model.safetensors, which is not a file in this folder",
        ),
    ],
)
def test_a_broken_folder_is_refused_by_the_name_of_the_file_or_tensor(change, message, tmp_path):
    m.Llama(m.LlamaConfig(61, 32, 40, 1, 4, 2, 8)).save(tmp_path / "m")
    change(tmp_path / "m" / "model.safetensors")
    with pytest.raises(m.UserError, match=message):
        m.load(tmp_path / "m")


def edit_part(change):
    def edit(folder):
        part = torch.load(folder / "consolidated.01.pth", weights_only=True)
        change(part)
        torch.save(part, folder / "consolidated.01.pth")

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "consolidated.01.pth").write_bytes(b"no"), "01.pth: not a readable file of weights"),
        (lambda folder: torch.save([1], folder / "consolidated.01.pth"), "01.pth: expected a dict of tensors"),
        (lambda folder: (folder / "consolidated.00.pth").unlink(), "expected consolidated.00.pth and on without a gap"),
        (lambda folder: (folder / "consolidated.01.pth").unlink(), "has shape"),
        (edit_part(lambda part: part.pop("norm.weight")), "norm.weight is not in both"),
        (edit_part(lambda part: part.update({"norm.weight": torch.ones(3)})), r"01.pth: norm.weight has shape \(3,\)"),
        (lambda folder: (folder / "params.json").write_text('{"dim": 8, "moe": {}}'), "moe is not supported"),
        (lambda folder: (folder / "params.json").write_text('{"dim": -8}'), "dim = -8: expected a positive number"),
    ],
)
def test_a_broken_folder_in_meta_s_format_is_refused(change, message, tmp_path):
    ours = m.Llama(m.LlamaConfig(V, D, 80, L, 4, 2, 12))
    ours.init_weights(0)
    write_meta(tmp_path, ours, parts=2)
    change(tmp_path)
    with pytest.raises(m.UserError, match=message):
        m.load(tmp_path)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was run",)

    ours = m.Llama(m.LlamaConfig(V, D, 80, L, 4, 2, 12))
    write_meta(tmp_path, ours)
    torch.save({"norm.weight": Touch()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(m.UserError, match="not a readable file of weights"):
        m.load(tmp_path)
    assert not (tmp_path / "was run").exists()


def test_a_family_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no family of models has both"):
        m.LlamaConfig(V, D, 80, L, 4, 2, 12, family="qwen2", family="qwen3")
