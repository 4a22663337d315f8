"""Sums over the processes of `torch.distributed`: tensors only, nothing is pickled."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there are processes to add up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(num_rows: int, sums: torch.Tensor | None) -> tuple[int, torch.Tensor | None]:
    """The rows and the sums of all processes; a process that has seen no row yet may have none."""
    if not is_distributed():
        return num_rows, sums
    device = _device()
    size = 0 if sums is None else len(sums)
    # largest size, and smallest of those that have one
    sizes = torch.tensor([size, -size if size else -(2**62)], dtype=torch.int64, device=device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    largest, smallest = int(sizes[0]), -int(sizes[1])
    if largest == 0:
        return 0, None
    if smallest != largest:
        raise ValueError(f"probs: the processes have different classes: between {smallest} and {largest} sums")
    total = torch.zeros(largest, dtype=torch.float64) if sums is None else sums
    total = total.to(device, copy=True)
    rows = torch.tensor(num_rows, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    dist.all_reduce(rows)
    return int(rows), total


def union_over_processes(names: list[str]) -> list[str]:
    """Every process's names, sorted, the same on each."""
    if not is_distributed():
        return sorted(names)
    device = _device()
    own = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor(len(own), dtype=torch.int64, device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = int(max(sizes))
    padded = own.new_zeros(longest)
    padded[: len(own)] = own
    texts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    lists = [json.loads(bytes(text[: int(length)].tolist())) for text, length in zip(texts, sizes, strict=True)]
    return sorted({name for found in lists for name in found})


def _device() -> torch.device:
    """Where the processes can meet: NCCL has no CPU tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
