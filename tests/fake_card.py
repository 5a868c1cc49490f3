"""A card that is not there: the package's own steps on fake tensors of `cuda:0`, on any machine.

Nothing is computed. Tensors on two devices in one operation raise, as on a card; operations on the
card and waits of the host for it are counted, by the parts of a step that a test names.
"""

import collections
import contextlib
import heapq
import math
import traceback
import types

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.models.deimv2 import modeling_deimv2

DEVICE = torch.device("cuda:0")
NO_KERNEL = {"detach", "alias", "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided"}
NO_KERNEL |= {
    "device",
    "new_empty_strided",
    "_reshape_alias",
    "expand",
    "lift_fresh",
    "set_",
    "resize_",
}
COPIES = {"_to_copy", "copy_"}
SIZED = {"nonzero", "masked_select", "unique2", "_unique2", "equal", "is_nonzero"}
SOME = 4  # how many entries a mask is said to choose


def on_card(*values) -> bool:
    tensors = (value for value in tree_leaves(values) if torch.is_tensor(value))
    return any(tensor.device.type == "cuda" for tensor in tensors)


def is_mask(index) -> bool:
    return torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8)


def kernels(name, args) -> int:
    "One for an operation; a list of several types is worked off one by one."
    if name.startswith("_foreach") and len({tensor.dtype for tensor in args[0]}) > 1:
        return len(args[0])
    return 1


def caller() -> str:
    "The line of the package (or of torchvision, transformers) that an operation comes from."
    frames = traceback.extract_stack()
    for name in ("/deimv2_tfg/", "site-packages/torchvision", "site-packages/transformers"):
        found = [frame for frame in frames if name in frame.filename]
        if found:
            return f"{found[-1].filename.rsplit('/')[-1]}:{found[-1].lineno}"
    return "?"


class Card(TorchDispatchMode):
    """Counts what runs on the card, and answers what only a real one could."""

    def __init__(self):
        super().__init__()
        self.ops = collections.Counter()  # of each part
        self.names = collections.Counter()  # of each operation
        self.waits = []  # (kind, where)
        self.now = "step"

    @contextlib.contextmanager
    def part(self, name):
        before, self.now = self.now, name
        try:
            yield
        finally:
            self.now = before

    def wait(self, kind):
        self.waits.append((kind, caller()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if name == "_local_scalar_dense":
            return self.scalar(args[0])
        masked = name in ("index", "index_put", "index_put_") and any(map(is_mask, args[1]))
        if on_card(args, kwargs) and (masked or name in SIZED):
            self.wait(f"{name} of a mask" if masked else name)
        out = self.answer(func, name, masked, args, kwargs)
        if name in COPIES:
            source = args[1] if name == "copy_" else args[0]
            blocking = not (
                kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
            )
            if source.device.type != out.device.type and blocking:
                self.wait(f"copy {source.device.type} -> {out.device.type}")
        if not func.is_view and name not in NO_KERNEL and on_card(args, kwargs, out):
            count = kernels(name, args)
            self.ops[self.now] += count
            self.names[name] += count
        return out

    def scalar(self, tensor):
        if on_card(tensor):
            self.wait("item")
        return True if tensor.dtype == torch.bool else 1 if not tensor.is_floating_point() else 1.0

    def answer(self, func, name, masked, args, kwargs):
        "The result; sizes that depend on values are `SOME`."
        if name == "nonzero":
            return torch.empty(SOME, args[0].ndim, dtype=torch.int64, device=args[0].device)
        if name == "nms":
            return torch.empty(SOME, dtype=torch.int64, device=args[0].device)
        if masked and name != "index":
            return args[0]
        if masked:
            chosen = torch.empty(SOME, dtype=torch.int64, device=args[0].device)
            return func(args[0], [chosen if is_mask(i) else i for i in args[1]])
        return func(*args, **kwargs)


def real(build, *args, **kwargs):
    "What `build` makes of its arguments, in the real world: random weights cannot be fake."
    with _disable_current_modes():
        return build(*args, **kwargs)


def to_card(module: nn.Module) -> nn.Module:
    "A module with its parameters and buffers as fake tensors of the card, in place."
    for owner in module.modules():
        for name, value in [*owner._parameters.items(), *owner._buffers.items()]:
            if value is None:
                continue
            fake = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=DEVICE
            )
            if name in owner._parameters:
                owner._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
            else:
                owner._buffers[name] = fake
    return module


@contextlib.contextmanager
def autocast(dtype):
    "torch's for the card, which refuses where there is none; None: float32."
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    "The kernel that a card from compute capability 8.0 takes: flash in 16 bits without a mask."
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, False, False, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype)
        bias = bias.masked_fill_(attn_mask.logical_not(), -math.inf)
        size = bias.shape[-1]
        bias = F.pad(bias, (0, -size % 16))[..., :size] if size % 16 else bias
        bias = bias.expand(*query.shape[:2], -1, size)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, 0.0, False, scale=scale)[0]


def fitted(grad, meta):
    "A gradient in the shape and type that a node takes."
    if tuple(grad.shape) != tuple(meta.shape):
        grad = grad.sum_to_size(tuple(meta.shape))
    return grad if grad.dtype == meta.dtype else grad.to(meta.dtype)


def _accumulate(variable, grad):
    variable.grad = grad.detach() if variable.grad is None else variable.grad.add_(grad)


_passes = [0]  # number of the backward pass


@torch.no_grad()
def backward(loss):
    "Gradients of the leaves by walking `grad_fn`: torch's own engine asks for a real card."
    _passes[0] += 1
    users = collections.Counter()
    found, todo = {loss.grad_fn}, [loss.grad_fn]
    while todo:
        for node, _ in todo.pop().next_functions:
            users[node] += 1
            if node is not None and node not in found:
                found.add(node)
                todo.append(node)
    grads = collections.defaultdict(dict)
    grads[loss.grad_fn] = {0: torch.ones_like(loss)}
    ready = [(0, 0, loss.grad_fn)]
    for order in range(1, len(found) + 1):
        _, _, node = heapq.heappop(ready)
        given = grads.pop(node, {})
        inputs = [given.get(i) for i in range(max(len(node._input_metadata), 1))]
        if hasattr(node, "variable"):
            if inputs[0] is not None:
                _accumulate(node.variable, inputs[0])
            outputs = ()
        else:
            run = node if callable(node) else node.apply
            outputs = run(*inputs) if given else (None,) * len(node.next_functions)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        skipped = max(len(outputs) - len(node.next_functions), 0)  # inputs that are no tensors
        outputs = outputs[skipped:]
        for i, (following, place) in enumerate(node.next_functions):
            if following is None:
                continue
            if i < len(outputs) and outputs[i] is not None:
                grad = fitted(outputs[i], following._input_metadata[place])
                held = grads[following].get(place)
                grads[following][place] = grad if held is None else held + grad
            users[following] -= 1
            if users[following] == 0:
                late = hasattr(following, "variable")
                rank = -(10**12) if late else -following._sequence_nr()
                heapq.heappush(ready, (rank, order * 1000 + i, following))


def fetch(tensors: dict) -> dict:
    "`criterion.fetch` with values of its own: one transfer, random numbers, labels of class 0."
    torch.cat([tensor.reshape(-1).float() for tensor in tensors.values()]).cpu()
    rng = np.random.default_rng(0)
    found = {name: rng.random(tuple(t.shape)).astype(np.float32) for name, t in tensors.items()}
    return found | {"labels": np.zeros(tuple(tensors["labels"].shape), np.float32)}


class Accelerator:
    "What `training_step` asks of accelerate's, without it."

    device = DEVICE
    scaler = None
    num_processes = 1
    process_index = 0

    def __init__(self, card):
        self.card = card

    def no_sync(self, model):
        return contextlib.nullcontext()

    def backward(self, loss):
        with self.card.part("backward"):
            backward(loss)

    def clip_grad_norm_(self, parameters, norm):
        with self.card.part("clip"):
            return nn.utils.clip_grad_norm_(parameters, norm)

    def unwrap_model(self, model):
        return model


@contextlib.contextmanager
def fake_card(monkeypatch):
    """A `Card` that is in force; what leaves the fake world is replaced.

    Checkpointed blocks are computed again once in a backward pass, as in torch's engine.
    """
    foreach = [*_foreach_utils._foreach_supported_types, FakeTensor]
    monkeypatch.setattr(_foreach_utils, "_foreach_supported_types", foreach)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(modeling_deimv2, "torch_compilable_check", lambda *_: None)
    monkeypatch.setattr("deimv2_tfg.criterion.fetch", fetch)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: _passes[0])
    with FakeTensorMode(allow_non_fake_inputs=True), Card() as card:
        yield card


def counted(card, module, method, part):
    "Let a method of a module count as a part of the step."
    plain = getattr(module, method)

    def call(self, *args, **kwargs):
        with card.part(part):
            return plain(*args, **kwargs)

    module.__dict__[method] = types.MethodType(call, module)
