"""An exported model of ours as an expert: its post-projector pixel map.

Place in the flow: `configs/experts/ours.yaml` names `ours` below, with the `export` folder of a larger run. An image
span sees nothing but itself, so its features do not depend on any text: a photo of 128 x 128 through a model with
patches of 16, stride 4 and mask_dim 128 gives [128, 32, 32].
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from pixel_sail.experts.expert import Recipe
from pixel_sail.experts.preprocess import PatchMultiple, Preprocessing
from pixel_sail.experts.weights import file_hashes
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.patches import PIXEL_MEAN, PIXEL_STD
from pixel_sail.model.processing_pixel_sail import image_positions
from pixel_sail.model.speed import Speed
from pixel_sail.types import DataError


class PixelMap(nn.Module):
    """The model's pixel features of pictures alone."""

    def __init__(self, model: PixelSailForSegmentation) -> None:
        super().__init__()
        self.model = model
        # The map itself is wanted, not its product with a query.
        model.use(Speed(mask_head="maps"))

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the pixel features [B, E, Y, X] of normalised pictures whose sides are multiples of the patch size."""
        config, device = self.model.config, pixels_B3HW.device
        size, num_images = config.patch_size, len(pixels_B3HW)
        rows, columns = (side // size for side in pixels_B3HW.shape[2:])
        tiles = pixels_B3HW.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
        num_patches = rows * columns
        one_span = [config.token_id("<vision>")]
        one_span += [config.token_id("<vpatch>")] * num_patches + [config.token_id("</vision>")]
        ids_BT = torch.tensor(one_span, device=device).expand(num_images, -1)
        patch_index_BT = torch.full_like(ids_BT, -1)
        patch_index_BT[:, 1:-1] = torch.arange(num_images * num_patches, device=device).view(num_images, -1)
        zeros_BT = torch.zeros_like(ids_BT)
        first_tokens = torch.stack((torch.arange(num_images), torch.zeros(num_images, dtype=torch.long)), dim=1)
        output = self.model(
            input_ids_BT=ids_BT,
            position_ids_2BT=image_positions((rows, columns)).to(device)[:, None].expand(-1, num_images, -1),
            sample_index_BT=zeros_BT,
            branch_ids_BT=zeros_BT,
            in_image_BT=torch.ones_like(ids_BT, dtype=torch.bool),
            patch_index_BT=patch_index_BT,
            prompt_ids_BT=torch.full_like(ids_BT, -1),
            patches_SK=tiles.reshape(num_images * num_patches, -1),
            grids=[(rows, columns)] * num_images,
            # Pixel features are made for images with masks: every image gets one query, which nobody reads.
            seg_positions_N2=first_tokens.to(device),
            masks_per_image=[1] * num_images,
            logit_positions_M2=torch.zeros(0, 2, dtype=torch.long, device=device),
        )
        assert output.pixel_features is not None
        maps = [feature for feature in output.pixel_features if feature is not None]
        return torch.stack(maps).permute(0, 3, 1, 2)


def ours(weights: str) -> Recipe:
    """Return the recipe of an exported folder. Raises: DataError."""
    folder = Path(weights)
    if not (folder / "config.json").is_file():
        raise DataError(f"experts: ours: {folder} holds no config.json; expected the `export` folder of a run")
    config = PixelSailConfig.from_pretrained(folder)

    def load() -> nn.Module:
        return PixelMap(load_model(folder))

    return Recipe(
        kind="ours",
        channels=config.mask_dim,
        preprocessing=Preprocessing(
            resize=PatchMultiple(patch_size=config.patch_size, max_long_side=config.max_long_side),
            mean=PIXEL_MEAN,
            std=PIXEL_STD,
        ),
        weights=file_hashes(folder),
        build=load,
    )
