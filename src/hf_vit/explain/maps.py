"""Maps over an image from attention probabilities and tokens, as pure functions.

Shapes: B images, K heads, N tokens (prefix tokens, then h*w patches row by row), D width of a token.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from hf_vit.explain.attentions import TokenGrid


def roll_out(rollout: torch.Tensor | None, attention: torch.Tensor) -> torch.Tensor:
    """Return the rollout after one more block: (1/2 mean over heads + 1/2 identity) times the rollout before it.

    Args:
        rollout: (B, N, N) of the blocks below; None below the first.
        attention: (B, K, N, N).

    Returns:
        (B, N, N) float32; row i is the share of each token of the first block in token i; rows sum to one.

    Source: the paper's appendix D.7, after "Quantifying Attention Flow in Transformers" (arXiv:2005.00928).
    """
    mixing = attention.float().mean(dim=1)  # (B, N, N)
    mixing = (mixing + torch.eye(mixing.shape[-1], device=mixing.device)) / 2  # the residual connection
    mixing = mixing / mixing.sum(dim=-1, keepdim=True)
    return mixing if rollout is None else mixing @ rollout


def attention_rollout(attentions: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the rollout (B, N, N) over all blocks, first block first; see `roll_out`.

    Raises:
        ValueError: If there is no block.
    """
    rollout = None
    for attention in attentions:
        rollout = roll_out(rollout, attention)
    if rollout is None:
        raise ValueError("no attentions: call the model with output_attentions=True")
    return rollout


def attention_distance(attention: torch.Tensor, tokens: TokenGrid) -> torch.Tensor:
    """Return the mean distance in pixels between a patch and the patches it attends to, (B, K).

    Distances are between the centres of patches, weighted by the attention among patches (prefix tokens are left out,
    the rest is normalised) and averaged over the query patches. Source: the paper's figure 7, right.
    """
    rows = torch.arange(tokens.size[0], device=attention.device).float() * tokens.patch[0]
    columns = torch.arange(tokens.size[1], device=attention.device).float() * tokens.patch[1]
    centres = torch.cartesian_prod(rows, columns).reshape(-1, 2)  # (h*w, 2)
    distances = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")  # (h*w, h*w)
    first = tokens.num_prefix_tokens
    among = attention[:, :, first:, first:].float()  # (B, K, h*w, h*w)
    seen = (among * distances).sum(dim=-1) / among.sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return seen.mean(dim=-1)


def uniform_distance(tokens: TokenGrid) -> float:
    """Return the attention distance of uniform attention, in pixels: the baseline of `attention_distance`."""
    attention = torch.full((1, 1, tokens.num_tokens, tokens.num_tokens), 1 / tokens.num_tokens)
    return float(attention_distance(attention, tokens))


def principal_components(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `count` principal directions (count, D) of (n, D), and the share of variance of each.

    The largest entry of each direction is positive. Directions beyond the rank are zero.
    """
    centred = rows.detach().float().cpu() - rows.detach().float().cpu().mean(dim=0)
    _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
    variances = singular.square()
    kept = min(count, len(directions))
    found = directions.new_zeros(count, rows.shape[1])
    shares = directions.new_zeros(count)
    if variances.sum() > 0:
        largest = directions[:kept].abs().argmax(dim=1, keepdim=True)
        found[:kept] = directions[:kept] * directions[:kept].gather(1, largest).sign()
        shares[:kept] = variances[:kept] / variances.sum()
    return found, shares


def token_colors(hidden_states: torch.Tensor, tokens: TokenGrid) -> torch.Tensor:
    """Return the patches as colours, (h, w, 3) in 0...1: their first three principal components as red, green, blue.

    Patches of similar colour have similar tokens.

    Args:
        hidden_states: (N, D) of one image.
    """
    patches = hidden_states[tokens.num_prefix_tokens :].float().cpu()  # (h*w, D)
    directions, _ = principal_components(patches, 3)
    values = (patches - patches.mean(dim=0)) @ directions.T  # (h*w, 3)
    return stretch(values, dim=0).unflatten(0, tokens.size)


def stretch(values: torch.Tensor, *, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the values shifted and scaled to 0...1 (over `dim`, or over all); zeros where they are all equal."""
    over = tuple(range(values.ndim)) if dim is None else dim
    low, high = values.amin(dim=over, keepdim=True), values.amax(dim=over, keepdim=True)
    span = high - low
    return torch.where(span > 0, (values - low) / span.clamp(min=torch.finfo(values.dtype).tiny), 0.0)


def join_patches(attention: torch.Tensor, tokens: TokenGrid, join: int) -> tuple[torch.Tensor, TokenGrid]:
    """Return the attention (K, M, M) among squares of `join` x `join` patches, and their grid; prefix tokens stay.

    The attention of a square is the mean over its patches, the attention to it their sum: rows still sum to one.
    Squares at the right and at the bottom may hold fewer patches.
    """
    rows, columns = (-(-side // join) for side in tokens.size)
    joined = TokenGrid((rows, columns), (tokens.patch[0] * join, tokens.patch[1] * join), tokens.num_prefix_tokens)
    if join == 1:
        return attention, joined
    members = joining_matrix(tokens, join).to(attention)  # (N, M)
    return (members / members.sum(dim=0)).T @ attention @ members, joined


def joining_matrix(tokens: TokenGrid, join: int) -> torch.Tensor:
    """Return (N, M), 1 where a token belongs to a square of `join_patches`."""
    rows, columns = torch.arange(tokens.size[0]) // join, torch.arange(tokens.size[1]) // join
    squares = rows[:, None] * -(-tokens.size[1] // join) + columns + tokens.num_prefix_tokens
    places = torch.cat([torch.arange(tokens.num_prefix_tokens), squares.flatten()])
    return F.one_hot(places).float()


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Spearman's correlation of two maps of one shape, -1...1; ties share their mean rank, 0 for a flat map."""
    first, second = (_ranks(values.flatten().double()) for values in (a, b))
    first, second = first - first.mean(), second - second.mean()
    norm = float(first.norm() * second.norm())
    return float(first @ second) / norm if norm > 0 else 0.0


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, inverse, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]
