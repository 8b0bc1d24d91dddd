"""What only a device can show: real sizes, streams, threads of autograd, captured graphs."""

import threading

import numpy as np
import pytest
import torch
from increlora_rs import _core
from increlora_rs.ops import device as cuda
from philox import kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def prepared():
    assert cuda.prepare(torch.cuda.current_device()), _core.cuda_unavailable()


def here():
    return cuda.stream(torch.device("cuda"))


def kept_on_device(mask, elements):
    bits = np.unpackbits(mask.cpu().numpy(), bitorder="little")[:elements]
    return torch.from_numpy(bits).cuda().bool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [768, 3072, 4096, 11008])
@pytest.mark.parametrize("ranks", [8, 16, 64])
def test_layers_of_real_size(dtype, features, ranks):
    tokens = 4097
    x = torch.randn(tokens, features, device="cuda", dtype=dtype)
    a, u = (
        torch.randn(ranks, features, device="cuda").to(dtype),
        torch.randn(tokens, ranks, device="cuda").to(dtype),
    )
    t, mask = _core.cuda_down(x, a, 1.0, 0.1, 5, 0, here())
    keeps = kept_on_device(mask, x.numel()).view(x.shape)
    want = (x.double() * keeps) @ a.double().T
    tolerance = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (t.double() - want).abs().max() < tolerance * want.abs().max()
    gx = x.clone()
    assert _core.cuda_add_grad_x(gx, True, u, a, mask, 1.0, here())
    want = x.double() + (u.double() @ a.double()) * keeps
    assert (gx.double() - want).abs().max() < tolerance * want.abs().max()


def test_a_large_mask_follows_its_description():
    x = torch.empty(3, 100_003, device="cuda")
    mask = _core.cuda_draw_mask(x, 0.1, 11, 2**33, here())
    assert np.array_equal(kept_on_device(mask, x.numel()).cpu().numpy(), kept(x.numel(), 0.1, 11, 2**33))


def test_work_is_queued_on_the_current_stream():
    side = torch.cuda.Stream()
    x = torch.zeros(2048, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.fill_(1.0)
        t, mask = _core.cuda_down(x, torch.ones(1, 4096, device="cuda"), 1.0, 0.5, 3, 0, here())
        assert not side.query(), "the launch waited for the stream"
    side.synchronize()
    # On another stream it would have read x before it was filled.
    assert torch.equal(t.flatten(), kept_on_device(mask, x.numel()).view(x.shape).sum(1).float())


def test_a_thread_without_a_context_can_launch():
    result = []

    def work():
        result.append(_core.cuda_draw_mask(torch.empty(1000, device="cuda"), 0.5, 1, 0, here()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert np.array_equal(kept_on_device(result[0], 1000).cpu().numpy(), kept(1000, 0.5, 1))


def test_a_step_can_be_captured_in_a_graph():
    vectors = [torch.rand(72, dtype=torch.float64, device="cuda") for _ in range(4)]
    a = [torch.randn(8, 768, device="cuda") for _ in range(72)]
    b = [torch.randn(768, 8, device="cuda") for _ in range(72)]
    gradients = [torch.zeros_like(matrix) for matrix in [*a, *b]]
    factor = torch.tensor(1.0, dtype=torch.float64, device="cuda")
    mean = vectors[2].clone()

    def step():
        assert _core.cuda_smooth_(*vectors, 0.85, 0.85, here())
        return _core.cuda_add_orthogonality_gradient_(a, b, gradients[:72], gradients[72:], factor, here())

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    graph.replay()
    torch.cuda.synchronize()
    once = [gradient.clone() for gradient in gradients]
    assert torch.allclose(vectors[2], 0.85 * mean + 0.15 * vectors[0] * vectors[1])
    assert abs(value.item() / _core.orthogonality(a, b).item() - 1.0) < 1e-5
    graph.replay()
    torch.cuda.synchronize()
    for gradient, first in zip(gradients, once, strict=True):
        assert torch.allclose(gradient, 2.0 * first)
