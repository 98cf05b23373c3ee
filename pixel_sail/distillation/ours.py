"""An exported Pixel-SAIL model as a teacher: its projected pixel map.

`configs/distillation/ours.yaml` names `ours` below, with the `export` folder of a larger run. Image tokens attend only
to each other, so the features do not depend on text. An image of 128 x 128 in a model with patches of 16, stride 4 and
mask_dim 128 gives [128, 32, 32].
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pixel_sail.distillation.preprocess import AreaMultiple, PatchMultiple, Preprocessing
from pixel_sail.distillation.teacher import TeacherSpec
from pixel_sail.distillation.weights import file_hashes
from pixel_sail.model.configuration_pixel_sail import PixelSailConfig
from pixel_sail.model.folder import MODEL_CONFIG, check_no_code
from pixel_sail.model.image_layout import image_span
from pixel_sail.model.kernels import Kernels
from pixel_sail.model.modeling_pixel_sail import PixelSailForSegmentation, load_model
from pixel_sail.model.patches import CLIP_MEAN, CLIP_STD, PIXEL_MEAN, PIXEL_STD
from pixel_sail.model.processing_pixel_sail import PixelSailProcessor
from pixel_sail.model.tokenization import IMAGE_TOKENS
from pixel_sail.types import DataError, SizeHW


class PixelMap(nn.Module):
    """Pixel features of images without text."""

    def __init__(self, model: PixelSailForSegmentation, lead_ids: Sequence[int] = ()) -> None:
        """`lead_ids`: the text that the model's template puts before an image."""
        super().__init__()
        self.model = model
        # The map itself is needed, not only its product with a query.
        model.use(Kernels(mask_head="maps"))
        self.lead_ids = tuple(lead_ids)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Return the pixel features [B, E, Y, X] of normalized images whose sides are multiples of the patch size."""
        config, device = self.model.config, pixels_B3HW.device
        size, num_images = config.patch_size, len(pixels_B3HW)
        rows, columns = (side // size for side in pixels_B3HW.shape[2:])
        tiles = pixels_B3HW.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
        num_patches = rows * columns
        image_ids = [config.token_id(token) for token in IMAGE_TOKENS]
        span = image_span(config.base, (rows, columns), image_ids, self.lead_ids)
        ids_BT = span.token_ids_S.to(device).expand(num_images, -1)
        own_BT = span.patch_index_S.to(device).expand(num_images, -1)
        first_B1 = num_patches * torch.arange(num_images, device=device)[:, None]
        patch_index_BT = torch.where(own_BT >= 0, own_BT + first_B1, -1)
        zeros_BT = torch.zeros_like(ids_BT)
        first_tokens = torch.stack((torch.arange(num_images), torch.zeros(num_images, dtype=torch.long)), dim=1)
        output = self.model(
            input_ids_BT=ids_BT,
            position_ids_2BT=span.position_ids_2S.to(device)[:, None].expand(-1, num_images, -1),
            sample_index_BT=zeros_BT,
            branch_ids_BT=zeros_BT,
            in_image_BT=torch.full_like(ids_BT, config.attention == "prefix", dtype=torch.bool),
            patch_index_BT=patch_index_BT,
            prompt_ids_BT=torch.full_like(ids_BT, -1),
            patches_SK=tiles.reshape(num_images * num_patches, -1),
            grids=[(rows, columns)] * num_images,
            # Pixel features are computed for images with masks only, so every image gets one unused query.
            seg_positions_N2=first_tokens.to(device),
            masks_per_image=[1] * num_images,
            logit_positions_M2=torch.zeros(0, 2, dtype=torch.long, device=device),
        )
        assert output.pixel_features is not None
        maps = [feature for feature in output.pixel_features if feature is not None]
        return torch.stack(maps).permute(0, 3, 1, 2)


def ours(weights: str) -> TeacherSpec:
    """Return the spec of an exported folder. Raises: DataError."""
    folder = Path(weights)
    if not (folder / "config.json").is_file():
        raise DataError(f"distillation: ours: {folder} holds no config.json; expected the `export` folder of a run")
    check_no_code(folder, MODEL_CONFIG)
    config = PixelSailConfig.from_pretrained(folder)

    is_eve = config.base == "eve"
    resize: Callable[[SizeHW], SizeHW] = PatchMultiple(patch_size=config.patch_size, max_long_side=config.max_long_side)
    if is_eve:
        resize = AreaMultiple(patch_size=config.patch_size, side=config.max_long_side)

    def load() -> nn.Module:
        lead_ids = PixelSailProcessor.from_pretrained(folder).lead_ids if is_eve else []
        return PixelMap(load_model(folder), lead_ids)

    return TeacherSpec(
        kind="ours",
        channels=config.mask_dim,
        preprocessing=Preprocessing(
            resize=resize,
            mode="bicubic" if is_eve else "bilinear",
            mean=CLIP_MEAN if is_eve else PIXEL_MEAN,
            std=CLIP_STD if is_eve else PIXEL_STD,
        ),
        weights=file_hashes(folder),
        build=load,
    )
