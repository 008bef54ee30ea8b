"""Memory that freed tensors leave behind: who gets it next, how much is kept, and that nobody shares it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

import weft
from weft.runtime import memory
from weft.runtime.memory import LEAST, PAGE, Pool, allocate

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    weft.release_memory()
    yield
    weft.release_memory()


def pool(limit: int = 64 * MIB) -> Pool:
    return Pool(limit)


def test_a_tensor_has_what_the_last_one_left() -> None:
    kept = pool()
    first = kept.tensor((8, MIB // 4), torch.float32)
    place = first.data_ptr()
    first.fill_(3.0)
    view = first[2:4]
    del first
    assert kept.kept == 0, "a view still has it"
    assert view.eq(3.0).all()
    del view
    assert kept.kept == 8 * MIB
    second = kept.tensor((4, MIB), torch.bfloat16)
    assert second.data_ptr() == place and kept.kept == 0


def test_tensors_that_live_together_share_nothing() -> None:
    kept = pool()
    alive = []
    for n in range(40):
        tensor = kept.tensor((2 + n % 3, MIB // 4), torch.float32).fill_(n)
        alive.append(tensor)
        if n % 4 == 3:
            del alive[n % 5]
    for tensor in alive:
        assert tensor.eq(tensor[0, 0]).all()
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in alive)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_memory_begins_at_a_large_page() -> None:
    assert pool().tensor((5, MIB), torch.uint8).data_ptr() % PAGE == 0


def test_much_larger_memory_is_not_taken() -> None:
    kept = pool()
    kept.tensor((32 * MIB,), torch.uint8)
    assert kept.kept == 32 * MIB
    small = kept.tensor((8 * MIB,), torch.uint8)
    assert kept.kept == 32 * MIB and small.nbytes == 8 * MIB
    kept.tensor((28 * MIB,), torch.uint8)
    assert kept.kept == 32 * MIB, "up to a quarter more is taken, and given back"


def test_no_more_is_kept_than_the_limit() -> None:
    kept = pool(16 * MIB)
    tensors = [kept.tensor((6 * MIB,), torch.uint8) for _ in range(4)]
    tensors.clear()
    assert kept.kept == 12 * MIB
    kept.tensor((40 * MIB,), torch.uint8)
    assert kept.kept == 0, "what nobody asks for any more makes room, and what is above the limit is not kept"


def test_release_leaves_it_to_the_system() -> None:
    assert memory._pool.kept == 0
    allocate((LEAST,), torch.uint8, CPU)
    assert memory._pool.kept == LEAST
    weft.release_memory()
    assert memory._pool.kept == 0


def test_small_tensors_are_of_pytorch() -> None:
    allocate((LEAST - 1,), torch.uint8, CPU)
    assert memory._pool.kept == 0


def test_memory_that_is_to_be_filled_is_of_pytorch() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert allocate((LEAST,), torch.float32, CPU).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_too_much_is_asked_of_pytorch_which_says_so() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        allocate((1 << 48,), torch.float32, CPU)


def test_threads_take_and_free() -> None:
    kept = pool()
    faults: list[str] = []

    def work(mark: int) -> None:
        for _ in range(50):
            tensor = kept.tensor((2 * MIB + mark,), torch.uint8)
            tensor[:: MIB // 2] = mark
            gc.collect(0)
            if not tensor[:: MIB // 2].eq(mark).all():
                faults.append(f"{mark} was overwritten")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert kept.kept <= kept.limit


def test_a_gradient_outlives_its_call_and_its_memory_is_used_again() -> None:
    from weft.specs import softmax_attention

    q, k, v = (torch.randn(1, 2, 8192, 64, requires_grad=True) for _ in range(3))
    softmax_attention(q, k, v).o.sum().backward()
    assert q.grad is not None
    kept, place = q.grad.clone(), q.grad.data_ptr()
    softmax_attention(q.detach(), k.detach(), v.detach())
    assert q.grad.equal(kept) and q.grad.data_ptr() == place
    had = {t.grad.data_ptr() for t in (q, k, v) if t.grad is not None}
    before = memory._pool.kept
    q.grad = k.grad = v.grad = None
    assert memory._pool.kept >= before + 3 * v.nbytes
    softmax_attention(q, k, v).o.sum().backward()
    assert had & {t.grad.data_ptr() for t in (q, k, v) if t.grad is not None}
