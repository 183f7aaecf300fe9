"""A recipe with everything in it."""

from typing import Any

RECIPE: dict[str, Any] = {
    "policy": {"name": "timm_rand_augment", "magnitude": 9.0, "magnitude_std": 0.5, "interpolation": "bilinear"},
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "prob": 0.8},
    "grayscale_prob": 0.2,
    "gaussian_blur_prob": 0.3,
    "solarize_prob": 0.2,
    "cutout": 8,
    "erasing": {"prob": 0.5, "max_count": 2},
    "mixing": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "elem"},
    "label_smoothing": 0.1,
}
