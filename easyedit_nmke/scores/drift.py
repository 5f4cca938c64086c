"""How far edits have moved a weight matrix from the one it was, and how alike the masks of two edits are."""

from __future__ import annotations

import torch

# Rows in float64 at once: 256 x 14336 is 29 MB.
ROWS = 256
# Entries compared as distributions; both weights are read at the same places, drawn with a seed.
SAMPLE = 2**20
# log10 of |dv|/|v|, in 28 bins of a quarter of a decade.
LOWEST, HIGHEST, BINS = -6.0, 1.0, 28


def weight_drift(before: torch.Tensor, after: torch.Tensor) -> dict:
    """What became of `before` [D, F] in `after` [D, F], column i being neuron i's value vector v_i. Computed in float64.

    "frobenius": ||after - before|| / ||before||; "row_cosine": mean cosine of a row with what it was, rows of zeros left out;
    "wasserstein": 1-D distance of the two distributions of entries, exact up to 2^20 entries and beyond that of a fixed random
    sample of 2^20; "norm_before", "norm": Frobenius norms; "histogram": {"edges": 29 numbers from -6 to 1, "counts": 28 numbers
    that sum to F} of log10 |dv_i|/|v_i|, what is beyond the edges (unchanged neurons among it) in the end bins.

    ValueError when the shapes differ, `before` is all zeros, or an entry is not finite.
    """
    if before.shape != after.shape or before.dim() != 2:
        raise ValueError(f"weights have the shapes {list(before.shape)} and {list(after.shape)}; both must be the same [D, F]")
    sums = _sums(before, after)
    old, new, change = (sums[name].sum().sqrt().item() for name in ("old", "new", "change"))
    if not (0 < old < float("inf") and new < float("inf")):
        raise ValueError(f"weights have the norms {old} before and {new} after; drift needs finite weights, at first not all 0")
    cosines = sums["product"] / (sums["old_rows"] * sums["new_rows"]).sqrt()
    return {
        "frobenius": change / old,
        "row_cosine": cosines.nanmean().item(),
        "wasserstein": _wasserstein(before, after),
        "norm_before": old,
        "norm": new,
        "histogram": _histogram(sums["change"], sums["old"]),
    }


def row_drift(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Of the rows of `before` and `after` [D, F], in float64: "cosine_mean", "cosine_std" of each with what it was (rows of zeros
    left out), "l2_mean", "l2_std" of the distance. Standard deviations are of all rows."""
    cosines, distances = [], []
    for old, new in zip(before.split(ROWS), after.split(ROWS), strict=True):
        old, new = old.to(after.device).double(), new.double()
        cosines.append((old * new).sum(1) / (old.norm(dim=1) * new.norm(dim=1)))
        distances.append((new - old).norm(dim=1))
    cosine, distance = torch.cat(cosines), torch.cat(distances)
    cosine = cosine[~cosine.isnan()]
    found = {"cosine": cosine, "l2": distance}
    return {f"{name}_{kind}": value.item() for name, of in found.items() for kind, value in (
        ("mean", of.mean()), ("std", of.std(unbiased=False)),
    )}  # fmt: skip


def mask_overlap(previous: torch.Tensor, current: torch.Tensor) -> float:
    """Jaccard overlap of two bool masks: neurons in both, of those in either (0 to 1); 1 where both are empty."""
    if previous.shape != current.shape or not previous.dtype == current.dtype == torch.bool:
        got = f"{previous.dtype} {list(previous.shape)} and {current.dtype} {list(current.shape)}"
        raise ValueError(f"masks are {got}; both must be bool and of one shape")
    current = current.to(previous.device)
    either = (previous | current).sum().item()
    return (previous & current).sum().item() / either if either else 1.0


def _sums(before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
    """Squares summed over each column ("old", "new", "change" [F]) and each row ("old_rows", "new_rows" [D]), and the product
    of each row with what it was ("product" [D]); a few rows in float64 at a time."""
    columns = {name: torch.zeros(before.shape[1], dtype=torch.float64, device=after.device) for name in ("old", "new", "change")}
    rows = {name: [] for name in ("old_rows", "new_rows", "product")}
    for old, new in zip(before.split(ROWS), after.split(ROWS), strict=True):
        old, new = old.to(after.device).double(), new.double()
        for name, block in (("old", old), ("new", new), ("change", new - old)):
            columns[name] += block.square().sum(0)
        for name, block in (("old_rows", old * old), ("new_rows", new * new), ("product", old * new)):
            rows[name].append(block.sum(1))
    return columns | {name: torch.cat(blocks) for name, blocks in rows.items()}


def _wasserstein(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean distance between the entries in order of size."""
    width = before.shape[1]
    if before.numel() > SAMPLE:
        places = torch.randint(before.numel(), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        before, after = (w[(places // width).to(w.device), (places % width).to(w.device)] for w in (before, after))
    old, new = (w.to(after.device).double().flatten().sort().values for w in (before, after))
    return (new - old).abs().mean().item()


def _histogram(change: torch.Tensor, old: torch.Tensor) -> dict[str, list]:
    """Of log10 sqrt(change/old), for squared norms [F]."""
    edges = torch.linspace(LOWEST, HIGHEST, BINS + 1, dtype=torch.float64)
    ratio = torch.where(change == 0, 0, change / old).sqrt().cpu()  # a neuron without a value, unchanged, would be 0/0
    counts = torch.histogram(ratio.log10().clamp(LOWEST, HIGHEST), edges).hist
    return {"edges": edges.tolist(), "counts": counts.long().tolist()}
