"""Law of golden numbers: the method is what its paper and its reference implementation say.

Where Hugging Face PEFT has the method, the adapter is written to a folder and PEFT itself computes with it. Bottlenecks and selective methods
are held against the equations, written here a second time, with hooks and edited parameters instead of this package's machinery.
(AdapterHub's numbers for the bottlenecks are held in `tests/golden`; its package does not run beside a present transformers.)
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.adapt.files.peft_tensors import layout_of
from ingraft.adapt.roles import blocks
from ingraft.adapt.select import select
from ingraft.adapt.stacked import matrices, own_tensors
from ingraft.methods.contract import AttentionPart, InputPart, OutputPart, ParameterPart
from ingraft.testing.cases import Case, close, differs, gradients, loss_of, output, run
from ingraft.testing.suite import law
from ingraft.testing.table import METHODS


def _in_peft(case: Case) -> bool:
    return case.method.peft is not None


def _peft_cannot(case: Case) -> str | None:
    """Why PEFT is no reference here, or None."""
    name, where = case.method.name, case.subject.name
    if not _in_peft(case):
        return "PEFT does not have it; see agrees_with_its_equation"
    if importlib.util.find_spec("peft") is None:
        return "the reference implementation is not installed (pip install peft)"
    if case.subject.packed:
        return "PEFT knows no packed layers of ours; tests/quant hold them to bitsandbytes', benchmarks/qlora.py sets runs side by side"
    if where == "conv2d-groups":
        return "PEFT has no grouped convolutions whose groups do not divide the rank; merged = active holds it to its equation"
    if where == "encoder":
        return "in evaluation torch's encoder passes over PEFT's layers, so that its adapters do nothing there"
    if name == "ia3" and where == "embedding":
        return "PEFT's IA3 has no embeddings"
    soft = issubclass(case.part, AttentionPart | InputPart)
    if soft and where == "vit":
        return "PEFT has no task type for images"
    if soft and where == "bert":
        return "PEFT has no task type for masked language models: its wrapper leaves the virtual tokens out"
    if name == "multitask-prompt" and where == "t5":
        return "PEFT's wrapper loses the decoder's input there"
    if issubclass(case.part, AttentionPart) and where == "t5":
        return (
            "PEFT puts prefixes of an encoder-decoder into the decoder's cache alone; here every self-attention has one"
        )
    return _uncovered(case)


_UNCOVERED: dict[tuple[str, str], str | None] = {}


def _uncovered(case: Case) -> str | None:
    """Why an adapter at these sites has no file of PEFT's, or None."""
    key = repr(case.config), case.subject.name
    layout = case.method.peft
    if key not in _UNCOVERED and layout is not None:
        case = _with_peft(case)
        model = case.base()
        sites, _, _ = select(model, case.config, case.method, strict=False)
        outside = layout_of(model, case.method, case.config, sites) is None
        _UNCOVERED[key] = (
            f"PEFT's {layout.peft_type} has no layer of this kind or no such option, or computes something else there"
            if outside
            else None
        )
    return _UNCOVERED.get(key)


def _with_peft(case: Case) -> Case:
    """The case without what PEFT is known to compute otherwise: a forward of the user's own, padding modes and dilation of convolutions."""
    only = {
        "attention": ("joint",),
        "embedding": ("plain",),
        "conv1d": ("first",),
        "conv2d": ("first",),
        "conv3d": ("second",),
    }.get(case.subject.name)
    if only is None:
        return case
    row = dataclasses.replace(case.row, config=dataclasses.replace(case.config, target_modules=only), elsewhere={})
    return Case(row=row, subject=case.subject)


NO_DERIVATIVE = (".c3a_kernel", ".hada_t1")
"""Tensors with which PEFT's backward, written by hand, is not the derivative of its forward. `tests/peft` mends it and compares."""


@law(22, hole=_peft_cannot)
def agrees_with_peft(case: Case) -> None:
    """With the same weights loaded, Hugging Face PEFT gives the same outputs, and the same gradients tensor by tensor."""
    case = _with_peft(case)
    model, batch = case.adapted("a"), case.batch()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        adapt.save(model, scratch, "a", dtype=torch.float32)
        theirs: Any = PeftModel.from_pretrained(case.base(), scratch).eval()  # type: ignore[arg-type]
        for key, p in theirs.named_parameters():
            p.requires_grad_(any(mark in f"{key}." for mark in (".a.", "default", ".adaption_")))
        asked = {"task_ids": torch.zeros(4, dtype=torch.int64)} if case.method.name == "multitask-prompt" else {}
        expected = _real(run(theirs, batch | asked), run(model, batch))
        close(run(model, batch), expected, "Ingraft and PEFT", times=2.0)
        loss_of(_real(output(theirs, batch | asked), expected)).backward()
    with torch.no_grad():
        differs(expected, run(case.base(), batch), "PEFT's adapter and base")
    if any(key.startswith("shared.") for key in adapt.parameters(model, "a")):
        return  # PEFT keeps what the shared module made, not the module: other tensors, other gradients
    if case.method.compact is not None:
        return  # the file is another adapter of the same function; tests/peft compares with PEFT's own of this method
    if any(key.endswith(NO_DERIVATIVE) for key in adapt.parameters(model, "a")):
        return
    if case.subject.name == "attention":
        return  # PEFT adds the output projection's change twice, so its file holds half of the tensor, which gets twice the gradient
    ours = sorted(float(g.norm()) for g in gradients(model, "a", batch).values())
    found = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.requires_grad and p.grad is not None)
    if len(found) == len(ours):  # PEFT keeps the prefixes of all layers in one tensor
        close(torch.tensor(ours), torch.tensor(found), "norms of gradients, ours and PEFT's", times=10.0)
    else:
        norms = [torch.tensor(values).norm() for values in (ours, found)]
        close(norms[0], norms[1], "norm of the gradient, ours and PEFT's", times=10.0)


def _real(y: Tensor, like: Tensor) -> Tensor:
    """PEFT's prompt tuning returns the virtual tokens' logits too, in front."""
    return y[:, -like.shape[1] :] if y.dim() == 3 else y


def _no_equation(case: Case) -> str | None:
    if _in_peft(case):
        return "PEFT is the reference; see agrees_with_peft"
    if case.method.name not in METHODS and case.row.equation is None:
        return "no reference was given: check_method(Row(config=..., equation=...)) takes one"
    if case.subject.name == "encoder" and issubclass(case.part, OutputPart):
        return "torch's encoder packs its rows in evaluation, where a hook on the base cannot do what the equation says"
    return None


@law(22, hole=_no_equation)
def agrees_with_its_equation(case: Case) -> None:
    """The equation in the method's header, written out by hand over the bare base, gives the same outputs."""
    model, batch = case.adapted("a"), case.batch()
    base = case.base()
    expected_base = run(base, batch)
    if case.row.equation is not None:
        adapt.make_dense(base)
        with torch.no_grad():
            case.row.equation({key: value.detach() for key, value in adapt.parameters(model, "a").items()}, base)
    elif case.method.name == "reft":
        _edits_by_hand(case, model, base, batch)
    elif case.method.name == "fusion":
        base = case.bare()
        _fusions_by_hand(case, model, base)
    elif case.method.name == "routing":
        base = case.bare()
        _routes_by_hand(case, model, base)
    elif issubclass(case.part, OutputPart):
        _bottlenecks_by_hand(case, model, base)
    else:
        _parameters_by_hand(case, model, base)
    expected = run(base, batch)
    differs(expected, expected_base, "equation and base")
    close(run(model, batch), expected, "the package and the equation", times=2.0)


def _parameters_by_hand(case: Case, model: nn.Module, base: nn.Module) -> None:
    with torch.no_grad():
        for key, value in adapt.parameters(model, "a").items():
            owner, _, leaf = key.rpartition(".")
            above, _, inside = owner.rpartition(".")
            matrix = next((m for m in matrices(base.get_submodule(above)) if m.key == inside), None)
            if matrix is not None and matrix.bias is not None:
                bias = matrix.bias_of(own_tensors(base.get_submodule(above)))
                assert bias is not None
                bias += value
                continue
            module = base.get_submodule(owner)
            if case.method.name == "bitfit":
                bias = module._parameters.get("bias")
                module._parameters["bias"] = nn.Parameter(value.detach() if bias is None else bias + value)
            else:
                assert issubclass(case.part, ParameterPart), f"no equation is written for {case.method.name}"
                old = module._parameters[leaf]
                assert old is not None
                old.copy_(value)  # in place: what is tied stays tied


def _edits_by_hand(case: Case, model: nn.Module, base: nn.Module, batch: dict[str, Tensor]) -> None:
    values = adapt.parameters(model, "a")
    options: Any = case.config
    first, last = options.first_last
    for path in require_control(model).require("a").sites:
        M, W, b = (values[f"{path}.{name}"].detach() for name in ("rotation", "weight", "bias"))
        R = torch.zeros_like(M)
        for row, m in enumerate(M):  # Gram and Schmidt
            m = m - R.T @ (R @ m)
            R[row] = m / m.norm()

        def edit(
            module: nn.Module, args: Any, y: Any, R: Tensor = R, W: Tensor = W, b: Tensor = b, path: str = path
        ) -> Any:
            del module, args
            h = (y[0] if isinstance(y, tuple) else y).clone()
            for row in range(h.shape[0]):
                real = list(range(h.shape[1]))
                if path.startswith("decoder."):
                    real = [0]  # the start token
                elif "attention_mask" in batch:
                    real = torch.nonzero(batch["attention_mask"][row]).flatten().tolist()
                for t in {*real[:first], *real[len(real) - last :]}:
                    h[row, t] += R.T @ (W @ h[row, t] + b - R @ h[row, t])
            return (h, *y[1:]) if isinstance(y, tuple) else h

        base.get_submodule(path).register_forward_hook(edit)


def _fusions_by_hand(case: Case, model: nn.Module, base: nn.Module) -> None:
    parts = {name: adapt.parameters(model, name) for name in ("a", *case.row.companions)}
    for path, role in require_control(model).require("a").sites.items():
        of = {
            name: {key.rpartition(".")[2]: p.detach() for key, p in found.items() if key.startswith(path + ".")}
            for name, found in parts.items()
        }

        def replace(module: nn.Module, args: Any, y: Any, of: Any = of, role: str = role) -> Any:
            first = y[0] if isinstance(y, tuple) else y
            changes = []
            for name, config in case.row.companions.items():
                options: Any = config
                inner = first @ of[name]["down"].T + of[name]["down_bias"]
                inner = torch.tanh(inner) if options.non_linearity == "tanh" else torch.relu(inner)
                changes.append(inner @ of[name]["up"].T + of[name]["up_bias"])
            query = first @ of["a"]["query"].T + of["a"]["query_bias"]
            scores = [(query * (c @ of["a"]["key"].T + of["a"]["key_bias"])).sum(-1) for c in changes]
            total = sum(score.exp() for score in scores)
            change = sum(
                (score.exp() / total)[..., None] * (c @ of["a"]["value"].T)
                for score, c in zip(scores, changes, strict=True)
            )
            changed = type(module).forward(module, args[0] + change) if role == "norm" else first + change
            return (changed, *y[1:]) if isinstance(y, tuple) else changed

        base.get_submodule(path).register_forward_hook(replace)


def _routes_by_hand(case: Case, model: nn.Module, base: nn.Module) -> None:
    parts = {name: adapt.parameters(model, name) for name in ("a", *case.row.companions)}
    options: Any = case.config
    for path in require_control(model).require("a").sites:
        of = {
            name: {key.rpartition(".")[2]: p.detach() for key, p in found.items() if key.startswith(path + ".")}
            for name, found in parts.items()
        }

        def replace(module: nn.Module, args: Any, y: Tensor, of: Any = of) -> Tensor:
            del module
            scores = (y @ of["a"]["gate"].T + of["a"]["gate_bias"]) / options.temperature
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            changes = [
                config.lora_alpha / config.r * (args[0] @ of[name]["lora_A"].T) @ of[name]["lora_B"].T  # type: ignore[attr-defined]
                for name, config in case.row.companions.items()
            ]
            return y + sum(weights[..., i, None] * c for i, c in enumerate(changes))

        base.get_submodule(path).register_forward_hook(replace)


def _kronecker(values: dict[str, Any], path: str) -> tuple[Tensor, Tensor]:
    left, right, bias = (values[f"{path}.{name}"].detach() for name in ("left", "right", "bias"))
    rule = values["shared.phm_rule"].detach()
    return torch.stack([torch.kron(A, S @ T) for A, S, T in zip(rule, left, right, strict=True)]).sum(0).T, bias


def _bottlenecks_by_hand(case: Case, model: nn.Module, base: nn.Module) -> None:
    values = adapt.parameters(model, "a")
    options: Any = case.config
    activation = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu, "tanh": torch.tanh}[options.non_linearity]
    entered: dict[str, Tensor] = {}
    entry_of = {block.mlp_out: block.mlp_in for block in blocks(base)} if case.subject.transformers else {}
    for path, role in require_control(model).require("a").sites.items():
        if case.method.name == "compacter":
            (down, d), (up, u) = (_kronecker(values, f"{path}.{name}") for name in ("down", "up"))
        else:
            down, d, up, u = (values[f"{path}.{name}"].detach() for name in ("down", "down_bias", "up", "up_bias"))

        def change(h: Tensor, down: Tensor = down, d: Tensor = d, up: Tensor = up, u: Tensor = u) -> Tensor:
            return options.scaling * (activation(h @ down.T + d) @ up.T + u)

        def replace(
            module: nn.Module, args: Any, y: Any, change: Any = change, role: str = role, path: str = path
        ) -> Any:
            first = y[0] if isinstance(y, tuple) else y
            if role == "norm":
                changed = type(module).forward(module, args[0] + change(first))
            elif case.method.name == "parallel":
                changed = first + change(entered.get(path, args[0]))
            else:
                changed = first + change(first)
            return (changed, *y[1:]) if isinstance(y, tuple) else changed

        base.get_submodule(path).register_forward_hook(replace)
        entry = entry_of.get(path)
        if role == "mlp" and entry is not None:

            def enter(module: nn.Module, args: Any, path: str = path) -> None:
                del module
                entered[path] = args[0]

            base.get_submodule(entry).register_forward_pre_hook(enter)
