"""A transformers model whose batches are divided over ranks: :func:`context_parallel`.

A hook before the model's forward makes the batch's plan and takes this rank's rows of every tensor; the plan travels to
the attention layers as a keyword argument, so that gradient checkpointing finds it again in backward. A hook after it
checks that every layer attended through the plan, and makes the loss that of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from anyattn._context._parallel import ContextParallel
from anyattn._context._plan import ContextPlan
from anyattn._errors import ContextError, InvalidArgument
from anyattn.integrations import _transformers_refusals as refusals
from anyattn.integrations._accelerate import same_batches
from anyattn.integrations._layout import Shape
from anyattn.integrations._transformers_batches import digest, divide, packing_of, says_documents, sizes_of
from anyattn.integrations._transformers_plan import begin, end, running

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Division:
    """What :func:`context_parallel` yields: how the model's batches are divided now."""

    def __init__(self, cp: ContextParallel, options: dict[str, Any], factor: int) -> None:
        self.cp = cp
        self._options, self._factor = options, factor
        self._plan: ContextPlan | None = None
        self._compared: set[bool] = set()
        self._known_loss = False
        self._positions: refusals.Positions | None = None

    @property
    def plan(self) -> ContextPlan:
        """The plan of the model's last batch; take it after the model was called.

        In ``division.plan.unshard(model(**batch).logits, dim=1)`` Python takes the plan before it calls the model, and
        it is the plan of the batch before: :meth:`unshard` takes it afterwards.

        Raises:
            ContextError: there was none yet.
        """
        if self._plan is None:
            raise ContextError("no batch has been divided yet: call the model first")
        return self._plan

    def shard(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """This rank's rows of a tensor of the model's last batch.

        Args:
            x: of the whole batch, the same on all ranks; any dtype. dim counts tokens of the flattened batch, B * S.
            dim: which dim counts tokens; 1 in (1, B * S, ...).
            fill: what rows without a token get: -100 for labels.

        Returns:
            x with this rank's rows in place of dim, as in the model's outputs.

        Raises:
            ContextError: no batch was divided yet.
            DtypeError: x's dtype cannot hold the fill.
            ShapeError: dim counts something else.

        Example::

            >>> with context_parallel(cp, model) as division:  # doctest: +SKIP
            ...     logits = model(**batch).logits  # (1, rows, vocabulary)
            ...     weights = division.shard(weights)  # (1, B * S) -> (1, rows)
        """
        return self.plan.shard(x, dim, fill)

    def unshard(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """The whole batch's rows of an output of the model's last call; all ranks call it.

        Args:
            x: this rank's rows, such as logits (1, rows, vocabulary); of one shape and dtype on all ranks.
            dim: which dim counts rows.
            fill: what tokens without a row, padding, get.

        Returns:
            x with the tokens of the flattened batch, B * S, in place of dim. A loss that every rank computes from it,
            the same one, has the gradients that :func:`context_parallel` was asked for: their mean over the group, or
            their sum, is the loss's gradient. What goes back through :meth:`shard` has wrong ones.

        Raises:
            ContextError: no batch was divided yet.
            DtypeError: x's dtype cannot hold the fill.
            ShapeError: dim has another size than this rank has rows.

        Example::

            >>> with context_parallel(cp, model) as division:  # doctest: +SKIP
            ...     logits = division.unshard(model(**batch).logits)  # (1, B * S, vocabulary)
        """
        if isinstance(x, Tensor) and x.requires_grad and self._factor != 1:
            x = _Times.apply(x, self._factor)  # type: ignore[no-untyped-call]
        return self.plan.unshard(x, dim, fill)

    # --- hooks ---

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Replace the whole batch by this rank's rows."""
        batch = refusals.named(model, args, kwargs)
        refusals.check_batch(batch)
        tokens = batch["input_ids"] if batch.get("input_ids") is not None else batch["inputs_embeds"]
        shape = Shape(tokens.shape[0], tokens.shape[1], tokens.shape[1])
        plan = batch.pop("plan", None)
        explicit = says_documents(batch) or (plan is not None and batch.get("attention_mask") is None)
        if self._positions is None:
            self._positions = refusals.positions_of(model)
        refusals.check_positions(model, self._positions, batch, explicit)
        if plan is None:
            plan = self.cp.plan(packing_of(batch, shape), **self._options)
        elif not isinstance(plan, ContextPlan):
            raise ContextError(f"plan must be an anyattn.ContextPlan, got {type(plan).__name__}")
        if plan._members is None or plan._members.groups is None:
            plan = self.cp.bind(plan)
        if plan._memory.entries or plan._memory.rows != shape.batch * shape.queries:
            raise ContextError(
                f"the plan is for {plan._memory.rows} rows, and the batch has {shape.batch} x {shape.queries} tokens: "
                "make it from a Packing of the flattened batch"
            )
        if batch.get("labels") is not None and not self._known_loss:
            refusals.check_loss(model)
            self._known_loss = True
        self._compare(plan, batch, model.training)
        self._plan = plan
        divided = divide(batch, plan, shape, explicit)
        if "use_cache" in refusals.parameters(model):
            divided["use_cache"] = False
        begin(plan)
        return (), divided

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Check what ran, and make the loss the whole batch's; also called, without output, where forward failed."""
        forward = end()
        if forward is None or output is None:
            return None
        refusals.check_ran(model, forward.layers, output)
        if kwargs.get("labels") is None:
            return None
        if isinstance(output, tuple):
            return (self._whole(output[0]), *output[1:])
        output["loss"] = self._whole(output["loss"])
        return output

    def _whole(self, part: Tensor) -> Tensor:
        whole: Tensor = _Whole.apply(part, self.cp, self._factor)  # type: ignore[no-untyped-call]
        return whole

    def _compare(self, plan: ContextPlan, batch: Mapping[str, Any], training: bool) -> None:
        """Whether all ranks were given the same tokens: at the first batch in training, and in evaluation."""
        if training in self._compared:
            return
        given = {name: digest(batch.get(name)) for name in ("input_ids", "labels", "shift_labels")}
        try:
            plan._agree_on(None, given)
        except ContextError as error:
            raise ContextError(
                f"{error}. All ranks of a context-parallel group must be given the same batch: with accelerate or a "
                "Trainer, pass context_parallel(..., accelerator=)"
            ) from None
        self._compared.add(training)


@contextmanager
def context_parallel(
    cp: ContextParallel | DeviceMesh | ProcessGroup,
    model: torch.nn.Module,
    *,
    accelerator: Any = None,
    gradients: Literal["mean", "sum"] = "mean",
    **options: Any,
) -> Iterator[Division]:
    """Divide every batch of a causal language model over the ranks of a group.

    Inside, the model is called as ever, with the whole batch, the same one on all ranks of the group: (batch, seq)
    tokens, padded, packed (``packing=``, ``cu_seq_lens_q=``, positions that restart) or neither. Each rank computes its
    rows; ``loss`` is the whole batch's on every rank, and ``logits`` are (1, rows, vocabulary), this rank's.

    Args:
        cp: the group; a DeviceMesh or ProcessGroup is one with ``comm="auto"``.
        model: a transformers model that was given ``attn_implementation="anyattn"``, alone or wrapped (DDP, FSDP2,
            PEFT).
        accelerator: an ``accelerate.Accelerator``, such as a Trainer's: data loaders that it prepares inside give the
            ranks of a group the same batches. Its processes are (data, context) in this order: ranks of a group are
            neighbours.
        gradients: what becomes of the ranks' gradients. "mean": they are averaged over the group, as DDP and FSDP do,
            alone or together with data-parallel ranks. "sum": they are summed, by you. Either way the result is
            the gradient of the one loss. Backward multiplies each rank's part by the group's size for "mean".
        **options: for :meth:`anyattn.ContextParallel.plan`: ``placement``, ``pad_to_multiple_of``, or sizes instead of
            those in the model's config.

    Raises:
        Unsupported: a model that mixes tokens outside of attention, an encoder-decoder, a batch with a cache, with
            images or a 4-D mask; the message names it.
        ContextError: a batch or plan that does not fit, ranks that were given different batches, a model that is
            divided already, or one inside of it (``model.model``) that is called by itself.

    Example::

        >>> register()  # doctest: +SKIP
        >>> with context_parallel(cp, model):  # doctest: +SKIP
        ...     loss = model(input_ids=ids, labels=ids).loss
        ...     loss.backward()
    """
    if gradients not in ("mean", "sum"):
        raise InvalidArgument(f"gradients must be 'mean' or 'sum', got {gradients!r}")
    cp = _group(cp)
    inner = refusals.transformers_model(model)
    refusals.check_model(inner)
    _check_not_nested(inner)
    division = Division(cp, {**sizes_of(inner.config), **options}, cp.size if gradients == "mean" else 1)
    loaders: AbstractContextManager[None] = nullcontext() if accelerator is None else same_batches(accelerator, cp)
    hooks = _hooks(inner, division)
    _divided.append(inner)
    try:
        with loaders:
            yield division
    finally:
        _divided.remove(inner)
        for hook in hooks:
            hook.remove()
        while end() is not None:  # an interrupt leaves some
            pass


def _hooks(model: Any, division: Division) -> list[Any]:
    """Register all hooks of a model that is divided; returns their handles."""
    before, after = (torch.compiler.disable(run) for run in (division._before, division._after))  # they look at values
    hooks = [
        model.register_forward_pre_hook(_Hook(before), prepend=True, with_kwargs=True),
        model.register_forward_hook(_Hook(after), with_kwargs=True, always_call=True),
    ]
    alone = _Hook(partial(_refuse_alone, type(model).__name__))
    for part in _models_inside(model):
        hooks.append(part.register_forward_pre_hook(alone, prepend=True, with_kwargs=True))
    return hooks


def _models_inside(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The transformers models of text that a model consists of, such as the decoder under a head."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if part is not model and isinstance(part, PreTrainedModel) and part.main_input_name == "input_ids":
            yield part


def _refuse_alone(outer: str, part: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook of models inside of a divided one, which must be called by it, or be given a plan."""
    if kwargs.get("plan") is None and not running():
        name = type(part).__name__
        raise ContextError(
            f"the {name} inside of a {outer} was called by itself, and context_parallel divides what the {outer} is "
            f"called with: call that, or give context_parallel the {name} instead of the {outer}"
        )


class _Hook:
    """A hook of the model that is divided, and of no other: in copies of the model it does nothing."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_of_a_copy, ()


def _hook_of_a_copy() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    """What a hook does in a copy."""


#: The models that are divided now.
_divided: list[torch.nn.Module] = []


def _check_not_nested(model: torch.nn.Module) -> None:
    parts = set(model.modules())
    if any(other in parts or model in other.modules() for other in _divided):
        raise ContextError(
            f"context_parallel is nested: {type(model).__name__} is divided already, by another context_parallel "
            "around this one; leave one of them out"
        )


def _group(cp: Any) -> ContextParallel:
    """What was given, or the group of a mesh."""
    return cp if isinstance(cp, ContextParallel) else ContextParallel(cp)


class ContextParallelCollator:
    """A data collator that also makes the batch's plan, in the data loader's worker.

    Without it :func:`context_parallel` makes the plan when the batch arrives, and copies what describes the documents
    from the device for it.

    Args:
        collator: makes the batch, such as ``transformers.DataCollatorWithFlattening()``.
        cp: the group whose plans are made, as for :func:`context_parallel`; only its sizes go to the workers.
        config: the model's.
        **options: as for :func:`context_parallel`.

    Example::

        >>> collator = ContextParallelCollator(DataCollatorWithFlattening(), cp, model.config)  # doctest: +SKIP
    """

    def __init__(
        self, collator: Callable[..., Any], cp: ContextParallel | DeviceMesh | ProcessGroup, config: Any, **options: Any
    ) -> None:
        cp = _group(cp)
        shape = cp._members.shape
        self.collator = collator
        self._planner = ContextParallel((shape[0] if len(shape) == 1 else shape, cp.rank), comm=cp.comm)
        self._options = {**sizes_of(config), **options}

    def __call__(self, features: Any) -> dict[str, Any]:
        """The whole batch, and under "plan" where this rank's tokens are."""
        batch = dict(self.collator(features))
        tokens = batch["input_ids"]
        packing = packing_of(batch, Shape(tokens.shape[0], tokens.shape[1], tokens.shape[1]))
        return {**batch, "plan": self._planner.plan(packing, **self._options)}


class _Whole(torch.autograd.Function):
    """The sum of all ranks' parts of a loss; backward hands ``factor`` times the gradient to this rank's part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, cp: ContextParallel, factor: int) -> Tensor:
        ctx.factor = factor
        whole = part.detach().clone()
        for group in cp._members.groups or ():
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None


class _Times(torch.autograd.Function):
    """A tensor as it is; backward hands on ``factor`` times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
