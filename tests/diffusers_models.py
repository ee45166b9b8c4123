"""Small transformers of diffusers, their inputs, and what they give: for this process and for ranks."""

import contextlib
import dataclasses
import importlib
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import anyattn

integration = importlib.import_module("anyattn.integrations.diffusers")

BATCH, TEXT, IMAGE = 2, 8, 16
#: Of meshes: groups that share nothing, and diffusers' two.
DIMS = ("dp", "ring", "ulysses")
KINDS = ("none", "true", "right", "left", "middle", "holes")


def key_mask(kind, batch=BATCH, length=TEXT):
    """bool (batch, length); None for "none"."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    if kind == "right":
        mask[0, length // 2 :] = False
    elif kind == "left":
        mask[0, : length // 2] = False
    elif kind == "middle":
        mask[0, 2 : length - 3] = False
        mask[-1, 1:3] = False
    elif kind == "holes":
        mask[0, 1::2] = False
        mask[-1, 0::3] = False
    return mask


def flux(diffusers):
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def wan(diffusers):
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def qwen(diffusers):
    return diffusers.QwenImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flux_inputs(mask):
    options = {} if mask is None else {"joint_attention_kwargs": {"attention_mask": mask}}
    return {
        "hidden_states": torch.randn(BATCH, IMAGE, 4), "encoder_hidden_states": torch.randn(BATCH, TEXT, 24),
        "pooled_projections": torch.randn(BATCH, 16), "timestep": torch.rand(BATCH),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(TEXT, 3), **options,
    }  # fmt: skip


def wan_inputs(mask):
    assert mask is None
    return {
        "hidden_states": torch.randn(BATCH, 4, 2, 4, 8), "encoder_hidden_states": torch.randn(BATCH, TEXT, 24),
        "timestep": torch.randint(1000, (BATCH,)),
    }  # fmt: skip


def qwen_inputs(mask):
    return {
        "hidden_states": torch.randn(BATCH, IMAGE, 4), "encoder_hidden_states": torch.randn(BATCH, TEXT, 24),
        "encoder_hidden_states_mask": mask, "timestep": torch.rand(BATCH), "img_shapes": [[(1, 4, 4)]] * BATCH,
    }  # fmt: skip


MODELS = {"flux": (flux, flux_inputs), "wan": (wan, wan_inputs), "qwen": (qwen, qwen_inputs)}


def joint(mask):
    """A mask of text, for text and image together."""
    return None if mask is None else torch.cat([mask, torch.ones(BATCH, IMAGE, dtype=torch.bool)], 1)


def build(name):
    """The same weights every time, away from their symmetric initial values."""
    import diffusers

    torch.manual_seed(0)
    model = MODELS[name][0](diffusers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float()


def inputs_of(name, mask=None):
    torch.manual_seed(1)
    return MODELS[name][1](mask)


def result(model, inputs):
    """(output, gradients by name) of a fixed function of the output."""
    model.zero_grad()
    out = model(**inputs, return_dict=False)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(got, want):
    """The largest, over the scale of what is wanted."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1.0)).item() if want.numel() else 0.0


def assert_same(got, want, limit=2e-5):
    assert got[1].keys() == want[1].keys()
    assert want[1], "no gradients"
    found = {"out": difference(got[0], want[0])} | {n: difference(got[1][n], want[1][n]) for n in want[1]}
    worst = max(found, key=found.get)
    assert found[worst] <= limit, f"{worst}: {found[worst]:.2e}"


@contextlib.contextmanager
def backend(name):
    """As ``attention_backend``, for a model that has none of its own."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend(name):
        yield


# --- jobs of ranks ---


def prepare(_seat):
    """Import what the others need: it takes longer than a job has."""
    import diffusers  # noqa: F401

    integration.register()
    integration.register("anyattn_whole", whole_masks=True)
    integration.register("anyattn_device", read_masks=False, whole_masks=True)


def parallel(seat, degrees):
    """diffusers' configuration over the rank's part of a mesh, the ranks of one sequence set up as on a GPU."""
    from diffusers import ContextParallelConfig

    return ContextParallelConfig(ring_degree=degrees[0], ulysses_degree=degrees[1], mesh=seat.group)


def enable(model, config):
    """``model.enable_parallelism``, which asks for accelerators only to number them."""
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        model.enable_parallelism(config=config)
    finally:
        torch.accelerator.device_count = count


def model_job(seat, name, kind, degrees, attention, own=False):
    """Output, and gradients summed over the ranks of a sequence, of a model under ``enable_parallelism``.

    Flux's mask is of the undivided sequence, or of this rank's ``own`` part of text and image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(name)
        model.set_attention_backend(attention)
        config = parallel(seat, degrees)
        enable(model, config)
        mask = key_mask(kind)
        if name == "flux" and mask is not None:
            mask = (part_of(mask, config._flattened_mesh) if own else joint(mask))[:, None, None]
        out, gradients = result(model, inputs_of(name, mask))
    for gradient in gradients.values():
        dist.all_reduce(gradient, group=config._flattened_mesh.get_group())
    return out, gradients


def part_of(words, team):
    """A rank's part of the mask of text and image."""
    rank, ranks = team.get_local_rank(), team.size()
    image = torch.ones(BATCH, IMAGE, dtype=torch.bool)
    return torch.cat([words.chunk(ranks, 1)[rank], image.chunk(ranks, 1)[rank]], dim=1)


class Call(NamedTuple):
    """An attention call on whole tensors, and a rank's parts of it."""

    kv_heads: int = 4
    rows: int = 16
    keys: int = 16
    mask: Any = None
    """Of the whole call, in the order of the ranks' parts."""
    held: str = "whole"
    """What a rank is given of it: "keys" (its own), "rows" (its own, by all keys), or the whole."""
    causal: bool = False
    more: Any = None
    """attention_kwargs."""

    def tensors(self):
        """q, k, v and dout."""
        generator = torch.Generator().manual_seed(3)
        sizes = (self.rows, 4), (self.keys, self.kv_heads), (self.keys, self.kv_heads), (self.rows, 4)
        return [torch.randn(BATCH, *size, 16, generator=generator) for size in sizes]

    def run(self, attention, rank=0, ranks=1, parallel_config=None):
        """(out, dq, dk, dv, lse where it is asked for) of a rank's parts."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        q, k, v, dout = (x.chunk(ranks, 1)[rank].clone() for x in self.tensors())
        for x in (q, k, v):
            x.requires_grad_()
        mask = self.mask
        if mask is not None and self.held != "whole":
            mask = mask.chunk(ranks, -1 if self.held == "keys" else -2)[rank]
        out = dispatch_attention_fn(
            q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=self.kv_heads != 4, backend=attention,
            attention_kwargs=self.more, parallel_config=parallel_config,
        )  # fmt: skip
        out, *lse = out if isinstance(out, tuple) else (out,)
        return [x.detach() for x in (out, *torch.autograd.grad((out * dout).sum(), (q, k, v)), *lse)]


def anything_job(seat, degrees, name):
    """diffusers' modes for parts of different length."""
    call_job(seat, Call(), degrees, "anyattn", **{name: True})


def call_job(seat, call, degrees, attention="anyattn_whole", **changes):
    """What a rank's parts of a call give, and the schemes that ran."""
    from diffusers.models._modeling_parallel import ParallelConfig

    from anyattn.integrations import _diffusers_parallel

    config = dataclasses.replace(parallel(seat, degrees), **changes)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), seat.group)
    team = config._flattened_mesh
    schemes, attend = [], _diffusers_parallel.attention

    def watched(*tensors, plan, **options):
        schemes.append(plan.comm)
        return attend(*tensors, plan=plan, **options)

    _diffusers_parallel.attention = watched
    try:
        both = ParallelConfig(context_parallel_config=config)
        return call.run(attention, team.get_local_rank(), team.size(), both), schemes
    finally:
        _diffusers_parallel.attention = attend


def repeated_job(seat, call, degrees, times):
    """How often a mask was looked at, of so many calls with one mask."""
    from diffusers.models._modeling_parallel import ParallelConfig

    from anyattn.integrations import _diffusers_parallel

    config = parallel(seat, degrees)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), seat.group)
    team = config._flattened_mesh
    looks, look = [], _diffusers_parallel._look
    _diffusers_parallel._look = lambda *arguments: looks.append(1) or look(*arguments)
    call = call._replace(mask=call.mask.chunk(team.size(), -1)[team.get_local_rank()], held="whole")
    try:
        for _ in range(times):
            call.run("anyattn", team.get_local_rank(), team.size(), ParallelConfig(context_parallel_config=config))
    finally:
        _diffusers_parallel._look = look
    return len(looks)


class Step(NamedTuple):
    """A call of two ranks."""

    uses: tuple[Any, Any]
    """By rank, which of its masks; None for none."""
    writes: Any = None
    """What rank 0 writes to its mask before, alone."""
    past_torch: bool = False
    """Where torch does not see it: it forgets afterwards."""
    inference: bool = False
    """In inference_mode, without gradients."""


def steps_job(seat, degrees, masks, steps):
    """What a rank's parts of calls give, one after the other; masks are by rank, and live for all steps."""
    from diffusers.models._modeling_parallel import ParallelConfig

    config = parallel(seat, degrees)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), seat.group)
    both, rank = ParallelConfig(context_parallel_config=config), config._flattened_mesh.get_local_rank()
    mine, found = [x.clone() for x in masks[rank]], []
    for step in steps:
        if step.writes is not None and rank == 0:
            written = mine[step.uses[0]]
            (written.data if step.past_torch else written).copy_(step.writes)
            if step.past_torch:
                integration.forget()
        mask = None if step.uses[rank] is None else mine[step.uses[rank]]
        if step.inference:
            with torch.inference_mode():
                parts = [x.chunk(2, 1)[rank].clone() for x in Call().tensors()[:3]]
                found.append([attend(*parts, mask, both)])
        else:
            found.append(Call(mask=mask).run("anyattn", rank, 2, both))
    return [[x.clone() for x in parts] for parts in found]


def refused_job(seat, *arguments):
    """(kind, message) of what steps_job raises, where ranks may raise different things."""
    try:
        steps_job(seat, *arguments)
    except anyattn.AnyattnError as error:
        return type(error).__name__, str(error)
    return None


def attend(q, k, v, mask, parallel_config):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend="anyattn", parallel_config=parallel_config)


def odd_heads_job(seat, degrees):
    """Three heads."""
    from diffusers.models._modeling_parallel import ParallelConfig

    config = parallel(seat, degrees)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), seat.group)
    q = torch.randn(BATCH, 4, 3, 16)
    attend(q, q, q, None, ParallelConfig(context_parallel_config=config))


def page_job(_seat, source):
    """What a script for GPUs prints of its output, here."""
    device = 'torch.device("cuda", int(os.environ["LOCAL_RANK"]))'
    assert source.count(device) == source.count("nccl") == 1
    replaced = {
        (dist, "init_process_group"): lambda *_, **__: None, (dist, "destroy_process_group"): lambda: None,
        (torch.cuda, "set_device"): lambda _: None, (torch.accelerator, "device_count"): lambda: 1,
    }  # fmt: skip
    before = {(where, name): getattr(where, name) for where, name in replaced}
    names = {}
    try:
        for (where, name), function in replaced.items():
            setattr(where, name, function)
        exec(source.replace(device, 'torch.device("cpu")'), names)
    finally:
        for (where, name), function in before.items():
            setattr(where, name, function)
    return names["out"].detach().clone()


def dictionary_job(seat):
    """A model under enable_parallelism, called with return_dict=True."""
    model = build("flux")
    enable(model, parallel(seat, (2, 1)))
    model(**inputs_of("flux"))


def without_accelerator_job(seat):
    """enable_parallelism as it is."""
    build("flux").enable_parallelism(config=parallel(seat, (2, 1)))


def uneven_job(seat, degrees):
    """Ranks whose parts differ in length."""
    config = parallel(seat, degrees)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), seat.group)
    from diffusers.models._modeling_parallel import ParallelConfig
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q = torch.randn(BATCH, 4 + config._flattened_mesh.get_local_rank(), 4, 16)
    dispatch_attention_fn(q, q, q, backend="anyattn", parallel_config=ParallelConfig(context_parallel_config=config))


def unprepared_job(seat, call, degrees):
    """A configuration that nobody set up."""
    from diffusers.models._modeling_parallel import ParallelConfig

    call.run("anyattn", parallel_config=ParallelConfig(context_parallel_config=parallel(seat, degrees)))
