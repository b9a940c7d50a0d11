"""ResMLP (Touvron et al. 2021): an image network of linear layers only, alternately across patches and across channels.

Needs torch and ``shared/networks/vit_parts.py`` only, so the two files can be lifted out alone. Modules and parameters
have the names of the official code: released checkpoints load strictly.

    network = resmlp_24()
    network(torch.randn(8, 3, 224, 224))                    # logits, (8, 1000)
    network.forward_features(torch.randn(8, 3, 224, 224))   # mean of the patches, (8, 384)

B images, N patches per image, D channels per patch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.networks.vit_parts import DropPath, Mlp, PatchEmbed, init_linear


class Affine(nn.Module):
    """Element-wise ``alpha * x + beta`` (eq. 1): what is left of a normalisation without any statistics."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return torch.addcmul(self.beta, self.alpha, x)


class CrossPatchLinear(nn.Linear):
    """One linear layer across the patches, the same for every channel: the matrix A of eq. 2, with a bias.

    The official code transposes patches and channels around a linear layer; multiplying from the left, with the bias in
    the same call, takes half of the time.
    """

    def __init__(self, num_patches: int):
        super().__init__(num_patches, num_patches)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return torch.baddbmm(self.bias[:, None], self.weight.expand(x.shape[0], -1, -1), x)


class Block(nn.Module):
    """A ResMLP layer (eq. 2 and 3): patches communicate, then channels, each on a residual branch.

    The affine layer behind each branch, whose beta the paper leaves out, is the LayerScale vector ``gamma``.

    Args:
        dim: Channels D.
        num_patches: Patches N.
        layer_scale: Initial value of both gammas.
        drop: Dropout inside the MLP.
        drop_path: Probability of leaving out a branch.
    """

    def __init__(self, dim: int, num_patches: int, layer_scale: float, drop: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = Affine(dim)
        self.attn = CrossPatchLinear(num_patches)  # the official name: it stands where attention does in a ViT
        self.drop_path = DropPath(drop_path)
        self.norm2 = Affine(dim)
        self.mlp = Mlp(dim, 4 * dim, drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = torch.addcmul(x, self.gamma_1, self.drop_path(self.attn(self.norm1(x))))
        return torch.addcmul(x, self.gamma_2, self.drop_path(self.mlp(self.norm2(x))))


class ResMLP(nn.Module):
    """Patch embedding, blocks, a last affine layer, the mean over patches, a linear classifier (section 2).

    There is no class token and no position embedding: the cross-patch matrices know every patch by its place. For the
    same reason a network takes images of one size only; :func:`resize_cross_patch_layers` makes it fit another one.

    Args:
        img_size: Side of the square images in pixels.
        patch_size: Side of a patch in pixels; divides ``img_size``.
        in_chans: Channels of the images.
        num_classes: Outputs; 0 for the features, (B, D).
        embed_dim: Channels D.
        depth: Number of blocks.
        drop_rate: Dropout in the MLPs.
        drop_path_rate: Stochastic depth, the same for every block.
        init_scale: Initial LayerScale; smaller for deeper networks.

    Raises:
        ValueError: If the patches do not fill the image.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_scale: float = 1e-4,
    ):
        super().__init__()
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ValueError(f"patches of {patch_size} pixels do not fill an image of {img_size} pixels")
        self.img_size, self.patch_size = img_size, patch_size
        self.grid = img_size // patch_size  # patches per side
        self.embed_dim = self.num_features = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.blocks = nn.ModuleList(
            [Block(embed_dim, self.grid**2, init_scale, drop_rate, drop_path_rate) for _ in range(depth)]
        )
        self.norm = Affine(embed_dim)
        self.head = nn.Identity()
        self.reset_classifier(num_classes)
        self.blocks.apply(init_linear)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a new one; 0: by none."""
        self.num_classes = num_classes
        device = self.norm.alpha.device
        self.head = nn.Linear(self.embed_dim, num_classes, device=device) if num_classes > 0 else nn.Identity()
        init_linear(self.head)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, img_size, img_size) -> (B, D), the mean of the patches.

        Raises:
            ValueError: For images of another size.
        """
        if tuple(images.shape[-2:]) != (self.img_size, self.img_size):
            height, width = images.shape[-2:]
            raise ValueError(
                f"images of {height}x{width} pixels do not fit a network for {self.img_size}x{self.img_size}: its "
                f"cross-patch layers mix exactly {self.grid**2} patches"
            )
        x = self.patch_embed(images).contiguous()
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, img_size, img_size) -> logits (B, num_classes), or features (B, D) without a classifier."""
        return self.head(self.forward_features(images))


# LayerScale starts smaller in deeper networks, and in wider ones
def resmlp_12(**options) -> ResMLP:
    """ResMLP-S12: 15.4 million parameters, 3.0 GFLOP at 224 pixels."""
    return ResMLP(**{"patch_size": 16, "embed_dim": 384, "depth": 12, "init_scale": 0.1, **options})


def resmlp_24(**options) -> ResMLP:
    """ResMLP-S24: 30.0 million parameters, 6.0 GFLOP at 224 pixels."""
    return ResMLP(**{"patch_size": 16, "embed_dim": 384, "depth": 24, "init_scale": 1e-5, **options})


def resmlp_36(**options) -> ResMLP:
    """ResMLP-S36: 44.7 million parameters, 8.9 GFLOP at 224 pixels."""
    return ResMLP(**{"patch_size": 16, "embed_dim": 384, "depth": 36, "init_scale": 1e-6, **options})


def resmlpB_24(**options) -> ResMLP:  # the official name
    """ResMLP-B24/8: 129.1 million parameters, 100.2 GFLOP at 224 pixels. ``patch_size=16`` makes it B24/16."""
    return ResMLP(**{"patch_size": 8, "embed_dim": 768, "depth": 24, "init_scale": 1e-6, **options})


ARCHITECTURES = {"resmlp_12": resmlp_12, "resmlp_24": resmlp_24, "resmlp_36": resmlp_36, "resmlpB_24": resmlpB_24}


def resize_cross_patch_layers(state_dict: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """A state dict for images with ``grid`` x ``grid`` patches, as position embeddings are resized in a ViT.

    Each cross-patch matrix maps a grid of patches to a grid of patches; it is interpolated (bicubic) over both, and
    scaled so that a patch still receives the same total weight. The published code has nothing of the kind.

    Args:
        state_dict: Of a :class:`ResMLP`; not changed.
        grid: New number of patches per side.
    """
    resized = dict(state_dict)
    for name, weight in state_dict.items():
        old = round(len(weight) ** 0.5) if name.endswith(".attn.weight") else grid
        if old == grid:
            continue
        rows = _resize(weight, old, grid) * (old / grid) ** 2  # over the patches that are read: (N, N) -> (N, N')
        resized[name] = _resize(rows.t(), old, grid).t().contiguous()  # over those that are written
        bias = name.replace("weight", "bias")
        resized[bias] = _resize(state_dict[bias][None], old, grid)[0]
    return resized


def _resize(maps: Tensor, old: int, new: int) -> Tensor:
    """Maps over a grid, (M, old * old) -> (M, new * new)."""
    maps = maps.reshape(-1, 1, old, old)
    maps = F.interpolate(maps, size=(new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return maps.flatten(1)
