"""The model: `configuration_pixel_sail`, `image_embedding`, `decoder`, `mask_head`, `modeling_pixel_sail`,
`generation`.

It imports nothing else of pixel_sail than `types`, so that a checkpoint can be used without the training code.
"""
