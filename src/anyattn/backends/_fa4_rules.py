"""What FlashAttention 4 refuses or gets wrong, by problem, GPU and version: the rows of the declaration in ``fa4``."""

from __future__ import annotations

from anyattn._capability import Reason, Row
from anyattn._problem import Problem

ISSUES = "https://github.com/Dao-AILab/flash-attention"


# --- which problems a rule speaks of -------------------------------------------------------------------------------


def _any(p: Problem) -> bool:
    return True


def _not_as_first(p: Problem) -> bool:
    """Other head dims than those of the first sm90 kernels, forward."""
    return _hopper(p) and (p.head_dim != p.head_dim_v or p.head_dim > 128)


def _backward_not_as_first(p: Problem) -> bool:
    """What the first sm90 backward did not take: packed batches, windows, determinism, most head dims."""
    taken = p.head_dim in (64, 128) and p.form == "dense" and not (p.left or p.right or p.deterministic)
    return _hopper(p) and not taken


def _hopper(p: Problem) -> bool:
    return p.arch // 10 == 9


def _blackwell(p: Problem) -> bool:
    return p.arch // 10 in (10, 11)


def _geforce(p: Problem) -> bool:
    return p.arch // 10 == 12


def _gqa(p: Problem) -> bool:
    return p.num_heads != p.num_kv_heads


def _dims(p: Problem) -> tuple[int, int]:
    return p.head_dim, p.head_dim_v


def _blackwell_256(p: Problem) -> bool:
    return _blackwell(p) and _dims(p) == (256, 256)


def _blackwell_dims_unknown(p: Problem) -> bool:
    return _blackwell(p) and max(_dims(p)) > 128 and _dims(p) not in ((192, 128), (256, 256))


def _hopper_dim_rounded(p: Problem) -> bool:
    """Rounding head_dim to 16, as the kernel does, and to 32, as its accumulator is laid out, differ."""
    return _hopper(p) and p.head_dim <= 128 and -(-p.head_dim // 16) % 2 == 1


_HOPPER_UNEQUAL = ((32, 64), (96, 64), (128, 64), (192, 128))


def takes_sink(p: Problem) -> bool:
    """Where the forward kernel takes a sink for each head itself."""
    return p.arch // 10 in (9, 10, 11) and not _blackwell_256(p)


# --- the rules -----------------------------------------------------------------------------------------------------

_ELSE = "choose another backend"
_NO_GRAD = "call it under torch.no_grad(), or choose another backend"


def _upgrade(version: str) -> str:
    return f'pip install -U "flash-attn-4>={version}"'


def _since(what: str, version: str, link: str = "") -> Reason:
    """A rule that an upgrade lifts."""
    return Reason(what, f"flash-attn-4 >= {version}", "an older version", _upgrade(version), link=link)


#: What the raw functions refuse, and what they get wrong, by version: read in every wheel from b3 to b36, and in the
#: issues linked. What is refused there by an assert or fails to compile is a rule as much as what is silently wrong.
ROWS = (
    Row(_any, _since("version", "4.0.0b3"), fixed="4.0.0b3"),
    Row(_not_as_first, _since("head_dim above 128, or another head_dim_v, on sm90", "4.0.0b5"), fixed="4.0.0b5"),
    Row(
        _backward_not_as_first,
        _since("backward of packed batches, windows, and other head dims than 64 and 128, on sm90", "4.0.0b5"),
        fixed="4.0.0b5", direction="backward",
    ),
    Row(lambda p: p.lse_grad, _since("the gradient of lse", "4.0.0b5"), fixed="4.0.0b5", direction="backward"),
    # --- head dims
    Row(
        _blackwell_dims_unknown,
        Reason("head_dim", "at most 128, or 192/128, or 256/256, on sm10x and sm11x", "another", _ELSE),
    ),
    Row(_blackwell_256, _since("head_dim 256 on sm10x and sm11x", "4.0.0b11"), fixed="4.0.0b11"),
    Row(
        # Seen on an H200 with b36: these work, forward and backward; 64/128, 64/96 and 128/96 do not compile or launch.
        lambda p: _hopper(p) and p.head_dim != p.head_dim_v and _dims(p) not in _HOPPER_UNEQUAL,
        Reason(
            "head_dim_v", "that of q, or one of " + ", ".join(f"{d}/{v}" for d, v in _HOPPER_UNEQUAL) + " on sm90",
            "another", "pad v, or q and k, with zeros to one of them, or choose another backend",
        ),
    ),
    Row(
        lambda p: _geforce(p) and max(_dims(p)) > 128,
        Reason("head_dim", "at most 128 on sm12x, by its shared memory", "more", _ELSE),
    ),
    Row(
        lambda p: p.head_dim % 32 != 0 or p.head_dim_v % 32 != 0,
        _since("a head_dim that is no multiple of 32, in backward", "4.0.0b30", f"{ISSUES}/issues/2492"),
        fixed="4.0.0b30", direction="backward",
    ),
    Row(
        _hopper_dim_rounded,
        Reason(
            "head_dim in backward", "a multiple of 32, or 8 less, on sm90", "another",
            "pad q and k with zeros to a multiple of 32, or choose another backend", link=f"{ISSUES}/pull/2896",
        ),
        since="4.0.0b30", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and 128 < p.head_dim <= 160,
        _since("head_dim 136 to 160 in backward on sm90", "4.0.0b30"), fixed="4.0.0b30", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and p.head_dim > 192,
        _since("head_dim above 192 in backward on sm90", "4.0.0b31", f"{ISSUES}/pull/2888"),
        fixed="4.0.0b31", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and p.head_dim > 128 and _gqa(p),
        _since("fewer kv heads with head_dim above 128, in backward on sm90", "4.0.0b31", f"{ISSUES}/pull/2888"),
        fixed="4.0.0b31", direction="backward",
    ),
    Row(
        lambda p: _hopper(p) and p.head_dim != p.head_dim_v and _gqa(p),
        Reason(
            "fewer kv heads in backward", "head_dim_v equal to head_dim on sm90", "different ones",
            "pad v with zeros to head_dim, or choose another backend",
        ),
        direction="backward",
    ),
    Row(
        lambda p: _blackwell(p) and p.head_dim != p.head_dim_v and _dims(p) != (192, 128),
        Reason(
            "head_dim_v in backward", "that of q, or 192/128, on sm10x and sm11x: dv is wrong for others", "another",
            "pad v with zeros to head_dim, or choose another backend", link=f"{ISSUES}/issues/2552",
        ),
        direction="backward",
    ),
    Row(
        # Wrong for batches of real activations in b11. No version is known to hold the fix.
        _blackwell_256,
        Reason(
            "head_dim in backward", "at most 192 on sm10x and sm11x: gradients of 256 were wrong", "256", _NO_GRAD,
            link="https://github.com/NVIDIA/TransformerEngine/issues/3216",
        ),
        direction="backward",
    ),
    Row(
        lambda p: p.arch // 10 == 11 and p.head_dim >= 128,
        _since("head_dim 128 and more in backward on sm11x", "4.0.0b15", f"{ISSUES}/pull/2590"),
        fixed="4.0.0b15", direction="backward",
    ),
    # --- features
    Row(
        lambda p: _blackwell_256(p) and (p.left or p.right),
        _since("sliding windows with head_dim 256 on sm10x and sm11x", "4.0.0b34"), fixed="4.0.0b34",
    ),
    Row(
        lambda p: _blackwell_256(p) and p.softcap,
        _since("softcap with head_dim 256 on sm10x and sm11x", "4.0.0b34"), fixed="4.0.0b34",
    ),
    Row(
        lambda p: _blackwell_256(p) and p.gaps,
        _since("rows outside every sequence with head_dim 256 on sm10x and sm11x", "4.0.0b31"), fixed="4.0.0b31",
    ),
    Row(
        lambda p: p.softcap and p.form == "packed",
        _since("softcap of packed batches in backward", "4.0.0b24", f"{ISSUES}/pull/2547"),
        fixed="4.0.0b24", direction="backward",
    ),
    Row(
        # The flag was taken, and dk and dv of a group were summed in any order all the same.
        lambda p: _hopper(p) and p.deterministic and _gqa(p),
        _since("a deterministic backward with fewer kv heads on sm90", "4.0.0b12"),
        fixed="4.0.0b12", direction="backward",
    ),
    # --- sm12x
    Row(
        _geforce,
        _since("sm12x, where older versions are silently wrong", "4.0.0b21", f"{ISSUES}/pull/2553"), fixed="4.0.0b21",
    ),
    Row(
        lambda p: _geforce(p) and p.form == "packed",
        Reason(
            "packed batches", "a GPU other than sm12x: illegal memory accesses", "sm12x", _ELSE,
            link=f"{ISSUES}/issues/2860",
        ),
    ),
)  # fmt: skip
