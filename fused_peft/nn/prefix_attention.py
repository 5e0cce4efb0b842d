"""Attention modules that hold a prefix of their own, for models that are not transformers'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_peft import ops
from fused_peft.ops._prefix_attention import check_operands

from .adapter_spec import check_rank
from .attention_masks import as_key_mask, both, check_mask_dtype, in_4_dimensions, shown
from .plain_attention import plain_attention

_INITS = ("random", "zero")


class PrefixAttention(nn.Module):
    """``scaled_dot_product_attention`` with a prefix; Li and Liang, "Prefix-Tuning", 2021.

    ``softmax([q prefix_k^T, mask(q k^T)] scale) [prefix_v; v]``: stands where a module calls
    :func:`torch.nn.functional.scaled_dot_product_attention` and takes the same arguments. Every
    query sees the whole prefix, whatever the mask. A causal or a padding mask runs
    :func:`fused_peft.prefix_attention`; another mask runs plain torch over the prefix and the keys
    joined.

    Attributes:
        prefix_k: parameter ``[num_heads, num_virtual_tokens, head_dim]``.
        prefix_v: as prefix_k.

    Args:
        num_heads: key/value heads.
        head_dim: of keys and values.
        num_virtual_tokens: length of the prefix, at least 1.
        init: "random" draws from N(0, 1), "zero" gives zeros.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        TypeError, ValueError: a size is no int >= 1, or init is unknown.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_virtual_tokens: int,
        *,
        init: str = "random",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = check_rank("num_heads", num_heads)
        self.head_dim = check_rank("head_dim", head_dim)
        self.num_virtual_tokens = check_rank("num_virtual_tokens", num_virtual_tokens)
        if init not in _INITS:
            raise ValueError(f"init is {init!r}; expected one of {', '.join(_INITS)}")
        make = torch.randn if init == "random" else torch.zeros
        shape = (num_heads, num_virtual_tokens, head_dim)
        self.prefix_k = nn.Parameter(make(shape, dtype=dtype, device=device))
        self.prefix_v = nn.Parameter(make(shape, dtype=dtype, device=device))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention over the prefix and the keys.

        Args:
            query: ``[B, Hq, S, D]``.
            key: ``[B, num_heads, T, D]``.
            value: ``[B, num_heads, T, D]``.
            attn_mask: bool, True where a key is seen, or floating point, added to the scores;
                broadcasts to ``[B, Hq, S, T]``; without the prefix.
            dropout_p: probability that an attention weight is dropped.
            is_causal: query ``i`` sees keys ``t <= i``.
            scale: factor on the scores; ``D ** -0.5`` by default.
            enable_gqa: allow Hq to be a multiple of num_heads.

        Returns:
            ``[B, Hq, S, D]`` in query's dtype.

        Raises:
            ValueError: both attn_mask and is_causal are given, Hq differs from num_heads without
                enable_gqa, or a shape does not fit; the message names it.
        """
        if attn_mask is not None and is_causal:
            raise ValueError("attn_mask and is_causal are both given; expected one of them")
        if query.dim() == 4 and query.shape[1] != self.num_heads and not enable_gqa:
            raise ValueError(
                f"query has {query.shape[1]} heads; expected {self.num_heads}, or enable_gqa=True"
            )
        if attn_mask is not None:
            attn_mask = in_4_dimensions(attn_mask, query, key)
        key_mask = as_key_mask(attn_mask, query, key)
        if key_mask is not None:
            attn_mask = None
        return self.attend(
            query,
            key,
            value,
            mask=attn_mask,
            key_mask=key_mask,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
        )[0]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`forward`, with a padding mask of its own and with the weights if wanted.

        Args:
            query: as in forward, like key, value, dropout_p and scale.
            key: see query.
            value: see query.
            mask: as attn_mask in forward; not together with is_causal.
            key_mask: bool ``[B, T]``, False at padding.
            is_causal: query ``i`` sees keys ``t <= i``.
            dropout_p: see query.
            scale: see query.
            need_weights: return the weights, from plain torch.

        Returns:
            The output and, if wanted, the weights ``[B, Hq, S, P + T]``, prefix first.
        """
        prefix_k, prefix_v = self.prefix_k.to(query.dtype), self.prefix_v.to(query.dtype)
        if mask is None and not need_weights:
            start = None
            if is_causal and query.shape[2] != key.shape[2]:  # torch's causal mask is top-left
                start = torch.zeros((), dtype=torch.int64, device=query.device)
            out = ops.prefix_attention(
                query,
                key,
                value,
                prefix_k,
                prefix_v,
                causal=is_causal,
                scale=scale,
                key_mask=key_mask,
                query_start=start,
                dropout_p=dropout_p,
                seed=ops.new_seed(query.device) if dropout_p > 0.0 else None,
            )
            return out, None
        check_operands(query, key, value, prefix_k, prefix_v, key_mask=key_mask)
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        if is_causal:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
        mask = both(mask, key_mask)
        if mask is not None:
            seen = True if mask.dtype == torch.bool else 0.0
            mask = mask.expand(*mask.shape[:-1], keys)
            mask = F.pad(mask, (self.num_virtual_tokens, 0), value=seen)
        key = torch.cat((prefix_k.expand(batch, -1, -1, -1), key), dim=2)
        value = torch.cat((prefix_v.expand(batch, -1, -1, -1), value), dim=2)
        return plain_attention(
            query,
            key,
            value,
            mask,
            dropout=dropout_p,
            scale=scale,
            weights_wanted=need_weights,
        )

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.num_heads}, {self.head_dim}, num_virtual_tokens={self.num_virtual_tokens}"


class PrefixMultiheadAttention(nn.Module):
    """An :class:`torch.nn.MultiheadAttention` with a trainable prefix and frozen weights.

    Made by :meth:`from_multihead_attention`; parameters, state-dict keys and arguments are those of
    the module it stands for, plus ``prefix``. Padding and causal masks without weights run
    :func:`fused_peft.prefix_attention`.

    Attributes:
        prefix: the :class:`PrefixAttention`, whose parameters are the trainable ones.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    prefix: PrefixAttention

    def __init__(self, mha: nn.MultiheadAttention, prefix: PrefixAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = mha.embed_dim, mha.kdim, mha.vdim
        self.num_heads, self.head_dim = mha.num_heads, mha.head_dim
        self.batch_first, self.dropout = mha.batch_first, mha.dropout
        # nn.TransformerEncoderLayer's inference fast path takes in_proj_weight past this forward,
        # and so past the prefix, unless this says that there is none.
        self._qkv_same_embed_dim = False
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(name, getattr(mha, name))
        self.register_parameter("in_proj_bias", mha.in_proj_bias)
        self.out_proj = mha.out_proj
        self.requires_grad_(False)
        self.prefix = prefix
        self.train(mha.training)

    @classmethod
    def from_multihead_attention(
        cls, mha: nn.MultiheadAttention, num_virtual_tokens: int, *, init: str = "random"
    ) -> PrefixMultiheadAttention:
        """Stand in for ``mha``, sharing its weights, which get frozen.

        Args:
            mha: with ``batch_first`` True or False.
            num_virtual_tokens: length of the prefix, at least 1.
            init: "random" draws the prefix from N(0, 1), "zero" gives zeros.

        Raises:
            TypeError: mha is something else. ValueError: it has ``add_bias_kv`` or
                ``add_zero_attn``, or a number does not fit. Nothing is changed then.
        """
        if type(mha) is not nn.MultiheadAttention:
            raise TypeError(f"mha is a {type(mha).__name__}; expected torch.nn.MultiheadAttention")
        if mha.bias_k is not None or mha.add_zero_attn:
            which = "add_bias_kv" if mha.bias_k is not None else "add_zero_attn"
            raise ValueError(f"mha has {which}=True; expected False, a prefix takes its place")
        weight = mha.out_proj.weight
        prefix = PrefixAttention(
            mha.num_heads,
            mha.head_dim,
            num_virtual_tokens,
            init=init,
            dtype=weight.dtype,
            device=weight.device,
        )
        return cls(mha, prefix)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`, with the prefix.

        Args:
            query: ``[B, S, E]`` if batch_first, else ``[S, B, E]``; ``[S, E]`` unbatched.
            key: ``[B, T, kdim]``, laid out as query.
            value: ``[B, T, vdim]``.
            key_padding_mask: ``[B, T]``, bool with True at padding, or added to the scores.
            need_weights: also return the weights; without is faster.
            attn_mask: ``[S, T]`` or ``[B * heads, S, T]``, bool with True where a key is hidden, or
                added to the scores.
            average_attn_weights: average the weights over heads.
            is_causal: query ``i`` sees keys ``t <= i``; attn_mask then is taken to say just that
                and not looked at. It may be None.

        Returns:
            The output, like query, and the weights ``[B, S, P + T]``, or ``[B, heads, S, P + T]``
            if not averaged, prefix first; None without need_weights.

        Raises:
            ValueError: a shape does not fit; the message names it.
        """
        batched = query.dim() == 3
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} "
                "dimensions; expected 3, or 2 without a batch"
            )
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value)
        mask = None if is_causal else shown(attn_mask, q.shape, k.shape[2], q.dtype)
        key_mask = None
        if key_padding_mask is not None:
            expected = (k.shape[0], k.shape[2])
            if tuple(key_padding_mask.shape) != expected:
                raise ValueError(
                    f"key_padding_mask has shape {tuple(key_padding_mask.shape)}; expected "
                    f"{expected}"
                )
            check_mask_dtype("key_padding_mask", key_padding_mask)
            if key_padding_mask.dtype == torch.bool:
                key_mask = ~key_padding_mask
            else:
                mask = both(mask, None, key_padding_mask[:, None, None, :].to(q.dtype))
                if is_causal:
                    tril = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
                    mask, is_causal = both(tril.tril(), None, mask), False
        out, weights = self.prefix.attend(
            q,
            k,
            v,
            mask=mask,
            key_mask=key_mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections, each ``[B, heads, length, head_dim]``."""
        if self.in_proj_weight is not None:
            weights = list(self.in_proj_weight.chunk(3))
        else:
            weights = [self._parameters[f"{name}_proj_weight"] for name in "qkv"]  # type: ignore[misc]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        projected = [
            F.linear(x, weight, bias)
            .view(*x.shape[:2], self.num_heads, self.head_dim)
            .transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        return projected[0], projected[1], projected[2]
