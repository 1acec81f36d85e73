"""Hist2ST and IGI-DL in plain torch, with the layers and sizes of `stimage_sd.baselines.networks`.

The number of parameters is compared with ours in `benchmarks.gpu_rows`. Torch's LSTM has a second bias per gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

HEAD_WIDTH, GRAPH_LAYERS, N_FEATURES = 64, 4, 18


class Mixer(nn.Module):
    """Two depthwise convolutions that add to their input, then one that mixes channels."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, pictures: Any) -> Any:
        """Run the block."""
        inner = pictures
        for convolution, norm in zip(self.depthwise, self.norms, strict=False):
            inner = functional.gelu(norm(convolution(inner)))
        return self.norms[2](functional.gelu(self.pointwise(inner + pictures)))


class SpotBlock(nn.Module):
    """Attention between the spots of a section, then two layers per spot."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.packed = nn.Linear(width, 3 * heads * HEAD_WIDTH, bias=False)
        self.project = nn.Linear(heads * HEAD_WIDTH, width)
        self.expand, self.contract = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Any) -> Any:
        """Run the block on ``(n_spots, width)``."""
        packed = self.packed(self.norms[0](tokens)).reshape(len(tokens), 3, self.heads, HEAD_WIDTH)
        queries, keys, values = packed.permute(1, 2, 0, 3)[:, None]
        attended = functional.scaled_dot_product_attention(queries, keys, values)
        tokens = tokens + self.dropout(self.project(attended[0].permute(1, 0, 2).reshape(len(tokens), -1)))
        hidden = self.dropout(functional.gelu(self.expand(self.norms[1](tokens))))
        return tokens + self.dropout(self.contract(hidden))


class Hist2ST(nn.Module):
    """Convolutions per spot, attention between spots, a neighbor graph, and heads."""

    def __init__(
        self, n_genes: int, *, patch_px: int, channels: int, depths: tuple[int, int, int], heads: int, dropout: float
    ) -> None:
        super().__init__()
        width = (patch_px // 7) ** 2 * (channels // 8)
        self.patch = nn.Conv2d(3, channels, 7, 7)
        self.column, self.row = nn.Embedding(64, width), nn.Embedding(64, width)
        self.dropout = nn.Dropout(dropout)
        self.mixers = nn.Sequential(*(Mixer(channels, 5) for _ in range(depths[0])))
        self.reduce = nn.Conv2d(channels, channels // 8, 1)
        self.blocks = nn.Sequential(*(SpotBlock(width, heads, dropout) for _ in range(depths[1])))
        self.graph = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(depths[2]))
        self.over_layers = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.before_genes, self.genes = nn.LayerNorm(width), nn.Linear(width, n_genes)
        self.count_heads = nn.ModuleList(nn.Linear(width, n_genes) for _ in range(3))
        self.confidence = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, pixels: Any, places: Any, graph: Any) -> tuple[Any, ...]:
        """Return log expression, mean, dispersion and dropout of counts, and the confidence."""
        pictures = self.reduce(self.mixers(self.dropout(self.patch(pixels))))
        tokens = pictures.permute(0, 2, 3, 1).reshape(len(pixels), -1)
        tokens = self.blocks(tokens + self.column(places[:, 0].clamp(0, 63)) + self.row(places[:, 1].clamp(0, 63)))
        layers = []
        for layer in self.graph:
            mapped = functional.relu(layer(torch.cat([tokens, graph @ tokens], dim=-1)))
            tokens = mapped / mapped.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            layers.append(tokens)
        tokens = self.over_layers(torch.stack(layers, dim=1))[0].mean(dim=1)
        mean, dispersion, extra = (head(tokens) for head in self.count_heads)
        return (
            self.genes(self.before_genes(tokens)),
            mean.clamp_max(15.0).exp().clamp(1e-5, 1e6),
            functional.softplus(dispersion).clamp(1e-4, 1e4),
            extra.sigmoid(),
            self.confidence(tokens),
        )


def hist2st_loss(network: Any, batch: dict[str, Any], *, copies: int, zinb: float, distillation: float) -> Any:
    """Squared error, zero-inflated negative binomial, and agreement with augmented copies."""
    expression, mean, r, extra, _ = network(batch["pixels"], batch["places"], batch["graph"])
    counts, eps = batch["counts"], 1e-10
    log_ratio = (r + eps).log() - (r + mean + eps).log()
    gammas = torch.lgamma(counts + r + eps) - torch.lgamma(counts + 1) - torch.lgamma(r + eps)
    log_nb = gammas + r * log_ratio + counts * ((mean + eps).log() - (r + mean + eps).log())
    at_zero = (extra + (1 - extra) * (r * log_ratio).exp() + eps).log()
    log_prob = torch.where(counts < 0.5, at_zero, (1 - extra + eps).log() + log_nb)
    made = [
        network(torch.rot90(batch["pixels"], turns % 4, dims=(2, 3)), batch["places"], batch["graph"])
        for turns in range(copies)
    ]
    weights = torch.softmax(torch.stack([one[4] for one in made]), dim=0)
    together = (torch.stack([one[0] for one in made]) * weights).sum(dim=0)
    loss = (expression - batch["target"]).square().mean() - zinb * log_prob.mean()
    return loss + distillation * (together - expression).square().mean()


class GraphIsomorphism(nn.Module):
    """Two linear maps of the sum of a node and its neighbors, and batch normalization over the nodes that exist."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(before, after), nn.Linear(after, after), nn.BatchNorm1d(after)

    def forward(self, nodes: Any, present: Any, edges: Any) -> Any:
        """Run the layer on ``(n_graphs, n_nodes, before)``."""
        mapped = self.outer(functional.relu(self.inner(nodes + edges.to(nodes.dtype) @ nodes)))
        result = torch.zeros_like(mapped)
        result[present] = functional.relu(self.norm(mapped[present]))
        return result


class IGIDL(nn.Module):
    """ResNet-18 on a tile, a graph isomorphism network on its nuclei, and layers that join both."""

    def __init__(self, n_genes: int, *, graph_width: int, fusion: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        import torchvision

        self.picture = torchvision.models.resnet18(weights=None)
        self.picture.fc = nn.Identity()
        self.picture_norm = nn.BatchNorm1d(512)
        lengths = [N_FEATURES, *[graph_width] * (GRAPH_LAYERS - 1)]
        self.layers = nn.ModuleList(GraphIsomorphism(before, graph_width) for before in lengths)
        self.pooled = nn.Sequential(
            nn.Linear(2 * graph_width, graph_width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(graph_width, graph_width // 2), nn.BatchNorm1d(graph_width // 2),
        )  # fmt: skip
        joined: list[Any] = []
        for before, after in zip([512 + graph_width // 2, *fusion], fusion, strict=False):
            joined += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(), nn.Dropout(dropout)]
        self.joined = nn.Sequential(*joined, nn.Linear(fusion[-1], n_genes))

    def forward(self, pixels: Any, nodes: Any, present: Any, edges: Any) -> Any:
        """Predict log expression of tiles."""
        n_nodes = present.sum(dim=1, keepdim=True).clamp_min(1)
        together: Any = 0.0
        for layer in self.layers:
            nodes = layer(nodes, present, edges)
            together = together + torch.cat([nodes.amax(dim=1), nodes.sum(dim=1) / n_nodes], dim=-1)
        seen = self.picture_norm(self.picture(2 * pixels - 1))
        return self.joined(torch.cat([seen, self.pooled(together)], dim=-1))
