"""What FlashAttention 2 refuses or gets wrong, by problem, GPU and version: the rows of the declaration in ``fa2``."""

from __future__ import annotations

from anyattn._capability import Reason, Row
from anyattn._problem import Problem

INSTALL = "pip install -U flash-attn --no-build-isolation"

_ISSUES = "https://github.com/Dao-AILab/flash-attention"
_SOURCE = "https://github.com/Dao-AILab/flash-attention/blob"


# --- which problems a rule speaks of -------------------------------------------------------------------------------


def _past_the_keys(p: Problem) -> bool:
    """A window that is not causal, in a dense batch with more queries than keys."""
    return (p.left or p.right) and not p.causal and p.form == "dense" and p.relation == "any"


def _sequences_without(p: Problem) -> bool:
    """Sequences with keys and no queries, or the other way round; a gap is two of those."""
    return p.form == "packed" and (p.gaps or p.relation != "equal")


def _above_192(p: Problem) -> bool:
    return max(p.head_dim, p.head_dim_v) > 192


def _small_gpu(p: Problem) -> bool:
    """Neither of those that the C++ code of old versions asks for."""
    return p.arch not in (80, 90)


def _little_memory(p: Problem) -> bool:
    """Less than 144 KB of shared memory per block."""
    return p.arch in (86, 89) or p.arch // 10 == 12


# --- the rules -----------------------------------------------------------------------------------------------------

_ELSE = "choose another backend"


def _since(what: str, version: str, link: str = "") -> Reason:
    """A rule that an upgrade lifts."""
    remedy = f'pip install -U "flash-attn>={version}" --no-build-isolation'
    return Reason(what, f"flash-attn >= {version}", "an older version", remedy, link=link)


def _lacking(argument: str) -> Reason:
    return Reason(argument, f"raw functions that take {argument}", "a build whose do not", INSTALL)


ROWS = (
    Row(lambda p: True, _since("version", "2.3.0"), fixed="2.3.0"),
    Row(
        # Wheels: the first that were compiled for these GPUs. A build from source may know them from 2.7.3 on.
        lambda p: p.arch // 10 in (10, 12),
        _since("sm10x and sm12x", "2.8.0", f"{_ISSUES}/pull/1436"), fixed="2.8.0",
    ),
    Row(
        # Seen to be wrong on an H200, with torch's own copy of the kernel. Packed, ``fa2`` avoids it.
        _past_the_keys,
        Reason(
            "sliding windows", "causal, or not more queries than keys, or packed batches", "more queries than keys",
            "add a bound on the right by causal=True, or choose another backend",
            link=f"{_SOURCE}/v2.8.3/csrc/flash_attn/flash_api.cpp#L141",
        ),
    ),
    Row(
        _sequences_without,
        _since(
            "sequences without keys, or without queries, whose results were not written", "2.3.4",
            f"{_ISSUES}/commit/db2f80692cbe2b4e8fcf149b5b45e863f6b70c58",
        ),
        fixed="2.3.4",
    ),
    Row(
        lambda p: p.softcap and p.dropout,
        Reason("softcap with dropout", "either alone", "both", _ELSE),
    ),
    # --- backward of large head dims
    Row(
        lambda p: _above_192(p) and _small_gpu(p),
        _since("head_dim above 192 in backward on another GPU than sm80 and sm90", "2.5.5"),
        fixed="2.5.5", direction="backward",
    ),
    Row(
        lambda p: 192 < max(p.head_dim, p.head_dim_v) <= 224 and _small_gpu(p),
        _since("head_dim 200 to 224 in backward on another GPU than sm80 and sm90", "2.6.2"),
        since="2.5.5", fixed="2.6.2", direction="backward",
    ),
    Row(
        # From 2.7.3 on nothing checks this, and no kernel is launched: flash_bwd_launch_template.h:300 of 2.8.3.
        lambda p: _above_192(p) and p.dropout and _little_memory(p),
        Reason(
            "dropout with head_dim above 192, in backward", "a GPU with 144 KB of shared memory: sm80, sm90, sm10x",
            "less", _ELSE, link=f"{_SOURCE}/v2.8.3/csrc/flash_attn/src/flash_bwd_launch_template.h#L300",
        ),
        direction="backward",
    ),
    # --- builds whose signatures are not those of their version
    Row(lambda p: p.softcap, _lacking("softcap"), since="2.6.0", flag="no_softcap"),
    Row(lambda p: p.alibi is not None, _lacking("alibi_slopes"), since="2.4.0", flag="no_alibi_slopes"),
    Row(lambda p: p.deterministic, _lacking("deterministic"), since="2.4.1", flag="no_deterministic",
        direction="backward"),
)  # fmt: skip
