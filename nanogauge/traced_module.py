"""Trace a training step of an nn.Module on fake tensors, which have shapes and lifetimes but no values.

Memory is what torch would allocate: a storage counts until its last tensor is gone, however many views share it.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nanogauge.errors import BadInput
from nanogauge.spec_parts import SETTINGS, Operations, Shape, Traced

_UNKNOWN = tuple(key for key, field in SETTINGS.items() if field.startswith("shape."))
_NO_SHAPE = Shape(n_layer=1, n_embd=1, n_head=1, context=1, vocabulary=1, n_kv_head=1, head_size=1, mlp_width=1)
"""Placeholder, as the fields of unknown keys mean nothing."""
_LOOK_UPS = ("embedding", "gather", "index", "index_select")
"""Operations that read as much of their table as they return."""


def fields_from_module(
    module: Any, inputs: tuple[Any, ...], loss: Callable[..., Any] | None, grad_accum: int, dtype: str
) -> dict[str, Any]:
    """Return the fields of RunSpec that a trace gives; RunSpec.from_module has the arguments."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    inputs = tuple(dict(value) if isinstance(value, Mapping) else value for value in inputs)
    try:
        traced = _trace(module, inputs, loss or _own_loss, grad_accum, dtype)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise BadInput(f"{type(module).__name__} cannot be traced: {error.func} depends on values; drop it.") from None
    micro_batch = next((len(tensor) for tensor in _tensors(inputs) if tensor.dim()), 1)
    own = {str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()}
    dtype = own.pop() if dtype == "float32" and own in ({"bfloat16"}, {"float16"}) else dtype
    return {"shape": _NO_SHAPE, "unknown": _UNKNOWN, "traced": traced, "micro_batch": micro_batch, "dtype": dtype}


def _own_loss(module: Any, *inputs: Any) -> Any:
    """Return the loss of a module that computes it: a tensor, or the output's `loss`."""
    output = module(**inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], dict) else module(*inputs)
    return getattr(output, "loss", output)


def _trace(module: Any, inputs: tuple[Any, ...], loss: Callable[..., Any], grad_accum: int, dtype: str) -> Traced:
    """Run two steps of AdamW, the second of which is the steady one."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map

    devices = {t.device for t in module.parameters()} - {torch.device("meta")}
    device = devices.pop() if devices else torch.device("cpu")

    def fake(value: Any) -> Any:
        """Return a tensor of this layout without memory, and anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        return torch.nn.Parameter(made, value.requires_grad) if isinstance(value, torch.nn.Parameter) else made

    recorder, fake_mode = _Recorder(), FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        replaced = {id(tensor): fake(tensor) for tensor in (*module.parameters(), *module.buffers())}
        inputs = tree_map(fake, inputs)
    module = copy.deepcopy(module, replaced)
    parameters = list(module.parameters())
    recorder.hold(parameters, "weights")
    recorder.hold(_tensors((list(module.buffers()), inputs)), "buffers and batch")
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: recorder.hold([p.grad], "gradients"))
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], fused=True)
    cast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    with fake_mode, _observed(recorder.record):
        for _ in range(2):
            for _ in range(min(grad_accum, 2)):
                recorder.begin("forward pass")
                with cast:
                    value = loss(module, *inputs)
                if not getattr(value, "requires_grad", False) or value.numel() != 1:
                    text = "returns no loss; give loss=, a function of the module and its inputs, with a gradient."
                    raise BadInput(f"{type(module).__name__} {text}")
                recorder.keep("saved activations")
                recorder.stage = "backward pass"
                value.backward()
                del value
                micro_batch = recorder.listed()
            recorder.begin("optimizer's step")
            optimizer.step()
            recorder.hold(_tensors(list(optimizer.state.values())), "AdamW moments")
            optimizer.zero_grad()
    return Traced(
        parameters=sum(p.numel() for p in parameters),
        peak=tuple(recorder.peak.items()),
        moment=f"the {recorder.moment}",
        micro_batch=micro_batch,
        update=recorder.listed(),
    )


class _Recorder:
    """Bytes of the live storages by kind, their peak, and the operations since `begin`."""

    def __init__(self) -> None:
        from torch import ops
        from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

        self._formulas = flop_registry | {
            ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
            ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
        }
        self._kinds: dict[int, str] = {}
        """Live storage -> its kind."""
        self._live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.moment = self.stage = ""
        self._operations: Counter[tuple[str, int, int]] = Counter()

    def begin(self, stage: str) -> None:
        self.stage, self._operations = stage, Counter()

    def listed(self) -> Operations:
        return tuple((*operation, calls) for operation, calls in self._operations.items())

    def hold(self, tensors: Iterable[Any], kind: str) -> None:
        """Count new storages, and those that were temporaries, as `kind`."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = id(storage), storage.nbytes()
            if key not in self._kinds:
                weakref.finalize(storage, self._release, key, size)
            elif self._kinds[key] != "temporaries":
                continue
            else:
                self._live["temporaries"] -= size
            self._kinds[key] = kind
            self._live[kind] += size

    def keep(self, kind: str) -> None:
        """Count all live temporaries as `kind`."""
        self._kinds = {key: kind if old == "temporaries" else old for key, old in self._kinds.items()}
        self._live[kind] += self._live.pop("temporaries", 0)

    def _release(self, key: int, size: int) -> None:
        self._live[self._kinds.pop(key)] -= size

    def record(self, function: Any, arguments: tuple[Any, ...], result: Any) -> None:
        """Count an operation that has run: its FLOPs, and the bytes that it reads and writes."""
        read = {id(tensor): tensor for tensor in _tensors(arguments)}
        storages = {id(tensor.untyped_storage()) for tensor in read.values()}
        made = [tensor for tensor in _tensors(result) if id(tensor.untyped_storage()) not in storages]
        self.hold(made, "temporaries")
        if self._live.total() > self.peak.total():
            self.peak, self.moment = self._live.copy(), self.stage
        formal = zip(function._schema.arguments, arguments, strict=False)
        changed = list(_tensors([value for name, value in formal if name.alias_info and name.alias_info.is_write]))
        name = function.overloadpacket.__name__
        if not made and not changed:  # such as a view
            return
        formula = self._formulas.get(function.overloadpacket)
        flops = formula(*arguments, out_val=result) if formula is not None else 0
        moved = sum(map(_bytes, made if name in _LOOK_UPS else read.values()))
        self._operations[name, flops, moved + sum(map(_bytes, (*made, *changed)))] += 1


def _observed(record: Callable[[Any, tuple[Any, ...], Any], None]) -> Any:
    """Return a context in which each operation of torch is recorded after it has run."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Observed(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            record(function, args, result)
            return result

    return Observed()  # type: ignore[no-untyped-call]


def _tensors(values: Any) -> Iterator[Any]:
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _bytes(tensor: Any) -> int:
    """Return the bytes of the elements, of repeated ones once."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
