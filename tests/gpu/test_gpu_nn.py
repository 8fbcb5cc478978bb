"""The layers on a GPU: decoding against one pass, a CUDA graph of a step, generation with a compiled static cache."""

import pytest
import torch

from lla_compile.nn import LocalLinearAttention, ParallaxAttention, RotaryEmbedding

LAYERS = [LocalLinearAttention, ParallaxAttention]


def make(layer_class):
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "qk_norm": True, "rotary": RotaryEmbedding(64)}
    layer = layer_class(256, 4, **options, device="cuda", dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return layer, torch.randn(2, 400, 256, device="cuda", dtype=torch.bfloat16)


def relative_error(actual, wanted):
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("layer_class", LAYERS)
@pytest.mark.parametrize("page_size", [None, 64])
@torch.no_grad()
def test_decoding_equals_one_pass(layer_class, page_size):
    layer, x = make(layer_class)
    expected, cache = layer(x), layer.new_cache(2, 512, page_size=page_size)
    out = torch.cat([layer(part, cache=cache) for part in x.split((380, 1, 1, 2, 16), dim=1)], dim=1)
    assert relative_error(out, expected) < 1e-2


@pytest.mark.parametrize("layer_class", LAYERS)
def test_gradients_equal_those_of_the_eager_backend(layer_class):
    layer, x = make(layer_class)
    grad_out = torch.randn_like(x)
    gradients = []
    for backend in (None, "eager"):
        layer.backend = backend
        gradients.append(torch.autograd.grad(layer(x), list(layer.parameters()), grad_out))
    for (name, _), actual, wanted in zip(layer.named_parameters(), *gradients):
        assert relative_error(actual, wanted) < 2e-2, name


@pytest.mark.parametrize("layer_class", LAYERS)
@torch.no_grad()
def test_a_step_in_a_cuda_graph(layer_class):
    layer, x = make(layer_class)
    expected, cache = layer(x), layer.new_cache(2, 512)
    layer(x[:, :396], cache=cache)
    token = x[:, 396:397].clone()
    layer(token, cache=cache)  # compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out = layer(token, cache=cache)
    torch.cuda.current_stream().wait_stream(side)
    for i in (397, 398, 399):
        token.copy_(x[:, i : i + 1])
        graph.replay()
        assert relative_error(out, expected[:, i : i + 1]) < 1e-2


@pytest.mark.parametrize("attention_layer", ["lla", "parallax"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_static_cache(attention_layer, padded):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'lla-compile[transformers]'")
    from lla_compile.integrations.transformers import LocalLinearConfig, LocalLinearForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LocalLinearConfig(
        **sizes, num_attention_heads=4, pad_token_id=0, eos_token_id=None, attention_layer=attention_layer
    )
    model = LocalLinearForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = torch.randint(1, 100, (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :15] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True}
    runs = [
        model.generate(ids, **options, return_dict_in_generate=True, cache_implementation=cache)
        for cache in ("dynamic", "static")  # transformers compiles the second
    ]
    first = [run.logits[1] for run in runs]  # of the first decoded token, before tokens could differ
    assert relative_error(*first) < 2e-2
