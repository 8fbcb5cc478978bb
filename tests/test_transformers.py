"""Local Linear Attention in transformers models: masks, caches, generation, checkpoints."""

import doctest
import importlib

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'lla-compile[transformers]'")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from lla_compile.integrations.transformers import (  # noqa: E402
    LocalLinearConfig,
    LocalLinearForCausalLM,
    lla_attention_forward,
    lla_mask,
    register_attention,
)
from lla_compile.nn import LocalLinearAttention, ParallaxAttention, from_softmax_attention  # noqa: E402

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["interface", "lla", "parallax"])
def model(request):
    """A small causal model with Local Linear Attention of a ridge that matters."""
    if request.param == "interface":
        register_attention(ridge=0.3)
        model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="lla")
    else:
        model = LocalLinearForCausalLM(LocalLinearConfig(**SIZES, attention_layer=request.param, qk_norm=True))
        for name, parameter in model.named_parameters():
            if "r_proj" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tokens(*shape):
    return torch.randint(1, SIZES["vocab_size"], shape)


def close(actual, expected, limit=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(
    "config, model_class, options",
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    ],
    ids=["llama", "qwen3", "mistral"],
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_large_ridge_gives_the_softmax_model(config, model_class, options, padding):
    register_attention(ridge=1e7)
    model = model_class._from_config(config(**SIZES, **options), attn_implementation="sdpa").eval()
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    if padding == "left":
        mask[0, :6] = mask[2, :19] = 0
    elif padding == "right":
        mask[0, 14:] = mask[2, 1:] = 0
    arguments = {"input_ids": ids, "attention_mask": None if padding == "none" else mask}
    expected = model(**arguments).logits
    model.set_attn_implementation("lla")
    close(model(**arguments).logits[mask.bool()], expected[mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("steps", [(20, 1, 1, 16, 17), (3, 20, 2)], ids=str)
def test_cached_steps_equal_one_pass(model, cache, steps):
    ids = tokens(2, sum(steps))
    expected = model(ids).logits
    cache = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=64)
    done = 0
    for count in steps:
        logits = model(ids[:, done : done + count], past_key_values=cache).logits
        close(logits, expected[:, done : done + count])
        done += count


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_padded_on_the_left_generate_what_they_would_alone(model, cache):
    prompts = [tokens(1, length) for length in (11, 4, 19)]
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    ids = torch.cat([torch.nn.functional.pad(prompt, (19 - prompt.shape[1], 0)) for prompt in prompts])
    together = model.generate(ids, attention_mask=(ids > 0).long(), **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert together.sequences[row, 19:].equal(alone.sequences[0, prompt.shape[1] :])
        for step, expected in zip(together.scores, alone.scores):
            close(step[row], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_long_piece_of_a_padded_prompt_after_another(model, cache):
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :25] = 0  # more than the first piece
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    cache = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=64)
    for part in (slice(0, 20), slice(20, 40)):
        seen = mask[:, : part.stop]
        given = {"attention_mask": seen, "position_ids": positions[:, part], "past_key_values": cache}
        logits = model(ids[:, part], **given).logits
        close(logits[mask[:, part].bool()], expected[:, part][mask[:, part].bool()])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_sliding_window_in_a_cache(cache):
    register_attention(ridge=0.3)
    config = MistralConfig(**SIZES, sliding_window=6)
    model = MistralForCausalLM._from_config(config, attn_implementation="lla").eval()
    ids = tokens(2, 30)
    expected = model(ids).logits
    cache = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config, max_cache_len=64)
    for part in (slice(0, 9), *(slice(i, i + 1) for i in range(9, 30))):
        close(model(ids[:, part], past_key_values=cache).logits, expected[:, part])


@pytest.mark.parametrize("given", ["cu_seq_lens", "position_ids", "both"])
def test_packed_sequences(model, given):
    ids, lengths = tokens(1, 22), (9, 1, 12)
    ends = torch.tensor([0, 9, 10, 22])
    arguments = {"position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}
    if given != "position_ids":
        arguments |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    logits = model(ids, use_cache=False, **arguments).logits
    if given == "cu_seq_lens":
        logits = model(ids, use_cache=False, **arguments, attention_mask=torch.ones_like(ids)).logits
    expected = [model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    close(logits, torch.cat(expected, dim=1))


def test_packed_rows_of_a_batch(model):
    ids = tokens(2, 12)
    positions = torch.stack((torch.arange(12), torch.cat((torch.arange(5), torch.arange(7)))))
    logits = model(ids, position_ids=positions, use_cache=False).logits
    close(logits[:1], model(ids[:1]).logits)
    close(logits[1:, 5:], model(ids[1:, 5:]).logits)


def test_padding_takes_no_part_in_training(model):
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(positions == 0, -100)  # nor does the first token, which padding would predict

    def gradients(ids):
        model.zero_grad()
        model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.model.layers.parameters()]

    first, second = gradients(ids), gradients(ids.masked_fill(mask == 0, 7))
    assert all(x.isfinite().all() and x.norm() > 0 for x in first)
    for x, y in zip(first, second):
        close(x, y)


def test_a_step_of_training_lowers_the_loss(model):
    model.train()
    ids = tokens(4, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("layer", ["lla", "parallax"])
def test_a_static_cache_is_compiled_in_one_graph(layer):
    model = LocalLinearForCausalLM(LocalLinearConfig(**SIZES, attention_layer=layer)).eval()
    ids = tokens(2, 12)
    expected = model(ids).logits
    cache = StaticCache(model.config, max_cache_len=32)
    model(ids[:, :10], past_key_values=cache)
    step = torch.compile(model, fullgraph=True, backend="eager")
    for i in (10, 11):
        masks = lla_mask(2, 1, 32, torch.tensor(i))  # as generate makes it, outside
        positions = torch.full((1, 1), i)
        logits = step(ids[:, i : i + 1], attention_mask=masks, position_ids=positions, past_key_values=cache).logits
        close(logits, expected[:, i : i + 1])


@torch.no_grad()
def test_checkpoints(model, tmp_path):
    ids = tokens(1, 9)
    model.save_pretrained(tmp_path)
    implementation = {} if isinstance(model, LocalLinearForCausalLM) else {"attn_implementation": "lla"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **implementation).eval()
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    close(again(ids).logits, model(ids).logits, 0)


@torch.no_grad()
@pytest.mark.parametrize(
    "options, new",
    [
        ({"attention_layer": "lla", "ridge": "head", "initial_ridge": 1e6}, "ridge.log_ridge"),
        ({"attention_layer": "parallax"}, "r_proj.weight"),
    ],
    ids=["lla", "parallax"],
)
def test_a_llama_checkpoint_goes_on_as_it_was(options, new, tmp_path):
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    llama.save_pretrained(tmp_path)
    config = LocalLinearConfig(**SIZES, **options)
    model, report = LocalLinearForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert {key.split("self_attn.")[1] for key in report["missing_keys"]} == {new}
    ids = tokens(2, 15)
    close(model.eval()(ids).logits, llama(ids).logits)


@pytest.mark.parametrize(
    "model_class, config",
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True)),
        (
            LlamaForCausalLM,
            LlamaConfig(
                **SIZES,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 100.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            ),
        ),
        (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=5)),
    ],
    ids=["llama with biases", "scaled frequencies", "norms", "window"],
)
@pytest.mark.parametrize("layer, limit", [(LocalLinearAttention, 2e-5), (ParallaxAttention, 1e-6)])
@torch.no_grad()
def test_conversion_of_an_attention(model_class, config, layer, limit):
    model = model_class(config).eval()
    attention, seen = model.model.layers[1].self_attn, {}
    for norm in ("q_norm", "k_norm"):
        if hasattr(attention, norm):
            getattr(attention, norm).weight.uniform_(0.5, 2)

    def keep(_, args, kwargs, output):
        seen.update(x=kwargs["hidden_states"], output=output[0])

    attention.register_forward_hook(keep, with_kwargs=True)
    model(tokens(2, 30))
    close(from_softmax_attention(attention, layer)(seen["x"]), seen["output"], limit)


def test_what_cannot_be_converted():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=dynamic))
    with pytest.raises(ValueError, match="'dynamic' depend on the length: give rotary"):
        from_softmax_attention(model.model.layers[0].self_attn)
    attention = LlamaForCausalLM(LlamaConfig(**SIZES)).model.layers[0].self_attn
    attention.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="LlamaAttention has sinks"):
        from_softmax_attention(attention)
    attention.sinks, attention.q_norm = None, torch.nn.LayerNorm(8)
    with pytest.raises(ValueError, match="must be a RMSNorm of the head_dim 8"):
        from_softmax_attention(attention)


def test_errors():
    register_attention()
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="lla")
    ids, mask = tokens(1, 8), torch.ones(1, 8, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="one run of ones"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="pad on the left"):
        padded = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
        model(ids, attention_mask=padded, past_key_values=StaticCache(model.config, max_cache_len=16))
    with pytest.raises(NotImplementedError, match="set attention_dropout=0; got 0.5"):
        config = LlamaConfig(**SIZES, attention_dropout=0.5)
        LlamaForCausalLM._from_config(config, attn_implementation="lla").train()(ids)
    with pytest.raises(NotImplementedError, match="lla attention takes causal masks only"):
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel._from_config(BertConfig(vocab_size=50, **small), attn_implementation="lla")(ids)
    with pytest.raises(NotImplementedError, match="lla attention is for causal models, Linear is not"):
        lla_attention_forward(torch.nn.Linear(1, 1), *torch.randn(3, 1, 2, 4, 8), None, is_causal=False)
    with pytest.raises(NotImplementedError, match="lla attention has no softcap, which Linear gives"):
        lla_attention_forward(torch.nn.Linear(1, 1), *torch.randn(3, 1, 2, 4, 8), None, softcap=30.0)
    with pytest.raises(NotImplementedError, match="none of a model's own"):
        lla_mask(1, 4, 4, use_vmap=True)
    with pytest.raises(ValueError, match="attention_layer must be one of"):
        LocalLinearForCausalLM(LocalLinearConfig(**SIZES, attention_layer="mean"))


@pytest.mark.parametrize("name", ["interface", "modeling"])
def test_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"lla_compile.integrations.transformers.{name}"))
    assert results.attempted and not results.failed
